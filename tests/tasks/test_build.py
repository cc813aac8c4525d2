"""From configurations to a task set: guesses, splits, shared rows, scale."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from task_rows import measurements, pictures, reviews

from polytask.data.rows import MemoryRows
from polytask.errors import TaskError
from polytask.tasks import Task, TaskConfig, TaskSet, build_tasks
from polytask.tasks.schemas import (
    Classification,
    Dense,
    Forecasting,
    Generation,
    LanguageModel,
    Matching,
    MultiLabel,
    Pair,
    Regression,
    Tagging,
)


def sizes(task: Task) -> dict[str, int]:
    return {name: len(rows) for name, rows in task.splits.items()}  # type: ignore[arg-type]


def test_a_task_from_rows_takes_one_line() -> None:
    task = Task.from_rows("reviews", reviews(), target="label")
    assert task.schema == Classification(("bad", "good"))
    assert task.inputs[0].columns == ("text",)
    assert sizes(task) == {"train": 42, "valid": 6, "test": 12}


def test_a_data_frame_is_rows_even_with_a_column_called_name() -> None:
    import pandas as pd

    frame = pd.DataFrame(reviews()).assign(name="x")
    assert Task.from_rows("r", frame, target="label", inputs={"text": "text"}).schema == (
        Classification(("bad", "good"))
    )


def test_configs_as_mappings_and_as_objects_are_the_same() -> None:
    rows = reviews()
    one = build_tasks({"r": {"data": rows, "target": "label", "schema": "classification"}})
    two = build_tasks({"r": TaskConfig(data=rows, target="label", schema="classification")})
    assert one.tasks[0].schema == two.tasks[0].schema
    assert sizes(one.tasks[0]) == sizes(two.tasks[0])


def test_files_are_found_relative_to_the_base(tmp_path: Path) -> None:
    lines = ["text,label", *(f"{r['text']},{r['label']}" for r in reviews(30))]
    (tmp_path / "reviews.csv").write_text("\n".join(lines))
    task = build_tasks({"r": {"data": "reviews.csv", "target": "label"}}, tmp_path).tasks[0]
    assert sizes(task) == {"train": 21, "valid": 3, "test": 6}
    assert "reviews.csv, line" in task.splits["train"].where(0)


def test_files_per_split_are_kept_and_a_missing_part_is_cut_from_train(tmp_path: Path) -> None:
    for name, count in (("a", 40), ("b", 10)):
        lines = ["text,label", *(f"{name} {r['text']},{r['label']}" for r in reviews(count))]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    config = {"data": {"train": "a.csv", "test": "b.csv"}, "target": "label"}
    task = build_tasks({"r": config}, tmp_path).tasks[0]
    assert sizes(task) == {"train": 36, "valid": 4, "test": 10}
    only = build_tasks({"r": {**config, "split": {"kind": "given"}}}, tmp_path).tasks[0]
    assert sizes(only) == {"train": 40, "test": 10}


def test_a_given_test_split_without_labels_is_left_out_and_said(tmp_path: Path) -> None:
    rows = reviews(40)
    hidden = [{**row, "label": -1} for row in reviews(10)]
    config = {"data": {"train": rows, "valid": rows[:10], "test": hidden}, "target": "label"}
    taskset = build_tasks({"r": config})
    assert sizes(taskset.tasks[0]) == {"train": 36, "valid": 4, "test": 10}
    assert any("'test' has no labels" in note for note in taskset.notes)
    assert any("valid split is used as test" in note for note in taskset.notes)


def test_a_column_can_hold_the_split() -> None:
    rows = [
        {**row, "fold": ("train", "train", "dev", "test")[i % 4]}
        for i, row in enumerate(reviews(80))
    ]
    for i, row in enumerate(rows):
        row["label"] = ("bad", "good")[(i // 4) % 2]
    task = Task.from_rows("r", rows, target="label", split={"kind": "given", "by": "fold"})
    assert sizes(task) == {"train": 40, "valid": 20, "test": 20}
    assert [f.columns for f in task.inputs] == [("text",)]


def test_splits_by_group_and_by_time_follow_their_column() -> None:
    rows = [{**row, "who": f"p{i % 9}", "day": f"2024-01-{i % 28 + 1:02d}"}
            for i, row in enumerate(reviews(120))]  # fmt: skip
    common: dict[str, Any] = {"target": "label", "inputs": {"text": "text"}}
    by_group = Task.from_rows("g", rows, split={"kind": "group", "by": "who"}, **common)
    people = [{row["who"] for row in s.take(range(len(s)))} for s in by_group.splits.values()]  # type: ignore[arg-type,union-attr]
    assert not people[0] & people[1] and not people[0] & people[2] and not people[1] & people[2]
    by_time = Task.from_rows("t", rows, split={"kind": "time", "by": "day"}, **common)
    days = [[row["day"] for row in s.take(range(len(s)))] for s in by_time.splits.values()]  # type: ignore[arg-type,union-attr]
    assert max(days[0]) < min(days[1]) <= max(days[1]) < min(days[2])


def test_the_split_does_not_depend_on_the_order_of_rows() -> None:
    rows = reviews(100)
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(100)]

    def texts(task: Task, split: str) -> set[str]:
        return {row["text"] for row in task.splits[split]}  # type: ignore[union-attr]

    a = Task.from_rows("r", rows, target="label")
    b = Task.from_rows("r", shuffled, target="label")
    assert texts(a, "test") == texts(b, "test") and texts(a, "valid") == texts(b, "valid")


def test_tasks_on_the_same_rows_share_them_with_missing_labels_allowed() -> None:
    rows = pictures()
    config = {"data": rows, "inputs": {"image": "image"}}
    taskset = build_tasks(
        {"shape": {**config, "target": "shape"}, "weight": {**config, "target": "weight"}}
    )
    (group,) = taskset.groups
    assert [task.name for task in group.tasks] == ["shape", "weight"]
    assert group.tasks[0].splits is group.tasks[1].splits
    assert isinstance(group.tasks[1].schema, Regression)
    alone = build_tasks(
        {
            "shape": {**config, "target": "shape", "share_rows": False},
            "w": {**config, "target": "weight", "max_bad": 0.5},
        }
    )
    assert len(alone.groups) == 2


def test_tasks_with_other_inputs_or_splits_do_not_share_rows() -> None:
    rows = pictures()
    taskset = build_tasks(
        {
            "a": {"data": rows, "inputs": {"image": "image"}, "target": "shape"},
            "b": {
                "data": rows,
                "inputs": {"image": "image"},
                "target": "shape",
                "split": {"seed": 3},
            },
        }
    )
    assert len(taskset.groups) == 2


def test_regression_learns_the_scale_of_the_train_split() -> None:
    task = Task.from_rows("price", measurements(), target="price")
    train = [row["price"] for row in task.splits["train"]]  # type: ignore[union-attr]
    assert isinstance(task.schema, Regression)
    assert task.schema.mean == pytest.approx((np.mean(train),))
    assert task.schema.std == pytest.approx((np.std(train),))
    assert {f.modality: f.columns for f in task.inputs} == {"table": ("age", "size", "colour")}


def rows_of(**columns: list[Any]) -> list[dict[str, Any]]:
    return [dict(zip(columns, cells)) for cells in zip(*columns.values())]


SENTENCES = [f"a sentence with number {i} in it" for i in range(40)]
SERIES = [np.sin(np.arange(20) + i) for i in range(40)]


@pytest.mark.parametrize(
    ("rows", "config", "expected"),
    [
        (rows_of(text=SENTENCES, label=[0, 1] * 20), {}, Classification(("0", "1"))),
        (rows_of(text=SENTENCES, label=[True, False] * 20), {}, Classification(("false", "true"))),
        (rows_of(text=SENTENCES, score=[i * 0.37 for i in range(40)]), {}, Regression),
        (
            rows_of(premise=SENTENCES, hypothesis=SENTENCES[::-1], label=["y", "n"] * 20),
            {},
            Pair(("n", "y")),
        ),
        (
            rows_of(text=SENTENCES, tags=[["x"], ["x", "y"]] * 20),
            {"schema": None},
            MultiLabel(("x", "y")),
        ),
        (
            rows_of(words=[["he", f"ran{i}"] for i in range(40)], tags=[["P", "V"]] * 40),
            {"inputs": {"text": "words"}},
            Tagging(("P", "V")),
        ),
        (rows_of(prompt=SENTENCES, completion=[s[::-1] for s in SENTENCES]), {}, Generation()),
        (rows_of(text=SENTENCES), {}, LanguageModel()),
        (
            rows_of(history=SERIES, future=[s[:5] for s in SERIES]),
            {},
            Forecasting(5),
        ),
        (
            rows_of(text=SENTENCES, x=[0, 1] * 20, y=[1, 1, 0, 0] * 10),
            {"target": ["x", "y"], "inputs": {"text": "text"}},
            MultiLabel(("x", "y")),
        ),
        (
            rows_of(text=SENTENCES, x=[i * 1.0 for i in range(40)], y=[i * 2.5 for i in range(40)]),
            {"target": ["x", "y"], "inputs": {"text": "text"}},
            Regression,
        ),
        (
            rows_of(a=SENTENCES, b=SENTENCES[::-1]),
            {"schema": "matching", "inputs": {"text": ["a", "b"]}},
            Matching(),
        ),
        (
            rows_of(
                image=[np.zeros((4, 4), np.uint8) + i for i in range(40)],
                mask=[np.eye(4, dtype=np.uint8)] * 40,
            ),
            {"target": "mask", "inputs": {"image": "image"}, "schema": "dense"},
            Dense(("0", "1"), 4, 4),
        ),
    ],
    ids=lambda value: getattr(value, "kind", None) if not isinstance(value, list | dict) else None,
)
def test_what_is_left_out_is_guessed(
    rows: list[dict[str, Any]], config: dict[str, Any], expected: Any
) -> None:
    schema = Task.from_rows("guess", rows, **config).schema
    if isinstance(expected, type):
        assert isinstance(schema, expected)
    else:
        assert schema == expected


def test_verbaliser_words_become_the_classes_in_their_order() -> None:
    rows = [{"text": s, "label": i % 3} for i, s in enumerate(SENTENCES)]
    task = Task.from_rows(
        "r", rows, target="label", verbaliser={0: "negative", 1: "neutral", 2: "positive"}
    )
    assert isinstance(task.schema, Classification)
    assert task.schema.classes == ("negative", "neutral", "positive")
    assert task.schema.read(2) == 2


def test_class_names_given_beside_class_numbers_are_joined_by_position() -> None:
    rows = [{"text": s, "label": i % 2} for i, s in enumerate(SENTENCES)]
    schema = Task.from_rows("r", rows, target="label", classes=["no", "yes"]).schema
    assert schema.read(1) == 1 and schema.show(1) == "yes"


def test_identifiers_are_not_inputs() -> None:
    rows = [{"id": i, **row} for i, row in enumerate(measurements())]
    task = Task.from_rows("price", rows, target="price")
    assert task.inputs[0].columns == ("age", "size", "colour")


def test_repeated_rows_are_noted_with_the_first_pair() -> None:
    rows = reviews(40)
    taskset = build_tasks({"r": {"data": [*rows, rows[3]], "target": "label"}})
    (note,) = taskset.notes
    assert "1 of 41 rows repeat" in note and "row 41 repeats memory, row 4" in note


def test_a_few_bad_rows_are_left_out_counted_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    rows = [*reviews(200), {"text": "no label", "label": None}]
    task = Task.from_rows("r", rows, target="label")
    assert sum(sizes(task).values()) == 200
    assert "1 of 201 rows (0.498 %)" in caplog.text
    assert "memory, row 201: the target is missing" in caplog.text


def test_names_and_ids_of_tasks() -> None:
    taskset = TaskSet.of(*(Task.from_rows(n, reviews(), target="label") for n in ("a", "b")))
    assert taskset.task_id("b") == 1 and taskset.group_of == (0, 1)
    with pytest.raises(TaskError, match="there is no task 'c'"):
        taskset.task_id("c")


def test_embedded_data_brings_its_own_configuration() -> None:
    task = build_tasks({"digits": {"data": "embedded:digits"}}).tasks[0]
    assert task.schema == Classification(tuple(str(d) for d in range(10)))
    assert {f.modality for f in task.inputs} == {"image"}
    assert set(task.splits) == {"train", "valid", "test"}


def test_a_thousand_tasks_are_built_in_time_proportional_to_their_number() -> None:
    def seconds(count: int) -> float:
        rows = {f"t{i}": MemoryRows(reviews(12), f"t{i}") for i in range(count)}
        started = time.process_time()
        taskset = build_tasks({n: {"data": r, "target": "label"} for n, r in rows.items()})
        assert len(taskset.tasks) == count
        assert [taskset.task_id(n) for n in taskset.names] == list(range(count))
        return time.process_time() - started

    seconds(20)
    few, many = seconds(100), seconds(1000)
    assert many < 20 * few + 0.5
    assert many < 5


def test_a_thousand_tasks_can_label_the_same_rows() -> None:
    rows = [
        {"text": s, **{f"y{k}": (i >> (k % 5)) % 2 for k in range(1000)}}
        for i, s in enumerate(SENTENCES)
    ]
    taskset = build_tasks(
        {
            f"t{k}": {"data": rows, "target": f"y{k}", "inputs": {"text": "text"}}
            for k in range(1000)
        }
    )
    (group,) = taskset.groups
    assert len(group.tasks) == 1000
