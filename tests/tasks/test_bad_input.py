"""Every fault of a task's data has one clear message, before anything long happens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from task_rows import measurements, reviews

from polytask.errors import ConfigError, DataError, TaskError, UserError
from polytask.tasks import Task, TaskSet, build_tasks


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def test_missing_file_is_named_with_task_and_nearest(tmp_path: Path) -> None:
    write_csv(tmp_path / "reviews.csv", reviews())
    with pytest.raises(DataError, match=r"task 'r': .*revews\.csv.*reviews\.csv"):
        build_tasks({"r": {"data": "revews.csv", "target": "label"}}, tmp_path)


def test_missing_target_column_names_file_columns_and_nearest(tmp_path: Path) -> None:
    rows = [{"text": r["text"], "lable": r["label"]} for r in reviews()]
    write_csv(tmp_path / "reviews.csv", rows)
    with pytest.raises(TaskError) as caught:
        build_tasks({"reviews": {"data": "reviews.csv", "target": "label"}}, tmp_path)
    assert str(caught.value) == (
        "task 'reviews': column 'label' is missing in reviews.csv (has: text, lable). "
        "Did you mean 'lable'?"
    )


def test_missing_input_column_is_named_with_the_nearest() -> None:
    with pytest.raises(TaskError, match=r"column 'txt' is missing.*Did you mean 'text'"):
        Task.from_rows("r", reviews(), target="label", inputs={"text": "txt"})


def test_missing_template_column_is_named_with_the_nearest() -> None:
    with pytest.raises(TaskError, match=r"task 'r', memory: template slot '\{texts\}'.*'text'"):
        Task.from_rows("r", reviews(), target="label", template="Review: {texts}")


def test_misspelt_config_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"task 'r': unknown key 'taget'.*'target'"):
        build_tasks({"r": {"data": reviews(), "taget": "label"}})


def test_misspelt_schema_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown schema 'regresion'.*'regression'"):
        Task.from_rows("r", reviews(), target="label", schema="regresion")


def test_no_rows_is_an_error() -> None:
    with pytest.raises(TaskError, match="memory has no rows"):
        Task.from_rows("r", [], target="label")


def test_empty_given_split_is_named() -> None:
    from polytask.data.rows import MemoryRows

    data = {"train": reviews(), "test": MemoryRows([], "test.csv")}
    with pytest.raises(TaskError, match=r"the split 'test' is empty: test\.csv has no rows"):
        build_tasks({"r": {"data": data, "target": "label"}})


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_rows_to_split_is_an_error(count: int) -> None:
    with pytest.raises(TaskError, match=f"valid split is empty.*{count} usable rows"):
        Task.from_rows(
            "r", reviews(count), target="label", classes=["bad", "good"], schema="classification"
        )


def test_one_row_can_be_trained_on_when_nothing_is_held_out() -> None:
    task = Task.from_rows(
        "r", [{"text": "a b c", "y": 1.5}], schema="regression", target="y",
        inputs={"text": "text"}, split={"valid": 0, "test": 0},
    )  # fmt: skip
    assert {name: len(s) for name, s in task.splits.items()} == {"train": 1}  # type: ignore[arg-type]


def test_one_class_only_is_an_error() -> None:
    with pytest.raises(TaskError, match=r"column 'label' has only one class \('bad'\)"):
        Task.from_rows("r", reviews(30, ("bad",)), target="label")


def test_one_class_only_in_train_is_an_error_although_two_are_declared() -> None:
    with pytest.raises(TaskError, match=r"train split has only one class \('bad'\)"):
        Task.from_rows("r", reviews(30, ("bad",)), target="label", classes=["bad", "good"])


def test_constant_regression_target_is_an_error() -> None:
    rows = [{**row, "price": 3.0} for row in measurements()]
    with pytest.raises(TaskError, match=r"all targets in column 'price' are \[3.0\]"):
        Task.from_rows("p", rows, target="price", schema="regression")


def test_label_outside_the_verbaliser_names_row_label_and_nearest() -> None:
    rows = [*reviews(), {"text": "one more", "label": "goood"}]
    with pytest.raises(DataError, match=r"memory, row 61: label 'goood' is outside.*'good'"):
        Task.from_rows("r", rows, target="label", verbaliser={"good": "great", "bad": "awful"})


def test_two_tasks_of_one_name_are_refused() -> None:
    config = {"data": reviews(), "target": "label"}
    with pytest.raises(TaskError, match="two tasks are named 'r'"):
        build_tasks([("r", config), ("r", config)])
    task = Task.from_rows("r", reviews(), target="label")
    with pytest.raises(TaskError, match="two tasks are named 'r'"):
        TaskSet.of(task, task)


def test_image_that_does_not_decode_is_named_by_path(tmp_path: Path) -> None:
    rows = []
    for i in range(20):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(path)
        rows.append({"picture": str(path), "label": ("a", "b")[i % 2]})
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:30])
    with pytest.raises(DataError, match=r"row 8: image .*7\.png does not decode"):
        Task.from_rows("p", rows, target="label")
    (tmp_path / "7.png").unlink()
    with pytest.raises(DataError, match=r"image .*7\.png does not exist"):
        Task.from_rows("p", rows, target="label")


def test_ten_megabytes_of_text_in_a_cell_are_refused() -> None:
    rows = [*reviews(30), {"text": "long " * 2_000_000, "label": "bad"}]
    with pytest.raises(DataError, match=r"row 31: the cell in column 'text' holds 10 million"):
        Task.from_rows("r", rows, target="label")


@pytest.mark.parametrize("hole", [None, math.nan, ""])
def test_missing_targets_are_refused_above_the_share(hole: Any) -> None:
    rows = [{**row, "price": hole if i % 10 == 3 else row["price"]}
            for i, row in enumerate(measurements(50))]  # fmt: skip
    with pytest.raises(DataError, match=r"5 of 50 rows \(10 %\).*\n.*row 4: the target is missing"):
        Task.from_rows("p", rows, target="price", schema="regression")
    assert Task.from_rows("p", rows, target="price", schema="regression", max_bad=0.1)


def test_all_targets_missing_is_an_error() -> None:
    rows = [{**row, "label": None} for row in reviews()]
    with pytest.raises(TaskError, match="column 'label' of memory holds no label"):
        Task.from_rows("r", rows, target="label")
    with pytest.raises(TaskError, match="every label in column 'label' is missing"):
        Task.from_rows("r", rows, target="label", schema="classification")


def test_infinite_target_is_refused() -> None:
    rows = [*measurements(20), {"age": 1, "size": 1.0, "colour": "red", "price": math.inf}]
    with pytest.raises(DataError, match="row 21: target is infinite"):
        Task.from_rows("p", rows, target="price", schema="regression")


def test_empty_inputs_are_refused() -> None:
    rows = [*reviews(20), {"text": "  ", "label": "bad"}]
    with pytest.raises(DataError, match=r"row 21: the input is empty \(column 'text'\)"):
        Task.from_rows("r", rows, target="label")


def test_target_among_the_inputs_is_refused() -> None:
    with pytest.raises(TaskError, match="column 'label' is both an input and the target"):
        Task.from_rows("r", reviews(), target="label", inputs={"text": ["text", "label"]})


def test_number_of_tags_must_be_that_of_words() -> None:
    rows = [{"text": f"a b c{i}", "tags": "X Y X"} for i in range(20)]
    rows[4]["tags"] = "X Y"
    with pytest.raises(DataError, match="row 5: there are 2 tags for 3 words"):
        Task.from_rows("t", rows, target="tags", schema="tagging", inputs={"text": "text"})


def test_answer_outside_the_candidates_names_the_nearest() -> None:
    rows = [
        {"question": f"question {i}", "choices": ["apple", "pear"], "answer": "pear"}
        for i in range(20)
    ]
    rows[2]["answer"] = "appel"
    config = {"inputs": {"text": "question", "choices": "choices"}, "target": "answer"}
    with pytest.raises(DataError, match=r"row 3: answer 'appel' is not among.*'apple'"):
        Task.from_rows("c", rows, **config)


def test_a_single_candidate_is_refused() -> None:
    rows = [{"question": f"q {i}", "choices": ["a"], "answer": 0} for i in range(10)]
    with pytest.raises(DataError, match="at least two candidates, this row has 1"):
        Task.from_rows(
            "c", rows, inputs={"text": "question", "choices": "choices"}, target="answer"
        )


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"schema": "pair", "inputs": {"text": "text"}}, "needs two text columns, not 1"),
        ({"schema": "choice", "inputs": {"text": "text"}}, "needs 'choices'"),
        ({"schema": "forecasting", "inputs": {"text": "text"}}, "needs 'series'"),
        ({"schema": "dense", "inputs": {"text": "text"}}, "needs 'image'"),
        ({"schema": "tagging", "template": "x {text}"}, "no template"),
        ({"schema": "matching", "inputs": {"text": "text"}}, "needs two sides"),
        ({"split": {"kind": "given"}}, "has no splits of its own"),
        ({"split": {"kind": "group", "by": "nobody"}}, "column 'nobody' is missing"),
    ],
)
def test_combinations_that_cannot_work_are_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(TaskError, match=reason):
        Task.from_rows("r", reviews(), **{"target": "label", **config})


@pytest.mark.parametrize(
    ("split", "reason"),
    [
        ({"valid": 0.5, "test": 0.5}, "leaves nothing for train"),
        ({"kind": "group"}, "needs 'by'"),
        ({"kind": "grup", "by": "text"}, "'given', 'random', 'group' or 'time'"),
        ({"valid": -0.1}, "greater than or equal to 0"),
    ],
)
def test_impossible_splits_are_refused(split: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Task.from_rows("r", reviews(), target="label", split=split)


def test_a_target_that_cannot_be_guessed_is_asked_for() -> None:
    rows = [{"first": row["text"], "second": row["text"], "third": 1} for row in reviews()]
    with pytest.raises(TaskError, match=r"say which column is the target .*first, second, third"):
        Task.from_rows("r", rows)


def test_unreadable_times_are_shown() -> None:
    rows = [{**row, "day": "soon"} for row in reviews()]
    with pytest.raises(DataError, match="time 'soon' is neither a number nor an ISO date"):
        Task.from_rows(
            "r", rows, target="label", inputs={"text": "text"},
            split={"kind": "time", "by": "day"},
        )  # fmt: skip


def test_rows_without_a_group_are_shown_when_split_by_group() -> None:
    rows = [{**row, "who": None if i == 4 else f"p{i % 9}"} for i, row in enumerate(reviews())]
    with pytest.raises(DataError, match="row 5: the group to split by is missing"):
        Task.from_rows(
            "r", rows, target="label", inputs={"text": "text"},
            split={"kind": "group", "by": "who"},
        )  # fmt: skip


def test_misspelt_schema_key_is_told_its_own_name() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'shema'\. Did you mean 'schema'"):
        build_tasks({"r": {"data": reviews(), "shema": "classification"}})


def test_embedded_data_of_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'digits'"):
        build_tasks({"d": {"data": "embedded:digts"}})
