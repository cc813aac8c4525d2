"""In other libraries' shapes stand the forecaster's own numbers, for the steps asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from polytask.errors import DataError, UserError
from polytask.infer import DatasetForecaster, Forecaster, SeriesForecaster
from polytask.models.ttm import TTMConfig

TINY = TTMConfig(
    context_length=24, prediction_length=6, patch_length=6, patch_stride=6, d_model=12,
    decoder_d_model=8, adaptive_patching_levels=1, resolution_prefix_tuning=True,
    frequency_token_vocab_size=14, dropout=0.0, head_dropout=0.0, quantiles=(0.1, 0.5, 0.9),
)  # fmt: skip


@pytest.fixture
def forecaster() -> Forecaster:
    return Forecaster(TINY, device="cpu")


def series(steps: int = 60, seed: int = 0, freq: str = "D") -> pd.Series:
    random = np.random.default_rng(seed)
    index = pd.date_range("2024-01-01", periods=steps, freq=freq)
    values = np.sin(2 * np.pi * np.arange(steps) / 7) + random.normal(0, 0.1, steps)
    return pd.Series(values, index, name="sales")


def own(forecaster: Forecaster, y: pd.Series, horizon: int) -> pd.DataFrame:
    table = y.rename("target").rename_axis("day").reset_index()
    fitted = forecaster.fit(table, timestamp="day", targets=["target"], mode="zero-shot")
    return fitted.predict(horizon=horizon)


def test_steps_ahead_are_those_asked_for(forecaster: Forecaster) -> None:
    y = series()
    expected = own(forecaster, y, 4)
    found = SeriesForecaster(forecaster).fit(y, fh=[1, 4]).predict()
    np.testing.assert_array_equal(found, expected["forecast"].iloc[[0, 3]])
    assert list(found.index) == list(expected["timestamp"].iloc[[0, 3]]) and found.name == "sales"
    assert SeriesForecaster(forecaster).fit(y).predict(range(1, 5)).tolist() == pytest.approx(
        expected["forecast"].tolist()
    )


def test_tables_keep_their_columns_and_periods_stay_periods(forecaster: Forecaster) -> None:
    y = pd.DataFrame({"b": series(), "a": series(seed=1)}).to_period("D")
    found = SeriesForecaster(forecaster).fit(y).predict(fh=2)
    assert list(found.columns) == ["b", "a"] and list(found.index) == [y.index[-1] + 2]
    levels = SeriesForecaster(forecaster).fit(y).predict_quantiles(fh=[1, 2], alpha=[0.1, 0.9])
    assert list(levels.columns) == [("b", 0.1), ("b", 0.9), ("a", 0.1), ("a", 0.9)]
    assert (levels["b", 0.1] < levels["b", 0.9]).all()


def test_missing_values_at_the_end_do_not_move_the_first_step(forecaster: Forecaster) -> None:
    y = series()
    cut = y.copy()
    cut.iloc[-2:] = np.nan
    found = SeriesForecaster(forecaster).fit(cut).predict(fh=[1, 2])
    assert list(found.index) == [y.index[-1] + pd.Timedelta(days=d) for d in (1, 2)]
    np.testing.assert_array_equal(found, own(forecaster, y.iloc[:-2], 4)["forecast"].iloc[2:])


def test_controls_of_the_steps_ahead_come_with_predict(forecaster: Forecaster) -> None:
    y = series()
    X = pd.DataFrame({"promo": np.arange(60) % 5 == 0}, y.index).astype(float)
    ahead = pd.DataFrame({"promo": [1.0, 0.0]}, y.index[-2:] + pd.Timedelta(days=2))
    fitted = SeriesForecaster(forecaster, steps=2).fit(y, X)
    assert np.isfinite(fitted.predict(fh=[1, 2], X=ahead)).all()
    with pytest.raises(DataError, match="control 'promo' has no value for 2024-03-03;"):
        fitted.predict(fh=[1, 2, 3], X=ahead)


@pytest.mark.parametrize("fh", [0, [1, -1], [1.5], [], None])
def test_a_bad_horizon_is_refused(forecaster: Forecaster, fh: Any) -> None:
    with pytest.raises(UserError, match="fh"):
        SeriesForecaster(forecaster).fit(series()).predict(fh)


def test_bad_series_are_refused(forecaster: Forecaster) -> None:
    with pytest.raises(DataError, match="y: the index should be a DatetimeIndex"):
        SeriesForecaster(forecaster).fit(series().reset_index(drop=True))
    with pytest.raises(DataError, match="y: expected a pandas Series or table, not list"):
        SeriesForecaster(forecaster).fit([1.0, 2.0])
    with pytest.raises(UserError, match="call fit"):
        SeriesForecaster(forecaster).predict(fh=1)
    with pytest.raises(UserError, match=r"no quantile '0.3' \(has: q0.1, q0.5, q0.9\)"):
        SeriesForecaster(forecaster).fit(series()).predict_quantiles(fh=1, alpha=0.3)


def entries(count: int, controls: bool = False) -> list[dict[str, Any]]:
    made = []
    for number in range(count):
        target = series(40 + number, number).to_numpy(copy=True)
        start = pd.Period("2024-01-01", "D") + number
        made.append({"start": start, "target": target, "item_id": f"item {number}"})
        if controls:
            made[-1]["feat_dynamic_real"] = np.arange(len(target) + 3)[None] % 5 == 0
    return made


def test_a_dataset_gives_a_forecast_per_entry_in_its_order(forecaster: Forecaster) -> None:
    dataset = entries(12)
    found = list(DatasetForecaster(forecaster, 3).predict(iter(dataset)))
    assert [f.item_id for f in found] == [e["item_id"] for e in dataset]
    for one, entry in zip(found, dataset, strict=True):
        y = pd.Series(
            entry["target"], pd.period_range(entry["start"], periods=len(entry["target"]))
        )
        expected = own(forecaster, y.to_timestamp(), 3)
        np.testing.assert_allclose(one.mean, expected["forecast"], rtol=1e-4, atol=1e-6)
        assert one.start_date == entry["start"] + len(entry["target"])
        assert list(one.index) == [one.start_date + step for step in range(3)]
        np.testing.assert_allclose(one.quantile("0.9"), expected["q0.9"], rtol=1e-4, atol=1e-6)
        between = (expected["q0.1"] + expected["q0.5"]) / 2
        np.testing.assert_allclose(one.quantile(0.3), between, rtol=1e-4, atol=1e-6)


def test_missing_values_at_an_entrys_end_do_not_move_its_forecast(forecaster: Forecaster) -> None:
    whole, cut = entries(2), entries(2)
    cut[1]["target"][-2:] = np.nan
    a, b = (list(DatasetForecaster(forecaster, 3).predict(d)) for d in (whole, cut))
    assert [f.start_date for f in a] == [f.start_date for f in b]
    np.testing.assert_allclose(a[0].mean, b[0].mean, rtol=1e-4, atol=1e-6)
    shorter = {**whole[1], "target": whole[1]["target"][:-2]}
    (longer,) = DatasetForecaster(forecaster, 5).predict([shorter])
    np.testing.assert_allclose(b[1].mean, longer.mean[2:], rtol=1e-4, atol=1e-6)


def test_known_features_are_used_after_training(forecaster: Forecaster) -> None:
    dataset = entries(3, controls=True)
    plain = DatasetForecaster(forecaster, 3, steps=2)
    with pytest.raises(UserError, match="feat_dynamic_real needs training"):
        list(plain.predict(dataset))
    tuned = plain.train(dataset)
    assert plain._fitted is None and all(len(f.mean) == 3 for f in tuned.predict(dataset))


def test_bad_datasets_are_refused(forecaster: Forecaster) -> None:
    predictor = DatasetForecaster(forecaster, 3)
    assert list(predictor.predict([])) == []
    with pytest.raises(DataError, match="no entries"):
        predictor.train([])
    mixed = [*entries(1), {"start": pd.Period("2024-01", "M"), "target": np.arange(40.0)}]
    with pytest.raises(DataError, match="frequencies D, M"):
        list(predictor.predict(mixed))
    with pytest.raises(DataError, match=r"entry 0 \(item 0\): target has shape \(2, 20\)"):
        list(predictor.predict([{**entries(1)[0], "target": np.zeros((2, 20))}]))
    with pytest.raises(UserError, match="outside of the model's levels"):
        next(iter(predictor.predict(entries(1)))).quantile(0.99)
    with pytest.raises(UserError, match="prediction_length = 0"):
        DatasetForecaster(forecaster, 0)
