"""Intervals against scipy, closed forms and simulated coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from polytask.evaluate.intervals import (
    bootstrap_interval,
    holm,
    percentile_limits,
    resampled,
    resampled_indices,
    t_interval,
    t_test,
)
from polytask.rng import generator


@pytest.mark.parametrize("n", [2, 3, 5, 40])
@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_t_interval_is_scipys(n: int, confidence: float) -> None:
    x = generator(n, "x").normal(3.0, 2.0, size=n)
    ours = t_interval(x, confidence)
    low, high = stats.ttest_1samp(x, 0).confidence_interval(confidence)
    assert (ours.low, ours.high) == pytest.approx((low, high), rel=1e-12)
    assert ours.mean == pytest.approx(x.mean())
    assert (ours.n, ours.method) == (n, "t")


@pytest.mark.parametrize("n", [2, 7, 30])
def test_t_test_of_differences_is_scipys_paired_test(n: int) -> None:
    g = generator(n, "pairs")
    a, b = g.normal(size=n), g.normal(0.3, 1, size=n)
    assert t_test(a - b) == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-10)


def test_without_spread_the_interval_is_a_point_and_p_is_zero_or_one() -> None:
    flat = t_interval([0.5, 0.5, 0.5])
    assert (flat.low, flat.high) == (0.5, 0.5)
    assert t_test([0.5, 0.5, 0.5]) == 0.0
    assert t_test([0.0, 0.0]) == 1.0
    boot = bootstrap_interval([0.5, 0.5, 0.5])
    assert (boot.low, boot.high) == (0.5, 0.5)


def test_for_many_measurements_the_bootstrap_is_the_plain_percentile_of_scipy() -> None:
    x = generator(1, "many").exponential(size=2000)
    ours = bootstrap_interval(x, 0.9, resamples=20_000)
    theirs = stats.bootstrap(
        (x,), np.mean, confidence_level=0.9, method="percentile", n_resamples=20_000, rng=0
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * width)


def test_resampled_sums_have_the_moments_of_drawing_with_replacement() -> None:
    for distinct in (3, 200):  # both ways of drawing: by distinct rows, and by index
        x = generator(2, "values").normal(size=distinct)
        rows = np.tile(x, 1200 // distinct)[:, None]
        means = resampled(rows, lambda sums: sums[:, 0] / 1200, 20_000)
        assert means.mean() == pytest.approx(rows.mean(), abs=4 * rows.std() / 1200**0.5 / 141)
        assert means.std() == pytest.approx(rows.std() / 1200**0.5, rel=0.03)


def test_columns_are_resampled_together() -> None:
    g = generator(3, "pairs")
    a = g.normal(size=300)
    rows = np.stack([a, a + 1.0], 1)
    gaps = resampled(rows, lambda sums: (sums[:, 1] - sums[:, 0]) / 300, 500)
    assert gaps == pytest.approx(np.ones(500))


def test_the_same_seed_gives_the_same_interval() -> None:
    x = generator(4, "x").normal(size=50)
    assert bootstrap_interval(x, seed=7) == bootstrap_interval(x, seed=7)
    assert bootstrap_interval(x, seed=7) != bootstrap_interval(x, seed=8)
    first, second = resampled_indices(10, 3, seed=1), resampled_indices(10, 3, seed=1)
    assert all((a == b).all() for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("n", [5, 10])
def test_intervals_miss_the_true_mean_about_one_time_in_twenty(n: int) -> None:
    runs, g = 1500, generator(n, "coverage")
    missed = {"t": 0, "bootstrap": 0}
    for _ in range(runs):
        x = g.normal(size=n)
        missed["t"] += t_interval(x).excludes(0.0)
        missed["bootstrap"] += bootstrap_interval(x, resamples=600).excludes(0.0)
    error = 3.5 * (0.05 * 0.95 / runs) ** 0.5  # binomial
    assert missed["t"] / runs == pytest.approx(0.05, abs=error)
    # The expanded percentile interval repairs most of what the plain one (about 16 % at n = 5)
    # misses; with five values it still cannot reach beyond the extremes.
    assert missed["bootstrap"] / runs < (0.09 if n == 5 else 0.075)


def test_undefined_resamples_are_left_out_until_they_are_common() -> None:
    draws = generator(5, "draws").normal(size=1000)
    few, many = draws.copy(), draws.copy()
    few[:50], many[:200] = np.nan, np.nan
    assert percentile_limits(few, 100, 0.95) == percentile_limits(few[50:], 100, 0.95)
    assert np.isnan(percentile_limits(many, 100, 0.95)).all()


@pytest.mark.parametrize("bad", [[1.0], [], [1.0, float("nan")], [[1.0, 2.0]]])
def test_measurements_that_allow_no_interval_are_refused(bad: list[float]) -> None:
    for function in (t_interval, bootstrap_interval, t_test):
        with pytest.raises(ValueError, match=r"measurements|one value per"):
            function(bad)


def test_confidence_is_a_share() -> None:
    with pytest.raises(ValueError, match=r"between 0\.5 and 1"):
        t_interval([1.0, 2.0], 95)


def test_holm_on_the_textbook_example() -> None:
    # Holm by hand: sorted .005 .01 .03 .04 times 4 3 2 1 = .02 .03 .06 .04, running maximum.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_keeps_the_chance_of_any_false_claim() -> None:
    g, false = generator(6, "holm"), 0
    for _ in range(4000):
        false += min(holm(list(g.random(5)))) < 0.05
    assert false / 4000 < 0.05 + 3 * (0.05 * 0.95 / 4000) ** 0.5
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([1.2])
