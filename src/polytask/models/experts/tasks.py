"""Rows and tasks: a router that knows the task needs a pass of its own for every task of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from polytask.errors import ConfigError

if TYPE_CHECKING:
    from polytask.models.batch import Batch


def check_one_task_a_row(batch: Batch, names: Sequence[str]) -> None:
    """`ConfigError` when a sequence is routed for one task and labelled for another.

    One pass for several tasks would route all of them by the first one's gate.
    """
    routed = batch.known("task")
    for kind in batch.targets:
        task = batch.known(f"{kind}.task")
        taken = routed[batch.known(f"{kind}.sequence")[:, 0]]
        if (task != taken).any():
            pair = int(np.argmax(task != taken))
            row = int(batch.known(f"{kind}.row")[pair])
            raise ConfigError(
                f"row {row} has labels for '{names[taken[pair]]}' and '{names[task[pair]]}' and "
                "would be routed for the first only: with experts every task needs its own row "
                "group (TaskSet.of(*tasks), as polytask train makes it), or 'router: blind'"
            )
