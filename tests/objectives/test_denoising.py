"""Language objectives: nothing lost, counts exact, all noise equally likely, errors with names."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.errors import ConfigError, DataError
from polytask.objectives import draws
from polytask.objectives.denoising import (
    Specials,
    full_lm,
    noise_mask,
    prefix_lengths,
    prefix_lm,
    span_corruption,
    span_sizes,
)
from polytask.objectives.pairs import Pairs
from polytask.objectives.ul2 import (
    RELEASED_TOKENS,
    ChunkSize,
    FullLM,
    MixtureOfDenoisers,
    SpanCorruption,
    chunk_size_for,
    rates_of,
    restored,
    ul2_mixture,
)

SPECIALS = Specials(tuple(range(5000, 5400)), 4000, {"R": 4001, "S": 4002, "X": 4003}, 4004)
SEVEN = ul2_mixture().denoisers


def chunks_of(n: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3000, (n, length), dtype=np.int32)


def runs(mask: np.ndarray) -> int:
    """Runs of True in one row."""
    return int(np.diff(mask.astype(int), prepend=0).clip(0).sum())


@settings(max_examples=150, deadline=None)
@given(
    which=st.integers(0, len(SEVEN) - 1),
    length=st.integers(2, 300),
    n=st.integers(1, 4),
    first=st.integers(0, 2**40),
    seed=st.integers(0, 2**31),
)
def test_input_and_target_merge_back_to_the_chunk(
    which: int, length: int, n: int, first: int, seed: int
) -> None:
    denoiser, chunks = SEVEN[which], chunks_of(n, length, seed % 97)
    pairs = denoiser(chunks, SPECIALS, seed, np.arange(first, first + n))
    assert len(pairs) == n
    longest = denoiser.lengths(length)
    for row in range(n):
        source, target = pairs.input(row), pairs.target(row)
        assert restored(source, target, SPECIALS) == chunks[row].tolist()
        assert source[0] == SPECIALS.modes[str(denoiser.mode)]
        assert source[-1] == target[-1] == SPECIALS.end
        assert (len(source) - 2, len(target) - 1) <= longest
    marks = np.isin(pairs.target_ids, [*SPECIALS.sentinels, SPECIALS.end])
    assert pairs.original is not None
    assert np.array_equal(pairs.original, ~marks)


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(2, 400),
    mean=st.sampled_from([3.0, 8.0, 64.0, 2.5]),
    rate=st.sampled_from([0.15, 0.5, 0.3]),
    seed=st.integers(0, 10**6),
)
def test_noise_and_spans_are_exact_and_never_touch(
    length: int, mean: float, rate: float, seed: int
) -> None:
    sizes = span_sizes(length, mean, rate)
    assert sizes.noise == min(
        max(int(np.round(np.float32(rate) * np.float32(length))), 1), length - 1
    )
    assert sizes.spans == max(1, int(np.round(np.float32(sizes.noise) / np.float32(mean))))
    for row in noise_mask(length, seed, [seed, 7], mean, rate):
        assert row.sum() == sizes.noise
        assert runs(row) == sizes.spans  # touching spans would be fewer runs
        assert not row[0]
        assert row[-1]


def test_every_mask_of_the_algorithm_is_equally_likely() -> None:
    """N = 8, k = 4, s = 2: 3 cuts of the noise times 3 of the kept tokens, 9 masks."""
    rows = 18_000
    found = Counter(map(bytes, noise_mask(8, 5, np.arange(rows), 2.0, 0.5)))
    assert len(found) == 9
    expected = rows / 9
    chi2 = sum((count - expected) ** 2 / expected for count in found.values())
    assert chi2 < 26.1  # 0.999 quantile of chi-squared with 8 degrees of freedom


@pytest.mark.parametrize(("among", "count"), [(5, 2), (5, 4), (6, 3)])
def test_choices_are_uniform_over_sets(among: int, count: int) -> None:
    rows = 20_000
    picked = draws.choose(3, "x", np.arange(rows), among, count)
    found = Counter(map(tuple, picked.tolist()))
    sets = list(combinations(range(among), count))
    assert set(found) == set(sets)
    expected = rows / len(sets)
    assert sum((found[s] - expected) ** 2 / expected for s in sets) < 3.3 * len(sets) + 20


def test_numbers_by_counter_do_not_depend_on_the_batch() -> None:
    one = span_corruption(chunks_of(6, 90), SPECIALS, 1, np.arange(6))
    some = span_corruption(chunks_of(6, 90)[[4, 1]], SPECIALS, 1, [4, 1])
    assert np.array_equal(some.input(0), one.input(4))
    assert np.array_equal(some.target(1), one.target(1))
    again = span_corruption(chunks_of(6, 90), SPECIALS, 2, np.arange(6))
    assert not np.array_equal(again.input(0), one.input(0))
    u = draws.uniform(0, "u", np.arange(4000), 3)
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(u.T)[0, 1]) < 0.06


def test_t5_rounds_in_float32() -> None:
    """At these lengths 0.15 N lies a hair above a half in float32, below or at it in float64."""
    for length in (190, 350, 390):
        single, double = (
            span_sizes(length, 3, 0.15, rounding=r).noise for r in ("float32", "float64")
        )
        assert single == double + 1
    differing = [
        n
        for n in range(2, 400)
        if span_sizes(n, 3, 0.15).noise != span_sizes(n, 3, 0.15, rounding="float64").noise
    ]
    assert differing == [190, 350, 390]


def test_a_worked_example() -> None:
    chunk = np.arange(10)[None]
    pairs = span_corruption(chunk, SPECIALS, 0, [0], 2, 0.4, mode="R")
    first = noise_mask(10, 0, [0], 2, 0.4)[0]
    source: list[int] = [4001]
    target: list[int] = []
    span = -1
    for token in range(10):
        if first[token]:
            if not first[token - 1]:
                span += 1
                source.append(5000 + span)
                target.append(5000 + span)
            target.append(token)
        else:
            source.append(token)
    assert pairs.input(0).tolist() == [*source, 4000]
    assert pairs.target(0).tolist() == [*target, 4000]


TABLE = [
    (3, 0.15, 568, 114),
    (8, 0.15, 588, 100),
    (3, 0.5, 766, 512),
    (8, 0.5, 908, 512),
    (64, 0.15, 600, 92),
    (64, 0.5, 1006, 512),
]


@pytest.mark.parametrize(("mean", "rate", "length", "targets"), TABLE)
def test_chunk_sizes_are_those_of_t5(mean: float, rate: float, length: int, targets: int) -> None:
    """What T5's helper gives for inputs of 512 tokens."""
    assert chunk_size_for(SpanCorruption(mean, rate), 512) == ChunkSize(length, 512, targets)


