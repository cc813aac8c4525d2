"""How the result is laid out: which tensors, made of what, at which byte of which file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from polytask.errors import ConfigError, MergeError
from polytask.merge.headers import TensorHeader, make_header
from polytask.merge.matching import Match, check_shape, is_head
from polytask.merge.method import Method
from polytask.merge.recipe import (
    Part,
    Recipe,
    depths,
    layer_of,
    parameters,
    with_layer,
)
from polytask.merge.sources import TensorSource
from polytask.merge.vectors import work_dtype

CHUNK = 1 << 17  # elements of a tensor handled at a time where a method allows it
FORMAT = {"format": "pt"}  # what transformers expects in a file's metadata


@dataclass(frozen=True)
class Item:
    """One tensor of the result.

    Attributes:
        name, shape, dtype: of the result.
        work: the type it is computed in.
        action: 'merge', or 'copy' from `models[0]`.
        method: with this tensor's parameters.
        models: (number of the source, name there) of the K tensors.
        base: the same for the base, or None.
        whole: it cannot be made piece by piece.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    work: torch.dtype
    action: Literal["merge", "copy"]
    method: Method | None
    models: tuple[tuple[int, str], ...]
    base: tuple[int, str] | None
    whole: bool

    @property
    def count(self) -> int:
        return TensorHeader(self.shape, self.dtype, ()).count

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize

    @property
    def memory(self) -> int:
        """Bytes in use while it is made: the K versions, the base, the result."""
        at_once = self.count if self.whole else min(self.count, CHUNK)
        rows = len(self.models) + (self.base is not None)
        return at_once * (rows * self.work.itemsize + self.dtype.itemsize)


@dataclass(frozen=True)
class Shard:
    """A file of the result: its header, and where each tensor's bytes begin."""

    file: str
    header: bytes
    places: Mapping[str, int]
    size: int


