"""A run that was stopped, killed or interrupted ends with the same bits as one that was not."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train_fakes import TinyModel, loader_of
from train_script import CONFIG, LearningLoader, disturb, evaluate, train

from polytask.train import checkpoints
from polytask.train.config import EarlyStopping, TrainConfig
from polytask.train.trackers import read_lines
from polytask.train.trainer import Trainer, TrainResult

SCRIPT = Path(__file__).with_name("train_script.py")


class Stop(Exception):
    pass


def stop_at(step: int) -> Any:
    def stop(trainer: Trainer, done: int) -> None:
        if done == step:
            raise Stop

    return stop


@pytest.mark.parametrize("weighting", ["dynamic", "uncertainty"])
def test_resuming_from_any_step_gives_the_same_bits(fast_path: Path, weighting: str) -> None:
    """Checkpoints at every step, a stop at every fourth: 30 steps, two stages, three generators,
    dropout, averages, a learning loader, an open log window."""
    settings = {"checkpoint_every": 1, "weighting": weighting}
    config = TrainConfig(**{**CONFIG.model_dump(), **settings})
    _, expected = train(fast_path / "whole", config)
    for step in range(2, 30, 4):
        folder = fast_path / str(step)
        with pytest.raises(Stop):
            model = TinyModel(dropout=0.2)
            callbacks = [disturb, stop_at(step)]
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            Trainer(
                model, LearningLoader(), config, folder, evaluator=evaluate, callbacks=callbacks
            ).fit()
        result, found = train(folder, config, seed=99)  # other generators: restored on resume
        assert result.resumed_from == step - 1
        assert found == expected, f"stopped in step {step}"


def test_metrics_of_a_resumed_run_are_those_of_the_uninterrupted_one(tmp_path: Path) -> None:
    def numbers(folder: Path) -> list[Any]:
        lines = read_lines(folder / "metrics.jsonl")
        return [(x["step"], x["loss"], x["terms"]) for x in lines if x["kind"] == "train"]

    config = TrainConfig(steps=20, batch_size=8, log_every=3, checkpoint_every=4)
    Trainer(TinyModel(), loader_of(8), config, tmp_path / "whole").fit()
    with pytest.raises(Stop):
        Trainer(TinyModel(), loader_of(8), config, tmp_path / "b", callbacks=[stop_at(15)]).fit()
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "kind": "tr')  # a line torn by a kill
    Trainer(TinyModel(), loader_of(8), config, tmp_path / "b").fit()
    assert numbers(tmp_path / "b") == numbers(tmp_path / "whole")


def test_a_finished_run_returns_at_once_with_its_weights_and_scores(tmp_path: Path) -> None:
    first, one = train(tmp_path)
    again, two = train(tmp_path)
    assert one == two
    assert again.resumed_from == again.step == 30
    assert again.scores == first.scores


def test_ctrl_c_saves_says_how_to_go_on_and_the_rest_is_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(steps=30, batch_size=8, checkpoint_every=0, ema=0.9)

    def run(folder: Path, **keywords: Any) -> tuple[TinyModel, TrainResult]:
        model = TinyModel()
        return model, Trainer(model, loader_of(8), config, folder, **keywords).fit()

    def press(trainer: Trainer, step: int) -> None:
        if step == 11:
            os.kill(os.getpid(), signal.SIGINT)

    whole, _ = run(tmp_path / "whole")
    handler = signal.getsignal(signal.SIGINT)
    _, stopped = run(tmp_path / "b", callbacks=[press])
    assert (stopped.stopped, stopped.step) == ("interrupted", 11)
    assert "stopped at step 11 of 30" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
    model, result = run(tmp_path / "b")
    assert (result.stopped, result.resumed_from) == ("done", 11)
    assert all(bool((a == b).all()) for a, b in zip(whole.parameters(), model.parameters()))


def test_training_outside_the_main_thread_leaves_signals_alone(tmp_path: Path) -> None:
    done: list[str] = []
    config = TrainConfig(steps=2, batch_size=4)
    trainer = Trainer(TinyModel(), loader_of(4), config, tmp_path)
    thread = threading.Thread(target=lambda: done.append(trainer.fit().stopped))
    thread.start()
    thread.join()
    assert done == ["done"]


def scripted(values: list[float]) -> Any:
    """An evaluator that reports these values one after another, by step."""

    def evaluator(model: Any, step: int) -> dict[str, dict[str, float]]:
        return {"alpha": {"acc": values[step // 5 - 1]}, "beta": {"acc": 0.5}}

    return evaluator


def test_early_stopping_returns_the_best_weights_also_when_resumed(tmp_path: Path) -> None:
    config = TrainConfig(
        steps=50,
        batch_size=8,
        evaluate_every=5,
        checkpoint_every=5,
        early_stopping=EarlyStopping(metric="acc", patience=2, margin=0.01),
    )
    best: dict[int, Any] = {}

    def keep(trainer: Trainer, step: int) -> None:
        best[step] = [p.detach().clone() for p in trainer.model.parameters()]

    evaluator = scripted([0.1, 0.5, 0.501, 0.4, 0.9])
    for folder in ("a", "a"):  # the second time it is finished already
        model = TinyModel()
        result = Trainer(
            model, loader_of(8), config, tmp_path / folder, evaluator=evaluator, callbacks=[keep]
        ).fit()
        assert (result.stopped, result.step, result.best_step) == ("early", 20, 10)
        assert all(bool((a == b).all()) for a, b in zip(model.parameters(), best[10]))
    lines = read_lines(tmp_path / "a" / "metrics.jsonl")
    evals = [x for x in lines if x["kind"] == "eval" and x["task"] == "alpha"]
    assert [(x["step"], x["metrics"]["acc"]) for x in evals] == [
        (5, 0.1),
        (10, 0.5),
        (15, 0.501),
        (20, 0.4),
    ]


def run_script(*arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
    )
    assert done.stdout.strip().endswith("done"), done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.slow
def test_kill_9_at_50_random_moments_gives_the_same_bits(tmp_path: Path) -> None:
    seed = time.time_ns() % 10_000
    assert run_script("random", str(tmp_path), "50", str(seed)) == "done", f"seed {seed}"


@pytest.mark.slow
def test_kill_9_at_every_write_of_three_saves_gives_the_same_bits(tmp_path: Path) -> None:
    """Writes 21 to 80: inside saves, at the rename, at the rotation of an old checkpoint."""
    assert run_script("writes", str(tmp_path), "21", "80") == "done"


def test_a_kill_costs_at_most_one_interval(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        config = TrainConfig(steps=20, batch_size=8, checkpoint_every=4)
        Trainer(TinyModel(), loader_of(8), config, tmp_path, callbacks=[stop_at(19)]).fit()
    found, refused = checkpoints.load_newest(tmp_path)
    assert found is not None
    assert (found.step, refused) == (16, [])
