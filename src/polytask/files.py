"""Files that are either whole or absent: written aside, checksummed, then renamed.

Every artefact (checkpoint, cached data set, merge, evidence) is complete when its manifest
exists; the manifest is written last and holds a checksum per file.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polytask.errors import CheckpointError, DataError, UserError

MANIFEST = "manifest.json"


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes, read in chunks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


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
            with aside.open("rb+") as handle:
                os.fsync(handle.fileno())
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
def building(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; on success add its manifest and rename it to `folder`.

    An existing `folder` is replaced only after the new one is complete.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with named_os_errors(folder):
            aside.mkdir()
            yield aside
            write_manifest(aside)
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


def write_manifest(folder: Path) -> None:
    """List every file below `folder` with size and checksum; written last, flushed first."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    entries = {}
    for file in files:
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
        entries[file.relative_to(folder).as_posix()] = {
            "bytes": file.stat().st_size,
            "sha256": sha256(file),
        }
    write_json(folder / MANIFEST, {"files": entries})


def verify_manifest(folder: Path) -> None:
    """Raise `CheckpointError` naming the first file that is missing or altered."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is incomplete: it has no {MANIFEST}")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{folder} is incomplete: {name} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{file} is damaged: {file.stat().st_size} bytes, expected {entry['bytes']}"
            )
        if sha256(file) != entry["sha256"]:
            raise CheckpointError(f"{file} is damaged: its checksum differs from the manifest")


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
