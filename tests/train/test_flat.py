"""FlatMTL against closed forms and slow references, and the traps a careless version falls in."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polytask.errors import ConfigError, NonFiniteError
from polytask.train.aggregation import GradientCombiner
from polytask.train.flat import FlatMTL
from polytask.train.sharpness import GradConflictMeter, SharpnessMeter


def mean(matrix: Tensor) -> Tensor:
    return matrix.mean(0)


def total(matrix: Tensor) -> Tensor:
    return matrix.sum(0)


def pcgrad_reference(matrix: Tensor) -> Tensor:
    """PCGrad as its paper writes it, j = i left out, rows in order."""
    rows = [row.clone() for row in matrix]
    for i, row in enumerate(rows):
        for j in range(len(rows)):
            if j != i and (dot := row @ matrix[j]) < 0:
                row -= dot / matrix[j].dot(matrix[j]) * matrix[j]
    return torch.stack(rows).sum(0)


class Quadratics(nn.Module):
    """L_t = 1/2 v' A_t v over (shared, head_t): everything has a closed form."""

    def __init__(self, tasks: int = 2, shared: int = 5, head: int = 3, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        draw = lambda *size: torch.randn(*size, generator=random, dtype=torch.float64)
        self.shared = nn.Parameter(draw(shared))
        self.heads = nn.ParameterList([nn.Parameter(draw(head)) for _ in range(tasks)])
        roots = [draw(shared + head, shared + head) for _ in range(tasks)]
        self.curvature = [root @ root.T for root in roots]

    def own(self, task: int) -> Tensor:
        return torch.cat([self.shared, self.heads[task]])

    def loss(self, task: int) -> Tensor:
        v = self.own(task)
        return 0.5 * v @ self.curvature[task] @ v

    def losses(self) -> list[Tensor]:
        return [self.loss(t) for t in range(len(self.heads))]

    def step(self, flat: FlatMTL):
        return flat.step(self.losses, [self.shared], [[head] for head in self.heads], self)


@pytest.mark.parametrize("tasks", [1, 2, 4])
def test_on_quadratics_the_flat_part_is_rho_A_g_over_norm_g(tasks: int) -> None:
    problem = Quadratics(tasks)
    report = problem.step(FlatMTL(mean, rho=0.3))
    size = problem.shared.numel()
    for t in range(tasks):
        curvature, v = problem.curvature[t], problem.own(t).detach()
        g = curvature @ v
        h = 0.3 * curvature @ g / g.norm()
        torch.testing.assert_close(report.flat_gradients[t], h[:size], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(problem.heads[t].grad, (g + h)[size:], rtol=1e-9, atol=1e-9)
        rise = 0.3 * g.norm() + 0.5 * 0.09 * g @ curvature @ g / (g @ g)
        torch.testing.assert_close(report.sharpness[t], rise, rtol=1e-9, atol=1e-9)


def test_the_update_combines_the_two_parts_separately() -> None:
    problem = Quadratics(3, seed=4)
    report = problem.step(FlatMTL(pcgrad_reference, rho=0.5))
    expected = pcgrad_reference(report.gradients) + pcgrad_reference(report.flat_gradients)
    torch.testing.assert_close(problem.shared.grad, expected)
    assert not torch.allclose(expected, pcgrad_reference(report.sam_gradients))


def test_the_direct_variant_combines_the_sam_gradients() -> None:
    problem = Quadratics(3, seed=4)
    report = problem.step(FlatMTL(pcgrad_reference, rho=0.5, aggregation="direct"))
    torch.testing.assert_close(problem.shared.grad, pcgrad_reference(report.sam_gradients))


def test_split_norm_perturbs_trunk_and_head_each_with_radius_rho() -> None:
    problem = Quadratics(2)
    report = problem.step(FlatMTL(mean, rho=0.3, norm="split"))
    size = problem.shared.numel()
    for t in range(2):
        curvature, v = problem.curvature[t], problem.own(t).detach()
        g = curvature @ v
        eps = 0.3 * torch.cat([g[:size] / g[:size].norm(), g[size:] / g[size:].norm()])
        torch.testing.assert_close(report.sam_gradients[t], (g + curvature @ eps)[:size])


def test_adaptive_perturbs_by_the_asam_formula() -> None:
    problem = Quadratics(2)
    report = problem.step(FlatMTL(mean, rho=2.0, adaptive=True))
    for t in range(2):
        curvature, v = problem.curvature[t], problem.own(t).detach()
        g = curvature @ v
        eps = 2.0 * v**2 * g / (v.abs() * g).norm()
        torch.testing.assert_close(report.sam_gradients[t], (g + curvature @ eps)[:5])


def test_summed_ascent_with_a_sum_is_sam_on_the_summed_loss() -> None:
    problem = Quadratics(3)
    heads = [head.detach() for head in problem.heads]
    v = torch.cat([problem.shared.detach(), *heads]).requires_grad_()

    def summed(v: Tensor) -> Tensor:
        parts = [torch.cat([v[:5], v[5 + 3 * t : 8 + 3 * t]]) for t in range(3)]
        return sum(0.5 * p @ a @ p for p, a in zip(parts, problem.curvature, strict=True))

    [g] = torch.autograd.grad(summed(v), v)
    moved = (v + 0.4 * g / g.norm()).detach().requires_grad_()
    [expected] = torch.autograd.grad(summed(moved), moved)
    for aggregation in ("direct", "split"):
        problem.zero_grad()
        report = problem.step(
            FlatMTL(total, rho=0.4, ascent="summed", aggregation=aggregation)  # type: ignore[arg-type]
        )
        found = torch.cat([problem.shared.grad, *(head.grad for head in problem.heads)])
        torch.testing.assert_close(found, expected)
    assert report.forwards == 2


@pytest.mark.parametrize("combiner", [mean, total, pcgrad_reference])
def test_with_one_task_the_update_is_the_sam_gradient(combiner: Callable[[Tensor], Tensor]) -> None:
    problem = Quadratics(1)
    report = problem.step(FlatMTL(combiner, rho=0.3))
    torch.testing.assert_close(problem.shared.grad, report.sam_gradients[0], rtol=1e-14, atol=0)


def test_zero_rho_gives_the_plain_combiner_exactly() -> None:
    problem = Quadratics(3, seed=2)
    report = problem.step(FlatMTL(pcgrad_reference, rho=0.0))
    assert torch.equal(report.flat_gradients, torch.zeros_like(report.gradients))
    assert torch.equal(problem.shared.grad, pcgrad_reference(report.gradients))
    assert (report.forwards, report.backwards) == (1, 3)


def test_a_converged_task_is_not_perturbed_and_gives_no_nan() -> None:
    problem = Quadratics(2)
    with torch.no_grad():
        problem.shared.zero_()
        problem.heads[0].zero_()
    report = problem.step(FlatMTL(mean, rho=0.1))
    assert torch.equal(report.flat_gradients[0], torch.zeros(5, dtype=torch.float64))
    assert torch.isfinite(problem.shared.grad).all()
    assert float(report.sharpness[0]) == 0.0


def test_an_absent_task_takes_part_in_neither_call_of_the_combiner() -> None:
    problem = Quadratics(3)
    seen = []

    def spy(matrix: Tensor) -> Tensor:
        seen.append(matrix.shape[0])
        return matrix.mean(0)

    losses = lambda: [problem.loss(0), None, problem.loss(2)]
    report = FlatMTL(spy).step(losses, [problem.shared], [[h] for h in problem.heads])
    assert seen == [2, 2]
    assert report.tasks == (0, 2)
    assert problem.heads[1].grad is None
    reference = Quadratics(3)
    closures = [lambda: reference.loss(0), lambda: None, lambda: reference.loss(2)]
    FlatMTL(mean).step(closures, [reference.shared], [[h] for h in reference.heads])
    torch.testing.assert_close(problem.shared.grad, reference.shared.grad)


def test_no_task_at_all_is_an_error() -> None:
    problem = Quadratics(2)
    with pytest.raises(ValueError, match="no task has a loss"):
        FlatMTL(mean).step(lambda: [None, None], [problem.shared], [[], []])


class Net(nn.Module):
    """A small trunk with dropout and batch normalisation, two heads."""

    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout)
        )
        self.heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
        self.inputs: list[Tensor] = []

    def losses(self, x: Tensor, y: Tensor) -> list[Tensor]:
        features = self.trunk(x)
        self.inputs.append(features.detach() != 0)
        return [
            nn.functional.cross_entropy(head(features), y[:, t])
            for t, head in enumerate(self.heads)
        ]

    def step(self, flat: FlatMTL, x: Tensor, y: Tensor):
        heads = [list(head.parameters()) for head in self.heads]
        return flat.step(lambda: self.losses(x, y), self.trunk.parameters(), heads, self)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(32, 6), torch.randint(0, 3, (32, 2))


