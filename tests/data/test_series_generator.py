"""Generated series: functions of their seed, with the seasons that they are said to have."""

from __future__ import annotations

import numpy as np
import pytest

from polytask.data.calendar import Frequency
from polytask.data.series_generator import SEASONS, generate
from polytask.data.windows import Record, standardise, with_coarser
from polytask.errors import DataError


@pytest.mark.parametrize("frequency", SEASONS)
def test_every_frequency_gives_finite_series_with_its_own_token(frequency: str) -> None:
    records = generate(frequency, 5, 120)
    assert len(records) == 5
    assert all(r.values.shape == (120, 1) and np.isfinite(r.values).all() for r in records)
    assert all(r.frequency == Frequency.named(frequency) for r in records)


def test_series_are_functions_of_seed_and_number() -> None:
    few, many = generate("D", 3, 50, seed=7), generate("D", 130, 50, seed=7)
    assert all(np.array_equal(a.values, b.values) for a, b in zip(few, many))
    assert not np.array_equal(few[0].values, generate("D", 1, 50, seed=8)[0].values)
    assert not np.array_equal(few[0].values, few[1].values)


def test_series_of_one_season_are_alike_a_season_apart() -> None:
    def likeness(season: float) -> float:
        values = np.stack([r.values[:, 0] for r in generate("M", 256, 480, season=season)])
        steps = np.diff(values, axis=1)  # without level and trend
        a, b = steps[:, 12:], steps[:, :-12]
        return float(np.median([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b)]))

    assert likeness(1.0) > likeness(0.0) + 0.2


@pytest.mark.parametrize(("frequency", "count"), [("fortnight", 1), ("D", 0)])
def test_wrong_requests_are_named(frequency: str, count: int) -> None:
    with pytest.raises(DataError, match=r"fortnight|count = 0"):
        generate(frequency, count, 10)


def test_standardised_series_have_mean_0_and_variance_1_of_what_is_seen() -> None:
    values = np.array([[1.0], [np.nan], [3.0], [8.0]], np.float32)
    found = standardise(Record(values, Frequency.named("D")))
    assert found is not None
    assert np.nanmean(found.values) == pytest.approx(0, abs=1e-6)
    assert np.nanstd(found.values) == pytest.approx(1, abs=1e-6)
    assert np.isnan(found.values[1, 0])
    assert standardise(Record(np.full((5, 1), 3.0, np.float32), Frequency.named("D"))) is None


def test_coarser_copies_keep_their_mean_and_name_their_frequency() -> None:
    records = generate("30min", 2, 96)
    found = with_coarser({"made": records}, shortest=40)
    assert set(found) == {"made", "made at h"}
    expected = records[0].values.reshape(48, 2).mean(1)
    assert found["made at h"][0].values[:, 0] == pytest.approx(expected, abs=1e-5)
