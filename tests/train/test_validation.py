"""Mixtures that follow validation losses: measured on the split, told before rounds, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_loader
import torch

from polytask.errors import ConfigError, PolytaskError
from polytask.mixture import MixtureConfig
from polytask.models import ModelConfig, build_model
from polytask.models.collate import Collator
from polytask.train.config import StageConfig, TrainConfig
from polytask.train.loader import make_loader
from polytask.train.trainer import Trainer
from polytask.train.validation import MixtureValidation

Parts = tuple[Any, Any]
parts = test_loader.parts  # the fixture: reviews with two labels, houses
GRAPH = {"train": ["liked+stars", "price"], "A": [[1.0, 0.5], [0.0, 1.0]]}


def mixture(**options: Any) -> MixtureConfig:
    return MixtureConfig(policy="skillit", graph=GRAPH, **{"update_steps": 2, **options})


def trainer(parts: Parts, folder: Path, steps: int = 8, **options: Any) -> Trainer:
    config = TrainConfig(
        steps=steps, batch_size=8, progress=False, log_every=2, checkpoint_every=3,
        schedule="constant", warmup=0,
    )  # fmt: skip
    loader = make_loader(*parts, config, mixture(**options))
    model = build_model(ModelConfig(dim=16, layers=1, heads=2), *parts)
    return Trainer(model, loader, config, folder, validation=MixtureValidation(loader, limit=20))


def events(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line.get("event") == "mixture"]


def test_losses_are_means_over_the_validation_rows(parts: Parts, tmp_path: Path) -> None:
    taskset, processor = parts
    made = trainer(parts, tmp_path)
    model = made.model.eval()
    found = MixtureValidation(made.loader, limit=15, batch_size=4).measure(model)  # type: ignore[arg-type]
    collate = Collator.of(taskset, processor.pad_id)
    expected: dict[int, list[float]] = {}
    for number, group in enumerate(taskset.groups):
        source = group.splits["valid"]
        for i in range(min(15, len(source))):
            (example,) = processor.encode(number, source.take([i]), source.where, indices=[i])
            terms = model.terms(collate([example], [number]))
            sums: dict[int, float] = {}
            for name, value in terms.value.items():
                for task, loss in zip(terms.task[name].tolist(), value.tolist(), strict=True):
                    sums[task] = sums.get(task, 0.0) + loss
            for task, loss in sums.items():
                expected.setdefault(task, []).append(loss)
    wanted = [np.mean(expected[t]) for t in range(len(taskset.names))]
    assert found == pytest.approx(wanted, rel=1e-4)


def test_every_round_is_dealt_by_the_losses_before_it(parts: Parts, tmp_path: Path) -> None:
    made = trainer(parts, tmp_path)
    made.fit()
    found = events(tmp_path)
    assert [e["after"] for e in found] == [0, 2, 4, 6]
    A = np.array(GRAPH["A"])
    groups = [[t.name for t in g.tasks] for g in parts[0].groups]
    table = np.array(
        [[np.mean([e["losses"][t] for t in names]) for names in groups] for e in found]
    )
    for number, event in enumerate(found):
        window = table[max(1, number - 2) : number + 1].sum(0) if number else np.ones(2)
        raw = np.exp(0.5 * A @ window)
        assert list(event["shares"].values()) == pytest.approx(list(raw / raw.sum()), rel=1e-6)
    history = made.loader.sampler.history  # type: ignore[attr-defined]
    assert [step for step, _ in history.evaluations] == [0, 2, 4, 6]


def test_a_run_that_was_cut_off_goes_on_with_the_same_mixture(parts: Parts, tmp_path: Path) -> None:
    whole = trainer(parts, tmp_path / "whole")
    whole.fit()
    cut = trainer(parts, tmp_path / "cut")

    def stop(at: Trainer, step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    cut.callbacks = (stop,)
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    again = trainer(parts, tmp_path / "cut")
    assert again.fit().resumed_from == 3
    assert events(tmp_path / "cut") == events(tmp_path / "whole")
    pairs = zip(whole.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_authors_way_measures_at_checkpoints(parts: Parts, tmp_path: Path) -> None:
    made = trainer(parts, tmp_path, official=True, loss_every=1, update_steps=4)
    made.fit()
    found = events(tmp_path)
    assert [e["after"] for e in found] == list(range(8))
    shares = [tuple(e["shares"].values()) for e in found]
    assert len(set(shares[:4])) == len(set(shares[4:])) == 1 and shares[0] != shares[4]
    groups = [[t.name for t in g.tasks] for g in parts[0].groups]
    table = [[np.mean([e["losses"][t] for t in names]) for names in groups] for e in found]
    raw = np.exp(0.5 * np.array(GRAPH["A"]) @ np.sum(table[1:4], 0))
    assert shares[4] == pytest.approx(tuple(raw / raw.sum()), rel=1e-6)


def test_a_mixture_that_nobody_tells_losses_stops(parts: Parts, tmp_path: Path) -> None:
    made = trainer(parts, tmp_path)
    made.validation = None
    with pytest.raises(PolytaskError, match="needs losses on validation rows"):
        made.fit()


def test_rounds_have_to_fit_and_stages_have_their_own_graph(parts: Parts, tmp_path: Path) -> None:
    config = TrainConfig(steps=9, batch_size=8, progress=False)
    with pytest.raises(ConfigError, match="update_steps = 2 does not divide the 9 steps"):
        make_loader(*parts, config, mixture())
    stages = (
        StageConfig(name="all", steps=4),
        StageConfig(name="price", steps=4, tasks=("price",)),
    )
    config = TrainConfig(stages=stages, batch_size=8, progress=False, checkpoint_every=0)
    loader = make_loader(*parts, config, mixture())
    model = build_model(ModelConfig(dim=16, layers=1, heads=2), *parts)
    validation = MixtureValidation(loader, limit=10)
    assert Trainer(model, loader, config, tmp_path, validation=validation).fit().step == 8
    assert [len(e["shares"]) for e in events(tmp_path)] == [2, 2, 1, 1]
