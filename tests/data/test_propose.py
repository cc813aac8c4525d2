"""`propose`: a folder of data becomes a commented configuration that builds."""

import csv
import json
import random
from datetime import datetime, timedelta

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from polytask.configs import parse
from polytask.data import propose
from polytask.data.profile import profile
from polytask.data.proposing import flow
from polytask.data.rows import MemoryRows
from polytask.errors import DataError
from polytask.tasks.build import build_tasks
from polytask.tasks.config import TaskConfig

draw = random.Random(0)
WORDS = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog", "then", "some", "good", "bad"]
START = datetime(2020, 1, 1)


def text(count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def write(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows([header, *rows])


def proposed(folder) -> tuple[dict, str]:
    """The tasks as read back from YAML, each checked to be a TaskConfig, and the text."""
    written = propose(folder)
    tasks = yaml.safe_load(written)["tasks"]
    for name, task in tasks.items():
        parse(TaskConfig, task, name)
    return tasks, written


def test_a_text_with_labels_and_numbers_is_a_task_for_each(tmp_path):
    rows = [[i, text(9), draw.choice(["pos", "neg", "mixed"]), draw.random()] for i in range(1204)]
    write(tmp_path / "reviews.csv", ["id", "review", "label", "grade"], rows)
    tasks, written = proposed(tmp_path)
    assert list(tasks) == ["reviews_label", "reviews_grade"]
    assert tasks["reviews_label"] == {
        "data": "reviews.csv",
        "schema": "classification",
        "inputs": {"text": "review"},
        "target": "label",
        "split": {"kind": "random", "valid": 0.1, "test": 0.2},
    }
    assert tasks["reviews_grade"]["schema"] == "regression"
    assert "# 'label' has 3 distinct values in 1,204 rows" in written
    assert "# 'review' is text (9 words a cell)" in written


@pytest.mark.parametrize(
    ("header", "row", "schema", "inputs", "target"),
    [
        (
            ["premise", "hypothesis", "label"],
            lambda i: [text(8), text(5), "yn"[i % 2]],
            "pair",
            {"text": ["premise", "hypothesis"]},
            "label",
        ),
        (
            ["question", "answer"],
            lambda i: [text(8), text(12)],
            "generation",
            {"text": "question"},
            "answer",
        ),
        (
            ["about", "topics"],
            lambda i: [text(9), "; ".join(draw.sample(["red", "round", "big", "old"], 1 + i % 3))],
            "multilabel",
            {"text": "about"},
            "topics",
        ),
        (
            ["comment", "toxic", "spam", "rude"],
            lambda i: [text(9), *(draw.randint(0, 1) for _ in range(3))],
            "multilabel",
            {"text": "comment"},
            ["toxic", "spam", "rude"],
        ),
        (["line"], lambda i: [text(20)], "language_model", {"text": "line"}, None),
        (
            ["width", "height", "kind"],
            lambda i: [draw.random(), draw.random(), "abc"[i % 3]],
            "classification",
            {"table": ["width", "height"]},
            "kind",
        ),
        (
            ["price", "area", "rooms"],
            lambda i: [draw.random() * 1e5, draw.random() * 100, i % 5],
            "regression",
            {"table": ["area", "rooms"]},
            "price",
        ),
    ],
)
def test_columns_suggest_the_schema(tmp_path, header, row, schema, inputs, target):
    write(tmp_path / "data.csv", header, [row(i) for i in range(300)])
    tasks, _ = proposed(tmp_path)
    (task,) = tasks.values()
    assert (task["schema"], task["inputs"], task.get("target")) == (schema, inputs, target)


def test_other_possible_targets_of_a_table_stand_as_comments(tmp_path):
    write(tmp_path / "t.csv", ["a", "b", "c"], [[draw.random() for _ in "abc"] for _ in range(99)])
    tasks, written = proposed(tmp_path)
    assert list(tasks) == ["t"] and tasks["t"]["target"] == "c"
    lines = [line[4:] for line in written.splitlines() if line.startswith("  # ")]
    again = yaml.safe_load("\n".join(line for line in lines if not line.startswith("another")))
    assert {name: task["target"] for name, task in again.items()} == {"t_a": "a", "t_b": "b"}


@pytest.mark.parametrize(
    ("step", "season"), [(timedelta(hours=1), 24), (timedelta(days=1), 7), (timedelta(weeks=1), 52)]
)
def test_numbers_over_time_are_forecast_a_season_ahead(tmp_path, step, season):
    rows = [[(START + i * step).isoformat(), draw.random()] for i in range(600)]
    write(tmp_path / "load.csv", ["when", "mw"], rows)
    task = proposed(tmp_path)[0]["load"]
    assert task["schema"] == "forecasting" and task["horizon"] == season
    assert task["data"] == {"path": "load.csv", "series": {"time": "when", "values": ["mw"]}}
    assert task["inputs"] == {"series": "series"} and "split" not in task


def test_series_are_told_apart_by_the_column_that_makes_moments_unique(tmp_path):
    rows = [
        [(START + timedelta(days=d)).date(), shop, draw.random(), draw.random(), "xy"[d % 2]]
        for shop in "ABC"
        for d in range(100)
    ]
    write(tmp_path / "sales.csv", ["day", "shop", "units", "temp", "odd"], rows)
    tasks, written = proposed(tmp_path)
    assert tasks["sales"]["data"]["series"] == {
        "time": "day", "values": ["units", "temp"], "by": "shop",
    }  # fmt: skip
    assert "into 3 series, one for each 'shop'" in written


def test_rows_of_one_user_stay_together_and_given_splits_are_kept(tmp_path):
    rows = [[f"u{i % 40}", text(9), "ab"[i % 2]] for i in range(400)]
    write(tmp_path / "users.csv", ["user_id", "text", "label"], rows)
    rows = [[["train", "test"][i % 4 == 0], text(9), "ab"[i % 2]] for i in range(400)]
    write(tmp_path / "given.csv", ["split", "text", "label"], rows)
    for part, count in (("train", 200), ("dev", 50), ("test", 60)):
        write(
            tmp_path / f"news_{part}.csv",
            ["text", "label"],
            [[text(9), "ab"[i % 2]] for i in range(count)],
        )
    tasks, _ = proposed(tmp_path)
    assert tasks["users"]["split"] == {"kind": "group", "by": "user_id", "valid": 0.1, "test": 0.2}
    assert tasks["given"]["split"] == {"kind": "given", "by": "split"}
    assert tasks["news"]["data"] == {
        "train": "news_train.csv", "valid": "news_dev.csv", "test": "news_test.csv",
    }  # fmt: skip
    assert "split" not in tasks["news"]


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(draw.randrange(10**6)).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(noise).save(path)


def test_class_folders_and_tables_of_images_are_image_tasks(tmp_path):
    for kind in ("cat", "dog"):
        for i in range(10):
            picture(tmp_path / "pets" / kind / f"{i}.png")
    rows = [[f"img/{i}.png", i * 1.5] for i in range(12)]
    write(tmp_path / "cells" / "ages.csv", ["file", "age"], rows)
    for name, _ in rows:
        picture(tmp_path / "cells" / name)
    tasks, written = proposed(tmp_path)
    assert tasks["pets"]["data"] == "pets" and tasks["pets"]["schema"] == "classification"
    assert tasks["pets"]["inputs"] == {"image": "image"}
    (cells,) = [task for name, task in tasks.items() if name != "pets"]
    assert cells["inputs"] == {"image": "file"} and cells["schema"] == "regression"
    assert "'label' has 2 distinct values in 20 rows" in written
    assert proposed(tmp_path / "pets")[0]["pets"]["data"] == "."
    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            picture(tmp_path / "parted" / part / kind / "1.png")
    assert proposed(tmp_path)[0]["parted"]["data"] == {
        part: {"path": "parted", "split": part} for part in ("test", "train")
    }


def test_a_saved_hugging_face_set_is_proposed_with_its_splits(tmp_path):
    parts = {
        name: datasets.Dataset.from_dict(
            {"text": [text(8) for _ in range(60)], "label": ["ab"[i % 2] for i in range(60)]}
        )
        for name in ("train", "test")
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    task = proposed(tmp_path)[0]["saved"]
    assert task["data"] == {
        "train": {"path": "saved", "split": "train"},
        "test": {"path": "saved", "split": "test"},
    }


def test_everything_that_is_proposed_builds(tmp_path):
    write(tmp_path / "iris.csv", ["w", "kind"], [[draw.random(), "ab"[i % 2]] for i in range(60)])
    rows = [[text(8), text(5), "yn"[i % 2]] for i in range(80)]
    write(tmp_path / "nli.csv", ["premise", "hypothesis", "label"], rows)
    rows = [[(START + timedelta(days=d)).date(), draw.random()] for d in range(300)]
    write(tmp_path / "load.csv", ["day", "mw"], rows)
    lines = [json.dumps({"text": text(20)}) for _ in range(50)]
    (tmp_path / "prose.jsonl").write_text("\n".join(lines))
    for kind in ("cat", "dog"):
        for i in range(10):
            picture(tmp_path / "pets" / kind / f"{i}.png")
    tasks, _ = proposed(tmp_path)
    built = build_tasks({n: parse(TaskConfig, t, n) for n, t in tasks.items()}, tmp_path, 0)
    assert set(built.names) == {"iris", "nli", "load", "prose", "pets"}
    assert all(len(task.splits["train"]) for task in built.tasks)


def test_what_cannot_be_read_or_used_is_named_in_a_comment(tmp_path):
    write(tmp_path / "good.csv", ["text", "label"], [[text(9), "ab"[i % 2]] for i in range(80)])
    (tmp_path / "broken.csv").write_text("a,b\n1\n2\n")
    write(tmp_path / "codes.csv", ["id"], [[f"x{i}"] for i in range(50)])
    tasks, written = proposed(tmp_path)
    assert list(tasks) == ["good"]
    assert "# Left out: broken: " in written and "line 2: 1 cell instead of 2" in written
    assert "# Left out: codes: no column looks like a label or text" in written


def test_names_that_yaml_would_misread_are_quoted(tmp_path):
    rows = [[text(9), "ab"[i % 2]] for i in range(80)]
    write(tmp_path / "yes.csv", ["My text: #1", "on"], rows)
    write(tmp_path / "mehr, größer.csv", ["{text}", "it's"], rows)
    tasks, _ = proposed(tmp_path)
    assert tasks["yes"]["inputs"] == {"text": "My text: #1"} and tasks["yes"]["target"] == "on"
    assert tasks["mehr, größer"]["data"] == "mehr, größer.csv"
    assert tasks["mehr, größer"]["target"] == "it's"
    odd = {"a": [1, 0.5, True, None, "null", "1", "- x", "a: b"], "no": {}}
    assert yaml.safe_load(flow(odd)) == odd


def test_two_files_of_one_name_give_two_names(tmp_path):
    rows = [[text(9), "ab"[i % 2]] for i in range(80)]
    for folder in ("a", "b"):
        write(tmp_path / folder / "rows.csv", ["text", "label"], rows)
    tasks, _ = proposed(tmp_path)
    assert {name: task["data"] for name, task in tasks.items()} == {
        "rows": "a/rows.csv", "rows_2": "b/rows.csv",
    }  # fmt: skip


def test_a_large_file_is_looked_at_in_part_and_read_as_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("polytask.data.proposing._LARGE", 1000)
    monkeypatch.setattr("polytask.data.proposing._FIRST", 100)
    write(tmp_path / "big.csv", ["text", "label"], [[text(9), "ab"[i % 2]] for i in range(500)])
    tasks, written = proposed(tmp_path)
    assert tasks["big"]["data"] == {"path": "big.csv", "streaming": True}
    assert "looked at the first 100 rows" in written


def test_a_folder_without_data_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no task can be proposed"):
        propose(tmp_path)
    with pytest.raises(DataError, match=r"no file .*nowhere"):
        propose(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is no folder"):
        propose(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "cells", "kind"),
    [
        ("x", [None, "", "  "], "empty"),
        ("x", ["a"] * 9, "constant"),
        ("x", [0.5, 1.5, 2.5], "number"),
        ("stars", [1, 2, 3, 4, 5] * 10, "class"),
        ("flag", [0, 1] * 5, "flag"),
        ("row", list(range(5, 50)), "id"),
        ("user_id", [3, 9, 1, 7, 5], "id"),
        ("year", [1999, 2000, 2001], "time"),
        ("x", ["2024-01-01", "2024-01-02"], "time"),
        ("x", ["01/02/2024", "03/04/2024"], "time"),
        ("x", ["red", "blue"] * 10, "class"),
        ("x", [f"Name{i}" for i in range(50)], "id"),
        ("x", [f"this is text number {i}" for i in range(50)], "text"),
        ("x", ["a,b", "a", "b,c", "c,a"] * 10, "tags"),
        ("x", [["a", "b"], ["b"], ["a"]] * 9, "tags"),
        ("x", [np.zeros(5, np.float32)] * 3, "series"),
        ("x", [np.zeros((5, 5), np.uint8)] * 3, "image"),
        ("x", [b"png"] * 3, "image"),
    ],
)
def test_what_a_column_is(name, cells, kind):
    (column,) = profile(MemoryRows([{name: cell} for cell in cells]))
    assert column.kind == kind and column.rows == len(cells)
