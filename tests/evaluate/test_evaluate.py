"""evaluate: equal to scoring row by row, resumable, independent of batching."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sk

from polytask.errors import NonFiniteError, TaskError, UserError
from polytask.evaluate import TaskScore, evaluate, table
from polytask.models import build_model
from polytask.models.collate import Collator
from polytask.models.specs import ModelConfig
from polytask.rng import generator
from polytask.tasks.build import build_tasks
from polytask.tasks.encode import Processor, ProcessorConfig
from polytask.tasks.task import TaskSet

NAMES = ("colour", "marks", "size", "answer", "prose", "future", "partner", "option", "words")


def write_rows(path: Path, n: int = 120) -> None:
    g = generator(0, "rows")
    with path.open("w") as out:
        for i in range(n):
            text = " ".join(g.choice(["red", "green", "cat", "dog", "old"], g.integers(2, 9)))
            row: dict[str, Any] = {
                "text": f"{text} {i}",
                "colour": ["red", "green", "blue"][i % 3] if i % 5 else None,
                "marks": [["a"], ["a", "b"], ["c"], []][i % 4] or ["b"],
                "size": [float(g.normal()), 100 + float(g.normal())],
                "question": f"what is {i}",
                "answer": ["one", "two three"][i % 2],
                "past": [float(v) for v in g.normal(size=20).cumsum()],
                "future": [float(v) for v in g.normal(size=3)],
                "left": f"left {i // 2}",
                "right": f"right {i}",
                "options": [f"p {i}", "q", f"r {i}"][: 2 + i % 2],
                "option": i % 2,
                "tokens": ["the", "cat", f"n{i}"][: 1 + i % 3],
                "tags": ["D", "N", "X"][: 1 + i % 3],
            }
            out.write(json.dumps(row) + "\n")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, TaskSet, Processor]:
    return build(tmp_path_factory.mktemp("rows"))


def build(folder: Path) -> tuple[Any, TaskSet, Processor]:
    path = folder / "rows.jsonl"
    write_rows(path)
    text = {"text": "text"}
    tasks = {
        "colour": {"schema": "classification", "inputs": text, "target": "colour"},
        "marks": {"schema": "multilabel", "inputs": text, "target": "marks"},
        "size": {"schema": "regression", "inputs": text, "target": "size"},
        "answer": {"schema": "generation", "inputs": {"text": "question"}, "target": "answer"},
        "prose": {"schema": "language_model", "inputs": text},
        "future": {"schema": "forecasting", "inputs": {"series": "past"}, "target": "future"},
        "partner": {
            "schema": "matching",
            "inputs": {"a": {"text": "left"}, "b": {"text": "right"}},
        },
        "option": {
            "schema": "choice",
            "inputs": {"text": "question", "choices": "options"},
            "target": "option",
        },
        "words": {"schema": "tagging", "inputs": {"text": "tokens"}, "target": "tags"},
    }
    taskset = build_tasks({name: {"data": str(path), **t} for name, t in tasks.items()}, folder)
    processor = Processor.fit(taskset, ProcessorConfig(series_length=20))
    model = build_model(ModelConfig(dim=32, layers=1, heads=2), taskset, processor)
    return model, taskset, processor


def one_by_one(world: tuple[Any, TaskSet, Processor], name: str) -> list[tuple[Any, Any, Any]]:
    """(row, prediction, target) of every labelled row, each in a batch of its own."""
    model, taskset, processor = world
    task_id = taskset.names.index(name)
    group_id = processor.group_of(name)
    source = taskset.groups[group_id].splits["test"]
    collate = Collator.of(taskset, processor.pad_id)
    found = []
    for i in range(len(source)):
        example = processor.encode(group_id, [source[i]], indices=[i])[0]
        example.targets = {t: v for t, v in example.targets.items() if t == task_id}
        batch = collate([example], [group_id])
        for kind, said in model.predict(batch).items():
            if len(said[0]):
                found.append((i, said[2][0], batch.targets[kind].value[0].numpy()))
    return found


def scored(world: tuple[Any, TaskSet, Processor], **settings: Any) -> dict[str, TaskScore]:
    return evaluate(*world, "test", **settings)


def test_every_task_gets_a_score_in_order(world: tuple[Any, TaskSet, Processor]) -> None:
    scores = scored(world)
    assert set(scores) == set(NAMES)
    assert tuple(scores) == world[1].names
    for name, score in scores.items():
        assert np.isfinite(list(score.metrics.values())).all(), name
        assert score.per_example.shape == (score.n,), name
        assert (np.diff(score.rows) > 0).all(), name
    rows = table(scores)
    assert [row["task"] for row in rows] == list(world[1].names)
    assert rows[0]["value"] == scores[rows[0]["task"]].value


def test_classes_are_scored_as_row_by_row(world: tuple[Any, TaskSet, Processor]) -> None:
    score, rows = scored(world)["colour"], one_by_one(world, "colour")
    truth = np.array([int(t) for _, _, t in rows])
    guess = np.array([p.argmax() for _, p, _ in rows])
    assert score.metrics["accuracy"] == pytest.approx(sk.accuracy_score(truth, guess))
    assert score.metrics["macro_f1"] == pytest.approx(sk.f1_score(truth, guess, average="macro"))
    assert score.rows.tolist() == [i for i, _, _ in rows]
    assert score.per_example.tolist() == (truth == guess).astype(float).tolist()
    assert score.n < len(world[1].tasks[0].splits["test"])  # rows without a label do not count


def test_numbers_are_scored_as_row_by_row(world: tuple[Any, TaskSet, Processor]) -> None:
    score, rows = scored(world)["size"], one_by_one(world, "size")
    truth, guess = (np.stack([r[k] for r in rows]) for k in (2, 1))
    assert score.metrics["rmse"] == pytest.approx(sk.root_mean_squared_error(truth, guess))
    assert score.metrics["r2"] == pytest.approx(sk.r2_score(truth, guess), rel=1e-4)


def test_labels_are_scored_as_row_by_row(world: tuple[Any, TaskSet, Processor]) -> None:
    names = ["macro_f1", "auroc", "hamming"]
    score = scored(world, tasks=["marks"], metrics={"marks": names})["marks"]
    rows = one_by_one(world, "marks")
    truth, guess = (np.stack([r[k] for r in rows]) for k in (2, 1))
    assert score.metrics["hamming"] == pytest.approx(sk.hamming_loss(truth, guess > 0.5))
    assert score.metrics["auroc"] == pytest.approx(sk.roc_auc_score(truth, guess), abs=1e-6)


def test_retrieval_is_over_the_whole_split(world: tuple[Any, TaskSet, Processor]) -> None:
    score, rows = scored(world)["partner"], one_by_one(world, "partner")
    vectors = np.stack([r[1] for r in rows]).astype(np.float64)
    label = np.array([int(r[2]) for r in rows])
    scores = vectors[:, 0] @ vectors[:, 1].T
    right = label[:, None] == label
    best = np.where(right, scores, -np.inf).max(1)
    rank = ((scores > best[:, None]) & ~right).sum(1) + 1
    assert score.metrics["mrr"] == pytest.approx((1 / rank).mean(), abs=1e-6)
    assert score.metrics["recall@5"] == pytest.approx((rank <= 5).mean())


def test_the_likelihood_of_texts_is_that_of_the_losses(
    world: tuple[Any, TaskSet, Processor],
) -> None:
    model, taskset, processor = world
    group_id, task_id = processor.group_of("prose"), taskset.names.index("prose")
    source = taskset.groups[group_id].splits["test"]
    examples = processor.encode(group_id, source.take(range(len(source))))
    collate = Collator.of(taskset, processor.pad_id)
    nats = tokens = 0.0
    for example in examples:
        only = {t: v for t, v in example.targets.items() if t == task_id}
        example.targets = only
        count = int((only[task_id][1:] != -100).sum())
        terms = model.terms(collate([example], [group_id])).value
        nats += float(terms["generate"].detach()) * count
        tokens += count
    expected = np.exp(nats / tokens)
    assert scored(world)["prose"].metrics["perplexity"] == pytest.approx(expected, rel=1e-4)


def test_without_writing_exact_match_is_that_of_greedy_decoding(
    world: tuple[Any, TaskSet, Processor],
) -> None:
    import torch

    model = world[0]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    learn(world, "answer", steps=60)
    try:
        written = scored(world, tasks=["answer"])["answer"]
        forced = scored(world, tasks=["answer"], texts=False)["answer"]
        assert written.metrics["exact_match"] == forced.metrics["exact_match"]
        assert forced.metrics["exact_match"] > 0.0
        assert (written.per_example == forced.per_example).all()
        assert forced.skipped == ("token_f1",)
        assert "token_f1" in written.metrics
    finally:
        model.load_state_dict(before)
        torch.manual_seed(0)


def learn(world: tuple[Any, TaskSet, Processor], name: str, steps: int) -> None:
    """A few steps on one task, so that some answers come out right."""
    import torch

    model, taskset, processor = world
    group_id = processor.group_of(name)
    source = taskset.groups[group_id].splits["train"]
    examples = processor.encode(group_id, source.take(range(len(source))))
    batch = Collator.of(taskset, processor.pad_id)(examples, [group_id] * len(examples))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model.terms(batch).value["generate"].mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def test_the_size_of_batches_changes_nothing(world: tuple[Any, TaskSet, Processor]) -> None:
    small, large = scored(world, batch_size=5), scored(world, batch_size=64)
    for name in NAMES:
        assert small[name].metrics == pytest.approx(large[name].metrics, rel=1e-4), name
        assert (small[name].rows == large[name].rows).all()


def test_tasks_and_metrics_and_rows_can_be_chosen(world: tuple[Any, TaskSet, Processor]) -> None:
    some = scored(world, tasks=["size"], metrics={"size": ["pearson", "mae"]}, limit=7)
    assert list(some) == ["size"]
    assert list(some["size"].metrics) == ["pearson", "mae"]
    assert some["size"].n == 7
    assert some["size"].primary == "pearson"
    with pytest.raises(TaskError, match=r"no task 'sise'\. Did you mean 'size'"):
        scored(world, tasks=["sise"])
    with pytest.raises(TaskError, match="has no split 'exam'"):
        evaluate(*world, "exam")


def same(a: dict[str, TaskScore], b: dict[str, TaskScore]) -> bool:
    return all(
        a[n].metrics == b[n].metrics and np.array_equal(a[n].per_example, b[n].per_example)
        for n in NAMES
    )


def test_an_interrupted_evaluation_goes_on_bit_for_bit(
    world: tuple[Any, TaskSet, Processor], tmp_path: Path
) -> None:
    whole = tmp_path / "whole.jsonl"
    first = scored(world, batch_size=8, resume_file=whole)
    lines = whole.read_bytes().splitlines(keepends=True)
    for kept in (1, 3, len(lines) - 1):
        torn = tmp_path / f"torn{kept}.jsonl"
        torn.write_bytes(b"".join(lines[:kept]) + lines[kept][:40])
        assert same(scored(world, batch_size=8, resume_file=torn), first)
        assert torn.read_bytes() == whole.read_bytes()


def test_a_finished_evaluation_is_replayed_without_the_model_predicting(
    world: tuple[Any, TaskSet, Processor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "parts.jsonl"
    first = scored(world, resume_file=path)
    monkeypatch.setattr(type(world[0]), "shared_features", None)
    assert same(scored(world, resume_file=path), first)


def test_a_file_of_another_evaluation_is_refused(
    world: tuple[Any, TaskSet, Processor], tmp_path: Path
) -> None:
    path = tmp_path / "parts.jsonl"
    scored(world, resume_file=path, limit=4)
    with pytest.raises(UserError, match=r"another evaluation \(another batch_size, limit\)"):
        scored(world, resume_file=path, batch_size=3)
    parameter = next(world[0].parameters()).data
    parameter += 1
    try:
        with pytest.raises(UserError, match="another model"):
            scored(world, resume_file=path, limit=4)
    finally:
        parameter -= 1
    path.write_text("{}\n[]\n")
    with pytest.raises(UserError, match="delete it to start over"):
        scored(world, resume_file=path)


def test_a_prediction_that_is_not_a_number_names_its_row(
    world: tuple[Any, TaskSet, Processor], monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = type(world[0]).predict

    def broken(model: Any, batch: Any) -> Any:
        found = predict(model, batch)
        for said in found.values():
            if said[2].dtype.kind == "f":
                said[2][0] = np.nan
        return found

    monkeypatch.setattr(type(world[0]), "predict", broken)
    with pytest.raises(
        NonFiniteError, match=r"task 'size': the prediction for .*rows\.jsonl, line"
    ):
        scored(world, tasks=["size"])


def test_the_model_comes_back_as_it_was(world: tuple[Any, TaskSet, Processor]) -> None:
    model = world[0]
    model.train()
    scored(world, limit=4)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_importing_evaluate_is_cheap() -> None:
    code = (
        "import sys, polytask.evaluate as e; e.ScoreMatrix, e.evaluate, e.compare_single;"
        "print(sorted({'torch', 'scipy', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_evaluate import build
from polytask.evaluate import evaluate, parts

line, left = parts.PartsFile._line, [int(sys.argv[3])]
def counted(self, value):
    line(self, value)
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
parts.PartsFile._line = counted
folder = Path(sys.argv[2])
evaluate(*build(folder), "test", batch_size=8, resume_file=folder / "parts.jsonl")
"""


def test_after_kill_nine_it_goes_on(tmp_path: Path) -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(here), str(tmp_path), "7"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    path = tmp_path / "parts.jsonl"
    assert len(path.read_bytes().splitlines()) == 7
    again = build(tmp_path)
    resumed = evaluate(*again, "test", batch_size=8, resume_file=path)
    assert same(resumed, evaluate(*again, "test", batch_size=8))
