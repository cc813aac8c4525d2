"""How well a policy's logits predict texts that are given: teacher forcing under fusion.

Every source reads the whole text in one pass; the policy then fuses all positions at once, or one
after the other where a step depends on the one before.

Legend: B rows, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polytask.errors import ConfigError
from polytask.infer.fusion_generate import Prompts, check_ids, pad_left
from polytask.infer.fusion_policy import Policy, State
from polytask.infer.logit_sources import LogitSource, check_same_vocabulary


@dataclass(frozen=True)
class Scored:
    """One text: `nll` (n,) in nats of the tokens from `start` on, and what the policy told of the
    steps that predict them: name -> (n, ...)."""

    nll: Tensor
    told: dict[str, Tensor]


def score(
    sources: Sequence[LogitSource],
    policy: Policy,
    texts: Prompts,
    *,
    start: int = 1,
    batch_size: int = 8,
) -> list[Scored]:
    """-log p of every token from place `start` on, given those before it.

    `start` >= 1: what stands before is the prompt. A text that ends before `start` has no tokens
    to score. Errors as for `generate`.
    """
    if policy.sources is not None and len(sources) != policy.sources:
        raise ConfigError(f"the policy combines {policy.sources} models, not {len(sources)}")
    if start < 1:
        raise ConfigError(f"start = {start}: the first token has nothing before it; use 1 or more")
    check_same_vocabulary(sources)
    for source in sources:
        check_ids(texts, len(source.vocabulary), "text")
        longest = max(map(len, texts), default=0)
        if source.longest is not None and longest > source.longest:
            raise ConfigError(
                f"'{source.name}' has {source.longest} positions and a text has {longest} tokens"
            )
    found: list[Scored] = []
    for at in range(0, len(texts), batch_size):
        part = texts[at : at + batch_size]
        ids, valid = pad_left(part)
        logits = [source.forward(ids, None, valid, last=False)[0] for source in sources]
        width = ids.shape[1]
        # Row r predicts its token number k from place offset + k - 1 of the padded row.
        spans = [(width - len(text) + start, width) for text in part]
        found += fold(logits, ids, spans, policy)
    return found


def fold(
    logits: Sequence[Tensor], ids: Tensor, spans: Sequence[tuple[int, int]], policy: Policy
) -> list[Scored]:
    """Score places first to last - 1 of each row from logits (B, N, V) that are there already;
    the logits at place i - 1 predict ids[:, i]."""
    counts = torch.tensor([max(0, last - first) for first, last in spans])
    firsts = torch.tensor([first for first, _ in spans])
    row = torch.repeat_interleave(torch.arange(len(spans)), counts)
    step = torch.arange(len(row)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    place = firsts[row] + step
    label = ids[row, place]
    if policy.stateless:
        nll, told = _choose(logits, row, place, label, policy, State())[:2]
    else:
        nll, told = _in_turn(logits, row, place, label, step, policy)
    parts = counts.tolist()
    pieces = {name: torch.split(value, parts) for name, value in told.items()}
    return [
        Scored(one, {name: piece[i] for name, piece in pieces.items()})
        for i, one in enumerate(torch.split(nll, parts))
    ]


def _choose(
    logits: Sequence[Tensor],
    row: Tensor,
    place: Tensor,
    label: Tensor,
    policy: Policy,
    state: State,
) -> tuple[Tensor, dict[str, Tensor], State]:
    choice = policy([x[row, place - 1] for x in logits], state)
    log_p = choice.logits.float().log_softmax(-1).cpu()
    nll = -log_p.gather(1, label[:, None])[:, 0]
    return nll, {name: value.cpu() for name, value in choice.told.items()}, choice.state


def _in_turn(
    logits: Sequence[Tensor],
    row: Tensor,
    place: Tensor,
    label: Tensor,
    step: Tensor,
    policy: Policy,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Step by step, all rows together; a row that ends leaves the state."""
    state, before = State(), row[step == 0]
    nlls, tolds, order = [], [], []
    for number in range(int(step.max()) + 1 if len(step) else 0):
        index = (step == number).nonzero()[:, 0]
        kept = torch.isin(before, row[index])
        state = {name: value[kept.to(value.device)] for name, value in state.items()}
        before = row[index]
        nll, told, state = _choose(logits, before, place[index], label[index], policy, state)
        nlls.append(nll)
        tolds.append(told)
        order.append(index)
    if not order:
        return torch.zeros(0), {}
    back = torch.cat(order).argsort()
    told = {name: torch.cat([one[name] for one in tolds])[back] for name in tolds[0]}
    return torch.cat(nlls)[back], told
