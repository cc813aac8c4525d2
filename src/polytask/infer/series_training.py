"""Training a Tiny Time Mixer on windows: batches by index, the loss, one call of the trainer.

Windows are drawn by the mixture sampler, so shares of data sets are exact (size^alpha), no window
repeats within an epoch, and a resumed run sees the batches of an uninterrupted one.
"""

from __future__ import annotations

import copy
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass, replace
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
from polytask.train.config import EarlyStopping, StageConfig, TrainConfig
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
        return series_batch(found, drawn.group, drawn.index, self.tokens)


def series_batch(windows: Windows, dataset: Ints, index: Ints, tokens: int) -> SeriesBatch:
    """Gathered windows as tensors; resolutions that the model has no token for are 'other'."""
    token = np.where(windows.token < tokens, windows.token, 0)
    parts = (windows.past, windows.future, token, dataset, index)
    return SeriesBatch(*(torch.from_numpy(part) for part in parts))


@dataclass(frozen=True)
class ForecastLoss:
    """Distance of the forecast, plus the pinball loss of the quantiles where there are any.

    scaled: in units of each window's instance norm, else in those of the series.

    A step to forecast with an unknown control is not learnt from: no value of it would be right. As
    a neighbour of other steps it counts as 0, the mean of scaled controls.
    """

    shape: Shape = "mse"
    scaled: bool = False

    def __call__(self, model: TinyTimeMixer, batch: SeriesBatch) -> Terms:
        config = model.config
        controls = list(config.exogenous_channel_indices or ())
        unknown = batch.future[..., controls].isnan()
        future = batch.future
        if bool(unknown.any()):
            future = future.clone()
            future[..., controls] = future[..., controls].nan_to_num()
        out = model(batch.past, frequency=batch.token, future=future)
        steps = min(out["forecast"].shape[1], batch.future.shape[1])
        columns = list(config.prediction_channel_indices or range(config.num_input_channels))
        truth = batch.future[:, :steps, columns]
        truth = truth.masked_fill(unknown[:, :steps].any(-1, keepdim=True), torch.nan)
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
    held_out: WindowSource | None = None,
    patience: int = 5,
) -> TrainResult:
    """Train in place with AdamW, a tenth of warm-up, cosine decay.

    Args:
        held_out: windows that are later in time. The loss on at most `_JUDGES` of them is looked at
            twenty times on the way; training ends when it has not fallen `patience` times, and the
            weights with the lowest loss are kept, be they those that came in.
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
        evaluate_every=0 if held_out is None else max(1, steps // 20),
        early_stopping=None if held_out is None else _stopping(patience),
        keep=1,
        progress=progress,
    )
    settings: Any = model.config
    tokens = settings.frequency_token_vocab_size
    loader = WindowLoader(windows, size, seed, alpha, tokens)
    judge = None if held_out is None else Judge(held_out, loss or ForecastLoss(), tokens)
    came = None if judge is None else (judge.loss(model), copy.deepcopy(model.state_dict()))
    place = tempfile.TemporaryDirectory() if folder is None else nullcontext(str(folder))
    with place as run:
        trainer = Trainer(model, loader, config, run, loss or ForecastLoss(), judge)
        result = trainer.fit()
    if result.stopped == "interrupted":
        kept = "nothing is kept" if folder is None else f"start again to go on in {folder}"
        raise UserError(f"training was interrupted at step {result.step} of {steps}; {kept}")
    if came is not None and trainer.stopper.best is not None and came[0] <= trainer.stopper.best:
        model.load_state_dict(came[1])
        result = replace(result, best_step=0)
    model.eval()
    return result


_JUDGES = 512


class Judge:
    """Mean loss on held-out windows spread evenly over all there are; an evaluator of `Trainer`."""

    def __init__(self, windows: WindowSource, loss: ForecastLoss, tokens: int) -> None:
        total = sum(windows.sizes)
        chosen = np.unique(np.linspace(0, total - 1, min(total, _JUDGES)).round().astype(np.int64))
        ends = np.cumsum(windows.sizes)
        dataset = np.searchsorted(ends, chosen, side="right")
        index = chosen - (ends - np.array(windows.sizes))[dataset]
        self.batch = series_batch(windows.gather(dataset, index), dataset, index, tokens)
        self._loss, self._name = loss, windows.names[0]

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """In evaluation mode, which is left as it was."""
        training = model.training
        terms = self._loss(model.eval(), self.batch.to(next(model.parameters()).device))
        model.train(training)
        return float(torch.stack([value.nanmean() for value in terms.value.values()]).sum())

    def __call__(self, model: Any, step: int) -> dict[str, dict[str, float]]:
        return {self._name: {"loss": self.loss(model)}}


def _stopping(patience: int) -> EarlyStopping:
    return EarlyStopping(metric="loss", patience=patience, higher_is_better=False)
