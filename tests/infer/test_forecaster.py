"""The forecaster on users' tables: stamps, gaps, controls, leaks, long horizons, files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from polytask.data.calendar import Frequency
from polytask.data.series_generator import generate
from polytask.data.windows import Record, WindowSet
from polytask.errors import CheckpointError, DataError, UserError
from polytask.infer import Forecaster
from polytask.infer.forecaster import split_in_time
from polytask.infer.series_training import ForecastLoss, SeriesBatch
from polytask.models.ttm import TinyTimeMixer, TTMConfig
from polytask.systems.ttm_run import sales_table

TINY = TTMConfig(
    context_length=24,
    prediction_length=6,
    patch_length=6,
    patch_stride=6,
    d_model=12,
    decoder_d_model=8,
    adaptive_patching_levels=1,
    resolution_prefix_tuning=True,
    frequency_token_vocab_size=14,
    dropout=0.0,
    head_dropout=0.0,
    exogenous_scale="raw",
    quantiles=(0.1, 0.5, 0.9),
)
ROLES: dict[str, Any] = {
    "timestamp": "day",
    "targets": ["y"],
    "id": "shop",
    "controls": ["holiday"],
}


@pytest.fixture
def table() -> pd.DataFrame:
    return sales_table(horizon=12, days=90)


@pytest.fixture
def plain(table: pd.DataFrame) -> Forecaster:
    """Nothing trained, no controls."""
    roles = {**ROLES, "controls": []}
    return Forecaster(TINY, device="cpu").fit(table, **roles, mode="zero-shot")


def last_day(table: pd.DataFrame) -> pd.Timestamp:
    return table[table["y"].notna()]["day"].max()


def test_the_forecast_has_ids_real_stamps_targets_and_ordered_quantiles(plain: Forecaster) -> None:
    found = plain.predict(horizon=6)
    assert list(found.columns) == ["id", "timestamp", "target", "forecast", "q0.1", "q0.5", "q0.9"]
    assert list(found["id"].unique()) == ["north", "south"] and len(found) == 12
    north = found[found["id"] == "north"]["timestamp"]
    assert (north.diff().dropna() == pd.Timedelta(days=1)).all()
    assert (found["q0.1"] <= found["q0.5"]).all() and (found["q0.5"] <= found["q0.9"]).all()


def test_training_on_a_table_with_gaps_two_ids_and_a_holiday(table: pd.DataFrame) -> None:
    forecaster = Forecaster(TINY, device="cpu").fit(table, **ROLES, steps=3)
    assert forecaster.panel is not None and forecaster.panel.missing > 0
    found = forecaster.predict(horizon=12)
    assert np.isfinite(found["forecast"]).all() and len(found) == 24
    scores = forecaster.backtest(windows=2, horizon=6)
    assert list(scores.table["id"]) == ["north", "south", "all"]
    assert np.isfinite(scores.table[["mse", "mase", "naive_mse", "naive_mase"]]).all(axis=None)


def test_few_shot_leaves_the_backbone_and_full_trains_everything(table: pd.DataFrame) -> None:
    for mode, frozen in (("few-shot", True), ("full", False)):
        forecaster = Forecaster(TINY, device="cpu").fit(table, **ROLES, steps=2, mode=mode)
        before, after = forecaster.base.state_dict(), forecaster.model.state_dict()
        same = [torch.equal(v, after[k]) for k, v in before.items() if k.startswith("backbone")]
        assert all(same) is frozen
        assert not torch.equal(
            before["head.base_forecast_block.weight"], after["head.base_forecast_block.weight"]
        )


def test_the_last_part_of_each_series_is_held_out_with_its_context_in_front() -> None:
    steps = Frequency.named("D")
    whole = np.arange(100, dtype=np.float32)[:, None]
    records = [Record(whole, steps), Record(whole[:30], steps), Record(whole[:11], steps)]
    early, late = split_in_time(records, 0.2, context=24, horizon=6)
    assert [len(r.values) for r in early] == [80, 24, 11]  # the last is too short to share
    assert [len(r.values) for r in late] == [44, 30]
    np.testing.assert_array_equal(late[0].values, whole[56:])
    np.testing.assert_array_equal(late[1].values, whole[:30])
    windows = WindowSet({"late": late}, 24, 6, 24)
    found = windows.gather(np.zeros(sum(windows.sizes), np.int64), np.arange(sum(windows.sizes)))
    assert found.future[:15].min() == 80 and found.future[15:].min() == 24  # nothing learnt from
    early, late = split_in_time(records, 0.0, context=24, horizon=6)
    assert [len(r.values) for r in early] == [100, 30, 11] and late == []


def test_tuning_stops_when_what_is_held_out_gets_no_better(table: pd.DataFrame) -> None:
    """A learning rate that spoils the model leaves the weights that came in."""
    forecaster = Forecaster(TINY, device="cpu")
    plain = Forecaster(TINY, device="cpu").fit(table, **ROLES, steps=1, validation=0.3)
    assert plain.panel is not None
    start = plain._adapted(plain.panel).state_dict()
    forecaster.fit(table, **ROLES, steps=40, lr=0.9, validation=0.3)
    for name, value in forecaster.model.state_dict().items():
        assert torch.equal(value, start[name]), name
    unchecked = Forecaster(TINY, device="cpu").fit(table, **ROLES, steps=40, lr=0.9, validation=0.0)
    head = "head.base_forecast_block.weight"
    assert not torch.equal(unchecked.model.state_dict()[head], start[head])


def test_a_table_too_short_to_hold_out_is_said_and_bad_settings_are_refused(
    table: pd.DataFrame,
) -> None:
    short = table[table["day"] < table["day"].min() + pd.Timedelta(days=14)]
    with pytest.warns(UserWarning, match="no series is long enough to hold out its last 15%"):
        Forecaster(TINY, device="cpu").fit(short, **{**ROLES, "controls": []}, steps=2)
    for name, value in (("lr", 0.0), ("lr", float("nan")), ("validation", 0.7), ("steps", 0)):
        with pytest.raises(UserError, match=f"{name} = {value}: should be"):
            Forecaster(TINY).fit(table, **ROLES, **{name: value})


def test_a_step_whose_control_is_unknown_is_neither_learnt_from_nor_scored(
    table: pd.DataFrame,
) -> None:
    """Whatever its target is: the loss and the gradients are the same."""
    config = TINY.model_copy(
        update={
            "num_input_channels": 2,
            "prediction_channel_indices": (0,),
            "exogenous_channel_indices": (1,),
            "enable_forecast_channel_mixing": True,
        }
    )
    torch.manual_seed(0)
    model, found = TinyTimeMixer(config).eval(), []
    past, future = torch.randn(4, 24, 2), torch.randn(4, 6, 2)
    future[:, 2, 1] = torch.nan
    whole = torch.zeros(4, dtype=torch.long)
    for target in (0.0, 1e3):
        future[:, 2, 0] = target
        terms = ForecastLoss()(model, SeriesBatch(past, future.clone(), whole, whole, whole))
        model.zero_grad()
        torch.stack([v.sum() for v in terms.value.values()]).sum().backward()
        fcm = model.head.fcm_block
        assert fcm is not None and fcm.mlp.weight.grad is not None
        found.append((terms.value["forecast"].detach(), fcm.mlp.weight.grad.clone()))
    assert found[0][0].isfinite().all()
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    hidden = table.copy()
    day = last_day(table) - pd.Timedelta(days=3)
    hidden.loc[hidden["day"] == day, "holiday"] = np.nan
    scores = (
        Forecaster(TINY, device="cpu").fit(hidden, **ROLES, steps=1).backtest(windows=1, horizon=6)
    )
    assert scores.forecasts[scores.forecasts["timestamp"] == day]["truth"].isna().all()
    assert scores.forecasts["truth"].notna().sum() >= 8


def test_controls_before_training_leave_the_pretrained_forecast(table: pd.DataFrame) -> None:
    plain = Forecaster(TINY, device="cpu").fit(table, **{**ROLES, "controls": []}, mode="zero-shot")
    controlled = Forecaster(TINY, device="cpu").fit(table, **ROLES, steps=1)
    assert controlled.panel is not None
    controlled.model = controlled._adapted(controlled.panel)
    ours, theirs = (f.predict(horizon=6)["forecast"] for f in (controlled, plain))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_future_targets_do_not_reach_a_backtest_forecast(table: pd.DataFrame) -> None:
    roles = {**ROLES, "controls": []}
    changed = table.copy()
    late = (changed["day"] > last_day(table) - pd.Timedelta(days=6)) & changed["y"].notna()
    changed.loc[late, "y"] += 1000.0
    for mode in ("zero-shot", "few-shot"):
        both = [
            Forecaster(TINY, device="cpu")
            .fit(t, **roles, mode=mode, steps=2)
            .backtest(windows=1, horizon=6)
            .forecasts
            for t in (table, changed)
        ]
        assert not np.allclose(both[0]["truth"].fillna(0), both[1]["truth"].fillna(0))
        np.testing.assert_array_equal(both[0]["forecast"], both[1]["forecast"])


def test_a_longer_horizon_goes_on_from_its_own_forecast(plain: Forecaster) -> None:
    long, short = plain.predict(horizon=15), plain.predict(horizon=6)
    for one in ("north", "south"):
        a, b = (t[t["id"] == one]["forecast"].to_numpy() for t in (long, short))
        assert len(a) == 15
        np.testing.assert_array_equal(a[:6], b)


def test_a_shorter_horizon_is_the_start_of_the_models_own(plain: Forecaster) -> None:
    short, whole = plain.predict(horizon=2), plain.predict(horizon=6)
    assert short["forecast"].iloc[0] == whole["forecast"].iloc[0] and len(short) == 4


def test_a_context_that_is_too_short_is_said(table: pd.DataFrame) -> None:
    first = table["day"] < table["day"].min() + pd.Timedelta(days=15)
    forecaster = Forecaster(TINY, device="cpu")
    forecaster.fit(table[first], **{**ROLES, "controls": []}, mode="zero-shot")
    with pytest.warns(UserWarning, match=r"series 'north' has 1\d steps, the model's context 24"):
        found = forecaster.predict(horizon=3)
    assert np.isfinite(found["forecast"]).all()


def test_a_constant_series_is_said_and_forecast_flat(table: pd.DataFrame) -> None:
    flat = table[table["y"].notna()].assign(y=7.0)
    forecaster = Forecaster(TINY, device="cpu")
    forecaster.fit(flat, **{**ROLES, "controls": []}, mode="zero-shot")
    with pytest.warns(UserWarning, match="constant target 'y'"):
        found = forecaster.predict(horizon=3)
    assert (found["forecast"] - 7.0).abs().max() < 0.1


def test_a_missing_future_control_names_series_control_and_day(table: pd.DataFrame) -> None:
    forecaster = Forecaster(TINY, device="cpu").fit(table, **ROLES, steps=1)
    with pytest.raises(DataError, match=r"series 'north': control 'holiday' has no value for 2023"):
        forecaster.predict(horizon=40)


def test_controls_without_training_are_refused(table: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="controls need training"):
        Forecaster(TINY).fit(table, **ROLES, mode="zero-shot")


def test_duplicate_and_irregular_stamps_and_another_frequency_are_named(
    table: pd.DataFrame, plain: Forecaster
) -> None:
    roles = {**ROLES, "controls": []}
    twice = pd.concat([table, table.iloc[[3]]])
    with pytest.raises(DataError, match=r"'north' has two rows for 2023-01-0"):
        Forecaster(TINY).fit(twice, **roles, mode="zero-shot")
    odd = table.copy()
    odd.loc[odd.index[5], "day"] += pd.Timedelta(hours=5)
    with pytest.raises(DataError, match=r"irregular timestamp 2023-01-0. 05:00"):
        Forecaster(TINY).fit(odd, **roles, mode="zero-shot")
    weekly = table[table["y"].notna()].copy()
    weekly["day"] = weekly["day"].min() + (weekly["day"] - weekly["day"].min()) * 7
    with pytest.raises(DataError, match="frequency 'W', the forecaster was fitted on 'D'"):
        plain.predict(weekly)


def test_what_is_saved_forecasts_the_same_and_damage_is_found(
    table: pd.DataFrame, tmp_path: Path
) -> None:
    forecaster = Forecaster(TINY, device="cpu").fit(table, **ROLES, steps=2)
    folder = forecaster.save(tmp_path / "model")
    again = Forecaster.load(folder, device="cpu")
    pd.testing.assert_frame_equal(
        again.predict(table, horizon=6), forecaster.predict(horizon=6), rtol=1e-5
    )
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    with pytest.raises(CheckpointError, match="damaged"):
        Forecaster.load(folder)


def test_published_checkpoints_load_by_name(tmp_path: Path) -> None:
    published = pytest.importorskip("tsfm_public.models.tinytimemixer", reason="needs granite-tsfm")
    config = published.TinyTimeMixerConfig(
        context_length=24, prediction_length=6, patch_length=6, patch_stride=6, d_model=12,
        decoder_d_model=8, adaptive_patching_levels=1, num_input_channels=1,
    )  # fmt: skip
    theirs = published.TinyTimeMixerForPrediction(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = Forecaster.from_pretrained(tmp_path, device="cpu")
    past = torch.randn(3, 24, 1)
    with torch.no_grad():
        expected = theirs(past, return_loss=False).prediction_outputs
        assert (ours.base(past)["forecast"] - expected).abs().max() < 1e-5
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        Forecaster.from_pretrained(tmp_path)


def test_arrow_tables_and_several_targets(table: pd.DataFrame) -> None:
    import pyarrow as pa

    table["z"] = table["y"] * 2 + 1
    roles = {"timestamp": "day", "targets": ["y", "z"], "id": "shop"}
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    forecaster = Forecaster(TINY, device="cpu").fit(arrow, **roles, mode="zero-shot")
    found = forecaster.predict(horizon=6).pivot_table(
        index=["id", "timestamp"], columns="target", values="forecast"
    )
    np.testing.assert_allclose(found["z"], found["y"] * 2 + 1, rtol=1e-3)


def test_pretraining_is_a_function_of_the_seed_and_learns() -> None:
    records = {"made": generate("D", 32, 120), "other": generate("M", 32, 120)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, again = (Forecaster(TINY, seed=3, device="cpu") for _ in range(2))
        for forecaster in (first, again):
            forecaster.pretrain(records, steps=4, batch_size=16)
    for key, value in first.base.state_dict().items():
        assert torch.equal(value, again.base.state_dict()[key])
    assert isinstance(first.model, TinyTimeMixer) and first.model is first.base
