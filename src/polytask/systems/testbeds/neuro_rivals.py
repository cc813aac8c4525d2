"""What a Neuroformer has to beat: correlations, a GLM, decoders on the same windows, Poisson.

Connection scores are (N, N) [target, source], larger for likelier, as `evaluate.spikes` wants.
Sources: cross-correlograms, Perkel et al. 1967; GLM with coupling filters, Pillow et al. 2008.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from polytask import rng
from polytask.data.spike_windows import SpikeWindows
from polytask.data.spikes import Recording
from polytask.errors import ConfigError, DataError

Floats = NDArray[np.float64]


def binned(recording: Recording, bins: int) -> Floats:
    """(N, T // bins) counts of `bins` recorded bins each."""
    raster = recording.raster()
    whole = raster.shape[1] // bins * bins
    if not whole:
        raise DataError(f"the recording is shorter than {bins} bins")
    counts = raster[:, :whole].reshape(len(raster), -1, bins).sum(axis=2)
    return np.asarray(counts, np.float64)


def lag_correlation(counts: ArrayLike, lag: int) -> Floats:
    """[y, p]: correlation of y's count with p's count `lag` bins before; lag 0 is symmetric."""
    table = np.asarray(counts, float)
    if not 0 <= lag < table.shape[1] - 1:
        raise ConfigError(f"lag {lag} does not fit {table.shape[1]} bins")
    now, before = table[:, lag:], table[:, : table.shape[1] - lag]
    now, before = (t - t.mean(axis=1, keepdims=True) for t in (now, before))
    scale = np.sqrt(np.outer((now**2).sum(axis=1), (before**2).sum(axis=1)))
    found: Floats = now @ before.T / np.where(scale > 0, scale, np.inf)
    return found


def peak_correlation(counts: ArrayLike, lags: int) -> Floats:
    """[y, p]: the strongest correlation, of either sign, at any lag from 1 to `lags`."""
    table = np.asarray(counts, float)
    each = np.stack([np.abs(lag_correlation(table, lag)) for lag in range(1, lags + 1)])
    found: Floats = each.max(axis=0)
    return found


def raised_cosines(width: int, count: int) -> Floats:
    """(count, width) overlapping bumps over lags 1 .. width that add up to 1 in between."""
    if count == 1:
        return np.ones((1, width))
    centres = np.linspace(0, width - 1, count)
    distance = (np.arange(width) - centres[:, None]) / (centres[1] - centres[0])
    bumps: Floats = np.where(np.abs(distance) < 1, (1 + np.cos(np.pi * distance)) / 2, 0.0)
    return bumps


def past_features(counts: ArrayLike, basis: Floats) -> Floats:
    """(T, N * count) every neuron's past through every bump; bin t sees only bins before t."""
    table = np.asarray(counts, float)
    padded = np.pad(table, ((0, 0), (basis.shape[1], 0)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, basis.shape[1], axis=1)[:, :-1]
    # frames[n, t] are bins t - width .. t - 1; the basis counts backwards from t - 1.
    found = np.einsum("ntw,cw->tnc", frames, basis[:, ::-1], optimize=True)
    return np.ascontiguousarray(found).reshape(table.shape[1], -1)


@dataclass(frozen=True)
class CouplingGLM:
    """Poisson regressions of every neuron on everybody's past.

    `filters`: (N, N, lags) [target, source, lag] log-rate per spike; `bias`: (N,).
    """

    filters: Floats
    bias: Floats
    counts_scale: Floats

    @property
    def score(self) -> Floats:
        """[y, p]: root mean square over lags of the filter, in standard deviations of p's count."""
        size = np.sqrt((self.filters**2).mean(axis=2))
        found: Floats = size * self.counts_scale[None, :]
        return found


def fit_glm(counts: ArrayLike, lags: int, bumps: int = 4, alpha: float = 1e-3) -> CouplingGLM:
    """Fit the GLM by penalised maximum likelihood (scikit-learn's Poisson regression, Newton).

    Args:
        counts: (N, T) spike counts; lags, bumps: length and number of the filters' bumps.
        alpha: weight of the squared coefficients of standardised features.
    """
    from sklearn.linear_model import PoissonRegressor

    table = np.asarray(counts, float)
    basis = raised_cosines(lags, bumps)
    features = past_features(table, basis)
    mean, spread = features.mean(axis=0), features.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    features = (features - mean) / spread
    filters, bias = np.zeros((len(table), len(table), lags)), np.zeros(len(table))
    for y, target in enumerate(table):
        if not target.any():
            bias[y] = -np.inf
            continue
        model = PoissonRegressor(alpha=alpha, solver="newton-cholesky", max_iter=30, tol=1e-4)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(features, target)
        weight = model.coef_ / spread
        filters[y] = weight.reshape(len(table), bumps) @ basis
        bias[y] = model.intercept_ - weight @ mean
    return CouplingGLM(filters, bias, table.std(axis=1))


def poisson_windows(rates: ArrayLike, seconds: float, windows: int, seed: int) -> NDArray[np.int64]:
    """(windows, N) counts of independent Poisson neurons with these rates (per second)."""
    mean = np.asarray(rates, float) * seconds
    return rng.generator(seed, "poisson rival").poisson(mean, (windows, len(mean)))


@dataclass(frozen=True)
class Decoder:
    """A fitted decoder: call it with (B, lags, N) counts for (B,) values."""

    predict: Callable[[NDArray[Any]], Floats]
    parameters: int

    def __call__(self, counts: NDArray[Any]) -> Floats:
        return self.predict(counts)


def fit_decoder(
    kind: str,
    windows: SpikeWindows,
    target: str,
    train: ArrayLike,
    *,
    lags: int = 2,
    seed: int = 0,
    alpha: float = 1.0,
    lr: float = 3e-3,
    steps: int = 400,
    width: int = 64,
    batch: int = 64,
) -> Decoder:
    """Fit 'ridge', 'mlp' or 'gru' on spike counts of the window and the `lags - 1` before it.

    Args:
        train: window indices to fit on (the full train set or a few-shot set).
        alpha: ridge's penalty; lr, steps, width, batch: of the networks.
    """
    index = np.asarray(train, np.int64)
    counts = windows.counts(index, lags)
    value = windows.batch(index).targets[target].numpy().astype(np.float64)
    mean, spread = counts.mean(axis=0), counts.std(axis=0)
    spread = np.where(spread > 0, spread, 1.0)
    level, scale = float(value.mean()), float(value.std()) or 1.0
    x, y = (counts - mean) / spread, (value - level) / scale
    if kind == "ridge":
        from sklearn.linear_model import Ridge

        model = Ridge(alpha=alpha).fit(x.reshape(len(x), -1), y)

        def linear(new: NDArray[Any]) -> Floats:
            flat = ((new - mean) / spread).reshape(len(new), -1)
            return np.asarray(model.predict(flat) * scale + level, np.float64)

        return Decoder(linear, model.coef_.size + 1)
    if kind not in ("mlp", "gru"):
        raise ConfigError(f"unknown decoder '{kind}'; known: ridge, mlp, gru")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive(seed, "decoder", kind))
        net: nn.Module = _MLP(x.shape[1:], width) if kind == "mlp" else _GRU(x.shape[2], width)
        _train(net, torch.from_numpy(x).float(), torch.from_numpy(y).float(), lr, steps, batch)

    def deep(new: NDArray[Any]) -> Floats:
        with torch.no_grad():
            out = net(torch.from_numpy((new - mean) / spread).float())
        return np.asarray(out.numpy() * scale + level, np.float64)

    return Decoder(deep, sum(p.numel() for p in net.parameters()))


class _MLP(nn.Module):
    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(int(np.prod(shape)), width), nn.GELU(), nn.Dropout(0.2),
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1),
        )  # fmt: skip

    def forward(self, counts: Tensor) -> Tensor:
        out: Tensor = self.net(counts)[:, 0]
        return out


class _GRU(nn.Module):
    def __init__(self, units: int, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(units, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, counts: Tensor) -> Tensor:
        out: Tensor = self.head(self.gru(counts)[0][:, -1])[:, 0]
        return out


def _train(net: nn.Module, x: Tensor, y: Tensor, lr: float, steps: int, batch: int) -> None:
    """AdamW with a cosine schedule; batches are drawn with replacement."""
    optimiser = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    net.train()
    for _ in range(steps):
        take = torch.randint(len(x), (min(batch, len(x)),))
        loss = F.mse_loss(net(x[take]), y[take])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
    net.eval()
