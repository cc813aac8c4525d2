"""Pieces of an evaluation: what one batch says of one task, on disk as one JSON line a batch.

The first line of the file says what is being evaluated (model, split, tasks, batch size). A run
that finds a file of the same evaluation replays it and goes on after the last whole line; a file
of another evaluation is refused. Arrays are stored exactly (base64 of their bytes).
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from polytask.errors import UserError
from polytask.evaluate.cases import TEXT_METRICS, Cases
from polytask.evaluate.metric import Floats, Metric

log = logging.getLogger(__name__)
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Part:
    """Rows of one task in one batch: summands of the metrics that add up batch by batch, and the
    arrays themselves for those that need the whole sample."""

    rows: Array
    sums: dict[str, Floats] = field(default_factory=dict)
    raw: dict[str, Array] = field(default_factory=dict)


def part_of(cases: Cases, metrics: Mapping[str, Metric], context: Mapping[str, Any]) -> Part:
    """Reduce cases to what the metrics need. `context` holds 'classes' where the task has any.

    Cases without predictions to compare row by row (matching) keep their arrays.
    """
    sums: dict[str, Floats] = {}
    raw: dict[str, Array] = {}
    if cases.whole:
        return Part(cases.rows.astype(np.int64), sums, arrays_of(cases))
    for name, metric in metrics.items():
        guess: Any = cases.prediction
        truth: Any = cases.target
        if cases.guess is not None and (name in TEXT_METRICS or name == "exact_match"):
            guess, truth = cases.guess, cases.truth
        elif name == "exact_match" and "written" in cases.extra:
            written = cases.extra["written"]
            sums[name] = np.stack([written, np.ones_like(written)], axis=1)
            continue
        if metric.statistics is None or not metric.streams:
            raw = arrays_of(cases)
            continue
        more = {**context, **cases.extra}
        needed = {key: more[key] for key in metric.needs if key in more}
        sums[name] = metric.statistics(guess, truth, **needed)
    return Part(cases.rows.astype(np.int64), sums, raw)


def arrays_of(cases: Cases) -> dict[str, Array]:
    return {"prediction": cases.prediction, "target": cases.target}


def joined(parts: Sequence[Part]) -> Part:
    """All rows of a task, in the order of row numbers; padded arrays widened to the widest."""
    order = np.argsort(np.concatenate([p.rows for p in parts]), kind="stable")
    rows = np.concatenate([p.rows for p in parts])[order]
    sums = {name: np.concatenate([p.sums[name] for p in parts])[order] for name in parts[0].sums}
    raw = {name: _stacked([p.raw[name] for p in parts])[order] for name in parts[0].raw}
    return Part(rows, sums, raw)


def _stacked(arrays: Sequence[Array]) -> Array:
    """One after the other; columns (candidates of a choice) filled with 0 up to the widest."""
    if arrays[0].ndim != 2:
        return np.concatenate(arrays)
    width = max(array.shape[1] for array in arrays)
    return np.concatenate([np.pad(a, ((0, 0), (0, width - a.shape[1]))) for a in arrays])


def fingerprint(model: Any) -> str:
    """A hash over names, shapes and bytes of all parameters and buffers."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        host = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {host.dtype} {tuple(host.shape)}".encode())
        digest.update(memoryview(host.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


class PartsFile:
    """The batches done so far, and where the next one is written. `path` None keeps nothing."""

    def __init__(self, path: Path | None, identity: Callable[[], Mapping[str, Any]]) -> None:
        self.done: dict[str, dict[str, Part]] = {}
        self._handle: IO[bytes] | None = None
        if path is None:
            return
        key = json.loads(json.dumps({"evaluation": dict(identity())}))
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._replay(path, key) if path.is_file() else 0
        self._handle = path.open("r+b" if path.is_file() else "w+b")
        self._handle.truncate(whole)
        self._handle.seek(whole)
        if whole == 0:
            self._line(key)

    def _replay(self, path: Path, key: Mapping[str, Any]) -> int:
        """Read whole lines; returns how many bytes of the file they are."""
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        lines = content[:whole].splitlines()
        if not lines:
            return 0
        try:
            head, *records = [json.loads(line) for line in lines]
            found = {str(r["batch"]): {t: _part(v) for t, v in r["tasks"].items()} for r in records}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}): delete it to start over") from error
        if head != key:
            raise UserError(
                f"{path} belongs to another evaluation ({_difference(head, key)}): choose another "
                "file, or delete it to start over"
            )
        self.done = found
        log.info("%s: %d batches found, going on after them", path, len(found))
        return whole

    def add(self, batch: str, parts: Mapping[str, Part]) -> None:
        """Keep a batch; on disk before this returns."""
        self.done[batch] = dict(parts)
        if self._handle is not None:
            tasks = {name: _record(part) for name, part in parts.items()}
            self._line({"batch": batch, "tasks": tasks})

    def _line(self, value: Mapping[str, Any]) -> None:
        assert self._handle is not None
        self._handle.write(json.dumps(value).encode() + b"\n")
        self._handle.flush()
        os.fsync(self._handle.fileno())

    def close(self) -> None:
        if self._handle is not None:
            self._handle.close()


def _difference(found: Any, wanted: Mapping[str, Any]) -> str:
    theirs = found.get("evaluation") if isinstance(found, dict) else None
    ours = wanted["evaluation"]
    if not isinstance(theirs, dict):
        return "it is no evaluation file"
    names = [name for name in ours if theirs.get(name) != ours[name]]
    return "another " + ", ".join(names or ["version"])


def _record(part: Part) -> dict[str, Any]:
    return {
        "rows": _pack(part.rows),
        "sums": {name: _pack(value) for name, value in part.sums.items()},
        "raw": {name: _pack(value) for name, value in part.raw.items()},
    }


def _part(value: Mapping[str, Any]) -> Part:
    sums = {name: _unpack(item) for name, item in value["sums"].items()}
    raw = {name: _unpack(item) for name, item in value["raw"].items()}
    return Part(_unpack(value["rows"]), sums, raw)


def _pack(array: Array) -> dict[str, Any]:
    plain = np.ascontiguousarray(array)
    return {
        "dtype": plain.dtype.str,
        "shape": list(plain.shape),
        "data": base64.b64encode(plain.tobytes()).decode(),
    }


def _unpack(item: Mapping[str, Any]) -> Array:
    dtype = np.dtype(item["dtype"])
    if dtype.kind not in "iufb":
        raise ValueError(f"unexpected type {dtype}")
    found: Array = np.frombuffer(base64.b64decode(item["data"]), dtype).reshape(item["shape"])
    return found
