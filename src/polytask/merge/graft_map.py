"""Where a graft's bits lie: counted by layer and kind of module, from the tensors' names alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from polytask.merge.graft_delta import SparseDelta

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class ModuleBits:
    """Bits of a graft in one module.

    layer: the first number in the tensors' names; None where there is none.
    module: what follows it, without '.weight' and '.bias' ('attention.self.query').
    bits: coordinates that are grafted. size: coordinates that could have been.
    """

    layer: int | None
    module: str
    bits: int
    size: int


def place_of(name: str) -> tuple[int | None, str]:
    """(layer, kind of module) of a tensor: 'encoder.layer.3.output.dense.bias' is (3,
    'output.dense'); 'head.weight' is (None, 'head')."""
    parts = name.split(".")
    stem = ".".join(parts[:-1]) or name
    found = _NUMBER.search(stem)
    if found is None:
        return None, stem
    rest = stem[found.end() :]
    return int(found[1]), rest or stem[: found.start()] or "module"


def bits_by_module(graft: SparseDelta) -> list[ModuleBits]:
    """A row for every module of the graft's layout, in the order of layers and of first names."""
    counts = graft.layout.counts(graft.indices)
    found: dict[tuple[int | None, str], list[int]] = {}
    for name, bits in counts.items():
        entry = found.setdefault(place_of(name), [0, 0])
        entry[0] += bits
        entry[1] += math.prod(graft.layout.shapes[name])
    order = sorted(found, key=lambda place: (place[0] is not None, place[0] or 0))
    return [ModuleBits(layer, module, *found[layer, module]) for layer, module in order]
