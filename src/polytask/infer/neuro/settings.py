"""What a user chooses about a Neuroformer on a recording, and what follows from it.

Sizes are small by default, so that a recording of some minutes trains on a processor; the paper's
are dim 256, heads 8, six layers of each kind, dropout 0.2.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from polytask.configs import Config, parse
from polytask.data.spike_tokens import SpikeTokenizer
from polytask.data.spike_windows import SpikeWindows
from polytask.data.spikes import Recording
from polytask.errors import DataError, suggestion
from polytask.models.neuro.config import NeuroformerConfig

Kind = Literal["regression", "classification"]


class NeuroSettings(Config):
    """Windows, modalities and sizes. Seconds where nothing else is said."""

    window: PositiveFloat = 0.05
    prev_window: float = Field(0.05, ge=0)
    block: int = Field(100, ge=3)  # tokens; holds block - 2 spikes, the latest
    prev_block: int = Field(100, ge=3)
    allow_truncation: bool = False  # of more than 5 % of the spikes
    split: Literal["blocked", "random"] = "blocked"
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)  # train, val, test

    frame_window: float = Field(0.0, ge=0)  # 0: no video
    frame_end: float = 0.0  # after the window's end; 0 is causal
    kernel: tuple[PositiveInt, PositiveInt, PositiveInt] = (3, 5, 5)
    stride: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    inputs: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # group -> variables
    targets: dict[str, Kind] = Field(default_factory=dict)  # to predict; never inputs

    dim: PositiveInt = 64
    heads: PositiveInt = 2
    dropout: float = Field(0.1, ge=0, lt=1)
    encoder_layers: int = Field(1, ge=0)
    past_layers: int = Field(2, ge=0)
    video_layers: int = Field(1, ge=0)
    group_layers: dict[str, int] = Field(default_factory=dict)  # 1 where not given
    layers: int = Field(1, ge=0)

    align: tuple[str, ...] = ()
    pool: Literal["post_fusion", "pre_fusion"] = "pre_fusion"
    symmetric: bool = False
    target_weights: dict[str, float] = Field(default_factory=dict)
    official: bool = False  # the published code, slips included


def tokenizer_of(recording: Recording, settings: NeuroSettings) -> SpikeTokenizer:
    """The tokeniser of a recording's units and bins."""
    return SpikeTokenizer(
        recording.n_units,
        recording.dt,
        settings.window,
        settings.prev_window,
        settings.block,
        settings.prev_block,
        official=settings.official,
        allow_truncation=settings.allow_truncation,
    )


def windows_of(recording: Recording, settings: NeuroSettings, seed: int = 0) -> SpikeWindows:
    """All windows of a recording, split; `DataError` for a variable it does not have."""
    inputs = [name for names in settings.inputs.values() for name in names]
    for name in (*inputs, *settings.targets):
        if name not in recording.behavior:
            raise DataError(
                f"the recording has no behaviour '{name}'.{suggestion(name, recording.behavior)}"
            )
    return SpikeWindows(
        recording,
        tokenizer_of(recording, settings),
        inputs=inputs,
        targets=tuple(settings.targets),
        frame_window=settings.frame_window,
        frame_end=settings.frame_end,
        split=settings.split,
        fractions=settings.fractions,
        seed=seed,
    )


def model_config(windows: SpikeWindows, settings: NeuroSettings) -> NeuroformerConfig:
    """The model that fits the windows."""
    recording, tokens = windows.recording, windows.tokenizer
    video = None
    if settings.frame_window:
        assert recording.frames is not None  # SpikeWindows has checked it
        video = {
            "frames": windows.frame_count,
            "height": recording.frames.shape[1],
            "width": recording.frames.shape[2],
            "kernel": settings.kernel,
            "stride": settings.stride,
            "layers": settings.video_layers,
        }
    targets = {
        name: {"kind": kind, "classes": _classes(recording, name, kind)}
        for name, kind in settings.targets.items()
    }
    groups = [
        {"name": name, "variables": names, "layers": settings.group_layers.get(name, 1)}
        for name, names in settings.inputs.items()
    ]
    same = (
        "dim", "heads", "dropout", "encoder_layers", "past_layers", "layers", "align", "pool",
        "symmetric", "target_weights", "official",
    )  # fmt: skip
    chosen = {name: getattr(settings, name) for name in same}
    sizes = {
        "units": tokens.n_units,
        "times": tokens.last_offset + 1,
        "block": settings.block,
        "past_block": settings.prev_block,
    }
    parts = {"video": video, "groups": groups, "targets": targets}
    return parse(NeuroformerConfig, {**sizes, **parts, **chosen}, "model")


def _classes(recording: Recording, name: str, kind: Kind) -> int | None:
    if kind == "regression":
        if name in recording.classes:
            raise DataError(f"target '{name}' holds labels: make it a classification")
        return None
    if name not in recording.classes:
        raise DataError(f"target '{name}' holds numbers, not labels: make it a regression")
    return max(2, len(recording.classes[name]))
