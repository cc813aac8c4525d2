"""Input and target token lists, ragged: what every example transform of text returns.

An objective decides what a pair holds; the architecture decides later how it is fed. An
encoder-decoder reads the input and predicts the target. A decoder reads input and target as one
sequence, under a prefix mask over the input or a causal one. Full language modelling has an empty
input and the whole chunk as its target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.errors import DataError

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Pairs:
    """n pairs; pair i's input is `input_ids[input_offsets[i] : input_offsets[i + 1]]`, its target
    likewise. Token ids are final (mode tokens, sentinels and end of text included), never padded.

    `weight` multiplies the loss of each target token (None: 1 everywhere). `original` is True where
    a target token belongs to the text and False at sentinels, mode tokens and end of text, so that
    likelihoods of texts can be compared between objectives (None: all True). `source` says which
    denoiser, task or corpus made each pair (None: nobody asked).
    """

    input_ids: Ids  # (input tokens,)
    input_offsets: Ints  # (n + 1,)
    target_ids: Ids  # (target tokens,)
    target_offsets: Ints  # (n + 1,)
    weight: Floats | None = None  # (target tokens,)
    original: Bools | None = None  # (target tokens,)
    source: Ints | None = None  # (n,)

    def __post_init__(self) -> None:
        """Offsets and the optional arrays must fit; a `DataError` says which does not."""
        if len(self.input_offsets) != len(self.target_offsets):
            raise DataError(
                f"{len(self.input_offsets) - 1} inputs but {len(self.target_offsets) - 1} targets"
            )
        for name, ids, offsets in (
            ("input", self.input_ids, self.input_offsets),
            ("target", self.target_ids, self.target_offsets),
        ):
            if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(ids):
                raise DataError(
                    f"the {name} offsets must run from 0 to the {len(ids)} {name} tokens"
                )
            if (np.diff(offsets) < 0).any():
                raise DataError(f"the {name} offsets run backwards")
        for name, values, size in (
            ("weight", self.weight, len(self.target_ids)),
            ("original", self.original, len(self.target_ids)),
            ("source", self.source, len(self)),
        ):
            if values is not None and len(values) != size:
                raise DataError(f"'{name}' has {len(values)} entries for {size}")

    def __len__(self) -> int:
        return len(self.input_offsets) - 1

    @property
    def input_lengths(self) -> Ints:
        """(n,)"""
        return np.diff(self.input_offsets)

    @property
    def target_lengths(self) -> Ints:
        """(n,)"""
        return np.diff(self.target_offsets)

    @property
    def tokens(self) -> int:
        """Tokens that a model sees: inputs and targets."""
        return len(self.input_ids) + len(self.target_ids)

    @property
    def is_original(self) -> Bools:
        """(target tokens,) `original`, all True where nothing was said."""
        return np.ones(len(self.target_ids), np.bool_) if self.original is None else self.original

    def input(self, index: int) -> Ids:
        """The input of one pair."""
        return self.input_ids[self.input_offsets[index] : self.input_offsets[index + 1]]

    def target(self, index: int) -> Ids:
        """The target of one pair."""
        return self.target_ids[self.target_offsets[index] : self.target_offsets[index + 1]]

    def take(self, rows: npt.ArrayLike) -> Pairs:
        """The pairs of these rows (m,), in this order; rows may repeat."""
        picked = np.asarray(rows, np.int64).reshape(-1)
        inputs, input_offsets = gather_ragged(self.input_offsets, picked)
        targets, target_offsets = gather_ragged(self.target_offsets, picked)
        return Pairs(
            self.input_ids[inputs],
            input_offsets,
            self.target_ids[targets],
            target_offsets,
            None if self.weight is None else self.weight[targets],
            None if self.original is None else self.original[targets],
            None if self.source is None else self.source[picked],
        )

    @classmethod
    def of(
        cls,
        inputs: Sequence[Sequence[int] | npt.NDArray[Any]],
        targets: Sequence[Sequence[int] | npt.NDArray[Any]],
        original: Sequence[Sequence[bool]] | None = None,
        source: Sequence[int] | None = None,
    ) -> Pairs:
        """From one list of ids per pair and side."""
        input_ids, input_offsets = ragged(inputs)
        target_ids, target_offsets = ragged(targets)
        flags = None
        if original is not None:
            flags = np.array([flag for row in original for flag in row], np.bool_)
        origin = None if source is None else np.asarray(source, np.int64)
        return cls(
            input_ids, input_offsets, target_ids, target_offsets, original=flags, source=origin
        )

    @classmethod
    def join(cls, parts: Sequence[Pairs]) -> Pairs:
        """One batch after another. What only some parts carry is filled in: weight 1, original
        True, source -1."""
        if not parts:
            return cls.of([], [])
        weight = original = source = None
        if any(part.weight is not None for part in parts):
            ones = [np.ones(len(p.target_ids), np.float32) for p in parts]
            weight = np.concatenate(
                [o if p.weight is None else p.weight for p, o in zip(parts, ones)]
            )
        if any(part.original is not None for part in parts):
            original = np.concatenate([part.is_original for part in parts])
        if any(part.source is not None for part in parts):
            none = [np.full(len(p), -1, np.int64) for p in parts]
            source = np.concatenate(
                [n if p.source is None else p.source for p, n in zip(parts, none)]
            )
        return cls(
            np.concatenate([part.input_ids for part in parts]),
            offsets_of(np.concatenate([part.input_lengths for part in parts])),
            np.concatenate([part.target_ids for part in parts]),
            offsets_of(np.concatenate([part.target_lengths for part in parts])),
            weight,
            original,
            source,
        )


def offsets_of(lengths: npt.ArrayLike) -> Ints:
    """(n,) lengths to (n + 1,) offsets."""
    sizes = np.asarray(lengths, np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])


def gather_ragged(offsets: Ints, rows: Ints) -> tuple[Ints, Ints]:
    """Places in a flat array that hold these rows, and the offsets of the rows so taken."""
    lengths = np.diff(offsets)[rows]
    taken = offsets_of(lengths)
    start = np.repeat(offsets[:-1][rows] - taken[:-1], lengths)
    return start + np.arange(taken[-1]), taken


def ragged(rows: Sequence[Sequence[int] | npt.NDArray[Any]]) -> tuple[Ids, Ints]:
    """Lists of ids as one flat array and offsets."""
    arrays = [np.asarray(row, np.int32).reshape(-1) for row in rows]
    flat = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
    return flat, offsets_of([len(array) for array in arrays])
