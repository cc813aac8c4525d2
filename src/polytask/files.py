"""Files that are either whole or absent: written aside, checksummed, then renamed.

Every artefact (checkpoint, cached data set, merge, evidence) is complete when its manifest
exists; the manifest is written last and holds checksums of every file. They are there to find
damage (flipped bits, torn writes), for which CRC-32 is made and several times as fast as a
cryptographic hash; against a forger, who can rewrite the manifest as well, neither would help.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polytask.errors import CheckpointError, DataError, UserError

MANIFEST = "manifest.json"
BLOCK = 1 << 22  # bytes that one CRC-32 stands for
PIECE = 1 << 18  # bytes handled at a time, few enough to stay in the processor's cache


class Checksum:
    """CRC-32 of every 4 MiB block of a stream of bytes; `text` has 8 hex digits a block.

    A block's CRC finds every change within 32 neighbouring bits, and misses any other with a
    chance of 2^-32.
    """

    def __init__(self) -> None:
        self._blocks: list[int] = []
        self._crc = 0
        self._room = BLOCK

    def add(self, data: memoryview) -> None:
        """Take in the next bytes (a flat view of bytes)."""
        while len(data) > 0:
            part = data[: self._room]
            self._crc = zlib.crc32(part, self._crc)
            self._room -= len(part)
            if not self._room:
                self._blocks.append(self._crc)
                self._crc, self._room = 0, BLOCK
            data = data[len(part) :]

    @property
    def text(self) -> str:
        last = [self._crc] if self._room < BLOCK else []
        return "".join(f"{crc:08x}" for crc in [*self._blocks, *last])


def checksum(data: memoryview) -> str:
    """The `Checksum` text of bytes that are all there; blocks are shared out over threads."""
    blocks = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
    if len(blocks) < 2:
        return "".join(f"{zlib.crc32(block):08x}" for block in blocks)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # crc32 lets others run
        return "".join(f"{crc:08x}" for crc in pool.map(zlib.crc32, blocks))


def crc32(path: Path) -> str:
    """A file's `Checksum`."""
    found, piece = Checksum(), memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as handle:
        while count := handle.readinto(piece):
            found.add(piece[:count])
    return found.text


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes: what manifests of the first version hold."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


KINDS = {"crc32": crc32, "sha256": sha256}  # checksums that a manifest may hold


def _fsync_file(path: Path) -> None:
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def named_os_errors(path: Path) -> Iterator[None]:
    """Turn 'disk full' and 'permission denied' into messages that name the path."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "no space left on the device",
            errno.EDQUOT: "the disk quota is used up",
            errno.EFBIG: "the limit on file sizes is reached",
            errno.EACCES: "permission denied",
            errno.EROFS: "the file system is read-only",
        }
        if error.errno not in reasons:
            raise
        raise DataError(
            f"cannot write {path}: {reasons[error.errno]}. Nothing half-written was left behind; "
            "free some space or choose another folder and run the command again."
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed onto `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with named_os_errors(path):
            yield aside
            _fsync_file(aside)
            aside.replace(path)
            _fsync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file or none of it."""
    with writing(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file or none of it; NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


@contextmanager
def building(folder: Path, known: Mapping[str, str] | None = None) -> Iterator[Path]:
    """Yield a temporary folder; on success add its manifest and rename it to `folder`.

    An existing `folder` is replaced only after the new one is complete. Whoever sums a file while
    writing it puts its `Checksum` text into `known` by file name, and it is not read again.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with named_os_errors(folder):
            aside.mkdir()
            yield aside
            write_manifest(aside, known or {})
            if folder.exists():
                old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
                folder.rename(old)
                aside.rename(folder)
                shutil.rmtree(old)
            else:
                aside.rename(folder)
            _fsync_folder(folder.parent)
    finally:
        if aside.exists():
            shutil.rmtree(aside, ignore_errors=True)


def write_manifest(folder: Path, known: Mapping[str, str]) -> None:
    """List every file below `folder` with size and checksum; written last, flushed first."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {}
    with ThreadPoolExecutor(8) as pool:  # files flushed together share the disk's commits
        list(pool.map(_fsync_file, files))
    for file in files:
        name = file.relative_to(folder).as_posix()
        entries[name] = {"bytes": file.stat().st_size, "crc32": known.get(name) or crc32(file)}
    write_json(folder / MANIFEST, {"files": entries})


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """File name -> {'bytes': size, 'crc32': `Checksum` text}; `CheckpointError` if there is none or
    it is torn."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is incomplete: it has no {MANIFEST}")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {str(name): {"bytes": int(e["bytes"]), **e} for name, e in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def check_size(file: Path, entry: Mapping[str, Any]) -> None:
    """`CheckpointError` when a manifest's file is missing or has another size."""
    if not file.is_file():
        raise CheckpointError(f"{file.parent} is incomplete: {file.name} is missing")
    size = file.stat().st_size
    if size != entry["bytes"]:
        raise CheckpointError(f"{file} is damaged: {size} bytes, expected {entry['bytes']}")


def check_file(file: Path, entry: Mapping[str, Any], found: str | None = None) -> None:
    """`CheckpointError` when a manifest's file is missing or altered. `found`: its `Checksum` text,
    where it has been read already."""
    check_size(file, entry)
    kind = next((kind for kind in KINDS if kind in entry), None)
    if kind is None:
        raise CheckpointError(f"{file.parent / MANIFEST} has no known checksum of {file.name}")
    if found is None or kind != "crc32":
        found = KINDS[kind](file)
    if found != entry[kind]:
        raise CheckpointError(f"{file} is damaged: its checksum differs from the manifest")


def verify_manifest(folder: Path) -> None:
    """Raise `CheckpointError` naming the first file that is missing or altered."""
    for name, entry in read_manifest(folder).items():
        check_file(folder / name, entry)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; a second holder gets a clear error.

    The lock is the operating system's, so it goes away with the process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            raise UserError(
                f"{folder} is in use by another process ({handle.read().strip() or 'unknown'}). "
                "Wait for it, or choose another run folder."
            ) from error
        handle.truncate(0)
        handle.write(f"pid {os.getpid()}")
        handle.flush()
        yield