@settings(max_examples=80, deadline=None)
@given(inputs=st.integers(8, 300), which=st.integers(0, 6), modes=st.booleans())
def test_chunks_fill_the_input_and_never_more(inputs: int, which: int, modes: bool) -> None:
    """Short inputs too, where T5's helper forgets that one span is the least."""
    denoiser = SEVEN[which]
    size = chunk_size_for(denoiser, inputs, modes=modes, balanced=False)
    specials = SPECIALS if modes else Specials(SPECIALS.sentinels, 4000)
    made = denoiser(chunks_of(1, size.length), specials, 0, [0])
    assert made.input_lengths[0] == size.inputs <= inputs
    assert made.target_lengths[0] == size.targets
    longer = denoiser(chunks_of(1, size.length + 1), specials, 0, [0])
    assert longer.input_lengths[0] > inputs


def test_a_target_that_does_not_fit_names_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="targets of 114, but targets_len is 100"):
        chunk_size_for(SpanCorruption(3, 0.15), 512, 100)
    assert chunk_size_for(SpanCorruption(3, 0.15), 512, 114).length == 568
    with pytest.raises(ConfigError, match="no chunk fits"):
        chunk_size_for(SpanCorruption(3, 0.15), 2)


@pytest.mark.parametrize(
    "denoiser", ul2_mixture("decoder").denoisers + ul2_mixture("ul2r").denoisers
)
def test_a_decoders_context_bounds_input_and_target_together(denoiser: SpanCorruption) -> None:
    size = chunk_size_for(denoiser, 128, modes=True, context=128)
    made = denoiser(chunks_of(50, size.length), SPECIALS, 0, np.arange(50))
    longest = int((made.input_lengths + made.target_lengths).max())
    assert 110 <= longest <= 128
    assert chunk_size_for(FullLM(), 128, context=128).length == 128