def test_weights_are_bit_identical_after_the_step(batch: tuple[Tensor, Tensor]) -> None:
    net = Net()
    before = [p.detach().clone() for p in net.parameters()]
    net.step(FlatMTL(mean, rho=7.3), *batch)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


def test_dropout_draws_the_same_mask_in_every_pass(batch: tuple[Tensor, Tensor]) -> None:
    net = Net()
    net.step(FlatMTL(mean, rho=0.1), *batch)
    first, *others = net.inputs
    assert len(others) == 2
    assert all(torch.equal(first, other) for other in others)
    assert not first.all()


def test_random_numbers_go_on_as_after_one_plain_forward(batch: tuple[Tensor, Tensor]) -> None:
    net = Net()
    torch.manual_seed(3)
    net.step(FlatMTL(mean, rho=0.1), *batch)
    after_step = torch.rand(4)
    torch.manual_seed(3)
    net.losses(*batch)
    assert torch.equal(torch.rand(4), after_step)


def test_batch_norm_statistics_are_updated_once(batch: tuple[Tensor, Tensor]) -> None:
    net = Net()
    twin = copy.deepcopy(net)
    net.step(FlatMTL(mean, rho=0.1), *batch)
    twin.losses(*batch)
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, dict(twin.named_buffers())[name]), name
    assert int(net.trunk[1].num_batches_tracked) == 1


