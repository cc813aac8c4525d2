"""Rows to examples: the `Processor` knows vocabulary, columns and layouts, and nothing of tensors.

It is fitted once on the train splits and saved with the model, so a prediction years later sees
exactly the ids and scales of training. Encoding works on batches of rows of one group.

    text          [START] text                        prefix = length (all tokens see each other)
    pair          [START] a [SEP] b
    choice        [START] question [SEP] candidate    one sequence per candidate
    generation    [START] prompt [SEP] answer [END]   prefix = up to and with [SEP]
    language      [START] text [END]                  prefix = 0 (causal)
    matching      two sequences, a and b
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field as Option

from polytask.configs import Config, parse
from polytask.data.rows import Row
from polytask.errors import CheckpointError, DataError, TaskError, suggestion
from polytask.files import write_json
from polytask.tasks.codec import TextCodec
from polytask.tasks.layouts import GroupLayout, layout_from_json
from polytask.tasks.sequences import SequenceBuilder
from polytask.tasks.task import TaskSet

Where = Callable[[int], str]


class ProcessorConfig(Config):
    """Sizes of what the model sees."""

    vocab_size: int = Option(4096, ge=301, description="ids of the text vocabulary")
    text_length: int = Option(64, ge=4, description="tokens a sequence may have, special included")
    image_size: int = Option(28, ge=1, description="height and width that images are resized to")
    series_length: int = Option(72, ge=1, description="most recent steps of a series that are kept")
    sentinels: int = Option(32, ge=0, description="spare ids for span corruption")
    modes: int = Option(8, ge=0, description="spare ids for objectives' mode tokens")
    max_categories: int = Option(1000, ge=1, description="values a table column may distinguish")
    fit_rows: int = Option(
        20_000, ge=1, description="rows per group read for vocabulary and scales"
    )
    seed: int = Option(0, description="draws the template of a row")


@dataclass
class Example:
    """One row, ready to be batched. Sequences hold arrays by field name ('text.ids', ...)."""

    sequences: list[dict[str, Any]]
    targets: dict[int, Any] = field(default_factory=dict)  # task id -> label
    row: int = 0  # index within the split


@dataclass(frozen=True)
class Processor:
    """Turns rows into examples. Made by `fit` or `load`."""

    config: ProcessorConfig
    codec: TextCodec
    layouts: tuple[GroupLayout, ...]

    @classmethod
    def fit(
        cls, taskset: TaskSet, config: ProcessorConfig | None = None, tokenizer: Any = None
    ) -> Processor:
        """Learn vocabulary, column statistics and sizes from the train splits.

        `tokenizer`: a Hugging Face fast tokenizer or a `TextCodec` to use as it is. Raises
        `DataError` when an answer or a candidate of any split does not fit in `text_length`.
        """
        from polytask.tasks.fit import fit_processor

        return fit_processor(taskset, config or ProcessorConfig(), tokenizer)

    @property
    def vocab_size(self) -> int:
        return self.codec.size

    @property
    def pad_id(self) -> int:
        return self.codec.pad

    @property
    def number_columns(self) -> int:
        """Global ids of number columns, over all tables."""
        return sum(len(table.numbers) for table in self._tables)

    @property
    def category_ids(self) -> int:
        """Global ids of categories, over all tables."""
        return sum(column.size for table in self._tables for column in table.categories)

    @property
    def feature_width(self) -> int:
        """Width of feature vectors; 0 without any."""
        return max((layout.feature_width for layout in self.layouts), default=0)

    @property
    def series_channels(self) -> int:
        """The most channels a series has; 0 without any."""
        return max((layout.series_channels for layout in self.layouts), default=0)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities that some group reads, sorted."""
        return tuple(sorted({f.modality for layout in self.layouts for f in layout.inputs}))

    @property
    def _tables(self) -> list[Any]:
        return [table for layout in self.layouts for table in layout.tables.values()]

    def group_of(self, task: str) -> int:
        """The group id of a task's name; `TaskError` with the nearest name when there is none."""
        names = [t.name for layout in self.layouts for t in layout.tasks]
        for number, layout in enumerate(self.layouts):
            if any(t.name == task for t in layout.tasks):
                return number
        raise TaskError(f"there is no task '{task}'.{suggestion(task, names)}")

    def templates(self, group_id: int) -> int:
        """How many templates the group has; evaluation scores each."""
        return self.layouts[group_id].templates

    def encode(
        self,
        group_id: int,
        rows: Sequence[Row],
        where: Where | None = None,
        *,
        indices: Sequence[int] | None = None,
        epochs: Sequence[int] | int | None = None,
        template: int = 0,
        with_targets: bool = True,
    ) -> list[Example]:
        """Examples of rows of one group, in order.

        `where(i)` says where `rows[i]` stands; `indices` are the rows' numbers in their split
        (default 0, 1, ...). With `epochs` each row's template is drawn from (seed, epoch, index);
        otherwise all use `template`. `with_targets=False` needs no label columns, and sequences to
        be continued end with the prompt. Raises `DataError` naming row and reason.
        """
        layout = self.layouts[group_id]
        place: Where = where or (lambda i: f"row {i + 1}")
        numbers = list(range(len(rows))) if indices is None else [int(i) for i in indices]
        chosen = layout.choose(template, numbers, epochs, self.config.seed)
        builder = SequenceBuilder(self.config, self.codec, layout, self.feature_width)
        try:
            sequences, targets = builder.build(rows, place, chosen, with_targets)
        except KeyError as error:
            raise self._missing_column(layout, rows, place, str(error.args[0])) from None
        return [Example(s, t, n) for s, t, n in zip(sequences, targets, numbers, strict=True)]

    def _missing_column(
        self, layout: GroupLayout, rows: Sequence[Row], where: Where, column: str
    ) -> DataError:
        at = next((i for i, row in enumerate(rows) if column not in row), 0)
        has = [str(name) for name in rows[at]]
        return DataError(
            f"task '{layout.tasks[0].name}': column '{column}' is missing in {where(at)} "
            f"(has: {', '.join(has)}).{suggestion(column, has)}"
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, up to the first [END]."""
        return self.codec.decode(ids)

    def save(self, folder: Path) -> None:
        """Write processor.json, codec.json and tokenizer.json into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        self.codec.save(folder)
        content = {
            "config": self.config.model_dump(),
            "layouts": [layout.to_json() for layout in self.layouts],
        }
        write_json(folder / "processor.json", content)

    @classmethod
    def load(cls, folder: Path) -> Processor:
        """Read what `save` wrote; encodes exactly as the saved one."""
        path = folder / "processor.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            layouts = tuple(layout_from_json(item) for item in content["layouts"])
            config = parse(ProcessorConfig, content["config"], str(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        return cls(config, TextCodec.load(folder), layouts)
