"""Builds the sequences and labels of a batch of rows of one group, layout by layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from polytask.data.rows import Row
from polytask.errors import DataError
from polytask.tasks.arrays import feature_values, image_pixels, series_values
from polytask.tasks.codec import TextCodec
from polytask.tasks.fitting import Segment, encode_documents
from polytask.tasks.layouts import GroupLayout
from polytask.tasks.schemas import Choice, Matching, Tagging, is_missing, words_of
from polytask.tasks.task import Field, Task
from polytask.tasks.templates import Template, cell_text

if TYPE_CHECKING:
    from polytask.tasks.encode import ProcessorConfig

Where = Callable[[int], str]
Sequences = list[dict[str, Any]]
Targets = dict[int, Any]
T = TypeVar("T")

ANSWER = Template.parse("{answer}")


@dataclass(frozen=True)
class SequenceBuilder:
    """One group's way from rows to sequences."""

    config: ProcessorConfig
    codec: TextCodec
    layout: GroupLayout
    feature_width: int

    def build(
        self, rows: Sequence[Row], where: Where, chosen: Sequence[int], with_targets: bool
    ) -> tuple[list[Sequences], list[Targets]]:
        """Per row: its sequences, and its labels by task id (none without targets)."""
        modes = {
            "plain": self._plain,
            "words": self._words,
            "choice": self._choice,
            "match": self._match,
            "generate": self._generate,
            "language": self._language,
        }
        if with_targets:
            for column in {c for task in self.layout.tasks for c in task.target_columns}:
                if rows and not any(column in row for row in rows):
                    raise KeyError(column)
        return modes[self.layout.mode](rows, where, chosen, with_targets)

    # One sequence per row, read by every task of the group.

    def _plain(
        self, rows: Sequence[Row], where: Where, chosen: Sequence[int], with_targets: bool
    ) -> tuple[list[Sequences], list[Targets]]:
        parts = self._side(self.layout.inputs, rows, where, chosen)
        return [[part] for part in parts], self._labels(rows, where, with_targets)

    def _words(
        self, rows: Sequence[Row], where: Where, chosen: Sequence[int], with_targets: bool
    ) -> tuple[list[Sequences], list[Targets]]:
        """Text given as words: whole words are kept while they fit, tags go to first sub-words."""
        (text, _), *_ = self.layout.texts
        others = [f for f in self.layout.inputs if f is not text]
        parts = self._side(others, rows, where, chosen)
        targets = self._labels(rows, where, with_targets)
        column = text.columns[0]
        words = each(rows, where, lambda row: [cell_text(w) for w in words_of(row[column])])
        room = self._room()
        tag_ids = [i for i, t in self._tasks() if isinstance(t.schema, Tagging)]
        for i, (ids, word_ids) in enumerate(self.codec.encode_words(words)):
            kept = _whole_words(word_ids, room)
            sequence = [*self.codec.start, *ids[:kept], *self.codec.close]
            parts[i] |= bidirectional(sequence)
            for task in tag_ids:
                if task in targets[i]:
                    targets[i][task] = self._aligned(
                        targets[i][task], word_ids[:kept], len(words[i]), len(sequence), where, i
                    )
        return [[part] for part in parts], targets

    def _aligned(
        self, tags: Any, word_ids: Sequence[int], words: int, length: int, where: Where, i: int
    ) -> Any:
        if len(tags) != words:
            raise DataError(f"{where(i)}: there are {len(tags)} tags for {words} words")
        labels = np.full(length, -100, np.int32)
        word_of = np.asarray(word_ids, np.int64)
        first = np.flatnonzero(np.diff(word_of, prepend=-1))
        labels[len(self.codec.start) + first] = tags[word_of[first]]
        return labels

    # Several sequences per row.

    def _choice(
        self, rows: Sequence[Row], where: Where, chosen: Sequence[int], with_targets: bool
    ) -> tuple[list[Sequences], list[Targets]]:
        options = next(f for f in self.layout.inputs if f.slot == "choices")
        others = [f for f in self.layout.inputs if f.modality != "text"]
        parts = self._side(others, rows, where, chosen)
        candidates = each(rows, where, lambda row: candidates_of(row, options))
        documents, owner = [], []
        for i, row in enumerate(rows):
            question = self._segments(row, chosen[i])
            for candidate in candidates[i]:
                documents.append([*question, Segment(ANSWER, [candidate], fixed=True)])
                owner.append(i)
        encoded = self._joined(documents, lambda d: where(owner[d]))
        sequences: list[Sequences] = [[] for _ in rows]
        for i, ids in zip(owner, encoded, strict=True):
            sequences[i].append(parts[i] | bidirectional(ids))
        targets: list[Targets] = [{} for _ in rows]
        for number, task in self._tasks() if with_targets else []:
            assert isinstance(task.schema, Choice)
            for i, row in enumerate(rows):
                label = task.raw_label(row)
                if not is_missing(label):
                    answer = at(i, where, task.schema.resolve, label, candidates[i])
                    targets[i][number] = answer
        return sequences, targets

    def _match(
        self, rows: Sequence[Row], where: Where, chosen: Sequence[int], with_targets: bool
    ) -> tuple[list[Sequences], list[Targets]]:
        sides = [
            self._side([f for f in self.layout.inputs if f.slot == slot], rows, where, chosen)
            for slot in ("a", "b")
        ]
        targets: list[Targets] = [{} for _ in rows]
        for number, task in self._tasks() if with_targets else []:
            assert isinstance(task.schema, Matching)
            for i, row in enumerate(rows):
                label = task.raw_label(row) if task.target_columns else content_key(sides[1][i])
                if not is_missing(label):
                    targets[i][number] = task.schema.read(label)
        return [[a, b] for a, b in zip(*sides, strict=True)], targets

    # Sequences to be continued.

    def _generate(
        self, rows: Sequence[Row], where: Where, chosen: Sequence[int], with_targets: bool
    ) -> tuple[list[Sequences], list[Targets]]:
        codec, ((number, task),) = self.codec, self._tasks()
        others = [f for f in self.layout.inputs if f.modality != "text"]
        parts = self._side(others, rows, where, chosen)
        room = self._room(len(codec.sep) + self.layout.answer_room, close=False)
        documents = [self._segments(row, chosen[i]) for i, row in enumerate(rows)]
        prompts = self._joined(documents, where, room, close=False)
        answers = self._answers(task, rows, where) if with_targets else [None] * len(rows)
        targets: list[Targets] = [{} for _ in rows]
        for i, answer in enumerate(answers):
            prompt = [*prompts[i], *codec.sep]
            ids = prompt if answer is None else [*prompt, *answer]
            if len(ids) > self.config.text_length:
                raise DataError(
                    f"{where(i)}: the answer needs {len(ids) - len(prompt)} tokens, which with the "
                    f"prompt is more than text_length = {self.config.text_length}"
                )
            parts[i] |= {"text.ids": np.array(ids, np.int32), "text.prefix": len(prompt)}
            if answer is not None:
                labels = np.array(ids, np.int32)
                labels[: len(prompt)] = -100
                targets[i][number] = labels
        return [[part] for part in parts], targets

    def _answers(self, task: Task, rows: Sequence[Row], where: Where) -> list[list[int] | None]:
        """Ids of each answer with its [END]; None where a row has none."""
        texts: list[str | None] = []
        for i, row in enumerate(rows):
            label = task.raw_label(row)
            texts.append(None if is_missing(label) else at(i, where, task.schema.read, label))
        encoded = iter(self.codec.encode([self.codec.joiner + t for t in texts if t is not None]))
        return [None if t is None else [*next(encoded), self.codec.end] for t in texts]

    def _language(
        self, rows: Sequence[Row], where: Where, chosen: Sequence[int], with_targets: bool
    ) -> tuple[list[Sequences], list[Targets]]:
        codec, ((number, _),) = self.codec, self._tasks()
        others = [f for f in self.layout.inputs if f.modality != "text"]
        parts = self._side(others, rows, where, chosen)
        documents = [self._segments(row, chosen[i]) for i, row in enumerate(rows)]
        encoded = self._joined(documents, where, self._room(1, close=False), close=False)
        targets: list[Targets] = [{} for _ in rows]
        for i, ids in enumerate(encoded):
            whole = np.array([*ids, codec.end] if with_targets else ids, np.int32)
            parts[i] |= {"text.ids": whole, "text.prefix": 0}
            if with_targets:
                labels = whole.copy()
                labels[: len(codec.start)] = -100
                targets[i][number] = labels
        return [[part] for part in parts], targets

    # Pieces.

    def _tasks(self) -> list[tuple[int, Task]]:
        return list(enumerate(self.layout.tasks, start=self.layout.first_id))

    def _room(self, reserved: int = 0, close: bool = True) -> int:
        """Ids that texts may have beside special tokens and `reserved` ones."""
        ends = len(self.codec.start) + (len(self.codec.close) if close else 0)
        return self.config.text_length - ends - reserved

    def _segments(self, row: Row, chosen: int, slot: str | None = None) -> list[Segment]:
        """The row's texts (of one slot, if given), candidates left out, in the chosen template."""
        segments = []
        for text, templates in self.layout.texts:
            if text.slot != "choices" and slot in (None, text.slot):
                template = templates[chosen % len(templates)]
                segments.append(Segment(template, template.contents(row)))
        return segments

    def _joined(
        self,
        documents: Sequence[list[Segment]],
        where: Where,
        room: int | None = None,
        close: bool = True,
    ) -> list[list[int]]:
        """[START] segment [SEP] segment ... per document, within the room."""
        codec = self.codec
        between = len(codec.sep) * (len(documents[0]) - 1) if documents else 0
        free = self._room(close=close) if room is None else room
        encoded = encode_documents(codec, documents, free - between, where)
        joined = []
        for parts in encoded:
            ids = [*codec.start, *parts[0]]
            for part in parts[1:]:
                ids += [*codec.sep, *part]
            joined.append([*ids, *codec.close] if close else ids)
        return joined

    def _side(
        self, fields: Sequence[Field], rows: Sequence[Row], where: Where, chosen: Sequence[int]
    ) -> list[dict[str, Any]]:
        """One sequence per row from `fields`; all texts of a side share one sequence."""
        parts: list[dict[str, Any]] = [{} for _ in rows]
        slots = {f.slot for f in fields if f.modality == "text"}
        if slots and rows:
            one = next(iter(slots)) if len(slots) == 1 else None
            documents = [self._segments(row, chosen[i], one) for i, row in enumerate(rows)]
            for part, ids in zip(parts, self._joined(documents, where), strict=True):
                part |= bidirectional(ids)
        for f in fields:
            self._other(f, rows, where, parts)
        return parts

    def _other(
        self, f: Field, rows: Sequence[Row], where: Where, parts: list[dict[str, Any]]
    ) -> None:
        column = f.columns[0]
        if f.modality == "image":
            size = self.config.image_size
            pixels = each(rows, where, lambda row: image_pixels(row[column], size))
            _store(parts, "image.pixels", pixels)
        elif f.modality == "series":
            kept = self.config.series_length
            values = each(rows, where, lambda row: series_values(row, f.columns)[-kept:])
            _store(parts, "series.values", values)
        elif f.modality == "features":
            width = self.feature_width
            values = each(rows, where, lambda row: feature_values(row, column, width))
            _store(parts, "features.values", values)
        elif f.modality == "table":
            table = self.layout.tables[f.slot]
            try:
                numbers = table.encode_numbers(rows)
            except ValueError:
                each(rows, where, lambda row: table.encode_numbers([row]))
                raise
            ids = np.array([c.id for c in table.numbers], np.int32)
            categories = table.encode_categories(rows)
            for part, number, category in zip(parts, numbers, categories, strict=True):
                part |= {
                    "table.number": number,
                    "table.number_id": ids,
                    "table.category": category,
                }

    def _labels(self, rows: Sequence[Row], where: Where, with_targets: bool) -> list[Targets]:
        """Labels of tasks that read a cell by itself; a missing label is simply absent."""
        targets: list[Targets] = [{} for _ in rows]
        for number, task in self._tasks() if with_targets else []:
            for i, row in enumerate(rows):
                label = task.raw_label(row)
                if not is_missing(label):
                    targets[i][number] = at(i, where, task.schema.read, label)
        return targets


