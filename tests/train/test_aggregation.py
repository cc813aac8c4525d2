"""Aggregation equals bare TorchJD, over micro-batches too; names, options and memory."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchjd.aggregation as rules
from torchjd.autojac import jac_to_grad, mtl_backward
from train_fakes import TASKS, TinyModel, loader_of, make_batch, rows_of

from polytask import rng
from polytask.errors import ConfigError, NonFiniteError, UserError
from polytask.models.batch import Batch
from polytask.train.aggregation import (
    GradientCombiner,
    aggregators,
    combiner,
    per_task_gradients,
)
from polytask.train.config import TrainConfig
from polytask.train.conflict import cosines, layer_group
from polytask.train.distribution import Distribution
from polytask.train.gradients import StepModule, model_terms
from polytask.train.jacobian import AggregatedGradients, shared_parameters
from polytask.train.loader import FunctionLoader
from polytask.train.trackers import read_lines
from polytask.train.trainer import Trainer
from polytask.train.weighting import build_weighting

BARE: dict[str, Callable[[], rules.Aggregator]] = {
    "mean": rules.Mean,
    "sum": rules.Sum,
    "upgrad": rules.UPGrad,
    "dualproj": rules.DualProj,
    "mgda": rules.MGDA,
    "pcgrad": rules.PCGrad,
    "graddrop": rules.GradDrop,
    "gradvac": rules.GradVac,
    "cagrad": lambda: rules.CAGrad(0.4),
    "imtl_g": rules.IMTLG,
    "nash_mtl": lambda: rules.NashMTL(3),
    "aligned_mtl": rules.AlignedMTL,
    "config": rules.ConFIG,
    "fairgrad": lambda: rules.FairGrad(2.0),
}


def gradients_of(
    model: TinyModel, batches: list[Batch], step: int = 0, **settings: object
) -> dict[str, torch.Tensor | None]:
    config = TrainConfig(**{"steps": 1, "aggregator": "mean", **settings})  # type: ignore[arg-type]
    weighting = build_weighting(config, TASKS)
    module = StepModule(model, model_terms, weighting, 3, False)
    AggregatedGradients(model, 3, config, Distribution("cpu"))(step, module, batches, 3)  # type: ignore[arg-type]
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def bare_torchjd(model: TinyModel, batch: Batch, rule: rules.Aggregator) -> dict[str, torch.Tensor]:
    """The same step as TorchJD's own documentation writes it."""
    target = batch.targets["regress"]
    features = model.trunk(batch.fields["features.values"])
    losses = []
    for task in target.task.unique().tolist():
        mine = target.task == task
        error = model.heads[task](features[mine])[:, 0] - target.value[mine]
        losses.append((error**2).mean())
    mtl_backward(losses, features=features)
    torch.manual_seed(rng.derive(0, "aggregate", 0))
    jac_to_grad(list(model.trunk.parameters()), rule)
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("name", sorted(BARE))
@pytest.mark.parametrize("chunk", [1, 2, None])
def test_a_step_equals_bare_torchjd(model: TinyModel, name: str, chunk: int | None) -> None:
    batch = rows_of(0, 24)
    ours = gradients_of(model, [batch], aggregator=name, chunk=chunk)
    theirs = bare_torchjd(model, batch, BARE[name]())
    for parameter in ours:
        torch.testing.assert_close(ours[parameter], theirs[parameter], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mean", "upgrad", "pcgrad", "cagrad", "config"])
def test_micro_batches_give_the_whole_batchs_result(model: TinyModel, name: str) -> None:
    """Uneven parts, and a part in which a task is missing."""
    whole = rows_of(0, 24)
    x, y = whole.fields["features.values"], whole.targets["regress"].value
    order = torch.argsort(whole.task, stable=True)
    parts = [
        make_batch(x[i], y[i], whole.task[i], whole.row[i])
        for i in (order[:5], order[5:6], order[6:])
    ]
    one = gradients_of(model, [whole], aggregator=name)
    many = gradients_of(model, parts, aggregator=name)
    for parameter in one:
        torch.testing.assert_close(one[parameter], many[parameter], rtol=1e-5, atol=1e-5)


def test_only_tasks_present_take_part(model: TinyModel) -> None:
    batch = rows_of(0, 24)
    keep = batch.task != 1
    x, y = batch.fields["features.values"][keep], batch.targets["regress"].value[keep]
    two = make_batch(x, y, batch.task[keep], batch.row[keep])
    found = gradients_of(model, [two], aggregator="mgda")
    theirs = bare_torchjd(model, two, rules.MGDA())
    assert found["heads.1.weight"] is not None  # the fake runs every head on every row
    assert found["heads.1.weight"].count_nonzero() == 0
    for name, expected in theirs.items():
        if expected is not None:
            torch.testing.assert_close(found[name], expected)


def test_aggregating_by_sum_is_the_ordinary_gradient(model: TinyModel) -> None:
    batch = rows_of(0, 24)
    found = gradients_of(model, [batch], aggregator="sum")
    terms = model.terms(batch)
    value, task = terms.value["mse"], terms.task["mse"]
    torch.stack([value[task == t].mean() for t in range(3)]).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_between_aggregations_the_last_weights_are_used(model: TinyModel) -> None:
    config = TrainConfig(steps=1, aggregator="mgda", aggregate_every=3)
    module = StepModule(model, model_terms, build_weighting(config, TASKS), 3, False)
    gradients = AggregatedGradients(model, 3, config, Distribution("cpu"))
    gradients(0, module, [rows_of(0, 24)], 3)  # type: ignore[arg-type]
    weights = gradients.last.clone()
    assert weights.sum() == pytest.approx(1)
    model.zero_grad()
    batch = rows_of(24, 24)
    gradients(1, module, [batch], 3)  # type: ignore[arg-type]
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    terms = model.terms(batch)
    value, task = terms.value["mse"], terms.task["mse"]
    means = torch.stack([value[task == t].mean() for t in range(3)])
    (means * weights).sum().backward(retain_graph=True)
    for name, parameter in model.trunk.named_parameters():
        torch.testing.assert_close(found[f"trunk.{name}"], parameter.grad)
    model.zero_grad()
    means.sum().backward()
    for name, parameter in model.heads.named_parameters():
        torch.testing.assert_close(found[f"heads.{name}"], parameter.grad)


def test_reusing_weights_needs_a_rule_with_weights(model: TinyModel) -> None:
    config = TrainConfig(steps=1, aggregator="config", aggregate_every=2)
    with pytest.raises(ConfigError, match="'config' has no weights"):
        AggregatedGradients(model, 3, config, Distribution("cpu"))


def test_an_unknown_rule_or_option_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown aggregator 'pcgard'. Did you mean 'pcgrad'"):
        combiner("pcgard")
    with pytest.raises(ConfigError, match=r"'mgda' has no option 'epsilom'.*'epsilon'"):
        combiner("mgda", epsilom=1)
    with pytest.raises(ConfigError, match=r"'mean' has no option 'c'. It has none"):
        combiner("mean", c=1)


def test_a_missing_solver_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("no ecos")

    monkeypatch.setattr("torchjd.aggregation.CAGrad", missing)
    with pytest.raises(UserError, match="pip install torchjd qpsolvers quadprog cvxpy ecos"):
        combiner("cagrad")


@pytest.mark.parametrize("name", aggregators.names())
def test_every_rule_has_the_right_shape_and_a_nan_row_gives_nan(name: str) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(4, 10)
    assert combiner(name)(matrix).shape == (10,)
    matrix[1, 3] = torch.nan
    assert combiner(name)(matrix).isnan().all()


# k of A(s G) = s^k A(G). FairGrad: weights solve (G G^T) w = w^(-1 / alpha), alpha 2.
DEGREES = {**dict.fromkeys(sorted(BARE), 1.0), "random": 1.0, "fairgrad": -1 / 3}
del DEGREES["nash_mtl"]


@pytest.mark.parametrize("name", sorted(DEGREES))
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6])
def test_the_scale_of_gradients_passes_through_a_rule(name: str, scale: float) -> None:
    """Bare CAGrad takes a matrix of norm below .01 for zero; bare solvers stop early or late."""
    matrix = torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    found = []
    for factor in (1.0, scale):
        torch.manual_seed(0)
        found.append(combiner(name)(matrix * factor))
    assert float(found[0].norm()) > 0
    torch.testing.assert_close(
        found[1] / scale ** DEGREES[name], found[0], rtol=1e-4, atol=1e-5 * float(found[0].norm())
    )


