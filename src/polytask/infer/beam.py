"""Beam search over any logit source, all prompts together.

    every prompt starts with one beam of score 0
    for each step:
        extend every beam by every token; keep the 2K best of the prompt
        those among the first K that end with a stop token are finished
        the best K that do not end go on (their caches are taken over from their parents)
        a prompt is done once no running beam can beat its K finished ones

A hypothesis' score is its log-probability / length ** penalty, the stop token counted. Since
log-probabilities only fall, a running beam is at best what it is now at the length that suits it
most; stopping on that bound loses nothing (`transformers` calls it early_stopping="never").

Legend: P prompts that run, K beams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polytask.errors import ConfigError
from polytask.infer.fusion_generate import Prompts, check_ids, pad_left
from polytask.infer.logit_sources import LogitSource


@dataclass(frozen=True)
class Beam:
    """One hypothesis: ids without the stop token, log-probability with it, and the score that
    hypotheses are ordered by. `stopped` is False at `max_new`."""

    ids: list[int]
    log_p: float
    score: float
    stopped: bool


@dataclass
class _Search:
    """The hypotheses of one prompt."""

    running: list[list[int]]
    finished: list[Beam] = field(default_factory=list)


def beam_search(
    source: LogitSource,
    prompts: Prompts,
    beams: int = 4,
    max_new: int = 64,
    length_penalty: float = 1.0,
    stop: Sequence[int] = (),
) -> list[list[Beam]]:
    """At most `beams` hypotheses per prompt, best first.

    length_penalty: 0 ranks by probability alone, larger values prefer longer texts. `stop` adds
    to the source's own ends. Errors: `ConfigError` for fewer than one beam or a negative penalty;
    `DataError` for a prompt without tokens, or ids outside the vocabulary.
    """
    _check(source, prompts, beams, max_new, length_penalty)
    if not prompts or not max_new:
        return [[] for _ in prompts]
    ends = torch.tensor(sorted({*stop, *source.end}), dtype=torch.long)
    searches = [_Search([[] for _ in range(beams)]) for _ in prompts]
    ids, valid = pad_left(prompts)
    logits, cache = source.forward(ids, None, valid)
    each = torch.arange(len(prompts)).repeat_interleave(beams)
    cache, logits = source.select(cache, each), logits[each.to(logits.device)]
    scores = torch.full((len(prompts), beams), -torch.inf, dtype=torch.float64)
    scores[:, 0] = 0.0
    active = list(range(len(prompts)))
    for step in range(max_new):
        last = step + 1 == max_new
        scores, parent, token = _extend(logits, scores, ends, last, [searches[i] for i in active],
                                        step + 1, length_penalty)  # fmt: skip
        keep = [
            place
            for place, number in enumerate(active)
            if not _done(searches[number], scores[place], beams, step + 1, max_new, length_penalty)
        ]
        if last or not keep:
            break
        kept = torch.tensor(keep)
        rows = (kept[:, None] * beams + parent[kept]).flatten()
        active, scores, token = [active[place] for place in keep], scores[kept], token[kept]
        cache = source.select(cache, rows)
        logits, cache = source.forward(token.reshape(-1, 1), cache)
    found = [sorted(s.finished, key=lambda beam: -beam.score)[:beams] for s in searches]
    return found


def _extend(
    logits: Tensor,
    scores_PK: Tensor,
    ends: Tensor,
    last: bool,
    searches: list[_Search],
    length: int,
    penalty: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Extend every beam; returns the going ones: scores, parents and tokens (P, K)."""
    prompts, beams = scores_PK.shape
    log_p = logits.double().log_softmax(-1).cpu().view(prompts, beams, -1)
    size = log_p.shape[-1]
    total = (log_p + scores_PK[:, :, None]).flatten(1)
    # Enough that K which do not end remain, whatever the stop tokens take.
    count = min(total.shape[1], (1 + max(1, len(ends))) * beams)
    best, place = total.topk(count, dim=1)
    parent, token = place // size, place % size
    ending = torch.isin(token, ends)
    new_scores, parents, tokens = scores_PK.clone(), [], []
    for row, search in enumerate(searches):
        before = search.running
        going: list[int] = []
        for rank in range(count):
            value = float(best[row, rank])
            if value == -torch.inf:
                break
            stops = bool(ending[row, rank])
            if stops and rank >= beams:
                continue
            grown = before[int(parent[row, rank])]
            if stops or (last and rank < beams):
                ids = grown if stops else [*grown, int(token[row, rank])]
                search.finished.append(Beam(list(ids), value, value / length**penalty, stops))
            if not stops and len(going) < beams:
                going.append(rank)
        search.running = [[*before[int(parent[row, r])], int(token[row, r])] for r in going]
        short = beams - len(going)  # a vocabulary smaller than the beam
        search.running += [[] for _ in range(short)]
        new_scores[row] = torch.cat((best[row, going], best.new_full((short,), -torch.inf)))
        parents.append(torch.cat((parent[row, going], parent.new_zeros(short))))
        tokens.append(torch.cat((token[row, going], token.new_zeros(short))))
    return new_scores, torch.stack(parents), torch.stack(tokens)


def _done(
    search: _Search, scores_K: Tensor, beams: int, length: int, max_new: int, penalty: float
) -> bool:
    """Whether nothing that runs can still come among the best K. A single beam is greedy: its
    first end is its end."""
    if beams == 1 and search.finished:
        return True
    if len(search.finished) < beams:
        return bool(scores_K.max() == -torch.inf)
    worst = sorted((beam.score for beam in search.finished), reverse=True)[beams - 1]
    return bool(float(scores_K.max()) / max_new**penalty <= worst)


def _check(source: LogitSource, prompts: Prompts, beams: int, max_new: int, penalty: float) -> None:
    if beams < 1 or max_new < 0 or penalty < 0:
        raise ConfigError(
            f"beams = {beams} must be at least 1, max_new = {max_new} and length_penalty = "
            f"{penalty} at least 0"
        )
    check_ids(prompts, len(source.vocabulary), "prompt")
    longest = max(map(len, prompts), default=0)
    if prompts and source.longest is not None and longest + max_new > source.longest:
        raise ConfigError(
            f"'{source.name}' has {source.longest} positions; a prompt of {longest} tokens and "
            f"{max_new} new ones do not fit"
        )
