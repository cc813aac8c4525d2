"""Greedy generation: prompts once through the trunk, then one token a step with a cache.

Prompts of a batch may have different lengths and hold other modalities; a row stops at its end
token and the batch when all rows have stopped.

Legend: P pairs, N new tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from polytask.models.batch import Batch
from polytask.models.features import Features
from polytask.models.heads.base import Pairs
from polytask.models.language import decoder_first, token_scorer
from polytask.models.masks import MaskSpec
from polytask.models.stems import plan_layout
from polytask.models.task_linear import HostArray
from polytask.models.transformer import RouteContext

if TYPE_CHECKING:
    from polytask.models.multitask import MultitaskModel

Choose = Callable[[Tensor], Tensor]  # (P, V) logits -> (P,) token ids


def greedy(logits_PV: Tensor) -> Tensor:
    """The most likely token."""
    return logits_PV.argmax(-1)


@torch.no_grad()
def generate(
    model: MultitaskModel,
    batch: Batch,
    pairs: Pairs,
    max_new: int | None = None,
    choose: Choose = greedy,
) -> npt.NDArray[np.int64]:
    """(P, N) ids that follow each pair's prompt, the end token included, then padding.

    The prompt is the text before the first labelled token, or all of it without labels. `max_new`
    defaults to the longest labelled answer plus one, or to what is left of the text length.
    """
    prompt = prompt_lengths(batch, pairs)
    limit = max_new if max_new is not None else _limit(model, pairs, prompt)
    state = model.decoder_state(select_prompts(batch, pairs, prompt))
    inputs = model.spec.inputs
    end = -1 if inputs.end_id is None else inputs.end_id
    found = np.full((len(pairs), limit), inputs.pad_id, np.int64)
    running = torch.ones(len(pairs), dtype=torch.bool, device=state.logits.device)
    for step in range(limit):
        token = torch.where(running, choose(state.logits), inputs.pad_id)
        found[:, step] = token.cpu().numpy()
        running = running & (token != end)
        if step + 1 == limit or not bool(running.any()):
            return found[:, : step + 1]
        state.advance(token)
    return found


def prompt_lengths(batch: Batch, pairs: Pairs) -> HostArray:
    """(P,) tokens before the first labelled one (after the very first), or all of the text."""
    assert pairs.value is not None
    entry = batch.entries("text")[pairs.sequence[:, 0]]
    length: HostArray = batch.known("text.length")[entry]
    labelled = pairs.value[:, 1:] != -100
    if labelled.shape[1] == 0:
        return length
    found: HostArray = np.where(labelled.any(1), labelled.argmax(1) + 1, length)
    return found


def _limit(model: MultitaskModel, pairs: Pairs, prompt: HostArray) -> int:
    assert pairs.value is not None
    answer = (pairs.value[:, 1:] != -100).sum(1)
    if len(answer) and answer.min() > 0:
        return int(answer.max()) + 1
    return max(1, model.spec.inputs.text_length - int(prompt.min(initial=0)))


def select_prompts(batch: Batch, pairs: Pairs, prompt: HostArray) -> Batch:
    """A batch of the pairs' first sequences, in pair order, with texts cut to their prompts."""
    wanted = pairs.sequence[:, 0]
    fields: dict[str, Tensor] = {}
    for modality in {name.partition(".")[0] for name in batch.fields}:
        owner = batch.known(f"{modality}.sequence")
        entry, pair = _entries_of(owner, wanted)
        if not len(entry):
            continue
        for name, value in batch.fields.items():
            if name.partition(".")[0] == modality:
                fields[name] = value[torch.from_numpy(entry).to(value.device)]
        fields[f"{modality}.sequence"] = torch.from_numpy(pair)
        if modality == "text":
            fields |= _cut(batch, entry, prompt[pair])
    index = torch.from_numpy(wanted).to(batch.task.device)
    return replace(
        batch,
        fields=fields,
        targets={},
        task=batch.task[index],
        row=batch.row[index],
        host={},
    )


def _cut(batch: Batch, entry: HostArray, prompt: HostArray) -> dict[str, Tensor]:
    ids = batch.fields["text.ids"]
    length = np.minimum(batch.known("text.length")[entry], prompt)
    prefix = np.minimum(batch.known("text.prefix")[entry], length)
    kept = ids[torch.from_numpy(entry).to(ids.device)][:, : int(length.max(initial=1))]
    return {
        "text.ids": kept,
        "text.length": torch.from_numpy(length),
        "text.prefix": torch.from_numpy(prefix),
    }


def _entries_of(owner: HostArray, wanted: HostArray) -> tuple[HostArray, HostArray]:
    """Entries that belong to each wanted sequence, and the position of that in `wanted`."""
    order = np.argsort(owner, kind="stable")
    ordered = owner[order]
    left = np.searchsorted(ordered, wanted, "left")
    count = np.searchsorted(ordered, wanted, "right") - left
    position = np.repeat(np.arange(len(wanted)), count)
    within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
    return order[np.repeat(left, count) + within], position


class CausalState:
    """Decoding with the trunk itself: prompt and answer are one sequence."""

    def __init__(self, model: MultitaskModel, batch: Batch) -> None:
        self.model = model
        entries = model.entries(batch)
        layout = plan_layout(entries, batch.sequences, summary=False)
        x, mask = model.spliced(batch, entries, layout, summary=None)
        prefix = mask.prefix if mask.causal else torch.from_numpy(layout.length).to(x.device)
        self.cache: Any = model.new_cache()
        mask = MaskSpec(causal=True, length=mask.length, prefix=prefix)
        model.announce(batch.task)
        self.context = RouteContext(batch.task, mask.valid(layout.width, x.device))
        hidden = model.trunk(x, mask, cache=self.cache, context=self.context)
        last = np.arange(batch.sequences) * layout.width + layout.length - 1
        index = torch.from_numpy(last).to(x.device)
        self._score = token_scorer(model)
        self.logits = self._score(hidden.flatten(0, 1).index_select(0, index))

    def advance(self, token_P: Tensor) -> None:
        """Append a token to every row."""
        x = self.model.embed_text(token_P[:, None])
        context = RouteContext(self.context.task, None)
        hidden = self.model.trunk(x, MaskSpec(causal=True), cache=self.cache, context=context)
        self.logits = self._score(hidden[:, 0])


class MemoryState:
    """Decoding with a decoder that attends to the encoded prompt."""

    def __init__(self, model: MultitaskModel, batch: Batch) -> None:
        self.model = model
        features: Features = model.shared_features(batch)
        self.memory = features.hidden
        self.length = torch.from_numpy(features.layout.length).to(self.memory.device)
        self.cache: Any = model.new_cache()
        self._score = token_scorer(model)
        model.announce(batch.task)
        self.advance(decoder_first(model, batch))

    def advance(self, token_P: Tensor) -> None:
        """Append a token to every row."""
        x = self.model.embed_decoder(token_P[:, None])
        hidden = self.model.decode(x, self.memory, self.length, self.cache)
        self.logits = self._score(hidden[:, 0])
