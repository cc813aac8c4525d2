"""`polytask run`: settings are checked before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from polytask import systems
from polytask.cli import main
from polytask.systems.base import Outcome


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces what system 16 does by a note of what it was asked."""
    asked: list[Any] = []
    system = systems.load(16)

    def run(config: Any, say: Any) -> Outcome:
        asked.append(config)
        say("working")
        return Outcome(Path("runs/x"), {"score": 1.0}, ["a line"], [Path("runs/x/report.html")])

    monkeypatch.setattr(system, "run", run)
    return asked


def test_settings_reach_the_system_typed(seen: list[Any], tmp_path: Path) -> None:
    data = tmp_path / "my.yaml"
    arguments = ["--data", str(data), "--set", "rho=.2", "--set", "aggregator=mgda"]
    assert main(["run", "flat-mtl", *arguments, "--out", str(tmp_path)]) == 0
    [config] = seen
    assert (config.rho, config.aggregator, config.data, config.out) == (
        0.2,
        "mgda",
        data,
        tmp_path,
    )


def test_json_is_one_line_with_folder_figures_and_files(
    seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "16", "--json"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {
        "folder": "runs/x",
        "figures": {"score": 1.0},
        "files": ["runs/x/report.html"],
    }


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rhoo=.1", "Did you mean 'rho'?"),
        ("rho=-1", "rho"),
        ("aggregator=pcgard", "Did you mean 'pcgrad'?"),
        ("rho", "KEY=VALUE"),
        ("rho={", "not valid YAML"),
    ],
)
def test_wrong_settings_are_named(
    setting: str, message: str, seen: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "flat-mtl", "--set", setting]) == 2
    assert message in capsys.readouterr().err
    assert not seen


def test_a_planned_system_cannot_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    planned = next(card for card in systems.cards() if not systems.is_built(card))
    assert main(["run", planned.slug]) == 2
    assert "is planned" in capsys.readouterr().err
