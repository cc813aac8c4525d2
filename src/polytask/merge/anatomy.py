"""How models differ, tensor by tensor, from a sample of their numbers: what the report draws.

From each tensor at most 16 runs of 4096 neighbouring elements are read, evenly spaced, so that a
look at any model takes seconds; tensors up to 65,536 elements are read whole. Over a sample, with
task vectors tau_k = theta_k - theta_0:

    size       |tau_k| / |theta_0|
    conflict   1 - |sum_k tau_k|_1 / sum_k |tau_k|_1: the share of all change that cancels
               (0: all agree; 1: nothing is left)
    overlap    mean over pairs of |A and B| / |A or B|, A and B the places of the fifth of each
               task vector that is largest in magnitude (two random fifths: 0.11)
    coefficient  c that makes |theta - theta_0 - sum_k c_k tau_k| smallest: how much of each model
               is in the merge, whatever the method
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polytask.errors import MergeError
from polytask.merge.layout import Item
from polytask.merge.plan import Plan
from polytask.merge.recipe import layer_of
from polytask.merge.sources import TensorSource

RUN, RUNS = 1 << 12, 16
FIFTH = 0.2
STRANGE, FAR = 1.0, 0.5  # sizes beyond which a model is refused, or noted


@dataclass(frozen=True)
class TensorAnatomy:
    """One tensor's figures; NaN where undefined. `coefficients` None without a merged model."""

    name: str
    layer: int | None
    kind: str
    count: int
    sizes: tuple[float, ...]
    conflict: float
    overlap: float
    coefficients: tuple[float, ...] | None = None


def anatomy(plan: Plan, merged: TensorSource | None = None) -> list[TensorAnatomy]:
    """Figures of every merged tensor; `[]` for a recipe without a base.

    Args:
        plan: whose models are looked at.
        merged: the result, for coefficients.
    """
    if plan.recipe.base is None:
        return []
    return [_look(plan, item, merged) for item in plan.merged if item.count]


def check_kinship(plan: Plan) -> list[str]:
    """Notes on models that lie far from the base.

    Raises:
        MergeError: a model lies farther from the base than the base lies from zero. Fine-tuned
            models lie at .01 to .3 of that; models of another start at about 1.4.
    """
    if plan.recipe.base is None or not plan.uses_base:
        return []
    notes = []
    totals: dict[int, Tensor] = {}
    worst: dict[int, tuple[float, str]] = {}
    for item in plan.merged:
        if item.base is None or not item.count:
            continue
        base, deltas = _sample(plan, item)
        own = float(base.square().sum(dtype=torch.float64))
        for (number, _), delta in zip(item.models, deltas, strict=True):
            moved = float(delta.square().sum(dtype=torch.float64))
            total = totals.setdefault(number, torch.zeros(2, dtype=torch.float64))
            total += torch.tensor([moved, own], dtype=torch.float64) * (item.count / base.numel())
            worst[number] = max(worst.get(number, (0.0, "")), (moved, item.name))
    for number, (moved, own) in ((n, t.tolist()) for n, t in totals.items()):
        ratio = (moved / own) ** 0.5 if own else 0.0
        name, tensor = plan.recipe.models[number].name, worst[number][1]
        said = f"{name} differs from the base by {ratio:.2f} times the base's own length"
        if ratio > STRANGE and plan.recipe.check_base:
            raise MergeError(
                f"{said} (most in '{tensor}'): it was not trained from this base. Name the right "
                "base, or say 'check_base: false' if this is meant"
            )
        if ratio > FAR:
            notes.append(f"{said} (most in '{tensor}'): was it trained from this base?")
    return notes


def _look(plan: Plan, item: Item, merged: TensorSource | None) -> TensorAnatomy:
    base, deltas = _sample(plan, item)
    place = layer_of(item.name)
    mass = float(deltas.abs().sum(dtype=torch.float64))
    kept = float(deltas.sum(0).abs().sum(dtype=torch.float64))
    length = float(base.norm())
    found = None
    if merged is not None:
        name = item.name
        found = _coefficients(deltas, _drawn(merged, name, item.count) - base)
    return TensorAnatomy(
        item.name,
        None if place is None else place[1],
        _kind(item.name),
        item.count,
        tuple(float(d.norm()) / length if length else float("nan") for d in deltas),
        1 - kept / mass if mass else float("nan"),
        _overlap(deltas),
        found,
    )


def _sample(plan: Plan, item: Item) -> tuple[Tensor, Tensor]:
    """(n,) of the base and (K, n) of the task vectors, float32."""
    number, key = item.base or (plan.frame, item.name)
    base = _drawn(plan.sources[number], key, item.count)
    rows = [_drawn(plan.sources[n], k, item.count) for n, k in item.models]
    return base, torch.stack(rows).sub_(base)


def _drawn(source: TensorSource, key: str, count: int) -> Tensor:
    """(n,) float32: the same places for every model."""
    if count <= RUN * RUNS:
        out = torch.empty(count)
        source.read_into(key, out)
        return out
    out = torch.empty(RUN * RUNS)
    for i in range(RUNS):
        start = (count - RUN) * i // (RUNS - 1)
        source.read_into(key, out[i * RUN : (i + 1) * RUN], start)
    return out


def _overlap(deltas: Tensor) -> float:
    count = len(deltas)
    most = max(1, int(FIFTH * deltas.shape[1]))
    chosen = torch.zeros_like(deltas, dtype=torch.bool)
    for row, delta in zip(chosen, deltas, strict=True):
        if bool(delta.any()):
            row[delta.abs().topk(most).indices] = True
    pairs = [
        float((chosen[i] & chosen[j]).sum() / (chosen[i] | chosen[j]).sum())
        for i in range(count)
        for j in range(i)
        if bool(chosen[i].any()) and bool(chosen[j].any())
    ]
    return sum(pairs) / len(pairs) if pairs else float("nan")


def _coefficients(deltas: Tensor, change: Tensor) -> tuple[float, ...]:
    """Least squares; models whose task vector is zero, or equal to another's, share nothing or
    alike (the shortest solution)."""
    wide = deltas.double()
    gram, target = wide @ wide.T, wide @ change.double()
    found: Sequence[float] = (torch.linalg.pinv(gram, hermitian=True, rtol=1e-10) @ target).tolist()
    return tuple(found)


def _kind(name: str) -> str:
    """A tensor's name without its layer: 'self_attn.q_proj.weight'."""
    place = layer_of(name)
    if place is None:
        return name
    return name[len(place[0]) :].lstrip(".").split(".", 1)[-1]