def test_one_closure_for_all_tasks_equals_one_closure_each(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    joint, apart = Net(0.0), Net(0.0)
    apart.load_state_dict(joint.state_dict())
    report = joint.step(FlatMTL(pcgrad_reference, rho=0.2), x, y)
    closures = [lambda t=t: apart.losses(x, y)[t] for t in range(2)]
    heads = [list(head.parameters()) for head in apart.heads]
    other = FlatMTL(pcgrad_reference, rho=0.2).step(
        closures, apart.trunk.parameters(), heads, apart
    )
    assert (report.forwards, report.backwards) == (3, 4)
    assert (other.forwards, other.backwards) == (4, 4)
    for p, q in zip(joint.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_gradients_are_added_as_backward_does(batch: tuple[Tensor, Tensor]) -> None:
    net = Net(0.0)
    net.step(FlatMTL(mean, rho=0.1), *batch)
    once = [p.grad.clone() for p in net.parameters()]
    net.step(FlatMTL(mean, rho=0.1), *batch)
    for p, g in zip(net.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


def test_a_stacked_head_serves_several_tasks() -> None:
    torch.manual_seed(0)
    trunk = nn.Linear(4, 5)
    stacked = nn.Parameter(torch.randn(2, 5))
    apart = [nn.Parameter(stacked[t].detach().clone()) for t in range(2)]
    x = torch.randn(8, 4)

    def together() -> list[Tensor]:
        out = trunk(x) @ stacked.T
        return [(out[:, t] ** 2).mean() for t in range(2)]

    def separately() -> list[Tensor]:
        return [((trunk(x) @ head) ** 2).mean() for head in apart]

    FlatMTL(mean, rho=0.2).step(together, trunk.parameters(), [[stacked], [stacked]])
    shared = [p.grad.clone() for p in trunk.parameters()]
    trunk.zero_grad()
    FlatMTL(mean, rho=0.2).step(separately, trunk.parameters(), [[head] for head in apart])
    torch.testing.assert_close(stacked.grad, torch.stack([head.grad for head in apart]))
    for p, g in zip(trunk.parameters(), shared, strict=True):
        torch.testing.assert_close(p.grad, g)


def test_frozen_and_unreached_parameters_are_left_alone(batch: tuple[Tensor, Tensor]) -> None:
    """LoRA: the base is frozen, only the low-rank factors are perturbed and trained."""
    x, y = batch
    base = nn.Linear(6, 8).requires_grad_(False)
    down, up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(8, 2) * 0.1)
    unused = nn.Parameter(torch.ones(3))
    heads = nn.ModuleList([nn.Linear(8, 3), nn.Linear(8, 3)])
    touched: list[bool] = []
    frozen = base.weight.clone()

    def losses() -> list[Tensor]:
        touched.append(not torch.equal(base.weight, frozen))
        features = torch.tanh(base(x) + x @ down.T @ up.T)
        return [nn.functional.cross_entropy(h(features), y[:, t]) for t, h in enumerate(heads)]

    shared = [*base.parameters(), down, up, unused]
    before = down.detach().clone()
    FlatMTL(mean, rho=0.5).step(losses, shared, [list(h.parameters()) for h in heads])
    assert touched == [False, False, False]
    assert base.weight.grad is None
    assert unused.grad is None  # as after backward: an optimiser skips it
    assert down.grad is not None
    assert torch.equal(down, before)


def test_under_bf16_autocast_the_fp32_weights_are_perturbed(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    net = Net(0.0)
    plain = [p.detach().clone() for p in net.trunk.parameters()]
    moves: list[Tensor] = []

    def losses() -> list[Tensor]:
        moves.append(
            torch.cat([(p - q).reshape(-1) for p, q in zip(net.trunk.parameters(), plain)])
        )
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return [loss.float() for loss in net.losses(x, y)]

    heads = [list(head.parameters()) for head in net.heads]
    report = FlatMTL(mean, rho=1e-4).step(losses, net.trunk.parameters(), heads, net)
    assert report.gradients.dtype == torch.float32
    for move in moves[1:]:
        assert 0 < float(move.detach().norm()) <= 1.001e-4  # far below bf16's resolution


def test_half_precision_weights_are_refused() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match=r"bfloat16.*autocast"):
        FlatMTL(mean).step(lambda: [weight.sum()], [weight], [[]])


def test_a_rule_is_two_objects_so_that_their_memories_do_not_mix() -> None:
    for flat in (FlatMTL("gradvac"), FlatMTL(GradientCombiner("gradvac", {"beta": 0.3}))):
        problem = Quadratics(2)
        problem.step(flat)
        assert flat.combine is not flat.combine_flat
        assert flat.combine.options == flat.combine_flat.options
        assert flat.combine.state() != flat.combine_flat.state()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rho": -0.1}, "rho = -0.1"),
        ({"rho": float("nan")}, "rho = nan"),
        ({"norm": "each"}, "norm = 'each'"),
        ({"ascent": "joint"}, "ascent = 'joint'"),
        ({"aggregation": "both"}, "aggregation = 'both'"),
        ({"combiner": "pcgrd"}, "pcgrad"),
    ],
)
def test_impossible_settings_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FlatMTL(**{"combiner": mean, **change})  # type: ignore[arg-type]


