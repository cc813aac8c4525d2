"""Training a Tiny Time Mixer on windows: batches by index, the loss, one call of the trainer.

Windows are drawn by the mixture sampler, so shares of data sets are exact (size^alpha), no window
repeats within an epoch, and a resumed run sees the batches of an uninterrupted one.
"""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polytask.data.windows import Windows
from polytask.errors import UserError
from polytask.mixture import MixtureConfig, build_sampler
from polytask.models.batch import Terms
from polytask.models.ttm import TinyTimeMixer
from polytask.objectives.numbers import Shape, pinball, raw_forecast
from polytask.train.config import StageConfig, TrainConfig
from polytask.train.loader import FunctionLoader
from polytask.train.trainer import Trainer, TrainResult

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class SeriesBatch:
    """Windows of one step: past (B, T, C), future (B, H, C), token, task and row (B,)."""

    past: Tensor
    future: Tensor
    token: Tensor
    task: Tensor
    row: Tensor

    @property
    def rows(self) -> int:
        return len(self.task)

    def to(self, device: Any, non_blocking: bool = False) -> SeriesBatch:
        """The same windows on another device."""
        parts = (self.past, self.future, self.token, self.task, self.row)
        return SeriesBatch(*(part.to(device, non_blocking=non_blocking) for part in parts))


class WindowSource(Protocol):
    """Numbered windows of named data sets, as `WindowSet` has them."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    def gather(self, dataset: Ints, index: Ints) -> Windows: ...


class WindowLoader(FunctionLoader):
    """Batches of windows, drawn by size^alpha; `batch(i)` is a function of i alone."""

    def __init__(
        self,
        windows: WindowSource,
        batch_size: int,
        seed: int,
        alpha: float = 0.5,
        tokens: int = 14,
    ) -> None:
        super().__init__(windows.names, self._take, sum(windows.sizes))
        self.windows, self.batch_size, self.tokens = windows, batch_size, tokens
        config = MixtureConfig(policy="temperature", alpha=alpha)
        self.sampler = build_sampler(config, windows.names, windows.sizes, seed, batch_size)

    def _take(self, index: int) -> SeriesBatch:
        drawn = self.sampler.draw(index * self.batch_size, self.batch_size)
        found = self.windows.gather(drawn.group, drawn.index)
        token = np.where(found.token < self.tokens, found.token, 0)
        return SeriesBatch(
            torch.from_numpy(found.past),
            torch.from_numpy(found.future),
            torch.from_numpy(token),
            torch.from_numpy(drawn.group),
            torch.from_numpy(drawn.index),
        )


@dataclass(frozen=True)
class ForecastLoss:
    """Distance of the forecast, plus the pinball loss of the quantiles where there are any.

    scaled: in units of each window's instance norm, else in those of the series.
    """

    shape: Shape = "mse"
    scaled: bool = False

    def __call__(self, model: TinyTimeMixer, batch: SeriesBatch) -> Terms:
        config = model.config
        out = model(batch.past, frequency=batch.token, future=batch.future)
        steps = min(out["forecast"].shape[1], batch.future.shape[1])
        columns = list(config.prediction_channel_indices or range(config.num_input_channels))
        truth = batch.future[:, :steps, columns]
        scale = out["scale"][:, 0] if self.scaled else None
        value = {"forecast": raw_forecast(out["forecast"][:, :steps], truth, self.shape, scale)}
        if config.quantiles:
            quantiles = out["quantiles"][:, :steps]
            value["quantiles"] = pinball(quantiles, truth, config.quantiles, scale)
        return Terms(value, dict.fromkeys(value, batch.task), dict.fromkeys(value, batch.row))


def train_mixer(
    model: nn.Module,
    windows: WindowSource,
    *,
    steps: int,
    batch_size: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
    alpha: float = 0.5,
    loss: ForecastLoss | None = None,
    freeze: tuple[str, ...] = (),
    folder: Path | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
    progress: bool = False,
) -> TrainResult:
    """Train in place with AdamW, a tenth of warm-up, cosine decay.

    Args:
        windows: data sets of windows with as many channels as the model has.
        freeze: patterns of parameters that stay as they are ('backbone.*' for few-shot).
        folder: run folder, in which an interrupted training resumes; None keeps nothing.
        precision: 'auto' is bf16 on an accelerator and fp32 on a processor.
    """
    if precision == "auto":
        usable = torch.cuda.is_available() and device != "cpu"
        precision = "bf16" if usable else "fp32"
    size = min(batch_size, max(1, sum(windows.sizes)))
    config = TrainConfig(
        stages=(StageConfig(name="fit", steps=steps, freeze=freeze),),
        batch_size=size,
        seed=seed,
        device=device,
        precision=precision,
        lr=lr,
        schedule="cosine",
        warmup=0.1,
        weight_decay=0.01,
        log_every=max(1, min(50, steps)),
        checkpoint_every=0 if folder is None else 500,
        keep=1,
        progress=progress,
    )
    settings: Any = model.config
    tokens = settings.frequency_token_vocab_size
    loader = WindowLoader(windows, size, seed, alpha, tokens)
    place = tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder))
    with place as run:
        trainer = Trainer(model, loader, config, run, loss or ForecastLoss())
        result = trainer.fit()
    if result.stopped == "interrupted":
        kept = "nothing is kept" if folder is None else f"start again to go on in {folder}"
        raise UserError(f"training was interrupted at step {result.step} of {steps}; {kept}")
    model.eval()
    return result
