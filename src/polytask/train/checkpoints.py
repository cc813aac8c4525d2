"""Checkpoints: safetensors and JSON in one folder a step, complete when the manifest exists.

    checkpoints/step-00000200/
        model.safetensors  optimizer.safetensors  ema.safetensors  rest.safetensors
        state.json         step, stage and the state of everything that is not a tensor
        config.json        what the run was started with
        manifest.json      a checksum per file; written last

A folder is written aside and renamed, older ones go only after it is complete. Nothing is ever
unpickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from polytask import files
from polytask.errors import CheckpointError
from polytask.train import tensorfile
from polytask.train.optim import id_of

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on: groups of tensors by file name, and plain values."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]  # 'model', 'optimizer', ...
    state: Mapping[str, Any]  # JSON values
    config: Mapping[str, Any]


def folder_of(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08d}"


def save(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint; `DataError` when the disk is full, and nothing is left half-written.

    The oldest beyond `keep` are removed after the new one is complete.
    """
    folder = folder_of(run, checkpoint.step)
    sums: dict[str, str] = {}
    with files.building(folder, sums) as aside:
        aliases = {}
        for name, tensors in checkpoint.tensors.items():
            file = f"{name}.safetensors"
            aliases[name], sums[file] = write_tensors(aside / file, tensors)
        _write_plain(aside / "config.json", dict(checkpoint.config))
        plain = {"step": checkpoint.step, "aliases": aliases, "state": dict(checkpoint.state)}
        _write_plain(aside / "state.json", plain)
    for old in _folders(run)[keep:]:
        shutil.rmtree(old)
    return folder


def load(folder: Path) -> Checkpoint:
    """Read and verify a checkpoint in one pass; `CheckpointError` names a missing or altered
    part."""
    entries = files.read_manifest(folder)
    for file, entry in entries.items():
        files.check_size(folder / file, entry)
    for file in ("state.json", "config.json"):
        files.check_file(folder / file, _entry(folder, entries, file))
    plain = read_plain(folder / "state.json")
    tensors = {}
    for name, aliases in plain["aliases"].items():
        file = f"{name}.safetensors"
        entry = _entry(folder, entries, file)
        tensors[name] = read_tensors(folder / file, aliases, entry)
    return Checkpoint(plain["step"], tensors, plain["state"], read_plain(folder / "config.json"))


def _entry(folder: Path, entries: Mapping[str, Any], file: str) -> dict[str, Any]:
    if file not in entries:
        raise CheckpointError(f"{folder} is incomplete: its manifest does not name {file}")
    entry: dict[str, Any] = entries[file]
    return entry


def load_newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete and unaltered checkpoint of a run, and why newer ones were refused.

    None when the run has no checkpoint at all; `CheckpointError` when it has some and none is
    valid, since starting afresh would throw the run away silently.
    """
    refused: list[str] = []
    for folder in _folders(run):
        try:
            return load(folder), refused
        except CheckpointError as error:
            refused.append(str(error))
    if refused:
        raise CheckpointError(
            f"{run} has checkpoints, but none is valid: " + "; ".join(refused) + ". "
            f"Remove {run / FOLDER} to start afresh."
        )
    return None, refused


def clear_leftovers(run: Path) -> list[str]:
    """Remove what killed saves left aside; call only while holding the run's lock."""
    parent = run / FOLDER
    left = [p for p in parent.glob(".step-*") if p.suffix in (".tmp", ".old")]
    for path in left:
        shutil.rmtree(path)
    return [path.name for path in left]


def refuse_other_config(
    found: Mapping[str, Any], wanted: Mapping[str, Any], where: Path, harmless: frozenset[str]
) -> None:
    """`CheckpointError` naming the keys in which a checkpoint's configuration differs."""
    a, b = _flat(found), _flat(wanted)
    differing = [
        f"{key} (checkpoint: {a.get(key, 'absent')!r}, now: {b.get(key, 'absent')!r})"
        for key in sorted(a.keys() | b.keys())
        if a.get(key, _ABSENT) != b.get(key, _ABSENT)
        and not any(part in harmless for part in key.split("."))
    ]
    if differing:
        shown = "; ".join(differing[:8]) + ("; ..." if len(differing) > 8 else "")
        raise CheckpointError(
            f"{where} belongs to another configuration. Differing: {shown}. "
            "Choose another run folder, or restore the configuration."
        )


_ABSENT = object()


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots; lists and tuples compare equal."""
    if isinstance(value, Mapping) and value:
        parts = [_flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items()]
        return {key: item for part in parts for key, item in part.items()}
    return {prefix: json.loads(json.dumps(value))}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], str]:
    """Write tensors; those that share memory (tied weights) once. Returns alias -> kept name, and
    the file's checksum."""
    kept: dict[str, Tensor] = {}
    owner: dict[tuple[Any, ...], str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        place = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        key = (id_of(tensor), *place)
        if tensor.numel() and key in owner:
            aliases[name] = owner[key]
        else:
            owner[key] = name
            kept[name] = tensor
    return aliases, tensorfile.write_file(path, kept)


def read_tensors(
    path: Path, aliases: Mapping[str, str], entry: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Tensors of a file with aliases filled in, checked against its manifest `entry` if given;
    `CheckpointError` when it cannot be read or is altered."""
    try:
        tensors, checksum = tensorfile.read_file(path)
    except CheckpointError:
        if entry is not None:
            files.check_file(path, entry)  # damage is the better explanation, if it is one
        raise
    if entry is not None:
        files.check_file(path, entry, checksum)
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}


def _write_plain(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_plain(path: Path) -> dict[str, Any]:
    """A JSON object; `CheckpointError` when it cannot be read."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return value


def _folders(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    parent = run / FOLDER
    found = [p for p in parent.glob("step-*") if p.is_dir() and _NAME.fullmatch(p.name)]
    return sorted(found, reverse=True)
