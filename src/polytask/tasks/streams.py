"""Tasks over streams: rows in order, too many to hold.

Training reads the stream itself. Valid and test are its first held-out rows, kept in memory,
chosen by a hash of their position, and training never sees a held-out position. Classes and
scales are learned from the first rows; a label that first occurs later is an error then, with its
place, so give `classes` where the data is not mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from polytask.data.rows import Row, RowSource, StreamSource
from polytask.errors import TaskError
from polytask.rng import derive
from polytask.tasks.sources import WHOLE, Source
from polytask.tasks.splits import SPLITS, TEST, TRAIN, VALID, StreamPart

if TYPE_CHECKING:
    from polytask.tasks.plan import Draft

PROBED = 10_000  # rows that classes and scales are learned from


@dataclass(frozen=True)
class HeldRows:
    """Some rows of a stream, held in memory, that know where they stand."""

    rows: Sequence[Row]
    part: StreamSource

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def columns(self) -> tuple[str, ...]:
        return self.part.columns

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def take(self, indices: Sequence[int]) -> list[Row]:
        return [self.rows[i] for i in indices]

    def where(self, index: int) -> str:
        return self.part.where(index)


def stream_sources(draft: Draft, run_seed: int) -> dict[str, Source]:
    """Train as a stream, valid and test as rows held in memory."""
    config = draft.config.split
    if draft.kind == "language_model" and draft.config.context is not None:
        raise TaskError(f"{draft.what}: a stream's texts are not cut into passages; omit 'context'")
    if draft.windows:
        raise TaskError(f"{draft.what}: forecasting windows cannot be cut from a stream")
    if config.kind in ("group", "time"):
        raise TaskError(
            f"{draft.what}: a stream is split by position; a split by '{config.kind}' needs data "
            "that is not streamed"
        )
    seed = derive(run_seed if config.seed is None else config.seed, "rows")
    most = config.held_out_rows
    given = dict(draft.sources)
    train = given.pop("train", None) or given.pop(WHOLE)
    if isinstance(train, RowSource):
        raise TaskError(f"{draft.what}: valid or test is a stream but train is not")
    valid = config.valid if "valid" not in given else 0.0
    test = config.test if "test" not in given else 0.0
    parts = {
        name: StreamPart(train, part, valid, test, seed)
        for name, part in zip(SPLITS, (TRAIN, VALID, TEST), strict=True)
    }
    found: dict[str, Source] = {"train": parts["train"]}
    for name in ("valid", "test"):
        source: Any = given.get(name)
        if source is None and parts[name].per_block:
            found[name] = HeldRows(list(islice(parts[name].read_from(0), most)), parts[name])
        elif isinstance(source, StreamSource):
            whole = StreamPart(source, TRAIN, 0.0, 0.0, seed)
            found[name] = HeldRows(list(islice(whole.read_from(0), most)), whole)
        elif source is not None:
            found[name] = source
    return found


def probe(stream: StreamSource) -> RowSource:
    """The first rows of a stream as a row source."""
    return HeldRows(list(islice(stream.read_from(0), PROBED)), stream)
