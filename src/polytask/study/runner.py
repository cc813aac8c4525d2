"""`prove`: run every arm with paired seeds under one budget and judge the claims.

    for seed in seeds:
        for arm in arms:
            result = cached(arm, seed) or arm.run(seed, budget)
        assert budgets equal within tolerance          # else the proof fails, saying where
    differences per seed -> intervals -> verdicts -> Evidence

A call that is interrupted or killed goes on where it was: finished results are on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from polytask.errors import ConfigError, UserError
from polytask.study.budget import BudgetCheck, check_pair, widest
from polytask.study.cache import default_folder
from polytask.study.collect import Collected, Executor, Progress, collect
from polytask.study.evidence import ArmRecord, Evidence, Trial
from polytask.study.judge import judge_all, overall, warnings
from polytask.study.records import Provable, Size, Study, study_of
from polytask.study.versions import environment


def prove(
    system: Provable | Study,
    seeds: int = 5,
    seed_base: int = 0,
    size: Size = "full",
    workers: int = 0,
    *,
    threads: int | None = None,
    backend: Any = "processes",
    cache: Path | None = None,
    code: str | None = None,
    on_result: Callable[[Progress], None] | None = None,
) -> Evidence:
    """Judge a system's claims over the seeds seed_base, ..., seed_base + seeds - 1.

    workers: 0 runs in this process, n in n processes side by side; backend 'ray' uses a cluster.
    threads: per process. cache: folder of finished results. code: a version to key them with,
    instead of the hash of the source. on_result: told after each.

    Returns `Evidence`; write it with `evidence.write(folder)`. Errors: `BudgetError` when arms
    spent unequal budgets, `ArmError` when an arm failed, `UserError` for fewer than two seeds.
    """
    study = system if isinstance(system, Study) else study_of(system, size)
    _check(study, seeds, seed_base)
    started, clock = datetime.now(UTC), time.perf_counter()
    executor = Executor(workers, threads, backend)
    chosen = list(range(seed_base, seed_base + seeds))
    checks: list[BudgetCheck] = []

    def check(found: Collected, seed: int) -> None:
        checks.extend(_new_checks(study, found, seed, checks))

    found = collect(
        study.name,
        list(study.arms.values()),
        chosen,
        study.budget,
        study.size,
        cache or default_folder(),
        executor,
        code,
        on_result,
        check,
    )
    arms = {name: _record(study, name, chosen, found) for name in study.arms}
    judged = study.size == "full"
    judgements = judge_all(study.claims, arms, study.correction, judged)
    verdict, reason = overall(judgements)
    return Evidence(
        name=study.name,
        title=study.title,
        size=study.size,
        verdict=verdict,
        reason=reason,
        seeds=chosen,
        arms=arms,
        judgements=judgements,
        budget=study.budget,
        budget_checks=widest(checks),
        correction=study.correction,
        environment={**environment(), "workers": workers, "threads": executor.threads_each},
        code=found.code,
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - clock, 3),
        reused=found.reused,
        warnings=warnings(judgements, arms),
        tuning=study.tuning,
        notes=dict(study.notes),
    )


def _check(study: Study, seeds: int, seed_base: int) -> None:
    """Faults that can be seen before anything runs."""
    if not study.arms or not study.claims:
        raise ConfigError(f"study '{study.name}' has no arms or no claims: nothing can be shown")
    if not any(claim.kind == "claim" for claim in study.claims):
        raise ConfigError(f"study '{study.name}' has ablations but no claim")
    least = 2 if study.size == "full" else 1
    if seeds < least:
        raise UserError(
            f"study '{study.name}': {seeds} seed(s) given, at least {least} needed"
            + (": one pair has no spread, so no interval" if least == 2 else "")
        )
    if study.tuning is not None:
        shared = set(study.tuning.seeds) & set(range(seed_base, seed_base + seeds))
        if shared:
            raise ConfigError(
                f"study '{study.name}': seeds {sorted(shared)} were used for tuning; judge on "
                "fresh ones (seed_base)"
            )


def _new_checks(
    study: Study, found: Collected, seed: int, known: list[BudgetCheck]
) -> list[BudgetCheck]:
    """Budget checks of the claims whose pair has just become complete for `seed`."""
    done = {(c.better, c.than, c.seed) for c in known}
    new = []
    for claim in study.claims:
        key = (claim.better, claim.than, seed)
        better = found.results.get((claim.better, seed))
        than = found.results.get((claim.than, seed))
        if better is not None and than is not None and key not in done:
            new += check_pair(claim, study.equal, better.spent, than.spent, seed)
    return new


def _record(study: Study, name: str, seeds: list[int], found: Collected) -> ArmRecord:
    arm = study.arms[name]
    trials = []
    for seed in seeds:
        result = found.results[name, seed]
        trials.append(Trial(seed, result.metrics, result.spent, result.notes))
    return ArmRecord(dict(arm.params), trials, arm.note)
