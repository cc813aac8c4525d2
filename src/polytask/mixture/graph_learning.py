"""Learn a skill graph from short training runs (Chen et al., 2023, arXiv 2307.14430, appendix).

    pairwise   train H steps on j alone, and H steps on every pair {i, j} in equal shares;
               A[i, j] = (own loss of j - its loss with i) / own loss, where that is positive:
               the pair sees half as much of j, so an edge says that i is worth as much as j itself
    single     train H steps on i alone;
               A[i, j] = (loss of j at the start - after training on i) / loss at the start,
               where that is positive. One run per skill, and the only way out of domain, where an
               evaluation skill has no rows to train on

The diagonal is in both modes what a skill does for itself. Who trains is the caller's business:
`train_fn` starts every run at the same weights and draws the same rows of a skill in the same
order, so that runs differ in the mixture alone. The mixture module knows no framework.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from polytask import files
from polytask.errors import ConfigError, NonFiniteError, suggestion
from polytask.mixture.skills import SkillGraph

GraphMode = Literal["pairwise", "single"]
TrainFn = Callable[[Mapping[str, float], int], Mapping[str, float]]
"""(shares of the skills trained on, steps) -> validation loss of every evaluation skill, of a model
trained from the common start. Zero steps: the losses of the start itself."""


@dataclass(frozen=True)
class LearnedGraph:
    """A graph and where it comes from."""

    graph: SkillGraph
    mode: GraphMode
    steps: int  # of each run
    losses: Mapping[str, Mapping[str, float]]  # run (its skills as JSON, or 'start') -> losses

    @property
    def runs(self) -> int:
        """Training runs made."""
        return len(self.losses) - ("start" in self.losses)

    @property
    def total_steps(self) -> int:
        """What the graph cost: steps of all runs together."""
        return self.runs * self.steps

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "mode": self.mode,
            "steps": self.steps,
            "runs": self.runs,
            "total_steps": self.total_steps,
            "losses": {run: dict(found) for run, found in self.losses.items()},
        }

    def save(self, path: Path | str) -> None:
        """Write the graph with its origin, as `SkillGraph.load` reads it."""
        self.graph.save(path, self.to_dict())


def learn_graph(
    train_fn: TrainFn,
    skills: Sequence[str],
    steps: int,
    mode: GraphMode = "pairwise",
    *,
    eval_skills: Sequence[str] | None = None,
    cache: Path | None = None,
    say: Callable[[str], None] | None = None,
) -> LearnedGraph:
    """Train as the mode asks and read the edges off the losses.

    Args:
        train_fn: see `TrainFn`.
        skills: what can be trained on.
        steps: of every run.
        mode: 'pairwise' makes k + k (k - 1) / 2 runs, 'single' k.
        eval_skills: what is judged, where that differs from `skills` (mode 'single').
        cache: a JSON file with the losses so far; an interrupted call goes on from it.
        say: is told before every run.

    Raises `ConfigError` for settings or losses that do not fit, `NonFiniteError` naming run and
    skill of a loss that is negative or not finite.
    """
    names = tuple(skills)
    judged = names if eval_skills is None else tuple(eval_skills)
    _check(names, judged, steps, mode)
    book = _Book(train_fn, judged, steps, cache, say or (lambda text: None), len(names), mode)
    start = book.losses(())
    alone = {name: book.losses((name,)) for name in names}
    A = np.zeros((len(names), len(judged)))
    for (i, one), (j, other) in itertools.product(enumerate(names), enumerate(judged)):
        if mode == "single" or one == other:
            before, after = start[other], alone[one][other]
        else:
            pair = tuple(n for n in names if n in (one, other))
            before, after = alone[other][other], book.losses(pair)[other]
        A[i, j] = max(0.0, (before - after) / before) if before > 0 else 0.0
    graph = SkillGraph(A, names, judged)
    graph.warn_if_flat()
    return LearnedGraph(graph, mode, steps, book.known)


def _check(names: Sequence[str], judged: Sequence[str], steps: int, mode: str) -> None:
    if mode not in ("pairwise", "single"):
        raise ConfigError(f"graph mode '{mode}'.{suggestion(mode, ('pairwise', 'single'))}")
    if steps < 1:
        raise ConfigError(f"a graph is learned from runs of at least one step, not {steps}")
    if not names or len(set(names)) != len(names):
        raise ConfigError("a graph needs skills of different names")
    if mode == "pairwise" and tuple(names) != tuple(judged):
        raise ConfigError(
            "mode 'pairwise' trains on every skill that is judged; evaluation skills without "
            "training rows need mode 'single'"
        )


class _Book:
    """Runs made so far, in memory and on file."""

    def __init__(
        self,
        train_fn: TrainFn,
        judged: Sequence[str],
        steps: int,
        cache: Path | None,
        say: Callable[[str], None],
        skills: int,
        mode: str,
    ) -> None:
        self.train_fn, self.judged, self.steps = train_fn, judged, steps
        self.cache, self.say = cache, say
        pairs = skills * (skills - 1) // 2 if mode == "pairwise" else 0
        self.planned = skills + pairs
        self.known = self._read()

    def _read(self) -> dict[str, dict[str, float]]:
        if self.cache is None or not self.cache.is_file():
            return {}
        try:
            record = json.loads(self.cache.read_text(encoding="utf-8"))
            found: dict[str, dict[str, float]] = record["losses"]
            if record["steps"] != self.steps:
                raise ConfigError(
                    f"{self.cache} holds runs of {record['steps']} steps, not {self.steps}: delete "
                    "it to start over"
                )
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.cache} cannot be read ({error}): delete it to start over"
            ) from error
        return found

    def losses(self, skills: tuple[str, ...]) -> dict[str, float]:
        run = json.dumps(skills, ensure_ascii=False) if skills else "start"
        if run not in self.known:
            if skills:
                done = len([r for r in self.known if r != "start"])
                self.say(
                    f"skill graph: {self.steps} steps on {' and '.join(skills)} "
                    f"({done + 1}/{self.planned})"
                )
            shares = {name: 1 / len(skills) for name in skills}
            found = self.train_fn(shares, self.steps if skills else 0)
            self.known[run] = {n: self._checked(run, n, found) for n in self.judged}
            if self.cache is not None:
                files.write_json(self.cache, {"steps": self.steps, "losses": self.known})
        return self.known[run]

    def _checked(self, run: str, name: str, found: Mapping[str, float]) -> float:
        if name not in found:
            raise ConfigError(f"train_fn gave no loss for '{name}' (has: {', '.join(found)})")
        loss = float(found[name])
        if not math.isfinite(loss) or loss < 0:
            raise NonFiniteError(
                f"skill graph: after the run '{run}' the loss of '{name}' is {loss}; it should be "
                "a finite number >= 0"
            )
        return loss
