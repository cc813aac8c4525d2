"""Measures of written text, and perplexity.

Words are runs of letters and digits, lower case (Unicode), so every language counts; no stemming,
no stop words. ROUGE-L: F1 of the longest common subsequence of words (Lin 2004). chrF: character
1- to 6-grams, beta 2, pooled over the corpus (Popovic 2015). Token F1: overlap of word bags.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from polytask.evaluate.metric import (
    METRICS,
    Floats,
    Metric,
    finite,
    mean_sums,
    ratio,
    same_length,
    with_weight,
)

_WORD = re.compile(r"\w+")
ORDERS = 6
BETA = 2.0


def words(text: str) -> list[str]:
    """Lower-case words of a text, composed Unicode form."""
    return _WORD.findall(unicodedata.normalize("NFC", text).casefold())


def _same_text(guess: str, truth: str) -> float:
    def plain(text: str) -> str:
        return " ".join(unicodedata.normalize("NFC", text).split())

    return float(plain(guess) == plain(truth))


def _overlap(shared: int, guess: int, truth: int) -> float:
    """F1 of two lengths and what they share; two empty texts are equal."""
    if guess == 0 and truth == 0:
        return 1.0
    return 2 * shared / (guess + truth)


def _bag_f1(guess: str, truth: str) -> float:
    a, b = Counter(words(guess)), Counter(words(truth))
    return _overlap((a & b).total(), a.total(), b.total())


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, one machine-integer row per word of `b`.

    Bit-parallel (Allison & Dix 1986; Hyyro 2004): V starts as all ones, and for each word with
    occurrence mask M: V = (V + (V & M)) | (V & ~M); the zeros of V count the matches.
    """
    where: dict[str, int] = {}
    for i, word in enumerate(a):
        where[word] = where.get(word, 0) | (1 << i)
    full = (1 << len(a)) - 1
    v = full
    for word in b:
        match = v & where.get(word, 0)
        v = ((v + match) | (v - match)) & full
    return len(a) - v.bit_count()


def _rouge_l(guess: str, truth: str) -> float:
    a, b = words(guess), words(truth)
    return _overlap(common_subsequence(a, b), len(a), len(b))


def _per_text(score: Callable[[str, str], float]) -> Callable[[Any, Any], Floats]:
    def sums(prediction: Any, target: Any) -> Floats:
        same_length(prediction, target)
        values = [score(str(p), str(t)) for p, t in zip(prediction, target, strict=True)]
        return with_weight(np.asarray(values, np.float64).reshape(-1), np.ones(len(values)))

    return sums


def _grams(text: str) -> list[Counter[str]]:
    dense = "".join(text.split())
    return [
        Counter(dense[i : i + order] for i in range(len(dense) - order + 1))
        for order in range(1, ORDERS + 1)
    ]


def _chrf_sums(prediction: Any, target: Any) -> Floats:
    """(n, 3 * ORDERS): shared, predicted and actual n-grams of each order."""
    same_length(prediction, target)
    rows = np.zeros((len(prediction), 3, ORDERS))
    for i, (guess, truth) in enumerate(zip(prediction, target, strict=True)):
        for k, (a, b) in enumerate(zip(_grams(str(guess)), _grams(str(truth)), strict=True)):
            rows[i, :, k] = (a & b).total(), a.total(), b.total()
    return rows.reshape(len(rows), 3 * ORDERS)


def _chrf(sums: Floats) -> Floats:
    """100 (1 + beta^2) P R / (beta^2 P + R), P and R averaged over the orders both sides have."""
    shared, guessed, actual = np.split(sums, 3, axis=-1)
    both = (guessed > 0) & (actual > 0)
    orders = both.sum(-1).astype(np.float64)
    precision = ratio(np.where(both, ratio(shared, guessed), 0.0).sum(-1), orders)
    recall = ratio(np.where(both, ratio(shared, actual), 0.0).sum(-1), orders)
    empty = (guessed.sum(-1) == 0) & (actual.sum(-1) == 0)
    score = 100 * (1 + BETA**2) * ratio(precision * recall, BETA**2 * precision + recall)
    return np.where(empty, 100.0, np.nan_to_num(score, nan=0.0))


def _likelihood(prediction: Any, target: Any = None) -> Floats:
    """(n, 2): negative log-likelihood in nats and tokens of each text."""
    rows = finite(prediction).astype(np.float64)
    if rows.ndim != 2 or rows.shape[1] != 2:
        raise ValueError(f"perplexity takes (n, 2): nats and tokens, got shape {rows.shape}")
    return rows


def _perplexity(sums: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.exp(mean_sums(sums))


for entry in (
    Metric(
        "exact_match",
        True,
        _per_text(_same_text),
        mean_sums,
        mean_of_scores=True,
        about="share of texts equal up to white space",
    ),
    Metric(
        "token_f1",
        True,
        _per_text(_bag_f1),
        mean_sums,
        mean_of_scores=True,
        about="overlap of the words, in any order",
    ),
    Metric(
        "rouge_l",
        True,
        _per_text(_rouge_l),
        mean_sums,
        mean_of_scores=True,
        about="longest common subsequence of words, F1",
    ),
    Metric("chrf", True, _chrf_sums, _chrf, unit="0-100", about="character n-grams, F2, pooled"),
    Metric(
        "perplexity",
        False,
        _likelihood,
        _perplexity,
        about="exp of the mean negative log-likelihood of a token",
    ),
):
    METRICS.add(entry.name, entry)
