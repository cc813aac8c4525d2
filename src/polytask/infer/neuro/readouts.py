"""What attention and ablation say: who drives whom, and which pixels mattered.

Matrices are written [target, source]: A[y, p] is how much the model looked at past spikes of p
while it predicted a spike of y. A sum of attention mostly counts how often both fire, so the count
C[y, p] of looks is kept and A / C is the readout. Attention is a hypothesis about connectivity, no
measurement.

Legend: B windows, L current tokens, P past tokens, H heads, N units.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from polytask.errors import UserError
from polytask.models.neuro.batch import NeuroBatch
from polytask.models.neuro.model import NeuroformerModel
from polytask.models.neuro.stack import Trace

Kind = Literal["mean", "rollout", "ablation"]
KINDS: tuple[Kind, ...] = ("mean", "rollout", "ablation")


@dataclass(frozen=True)
class Connectivity:
    """Sums A and counts C of a readout, (N, N) float64 each, [target, source]."""

    kind: Kind
    total: NDArray[np.float64]
    count: NDArray[np.float64]

    @property
    def mean(self) -> NDArray[np.float64]:
        """A / C; 0 for pairs that were never seen."""
        return np.divide(
            self.total, self.count, out=np.zeros_like(self.total), where=self.count > 0
        )


def connectivity(
    model: NeuroformerModel, batches: Iterable[NeuroBatch], kind: Kind = "mean"
) -> Connectivity:
    """Directed readout over many windows.

    mean       attention from current to past tokens, averaged over layers and heads
    rollout    attention combined over layers, see `rollout`
    ablation   log p(y | past) - log p(y | past without the spikes of p), averaged over spikes of y
               in whose past p fired: how much p's spikes were worth

    Raises:
        UserError: another kind, or a model without a past.
    """
    if kind not in KINDS:
        raise UserError(f"connectivity: kind '{kind}' is none of {', '.join(KINDS)}")
    if model.config.past_layers == 0:
        raise UserError("connectivity is read from the past: this model has past_layers = 0")
    n = model.config.units
    total, count = torch.zeros(n * n, dtype=torch.float64), torch.zeros(n * n, dtype=torch.float64)
    for batch in batches:
        values, index = (_ablated if kind == "ablation" else _attended)(model, batch, kind)
        total += torch.bincount(index, values.double(), n * n).cpu()
        count += torch.bincount(index, minlength=n * n).double().cpu()
    return Connectivity(kind, total.view(n, n).numpy(), count.view(n, n).numpy())


@torch.no_grad()
def _attended(model: NeuroformerModel, batch: NeuroBatch, kind: Kind) -> tuple[Tensor, Tensor]:
    """Attention of every (predicted spike, past spike), and y * N + p of it."""
    trace = Trace()
    model(batch, trace)
    layers = trace.weights["past"]
    if kind == "mean":
        score = torch.stack([w.mean(1) for w in layers]).mean(0)
    else:
        score = rollout(layers, model.config.rollout_from, model.config.official)
    return _pairs(model, batch, score)


def _pairs(model: NeuroformerModel, batch: NeuroBatch, score_BLP: Tensor) -> tuple[Tensor, Tensor]:
    n = model.config.units
    target, source = batch.ids[:, 1:, None], batch.past_ids[:, None, :]
    real = (target < n) & (source < n)
    return score_BLP[real], (target * n + source)[real]


def rollout(layers: list[Tensor], first: int = 0, official: bool = False) -> Tensor:
    """(B, L, P) attention to the past over all layers, each (B, H, L, P).

    A layer adds what its heads (the strongest of them) look at to what the token had before, in
    equal parts: r <- (r + a) / 2, starting from nothing; rows are made to sum to 1 at the end. (The
    residual of a current token is itself, not a past token, so an identity over past tokens has no
    place here.)

    official: (a + I) / 2 with a rectangular I, rows made to sum to 1, multiplied as matrices where
    they are square and element by element where not; layer 0 skipped (`first` = 1).
    """
    if official:
        return _rollout_as_published(layers, first)
    found = torch.zeros_like(layers[0][:, 0])
    for weights in layers[first:]:
        strongest = weights.amax(1)
        share = strongest / strongest.sum(-1, keepdim=True).clamp(min=1e-12)
        found = (found + share) / 2
    return found / found.sum(-1, keepdim=True).clamp(min=1e-12)


def _rollout_as_published(layers: list[Tensor], first: int) -> Tensor:
    rows, keys = layers[0].shape[-2:]
    eye = torch.eye(rows, keys, device=layers[0].device)
    found = eye.expand(len(layers[0]), rows, keys)
    for weights in layers[first:]:
        a = (weights.amax(1) + eye) / 2
        a = a / a.sum(-1, keepdim=True)
        found = a @ found if rows == keys else a * found
    return found


@torch.no_grad()
def _ablated(model: NeuroformerModel, batch: NeuroBatch, _: Kind) -> tuple[Tensor, Tensor]:
    """Loss in log p of every (predicted spike, unit in its past), and y * N + p of it."""
    n, pad, time_pad = model.config.units, model.config.pad, model.config.time_pad
    present = F.one_hot(batch.past_ids.clamp(max=n), n + 1)[..., :n].amax(1)  # (B, N)
    window, unit = present.nonzero(as_tuple=True)
    whole = _log_p(model, batch)
    values, index = [], []
    for at in range(0, len(window), len(batch)):
        rows, gone = window[at : at + len(batch)], unit[at : at + len(batch)]
        part = batch.take(rows)
        hit = part.past_ids == gone[:, None]
        left = replace(
            part,
            past_ids=part.past_ids.masked_fill(hit, pad),
            past_times=part.past_times.masked_fill(hit, time_pad),
        )
        drop = whole[rows] - _log_p(model, left)
        target = part.ids[:, 1:]
        real = target < n
        values.append(drop[real])
        index.append((target * n + gone[:, None])[real])
    if not values:
        none = torch.zeros(0, device=batch.ids.device)
        return none, none.long()
    return torch.cat(values), torch.cat(index)


def _log_p(model: NeuroformerModel, batch: NeuroBatch) -> Tensor:
    """(B, L) log probability of each next id."""
    share: Tensor = model(batch).ids.float().log_softmax(-1)
    return share.gather(-1, batch.ids[:, 1:, None])[..., 0]


def stimulus_attribution(model: NeuroformerModel, batch: NeuroBatch) -> Tensor:
    """(B, T, H, W) how much each pixel's patches drove the true spikes.

    Gradient of the summed logits of the true next ids, times the attention to video tokens, clamped
    at 0, averaged over heads, summed over layers and spikes (the token of SOS is left out); a patch
    shares its value among the pixels it covers.

    Raises:
        UserError: the model has no video blocks, or the batch no frames.
    """
    video = model.config.video
    if video is None or video.layers == 0 or batch.frames is None:
        raise UserError("stimulus attribution needs a model with video blocks, and frames")
    trace = Trace()
    with torch.enable_grad():
        out = model(batch, trace)
        target = batch.ids[:, 1:]
        real = target < model.config.units
        total = (out.ids.gather(-1, target[..., None])[..., 0] * real).sum()
        layers = trace.weights["video"]
        gradients = torch.autograd.grad(total, layers)
    score = torch.zeros(len(target), layers[0].shape[-1], device=target.device)
    for weights, gradient in zip(layers, gradients, strict=True):
        each = (weights.detach() * gradient).clamp(min=0).mean(1)  # (B, L, M)
        score += (each * real[..., None]).sum(1)
    patches = score[:, 1:].reshape(len(score), 1, *video.grid)
    return _spread(patches, video.kernel, video.stride or video.kernel, batch.frames.shape[1:])


def _spread(
    patches: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], size: torch.Size
) -> Tensor:
    """Patch values (B, 1, T', H', W') shared equally among their pixels, (B, T, H, W)."""
    ones = torch.ones(1, 1, *kernel, device=patches.device)
    pixels = F.conv_transpose3d(patches, ones / ones.numel(), stride=stride)[:, 0]
    missing = [n - m for n, m in zip(size, pixels.shape[1:], strict=True)]
    return F.pad(pixels, (0, missing[2], 0, missing[1], 0, missing[0]))
