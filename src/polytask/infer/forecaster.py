"""A forecaster for a long table: `id, timestamp, targets..., controls...`.

    >>> forecaster = Forecaster().pretrain(datasets)                     # or .from_pretrained(...)
    >>> forecaster.fit("sales.csv", timestamp="day", targets=["y"], id="shop", controls=["holiday"])
    >>> forecaster.predict(horizon=24)         # id, timestamp, target, forecast, q0.1, q0.5, q0.9
    >>> forecaster.backtest(windows=5)         # mse, mae, smape, mase beside the seasonal naive

Without controls every target is a series of its own for a one-channel model. With controls a model
with one channel per column takes over all weights that fit; what is new starts at zero, so its
forecasts are those of the pretrained model until it is trained.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from polytask import rng
from polytask.data.panel import Panel, read_panel
from polytask.data.windows import Record, WindowSet, standardise, univariate, with_coarser
from polytask.errors import DataError, UserError
from polytask.infer import forecast_files
from polytask.infer.backtest import Scores, score_origin, summarise
from polytask.infer.series_predict import Floats, Roll, roll
from polytask.infer.series_training import ForecastLoss, train_mixer
from polytask.models.ttm import TinyTimeMixer, TTMConfig

Mode = Literal["zero-shot", "few-shot", "full"]

DEFAULT = TTMConfig(
    context_length=96,
    prediction_length=24,
    patch_length=12,
    patch_stride=12,
    d_model=48,
    decoder_d_model=24,
    adaptive_patching_levels=2,
    resolution_prefix_tuning=True,
    frequency_token_vocab_size=14,
    dropout=0.1,
    head_dropout=0.1,
    exogenous_scale="raw",
    quantiles=(0.1, 0.5, 0.9),
)


@dataclass(frozen=True)
class Columns:
    """Which columns of the table play which role, and how training went about it."""

    timestamp: str
    targets: tuple[str, ...]
    id: str | None = None
    controls: tuple[str, ...] = ()
    frequency: str | None = None
    mode: Mode = "zero-shot"
    steps: int = 400
    lr: float = 3e-3
    validation: float = 0.15


class Forecaster:
    """Pretrain, fit, predict, backtest, save and load.

    Args:
        config: of the one-channel model; see `DEFAULT`.
        seed: of the weights, the batches and the dropout.
        device: 'auto' takes the accelerator there is.
    """

    def __init__(self, config: TTMConfig = DEFAULT, seed: int = 0, device: str = "auto") -> None:
        self.seed, self.device = seed, device
        self.base = _fresh(config, seed)
        self.model = self.base
        self.columns: Columns | None = None
        self.panel: Panel | None = None
        self.control_units: Floats = np.zeros((2, 0), np.float32)

    def pretrain(
        self,
        datasets: Mapping[str, Sequence[Record]],
        steps: int = 600,
        batch_size: int = 128,
        lr: float = 3e-3,
        coarser: bool = True,
        folder: Path | None = None,
        progress: bool = False,
    ) -> Forecaster:
        """On every channel of every series as a series of its own; size^0.5 mixture of data sets.

        Args:
            datasets: name -> records; constant ones are left out.
            coarser: also on downsampled copies at every coarser resolution with a name.
            folder: run folder in which an interrupted pretraining resumes.
        """
        c = self.base.config
        scaled = {
            name: [s for r in univariate(records) if (s := standardise(r)) is not None]
            for name, records in datasets.items()
        }
        scaled = {name: records for name, records in scaled.items() if records}
        if coarser:
            scaled = with_coarser(scaled, shortest=2 * c.prediction_length)
        windows = WindowSet(scaled, c.context_length, c.prediction_length)
        self._train(self.base, windows, steps, batch_size, lr, (), folder, progress)
        self.model = self.base
        return self

    def fit(
        self,
        table: Any,
        *,
        timestamp: str,
        targets: Sequence[str],
        id: str | None = None,
        controls: Sequence[str] = (),
        frequency: str | None = None,
        mode: Mode = "few-shot",
        steps: int = 400,
        lr: float = 3e-3,
        validation: float = 0.15,
        progress: bool = False,
    ) -> Forecaster:
        """Learn from a table (pandas, Polars, Arrow, or a path), as `read_panel` takes it.

        Args:
            mode: 'zero-shot' trains nothing, 'few-shot' all but the backbone, 'full' everything.
                Controls need training: their mixer starts at zero.
            steps: at most so many; fewer when the loss on what is held out stops falling.
            lr: peak of the learning rate.
            validation: share of each series, its last part (a horizon at least), that is held out
                to tell when to stop; 0 trains on everything for all `steps`.

        Raises:
            DataError: the table has a fault (named), or no series is long enough to train on.
        """
        if mode not in ("zero-shot", "few-shot", "full"):
            raise UserError(f"mode '{mode}': give 'zero-shot', 'few-shot' or 'full'")
        for name, fits, what in (
            ("steps", steps >= 1, "at least 1"),
            ("lr", 0 < lr < 1, "between 0 and 1"),
            ("validation", 0 <= validation <= 0.5, "between 0 and 0.5"),
        ):
            if not fits:
                raise UserError(f"{name} = {locals()[name]}: should be {what}")
        self.columns = Columns(
            timestamp, tuple(targets), id, tuple(controls), frequency, mode, steps, lr, validation
        )
        self.panel = self._read(table)
        self._fit_panel(self.panel, progress)
        return self

    def predict(self, table: Any = None, horizon: int | None = None) -> Any:
        """The steps after each series' last target, as a pandas table: id, timestamp, target,
        forecast, and a column per quantile.

        Args:
            table: another table with the same columns; None takes the fitted one. Controls are
                read from its rows after the last target.
            horizon: steps; None: the model's own. Longer ones feed forecasts back as context.
        """
        panel = self._panel(table)
        steps = horizon or self.model.config.prediction_length
        if steps < 1:
            raise UserError(f"horizon = {horizon}: should be at least 1")
        rolled = self._roll(panel, panel_cuts(panel), steps)
        return forecast_files.to_frame(panel, rolled, self.model.config.quantiles, steps)

    def backtest(
        self,
        table: Any = None,
        windows: int = 5,
        stride: int | None = None,
        horizon: int | None = None,
    ) -> Scores:
        """Forecast the last part of each series from `windows` origins and compare.

        A model that was trained on the table is trained again on what lies before the first
        origin, so no origin is forecast by a model that has seen its future.
        """
        panel = self._panel(table)
        steps = horizon or self.model.config.prediction_length
        stride = stride or steps
        if windows < 1 or stride < 1:
            raise UserError(f"windows = {windows}, stride = {stride}: both should be at least 1")
        back = [steps + stride * k for k in range(windows)][::-1]
        lengths = panel_cuts(panel)
        least = int(lengths.min()) - back[0]
        if least < 3:
            short = panel.ids[int(lengths.argmin())]
            raise DataError(
                f"series '{short}' has {lengths.min()} steps: too few for {windows} windows of "
                f"{steps} steps. Lower `windows`, `stride` or the horizon"
            )
        judge = self
        if self.columns is not None and self.columns.mode != "zero-shot":
            judge = copy.copy(self)
            judge._fit_panel(truncated(panel, back[0]), False)
        parts = [
            score_origin(panel, lengths - b, judge._roll(panel, lengths - b, steps), steps)
            for b in back
        ]
        return summarise(panel, parts)

    def save(self, folder: Path | str) -> Path:
        """Weights (safetensors), configuration and columns (JSON), whole or not at all."""
        return forecast_files.save(self, Path(folder))

    @classmethod
    def load(cls, folder: Path | str, device: str = "auto") -> Forecaster:
        """What `save` wrote; forecasts are the same bit for bit."""
        return forecast_files.load(cls, Path(folder), device)

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str = "auto") -> Forecaster:
        """A published `granite-tsfm` checkpoint: a folder, or a name on the Hugging Face hub."""
        found = cls(forecast_files.granite_config(name), device=device)
        forecast_files.granite_weights(found.base, name)
        return found

    # Inside ---------------------------------------------------------------------------------------

    def _read(self, table: Any) -> Panel:
        c = self.columns
        assert c is not None
        return read_panel(
            table,
            timestamp=c.timestamp,
            targets=c.targets,
            id=c.id,
            controls=c.controls,
            frequency=c.frequency,
        )

    def _panel(self, table: Any) -> Panel:
        if self.columns is None:
            raise UserError("this forecaster knows no columns yet: call `fit` first")
        if table is None:
            if self.panel is None:
                raise UserError("a loaded forecaster keeps no data: give a table")
            return self.panel
        panel = self._read(table)
        if self.panel is not None and panel.frequency != self.panel.frequency:
            raise DataError(
                f"the table has the frequency '{panel.frequency.name}', the forecaster was fitted "
                f"on '{self.panel.frequency.name}'"
            )
        return panel

    def _fit_panel(self, panel: Panel, progress: bool) -> None:
        c = self.columns
        assert c is not None
        if c.controls and c.mode == "zero-shot":
            raise UserError("controls need training: give mode='few-shot' or 'full'")
        known = panel.values[:, panel.targets :]
        self.control_units = _units(known) if c.controls else np.zeros((2, 0), np.float32)
        self.model = self._adapted(panel)
        if c.mode == "zero-shot":
            return
        m = self.model.config
        records = [
            Record(self._scaled(panel.history(i), panel.targets), panel.frequency)
            for i in range(len(panel))
        ]
        if m.num_input_channels == 1:
            records = univariate(records)
        least = min(m.prediction_length, m.context_length // 2)
        early, late = split_in_time(records, c.validation, m.context_length, m.prediction_length)
        windows = WindowSet({"table": early}, m.context_length, m.prediction_length, least)
        held_out = None
        if late:
            held_out = WindowSet(
                {"table": late}, m.context_length, m.prediction_length, m.context_length
            )
        elif c.validation:
            warnings.warn(
                f"no series is long enough to hold out its last {c.validation:.0%}: all {c.steps} "
                "steps of tuning are made, unchecked",
                stacklevel=4,
            )
        frozen = ("backbone.*",) if c.mode == "few-shot" else ()
        self._train(self.model, windows, c.steps, 64, c.lr, frozen, None, progress, held_out)

    def _adapted(self, panel: Panel) -> TinyTimeMixer:
        """A copy of the pretrained model with the channels that the panel needs."""
        config, channels = self.base.config, len(panel.channels)
        has_mixer = config.enable_forecast_channel_mixing
        if channels > panel.targets:
            config = config.model_copy(
                update={
                    "num_input_channels": channels,
                    "prediction_channel_indices": tuple(range(panel.targets)),
                    "exogenous_channel_indices": tuple(range(panel.targets, channels)),
                    "enable_forecast_channel_mixing": True,
                    # a softmax over all inputs would shrink each control by their number
                    "fcm_gated_attn": config.fcm_gated_attn and has_mixer,
                    "exogenous_scale": "raw",
                }
            )
        model = _fresh(config, self.seed)
        model.load_state_dict({**model.state_dict(), **self.base.state_dict()})
        if model.head.fcm_block is not None:
            torch.nn.init.zeros_(model.head.fcm_block.mlp.weight)
            torch.nn.init.zeros_(model.head.fcm_block.mlp.bias)
        return model.eval()

    def _scaled(self, values: Floats, targets: int) -> Floats:
        """Targets by their own mean and spread, controls by those of the fitted table."""
        loc, scale = _units(values[:, :targets])
        shift = np.concatenate([loc, self.control_units[0]])
        unit = np.concatenate([scale, self.control_units[1]])
        return np.asarray((values - shift) / unit, dtype=np.float32)

    def _roll(self, panel: Panel, cuts: Any, steps: int) -> Roll:
        return roll(self.model, panel, cuts, steps, self.control_units, self.device)

    def _train(
        self,
        model: TinyTimeMixer,
        windows: WindowSet,
        steps: int,
        batch_size: int,
        lr: float,
        freeze: tuple[str, ...],
        folder: Path | None,
        progress: bool,
        held_out: WindowSet | None = None,
    ) -> None:
        train_mixer(
            model,
            windows,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            seed=self.seed,
            loss=ForecastLoss("huber"),
            freeze=freeze,
            folder=folder,
            device=self.device,
            progress=progress,
            held_out=held_out,
        )


def panel_cuts(panel: Panel) -> Any:
    """Steps of each series up to its last target, (series,) int."""
    return np.diff(panel.starts) - panel.known


def truncated(panel: Panel, steps: int) -> Panel:
    """The panel without the last `steps` steps (and the future controls) of every series."""
    blocks = [panel.history(i) for i in range(len(panel))]
    blocks = [block[: len(block) - steps] for block in blocks]
    lengths = [len(block) for block in blocks]
    return replace(
        panel,
        values=np.concatenate(blocks),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        known=np.zeros(len(panel), np.int64),
    )


def _fresh(config: TTMConfig, seed: int) -> TinyTimeMixer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive(seed, "ttm"))
        return TinyTimeMixer(config).eval()


def _units(values: Floats) -> Floats:
    """(2, channels): mean and standard deviation of what is known; 1 for constant channels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a channel without any value
        loc, scale = np.nanmean(values, 0), np.nanstd(values, 0)
    known = np.isfinite(loc) & (scale > 1e-6 * np.maximum(np.abs(loc), 1e-12))
    return np.stack([np.nan_to_num(loc), np.where(known, scale, 1.0)]).astype(np.float32)


def split_in_time(
    records: Sequence[Record], share: float, context: int, horizon: int
) -> tuple[list[Record], list[Record]]:
    """Each series without its last `share` (a horizon at least), and that part with the context
    before it. A series that would keep less than two horizons to learn from stays whole."""
    early, late = [], []
    for record in records:
        length = len(record.values)
        held = max(horizon, round(length * share)) if share else 0
        if not held or length - held < 2 * horizon:
            early.append(record)
            continue
        early.append(Record(record.values[: length - held], record.frequency))
        tail = record.values[-(context + held) :]
        lacking = np.full((context + held - len(tail), tail.shape[1]), np.nan, np.float32)
        late.append(Record(np.concatenate([lacking, tail]), record.frequency))
    return early, late
