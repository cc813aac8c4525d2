"""Alignment of gradients against known geometry; routing tables, distances and trees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from adapt_models import TASKS, perceptron, stir
from torch import nn

from polytask.adapt import AdaptConfig, attach
from polytask.adapt.diagnose import Routing, gradient_alignment, routing_of, shared_parameters
from polytask.errors import AdaptError


def test_alignment_is_the_cosine_of_gradients() -> None:
    w = nn.Parameter(torch.zeros(2))
    directions = {
        "east": torch.tensor([1.0, 0.0]),
        "north-east": torch.tensor([2.0, 2.0]),
        "west": torch.tensor([-3.0, 0.0]),
    }
    found = gradient_alignment(lambda task: (w * directions[task]).sum(), tuple(directions), [w])
    half = math.sqrt(0.5)
    wanted = np.array([[1, half, -1], [half, 1, -half], [-1, -half, 1]])
    np.testing.assert_allclose(found.cosine, wanted, atol=1e-6)
    assert found.mean == pytest.approx((half - 1 - half) / 3)


def test_a_task_without_gradient_is_left_out_of_the_mean() -> None:
    w, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    losses = {"a": lambda: w.sum(), "b": lambda: w[0] + w[1], "none": lambda: other.sum()}
    found = gradient_alignment(lambda task: losses[task](), tuple(losses), [w])
    assert math.isnan(found.cosine[0, 2]) and found.mean == pytest.approx(1.0)
    with pytest.raises(AdaptError, match="parameters that train"):
        gradient_alignment(lambda task: w.sum(), ("a",), [])


def test_routing_is_what_rows_get_in_evaluation() -> None:
    model = perceptron()
    adapters = attach(model, AdaptConfig(heads=4), TASKS)
    stir(adapters)
    found = routing_of(adapters)
    assert tuple(found.weight) == ("0", "2") and found.tasks == TASKS
    for name, layer in adapters.routed().items():
        w = layer.table.eval()(torch.arange(3)).detach().double().numpy()
        np.testing.assert_allclose(found.weight[name], w)
    again = Routing.of(found.to_dict())
    np.testing.assert_allclose(again.flat(), found.flat(), atol=1e-5)
    assert len(shared_parameters(adapters)) == 4


def test_tasks_that_route_alike_join_first() -> None:
    weight = {"layer": np.array([[[0.9, 0.1]], [[0.1, 0.9]], [[0.85, 0.15]]])}
    routing = Routing(("a", "b", "c"), weight)
    distance = routing.distance()
    assert distance[0, 2] == pytest.approx(0.05) and distance[0, 1] == pytest.approx(0.8)
    tree = routing.linkage()
    assert set(tree[0, :2].astype(int)) == {0, 2}
    assert tree[1, 2] == pytest.approx((0.8 + 0.75) / 2)  # average linkage
    with pytest.raises(AdaptError, match="two tasks"):
        Routing(("a",), {"layer": weight["layer"][:1]}).linkage()


def test_adapters_without_routing_say_so() -> None:
    adapters = attach(perceptron(), AdaptConfig(method="lora"), ("a",))
    with pytest.raises(AdaptError, match="'lora' adapters have no routing"):
        routing_of(adapters)
