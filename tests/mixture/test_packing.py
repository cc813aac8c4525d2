"""Packing: nothing lost, nothing mixed, and resumable at every bin."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.errors import ConfigError, DataError
from polytask.mixture import (
    MixtureConfig,
    MixtureSampler,
    Packed,
    Packer,
    Tokens,
    build_sampler,
    pack,
    unpack,
)

lengths_ = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def rows_of(lengths: list[int], labels: bool = False) -> list[Tokens]:
    random = np.random.default_rng(sum(lengths))
    return [
        Tokens(
            random.integers(1, 1000, n),
            task=i % 3,
            weight=float(1 + i % 3),
            labels=random.integers(0, 9, n) if labels else None,
        )
        for i, n in enumerate(lengths)
    ]


def packer_of(rows: list[Tokens], width: int = 16, **settings: object) -> Packer:
    return Packer(lambda first, n: rows[first : first + n], width, **settings)  # type: ignore[arg-type]


def all_of(packer: Packer, bins: int = 3) -> list[Packed]:
    out = []
    while (packed := packer.next(bins)).plan.bins:
        out.append(packed)
    return out


@given(lengths_, st.integers(1, 24))
@settings(deadline=None)
def test_every_token_has_exactly_one_place(lengths: list[int], width: int) -> None:
    plan = pack(lengths, width)
    assert plan.tokens == sum(lengths)
    places = plan.bin * width + plan.offset
    used = np.concatenate([p + np.arange(n) for p, n in zip(places, plan.length)])
    assert len(np.unique(used)) == len(used) == sum(lengths)
    assert (plan.offset + plan.length <= width).all() and used.max() < plan.bins * width
    for row, length in enumerate(lengths):
        mine = np.flatnonzero(plan.row == row)
        spans = sorted((int(plan.start[i]), int(plan.length[i])) for i in mine)
        assert [s for s, _ in spans] == list(range(0, length, width))
        assert sum(n for _, n in spans) == length


@given(lengths_)
def test_at_most_one_bin_is_left_half_empty(lengths: list[int]) -> None:
    plan = pack(lengths, 40)
    filled = np.bincount(plan.bin, weights=plan.length, minlength=plan.bins)
    assert (filled <= 20).sum() <= 1  # else one's pieces would have gone into the other
    assert plan.efficiency == sum(lengths) / (plan.bins * 40)


def test_best_fit_decreasing_finds_the_perfect_packing_that_first_come_first_served_misses() -> (
    None
):
    lengths = [3, 3, 3, 7, 7, 7, 4, 6]
    assert pack(lengths, 10).bins == sum(lengths) // 10


@pytest.mark.parametrize("strategy", ["decreasing", "streaming"])
@given(lengths=lengths_, shuffle=st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_unpacking_in_any_order_gives_back_the_rows(
    strategy: str, lengths: list[int], shuffle: object
) -> None:
    rows = rows_of(lengths, labels=True)
    packer = packer_of(rows, strategy=strategy, buffer=7, open_bins=3)
    batches = all_of(packer)
    shuffle.shuffle(batches)  # type: ignore[attr-defined]
    found = unpack(batches)
    assert sorted(found) == list(range(len(rows)))
    for number, row in enumerate(rows):
        np.testing.assert_array_equal(found[number], row.ids)
    assert packer.tokens == sum(lengths)
    assert packer.bins == sum(b.plan.bins for b in batches)


@pytest.mark.parametrize("strategy", ["decreasing", "streaming"])
def test_arrays_say_segment_position_weight_and_label_of_every_token(strategy: str) -> None:
    rows = rows_of([5, 20, 3, 16, 9, 2, 2, 7], labels=True)
    for packed in all_of(packer_of(rows, strategy=strategy)):
        plan = packed.plan
        seen = np.zeros_like(packed.ids, dtype=bool)
        for at, row in enumerate(plan.row):
            source = rows[row]
            span = slice(plan.offset[at], plan.offset[at] + plan.length[at])
            part = slice(plan.start[at], plan.start[at] + plan.length[at])
            place = (plan.bin[at], span)
            np.testing.assert_array_equal(packed.ids[place], source.ids[part])
            np.testing.assert_array_equal(packed.labels[place], source.labels[part])
            np.testing.assert_array_equal(packed.position[place], np.arange(plan.length[at]))
            assert (packed.segment[place] == plan.segment[at]).all()
            assert (packed.weight[place] == source.weight).all()
            assert packed.task[at] == source.task
            seen[place] = True
        assert (packed.segment[~seen] == -1).all() and (packed.weight[~seen] == 0).all()
        assert (packed.labels[~seen] == -100).all() and (packed.ids[~seen] == 0).all()


@pytest.mark.parametrize("strategy", ["decreasing", "streaming"])
def test_a_restart_before_any_bin_gives_the_same_bins(strategy: str) -> None:
    random = np.random.default_rng(3)
    rows = rows_of(random.integers(1, 40, 70).tolist(), labels=True)

    def fresh() -> Packer:
        return packer_of(rows, strategy=strategy, buffer=16, open_bins=4)

    unbroken = fresh()
    for expected in all_of(fresh(), bins=1):
        state = json.loads(json.dumps(unbroken.state()))
        resumed = fresh()
        resumed.restore(state)
        for packed in (resumed.next(1), unbroken.next(1)):
            for name in ("ids", "segment", "position", "weight", "labels", "task"):
                np.testing.assert_array_equal(getattr(packed, name), getattr(expected, name))
            np.testing.assert_array_equal(packed.plan.row, expected.plan.row)
        assert resumed.state() == unbroken.state()


def test_the_state_of_a_buffered_packer_is_five_small_entries() -> None:
    packer = packer_of(rows_of([3] * 100))
    packer.next(4)
    assert packer.state() == {"row": 0, "taken": 4, "waiting": [], "bins": 4, "tokens": 60}


@pytest.mark.parametrize("strategy", ["decreasing", "streaming"])
def test_weights_of_tasks_survive_packing(strategy: str) -> None:
    rows = rows_of(np.random.default_rng(5).integers(1, 40, 90).tolist())
    for weigh in ("token", "row"):
        total = np.zeros(3)
        for packed in all_of(packer_of(rows, strategy=strategy, weigh=weigh)):
            piece, step = np.repeat(np.arange(len(packed.task)), packed.plan.length), None
            step = np.concatenate([np.arange(n) for n in packed.plan.length])
            place = (packed.plan.bin[piece], packed.plan.offset[piece] + step)
            np.add.at(total, packed.task[piece], packed.weight[place])
        size = (lambda row: len(row.ids)) if weigh == "token" else (lambda row: 1)
        expected = [sum(r.weight * size(r) for r in rows if r.task == t) for t in range(3)]
        np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_short_rows_are_packed_to_more_than_nine_tenths() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 3000).tolist()
    for strategy in ("decreasing", "streaming"):
        packer = packer_of(rows_of(lengths), width=128, strategy=strategy)
        all_of(packer, bins=16)
        assert packer.efficiency > 0.95


def test_long_rows_and_empty_rows_are_named() -> None:
    rows = rows_of([4, 30, 2])
    with pytest.raises(DataError, match=r"reviews\.csv, line 3 has 30 tokens"):
        packer_of(rows, long="refuse", name=lambda row: f"reviews.csv, line {row + 2}").next(1)
    with pytest.raises(DataError, match="row 0 has no tokens"):
        packer_of([Tokens(np.zeros(0, dtype=np.int64))]).next(1)
    with pytest.raises(DataError, match="row 1 has 30 tokens"):
        pack([4, 30], 16, long="refuse")


def test_labels_have_to_align_or_be_absent_everywhere() -> None:
    one, two = rows_of([4, 3], labels=True)
    with pytest.raises(DataError, match="row 1: labels do not align"):
        packer_of([one, Tokens(two.ids)]).next(1)
    assert packer_of([Tokens(one.ids)]).next(1).labels is None


@pytest.mark.parametrize("settings", [{"width": 0}, {"buffer": 0}, {"strategy": "tight"}])
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        packer_of([], **{"width": 8, **settings})  # type: ignore[arg-type]


def test_a_missing_piece_is_noticed() -> None:
    batches = all_of(packer_of(rows_of([40])), bins=1)
    with pytest.raises(ValueError, match="row 0 is not whole"):
        unpack(batches[1:])


def test_forty_packed_steps_of_three_tasks_resume_at_every_step() -> None:
    config = MixtureConfig(policy="temperature")
    sizes = (30, 90, 250)
    texts = [
        [np.arange(n) + 1000 * g for n in np.random.default_rng(g).integers(3, 40, size)]
        for g, size in enumerate(sizes)
    ]

    def fresh() -> tuple[MixtureSampler, Packer]:
        sampler = build_sampler(config, ("a", "b", "c"), sizes, 0, 8)

        def read(first: int, n: int) -> list[Tokens]:
            draw = sampler.draw(first, n)
            return [Tokens(texts[g][i], task=int(g)) for g, i in zip(draw.group, draw.index)]

        return sampler, Packer(read, 64, buffer=50)

    _, packer = fresh()
    states, unbroken = [], []
    for _ in range(40):
        states.append(json.dumps(packer.state()))
        unbroken.append(packer.next(2))
    for stop in range(40):
        _, resumed = fresh()
        resumed.restore(json.loads(states[stop]))
        for expected in unbroken[stop : stop + 3]:
            packed = resumed.next(2)
            np.testing.assert_array_equal(packed.ids, expected.ids)
            np.testing.assert_array_equal(packed.segment, expected.segment)
            np.testing.assert_array_equal(packed.plan.row, expected.plan.row)
    pieces = np.concatenate([p.plan.row for p in unbroken])
    assert set(range(int(pieces.max()) - 50)) <= set(pieces.tolist())  # no row was skipped