def bidirectional(ids: Sequence[int]) -> dict[str, Any]:
    """A text whose tokens all see each other."""
    return {"text.ids": np.array(ids, np.int32), "text.prefix": len(ids)}


def candidates_of(row: Row, options: Field) -> list[str]:
    """A row's candidates: a list in one column, or one column each."""
    if len(options.columns) > 1:
        return [cell_text(row[column]) for column in options.columns]
    value = row[options.columns[0]]
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ValueError(f"candidates should be a list, not a {type(value).__name__}")
    found = [cell_text(item) for item in value]
    if len(found) < 2:
        raise ValueError(f"a choice needs at least two candidates, this row has {len(found)}")
    return found


def content_key(part: dict[str, Any]) -> str:
    """Text that identifies what a sequence holds."""
    import hashlib

    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(part):
        value = part[name]
        digest.update(name.encode())
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else str(value).encode())
    return digest.hexdigest()


def at(i: int, where: Where, read: Callable[..., T], *values: Any) -> T:
    """`read(*values)`, its `ValueError` turned into a `DataError` that says where."""
    try:
        return read(*values)
    except ValueError as error:
        raise DataError(f"{where(i)}: {error}") from None


def each(rows: Sequence[Row], where: Where, read: Callable[[Row], T]) -> list[T]:
    """`read` of every row, failures with their place."""
    out = []
    for i, row in enumerate(rows):
        try:
            out.append(read(row))
        except ValueError as error:
            raise DataError(f"{where(i)}: {error}") from None
    return out


def _store(parts: list[dict[str, Any]], name: str, values: Sequence[Any]) -> None:
    for part, value in zip(parts, values, strict=True):
        part[name] = value


def _whole_words(word_ids: Sequence[int], room: int) -> int:
    """How many ids to keep so that the last word kept is whole."""
    if len(word_ids) <= room:
        return len(word_ids)
    kept = room
    while kept > 0 and word_ids[kept] == word_ids[kept - 1]:
        kept -= 1
    return kept
