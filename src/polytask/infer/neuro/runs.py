"""Generated activity over many windows: one window ahead of the record, or running free.

Free runs go over chains of neighbouring windows. All chains and trials advance together, window by
window; the past of each is tokenised from its own spikes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from polytask.data.spike_tokens import SpikeTokenizer
from polytask.data.spikes import Recording
from polytask.infer.neuro.generate import EventGenerator, turned_round
from polytask.infer.neuro.training import WindowStore
from polytask.models.neuro.batch import NeuroBatch

Ints = NDArray[np.int64]
ROWS = 512  # windows drawn at once


@dataclass(frozen=True)
class Generated:
    """Spikes drawn for W windows in R trials.

    Attributes:
        starts: (W,) first bin of each window, ascending.
        ids, times: (R, W, block + 1) int64 tokens [SOS, spikes, EOS, PAD ..].
        trial, unit, step: (S,) int64 every spike with its bin in the recording, ordered by
            (trial, step, unit).
    """

    starts: Ints
    ids: Ints
    times: Ints
    trial: Ints
    unit: Ints
    step: Ints
    n_units: int
    window_bins: int

    @property
    def counts(self) -> Ints:
        """(R, W, N) spikes per window and unit."""
        trials, windows, _ = self.ids.shape
        real = self.ids < self.n_units
        place = np.nonzero(real)
        found = np.zeros((trials, windows, self.n_units), np.int64)
        np.add.at(found, (place[0], place[1], self.ids[real]), 1)
        return found

    def spikes(self, trial: int = 0) -> tuple[Ints, Ints]:
        """Units and bins of one trial."""
        own = self.trial == trial
        return self.unit[own], self.step[own]


def true_ahead(
    generator: EventGenerator, store: WindowStore, rows: Ints, trials: int, seed: int
) -> tuple[Ints, Ints]:
    """(R, W, block + 1) ids and times; every window after its recorded past."""
    place = np.tile(np.arange(len(rows)), trials)
    trial = np.repeat(np.arange(trials), len(rows))
    ids, times = [], []
    for at in range(0, len(place), ROWS):
        part = slice(at, at + ROWS)
        found = generator.windows(_on(generator, store, rows[place[part]]), seed, trial[part])
        ids.append(found[0])
        times.append(found[1])
    shape = (trials, len(rows), -1)
    return np.concatenate(ids).reshape(shape), np.concatenate(times).reshape(shape)


def turned_ahead(
    generator: EventGenerator, store: WindowStore, rows: Ints, trials: int, seed: int
) -> tuple[Ints, Ints]:
    """The published code's free run: recorded pasts, turned round after the first windows."""
    tok = generator.tokenizer
    first = -(-tok.prev_bins // tok.window_bins)
    ids, times = true_ahead(generator, store, rows, trials, seed)
    late = rows[first:]
    for trial in range(trials):
        for at in range(0, len(late), ROWS):
            batch = turned_round(_on(generator, store, late[at : at + ROWS]), tok.sos)
            which = np.full(len(batch), trial)
            place = slice(first + at, first + at + len(batch))
            ids[trial, place], times[trial, place] = generator.windows(batch, seed, which)
    return ids, times


def free_run(
    generator: EventGenerator,
    store: WindowStore,
    rows: Ints,
    trials: int,
    seed: int,
    horizon: int | None = None,
) -> tuple[Ints, Ints]:
    """As `true_ahead`, but each window's past is what was drawn before it. `horizon`: windows after
    which a chain starts again from recorded spikes; None: as long as windows are neighbours."""
    tok, recording = generator.tokenizer, store.windows.recording
    starts = store.windows.starts[rows]
    chains = list(_chains(starts, tok.window_bins, horizon))
    ids = np.full((trials, len(rows), tok.block + 1), tok.pad, np.int64)
    times = np.full_like(ids, tok.dt_pad)
    chain = np.repeat(np.arange(len(chains)), trials)
    trial = np.tile(np.arange(trials), len(chains))
    begin = np.array([starts[first] for first, _ in chains])[chain]
    owner, unit, step = _recorded(recording, tok, begin)
    for number in range(max(last - first for first, last in chains)):
        going = np.flatnonzero([chains[c][1] - chains[c][0] > number for c in chain])
        place = np.array([chains[chain[g]][0] + number for g in going])
        past_ids, past_times = _pasts(tok, owner, unit, step, going, starts[place])
        drawn: list[tuple[Ints, Ints]] = []
        for at in range(0, len(going), ROWS):
            part = slice(at, at + ROWS)
            batch = _on(generator, store, rows[place[part]])
            device = batch.ids.device
            batch = replace(
                batch,
                past_ids=torch.from_numpy(past_ids[part]).to(device),
                past_times=torch.from_numpy(past_times[part]).to(device),
            )
            if store.trim:
                batch = batch.trimmed(tok.pad)
            drawn.append(generator.windows(batch, seed, trial[going[part]]))
        new_ids, new_times = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        ids[trial[going], place], times[trial[going], place] = new_ids, new_times
        row, new_unit, new_step = tok.decode(new_ids, new_times, starts[place])
        owner = np.concatenate([owner, going[row]])
        unit, step = np.concatenate([unit, new_unit]), np.concatenate([step, new_step])
        recent = step >= begin[owner] + (number + 1) * tok.window_bins - tok.prev_bins
        owner, unit, step = owner[recent], unit[recent], step[recent]
    return ids, times


def collected(
    ids: Ints, times: Ints, starts: Ints, tok: SpikeTokenizer, official: bool = False
) -> Generated:
    """Tokens and their spikes. `official` counts times from the window's end, as the code does."""
    trials, windows = ids.shape[:2]
    flat = (ids.reshape(trials * windows, -1), times.reshape(trials * windows, -1))
    base = np.tile(starts + (tok.window_bins if official else 0), trials)
    row, unit, step = tok.decode(*flat, base)
    trial = row // windows
    order = np.lexsort((unit, step, trial))
    return Generated(
        starts,
        ids,
        times,
        trial[order],
        unit[order],
        step[order],
        tok.n_units,
        tok.window_bins,
    )


def _on(generator: EventGenerator, store: WindowStore, rows: Ints) -> NeuroBatch:
    device = next(generator.models[0].parameters()).device
    return store.batch(rows).to(device)


def _chains(starts: Ints, width: int, horizon: int | None) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of runs of neighbouring windows, none longer than `horizon`."""
    cuts = [0, *(np.flatnonzero(np.diff(starts) != width) + 1).tolist(), len(starts)]
    for first, last in itertools.pairwise(cuts):
        step = horizon or max(1, last - first)
        for at in range(first, last, step):
            yield at, min(at + step, last)


def _recorded(recording: Recording, tok: SpikeTokenizer, begin: Ints) -> tuple[Ints, Ints, Ints]:
    """Spikes of the record just before each chain: owner (row), unit, step."""
    low = np.searchsorted(recording.step, begin - tok.prev_bins)
    high = np.searchsorted(recording.step, begin)
    owner = np.repeat(np.arange(len(begin)), high - low)
    take = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)]).astype(
        np.int64
    )
    return owner, recording.unit[take], recording.step[take]


def _pasts(
    tok: SpikeTokenizer, owner: Ints, unit: Ints, step: Ints, rows: Ints, starts: Ints
) -> tuple[Ints, Ints]:
    """Past tokens of some rows. Each row gets a stretch of time of its own, so that the tokeniser
    sees one sorted record."""
    low = int(starts.min()) - tok.prev_bins
    span = int(starts.max()) - low + tok.prev_bins + 1
    kept = step >= low
    shifted = (step[kept] - low) + owner[kept] * span
    order = np.lexsort((unit[kept], shifted))
    found = tok.rows(unit[kept][order], shifted[order], starts - low + rows * span, past=True)
    return found.ids[:, :-1], found.dts[:, :-1]
