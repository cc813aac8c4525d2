"""Tasks over streams: held-out rows in memory, exact positions, classes from the first rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import pytest
from task_rows import WORDS

from polytask.data.rows import Row, RowSource, StreamSource
from polytask.errors import DataError, TaskError
from polytask.tasks import Processor, ProcessorConfig, Task


@dataclass
class Endless:
    """A stream of labelled texts that never ends."""

    name: str = "endless.jsonl"
    columns: tuple[str, ...] = ("text", "label")

    def read_from(self, position: int) -> Iterator[Row]:
        while True:
            text = f"{WORDS[position % 12]} of row {position}"
            yield {"text": text, "label": ("a", "b")[position % 2]}
            position += 1

    def where(self, index: int) -> str:
        return f"{self.name}, line {index + 1}"


def test_train_stays_a_stream_and_the_judged_rows_are_held() -> None:
    task = Task.from_rows("s", Endless(), target="label", split={"held_out_rows": 50})
    train, valid, test = (task.splits[n] for n in ("train", "valid", "test"))
    assert isinstance(train, StreamSource) and not isinstance(train, RowSource)
    assert isinstance(valid, RowSource) and isinstance(test, RowSource)
    assert (len(valid), len(test)) == (50, 50)
    held = {row["text"] for s in (valid, test) for row in s.take(range(50))}
    seen = {row["text"] for row in islice(train.read_from(0), 3000)}
    assert not held & seen
    first = test[0]["text"].rsplit(" ", 1)[1]
    assert test.where(0) == f"endless.jsonl, line {int(first) + 1}"


def test_the_split_of_a_stream_can_be_resumed_anywhere() -> None:
    task = Task.from_rows("s", Endless(), target="label")
    train = task.splits["train"]
    assert isinstance(train, StreamSource)
    whole = list(islice(train.read_from(0), 1500))
    assert list(islice(train.read_from(1203), 4)) == whole[1203:1207]


def test_a_processor_can_be_fitted_on_a_stream() -> None:
    task = Task.from_rows("s", Endless(), target="label")
    from polytask.tasks import TaskSet

    processor = Processor.fit(
        TaskSet.of(task), ProcessorConfig(vocab_size=400, text_length=16, fit_rows=200)
    )
    rows = list(islice(Endless().read_from(10), 4))
    assert [e.targets[0] for e in processor.encode(0, rows)] == [0, 1, 0, 1]


@pytest.mark.parametrize("split", [{"kind": "time", "by": "text"}, {"kind": "group", "by": "text"}])
def test_streams_are_only_split_by_position(split: dict[str, str]) -> None:
    with pytest.raises(TaskError, match="a stream is split by position"):
        Task.from_rows("s", Endless(), target="label", inputs={"text": "text"}, split=split)


def test_bad_labels_in_the_first_rows_of_a_stream_are_shown() -> None:
    class Bad(Endless):
        def read_from(self, position: int) -> Iterator[Row]:
            for i, row in enumerate(super().read_from(position), start=position):
                yield {**row, "label": "oops"} if i % 10 == 4 else row

    with pytest.raises(DataError, match=r"endless\.jsonl, line \d+: label 'oops' is outside"):
        Task.from_rows("s", Bad(), target="label", classes=["a", "b"])
