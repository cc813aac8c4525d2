"""What a pretrained forecaster has to beat: DLinear trained on the set, and the Theta method.

Sources: Zeng et al. 2023, arXiv 2205.13504 (DLinear); Assimakopoulos and Nikolopoulos 2000 (Theta).
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polytask.errors import DataError
from polytask.models.ttm import TTMConfig
from polytask.systems.testbeds.series import CONTEXT, HORIZON, Floats, HeldOut


class DLinear(nn.Module):
    """Trend (moving average over 25 steps) and remainder, each mapped linearly to the horizon.

    Takes and gives what a TinyTimeMixer does, so one training serves both.
    """

    def __init__(self, kernel: int = 25) -> None:
        super().__init__()
        self.config = TTMConfig(
            context_length=CONTEXT, prediction_length=HORIZON, patch_length=12, patch_stride=12
        )
        self.kernel = kernel
        self.trend = nn.Linear(CONTEXT, HORIZON)
        self.rest = nn.Linear(CONTEXT, HORIZON)

    def forward(
        self, past: Tensor, frequency: Tensor | None = None, future: Tensor | None = None
    ) -> dict[str, Tensor]:
        x = past[..., 0]
        level = x.nanmean(1, keepdim=True).nan_to_num()
        x = torch.where(x.isfinite(), x, level) - level
        half = self.kernel // 2
        smooth = F.avg_pool1d(F.pad(x[:, None], (half, half), "replicate"), self.kernel, 1)[:, 0]
        out = self.trend(smooth) + self.rest(x - smooth) + level
        return {"forecast": out[..., None], "scale": torch.ones_like(level)[..., None]}


def theta(part: HeldOut) -> Floats:
    """(n, horizon, 1) one fitted Theta model per test window."""
    try:
        from statsmodels.tsa.forecasting.theta import ThetaModel
    except ImportError as error:
        raise DataError("statsmodels is missing: pip install 'polytask[series]'") from error
    out = np.empty_like(part.future)
    for i, window in enumerate(part.past[..., 0]):
        seen = _filled(window)
        season = part.frequency.season
        use = season > 1 and len(seen) >= 2 * season
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = ThetaModel(
                seen, period=season if use else 1, deseasonalize=use, method="additive"
            )
            out[i, :, 0] = np.asarray(model.fit().forecast(part.horizon))
    return out


def _filled(window: Floats) -> Floats:
    """From the first observation on, gaps interpolated."""
    seen = np.flatnonzero(np.isfinite(window))
    steps = np.arange(seen[0], len(window))
    return np.asarray(np.interp(steps, seen, window[seen]), dtype=np.float64)
