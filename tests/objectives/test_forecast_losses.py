"""Losses of forecasts in the units of the series: closed forms, masks, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, mean_pinball_loss, mean_squared_error

from polytask.objectives import pinball, raw_forecast


def test_raw_forecast_equals_scikit_learn_on_known_steps() -> None:
    guess, truth = torch.randn(3, 5, 2), torch.randn(3, 5, 2)
    truth[0, 1, 1] = float("nan")
    known = ~truth[0].isnan()
    args = truth[0][known].numpy(), guess[0][known].numpy()
    for shape, expected in (("mse", mean_squared_error), ("mae", mean_absolute_error)):
        found = raw_forecast(guess, truth, shape)[0]  # type: ignore[arg-type]
        assert float(found) == pytest.approx(expected(*args), rel=1e-5)


def test_a_scale_divides_the_error() -> None:
    guess, truth = torch.randn(2, 4, 1), torch.randn(2, 4, 1)
    plain = raw_forecast(guess, truth, "mse")
    scaled = raw_forecast(guess, truth, "mse", torch.full((2, 1), 10.0))
    assert torch.allclose(scaled * 100, plain)


def test_pinball_equals_scikit_learn_and_is_least_at_the_quantile() -> None:
    levels = (0.1, 0.5, 0.9)
    guess, truth = torch.randn(1, 50, 1, 3), torch.randn(1, 50, 1)
    expected = [
        mean_pinball_loss(truth[0, :, 0].numpy(), guess[0, :, 0, k].numpy(), alpha=q)
        for k, q in enumerate(levels)
    ]
    assert float(pinball(guess, truth, levels)[0]) == pytest.approx(np.mean(expected), rel=1e-5)
    best = torch.quantile(truth[0, :, 0], torch.tensor(0.9))
    grid = torch.linspace(-3, 3, 601)
    loss = [float(pinball(g.expand(1, 50, 1, 1), truth, (0.9,))[0]) for g in grid]
    assert float(grid[int(np.argmin(loss))]) == pytest.approx(float(best), abs=0.2)


def test_missing_steps_have_no_gradient() -> None:
    guess = torch.randn(1, 4, 1, requires_grad=True)
    spread = torch.randn(1, 4, 1, 2, requires_grad=True)
    truth = torch.tensor([[[1.0], [float("nan")], [0.0], [float("nan")]]])
    (raw_forecast(guess, truth).sum() + pinball(spread, truth, (0.2, 0.8)).sum()).backward()
    for grad in (guess.grad, spread.grad):
        assert grad is not None and grad.isfinite().all()
        assert (grad[0, [1, 3]] == 0).all() and (grad[0, [0, 2]] != 0).all()
