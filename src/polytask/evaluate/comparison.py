"""One multitask model against one model per task: the headline of a run.

Per task the gain (positive = multitask better) of the primary metric and its paired bootstrap
interval over test rows; over all tasks

    delta_m = 1/T sum_t (-1)^[lower is better] (M_multi,t - M_single,t) / |M_single,t|

(Maninis et al. 2019, arXiv 1904.08918), as a share. Tasks that label the same rows are resampled
together, so that what their errors have in common stays in. `compare_seeds` has Student's t over
seeds instead: rows measure this model, seeds measure the method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from polytask import rng
from polytask.errors import UserError
from polytask.evaluate.intervals import Interval, percentile_limits, resampled, t_interval
from polytask.evaluate.metric import Floats
from polytask.evaluate.scored import TaskScore

RESAMPLES = 2000
Scores = Mapping[str, TaskScore]


@dataclass(frozen=True)
class TaskGain:
    """One task: both values, the gain in units of the metric, and relative to single-task."""

    task: str
    metric: str
    higher_is_better: bool
    multitask: float
    single: float
    gain: Interval
    relative: Interval


@dataclass(frozen=True)
class Comparison:
    """All tasks, and delta_m. `left_out`: tasks without a relative gain (single-task metric 0 or
    undefined), which delta_m therefore lacks."""

    tasks: tuple[TaskGain, ...]
    delta_m: Interval
    over: str  # 'rows' or 'seeds'
    left_out: tuple[str, ...] = ()
    spent: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def compare_single(
    multitask: Scores,
    single: Scores,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    spent: Mapping[str, tuple[float, float]] | None = None,
    tolerance: float = 0.02,
) -> Comparison:
    """Compare on the rows both were judged on; the same tasks and rows on both sides.

    spent: quantity -> (multitask, all single-task models together), which must be equal up to
    `tolerance` (a share of the larger), or the comparison is refused.
    """
    _check_spent(spent or {}, tolerance)
    pairs = {name: _paired(name, multitask, single) for name in multitask}
    if not pairs:
        raise UserError("there is no task to compare")
    drawn: dict[str, tuple[Floats, Floats]] = {}
    for key, names in _together(pairs).items():
        own = rng.derive(seed, key)  # other rows, other draws
        drawn |= _draws({name: pairs[name] for name in names}, resamples, own)
    gains, relative_draws, left_out = [], [], []
    for name, (a, b) in pairs.items():
        sign = 1.0 if a.higher_is_better else -1.0
        multi_draws, single_draws = drawn[name]
        gap = sign * (multi_draws - single_draws)
        share = _relative(gap, single_draws)
        here = sign * (a.value - b.value)
        relative = _interval(_relative_one(here, b.value), share, a.n, confidence)
        gains.append(
            TaskGain(
                name,
                a.primary,
                a.higher_is_better,
                a.value,
                b.value,
                _interval(here, gap, a.n, confidence),
                relative,
            )
        )
        if np.isfinite(relative.mean):
            relative_draws.append(share)
        else:
            left_out.append(name)
    kept = [g.relative.mean for g in gains if np.isfinite(g.relative.mean)]
    mean = float(np.mean(kept)) if kept else float("nan")
    draws = np.mean(relative_draws, axis=0) if relative_draws else np.full(resamples, np.nan)
    rows = min(a.n for a, _ in pairs.values())
    return Comparison(
        tuple(gains),
        _interval(mean, draws, rows, confidence),
        "rows",
        tuple(left_out),
        dict(spent or {}),
    )


def compare_seeds(
    multitask: Sequence[Scores], single: Sequence[Scores], confidence: float = 0.95
) -> Comparison:
    """The same over paired seeds: means, and Student's t intervals of the paired differences."""
    if len(multitask) != len(single) or len(multitask) < 2:
        raise UserError(
            f"{len(multitask)} multitask and {len(single)} single-task runs: give one of each "
            "per seed, for at least two seeds"
        )
    gains, per_seed, left_out = [], [], []
    for name, first in multitask[0].items():
        sign = 1.0 if first.higher_is_better else -1.0
        a = np.array([scores[name].value for scores in multitask])
        b = np.array([_find(name, scores).value for scores in single])
        gap = sign * (a - b)
        share = _relative(gap, b)
        gains.append(
            TaskGain(
                name,
                first.primary,
                first.higher_is_better,
                float(a.mean()),
                float(b.mean()),
                _t(gap, confidence),
                _t(share, confidence),
            )
        )
        if np.isfinite(share).all():
            per_seed.append(share)
        else:
            left_out.append(name)
    mean = np.mean(per_seed, axis=0) if per_seed else np.full(len(multitask), np.nan)
    return Comparison(tuple(gains), _t(mean, confidence), "seeds", tuple(left_out))