def test_nash_cuts_what_is_longer_than_its_norm() -> None:
    matrix = 1e3 * torch.randn(3, 12, generator=torch.Generator().manual_seed(1))
    cut, free = (combiner("nash_mtl", max_norm=norm)(matrix) for norm in (1.0, 0.0))
    assert float(free.norm()) > 1
    torch.testing.assert_close(cut, free / free.norm())


@pytest.mark.parametrize("name", sorted(aggregators))
def test_gradients_that_are_zero_give_zero(name: str) -> None:
    assert torch.equal(combiner(name)(torch.zeros(3, 5)), torch.zeros(5))


@pytest.mark.parametrize("name", ["gradvac", "nash_mtl"])
def test_memory_survives_saving_bit_for_bit(name: str) -> None:
    """Saved as JSON and read back at every step, against a rule that was never saved."""
    matrices = torch.randn(8, 3, 20, generator=torch.Generator().manual_seed(0))
    whole = GradientCombiner(name)
    resumed = GradientCombiner(name)
    for matrix in matrices:
        kept = json.loads(json.dumps(resumed.state()))
        resumed = GradientCombiner(name)
        resumed.restore(kept)
        found = []
        for rule in (whole, resumed):
            torch.manual_seed(1)
            found.append(rule(matrix))
        assert torch.equal(*found)
        assert resumed.state() == whole.state()


def test_memory_is_kept_apart_for_different_sets_of_tasks() -> None:
    torch.manual_seed(0)
    rule = GradientCombiner("nash_mtl")
    rule.combine([torch.randn(2, 5)], [0, 1])
    weights = rule.combine([torch.randn(3, 5)], [0, 1, 2])[1]
    assert weights is not None
    assert weights.shape == (3,)


