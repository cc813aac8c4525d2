"""Reliability against closed forms; models on several sets."""

from __future__ import annotations

import numpy as np
import pytest

from polytask.errors import DataError
from polytask.evaluate import agreement, compare_on_sets, find_metric, reliability


def test_ece_of_a_hand_made_table() -> None:
    # Confidences .95 (three rows, two right) and .55 (one row, wrong): two bins of ten.
    p = np.array([[0.95, 0.05], [0.95, 0.05], [0.05, 0.95], [0.45, 0.55]])
    truth = np.array([0, 1, 1, 0])
    found = reliability(p, truth)
    assert found.count.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 3]
    assert found.accuracy[9] == pytest.approx(2 / 3)
    assert found.confidence[9] == pytest.approx(0.95)
    assert np.isnan(found.accuracy[0])
    assert found.ece == pytest.approx(0.75 * (0.95 - 2 / 3) + 0.25 * 0.55)
    assert found.overconfidence == pytest.approx(0.95 * 0.75 + 0.55 * 0.25 - 0.5)


def test_ece_of_a_miscalibrated_coin_is_its_closed_form() -> None:
    """Confidence c everywhere, right with probability q: ECE = |c - q| in expectation."""
    rng = np.random.default_rng(0)
    right = rng.random(200_000) < 0.7
    p = np.where(right[:, None], [[0.9, 0.1]], [[0.1, 0.9]])
    found = reliability(p, np.zeros(len(p)))
    assert found.ece == pytest.approx(0.2, abs=4e-3)


def test_calibrated_probabilities_have_almost_no_error() -> None:
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(3), size=100_000)
    truth = (p.cumsum(1) > rng.random((len(p), 1))).argmax(1)
    assert reliability(p, truth).ece < 0.01
    assert abs(reliability(p, truth).overconfidence) < 0.01


def test_the_metric_ece_is_the_same_with_its_number_of_bins() -> None:
    rng = np.random.default_rng(2)
    p, truth = rng.dirichlet(np.ones(4), size=300), rng.integers(0, 4, 300)
    assert find_metric("ece")(p, truth) == pytest.approx(reliability(p, truth, bins=15).ece)


def test_unknown_labels_are_left_out_and_no_rows_give_nan() -> None:
    p = np.array([[0.8, 0.2], [0.3, 0.7]])
    assert reliability(p, np.array([0, -1])).count.sum() == 1
    assert np.isnan(reliability(p[:0], np.array([])).ece)
    with pytest.raises(DataError, match="at least one bin"):
        reliability(p, np.array([0, 1]), bins=0)


def test_agreement_counts_equal_top_classes() -> None:
    one = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    other = np.array([[0.6, 0.4], [0.9, 0.1], [0.1, 0.9]])
    assert agreement(one, other) == pytest.approx(2 / 3)


def test_models_are_compared_on_every_set() -> None:
    sure = np.array([[1.0, 0.0], [0.0, 1.0]])
    unsure = np.array([[0.6, 0.4], [0.6, 0.4]])
    truth = np.array([0, 1])
    rows = compare_on_sets(
        {"tuned": {"test": sure, "ood": sure}, "graft": {"test": unsure, "ood": sure}},
        {"test": truth, "ood": np.array([1, -1])},
        reference="tuned",
    )
    named = {(row.model, row.set): row for row in rows}
    assert named["tuned", "test"].ece == 0
    assert named["graft", "test"].accuracy == 0.5
    assert named["graft", "test"].ece == pytest.approx(0.1)
    assert named["graft", "test"].agreement == 0.5
    assert (named["graft", "ood"].n, named["graft", "ood"].accuracy) == (1, 0.0)


def test_missing_sets_and_labels_are_named() -> None:
    p = np.array([[1.0, 0.0]])
    with pytest.raises(DataError, match="model 'graft' has no predictions for the set 'ood'"):
        compare_on_sets({"graft": {"test": p}}, {"test": [0], "ood": [0]})
    with pytest.raises(DataError, match="no model 'tuned'"):
        compare_on_sets({"graft": {"test": p}}, {"test": [0]}, reference="tuned")
    with pytest.raises(DataError, match="set 'test' has no row"):
        compare_on_sets({"graft": {"test": p}}, {"test": [-1]})