def delta_m(
    multitask: Mapping[str, float],
    single: Mapping[str, float],
    higher_is_better: Mapping[str, bool],
) -> float:
    """Mean relative improvement as a share, from plain numbers."""
    values = [
        _relative_one(
            (1.0 if higher_is_better[name] else -1.0) * (multitask[name] - single[name]),
            single[name],
        )
        for name in multitask
    ]
    return float(np.mean(values))


def _check_spent(spent: Mapping[str, tuple[float, float]], tolerance: float) -> None:
    for quantity, (a, b) in spent.items():
        gap = abs(a - b) / max(a, b) if max(a, b) > 0 else 0.0
        if gap > tolerance:
            raise UserError(
                f"unequal budgets: {quantity} {a:.10g} (multitask) against {b:.10g} (single-task "
                f"models together), a gap of {gap:.1%}; allowed is {tolerance:.1%}"
            )


def _find(name: str, scores: Scores) -> TaskScore:
    if name not in scores:
        raise UserError(f"there is no single-task score of '{name}' to compare with")
    return scores[name]


def _paired(name: str, multitask: Scores, single: Scores) -> tuple[TaskScore, TaskScore]:
    a, b = multitask[name], _find(name, single)
    if a.primary != b.primary:
        raise UserError(f"task '{name}' is judged by '{a.primary}' and by '{b.primary}'")
    if not np.array_equal(a.rows, b.rows):
        raise UserError(f"task '{name}' was judged on different rows: {a.n} and {b.n} of them")
    if a.n == 0:
        raise UserError(f"task '{name}' has no labelled rows to compare on")
    return a, b


def _together(pairs: Mapping[str, tuple[TaskScore, TaskScore]]) -> dict[str, list[str]]:
    """Tasks of one row group whose metrics are sums are resampled together."""
    groups: dict[str, list[str]] = {}
    for name, (a, b) in pairs.items():
        sums = a.primary in a.statistics and b.primary in b.statistics
        key = f"group {a.group}" if sums and a.group else f"task {name}"
        groups.setdefault(key, []).append(name)
    return groups


def _draws(
    pairs: Mapping[str, tuple[TaskScore, TaskScore]], resamples: int, seed: int
) -> dict[str, tuple[Floats, Floats]]:
    """Per task both metrics on the same resamples of rows."""
    name, (a, b) = next(iter(pairs.items()))
    if a.primary not in a.statistics or b.primary not in b.statistics:
        return {name: (a.draws(a.primary, resamples, seed), b.draws(b.primary, resamples, seed))}
    rows = np.unique(np.concatenate([a.rows for a, _ in pairs.values()]))
    columns: list[Floats] = []
    for a, b in pairs.values():
        for score in (a, b):
            own = score.statistics[score.primary]
            wide = np.zeros((len(rows), own.shape[1]))  # a row without this label adds nothing
            wide[np.searchsorted(rows, score.rows)] = own
            columns.append(wide)
    ends = np.cumsum([column.shape[1] for column in columns])
    sums = resampled(np.concatenate(columns, axis=1), lambda s: s, resamples, seed)
    parts = iter(np.split(sums, ends[:-1], axis=1))
    found = {}
    for name, (a, b) in pairs.items():
        both = []
        for score in (a, b):
            finish = score.metric(score.primary).finish
            assert finish is not None
            both.append(finish(next(parts)))
        found[name] = (both[0], both[1])
    return found


def _relative(gap: Floats, base: Floats) -> Floats:
    out: Floats = np.full(gap.shape, np.nan)
    np.divide(gap, np.abs(base), out=out, where=base != 0)
    return out


def _relative_one(gap: float, base: float) -> float:
    return gap / abs(base) if base else float("nan")


def _interval(mean: float, draws: Floats, n: int, confidence: float) -> Interval:
    low, high = percentile_limits(draws, n, confidence)
    return Interval(mean, low, high, confidence, n, "bootstrap")


def _t(values: Floats, confidence: float) -> Interval:
    if not np.isfinite(values).all():
        nothing = float("nan")
        return Interval(nothing, nothing, nothing, confidence, len(values), "t")
    return t_interval(values, confidence)
