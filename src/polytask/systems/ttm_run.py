"""`polytask run ttm --data sales.csv --target y --horizon 24`: forecast, backtest, page, model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveInt, field_validator

from polytask import files, rng
from polytask.errors import DataError
from polytask.systems.base import Outcome, Say, SystemConfig

STAMPS = ("timestamp", "date", "datetime", "ds", "time", "day", "week", "month", "quarter", "year")


class TTMRunConfig(SystemConfig):
    """A long table (CSV, TSV, Parquet, JSONL) and the roles of its columns.

    Rows after the last target carry the future values of the controls. Without `data` a made
    table of two shops is forecast.
    """

    target: tuple[str, ...] = ("y",)
    horizon: PositiveInt = 24
    id: str | None = None
    timestamp: str | None = None  # the first column with a usual name for one
    controls: tuple[str, ...] = ()
    frequency: str | None = None  # found out from the stamps
    mode: Literal["zero-shot", "few-shot", "full"] = "few-shot"
    steps: PositiveInt = 400  # of tuning, at most
    lr: float = Field(3e-3, gt=0, lt=1)
    validation: float = Field(0.15, ge=0, le=0.5)  # last part of each series; 0: no early stop
    windows: PositiveInt = 3  # of the backtest
    pretraining: PositiveInt = 400  # steps, once
    source: Path | None = Field(None, alias="from")  # a saved forecaster or published weights

    @field_validator("target", "controls", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        """'a,b' is two columns."""
        return tuple(v.strip() for v in value.split(",")) if isinstance(value, str) else value


def ttm_run(config: TTMRunConfig, say: Say) -> Outcome:
    """Pretrain or load, fit, backtest, forecast; leaves tables, a page, a picture and the model."""
    if config.data is None:
        config = made_up(config)
        say(f"no --data given: made {config.data}, two shops with gaps and holidays")
    assert config.data is not None  # given or made
    folder = config.out / f"forecast-{config.data.stem}"
    folder.mkdir(parents=True, exist_ok=True)
    forecaster = _start(config, say)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        say(f"fitting to {config.data.name} ({config.mode})")
        forecaster.fit(
            config.data,
            timestamp=config.timestamp or _stamp_column(config.data),
            targets=config.target,
            id=config.id,
            controls=config.controls,
            frequency=config.frequency,
            mode=config.mode,
            steps=config.steps,
            lr=config.lr,
            validation=config.validation,
        )
        forecast = forecaster.predict(horizon=config.horizon)
        say(f"testing on {config.windows} windows of {config.horizon} steps")
        scores = forecaster.backtest(windows=config.windows, horizon=config.horizon)
    panel = forecaster.panel
    assert panel is not None  # `fit` has set it
    notes = list(dict.fromkeys(str(w.message) for w in told if w.category is UserWarning))
    notes.insert(
        0,
        f"{len(panel)} series with a step of '{panel.frequency.name}'; {panel.missing} missing "
        f"rows were filled in as unknown; {config.mode}"
        + ("." if config.mode == "zero-shot" else f", at most {config.steps} steps of tuning."),
    )
    return _write(config, folder, forecaster, forecast, scores, notes)


def _start(config: TTMRunConfig, say: Say) -> Any:
    from polytask.infer.forecast_files import CONFIG
    from polytask.infer.forecaster import Forecaster
    from polytask.infer.pretrained import pretrained

    if config.source is None:
        return pretrained(say, config.pretraining)
    if (config.source / CONFIG).is_file():
        return Forecaster.load(config.source)
    return Forecaster.from_pretrained(str(config.source))


def _write(
    config: TTMRunConfig, folder: Path, forecaster: Any, forecast: Any, scores: Any, notes: Any
) -> Outcome:
    from polytask.report.forecast_page import forecast_report

    assert config.data is not None
    tables = {"forecast.csv": forecast, "backtest.csv": scores.table}
    tables["backtest_forecasts.csv"] = scores.forecasts
    for name, table in tables.items():
        with files.writing(folder / name) as aside:
            table.to_csv(aside, index=False)
    history = long_history(forecaster.panel)
    report = forecast_report(folder, config.data.stem, history, forecast, scores, notes)
    model = forecaster.save(folder / "model")
    total = {k: v for k, v in scores.table.iloc[-1].items() if k not in ("id", "target")}
    figures = {k: float(v) if np.isfinite(v) else None for k, v in total.items()}
    lines = [
        *notes,
        f"backtest: MASE {total['mase']:.3f}, seasonal naive {total['naive_mase']:.3f}; "
        f"sMAPE {total['smape']:.2f} %, seasonal naive {total['naive_smape']:.2f} %",
    ]
    written = [*(folder / name for name in tables), report, folder / "forecast.png", model]
    return Outcome(folder, figures, lines, written)


def long_history(panel: Any) -> Any:
    """id, timestamp, target, value of everything observed, gaps as NaN."""
    import pandas as pd

    parts = []
    for i, one in enumerate(panel.ids):
        values = panel.history(i)
        stamps = panel.stamps(i)[: len(values)]
        for k in range(panel.targets):
            columns = {"id": one, "timestamp": stamps, "target": panel.channels[k]}
            parts.append(pd.DataFrame({**columns, "value": values[:, k].astype(float)}))
    return pd.concat(parts, ignore_index=True)


def _stamp_column(path: Path) -> str:
    """The first column with a usual name for a time stamp."""
    from polytask.data.panel import read_columns

    columns = read_columns(path)
    for name in columns:
        if name.lower() in STAMPS:
            return name
    raise DataError(
        f"{path.name}: no column is called {', '.join(STAMPS)}; name it with --timestamp "
        f"(has: {', '.join(columns)})"
    )


def made_up(config: TTMRunConfig) -> TTMRunConfig:
    """The configuration with a made table beside the run."""
    path = config.out / "made_sales.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.writing(path) as aside:
        sales_table(config.horizon).to_csv(aside, index=False)
    return config.model_copy(
        update={
            "data": path,
            "target": ("y",),
            "id": "shop",
            "timestamp": "day",
            "controls": ("holiday",),
        }
    )


def sales_table(horizon: int, days: int = 800, seed: int = 0) -> Any:
    """Two shops by day: weekly season, holidays known ahead, missing rows and missing values."""
    import pandas as pd

    random = rng.generator(seed, "sales table")
    stamps = pd.date_range("2023-01-01", periods=days + horizon, freq="D")
    time = np.arange(days + horizon)
    holiday = (random.random(days + horizon) < 0.05).astype(int)
    parts = []
    for shop, level in (("north", 120.0), ("south", 45.0)):
        season = 1 + 0.3 * np.sin(2 * np.pi * time / 7) + 0.1 * np.sin(2 * np.pi * time / 365)
        sold = level * (season + 0.6 * holiday) + random.normal(0, 0.05 * level, len(time))
        sold[days:] = np.nan
        sold[random.choice(days, 8, replace=False)] = np.nan
        table = pd.DataFrame({"shop": shop, "day": stamps, "y": sold.round(2), "holiday": holiday})
        parts.append(
            table.drop(index=random.choice(range(1, days - 1), 10, replace=False).tolist())
        )
    return pd.concat(parts, ignore_index=True)
