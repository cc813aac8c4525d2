"""Which coefficients a merge has: one a task, a block of layers or a tensor, spread over tensors.

A matrix (groups, experts) is what is learned or searched; tensors of a group share its row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from polytask.errors import MergeError, suggestion
from polytask.merge.vectors import StateDict, TaskVectors

Granularity = Literal["task", "block", "tensor"]
FAR = 0.5  # |tau| / |theta_0| from which an expert may be one of another base
_NUMBERED = re.compile(r"^(.*?\.\d+|\d+)\.")


def block_of(name: str) -> str:
    """'encoder.layer.4.attention.weight' -> 'encoder.layer.4'; without a number the module's
    name: 'embeddings.word.weight' -> 'embeddings.word'."""
    found = _NUMBERED.match(name)
    return found[1] if found else name.rpartition(".")[0]


@dataclass(frozen=True)
class Groups:
    """Which tensors share coefficients.

    Attributes:
        labels: of the groups: '' for all, block or tensor names, in the order of the tensors.
        group: tensor name -> number of its group.
    """

    labels: tuple[str, ...]
    group: Mapping[str, int]

    @classmethod
    def of(cls, vectors: TaskVectors, granularity: Granularity) -> Groups:
        """Groups of all tensors of `vectors`."""
        label = {
            key: "" if granularity == "task" else block_of(key) if granularity == "block" else key
            for key in vectors.deltas
        }
        labels = tuple(dict.fromkeys(label.values()))
        number = {text: i for i, text in enumerate(labels)}
        return cls(labels, {key: number[text] for key, text in label.items()})

    @property
    def count(self) -> int:
        return len(self.labels)

    def spread(self, matrix: Tensor) -> dict[str, Tensor]:
        """(groups, K) -> tensor name -> (K,)."""
        return {key: matrix[number] for key, number in self.group.items()}

    def gather(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Tensor name -> (K,) to (groups, K) float64, summed in groups: `spread` transposed."""
        first = next(iter(rows.values()))
        total = torch.zeros(self.count, len(first), dtype=torch.float64)
        for key, row in rows.items():
            total[self.group[key]] += row.double().cpu()
        return total


def parameters_of(
    model: nn.Module, base: StateDict, experts: Mapping[str, StateDict]
) -> dict[str, nn.Parameter]:
    """Names in `base` of the model's parameters, tied ones once -> the parameter.

    Raises:
        MergeError: a parameter that the base lacks, a tensor that the model has not, an expert in
            which tied tensors differ.
    """
    if not experts:
        raise MergeError("there is nothing to merge: no expert was given")
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    known = {name for group in names.values() for name in group}
    known |= {name for name, _ in model.named_buffers()}
    for name in base:
        if name not in known:
            raise MergeError(f"the model has no tensor '{name}'.{suggestion(name, known)}")
    found = {}
    for key, group in names.items():
        held = [name for name in group if name in base]
        if not held:
            raise MergeError(f"the base lacks the model's parameter '{group[0]}'")
        for who, state in (("the base", base), *experts.items()):
            for other in held[1:]:
                if other in state and not torch.equal(state[held[0]], state[other]):
                    raise MergeError(
                        f"{who}: '{held[0]}' and '{other}' are tied in the model but differ"
                    )
        for who, state in experts.items():
            if held[0] not in state:
                raise MergeError(f"{who}: tensor '{held[0]}' of the base is missing")
        found[held[0]] = parameters[key]
    return found


def check_size(vectors: TaskVectors) -> tuple[str, ...]:
    """Warnings for experts that lie so far from the base that it may not be theirs."""
    texts = []
    origin = {key: vectors.base[key].detach().double().norm() for key in vectors.deltas}
    whole = float(torch.stack(list(origin.values())).norm())
    for k, name in enumerate(vectors.names):
        sizes = {key: delta[k].double().norm() for key, delta in vectors.deltas.items()}
        ratio = float(torch.stack(list(sizes.values())).norm()) / whole if whole else 0.0
        if ratio > FAR:
            worst = max(sizes, key=lambda key: float(sizes[key]))
            texts.append(
                f"{name}: what training changed is {ratio:.2f} times as large as the base, most of "
                f"all in '{worst}'; was it trained from this base?"
            )
    return tuple(texts)
