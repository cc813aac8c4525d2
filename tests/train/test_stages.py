"""Stages: patterns match or are refused, and what is frozen does not move."""

import itertools
from pathlib import Path

import pytest
import torch
from train_fakes import TinyModel, loader_of

from polytask.errors import ConfigError
from polytask.train.config import StageConfig, TrainConfig
from polytask.train.optim import build_optimizer, scale_at, set_scale
from polytask.train.stages import freeze, legs, matching
from polytask.train.trackers import read_lines
from polytask.train.trainer import Trainer


def test_a_pattern_that_matches_nothing_names_the_nearest(model: TinyModel) -> None:
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ConfigError, match=r"'trnk\.\*' matches no parameter.*'trunk'"):
        matching(names, ["trnk.*"], "stage 'main', freeze")
    with pytest.raises(ConfigError, match=r"Did you mean 'trunk\.0\.weight'"):
        matching(names, ["trunk.0.weigth"], "freeze")


def test_freeze_counts_every_number_once(model: TinyModel) -> None:
    frozen = freeze(model, StageConfig(steps=1, freeze=("trunk.*",)))
    assert frozen.trained_numbers == 3 * (8 + 1)
    assert frozen.frozen_numbers == 6 * 8 + 8 + 8 + 8
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(frozen.trains)
    assert frozen.event()["frozen"] == ["trunk.0 (2)", "trunk.1 (2)"]


def test_a_stage_that_trains_nothing_is_refused(model: TinyModel) -> None:
    with pytest.raises(ConfigError, match="no parameter is left to train"):
        freeze(model, StageConfig(steps=1, train=("trunk.*",), freeze=("*",)))


def test_frozen_parameters_keep_their_bits_and_the_next_stage_moves_them(tmp_path: Path) -> None:
    model = TinyModel()
    seen: dict[int, torch.Tensor] = {}

    def watch(trainer: Trainer, step: int) -> None:
        seen[step] = model.trunk[0].weight.detach().clone()

    config = TrainConfig(
        stages=(
            StageConfig(name="heads", steps=5, freeze=("trunk.*",)),
            StageConfig(name="all", steps=5),
        ),
        batch_size=8,
    )
    before = model.trunk[0].weight.detach().clone()
    Trainer(model, loader_of(8), config, tmp_path, callbacks=[watch]).fit()
    assert torch.equal(seen[5], before)
    assert not torch.equal(seen[6], before)
    events = [line for line in read_lines(tmp_path / "metrics.jsonl") if line["kind"] == "event"]
    stages = [e for e in events if e["event"] == "stage"]
    assert [(e["stage"], e["trained_numbers"]) for e in stages] == [("heads", 27), ("all", 99)]


def test_norms_and_biases_get_no_decay_and_patterns_set_learning_rates(model: TinyModel) -> None:
    config = TrainConfig(steps=1, lr=0.1, lrs={"heads.*": 0.5}, weight_decay=0.3)
    optimizer = build_optimizer(model, StageConfig(steps=1), config)
    of = {
        id(p): (group["peak"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    found = {name: of[id(p)] for name, p in model.named_parameters()}
    assert found["trunk.0.weight"] == (0.1, 0.3)
    assert found["trunk.0.bias"] == found["trunk.1.weight"] == (0.1, 0.0)
    assert found["heads.0.weight"] == (0.5, 0.3)
    assert found["heads.0.bias"] == (0.5, 0.0)
    assert set_scale(optimizer, 0.5) == pytest.approx(0.05)


def test_an_lr_pattern_that_matches_nothing_is_refused(model: TinyModel) -> None:
    with pytest.raises(ConfigError, match="lrs: pattern 'haeds"):
        build_optimizer(model, StageConfig(steps=1), TrainConfig(steps=1, lrs={"haeds.*": 0.1}))


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_schedules_rise_to_the_peak_stay_within_it_and_end_low(kind: str) -> None:
    config = TrainConfig(steps=100, warmup=0.1, schedule=kind, floor=0.1)
    leg = legs([StageConfig(steps=100)])[0]
    scales = [scale_at(step, leg, config) for step in range(100)]
    assert scales[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(scales) == pytest.approx(1)
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(scales[9:]))
    assert scales[-1] == pytest.approx(1.0 if kind == "constant" else 0.1, abs=0.06)


def test_cosine_matches_torchs_own_schedule() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    leg = legs([StageConfig(steps=50, warmup=0)])[0]
    for step in range(50):
        ours = scale_at(step, leg, TrainConfig(steps=50))
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


def test_a_stage_overrides_schedule_and_warmup_and_starts_anew() -> None:
    first, second = legs(
        [
            StageConfig(name="a", steps=10, warmup=0, schedule="constant"),
            StageConfig(name="b", steps=10, warmup=4),
        ]
    )
    config = TrainConfig(steps=1)
    assert scale_at(9, first, config) == 1.0
    assert scale_at(10, second, config) == 0.25
