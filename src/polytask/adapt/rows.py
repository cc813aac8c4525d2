"""Which task each row of the running batch belongs to: told once, read by every adapter.

It is a plain object that all adapters of a model share, not a context variable: gradient
checkpointing runs layers again during the backward pass, in a thread of the autograd engine and
after the `with` block has ended, where a context variable would be gone. What was told last stays
until something else is told.

Legend: B rows, G tasks that occur.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytask.errors import AdaptError, suggestion


@dataclass(frozen=True)
class Rows:
    """The tasks of a batch's rows, laid out for gathers."""

    task: Tensor  # (B,) int64
    present: Tensor  # (G,) int64: the tasks that occur, ascending
    place: Tensor  # (B,) int64: task = present[place]
    single: bool  # G == 1, known without asking the device

    def repeated(self, times: int) -> Rows:
        """Every row `times` times in a row, as beam search expands a batch."""
        again = self.task.repeat_interleave(times), self.place.repeat_interleave(times)
        return Rows(again[0], self.present, again[1], self.single)


class RowTasks:
    """Holds the `Rows` of the batch that runs.

    >>> tasks = RowTasks(("parity", "prime"))
    >>> with tasks.of(["prime", "parity", "prime"]):
    ...     tasks.rows(3).task.tolist()
    [1, 0, 1]
    """

    def __init__(self, names: Sequence[str]) -> None:
        if not names:
            raise AdaptError("adapters that route by task need at least one task")
        if len(set(names)) < len(names):
            raise AdaptError(f"two tasks have the same name: {', '.join(sorted(names))}")
        self.names = tuple(names)
        self._rows: Rows | None = None
        self._repeat = 1

    def tell(self, tasks: Any, repeat: int = 1) -> None:
        """Set the task of every row: ids or names, one per row, or one for all rows.

        `repeat`: layers may also see every row that many times in a row (beam search expands the
        decoder's batch, not the encoder's). Raises `AdaptError` for an unknown task.
        """
        if isinstance(tasks, str | int):
            tasks = [tasks]
        ids = self._ids(tasks)
        host = ids.cpu().numpy() if ids.numel() else np.zeros(0, np.int64)
        wrong = host[(host < 0) | (host >= len(self.names))]
        if len(wrong):
            known = ", ".join(self.names[:6]) + (", ..." if len(self.names) > 6 else "")
            raise AdaptError(
                f"task id {int(wrong[0])} is outside 0..{len(self.names) - 1}: the adapters know "
                f"{len(self.names)} tasks ({known})"
            )
        present, place = np.unique(host, return_inverse=True)
        device = ids.device
        self._rows = Rows(
            ids,
            torch.from_numpy(present).to(device),
            torch.from_numpy(place.reshape(-1).astype(np.int64)).to(device),
            len(present) == 1,
        )
        self._repeat = max(1, repeat)

    def forget(self) -> None:
        """As before anything was told."""
        self._rows, self._repeat = None, 1

    @contextmanager
    def of(self, tasks: Any, repeat: int = 1) -> Iterator[None]:
        """Tell, and see that the next batch is not run by mistake with these tasks.

        A backward pass with gradient checkpointing belongs inside the block.
        """
        self.tell(tasks, repeat)
        try:
            yield
        finally:
            self.forget()

    def rows(self, count: int, where: str = "an adapted layer") -> Rows:
        """The `Rows` for a layer whose input has `count` rows; `AdaptError` where they differ."""
        rows = self._rows
        if rows is None:
            raise AdaptError(
                f"{where} does not know the rows' tasks: call the model within "
                "`with adapters.rows(task_ids):`, one id per row of the batch"
            )
        told = len(rows.task)
        if told == count:
            return rows
        if rows.single and told == 1:
            return rows.repeated(count)
        if count == told * self._repeat:
            return rows.repeated(self._repeat)
        raise AdaptError(
            f"{where} got {count} rows and {told} task ids were given. The first dimension must be "
            "the batch; where beam search repeats rows, say so: `adapters.rows(ids, repeat=beams)`"
        )

    def _ids(self, tasks: Any) -> Tensor:
        if isinstance(tasks, Tensor):
            if tasks.ndim != 1 or tasks.is_floating_point() or tasks.dtype == torch.bool:
                raise AdaptError(
                    f"task ids must be whole numbers, one per row: got {tasks.dtype} of shape "
                    f"{tuple(tasks.shape)}"
                )
            return tasks.long()
        return torch.tensor([self.id_of(task) for task in tasks], dtype=torch.int64)

    def id_of(self, task: Any) -> int:
        """The id of a task given by name or id."""
        if isinstance(task, str):
            if task not in self.names:
                raise AdaptError(f"no task '{task}'.{suggestion(task, self.names)}")
            return self.names.index(task)
        return int(task)
