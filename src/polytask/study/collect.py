"""Gather the results of arms over seeds: what is finished is read, the rest is run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from polytask.errors import ConfigError
from polytask.study import cache
from polytask.study.execute import Job, run_here, run_processes, run_ray
from polytask.study.records import Arm, Budget, Result


@dataclass(frozen=True)
class Executor:
    """How jobs run. workers 0: one by one in this process; n: n processes side by side.

    threads: per process (or Ray task); None shares the machine's cores out over the workers.
    """

    workers: int = 0
    threads: int | None = None
    backend: Literal["processes", "ray"] = "processes"

    def __post_init__(self) -> None:
        if self.workers < 0:
            raise ConfigError(f"workers = {self.workers}: give 0 (this process) or more")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads = {self.threads}: give 1 or more")

    @property
    def threads_each(self) -> int:
        """Threads a job computes with."""
        return self.threads or max(1, (os.cpu_count() or 1) // max(1, self.workers))

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
        """Jobs with their results, as they finish."""
        if self.backend == "ray":
            return run_ray(jobs, self.threads_each)
        if self.workers == 0:
            return run_here(jobs)
        return run_processes(jobs, self.workers, self.threads_each)


@dataclass(frozen=True)
class Progress:
    """Told after every result: how far the study is, and what just came in."""

    done: int
    total: int
    arm: str
    seed: int
    result: Result
    reused: bool


@dataclass
class Collected:
    """Results by (arm, seed), and how many of them were found in the cache."""

    results: dict[tuple[str, int], Result] = field(default_factory=dict)
    reused: int = 0
    code: str = ""


def collect(
    study: str,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    budget: Budget,
    size: str,
    folder: Path,
    executor: Executor,
    code: str | None = None,
    on_result: Callable[[Progress], None] | None = None,
    check: Callable[[Collected, int], None] | None = None,
) -> Collected:
    """Every (arm, seed) once, seed by seed, so that pairs are complete early.

    `check(collected, seed)` is called after each result and may raise to stop the rest (unequal
    budgets, say). An interrupt leaves every finished result in `folder`.
    """
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ConfigError(f"seeds must be given and differ from each other, got {list(seeds)}")
    found = Collected(code=code or cache.code_version(arms))
    total = len(seeds) * len(arms)
    missing: list[Job] = []

    def add(arm: str, seed: int, result: Result, reused: bool) -> None:
        found.results[arm, seed] = result
        found.reused += reused
        if on_result is not None:
            on_result(Progress(len(found.results), total, arm, seed, result, reused))
        if check is not None:
            check(found, seed)

    for seed in seeds:
        for arm in arms:
            path = cache.result_path(folder, study, arm, seed, budget, size, found.code)
            known = cache.load(path)
            if known is None:
                missing.append(Job(arm, seed, budget, path))
            else:
                add(arm.name, seed, known, reused=True)
    if missing:
        with closing(executor.run(missing)) as finished:  # type: ignore[type-var]
            for job, result in finished:
                add(job.arm.name, job.seed, result, reused=False)
    return found
