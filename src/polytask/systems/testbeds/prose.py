"""English prose for language pretraining: Webster's dictionary as a stream of tokens.

Entries of `embedded:gcide` in a shuffled order, each closed by the codec's end token; 5 % of the
headwords are held out. The vocabulary (byte-level BPE by default) is trained on training entries
only, with 32 sentinels and the mode tokens [R], [S], [X]. Both are built once and cached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from polytask import rng
from polytask.data import embedded
from polytask.data.embedded.folders import builders_lock, whole
from polytask.data.embedded.sources import cache_root
from polytask.errors import DataError
from polytask.files import building
from polytask.objectives import draws
from polytask.objectives.denoising import Specials
from polytask.tasks.codec import TextCodec
from polytask.tasks.tokenizer_training import train_tokenizer

Ids = npt.NDArray[np.int32]
Part = Literal["train", "valid", "test"]
PARTS: tuple[Part, ...] = ("train", "valid", "test")
MODES = {"R": 0, "S": 1, "X": 2}  # places in `codec.modes`
SENTINELS = 32
_VERSION = 1
_LEARNED_FROM = 12_000  # entries the vocabulary is trained on


@dataclass(frozen=True, eq=False)
class Prose:
    """A codec, and one stream of token ids per part."""

    codec: TextCodec
    tokens: dict[Part, Ids]

    @property
    def specials(self) -> Specials:
        """Sentinels, end, modes and mask of the codec, for `polytask.objectives`."""
        modes = {name: self.codec.modes[at] for name, at in MODES.items()}
        return Specials(self.codec.sentinels, self.codec.end, modes, self.codec.mask)

    def windows(self, part: Part, length: int, seed: int, rows: npt.ArrayLike) -> Ids:
        """(n, length): window r of a part begins at a place drawn for (seed, r)."""
        stream = self.tokens[part]
        last = len(stream) - length
        if last < 0:
            raise DataError(f"the {part} prose has {len(stream)} tokens, fewer than {length}")
        first = draws.below(seed, f"windows of {part}", rows, last + 1)
        return np.asarray(stream[first[:, None] + np.arange(length)])

    def blocks(self, part: Part, length: int, count: int | None = None) -> Ids:
        """(n, length): the part from its start, cut without overlap; for held-out scores."""
        stream = self.tokens[part]
        n = len(stream) // length if count is None else count
        if n * length > len(stream) or n == 0:
            raise DataError(f"the {part} prose has {len(stream)} tokens, fewer than {n} x {length}")
        return np.asarray(stream[: n * length].reshape(n, length))


@cache
def prose(vocab: int = 1024, kind: Literal["bpe", "word"] = "bpe", entries: int = 30_000) -> Prose:
    """The prose of at most `entries` training entries under a vocabulary of `vocab` ids.

    Built and cached the first time (about half a minute); `DataError` says how to fetch the
    dictionary where it is not here.
    """
    key = hashlib.sha256(f"{_VERSION} {vocab} {kind} {entries}".encode()).hexdigest()[:12]
    folder = cache_root() / "testbeds" / f"prose-{kind}-{vocab}-{key}"
    if not whole(folder):
        with builders_lock(folder):
            if not whole(folder, warn=True):
                _build(folder, vocab, kind, entries)
    codec = TextCodec.load(folder)
    return Prose(codec, {part: np.load(folder / f"{part}.npy", mmap_mode="r") for part in PARTS})


def _build(folder: Path, vocab: int, kind: Literal["bpe", "word"], entries: int) -> None:
    rows = embedded.load("gcide")
    texts: dict[Part, list[str]] = {}
    for part in PARTS:
        order = rng.generator(0, "prose", part).permutation(len(rows[part]))[:entries]
        texts[part] = [str(row["text"]) for row in rows[part].take(order.tolist())]
    codec = train_tokenizer(texts["train"][:_LEARNED_FROM], vocab, kind, SENTINELS)
    with building(folder) as aside:
        codec.save(aside)
        for part in PARTS:
            np.save(aside / f"{part}.npy", _stream(codec, texts[part]), allow_pickle=False)


def _stream(codec: TextCodec, texts: Sequence[str]) -> Ids:
    """All texts one after the other, each closed by the end token."""
    parts: list[Ids] = []
    for first in range(0, len(texts), 1000):
        encoded = codec.encode(texts[first : first + 1000])
        parts += [np.array([*ids, codec.end], np.int32) for ids in encoded]
    return np.concatenate(parts)
