"""Sparse deltas: a few coordinates of a model and what fine-tuning added there, in a small file.

A graft keeps well below one parameter in a hundred, so it is stored as coordinates and values. A
coordinate is a place in all tensors that take part, laid end to end in the order of their names;
the file carries that layout, so that a graft knows its denominator and refuses models of other
shapes. It also carries the base's values at its coordinates, rounded to bfloat16, which is enough
to tell another base. "Task-Specific Skill Localization in Fine-tuned Language Models" (Panigrahi et
al. 2023, arXiv 2302.06600) grafts, unites and purges such regions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from polytask import files
from polytask.errors import CheckpointError, MergeError, suggestion
from polytask.merge.vectors import StateDict, check_finite, tied_names, work_dtype

FORMAT = "polytask.graft/1"
Conflict = Literal["first", "last", "mean", "sum"]
ALIKE = 0.99  # share of base values that must agree for a base to be the one a graft was cut from


@dataclass(frozen=True)
class Layout:
    """Tensors laid end to end, names sorted: where coordinate i of size D lies.

    Attributes:
        shapes: name -> shape of every tensor that takes part; they make the denominator.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        ordered = {name: tuple(self.shapes[name]) for name in sorted(self.shapes)}
        object.__setattr__(self, "shapes", ordered)

    @cached_property
    def starts(self) -> dict[str, int]:
        """Name -> its first coordinate."""
        found, place = {}, 0
        for name, shape in self.shapes.items():
            found[name] = place
            place += math.prod(shape)
        return found

    @cached_property
    def size(self) -> int:
        """D, the number of coordinates."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def pieces(self, indices: Tensor) -> Iterator[tuple[str, slice, Tensor]]:
        """For every tensor with any of the sorted `indices`: name, which of them, places in it."""
        edges = torch.tensor([*self.starts.values(), self.size], dtype=torch.int64)
        bounds = torch.searchsorted(indices.cpu().contiguous(), edges).tolist()
        for name, start, low, high in zip(
            self.shapes, edges.tolist(), bounds, bounds[1:], strict=False
        ):
            if low < high:
                yield name, slice(low, high), indices[low:high] - start

    def counts(self, indices: Tensor) -> dict[str, int]:
        """Name -> how many of the sorted `indices` lie in that tensor, 0 included."""
        found = dict.fromkeys(self.shapes, 0)
        for name, part, _ in self.pieces(indices):
            found[name] = part.stop - part.start
        return found

    def check(self, state: StateDict, what: str) -> None:
        """`MergeError` when a tensor is missing from `state` or has another shape there."""
        for name, shape in self.shapes.items():
            if name not in state:
                raise MergeError(
                    f"{what} has no tensor '{name}', which the graft's region covers."
                    f"{suggestion(name, state)}"
                )
            if tuple(state[name].shape) != shape:
                raise MergeError(
                    f"tensor '{name}' of {what} has shape {tuple(state[name].shape)}, the graft "
                    f"was cut for {shape}"
                )


@dataclass(frozen=True)
class SparseDelta:
    """n coordinates of D with the values that fine-tuning added there.

    Attributes:
        layout: what the coordinates count.
        indices: (n,) int64, ascending, none twice.
        values: (n,) floating point, theta_ft - theta_pre.
        origin: (n,) bfloat16, the base's values, to know the base again; None: not known.
        dense: whole tensors that the base does not have (a classification head), name -> tensor.
        facts: plain JSON values about where it comes from: name, sparsity, scores, architecture.
    """

    layout: Layout
    indices: Tensor
    values: Tensor
    origin: Tensor | None = None
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = self.indices.numel()
        if self.values.shape != self.indices.shape or self.indices.dim() != 1:
            raise MergeError(f"a graft has one value for each coordinate: {n} coordinates given")
        if n and (int(self.indices[0]) < 0 or int(self.indices[-1]) >= self.layout.size):
            raise MergeError(f"a coordinate of the graft is outside of its {self.layout.size:,}")
        if n and not bool((self.indices[1:] > self.indices[:-1]).all()):
            raise MergeError("coordinates of a graft must ascend, none twice")
        check_finite(self.values, "values", self.name)

    @property
    def name(self) -> str:
        """What messages and tables call it."""
        return str(self.facts.get("name", "graft"))

    def __len__(self) -> int:
        return self.indices.numel()

    @property
    def share(self) -> float:
        """n / D."""
        return len(self) / self.layout.size if self.layout.size else 0.0

    def __str__(self) -> str:
        return (
            f"{self.name}: {len(self):,} of {self.layout.size:,} parameters in "
            f"{len(self.layout.shapes)} tensors ({self.share:.4%})"
        )

    def to(self, dtype: torch.dtype) -> SparseDelta:
        """The same with values of another type; `MergeError` when one does not fit into it."""
        values = self.values.to(dtype)
        check_finite(values, f"values as {dtype}", self.name)
        return replace(self, values=values)

    def named(self, name: str) -> SparseDelta:
        """The same under another name."""
        return replace(self, facts={**self.facts, "name": name})

    def apply(self, state: StateDict, *, check: bool = True) -> dict[str, Tensor]:
        """theta_pre + gamma delta: a new state dict with types as in `state`, which is not changed.

        Tensors outside of the region are passed on as they are, those in `dense` are taken from
        the graft, tied names stay tied.

        Raises:
            MergeError: a tensor is missing or of another shape, or (`check`) more than 1 % of the
                values at the graft's coordinates differ from those of the base it was cut from.
        """
        self.layout.check(state, "the model")
        if check:
            self.check_base(state)
        made = dict(state)
        for name, part, place in self.layout.pieces(self.indices):
            work = work_dtype(state[name].dtype)
            flat = state[name].detach().to(work, copy=True).reshape(-1)
            place = place.to(flat.device)
            flat[place] += self.values[part].to(flat)
            made[name] = flat.reshape(state[name].shape).to(state[name].dtype)
        made.update(self.dense)
        for name, first in tied_names(state).items():
            made[name] = made[first]
        return made

    def check_base(self, state: StateDict) -> None:
        """`MergeError` when `state` is not the base that this graft was cut from."""
        if self.origin is None or not len(self):
            return
        found, known = self.taken(state), self.origin.float()
        # Twice the spacing of bfloat16: a base in half precision is still the same base.
        near = (found - known).abs() <= known.abs() * 2**-6 + 1e-6
        if float(near.float().mean()) < ALIKE:
            raise MergeError(
                f"{self.name} was cut from another base: {int((~near).sum()):,} of {len(self):,} "
                "values at its coordinates differ. Apply it to the model it was cut from, or pass "
                "check=False (--force) to add it anyway"
            )

    def purge(self, state: StateDict, base: StateDict) -> dict[str, Tensor]:
        """`state` with this region set back to `base`'s values: the skill taken out again."""
        self.layout.check(state, "the model")
        self.layout.check(base, "the base")
        made = dict(state)
        for name, _, place in self.layout.pieces(self.indices):
            flat = state[name].detach().clone().reshape(-1)
            place = place.to(flat.device)
            flat[place] = base[name].detach().reshape(-1).to(flat)[place]
            made[name] = flat.reshape(state[name].shape)
        for name, first in tied_names(state).items():
            made[name] = made[first]
        return made

    def from_model(self, state: StateDict, base: StateDict) -> SparseDelta:
        """This region with another model's values: what `state` has there, minus `base`."""
        self.layout.check(state, "the model")
        self.layout.check(base, "the base")
        origin = self.taken(base)
        return replace(self, values=self.taken(state) - origin, origin=origin.bfloat16(), dense={})

    def on(self, layout: Layout) -> SparseDelta:
        """The same coordinates counted in a layout that has every tensor of this one."""
        if layout.shapes == self.layout.shapes:
            return self
        indices = self.indices.clone()
        for name, part, place in self.layout.pieces(self.indices):
            indices[part] = place + layout.starts[name]
        return replace(self, layout=layout, indices=indices)

    def within(self, other: SparseDelta) -> SparseDelta:
        """Only the coordinates that `other` has too, with this graft's values."""
        one, two = aligned([self, other])
        return one._keep(torch.isin(one.indices, two.indices, assume_unique=True))

    def without(self, other: SparseDelta) -> SparseDelta:
        """Only the coordinates that `other` does not have."""
        one, two = aligned([self, other])
        kept = torch.isin(one.indices, two.indices, assume_unique=True, invert=True)
        return one._keep(kept)

    def _keep(self, kept: Tensor) -> SparseDelta:
        origin = None if self.origin is None else self.origin[kept]
        return replace(self, indices=self.indices[kept], values=self.values[kept], origin=origin)

    def taken(self, state: StateDict) -> Tensor:
        """(n,) float32: a model's values at the coordinates, on the CPU."""
        found = torch.empty(len(self), dtype=torch.float32)
        for name, part, place in self.layout.pieces(self.indices):
            flat = state[name].detach().reshape(-1)
            found[part] = flat[place.to(flat.device)].float().cpu()
        return found

    # -- files

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all: 'indices', 'values', 'origin', 'dense.*'.

        Indices are int32 where D allows. What is tied or not contiguous is copied.
        """
        from safetensors.torch import save_file

        wide = torch.int64 if self.layout.size > 2**31 - 1 else torch.int32
        tensors = {"indices": self.indices.to(wide), "values": self.values}
        if self.origin is not None:
            tensors["origin"] = self.origin
        for name, tensor in self.dense.items():
            tensors[f"dense.{name}"] = tensor.detach().cpu().contiguous().clone()
        facts = {"format": FORMAT, "layout": self.layout.shapes, "facts": dict(self.facts)}
        metadata = {key: json.dumps(value, allow_nan=False) for key, value in facts.items()}
        with files.writing(path) as aside:
            save_file(tensors, aside, metadata)

    @classmethod
    def load(cls, path: Path) -> SparseDelta:
        """Read a graft; `CheckpointError` for a file that is torn or no graft."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise CheckpointError(f"there is no graft file {path}")
        try:
            with safe_open(path, framework="pt") as handle:  # type: ignore[no-untyped-call]
                metadata = {k: json.loads(v) for k, v in (handle.metadata() or {}).items()}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is not {FORMAT}, so it is no graft")
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
            shapes = {name: tuple(shape) for name, shape in metadata["layout"].items()}
            dense = {k[6:]: v for k, v in tensors.items() if k.startswith("dense.")}
            facts = {"name": path.stem, **metadata["facts"]}
            indices = tensors["indices"].to(torch.int64)
            return cls(
                Layout(shapes), indices, tensors["values"], tensors.get("origin"), dense, facts
            )
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, MergeError) as error:
            raise CheckpointError(f"{path} cannot be read as a graft: {error}") from error


