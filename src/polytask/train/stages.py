"""Stages: which parameters train, by name patterns that must all match something.

A pattern that matches nothing is nearly always a misspelling that would silently train the wrong
part, so it is an error; what trains and what is frozen is reported with counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from polytask.errors import ConfigError, suggestion
from polytask.train.config import StageConfig, TrainConfig
from polytask.train.loader import BatchSource, Span

V = TypeVar("V")


def matching(names: Sequence[str], patterns: Sequence[str], where: str) -> set[str]:
    """The names that match any pattern; `ConfigError` for a pattern that matches none.

    >>> sorted(matching(["trunk.w", "trunk.b", "head.w"], ["trunk.*"], "freeze"))
    ['trunk.b', 'trunk.w']
    """
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            raise ConfigError(
                f"{where}: pattern '{pattern}' matches no parameter.{_hint(pattern, names)}"
            )
        found |= hits
    return found


def _hint(pattern: str, names: Sequence[str]) -> str:
    """The nearest parameter name, or the nearest prefix when the pattern is about a module."""
    prefixes = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, 8)}
    stem = pattern.strip("*").strip(".")
    return suggestion(stem, prefixes if "*" in pattern else names)


def first_match(name: str, table: Mapping[str, V]) -> V | None:
    """The value of the first pattern that matches `name`."""
    return next((value for pattern, value in table.items() if fnmatchcase(name, pattern)), None)


@dataclass(frozen=True)
class Frozen:
    """What a stage trains: for the log."""

    stage: str
    trains: tuple[str, ...]
    frozen: tuple[str, ...]
    trained_numbers: int
    frozen_numbers: int

    def event(self) -> dict[str, Any]:
        return {
            "event": "stage",
            "stage": self.stage,
            "trained_tensors": len(self.trains),
            "trained_numbers": self.trained_numbers,
            "frozen_tensors": len(self.frozen),
            "frozen_numbers": self.frozen_numbers,
            "trains": _modules(self.trains),
            "frozen": _modules(self.frozen),
        }


def _modules(names: Sequence[str]) -> list[str]:
    """Top modules with their counts: short enough to read."""
    counts: dict[str, int] = {}
    for name in names:
        top = ".".join(name.split(".")[:2])
        counts[top] = counts.get(top, 0) + 1
    return [f"{top} ({count})" for top, count in counts.items()]


def freeze(model: nn.Module, stage: StageConfig) -> Frozen:
    """Set `requires_grad` as the stage says; at least one parameter has to train."""
    parameters = dict(model.named_parameters())
    names = list(parameters)
    where = f"stage '{stage.name}'"
    trains = matching(names, stage.train, f"{where}, train")
    trains -= matching(names, stage.freeze, f"{where}, freeze")
    trains = {name for name in trains if parameters[name].is_floating_point()}
    if not trains:
        raise ConfigError(f"{where}: no parameter is left to train")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in trains)

    def split(keep: Callable[[str], bool]) -> tuple[tuple[str, ...], int]:
        chosen = tuple(name for name in names if keep(name))
        return chosen, sum(parameters[name].numel() for name in chosen)

    on, on_numbers = split(lambda name: name in trains)
    off, off_numbers = split(lambda name: name not in trains)
    return Frozen(stage.name, on, off, on_numbers, off_numbers)


@dataclass(frozen=True)
class Leg:
    """A stage with its place in the run: steps `start` to `stop`."""

    index: int
    start: int
    stop: int
    config: StageConfig


def legs(stages: Sequence[StageConfig]) -> tuple[Leg, ...]:
    """The stages one after another."""
    result, start = [], 0
    for index, stage in enumerate(stages):
        result.append(Leg(index, start, start + stage.steps, stage))
        start += stage.steps
    return tuple(result)


def plan_run(config: TrainConfig, loader: BatchSource) -> tuple[Leg, ...]:
    """The stages, told to the loader; cut short where a mixture's stopping rule ends the data."""
    stages = list(config.plan(loader.rows_per_epoch))
    limit = loader.total_rows
    if limit is not None and not config.stages:
        steps = limit // config.batch_size
        if not steps:
            raise ConfigError(
                f"the mixture ends after {limit} rows, before the first batch of "
                f"{config.batch_size}"
            )
        stages = [s.model_copy(update={"steps": min(s.steps, steps)}) for s in stages]
    planned = legs(stages)
    micro = config.accumulate
    loader.plan([Span(leg.config.tasks, leg.start * micro, leg.stop * micro) for leg in planned])
    return planned


def switch_on_checkpointing(model: Any) -> None:
    """Turn on gradient checkpointing the way the model offers it: by method, or by a switch on
    some of its modules."""
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable()
        return
    parts: list[Any] = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    if not parts:
        raise ConfigError(
            f"'gradient_checkpointing': {type(model).__name__} has neither a method "
            "'gradient_checkpointing_enable' nor a module with a 'gradient_checkpointing' switch"
        )
    for part in parts:
        part.gradient_checkpointing = True
