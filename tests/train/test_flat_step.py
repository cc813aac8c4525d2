"""FlatMTL inside the trainer: the same numbers as by hand, however a step is cut up."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from train_fakes import TASKS, TinyModel, loader_of, make_batch, rows_of

from polytask.errors import ConfigError, NonFiniteError
from polytask.train.aggregation import combiner
from polytask.train.config import TrainConfig
from polytask.train.distribution import Distribution
from polytask.train.flat import FlatMTL
from polytask.train.flat_config import SharpnessConfig
from polytask.train.flat_step import FlatGradients
from polytask.train.gradients import StepModule, model_terms
from polytask.train.jacobian import AggregatedGradients
from polytask.train.trainer import Trainer, TrainResult
from polytask.train.weighting import build_weighting


def config(**changes: Any) -> TrainConfig:
    given = {"steps": 6, "batch_size": 24, "aggregator": "cagrad", "progress": False}
    return TrainConfig.model_validate({**given, "device": "cpu", **changes})


def gradients_of(
    model: nn.Module,
    batches: list[Any],
    kind: type[AggregatedGradients] = FlatGradients,
    distribution: Distribution | None = None,
    **changes: Any,
) -> dict[str, Tensor]:
    """Gradients by name after one step of `kind`."""
    settings = config(**{k: v for k, v in changes.items() if k not in ("rho", "norm")})
    weighting = build_weighting(settings, TASKS)
    inner = StepModule(model, model_terms, weighting, len(TASKS), False)
    distribution = distribution or Distribution("cpu")
    if kind is FlatGradients:
        sharp = SharpnessConfig(rho=changes.get("rho", 0.2), norm=changes.get("norm", "joint"))
        found: AggregatedGradients = FlatGradients(model, len(TASKS), settings, distribution, sharp)
    else:
        found = kind(model, len(TASKS), settings, distribution)
    sums = found(0, inner, batches, len(TASKS))  # type: ignore[arg-type]
    assert torch.isfinite(sums.losses).all()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model: TinyModel, batch: Any, rule: str, rho: float) -> dict[str, Tensor]:
    def losses() -> list[Tensor | None]:
        terms = model.terms(batch)
        value, task = terms.value["mse"], terms.task["mse"]
        return [value[task == t].mean() if (task == t).any() else None for t in range(3)]

    heads = [list(head.parameters()) for head in model.heads]
    FlatMTL(rule, rho).step(losses, model.trunk.parameters(), heads, model)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=1e-6, msg=name)


@pytest.mark.parametrize("rule", ["mean", "cagrad", "mgda"])
def test_a_trainers_step_is_flat_mtls_step(rule: str) -> None:
    model, batch = TinyModel(), rows_of(0, 24)
    # Every head parameter belongs to every task here; other tasks' heads have zero gradient.
    found = gradients_of(copy.deepcopy(model), [batch], aggregator=rule)
    assert_same(found, by_hand(model, batch, rule, 0.2))


def test_micro_batches_do_not_change_the_step() -> None:
    model = TinyModel()
    whole = gradients_of(copy.deepcopy(model), [rows_of(0, 24)])
    parts = gradients_of(copy.deepcopy(model), [rows_of(0, 5), rows_of(5, 19)])
    assert_same(parts, whole)


def test_zero_rho_is_plain_aggregation() -> None:
    model = TinyModel()
    plain = gradients_of(copy.deepcopy(model), [rows_of(0, 24)], AggregatedGradients)
    assert_same(gradients_of(copy.deepcopy(model), [rows_of(0, 24)], rho=0.0), plain)


def test_a_task_absent_from_the_step_changes_nothing_and_gets_no_head_gradient() -> None:
    model, batch = TinyModel(), rows_of(0, 40)
    keep = batch.task != 1
    few = make_batch(
        batch.fields["features.values"][keep],
        batch.targets["regress"].value[keep],
        batch.task[keep],
        batch.row[keep],
    )
    found = gradients_of(copy.deepcopy(model), [few])
    assert not any(name.startswith("heads.1") and g.any() for name, g in found.items())
    trunk = {n: g for n, g in by_hand(model, few, "cagrad", 0.2).items() if "trunk" in n}
    assert_same({n: g for n, g in found.items() if "trunk" in n}, trunk)


class Together:
    """Sums tensors over threads that stand in for processes."""

    def __init__(self, world: int) -> None:
        self.barrier = threading.Barrier(world)
        self.parts: list[list[Tensor]] = []

    def rank(self, index: int, world: int) -> Distribution:
        found = Distribution("cpu")
        found.rank, found.world = index, world
        found.sum_ = self.sum_  # type: ignore[method-assign]
        return found

    def sum_(self, tensors: Any) -> None:
        mine = list(tensors)
        self.parts.append([t.clone() for t in mine])
        self.barrier.wait(20)
        for position, tensor in enumerate(mine):
            tensor.copy_(torch.stack([part[position] for part in self.parts]).sum(0))
        if self.barrier.wait(20) == 0:
            self.parts.clear()
        self.barrier.wait(20)


def test_two_processes_give_the_one_process_result_even_when_one_lacks_a_task() -> None:
    model, batch = TinyModel(), rows_of(0, 24)
    whole = gradients_of(copy.deepcopy(model), [batch])
    first, second = batch.task != 2, batch.task == 2  # all of task 2 is with the second
    second = second | (torch.arange(24) % 3 == 0)
    first = ~second
    together, found = Together(2), {}

    def work(rank: int, mask: Tensor) -> None:
        part = make_batch(
            batch.fields["features.values"][mask],
            batch.targets["regress"].value[mask],
            batch.task[mask],
            batch.row[mask],
        )
        found[rank] = gradients_of(
            copy.deepcopy(model), [part], distribution=together.rank(rank, 2)
        )

    threads = [threading.Thread(target=work, args=(r, m)) for r, m in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert_same(found[0], found[1], rtol=1e-6)
    assert_same(found[0], whole)


def train(folder: Path, model: nn.Module, **changes: Any) -> TrainResult:
    settings = config(sharpness={"rho": 0.1}, **changes)
    return Trainer(model, loader_of(24), settings, folder).fit()


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_run_ends_bit_identical(tmp_path: Path) -> None:
    whole, parts = TinyModel(dropout=0.3), TinyModel(dropout=0.3)
    train(tmp_path / "whole", whole, checkpoint_every=3, aggregator="pcgrad")
    train(tmp_path / "parts", parts, checkpoint_every=3, aggregator="pcgrad")
    newest = tmp_path / "parts" / "checkpoints"
    last = sorted(newest.iterdir())[-1]
    for file in sorted(last.iterdir(), reverse=True):
        file.unlink()
    last.rmdir()
    again = TinyModel(dropout=0.3, seed=9)
    result = train(tmp_path / "parts", again, checkpoint_every=3, aggregator="pcgrad")
    assert result.resumed_from == 3
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_training_lowers_the_loss_and_logs_every_tasks_sharpness(tmp_path: Path) -> None:
    train(tmp_path, TinyModel(), steps=60, log_every=20, lr=0.02, conflict_every=30)
    lines = lines_of(tmp_path)
    sharp = [line for line in lines if line.get("event") == "sharpness"]
    assert [line["step"] for line in sharp] == [20, 40, 60]
    assert all(set(line["rise"]) == set(TASKS) for line in sharp)
    assert all(rise > 0 for line in sharp for rise in line["rise"].values())
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0]
    conflicts = [line for line in lines if line.get("event") == "conflict"]
    assert len(conflicts) == 2
    assert "trunk.0" in conflicts[0]["cosine"]


def test_a_nan_is_told_by_the_trainer_and_weights_are_unharmed(tmp_path: Path) -> None:
    model = TinyModel()
    loader = loader_of(24)
    plain = loader.function

    def broken(index: int) -> Any:
        batch = plain(index)
        if index == 2:
            batch.targets["regress"].value[4] = float("nan")
        return batch

    loader.function = broken
    settings = config(checkpoint_every=0, sharpness={})
    trainer = Trainer(model, loader, settings, tmp_path)
    with pytest.raises(NonFiniteError, match=r"step 3.*not finite"):
        trainer.fit()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_sharpness_without_an_aggregator_or_with_reused_weights_is_refused() -> None:
    model, distribution = TinyModel(), Distribution("cpu")
    for changes in ({"aggregator": None}, {"aggregate_every": 2}):
        with pytest.raises(ValueError, match="'sharpness' needs an 'aggregator'"):
            config(sharpness={}, **changes)
    with pytest.raises(ConfigError, match="needs an 'aggregator'"):
        FlatGradients(model, 3, config(aggregator=None), distribution, SharpnessConfig())
    with pytest.raises(ConfigError, match="aggregate_every"):
        FlatGradients(model, 3, config(aggregate_every=2), distribution, SharpnessConfig())


def test_rules_with_memory_keep_one_for_each_part() -> None:
    model, settings = TinyModel(), config(aggregator="nash_mtl")
    found = FlatGradients(model, 3, settings, Distribution("cpu"), SharpnessConfig())
    inner = StepModule(model, model_terms, build_weighting(settings, TASKS), 3, False)
    found(0, inner, [rows_of(0, 24)], 3)  # type: ignore[arg-type]
    state = found.state()
    assert state["memory"] and state["second"] and state["memory"] != state["second"]
    fresh = FlatGradients(model, 3, settings, Distribution("cpu"), SharpnessConfig())
    fresh.restore(json.loads(json.dumps(state)))
    again = fresh.state()
    for part in ("memory", "second"):
        for key, value in state[part].items():
            assert again[part][key] == pytest.approx(value, rel=1e-6), key


def test_the_rule_by_name_is_the_same_as_in_plain_use() -> None:
    g = torch.randn(3, 7)
    torch.testing.assert_close(combiner("mgda")(g), FlatMTL("mgda").combine(g))
