"""What a Neuroformer learns: next spike, alignment of modalities, behaviour.

    L = a (1 - 1/n) [ 3/5 CE(id) + 2/5 CE(time) ] + 1/n L_align + sum_v w_v L_v

(Antoniades et al., ICLR 2024, section 3.3); padding is no target, 1/n is 0 without alignment.
Every term comes per window, such that its plain mean over the windows of a batch is the term of
the formula: the mean over all tokens, over windows, over pairs of modalities.

Legend: B windows, L tokens, N classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from polytask.errors import DataError, UserError, suggestion
from polytask.models.batch import Terms
from polytask.models.neuro.batch import NeuroBatch
from polytask.models.neuro.model import NeuroformerModel, NeuroOutput
from polytask.objectives.contrast import info_nce


def next_token(logits_BLN: Tensor, target_BL: Tensor, ignore: int) -> Tensor:
    """(B,) -log p summed over a window's tokens, times B / all tokens of the batch."""
    each = F.cross_entropy(
        logits_BLN.float().flatten(0, 1), target_BL.flatten(), ignore_index=ignore, reduction="none"
    )
    tokens = (target_BL != ignore).sum()
    scale: Tensor = len(target_BL) / tokens.clamp(min=1)
    return each.view(target_BL.shape).sum(1) * scale


def alignment(vectors: Mapping[str, Tensor], temperature: float, symmetric: bool) -> Tensor:
    """(B,) InfoNCE averaged over all pairs of modalities, each pair in the order given.

    Raises:
        UserError: one window has nothing to be told apart from, or fewer than two modalities.
    """
    if len(vectors) < 2:
        raise UserError(
            f"alignment needs two modalities, the batch has {', '.join(vectors) or 'none'}"
        )
    first = next(iter(vectors.values()))
    rows = len(first)
    if rows < 2:
        raise UserError(
            "alignment needs at least 2 windows in a batch: alone, a window has nothing to be told "
            "apart from and its gradient is 0. Raise the batch size"
        )
    own = torch.arange(rows, device=first.device)
    heat = torch.full((rows,), temperature, device=first.device)
    found = [
        info_nce(a, b, torch.zeros_like(own), own, heat, one_sided=not symmetric)
        for a, b in itertools.combinations(vectors.values(), 2)
    ]
    return torch.stack(found).mean(0)


@dataclass(frozen=True)
class NeuroLoss:
    """(model, batch) -> terms 'id', 'time', 'align' and one per target, weighted as in L.

    Args:
        losses: terms that are learned from, as in few-shot finetuning on one target; the others
            are computed and logged but give no gradient. Empty: all.
    """

    losses: tuple[str, ...] = ()

    def __call__(self, model: NeuroformerModel, batch: NeuroBatch) -> Terms:
        out = model(batch)
        value = neuro_terms(model, out, batch)
        for name in self.losses:
            if name not in value:
                raise UserError(f"losses: there is no term '{name}'.{suggestion(name, value)}")
        if self.losses:
            value = {n: v if n in self.losses else v.detach() for n, v in value.items()}
        task = torch.zeros(len(batch), dtype=torch.long, device=out.ids.device)
        row = task if batch.row is None else batch.row
        return Terms(value, dict.fromkeys(value, task), dict.fromkeys(value, row))


def neuro_terms(model: NeuroformerModel, out: NeuroOutput, batch: NeuroBatch) -> dict[str, Tensor]:
    """Every term of the loss, (B,) each, weighted."""
    c = model.config
    aligned = c.align_share if c.align or c.always_quarter else 0.0
    spikes = c.spike_weight * (1 - aligned)
    found = {
        "id": spikes * c.id_share * next_token(out.ids, batch.ids[:, 1:], c.pad),
        "time": spikes * (1 - c.id_share) * next_token(out.times, batch.times[:, 1:], c.time_pad),
    }
    if c.align:
        vectors = model.vectors(out)
        found["align"] = aligned * alignment(vectors, c.temperature, c.symmetric)
    for name in c.targets:
        if name in batch.targets:
            weight = c.target_weights.get(name, 1.0)
            found[name] = weight * target_loss(model, out, name, batch.targets[name])
    return found


def target_loss(model: NeuroformerModel, out: NeuroOutput, name: str, target_B: Tensor) -> Tensor:
    """(B,) squared error, or -log p of the class."""
    answer, kind = model.answer(out, name).float(), model.config.targets[name]
    if kind.kind == "regression":
        return (answer[:, 0] - target_B.float()).square()
    classes = target_B.long()
    if bool(((classes < 0) | (classes >= answer.shape[1])).any()):
        raise DataError(
            f"target '{name}' has a class outside of 0 .. {answer.shape[1] - 1}: "
            f"{int(classes.min())} to {int(classes.max())}"
        )
    return F.cross_entropy(answer, classes, reduction="none")


@torch.no_grad()
def token_scores(
    model: NeuroformerModel, batches: Collection[NeuroBatch] | Any
) -> dict[str, float]:
    """Plain cross-entropies over all tokens of some batches, in nats: 'id', 'time'; mean loss of
    each target; 'loss', their weighted sum as trained on (without alignment, which depends on the
    batch size)."""
    c, total, count = model.config, {"id": 0.0, "time": 0.0}, {"id": 0, "time": 0}
    for batch in batches:
        out = model(batch)
        pairs = (("id", out.ids, batch.ids, c.pad), ("time", out.times, batch.times, c.time_pad))
        for name, logits, tokens, pad in pairs:
            target = tokens[:, 1:]
            used = int((target != pad).sum())
            mean = float(next_token(logits, target, pad).mean())
            total[name] += mean * used
            count[name] += used
        for name in c.targets:
            if name in batch.targets:
                each = target_loss(model, out, name, batch.targets[name])
                total[name] = total.get(name, 0.0) + float(each.sum())
                count[name] = count.get(name, 0) + len(each)
    found = {name: total[name] / max(1, count[name]) for name in total}
    loss = c.spike_weight * (c.id_share * found["id"] + (1 - c.id_share) * found["time"])
    for name in c.targets:
        loss += c.target_weights.get(name, 1.0) * found.get(name, 0.0)
    return {**found, "loss": loss}
