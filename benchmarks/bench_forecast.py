"""Forecasts per second beside granite-tsfm and per-series ETS; pretraining windows per second.

    python -m benchmarks forecast

Both mixers have the same weights and give the same numbers (checked to 1e-5 before timing). ETS
(statsmodels, additive trend and season) is fitted anew for every series, as it has to be, and so
are AutoETS and AutoTheta of statsforecast, in a process of their own: that package may be installed
in a folder apart (`pip install --target FOLDER statsforecast`, `--statsforecast FOLDER`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.harness import Aim, compare, show_versions, table

from polytask.data.series_generator import generate
from polytask.data.windows import WindowSet, standardise
from polytask.infer.series_training import train_mixer
from polytask.models.ttm import TinyTimeMixer, TTMConfig

SIZES: dict[str, dict[str, Any]] = {
    "TTM-B (512 -> 96)": {
        "context_length": 512,
        "prediction_length": 96,
        "patch_length": 64,
        "patch_stride": 64,
        "d_model": 192,
        "decoder_d_model": 128,
        "adaptive_patching_levels": 3,
    },
    "small (96 -> 24)": {
        "context_length": 96,
        "prediction_length": 24,
        "patch_length": 12,
        "patch_stride": 12,
        "d_model": 48,
        "decoder_d_model": 24,
        "adaptive_patching_levels": 2,
    },
}


def beside_published(clock: Callable[[], float], repeats: int, batch: int) -> list[dict[str, Any]]:
    """Forecasts per second of both, the ratio, and parameters."""
    from tsfm_public.models.tinytimemixer import TinyTimeMixerConfig, TinyTimeMixerForPrediction

    rows = []
    for name, size in SIZES.items():
        settings = {**size, "num_layers": 2, "decoder_num_layers": 2, "num_input_channels": 1}
        theirs = TinyTimeMixerForPrediction(TinyTimeMixerConfig(**settings)).eval()
        ours = TinyTimeMixer(TTMConfig(**settings, parity=True)).eval()
        ours.load_state_dict(theirs.state_dict())
        past = torch.randn(batch, size["context_length"], 1)

        def run_theirs(model: Any = theirs, past: Any = past) -> Any:
            with torch.no_grad():
                return model(past, return_loss=False).prediction_outputs

        def run_ours(model: Any = ours, past: Any = past) -> Any:
            with torch.no_grad():
                return model(past)["forecast"]

        difference = float((run_theirs() - run_ours()).abs().max())
        if difference > 1e-5:
            raise RuntimeError(f"{name}: outputs differ by {difference}")
        times = compare({"ours": run_ours, "theirs": run_theirs}, repeats, clock=clock)
        medians = times.medians
        rows.append(
            {
                "model": name,
                "parameters": sum(p.numel() for p in ours.parameters()),
                "polytask_per_s": batch / medians["ours"],
                "granite_per_s": batch / medians["theirs"],
                "speedup": medians["theirs"] / medians["ours"],
            }
        )
    return rows


def beside_ets(clock: Callable[[], float], repeats: int, series: int) -> dict[str, Any]:
    """Seconds per forecast of the small model in one batch, and of ETS series by series."""
    from statsmodels.tsa.holtwinters import ExponentialSmoothing

    settings = {**SIZES["small (96 -> 24)"], "num_input_channels": 1}
    model = TinyTimeMixer(TTMConfig(**settings)).eval()
    values = np.stack([r.values for r in generate("M", series, 96)])

    def mixer() -> None:
        with torch.no_grad():
            model(torch.from_numpy(values))

    def ets() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for row in values[..., 0]:
                fitted = ExponentialSmoothing(
                    row, trend="add", seasonal="add", seasonal_periods=12
                ).fit()
                fitted.forecast(24)

    medians = compare({"mixer": mixer, "ets": ets}, repeats, clock=clock).medians
    return {
        "series": series,
        "mixer_per_s": series / medians["mixer"],
        "ets_per_s": series / medians["ets"],
        "speedup": medians["ets"] / medians["mixer"],
    }


_THEIRS = """
import json, sys, time
import numpy as np
from statsforecast.models import AutoETS, AutoTheta
values, season, horizon, clock = np.load(sys.argv[1]), 12, 24, getattr(time, sys.argv[2])
found = {}
for kind in (AutoETS, AutoTheta):
    kind(season_length=season).forecast(y=values[0], h=horizon)  # compiles, not counted
    start = clock()
    for row in values:
        kind(season_length=season).forecast(y=row, h=horizon)
    found[kind.__name__] = clock() - start
