"""Measures of text and of candidates against slow references and closed forms."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from sklearn import metrics as sk

from polytask.evaluate.metric import find_metric
from polytask.evaluate.texts import common_subsequence, words
from polytask.rng import generator


def slow_lcs(a: list[str], b: list[str]) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, j in itertools.product(range(len(a)), range(len(b))):
        same = a[i] == b[j]
        table[i + 1, j + 1] = table[i, j] + 1 if same else max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


def test_longest_common_subsequence_is_the_table_method() -> None:
    g = generator(0, "lcs")
    for n, m in ((0, 4), (1, 1), (12, 9), (150, 130), (70, 200)):
        a, b = ([str(t) for t in g.integers(0, 6, k)] for k in (n, m))
        assert common_subsequence(a, b) == slow_lcs(a, b)


def test_rouge_l_by_hand() -> None:
    score = find_metric("rouge_l")(["police kill the gunman"], ["police killed the gunman"])
    assert score == pytest.approx(2 * 3 / 8)
    assert find_metric("rouge_l")(["the gunman kill police"], ["police killed the gunman"]) == 0.5


def test_token_f1_counts_words_with_multiplicity_in_any_order() -> None:
    metric = find_metric("token_f1")
    assert metric(["a a b"], ["b a c"]) == pytest.approx(2 * 2 / 6)
    assert metric(["", "x"], ["", ""]) == pytest.approx(0.5)


def test_words_of_any_language() -> None:
    assert words("L'Été, déjà-vu! Straße ÄÖ") == ["l", "été", "déjà", "vu", "strasse", "äö"]
    assert words("東京は 夜") == ["東京は", "夜"]
    assert words("e\u0301te\u0301") == words("été")


def test_exact_match_forgives_white_space_only() -> None:
    metric = find_metric("exact_match")
    scores = metric.scores(["  a  b ", "A b", "a b"], ["a b", "a b", "a c"])
    assert scores is not None
    assert scores.tolist() == [1.0, 0.0, 0.0]


def grams(text: str, order: int) -> list[str]:
    return [text[i : i + order] for i in range(len(text) - order + 1)]


def slow_chrf(guesses: list[str], truths: list[str]) -> float:
    precision, recall = [], []
    for order in range(1, 7):
        shared = guessed = actual = 0
        for guess, truth in zip(guesses, truths, strict=True):
            a, b = (Counter(grams(t.replace(" ", ""), order)) for t in (guess, truth))
            shared += sum(min(a[gram], b[gram]) for gram in a)
            guessed += sum(a.values())
            actual += sum(b.values())
        if guessed and actual:
            precision.append(shared / guessed)
            recall.append(shared / actual)
    p, r = np.mean(precision), np.mean(recall)
    return float(100 * 5 * p * r / (4 * p + r)) if p + r else 0.0


def test_chrf_is_popovics_formula() -> None:
    guesses = ["the cat sat on the mat", "a dog", "Grüße aus Köln"]
    truths = ["the cat is on the mat", "the dog barked", "Gruß aus Köln"]
    assert find_metric("chrf")(guesses, truths) == pytest.approx(slow_chrf(guesses, truths))
    assert find_metric("chrf")(truths, truths) == pytest.approx(100.0)
    assert find_metric("chrf")(["xyz"], ["abc"]) == 0.0
    assert find_metric("chrf")(["ab"], ["ab"]) == pytest.approx(100.0)


def test_perplexity_of_guessing_is_the_size_of_the_vocabulary() -> None:
    nats = np.array([[3 * math.log(50), 3], [7 * math.log(50), 7]])
    assert find_metric("perplexity")(nats) == pytest.approx(50.0)
    assert find_metric("perplexity")([[800_000.0, 1.0]]) == math.inf
    assert np.isnan(find_metric("perplexity")(np.zeros((0, 2))))
    with pytest.raises(ValueError, match="nats and tokens"):
        find_metric("perplexity")(np.zeros((3, 1)))


def candidates(n: int = 60, m: int = 12) -> tuple[np.ndarray, np.ndarray]:
    g = generator(1, "candidates")
    scores, right = g.normal(size=(n, m)), g.integers(0, m, n)
    scores[np.arange(n), right] += 1.0
    return scores, right


def test_recall_and_reciprocal_rank_without_ties_are_by_sorting() -> None:
    scores, right = candidates()
    rank = (scores > scores[np.arange(60), right][:, None]).sum(1) + 1
    for k in (1, 5, 10):
        assert find_metric(f"recall@{k}")(scores, right) == pytest.approx((rank <= k).mean())
    assert find_metric("mrr")(scores, right) == pytest.approx((1 / rank).mean())
    for k in (1, 3):
        theirs = sk.top_k_accuracy_score(right, scores, k=k, labels=range(12))
        assert find_metric(f"recall@{k}")(scores, right) == pytest.approx(theirs)


def test_ties_are_worth_what_random_order_is_worth() -> None:
    scores = np.array([[2.0, 1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 0.0]])
    right = np.array([[0, 1, 0, 1, 0], [0, 0, 1, 0, 1]])
    g, places = generator(2, "shuffle"), []
    for _ in range(20_000):
        order = np.argsort(-(scores + 1e-9 * g.random(scores.shape)), axis=1)
        places.append(np.take_along_axis(right, order, 1).argmax(1) + 1)
    rank = np.asarray(places)
    for k in (1, 2, 3):
        ours = find_metric(f"recall@{k}").scores(scores, right)
        assert ours == pytest.approx((rank <= k).mean(0), abs=0.015)
    assert find_metric("mrr").scores(scores, right) == pytest.approx((1 / rank).mean(0), abs=0.01)


def test_scoring_everything_alike_is_guessing() -> None:
    flat, right = np.zeros((8, 20)), np.arange(8)
    assert find_metric("recall@1")(flat, right) == pytest.approx(1 / 20)
    assert find_metric("recall@10")(flat, right) == pytest.approx(1 / 2)
    harmonic = sum(1 / r for r in range(1, 21)) / 20
    assert find_metric("mrr")(flat, right) == pytest.approx(harmonic)


def test_the_best_of_several_right_candidates_counts() -> None:
    scores = np.array([[0.1, 0.9, 0.5, 0.4]])
    assert find_metric("mrr")(scores, np.array([[1, 0, 1, 0]])) == 0.5
    nothing = np.array([[0, 0, 0, 0]])
    assert np.isnan(find_metric("mrr")(scores, nothing))
    with pytest.raises(ValueError, match="example 0"):
        find_metric("mrr")(np.array([[np.nan, 1.0]]), np.array([0]))


@pytest.mark.parametrize("name", ["exact_match", "token_f1", "rouge_l"])
def test_text_scores_average_to_the_measure(name: str) -> None:
    guesses, truths = ["a b c", "x", "the end"], ["a c", "x", "an end"]
    metric = find_metric(name)
    scores = metric.scores(guesses, truths)
    assert scores is not None
    assert scores.mean() == pytest.approx(metric(guesses, truths))
    assert np.isnan(metric([], []))
