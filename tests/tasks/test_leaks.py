"""Leaks: planted duplicates are found, others are not, and quickly."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from task_rows import pictures

from polytask.errors import DataError
from polytask.tasks import LeakConfig, Task, TaskSet, check_leaks
from polytask.tasks.leakindex import LeakIndex
from polytask.tasks.ngrams import normal, shingles

VOCABULARY = [f"w{i}" for i in range(4000)]


def texts(count: int, low: int = 10, high: int = 25, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(VOCABULARY, k=rng.randint(low, high))) for _ in range(count)]


def given_task(name: str, train: list[str], test: list[str]) -> Task:
    data = {
        "train": [{"text": t, "label": "ab"[i % 2]} for i, t in enumerate(train)],
        "test": [{"text": t, "label": "ab"[i % 2]} for i, t in enumerate(test)],
    }
    return Task.from_rows(
        name, data, target="label", inputs={"text": "text"}, split={"kind": "given"}
    )


def found(*tasks: Task, **config: Any) -> dict[tuple[str, str, str], int]:
    report = check_leaks(TaskSet.of(*tasks), LeakConfig(**config))
    return {(leak.task, leak.train_task, leak.kind): leak.rows for leak in report.leaks}


def test_independent_texts_do_not_leak() -> None:
    assert found(given_task("a", texts(300), texts(100, seed=1))) == {}


def test_equal_rows_are_found_through_case_and_punctuation() -> None:
    train = texts(100)
    test = [train[5].upper() + "!", train[7].replace(" ", "  "), *texts(50, seed=1)]
    assert found(given_task("a", train, test)) == {("a", "a", "exact"): 2}


def test_long_texts_overlap_when_most_of_their_n_grams_were_trained_on() -> None:
    train = texts(100, 40, 40)
    changed = train[3].split()
    changed[-2:] = ["new", "end"]  # 31 of 33 8-grams are left
    scattered = train[4].split()
    scattered[::7] = ["other"] * len(scattered[::7])  # no 8-gram is left
    test = [" ".join(changed), " ".join(scattered), *texts(20, seed=1)]
    assert found(given_task("a", train, test)) == {("a", "a", "overlap"): 1}


def test_an_overlap_may_come_from_several_train_rows() -> None:
    train = texts(100, 40, 40)
    assert found(given_task("a", train, [f"{train[1]} {train[2]}", *texts(9, seed=1)])) == {
        ("a", "a", "overlap"): 1
    }


def test_short_texts_are_near_duplicates_of_one_train_row_only() -> None:
    train = ["the weather is lovely today", "my cat sleeps all day", *texts(20, 3, 6)]
    test = [
        "the weather is lovely today ok",  # near one row
        "the weather sleeps all day",  # made of two: near none
        *texts(20, 3, 6, seed=1),
    ]
    assert found(given_task("a", train, test)) == {("a", "a", "overlap"): 1}


def test_leaks_across_tasks_are_told_from_own_ones() -> None:
    shared = texts(30, seed=5)
    one = given_task("one", texts(100), [*shared[:4], *texts(50, seed=2)])
    two = given_task("two", [*shared, *texts(100, seed=3)], texts(50, seed=4))
    report = check_leaks(TaskSet.of(one, two))
    (leak,) = report.leaks
    assert (leak.task, leak.split, leak.train_task, leak.kind) == ("one", "test", "two", "exact")
    assert leak.rows == 4 and leak.share == pytest.approx(4 / 54)
    assert leak.examples[0] == ("memory, row 1", "memory, row 1")
    assert len(leak.examples) == 3
    assert report.worst == leak.share and report.rows == 104
    assert "4 test rows (7.41 %) stand in training of 'two'" in str(report)
    assert report.to_json()["leaks"][0]["rows"] == 4


def test_pictures_and_tables_are_compared_byte_by_byte() -> None:
    rows = pictures(60)
    data = {"train": rows[:40], "test": [rows[0], *rows[40:]]}
    picture = Task.from_rows(
        "p", data, target="shape", inputs={"image": "image"}, split={"kind": "given"}
    )
    table = [{"x": i * 0.5, "colour": "rgb"[i % 3], "y": i % 2} for i in range(60)]
    tables = {"train": table[:40], "test": [{**table[1]}, *table[40:]]}
    other = Task.from_rows("t", tables, target="y", split={"kind": "given"})
    assert found(picture, other) == {("p", "p", "exact"): 1, ("t", "t", "exact"): 1}


def test_the_random_split_never_leaks_exact_duplicates() -> None:
    rows = [{"text": t, "label": "ab"[i % 2]} for i, t in enumerate(texts(60) * 3)]
    assert found(Task.from_rows("a", rows, target="label")) == {}


def test_action_stop_raises_above_the_share_only() -> None:
    train = texts(100)
    task = given_task("a", train, [train[0], *texts(19, seed=1)])
    with pytest.raises(DataError, match=r"leak into training.*\n.*1 test rows \(5 %\)"):
        check_leaks(TaskSet.of(task), LeakConfig(action="stop"))
    check_leaks(TaskSet.of(task), LeakConfig(action="stop", max_share=0.05))


def test_warnings_are_logged_above_the_share(caplog: pytest.LogCaptureFixture) -> None:
    train = texts(100)
    check_leaks(TaskSet.of(given_task("a", train, [train[0], *texts(9, seed=1)])))
    assert "leak: task 'a': 1 test rows (10 %)" in caplog.text


def slow_grams(text: str, words: int, characters: int) -> set[tuple[str, ...]]:
    tokens = text.split(" ")
    if len(tokens) >= words:
        return {tuple(tokens[i : i + words]) for i in range(len(tokens) - words + 1)}
    return {tuple(text[i : i + characters]) for i in range(len(text) - characters + 1)}


@given(st.lists(st.text(st.sampled_from("ab 漢é"), max_size=40), max_size=8))
def test_shingles_equal_those_counted_by_hand(raw: list[str]) -> None:
    cleaned = [normal(text) for text in raw]
    hashes, row, _ = shingles(cleaned, 4, 3)
    fast = {i: len(set(hashes[row == i].tolist())) for i in range(len(cleaned))}
    slow = [slow_grams(text, 4, 3) for text in cleaned]
    assert fast == {i: len(grams) for i, grams in enumerate(slow)}
    long = [len(text.split(" ")) >= 4 for text in cleaned]
    for i, mine in enumerate(slow):
        for j in range(i):
            if long[i] == long[j]:
                shared = set(hashes[row == i].tolist()) & set(hashes[row == j].tolist())
                assert len(shared) == len(mine & slow[j])


def test_normal_text_levels_case_punctuation_and_spacing() -> None:
    assert normal("  Hello,\nWORLD! ") == "hello world"
    assert normal("Straße") == normal("STRASSE")
    assert normal("?!") == "?!"


def test_sampling_shingles_keeps_finding_whole_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polytask.tasks.leakindex.MOST_SHINGLES", 500)
    index = LeakIndex(8, 8, 0.7)
    train = texts(300, 40, 40)
    for start in range(0, 300, 100):
        piece = train[start : start + 100]
        index.add(0, start, np.arange(start, start + 100, dtype=np.uint64), piece)
    index.close()
    assert index.every > 1
    grams = index.grams([train[250] + " and more", "nothing of this kind " * 10])
    assert index.overlaps(grams, 2, 0, True) == [(0, 0, 250)]


@pytest.mark.slow
def test_a_hundred_thousand_short_rows_take_seconds() -> None:
    rows = texts(100_000, 4, 14)
    task = given_task("a", rows[:90_000], rows[90_000:])
    started = time.process_time()
    check_leaks(TaskSet.of(task))
    assert time.process_time() - started < 20


def test_a_thousand_small_tasks_are_checked_quickly() -> None:
    tasks = [given_task(f"t{i}", texts(8, seed=i), texts(3, seed=10_000 + i)) for i in range(1000)]
    started = time.process_time()
    assert found(*tasks) == {}
    assert time.process_time() - started < 20
