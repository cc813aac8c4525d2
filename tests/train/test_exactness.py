"""The trainer does what a hand-written loop does, and sums are exact over micro-batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from train_fakes import TASKS, TinyModel, loader_of, rows_of

from polytask.errors import ConfigError
from polytask.models.batch import Terms
from polytask.train.config import StageConfig, TrainConfig
from polytask.train.gradients import count_pairs, pairs_by_target, task_means
from polytask.train.optim import AveragedWeights, clip_, scale_at
from polytask.train.stages import legs
from polytask.train.trackers import read_lines
from polytask.train.trainer import Trainer


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def train(folder: Path, **settings: object) -> TinyModel:
    model = TinyModel()
    config = TrainConfig(**{"steps": 20, "batch_size": 12, "lr": 1e-2, **settings})  # type: ignore[arg-type]
    Trainer(model, loader_of(config.micro_batch), config, folder).fit()
    return model


def test_training_equals_a_hand_written_loop(tmp_path: Path) -> None:
    ours = train(tmp_path, clip=0.5, weight_decay=0.1, seed=3)
    model = TinyModel()
    config = TrainConfig(steps=20, lr=1e-2)
    leg = legs([StageConfig(steps=20)])[0]
    decayed = [p for n, p in model.named_parameters() if n in ("trunk.0.weight",) or "heads" in n]
    decayed = [p for p in decayed if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-2
    )
    for step in range(20):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * scale_at(step, leg, config)
        batch = rows_of(step * 12, 12)
        model.terms(batch).value["mse"].mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights_of(ours), weights_of(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("balance", ["rows", "tasks"])
@pytest.mark.parametrize("weighting", ["equal", "uncertainty", "dynamic"])
def test_accumulation_equals_the_whole_batch(tmp_path: Path, balance: str, weighting: str) -> None:
    settings = {"balance": balance, "weighting": weighting, "weighting_every": 3}
    whole = train(tmp_path / "1", accumulate=1, **settings)
    parts = train(tmp_path / "4", accumulate=4, **settings)
    torch.testing.assert_close(weights_of(whole), weights_of(parts), rtol=1e-4, atol=1e-5)


def test_balance_by_task_is_the_gradient_of_the_mean_of_task_means(tmp_path: Path) -> None:
    model, reference = TinyModel(), TinyModel()
    kept: list[torch.Tensor] = []

    config = TrainConfig(steps=1, batch_size=12, balance="tasks", clip=0)
    trainer = Trainer(model, loader_of(12), config, tmp_path)
    original = trainer._clip

    def watch(sums: object) -> torch.Tensor:
        norm = original(sums)  # type: ignore[arg-type]
        kept.extend(p.grad.clone() for p in model.parameters() if p.grad is not None)
        return norm

    trainer._clip = watch  # type: ignore[method-assign]
    trainer.fit()
    terms = reference.terms(rows_of(0, 12))
    value, task = terms.value["mse"], terms.task["mse"]
    present = task.unique()
    torch.stack([value[task == t].mean() for t in present]).mean().backward()
    expected = [p.grad for p in reference.parameters() if p.grad is not None]
    assert len(kept) == len(expected)
    for ours, theirs in zip(kept, expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_logged_terms_are_exact_means_over_the_window(tmp_path: Path, accumulate: int) -> None:
    class Still(TinyModel):
        """Reports losses that do not depend on training: row number squared."""

        def terms(self, batch):  # type: ignore[no-untyped-def, override]
            found = super().terms(batch)
            fixed = found.row["mse"].float() ** 2 + 0 * found.value["mse"]
            half = found.task["mse"] < 2  # a second term that only two tasks have
            return Terms(
                {"square": fixed, "extra": fixed[half] * 0 + 1.0},
                {"square": found.task["mse"], "extra": found.task["mse"][half]},
                {"square": found.row["mse"], "extra": found.row["mse"][half]},
            )

    config = TrainConfig(steps=10, batch_size=6, accumulate=accumulate, log_every=5)
    Trainer(Still(), loader_of(config.micro_batch), config, tmp_path).fit()
    lines = [x for x in read_lines(tmp_path / "metrics.jsonl") if x["kind"] == "train"]
    assert [line["step"] for line in lines] == [5, 10]
    rows = rows_of(30, 30)  # the second window
    task, row = rows.task.numpy(), rows.row.numpy().astype(float)
    for t, name in enumerate(TASKS):
        assert lines[1]["terms"][name]["square"] == pytest.approx((row[task == t] ** 2).mean())
        assert ("extra" in lines[1]["terms"][name]) == (t < 2)
    expected = (row**2).mean() + (task < 2).mean()
    assert lines[1]["loss"] == pytest.approx(expected)
    assert lines[1]["tokens_per_s"] == pytest.approx(2 * lines[1]["rows_per_s"])


def test_pairs_are_counted_once_however_many_terms() -> None:
    task = torch.tensor([0, 2, 2])
    value = torch.tensor([1.0, 2.0, 4.0])
    terms = Terms(
        {"a": value, "b": value[:1]}, {"a": task, "b": task[:1]}, {"a": task, "b": task[:1]}
    )
    assert count_pairs(terms, 3).tolist() == [1, 0, 2]
    assert task_means(terms, 3).tolist() == [2, 0, 3]
    batch = rows_of(0, 20)
    assert pairs_by_target(batch, 3).tolist() == np.bincount(batch.task, minlength=3).tolist()


def test_balance_over_micro_batches_needs_targets() -> None:
    with pytest.raises(ConfigError, match="needs batches with 'targets'"):
        pairs_by_target(object(), 3)


def test_an_objective_without_terms_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(steps=1, batch_size=4)
    trainer = Trainer(
        TinyModel(), loader_of(4), config, tmp_path, objective=lambda m, b: Terms({}, {}, {})
    )
    with pytest.raises(ConfigError, match="the steps up to 1 had no loss"):
        trainer.fit()


def test_clipping_equals_torchs_and_reports_the_norm_before() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(5, 3), torch.randn(7)]
    ours = [g.clone() for g in gradients]
    parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient / 4
    expected = torch.nn.utils.clip_grad_norm_(parameters, 0.3)
    norm = clip_(ours, torch.tensor(4.0), 0.3)
    torch.testing.assert_close(norm, expected)
    for mine, parameter in zip(ours, parameters):
        torch.testing.assert_close(mine, parameter.grad)


def test_averaged_weights_follow_the_recurrence_and_swap_back(model: TinyModel) -> None:
    ema = AveragedWeights(model, 0.5)
    expected = model.trunk[0].weight.detach().clone()
    for step in range(30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.trunk[0].weight.detach()
    live = model.trunk[0].weight.detach().clone()
    with ema.applied():
        torch.testing.assert_close(model.trunk[0].weight.detach(), expected)
    assert torch.equal(model.trunk[0].weight.detach(), live)
    ema.settle()
    torch.testing.assert_close(model.trunk[0].weight.detach(), expected)


def test_tied_weights_are_averaged_once() -> None:
    model = torch.nn.Module()
    model.a = torch.nn.Linear(2, 2)
    model.b = model.a
    ema = AveragedWeights(model, 0.9)
    assert set(ema.average) == {"a.weight", "a.bias"}


def test_bf16_keeps_fp32_weights_and_follows_fp32(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        model = train(tmp_path / precision, precision=precision, steps=100, lr=5e-2)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        lines = [x for x in read_lines(tmp_path / precision / "metrics.jsonl") if "loss" in x]
        losses[precision] = lines[-1]["loss"]
        assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1)
    assert losses["bf16"] != losses["fp32"]


def test_gradient_checkpointing_asks_the_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="TinyModel has neither a method"):
        train(tmp_path, gradient_checkpointing=True)
