"""What each task has cost and been given: examples, epochs, tokens, FLOPs and seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask.errors import CheckpointError

COLUMNS = ("examples", "tokens", "flops", "seconds")


class Ledger:
    """Totals per task, (tasks,) each. Examples and tokens are whole numbers and stay exact.

    `sizes` are the rows of each task's training split (None for a stream), for counting epochs.
    Ledgers of several ranks add up; their seconds are then seconds of computing, not of waiting.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int | None] | None = None) -> None:
        self.names = tuple(names)
        self.sizes = tuple(sizes) if sizes is not None else (None,) * len(self.names)
        if len(self.sizes) != len(self.names):
            raise ValueError(f"{len(self.names)} names but {len(self.sizes)} sizes")
        self.examples = np.zeros(len(self.names), dtype=np.int64)
        self.tokens = np.zeros(len(self.names), dtype=np.int64)
        self.flops = np.zeros(len(self.names), dtype=np.float64)
        self.seconds = np.zeros(len(self.names), dtype=np.float64)

    def add(
        self,
        task: npt.ArrayLike,
        examples: npt.ArrayLike = 1,
        tokens: npt.ArrayLike = 0,
        flops: npt.ArrayLike = 0.0,
        seconds: npt.ArrayLike = 0.0,
    ) -> None:
        """Book entries: `task` (n,) ids, which may repeat; the rest (n,) or one value for each."""
        ids = np.atleast_1d(np.asarray(task, dtype=np.int64))
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < len(self.names):
            raise IndexError(f"a task id lies outside 0..{len(self.names) - 1}")
        for name, value in zip(COLUMNS, (examples, tokens, flops, seconds)):
            column = getattr(self, name)
            entries = np.broadcast_to(np.asarray(value), ids.shape)
            if entries.dtype.kind not in "iub" and column.dtype.kind == "i":
                raise TypeError(f"{name} are whole numbers, not {entries.dtype}")
            if (entries < 0).any():
                raise ValueError(f"{name} cannot be negative")
            np.add.at(column, ids, entries.astype(column.dtype))

    def spread_seconds(self, task: npt.ArrayLike, seconds: float) -> None:
        """Book the time of a step, shared out evenly over its rows, `task` (n,)."""
        ids = np.atleast_1d(np.asarray(task, dtype=np.int64))
        self.add(ids, examples=0, seconds=seconds / max(1, ids.size))

    @property
    def epochs(self) -> npt.NDArray[np.float64]:
        """Examples over the task's size, (tasks,); NaN for streams."""
        sizes = np.array([np.nan if size is None else size for size in self.sizes], np.float64)
        return np.asarray(self.examples / sizes)

    def array(self) -> npt.NDArray[np.float64]:
        """(tasks, 4): examples, tokens, FLOPs, seconds; what ranks sum (exact below 2^53)."""
        return np.stack([getattr(self, name).astype(np.float64) for name in COLUMNS], axis=1)

    def load_array(self, values: npt.ArrayLike) -> None:
        """Take over what `array` gave, for instance summed over ranks."""
        table = np.asarray(values, dtype=np.float64)
        if table.shape != (len(self.names), len(COLUMNS)):
            raise ValueError(f"shape {table.shape}, expected {(len(self.names), len(COLUMNS))}")
        for at, name in enumerate(COLUMNS):
            column = getattr(self, name)
            column[:] = np.rint(table[:, at]) if column.dtype.kind == "i" else table[:, at]

    def __add__(self, other: Ledger) -> Ledger:
        if self.names != other.names or self.sizes != other.sizes:
            raise ValueError("only ledgers of the same tasks can be added")
        out = Ledger(self.names, self.sizes)
        for name in COLUMNS:
            getattr(out, name)[:] = getattr(self, name) + getattr(other, name)
        return out

    def state(self) -> dict[str, Any]:
        """Plain JSON."""
        columns = {name: getattr(self, name).tolist() for name in COLUMNS}
        return {"names": list(self.names), **columns}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned; `CheckpointError` if it is of other tasks."""
        if tuple(state["names"]) != self.names:
            raise CheckpointError(
                f"the ledger is of tasks {list(state['names'])}, the run has {list(self.names)}"
            )
        for name in COLUMNS:
            getattr(self, name)[:] = state[name]

    def rows(self) -> list[dict[str, Any]]:
        """A dictionary per task, totals last; epochs are None for streams and for the total."""
        out: list[dict[str, Any]] = []
        for at, name in enumerate(self.names):
            epochs = float(self.epochs[at])
            entry = {column: getattr(self, column)[at].item() for column in COLUMNS}
            out.append({"task": name, "epochs": None if np.isnan(epochs) else epochs, **entry})
        total = {column: getattr(self, column).sum().item() for column in COLUMNS}
        return [*out, {"task": "total", "epochs": None, **total}]

    def table(self) -> str:
        """The ledger for people, in fixed-width columns."""
        head = ["task", "examples", "epochs", "tokens", "FLOPs", "seconds"]
        body = [
            [
                row["task"],
                f"{row['examples']:,}",
                "-" if row["epochs"] is None else f"{row['epochs']:.2f}",
                f"{row['tokens']:,}",
                f"{row['flops']:.3g}",
                f"{row['seconds']:.1f}",
            ]
            for row in self.rows()
        ]
        width = [max(len(line[at]) for line in [head, *body]) for at in range(len(head))]
        lines = [
            "  ".join(
                cell.ljust(width[at]) if at == 0 else cell.rjust(width[at])
                for at, cell in enumerate(line)
            )
            for line in [head, *body]
        ]
        return "\n".join(line.rstrip() for line in lines)
