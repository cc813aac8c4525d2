"""Sales with promotions that are known in advance: are they used, and no target?

    y_t = season + AR(1) shared by three targets + beta * promo_t

The arm that does not see promotions to come is the same network with zeros in their place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from polytask import rng
from polytask.data.calendar import Frequency
from polytask.data.windows import Record, WindowSet
from polytask.errors import PolytaskError
from polytask.infer.series_training import ForecastLoss, SeriesBatch, train_mixer
from polytask.models.batch import Terms
from polytask.models.ttm import TinyTimeMixer, TTMConfig
from polytask.objectives.numbers import raw_forecast
from polytask.study import Budget, Result

CONTEXT, HORIZON, TARGETS = 96, 24, 3
CONFIG = TTMConfig(
    context_length=CONTEXT,
    prediction_length=HORIZON,
    patch_length=12,
    patch_stride=12,
    num_input_channels=TARGETS + 1,
    d_model=24,
    decoder_d_model=24,
    adaptive_patching_levels=2,
    dropout=0.1,
    head_dropout=0.1,
    decoder_mode="mix_channel",
    prediction_channel_indices=(0, 1, 2),
    exogenous_channel_indices=(3,),
    enable_forecast_channel_mixing=True,
    exogenous_scale="raw",
)


def sales(seed: int, steps: int = 2000) -> Record:
    """(steps, 4): three targets that move together, and the promotion (0 or 1)."""
    random = rng.generator(seed, "sales")
    time = np.arange(steps)
    promo = (random.random(steps) < 0.15).astype(np.float64)
    shared, state = np.empty(steps), 0.0
    for t, shock in enumerate(random.normal(0, 0.3, steps)):
        shared[t] = state = 0.8 * state + shock
    columns = []
    for beta in (2.0, 1.5, 2.5):
        season = np.sin(2 * np.pi * (time / 7 + random.random()))
        columns.append(season + shared + beta * promo + random.normal(0, 0.2, steps))
    values = np.stack([*columns, promo], axis=1)
    return Record(values.astype(np.float32), Frequency.named("D"))


@dataclass(frozen=True)
class BlindLoss(ForecastLoss):
    """The loss of a model that is not told the promotions to come, in training either."""

    def __call__(self, model: TinyTimeMixer, batch: SeriesBatch) -> Terms:
        out = model(batch.past, future=hide(batch.future))
        value = {"forecast": raw_forecast(out["forecast"], batch.future[..., :TARGETS], self.shape)}
        return Terms(value, {"forecast": batch.task}, {"forecast": batch.row})


@dataclass(frozen=True)
class Trial:
    """Train on the first 70 %, judge on the rest; `sees` the promotions to come or does not."""

    sees: bool
    smoke: bool = False

    def __call__(self, seed: int, budget: Budget) -> Result:
        record = sales(seed)
        cut = round(len(record.values) * 0.7)
        train = Record(record.values[:cut], record.frequency)
        test = Record(record.values[cut - CONTEXT :], record.frequency)
        torch.manual_seed(rng.derive(seed, "init"))
        model = TinyTimeMixer(CONFIG)
        steps, batch = (3 if self.smoke else 250), 32
        windows = WindowSet({"sales": [train]}, CONTEXT, HORIZON, shortest=CONTEXT)
        loss = ForecastLoss() if self.sees else BlindLoss()
        train_mixer(
            model,
            windows,
            steps=steps,
            batch_size=batch,
            lr=3e-3,
            seed=seed,
            loss=loss,
            device="cpu",
        )
        held = WindowSet({"sales": [test]}, CONTEXT, HORIZON, shortest=CONTEXT, stride=4)
        index = np.arange(held.sizes[0])
        drawn = held.gather(np.zeros_like(index), index)
        past, future = torch.from_numpy(drawn.past), torch.from_numpy(drawn.future)
        with torch.no_grad():
            known = future if self.sees else hide(future)
            guess = model(past, future=known)["forecast"]
            disturbed = known.clone()
            disturbed[..., :TARGETS] += 100 * torch.randn_like(disturbed[..., :TARGETS])
            if not torch.equal(model(past, future=disturbed)["forecast"], guess):
                raise PolytaskError("future target values reach the forecast: a leak")
        mse = float((guess - future[..., :TARGETS]).square().mean())
        spent = Budget(steps=steps, rows=steps * batch, tokens=0)
        metrics = {"exogenous_mse": mse, "exogenous_log_mse": math.log(mse)}
        return Result(
            dict(metrics), spent, {"leak": "none: disturbed future targets change nothing"}
        )


def hide(future: torch.Tensor) -> torch.Tensor:
    """The future without its promotions."""
    hidden = future.clone()
    hidden[..., TARGETS:] = 0.0
    return hidden
