"""The page of a forecast: context, forecast with its band, truth; the backtest beside the naive."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from polytask import files
from polytask.report import page as html
from polytask.report.drawing import BRIGHT, INK, SOFT, WIDTH, Picture, finish, short, style

_SHOWN = 4  # series in the picture
_MEASURES = (("mase", "MASE"), ("smape", "sMAPE %"), ("mae", "MAE"), ("mse", "MSE"))


def forecast_report(
    folder: Path, name: str, history: Any, forecast: Any, scores: Any, notes: list[str]
) -> Path:
    """Write report.html and forecast.png into `folder`.

    Args:
        history: long pandas table with id, timestamp, target, value (NaN where missing).
        forecast: what `Forecaster.predict` gives.
        scores: what `Forecaster.backtest` gives.
        notes: sentences for the reader: warnings, how it was trained.
    """
    picture = forecast_picture(folder, history, forecast, scores.forecasts)
    total = scores.table.iloc[-1].to_dict()
    parts = [
        html.paragraph("Forecast", "kicker"),
        f"<h1>{escape(name)}</h1>",
        html.paragraph(_verdict(total), "lead"),
        html.figure(picture),
        html.section("Backtest", _backtest(scores.table)),
        html.section("Notes", html.items(notes)),
    ]
    path = folder / "report.html"
    files.write_text(path, html.page(f"Forecast of {name}", parts))
    return path


def _verdict(total: dict[str, Any]) -> str:
    ours, naive = float(total["mase"]), float(total["naive_mase"])
    if not (math.isfinite(ours) and math.isfinite(naive)):
        return "Too little was known in the backtest to measure a scaled error."
    gain = 1 - ours / naive if naive > 0 else 0.0
    word = "smaller" if gain >= 0 else "larger"
    return (
        f"In the backtest the mean absolute scaled error is {ours:.3f}; repeating the last season "
        f"gives {naive:.3f}. The error is {abs(gain):.0%} {word}."
    )


def _backtest(table: Any) -> str:
    heads = ["series", "target", "windows"]
    for _, label in _MEASURES:
        heads += [label, "naive"]
    rows = []
    for row in table.to_dict("records"):
        cells = [str(row["id"]), str(row["target"]), str(row["windows"])]
        for key, _ in _MEASURES:
            cells += [_number(row[key]), _number(row[f"naive_{key}"])]
        rows.append(cells)
    said = html.paragraph(
        "Every window is forecast from what lay before it by a model that was not trained on what "
        "came after. MASE: errors over those of the seasonal naive forecast before the window.",
        "small soft",
    )
    return html.table(heads, rows, left=2, total=True) + said


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "-"


def forecast_picture(folder: Path, history: Any, forecast: Any, tested: Any) -> Picture:
    """A panel per series and target, four at most: what was observed, the forecast of the last
    backtest window beside what came, the forecast with its outermost quantiles."""
    pairs = list(dict.fromkeys(zip(forecast["id"], forecast["target"], strict=True)))
    shown = pairs[:_SHOWN]
    levels = [c for c in forecast.columns if c.startswith("q0.")]
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 0.7 + 1.75 * len(shown)), layout="constrained")
        axes = np.atleast_1d(figure.subplots(len(shown), 1, squeeze=False)[:, 0])
        for ax, (one, target) in zip(axes, shown, strict=True):
            _panel(ax, one, target, history, forecast, tested, levels)
            ax.set_title(short(f"{one}: {target}" if len(pairs) > 1 else str(target), 60))
        axes[0].legend(loc="upper left", ncols=4, bbox_to_anchor=(0, 1.42), borderaxespad=0)
        band = f"; the band reaches from {levels[0]} to {levels[-1]}" if levels else ""
        rest = f" {len(pairs) - _SHOWN} more are in the table." if len(pairs) > _SHOWN else ""
        caption = (
            "Observed values, the forecast of the last backtest window over what came, and the "
            f"forecast{band}. Gaps are missing values.{rest}"
        )
        return finish(figure, folder, "forecast", "Context, forecast and truth", caption)


def _panel(
    ax: Any, one: str, target: str, history: Any, forecast: Any, tested: Any, levels: list[str]
) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    def of(table: Any) -> Any:
        return table[(table["id"] == one) & (table["target"] == target)]

    ahead, past, judged = of(forecast), of(history), of(tested)
    past = past.iloc[-4 * len(ahead) :]
    judged = judged[judged["origin"] == judged["origin"].max()]
    ax.plot(past["timestamp"], past["value"], color=INK, lw=1.3, label="observed")
    ax.plot(
        judged["timestamp"], judged["forecast"], color=BRIGHT[1], ls=(0, (4, 1.5)), label="backtest"
    )
    if levels:
        ax.fill_between(
            ahead["timestamp"],
            ahead[levels[0]],
            ahead[levels[-1]],
            color=BRIGHT[0],
            alpha=0.22,
            lw=0,
            label=f"{levels[0]} to {levels[-1]}",
        )
    ax.plot(ahead["timestamp"], ahead["forecast"], color=BRIGHT[0], label="forecast")
    ax.axvline(past["timestamp"].iloc[-1], color=SOFT, lw=0.8)
    ax.margins(x=0.01)
    dates = AutoDateLocator(maxticks=6)  # type: ignore[no-untyped-call]
    ax.xaxis.set_major_locator(dates)
    ax.xaxis.set_major_formatter(ConciseDateFormatter(dates))  # type: ignore[no-untyped-call]
