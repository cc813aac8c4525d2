"""Learns what a `Processor` knows: vocabulary, column statistics, widths, room for answers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from polytask.data.rows import Row, RowSource, StreamSource
from polytask.errors import DataError
from polytask.tasks.arrays import feature_values, series_values
from polytask.tasks.codec import TextCodec
from polytask.tasks.layouts import GroupLayout, mode_of
from polytask.tasks.schemas import Choice, Generation, is_missing
from polytask.tasks.sequences import candidates_of
from polytask.tasks.tables import TableCodec, TableFitter
from polytask.tasks.task import RowGroup, TaskSet
from polytask.tasks.templates import Template

if TYPE_CHECKING:
    from polytask.tasks.encode import Processor, ProcessorConfig

log = logging.getLogger("polytask.tasks")

CHUNK = 4096
MEASURED_TEXTS = 20_000  # over all tasks, to say how many texts are shortened
LONGEST_TEXT = 10_000  # characters of one cell that the vocabulary learns from


def fit_processor(taskset: TaskSet, config: ProcessorConfig, tokenizer: Any = None) -> Processor:
    """See `Processor.fit`."""
    from polytask.tasks.encode import Processor

    fitter = TableFitter(config.max_categories)
    layouts, samples, first = [], [], 0
    for group in taskset.groups:
        rows = sample_rows(group.splits["train"], config.fit_rows)
        layouts.append(_layout(group, first, rows, fitter))
        samples.append(rows)
        first += len(group.tasks)
    if tokenizer is None:
        texts = (
            text[:LONGEST_TEXT]
            for layout, rows in zip(layouts, samples, strict=True)
            for text in _texts(layout, rows)
        )
        codec = TextCodec.train(texts, config.vocab_size, config.sentinels, config.modes)
    else:
        codec = TextCodec.of(tokenizer)
    _say_what_is_shortened(layouts, samples, codec, config)
    fitted = [
        _with_answer_room(layout, group, codec, config)
        for layout, group in zip(layouts, taskset.groups, strict=True)
    ]
    return Processor(config, codec, tuple(fitted))


def sample_rows(source: RowSource | StreamSource, most: int) -> list[Row]:
    """Up to `most` rows: evenly spaced from a row source, the first ones of a stream."""
    if not isinstance(source, RowSource):
        return list(islice(source.read_from(0), most))
    size = len(source)
    positions = np.unique(np.linspace(0, size - 1, min(size, most)).astype(np.int64))
    return source.take(positions.tolist()) if size else []


def chunks(source: RowSource, size: int = CHUNK) -> Iterator[tuple[int, list[Row]]]:
    """(first index, rows) over a whole source."""
    for start in range(0, len(source), size):
        yield start, source.take(range(start, min(start + size, len(source))))


def _layout(group: RowGroup, first: int, rows: Sequence[Row], fitter: TableFitter) -> GroupLayout:
    modes = {mode_of(type(task.schema)) for task in group.tasks}
    mode = modes.pop() if len(modes) == 1 else "words"
    tables: dict[str, TableCodec] = {}
    width = channels = 0
    for f in group.inputs:
        if f.modality == "table":
            categories = group.tasks[0].options.get("categories", ())
            tables[f.slot] = fitter.fit(rows, f.columns, categories)
        elif f.modality == "features":
            width = max(width, *(feature_values(row, f.columns[0]).shape[1] for row in rows))
        elif f.modality == "series":
            channels = max(
                channels, *(series_values(row, f.columns).shape[1] for row in rows[:100])
            )
    return GroupLayout(
        name=group.name,
        tasks=tuple(_without_rows(task) for task in group.tasks),
        first_id=first,
        mode=mode,
        tables=tables,
        feature_width=width,
        series_channels=channels,
    )


def _say_what_is_shortened(
    layouts: Sequence[GroupLayout],
    samples: Sequence[Sequence[Row]],
    codec: TextCodec,
    config: ProcessorConfig,
) -> None:
    """Log which tasks' texts are often longer than the model reads."""
    per_group = max(16, min(200, MEASURED_TEXTS // max(len(layouts), 1)))
    for layout, rows in zip(layouts, samples, strict=True):
        fields = [(f, templates[0]) for f, templates in layout.texts if f.slot != "choices"]
        if not fields:
            continue
        lengths = np.zeros(min(len(rows), per_group), np.int64)
        for _, template in fields:
            texts = [
                template.fill(template.contents(row))[:LONGEST_TEXT] for row in rows[:per_group]
            ]
            lengths += [len(ids) for ids in codec.encode(texts)]
        share = float((lengths > config.text_length).mean())
        if share > 0:
            log.log(
                logging.WARNING if share >= 0.5 else logging.INFO,
                "task '%s': about %.0f %% of the texts are longer than text_length = %d tokens "
                "and are shortened",
                layout.tasks[0].name,
                100 * share,
                config.text_length,
            )


def _without_rows(task: Any) -> Any:
    from dataclasses import replace

    return replace(task, splits={})


def _texts(layout: GroupLayout, rows: Sequence[Row]) -> Iterator[str]:
    """Every text that the vocabulary should serve: prompts, answers, candidates."""
    for f, templates in layout.texts:
        for row in rows:
            if f.slot == "choices":
                yield from candidates_of(row, f)
            else:
                yield templates[0].fill(templates[0].contents(row))
        yield from ("".join(t.literals) for t in templates[1:])
    for task in layout.tasks:
        if isinstance(task.schema, Generation):
            labels = (task.raw_label(row) for row in rows)
            yield from (task.schema.read(label) for label in labels if not is_missing(label))


def _with_answer_room(
    layout: GroupLayout, group: RowGroup, codec: TextCodec, config: ProcessorConfig
) -> GroupLayout:
    """Measure the longest answer (or candidate) of every split; refuse what cannot fit.

    Answers are labels and labels are never cut, so this must be known before training starts.
    """
    from dataclasses import replace

    schema = layout.tasks[0].schema
    if not isinstance(schema, Generation | Choice):
        return layout
    words = _template_tokens(layout, codec)
    longest, place = 0, ""
    for source in group.splits.values():
        if not isinstance(source, RowSource):
            rows = sample_rows(source, config.fit_rows)
            length, at = _longest(layout, rows, codec)
            spot = source.where(at)
        else:
            length, spot = 0, ""
            for start, rows in chunks(source):
                found, at = _longest(layout, rows, codec)
                if found > length:
                    length, spot = found, source.where(start + at)
        if length > longest:
            longest, place = length, spot
    fixed = len(codec.start) + len(codec.sep) + words
    fixed += 1 if isinstance(schema, Generation) else len(codec.close)
    if fixed + longest > config.text_length:
        what = "answer" if isinstance(schema, Generation) else "candidate"
        raise DataError(
            f"task '{layout.tasks[0].name}': the {what} in {place} has {longest} tokens and labels "
            f"are never cut. Set text_length to at least {fixed + longest} "
            f"(it is {config.text_length})."
        )
    return replace(layout, answer_room=longest + 1) if isinstance(schema, Generation) else layout


def _template_tokens(layout: GroupLayout, codec: TextCodec) -> int:
    """Tokens of the wordiest template of each text field, slots empty."""

    def empty(template: Template) -> str:
        return template.fill([""] * len(template.slots))

    return sum(
        max(len(ids) for ids in codec.encode([empty(t) for t in templates]))
        for f, templates in layout.texts
        if f.slot != "choices"
    )


def _longest(layout: GroupLayout, rows: Sequence[Row], codec: TextCodec) -> tuple[int, int]:
    """Tokens of the longest answer or candidate of some rows, and which row has it."""
    task = layout.tasks[0]
    texts, owner = [], []
    for i, row in enumerate(rows):
        if isinstance(task.schema, Choice):
            options = next(f for f in layout.inputs if f.slot == "choices")
            found = candidates_of(row, options)
        else:
            label = task.raw_label(row)
            found = [] if is_missing(label) else [codec.joiner + task.schema.read(label)]
        texts += found
        owner += [i] * len(found)
    lengths = [len(ids) for ids in codec.encode(texts)]
    if not lengths:
        return 0, 0
    top = int(np.argmax(lengths))
    return lengths[top], owner[top]
