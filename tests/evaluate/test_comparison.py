"""Multitask against single-task: delta_m by hand, intervals with the right coverage."""

from __future__ import annotations

import numpy as np
import pytest

from polytask.errors import UserError
from polytask.evaluate import TaskScore, compare_seeds, compare_single, delta_m, find_metric
from polytask.rng import generator

HEADS = {"accuracy": "classify", "rmse": "regress", "auroc": "classify", "macro_f1": "classify"}


def score(
    task: str,
    name: str,
    prediction: np.ndarray,
    target: np.ndarray,
    group: str = "",
    rows: np.ndarray | None = None,
) -> TaskScore:
    metric = find_metric(name)
    n = len(target)
    where = np.arange(n) if rows is None else rows
    if metric.statistics is None:
        raw = {"prediction": prediction, "target": target}
        value, alone, sums = metric(prediction, target), np.full(n, np.nan), {}
    else:
        raw = {}
        sums = {name: metric.statistics(prediction, target)}
        value, alone = metric.of_sums(sums[name]), metric.scores_of(sums[name])
    return TaskScore(task, HEADS[name], {name: value}, name, alone, where, group, sums, raw)


def right_or_wrong(p: float, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    truth = generator(seed, "truth").integers(0, 2, n)
    hit = generator(seed, f"hit{p}").random(n) < p
    return np.where(hit, truth, 1 - truth), truth


def two_tasks(seed: int = 0) -> tuple[dict[str, TaskScore], dict[str, TaskScore]]:
    g = generator(seed, "numbers")
    y = g.normal(size=(400, 1))
    good, bad = y + 0.5 * g.normal(size=y.shape), y + 0.8 * g.normal(size=y.shape)
    guess, truth = right_or_wrong(0.8, 500, seed)
    other, _ = right_or_wrong(0.85, 500, seed)
    multitask = {"a": score("a", "accuracy", guess, truth), "b": score("b", "rmse", good, y)}
    single = {"a": score("a", "accuracy", other, truth), "b": score("b", "rmse", bad, y)}
    return multitask, single


def test_delta_m_is_the_mean_signed_relative_improvement() -> None:
    multitask, single = two_tasks()
    found = compare_single(multitask, single)
    a = (multitask["a"].value - single["a"].value) / single["a"].value
    b = -(multitask["b"].value - single["b"].value) / single["b"].value
    assert found.delta_m.mean == pytest.approx((a + b) / 2)
    assert [t.relative.mean for t in found.tasks] == pytest.approx([a, b])
    assert found.tasks[1].gain.mean == pytest.approx(single["b"].value - multitask["b"].value)
    plain = delta_m(
        {name: s.value for name, s in multitask.items()},
        {name: s.value for name, s in single.items()},
        {"a": True, "b": False},
    )
    assert plain == pytest.approx(found.delta_m.mean)
    # Maninis et al. by hand: accuracy .6 -> .66 (+10 %), error 2.0 -> 2.2 (-10 %).
    assert delta_m({"x": 0.66, "y": 2.2}, {"x": 0.6, "y": 2.0}, {"x": True, "y": False}) == (
        pytest.approx(0.0)
    )


def test_the_interval_of_an_accuracy_gain_is_the_normal_one_for_paired_proportions() -> None:
    guess, truth = right_or_wrong(0.8, 4000, 1)
    other, _ = right_or_wrong(0.75, 4000, 1)
    found = compare_single(
        {"a": score("a", "accuracy", guess, truth)},
        {"a": score("a", "accuracy", other, truth)},
        resamples=8000,
    )
    d = (guess == truth).astype(float) - (other == truth)
    half = 1.96 * d.std() / 4000**0.5
    gain = found.tasks[0].gain
    assert gain.low == pytest.approx(d.mean() - half, abs=0.06 * half)
    assert gain.high == pytest.approx(d.mean() + half, abs=0.06 * half)


def slow_auroc(truth: np.ndarray, p: np.ndarray) -> float:
    return float((p[truth == 1][:, None] > p[truth == 0]).mean())


def slow_macro_f1(truth: np.ndarray, p: np.ndarray) -> float:
    each = [
        2 * ((p == c) & (truth == c)).sum() / ((p == c).sum() + (truth == c).sum()) for c in (0, 1)
    ]
    return float(np.mean(each))


@pytest.mark.parametrize("name", ["auroc", "macro_f1"])
def test_measures_that_are_no_means_are_recomputed_on_each_resample(name: str) -> None:
    g = generator(2, "ranks")
    truth = g.integers(0, 2, 200)
    a, b = truth + g.normal(size=200), truth + 2 * g.normal(size=200)
    if name == "macro_f1":
        a, b = (a > 0.5).astype(int), (b > 0.5).astype(int)
    found = compare_single(
        {"t": score("t", name, a, truth)}, {"t": score("t", name, b, truth)}, resamples=600
    )
    of = slow_auroc if name == "auroc" else slow_macro_f1
    draws = []
    for _ in range(600):
        i = g.integers(0, 200, 200)
        draws.append(of(truth[i], a[i]) - of(truth[i], b[i]))
    low, high = np.quantile(draws, [0.025, 0.975])
    gain = found.tasks[0].gain
    assert gain.mean == pytest.approx(of(truth, a) - of(truth, b))
    assert gain.low == pytest.approx(low, abs=0.15 * (high - low))
    assert gain.high == pytest.approx(high, abs=0.15 * (high - low))


def test_the_interval_covers_equal_models_nineteen_times_in_twenty() -> None:
    missed, runs = 0, 400
    for seed in range(runs):
        truth = np.zeros(150, int)
        g = generator(seed, "equal")
        a, b = (g.random((2, 150)) < 0.3).astype(int)
        found = compare_single(
            {"t": score("t", "accuracy", a, truth)},
            {"t": score("t", "accuracy", b, truth)},
            resamples=800,
        )
        missed += found.delta_m.excludes(0.0)
    assert missed / runs == pytest.approx(0.05, abs=3 * (0.05 * 0.95 / runs) ** 0.5)


def test_tasks_on_the_same_rows_are_resampled_together() -> None:
    """Two tasks whose errors mirror each other: jointly delta_m hardly varies, apart it does."""
    g = generator(3, "mirror")
    n = 1000
    truth = np.zeros(n, int)
    flip = g.random(n) < 0.5
    base = np.zeros(n, int)
    base[:5] = 1
    one, two = flip.astype(int), 1 - flip.astype(int)

    def width(group: str) -> float:
        multitask = {
            "one": score("one", "accuracy", one, truth, group),
            "two": score("two", "accuracy", two, truth, group),
        }
        single = {name: score(name, "accuracy", base, truth, group) for name in ("one", "two")}
        delta = compare_single(multitask, single).delta_m
        return delta.high - delta.low

    assert width("same") < 0.5 * width("")


def test_rows_that_lack_one_of_the_labels_take_part_with_the_other() -> None:
    guess, truth = right_or_wrong(0.8, 300, 4)
    rows = np.arange(300)
    some = rows % 3 != 0
    whole = score("x", "accuracy", guess, truth, "g")
    part = score("y", "accuracy", guess[some], truth[some], "g", rows[some])
    flat, holes = np.zeros(300, int), np.zeros(200, int)
    base = {
        "x": score("x", "accuracy", flat, truth, "g"),
        "y": score("y", "accuracy", holes, truth[some], "g", rows[some]),
    }
    found = compare_single({"x": whole, "y": part}, base)
    alone = compare_single({"y": part}, {"y": base["y"]})
    assert found.tasks[1].gain.mean == pytest.approx(alone.tasks[0].gain.mean)
    assert found.tasks[1].gain.low == pytest.approx(alone.tasks[0].gain.low, abs=0.02)


def test_unequal_budgets_and_unpaired_rows_are_refused() -> None:
    multitask, single = two_tasks()
    with pytest.raises(UserError, match=r"unequal budgets: rows 1000 .* 900"):
        compare_single(multitask, single, spent={"rows": (1000, 900)})
    assert compare_single(multitask, single, spent={"rows": (1000, 990)}).spent == {
        "rows": (1000, 990)
    }
    with pytest.raises(UserError, match="no single-task score of 'b'"):
        compare_single(multitask, {"a": single["a"]})
    guess, truth = right_or_wrong(0.8, 100, 0)
    with pytest.raises(UserError, match="different rows: 500 and 100"):
        compare_single({"a": multitask["a"]}, {"a": score("a", "accuracy", guess, truth)})


def test_a_task_without_a_relative_gain_is_named_and_left_out() -> None:
    multitask, single = two_tasks()
    truth = np.zeros(20, int)
    multitask["z"] = score("z", "accuracy", truth, truth)
    single["z"] = score("z", "accuracy", truth + 1, truth)
    found = compare_single(multitask, single)
    assert found.left_out == ("z",)
    assert found.delta_m.mean == pytest.approx(compare_single(*two_tasks()).delta_m.mean)


def test_over_seeds_it_is_students_interval() -> None:
    from scipy import stats

    runs = [two_tasks(seed) for seed in range(5)]
    found = compare_seeds([m for m, _ in runs], [s for _, s in runs])
    gaps = [s["b"].value - m["b"].value for m, s in runs]
    low, high = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert (found.tasks[1].gain.low, found.tasks[1].gain.high) == pytest.approx((low, high))
    each = [compare_single(m, s, resamples=10).delta_m.mean for m, s in runs]
    assert found.delta_m.mean == pytest.approx(np.mean(each))
    with pytest.raises(UserError, match="at least two seeds"):
        compare_seeds([runs[0][0]], [runs[0][1]])
