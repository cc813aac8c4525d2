"""Class and label measures against scikit-learn, and at their edges."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from polytask.evaluate.classes import confusion_sums
from polytask.evaluate.metric import find_metric, metric_names
from polytask.rng import generator


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def classes(n: int = 200, c: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    g = generator(seed, "classes")
    truth = g.integers(0, c, n)
    return softmax(g.normal(size=(n, c)) + 1.5 * np.eye(c)[truth]), truth


def labels(n: int = 150, c: int = 6) -> tuple[np.ndarray, np.ndarray]:
    g = generator(1, "labels")
    truth = (g.random((n, c)) < [0.5, 0.3, 0.2, 0.1, 0.4, 0.05]).astype(float)
    return np.clip(0.5 * truth + 0.7 * g.random((n, c)), 0, 1), truth


@pytest.mark.parametrize("c", [2, 5])
def test_class_measures_are_sklearns(c: int) -> None:
    p, truth = classes(c=c)
    guess = p.argmax(1)
    assert find_metric("accuracy")(p, truth) == pytest.approx(sk.accuracy_score(truth, guess))
    macro = sk.f1_score(truth, guess, average="macro")
    assert find_metric("macro_f1")(p, truth) == pytest.approx(macro)
    assert find_metric("log_loss")(p, truth) == pytest.approx(sk.log_loss(truth, p))
    theirs = (
        sk.roc_auc_score(truth, p[:, 1])
        if c == 2
        else sk.roc_auc_score(truth, p, multi_class="ovr", average="macro")
    )
    assert find_metric("auroc")(p, truth) == pytest.approx(theirs)


def test_class_numbers_count_like_scores() -> None:
    p, truth = classes()
    for name in ("accuracy", "macro_f1", "miou"):
        assert find_metric(name)(p, truth) == find_metric(name)(p.argmax(1), truth)


def test_label_measures_are_sklearns() -> None:
    p, truth = labels()
    given = p > 0.5
    pairs = {
        "hamming": sk.hamming_loss(truth, given),
        "micro_f1": sk.f1_score(truth, given, average="micro"),
        "auroc": sk.roc_auc_score(truth, p, average="macro"),
        "mean_average_precision": sk.average_precision_score(truth, p, average="macro"),
    }
    for name, expected in pairs.items():
        assert find_metric(name, "multilabel")(p, truth) == pytest.approx(expected), name
    macro = find_metric("macro_f1", "multilabel")(p, truth)
    assert macro == pytest.approx(sk.f1_score(truth, given, average="macro"))
    accuracy = find_metric("accuracy", "multilabel")(p, truth)
    assert accuracy == pytest.approx(1 - sk.hamming_loss(truth, given))


def test_ties_count_half_in_auroc_and_are_one_step_in_average_precision() -> None:
    truth = np.array([0, 0, 1, 1, 1, 0])
    score = np.array([0.2, 0.5, 0.5, 0.5, 0.9, 0.9])
    assert find_metric("auroc")(score, truth) == pytest.approx(sk.roc_auc_score(truth, score))
    both = np.stack([score, score], 1), np.stack([truth, truth], 1).astype(float)
    ours = find_metric("mean_average_precision")(*both)
    assert ours == pytest.approx(sk.average_precision_score(truth, score))
    assert find_metric("auroc")(np.full(6, 0.3), truth) == 0.5


def test_unknown_labels_are_left_out() -> None:
    p, truth = classes()
    hidden = np.where(np.arange(200) % 3 == 0, -1, truth)
    kept = hidden >= 0
    for name in ("accuracy", "macro_f1", "log_loss", "ece", "auroc", "miou"):
        metric = find_metric(name)
        assert metric(p, hidden) == pytest.approx(metric(p[kept], truth[kept])), name
    q, many = labels()
    holes = many.copy()
    holes[::2, 0] = np.nan
    column = sk.roc_auc_score(many[1::2, 0], q[1::2, 0])
    others = [sk.roc_auc_score(many[:, c], q[:, c]) for c in range(1, 6)]
    ours = find_metric("auroc", "multilabel")(q, holes)
    assert ours == pytest.approx(np.mean([column, *others]))
    wrong = (q > 0.5) != (many > 0.5)
    hamming = find_metric("hamming")(q, holes)
    assert hamming == pytest.approx(wrong[~np.isnan(holes)].mean())


def test_with_one_class_only_ranking_is_undefined_and_counting_is_not() -> None:
    p, truth = softmax(np.zeros((4, 3))), np.zeros(4, int)
    assert np.isnan(find_metric("auroc")(p, truth))
    assert find_metric("accuracy")(p, truth) == 1.0
    assert find_metric("macro_f1")(p, truth) == 1.0
    every = np.ones((3, 2))
    assert np.isnan(find_metric("mean_average_precision", "multilabel")(every, np.zeros((3, 2))))


def test_no_examples_give_no_number() -> None:
    for name in ("accuracy", "macro_f1", "log_loss", "ece", "auroc"):
        assert np.isnan(find_metric(name)(np.zeros((0, 3)), np.zeros(0, int))), name
    for name in ("hamming", "micro_f1", "macro_f1"):
        metric = find_metric(name, "multilabel")
        assert np.isnan(metric(np.zeros((0, 3)), np.zeros((0, 3)))), name


def test_calibration_error_by_hand() -> None:
    # Two bins: confidence .6 twice (one right), .9 twice (both right).
    p = np.array([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.1, 0.9]])
    truth = np.array([0, 1, 1, 1])
    assert find_metric("ece")(p, truth) == pytest.approx((abs(1.2 - 1) + abs(1.8 - 2)) / 4)


def test_calibration_error_of_calibrated_scores_goes_to_zero() -> None:
    g = generator(2, "calibrated")
    p = g.random(200_000)
    truth = (g.random(200_000) < p).astype(int)
    assert find_metric("ece")(p, truth) < 0.01
    assert find_metric("ece")(np.where(p > 0.5, 1.0, 0.0), truth) > 0.2


def test_intersection_over_union_by_sets_of_pixels() -> None:
    g = generator(3, "maps")
    truth, guess = g.integers(0, 4, (6, 8, 8)), g.integers(0, 4, (6, 8, 8))
    truth[:, 0] = -100
    guess[truth == 3] = 3
    known = truth >= 0
    expected = [
        ((guess == c) & (truth == c) & known).sum() / (((guess == c) | (truth == c)) & known).sum()
        for c in range(4)
    ]
    assert find_metric("miou")(guess, truth) == pytest.approx(np.mean(expected))
    right = (guess == truth)[known].mean()
    assert find_metric("pixel_accuracy")(guess, truth) == pytest.approx(right)
    floats = np.where(known, truth, np.nan).astype(np.float32)
    assert find_metric("miou")(guess.astype(np.float32), floats) == pytest.approx(np.mean(expected))


def test_a_class_that_never_occurs_does_not_count() -> None:
    truth, guess = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    few = find_metric("macro_f1")(guess, truth)
    assert few == pytest.approx(sk.f1_score(truth, guess, average="macro"))
    assert find_metric("macro_f1")(guess, truth, classes=10) == few


def test_sums_of_batches_are_the_sum_of_all() -> None:
    p, truth = classes()
    whole = confusion_sums(p, truth, classes=5)
    parts = [confusion_sums(p[i : i + 33], truth[i : i + 33], classes=5) for i in range(0, 200, 33)]
    assert (np.concatenate(parts) == whole).all()


def test_tags_are_pooled_over_words() -> None:
    truth = np.array([[0, 1, -100], [2, -100, -100]])
    guess = np.array([[0, 2, 1], [2, 0, 0]])
    assert find_metric("accuracy")(guess, truth) == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", ["accuracy", "log_loss", "hamming"])
def test_scores_average_to_the_measure(name: str) -> None:
    p, truth = labels() if name == "hamming" else classes()
    metric = find_metric(name)
    scores = metric.scores(p, truth)
    assert scores is not None
    assert scores.shape == (len(truth),)
    assert scores.mean() == pytest.approx(metric(p, truth))


def test_what_is_no_mean_has_no_scores() -> None:
    p, truth = classes()
    assert find_metric("macro_f1").scores(p, truth) is None
    assert find_metric("auroc").scores(p, truth) is None


def test_bad_predictions_are_refused_with_the_example() -> None:
    p, truth = classes()
    p[7, 2] = np.nan
    for name in ("accuracy", "log_loss", "ece", "auroc"):
        with pytest.raises(ValueError, match="prediction of example 7 is not finite"):
            find_metric(name)(p, truth)
    with pytest.raises(ValueError, match="199 predictions for 200 targets"):
        find_metric("accuracy")(np.zeros((199, 2)), truth)
    with pytest.raises(ValueError, match="negative"):
        find_metric("log_loss")(-np.ones((200, 2)), truth)


def test_unknown_metrics_get_the_nearest_name() -> None:
    from polytask.errors import ConfigError

    with pytest.raises(ConfigError, match=r"unknown metric 'acuracy'\. Did you mean 'accuracy'"):
        find_metric("acuracy")
    assert find_metric("recall@7").name == "recall@7"
    assert {"accuracy", "rmse", "perplexity", "mrr", "smape", "miou"} <= set(metric_names())
