"""BERT's and BART's noise: exact counts, the right shares, the text always recoverable."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.errors import ConfigError
from polytask.objectives.denoising import Specials
from polytask.objectives.noise import (
    Bart,
    BartNoise,
    MaskedLM,
    bart_noise,
    infill,
    masked_lm,
    permute_sentences,
)
from polytask.objectives.ul2 import MixtureOfDenoisers, chunk_size_for

MASK, END = 900, 901
SPECIALS = Specials(end=END, mask=MASK)


def distinct(n: int, length: int) -> np.ndarray:
    """Chunks without repeated tokens, so that what stayed can be told by its id."""
    return np.tile(np.arange(length, dtype=np.int32), (n, 1))


def test_masked_tokens_are_exact_and_share_out_80_10_10() -> None:
    n, length = 400, 200
    chunks = np.random.default_rng(0).integers(100, 800, (n, length))
    pairs = masked_lm(chunks, SPECIALS, 0, np.arange(n), vocab_size=850, first_random=100)
    assert pairs.weight is not None
    chosen = pairs.weight.reshape(n, length) > 0
    assert (chosen.sum(1) == 30).all()
    source, target = (ids.reshape(n, length) for ids in (pairs.input_ids, pairs.target_ids))
    assert np.array_equal(target, chunks)
    assert np.array_equal(source[~chosen], chunks[~chosen])
    masked = source[chosen] == MASK
    assert masked.mean() == pytest.approx(0.8, abs=0.015)
    rest = source[chosen][~masked]
    assert (rest == chunks[chosen][~masked]).mean() == pytest.approx(0.5, abs=0.04)
    assert 100 <= rest.min() <= rest.max() < 850


def test_masking_all_of_one_token() -> None:
    pairs = masked_lm(np.array([[5]]), SPECIALS, 0, [0], 10, mask=1.0, random=0.0)
    assert pairs.input_ids.tolist() == [MASK]
    assert pairs.target_ids.tolist() == [5]


@settings(max_examples=80, deadline=None)
@given(
    length=st.integers(2, 120),
    rate=st.sampled_from([0.0, 0.15, 0.3, 0.7]),
    delete=st.sampled_from([0.0, 0.2]),
    rotate=st.sampled_from([0.0, 1.0]),
    stops=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_target_is_the_text_and_the_input_what_noise_leaves(
    length: int, rate: float, delete: float, rotate: float, stops: bool, seed: int
) -> None:
    noise = BartNoise(rate, 3, stops, (3, 7, 30) if stops else (), delete, rotate)
    chunks = distinct(3, length)
    pairs = bart_noise(chunks, SPECIALS, seed, [0, 1, 2], noise)
    gone = int(np.round(rate * length))
    for row in range(3):
        assert pairs.target(row).tolist() == [*range(length), END]
        source = pairs.input(row)[:-1]
        kept = source[source != MASK]
        assert len(set(kept.tolist())) == len(kept)
        assert len(kept) <= length - gone
        if not delete:
            assert len(kept) == length - gone
        if not (delete or rotate or stops):
            assert np.array_equal(kept, np.sort(kept))  # the order stays
    assert pairs.is_original.reshape(3, -1)[:, -1].sum() == 0


def test_spans_have_poisson_lengths() -> None:
    """Between masks, what is missing is as long as a Poisson(3) number (all but the last span)."""
    rows, length = 300, 400
    flat, sizes = infill(distinct(rows, length), MASK, 0.3, 3.0, 1, np.arange(rows))
    lengths: Counter[int] = Counter()
    for part in np.split(flat, np.cumsum(sizes)[:-1]):
        before, masks = -1, 0
        for token in [*part.tolist(), length]:
            if token == MASK:
                masks += 1
                continue
            if masks == 1:  # neighbours cannot be told apart
                lengths[token - before - 1] += 1
            before, masks = token, 0
    total = sum(lengths.values())
    assert lengths[0] / total == pytest.approx(np.exp(-3), abs=0.012)
    mean = sum(size * count for size, count in lengths.items()) / total
    assert mean == pytest.approx(3, abs=0.1)
    spread = sum((size - mean) ** 2 * count for size, count in lengths.items()) / total
    assert spread == pytest.approx(3, abs=0.25)  # a Poisson number's variance is its mean


def test_sentences_are_shuffled_whole() -> None:
    chunk = np.array([1, 2, 0, 3, 0, 4, 5, 6], np.int32)  # 0 ends a sentence
    out = permute_sentences(np.tile(chunk, (6000, 1)), [0], 0, np.arange(6000))
    found = Counter(map(tuple, out.tolist()))
    sentences = [(1, 2, 0), (3, 0), (4, 5, 6)]
    orders = {
        sentences[a] + sentences[b] + sentences[c]
        for a, b, c in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))
    }
    assert set(found) == orders
    assert all(abs(count - 1000) < 120 for count in found.values())


def test_rotation_begins_anywhere() -> None:
    noise = BartNoise(0.0, permute=False, rotate=1.0)
    pairs = bart_noise(distinct(3000, 5), Specials(), 0, np.arange(3000), noise)
    first = pairs.input_ids.reshape(3000, 5)[:, 0]
    assert np.bincount(first) / 3000 == pytest.approx([0.2] * 5, abs=0.03)
    assert ((np.diff(pairs.input_ids.reshape(3000, 5)) % 5) == 1).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: masked_lm(distinct(1, 4), SPECIALS, 0, [0], 10, rate=0.0), r"\(0, 1\]"),
        (lambda: masked_lm(distinct(1, 4), SPECIALS, 0, [0], 10, mask=0.9, random=0.2), "summed"),
        (lambda: masked_lm(distinct(1, 4), Specials(), 0, [0], 10), "no mask token"),
        (lambda: masked_lm(distinct(1, 4), SPECIALS, 0, [0], 10, first_random=10), "no random"),
        (lambda: BartNoise(infill=1.2), "infill is a share"),
        (lambda: BartNoise(span=0.2, permute=False), "at least 1"),
        (lambda: BartNoise(), "name the tokens that end one"),
        (
            lambda: bart_noise(distinct(1, 4), Specials(), 0, [0], BartNoise(permute=False)),
            "needs a mask",
        ),
    ],
)
def test_mistakes_are_named(call: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("length", [2, 3, 4, 7, 31, 200])
def test_the_noises_as_denoisers_keep_within_the_lengths_they_announce(length: int) -> None:
    chunks, rows = distinct(500, length), np.arange(500)
    specials = Specials(end=END, mask=MASK, words=(0, 50))
    for denoiser in (
        MaskedLM(),
        Bart(),
        Bart(BartNoise(0.5, 1.0, False, (), 0.2, 0.5), input_end=False),
    ):
        made = denoiser(chunks, specials, 0, rows)
        longest, target = denoiser.lengths(length)
        ends = int(getattr(denoiser, "input_end", False))
        assert made.input_lengths.max() <= longest + ends
        assert made.target_lengths.max() <= target + 1
        size = chunk_size_for(denoiser, 128)
        assert size.inputs == denoiser.lengths(size.length)[0] + ends <= 128


def test_noises_mix_with_other_denoisers_and_draw_words_alone() -> None:
    mixture = MixtureOfDenoisers((MaskedLM(random=0.2), Bart()), (1, 1))
    specials = Specials(end=END, mask=MASK, words=(3, 9))
    rows = np.arange(40)
    made = mixture.make(lambda at, numbers: distinct(len(numbers), 20), specials, 0, rows)
    assert made.source is not None
    assert set(made.source.tolist()) == {0, 1}
    masked = made.take(np.flatnonzero(made.source == 0))
    changed = masked.input_ids != masked.target_ids
    fresh = masked.input_ids[changed & (masked.input_ids != MASK)]
    assert len(fresh)
    assert ((fresh >= 3) & (fresh < 9)).all()
    with pytest.raises(ConfigError, match="which ids are words"):
        MaskedLM()(distinct(1, 5), Specials(mask=MASK), 0, [0])
