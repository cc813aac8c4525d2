"""The forecaster that is pretrained here once, in about half a minute, and kept in the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from polytask import files
from polytask.data.calendar import Frequency
from polytask.data.series_generator import SEASONS, generate
from polytask.data.windows import Record
from polytask.infer.forecaster import Forecaster

VERSION = 1  # raise it when data, model or training change
COMPETITIONS = ("m1", "m3", "tourism")


def pretrained(say: Callable[[str], None], steps: int = 400, seed: int = 0) -> Forecaster:
    """From the cache, or trained on generated series and the competitions that are installed."""
    from polytask.data.embedded.sources import cache_root

    found = competitions()
    name = f"ttm-v{VERSION}-{steps}-{seed}-{'-'.join(found) or 'generated'}"
    folder = Path(cache_root()) / "forecaster" / name
    with files.locked(folder.parent):
        if (folder / files.MANIFEST).is_file():
            say(f"pretrained model: {folder}")
            return Forecaster.load(folder)
        made = {f"made {frequency}": generate(frequency, 128, 400, seed) for frequency in SEASONS}
        say(f"pretraining once on {len(made) + len(found)} collections of series ({steps} steps)")
        records = {**made, **{n: competition(n) for n in found}}
        forecaster = Forecaster(seed=seed).pretrain(records, steps=steps)
        forecaster.save(folder)
    say(f"kept in {folder}")
    return forecaster


def competitions() -> tuple[str, ...]:
    """Names of the competitions whose packages are on this machine."""
    from polytask.data import embedded

    return tuple(name for name in COMPETITIONS if embedded.state(name) is not None)


def competition(name: str) -> list[Record]:
    """Whole series, official future included, of the periods with a calendar."""
    from polytask.data import embedded

    steps = {"monthly": "M", "quarterly": "Q", "yearly": "Y"}
    return [
        Record(
            np.concatenate([row["history"], row["future"]]).astype(np.float32)[:, None],
            Frequency.named(steps[row["period"]]),
        )
        for source in embedded.load(name).values()
        for row in (source[i] for i in range(len(source)))
        if row["period"] in steps
    ]
