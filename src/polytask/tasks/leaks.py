"""Does a judged row stand, whole or nearly, in what was trained on?

Every valid and test row is looked up among the train rows of its own task and of all others:
exactly (inputs with case, punctuation and spacing of texts levelled; pictures, series and tables
byte by byte), and by overlap. A text of at least `ngram` words overlaps when the share `overlap`
of its word n-grams occurs in training (the rule of Chowdhery et al. 2022, PaLM, section 8); a
shorter one when that share of its character shingles stands in one train row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field as Option

from polytask.configs import Config
from polytask.data.rows import RowSource
from polytask.errors import DataError
from polytask.tasks.fit import chunks
from polytask.tasks.hashing import Hashes, cell_bytes, digest
from polytask.tasks.leakindex import Found, LeakIndex
from polytask.tasks.ngrams import normal
from polytask.tasks.task import RowGroup, TaskSet
from polytask.tasks.templates import cell_text

log = logging.getLogger("polytask.tasks")

Kind = Literal["exact", "overlap"]
JUDGED = ("valid", "test")


class LeakConfig(Config):
    """When judged rows count as leaked, and what to do about it."""

    ngram: int = Option(8, ge=2, description="words of an n-gram")
    shingle: int = Option(8, ge=3, description="characters of a shingle, for shorter texts")
    overlap: float = Option(0.7, gt=0, le=1, description="share of n-grams that makes an overlap")
    max_share: float = Option(0.01, ge=0, le=1, description="share of leaked rows that is borne")
    action: Literal["warn", "stop"] = "warn"


@dataclass(frozen=True)
class Leak:
    """Rows of one judged split that occur in one task's training."""

    task: str
    split: str
    train_task: str
    kind: Kind
    rows: int
    share: float  # of the judged split
    examples: tuple[tuple[str, str], ...]  # (judged row, train row), at most three

    def __str__(self) -> str:
        own = (
            "its own training"
            if self.task == self.train_task
            else f"training of '{self.train_task}'"
        )
        how = "stand in" if self.kind == "exact" else "nearly stand in"
        shown = "".join(f"\n  {judged} ~ {train}" for judged, train in self.examples)
        return (
            f"task '{self.task}': {self.rows} {self.split} rows ({100 * self.share:.3g} %) "
            f"{how} {own}:{shown}"
        )


@dataclass(frozen=True)
class LeakReport:
    """All leaks found, worst first, and how many judged rows were looked up."""

    leaks: tuple[Leak, ...]
    rows: int

    @property
    def worst(self) -> float:
        """The largest share of a judged split that leaked from one task's training."""
        return max((leak.share for leak in self.leaks), default=0.0)

    def to_json(self) -> dict[str, Any]:
        return {"rows": self.rows, "leaks": [asdict(leak) for leak in self.leaks]}

    def __str__(self) -> str:
        if not self.leaks:
            return f"no leaks among {self.rows} judged rows"
        return "\n".join(str(leak) for leak in self.leaks)


def check_leaks(taskset: TaskSet, config: LeakConfig | None = None) -> LeakReport:
    """Compare every judged split with every train split; streams take part with what is held.

    Leaks above `max_share` are logged as warnings, or raise `DataError` where `action` is 'stop'.
    """
    config = config or LeakConfig()
    seen = LeakIndex(config.ngram, config.shingle, config.overlap)
    for number, group in enumerate(taskset.groups):
        for start, hashes, texts in _read(group, "train"):
            seen.add(number, start, hashes, texts)
    seen.close()
    leaks, rows = [], 0
    for number, group in enumerate(taskset.groups):
        for split in JUDGED:
            source = group.splits.get(split)
            if not isinstance(source, RowSource) or not len(source):
                continue
            rows += len(source)
            leaks += _judge(taskset, number, split, source, seen)
    report = LeakReport(tuple(sorted(leaks, key=lambda leak: -leak.share)), rows)
    over = [str(leak) for leak in report.leaks if leak.share > config.max_share]
    if over and config.action == "stop":
        raise DataError(
            f"judged rows leak into training (more than max_share = {config.max_share:g}):\n"
            + "\n".join(over)
        )
    for line in over:
        log.warning("leak: %s", line)
    return report


def _read(group: RowGroup, split: str) -> Iterator[tuple[int, Hashes, list[str]]]:
    """(first row, content hashes, normalised texts) of a split's rows, in chunks."""
    source = group.splits.get(split)
    if not isinstance(source, RowSource):
        return
    text_columns = [c for f in group.inputs if f.modality == "text" for c in f.columns]
    others = [c for f in group.inputs if f.modality != "text" for c in f.columns]
    for start, rows in chunks(source):
        texts = [normal(" ".join(cell_text(row[c]) for c in text_columns)) for row in rows]
        hashes = np.array(
            [
                digest(b"\x1f".join([text.encode("utf-8", "surrogatepass"), *_cells(row, others)]))
                for text, row in zip(texts, rows, strict=True)
            ],
            np.uint64,
        )
        yield start, hashes, texts


def _cells(row: Any, columns: list[str]) -> list[bytes]:
    return [cell_bytes(row[column]) for column in columns]


def _judge(
    taskset: TaskSet, number: int, split: str, source: RowSource, seen: LeakIndex
) -> list[Leak]:
    """Leaks of one judged split: from its own training, and from that of others."""
    group = taskset.groups[number]
    places: dict[tuple[bool, Kind], Found] = {}
    for start, hashes, texts in _read(group, split):
        grams = seen.grams(texts)
        for same in (True, False):
            exact = seen.equal(hashes, number, same)
            known = {i for i, _, _ in exact}
            near = seen.overlaps(grams, len(hashes), number, same)
            places.setdefault((same, "exact"), []).extend(_moved(exact, start))
            near = [place for place in near if place[0] not in known]
            places.setdefault((same, "overlap"), []).extend(_moved(near, start))
    leaks = []
    for (_, kind), rows in places.items():
        for train in sorted({g for _, g, _ in rows}):
            pairs = [(i, r) for i, g, r in rows if g == train]
            other = taskset.groups[train]
            trained = other.splits["train"]
            leaks.append(
                Leak(
                    task=group.name,
                    split=split,
                    train_task=other.name,
                    kind=kind,
                    rows=len(pairs),
                    share=len(pairs) / len(source),
                    examples=tuple((source.where(i), trained.where(r)) for i, r in pairs[:3]),
                )
            )
    return leaks


def _moved(found: Found, start: int) -> Found:
    return [(start + i, group, row) for i, group, row in found]
