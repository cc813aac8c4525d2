"""Neuroformers of the proof, trained once per (variant, seed, learning rate) and kept in the cache.

All are judged on the last fifth of their recording. Variants that take something away:

    shuffled-past    the past of every window is that of another one while training
    shuffled-labels  units are renamed anew in every window while training
    no-past          no blocks that look at the past
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import polytask
from polytask.data.circuits import Circuit
from polytask.data.embedded.sources import cache_root
from polytask.infer.neuro.neuroformer import Neuroformer
from polytask.infer.neuro.settings import NeuroSettings
from polytask.infer.neuro.training import WindowStore
from polytask.models.neuro.batch import NeuroBatch
from polytask.rng import generator
from polytask.systems.testbeds import circuits

Change = Callable[[NeuroBatch, Neuroformer], NeuroBatch]


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    seconds: float = 600.0
    steps: int = 600
    sheet_steps: int = 250  # on the sheet's own circuits
    film_steps: int = 400  # where video and behaviour come in
    finetune: int = 150
    batch: int = 64
    dim: int = 48
    block: int = 32
    ablation_windows: int = 2000
    trials: int = 4
    horizon: int = 20
    fraction: float = 0.01  # of the train windows that have labels

    def steps_of(self, variant: str) -> int:
        """Steps of pretraining."""
        kind = VARIANTS[variant][0]
        return {"speed": self.steps, "seeing": self.film_steps}.get(kind, self.sheet_steps)


SMOKE = Plan(10.0, 2, 2, 2, 2, 8, 16, 32, 30, 1, 2, 0.1)

BASE: Mapping[str, Any] = {
    "prev_block": 48,
    "prev_window": 0.1,
    "dropout": 0.0,
    "targets": {"speed": "regression"},
}
SHEET = {**BASE, "prev_window": 0.05, "targets": {}}  # delay of 30 ms: the sheet's own windows
PAST: Mapping[str, Any] = {**BASE, "targets": {}}
VIDEO: Mapping[str, Any] = {**PAST, "frame_window": 0.2, "kernel": (2, 8, 8), "video_layers": 1}
BODY: Mapping[str, Any] = {**VIDEO, "inputs": {"behaviour": ("speed",)}}

# variant -> population, settings, losses
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any], tuple[str, ...]]] = {
    "spikes": ("speed", BASE, ("id", "time")),
    "shuffled-past": ("speed", BASE, ("id", "time")),
    "shuffled-labels": ("speed", BASE, ("id", "time")),
    "no-past": ("speed", {**BASE, "past_layers": 0}, ("id", "time")),
    "joint": ("speed", BASE, ("id", "time", "speed")),
    "speed": ("speed", BASE, ("speed",)),
    "easy": ("easy", SHEET, ("id", "time")),
    "weak": ("weak", SHEET, ("id", "time")),
    "past": ("seeing", PAST, ("id", "time")),
    "+stimulus": ("seeing", VIDEO, ("id", "time")),
    "+behaviour": ("seeing", BODY, ("id", "time")),
    "+alignment": (
        "seeing",
        {**BODY, "align": ("spikes", "video", "speed")},
        ("id", "time", "align"),
    ),
}


def population(variant: str, plan: Plan, seed: int) -> Circuit:
    """The simulated recording of a variant, with its true edges."""
    kind = VARIANTS[variant][0]
    if kind == "speed":
        return circuits.speed_population(seed, plan.seconds)
    if kind == "seeing":
        return circuits.seeing_population(seed, plan.seconds)
    return circuits.hub_circuit(seed, plan.seconds, kind)


def fresh(variant: str, plan: Plan, seed: int) -> Neuroformer:
    """Before any training."""
    _, fields, _ = VARIANTS[variant]
    settings = NeuroSettings(**{**fields, "dim": plan.dim, "block": plan.block})
    recording = population(variant, plan, seed).recording
    return Neuroformer(recording, settings, seed=seed, device="cpu")


def trained(variant: str, plan: Plan, seed: int, lr: float) -> Neuroformer:
    """After `plan.steps` steps; the file in the cache is whole or absent."""
    folder = cache_root() / "testbeds" / "neuro" / _key(variant, plan, seed, lr)
    if (folder / "manifest.json").is_file():
        recording = population(variant, plan, seed).recording
        return Neuroformer.load(folder, recording, device="cpu")
    neuro = fresh(variant, plan, seed)
    plain = neuro.store
    change = {"shuffled-past": strangers, "shuffled-labels": renamed}.get(variant)
    if change is not None:
        neuro.store = ChangedStore(neuro, change)
    neuro.pretrain(
        plan.steps_of(variant),
        losses=VARIANTS[variant][2],
        batch_size=plan.batch,
        lr=lr,
        validate=False,
    )
    neuro.store = plain
    neuro.save(folder)
    return neuro


class ChangedStore(WindowStore):
    """Windows as they are after a change of the whole table."""

    def __init__(self, neuro: Neuroformer, change: Change) -> None:
        super().__init__(neuro.windows, neuro.units, neuro.store.trim)
        self.neuro, self.change = neuro, change

    def _scaled(self, batch: NeuroBatch) -> NeuroBatch:
        return self.change(super()._scaled(batch), self.neuro)


def strangers(batch: NeuroBatch, neuro: Neuroformer) -> NeuroBatch:
    """Every window with the past of another one."""
    order = torch.from_numpy(generator(neuro.seed, "strange pasts").permutation(len(batch)))
    return replace(batch, past_ids=batch.past_ids[order], past_times=batch.past_times[order])


def renamed(batch: NeuroBatch, neuro: Neuroformer) -> NeuroBatch:
    """Units renamed by a permutation of each window's own, now and in the past alike."""
    n = neuro.recording.n_units
    draw = generator(neuro.seed, "names of units")
    names = np.tile(np.arange(n + 3), (len(batch), 1))
    names[:, :n] = draw.permuted(names[:, :n], axis=1)
    table = torch.from_numpy(names)
    return replace(batch, ids=table.gather(1, batch.ids), past_ids=table.gather(1, batch.past_ids))


def _key(variant: str, plan: Plan, seed: int, lr: float) -> str:
    """Changes with the setting and with the code that decides the result."""
    size = (plan.seconds, plan.steps_of(variant), plan.batch, plan.dim, plan.block)
    text = f"{variant}/{VARIANTS[variant]}/{size}/{seed}/{lr}/{torch.__version__}"
    digest = hashlib.blake2b(text.encode())
    root = Path(polytask.__file__).parent
    parts = ("data/spike*.py", "data/circuits*.py", "models/neuro/*.py", "infer/neuro/*.py",
             "objectives/neuro.py", "train/*.py", "systems/testbeds/*circuits.py",
             "systems/testbeds/neuro_models.py")  # fmt: skip
    for path in sorted(p for pattern in parts for p in root.glob(pattern)):
        digest.update(path.read_bytes())
    return f"{variant.strip('+')}-{seed}-{digest.hexdigest()[:12]}"
