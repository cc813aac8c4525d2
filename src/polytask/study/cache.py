"""Finished results, one file per (arm, seed), so that an interrupted proof goes on where it was.

A file's name carries a key over everything that could change the result: the arm's name and
parameters, what it runs, the budget, the size and the version of the code. Nothing is reused
whose key differs. Files are written aside and renamed, so a kill leaves a whole result or none.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import logging
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

import polytask
from polytask import files
from polytask.errors import ConfigError
from polytask.study.records import Arm, Budget, Result

log = logging.getLogger(__name__)
_RESULT: TypeAdapter[Result] = TypeAdapter(Result)
_NO_NUMBERS = ("report", "cli")  # folders that cannot change a result


def default_folder() -> Path:
    """$POLYTASK_CACHE/study, by default ~/.cache/polytask/study."""
    root = os.environ.get("POLYTASK_CACHE") or Path.home() / ".cache" / "polytask"
    return Path(root) / "study"


def code_version(arms: Iterable[Arm]) -> str:
    """A hash over the package's source (without report and cli) and the modules the arms run in.

    Where the source of an arm is unknown (typed into a prompt) the version is never the same
    twice, so that nothing is reused that might have been computed by other code.
    """
    root = Path(polytask.__file__).parent
    sources = [
        path
        for path in sorted(root.rglob("*.py"))
        if path.relative_to(root).parts[0] not in _NO_NUMBERS
    ]
    digest = hashlib.blake2b(digest_size=8)
    for path in sources:
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    for module in sorted({_module_of(arm.run) for arm in arms}):
        try:
            source = inspect.getsource(sys.modules[module])
        except (OSError, TypeError, KeyError):
            source = uuid.uuid4().hex
        digest.update(source.encode())
    return digest.hexdigest()


def _module_of(run: Callable[..., Any]) -> str:
    while isinstance(run, functools.partial):
        run = run.func
    named = run if hasattr(run, "__qualname__") else type(run)
    return str(named.__module__)


def describe(run: Callable[..., Any]) -> str:
    """What an arm runs, in words that are the same in every process.

    A function by its name, a partial with its arguments, a dataclass instance with its fields.
    """
    if isinstance(run, functools.partial):
        return f"{describe(run.func)}{run.args!r}{sorted(run.keywords.items())!r}"
    if dataclasses.is_dataclass(run) and not isinstance(run, type):
        values = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
        return f"{_module_of(run)}.{type(run).__qualname__}{values!r}"
    return f"{_module_of(run)}.{getattr(run, '__qualname__', type(run).__qualname__)}"


def result_path(
    folder: Path, study: str, arm: Arm, seed: int, budget: Budget, size: str, code: str
) -> Path:
    """Where the result of (arm, seed) is kept: STUDY/ARM-seedN-KEY.json."""
    config = {
        "arm": arm.name,
        "params": dict(arm.params),
        "run": describe(arm.run),
        "budget": budget.measured(),
    }
    try:
        text = json.dumps({**config, "size": size, "code": code}, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"arm '{arm.name}': params must be plain JSON values (numbers, text, lists, "
            f"mappings): {error}"
        ) from error
    key = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    return folder / _plain(study) / f"{_plain(arm.name)}-seed{seed}-{key}.json"


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name) or "_"


def save(path: Path, result: Result) -> None:
    """Write a result whole or not at all."""
    try:
        files.write_json(path, _RESULT.dump_python(result, mode="json"))
    except ValueError as error:
        raise ConfigError(f"{path.name}: a result's notes must be plain JSON: {error}") from error


def load(path: Path) -> Result | None:
    """The result kept at `path`; None when there is none or when it is damaged (logged)."""
    if not path.is_file():
        return None
    try:
        return _RESULT.validate_json(path.read_bytes())
    except ValidationError as error:
        log.warning("%s is damaged and will be computed again: %s", path, error)
        return None
