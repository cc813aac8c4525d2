"""Splits: sizes, independence of row order, groups and times kept whole, streams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytask.data.rows import Row
from polytask.tasks.hashing import cell_bytes, content_hashes, mix
from polytask.tasks.splits import (
    TEST,
    TRAIN,
    VALID,
    StreamPart,
    given_part,
    group_keys,
    split_random,
    split_time,
    time_of,
)


def keys_of(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 2**63, count).astype(np.uint64)


@given(st.integers(3, 300), st.sampled_from([0.0, 0.1, 0.25]), st.sampled_from([0.1, 0.2, 0.5]))
def test_random_split_has_the_shares_and_at_least_one_row_each(
    count: int, valid: float, test: float
) -> None:
    part = split_random(keys_of(count), valid, test, 3)
    assert (part == TEST).sum() == min(max(1, round(count * test)), count - 1 - bool(valid))
    assert (part == VALID).sum() == (max(1, round(count * valid)) if valid else 0)
    assert (part == TRAIN).any()


def test_random_split_does_not_depend_on_the_order_of_rows() -> None:
    keys = keys_of(200)
    strata = np.random.default_rng(1).integers(0, 3, 200)
    order = np.random.default_rng(2).permutation(200)
    straight = split_random(keys, 0.1, 0.2, 5, strata)
    shuffled = split_random(keys[order], 0.1, 0.2, 5, strata[order])
    np.testing.assert_array_equal(straight[order], shuffled)


def test_rows_with_equal_content_are_never_parted() -> None:
    keys = np.repeat(keys_of(50), 3)
    part = split_random(keys, 0.2, 0.2, 0).reshape(50, 3)
    assert (part == part[:, :1]).all()


def test_another_seed_gives_another_split() -> None:
    keys = keys_of(100)
    assert (split_random(keys, 0.1, 0.2, 0) != split_random(keys, 0.1, 0.2, 1)).any()


def test_strata_keep_their_shares_to_within_a_row_and_a_train_row_each() -> None:
    strata = np.repeat(np.arange(5), [100, 40, 20, 10, 2])
    part = split_random(keys_of(len(strata)), 0.1, 0.2, 7, strata)
    for stratum, size in enumerate([100, 40, 20, 10, 2]):
        here = part[strata == stratum]
        assert abs((here == TEST).sum() - 0.2 * size) <= 1.5
        assert abs((here == VALID).sum() - 0.1 * size) <= 1.5
        assert (here == TRAIN).any()


def test_a_lone_class_member_stays_in_training() -> None:
    strata = np.r_[np.zeros(30, int), np.arange(1, 11)]
    for seed in range(20):
        part = split_random(keys_of(40), 0.2, 0.2, seed, strata)
        assert (part[30:] == TRAIN).all()


def test_group_split_keeps_groups_whole() -> None:
    groups = [f"patient {i % 17}" for i in range(300)]
    part = split_random(group_keys(groups), 0.2, 0.2, 1)
    for name in set(groups):
        assert len({int(p) for p, g in zip(part, groups, strict=True) if g == name}) == 1
    assert set(part.tolist()) == {TRAIN, VALID, TEST}


def test_time_split_is_ordered_and_never_parts_equal_times() -> None:
    times = np.random.default_rng(0).integers(0, 30, 200).astype(float)
    part = split_time(times, 0.1, 0.2)
    assert times[part == TRAIN].max() < times[part == VALID].min()
    assert times[part == VALID].max() < times[part == TEST].min()


def test_times_are_numbers_dates_and_iso_text() -> None:
    day = 86400.0
    assert time_of(5) == 5.0
    assert time_of("17.5") == 17.5
    assert time_of("1970-01-02") == time_of(date(1970, 1, 2)) == day
    assert time_of(datetime(1970, 1, 2, tzinfo=UTC)) == day
    assert time_of("1970-01-02T00:00:00") == time_of(np.datetime64("1970-01-02")) == day
    with pytest.raises(ValueError, match="neither a number nor an ISO date"):
        time_of("next Tuesday")
    with pytest.raises(ValueError, match="missing"):
        time_of(None)


@pytest.mark.parametrize(
    ("cell", "part"), [("train", TRAIN), ("Validation", VALID), ("dev", VALID), (" TEST ", TEST)]
)
def test_split_names_are_known_by_their_usual_spellings(cell: str, part: int) -> None:
    assert given_part(cell) == part


def test_an_unknown_split_name_is_refused() -> None:
    with pytest.raises(ValueError, match="none of train, valid, test"):
        given_part("holdout")


def test_equal_content_has_equal_hashes_whatever_its_type() -> None:
    rows = [{"a": 1, "b": "x"}, {"a": 1.0, "b": "x"}, {"a": "1", "b": "x"}, {"a": 1, "b": "y"}]
    first, second, third, fourth = content_hashes(rows, ["a", "b"]).tolist()
    assert first == second == third != fourth
    assert cell_bytes(np.zeros(4)) != cell_bytes(np.zeros((2, 2)))


def test_mix_is_a_permutation_on_a_sample() -> None:
    assert len(np.unique(mix(np.arange(100_000, dtype=np.uint64), 9))) == 100_000


@dataclass
class Numbers:
    """An endless stream of its own positions."""

    name: str = "numbers"
    columns: tuple[str, ...] = ("n",)
    reads: int = 0

    def read_from(self, position: int) -> Iterator[Row]:
        while True:
            self.reads += 1
            yield {"n": position}
            position += 1

    def where(self, index: int) -> str:
        return f"numbers, row {index + 1}"


def taken(part: StreamPart, position: int, count: int) -> list[int]:
    return [row["n"] for row in islice(part.read_from(position), count)]


def test_stream_parts_share_out_every_position_exactly_once() -> None:
    sizes = {TRAIN: 7000, VALID: 1000, TEST: 2000}
    found = [
        n
        for part, size in sizes.items()
        for n in taken(StreamPart(Numbers(), part, 0.1, 0.2, 4), 0, size)
    ]
    assert sorted(found) == list(range(10_000))


@pytest.mark.parametrize("part", [TRAIN, VALID, TEST])
def test_seeking_in_a_stream_part_equals_reading_up_to_there(part: int) -> None:
    stream = StreamPart(Numbers(), part, 0.1, 0.2, 4)
    whole = taken(stream, 0, 2500)
    for position in (0, 1, 99, 100, 700, 701, 2000):
        assert taken(stream, position, 5) == whole[position : position + 5]
        assert stream.where(position) == f"numbers, row {whole[position] + 1}"


def test_seeking_far_into_a_stream_reads_little() -> None:
    source = Numbers()
    taken(StreamPart(source, TRAIN, 0.1, 0.2, 0), 10**9, 1)
    assert source.reads <= 1


def test_a_finite_stream_ends_cleanly() -> None:
    @dataclass
    class Short(Numbers):
        def read_from(self, position: int) -> Iterator[Row]:
            yield from ({"n": n} for n in range(position, 1500))

    counts = [
        len(list(StreamPart(Short(), part, 0.1, 0.2, 0).read_from(0)))
        for part in (TRAIN, VALID, TEST)
    ]
    assert sum(counts) == 1500
