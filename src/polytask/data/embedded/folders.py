"""Cache folders: is one whole, and who may build it. Shared by data sets and converted models."""

from __future__ import annotations

import fcntl
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from polytask.errors import CheckpointError
from polytask.files import named_os_errors, verify_manifest

Signature = tuple[tuple[str, int, int, int], ...]
_verified: dict[Path, Signature] = {}


def whole(folder: Path, warn: bool = False) -> bool:
    """True when the folder is complete and unaltered; with `warn`, damage is said aloud.

    Checksums are computed once per process and again when a file's size, time or inode changes.
    """
    if not folder.is_dir():
        return False
    signature = _signature(folder)
    if _verified.get(folder) == signature:
        return True
    try:
        verify_manifest(folder)
    except CheckpointError as error:
        if warn:
            warnings.warn(f"cached data damaged, building it again: {error}", stacklevel=5)
        return False
    _verified[folder] = signature
    return True


@contextmanager
def builders_lock(folder: Path) -> Iterator[None]:
    """Hold the right to build a cache folder; a second builder waits for the first."""
    with named_os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = (folder.parent / f".{folder.name}.lock").open("a")
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _signature(folder: Path) -> Signature:
    stats = ((path.name, path.stat()) for path in sorted(folder.iterdir()))
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in stats)