def test_per_task_gradients_equal_one_backward_each(model: TinyModel) -> None:
    terms = model.terms(rows_of(0, 12))
    losses = [terms.value["mse"][terms.task["mse"] == t].sum() for t in range(3)]
    parameters = list(model.parameters())
    found = per_task_gradients(losses, parameters, chunk=1)
    for t in range(3):
        terms = model.terms(rows_of(0, 12))
        model.zero_grad()
        terms.value["mse"][terms.task["mse"] == t].sum().backward()
        for row, parameter in zip(found, parameters):
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(row[t], expected)


def test_what_is_shared_comes_from_patterns_or_the_model(model: TinyModel) -> None:
    assert shared_parameters(model, ()) == model.shared_names()
    assert shared_parameters(model, ("trunk.0.*",)) == ["trunk.0.weight", "trunk.0.bias"]
    with pytest.raises(ConfigError, match="shared: pattern"):
        shared_parameters(model, ("trnk.*",))
    plain = torch.nn.Linear(2, 1)
    assert shared_parameters(plain, ()) == ["weight", "bias"]


def test_training_with_a_rule_learns_logs_conflicts_and_resumes(tmp_path: Path) -> None:
    config = TrainConfig(
        steps=40,
        batch_size=16,
        accumulate=2,
        aggregator="gradvac",
        conflict_every=20,
        checkpoint_every=10,
        lr=1e-2,
    )
    model = TinyModel()
    Trainer(model, loader_of(8), config, tmp_path / "whole").fit()

    class Stop(Exception):
        pass

    def stop(trainer: Trainer, step: int) -> None:
        if step == 33:
            raise Stop

    again = TinyModel()
    with pytest.raises(Stop):
        Trainer(again, loader_of(8), config, tmp_path / "b", callbacks=[stop]).fit()
    again = TinyModel()
    result = Trainer(again, loader_of(8), config, tmp_path / "b").fit()
    assert result.resumed_from == 30
    for a, b in zip(model.parameters(), again.parameters()):
        assert torch.equal(a, b)
    lines = read_lines(tmp_path / "whole" / "metrics.jsonl")
    losses = [x["loss"] for x in lines if x["kind"] == "train"]
    assert losses[-1] < losses[0]
    conflict = [x for x in lines if x.get("event") == "conflict"]
    assert [x["step"] for x in conflict] == [1, 21]
    assert conflict[0]["tasks"] == list(TASKS)
    assert set(conflict[0]["cosine"]) == {"all", "trunk.0", "trunk.1"}
    assert [conflict[0]["cosine"]["all"][t][t] for t in range(3)] == [1, 1, 1]


def test_conflicts_are_logged_without_an_aggregator_too(tmp_path: Path) -> None:
    config = TrainConfig(steps=2, batch_size=16, conflict_every=1)
    Trainer(TinyModel(), loader_of(16), config, tmp_path).fit()
    lines = read_lines(tmp_path / "metrics.jsonl")
    found = [x for x in lines if x.get("event") == "conflict"]
    model, batch = TinyModel(), rows_of(0, 16)
    terms = model.terms(batch)
    losses = [terms.value["mse"][terms.task["mse"] == t].sum() for t in range(3)]
    jacobian = torch.cat(
        [j.flatten(1) for j in per_task_gradients(losses, list(model.trunk.parameters()))], 1
    )
    torch.testing.assert_close(
        torch.tensor(found[0]["cosine"]["all"]), cosines(jacobian), atol=1e-4, rtol=0
    )


def test_cosines_and_groups() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    assert cosines(rows).tolist() == [[1, 0, -1], [0, 1, 0], [-1, 0, 1]]
    assert layer_group("encoder.layers.11.ffn.weight") == "encoder.layers.11"
    assert layer_group("embedding.weight") == "embedding"


def test_a_nan_gradient_is_named_under_aggregation(tmp_path: Path) -> None:
    def function(index: int) -> Batch:
        batch = rows_of(index * 8, 8)
        if index == 2:
            batch.fields["features.values"][5] = torch.inf
        return batch

    config = TrainConfig(steps=5, batch_size=8, aggregator="upgrad")
    trainer = Trainer(TinyModel(), FunctionLoader(TASKS, function), config, tmp_path)
    with pytest.raises(NonFiniteError, match=r"step 3: .*rows 21"):
        trainer.fit()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_frozen_trunk_leaves_the_heads_their_own_gradients(model: TinyModel) -> None:
    for parameter in model.trunk.parameters():
        parameter.requires_grad_(False)
    found = gradients_of(copy.deepcopy(model), [rows_of(0, 24)], aggregator="mgda")
    terms = model.terms(rows_of(0, 24))
    value, task = terms.value["mse"], terms.task["mse"]
    torch.stack([value[task == t].mean() for t in range(3)]).sum().backward()
    assert found["trunk.0.weight"] is None
    for name, parameter in model.heads.named_parameters():
        torch.testing.assert_close(found[f"heads.{name}"], parameter.grad)
