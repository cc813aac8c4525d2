"""Sequences of tasks: every number against the formulas worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from polytask.errors import UserError
from polytask.evaluate import ScoreMatrix, stability_gap

# Rows: untrained, after a, after b, after c. The table of a class-incremental paper's appendix.
R = [
    [0.10, 0.12, 0.08],
    [0.90, 0.20, 0.10],
    [0.70, 0.80, 0.30],
    [0.60, 0.85, 0.95],
]
LEARNED = {"a": 1, "b": 2, "c": 3}


def matrix() -> ScoreMatrix:
    return ScoreMatrix("abc", R, LEARNED)


def test_average_is_over_the_tasks_learned_so_far() -> None:
    m = matrix()
    assert m.average() == pytest.approx((0.60 + 0.85 + 0.95) / 3)
    assert m.average(2) == pytest.approx((0.70 + 0.80) / 2)
    assert math.isnan(m.average(0))


def test_backward_transfer_of_lopez_paz_and_ranzato() -> None:
    assert matrix().backward_transfer() == pytest.approx(((0.60 - 0.90) + (0.85 - 0.80)) / 2)


def test_forward_transfer_of_lopez_paz_and_ranzato() -> None:
    assert matrix().forward_transfer() == pytest.approx(((0.20 - 0.12) + (0.30 - 0.08)) / 2)
    fresh = ScoreMatrix("abc", R, LEARNED, baseline={"b": 0.25, "c": 0.1})
    assert fresh.forward_transfer() == pytest.approx(((0.20 - 0.25) + (0.30 - 0.1)) / 2)


def test_forgetting_of_chaudhry_counts_from_the_best_so_far() -> None:
    m = matrix()
    assert m.forgetting() == pytest.approx(((0.90 - 0.60) + (0.80 - 0.85)) / 2)
    assert m.forgetting(2) == pytest.approx(0.90 - 0.70)
    assert math.isnan(m.forgetting(1))
    later_peak = [*R[:3], [0.95, 0.82, 0.9], [0.5, 0.8, 0.9]]
    assert ScoreMatrix("abc", later_peak, LEARNED).forgetting() == pytest.approx(
        ((0.95 - 0.5) + (0.82 - 0.8) + 0.0) / 3
    )


def test_accumulation_and_retention_of_fomo_in_flux() -> None:
    scores = [[0.2, 0.3, 0.8], [0.6, 0.3, 0.7], [0.5, 0.7, 0.72]]
    m = ScoreMatrix(["a", "b", "held"], scores, {"a": 1, "b": 2}, held_out=["held"])
    assert m.accumulation() == pytest.approx(0.6)
    assert m.accumulation(0) == pytest.approx(0.25)
    assert m.retention() == pytest.approx(0.72)
    assert m.trade_off() == pytest.approx(math.sqrt(0.6 / 0.25 * 0.72 / 0.8))


def test_with_losses_every_number_still_reads_more_is_better() -> None:
    lower = ScoreMatrix(
        "abc",
        -np.asarray(R),
        LEARNED,
        baseline={"b": -0.12, "c": -0.08},
        higher_is_better=dict.fromkeys("abc", False),
    )
    assert lower.summary() == pytest.approx(matrix().summary() | {"retention": None})


def test_several_steps_a_task() -> None:
    scores = [[0.1, 0.1], [0.5, 0.2], [0.8, 0.3], [0.4, 0.5], [0.7, 0.9]]
    m = ScoreMatrix("ab", scores, {"a": 2, "b": 4}, began={"b": 2})
    assert m.forward_transfer() == pytest.approx(0.3 - 0.1)
    assert m.worst("a") == 0.4
    assert math.isnan(m.worst("b"))
    gap = m.gap("a", start=2)
    assert (gap.depth, gap.recovery) == (pytest.approx(0.4), None)
    assert gap.area == pytest.approx((0.8 - 0.4) + (0.8 - 0.7))


def test_the_stability_gap_has_depth_recovery_and_area() -> None:
    gap = stability_gap([0.5, 0.4, 0.3, 0.45, 0.5, 0.6], steps=[0, 10, 20, 40, 50, 60])
    assert gap.depth == pytest.approx(0.2)
    assert gap.recovery == 50
    assert gap.area == pytest.approx(0.1 * 10 + 0.2 * 10 + 0.05 * 20)
    none = stability_gap([0.5, 0.5, 0.6])
    assert (none.depth, none.recovery, none.area) == (0.0, 0.0, 0.0)


def test_wrong_uses_are_refused() -> None:
    with pytest.raises(UserError, match="should be"):
        ScoreMatrix("ab", R, LEARNED)
    with pytest.raises(UserError, match=r"no task 'd'"):
        ScoreMatrix("abc", R, {**LEARNED, "d": 1})
    with pytest.raises(UserError, match="say when 'c' was learned"):
        ScoreMatrix("abc", R, {"a": 1, "b": 2})
    with pytest.raises(UserError, match="learned at step 9"):
        ScoreMatrix("abc", R, {**LEARNED, "c": 9})
    for bad in ([0.5], [0.5, float("nan")]):
        with pytest.raises(ValueError, match="gap needs"):
            stability_gap(bad)
    with pytest.raises(ValueError, match="ascending"):
        stability_gap([0.1, 0.2], steps=[1, 1])
