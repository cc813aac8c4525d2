"""Bad input at the command line: one clear message, exit code 2, nothing written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polytask import cli

Make = Callable[..., Path]

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "missing file": ({"tasks/price/data": "house.csv"}, "house.csv"),
    "missing column": ({"tasks/price/target": "prise"}, "Did you mean 'price'?"),
    "misspelt section": ({"trian": {"steps": 1}}, "Did you mean 'train'?"),
    "misspelt key": ({"train/stpes": 3}, "unknown key 'train.stpes'. Did you mean 'steps'?"),
    "misspelt task key": ({"tasks/price/taget": "x"}, "Did you mean 'target'?"),
    "wrong type": ({"train/steps": "many"}, "key 'train.steps' = 'many'"),
    "unknown policy": ({"mixture/policy": "temprature"}, "Did you mean 'temperature'?"),
    "unknown aggregator": ({"train/aggregator": "pcgrd"}, "Did you mean 'pcgrad'?"),
    "unknown schema": ({"tasks/price/schema": "regresion"}, "Did you mean 'regression'?"),
    "unknown metric": ({"tasks/liked/metrics": ["acuracy"]}, "Did you mean 'accuracy'?"),
    "label outside the verbaliser": (
        {"tasks/liked/verbaliser": {"yes": "good", "maybe": "bad"}},
        "reviews.csv",
    ),
    "empty split": ({"tasks/price/split": {"valid": 0.0, "test": 0.0}}, "price"),
    "a weight that no policy reads": ({"tasks/price/weight": 2.0}, "policy: fixed"),
    "no tasks": ({"tasks": {}}, "tasks"),
    "freeze pattern that matches nothing": (
        {"train/steps": None, "train/stages": [{"steps": 2, "freeze": ["trnk.*"]}]},
        "trnk.*",
    ),
    "stage of an unknown task": (
        {"train/steps": None, "train/stages": [{"steps": 2, "tasks": ["prise"]}]},
        "Did you mean 'price'?",
    ),
}


@pytest.mark.parametrize("what", CASES)
def test_bad_configs_stop_before_anything_is_written(
    what: str, config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, message = CASES[what]
    before = {p.name for p in tmp_path.iterdir()} | {"config.yaml"}
    code = cli.main(["train", str(config(changes)), "--out", str(tmp_path / "runs")])
    error = capsys.readouterr().err
    assert code == 2, error
    assert message in error
    assert "Traceback" not in error
    assert not list((tmp_path / "runs").rglob("*.safetensors"))
    assert {p.name for p in tmp_path.iterdir()} - before <= {"runs"}


def test_two_tasks_of_one_name_name_the_line(
    config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config()
    text = path.read_text() + "\n"
    path.write_text(text.replace("tasks:\n", "tasks:\n  price: houses.csv\n", 1))
    assert cli.main(["train", str(path), "--out", str(tmp_path / "runs")]) == 2
    assert "'price' is given twice" in capsys.readouterr().err


def spoil(path: Path, column: int, value: str, rows: slice) -> None:
    lines = path.read_text().splitlines()
    for number in range(len(lines))[rows]:
        cells = lines[number].split(",")
        cells[column] = value
        lines[number] = ",".join(cells)
    path.write_text("\n".join(lines) + "\n")


DATA_CASES: dict[str, tuple[str, int, str, slice, str]] = {
    "one class only": ("pairs.csv", 2, "1", slice(1, None), "same"),
    "NaN targets": ("houses.csv", 2, "nan", slice(1, 30), "houses.csv"),
    "10 MB in one cell": ("houses.csv", 1, "x" * 10_500_000, slice(3, 6), "houses.csv"),
}


@pytest.mark.parametrize("what", DATA_CASES)
def test_bad_data_stops_with_file_and_reason(
    what: str, config: Make, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, column, value, rows, message = DATA_CASES[what]
    spoil(files / name, column, value, rows)
    code = cli.main(["train", str(config()), "--out", str(files / "runs")])
    error = capsys.readouterr().err
    assert code == 2, error
    assert message in error
    assert len(error) < 4000
    assert not (files / "runs").exists()


def test_an_image_that_does_not_decode_is_named(
    config: Make, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for label in ("cat", "dog"):
        folder = files / "photos" / label
        folder.mkdir(parents=True)
        for number in range(20):
            pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    (files / "photos" / "cat" / "3.png").write_bytes(b"not a picture")
    path = config({"tasks": {"animal": {"data": {"path": "photos"}}}})
    assert cli.main(["train", str(path), "--out", str(files / "runs")]) == 2
    assert "3.png" in capsys.readouterr().err


def test_check_looks_and_writes_nothing(
    config: Make, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", str(config()), "--check", "--out", str(files / "runs")]) == 0
    assert "4 tasks, all checks passed" in capsys.readouterr().out
    assert not (files / "runs").exists()


def test_init_proposes_a_config_that_trains(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--init", str(files)]) == 0
    path = files / "polytask.yaml"
    assert "houses" in path.read_text()
    assert cli.main(["train", str(path), "--check"]) == 0
    assert cli.main(["train", "--init", str(files)]) == 2
    assert "exists already" in capsys.readouterr().err
