"""Rolling origins: forecasts of a panel's past, compared with what came and with the naive one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from polytask.data.panel import Panel
from polytask.evaluate.numbers import naive_scale
from polytask.infer.naive import seasonal_naive
from polytask.infer.series_predict import Floats, Roll

MEASURES = ("mse", "mae", "smape", "mase")


@dataclass(frozen=True)
class Scores:
    """`table`: id, target, windows, each measure and the seasonal naive one's ('naive_mse' ...),
    the last row over all. `forecasts`: origin, id, timestamp, target, truth, forecast, naive."""

    table: Any
    forecasts: Any


def score_origin(panel: Panel, cuts: Any, rolled: Roll, steps: int) -> Any:
    """One origin as a long pandas table. Errors are scaled (MASE) by the seasonal naive error of
    what lies before the origin. A truth whose controls were not known counts as missing: a real
    forecast of that step would have been refused."""
    import pandas as pd

    season, parts = panel.frequency.season, []
    for i, cut in enumerate(cuts):
        values = panel.series(i)
        stamps = panel.stamps(i)
        past, ahead = values[:cut, : panel.targets], values[cut : cut + steps]
        known = np.isfinite(ahead[:, panel.targets :]).all(1, keepdims=True)
        truth = np.where(known, ahead[:, : panel.targets], np.nan)
        naive = seasonal_naive(past[None], season, steps)[0]
        scale = naive_scale(past[None], min(season, max(1, len(past) - 1)))[0]
        for k in range(panel.targets):
            parts.append(
                pd.DataFrame(
                    {
                        "origin": stamps[cut - 1],
                        "id": panel.ids[i],
                        "timestamp": stamps[cut : cut + steps],
                        "target": panel.channels[k],
                        "truth": truth[:, k].astype(float),
                        "forecast": rolled.forecast[i, :, k].astype(float),
                        "naive": naive[:, k].astype(float),
                        "scale": float(scale[k]),
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def summarise(panel: Panel, parts: list[Any]) -> Scores:
    """Measures per id and target, and over all; missing truths are left out."""
    import pandas as pd

    forecasts = pd.concat(parts, ignore_index=True)
    known = forecasts[np.isfinite(forecasts["truth"])]
    rows = [
        {"id": one, "target": target, "windows": group["origin"].nunique(), **measures(group)}
        for (one, target), group in known.groupby(["id", "target"], sort=False)
    ]
    total = {"id": "all", "target": "all", "windows": known["origin"].nunique()}
    if rows:
        means = pd.DataFrame(rows).drop(columns=["id", "target", "windows"]).mean()
        rows.append({**total, **{str(name): value for name, value in means.items()}})
    return Scores(pd.DataFrame(rows), forecasts.drop(columns=["scale"]))


def measures(group: Any) -> dict[str, float]:
    """Each of `MEASURES` for the forecast, then for the naive one."""
    found: dict[str, float] = {}
    for prefix, column in (("", "forecast"), ("naive_", "naive")):
        found |= {prefix + n: v for n, v in _errors(group, group[column].to_numpy()).items()}
    return found


def _errors(group: Any, guess: Floats) -> dict[str, float]:
    truth, scale = group["truth"].to_numpy(), group["scale"].to_numpy()
    error, size = np.abs(truth - guess), np.abs(truth) + np.abs(guess)
    usable = np.isfinite(scale) & (scale > 0)
    mase = float((error[usable] / scale[usable]).mean()) if usable.any() else float("nan")
    return {
        "mse": float((error**2).mean()),
        "mae": float(error.mean()),
        "smape": float((200 * error / np.where(size > 0, size, 1)).mean()),
        "mase": mase,
    }
