"""Task vectors: what fine-tuning added to a base, by tensor name, for any number of experts.

A state dict is a mapping of names to tensors. Only its floating-point tensors are merged;
integer tensors (counters, position ids) are the base's, and a storage that several names share
(tied embeddings) is merged once. Task vectors are from "Editing Models with Task Arithmetic"
(Ilharco et al. 2023, arXiv 2212.04089).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polytask.errors import MergeError, suggestion

StateDict = Mapping[str, Tensor]
Coefficients = float | Tensor | Mapping[str, Tensor]


def default_names(count: int) -> tuple[str, ...]:
    """'expert 1', 'expert 2', ...: what messages and random masks call experts without names."""
    return tuple(f"expert {number}" for number in range(1, count + 1))


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that merging computes in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_alike(
    base: StateDict, experts: Sequence[StateDict], names: Sequence[str] | None = None
) -> None:
    """Refuse experts whose tensors differ from the base's in name, shape, kind or ties.

    Floating-point types may differ (a float32 expert of a bfloat16 base is common: differences
    are formed in float32); a floating-point tensor against an integer one may not.

    Raises:
        MergeError: names the expert, the tensor and what differs.
    """
    names = default_names(len(experts)) if names is None else names
    if len(names) != len(experts):
        raise MergeError(f"{len(experts)} experts were given, but {len(names)} names for them")
    if not experts:
        raise MergeError("there is nothing to merge: no expert was given")
    tied = tied_names(base)
    for name, expert in zip(names, experts, strict=True):
        missing, extra = base.keys() - expert.keys(), expert.keys() - base.keys()
        if missing:
            raise MergeError(f"{name}: tensor {_some(missing)} of the base is missing")
        if extra:
            first = min(extra)
            raise MergeError(
                f"{name}: tensor {_some(extra)} is not in the base.{suggestion(first, base)}"
            )
        for key, tensor in base.items():
            other = expert[key]
            if other.shape != tensor.shape:
                raise MergeError(
                    f"{name}: tensor '{key}' has shape {tuple(other.shape)}, the base's has "
                    f"{tuple(tensor.shape)}"
                )
            if other.is_floating_point() != tensor.is_floating_point():
                raise MergeError(
                    f"{name}: tensor '{key}' has type {other.dtype}, the base's has {tensor.dtype}"
                )
        for key, kept in tied.items():
            if expert[key] is not expert[kept] and not torch.equal(expert[key], expert[kept]):
                raise MergeError(
                    f"{name}: '{key}' and '{kept}' are one tensor in the base, but differ here; "
                    "untie them in the base (clone one) to merge both"
                )


def check_finite(tensor: Tensor, key: str, name: str) -> None:
    """Raise `MergeError` naming tensor and model when `tensor` holds NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinite values"
        raise MergeError(f"{name}: tensor '{key}' holds {kind}; such a model cannot be merged")


def tied_names(state: StateDict) -> dict[str, str]:
    """Every name that shares its whole storage with another -> the name that stands for both.

    That is an embedding's name where there is one, else the first in alphabetical order.
    """
    places: dict[tuple[object, ...], list[str]] = {}
    for key in sorted(state):
        tensor = state[key]
        if tensor.numel():  # empty tensors have no storage to share
            where = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape))
            places.setdefault((*where, tensor.stride()), []).append(key)
    tied: dict[str, str] = {}
    for names in places.values():
        kept = next((n for n in names if "emb" in n or "shared" in n), names[0])
        tied |= {name: kept for name in names if name != kept}
    return tied


def merge_keys(base: StateDict) -> tuple[str, ...]:
    """Names of the tensors that take part, sorted: floating point, tied storages once."""
    tied = tied_names(base)
    return tuple(k for k in sorted(base) if base[k].is_floating_point() and k not in tied)


