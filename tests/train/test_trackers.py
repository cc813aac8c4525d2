"""Metrics are whole lines, cut on resume; optional trackers come by name or say how to install."""

import importlib
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from train_fakes import TinyModel, loader_of

from polytask.errors import ConfigError, DataError, MissingExtra
from polytask.train import trackers
from polytask.train.config import TrainConfig
from polytask.train.progress import Progress
from polytask.train.trackers import Journal, JsonLines, flat_numbers, read_lines, truncate_after
from polytask.train.trainer import Trainer

LINE = {
    "step": 3,
    "kind": "train",
    "loss": 0.5,
    "lr": 0.1,
    "grad_norm": None,
    "terms": {"alpha": {"mse": 0.25}},
}


def test_a_line_is_there_at_once_and_has_no_nan(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.log({"step": 1, "kind": "train", "loss": float("nan"), "terms": {"é": [float("inf")]}})
    found = read_lines(tmp_path / "metrics.jsonl")  # before closing
    assert found == [{"step": 1, "kind": "train", "loss": None, "terms": {"é": [None]}}]
    lines.close()


def test_a_line_that_does_not_fit_is_taken_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    lines.log({"step": 1, "kind": "event"})
    write, calls = os.write, []

    def half(handle: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) == 1:
            return write(handle, data[:7])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(DataError, match="no space left on the device"):
        lines.log({"step": 2, "kind": "event"})
    monkeypatch.undo()
    assert len(calls) == 2
    assert path.read_text() == '{"step": 1, "kind": "event"}\n'


def test_truncating_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = JsonLines(path)
    for step in (1, 2, 3, 4):
        lines.log({"step": step, "kind": "event"})
    lines.close()
    with path.open("a") as handle:
        handle.write('{"step": 5, "ki')
    assert truncate_after(path, 2) == 2
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    assert truncate_after(path, 2) == 0
    assert truncate_after(tmp_path / "none", 2) == 0


def test_flat_names() -> None:
    assert flat_numbers(LINE) == {"train/loss": 0.5, "train/lr": 0.1, "train/alpha/mse": 0.25}
    scores = {"step": 1, "kind": "eval", "task": "a", "split": "valid", "metrics": {"acc": 1.0}}
    assert flat_numbers(scores) == {"valid/a/acc": 1.0}
    assert flat_numbers({"step": 1, "kind": "event", "event": "x"}) == {}


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_tracker_that_is_not_installed_gives_the_install_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r'pip install "polytask\[trackers\]"'):
        Journal(tmp_path, [name], {}, True)


def test_an_unknown_tracker_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown tracker 'wandbb'. Did you mean 'wandb'"):
        Journal(tmp_path, ["wandbb"], {}, True)


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_hosted_trackers_get_numbers_by_step(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    fake = types.ModuleType(name)
    fake.init = lambda **given: calls.append(("init", given["name"], given["config"]))  # type: ignore[attr-defined]
    fake.log = lambda numbers, step: calls.append((step, numbers))  # type: ignore[attr-defined]
    fake.finish = lambda: calls.append("finish")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, fake)
    journal = Journal(tmp_path / "run", [name], {"lr": 1}, True)
    journal.log(3, "train", **{k: v for k, v in LINE.items() if k not in ("step", "kind")})
    journal.event(4, "checkpoint")
    journal.close()
    assert calls == [("init", "run", {"lr": 1}), (3, flat_numbers(LINE)), "finish"]
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 2


def test_tensorboard_writes_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Any] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            written.append(folder)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append("closed")

    real = importlib.import_module
    fakes = {"tensorboard": object(), "torch.utils.tensorboard": types.SimpleNamespace()}
    fakes["torch.utils.tensorboard"].SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setattr(
        trackers.importlib, "import_module", lambda name: fakes.get(name) or real(name)
    )
    tracker = trackers.TensorBoard(tmp_path, {})
    tracker.log(LINE)
    tracker.close()
    expected = [(name, value, 3) for name, value in flat_numbers(LINE).items()]
    assert written == [str(tmp_path / "tensorboard"), *expected, "closed"]


def test_a_process_that_is_not_the_main_one_writes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run", [], {}, False)
    journal.event(1, "x")
    journal.close()
    assert not (tmp_path / "run").exists()


def test_lines_of_a_run_have_the_agreed_form(tmp_path: Path) -> None:
    def evaluator(model: Any, step: int) -> dict[str, dict[str, float]]:
        return {"alpha": {"rmse": 1.0}}

    config = TrainConfig(steps=4, batch_size=8, log_every=2, evaluate_every=2)
    Trainer(TinyModel(), loader_of(8), config, tmp_path, evaluator=evaluator).fit()
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert {line["kind"] for line in lines} == {"train", "eval", "event"}
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == [2, 4]
    keys = {"step", "kind", "loss", "terms", "lr", "grad_norm", "rows_per_s", "tokens_per_s"}
    assert all(set(line) == keys for line in train)
    evals = [line for line in lines if line["kind"] == "eval"]
    assert evals[0] == {
        "step": 2,
        "kind": "eval",
        "task": "alpha",
        "split": "valid",
        "metrics": {"rmse": 1.0},
    }
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["event"] == "stage"


def test_progress_is_quiet_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(10, ["alpha"], True) as progress:
        progress.train(1, LINE)
        progress.scores(1, {"alpha": {"acc": 0.5}})
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_progress_shows_loss_throughput_score_and_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import io

    from rich.console import Console

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(100, ["alpha", "beta"], True)
    assert progress._live is not None
    progress._live.console = Console(file=io.StringIO(), force_terminal=False, width=100)
    line = {**LINE, "rows_per_s": 1234.0, "tokens_per_s": 56789.0}
    with progress:
        progress.stage("main")
        progress.train(10, line)
        progress.train(20, {**line, "terms": {"alpha": {"mse": 0.125}}})
        progress.scores(20, {"alpha": {"accuracy": 0.75}})
        screen = Console(file=io.StringIO(), width=100)
        screen.print(progress._view(20))
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    for part in ("alpha", "0.1250", "-50%", "accuracy 0.750", "step 20/100", "1,234 rows/s"):
        assert part in text
    assert "56,789 tokens/s" in text
    assert "0:0" in text
