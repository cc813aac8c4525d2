"""The decoding loop of several models at once: each its own cache, one chosen token for all.

    for each source: logits, cache = source.forward(prompts)     # padded on the left
    until all rows are done:
        chosen = policy([logits of every source])                # fuse, ensemble, contrast ...
        token = sampler(chosen logits)                           # temperature, top-k, top-p
        rows that are done leave every cache
        for each source: logits, cache = source.forward(token, cache)

A row gives what it gives alone: its positions are its own, finished rows are out of the batch, and
its random numbers depend on (seed, row, step) only.

Legend: B rows that run, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from polytask import rng
from polytask.configs import Config
from polytask.errors import ConfigError, DataError
from polytask.infer.fusion_policy import Policy, State
from polytask.infer.logit_sources import LogitSource, check_same_vocabulary

OnToken = Callable[[int, int], bool]  # (row, token id) -> whether the row should stop
Prompts = Sequence[Sequence[int]]


class Sampler(Config):
    """How a token is chosen from logits; temperature 0 takes the most likely one."""

    temperature: float = Field(0.0, ge=0)
    top_k: int = Field(0, ge=0, description="0: all tokens")
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0)

    def choose(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """(B,) ids; `uniform_B` in [0, 1) decides (inverse of the cumulative distribution)."""
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        logits, order = (logits_BV.double() / self.temperature).sort(-1, descending=True)
        kept = torch.ones_like(logits, dtype=torch.bool)
        if self.top_k:
            kept[:, self.top_k :] = False
        p = logits.masked_fill(~kept, -torch.inf).softmax(-1)
        # A token stays while those before it have less than top_p: the first one always does.
        if self.top_p < 1:
            p = p.masked_fill(p.cumsum(-1) - p >= self.top_p, 0.0)
        total = p.cumsum(-1)
        wanted = uniform_B.to(p)[:, None] * total[:, -1:]
        place = torch.searchsorted(total, wanted, right=True)
        last = (p > 0).sum(-1, keepdim=True) - 1  # rounding may step beyond the last with a share
        return order.gather(1, torch.minimum(place, last))[:, 0]


@dataclass
class Continuation:
    """What was written after one prompt.

    ids      token ids, a stop token not included
    stopped  'stop', or 'length' at `max_new`
    told     what the policy said of each step: name -> (len(ids), ...), stop token left out
    """

    ids: list[int]
    stopped: str
    told: dict[str, Tensor] = field(default_factory=dict)


def generate(
    sources: Sequence[LogitSource],
    policy: Policy,
    prompts: Prompts,
    *,
    sampler: Sampler | None = None,
    max_new: int = 64,
    stop: Sequence[int] = (),
    on_token: OnToken | None = None,
    own_prompts: Mapping[int, Prompts] | None = None,
) -> list[Continuation]:
    """Continue every prompt with the tokens that `policy` and `sampler` choose.

    Args:
        sources: models with one vocabulary (checked), in the policy's order.
        prompts: ids per row; rows may differ in length.
        max_new: tokens per row at most; 0 writes none.
        stop: ids that end a row; a source's own are in its `end`.
        on_token: told of every token as it is chosen; True ends the row after it.
        own_prompts: prompts of some sources (by their place) where they differ from the shared
            ones: examples before the large model's prompt, say. Rows must be the same; every
            source goes on from the end of its own prompt.

    Errors: `ConfigError` for vocabularies that differ, prompts with what is to be written longer
    than a model's positions; `DataError` for a row without tokens or ids outside the vocabulary.
    """
    _check(sources, policy, prompts, max_new, own_prompts or {})
    rows = len(prompts)
    found: list[Continuation] = [Continuation([], "length") for _ in range(rows)]
    told: list[dict[str, list[Tensor]]] = [{} for _ in range(rows)]
    if not rows or not max_new:
        return found
    sampler = sampler or Sampler()
    uniform = _uniform(sampler, rows, max_new)
    states = []
    for number, source in enumerate(sources):
        ids, valid = pad_left((own_prompts or {}).get(number, prompts))
        states.append(source.forward(ids, None, valid))
    running, memory = torch.arange(rows), State()
    ends = set(stop)
    for step in range(max_new):
        choice = policy([logits for logits, _ in states], memory)
        token = sampler.choose(choice.logits, uniform[running, step]).cpu()
        said = {name: value.cpu() for name, value in choice.told.items()}
        keep = []
        for place, (row, chosen) in enumerate(zip(running.tolist(), token.tolist(), strict=True)):
            if chosen in ends:
                found[row].stopped = "stop"
                continue
            found[row].ids.append(chosen)
            for name, value in said.items():
                told[row].setdefault(name, []).append(value[place])
            if on_token is not None and on_token(row, chosen):
                found[row].stopped = "stop"
                continue
            keep.append(place)
        if not keep or step + 1 == max_new:
            break
        caches, memory = [cache for _, cache in states], choice.state
        if len(keep) < len(running):
            index = torch.tensor(keep)
            running, token = running[index], token[index]
            memory = {name: value[index.to(value.device)] for name, value in memory.items()}
            caches = [s.select(c, index) for s, c in zip(sources, caches, strict=True)]
        states = [
            source.forward(token[:, None], cache)
            for source, cache in zip(sources, caches, strict=True)
        ]
    for one, steps in zip(found, told, strict=True):
        one.told = {name: torch.stack(values) for name, values in steps.items()}
    return found


def pad_left(prompts: Prompts) -> tuple[Tensor, Tensor | None]:
    """Ids (B, N) with padding (id 0) on the left, and where they are valid; None: everywhere."""
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    valid = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.long)
        valid[row, width - len(prompt) :] = True
    return ids, None if bool(valid.all()) else valid


def check_ids(prompts: Prompts, vocabulary: int, what: str = "prompt") -> None:
    """`DataError` naming the first row that has no ids, or one outside the vocabulary."""
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"{what} {row + 1} is empty; there is nothing to continue")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise DataError(f"{what} {row + 1} has ids outside the vocabulary of {vocabulary}")


def _check(
    sources: Sequence[LogitSource],
    policy: Policy,
    prompts: Prompts,
    max_new: int,
    own_prompts: Mapping[int, Prompts],
) -> None:
    if not sources or (policy.sources is not None and len(sources) != policy.sources):
        raise ConfigError(f"the policy combines {policy.sources} models, not {len(sources)}")
    check_same_vocabulary(sources)
    if max_new < 0:
        raise ConfigError(f"max_new = {max_new} is negative")
    for number, source in enumerate(sources):
        mine = own_prompts.get(number, prompts)
        if len(mine) != len(prompts):
            raise DataError(f"'{source.name}' has {len(mine)} own prompts for {len(prompts)} rows")
        check_ids(mine, len(source.vocabulary))
        longest = max(map(len, mine), default=0) + max_new
        if source.longest is not None and longest > source.longest:
            raise ConfigError(
                f"'{source.name}' has {source.longest} positions; the longest prompt with "
                f"{max_new} new tokens needs {longest}. Shorten the prompt or write less"
            )


def _uniform(sampler: Sampler, rows: int, steps: int) -> Tensor:
    """(rows, steps): row r is a stream of its own, whatever the other rows are."""
    if sampler.temperature == 0:
        return torch.zeros(rows, steps)
    drawn = [rng.generator(sampler.seed, "decode", row).random(steps) for row in range(rows)]
    return torch.from_numpy(np.stack(drawn))
