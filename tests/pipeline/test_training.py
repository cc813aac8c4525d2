"""A user's three files become one judged model; runs resume, refuse and predict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from polytask import cli
from polytask.errors import CheckpointError
from polytask.pipeline import load_config, load_run, train

Make = Callable[..., Path]


@pytest.fixture
def run(config: Make, tmp_path: Path) -> Path:
    path = config()
    train(load_config(path), tmp_path / "run", base=path.parent)
    return tmp_path / "run"


@pytest.mark.slow
def test_three_files_give_scores_a_report_and_predictions(run: Path) -> None:
    scores = json.loads((run / "scores.json").read_text())
    assert {row["task"] for row in scores["tasks"]} == {"liked", "stars", "same", "price"}
    assert all(row["single"] is not None and row["gain"] is not None for row in scores["tasks"])
    assert "<html" in (run / "report.html").read_text()
    found = load_run(run)
    answers = found.predict("liked", [{"body": "great and lovely"}, {"body": "awful"}])
    assert {a["prediction"] for a in answers} <= {"yes", "no"}
    assert all(0.5 <= a["probability"] <= 1 for a in answers)
    (price,) = found.predict("price", [{"area": 100.0, "side": "north"}])
    assert isinstance(price["prediction"], float)


@pytest.mark.slow
def test_tasks_on_the_same_rows_share_them_and_the_ledger_counts_only_known_labels(
    run: Path,
) -> None:
    ledger = json.loads((run / "ledger.json").read_text())
    rows = {row["task"]: row["examples"] for row in ledger["tasks"]}
    groups = {row["group"]: row for row in ledger["mixture"]}
    assert len(groups) == 3  # liked and stars are one group
    assert rows["stars"] < rows["liked"]  # one star label in five is missing
    drawn = sum(row["rows"] for row in groups.values())
    assert drawn == 12 * 16


@pytest.mark.slow
def test_a_finished_run_is_returned_as_it_is_and_another_config_is_refused(
    run: Path, config: Make
) -> None:
    before = (run / "model" / "model.safetensors").read_bytes()
    train(load_config(config()), run, base=run.parent)
    assert (run / "model" / "model.safetensors").read_bytes() == before
    with pytest.raises(CheckpointError, match=r"another configuration .*train.* differ"):
        train(load_config(config({"train/lr": 0.5})), run, base=run.parent)


@pytest.mark.slow
def test_the_same_config_gives_the_same_weights(run: Path, config: Make, tmp_path: Path) -> None:
    train(load_config(config()), tmp_path / "again", base=tmp_path)
    first, second = load_run(run).model, load_run(tmp_path / "again").model
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.slow
def test_evaluate_on_the_same_rows_repeats_the_scores(run: Path) -> None:
    scores = json.loads((run / "scores.json").read_text())
    again = load_run(run).evaluate()
    for row in scores["tasks"]:
        assert again[row["task"]].value == pytest.approx(row["multitask"], rel=1e-6)


@pytest.mark.slow
def test_evaluate_on_a_users_rows(run: Path, tmp_path: Path) -> None:
    found = load_run(run).evaluate(str(tmp_path / "houses.csv"), tasks=["price"])
    assert found["price"].n == 120


@pytest.mark.slow
def test_a_flipped_byte_in_the_model_is_refused(run: Path) -> None:
    path = run / "model" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        _ = load_run(run).model


@pytest.mark.slow
def test_predict_from_the_command_line_writes_rows_with_answers(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.csv"
    arguments = ["predict", str(run), str(tmp_path / "houses.csv"), "--task", "price"]
    assert cli.main([*arguments, "--out", str(out)]) == 0
    lines = out.read_text().splitlines()
    assert lines[0] == "area,side,price,prediction"
    assert len(lines) == 121
    assert cli.main(["predict", str(run), "x.csv", "--task", "prise"]) == 2
    assert "Did you mean 'price'?" in capsys.readouterr().err


@pytest.mark.slow
def test_the_transfer_table_has_every_pair(config: Make, tmp_path: Path) -> None:
    path = config({"evaluate/transfer_steps": 2, "evaluate/single_task": False})
    run = train(load_config(path), tmp_path / "run", base=tmp_path)
    transfer = run.scores["transfer"]
    assert sorted(transfer["tasks"]) == ["liked", "price", "same", "stars"]
    assert all(value is not None for row in transfer["score"] for value in row)
    assert not (run.folder / "single").exists()


@pytest.mark.slow
def test_a_stream_trains_like_a_file(config: Make, files: Path, tmp_path: Path) -> None:
    data = {"path": "houses.csv", "streaming": True}
    changes = {
        "tasks/price/data": data,
        "tasks/price/split": {"held_out_rows": 10},
        "mixture/policy": "uniform",
        "evaluate/single_task": False,
    }
    run = train(load_config(config(changes)), tmp_path / "run", base=files)
    (row,) = [row for row in run.scores["tasks"] if row["task"] == "price"]
    assert row["multitask"] is not None
    assert row["n"] == 10


@pytest.mark.slow
def test_python_and_command_line_give_the_same_scores(config: Make, tmp_path: Path) -> None:
    path = config({"evaluate/single_task": False})
    run = train(load_config(path), tmp_path / "a", base=tmp_path)
    assert cli.main(["train", str(path), "--out", str(tmp_path / "b"), "--json"]) == 0
    other = json.loads((tmp_path / "b" / "small" / "scores.json").read_text())
    assert other["tasks"] == run.scores["tasks"]


@pytest.mark.slow
def test_predictions_are_a_function_of_the_row_alone(run: Path) -> None:
    predictor = load_run(run).predictor(batch_size=2)
    rows = [{"body": "great"}, {"body": "a much longer and rather dull text"}, {"body": "it"}]
    together = predictor.predict("liked", rows)
    for row, answer in zip(rows, together, strict=True):
        (alone,) = predictor.predict("liked", [row])
        assert alone["prediction"] == answer["prediction"]
        assert alone["probability"] == pytest.approx(answer["probability"], abs=1e-5)
