"""Fisher information and Gram matrices against closed forms and slow loops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from polytask.errors import MergeError, NonFiniteError
from polytask.merge.method import merge_state_dicts
from polytask.merge.statistics import fisher_diagonal, gram_matrices, write_statistics


def softmax_regression(state: Any, x: Tensor) -> Tensor:
    found: Tensor = x @ state["weight"].T + state["bias"]
    return found


def state_of(classes: int = 3, width: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "weight": torch.randn(classes, width, dtype=torch.float64),
        "bias": torch.randn(classes, dtype=torch.float64),
    }


def test_the_fisher_of_softmax_regression_has_its_closed_form() -> None:
    state, x = state_of(), torch.randn(7, 4, dtype=torch.float64)
    found = fisher_diagonal(softmax_regression, state, [x[:5], x[5:]])
    p = torch.softmax(softmax_regression(state, x), -1)
    wanted = p * (1 - p)  # the diagonal of diag(p) - p p^T
    assert torch.allclose(found["bias"], wanted.mean(0).float(), rtol=1e-5)
    outer = (wanted[:, :, None] * x[:, None].square()).mean(0)
    assert torch.allclose(found["weight"], outer.float(), rtol=1e-5)


def test_the_empirical_fisher_is_the_mean_squared_slope_of_each_input() -> None:
    state, x = state_of(), torch.randn(6, 4, dtype=torch.float64)
    y = torch.tensor([0, 2, 1, 1, 0, 2])
    found = fisher_diagonal(
        softmax_regression, state, [((x[:4]), y[:4]), (x[4:], y[4:])], targets="labels", at_once=3
    )
    leaves = {k: v.clone().requires_grad_() for k, v in state.items()}
    total = {k: torch.zeros_like(v) for k, v in state.items()}
    for i in range(6):
        log_p = torch.log_softmax(softmax_regression(leaves, x[i : i + 1]), -1)[0, y[i]]
        for key, slope in zip(leaves, torch.autograd.grad(log_p, list(leaves.values()))):
            total[key] += slope.square() / 6
    for key in state:
        assert torch.allclose(found[key], total[key].float(), rtol=1e-5)


def test_drawn_classes_give_the_expected_fisher_on_average_and_the_same_again() -> None:
    state, x = state_of(), torch.randn(2, 4, dtype=torch.float64)
    many = [x] * 4000
    drawn = fisher_diagonal(softmax_regression, state, many, targets="sampled")
    exact = fisher_diagonal(softmax_regression, state, [x])
    assert torch.allclose(drawn["bias"], exact["bias"], atol=0.02)
    again = fisher_diagonal(softmax_regression, state, many[:3], targets="sampled", seed=1)
    other = fisher_diagonal(softmax_regression, state, many[:3], targets="sampled", seed=1)
    assert torch.equal(again["weight"], other["weight"])


def test_fisher_takes_tuples_and_mappings_and_any_module() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    state, x = dict(model.state_dict()), torch.randn(4, 3)

    def forward(tensors: Any, batch: Any) -> Tensor:
        rows = batch["x"] if isinstance(batch, dict) else batch[0]
        found: Tensor = functional_call(model, dict(tensors), (rows,))
        return found

    one = fisher_diagonal(forward, state, [(x,)])
    two = fisher_diagonal(forward, state, [{"x": x}], at_once=1)
    assert one.keys() == state.keys()
    for key in one:
        assert one[key].shape == state[key].shape
        assert torch.allclose(one[key], two[key], rtol=1e-4, atol=1e-9)


def test_gram_matrices_are_the_inputs_products() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).train()
    x = torch.randn(10, 3)
    found = gram_matrices(model, [x[:6], x[6:]])
    hidden = model[1](model[0](x)).detach()
    assert torch.allclose(found["0.weight"], x.T @ x, atol=1e-5)
    assert torch.allclose(found["2.weight"], hidden.T @ hidden, atol=1e-5)
    assert model.training
    assert not model[0]._forward_pre_hooks


def test_padding_does_not_count() -> None:
    model = nn.Linear(3, 2)
    x, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]).bool()
    found = gram_matrices(
        model, [(x, mask)], run=lambda m, b: m(b[0]), valid=lambda batch: batch[1]
    )
    rows = x[mask]
    assert torch.allclose(found["weight"], rows.T @ rows, atol=1e-5)


def test_layers_that_share_a_weight_add_up() -> None:
    first = nn.Linear(3, 3, bias=False)
    second = nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    x = torch.randn(5, 3)
    found = gram_matrices(nn.Sequential(first, second), [x])
    y = first(x).detach()
    assert list(found) == ["0.weight"]
    assert torch.allclose(found["0.weight"], x.T @ x + y.T @ y, atol=1e-5)


def test_regmean_with_what_was_collected_solves_the_joint_least_squares() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(4, 3, bias=False) for _ in range(2)]
    inputs = [torch.randn(50, 4), torch.randn(50, 4) * torch.tensor([3.0, 1, 1, 0.1])]
    extras = [gram_matrices(m, [x]) for m, x in zip(models, inputs)]
    merged = merge_state_dicts(
        "regmean", [m.state_dict() for m in models], extras=extras, reduce=1.0
    )
    joint = torch.cat(inputs).double()
    outputs = torch.cat([m(x).detach() for m, x in zip(models, inputs)]).double()
    wanted = torch.linalg.lstsq(joint, outputs).solution.T
    assert torch.allclose(merged["weight"].double(), wanted, atol=1e-4)


def test_statistics_are_written_whole(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    write_statistics(tmp_path / "a.safetensors", {"w": torch.eye(3).T})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["w"], torch.eye(3))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_cannot_be_collected_is_said() -> None:
    def nothing() -> Iterator[Tensor]:
        yield from ()

    with pytest.raises(MergeError, match="no input"):
        fisher_diagonal(softmax_regression, state_of(), nothing())
    with pytest.raises(MergeError, match="no input"):
        gram_matrices(nn.Linear(2, 2), nothing())
    with pytest.raises(MergeError, match="no linear layer"):
        gram_matrices(nn.ReLU(), [torch.ones(1, 2)])
    with pytest.raises(NonFiniteError, match="inputs of 'weight'"):
        gram_matrices(nn.Linear(2, 2), [torch.full((1, 2), math.nan)])
    with pytest.raises(NonFiniteError, match="gradients of"):
        fisher_diagonal(softmax_regression, state_of(), [torch.full((1, 4), math.inf).double()])
