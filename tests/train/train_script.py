"""A short run with everything that has state, started by the tests that kill it.

Imported once by a process that then forks children: a child trains, the parent kills it.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from train_fakes import TASKS, TinyModel, rows_of

from polytask.train.config import StageConfig, TrainConfig
from polytask.train.loader import FunctionLoader
from polytask.train.trainer import Trainer

BATCH = 6
CONFIG = TrainConfig(
    stages=(
        StageConfig(name="all", steps=17, schedule="wsd"),
        StageConfig(name="heads", steps=13, freeze=("trunk.0.*",), lr=3e-3),
    ),
    batch_size=2 * BATCH,
    accumulate=2,
    lr=1e-2,
    ema=0.9,
    weighting="dynamic",
    weighting_every=4,
    checkpoint_every=4,
    log_every=3,
    seed=5,
    progress=False,
)


class LearningLoader(FunctionLoader):
    """Rows shift with the losses seen so far, as with a policy that adapts: state that matters."""

    def __init__(self) -> None:
        super().__init__(TASKS, self._make, rows_per_epoch=64)
        self.learns = True
        self.shift = 0

    def _make(self, index: int) -> Any:
        return rows_of(index * BATCH + self.shift, BATCH)

    def observe(self, step: int, losses: Any) -> None:
        self.shift += int(np.nansum(losses) * 1000) % 7

    def state(self) -> dict[str, Any]:
        return {"shift": self.shift}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.shift = state["shift"]


def disturb(trainer: Trainer, step: int) -> None:
    """A callback that uses the global generators and lets the weights depend on them."""
    noise = np.random.rand() + random.random()  # noqa: NPY002
    with torch.no_grad():
        trainer.model.heads[0].bias.add_(noise * 1e-3)  # type: ignore[union-attr]


def evaluate(model: Any, step: int) -> dict[str, dict[str, float]]:
    with torch.no_grad():
        terms = model.terms(rows_of(10_000, 12))
    return {task: {"mse": float(terms.value["mse"].mean())} for task in TASKS}


def train(folder: Path, config: TrainConfig = CONFIG, seed: int = 0) -> tuple[Any, str]:
    """Train (or go on); returns the result and a digest of every bit of the final weights."""
    torch.set_num_threads(1)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    model = TinyModel(dropout=0.2)
    loader = LearningLoader()
    trainer = Trainer(model, loader, config, folder, evaluator=evaluate, callbacks=[disturb])
    result = trainer.fit()
    return result, digest(model)


def digest(model: torch.nn.Module) -> str:
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(name.encode())
        total.update(tensor.numpy().tobytes())
    return total.hexdigest()


def in_child(work: Callable[[], str]) -> tuple[int, int]:
    """Fork; the child does `work` and writes its string to a pipe. Returns (pid, read end)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    code = 1
    try:
        os.close(reader)
        os.write(writer, work().encode())
        code = 0
    finally:
        os._exit(code)


def finish(child: tuple[int, int]) -> str:
    """Wait for a child and return what it wrote ('' if it was killed)."""
    pid, reader = child
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


def kill_at_write(number: int, folder: Path) -> None:
    """Arrange that this process kills itself at its `number`-th write-like call in the folder."""
    count = 0

    def strike() -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"):
            path = args[0]
            if isinstance(path, (str, bytes, os.PathLike)) and str(folder) in str(path):
                strike()

    for name in ("fsync", "write", "ftruncate"):
        original = getattr(os, name)

        def wrapped(*args: Any, original: Any = original) -> Any:
            strike()
            return original(*args)

        setattr(os, name, wrapped)
    sys.addaudithook(audit)


def random_kills(base: Path, points: int, seed: int) -> list[str]:
    """Kill runs at random times until `points` kills hit; returns complaints (none is good)."""
    expected = finish(in_child(lambda: train(base / "whole")[1]))
    begun = time.perf_counter()
    finish(in_child(lambda: train(base / "timed")[1]))
    whole = time.perf_counter() - begun
    dice = random.Random(seed)
    complaints, hits = [], 0
    folder, run = base / "killed-0", 0
    while hits < points:
        child = in_child(lambda folder=folder: train(folder)[1])  # type: ignore[misc]
        time.sleep(dice.random() * whole)
        os.kill(child[0], signal.SIGKILL)
        if finish(child) == "":
            hits += 1
        if dice.random() < 0.4:  # often several kills in a row before a run may finish
            found = finish(in_child(lambda folder=folder: train(folder)[1]))  # type: ignore[misc]
            if found != expected:
                complaints.append(f"{folder.name}: {found or 'failed'} is not {expected}")
            run += 1
            folder = base / f"killed-{run}"
    return complaints


def kills_at_every_write(base: Path, first: int, last: int) -> list[str]:
    """Kill at each write-like call from `first` to `last`; every run must end the same."""
    expected = finish(in_child(lambda: train(base / "whole")[1]))
    complaints = []
    for number in range(first, last + 1):
        folder = base / f"write-{number}"

        def doomed(folder: Path = folder, number: int = number) -> str:
            kill_at_write(number, folder)
            return train(folder)[1]

        if finish(in_child(doomed)) != "":
            complaints.append(f"there was no write number {number}")
        found = finish(in_child(lambda folder=folder: train(folder)[1]))  # type: ignore[misc]
        if found != expected:
            complaints.append(f"killed at write {number}: {found or 'failed'} is not {expected}")
    return complaints


def warm_up() -> None:
    """Import what training imports lazily, so that forked children start at once. No backward
    pass: autograd's threads do not survive a fork."""
    import accelerate  # noqa: F401
    import safetensors.torch  # noqa: F401

    model = TinyModel()
    Trainer(model, LearningLoader(), CONFIG, "unused")
    torch.optim.AdamW(model.parameters(), fused=True).zero_grad()


if __name__ == "__main__":
    mode, where, *rest = sys.argv[1:]
    torch.set_num_threads(1)
    warm_up()
    job = {"random": random_kills, "writes": kills_at_every_write}[mode]
    for complaint in job(Path(where), *map(int, rest)):
        print(complaint)
    print("done")
