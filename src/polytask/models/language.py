"""The language side of a model: what scores tokens, and what a decoder is fed.

Legend: S sequences, P pairs, T decoder length, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from polytask.models.batch import Batch
from polytask.models.features import Features
from polytask.models.heads.base import on_device
from polytask.models.heads.tokens import IGNORE, GenerateHead, first_label
from polytask.models.hub import HubTrunk
from polytask.models.stems import TextStem

if TYPE_CHECKING:
    from polytask.models.multitask import MultitaskModel


def lm_weight(model: MultitaskModel) -> tuple[Tensor | None, Tensor | None]:
    """(V, D) weight and (V,) bias that score tokens; None if the head has a matrix of its own.

    Both are aliases of parameters: a tied weight counts as a shared feature (`Features.tensors`),
    not as the head's own parameter.
    """
    if isinstance(model.trunk, HubTrunk):
        weight, bias = model.trunk.scorer()
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)
    if not model.config.tie:
        return None, None
    stem = model.stems["text"]
    assert isinstance(stem, TextStem)
    return stem.embedding.weight.view_as(stem.embedding.weight), None


def token_scorer(model: MultitaskModel) -> Callable[[Tensor], Tensor]:
    """Hidden states (P, D) -> float32 logits (P, V)."""
    head = model.heads["generate"]
    assert isinstance(head, GenerateHead)
    weight, bias = lm_weight(model)
    chosen = head.weight if head.weight is not None else weight
    assert chosen is not None
    return lambda hidden: nn.functional.linear(hidden, chosen, bias).float()


def decoder_first(model: MultitaskModel, batch: Batch) -> Tensor:
    """(S,) a decoder's first input: the hub model's start token, or the last of the prompt."""
    ids = batch.fields["text.ids"]
    if isinstance(model.trunk, HubTrunk):
        return torch.full((batch.sequences,), model.trunk.decoder_start, device=ids.device)
    last = batch.fields["text.length"].to(ids.device)[:, None] - 1
    return ids.gather(1, last)[:, 0]


def decoder_states(
    model: MultitaskModel, features: Features, hidden_SLD: Tensor, batch: Batch
) -> Tensor:
    """(P, T, D) decoder states of every generation pair; the first predicts its first label."""
    pairs = model.all_pairs(batch, "generate")
    assert pairs.value is not None
    first = first_label(pairs.value)
    place = np.arange(pairs.value.shape[1])
    last = np.where(pairs.value != IGNORE, place, 0).max(1, initial=0)
    steps = max(1, int((last - first).max(initial=0)) + 1)
    # The input that predicts the label at t is the token at t - 1.
    index = first[:, None] - 1 + np.arange(steps)
    entry = on_device(features.entry(pairs.sequence[:, 0], "text"), hidden_SLD)
    ids = batch.fields["text.ids"].index_select(0, entry)
    ids = ids.gather(1, on_device(index.clip(0, ids.shape[1] - 1), ids))
    if isinstance(model.trunk, HubTrunk):
        start = torch.full_like(ids[:, :1], model.trunk.decoder_start)
        ids = torch.cat((start, ids[:, 1:]), 1)
    memory = hidden_SLD.index_select(0, pairs.target.sequence[:, 0])
    length = on_device(features.layout.length[pairs.sequence[:, 0]], ids)
    model.announce(batch.task.index_select(0, pairs.target.sequence[:, 0]))
    return model.decode(model.embed_decoder(ids), memory, length)