def aligned(grafts: Sequence[SparseDelta]) -> list[SparseDelta]:
    """The same grafts over one layout, the tensors of all; `MergeError` where shapes differ.

    Two fine-tunings may have trained different tensors of one base; their grafts then count
    coordinates in different ways until they are aligned.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    owner: dict[str, str] = {}
    for graft in grafts:
        for name, shape in graft.layout.shapes.items():
            if shapes.setdefault(name, shape) != shape:
                raise MergeError(
                    f"tensor '{name}' has shape {shapes[name]} in {owner[name]} and {shape} in "
                    f"{graft.name}: they were cut from different models"
                )
            owner.setdefault(name, graft.name)
    layout = Layout(shapes)
    return [graft.on(layout) for graft in grafts]


def union(grafts: Sequence[SparseDelta], conflict: Conflict = "first") -> SparseDelta:
    """All coordinates of all grafts.

    Where several have a coordinate its value is that of the 'first' graft (a region stays with who
    claimed it first: the later task is masked off there), of the 'last', their 'mean' or 'sum'.
    Grafts cut from one multitask model agree there, so that all but 'sum' are the same.

    Raises:
        MergeError: no graft, shapes or bases that differ, or a dense tensor that two grafts
            have with different values.
    """
    if not grafts:
        raise MergeError("there is nothing to unite: no graft was given")
    grafts = aligned(grafts)
    layout = grafts[0].layout
    wide = torch.promote_types(grafts[0].values.dtype, torch.float32)
    for graft in grafts:
        wide = torch.promote_types(wide, graft.values.dtype)
    ordered = list(reversed(grafts)) if conflict == "last" else list(grafts)
    every = torch.cat([graft.indices for graft in ordered])
    values = torch.cat([graft.values.to(wide) for graft in ordered])
    indices, which = torch.unique(every, return_inverse=True)
    # The first of every coordinate: scatter the smallest position.
    position = torch.arange(len(every))
    first = torch.full((len(indices),), len(every)).scatter_reduce(0, which, position, "amin")
    merged = values[first]
    if conflict in ("mean", "sum"):
        merged = torch.zeros(len(indices), dtype=wide).index_add_(0, which, values)
        if conflict == "mean":
            merged = merged / torch.bincount(which, minlength=len(indices)).to(wide)
    origin = None
    if all(graft.origin is not None for graft in grafts):
        origins = torch.cat([g.origin for g in ordered if g.origin is not None])
        origin = origins[first]
        if not torch.equal(origin[which], origins):
            names = ", ".join(graft.name for graft in grafts)
            raise MergeError(f"{names} were cut from different bases and cannot be united")
    facts = {"name": "+".join(graft.name for graft in grafts), "conflict": conflict}
    for key in ("architecture", "config"):
        if all(graft.facts.get(key) == grafts[0].facts.get(key) for graft in grafts):
            facts |= {key: grafts[0].facts[key]} if key in grafts[0].facts else {}
    return SparseDelta(layout, indices, merged, origin, _dense(grafts), facts)


def _dense(grafts: Sequence[SparseDelta]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for graft in grafts:
        for name, tensor in graft.dense.items():
            if name in found and not torch.equal(found[name], tensor):
                raise MergeError(
                    f"tensor '{name}' (a head that the base lacks) differs between the grafts: "
                    "each needs a head of its own, so they cannot become one model"
                )
            found[name] = tensor
    return found


def overlap(grafts: Sequence[SparseDelta]) -> Tensor:
    """(K, K) float64, O_ij = |gamma_i and gamma_j| / |gamma_j|, as in the paper.

    Column j tells which share of graft j's region the others also have; the diagonal is 1. A graft
    without coordinates gives NaN in its column.
    """
    if not grafts:
        return torch.zeros(0, 0, dtype=torch.float64)
    grafts = aligned(grafts)
    shared = torch.zeros(len(grafts), len(grafts), dtype=torch.float64)
    for i, one in enumerate(grafts):
        for j in range(i, len(grafts)):
            both = torch.isin(one.indices, grafts[j].indices, assume_unique=True).sum()
            shared[i, j] = shared[j, i] = both
    return shared / shared.diagonal()[None]
