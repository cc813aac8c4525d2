"""The ledger, against sums over a list of entries."""

from __future__ import annotations

import json

import numpy as np
import pytest

from polytask.errors import CheckpointError
from polytask.mixture import Ledger

NAMES, SIZES = ("a", "b", "stream"), (10, 4, None)


def filled(seed: int, entries: int = 200) -> tuple[Ledger, np.ndarray]:
    random = np.random.default_rng(seed)
    task = random.integers(0, 3, entries)
    tokens, flops, seconds = random.integers(0, 50, entries), random.random((2, entries)), None
    flops, seconds = flops
    ledger = Ledger(NAMES, SIZES)
    for at in range(0, entries, 16):
        part = slice(at, at + 16)
        ledger.add(task[part], 1, tokens[part], flops[part], seconds[part])
    expected = [
        [(task == t).sum(), *(column[task == t].sum() for column in (tokens, flops, seconds))]
        for t in range(3)
    ]
    return ledger, np.array(expected)


def test_entries_add_up_per_task_though_tasks_repeat_within_a_call() -> None:
    ledger, expected = filled(0)
    np.testing.assert_allclose(ledger.array(), expected, rtol=1e-12)
    np.testing.assert_array_equal(ledger.tokens, expected[:, 1].astype(int))


def test_epochs_are_examples_over_size_and_unknown_for_streams() -> None:
    ledger = Ledger(NAMES, SIZES)
    ledger.add([0, 0, 1, 2])
    np.testing.assert_allclose(ledger.epochs, [0.2, 0.25, np.nan])
    assert ledger.rows()[2]["epochs"] is None


def test_two_ranks_merge_by_addition() -> None:
    one, expected_one = filled(1)
    two, expected_two = filled(2)
    np.testing.assert_allclose((one + two).array(), expected_one + expected_two)
    reduced = Ledger(NAMES, SIZES)
    reduced.load_array(one.array() + two.array())
    assert reduced.state() == (one + two).state()
    with pytest.raises(ValueError, match="same tasks"):
        one + Ledger(("other",))


def test_a_ledger_survives_json_bit_for_bit() -> None:
    ledger, _ = filled(3)
    copy = Ledger(NAMES, SIZES)
    copy.restore(json.loads(json.dumps(ledger.state())))
    assert copy.state() == ledger.state()
    with pytest.raises(CheckpointError, match="ledger is of tasks"):
        Ledger(("a", "b")).restore(ledger.state())


def test_the_time_of_a_step_is_shared_by_its_rows() -> None:
    ledger = Ledger(NAMES)
    ledger.spread_seconds([0, 0, 0, 2], 2.0)
    np.testing.assert_allclose(ledger.seconds, [1.5, 0, 0.5])
    assert ledger.examples.sum() == 0


@pytest.mark.parametrize(
    ("entry", "error"),
    [
        ({"task": [3]}, IndexError),
        ({"task": [-1]}, IndexError),
        ({"task": [0], "tokens": 1.5}, TypeError),
        ({"task": [0], "flops": -1.0}, ValueError),
    ],
)
def test_impossible_entries_are_refused(entry: dict, error: type[Exception]) -> None:
    with pytest.raises(error):
        Ledger(NAMES).add(**entry)


def test_the_table_shows_every_task_and_the_total() -> None:
    ledger = Ledger(NAMES, SIZES)
    ledger.add([0] * 15, tokens=100, flops=2e9, seconds=0.1)
    lines = ledger.table().splitlines()
    assert [line.split()[0] for line in lines] == ["task", "a", "b", "stream", "total"]
    assert lines[1].split() == ["a", "15", "1.50", "1,500", "3e+10", "1.5"]
    assert lines[4].split()[1] == "15"
