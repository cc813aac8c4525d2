"""Passages: nothing of a document is lost, and no document is on both sides of a split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytask.data.rows import MemoryRows
from polytask.errors import TaskError
from polytask.tasks import Task
from polytask.tasks.passages import cut_passages

WORDS = st.text(st.sampled_from("ab \n\té漢"), max_size=60)


@given(st.lists(WORDS, max_size=6), st.integers(1, 5))
def test_passages_hold_every_word_once_in_order(texts: list[str], words: int) -> None:
    source = MemoryRows([{"t": text} for text in texts])
    passages = cut_passages(source, "t", words)
    rows = passages.take(range(len(passages)))
    assert all(1 <= len(row["t"].split()) <= words for row in rows)
    for number, text in enumerate(texts):
        own = [row["t"] for row, owner in zip(rows, passages.owner, strict=True) if owner == number]
        assert "".join(own) == text.lstrip()
        assert sum(len(p.split()) for p in own) == len(text.split())


def test_a_passage_says_where_it_stands() -> None:
    passages = cut_passages(MemoryRows([{"t": "one two three four five"}]), "t", 2)
    assert [row["t"] for row in passages.take([2, 0])] == ["five", "one two "]
    assert passages.where(1) == "memory, row 1, characters 9 to 19"


def test_documents_are_split_before_they_are_cut() -> None:
    rows = [{"text": f"document {i} has several words of its own"} for i in range(30)]
    task = Task.from_rows("lm", rows, schema="language_model", context=3)
    owners = [
        {int(s.source.indices[o]) for o in s.owner}  # type: ignore[union-attr]
        for s in task.splits.values()
    ]
    assert not owners[0] & owners[1] and not owners[0] & owners[2] and not owners[1] & owners[2]
    assert sum(len(s) for s in task.splits.values()) == 30 * 3  # type: ignore[misc,arg-type]


def test_passages_of_several_columns_are_refused() -> None:
    rows = [{"a": f"some words {i}", "b": "more words"} for i in range(30)]
    with pytest.raises(TaskError, match="cuts one text column into passages, not 2"):
        Task.from_rows("lm", rows, schema="language_model", inputs={"text": ["a", "b"]}, context=3)
