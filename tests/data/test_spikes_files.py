"""Recordings from NWB files and from nitime."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polytask.data.spikes import Recording
from polytask.data.spikes_nitime import grasshopper
from polytask.errors import ConfigError, DataError

pynwb = pytest.importorskip("pynwb")
BEGIN = 2.0  # behaviour starts two seconds into the session


def write(path: Path, seed: int = 0, units: bool = True) -> dict[str, Any]:
    """A file with three units, two behaviours of different clocks, a film and trials."""
    from pynwb.image import ImageSeries

    rng = np.random.default_rng(seed)
    nwb = pynwb.NWBFile("a test", "x", datetime(2020, 1, 1, tzinfo=UTC))
    truth: dict[str, Any] = {"trains": [np.sort(rng.uniform(0, 12, 200)) for _ in range(3)]}
    if units:
        nwb.add_unit_column("good", "kept after sorting")
        for i, train in enumerate(truth["trains"]):
            nwb.add_unit(spike_times=train, id=10 + i, good=i != 1)
    module = nwb.create_processing_module("behavior", "what the animal did")
    truth["speed"] = rng.random(100)
    module.add(
        pynwb.TimeSeries(
            name="speed", data=truth["speed"], unit="cm/s", rate=10.0, starting_time=BEGIN
        )
    )
    truth["gaze"], stamps = rng.random((500, 2)), BEGIN + np.arange(500) * 0.02
    series = pynwb.behavior.SpatialSeries(
        name="gaze", data=truth["gaze"], timestamps=stamps, reference_frame="screen"
    )
    module.add(pynwb.behavior.Position(spatial_series=series))
    truth["film"] = rng.random((120, 4, 6)).astype(np.float32)
    nwb.add_stimulus(
        ImageSeries(name="film", data=truth["film"], unit="n", rate=10.0, starting_time=0.0)
    )
    for k in range(3):
        nwb.add_trial(start_time=BEGIN + 3.0 * k, stop_time=BEGIN + 3.0 * k + 2.5)
    with pynwb.NWBHDF5IO(str(path), "w") as out:
        out.write(nwb)
    return truth


def test_a_file_becomes_one_grid(tmp_path: Path) -> None:
    truth = write(tmp_path / "a.nwb")
    rec = Recording.from_file(tmp_path / "a.nwb", dt=0.01, frames="film")
    assert rec.n_steps == 1000 and rec.start == BEGIN and rec.names == ("10", "11", "12")
    for unit, train in enumerate(truth["trains"]):
        inside = train[(train >= BEGIN) & (train < 12)] - BEGIN
        mine = rec.step[rec.unit == unit]
        assert np.array_equal(np.sort(mine), np.floor(np.round(inside / 0.01, 6)).astype(int))
    assert np.array_equal(rec.behavior["speed"], np.repeat(truth["speed"], 2).astype(np.float32))
    assert set(rec.behavior) == {"speed", "gaze_0", "gaze_1"}
    held = truth["gaze"][(np.arange(200) * 0.05 / 0.02 + 1e-9).astype(int), 1]
    assert np.array_equal(rec.behavior["gaze_1"], held.astype(np.float32))
    assert rec.frame_rate == 10.0 and rec.shown is not None and rec.frames is not None
    assert np.array_equal(rec.frames[rec.shown], truth["film"][20:])


def test_parts_of_a_file(tmp_path: Path) -> None:
    truth = write(tmp_path / "a.nwb")
    rec = Recording.from_nwb(
        tmp_path / "a.nwb", units="good", behavior=["speed"], frames="film", shrink=2,
        start=4.0, stop=9.0, trials=True,
    )  # fmt: skip
    assert rec.names == ("10", "12") and list(rec.behavior) == ["speed"] and rec.n_steps == 500
    assert rec.trials is not None and rec.trials.tolist() == [[0, 50], [100, 350], [400, 500]]
    assert rec.frames is not None and rec.frames.shape[1:] == (2, 3)
    assert rec.frames[7, 1, 2] == pytest.approx(truth["film"][7, 2:4, 4:6].mean())
    one = Recording.from_nwb(tmp_path / "a.nwb", units=[2], behavior=[])
    assert one.names == ("12",) and not one.behavior and one.start == 0.0


def test_nothing_after_a_sample_reaches_it(tmp_path: Path) -> None:
    write(tmp_path / "a.nwb")
    rec = Recording.from_nwb(tmp_path / "a.nwb", dt_b=0.01)
    jumps = np.flatnonzero(np.diff(rec.behavior["speed"]))
    assert np.array_equal(jumps + 1, np.arange(10, 1000, 10))  # held, not interpolated


def test_mistakes_in_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a.nwb")
    write(tmp_path / "bare.nwb", units=False)
    (tmp_path / "odd.nwb").write_text("not HDF5")
    read = Recording.from_nwb
    for name, options, said in [
        ("none", {}, "does not exist"),
        ("odd", {}, "is not an NWB"),
        ("bare", {}, "no units table"),
        ("a", {"behavior": ["sped"]}, "no time series 'sped'. Did you mean 'speed'"),
        ("a", {"frames": "movie"}, "no image series 'movie'"),
        ("a", {"units": "god"}, "no column 'god'. Did you mean 'good'"),
        ("a", {"units": [7]}, "units are rows 0 to 2; got 7"),
        ("a", {"start": 13.0}, "nothing is left between"),
    ]:
        with pytest.raises(DataError, match=said):
            read(tmp_path / f"{name}.nwb", **options)


def test_the_grasshopper_and_its_sound() -> None:
    pytest.importorskip("nitime")  # of the extra 'starter'; any other fault is one
    rec = grasshopper(1)
    assert rec.n_units == 1 and rec.n_steps == 10_000 and len(rec.unit) == 929
    # A receptor answers loud sound: the envelope before a spike is above its mean.
    sound = rec.behavior["sound"]
    lead = [sound[rec.step[rec.step >= 20] - k].mean() for k in range(20)]
    assert max(lead) > sound.mean() + 0.3 * sound.std()
    assert len(grasshopper(2, dt=0.01, dt_b=0.01).behavior["sound"]) == 1000
    with pytest.raises(ConfigError, match="not 3"):
        grasshopper(3)
    with pytest.raises(ConfigError, match="does not divide"):
        grasshopper(1, dt_b=0.003)
