"""Grafts: which few fine-tuned values, copied onto the pretrained model, carry what was learned.

    theta(gamma) = theta_pre + gamma * delta,     delta = theta_ft - theta_pre, gamma in {0, 1}^D
    gamma(S) = gamma_b + (1 - 2 gamma_b) sigmoid(S - b),    S real, b = 10, gamma_b the base patch

"Task-Specific Skill Localization in Fine-tuned Language Models" (Panigrahi et al. 2023, arXiv
2302.06600). The base patch holds the coordinates that moved most, counted globally over
all tensors that take part; `graft_fit.fit_mask` learns S from there. Buffers (running statistics
of a norm) are no parameters: a graft keeps the base's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from polytask import rng
from polytask.errors import MergeError
from polytask.merge.graft_delta import Layout, SparseDelta
from polytask.merge.select import kth_magnitude
from polytask.merge.vectors import StateDict, TaskVectors, merge_keys, tied_names
from polytask.train.stages import matching

BIAS = 10.0
Outside = Literal["error", "base", "finetuned"]


def smallest_sparsity(size: int) -> float:
    """The least sparsity that keeps one of `size` coordinates."""
    return 1 / size


def count_of(sparsity: float, size: int) -> int:
    """s = int(sparsity * D); `MergeError` with the smallest usable sparsity when that is 0."""
    if not 0 < sparsity <= 1:
        raise MergeError(f"sparsity = {sparsity:g} is not a share in (0, 1]")
    count = int(sparsity * size * (1 + 1e-12))  # .001 * 1000 may come out just below 1
    if count < 1:
        raise MergeError(
            f"sparsity {sparsity:g} of {size:,} parameters is less than one of them; the smallest "
            f"usable sparsity is {smallest_sparsity(size):.3g}"
        )
    return min(count, size)


def top_movement(delta: Tensor, count: int, *, strict: bool = False) -> Tensor:
    """(D,) bool: the `count` coordinates of largest |delta|, exactly; of ties the first.

    Coordinates that did not move are never taken, so fewer may come out (tell the achieved count).
    float32 and narrower are compared exactly; float64 too.

    Args:
        delta: (D,), over all tensors together: a top-k per tensor is another, worse mask.
        strict: as the published code: strictly greater than the `count`-th largest value, which
            keeps count - 1 coordinates, or fewer with ties.
    """
    size = delta.numel()
    if not 1 <= count <= size:
        raise MergeError(f"cannot take {count:,} of {size:,} coordinates")
    if delta.dtype == torch.float64:
        moved = delta.abs()
        threshold = float(moved.kthvalue(size - count + 1).values)
    else:
        moved = delta.abs().float()
        threshold = kth_magnitude(delta, size - count)
    above = moved > threshold
    if strict or threshold == 0:
        return above
    ties = (moved == threshold).nonzero().flatten()
    above[ties[: count - int(above.sum())]] = True
    return above


def random_mask(delta: Tensor, count: int, seed: int) -> Tensor:
    """(D,) bool: `count` of the coordinates that moved, drawn without replacement (a control)."""
    moved = delta.nonzero().flatten()
    if count > len(moved):
        raise MergeError(f"cannot draw {count:,} of {len(moved):,} coordinates that moved")
    generator = rng.torch_generator(seed, "random mask")
    chosen = moved[torch.randperm(len(moved), generator=generator)[:count].to(moved.device)]
    mask = torch.zeros_like(delta, dtype=torch.bool)
    mask[chosen] = True
    return mask


@dataclass(frozen=True)
class Graft:
    """theta_pre, delta and the base patch gamma_b: everything but S.

    Attributes:
        base: the pretrained state dict, whole.
        layout: tensors that take part, laid end to end: D coordinates.
        delta: (D,) float32 (float64 for a float64 base).
        gamma_b: (D,) bool, the base patch.
        bias: b, by which S is pushed down: how far S must travel to flip a bit.
        asked: how many coordinates were asked for; `gamma_b` may hold fewer (see `top_movement`).
        dense: tensors taken whole from the fine-tuned model (a head that the base lacks).
        notes: sentences for reports: what was left out and why.
    """

    base: StateDict
    layout: Layout
    delta: Tensor
    gamma_b: Tensor
    bias: float = BIAS
    asked: int = 0
    dense: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, vector in (("delta", self.delta), ("gamma_b", self.gamma_b)):
            if vector.shape != (self.layout.size,):
                raise MergeError(
                    f"{name} needs {self.layout.size:,} values, got shape {tuple(vector.shape)}"
                )
        if self.gamma_b.dtype != torch.bool:
            raise MergeError(f"gamma_b is a bool vector, got {self.gamma_b.dtype}")
        if not (math.isfinite(self.bias) and self.bias > 0):
            raise MergeError(f"bias = {self.bias} must be a finite number > 0")

    @classmethod
    def between(
        cls,
        base: StateDict,
        finetuned: StateDict,
        sparsity: float | None = None,
        *,
        count: int | None = None,
        patch: float = 1.0,
        gamma_b: Tensor | None = None,
        parameters: Sequence[str] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        outside: Outside = "error",
        claimed: SparseDelta | None = None,
        bias: float = BIAS,
        official: bool = False,
    ) -> Graft:
        """Compare two state dicts and take the coordinates that moved most as the base patch.

        Only tensors that fine-tuning changed take part and make the denominator: frozen ones are
        not counted, tied ones once.

        Args:
            sparsity: share s / D of coordinates to keep; or `count`, s itself; or `gamma_b`,
                (D,) bool, a base patch of one's own.
            patch: share of s in the base patch; below 1 the mask has room to grow (the paper: 1).
            parameters: names of the model's parameters (`parameter_names`); other tensors are
                buffers, keep the base's values and are named in `notes`. None: all tensors with
                floating-point numbers are taken for parameters.
            include, exclude: name patterns (`encoder.layer.*`) that narrow what takes part.
            outside: what to do about tensors that changed but do not take part ('error' refuses,
                since the graft would miss them; 'base' keeps the base's; 'finetuned' copies them
                whole, for heads), and about tensors that the base lacks.
            claimed: a region that belongs to earlier tasks: its coordinates count as not moved.
            official: the base patch of the published code (see `top_movement`, `strict`).

        Raises:
            MergeError: unlike models (tensor named), nothing changed, NaN, s below one, tensors
                outside that changed.
        """
        dense = {k: v for k, v in finetuned.items() if k not in base}
        if dense and outside != "finetuned":
            raise MergeError(
                f"the base has no tensor {_some(dense)} of the fine-tuned model. If that is a head "
                "that fine-tuning added, take it over whole with outside='finetuned'"
            )
        shared = {k: v for k, v in finetuned.items() if k in base}
        keys = merge_keys(base)
        vectors = TaskVectors.from_state_dicts(base, [shared], keys, ["the fine-tuned model"])
        _check_ties(base, shared)
        _check_fixed(base, shared)
        changed = [key for key in keys if bool(vectors.deltas[key].any())]
        notes: list[str] = []
        if parameters is not None:
            known = set(parameters)
            buffers = [key for key in changed if key not in known]
            if buffers:
                notes.append(
                    f"{len(buffers)} buffers changed in fine-tuning ({_some(buffers)}); they are "
                    "no parameters, the graft keeps the base's"
                )
            changed = [key for key in changed if key in known]
        if not changed:
            raise MergeError(
                "the fine-tuned model equals the base: no parameter differs, so there is no skill "
                "to localize. Are both paths the same model?"
            )
        chosen = set(changed)
        if include:
            chosen &= matching(keys, include, "graft: include")
        if exclude:
            chosen -= matching(keys, exclude, "graft: exclude")
        left = [key for key in changed if key not in chosen]
        if left and outside == "error":
            raise MergeError(
                f"fine-tuning changed {len(left)} tensors that the graft leaves out "
                f"({_some(left)}): without them accuracy may collapse. Include them, freeze them "
                "in fine-tuning, or say outside='base' or outside='finetuned'"
            )
        if left and outside == "finetuned":
            dense |= {key: shared[key].detach() for key in left}
        if dense:
            notes.append(f"taken whole from the fine-tuned model: {_some(dense)}")
        if not chosen:
            raise MergeError("no tensor that fine-tuning changed is left to graft")
        layout = Layout({key: tuple(base[key].shape) for key in chosen})
        delta = torch.cat([vectors.deltas[key].reshape(-1) for key in layout.shapes])
        if claimed is not None:
            delta[_places(claimed, layout)] = 0
            notes.append(f"{len(claimed):,} coordinates are claimed by {claimed.name}")
        if (sparsity is None) + (count is None) + (gamma_b is None) != 2:
            raise MergeError("give one of sparsity, count and gamma_b")
        if gamma_b is not None:
            return cls(base, layout, delta, gamma_b, bias, int(gamma_b.sum()), dense, tuple(notes))
        asked = count_of(sparsity, layout.size) if sparsity is not None else int(count or 0)
        if not 0 < patch <= 1:
            raise MergeError(f"patch = {patch:g} is not a share in (0, 1]")
        wanted = max(1, int(patch * asked))
        top = top_movement(delta, wanted, strict=official)
        achieved = int(top.sum())
        if achieved < wanted:
            notes.append(
                f"{wanted:,} coordinates were asked for, {achieved:,} are in the base patch"
                + (" (strictly above the threshold)" if official else ": no others moved")
            )
        return cls(base, layout, delta, top, bias, asked, dense, tuple(notes))

    @property
    def size(self) -> int:
        """D, the denominator."""
        return self.layout.size

    def movement(self) -> Tensor:
        """(D,) bool: the `asked` coordinates that moved most; the base patch if it is as large."""
        if int(self.gamma_b.sum()) == self.asked:
            return self.gamma_b
        return top_movement(self.delta, self.asked)

    def sign(self) -> Tensor:
        """(D,) 1 - 2 gamma_b: +1 where a larger S adds the coordinate, -1 where it removes it."""
        return torch.where(self.gamma_b, -1.0, 1.0).to(self.delta)

    def soft(self, scores: Tensor) -> Tensor:
        """(D,) gamma(S) = gamma_b + (1 - 2 gamma_b) sigmoid(S - b), in [0, 1]."""
        moved = torch.sigmoid(scores - self.bias)
        return torch.where(self.gamma_b, 1 - moved, moved)

    def hard(self, scores: Tensor, limit: int | None = None) -> Tensor:
        """(D,) bool: gamma(S) rounded; with `limit` at most so many bits, those of largest gamma.

        The paper bounds |gamma|_0 by s, the published code does not enforce it (limit=None). gamma
        saturates, so it is its logit (1 - 2 gamma_b)(S - b) that ranks; of ties the first.
        """
        pushed = scores - self.bias
        logits = torch.where(self.gamma_b, -pushed, pushed)
        mask = logits > 0  # torch.round takes a gamma of exactly 1/2 to 0
        over = int(mask.sum()) - (self.size if limit is None else limit)
        if over > 0:
            places = mask.nonzero().flatten()
            order = torch.argsort(logits[places], descending=True, stable=True)
            mask[places[order[len(places) - over :]]] = False
        return mask

    def state(self, gamma: Tensor) -> dict[str, Tensor]:
        """theta(gamma) as a whole state dict; differentiable in gamma (D,).

        Floating-point tensors have the type of `delta`, so that a half-precision base can be
        trained through.
        """
        made = {name: self._work(tensor) for name, tensor in {**self.base, **self.dense}.items()}
        flat = gamma.to(self.delta) * self.delta
        for name, start in self.layout.starts.items():
            origin = made[name]
            made[name] = origin + flat[start : start + origin.numel()].view(origin.shape)
        for name, first in tied_names(self.base).items():
            made[name] = made[first]
        return made

    def _work(self, tensor: Tensor) -> Tensor:
        found = tensor.detach()
        return found.to(self.delta) if found.is_floating_point() else found

    def sparse(self, mask: Tensor, name: str = "graft") -> SparseDelta:
        """The masked values as a `SparseDelta`, in the type of `delta`."""
        indices = mask.nonzero().flatten()
        facts = {"name": name, "asked": self.asked}
        made = SparseDelta(
            self.layout, indices.cpu(), self.delta[indices].cpu(), None, self.dense, facts
        )
        return replace(made, origin=made.taken(self.base).bfloat16())


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of a module's parameters, every name of a tied one included; buffers left out."""
    return tuple(name for name, _ in module.named_parameters(remove_duplicate=False))


