"""From a panel and a cut per series to forecasts: contexts, scaling, recursion, batches."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from polytask.data.calendar import show
from polytask.data.panel import Panel
from polytask.errors import DataError
from polytask.models.ttm import TinyTimeMixer

Floats = NDArray[np.float32]
_BATCH = 1024


@dataclass(frozen=True)
class Roll:
    """Forecasts (series, steps, targets) in the table's units, quantiles with a last axis more."""

    forecast: Floats
    quantiles: Floats
    cuts: NDArray[np.int64]


@torch.no_grad()
def roll(
    model: TinyTimeMixer,
    panel: Panel,
    cuts: NDArray[np.int64],
    steps: int,
    control_units: Floats,
    device: str = "auto",
) -> Roll:
    """Forecast `steps` steps after step `cuts[i]` of every series.

    Only rows before the cut are read, and controls after it. Scales are those of the context.

    Raises:
        DataError: a control is missing in the steps to forecast.
    """
    c = model.config
    controls = len(panel.channels) - panel.targets
    past = _contexts(panel, cuts, c.context_length)
    future = _controls(panel, cuts, steps, control_units[0])
    short = cuts < c.context_length
    if short.any():
        name = panel.ids[int(short.argmax())]
        warnings.warn(
            f"series '{name}' has {int(cuts[short][0])} steps, the model's context "
            f"{c.context_length}: what is missing in front counts as missing"
            + (f" (and {short.sum() - 1} more series)" if short.sum() > 1 else ""),
            stacklevel=3,
        )
    loc, scale = _scales(panel, past[..., : panel.targets])
    scaled = past.copy()
    scaled[..., : panel.targets] = (past[..., : panel.targets] - loc) / scale
    scaled[..., panel.targets :] = (past[..., panel.targets :] - control_units[0]) / control_units[
        1
    ]
    known = (future - control_units[0]) / control_units[1]
    if controls == 0:  # every target is a series of its own
        scaled = scaled.transpose(0, 2, 1).reshape(-1, c.context_length, 1)
        known = np.zeros((len(scaled), steps, 0), np.float32)
    token = panel.frequency.token
    token = token if token < c.frequency_token_vocab_size else 0
    out, spread = _recurse(model, scaled, known, steps, token, device)
    n, q = len(panel), len(c.quantiles)
    if controls == 0:
        out = out.reshape(n, panel.targets, steps).transpose(0, 2, 1)
        spread = spread.reshape(n, panel.targets, steps, q).transpose(0, 2, 1, 3)
    return Roll(out * scale + loc, spread * scale[..., None] + loc[..., None], cuts)


def _recurse(
    model: TinyTimeMixer, past: Floats, known: Floats, steps: int, token: int, device: str
) -> tuple[Floats, Floats]:
    """Block after block; a forecast is the context of the next. Scaled units."""
    c = model.config
    kind = "cuda" if torch.cuda.is_available() and device != "cpu" else "cpu"
    model.to(kind).eval()
    forecasts, spreads = [], []
    for first in range(0, steps, c.prediction_length):
        block = _block_controls(known, first, c.prediction_length, c.num_input_channels)
        outs, quants = [], []
        for at in range(0, len(past), _BATCH):
            rows = slice(at, at + _BATCH)
            window = torch.from_numpy(past[rows]).to(kind)
            ahead = torch.from_numpy(block[rows]).to(kind) if c.num_input_channels > 1 else None
            tokens = torch.full((len(window),), token, device=kind)
            out = model(window, frequency=tokens, future=ahead)
            outs.append(out["forecast"].cpu().numpy())
            if c.quantiles:
                quants.append(out["quantiles"].cpu().numpy())
        forecast = np.concatenate(outs)
        forecasts.append(forecast)
        if quants:
            spreads.append(np.concatenate(quants))
        added = np.concatenate([forecast, block[..., forecast.shape[2] :]], axis=2)
        past = np.concatenate([past, added.astype(np.float32)], axis=1)[:, -c.context_length :]
    joined = np.concatenate(forecasts, axis=1)[:, :steps]
    if not spreads:
        return joined, np.zeros((*joined.shape, 0), np.float32)
    return joined, np.concatenate(spreads, axis=1)[:, :steps]


def _block_controls(known: Floats, first: int, length: int, channels: int) -> Floats:
    """(series, length, channels) with the controls of one block in the last channels; beyond the
    horizon asked for they are 0, and those forecasts are cut off."""
    part = known[:, first : first + length]
    out = np.zeros((len(known), length, channels), np.float32)
    if part.shape[2]:
        out[:, : part.shape[1], channels - part.shape[2] :] = part
    return out


def _contexts(panel: Panel, cuts: NDArray[np.int64], context: int) -> Floats:
    """(series, context, channels) before each cut, NaN before a series' start."""
    rows = (panel.starts[:-1] + cuts)[:, None] + np.arange(-context, 0)
    start = panel.starts[:-1, None]
    past = panel.values[np.maximum(rows, start)].copy()
    past[rows < start] = np.nan
    return np.asarray(past)


def _controls(panel: Panel, cuts: NDArray[np.int64], steps: int, means: Floats) -> Floats:
    """(series, steps, controls) after each cut; every one after the last target has to be there.

    A row that is missing within the history has no control: it counts as the mean for its
    neighbours, as in training; its own step is neither learnt from nor scored.
    """
    controls = len(panel.channels) - panel.targets
    out = np.zeros((len(panel), steps, controls), np.float32)
    if controls == 0:
        return out
    for i, cut in enumerate(cuts):
        ahead = panel.series(i)[cut : cut + steps, panel.targets :].copy()
        within = ahead[: max(0, len(panel.history(i)) - cut)]
        within[...] = np.where(np.isfinite(within), within, means)
        seen = np.isfinite(ahead)
        if len(ahead) < steps or not seen.all():
            if len(ahead) and not seen.all():
                step, column = np.argwhere(~seen)[0]
            else:
                step, column = len(ahead), 0
            when = panel.frequency.after(panel.stamps(i)[cut - 1], int(step) + 1)[-1]
            raise DataError(
                f"series '{panel.ids[i]}': control '{panel.channels[panel.targets + column]}' has "
                f"no value for {show(when)}; controls have to be known for all {steps} steps to "
                "forecast"
            )
        out[i] = ahead
    return out


def _scales(panel: Panel, past: Floats) -> tuple[Floats, Floats]:
    """Mean and spread of each context's targets, (series, 1, targets); constant ones are told."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all missing
        loc = np.nanmean(past, axis=1, keepdims=True)
        scale = np.nanstd(past, axis=1, keepdims=True)
    empty = ~np.isfinite(loc)
    flat = ~empty & (scale <= 1e-6 * np.maximum(np.abs(loc), 1e-12))
    for what, where in (("no target value", empty), ("a constant target", flat)):
        if where.any():
            series, _, target = np.argwhere(where)[0]
            warnings.warn(
                f"series '{panel.ids[series]}' has {what} '{panel.channels[target]}' in its "
                "context: its forecast is flat",
                stacklevel=4,
            )
    loc = np.where(empty, 0, loc)
    return loc.astype(np.float32), np.where(empty | flat, 1, scale).astype(np.float32)
