"""The loader with the real tasks, processor, sampler and model: batches are a function of their
index, stages have their own rows, the ledger is exact, and training resumes bit for bit."""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polytask.data.rows import Row
from polytask.errors import ConfigError, DataError
from polytask.mixture.policies import MixtureConfig
from polytask.models import ModelConfig, build_model
from polytask.models.batch import Batch
from polytask.models.flops import flops, flops_by_task
from polytask.tasks import Processor, ProcessorConfig, TaskSet, build_tasks
from polytask.train.config import StageConfig, TrainConfig
from polytask.train.loader import DataEnded, FunctionLoader, Loader, Span, make_loader
from polytask.train.reading import ExampleCache, RowReader
from polytask.train.trackers import read_lines
from polytask.train.trainer import Trainer

Parts = tuple[TaskSet, Processor]
WORDS = {True: ["fine", "great", "lovely"], False: ["poor", "awful", "dull"]}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Reviews with two labels (one often missing), and houses in a table."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    with (folder / "reviews.csv").open("w", newline="") as handle:
        rows = [
            [
                " ".join(draw.choices(WORDS[i % 2 == 0], k=3)) + f" {i}",
                "yes" if i % 2 == 0 else "no",
                "" if i % 3 == 0 else i % 5,
            ]
            for i in range(150)
        ]
        csv.writer(handle).writerows([["body", "liked", "stars"], *rows])
    with (folder / "houses.csv").open("w", newline="") as handle:
        areas = [draw.uniform(20, 200) for _ in range(60)]
        csv.writer(handle).writerows([["area", "price"], *[[a, 3 * a + 10] for a in areas]])
    text = {"data": "reviews.csv", "inputs": {"text": "body"}}
    taskset = build_tasks(
        {
            "liked": {**text, "target": "liked"},
            "stars": {**text, "target": "stars", "schema": "regression"},
            "price": {"data": "houses.csv", "inputs": {"table": ["area"]}, "target": "price"},
        },
        folder,
    )
    return taskset, Processor.fit(taskset, ProcessorConfig(vocab_size=320, text_length=16))


def loader_of(parts: Parts, mixture: str = "uniform", **keywords: Any) -> Loader:
    train = TrainConfig(**{"steps": 20, "batch_size": 12, "seed": 1, **keywords.pop("train", {})})
    return make_loader(*parts, train, MixtureConfig(policy=mixture, round_rows=24), **keywords)


def same(a: Batch, b: Batch) -> bool:
    fields = all(torch.equal(a.fields[n], b.fields[n]) for n in a.fields | b.fields)
    kinds = a.targets.keys() == b.targets.keys()
    values = all(
        torch.equal(a.targets[k].value.nan_to_num(-1), b.targets[k].value.nan_to_num(-1))
        and torch.equal(a.targets[k].row, b.targets[k].row)
        for k in a.targets
    )
    return fields and kinds and values


def test_a_batch_is_a_function_of_its_index(parts: Parts) -> None:
    one, other = loader_of(parts), loader_of(parts)
    expected = {index: one.batch(index)[0] for index in (0, 1, 2, 7, 400)}
    for index in (400, 7, 0, 2, 1, 0):
        assert same(other.batch(index)[0], expected[index])


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_rows_of_one(parts: Parts, world: int) -> None:
    whole = loader_of(parts)
    ranks = [loader_of(parts, rank=rank, world=world) for rank in range(world)]
    for index in (0, 5):
        draws = [rank.batch(index)[1] for rank in ranks]
        expected = whole.batch(index)[1]
        for part in ("group", "index", "epoch"):
            found = np.concatenate([getattr(draw, part) for draw in draws])
            assert found.tolist() == getattr(expected, part).tolist()


def test_each_epoch_has_every_row_once(parts: Parts) -> None:
    loader = loader_of(parts)
    size = len(parts[0].groups[0].splits["train"])
    seen: Counter[int] = Counter()
    for index in range(100):
        draw = loader.batch(index)[1]
        seen.update(draw.index[(draw.group == 0) & (draw.epoch == 0)].tolist())
    assert sorted(seen) == list(range(size))
    assert set(seen.values()) == {1}


def test_a_stage_has_rows_and_labels_of_its_tasks_only(parts: Parts) -> None:
    loader = loader_of(parts)
    loader.plan([Span((), 0, 5), Span(("stars",), 5, 10), Span((), 10, 15)])
    for index in range(5, 10):
        batch, draw = loader.batch(index)
        assert set(draw.group.tolist()) == {0}
        assert set(batch.targets) <= {"regress"}
        assert set(batch.targets["regress"].task.tolist()) == {1}
    plain = loader_of(parts)
    assert same(loader.batch(10)[0], plain.batch(5)[0])  # the mixture goes on where it stopped


def test_a_stage_of_an_unknown_task_names_the_nearest(parts: Parts) -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'prize'. Did you mean 'price'"):
        loader_of(parts).plan([Span(("prize",), 0, 1)])