def _places(claimed: SparseDelta, layout: Layout) -> Tensor:
    """Coordinates of `claimed` counted in `layout`; those in tensors it lacks are left out."""
    found = [torch.empty(0, dtype=torch.int64)]
    for name, _, place in claimed.layout.pieces(claimed.indices):
        if name in layout.shapes:
            found.append(place + layout.starts[name])
    return torch.cat(found)


def _check_ties(base: StateDict, finetuned: StateDict) -> None:
    """Tied in the base and not in the fine-tuned model, with different values: refuse."""
    for name, first in tied_names(base).items():
        if not torch.equal(finetuned[name], finetuned[first]):
            raise MergeError(
                f"'{name}' and '{first}' are one tensor in the base and two in the fine-tuned "
                "model: untie them in the base first"
            )


def _check_fixed(base: StateDict, finetuned: StateDict) -> None:
    """Integer tensors must be equal: a graft has no way to carry them."""
    for name, tensor in base.items():
        counter = name.split(".")[-1] == "num_batches_tracked"
        if tensor.is_floating_point() or counter:
            continue
        if not torch.equal(tensor, finetuned[name].to(tensor)):
            raise MergeError(f"tensor '{name}' ({tensor.dtype}) differs between the models")


def _some(names: Sequence[str] | Mapping[str, Tensor]) -> str:
    found = sorted(names)
    shown = ", ".join(f"'{name}'" for name in found[:3])
    return shown + (f" and {len(found) - 3} more" if len(found) > 3 else "")
