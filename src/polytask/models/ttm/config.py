"""Sizes and switches of a Tiny Time Mixer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from polytask.configs import Config

Mode = Literal["common_channel", "mix_channel"]


class TTMConfig(Config):
    """Sizes and switches. Field names follow `granite-tsfm`, so its config.json is understood."""

    context_length: int = Field(512, ge=2)
    prediction_length: int = Field(96, ge=1)
    patch_length: int = Field(64, ge=1)
    patch_stride: int = Field(64, ge=1)
    num_input_channels: int = Field(1, ge=1)
    d_model: int = Field(192, ge=1)
    expansion_factor: int = Field(2, ge=1)
    num_layers: int = Field(2, ge=1)
    adaptive_patching_levels: int = Field(3, ge=0)
    dropout: float = Field(0.2, ge=0, lt=1)
    head_dropout: float = Field(0.2, ge=0, lt=1)
    gated_attn: bool = True
    norm_eps: float = 1e-5
    resolution_prefix_tuning: bool = False
    frequency_token_vocab_size: int = Field(5, ge=1)
    use_decoder: bool = True
    decoder_num_layers: int = Field(2, ge=1)
    decoder_d_model: int = Field(128, ge=1)
    decoder_adaptive_patching_levels: int = Field(0, ge=0)
    decoder_raw_residual: bool = False
    decoder_mode: Mode = "common_channel"
    prediction_channel_indices: tuple[int, ...] | None = None
    exogenous_channel_indices: tuple[int, ...] | None = None
    enable_forecast_channel_mixing: bool = False
    fcm_context_length: int = Field(1, ge=0)
    fcm_gated_attn: bool = True
    fcm_prepend_past: bool = True
    exogenous_scale: Literal["instance", "raw"] = "instance"  # raw: scaled by the caller
    instance_norm: bool = True  # an ablation switches it off
    quantiles: tuple[float, ...] = ()
    parity: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> TTMConfig:
        if self.context_length < self.patch_length:
            raise ValueError(
                f"context_length {self.context_length} is shorter than patch_length "
                f"{self.patch_length}"
            )
        for name, width, levels in (
            ("d_model", self.d_model, self.adaptive_patching_levels),
            ("decoder_d_model", self.decoder_d_model, self.decoder_adaptive_patching_levels),
        ):
            factors = [2**i for i in range(levels) if width // 2**i > 4]
            if any(width % k for k in factors):
                raise ValueError(f"{name} = {width} must be divisible by {max(factors)}")
        for name in ("prediction_channel_indices", "exogenous_channel_indices"):
            for index in getattr(self, name) or ():
                if not 0 <= index < self.num_input_channels:
                    raise ValueError(f"{name}: there is no channel {index}")
        if set(self.prediction_channel_indices or ()) & set(self.exogenous_channel_indices or ()):
            raise ValueError("a channel cannot be both predicted and exogenous")
        if any(not 0 < q < 1 for q in self.quantiles):
            raise ValueError("quantiles lie strictly between 0 and 1")
        return self

    @property
    def patches(self) -> int:
        """Number of whole patches at the end of the context, the resolution prefix included."""
        whole = (self.context_length - self.patch_length) // self.patch_stride + 1
        return whole + int(self.resolution_prefix_tuning)

    @property
    def targets(self) -> int:
        """Number of predicted channels."""
        if self.prediction_channel_indices is None:
            return self.num_input_channels
        return len(self.prediction_channel_indices)
