"""A grasshopper's auditory receptor neuron: two recordings of 10 s, spikes and sound envelope.

Source: nitime's example data; the sound is a 2.5 kHz tone whose amplitude follows Gaussian noise
with a cut-off of 200 Hz in the first and 800 Hz in the second recording (files' headers).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Located, Wheel
from polytask.data.embedded.splits import by_split

STEP_US = 50
BIN_US = 500
WINDOW_BINS = 80
COUNTED_US = 5_000
HOP_US = 5_000
_SEGMENTS = (("train", 0.0, 0.7), ("valid", 0.7, 0.8), ("test", 0.8, 1.0))


def read_recordings(located: Located) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per recording: stimulus (200000,) float64 every 50 us, spike times in us, ascending."""
    found = []
    for number in (1, 2):
        stimulus = np.loadtxt(located.one(f"grasshopper_stimulus{number}.txt"))
        if not np.array_equal(stimulus[:, 0], np.arange(len(stimulus)) * STEP_US):
            raise ValueError(f"stimulus {number} is not on a grid of {STEP_US} us")
        spikes = np.loadtxt(located.one(f"grasshopper_spike_times{number}.txt"), comments="#")
        found.append((stimulus[:, 1], np.sort(spikes).astype(np.int64)))
    return found


def _recordings(located: Located) -> Splits:
    recordings = read_recordings(located)
    return {
        "all": {
            "recording": np.array([1, 2]),
            "cutoff_hz": np.array([200, 800]),
            "stimulus": [stimulus for stimulus, _ in recordings],
            "spike_times_us": [spikes for _, spikes in recordings],
        }
    }


def _windows(located: Located) -> Splits:
    rows: dict[str, list[Any]] = {
        name: []
        for name in ("recording", "start_ms", "stimulus", "spike_times_ms", "count", "fired")
    }
    splits = []
    width = WINDOW_BINS * BIN_US
    for number, (stimulus, spikes) in enumerate(read_recordings(located), 1):
        bins = stimulus.reshape(-1, BIN_US // STEP_US).mean(axis=1).astype(np.float32)
        total = len(stimulus) * STEP_US
        for split, begin, end in _SEGMENTS:
            for start in range(round(begin * total), round(end * total) - width + 1, HOP_US):
                inside = spikes[
                    np.searchsorted(spikes, start) : np.searchsorted(spikes, start + width)
                ]
                rows["recording"].append(number)
                rows["start_ms"].append(start / 1000)
                rows["stimulus"].append(bins[start // BIN_US : start // BIN_US + WINDOW_BINS])
                rows["spike_times_ms"].append((inside - start) / 1000)
                count = int(np.sum(inside >= start + width - COUNTED_US))
                rows["count"].append(count)
                rows["fired"].append("yes" if count else "no")
                splits.append(split)
    return by_split(rows, splits)


_SOURCES = (
    Wheel(
        "nitime",
        tuple(
            f"nitime/data/grasshopper_{kind}{number}.txt"
            for kind in ("spike_times", "stimulus")
            for number in (1, 2)
        ),
    ),
)
_LICENCE = "BSD-3-Clause (nitime; recordings' own licence not stated)"

SETS = (
    Entry(
        EmbeddedInfo(
            name="nitime-spikes",
            title="Grasshopper auditory receptor: does it fire after 40 ms of sound?",
            licence=_LICENCE,
            modality="spikes",
            sources=_SOURCES,
            tasks={
                "nitime-spikes": {
                    "data": "embedded:nitime-spikes",
                    "schema": "classification",
                    "inputs": {"series": "stimulus"},
                    "target": "fired",
                },
                "nitime-count": {
                    "data": "embedded:nitime-spikes",
                    "schema": "regression",
                    "inputs": {"series": "stimulus"},
                    "target": "count",
                },
            },
            classes=("no", "yes"),
            note="Stimulus in 0.5 ms bins, windows every 5 ms; 'count' and 'fired' speak of the "
            "last 5 ms, the neuron answers 6 ms late. Splits: stretches of time (70, 10, 20 %); no "
            "window crosses a border. One neuron: boosted trees reach an AUROC of about 0.83.",
        ),
        _windows,
    ),
    Entry(
        EmbeddedInfo(
            name="nitime-recordings",
            title="Grasshopper auditory receptor: two whole recordings of 10 s",
            licence=_LICENCE,
            modality="spikes",
            sources=_SOURCES,
            note="Stimulus every 50 us, spike times in us; for encoding and decoding models.",
        ),
        _recordings,
    ),
)
