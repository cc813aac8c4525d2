"""Heads that read text tokens: tag (a class per token) and generate (the next token).

Only tokens that count are gathered, from all pairs into one flat list, before anything is scored.

Legend: P pairs, T text length, N tokens that count, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from polytask import objectives
from polytask.models.features import Features
from polytask.models.heads.base import Head, Output, Pairs, on_device
from polytask.models.heads.vectors import to_numpy
from polytask.models.specs import HeadSpec, ModelConfig
from polytask.models.task_linear import HostArray, TaskLinear

IGNORE = -100


class TagHead(Head):
    """A class per token of the text."""

    def __init__(self, specs: Sequence[HeadSpec], config: ModelConfig, dim: int) -> None:
        super().__init__(specs, config)
        self.linear = TaskLinear(dim, [s.task for s in specs], [s.outputs for s in specs])

    def forward(self, features: Features, pairs: Pairs) -> Output:
        """(N, C) logits of every token of the pairs' texts."""
        entry = features.entry(pairs.sequence[:, 0], "text")
        length = features.layout.count["text"][entry]
        step = np.arange(int(length.max(initial=0)))
        pair, position = np.nonzero(step < length[:, None])
        place = features.places(pairs.sequence[:, 0], "text", step)[pair, position]
        hidden = features.hidden.flatten(0, 1)
        x = hidden.index_select(0, on_device(place, hidden))
        slot = pairs.slot[pair]
        logits = self.linear(x, slot)
        width = self.linear.width(slot)
        if (width != logits.shape[1]).any():
            logits = objectives.mask_classes(logits, on_device(width, logits))
        return Output(
            logits,
            pairs.target.task,
            pairs.target.row,
            on_device(pair, logits),
            on_device(position, logits),
        )

    def losses(self, output: Output, pairs: Pairs) -> dict[str, Tensor]:
        assert output.pair is not None and output.position is not None
        value = pairs.target.value
        inside = output.position < value.shape[1]
        label = value[output.pair, output.position.clamp(max=value.shape[1] - 1)]
        label = torch.where(inside, label, IGNORE)
        each = nn.functional.cross_entropy(
            output.value.float(), label, reduction="none", ignore_index=IGNORE
        )
        mean = self.objective.token_mean
        weight = (label != IGNORE).float()
        task = pairs.target.task
        return {"tag": objectives.per_pair(each, output.pair, len(pairs), task, mean, weight)}

    def predict(self, output: Output, pairs: Pairs) -> npt.NDArray[Any]:
        """(P, T) class per token, -100 beyond the text."""
        assert output.pair is not None and output.position is not None
        pair, position = to_numpy(output.pair), to_numpy(output.position)
        width = max(int(position.max(initial=-1)) + 1, pairs.target.value.shape[1])
        found = np.full((len(pairs), width), IGNORE, np.int64)
        found[pair, position] = to_numpy(output.value.argmax(-1))
        return found

    def task_rows(self, slot: int) -> dict[str, slice]:
        rows = self.linear.rows(slot)
        return {"linear.weight": rows, "linear.bias": rows}


class GenerateHead(Head):
    """The next token, scored against the input embeddings (tied) or an own matrix."""

    def __init__(
        self, specs: Sequence[HeadSpec], config: ModelConfig, dim: int, vocab_size: int, tied: bool
    ) -> None:
        super().__init__(specs, config)
        self.weight = None if tied else nn.Parameter(torch.zeros(vocab_size, dim))

    def selected(self, features: Features, pairs: Pairs) -> tuple[Tensor, HostArray, HostArray]:
        """Hidden states (N, D) that predict a labelled token, with its pair and position."""
        assert pairs.value is not None
        pair, position = np.nonzero(pairs.value[:, 1:] != IGNORE)
        position = position + 1
        if features.decoded is not None:
            hidden = features.decoded.flatten(0, 1)
            step = position - first_label(pairs.value)[pair]
            origin = pair if pairs.index is None else pairs.index[pair]
            place = origin * features.decoded.shape[1] + step
        else:
            hidden = features.hidden.flatten(0, 1)
            start = features.starts(pairs.sequence[:, 0], "text")
            place = (pairs.sequence[:, 0] * features.layout.width + start)[pair] + position - 1
        return hidden.index_select(0, on_device(place, hidden)), pair, position

    def forward(self, features: Features, pairs: Pairs) -> Output:
        """(N, V) logits of every labelled token."""
        x, pair, position = self.selected(features, pairs)
        weight, bias = self.scorer(features)
        logits = nn.functional.linear(x, weight, bias)
        return Output(
            logits,
            pairs.target.task,
            pairs.target.row,
            on_device(pair, logits),
            on_device(position, logits),
        )

    def scorer(self, features: Features) -> tuple[Tensor, Tensor | None]:
        """(V, D) weight and (V,) bias that turn hidden states into logits."""
        if self.weight is not None:
            return self.weight, None
        assert features.lm_weight is not None
        return features.lm_weight, features.lm_bias

    def losses(self, output: Output, pairs: Pairs) -> dict[str, Tensor]:
        assert output.pair is not None and output.position is not None
        label = pairs.target.value[output.pair, output.position]
        nll, z = objectives.token_cross_entropy(output.value, label)
        return self._by_pair(nll, z, output.pair, pairs)

    def terms(self, features: Features, pairs: Pairs) -> dict[str, Tensor]:
        """The same losses without holding all logits at once."""
        x, pair, position = self.selected(features, pairs)
        weight, bias = self.scorer(features)
        of_pair = on_device(pair, x)
        label = pairs.target.value[of_pair, on_device(position, x)]
        nll, z = objectives.projected_cross_entropy(x, weight, label, bias)
        return self._by_pair(nll, z, of_pair, pairs)

    def _by_pair(
        self, nll_N: Tensor, z_N: Tensor, pair_N: Tensor, pairs: Pairs
    ) -> dict[str, Tensor]:
        task, mean = pairs.target.task, self.objective.token_mean
        terms = {"generate": objectives.per_pair(nll_N, pair_N, len(pairs), task, mean)}
        if self.objective.z_loss:
            z_N = self.objective.z_loss * z_N
            terms["z_loss"] = objectives.per_pair(z_N, pair_N, len(pairs), task, mean)
        return terms

    def predict(self, output: Output, pairs: Pairs) -> npt.NDArray[Any]:
        """(P, T) the most likely token at each labelled place given the true ones before it, -100
        elsewhere. (`polytask.models.generate` writes freely.)"""
        assert output.pair is not None and output.position is not None
        found = np.full(pairs.target.value.shape, IGNORE, np.int64)
        best = to_numpy(output.value.argmax(-1))
        found[to_numpy(output.pair), to_numpy(output.position)] = best
        return found


def first_label(value: HostArray) -> HostArray:
    """(P,) position of each pair's first labelled token after the first; T if there is none."""
    labelled = value[:, 1:] != IGNORE
    found: HostArray = np.where(labelled.any(1), labelled.argmax(1) + 1, value.shape[1])
    return found