print(json.dumps(found))
"""


def beside_statsforecast(
    clock: Callable[[], float], repeats: int, series: int, folder: Path | None
) -> list[dict[str, Any]]:
    """As `beside_ets`, for automatic models; nothing where statsforecast is not installed."""
    paths = [str(folder)] if folder is not None else []
    place = {"PYTHONPATH": os.pathsep.join(paths)} if paths else {}
    environment = {**os.environ, **place, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    values = np.stack([r.values for r in generate("M", series, 96)])
    with tempfile.TemporaryDirectory() as scratch:
        np.save(file := Path(scratch) / "series.npy", values[..., 0])
        command = [sys.executable, "-c", _THEIRS, str(file), clock.__name__]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        print(f"left out: statsforecast does not run ({ran.stderr.strip().splitlines()[-1]})")
        return []
    model = TinyTimeMixer(TTMConfig(**SIZES["small (96 -> 24)"], num_input_channels=1)).eval()

    def mixer() -> None:
        with torch.no_grad():
            model(torch.from_numpy(values))

    ours = compare({"mixer": mixer}, repeats, clock=clock).medians["mixer"]
    return [
        {
            "peer": name,
            "series": series,
            "mixer_per_s": series / ours,
            "peer_per_s": series / seconds,
            "speedup": seconds / ours,
        }
        for name, seconds in json.loads(ran.stdout).items()
    ]


def pretraining(clock: Callable[[], float], steps: int) -> dict[str, Any]:
    """Windows per second of the whole loop: draw, gather, forward, backward, update."""
    records = {f: [s for r in generate(f, 128, 400) if (s := standardise(r))] for f in ("h", "D")}
    windows = WindowSet(records, 96, 24)
    settings = {**SIZES["small (96 -> 24)"], "dropout": 0.1, "head_dropout": 0.1}
    model = TinyTimeMixer(TTMConfig(**settings))
    train_mixer(model, windows, steps=2, batch_size=256, device="cpu")
    start = clock()
    train_mixer(model, windows, steps=steps, batch_size=256, device="cpu")
    return {"steps": steps, "windows_per_s": steps * 256 / (clock() - start)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--series", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu-time", action="store_true", help="where others share the machine")
    parser.add_argument("--statsforecast", type=Path, help="folder in which it is installed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    packages = ("torch", "granite-tsfm", "statsmodels")
    found: dict[str, Any] = {"versions": show_versions(packages)}
    found["published"] = beside_published(clock, options.repeats, options.batch)
    found["ets"] = [beside_ets(clock, max(1, options.repeats // 3), options.series)]
    folder = options.statsforecast or os.environ.get("STATSFORECAST")
    automatic = beside_statsforecast(
        clock, options.repeats, options.series, Path(folder) if folder else None
    )
    if automatic:
        found["statsforecast"] = automatic
    found["pretraining"] = [pretraining(clock, options.steps)]
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for key in ("published", "ets", "statsforecast", "pretraining"):
            if key not in found:
                continue
            print("\n" + table(list(found[key][0]), [list(row.values()) for row in found[key]]))
    return found


def aims(found: dict[str, Any]) -> list[Aim]:
    return [
        Aim(f"{row['model']}: forecasts over granite-tsfm", row["speedup"], at_least=1.2)
        for row in found["published"]
    ]


if __name__ == "__main__":
    main()
