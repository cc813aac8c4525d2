"""The grasshopper's auditory receptor as a `Recording`: one real neuron and the sound it heard.

Two recordings of 10 s (nitime's example data; see `data/embedded/spikes.py`): a tone whose
amplitude follows noise of 200 or 800 Hz. The sound's envelope becomes a behaviour variable
'sound' (its mean over each sample's time), so a model may read it, or decode it from the spikes.
"""

from __future__ import annotations

import numpy as np

from polytask.data.embedded.spikes import SETS, STEP_US
from polytask.data.embedded.store import open_splits
from polytask.data.spike_tokens import whole_bins
from polytask.data.spikes import Recording
from polytask.errors import ConfigError


def grasshopper(number: int = 1, dt: float = 0.001, dt_b: float = 0.001) -> Recording:
    """Recording 1 (slow sound) or 2 (fast sound).

    Args:
        number: which one. dt: width of a bin; dt_b: of a sample of 'sound', seconds.

    Sample j of 'sound' is the mean envelope over [j * dt_b, (j + 1) * dt_b).

    Raises:
        ConfigError: another number, or dt_b is no multiple of the file's 50 us that divides 10 s.
        DataError: nitime is not installed.
    """
    if number not in (1, 2):
        raise ConfigError(f"there are grasshopper recordings 1 and 2, not {number}")
    entry = next(e for e in SETS if e.info.name == "nitime-recordings")
    rows = open_splits(entry)["all"]
    stimulus = np.asarray(rows["stimulus"][number - 1], float)
    spikes = np.asarray(rows["spike_times_us"][number - 1], np.int64)
    step = STEP_US * 1e-6
    each = whole_bins(dt_b, step, "dt_b")
    if not each or len(stimulus) % each:
        raise ConfigError(
            f"dt_b = {dt_b} s does not divide the {len(stimulus) * step:g} s of sound"
        )
    return Recording.from_arrays(
        units=np.zeros(len(spikes), np.int64),
        times=spikes * 1e-6,
        dt=dt,
        n_units=1,
        duration=len(stimulus) * step,
        behavior={"sound": stimulus.reshape(-1, each).mean(axis=1)},
        dt_b=dt_b,
        names=["receptor"],
    )
