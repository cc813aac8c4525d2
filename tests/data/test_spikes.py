"""Recordings: rasters and events agree, files come back whole, mistakes are named."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polytask.data.spikes import Recording
from polytask.errors import DataError


def full(seed: int = 0) -> Recording:
    rng = np.random.default_rng(seed)
    return Recording.from_arrays(
        rng.poisson(0.2, (4, 100)),
        0.01,
        frames=rng.random((20, 2, 3)),
        frame_rate=20,
        behavior={"speed": rng.random(20), "place": ["left", "right"] * 10},
        dt_b=0.05,
        trials=[(0, 0.5), (0.5, 1.0)],
        names=["a", "b", "c", "d"],
        start=3.0,
    )


def equal(a: Recording, b: Recording) -> None:
    for name, one in vars(a).items():
        two = getattr(b, name)
        if isinstance(one, dict):
            assert list(one) == list(two)
            for key in one:
                assert np.array_equal(one[key], two[key]), key
        else:
            assert np.array_equal(one, two), name


def test_a_raster_and_its_events_are_the_same_recording() -> None:
    counts = np.random.default_rng(0).poisson(0.3, (6, 50))
    unit, step = np.repeat(np.argwhere(counts), counts[counts > 0], axis=0).T
    order = np.random.default_rng(1).permutation(len(unit))
    events = Recording.from_arrays(
        units=unit[order], times=step[order] * 0.01, n_units=6, duration=0.5
    )
    raster = Recording.from_arrays(counts)
    equal(raster, events)
    assert np.array_equal(events.raster(), counts)
    assert np.array_equal(events.raster(7, 9), counts[:, 7:9])
    assert np.allclose(raster.rates, counts.sum(axis=1) / 0.5)


def test_times_on_a_bins_edge_belong_to_that_bin() -> None:
    times = np.arange(1, 2000) * 0.01
    rec = Recording.from_arrays(units=np.zeros(1999, int), times=times, duration=20.0)
    assert np.array_equal(rec.step, np.arange(1, 2000))


def test_what_comes_before_a_bin_is_counted_without_float_error() -> None:
    rec = Recording.from_arrays(
        np.zeros((1, 3000)),
        0.01,
        frames=np.zeros((1800, 1, 1)),
        frame_rate=59.94,
        behavior={"speed": np.zeros(1000)},
        dt_b=0.03,
    )
    bins = np.arange(3000)

    frames = [-(-int(b) * 2997 // 5000) for b in bins]
    assert np.array_equal(rec.frames_before(bins), frames)
    starts = [Fraction(k * 50, 2997) for k in range(1800)]
    for b in (0, 1, 17, 1501):
        assert rec.frames_before(np.array(b)) == sum(s < Fraction(b, 100) for s in starts)
    assert np.array_equal(rec.samples_before(bins), -(-bins // 3))


def test_a_slice_is_the_recording_of_that_stretch() -> None:
    rec = full()
    part = rec.slice(25, 75)
    assert np.array_equal(part.raster(), rec.raster(25, 75))
    assert rec.frames is not None and part.frames is not None
    assert np.array_equal(part.frames, rec.frames[5:15])
    assert np.array_equal(part.behavior["speed"], rec.behavior["speed"][5:15])
    assert part.trials is not None and part.trials.tolist() == [[0, 25], [25, 50]]
    assert part.start == pytest.approx(3.25)
    with pytest.raises(DataError, match="start the slice at a multiple of 5 bins"):
        rec.slice(26)
    with pytest.raises(DataError, match="not within the recording's 0 to 100"):
        rec.slice(50, 101)


def test_a_saved_recording_comes_back(tmp_path: Path) -> None:
    rec = full()
    equal(rec, Recording.from_file(rec.save(tmp_path / "a.npz")))
    bare = Recording.from_arrays([[1, 0, 2]])
    equal(bare, Recording.from_npz(bare.save(tmp_path / "b.npz")))


def test_ones_own_npz_is_read_by_names(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).poisson(0.3, (3, 40))
    np.savez(tmp_path / "x.npz", spikes=counts, dt=0.01, behavior_speed=np.arange(8.0), dt_b=0.05)
    rec = Recording.from_npz(tmp_path / "x.npz")
    assert np.array_equal(rec.raster(), counts) and rec.behavior["speed"][3] == 3
    assert Recording.from_npz(tmp_path / "x.npz", names=["p", "q", "r"]).names == ("p", "q", "r")


def test_broken_files_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "odd.npz", spike=np.ones((2, 3)))
    np.savez(tmp_path / "bad.npz", spikes=-np.ones((2, 3)))
    np.savez(tmp_path / "pickle.npz", spikes=np.array([{"a": 1}], dtype=object))
    (tmp_path / "torn.npz").write_bytes(full().save(tmp_path / "f.npz").read_bytes()[:300])
    for name, said in [
        ("none.npz", "does not exist"),
        ("odd.npz", "unknown array 'spike'. Did you mean 'spikes'"),
        ("bad.npz", r"bad\.npz: spike counts cannot be negative"),
        ("pickle.npz", "cannot be read as .npz without pickles"),
        ("torn.npz", "cannot be read as .npz"),
        ("x.mat", r"a recording is a \.npz or an \.nwb"),
    ]:
        with pytest.raises(DataError, match=said):
            Recording.from_file(tmp_path / name)
    with pytest.raises(DataError, match="leave out dt"):
        Recording.from_npz(tmp_path / "f.npz", dt=0.02)


ONES = np.ones((2, 100), int)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"spikes": ONES, "dt": 0}, "dt must be a positive number"),
        ({}, "needs `spikes`"),
        ({"spikes": ONES, "units": [0], "times": [0.0]}, "not both"),
        ({"spikes": np.ones(4)}, r"counts \(units, bins\)"),
        ({"spikes": np.ones((0, 4))}, "empty: 0 units"),
        ({"spikes": ONES, "n_units": 3}, "n_units = 3, but spikes has 2 rows"),
        ({"units": [0, 5], "times": [0.0, 0.1], "n_units": 5}, "unit 5 is not among the 5 units"),
        ({"units": [0, -1], "times": [0.0, 0.1], "n_units": 5}, "unit -1 is not among"),
        ({"units": [0.5], "times": [0.0]}, "units must be whole numbers"),
        ({"units": [0], "times": [np.nan]}, "spike 0 has no finite time"),
        ({"units": [0], "times": [-0.1]}, "-0.1 s is before"),
        ({"units": [0], "times": [2.0], "duration": 1.0}, "lies beyond the duration"),
        ({"units": [0, 1], "times": [2.0]}, "two lists of the same length"),
        ({"spikes": ONES, "frames": np.ones((20, 2, 2))}, "frames need `frame_rate`"),
        ({"spikes": ONES, "frame_rate": 20}, "there are no `frames`"),
        ({"spikes": ONES, "frames": np.ones((20, 2)), "frame_rate": 20}, "height, width"),
        (
            {"spikes": ONES, "frames": np.full((20, 2, 2), np.nan), "frame_rate": 20},
            "frame 0 holds NaN",
        ),
        ({"spikes": ONES, "frames": np.ones((9, 2, 2)), "frame_rate": 20}, "20 frames are needed"),
        (
            {"spikes": ONES, "frames": np.ones((9, 2, 2)), "frame_rate": 20, "shown": [9] * 20},
            "frames 0 to 8",
        ),
        ({"spikes": ONES, "behavior": {"v": np.ones(20)}}, "behaviour needs `dt_b`"),
        (
            {"spikes": ONES, "behavior": {"v": np.ones(19)}, "dt_b": 0.05},
            r"behaviour 'v' has shape \(19,\).*make 20 samples",
        ),
        (
            {"spikes": ONES, "behavior": {"v": [np.inf] * 20}, "dt_b": 0.05},
            "'v' is NaN or infinite at sample 0",
        ),
        ({"spikes": ONES, "names": ["a", "a"]}, "names must be 2 different names"),
        ({"spikes": ONES, "trials": [(0.5, 0.2)]}, "end after they start"),
        ({"spikes": ONES, "trials": [(0.0, 0.5), (0.4, 0.9)]}, "not overlap"),
        ({"spikes": ONES, "trials": [(0.0, 1.5)]}, "reach out of the recording"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        Recording.from_arrays(**options)
