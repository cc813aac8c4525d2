"""Measures of numbers and forecasts against scikit-learn, scipy and the competitions' formulas."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from polytask.evaluate.metric import find_metric
from polytask.evaluate.numbers import naive_scale
from polytask.rng import generator


def pairs(outputs: int = 1, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    g = generator(outputs, "numbers")
    truth = g.normal(size=(300, outputs)) * np.arange(1, outputs + 1) + shift
    return truth + g.normal(size=truth.shape) * 0.7, truth


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_regression_measures_are_sklearns_and_scipys(outputs: int, shift: float) -> None:
    p, y = pairs(outputs, shift)
    columns = range(outputs)
    expected = {
        "rmse": sk.root_mean_squared_error(y, p),
        "mae": sk.mean_absolute_error(y, p),
        "r2": sk.r2_score(y, p),
        "pearson": np.mean([stats.pearsonr(p[:, c], y[:, c]).statistic for c in columns]),
        "spearman": np.mean([stats.spearmanr(p[:, c], y[:, c]).statistic for c in columns]),
    }
    for name, value in expected.items():
        assert find_metric(name)(p, y) == pytest.approx(value, rel=1e-6), name


def test_ties_share_their_rank() -> None:
    p, y = np.array([1, 1, 2, 3, 3, 0.5]), np.array([2, 1, 1, 3, 4, 0.0])
    assert find_metric("spearman")(p, y) == pytest.approx(stats.spearmanr(p, y).statistic)


def test_unknown_targets_are_left_out() -> None:
    p, y = pairs(2)
    y[::3, 0] = np.nan
    kept = ~np.isnan(y[:, 0])
    for name, of in (("rmse", sk.root_mean_squared_error), ("r2", sk.r2_score)):
        expected = np.mean([of(y[kept, 0], p[kept, 0]), of(y[:, 1], p[:, 1])])
        assert find_metric(name)(p, y) == pytest.approx(expected), name


def test_without_spread_correlation_and_r2_are_undefined() -> None:
    flat = np.full(10, 3.7)
    p = generator(0, "p").normal(size=10)
    for name in ("r2", "pearson", "spearman"):
        assert np.isnan(find_metric(name)(p, flat)), name
    assert np.isnan(find_metric("pearson")(flat, p))
    assert find_metric("r2")(flat, p) < 0
    assert np.isnan(find_metric("r2")(p[:1], p[:1]))
    for name in ("rmse", "mae", "r2", "pearson", "spearman", "smape"):
        assert np.isnan(find_metric(name)(np.zeros((0, 1)), np.zeros((0, 1)))), name


def test_symmetric_error_is_the_m_competitions() -> None:
    y, f = np.array([[[10.0], [0.0]], [[5.0], [8.0]]]), np.array([[[8.0], [0.0]], [[5.0], [2.0]]])
    first = np.mean([200 * 2 / 18, 0.0])
    second = np.mean([0.0, 200 * 6 / 10])
    metric = find_metric("smape")
    assert metric(f, y) == pytest.approx((first + second) / 2)
    scores = metric.scores(f, y)
    assert scores is not None
    assert scores == pytest.approx([first, second])


def test_mase_of_the_naive_forecast_within_the_sample_is_one() -> None:
    g = generator(4, "series")
    y = g.normal(size=(20, 60, 1)).cumsum(1)
    scale = naive_scale(y)
    inside = find_metric("mase")(y[:, :-1], y[:, 1:], scale=scale)
    assert inside == pytest.approx(1.0)


def test_mase_by_hand_with_a_season_missing_steps_and_a_flat_series() -> None:
    history = np.array([[1.0, 2.0, 3.0, 5.0], [4.0, np.nan, 6.0, 7.0], [2.0, 2.0, 2.0, 2.0]])
    scale = naive_scale(history, season=2)
    assert scale[:, 0] == pytest.approx([(2 + 3) / 2, 2.0, 0.0])
    y, f = np.array([[6.0], [9.0], [2.0]]), np.array([[1.0], [8.0], [3.0]])
    scores = find_metric("mase").scores(f, y, scale=scale)
    assert scores is not None
    assert scores[:2] == pytest.approx([5 / 2.5, 1 / 2])
    assert np.isnan(scores[2])
    assert find_metric("mase")(f, y, scale=scale) == pytest.approx((2.0 + 0.5) / 2)
    assert np.isnan(naive_scale(history, season=4)).all()


def test_mase_scales_each_channel_by_its_own_history() -> None:
    history = np.stack([np.arange(6.0), 10 * np.arange(6.0)], 1)[None]
    y = np.array([[[6.0, 60.0], [7.0, 70.0]]])
    f = y + np.array([1.0, 10.0])
    assert find_metric("mase")(f, y, scale=naive_scale(history)) == pytest.approx(1.0)


def test_scaled_and_relative_errors_by_hand() -> None:
    y, f = np.array([[2.0, -4.0], [0.0, np.nan]]), np.array([[1.0, -3.0], [1.0, 5.0]])
    assert find_metric("mae_scaled")(f, y) == pytest.approx(3 / 6)
    assert find_metric("abs_rel")(f, y) == pytest.approx(1 / 2)


def test_maps_and_forecasts_pool_their_positions() -> None:
    g = generator(5, "maps")
    y, p = g.normal(size=(7, 4, 4)), g.normal(size=(7, 4, 4))
    y[0, :3] = np.nan
    gap = (p - y)[~np.isnan(y)]
    for head in ("dense", "forecast"):
        assert find_metric("rmse", head)(p, y) == pytest.approx(np.sqrt((gap**2).mean()))
        assert find_metric("mae", head)(p, y) == pytest.approx(np.abs(gap).mean())


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        find_metric("rmse")(np.zeros((3, 2)), np.zeros((3, 1)))
    with pytest.raises(ValueError, match="prediction of example 1 is not finite"):
        find_metric("mae")(np.array([0.0, np.inf]), np.zeros(2))
    with pytest.raises(ValueError, match="season"):
        naive_scale(np.zeros((1, 5)), season=0)
