"""A batch: what a model sees in one step. It may mix tasks, modalities and labels.

A *sequence* is one item the trunk runs on. A row usually gives one sequence; multiple choice gives
one per candidate, matching gives two. A *pair* is (row, task): one label to predict. Rows that
several tasks label give several pairs but still one sequence, so the trunk runs once.

Fields are named 'modality.name'. For every modality M present, 'M.sequence' says which sequence
each entry belongs to, so that a stem runs only over the entries it is for:

    text.ids      (n, length) int64      text.length   (n,) int64     text.sequence   (n,)
    text.prefix   (n,) int64             tokens before this index see each other (equal to length:
                                         bidirectional; 0: causal)
    image.pixels  (n, 3, height, width) uint8                         image.sequence  (n,)
    series.values (n, length, channels) float32, NaN = missing        series.sequence (n,)
    series.length (n,) int64             series.channels (n,) int64
    table.number  (n, columns) float32 standardised, NaN = missing
    table.number_id (n, columns) int64 global number-column id; -1 = padding
    table.category (n, columns) int64 global category id; -1 = padding; table.sequence (n,)
    features.values (n, length, width) float32; features.length (n,)  features.sequence (n,)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What the layout of a batch depends on: small integers that are also kept on the host.
_LAYOUT = {"length", "sequence", "prefix", "channels", "number_id", "category"}


@dataclass(frozen=True)
class Target:
    """Labels of one schema kind in a batch, one entry per pair."""

    sequence: (
        Tensor  # (pairs, k) int64: the pair's sequences; k = 1, 2 (matching), choices; -1 pads
    )
    task: Tensor  # (pairs,) int64 task id
    row: Tensor  # (pairs,) int64 row index within the task's split
    value: Tensor  # (pairs, ...) label, padded; what it holds is the schema's business
    size: Tensor | None = None  # (pairs, ...) true extent of `value` where it was padded

    def __len__(self) -> int:
        return int(self.task.shape[0])

    def select(self, index: Tensor) -> Target:
        """The pairs at `index` (int64), in that order."""
        size = None if self.size is None else self.size[index]
        return Target(
            self.sequence[index], self.task[index], self.row[index], self.value[index], size
        )


@dataclass(frozen=True)
class Batch:
    """Fields for the stems, and targets by schema kind."""

    fields: dict[str, Tensor]
    targets: dict[str, Target]
    task: Tensor  # (sequences,) int64 first task of the row's group; routers gather by it
    row: Tensor  # (sequences,) int64 row index: names culprits in errors
    rows: int  # number of rows drawn from the mixture
    complete: bool = False  # every pair is known to have a label (`collate` has checked)
    host: dict[str, tuple[Tensor, np.ndarray[Any, Any]]] = field(default_factory=dict, repr=False)

    def known(self, name: str) -> np.ndarray[Any, Any]:
        """A field, 'task', 'row', or 'KIND.task', 'KIND.sequence' of a target, as a host array.

        Layouts and groupings are computed on the host. `to` keeps host copies of what they need,
        so that a batch on an accelerator answers without waiting for the device.
        """
        tensor = self._find(name)
        if tensor.device.type == "cpu":
            return tensor.numpy()
        # A copy belongs to the very tensor it was made of: a field that was replaced has none.
        held = self.host.get(name)
        if held is None or held[0] is not tensor:
            held = self.host[name] = (tensor, tensor.cpu().numpy())
        return held[1]

    def entries(self, modality: str) -> np.ndarray[Any, Any]:
        """(sequences,) the first entry of a modality in each sequence; -1 where there is none."""
        owner = self.known(f"{modality}.sequence")
        found = np.full(self.sequences, -1)
        found[owner[::-1]] = np.arange(len(owner))[::-1]
        return found

    def _find(self, name: str) -> Tensor:
        if name in self.fields:
            return self.fields[name]
        kind, _, part = name.rpartition(".")
        found: Tensor = getattr(self.targets[kind] if kind else self, part)
        return found

    @property
    def sequences(self) -> int:
        return int(self.task.shape[0])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""

        def move(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.to(device, non_blocking=non_blocking)

        moved = replace(
            self,
            fields={name: move(value) for name, value in self.fields.items()},
            targets={
                kind: Target(
                    move(t.sequence), move(t.task), move(t.row), move(t.value), move(t.size)
                )
                for kind, t in self.targets.items()
            },
            task=move(self.task),
            row=move(self.row),
            host={},
        )
        if torch.device(device).type != "cpu":
            names = [n for n in self.fields if n.partition(".")[2] in _LAYOUT]
            names += [
                "task",
                *(f"{k}.{part}" for k in self.targets for part in ("task", "sequence")),
            ]
            names += [f"{kind}.value" for kind in ("generate", "tag") if kind in self.targets]
            moved.host.update({name: (moved._find(name), self.known(name)) for name in names})
        return moved


@dataclass(frozen=True)
class Terms:
    """Named loss terms, one value per pair: masks for missing labels, logging per task, weighting,
    aggregation and contribution analysis all read this one record."""

    value: dict[str, Tensor]  # term -> (pairs,) float32, unreduced
    task: dict[str, Tensor]  # term -> (pairs,) int64
    row: dict[str, Tensor]  # term -> (pairs,) int64

    def per_task(self, tasks: int) -> tuple[Tensor, Tensor]:
        """Mean loss per task, terms added, and the number of pairs: both (tasks,).

        A task that is absent from the batch has mean 0 and count 0.
        """
        total, count = self.sums(tasks)
        mean = (
            sum(total[name] / count[name].clamp(min=1) for name in self.value)
            if self.value
            else torch.zeros(tasks)
        )
        pairs = torch.stack(list(count.values())).amax(0) if count else torch.zeros(tasks)
        return torch.as_tensor(mean), pairs

    def sums(self, tasks: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Per term: summed value and number of pairs for each task, (tasks,) each."""
        total: dict[str, Tensor] = {}
        count: dict[str, Tensor] = {}
        for name, value in self.value.items():
            zero = value.new_zeros(tasks)
            total[name] = zero.index_add(0, self.task[name], value)
            count[name] = zero.index_add(0, self.task[name], torch.ones_like(value))
        return total, count