def test_a_function_loader_knows_no_tasks() -> None:
    with pytest.raises(ConfigError, match="drop 'tasks'"):
        FunctionLoader(("a",), lambda index: None).plan([Span(("a",), 0, 1)])


def test_prefetching_changes_nothing(parts: Parts) -> None:
    plain = loader_of(parts)
    ahead = loader_of(parts, train={"prefetch": 2})
    for index in (0, 1, 2, 3, 9, 10, 4, 5):  # also jumps
        assert same(ahead.batch(index)[0], plain.batch(index)[0])


def test_a_learning_policy_waits_for_its_losses(parts: Parts) -> None:
    loader = loader_of(parts, "hardest")
    assert loader.learns
    assert loader.waits_for_losses(0)
    loader.batch(0)
    assert not loader.waits_for_losses(1)  # a round has 24 rows, two steps
    assert loader.waits_for_losses(2)


def test_a_batch_past_the_end_is_refused_not_short(parts: Parts) -> None:
    mixture = MixtureConfig(policy="uniform", stop="first_exhausted")
    for world in (1, 2):
        config = TrainConfig(steps=1000, batch_size=12)
        loader = make_loader(*parts, config, mixture, 0, world)
        assert loader.total_rows is not None
        whole = loader.total_rows // 12
        assert loader.batch(whole - 1)[0].rows == 12 // world
        with pytest.raises(DataEnded, match=rf"after {loader.total_rows} rows"):
            loader.batch(whole)


