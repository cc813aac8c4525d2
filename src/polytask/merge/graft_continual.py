"""Continual learning with grafts: keep per task only the few values that carry its skill.

    for task t: fine-tune theta_pre (or what there is), learn gamma_t, keep gamma_t delta_t

Whoever knows the task at inference uses theta_pre + gamma_t delta_t: nothing that is learned later
can change it, so nothing is forgotten. Whoever does not uses the union, where a coordinate belongs
to the task that claimed it first. After Panigrahi et al. 2023 (arXiv 2302.06600), whose code does
not include this part: start and conflicts are options.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from polytask import files
from polytask.errors import MergeError, suggestion
from polytask.merge.graft_delta import Conflict, SparseDelta, union
from polytask.merge.vectors import StateDict

Start = Literal["base", "current"]
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class GraftMemory:
    """A base and the grafts of the tasks so far, in the order in which they were learned.

    Attributes:
        base: the pretrained state dict; it never changes.
        grafts: relative to `base`, each under its task's name.
    """

    base: StateDict
    grafts: tuple[SparseDelta, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(graft.name for graft in self.grafts)

    def begin(self, start: Start = "base") -> dict[str, Tensor]:
        """What the next task is fine-tuned from: the base, or the base with all grafts."""
        if start == "base" or not self.grafts:
            return dict(self.base)
        return self.merged()

    def claimed(self) -> SparseDelta | None:
        """All coordinates that are taken (`Graft.between(claimed=...)` keeps a new task off
        them); None before the first task."""
        return union(self.grafts) if self.grafts else None

    def learn(self, name: str, graft: SparseDelta, finetuned: StateDict) -> GraftMemory:
        """Remember a task: the graft's region with the fine-tuned model's values, less the base's.

        The values are taken anew, since a task that was fine-tuned from 'current' has a graft
        relative to that. `MergeError` for a name that is taken or cannot be a file's name.
        """
        if name in self.names:
            raise MergeError(f"there is a graft of task '{name}' already")
        if not _NAME.fullmatch(name):
            raise MergeError(f"'{name}' cannot name a graft: use letters, digits, '_', '-', '.'")
        kept = graft.from_model(finetuned, self.base).named(name)
        return GraftMemory(self.base, (*self.grafts, kept))

    def task(self, name: str) -> dict[str, Tensor]:
        """theta_pre + gamma_t delta_t: the model for one task whose name is known."""
        for graft in self.grafts:
            if graft.name == name:
                return graft.apply(self.base)
        raise MergeError(f"no graft of task '{name}'.{suggestion(name, self.names)}")

    def merged(self, conflict: Conflict = "first") -> dict[str, Tensor]:
        """One model for all tasks: the base with the union of the grafts."""
        return union(self.grafts, conflict).apply(self.base) if self.grafts else dict(self.base)

    def save(self, folder: Path) -> None:
        """Write the grafts (not the base) as a whole folder: NN-NAME.safetensors, a manifest."""
        with files.building(folder) as aside:
            for number, graft in enumerate(self.grafts):
                graft.save(aside / f"{number:03d}-{graft.name}.safetensors")

    @classmethod
    def load(cls, folder: Path, base: StateDict) -> GraftMemory:
        """Read what `save` wrote; `CheckpointError` when it is damaged, `MergeError` when `base`
        is another."""
        files.verify_manifest(folder)
        names = sorted(files.read_manifest(folder))
        grafts = tuple(SparseDelta.load(folder / name) for name in names)
        for graft in grafts:
            graft.layout.check(base, "the base")
            graft.check_base(base)
        return cls(base, grafts)
