"""What a Neuroformer is made of: sizes, modalities in their order, targets, and `official`.

`official=True` reproduces the published code (commit 36ed940), slips included. Each slip is a field
of its own, so a setting that is given goes before what `official` implies:

    time_code='learned'   shipped configurations lack `wave_emb`: times go through two layers
    mask_pad=False        padding of the past window is attended to
    video_positions=False the 3-D positions are computed, then dropped
    scalar_norm=True      a layer norm over one feature: the value of a behaviour is erased
    last_group_layers=True  every group of variables gets the last group's number of layers
    one_sample=True       one sample of each variable and window (more crash there: here the last)
    masked_mean=False     heads and alignment average over padding as well
    always_quarter=True   n = 4 in the loss even without alignment
    rollout_from=1        rollout starts at the second layer, on rectangular 'identities'

Slips outside the model have switches where they belong: the tokeniser (offset of SOS where a window
overflows), the windows (frames end one window late), generation (`official` of `generate`) and the
metrics.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from polytask.configs import Config

OFFICIAL: dict[str, Any] = {
    "time_code": "learned",
    "mask_pad": False,
    "video_positions": False,
    "scalar_norm": True,
    "last_group_layers": True,
    "one_sample": True,
    "masked_mean": False,
    "always_quarter": True,
    "rollout_from": 1,
}


class VideoConfig(Config):
    """Frames of a window as patches of space and time."""

    frames: PositiveInt
    height: PositiveInt
    width: PositiveInt
    kernel: tuple[PositiveInt, PositiveInt, PositiveInt] = (3, 5, 5)
    stride: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None  # None: as the kernel
    layers: int = Field(6, ge=0)  # blocks in which current spikes look at the video
    encoder_layers: int | None = Field(None, ge=0)  # video on itself; None: as many as `layers`

    @model_validator(mode="after")
    def _fits(self) -> VideoConfig:
        for size, kernel, what in zip(
            (self.frames, self.height, self.width),
            self.kernel,
            ("frames", "height", "width"),
            strict=True,
        ):
            if kernel > size:
                raise ValueError(f"kernel {self.kernel} is longer than {what} = {size}")
        return self

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches in time, height and width."""
        stride = self.stride or self.kernel
        sizes = (self.frames, self.height, self.width)
        t, h, w = ((n - k) // s + 1 for n, k, s in zip(sizes, self.kernel, stride, strict=True))
        return t, h, w


class GroupConfig(Config):
    """Variables that the current spikes look at together, after past and video."""

    name: str
    variables: tuple[str, ...] = Field(min_length=1)
    layers: int = Field(4, ge=0)


class TargetConfig(Config):
    """A variable to predict from a window, from the mean over its tokens."""

    kind: Literal["regression", "classification"] = "regression"
    classes: int | None = Field(None, ge=2)

    @model_validator(mode="after")
    def _fits(self) -> TargetConfig:
        if (self.kind == "classification") != (self.classes is not None):
            raise ValueError("'classes' belongs to classification, and only there")
        return self


class NeuroformerConfig(Config):
    """Typed settings of `NeuroformerModel`; defaults of sizes are the paper's."""

    units: PositiveInt  # neurons; ids units, units + 1, units + 2 are SOS, EOS, PAD
    times: PositiveInt  # offsets 0 .. times - 1; times, times + 1, times + 2 are SOS, EOS, PAD
    block: int = Field(100, ge=2)  # tokens of the current window that enter the model
    past_block: int = Field(100, ge=1)  # tokens of the past window
    dim: PositiveInt = 256
    heads: PositiveInt = 8
    dropout: float = Field(0.2, ge=0, lt=1)

    encoder_layers: int | None = Field(None, ge=0)  # causal, before the rest; None: as `layers`
    past_layers: int = Field(6, ge=0)
    layers: int = Field(6, ge=0)  # causal, after all modalities
    video: VideoConfig | None = None
    groups: tuple[GroupConfig, ...] = ()
    targets: dict[str, TargetConfig] = Field(default_factory=dict)

    align: tuple[str, ...] = ()  # 'spikes', 'video' and variables, in the order of their pairs
    pool: Literal["post_fusion", "pre_fusion"] = "post_fusion"  # which state of the spikes aligns
    symmetric: bool = False  # InfoNCE both ways
    temperature: float = Field(0.5, gt=0)

    spike_weight: float = Field(1.0, ge=0)  # the factor a of id and time
    id_share: float = Field(0.6, ge=0, le=1)  # the rest is the share of time
    align_share: float = Field(0.25, ge=0, lt=1)  # 1/n where anything is aligned
    target_weights: dict[str, float] = Field(default_factory=dict)

    official: bool = False
    time_code: Literal["sinusoid", "learned"] = "sinusoid"
    mask_pad: bool = True
    video_positions: bool = True
    scalar_norm: bool = False
    last_group_layers: bool = False
    one_sample: bool = False
    masked_mean: bool = True
    always_quarter: bool = False
    rollout_from: int = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, data: Any) -> Any:
        """`official` sets what is not given."""
        if isinstance(data, dict) and data.get("official"):
            return {**OFFICIAL, **data}
        return data

    @model_validator(mode="after")
    def _fits(self) -> NeuroformerConfig:
        if self.dim % self.heads or self.dim % 2:
            raise ValueError(f"dim {self.dim} has to be even and a multiple of heads {self.heads}")
        names = [group.name for group in self.groups]
        for name in names:
            if names.count(name) > 1 or name in ("past", "video", "state", "encoder"):
                raise ValueError(f"two modalities are called '{name}'")
        inputs = self.variables
        for name in inputs:
            if inputs.count(name) > 1:
                raise ValueError(f"variable '{name}' is an input twice")
            if name in self.targets:
                raise ValueError(
                    f"variable '{name}' is an input and a target: the answer would be given away"
                )
        known = {"spikes", *inputs} | ({"video"} if self.video is not None else set())
        for name in self.align:
            if name not in known:
                found = ", ".join(sorted(known))
                raise ValueError(f"align: '{name}' is no modality of this model (has: {found})")
        if self.align and len(set(self.align)) < 2:
            raise ValueError("align needs two different modalities, as in ('spikes', 'video')")
        for name in self.target_weights:
            if name not in self.targets:
                raise ValueError(f"target_weights names '{name}', which is no target")
        return self

    @property
    def variables(self) -> tuple[str, ...]:
        """Behaviour that goes in, in order."""
        return tuple(name for group in self.groups for name in group.variables)

    @property
    def sos(self) -> int:
        """Id of the start token; end and padding follow."""
        return self.units

    @property
    def eos(self) -> int:
        return self.units + 1

    @property
    def pad(self) -> int:
        return self.units + 2

    @property
    def time_eos(self) -> int:
        return self.times + 1

    @property
    def time_pad(self) -> int:
        return self.times + 2

    def group_layers(self, group: GroupConfig) -> int:
        """Blocks of a group."""
        return self.groups[-1].layers if self.last_group_layers else group.layers
