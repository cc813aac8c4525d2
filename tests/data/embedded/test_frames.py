"""Tables stored as pickles are read right, and nothing in them is run."""

from __future__ import annotations

import lzma
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from polytask.data.embedded.frames import read_frame, record


def stored(path: Path, value: object) -> Path:
    path.write_bytes(lzma.compress(pickle.dumps(value, protocol=5)))
    return path


def test_a_table_of_numbers_reads_as_pandas_wrote_it(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "rownames": np.arange(5),
            "Demand": np.linspace(0, 1, 5),
            "WorkDay": np.array([0, 1, 1, 0, 1]),
            "Temperature": np.array([1.5, np.nan, -3.0, 0.0, 9.25]),
        }
    )
    # Columns as Python objects, as in files that older versions of pandas wrote.
    frame.columns = pd.Index(list(frame.columns), dtype=object)
    ours = read_frame(stored(tmp_path / "t.xz", frame))
    assert list(ours) == list(frame.columns)
    for name, values in ours.items():
        np.testing.assert_array_equal(values, frame[name].to_numpy())


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


def test_a_harmful_file_runs_nothing(tmp_path: Path) -> None:
    victim = tmp_path / "touched"
    path = stored(tmp_path / "evil.xz", Harmful(victim))
    with pytest.raises(ValueError, match=r"evil\.xz is not a table of numbers"):
        read_frame(path)
    assert not victim.exists()
    pickle.loads(lzma.decompress(path.read_bytes()))
    assert victim.exists(), "unpickling would have run it"


@pytest.mark.parametrize("value", [1, {"a": [1, (2, 3.5, None, True)]}, ["x", b"y"], ()])
def test_plain_values_are_recorded_as_they_are(value: object) -> None:
    assert record(pickle.dumps(value, protocol=5)) == value


def test_what_is_no_table_of_numbers_is_refused(tmp_path: Path) -> None:
    for value in (3, {"_mgr": 1}, pd.DataFrame({"a": ["text", "more"]})):
        with pytest.raises(ValueError, match=r"table|numbers"):
            read_frame(stored(tmp_path / "x.xz", value))
    (tmp_path / "x.xz").write_bytes(b"not xz at all")
    with pytest.raises(ValueError, match=r"x\.xz is not a table"):
        read_frame(tmp_path / "x.xz")
    with pytest.raises(ValueError, match="exhausted"):
        record(pickle.dumps([1], protocol=5)[:-1])