class Builder:
    """Lays out the tensors of the result."""

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        sources: Sequence[TensorSource],
        matches: Sequence[Match],
        frame: int,
    ) -> None:
        self.recipe = recipe
        self.method = method
        self.sources = sources
        self.matches = matches
        self.frame = frame
        self.notes: list[str] = []
        self.layers: int | None = None
        self._methods: dict[str, Method] = {}
        self._shared = parameters(recipe, recipe.parts[0], "", 0.0)
        dropped = frozenset().union(*(m.dropped for m in matches))
        self.headers = {k: h for k, h in sources[frame].headers.items() if k not in dropped}

    def items(self) -> tuple[Item, ...]:
        found = []
        first, last = self.recipe.parts[0], self.recipe.parts[-1]
        plain = [k for k in self.headers if not is_head(k, self.recipe.heads)]
        if first.layers is None:
            deep = depths(plain)
            for key in plain:
                place = layer_of(key)
                t = 0.0
                if place is not None and place[0] in deep:
                    t = place[1] / (deep[place[0]] - 1) if deep[place[0]] > 1 else 1.0
                found.append(self._item(key, first, {m.model: key for m in first.members}, key, t))
        else:
            found += self._stacked(plain, first, last)
        if self.recipe.base is not None:
            heads = self.matches[self.frame].heads
            found += [self._copied(key, (self.frame, key)) for key in heads]
        return tuple(sorted(found, key=lambda item: natural(item.name)))

    def _stacked(self, plain: Sequence[str], first: Part, last: Part) -> list[Item]:
        """Slices: layers of the parts one upon another; what lies outside comes from the first
        part (embeddings) or the last (final norm, output layer)."""
        stacks = depths(plain)
        if len(stacks) != 1:
            raise MergeError(
                f"slices need a model with one stack of layers; {self.sources[self.frame].name} "
                f"has {len(stacks)} ({', '.join(stacks) or 'none'})"
            )
        ((stack, depth),) = stacks.items()
        outside = [k for k in plain if (layer_of(k) or ("", 0))[0] != stack]
        layer = [k for k in plain if layer_of(k) == (stack, 0)]
        found = []
        for key in outside:
            part = first if "emb" in key or ".wte." in f".{key}" or ".wpe." in f".{key}" else last
            found.append(self._item(key, part, {m.model: key for m in part.members}, key, 0.0))
        number = 0
        for part in self.recipe.parts:
            size = part.layers or 0
            for member in part.members:
                if member.first + size > depth:
                    raise MergeError(
                        f"{self.sources[member.model].name} has {depth} layers, no layers "
                        f"{member.first} to {member.first + size - 1}"
                    )
            for offset in range(size):
                t = offset / (size - 1) if size > 1 else 1.0
                for key in layer:
                    there = {m.model: with_layer(key, m.first + offset) for m in part.members}
                    base = with_layer(key, part.members[0].first + offset)
                    found.append(self._item(with_layer(key, number), part, there, base, t))
                number += 1
        self.layers = number
        if number != depth:
            self.notes.append(f"{number} layers instead of {depth}")
        return found

    def _item(
        self, name: str, part: Part, keys: Mapping[int, str], base_key: str, t: float
    ) -> Item:
        frame = self.headers[base_key]
        models = tuple((n, self.matches[n].keys.get(key, key)) for n, key in keys.items())
        if not frame.dtype.is_floating_point:
            if self.recipe.base is None and models[0][1] in self.sources[models[0][0]].headers:
                return self._copied(name, models[0])
            return self._copied(name, (self.frame, base_key))
        for number, key in models:
            source = self.sources[number]
            check_shape(source.name, key, frame, source.headers[key])
            if source.headers[key].dtype.itemsize == 1:
                raise MergeError(
                    f"{source.name}: tensor '{key}' has 8 bits a value ({frame.dtype}), codes that "
                    "mean something only with their scales. Merge the models it was made from"
                )
        base = None if self.recipe.base is None else (self.recipe.base, base_key)
        method = self._method(part, name, t)
        whole = not method.elementwise or any(
            self.sources[n].headers[k].whole for n, k in [*models, *([base] if base else [])]
        )
        if method.base == "ignored":
            base = None
        dtype = frame.dtype if self.recipe.dtype is None else getattr(torch, self.recipe.dtype)
        work = work_dtype(frame.dtype)
        return Item(name, frame.shape, dtype, work, "merge", method, models, base, whole)

    def _copied(self, name: str, source: tuple[int, str]) -> Item:
        header = self.sources[source[0]].headers[source[1]]
        dtype = header.dtype
        if self.recipe.dtype is not None and dtype.is_floating_point:
            dtype = getattr(torch, self.recipe.dtype)
        work = work_dtype(dtype) if dtype != header.dtype else dtype
        return Item(name, header.shape, dtype, work, "copy", None, (source,), None, header.whole)

    def _method(self, part: Part, name: str, t: float) -> Method:
        found = parameters(self.recipe, part, name, t)
        fields = type(self.method).model_fields
        found = {**{k: fields[k].default for k in self._shared.keys() - found.keys()}, **found}
        changed = {k: v for k, v in found.items() if self._shared.get(k, fields[k].default) != v}
        key = json.dumps(changed, sort_keys=True, default=str)
        if key not in self._methods:
            try:
                method = self.method.at(**changed)
                method.check(len(part.members), self.recipe.base is not None)
            except ConfigError as error:
                raise ConfigError(f"tensor '{name}': {error}") from error
            if method.passes and len(self.recipe.parts) > 1:
                raise ConfigError(
                    f"{method.title} with these parameters looks at all tensors together, which "
                    "slices of different models do not allow"
                )
            self._methods[key] = method
        return self._methods[key]


def natural(name: str) -> tuple[Any, ...]:
    """Sorts layer 10 after layer 9."""
    return tuple(
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)
    )


def shards_of(items: Sequence[Item], aliases: Mapping[str, str], most: int) -> tuple[Shard, ...]:
    groups: list[list[Item]] = [[]]
    size = 0
    for item in items:
        if groups[-1] and size + item.nbytes > most:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.nbytes
    found = []
    for number, group in enumerate(groups, 1):
        single = len(groups) == 1
        file = "model" if single else f"model-{number:05d}-of-{len(groups):05d}"
        # Wide types first: every tensor lies at a multiple of its element's size.
        ordered = sorted(group, key=lambda item: -item.dtype.itemsize)
        held = {item.name for item in group}
        tied = {name: kept for name, kept in aliases.items() if kept in held}
        header, places = make_header(
            {item.name: (item.dtype, item.shape) for item in ordered}, {**FORMAT, **tied}
        )
        total = len(header) + sum(item.nbytes for item in group)
        found.append(Shard(f"{file}.safetensors", header, places, total))
    return tuple(found)
