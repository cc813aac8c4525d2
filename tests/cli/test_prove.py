"""`polytask prove`: exit codes, the last JSON line, and that only a full run leaves a record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from polytask import systems
from polytask.cli import main
from polytask.rng import generator
from polytask.study import Arm, Budget, Claim, Result, Tuning
from polytask.systems.base import read_tuning


@dataclass(frozen=True)
class Fixed:
    """Accuracy `mean` and a little noise that the arms of a seed do not share."""

    mean: float

    def __call__(self, seed: int, budget: Budget) -> Result:
        noise = float(generator(seed, str(self.mean)).normal()) * 0.001
        return Result({"accuracy": self.mean + noise}, Budget(steps=budget.steps, rows=10))


class Fake:
    """A system whose method is better by `gain`."""

    card = systems.card("neuroformer")
    tuning_file = Path("unset")
    gain = 0.1

    @property
    def claims(self) -> tuple[Claim, ...]:
        return (Claim("method", "plain", "accuracy"),)

    def arms(self, size: str) -> Mapping[str, Arm]:
        method, plain = Arm("method", Fixed(0.5 + self.gain)), Arm("plain", Fixed(0.5), note="toy")
        return {"method": method, "plain": plain}

    def budget(self, size: str) -> Budget:
        return Budget(steps=3)

    def tune(self, executor: Any) -> Tuning:
        return Tuning("accuracy", True, [900], {}, {}, {}, {"method": {"rho": 0.1}})

    def reported(self, evidence: Any) -> list[str]:
        return [f"{len(evidence.arms)} arms were compared"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    system = Fake()
    system.tuning_file = tmp_path / "tuning.json"
    monkeypatch.setattr(systems, "load", lambda name: system)
    monkeypatch.setenv("POLYTASK_CACHE", str(tmp_path / "cache"))
    return system


def prove(tmp_path: Path, *more: str) -> int:
    return main(["prove", "fake", "--workers", "0", "--out", str(tmp_path / "evidence"), *more])


def test_a_full_run_writes_the_record_with_pictures_and_says_so(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prove(tmp_path) == 0
    out = capsys.readouterr().out
    assert "'method' has higher accuracy than 'plain': shown" in out
    assert "reported: 2 arms were compared" in out
    assert "data: toy" in out
    written = {path.name for path in (tmp_path / "evidence").rglob("*")}
    assert {"01-neuroformer.json", "01-neuroformer.html"} <= written
    assert any(name.endswith(".png") for name in written)
    record = json.loads((tmp_path / "evidence" / "01-neuroformer.json").read_text())
    assert record["seeds"] == [0, 1, 2, 3, 4]
    assert record["notes"]["reported"] == ["2 arms were compared"]


def test_the_json_line_holds_arms_seeds_metrics_intervals_and_verdicts(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prove(tmp_path, "--json", "--seeds", "3", "--seed-base", "7") == 0
    [line] = capsys.readouterr().out.splitlines()
    facts = json.loads(line)
    assert facts["verdict"] == "shown"
    assert facts["seeds"] == [7, 8, 9]
    assert len(facts["arms"]["method"]["metrics"]["accuracy"]) == 3
    [claim] = facts["claims"]
    mean, low, high = claim["interval"]
    assert low < mean < high
    assert claim["verdict"] == "shown"
    assert mean == pytest.approx(sum(claim["differences"]) / 3)


@pytest.mark.parametrize(("gain", "code"), [(0.1, 0), (0.0, 3), (-0.1, 3)])
def test_strict_exits_with_3_unless_shown(
    gain: float, code: int, fake: Fake, tmp_path: Path
) -> None:
    fake.gain = gain
    assert prove(tmp_path, "--strict") == code
    assert prove(tmp_path) == 0


def test_smoke_judges_nothing_and_writes_nothing(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prove(tmp_path, "--budget", "smoke", "--strict") == 0
    assert "not judged" in capsys.readouterr().out
    assert not (tmp_path / "evidence").exists()


def test_tune_writes_the_record_that_arms_read(fake: Fake, tmp_path: Path) -> None:
    assert prove(tmp_path, "--tune", "--json") == 0
    assert read_tuning(fake.tuning_file).chosen == {"method": {"rho": 0.1}}


def test_a_system_without_settings_cannot_be_tuned(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(Fake, "tune")
    assert prove(tmp_path, "--tune") == 2
    assert "nothing to tune" in capsys.readouterr().err


def test_bad_arguments_are_the_users_fault(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prove(tmp_path, "--seeds", "1") == 2
    assert "at least 2 needed" in capsys.readouterr().err
    assert prove(tmp_path, "--budget", "huge") == 2


@pytest.mark.slow
def test_system_16_runs_through_at_smoke_size_without_any_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POLYTASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")  # no apt, no pip
    assert main(["prove", "16", "--budget", "smoke"]) == 0
    out = capsys.readouterr().out
    assert "data: 64 pairs of digits" in out
    assert "not judged" in out
