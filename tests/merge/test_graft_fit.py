"""Learning a mask: the gradient against finite differences, the step against a slow reference."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from polytask import rng
from polytask.errors import CheckpointError, MergeError, NonFiniteError
from polytask.merge.graft import Graft, parameter_names
from polytask.merge.graft_fit import (
    FittedMask,
    MaskConfig,
    MaskStep,
    fit_mask,
    gamma_gradient,
    score_gradient,
    with_state,
)


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def moved(model: nn.Module, size: float = 0.5, seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    made = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += size * torch.randn_like(parameter)
    return made


def rows(count: int = 24, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(2)
    x = torch.randn(count, 4, dtype=dtype)
    y = torch.randint(0, 3, (count,))
    return list(zip(x.split(8), y.split(8), strict=True))


def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def score(model: Any) -> float:
    return -float(torch.stack([loss(model, batch) for batch in rows()]).mean())


def graft_of(model: nn.Module, count: int = 10, **options: Any) -> Graft:
    return Graft.between(model.state_dict(), moved(model).state_dict(), count=count, **options)


# -- the gradient


def test_the_gradient_of_s_equals_finite_differences() -> None:
    model = net()
    graft = graft_of(model)
    torch.manual_seed(3)
    scores = 10 + 3 * torch.randn(graft.size, dtype=torch.float64)

    def value(at: Tensor) -> float:
        state = graft.state(graft.soft(at))
        with torch.no_grad():
            found = [with_state(model, state, loss, batch) for batch in rows()]
        return float(torch.stack(found).mean())

    gradient, mean = gamma_gradient(graft, model, loss, rows(), graft.soft(scores))
    slope = score_gradient(graft, scores, gradient)
    assert mean == pytest.approx(value(scores), rel=1e-12)
    assert int(graft.gamma_b.sum()) == 10  # both signs of 1 - 2 gamma_b are in it
    for i in range(graft.size):
        step = torch.zeros_like(scores)
        step[i] = 1e-5
        numeric = (value(scores + step) - value(scores - step)) / 2e-5
        assert float(slope[i]) == pytest.approx(numeric, rel=1e-5, abs=1e-10)


def test_the_step_equals_autograd_through_gamma() -> None:
    model = net()
    graft = graft_of(model)
    scores = torch.full((graft.size,), 8.0, dtype=torch.float64, requires_grad=True)
    total = torch.zeros((), dtype=torch.float64)
    for batch in rows():
        total = total + with_state(model, graft.state(graft.soft(scores)), loss, batch)
    (total / 3).backward()
    gradient, _ = gamma_gradient(graft, model, loss, rows(), graft.soft(scores.detach()))
    assert scores.grad is not None
    assert torch.allclose(score_gradient(graft, scores.detach(), gradient), scores.grad)


def test_only_so_many_batches_are_averaged() -> None:
    model = net()
    graft = graft_of(model)
    gamma = graft.soft(torch.zeros(graft.size))
    two, _ = gamma_gradient(graft, model, loss, rows()[:2], gamma)
    limited, _ = gamma_gradient(graft, model, loss, rows(), gamma, accumulate=2)
    assert torch.equal(two, limited)


# -- the published trainer, written once more from its description: tensor by tensor, in place


def reference(
    base: nn.Module, tuned: nn.Module, patch: list[Tensor], scores: list[Tensor], lr: float
) -> list[list[Tensor]]:
    work = copy.deepcopy(base)
    pre = [p.detach().clone() for p in base.parameters()]
    delta = [
        q.detach() - p.detach() for p, q in zip(base.parameters(), tuned.parameters(), strict=True)
    ]
    history = []
    for _ in range(4):
        with torch.no_grad():
            for p, o, d, g, s in zip(work.parameters(), pre, delta, patch, scores, strict=True):
                p.copy_(o + (g * (1 - torch.sigmoid(s - 10)) + (1 - g) * torch.sigmoid(s - 10)) * d)
        work.zero_grad()
        for batch in rows():
            (loss(work, batch) / 3).backward()
        for i, p in enumerate(work.parameters()):
            assert p.grad is not None
            sigmoid = torch.sigmoid(scores[i] - 10)
            step = (1 - 2 * patch[i]) * p.grad * delta[i] * sigmoid * (1 - sigmoid)
            scores[i] = scores[i] - lr * step
        history.append([s.clone() for s in scores])
    return history


def test_the_official_fit_equals_a_slow_reference() -> None:
    model = net()
    tuned = moved(model)
    graft = Graft.between(model.state_dict(), tuned.state_dict(), count=10, official=True)
    assert int(graft.gamma_b.sum()) == 9
    config = MaskConfig.official(steps=4, lr=3e5)
    seen: list[MaskStep] = []
    scores: list[float] = []

    def last_wins(_: Any) -> float:
        scores.append(float(len(scores)))
        return scores[-1]

    found = fit_mask(graft, model, loss, rows(), last_wins, config, say=seen.append)
    names = [n for n, _ in model.named_parameters()]
    generator = rng.torch_generator(0, "mask scores")
    start = torch.rand(graft.size, generator=generator, dtype=torch.float64)

    def split(vector: Tensor) -> list[Tensor]:
        at = graft.layout.starts
        return [vector[at[n] : at[n] + p.numel()].view_as(p) for n, p in model.named_parameters()]

    history = reference(
        model, tuned, split(graft.gamma_b.double()), [s.clone() for s in split(start)], 3e5
    )
    assert seen[0].score is None  # the base patch is not judged
    assert found.best == 4
    expected = torch.cat([history[-1][names.index(n)].reshape(-1) for n in graft.layout.shapes])
    assert torch.allclose(found.scores, expected, rtol=1e-9)
    assert seen[-1].added > 0
    # No limit: the set may outgrow what was asked for.
    bits = (graft.soft(found.scores) > 0.5).sum()
    assert found.count == int(bits)


# -- fitting


def test_a_fit_finds_the_coordinates_that_matter() -> None:
    """Of 20 inputs three carry the label; the others moved more and are noise."""
    torch.manual_seed(0)
    base = nn.Linear(20, 1, bias=False)
    with torch.no_grad():
        base.weight.zero_()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.weight[:] = 3.0  # moved most, mean nothing
        tuned.weight[:, :3] = 2.0
    x = torch.randn(256, 20)
    y = (x[:, :3].sum(1) > 0).float()

    def binary(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1])

    def accuracy(model: Any) -> float:
        return float(((model(x)[:, 0] > 0) == (y > 0)).float().mean())

    graft = Graft.between(base.state_dict(), tuned.state_dict(), count=3)
    assert not graft.gamma_b[:3].any()
    found = fit_mask(graft, base, binary, [(x, y)], accuracy, MaskConfig(steps=15))
    assert found.count <= 3
    assert int(found.mask[:3].sum()) >= 2
    assert max(s.score or 0 for s in found.trace) > (found.trace[0].score or 0) + 0.2


def test_the_first_step_has_the_asked_size_and_the_cap_holds() -> None:
    model = net()
    graft = graft_of(model, count=10)
    seen: list[MaskStep] = []
    config = MaskConfig(steps=6, step_size=2.0, cap=7.0)
    found = fit_mask(graft, model, loss, rows(), score, config, say=seen.append)
    gradient, _ = gamma_gradient(
        graft, model, loss, rows(), graft.soft(torch.zeros_like(graft.delta))
    )
    slope = score_gradient(graft, torch.zeros_like(graft.delta), gradient).abs()
    assert int((found.lr * slope >= 2.0 * (1 - 1e-9)).sum()) == 10
    assert 2.0 <= seen[1].moved <= 7.0
    assert all(step.moved <= 7.0 for step in seen)
    assert all(step.count <= 10 for step in seen)


def test_without_a_cap_a_coordinate_saturates() -> None:
    model = net()
    seen: list[MaskStep] = []
    config = MaskConfig(steps=6, step_size=8.0, cap=None)
    fit_mask(graft_of(model), model, loss, rows(), score, config, say=seen.append)
    assert max(step.moved for step in seen) > 100


def test_bits_beyond_the_limit_are_switched_off_again() -> None:
    """So that the next gradient is taken where the mask that is judged stands."""
    model = net()
    graft = graft_of(model, count=6, patch=0.5)
    assert int(graft.gamma_b.sum()) == 3
    seen: list[MaskStep] = []
    config = MaskConfig(steps=8, step_size=6.0)
    found = fit_mask(graft, model, loss, rows(), score, config, say=seen.append)
    assert seen[0].count == 6  # those that moved most are the first candidate
    assert max(step.count for step in seen[1:]) == 6  # grown to the limit, not beyond
    assert int(graft.hard(found.scores).sum()) <= 6
    free = fit_mask(graft, model, loss, rows(), score, config.model_copy(update={"limit": False}))
    assert max(step.count for step in free.trace) > 6


def test_the_best_step_is_kept_and_the_base_patch_is_a_candidate() -> None:
    model = net()
    graft = graft_of(model)
    given = iter([5.0, 4.0, 9.0, 9.0, 1.0])
    found = fit_mask(
        graft, model, loss, rows(), lambda _: next(given), MaskConfig(steps=4, step_size=8.0)
    )
    assert found.best == 2
    given = iter([5.0, 4.0, 3.0, 5.0, 1.0])
    found = fit_mask(
        graft, model, loss, rows(), lambda _: next(given), MaskConfig(steps=4, step_size=8.0)
    )
    assert found.best == 0
    assert torch.equal(found.mask, graft.gamma_b)


def test_the_model_and_its_mode_are_left_alone_and_dropout_is_off() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    graft = Graft.between(
        model.state_dict(),
        moved(model).state_dict(),
        count=10,
        parameters=parameter_names(model),
    )
    model.train()
    data = rows(dtype=torch.float32)
    config = MaskConfig(steps=2, step_size=9.0)
    runs = [fit_mask(graft, model, loss, data, lambda _: 0.0, config) for _ in range(2)]
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert runs[0].trace == runs[1].trace
    assert runs[0].trace[1].loss is not None


def test_an_interrupted_fit_goes_on_bit_by_bit(tmp_path: Path) -> None:
    model = net(dtype=torch.float32)
    graft = graft_of(model)
    data = rows(dtype=torch.float32)

    def metric(m: Any) -> float:
        return -float(torch.stack([loss(m, b) for b in data]).mean())

    def shuffled(step: int) -> list[tuple[Tensor, Tensor]]:
        return data[step % 3 :] + data[: step % 3]

    config = MaskConfig(steps=6, step_size=6.0)
    whole = fit_mask(graft, model, loss, shuffled, metric, config)
    path = tmp_path / "fit.safetensors"

    class Killed(Exception):
        pass

    def kill(step: MaskStep) -> None:
        if step.step == 3:
            raise Killed

    with pytest.raises(Killed):
        fit_mask(graft, model, loss, shuffled, metric, config, checkpoint=path, say=kill)
    seen: list[int] = []
    resumed = fit_mask(
        graft,
        model,
        loss,
        shuffled,
        metric,
        config,
        checkpoint=path,
        say=lambda s: seen.append(s.step),
    )
    assert seen == [4, 5, 6]
    _same(whole, resumed)
    _same(whole, fit_mask(graft, model, loss, shuffled, metric, config, checkpoint=path))
    with pytest.raises(CheckpointError, match="another fit"):
        other = config.model_copy(update={"step_size": 5.0})
        fit_mask(graft, model, loss, shuffled, metric, other, checkpoint=path)
    with pytest.raises(CheckpointError, match="holds 6 steps"):
        fewer = config.model_copy(update={"steps": 5})
        fit_mask(graft, model, loss, shuffled, metric, fewer, checkpoint=path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="no checkpoint of a fit"):
        fit_mask(graft, model, loss, shuffled, metric, config, checkpoint=path)


def _same(one: FittedMask, other: FittedMask) -> None:
    assert one.trace == other.trace
    assert one.best == other.best
    assert one.lr == other.lr
    assert torch.equal(one.scores, other.scores)
    assert torch.equal(one.mask, other.mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_fitted_in_float32(dtype: torch.dtype) -> None:
    model = net(dtype=dtype)
    graft = graft_of(model)
    data = rows(dtype=torch.float32)
    found = fit_mask(graft, model, loss, data, lambda _: 0.0, MaskConfig(steps=2, step_size=9.0))
    assert math.isfinite(found.trace[-1].loss or math.nan)
    assert next(model.parameters()).dtype == dtype


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 5)
        self.out = nn.Linear(5, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        made: Tensor = self.out(self.embed(ids))
        return made


def test_tied_weights_are_one_and_get_the_gradient_of_both_uses() -> None:
    model, tuned = Tied().double(), Tied().double()
    with torch.no_grad():
        tuned.embed.weight += 1
    base, after = model.state_dict(), tuned.state_dict()
    graft = Graft.between(base, after, count=5, parameters=parameter_names(model))
    assert graft.size == 35
    batch = (torch.tensor([0, 3, 6]), torch.tensor([1, 0, 2]))
    gradient, _ = gamma_gradient(graft, model, loss, [batch], torch.ones_like(graft.delta))
    loss(tuned, batch).backward()
    assert tuned.embed.weight.grad is not None
    assert torch.allclose(gradient, tuned.embed.weight.grad.reshape(-1))


# -- mistakes


def test_a_tiny_step_is_an_error_not_the_base_patch() -> None:
    model = net()
    with pytest.raises(MergeError, match="no bit of the mask moved in 3 steps"):
        fit_mask(graft_of(model), model, loss, rows(), score, MaskConfig(steps=3, lr=1e-3))


def test_mistakes_are_named() -> None:
    model = net()
    graft = graft_of(model)
    config = MaskConfig(steps=2, step_size=9.0)
    with pytest.raises(MergeError, match="not an iterator"):
        fit_mask(graft, model, loss, iter(rows()), score, config)
    with pytest.raises(MergeError, match=r"got shape \(8,\)"):
        fit_mask(graft, model, lambda m, b: m(b[0]).sum(1), rows(), score, config)
    with pytest.raises(MergeError, match="under no_grad"):
        fit_mask(graft, model, lambda m, b: m(b[0]).sum().detach(), rows(), score, config)
    with pytest.raises(MergeError, match="does it use the tensors"):
        fit_mask(graft, model, lambda m, b: 0 * m(b[0]).sum(), rows(), score, config)
    with pytest.raises(NonFiniteError, match="loss of batch 0 is nan"):
        fit_mask(graft, model, lambda m, b: m(b[0]).sum() * math.nan, rows(), score, config)
    with pytest.raises(NonFiniteError, match="score on validation rows"):
        fit_mask(graft, model, loss, rows(), lambda _: math.nan, config)
    with pytest.raises(MergeError, match=r"'0.weight' of the model has shape"):
        fit_mask(
            graft,
            nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)),
            loss,
            rows(),
            score,
            config,
        )
    with pytest.raises(MergeError, match=r"'0.bias' is no parameter"):
        fit_mask(
            graft,
            nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)),
            loss,
            rows(),
            score,
            config,
        )
