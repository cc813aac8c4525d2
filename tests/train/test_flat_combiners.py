"""The combiners that FlatMTL is used with, by name, against their formulas written out slowly."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from polytask.train.aggregation import combiner
from polytask.train.flat import FlatMTL


def gradients(tasks: int, seed: int, params: int = 12) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(params, generator=random)
    return torch.randn(tasks, params, generator=random) + 0.3 * common


def on_simplex(objective, tasks: int) -> np.ndarray:
    """Minimise by SLSQP from several starts."""
    starts = [np.full(tasks, 1 / tasks), *np.eye(tasks)]
    found = [
        minimize(
            objective,
            start,
            bounds=[(0, 1)] * tasks,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        for start in starts
    ]
    return min(found, key=lambda f: f.fun).x


@pytest.mark.parametrize("seed", range(5))
def test_pcgrad_of_two_tasks_projects_each_on_the_others_original(seed: int) -> None:
    g = gradients(2, seed)
    g[1] -= 1.5 * g[0]  # in conflict
    assert g[0] @ g[1] < 0
    first = g[0] - (g[0] @ g[1]) / (g[1] @ g[1]) * g[1]
    second = g[1] - (g[1] @ g[0]) / (g[0] @ g[0]) * g[0]
    torch.testing.assert_close(combiner("pcgrad")(g), first + second, rtol=1e-4, atol=1e-5)


def pcgrad_row(g: Tensor, i: int, order: Sequence[int]) -> Tensor:
    row = g[i].clone()
    for j in order:
        if row @ g[j] < 0:
            row -= row @ g[j] / (g[j] @ g[j]) * g[j]
    return row


def test_pcgrad_of_three_tasks_never_projects_a_gradient_on_itself() -> None:
    """For some order of the others; projecting on j = i too, as released code does, differs."""
    g = torch.tensor([[0.0, 3.0, 2.0], [0.0, -2.0, -3.0], [-1.0, 1.0, 2.0]])
    skipping, including = [], []
    for choice in itertools.product((0, 1), repeat=3):
        others = [[j for j in range(3) if j != i][:: 1 - 2 * flip] for i, flip in enumerate(choice)]
        skipping.append(torch.stack([pcgrad_row(g, i, o) for i, o in enumerate(others)]).sum(0))
        last = [[*o, i] for i, o in enumerate(others)]
        including.append(torch.stack([pcgrad_row(g, i, o) for i, o in enumerate(last)]).sum(0))
    found = combiner("pcgrad")(g)
    assert any(torch.allclose(found, sum_, atol=1e-5) for sum_ in skipping)
    assert not any(torch.allclose(found, sum_, atol=1e-5) for sum_ in including)


@pytest.mark.parametrize("tasks", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_cagrad_is_the_average_plus_a_step_towards_the_worst_mixture(tasks: int, seed: int) -> None:
    g = gradients(tasks, seed).double()
    c, g0 = 0.4, g.mean(0)

    def dual(w: np.ndarray) -> float:
        gw = torch.from_numpy(w) @ g
        return float(gw @ g0 + c * g0.norm() * gw.norm())

    gw = torch.from_numpy(on_simplex(dual, tasks)) @ g
    expected = g0 + c * g0.norm() / gw.norm() * gw
    torch.testing.assert_close(combiner("cagrad", c=c)(g), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("seed", range(3))
def test_mgda_is_the_shortest_vector_of_the_hull(seed: int) -> None:
    g = gradients(3, seed).double()
    w = on_simplex(lambda w: float((torch.from_numpy(w) @ g).norm() ** 2), 3)
    found = combiner("mgda")(g)
    assert float(found.norm()) == pytest.approx(float((torch.from_numpy(w) @ g).norm()), rel=5e-3)


@pytest.mark.parametrize("seed", range(3))
def test_imtl_g_has_equal_projections_by_the_closed_form(seed: int) -> None:
    g = gradients(3, seed).double()
    unit = g / g.norm(dim=1, keepdim=True)
    difference, turn = g[0] - g[1:], unit[0] - unit[1:]
    rest = g[0] @ turn.T @ torch.linalg.inv(difference @ turn.T)
    weights = torch.cat([1 - rest.sum()[None], rest])
    found = combiner("imtl_g")(g)
    torch.testing.assert_close(found, weights @ g, rtol=1e-3, atol=1e-3)
    projections = unit @ found
    torch.testing.assert_close(projections, projections[0].expand(3), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("mean", 1.0), ("sum", 1.0), ("pcgrad", 1.0), ("mgda", 1.0), ("cagrad", 1.4)],
)
def test_one_task_gives_its_sam_gradient_times_the_rules_own_factor(
    name: str, factor: float
) -> None:
    torch.manual_seed(0)
    trunk, head = nn.Linear(4, 3), nn.Linear(3, 1)
    x = torch.randn(16, 4)
    report = FlatMTL(name, rho=0.3).step(
        lambda: [head(torch.tanh(trunk(x))).square().mean()],
        trunk.parameters(),
        [head.parameters()],
    )
    found = torch.cat([p.grad.reshape(-1) for p in trunk.parameters()])
    torch.testing.assert_close(found, factor * report.sam_gradients[0], rtol=1e-4, atol=1e-6)
