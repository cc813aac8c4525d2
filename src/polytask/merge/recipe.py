"""What is to be merged, whichever file said so: models, parts of them, parameters by tensor.

Our own YAML (`config`) and mergekit's (`mergekit`) both become a `Recipe`; the plan knows nothing
else. A parameter may differ from tensor to tensor: a `Setting` gives its value by the tensor's name
and by how deep its layer lies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from polytask.errors import ConfigError
from polytask.merge.method import METHODS, Method, make_method

_NUMBER = re.compile(r"(?:^|(?<=\.))(\d+)(?=\.|$)")


@dataclass(frozen=True)
class Gradient:
    """Values spread evenly over the layers, first to last; between them numbers are interpolated,
    other values hold until the next (mergekit's rule)."""

    values: tuple[Any, ...]

    def at(self, t: float) -> Any:
        """The value at relative depth t in [0, 1]."""
        place = t * (len(self.values) - 1)
        low = math.floor(place)
        first, second = self.values[low], self.values[min(low + 1, len(self.values) - 1)]
        if not all(_number(value) for value in self.values):
            return first
        rest = place - low
        return (1 - rest) * first + rest * second


@dataclass(frozen=True)
class Case:
    """A value for the tensors whose name matches. `part`: that hold `pattern` (mergekit), else a
    pattern with * and ?; None: all."""

    value: Any
    pattern: str | None = None
    part: bool = False

    def covers(self, name: str) -> bool:
        if self.pattern is None:
            return True
        return self.pattern in name if self.part else fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class Setting:
    """Cases of one parameter; the first that covers a tensor counts."""

    cases: tuple[Case, ...]

    def at(self, name: str, t: float) -> Any:
        """The value for a tensor; None where no case covers it."""
        for case in self.cases:
            if case.covers(name):
                return case.value.at(t) if isinstance(case.value, Gradient) else case.value
        return None


Settings = Mapping[str, Setting]


@dataclass(frozen=True)
class ModelSpec:
    """A model as named: where it is, an adapter to apply, statistics it brings."""

    where: str
    name: str
    adapter: Path | None = None
    statistics: Path | None = None


@dataclass(frozen=True)
class Member:
    """A model's share in a part: its number, its first layer there, its own settings."""

    model: int
    first: int = 0
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Layers of the result made from the members alike. `layers` None: whole models."""

    members: tuple[Member, ...]
    layers: int | None = None
    settings: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what the merged model is.

    Attributes:
        method: name in `METHODS`, or 'passthrough' (copy, one model per part).
        models: all of them; `base` is a number of these or None.
        parts: one for whole models, several for slices of layers.
        settings: parameters for all tensors.
        heads: patterns of tensors that stay each model's own.
        dtype: of the result; None: as the base (without one, the first model) has it.
        vocabulary: 'refuse', 'base', 'union' or the name of a model.
        check_base: refuse models that were not trained from the base.
    """

    method: str
    models: tuple[ModelSpec, ...]
    base: int | None
    parts: tuple[Part, ...]
    settings: Settings = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    dtype: str | None = None
    vocabulary: str = "refuse"
    check_base: bool = True
    seed: int = 0
    shard_bytes: int = 5 * 10**9
    notes: tuple[str, ...] = ()
    said: Mapping[str, Any] = field(default_factory=dict)  # the YAML, for the model card

    def __post_init__(self) -> None:
        names = [model.name for model in self.models]
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ConfigError(f"two models are called '{twice}': give them a 'name' each")

    @property
    def experts(self) -> tuple[int, ...]:
        """Numbers of the models that are merged, in order."""
        return tuple(dict.fromkeys(m.model for part in self.parts for m in part.members))


def parameters(recipe: Recipe, part: Part, name: str, t: float) -> dict[str, Any]:
    """Values for one tensor of a part: the member's own, else the part's, else the recipe's."""
    factory = METHODS.get(recipe.method)
    found: dict[str, Any] = {}
    for key in factory.model_fields:
        shared = _first([part.settings, recipe.settings], key, name, t)
        if key in factory.per_model:
            own = [_first([m.settings], key, name, t) for m in part.members]
            if any(value is not None for value in own):
                default = factory.model_fields[key].default if shared is None else shared
                found[key] = tuple(
                    _spread(default, i, len(own), key) if value is None else value
                    for i, value in enumerate(own)
                )
                continue
        if shared is not None:
            found[key] = shared
    return found


def whole_method(recipe: Recipe, where: str) -> Method:
    """The method with the parameters that hold for all tensors; others keep their defaults."""
    return make_method(recipe.method, parameters(recipe, recipe.parts[0], "", 0.0), where)


def _spread(value: Any, number: int, count: int, key: str) -> Any:
    if isinstance(value, list | tuple):
        if len(value) != count:
            raise ConfigError(f"'{key}' has {len(value)} values for {count} models")
        return value[number]
    return value


def _first(places: Sequence[Settings], key: str, name: str, t: float) -> Any:
    for settings in places:
        value = settings[key].at(name, t) if key in settings else None
        if value is not None:
            return value
    return None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def layer_of(name: str) -> tuple[str, int] | None:
    """('model.layers', 3) for 'model.layers.3.mlp.up.weight'; None for tensors outside layers."""
    found = _NUMBER.search(name)
    return None if found is None else (name[: found.start()].rstrip("."), int(found[1]))


def with_layer(name: str, layer: int) -> str:
    """The same tensor of another layer."""
    return _NUMBER.sub(str(layer), name, count=1)


def depths(names: Sequence[str]) -> dict[str, int]:
    """Stacks of layers and how many layers each has: {'model.layers': 32}."""
    found: dict[str, set[int]] = {}
    for name in names:
        place = layer_of(name)
        if place is not None:
            found.setdefault(place[0], set()).add(place[1])
    return {stack: max(layers) + 1 for stack, layers in found.items() if 0 in layers}


def bytes_of(text: str | int) -> int:
    """'5GB', '200 MB', '1.5GiB' or a number of bytes."""
    if isinstance(text, int):
        return text
    found = re.fullmatch(r"\s*([\d.]+)\s*([kMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if found is None or not found[1].replace(".", "", 1).isdigit():
        raise ConfigError(f"'{text}' is no size; write for instance 5GB or 500MB")
    power = " kmgt".index(found[2].lower() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)
