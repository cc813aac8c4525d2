"""Forecast two shops' sales with gaps and known holidays: `python examples/forecast_sales.py`.

Makes its own CSV, trains a small forecaster on generated series, tunes it on the table, compares it
with the seasonal naive forecast and prints the first days of the forecast. About a minute.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from polytask.data.series_generator import generate
from polytask.infer import Forecaster
from polytask.systems.ttm_run import sales_table


def main(pretraining: int, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sales.csv"
        sales_table(horizon=24).to_csv(path, index=False)  # shop, day, y, holiday
        forecaster = Forecaster().pretrain(
            {name: generate(name, 128, 400) for name in ("D", "h", "M")}, steps=pretraining
        )
        forecaster.fit(
            path,
            timestamp="day",
            targets=["y"],
            id="shop",
            controls=["holiday"],
            steps=steps,
        )
        print(forecaster.backtest(windows=3).table.round(3).to_string(index=False))
        print(forecaster.predict(horizon=24).groupby("id").head(5).to_string(index=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretraining", type=int, default=200, help="steps")
    parser.add_argument("--steps", type=int, default=400, help="of tuning, at most")
    main(**vars(parser.parse_args()))
