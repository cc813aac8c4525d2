"""Long documents as passages: a language model learns from all of a text, not from its beginning.

A document of more than `words` words becomes several rows of at most that many. Documents are
split into train, valid and test first and cut afterwards, so no document stands on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from polytask.data.rows import Row, RowSource
from polytask.tasks.fit import chunks
from polytask.tasks.templates import cell_text

Ints = npt.NDArray[np.int64]
_WORD = re.compile(r"\S+\s*")


@dataclass(frozen=True)
class PassageRows:
    """Passages as rows: `column` holds characters start to stop of the document's text."""

    source: RowSource
    column: str
    owner: Ints = field(repr=False)  # (passages,) row of the source
    start: Ints = field(repr=False)
    stop: Ints = field(repr=False)

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def columns(self) -> tuple[str, ...]:
        return self.source.columns

    def __len__(self) -> int:
        return len(self.owner)

    def __getitem__(self, index: int) -> Row:
        return self.take([index])[0]

    def take(self, indices: Sequence[int]) -> list[Row]:
        places = np.asarray(indices, np.int64)
        owners, which = np.unique(self.owner[places], return_inverse=True)
        rows = self.source.take(owners.tolist())
        return [
            {
                **rows[k],
                self.column: cell_text(rows[k][self.column])[self.start[p] : self.stop[p]],
            }
            for p, k in zip(places, which, strict=True)
        ]

    def where(self, index: int) -> str:
        first, last = int(self.start[index]), int(self.stop[index])
        return f"{self.source.where(int(self.owner[index]))}, characters {first + 1} to {last}"


def cut_passages(source: RowSource, column: str, words: int) -> PassageRows:
    """Every document in passages of at most `words` words; blank documents give none."""
    owner: list[int] = []
    edges: list[tuple[int, int]] = []
    for first, rows in chunks(source):
        for number, row in enumerate(rows, start=first):
            found = list(_WORD.finditer(cell_text(row[column])))
            for k in range(0, len(found), words):
                owner.append(number)
                edges.append((found[k].start(), found[min(k + words, len(found)) - 1].end()))
    spans = np.array(edges, np.int64).reshape(-1, 2)
    return PassageRows(source, column, np.array(owner, np.int64), spans[:, 0], spans[:, 1])