def test_stages_that_outlast_the_mixture_are_refused_before_training(parts: Parts) -> None:
    mixture = MixtureConfig(policy="uniform", stop={"liked+stars": 1, "price": 1})
    stages = (StageConfig(name="a", steps=3), StageConfig(name="b", steps=30, tasks=("price",)))
    config = TrainConfig(stages=stages, batch_size=12, accumulate=2)
    loader = make_loader(*parts, config, mixture)
    rows = len(parts[0].groups[1].splits["train"])
    with pytest.raises(ConfigError, match=rf"mixture of price.* after {rows}.* {rows // 12} steps"):
        loader.plan([Span((), 0, 6), Span(("price",), 6, 66)])
    loader.plan([Span((), 0, 6), Span(("price",), 6, 6 + 2 * (rows // 12))])


def test_cached_examples_are_bounded(parts: Parts) -> None:
    taskset, processor = parts
    rows = taskset.groups[1].splits["train"]
    example = processor.encode(0, [taskset.groups[0].splits["train"][0]])[0]  # type: ignore[index]
    cache = ExampleCache(limit=1500)
    for index in range(10):
        cache.put((0, index, 0), example)
    assert cache.used <= 1500
    assert cache.get((0, 0, 0)) is example
    assert cache.get((0, 9, 0)) is None
    assert len(rows) > 0  # type: ignore[arg-type]


class Numbers:
    """A stream of `size` rows."""

    name, columns = "numbers", ("x",)

    def __init__(self, size: int) -> None:
        self.size, self.opened = size, 0

    def read_from(self, position: int) -> Iterator[Row]:
        self.opened += 1
        return ({"x": i} for i in range(position, self.size))

    def where(self, index: int) -> str:
        return f"number {index}"


def test_a_stream_is_read_on_skipped_in_reopened_and_started_over() -> None:
    stream = Numbers(50)
    reader = RowReader(stream)
    assert [row["x"] for row in reader.take([0, 1, 2, 5, 9])] == [0, 1, 2, 5, 9]
    assert stream.opened == 1
    assert [row["x"] for row in reader.take([3, 4])] == [3, 4]
    assert stream.opened == 2
    assert [row["x"] for row in reader.take([49, 50, 51, 120])] == [49, 0, 1, 20]
    fresh = RowReader(Numbers(50))  # a resumed run, beyond the end
    assert [row["x"] for row in fresh.take([120, 121])] == [20, 21]
    with pytest.raises(DataError, match="numbers has no rows"):
        RowReader(Numbers(0)).take([0])


def train(parts: Parts, folder: Path, mixture: str = "uniform", **more: Any) -> Any:
    """A small real run; returns the trainer, its weights and result."""
    settings = {"steps": 18, "batch_size": 12, "seed": 1, "checkpoint_every": 5, "log_every": 4}
    stop = more.pop("stop", None)
    config = TrainConfig(**{**settings, "progress": False, **more})
    loader = make_loader(*parts, config, MixtureConfig(policy=mixture, round_rows=24))
    model = build_model(ModelConfig(dim=16, layers=1, heads=2, dropout=0.1), *parts)

    def watch(trainer: Trainer, step: int) -> None:
        if step == stop:
            raise KeyboardInterrupt

    work = partial(flops_by_task, model)
    trainer = Trainer(model, loader, config, folder, callbacks=[watch], work=work)
    result = trainer.fit()
    return trainer, torch.cat([p.detach().reshape(-1) for p in model.parameters()]), result


@pytest.mark.parametrize("mixture", ["uniform", "hardest", "one_task_per_step"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_real_run_resumes_bit_for_bit(
    parts: Parts, fast_path: Path, mixture: str, accumulate: int
) -> None:
    stages = (
        StageConfig(name="all", steps=8),
        StageConfig(name="text", steps=6, tasks=("liked",), freeze=("heads.*",), train=("*",)),
        StageConfig(name="again", steps=4),
    )
    settings = {"steps": None, "stages": stages, "accumulate": accumulate}
    whole, expected, _ = train(parts, fast_path / "whole", mixture, **settings)
    for stop in (7, 12, 17):
        folder = fast_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            train(parts, folder, mixture, stop=stop, **settings)
        again, found, result = train(parts, folder, mixture, **settings)
        assert result.resumed_from == stop // 5 * 5
        assert torch.equal(found, expected)
        for column in ("examples", "tokens", "flops"):
            ours, theirs = getattr(again.ledger, column), getattr(whole.ledger, column)
            np.testing.assert_allclose(ours, theirs)


def test_the_ledger_counts_known_labels_tokens_and_operations(parts: Parts, tmp_path: Path) -> None:
    trainer, _, _ = train(parts, tmp_path, accumulate=2)
    loader = make_loader(*parts, trainer.config, MixtureConfig(policy="uniform", round_rows=24))
    batches = [loader.batch(index)[0] for index in range(36)]
    pairs = Counter(t for b in batches for x in b.targets.values() for t in x.task.tolist())
    ledger = trainer.ledger
    assert ledger.examples.tolist() == [pairs[t] for t in range(3)]
    assert pairs[1] < pairs[0]  # some rows lack the second label
    text = sum(int(b.fields["text.length"].sum()) for b in batches if "text.length" in b.fields)
    assert ledger.tokens.tolist() == [text, 0, 0]
    assert ledger.flops.sum() == pytest.approx(sum(flops(trainer.model, b).total for b in batches))
    assert (ledger.seconds > 0).all()


def test_a_stopping_rule_ends_training_where_the_mixture_ends(parts: Parts, tmp_path: Path) -> None:
    config = TrainConfig(steps=1000, batch_size=12, progress=False, checkpoint_every=0)
    mixture = MixtureConfig(policy="uniform", stop="first_exhausted")
    loader = make_loader(*parts, config, mixture)
    model = build_model(ModelConfig(dim=16, layers=1, heads=2), *parts)
    result = Trainer(model, loader, config, tmp_path).fit()
    smallest = len(parts[0].groups[1].splits["train"])
    assert result.step == 2 * smallest // 12
    assert loader.total_rows is not None


def test_an_adaptive_mixture_that_ends_ends_the_run_cleanly(parts: Parts, tmp_path: Path) -> None:
    """Nobody can know beforehand when: the run is logged, saved, judged and can be called again."""
    stop = {"liked+stars": 1, "price": 2}
    rows = sum(len(g.splits["train"]) * n for g, n in zip(parts[0].groups, stop.values()))
    config = TrainConfig(steps=1000, batch_size=12, progress=False, log_every=4)

    def run() -> Any:
        mixture = MixtureConfig(policy="hardest", round_rows=24, stop=stop)
        loader = make_loader(*parts, config, mixture)
        model = build_model(ModelConfig(dim=16, layers=1, heads=2), *parts)
        seen: list[int] = []
        judge = partial(_judge, seen)
        return Trainer(model, loader, config, tmp_path, evaluator=judge).fit(), seen

    result, seen = run()
    assert (result.stopped, result.step) == ("ended", rows // 12)
    assert seen == [result.step]
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert next(x for x in lines if x.get("event") == "data_ended")["step"] == result.step
    assert [x["step"] for x in lines if x["kind"] == "train"][-1] == result.step
    again, seen = run()
    assert (again.stopped, again.step, again.resumed_from, seen) == (
        "ended",
        result.step,
        result.step,
        [],
    )


def _judge(seen: list[int], model: Any, step: int) -> dict[str, dict[str, float]]:
    seen.append(step)
    return {"liked": {"accuracy": 0.5}}


def test_prefetching_changes_no_bit_of_a_run_whose_mixture_learns(
    parts: Parts, tmp_path: Path
) -> None:
    found = [
        train(parts, tmp_path / str(ahead), "hardest", prefetch=ahead, accumulate=2)[1]
        for ahead in (0, 1, 5)
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("aggregator", [None, "upgrad"])
def test_the_real_model_learns_with_and_without_a_rule(
    parts: Parts, tmp_path: Path, aggregator: str | None
) -> None:
    train(parts, tmp_path, steps=60, lr=5e-3, aggregator=aggregator)
    lines = [x for x in read_lines(tmp_path / "metrics.jsonl") if x["kind"] == "train"]
    first, last = lines[0]["terms"], lines[-1]["terms"]
    for task in ("liked", "price"):
        assert sum(last[task].values()) < 0.8 * sum(first[task].values())