def test_prefixes() -> None:
    rows = np.arange(9000)
    uniform = prefix_lengths(7, "uniform", False, 0, rows)
    assert set(uniform.tolist()) == set(range(1, 7))
    counts = np.bincount(uniform)[1:]
    assert ((counts - 1500) ** 2 / 1500).sum() < 20.5  # 0.999 of chi-squared, 5 degrees
    assert (prefix_lengths(100, 0.25, False, 0, rows) == 75).all()
    assert (prefix_lengths(2, 0.25, False, 0, rows) == 1).all()
    around = prefix_lengths(101, 0.25, True, 0, rows)
    assert around.min() == 50
    assert around.max() == 100
    assert abs(1 - around.mean() / 101 - 0.26) < 0.01
    pairs = prefix_lm(chunks_of(1, 8), SPECIALS, 0, [0], 0.25, mode="S", input_end=False)
    assert pairs.input(0).tolist() == [4002, *chunks_of(1, 8)[0, :6]]


def test_a_full_language_model_predicts_everything() -> None:
    pairs = full_lm(chunks_of(3, 5))
    assert pairs.input_lengths.tolist() == [0, 0, 0]
    assert np.array_equal(pairs.target_ids.reshape(3, 5), chunks_of(3, 5))
    assert pairs.is_original.all()
    assert full_lm(chunks_of(2, 5), SPECIALS, "S").input(1).tolist() == [4002]
    assert len(full_lm(chunks_of(0, 5))) == 0


def test_the_mixture_draws_by_its_rates_and_keeps_the_order() -> None:
    mixture = ul2_mixture()
    assert mixture.modes == ("R", "S", "X")
    assert mixture.rates == pytest.approx((0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1))
    which = mixture.draw(0, np.arange(20_000))
    assert np.bincount(which) / 20_000 == pytest.approx(mixture.rates, abs=0.012)
    lengths = [chunk_size_for(d, 96, modes=True).length for d in mixture.denoisers]
    rows = np.arange(100, 140)
    pairs = mixture.make(
        lambda at, numbers: np.stack([np.arange(lengths[at]) + n for n in numbers]),
        SPECIALS,
        0,
        rows,
    )
    assert pairs.source is not None
    assert np.array_equal(pairs.source, mixture.draw(0, rows))
    for place, row in enumerate(rows):
        chunk = restored(pairs.input(place), pairs.target(place), SPECIALS)
        assert chunk == list(range(row, row + lengths[pairs.source[place]]))
    assert (pairs.input_lengths <= 96).all()


def test_presets_and_ablations() -> None:
    twenty = {d.name for d in ul2_mixture().denoisers}
    assert {"R (3, 0.15)", "X (64, 0.5)", "S (0.25)"} <= twenty
    assert len(twenty) == 7
    after = ul2_mixture("ul2r")
    assert sum(r for d, r in zip(after.denoisers, after.rates) if d.mode == "S") == 0.5
    assert not any(d.input_end for d in ul2_mixture("decoder").denoisers)  # type: ignore[attr-defined]
    rest = ul2_mixture().without("S")
    assert rest.modes == ("R", "X")
    assert sum(rest.rates) == pytest.approx(1)
    assert rest.rates[0] == pytest.approx(0.25)
    assert RELEASED_TOKENS == {"R": "[NLU]", "S": "[S2S]", "X": "[NLG]"}
    silent = SpanCorruption(mode="")(chunks_of(1, 20), SPECIALS, 0, [0])
    assert silent.input(0)[0] < 3000 or silent.input(0)[0] >= 5000