@dataclass(frozen=True)
class TaskVectors:
    """K task vectors tau_k = theta_k - theta_0 of one base.

    Attributes:
        base: the base's state dict, whole.
        deltas: name -> (K, *shape), float32 (float64 for a float64 base), keys sorted.
        names: the experts' names.
    """

    base: StateDict
    deltas: Mapping[str, Tensor]
    names: tuple[str, ...]

    @classmethod
    def from_state_dicts(
        cls,
        base: StateDict,
        experts: Sequence[StateDict],
        keys: Sequence[str] | None = None,
        names: Sequence[str] | None = None,
    ) -> TaskVectors:
        """Subtract `base` from every expert, for `keys` (default: `merge_keys(base)`).

        Raises:
            MergeError: unlike state dicts, an unknown key, NaN or infinity, names not unique.
        """
        names = default_names(len(experts)) if names is None else tuple(names)
        check_alike(base, experts, names)
        if len(set(names)) != len(names):
            raise MergeError(f"every expert needs a name of its own, got {', '.join(names)}")
        chosen = merge_keys(base) if keys is None else tuple(sorted(keys))
        for key in chosen:
            if key not in base:
                raise MergeError(f"no tensor '{key}' in the base.{suggestion(key, base)}")
            if not base[key].is_floating_point():
                raise MergeError(f"tensor '{key}' holds {base[key].dtype}: nothing to subtract")
        if not chosen:
            raise MergeError("the base has no floating-point tensor to merge")
        deltas = {}
        for key in chosen:
            dtype = work_dtype(base[key].dtype)
            origin = base[key].detach().to(dtype)
            check_finite(origin, key, "the base")
            delta = torch.empty((len(experts), *origin.shape), dtype=dtype, device=origin.device)
            for row, expert, name in zip(delta, experts, names, strict=True):
                check_finite(expert[key], key, name)
                torch.sub(expert[key].detach().to(origin), origin, out=row)
            deltas[key] = delta
        return cls(base, deltas, names)

    def __len__(self) -> int:
        return len(self.names)

    def flatten(self) -> Tensor:
        """(K, D): every delta flattened, keys in sorted order."""
        return torch.cat([d.reshape(len(self), -1) for d in self.deltas.values()], dim=1)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Inverse of `flatten`: (..., D) -> name -> (..., *shape); views of `vector`."""
        sizes = [d[0].numel() for d in self.deltas.values()]
        if vector.shape[-1] != sum(sizes):
            raise MergeError(f"a vector of {sum(sizes)} values is needed, got {vector.shape[-1]}")
        parts = torch.split(vector, sizes, dim=-1)
        return {
            key: part.reshape(part.shape[:-1] + delta.shape[1:])
            for (key, delta), part in zip(self.deltas.items(), parts, strict=True)
        }

    def with_deltas(self, deltas: Mapping[str, Tensor]) -> TaskVectors:
        """The same base and names with other deltas (trimmed, masked) of the same shapes."""
        if deltas.keys() != self.deltas.keys():
            raise MergeError("other task vectors must have the same tensors")
        return TaskVectors(self.base, {key: deltas[key] for key in self.deltas}, self.names)

    def add(self, coefficients: Coefficients) -> dict[str, Tensor]:
        """theta_0 + sum_k lambda_k tau_k as a whole state dict; differentiable in lambda.

        `coefficients` is one number, a (K,) tensor, or name -> (K,) for each tensor of `deltas`.
        Merged tensors have the deltas' type (float32), so that gradients and small differences
        survive; the rest of the base is passed on as it is, tied names stay tied.
        """
        merged = dict(self.base)
        for key, delta in self.deltas.items():
            weight = self._weight(coefficients, key).to(delta)
            merged[key] = self.base[key].detach().to(delta) + torch.tensordot(weight, delta, 1)
        for key, first in tied_names(self.base).items():
            merged[key] = merged[first]
        return merged

    def _weight(self, coefficients: Coefficients, key: str) -> Tensor:
        if isinstance(coefficients, Mapping):
            if key not in coefficients:
                raise MergeError(f"no coefficients for tensor '{key}'")
            chosen: float | Tensor = coefficients[key]
        else:
            chosen = coefficients
        weight = torch.as_tensor(chosen)
        if weight.dim() == 0:
            weight = weight.expand(len(self))
        if weight.shape != (len(self),):
            raise MergeError(
                f"{len(self)} coefficients are needed, one for each expert "
                f"({', '.join(self.names)}), got shape {tuple(weight.shape)}"
            )
        return weight


def _some(keys: set[str]) -> str:
    shown = ", ".join(f"'{key}'" for key in sorted(keys)[:3])
    return shown + (f" (and {len(keys) - 3} more)" if len(keys) > 3 else "")
