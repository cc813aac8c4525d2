"""Sharpness-aware parts against closed forms and the promise that nothing is left behind."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from polytask.train.sam import RandomState, ascent, frozen_statistics, global_norm, perturbed


def bits(tensors: list[torch.Tensor]) -> list[bytes]:
    return [t.detach().numpy().tobytes() for t in tensors]


def test_weights_come_back_bit_for_bit_where_subtracting_would_drift() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(1000) * 1e3, torch.randn(7, 3) * 1e-3]
    offsets = [torch.randn(1000), torch.randn(7, 3) * 1e3]
    before = bits(weights)
    with perturbed(weights, offsets):
        moved = [w.clone() for w in weights]
    assert bits(weights) == before
    drifted = [m - o for m, o in zip(moved, offsets, strict=True)]
    assert bits(drifted) != before  # what the copy protects from


def test_weights_come_back_when_the_block_raises() -> None:
    weight = torch.ones(3)
    with pytest.raises(ZeroDivisionError), perturbed([weight], [torch.full((3,), 0.1)]):
        raise ZeroDivisionError
    assert torch.equal(weight, torch.ones(3))


def test_weights_are_moved_by_exactly_the_offset_inside_the_block() -> None:
    weight, offset = torch.randn(5), torch.randn(5)
    expected = weight + offset
    with perturbed([weight], [offset]):
        assert torch.equal(weight, expected)


def test_joint_ascent_has_length_rho_over_all_groups() -> None:
    values = [torch.randn(4, 5), torch.randn(3)]
    gradients = [torch.randn(4, 5), torch.randn(3)]
    offsets = ascent([(values[:1], gradients[:1]), (values[1:], gradients[1:])], rho=0.3)
    flat = torch.cat([part[0].reshape(-1) for part in offsets])
    direction = torch.cat([g.reshape(-1) for g in gradients])
    torch.testing.assert_close(flat, 0.3 * direction / direction.norm())


def test_split_ascent_gives_every_group_its_own_radius() -> None:
    values = [[torch.randn(6)], [torch.randn(2), torch.randn(2)]]
    gradients = [[torch.randn(6) * 100], [torch.randn(2), torch.randn(2)]]
    offsets = ascent(list(zip(values, gradients, strict=True)), rho=0.2, norm="split")
    for part in offsets:
        assert float(global_norm(part)) == pytest.approx(0.2, rel=1e-6)


def test_adaptive_ascent_is_the_asam_formula() -> None:
    v, g = torch.randn(9), torch.randn(9)
    [[offset]] = ascent([([v], [g])], rho=2.0, adaptive=True)
    torch.testing.assert_close(offset, 2.0 * v**2 * g / (v.abs() * g).norm())


def test_adaptive_ascent_does_not_change_when_weights_are_rescaled() -> None:
    v, g, scale = torch.randn(9), torch.randn(9), torch.rand(9) + 0.5
    [[offset]] = ascent([([v], [g])], rho=2.0, adaptive=True)
    [[rescaled]] = ascent([([v * scale], [g / scale])], rho=2.0, adaptive=True)
    torch.testing.assert_close(rescaled / scale, offset)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("norm", ["joint", "split"])
def test_a_zero_gradient_gives_a_zero_step_and_no_nan(adaptive: bool, norm: str) -> None:
    zero = torch.zeros(3)
    offsets = ascent([([torch.ones(3)], [zero]), ([], [])], 0.1, adaptive, norm)  # type: ignore[arg-type]
    assert torch.equal(offsets[0][0], zero)


def test_running_statistics_are_kept_while_batches_are_still_normalised_by_themselves() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None))
    x = torch.randn(16, 4) * 5 + 3
    model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with frozen_statistics(model):
        inside = model(x)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    torch.testing.assert_close(inside, model(x))  # batch statistics were used, not the running ones
    assert not torch.equal(model.state_dict()["0.running_mean"], before["0.running_mean"])


def test_instance_norm_that_tracks_is_kept_as_well() -> None:
    model = nn.InstanceNorm1d(3, track_running_stats=True)
    before = model.running_mean.clone()
    with frozen_statistics(model):
        model(torch.randn(4, 3, 8) + 2)
    assert torch.equal(model.running_mean, before)


def test_every_generator_is_replayed() -> None:
    state = RandomState.capture()
    first = (torch.rand(3), random.random(), np.random.rand(2))  # noqa: NPY002
    state.restore()
    again = (torch.rand(3), random.random(), np.random.rand(2))  # noqa: NPY002
    assert torch.equal(first[0], again[0])
    assert first[1] == again[1]
    assert np.array_equal(first[2], again[2])


def test_norm_of_half_precision_is_computed_in_full() -> None:
    many = torch.full((100_000,), 0.01, dtype=torch.bfloat16)
    assert float(global_norm([many])) == pytest.approx(0.01 * 100_000**0.5, rel=2e-3)
    assert float(global_norm([])) == 0.0
