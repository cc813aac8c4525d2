"""Tokens of spikes against a plain loop, and what happens at the edges."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polytask.data.spike_tokens import SpikeTokenizer, raster_events, whole_bins, whole_counts
from polytask.errors import ConfigError, DataError


def by_hand(counts: np.ndarray, tok: SpikeTokenizer, block: int) -> tuple[list[int], list[int]]:
    """One window, spike by spike."""
    ids, dts = [], []
    for step in range(counts.shape[1]):
        for unit in range(counts.shape[0]):
            for _ in range(counts[unit, step]):
                ids.append(unit)
                dts.append(step)
    ids, dts = ids[-(block - 2) :], dts[-(block - 2) :]
    ids, dts = [tok.sos, *ids, tok.eos], [0, *dts, tok.dt_eos]
    more = block + 1 - len(ids)
    return ids + [tok.pad] * more, dts + [tok.dt_pad] * more


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 5), st.integers(3, 12))
def test_rows_equal_a_loop_over_spikes(seed: int, n: int, width: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    tok = SpikeTokenizer(n, 0.01, width * 0.01, 0.03, block, 9, allow_truncation=True)
    counts = rng.poisson(0.3, (4, n, width))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = tok.encode(counts)
    for b in range(4):
        ids, dts = by_hand(counts[b], tok, block)
        assert rows.ids[b].tolist() == ids
        assert rows.dts[b].tolist() == dts
        assert rows.pad[b] == ids.count(tok.pad)
        assert rows.spikes[b] == counts[b].sum()


def test_vocabularies_follow_the_longer_window() -> None:
    tok = SpikeTokenizer(7, 0.01, 0.05, 0.15)
    assert (tok.sos, tok.eos, tok.pad, tok.n_ids) == (7, 8, 9, 10)
    assert (tok.dt_sos, tok.dt_eos, tok.dt_pad, tok.n_dts) == (16, 17, 18, 19)
    assert SpikeTokenizer(**tok.to_dict()).to_dict() == tok.to_dict()


def test_past_windows_end_where_the_current_ones_start() -> None:
    tok = SpikeTokenizer(3, 0.01, 0.02, 0.03, 6, 8)
    unit, step = np.array([0, 1, 2, 0]), np.array([1, 2, 4, 5])
    rows = tok.rows(unit, step, [4], past=True)  # bins 1, 2, 3
    assert rows.ids[0].tolist() == [3, 0, 1, 4, 5, 5, 5, 5, 5]
    assert rows.dts[0].tolist() == [0, 0, 1, tok.dt_eos, *[tok.dt_pad] * 5]
    now = tok.rows(unit, step, [4])
    assert now.ids[0].tolist() == [3, 2, 0, 4, 5, 5, 5]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_decode_inverts_encode(seed: int) -> None:
    counts = np.random.default_rng(seed).poisson(0.4, (5, 4, 3))
    tok = SpikeTokenizer(4, 0.01, 0.03, 0.05, block=60)
    rows = tok.encode(counts)
    assert np.array_equal(tok.decode_raster(rows.ids, rows.dts), counts)
    row, unit, step = tok.decode(rows.ids, rows.dts, starts=np.arange(5) * 3)
    whole_unit, whole_step = raster_events(counts.transpose(1, 0, 2).reshape(4, -1))
    assert np.array_equal(unit, whole_unit) and np.array_equal(step, whole_step)
    assert np.array_equal(row, step // 3)


def test_the_latest_spikes_are_kept_and_official_slips_at_sos() -> None:
    counts = np.zeros((1, 3, 5), int)
    counts[0, [0, 1, 2, 0], [0, 1, 3, 4]] = 1
    spikes = {"allow_truncation": True, "block": 4}
    with pytest.warns(UserWarning, match=r"50\.00% of the spikes"):
        ours = SpikeTokenizer(3, 0.01, 0.05, 0.05, **spikes).encode(counts)
    with pytest.warns(UserWarning, match="dropped"):
        code = SpikeTokenizer(3, 0.01, 0.05, 0.05, official=True, **spikes).encode(counts)
    assert ours.ids[0].tolist() == [3, 2, 0, 4, 5]
    assert ours.dts[0, :3].tolist() == [0, 3, 4]
    assert code.dts[0, :3].tolist() == [1, 3, 4]  # offset of unit 1, the last one dropped
    assert np.array_equal(code.ids, ours.ids)


def test_more_than_five_per_cent_lost_is_refused() -> None:
    counts = np.ones((2, 3, 5), int)
    with pytest.raises(DataError, match=r"more than 5%.*allow_truncation"):
        SpikeTokenizer(3, 0.01, 0.05, 0.05, block=6).encode(counts)


def test_an_empty_window_is_sos_eos() -> None:
    tok = SpikeTokenizer(2, 0.01, 0.02, 0.02, block=5)
    empty = np.array([], np.int64)
    rows = tok.rows(empty, empty, [0, 10])
    assert rows.ids[1].tolist() == [2, 3, 4, 4, 4, 4]
    assert rows.pad.tolist() == [4, 4] and rows.truncated == 0.0
    assert tok.decode(rows.ids, rows.dts)[0].size == 0


def test_what_a_model_draws_wrongly_is_no_spike() -> None:
    tok = SpikeTokenizer(2, 0.01, 0.02, 0.02, block=6)
    ids = [[tok.sos, 1, tok.sos, 0, tok.pad, 1]]
    dts = [[0, 0, 1, tok.dt_eos, 0, 0]]
    row, unit, step = tok.decode(ids, dts)
    assert (row.tolist(), unit.tolist(), step.tolist()) == ([0], [1], [0])


@pytest.mark.parametrize(
    ("raster", "said"),
    [
        ([[1, -2]], r"negative.*-2 at \(0, 1\)"),
        ([[0.5, 1.0]], r"whole numbers.*0\.5 at \(0, 0\)"),
        ([[np.nan, 1.0]], "whole numbers"),
        ([["a", "b"]], "spike counts, not values of type"),
    ],
)
def test_broken_counts_are_named(raster: list[list[object]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        whole_counts(raster)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 0.055}, "window = 0.055 s is not a whole number of bins"),
        ({"prev_window": -0.1}, "prev_window must be a number of seconds from 0 on"),
        ({"window": 0.0}, "shorter than one bin"),
        ({"dt": 0.0}, "dt must be a positive"),
        ({"block": 2}, "block = 2 has no room"),
        ({"n_units": 0}, "n_units must be at least 1"),
    ],
)
def test_impossible_settings_are_named(options: dict[str, float], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SpikeTokenizer(**{"n_units": 3, **options})  # type: ignore[arg-type]


def test_durations_are_whole_bins_despite_floats() -> None:
    assert whole_bins(0.1 + 0.2, 0.1, "x") == 3
    assert whole_bins(0.15, 0.05, "x") == 3