def test_a_mean_span_of_12_or_a_rate_of_a_third_is_extreme() -> None:
    assert [SpanCorruption(m, r).mode for m, r in ((11.9, 0.29), (12, 0.15), (3, 0.3))] == [
        "R",
        "X",
        "X",
    ]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: span_corruption(chunks_of(1, 1), SPECIALS, 0, [0]), "at least 2 tokens"),
        (lambda: span_corruption(chunks_of(1, 9), SPECIALS, 0, [0], rate=1.0), "between 0 and 1"),
        (lambda: span_corruption(chunks_of(1, 9), SPECIALS, 0, [0], mean_span=0.5), "at least 1"),
        (lambda: span_corruption(chunks_of(1, 9), SPECIALS, 0, [0], spans=0), "at least 1"),
        (lambda: span_corruption(chunks_of(1, 10), SPECIALS, 0, [0], 1, 0.9), "9 spans cannot"),
        (
            lambda: span_corruption(chunks_of(1, 99), Specials((1,)), 0, [0]),
            "has 5 spans.*1 sentinel",
        ),
        (
            lambda: span_corruption(chunks_of(1, 9), SPECIALS, 0, [0], mode="Q"),
            "no token for .*'Q'",
        ),
        (lambda: span_corruption(chunks_of(2, 9), SPECIALS, 0, [0]), "2 chunks but 1 row"),
        (lambda: span_corruption(chunks_of(2, 9)[0], SPECIALS, 0, [0]), r"shape \(n, N\)"),
        (lambda: prefix_lm(chunks_of(1, 9), SPECIALS, 0, [0], 1.5), "in \\(0, 1\\)"),
        (lambda: prefix_lm(chunks_of(1, 9), SPECIALS, 0, [0], 0.75, around=True), "at most 0.5"),
        (lambda: MixtureOfDenoisers(()), "at least one"),
        (lambda: MixtureOfDenoisers(SEVEN, (1.0,)), "1 rates for 7"),
        (lambda: MixtureOfDenoisers(SEVEN, (0.0,) * 7), "more than 0"),
        (lambda: rates_of(SEVEN, {"R": 1.0}), "no share .* S, X"),
        (lambda: ul2_mixture("ul2-20"), "Did you mean 'ul2-20b'"),  # type: ignore[arg-type]
        (lambda: ul2_mixture().without("Q"), "no denoiser"),
    ],
)
def test_mistakes_are_named(call: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()  # type: ignore[operator]


def test_pairs_hold_together() -> None:
    pairs = Pairs.of([[1, 2], [], [3]], [[4], [5, 6], []], source=[0, 1, 2])
    back = pairs.take([2, 0, 0])
    assert [back.input(i).tolist() for i in range(3)] == [[3], [1, 2], [1, 2]]
    assert [back.target(i).tolist() for i in range(3)] == [[], [4], [4]]
    assert back.source is not None
    assert back.source.tolist() == [2, 0, 0]
    marked = Pairs.of([[1]], [[2, 3]], original=[[False, True]])
    both = Pairs.join([pairs, marked])
    assert len(both) == 4
    assert both.is_original.tolist() == [True, True, True, False, True]
    assert both.source is not None
    assert both.source.tolist() == [0, 1, 2, -1]
    assert both.tokens == 9
    assert len(Pairs.join([])) == 0
    assert both.take([]).tokens == 0
    with pytest.raises(DataError, match="1 inputs but 2 targets"):
        Pairs(both.input_ids[:0], np.zeros(2, np.int64), both.input_ids[:0], np.zeros(3, np.int64))
    with pytest.raises(DataError, match="'source' has 1"):
        Pairs.of([[1], [2]], [[1], [2]], source=[1])
    with pytest.raises(DataError, match="run from 0 to the 1 input"):
        Pairs(both.input_ids[:1], np.zeros(2, np.int64), both.input_ids[:0], np.zeros(2, np.int64))
