"""The page of a forecast: each series' context, forecast and quantile band, and the backtest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from polytask import files
from polytask.data.panel import Panel
from polytask.report.drawing import BRIGHT, INK, SOFT, WIDTH, Picture, finish, style
from polytask.report.page import figure, page, paragraph, section, table

_SHOWN = 6  # series in a picture
_CONTEXT = 4  # horizons of past drawn before the forecast


def forecast_report(folder: Path, panel: Panel, forecast: Any, scores: Any) -> list[Path]:
    """Write report.html, forecast.png and backtest.png into `folder`; returns their paths.

    Args:
        forecast: table of `Forecaster.predict`.
        scores: result of `Forecaster.backtest`.
    """
    ahead = draw_forecast(panel, forecast, folder)
    past = draw_backtest(panel, scores.forecasts, folder)
    total = scores.table.iloc[-1]
    better = "better" if total["mase"] < total["naive_mase"] else "worse"
    lead = (
        f"Over {int(total['windows'])} origins the mean absolute scaled error is "
        f"{total['mase']:.2f}, that of repeating the last season {total['naive_mase']:.2f}."
    )
    heads = ["series", "target", "MAE", "naive MAE", "sMAPE", "naive sMAPE", "MASE", "naive MASE"]
    keys = ("mae", "naive_mae", "smape", "naive_smape", "mase", "naive_mase")
    rows = [
        [row["id"], row["target"], *(f"{row[k]:.3g}" for k in keys)]
        for _, row in scores.table.iterrows()
    ]
    text = page(
        "Forecast",
        [
            "<h1>Forecast</h1>",
            paragraph(lead, f"lead {better}"),
            section("What comes", figure(ahead)),
            section("What would have been forecast", figure(past)),
            section("Backtest", table(heads, rows, left=2, total=True)),
        ],
    )
    files.write_text(folder / "report.html", text)
    return [folder / "report.html", *(folder / f"{p.name}.png" for p in (ahead, past))]


def draw_forecast(panel: Panel, forecast: Any, folder: Path) -> Picture:
    """Context, forecast and the widest quantile band, a panel per series and target."""
    groups = list(forecast.groupby(["id", "target"], sort=False))[:_SHOWN]
    bands = [c for c in forecast.columns if c.startswith("q0.")]
    with style() as figure_class:
        fig = figure_class(figsize=(WIDTH, 0.5 + 1.9 * len(groups)), layout="constrained")
        axes = np.atleast_1d(fig.subplots(len(groups), 1, squeeze=False)[:, 0])
        for ax, ((name, target), group) in zip(axes, groups):
            _context(ax, panel, name, target, len(group))
            when = group["timestamp"].to_numpy()
            if len(bands) > 1:
                low, high = group[bands[0]].to_numpy(), group[bands[-1]].to_numpy()
                label = f"{bands[0][1:]} to {bands[-1][1:]} quantile"
                ax.fill_between(when, low, high, color=BRIGHT[0], alpha=0.2, lw=0, label=label)
            ax.plot(when, group["forecast"].to_numpy(), color=BRIGHT[0], label="forecast")
            ax.set_title(f"{name}: {target}")
        axes[0].legend(loc="upper left", ncols=3)
        caption = f"Past and forecast of {len(groups)} series."
        return finish(fig, folder, "forecast", "Forecast", caption)


def draw_backtest(panel: Panel, forecasts: Any, folder: Path) -> Picture:
    """Truth, forecast and seasonal naive forecast from every origin."""
    groups = list(forecasts.groupby(["id", "target"], sort=False))[:_SHOWN]
    with style() as figure_class:
        fig = figure_class(figsize=(WIDTH, 0.5 + 1.9 * len(groups)), layout="constrained")
        axes = np.atleast_1d(fig.subplots(len(groups), 1, squeeze=False)[:, 0])
        for ax, ((name, target), group) in zip(axes, groups):
            first = True
            for _, part in group.groupby("origin", sort=True):
                when = part["timestamp"].to_numpy()
                labels = ("truth", "seasonal naive", "forecast") if first else (None,) * 3
                ax.plot(when, part["truth"].to_numpy(), color=INK, lw=1.2, label=labels[0])
                ax.plot(when, part["naive"].to_numpy(), "--", color=SOFT, lw=1, label=labels[1])
                ax.plot(when, part["forecast"].to_numpy(), color=BRIGHT[0], label=labels[2])
                first = False
            ax.set_title(f"{name}: {target}")
        axes[0].legend(loc="upper left", ncols=3)
        caption = "Forecasts from rolling origins, made without what followed."
        return finish(fig, folder, "backtest", "Backtest", caption)


def _context(ax: Any, panel: Panel, name: str, target: str, steps: int) -> None:
    index = panel.ids.index(name)
    history = panel.history(index)
    values = history[:, panel.channels.index(target)][-_CONTEXT * steps :]
    when = panel.stamps(index)[: len(history)][-len(values) :]
    ax.plot(when, values, color=INK, lw=1.2, label="past")