def test_no_shared_parameter_is_an_error() -> None:
    head = nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match="no shared parameter"):
        FlatMTL(mean).step(lambda: [head.sum()], [], [[head]])


def test_a_parameter_cannot_be_shared_and_a_heads_own() -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match="both as shared"):
        FlatMTL(mean).step(lambda: [weight.sum()], [weight], [[weight]])


@pytest.mark.parametrize("when", ["first", "second"])
def test_a_nan_loss_names_the_task_and_writes_nothing(when: str) -> None:
    problem = Quadratics(2)
    before = [p.detach().clone() for p in problem.parameters()]
    calls = itertools.count()

    def losses() -> list[Tensor]:
        bad = (when == "first") == (next(calls) == 0)
        return [problem.loss(0), problem.loss(1) * (float("nan") if bad else 1.0)]

    flat = FlatMTL(mean, names=("left", "right"))
    with pytest.raises(NonFiniteError, match="'right'"):
        flat.step(losses, [problem.shared], [[h] for h in problem.heads])
    assert all(p.grad is None for p in problem.parameters())
    assert all(torch.equal(p, q) for p, q in zip(problem.parameters(), before, strict=True))


def test_sharpness_meter_measures_the_quadratics_rise_and_changes_nothing() -> None:
    problem = Quadratics(3)
    before = [p.detach().clone() for p in problem.parameters()]
    state = torch.get_rng_state()
    meter = SharpnessMeter(rhos=(0.0, 0.1, 0.5))
    found = meter.measure(problem.losses, [problem.shared], [[h] for h in problem.heads])
    for t in range(3):
        curvature, v = problem.curvature[t], problem.own(t).detach()
        g = curvature @ v
        for column, rho in enumerate(meter.rhos):
            rise = rho * g.norm() + 0.5 * rho**2 * g @ curvature @ g / (g @ g)
            assert float(found.rise[t, column]) == pytest.approx(float(rise), rel=1e-6)
            h = rho * (curvature @ g / g.norm())[:5]
            assert float(found.flat_norm[t, column]) == pytest.approx(float(h.norm()), rel=1e-6)
        assert float(found.gradient_norm[t]) == pytest.approx(float(g.norm()), rel=1e-6)
    assert all(torch.equal(p, q) for p, q in zip(problem.parameters(), before, strict=True))
    assert all(p.grad is None for p in problem.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_sharpness_meter_leaves_batch_norm_and_random_numbers_alone(
    batch: tuple[Tensor, Tensor],
) -> None:
    net = Net()
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    state = torch.get_rng_state()
    heads = [list(head.parameters()) for head in net.heads]
    SharpnessMeter().measure(lambda: net.losses(*batch), net.trunk.parameters(), heads, net)
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())
    assert torch.equal(torch.get_rng_state(), state)


def test_conflict_meter_averages_cosines_over_the_steps_where_both_tasks_were_there() -> None:
    problem = Quadratics(3)
    meter = GradConflictMeter(3)
    heads = [[h] for h in problem.heads]
    first = FlatMTL(mean).step(problem.losses, [problem.shared], heads)
    meter.update(first)
    partly = lambda: [problem.loss(0), problem.loss(1), None]
    meter.update(FlatMTL(mean).step(partly, [problem.shared], heads))
    unit = first.gradients / first.gradients.norm(dim=1, keepdim=True)
    np.testing.assert_allclose(meter.mean("loss"), (unit @ unit.T).numpy(), rtol=1e-9)
    assert meter.values("loss").shape == (4,)  # 3 pairs, then 1
    assert set(meter.history) == {"loss", "flat", "sam"}
