"""`polytask adapt`: its options become settings, mistakes are told without a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polytask import cli
from polytask.pipeline import training


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "new.yaml"
    path.write_text("tasks: {reviews: reviews.csv}\ntrain: {steps: 3}\n")
    return path


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be trained."""
    found: list[Any] = []

    def train(config: Any, folder: Path, **options: Any) -> Any:
        found.append((config, folder, options))
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", train)
    return found


def test_options_become_settings(config: Path, asked: list[Any], tmp_path: Path) -> None:
    given = ["--from", "runs/many", "--tune", "z", "--shots", "32", "--name", "few"]
    assert cli.main(["adapt", str(config), *given, "--out", str(tmp_path)]) == 130
    [(settings, folder, options)] = asked
    assert (settings.adapt.source, settings.adapt.tune, settings.adapt.shots) == (
        "runs/many",
        "z",
        32,
    )
    assert folder == tmp_path / "few" and options["base"] == tmp_path


def test_a_hub_model_and_a_method_can_be_named(config: Path, asked: list[Any]) -> None:
    assert cli.main(["adapt", str(config), "--hub", "embedded:minilm", "--method", "ia3"]) == 130
    [(settings, _, _)] = asked
    assert (settings.model.hub, settings.adapt.method) == ("embedded:minilm", "ia3")


def test_without_any_setting_the_section_is_there(config: Path, asked: list[Any]) -> None:
    assert cli.main(["adapt", str(config)]) == 130
    assert asked[0][0].adapt is not None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--method", "mhrr"], "adapt.method"),
        (["--shots", "0"], "adapt.shots"),
        (["--from", "runs/none"], "there is no run folder runs/none"),
        ([], "nothing pretrained to adapt"),
        (["--set", "adapt.rnk=3"], "unknown key 'adapt.rnk'. Did you mean 'rank'"),
    ],
)
def test_mistakes_are_told(
    given: list[str], said: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["adapt", str(config), *given]) == 2
    shown = capsys.readouterr().err
    assert said in shown and "Traceback" not in shown
