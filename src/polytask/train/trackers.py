"""Where numbers go: `metrics.jsonl` always, TensorBoard, trackio or W&B by name if installed.

    {"step": 10, "kind": "train", "loss": ..., "terms": {task: {term: mean}}, "lr": ...,
     "grad_norm": ..., "rows_per_s": ..., "tokens_per_s": ...}
    {"step": 10, "kind": "eval", "task": ..., "split": "valid", "metrics": {...}}
    {"step": 10, "kind": "event", "event": "checkpoint", ...}

A line is one `write`, so it is whole or (after a crash) torn at the end of the file, where the next
run cuts it off. A resumed run removes lines of steps it is going to repeat.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from polytask import files
from polytask.errors import MissingExtra
from polytask.registry import Registry

METRICS = "metrics.jsonl"


class Tracker(Protocol):
    def log(self, line: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """Appends JSON lines to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._file = os.open(path, flags, 0o644)

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line, all of it or (disk full) none of it."""
        text = json.dumps(_finite(line), allow_nan=False, ensure_ascii=False) + "\n"
        data = text.encode()
        size = os.fstat(self._file).st_size
        with files.named_os_errors(self.path):
            try:
                written = os.write(self._file, data)
                if written < len(data):  # the disk is nearly full: the rest tells us why
                    os.write(self._file, data[written:])
            except OSError:
                os.ftruncate(self._file, size)
                raise

    def close(self) -> None:
        os.close(self._file)


def _finite(value: Any) -> Any:
    """JSON has no NaN: such numbers become null."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a torn last line (a killed run's) is left out."""
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    for raw in path.read_bytes().split(b"\n")[:-1]:
        lines.append(json.loads(raw))
    return lines


def truncate_after(path: Path, step: int) -> int:
    """Drop lines of later steps and a torn last line; returns how many lines went."""
    if not path.is_file():
        return 0
    raw = path.read_bytes()
    lines = read_lines(path)
    kept = [line for line in lines if line["step"] <= step]
    if len(kept) < len(lines) or not raw.endswith(b"\n"):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        files.write_text(path, text)
    return len(lines) - len(kept)


class _Flat:
    """Base of trackers that take flat numbers: 'train/task/term', 'valid/task/metric'."""

    def log(self, line: Mapping[str, Any]) -> None:
        numbers = flat_numbers(line)
        if numbers:
            self.write(numbers, int(line["step"]))

    def write(self, numbers: dict[str, float], step: int) -> None:
        raise TypeError(f"{type(self).__name__} has to define 'write'")


def flat_numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line under flat names.

    >>> flat_numbers({"step": 1, "kind": "train", "loss": 2.0, "terms": {"a": {"ce": 1.0}}})
    {'train/loss': 2.0, 'train/a/ce': 1.0}
    """
    if line["kind"] == "eval":
        prefix = f"{line['split']}/{line['task']}"
        return {f"{prefix}/{k}": v for k, v in line["metrics"].items() if _number(v)}
    if line["kind"] != "train":
        return {}
    flat = {f"train/{k}": v for k, v in line.items() if k != "step" and _number(v)}
    for task, terms in line.get("terms", {}).items():
        flat |= {f"train/{task}/{term}": v for term, v in terms.items() if _number(v)}
    return flat


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _module(name: str, purpose: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(name.split(".")[0], "trackers", purpose) from error


class TensorBoard(_Flat):
    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        _module("tensorboard", "the tracker 'tensorboard'")
        module = _module("torch.utils.tensorboard", "the tracker 'tensorboard'")
        self._writer = module.SummaryWriter(str(run / "tensorboard"))

    def write(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Hosted(_Flat):
    """trackio and W&B share one interface: `init`, `log`, `finish`."""

    package = ""

    def __init__(self, run: Path, config: Mapping[str, Any]) -> None:
        self._module = _module(self.package, f"the tracker '{self.package}'")
        self._module.init(project=run.parent.name or "polytask", name=run.name, config=dict(config))

    def write(self, numbers: dict[str, float], step: int) -> None:
        self._module.log(numbers, step=step)

    def close(self) -> None:
        self._module.finish()


class Trackio(_Hosted):
    package = "trackio"


class WandB(_Hosted):
    package = "wandb"


trackers: Registry[Any] = Registry("tracker")
trackers.add("tensorboard", TensorBoard)
trackers.add("trackio", Trackio)
trackers.add("wandb", WandB)


class Journal:
    """All trackers of a run; only the main process has any."""

    def __init__(
        self, run: Path, names: Sequence[str], config: Mapping[str, Any], active: bool
    ) -> None:
        self._all: list[Tracker] = []
        if active:
            extra = [trackers.get(name)(run, config) for name in names]
            self._all = [JsonLines(run / METRICS), *extra]

    def log(self, step: int, kind: str, **values: Any) -> None:
        for tracker in self._all:
            tracker.log({"step": step, "kind": kind, **values})

    def event(self, step: int, event: str, **values: Any) -> None:
        self.log(step, "event", event=event, **values)

    def close(self) -> None:
        for tracker in self._all:
            tracker.close()
