"""The seasonal naive forecast against a loop."""

from __future__ import annotations

import numpy as np

from polytask.infer.naive import seasonal_naive


def test_it_repeats_the_last_season() -> None:
    past = np.arange(10, dtype=np.float32).reshape(1, 10, 1)
    assert seasonal_naive(past, 4, 6)[0, :, 0].tolist() == [6, 7, 8, 9, 6, 7]
    assert seasonal_naive(past, 1, 3)[0, :, 0].tolist() == [9, 9, 9]


def test_a_missing_step_is_taken_from_the_season_before_and_else_from_the_last_value() -> None:
    random = np.random.default_rng(0)
    past = random.normal(size=(6, 17, 2)).astype(np.float32)
    past[random.random(past.shape) < 0.5] = np.nan
    past[0, :, 0] = np.nan
    found = seasonal_naive(past, 5, 8)
    for n in range(6):
        for c in range(2):
            seen = np.flatnonzero(np.isfinite(past[n, :, c]))
            for h in range(8):
                same = [t for t in seen if (17 + h - t) % 5 == 0]
                place = same or list(seen)
                expected = past[n, place[-1], c] if place else np.nan
                np.testing.assert_equal(found[n, h, c], expected)
