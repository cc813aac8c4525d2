"""Documents as chunks for denoisers, with an account of every token.

    documents -> ids + end -> (a random piece of those longer than 65,536) -> one file of tokens
    an epoch: documents in a shuffled order, joined; each denoiser gets a range of the joined
    tokens, as long as its share of the reading; cut into chunks of the length that it needs

Tokens are on disk and mapped, so memory does not grow with the corpus. Chunk k of a denoiser is a
function of (seed, denoiser, k): a run that resumes replays nothing. Within an epoch every token is
in exactly one chunk, or in the tail of a range (fewer tokens than a chunk), which is accounted for.

The pipeline is that of UL2 and T5 (arXiv 1910.10683, 2205.05131), with ranges of one joined text in
place of files per task.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from polytask import files, rng
from polytask.errors import DataError

Ids = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]
Encode = Callable[[Sequence[str]], Sequence[Sequence[int]]]
LONGEST = 65_536  # tokens of a document that are kept, at a random place
_SLICE = 256  # documents encoded in one call
_KEPT = 16  # epochs' orders that are held


@dataclass(frozen=True, eq=False)
class TokenStore:
    """Documents one after the other, each closed by an end token if there is one."""

    ids: Ids  # (tokens,)
    offsets: Ints  # (documents + 1,)
    read: int  # tokens of all documents before cutting, ends included

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def cut(self) -> int:
        """Tokens of documents longer than `LONGEST` that are left out."""
        return self.read - self.tokens

    @classmethod
    def write(
        cls,
        folder: Path,
        documents: Iterable[str],
        encode: Encode,
        end: int | None,
        seed: int = 0,
        longest: int = LONGEST,
        held_out: float = 0.0,
    ) -> dict[str, TokenStore]:
        """Encode documents into `folder`: {'train': store, 'valid': store}. A document is held out
        by a draw on its number. `DataError` where there is nothing to train on."""
        with files.building(folder) as aside:
            parts = {part: _Writer(aside, part) for part in ("train", "valid")}
            for number, ids in enumerate(_encoded(documents, encode, end)):
                out = rng.derive(seed, "held out", number) / 2**63 < held_out
                parts["valid" if out else "train"].add(ids, number, seed, longest)
            for writer in parts.values():
                writer.close()
            if not parts["train"].tokens:
                raise DataError("the corpus has no text to train on")
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> dict[str, TokenStore]:
        """What `write` left, mapped into memory; `CheckpointError` where it is not whole."""
        files.read_manifest(folder)
        found = {}
        for part in ("train", "valid"):
            facts = json.loads((folder / f"{part}.json").read_text(encoding="utf-8"))
            path, size = folder / f"{part}.tokens", facts["tokens"]
            ids = np.memmap(path, np.int32, "r", shape=(size,)) if size else np.zeros(0, np.int32)
            found[part] = cls(ids, np.load(folder / f"{part}.npy"), facts["read"])
        return found


class _Writer:
    def __init__(self, folder: Path, part: str) -> None:
        self.folder, self.part = folder, part
        self.handle = (folder / f"{part}.tokens").open("wb")
        self.lengths: list[int] = []
        self.read = self.tokens = 0

    def add(self, ids: Ids, number: int, seed: int, longest: int) -> None:
        self.read += len(ids)
        if len(ids) > longest:
            first = int(rng.generator(seed, "piece", number).integers(len(ids) - longest + 1))
            ids = ids[first : first + longest]
        self.handle.write(ids.tobytes())
        self.lengths.append(len(ids))
        self.tokens += len(ids)

    def close(self) -> None:
        self.handle.close()
        offsets = np.concatenate([[0], np.cumsum(np.array(self.lengths, np.int64))])
        np.save(self.folder / f"{self.part}.npy", offsets.astype(np.int64), allow_pickle=False)
        facts = {"tokens": self.tokens, "read": self.read, "documents": len(self.lengths)}
        files.write_json(self.folder / f"{self.part}.json", facts)


def _encoded(documents: Iterable[str], encode: Encode, end: int | None) -> Iterator[Ids]:
    tail = [] if end is None else [end]
    source = iter(documents)
    while some := list(islice(source, _SLICE)):
        for ids in encode(some):
            if len(ids):
                yield np.array([*ids, *tail], np.int32)


@dataclass
class ChunkReader:
    """Chunks for several denoisers from one store.

    sizes: tokens of a chunk, per denoiser. shares: how often each is drawn; a denoiser's range of
    an epoch is in proportion to share x size, so that all of them come round together.
    """

    store: TokenStore
    sizes: Sequence[int]
    shares: Sequence[float]
    seed: int = 0
    names: Sequence[str] = ()
    _orders: dict[int, tuple[Ints, Ints]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        weight = np.array(self.shares, np.float64) * np.array(self.sizes)
        edges = np.rint(np.cumsum(weight) / weight.sum() * self.store.tokens).astype(np.int64)
        self._ranges = np.diff(edges, prepend=0)
        self._first = edges - self._ranges
        self._chunks = self._ranges // np.array(self.sizes)
        short = [at for at, c in enumerate(self._chunks) if c < 1 and self.shares[at] > 0]
        if short:
            at = short[0]
            name = self.names[at] if self.names else f"number {at}"
            raise DataError(
                f"the corpus has {self.store.tokens} tokens, {self._ranges[at]} of them for the "
                f"denoiser {name}, which reads chunks of {self.sizes[at]}. Give more text, shorter "
                "inputs, or fewer denoisers"
            )

    @property
    def per_epoch(self) -> Ints:
        """(denoisers,) chunks that each gets out of an epoch."""
        return np.asarray(self._chunks)

    @property
    def tails(self) -> Ints:
        """(denoisers,) tokens of each range that fill no chunk, per epoch."""
        return np.asarray(self._ranges - self._chunks * np.array(self.sizes), np.int64)

    def take(self, denoiser: int, numbers: npt.ArrayLike) -> Ids:
        """(m, N): these chunks (m,) of a denoiser, counted on through the epochs."""
        size, per = self.sizes[denoiser], int(self._chunks[denoiser])
        wanted = np.asarray(numbers, np.int64).reshape(-1)
        out = np.empty((len(wanted), size), np.int32)
        for row, number in enumerate(wanted.tolist()):
            epoch, place = divmod(number, per)
            self._copy(epoch, int(self._first[denoiser]) + place * size, out[row])
        return out

    def account(self, counts: Sequence[int]) -> list[dict[str, int]]:
        """Per denoiser, after `counts` chunks of each: text tokens read, epochs finished, and
        tokens that those left in tails."""
        found = []
        for at, count in enumerate(counts):
            finished = count // max(1, int(self._chunks[at]))
            found.append(
                {
                    "chunks": int(count),
                    "tokens": int(count) * int(self.sizes[at]),
                    "epochs": finished,
                    "tail": finished * int(self.tails[at]),
                }
            )
        return found

    def _copy(self, epoch: int, start: int, out: Ids) -> None:
        """Tokens from `start` on of an epoch's joined text."""
        order, begins = self._order(epoch)
        at, filled = int(np.searchsorted(begins, start, "right")) - 1, 0
        while filled < len(out):
            document = int(order[at])
            skip = start + filled - int(begins[at])
            first = int(self.store.offsets[document]) + skip
            count = min(len(out) - filled, int(self.store.offsets[document + 1]) - first)
            out[filled : filled + count] = self.store.ids[first : first + count]
            filled += count
            at += 1

    def _order(self, epoch: int) -> tuple[Ints, Ints]:
        """Documents in the order of an epoch, and where each begins in the joined text."""
        if epoch not in self._orders:
            if len(self._orders) >= _KEPT:
                del self._orders[min(self._orders)]
            order = rng.generator(self.seed, "documents", epoch).permutation(self.store.documents)
            lengths = np.diff(self.store.offsets)[order]
            self._orders[epoch] = (order, np.cumsum(lengths) - lengths)
        return self._orders[epoch]


class DrawCounter:
    """How many of the examples before one were drawn for each denoiser; nothing but the draws
    decides it, so it can be found again at any time."""

    def __init__(self, draw: Callable[[Ints], Ints], denoisers: int, block: int = 8192) -> None:
        self.draw = draw
        self.denoisers = denoisers
        self.block = block
        self._totals = [np.zeros(denoisers, np.int64)]  # before each block

    def before(self, row: int) -> Ints:
        """(denoisers,) counts over examples 0 .. row - 1."""
        block = row // self.block
        while len(self._totals) <= block:
            first = (len(self._totals) - 1) * self.block
            self._totals.append(self._totals[-1] + self._count(first, first + self.block))
        return self._totals[block] + self._count(block * self.block, row)

    def _count(self, first: int, last: int) -> Ints:
        if last <= first:
            return np.zeros(self.denoisers, np.int64)
        drawn = self.draw(np.arange(first, last))
        return np.bincount(drawn, minlength=self.denoisers).astype(np.int64)
