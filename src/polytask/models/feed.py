"""From pairs to what a language model reads: packed, shifted right by segment, ready to score.

A decoder reads input and target as one sequence; an encoder-decoder reads the input and predicts
the target. What is fed is what is predicted, moved right by one: the first slot of every segment
holds `bos`, the last token is never fed. In these coordinates a prefix of n tokens takes n + 1
slots (bos and the n tokens), and the last of them predicts the first target token. Forgetting
that +1 either hides the last input token's slot from the prefix or shows the first target to it.

Only slots that predict a target token are scored, so the vocabulary is never multiplied with the
rest.

Worked example, as a prefix decoder sees it (columns are keys, bos = 0; inputs [6, 7] -> [8] and
[3, 4] -> [5] in one row of 7):

    fed      0 6 7 | 0 3 4 | pad          predicts  6 7 8 | 3 4 5 | -
    rows 1-3 see {1, 2, 3}, rows 4-6 see {4, 5, 6}, row 7 (padding) sees only padding.

Wang, Roberts et al. 2022 (arXiv 2204.05832). Their code takes token id 0 inside a segment for
padding; here segment numbers alone say what is padding, so no id is special.

Legend: B rows, L slots of a row, M slots of a row of inputs, T scored slots, n pairs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polytask.errors import ConfigError, DataError
from polytask.mixture.packing import PackPlan, in_order, pack, pack_two
from polytask.mixture.schedule import ramp
from polytask.models.masks import MaskSpec
from polytask.objectives.pairs import Pairs

Architecture = Literal["causal", "prefix", "encdec"]
ARCHITECTURES: tuple[Architecture, ...] = ("causal", "prefix", "encdec")
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class LanguageBatch:
    """What a step of a language model needs. Optional tensors are None where they say nothing."""

    architecture: Architecture
    ids: Tensor  # (B, L) int64, fed to the decoder
    slot: Tensor  # (T,) int64, place in B * L that predicts a target token
    label: Tensor  # (T,) int64, that token
    target: Tensor  # (T,) int64, its place in the pairs' `target_ids`
    pair: Tensor  # (T,) int64, its pair
    weight: Tensor | None  # (T,) float32
    source: Tensor  # (n,) int64, the pairs' source; 0 where nobody said
    length: Tensor | None  # (B,) int64, slots in use where a row is one segment and some are short
    positions: Tensor | None  # (B, L) int64, restarting in each segment
    segments: Tensor | None  # (B, L) int64, -1 at padding
    prefix: Tensor | None  # (B,) int64 slots, or (B, L) bool in packed rows
    memory_ids: Tensor | None  # (B, M) int64, read by the encoder
    memory_length: Tensor | None
    memory_positions: Tensor | None
    memory_segments: Tensor | None
    seen: tuple[int, ...]  # (n,) tokens of each pair, input and target

    @property
    def rows(self) -> int:
        """Pairs: what a mixture counts."""
        return len(self.seen)

    @property
    def tokens(self) -> int:
        """Tokens that the model sees: inputs and targets, neither bos nor padding."""
        return sum(self.seen)

    @property
    def slots(self) -> int:
        """Places in all rows, padding included."""
        return self.ids.numel() + (0 if self.memory_ids is None else self.memory_ids.numel())

    @property
    def efficiency(self) -> float:
        """Share of places that hold something (a token or bos)."""
        used = _used(self.ids, self.length, self.segments)
        if self.memory_ids is not None:
            used += _used(self.memory_ids, self.memory_length, self.memory_segments)
        return used / self.slots if self.slots else 1.0

    def booked(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """For the ledger: the source of each pair (n,), and (2, n) source and tokens."""
        source = self.source.cpu().numpy()
        return source, np.stack([source, np.array(self.seen, np.int64)])

    def mask(self) -> MaskSpec:
        """Who sees whom in the decoder."""
        if self.architecture == "encdec":
            return MaskSpec(
                causal=True,
                length=self.length,
                segments=self.segments,
                memory_length=self.memory_length,
                memory_segments=self.memory_segments,
            )
        return MaskSpec(causal=True, length=self.length, prefix=self.prefix, segments=self.segments)

    def memory_mask(self) -> MaskSpec:
        """Who sees whom in the encoder."""
        return MaskSpec(length=self.memory_length, segments=self.memory_segments)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LanguageBatch:
        """The same batch on another device."""
        moved = {
            f.name: getattr(self, f.name).to(device, non_blocking=non_blocking)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


def _used(ids: Tensor, length: Tensor | None, segments: Tensor | None) -> int:
    if segments is not None:
        return int((segments >= 0).sum())
    return ids.numel() if length is None else int(length.sum())


def feed(
    pairs: Pairs,
    architecture: Architecture,
    width: int | tuple[int, int] | None = None,
    *,
    pack: bool = True,
    bos: int | None = 0,
    pad: int = 0,
) -> LanguageBatch:
    """Lay out pairs for an architecture.

    Args:
        width: slots of a row; for an encoder-decoder (inputs, targets) or one number for both.
            None takes the longest pair.
        pack: put several pairs into a row; they never see each other. False: one pair a row.
        bos: what the first slot of a segment holds. None feeds the tokens as they are (how Hugging
            Face decoders are trained): a pair without an input then has its first token unscored.
        pad: what unused places hold; nobody sees it.

    Rows are as wide as the fullest of them. Errors: `DataError` for a pair without tokens or
    longer than the width; `ConfigError` for an unknown architecture, or an encoder-decoder without
    bos.
    """
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"architecture '{architecture}': one of {', '.join(ARCHITECTURES)} is expected"
        )
    if not len(pairs):
        raise DataError("there are no pairs to feed")
    if architecture == "encdec":
        return _encoder_decoder(pairs, width, pack, bos, pad)
    return _decoder(pairs, architecture, width, pack, bos, pad)


def _decoder(
    pairs: Pairs,
    architecture: Architecture,
    width: int | tuple[int, int] | None,
    packed: bool,
    bos: int | None,
    pad: int,
) -> LanguageBatch:
    if isinstance(width, tuple):
        raise ConfigError(f"a decoder has rows of one width, not {width}")
    first = 0 if bos is None else 1
    inputs, targets = pairs.input_lengths, pairs.target_lengths
    lengths = inputs + targets - 1 + first
    plan = _plan(lengths, width, packed, "tokens")
    size, begin = _places(plan)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(inputs + targets)])
    joined = np.empty(int(offsets[-1]), np.int64)
    owner, step = ramp(inputs)
    joined[offsets[owner] + step] = pairs.input_ids
    owner, step = ramp(targets)
    joined[offsets[owner] + inputs[owner] + step] = pairs.target_ids
    ids = np.full(plan.bins * size, pad, np.int64)
    fed_of, fed = ramp(lengths)
    shifted = joined[np.maximum(offsets[fed_of] + fed - first, 0)]
    if bos is not None:
        shifted = np.where(fed == 0, bos, shifted)
    ids[begin[fed_of] + fed] = shifted
    slot = begin[owner] + inputs[owner] + step - 1 + first
    scored = np.flatnonzero(inputs[owner] + step - 1 + first >= 0)
    layout = _layout(plan, size)
    prefix: npt.NDArray[Any] | None = None
    if architecture == "prefix":
        # A pair without an input has no prefix: bos alone sees and is seen as under causality.
        early = np.where(inputs > 0, np.minimum(inputs + first, lengths), 0)
        if layout["segments"] is None:
            prefix = np.zeros(plan.bins, np.int64)
            prefix[plan.bin] = early[plan.row]
        else:
            prefix = np.zeros(plan.bins * size, np.bool_)
            prefix_of, inside = ramp(early)
            prefix[begin[prefix_of] + inside] = True
            prefix = prefix.reshape(plan.bins, size)
    return _batch(
        pairs,
        architecture,
        ids.reshape(plan.bins, size),
        slot,
        owner,
        scored,
        layout,
        prefix=prefix,
    )


def _encoder_decoder(
    pairs: Pairs,
    width: int | tuple[int, int] | None,
    packed: bool,
    bos: int | None,
    pad: int,
) -> LanguageBatch:
    if bos is None:
        raise ConfigError("a decoder that reads from an encoder needs a first token: give bos")
    inputs, targets = pairs.input_lengths, pairs.target_lengths
    if (targets < 1).any():
        raise DataError(f"pair {int(np.argmax(targets < 1))} has no target")
    widths = width if isinstance(width, tuple) else (width, width)
    sides = (_check(inputs, widths[0], "input tokens", least=0), _check(targets, widths[1]))
    if packed:
        bins = pack_two(inputs, targets, *sides)
        order = np.argsort(bins, kind="stable")
    else:
        bins = order = np.arange(len(pairs))
    count = int(bins.max()) + 1
    zeros = np.zeros(len(order), np.int64)
    source, plan = (
        in_order(order, zeros, lengths[order], bins[order], count, side)
        for lengths, side in zip((inputs, targets), sides)
    )
    size, begin = _places(plan)
    memory_size, memory_begin = _places(source)
    owner, step = ramp(targets)
    ids = np.full(count * size, pad, np.int64)
    ids[begin[owner] + step] = np.where(step == 0, bos, np.roll(pairs.target_ids, 1))
    read_of, read = ramp(inputs)
    memory = np.full(count * memory_size, pad, np.int64)
    memory[memory_begin[read_of] + read] = pairs.input_ids
    layout = _layout(plan, size)
    below = _layout(source, memory_size, layout["segments"] is not None)
    return _batch(
        pairs,
        "encdec",
        ids.reshape(count, size),
        begin[owner] + step,
        owner,
        np.arange(len(owner)),
        layout,
        memory_ids=memory.reshape(count, memory_size),
        **{f"memory_{name}": value for name, value in below.items()},
    )


def _batch(
    pairs: Pairs,
    architecture: Architecture,
    ids: Ints,
    slot: Ints,
    owner: Ints,
    scored: Ints,
    layout: dict[str, npt.NDArray[Any] | None],
    **more: npt.NDArray[Any] | None,
) -> LanguageBatch:
    def tensor(array: npt.NDArray[Any] | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(np.ascontiguousarray(array))

    source = np.zeros(len(pairs), np.int64) if pairs.source is None else pairs.source
    given: dict[str, Any] = {
        name: tensor(more.get(name))
        for name in (
            "prefix",
            "memory_ids",
            "memory_length",
            "memory_positions",
            "memory_segments",
        )
    }
    given |= {name: tensor(value) for name, value in layout.items()}
    return LanguageBatch(
        architecture=architecture,
        ids=torch.from_numpy(ids),
        slot=torch.from_numpy(slot[scored]),
        label=torch.from_numpy(pairs.target_ids[scored].astype(np.int64)),
        target=torch.from_numpy(scored.astype(np.int64)),
        pair=torch.from_numpy(owner[scored]),
        weight=tensor(None if pairs.weight is None else pairs.weight[scored]),
        source=torch.from_numpy(source.astype(np.int64)),
        seen=tuple((pairs.input_lengths + pairs.target_lengths).tolist()),
        **given,
    )


def _check(lengths: Ints, width: int | None, what: str = "target tokens", least: int = 1) -> int:
    """The width to pack to; lengths that do not fit are errors."""
    if (lengths < least).any():
        pair = int(np.argmax(lengths < least))
        raise DataError(
            f"pair {pair} has nothing to feed: it has neither an input nor two tokens to predict "
            "one from another"
        )
    if width is None:
        return max(1, int(lengths.max(initial=1)))
    if (lengths > width).any():
        pair = int(np.argmax(lengths > width))
        raise DataError(
            f"pair {pair} takes {int(lengths[pair])} {what}, more than the width {width}: raise "
            "the width or make shorter chunks"
        )
    return width


def _plan(lengths: Ints, width: int | None, packed: bool, what: str) -> PackPlan:
    size = _check(lengths, width, what)
    if packed:
        return pack(lengths, size, "refuse")
    rows = np.arange(len(lengths))
    return in_order(rows, np.zeros_like(rows), lengths, rows, len(rows), size)


def _places(plan: PackPlan) -> tuple[int, Ints]:
    """Slots of a row (as many as the fullest needs), and the first place of every pair."""
    size = max(1, int((plan.offset + plan.length).max(initial=1)))
    begin = np.empty(len(plan.row), np.int64)
    begin[plan.row] = plan.bin * size + plan.offset
    return size, begin


def _layout(
    plan: PackPlan, size: int, segmented: bool | None = None
) -> dict[str, npt.NDArray[Any] | None]:
    """length, positions, segments: only what says something."""
    if segmented is None:
        segmented = len(plan.row) > plan.bins
    if not segmented:
        length = np.zeros(plan.bins, np.int64)
        length[plan.bin] = plan.length
        short = bool((length < size).any())
        return {"length": length if short else None, "positions": None, "segments": None}
    narrow = replace(plan, width=size)
    return {
        "length": None,
        "positions": narrow.positions().astype(np.int64),
        "segments": narrow.segments().astype(np.int64),
    }
