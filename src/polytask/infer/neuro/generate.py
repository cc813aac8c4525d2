"""Population activity drawn spike by spike, many windows and trials at once.

A window starts with SOS; a step draws the next unit and its time from their logits and stops at EOS
or PAD, or when the block is full. What does not change within a window (past, video, behaviour) is
encoded once, keys and values of earlier spikes are kept. Random numbers belong to (seed, trial,
window), so a window does not depend on which others are drawn beside it.

`true_past=False` runs free: the past of a window is what was drawn for the windows before it
(recorded spikes only before the first one), sorted by time. `official` draws as the published code
does: it reads the recorded past either way and without `true_past` merely turns it round; a drawn
SOS repeats the unit before; an ensemble answers with its last model; times count from the window's
end.

Legend: B windows, N ids, D times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polytask import rng
from polytask.configs import Config
from polytask.data.spike_tokens import SpikeTokenizer
from polytask.errors import ConfigError
from polytask.models.neuro.batch import NeuroBatch
from polytask.models.neuro.model import NeuroformerModel

Ints = NDArray[np.int64]


class Draw(Config):
    """How the next spike is drawn; filters come before the temperature, as in the code."""

    greedy: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    time_temperature: float = 1.0
    time_top_k: int = 0
    time_top_p: float = 1.0
    official: bool = False
    cached: bool = True  # False runs the whole window again for every spike: slow, the same

    def checked(self) -> Draw:
        """Itself; `ConfigError` for a number that means nothing."""
        for name in ("temperature", "time_temperature"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: above 0 (greedy=True for 0)")
        for name in ("top_p", "time_top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: above 0, at most 1")
        for name in ("top_k", "time_top_k"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} = {getattr(self, name)}: at least 0")
        return self


def filtered(logits_BN: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits of what remains: the k most likely, of them the fewest whose share reaches p."""
    logits = logits_BN
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ordered, place = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        gone = torch.zeros_like(before, dtype=torch.bool).scatter(-1, place, before >= top_p)
        logits = logits.masked_fill(gone, float("-inf"))
    return logits


def pick(logits_BN: Tensor, uniform_B: Tensor, temperature: float, greedy: bool) -> Tensor:
    """(B,) classes: the most likely, or the one in whose share of [0, 1) the number lies."""
    if greedy:
        return logits_BN.argmax(-1)
    share = (logits_BN.double() / temperature).softmax(-1).cumsum(-1)
    top = share[:, -1:]  # 1 up to rounding: a number beyond it would fall on a class of share 0
    return (share <= uniform_B[:, None] * top).sum(-1).clamp(max=logits_BN.shape[-1] - 1)


@dataclass
class EventGenerator:
    """Windows from one model or an ensemble of models of the same units and times."""

    models: Sequence[NeuroformerModel]
    tokenizer: SpikeTokenizer
    draw: Draw

    def __post_init__(self) -> None:
        self.draw.checked()
        if not self.models:
            raise ConfigError("generation needs at least one model")
        sizes = {(m.config.units, m.config.times, m.config.block) for m in self.models}
        if len(sizes) > 1:
            raise ConfigError(f"models of an ensemble differ in units, times, block: {sizes}")

    @torch.no_grad()
    def windows(self, batch: NeuroBatch, seed: int, trial: Ints) -> tuple[Ints, Ints]:
        """(B, block + 1) ids and times [SOS, spikes, EOS, PAD ..] given each window's past,
        frames and behaviour; spikes in the order drawn. `trial`: (B,) which repeat a row is."""
        tok, rows = self.tokenizer, len(batch)
        assert batch.row is not None
        names = zip(trial.tolist(), batch.row.tolist(), strict=True)
        uniform = self._uniform(list(names), seed).to(batch.ids.device)
        ids = torch.full((rows, tok.block + 1), tok.pad, device=batch.ids.device)
        times = torch.full_like(ids, tok.dt_pad)
        ids[:, 0], times[:, 0] = tok.sos, 0
        run = _Cached(self, batch) if self.draw.cached else _Again(self, batch)
        alive = torch.arange(rows, device=ids.device)
        for step in range(tok.block - 1):
            logits = run.next(ids[alive, : step + 1], times[alive, : step + 1])
            unit, time = self._spike(logits, ids[alive, step], uniform[alive, step])
            over = (unit >= tok.eos) | (step == tok.block - 2)
            ids[alive, step + 1] = torch.where(over, tok.eos, unit)
            times[alive, step + 1] = torch.where(over, tok.dt_eos, time)
            kept = (~over).nonzero()[:, 0]
            if len(kept) == 0:
                break
            if len(kept) < len(alive):
                alive = alive[kept]
                run.select(kept)
        return ids.cpu().numpy(), times.cpu().numpy()

    def _uniform(self, names: Sequence[tuple[int, int]], seed: int) -> Tensor:
        size = (self.tokenizer.block, 2)
        drawn = [rng.generator(seed, "spikes", trial, row).random(size) for trial, row in names]
        return torch.from_numpy(np.stack(drawn))

    def _spike(
        self, logits: tuple[Tensor, Tensor], before: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor]:
        d, tok = self.draw, self.tokenizer
        ids, times = logits[0].float(), logits[1].float()
        if not d.official:
            ids[:, tok.sos] = float("-inf")
            times[:, tok.window_bins :] = float("-inf")
        unit = pick(filtered(ids, d.top_k, d.top_p), uniform[:, 0], d.temperature, d.greedy)
        kept = filtered(times, d.time_top_k, d.time_top_p)
        time = pick(kept, uniform[:, 1], d.time_temperature, d.greedy)
        return torch.where(unit == tok.sos, before, unit), time

    def mixed(self, found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Mean logits of the ensemble."""
        if len(found) == 1 or self.draw.official:
            return found[-1]
        ids, times = zip(*found, strict=True)
        return torch.stack(ids).mean(0), torch.stack(times).mean(0)


class _Cached:
    """One new token a step."""

    def __init__(self, owner: EventGenerator, batch: NeuroBatch) -> None:
        self.owner = owner
        self.states = [model.start(batch) for model in owner.models]

    def next(self, ids: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        pairs = zip(self.owner.models, self.states, strict=True)
        return self.owner.mixed([m.advance(s, ids[:, -1], times[:, -1]) for m, s in pairs])

    def select(self, rows: Tensor) -> None:
        for state in self.states:
            state.select(rows)


class _Again:
    """The whole window at every step: what the cache is compared with."""

    def __init__(self, owner: EventGenerator, batch: NeuroBatch) -> None:
        self.owner, self.batch = owner, batch

    def next(self, ids: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        last = torch.zeros_like(ids[:, :1])
        now = replace(self.batch, ids=torch.cat([ids, last], 1), times=torch.cat([times, last], 1))
        found = [model(now) for model in self.owner.models]
        return self.owner.mixed([(out.ids[:, -1], out.times[:, -1]) for out in found])

    def select(self, rows: Tensor) -> None:
        self.batch = self.batch.take(rows)


def turned_round(batch: NeuroBatch, sos: int) -> NeuroBatch:
    """The past in descending order of time, padding first, SOS last: the published code's slip."""
    key = 2 * batch.past_times + (batch.past_ids != sos)
    order = key.argsort(dim=1, descending=True, stable=True)
    return replace(
        batch,
        past_ids=batch.past_ids.gather(1, order),
        past_times=batch.past_times.gather(1, order),
    )
