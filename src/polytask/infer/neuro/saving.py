"""A Neuroformer's files: `neuroformer.json` and `model.safetensors`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from polytask import files
from polytask.configs import parse
from polytask.data.spikes import Recording
from polytask.errors import CheckpointError
from polytask.infer.neuro.settings import NeuroSettings

if TYPE_CHECKING:
    from polytask.infer.neuro.neuroformer import Neuroformer

SETTINGS, WEIGHTS = "neuroformer.json", "model.safetensors"


def save(neuro: Neuroformer, folder: Path) -> Path:
    """Everything but the data."""
    from safetensors.torch import save_file

    record = {
        "settings": neuro.settings.model_dump(mode="json"),
        "units": {name: list(pair) for name, pair in neuro.units.items()},
        "neurons": list(neuro.recording.names),
        "dt": neuro.recording.dt,
        "seed": neuro.seed,
        "history": neuro.history,
    }
    state = neuro.model.state_dict()
    with files.building(folder) as aside:
        files.write_json(aside / SETTINGS, record)
        save_file({k: v.cpu().contiguous() for k, v in state.items()}, str(aside / WEIGHTS))
    return folder


def load(kind: type[Neuroformer], folder: Path, recording: Recording, device: str) -> Neuroformer:
    """`CheckpointError` for a folder that is incomplete, altered, or of other units or bins."""
    from safetensors.torch import load_file

    from polytask.infer.neuro.training import WindowStore

    files.verify_manifest(folder)
    record = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    if len(record["neurons"]) != recording.n_units or record["dt"] != recording.dt:
        raise CheckpointError(
            f"{folder} was trained on {len(record['neurons'])} units in bins of {record['dt']} s, "
            f"the recording has {recording.n_units} in bins of {recording.dt} s"
        )
    settings = parse(NeuroSettings, record["settings"], str(folder / SETTINGS))
    found = kind(recording, settings, seed=record["seed"], device=device)
    state, wanted = load_file(str(folder / WEIGHTS)), found.model.state_dict()
    for name, tensor in wanted.items():
        if name not in state or state[name].shape != tensor.shape:
            raise CheckpointError(f"{folder}: '{name}' of {WEIGHTS} does not fit the recording")
    found.model.load_state_dict(state)
    found.units = {name: (pair[0], pair[1]) for name, pair in record["units"].items()}
    found.store = WindowStore(found.windows, found.units, found.model.config.mask_pad)
    found.history = record["history"]
    return found
