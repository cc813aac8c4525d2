"""Looks at a folder of data and writes a configuration with the tasks that it suggests.

Every proposal says why, in a comment, from what was counted; nothing is guessed silently. What
could be a task but is less likely stands there as a comment, ready to be switched on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from polytask.data.images import SUFFIXES
from polytask.data.open import (
    FORMATS,
    SPLIT_NAMES,
    data_files,
    is_saved,
    missing_file,
    open_rows,
    split_of,
)
from polytask.data.profile import profile
from polytask.data.rows import MemoryRows, RowSource
from polytask.data.spec import DataSpec
from polytask.data.suggest import Proposal, suggest
from polytask.errors import DataError

_LARGE = 200_000_000  # bytes of a file above which only its first rows are looked at
_FIRST = 50_000

_HEAD = """\
# Tasks that the data in {folder} suggest. Each comment says what was seen; change what is wrong,
# delete what you do not want, then run:  polytask train THIS_FILE
"""


def propose(folder: Path) -> str:
    """Commented YAML with a task for whatever the files suggest; paths are relative to `folder`.

    Files that cannot be read are named in a comment. `DataError` when nothing can be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise missing_file(folder) if not folder.exists() else DataError(f"{folder} is no folder")
    found = list(_sources(folder))
    proposals: list[Proposal] = []
    left_out: list[str] = []
    for source in found:
        try:
            made = _proposals(source, folder)
            if not made:
                left_out.append(f"# Left out: {source.name}: no column looks like a label or text")
            proposals += made
        except DataError as error:
            reason = str(error).replace("\n", " ")
            left_out.append(f"# Left out: {source.name}: {reason}")
    if not any(proposal.active for proposal in proposals):
        reasons = "\n".join(left_out) or f"It should hold {', '.join(FORMATS)} files or images."
        raise DataError(f"no task can be proposed from {folder}.\n{reasons}")
    return _yaml(folder, _unique_names(proposals), left_out)


@dataclass(frozen=True)
class _Found:
    """A data set of the folder: one file, files per split, or a folder of its own."""

    name: str
    data: Any  # what goes into the configuration
    look: str  # the path that is looked at
    bytes: int = 0
    notes: tuple[str, ...] = field(default=())


def _sources(folder: Path) -> Iterator[_Found]:
    if _is_one_set(folder):
        yield _Found(folder.resolve().name, {"path": "."}, ".")
        return
    folders = [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    sets = [p for p in folders if _is_one_set(p)]
    for part in sets:
        yield _Found(part.name, part.name, part.name)
    files = [file for file in data_files(folder) if not any(part in file.parents for part in sets)]
    by_split: dict[tuple[Path, str], dict[str, Path]] = {}
    for file in files:
        split = split_of(file, folder)
        if split is None:
            size = file.stat().st_size
            relative = file.relative_to(folder).as_posix()
            yield _Found(_stem(file), relative, relative, size)
        else:
            words = re.split(r"[-_]", _stem(file))
            rest = "_".join(word for word in words if word.lower() not in SPLIT_NAMES)
            by_split.setdefault((file.parent, rest), {}).setdefault(split, file)
    for (parent, rest), parts in by_split.items():
        names = {split: file.relative_to(folder).as_posix() for split, file in parts.items()}
        shown = next(iter(names.values())) if "train" not in names else names["train"]
        size = (folder / shown).stat().st_size
        name = rest or (parent.name if parent != folder else folder.resolve().name)
        if "train" in names:
            yield _Found(name, names, shown, size)
        else:
            yield _Found(name, shown, shown, size)


def _is_one_set(folder: Path) -> bool:
    """Saved by Hugging Face, or a folder of images by class or with one table."""
    if is_saved(folder):
        return True
    inner = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    tables = [p for p in data_files(folder) if p.parent == folder]
    if _has_images(folder):
        return len(tables) == 1
    if inner and all(part.name.lower() in SPLIT_NAMES for part in inner):
        return not tables and all(_is_one_set(part) for part in inner)
    return not tables and len(inner) >= 2 and all(map(_has_images, inner))


def _has_images(folder: Path) -> bool:
    return any(file.suffix.lower() in SUFFIXES for file in folder.iterdir())


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


def _proposals(found: _Found, folder: Path) -> list[Proposal]:
    spec: dict[str, Any] = {"path": found.look}
    large = found.bytes > _LARGE
    note = ""
    if (folder / found.look).is_dir():
        source, data = _open_set(found, folder)
    else:
        spec["streaming"] = large
        opened = open_rows(DataSpec.of(spec), folder)
        data = found.data
        if isinstance(opened, RowSource):
            source = opened
        else:
            rows = list(islice(opened.read_from(0), _FIRST))
            source = MemoryRows(rows, opened.name)
            note = f"looked at the first {len(rows):,} rows; the file is read as a stream"
            data = {"path": found.look, "streaming": True}
    if not len(source):
        raise DataError(f"{found.look} has no rows")
    given = isinstance(data, Mapping) and "train" in data
    return suggest(found.name, data, source, profile(source), given, note)


def _open_set(found: _Found, folder: Path) -> tuple[RowSource, Any]:
    from polytask.data.open import WHOLE, open_splits

    splits = open_splits(DataSpec.of({"path": found.look}), folder)
    first = splits.get("train") or next(iter(splits.values()))
    if not isinstance(first, RowSource):
        raise DataError(f"{found.look} is a stream")
    if set(splits) == {WHOLE} or "train" not in splits:
        return first, found.look
    return first, {name: {"path": found.look, "split": name} for name in splits}


def _unique_names(proposals: Sequence[Proposal]) -> list[Proposal]:
    taken: set[str] = set()
    named = []
    for proposal in proposals:
        name, number = proposal.name, 2
        while name in taken:
            name, number = f"{proposal.name}_{number}", number + 1
        taken.add(name)
        named.append(proposal.renamed(name))
    return named


def _yaml(folder: Path, proposals: Sequence[Proposal], left_out: Sequence[str]) -> str:
    lines = [_HEAD.format(folder=folder), *left_out, "tasks:"]
    for proposal in proposals:
        mark = "" if proposal.active else "# "
        lines += ["", *(f"  # {reason}" for reason in proposal.reasons)]
        lines.append(f"  {mark}{scalar(proposal.name)}:")
        for key, (value, why) in proposal.keys.items():
            comment = f"  # {why}" if why else ""
            lines.append(f"  {mark}  {key}: {flow(value)}{comment}")
    return "\n".join(lines) + "\n"


_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*(?: [A-Za-z0-9_./-]+)*")
_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}


def scalar(value: Any) -> str:
    """A value as YAML on one line, quoted where YAML would read something else."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)


def flow(value: Any) -> str:
    """Mappings and lists in YAML's one-line form."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{scalar(k)}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(flow(item) for item in value) + "]"
    return scalar(value)
