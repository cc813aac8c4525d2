"""A forecaster's tables and files: the forecast frame, save and load, published checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polytask import files
from polytask.configs import parse
from polytask.data.calendar import Frequency
from polytask.data.panel import Panel
from polytask.errors import CheckpointError, ConfigError, UserError
from polytask.infer.series_predict import Roll
from polytask.models.ttm import TinyTimeMixer, TTMConfig

if TYPE_CHECKING:
    from polytask.infer.forecaster import Forecaster

CONFIG, WEIGHTS, BASE = "forecaster.json", "model.safetensors", "base.safetensors"
# Switches of the published code for which there is no counterpart here: only these values load.
_ONLY: dict[str, tuple[Any, ...]] = {
    "self_attn": (False, 0),
    "use_positional_encoding": (False,),
    "norm_mlp": ("LayerNorm",),
    "mode": ("common_channel",),
    "scaling": ("std", True),
    "fcm_use_mixer": (False,),
}


def to_frame(panel: Panel, rolled: Roll, quantiles: tuple[float, ...], steps: int) -> Any:
    """id, timestamp, target, forecast, and 'q0.1' ... as a pandas table."""
    import pandas as pd

    parts = []
    for i in range(len(panel)):
        last = panel.stamps(i)[rolled.cuts[i] - 1]
        for k in range(panel.targets):
            columns: dict[str, Any] = {
                "id": panel.ids[i],
                "timestamp": panel.frequency.after(last, steps),
                "target": panel.channels[k],
                "forecast": rolled.forecast[i, :, k],
            }
            for j, level in enumerate(quantiles):
                columns[f"q{level:g}"] = rolled.quantiles[i, :, k, j]
            parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def save(forecaster: Forecaster, folder: Path) -> Path:
    """Everything but the data."""
    from safetensors.torch import save_file

    panel = forecaster.panel
    record = {
        "base": forecaster.base.config.model_dump(mode="json"),
        "model": forecaster.model.config.model_dump(mode="json"),
        "columns": None if forecaster.columns is None else asdict(forecaster.columns),
        "frequency": None if panel is None else panel.frequency.name,
        "control_units": forecaster.control_units.tolist(),
        "seed": forecaster.seed,
    }
    with files.building(folder) as aside:
        files.write_json(aside / CONFIG, record)
        for name, model in ((WEIGHTS, forecaster.model), (BASE, forecaster.base)):
            tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
            save_file(tensors, str(aside / name))
    return folder


def load(kind: type[Forecaster], folder: Path, device: str) -> Forecaster:
    """`CheckpointError` for a folder that is incomplete or altered."""
    from safetensors.torch import load_file

    from polytask.infer.forecaster import Columns

    files.verify_manifest(folder)
    record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    base = parse(TTMConfig, record["base"], str(folder / CONFIG))
    found = kind(base, record["seed"], device)
    found.base.load_state_dict(load_file(str(folder / BASE)))
    found.model = TinyTimeMixer(parse(TTMConfig, record["model"], str(folder / CONFIG))).eval()
    found.model.load_state_dict(load_file(str(folder / WEIGHTS)))
    if record["columns"] is not None:
        names = record["columns"]
        names |= {key: tuple(names[key]) for key in ("targets", "controls")}
        if record["frequency"] is not None:
            names["frequency"] = Frequency.named(record["frequency"]).name
        found.columns = Columns(**names)
    units = record["control_units"]
    found.control_units = np.asarray(units, np.float32).reshape(2, -1)
    return found


def granite_config(name: str | Path) -> TTMConfig:
    """The configuration of a published checkpoint; a switch that we lack is an error."""
    path = _granite_folder(name) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no config.json")
    raw = json.loads(path.read_text(encoding="utf-8"))
    for key, allowed in _ONLY.items():
        if key in raw and raw[key] not in (*allowed, None):
            raise ConfigError(f"{path}: '{key}' = {raw[key]!r} is not supported")
    known = {k: v for k, v in raw.items() if k in TTMConfig.model_fields and v is not None}
    if raw.get("decoder_mode") == "mix_channel" or raw.get("enable_forecast_channel_mixing"):
        return parse(TTMConfig, known, str(path))
    known |= {"num_input_channels": 1}  # channel-independent: its weights fit any number
    known.pop("prediction_channel_indices", None)
    known.pop("exogenous_channel_indices", None)
    return parse(TTMConfig, known, str(path))


def granite_weights(model: TinyTimeMixer, name: str | Path) -> None:
    """Load by name; missing or unexpected tensors are an error that names the first."""
    from safetensors.torch import load_file

    path = _granite_folder(name) / "model.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no model.safetensors")
    found, wanted = load_file(str(path)), model.state_dict()
    for label, odd in (
        ("lacks", sorted(wanted.keys() - found.keys())),
        ("has an unexpected", sorted(found.keys() - wanted.keys())),
    ):
        if odd:
            raise CheckpointError(f"{path} {label} tensor '{odd[0]}' ({len(odd)} in all)")
    for key, tensor in wanted.items():
        if found[key].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: '{key}' has shape {tuple(found[key].shape)}, not {tuple(tensor.shape)}"
            )
    model.load_state_dict(found)


def _granite_folder(name: str | Path) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if isinstance(name, Path) or str(name).count("/") != 1:
        raise UserError(f"'{name}' is neither a folder nor a name on the hub (OWNER/NAME)")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["config.json", "model.safetensors"]))
