"""Scores of spikes and connections against definitions worked out one by one."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support, roc_auc_score

from polytask.errors import DataError
from polytask.evaluate import spikes


def test_sets_agree_with_sklearn_window_by_window() -> None:
    rng = np.random.default_rng(0)
    true, made = rng.poisson(0.3, (200, 12)), rng.poisson(0.3, (200, 12))
    rows = [
        precision_recall_fscore_support(a > 0, b > 0, average="binary", zero_division=0)[:3]
        if (a + b).any()
        else (1.0, 1.0, 1.0)
        for a, b in zip(true, made, strict=True)
    ]
    found = spikes.set_scores(true, made)
    assert (found.precision, found.recall, found.f1) == pytest.approx(np.mean(rows, axis=0))


def test_empty_windows_score_one_and_are_counted() -> None:
    found = spikes.set_scores([[0, 0], [1, 0], [0, 0]], [[0, 0], [0, 0], [0, 2]])
    assert (found.precision, found.recall, found.f1) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert found.empty == pytest.approx(1 / 3) and found.windows == 3


def test_the_published_code_inflates_one_sided_windows() -> None:
    true = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    made = np.array([[1, 0, 0, 0], [1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]])
    plain, code = spikes.set_scores(true, made), spikes.set_scores(true, made, official=True)
    assert plain.recall == pytest.approx((0.25 + 0.5 + 0 + 0) / 4)
    assert code.recall == pytest.approx((1 + 0.5 + 0) / 3)  # no false positive: called perfect
    assert code.windows == 3 and code.f1 > plain.f1
    with pytest.raises(DataError, match="no window holds a true spike"):
        spikes.set_scores([[0]], [[1]], official=True)


def plain_cosmic(one: list[float], two: list[float], width: float) -> float:
    """The definition as an integral over a fine grid, without any short cut."""
    grid = np.arange(-5, 15, width / 2000)

    def y(times: list[float]) -> np.ndarray:
        distance = np.abs(grid - np.asarray(times, float).reshape(-1, 1))
        return np.maximum(0, 1 - distance / (width / 2)).sum(axis=0)

    a, b = y(one), y(two)
    return float(2 * np.minimum(a, b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ([1.0], [1.01]),
        ([0.1, 0.5, 0.9], [0.11, 0.52, 0.7]),
        ([0.0, 0.01, 0.02], [0.01]),
        ([3.0], [0.0]),
    ],
)
def test_cosmic_is_the_overlap_of_pulse_trains(one: list[float], two: list[float]) -> None:
    found = spikes.cosmic(one, two, 0.05)
    assert found == pytest.approx(plain_cosmic(one, two, 0.05), abs=0.01)
    assert found == pytest.approx(spikes.cosmic(two, one, 0.05))
    assert spikes.cosmic(np.array(one) + 7, np.array(two) + 7, 0.05) == pytest.approx(found)


def test_cosmic_of_shifted_single_spikes_has_a_closed_form() -> None:
    # Two triangles of base w, shifted by s < w, overlap in a triangle of height 1 - s / w.
    for shift in (0.0, 0.01, 0.025, 0.04):
        want = (1 - shift / 0.05) ** 2
        assert spikes.cosmic([1.0], [1.0 + shift], 0.05) == pytest.approx(want, abs=0.01)


def test_cosmic_at_its_edges() -> None:
    assert spikes.cosmic([], [], 0.1) == 1.0
    assert spikes.cosmic([1.0], [], 0.1) == 0.0 == spikes.cosmic([], [1.0], 0.1)
    assert spikes.cosmic([1.0, 2.0], [1.0, 2.0], 0.1) == pytest.approx(1.0)
    assert np.isnan(spikes.cosmic([1.0], [1.0], 0.1, official=True))
    # The code's grid starts one width late: an early match is not seen, a late miss is.
    assert spikes.cosmic([0.0, 1.0], [0.0], 0.1) == pytest.approx(2 / 3, abs=0.01)
    assert spikes.cosmic([0.0, 1.0], [0.0], 0.1, official=True) == 0.0
    with pytest.raises(DataError, match="above 0"):
        spikes.cosmic([0.0], [0.0], 0.0)
    with pytest.raises(DataError, match="finite"):
        spikes.cosmic([np.nan], [0.0], 0.1)


def test_cosmic_by_unit_splits_the_events() -> None:
    rng = np.random.default_rng(1)
    a = rng.integers(0, 4, 60), rng.random(60)
    b = rng.integers(0, 4, 50), rng.random(50)
    found = spikes.cosmic_by_unit(a, b, 5, 0.05)
    for i in range(5):
        assert found[i] == spikes.cosmic(a[1][a[0] == i], b[1][b[0] == i], 0.05)
    assert found[4] == 1.0


def test_psth_counts_by_hand() -> None:
    unit, step = [0, 0, 1, 1, 0, 1], [0, 3, 5, 12, 13, 19]
    found = spikes.psth(unit, step, 2, [(10, 16), (0, 7)], 3)
    # Trial 0-7: unit 0 at 0, 3; unit 1 at 5. Trial 10-16: unit 1 at +2, unit 0 at +3.
    assert found.tolist() == [[0.5, 1.0], [0.5, 0.5]]
    with pytest.raises(DataError, match="shorter than one bin"):
        spikes.psth(unit, step, 2, [(0, 2)], 3)


def test_correlations_agree_with_numpy() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.random((4, 30)), rng.random((4, 30))
    a[3] = 1.0
    found = spikes.correlations(a, b)
    assert found[:3] == pytest.approx([np.corrcoef(x, y)[0, 1] for x, y in zip(a[:3], b[:3])])
    assert np.isnan(found[3])
    assert spikes.correlation(a, b) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def test_population_scores_see_wrong_counts() -> None:
    rng = np.random.default_rng(3)
    true = rng.poisson(np.linspace(0.1, 1, 20), (400, 20))
    found = spikes.population_scores(true, 2 * true)
    assert found.count_ratio == 2.0 and found.sets.f1 == 1.0
    assert found.rate_r == pytest.approx(1.0) and found.cell_r == pytest.approx(1.0)
    assert spikes.population_scores(true, true[:, ::-1]).rate_r < -0.9


def test_decoding_gives_r_and_r2() -> None:
    truth = np.random.default_rng(4).random(50)
    r, r2 = spikes.decoding(2 * truth + 1, truth)
    assert r == pytest.approx(1.0)
    assert r2 == pytest.approx(1 - ((truth + 1) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())


def test_edges_are_judged_forward_and_against_the_arrows() -> None:
    rng = np.random.default_rng(5)
    edges = rng.random((9, 9)) < 0.2
    np.fill_diagonal(edges, True)  # self edges never count
    score = edges + 0.6 * rng.random((9, 9))
    off = ~np.eye(9, dtype=bool)
    found = spikes.edge_scores(score, edges)
    assert found.forward == pytest.approx(roc_auc_score(edges[off], score[off])) == 1.0
    assert found.transposed == pytest.approx(roc_auc_score(edges.T[off], score[off]))
    even = spikes.edge_scores(score + score.T, edges)
    assert even.direction == pytest.approx(0.0)
    seen = np.where(rng.random((9, 9)) < 0.5, np.nan, score)
    low = np.nan_to_num(seen, nan=-1.0)
    assert spikes.edge_scores(seen, edges).forward == pytest.approx(
        roc_auc_score(edges[off], low[off])
    )


def test_knowing_the_hubs_is_not_knowing_the_edges() -> None:
    edges = np.zeros((8, 8), bool)
    edges[3:6, 0] = edges[5:8, 1] = True
    hubs = edges.sum(axis=0) * np.ones((8, 1))  # every target of a hub alike
    found = spikes.edge_scores(hubs, edges)
    assert found.forward > 0.8 and found.within == pytest.approx(0.5)
    score = np.random.default_rng(6).random((8, 8))
    rows = [np.delete(np.arange(8), p) for p in (0, 1)]
    want = [roc_auc_score(edges[r, p], score[r, p]) for p, r in enumerate(rows)]
    assert spikes.edge_scores(score, edges).within == pytest.approx(np.mean(want))


def test_mistakes_are_named() -> None:
    with pytest.raises(DataError, match="needs pairs that are connected"):
        spikes.edge_scores(np.ones((3, 3)), np.eye(3))
    with pytest.raises(DataError, match="must both be"):
        spikes.edge_scores(np.ones((3, 2)), np.ones((3, 2)))
    with pytest.raises(DataError, match="sets of units"):
        spikes.set_scores(np.ones((3, 2)), np.ones((2, 2)))
