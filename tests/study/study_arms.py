"""Arms for the tests: importable by name, so that spawned processes find them."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from polytask.rng import generator
from polytask.study import Budget, Result


@dataclass(frozen=True)
class Noisy:
    """Accuracy `mean` plus seed noise shared by all arms plus noise of its own; spends `rows`."""

    mean: float
    rows: float = 100
    own_noise: float = 0.01
    log: str = ""  # a folder: one empty file per call

    def __call__(self, seed: int, budget: Budget) -> Result:
        if self.log:
            (Path(self.log) / f"{self.mean}-{seed}-{os.getpid()}-{time.time_ns()}").touch()
        shared = generator(seed, "data").normal() * 0.5
        own = generator(seed, f"arm {self.mean}").normal() * self.own_noise
        return Result({"accuracy": self.mean + shared + own}, Budget(rows=self.rows))


def steps_as_asked(seed: int, budget: Budget) -> Result:
    return Result({"loss": 1.0 + 0.1 * seed}, Budget(steps=budget.steps))


def reports_pid_and_threads(seed: int, budget: Budget) -> Result:
    pid, threads = os.getpid(), int(os.environ.get("OMP_NUM_THREADS", "0"))
    return Result({"pid": pid, "threads": threads}, Budget(rows=1))


def raises(seed: int, budget: Budget) -> Result:
    raise ZeroDivisionError(f"boom at {seed}")


def dies(seed: int, budget: Budget) -> Result:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class Slow:
    """Leaves a mark when it begins, then takes a minute, unless the folder holds 'hurry'."""

    folder: str

    def __call__(self, seed: int, budget: Budget) -> Result:
        (Path(self.folder) / f"began-{seed}").touch()
        if seed and not (Path(self.folder) / "hurry").exists():
            time.sleep(60)
        return Result({"accuracy": float(seed)}, Budget(rows=1))


@dataclass(frozen=True)
class Bowl:
    """Best at lr = `at`; radius adds to it."""

    at: float
    lr: float
    radius: float = 0.0

    def __call__(self, seed: int, budget: Budget) -> Result:
        value = 1 - (self.lr - self.at) ** 2 + self.radius + 0.001 * seed
        return Result({"accuracy": value, "seed": seed}, Budget(rows=10))
