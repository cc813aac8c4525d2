"""One step of dynamic logit fusion: move a large model as far as small experts moved their base.

Fan et al. 2024, "On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion", arXiv
2406.15480. With P = softmax(large), Q = softmax(base), Q_t = softmax(expert t):

    P~(alpha) = softmax(large + sum_t alpha_t d_t),           d_t = expert_t - base
    a_t = KL(Q_t || Q),   b_t = KL(Q || Q_t)                  how far expert t moved
    L(alpha) = sum_t (KL(P~ || P) - a_t)^2 + (KL(P || P~) - b_t)^2

and every row of every step takes the alpha that minimises L over a grid. Both divergences follow
from one log-normaliser. With s = alpha d centred so that E_P[s] = 0,

    K = log sum P exp(s),    KL(P || P~) = K,    KL(P~ || P) = E_P~[s] - K,

so the whole grid is one batched pass, in float32 log-space. Adding the shift of one expert with
alpha fixed at 1 is proxy tuning (Liu et al. 2024, arXiv 2401.08565).

A token that a model bans (-inf, or the most negative number of its dtype) makes no difference of
infinities: d_t is 0 where base or expert bans it, P keeps the bans of the large model, and a_t and
b_t compare base and expert on the tokens that all three allow.

Legend: B rows, T experts, V vocabulary, N grid points.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from polytask.errors import ConfigError, DataError

Mode = Literal["single", "joint", "static"]
Refine = Literal["none", "golden"]
Pairing = Literal["matched", "swapped"]
Bounds = Sequence[tuple[float, float]]

GRID = tuple(round(i / 10, 1) for i in range(21))  # the paper's: 0, 0.1, ..., 2
MOST_POINTS = 20_000  # of a joint grid
_HELD = 2**21  # numbers of one chunk of the search: they stay in the processor's cache
_GOLDEN = (math.sqrt(5) - 1) / 2
_STEPS = 20  # of golden section: the bracket shrinks to 1/15,000


class Fused(NamedTuple):
    """What a step found; all float32 (float64 where all inputs are).

    logits      (B, V) of P~, not normalised; -inf where the large model has it
    alpha       (B, T)
    loss        (B,) L(alpha)
    divergence  (B, 2) KL(P~ || P), KL(P || P~)
    target      (B, T, 2) a_t, b_t
    """

    logits: Tensor
    alpha: Tensor
    loss: Tensor
    divergence: Tensor
    target: Tensor


@torch.no_grad()
def fuse_step(
    large: Tensor,
    base: Tensor,
    experts: Tensor,
    grid: Sequence[float] = GRID,
    mode: Mode = "single",
    *,
    bounds: Bounds | None = None,
    refine: Refine = "none",
    alpha: float | Sequence[float] | Tensor | None = None,
    pairing: Pairing = "matched",
) -> Fused:
    """Fuse the logits of one step.

    Args:
        large: (B, V) logits of the large model, any float dtype.
        base: (B, V) of the small model that the experts were tuned from.
        experts: (T, B, V).
        grid: strengths to try; 0 is among them and none is negative.
        mode: 'single' lets one expert act per row: T searches along one axis each, the best
            (expert, strength) wins (the paper's way). 'joint' tries every combination, N^T.
            'static' takes `alpha` as it is.
        bounds: (lowest, highest) strength of each expert; grid points outside are not tried.
        refine: 'golden' searches between the grid's neighbours of each expert's best point
            (single only); never worse than the grid.
        alpha: for 'static': one number, (T,) or (B, T).
        pairing: 'swapped' pairs each direction with the other one's target, as one line of the
            paper's appendix has it; its text and pseudocode, and the default, do not.

    Ties go to the smallest strength, then to the first expert: an expert equal to its base has
    no effect and gets 0.

    Errors: `DataError` for shapes that differ, NaN or +inf logits, or a row whose tokens are all
    banned; `ConfigError` for no expert, a grid that is empty, negative or without 0, bounds that
    leave nothing, too many combinations.
    """
    log_p, shift, target = _prepared(large, base, experts)
    if pairing == "swapped":
        target = target.flip(-1)
    count = len(experts)
    if mode == "static":
        chosen = _static(alpha, count, log_p)
    elif mode == "joint":
        if refine != "none":
            raise ConfigError("refine: golden section needs mode 'single', not 'joint'")
        points = log_p.new_tensor(joint_points(checked_grid(grid), count, bounds))
        chosen = _search_joint(log_p, shift, target, points)
    elif mode == "single":
        lines = log_p.new_tensor(checked_grid(grid))
        allowed = _allowed(lines, count, bounds)
        chosen = _search_single(log_p, shift, target, lines, allowed, refine)
    else:
        raise ConfigError(f"mode '{mode}' is none of single, joint, static")
    moved = torch.einsum("bt,tbv->bv", chosen, shift)
    divergence = torch.stack(divergences(log_p, moved), -1)
    logits = torch.where(log_p.isneginf(), log_p, _wide(large) + moved)
    loss = _loss(divergence, target.movedim(0, -2))
    if pairing == "swapped":
        target = target.flip(-1)
    return Fused(logits, chosen, loss, divergence, target.movedim(0, -2))


def divergences(log_p: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """KL(P~ || P) and KL(P || P~) for P~ = softmax(log_p + shift), over the last dimension.

    `log_p` is normalised and may hold -inf; `shift` is finite.
    """
    centred = _centred(log_p, shift)
    mean, normaliser = _tilted(log_p + centred, centred)
    return (mean - normaliser).clamp_(min=0), normaliser.clamp(min=0)


def _centred(log_p: Tensor, shift: Tensor) -> Tensor:
    """The shift less its mean under P; that changes no distribution."""
    return shift - (log_p.exp() * shift).sum(-1, keepdim=True)


def _tilted(z: Tensor, centred: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of `centred` under softmax(z), and log sum exp(z). Overwrites z."""
    most = z.amax(-1, keepdim=True)
    weight = z.sub_(most).exp_()
    total = weight.sum(-1)
    return weight.mul_(centred).sum(-1) / total, total.log() + most[..., 0]


def _loss(divergence: Tensor, target_T2: Tensor) -> Tensor:
    """sum_t |divergence - target_t|^2; divergence (..., 2), target (..., T, 2)."""
    return (divergence.unsqueeze(-2) - target_T2).square().sum((-1, -2))


# -- what goes in


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _prepared(large: Tensor, base: Tensor, experts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log P (B, V), d (T, B, V) and the targets (T, B, 2)."""
    if large.dim() != 2 or base.shape != large.shape or experts.shape[1:] != large.shape:
        raise DataError(
            f"logits should be (rows, vocabulary) and (experts, rows, vocabulary) of one size, not "
            f"large {tuple(large.shape)}, base {tuple(base.shape)}, experts {tuple(experts.shape)}"
        )
    if experts.dim() != 3 or not len(experts):
        raise ConfigError("fusion needs at least one expert")
    given = {"the large model": large, "the base": base, "the experts": experts}
    banned = []
    for name, x in given.items():
        if not x.is_floating_point():
            raise DataError(f"logits of {name} should be floats, not {x.dtype}")
        if bool((x.isnan() | x.isposinf()).any()):
            raise DataError(f"logits of {name} hold NaN or infinity")
        # Some models ban with the most negative number there is, whose differences overflow.
        banned.append(x <= torch.finfo(x.dtype).min / 2)
    no_large, no_base, no_expert = banned
    if bool(no_large.all(-1).any()):
        row = int(no_large.all(-1).nonzero()[0])
        raise DataError(f"row {row}: the large model bans every token")
    log_p = torch.log_softmax(_wide(large).masked_fill(no_large, -torch.inf), -1)
    no_small = no_base | no_expert
    wide_base = _wide(base).to(log_p.dtype)
    shift = (_wide(experts).to(log_p.dtype) - wide_base).masked_fill_(no_small, 0.0)
    log_q = wide_base.masked_fill(no_small | no_large, -torch.inf)
    # Nothing in common: nothing can be compared, and the expert has not moved.
    apart = log_q.isneginf().all(-1, keepdim=True)
    log_q = torch.log_softmax(log_q.masked_fill(apart, 0.0), -1)
    target = torch.stack(divergences(log_q, shift.masked_fill(apart, 0.0)), -1)
    return log_p, shift, target


def checked_grid(grid: Sequence[float]) -> tuple[float, ...]:
    """The strengths in rising order, once each; `ConfigError` when they cannot be searched."""
    found = tuple(sorted({float(a) for a in grid}))
    if not found:
        raise ConfigError("grid: no strength to try")
    if not all(map(math.isfinite, found)):
        raise ConfigError(f"grid: {found} holds a value that is not finite")
    if found[0] < 0:
        raise ConfigError(
            f"grid: {found[0]:g} is negative: it would push away from what the experts learned. "
            "Use strengths from 0 on"
        )
    if found[0] > 0:
        raise ConfigError(
            f"grid: 0 is missing (the smallest strength is {found[0]:g}), so a step in which no "
            "expert helps could not be left to the large model. Add 0, or set bounds"
        )
    return found


def parse_grid(text: str) -> tuple[float, ...]:
    """'0:2:.1' is 0, 0.1, ..., 2 (the end belongs to it); '0,.5,1' is a list."""
    try:
        if ":" in text:
            start, stop, step = (float(part) for part in text.split(":"))
            if step <= 0 or stop < start or not math.isfinite(start + stop + step):
                raise ValueError
            count = math.floor((stop - start) / step + 1e-9) + 1
            found = tuple(round(start + i * step, 10) for i in range(count))
        else:
            found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"grid '{text}' should be start:stop:step (0:2:.1) or a list (0,.5,1)"
        ) from None
    return checked_grid(found)


def checked_bounds(bounds: Bounds | None, count: int) -> tuple[tuple[float, float], ...]:
    """One (lowest, highest) per expert; everything without `bounds`."""
    if bounds is None:
        return ((0.0, math.inf),) * count
    found = tuple((float(low), float(high)) for low, high in bounds)
    if len(found) != count:
        raise ConfigError(f"bounds: {len(found)} pairs for {count} experts")
    for number, (low, high) in enumerate(found):
        if not 0 <= low <= high:
            raise ConfigError(f"bounds: expert {number} has {low:g} to {high:g}")
    return found


def _allowed(grid: Tensor, count: int, bounds: Bounds | None) -> Tensor:
    """(N, T) bool: which grid points each expert may take."""
    low, high = grid.new_tensor(checked_bounds(bounds, count)).unbind(1)
    slack = 1e-6  # float32 has no exact 0.1
    allowed = (grid[:, None] >= low - slack) & (grid[:, None] <= high + slack)
    if not bool(allowed.any(0).all()):
        number = int((~allowed.any(0)).nonzero()[0])
        raise ConfigError(f"bounds: no grid point lies within those of expert {number}")
    return allowed


def joint_points(
    grid: Sequence[float], count: int, bounds: Bounds | None = None
) -> list[tuple[float, ...]]:
    """Every combination of strengths, the smallest sum first."""
    lines = [
        [a for a in grid if low - 1e-6 <= a <= high + 1e-6]
        for low, high in checked_bounds(bounds, count)
    ]
    points = math.prod(map(len, lines))
    if points > MOST_POINTS:
        raise ConfigError(
            f"mode 'joint' would try {points:,} combinations of {count} experts (at most "
            f"{MOST_POINTS:,}); use mode 'single' or a coarser grid"
        )
    if not points:
        raise ConfigError("bounds: no grid point lies within them")
    return sorted(itertools.product(*lines), key=lambda point: (sum(point), point))


def _static(alpha: float | Sequence[float] | Tensor | None, count: int, log_p: Tensor) -> Tensor:
    if alpha is None:
        raise ConfigError("mode 'static' needs alpha: one strength, or one per expert")
    found = torch.as_tensor(alpha, dtype=log_p.dtype, device=log_p.device)
    if found.dim() > 0 and found.shape[-1] != count:
        raise ConfigError(f"alpha: {found.shape[-1]} strengths for {count} experts")
    if not bool((found.isfinite() & (found >= 0)).all()):
        raise ConfigError(f"alpha: {found.tolist()} holds a strength that is negative or infinite")
    return found.expand(len(log_p), count)


# -- the search


def _search_single(
    log_p: Tensor, shift: Tensor, target: Tensor, grid: Tensor, allowed: Tensor, refine: Refine
) -> Tensor:
    """(B, T) with one strength above 0 per row at most."""
    experts, rows, vocabulary = shift.shape
    centred = _centred(log_p, shift)
    size = max(1, _HELD // (len(grid) * experts * vocabulary))
    parts = []
    for at in range(0, rows, size):
        part = slice(at, at + size)
        p, s, wanted = log_p[part], centred[:, part], target[:, part]
        losses = _line_losses(p, s, wanted, grid[:, None, None].expand(-1, *s.shape[:2]))
        losses = losses.masked_fill(~allowed[:, :, None], torch.inf)  # (N, T, b)
        if refine == "golden":
            alpha, loss = _golden(p, s, wanted, grid, losses, allowed)
            best = loss.argmin(0)  # the first of equals
            strength = alpha.gather(0, best[None])[0]
        else:
            best_point = losses.flatten(0, 1).argmin(0)  # by strength, then by expert
            strength, best = grid[best_point // experts], best_point % experts
        chosen = log_p.new_zeros(p.shape[0], experts)
        parts.append(chosen.scatter_(1, best[:, None], strength[:, None]))
    return torch.cat(parts) if parts else log_p.new_zeros(0, experts)


def _line_losses(log_p: Tensor, centred: Tensor, target: Tensor, alpha_NTB: Tensor) -> Tensor:
    """(N, T, B) L with expert t alone at strength alpha[n, t, b]."""
    alpha = alpha_NTB[..., None]
    z = torch.addcmul(log_p.expand(*alpha.shape[:3], -1), alpha, centred)
    mean, normaliser = _tilted(z, centred)
    forward = (alpha_NTB * mean - normaliser).clamp_(min=0)
    found = torch.stack((forward, normaliser.clamp_(min=0)), -1)
    return _loss(found, target.movedim(0, -2))


def _golden(
    log_p: Tensor, centred: Tensor, target: Tensor, grid: Tensor, losses: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor]:
    """(T, B) strength and loss of each expert's best, searched between the grid's neighbours.

    Each squared term falls and then rises in alpha (both divergences are nondecreasing), their sum
    need not: the best of everything seen is kept, so the result is never worse than the grid's.
    """
    best, where = losses.min(0)  # (T, B)
    alpha = grid[where]
    # Grid points may be outside an expert's bounds: neighbours are clamped to its own range.
    lowest = torch.where(allowed, grid[:, None], torch.inf).amin(0)[:, None]
    highest = torch.where(allowed, grid[:, None], -torch.inf).amax(0)[:, None]
    left = torch.maximum(grid[(where - 1).clamp(min=0)], lowest)
    right = torch.minimum(grid[(where + 1).clamp(max=len(grid) - 1)], highest)
    for _ in range(_STEPS):
        width = _GOLDEN * (right - left)
        inner = torch.stack((right - width, left + width))  # (2, T, B)
        found = _line_losses(log_p, centred, target, inner)
        for point, loss in zip(inner, found, strict=True):
            better = loss < best
            alpha, best = torch.where(better, point, alpha), torch.where(better, loss, best)
        lower = found[0] <= found[1]
        right = torch.where(lower, inner[1], right)
        left = torch.where(lower, left, inner[0])
    return alpha, best


def _search_joint(log_p: Tensor, shift: Tensor, target: Tensor, points: Tensor) -> Tensor:
    """(B, T) the best of all combinations (G, T)."""
    experts, rows, vocabulary = shift.shape
    size = max(1, _HELD // (len(points) * vocabulary))
    parts = []
    for at in range(0, rows, size):
        part = slice(at, at + size)
        moved = torch.einsum("gt,tbv->gbv", points, shift[:, part])
        divergence = torch.stack(divergences(log_p[part], moved), -1)
        losses = _loss(divergence, target[:, part].movedim(0, -2))
        parts.append(points[losses.argmin(0)])
    return torch.cat(parts) if parts else log_p.new_zeros(0, experts)
