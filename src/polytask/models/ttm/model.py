"""Tiny Time Mixers: an MLP-Mixer forecaster under a million parameters (arXiv 2401.03955).

What is notable
- Every channel of every series is an independent univariate window in the backbone; channels meet
  only in the decoder (`decoder_mode="mix_channel"`) and in the exogenous mixer.
- Adaptive patching: level i reshapes (patches, features) to (patches * 2^i, features / 2^i), so
  early levels see many short patches and the last level full ones.
- Gated mixing: every mixer multiplies its output by softmax(Linear(.)) over the mixed axis.
- Instance normalisation over the observed steps of each window and channel; forecasts return in
  the units of the input.

The module tree has the parameter names of the published `granite-tsfm` checkpoints, so their
weights load by name. Where their code and sound practice differ, `parity=True` follows the code:

- a missing step enters scaled as if it were the placeholder (ours: zero after scaling);
- exogenous values and the prepended past reach the exogenous mixer in raw units (ours: in the
  units of the instance norm, as the forecasts they are mixed with).

Shape suffixes: B batch, T time, C channels, N patches, P patch length, D features, H horizon,
L context steps of the exogenous mixer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polytask.models.ttm.config import TTMConfig
from polytask.models.ttm.mixers import Gate, InstanceNorm, MixerBlock, NoGate


class Encoder(nn.Module):
    """Patches to features, the resolution prefix in front, then the mixers."""

    def __init__(self, config: TTMConfig) -> None:
        super().__init__()
        P, D = config.patch_length, config.d_model
        self.patcher = nn.Linear(P, D)
        self.freq_mod = (
            nn.Sequential(
                nn.Embedding(config.frequency_token_vocab_size, P),
                nn.Linear(P, (P + D) // 2),
                nn.GELU(),
                nn.Linear((P + D) // 2, D),
            )
            if config.resolution_prefix_tuning
            else None
        )
        self.mlp_mixer_encoder = MixerBlock(
            config,
            D,
            config.adaptive_patching_levels,
            config.num_layers,
            "common_channel",
            config.dropout,
        )

    def forward(self, patches_BCNP: Tensor, frequency_B: Tensor | None) -> Tensor:
        x = self.patcher(patches_BCNP)
        if self.freq_mod is not None:
            if frequency_B is None:
                raise ValueError("this model has a resolution prefix: give `frequency` (batch,)")
            prefix_BD = self.freq_mod(frequency_B.long())
            prefix = prefix_BD[:, None, None, :].expand(x.shape[0], x.shape[1], 1, x.shape[3])
            x = torch.cat([prefix, x], dim=2)
        out: Tensor = self.mlp_mixer_encoder(x)
        return out


class Backbone(nn.Module):
    """Instance norm, patches, encoder."""

    def __init__(self, config: TTMConfig) -> None:
        super().__init__()
        self.config = config
        self.scaler = InstanceNorm()
        self.encoder = Encoder(config)

    def forward(
        self, x_BTC: Tensor, observed_BTC: Tensor, frequency_B: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns hidden (B, C, N, D), patches (B, C, N, P), loc and scale (B, 1, C)."""
        loc, scale = self.scaler(x_BTC, observed_BTC)
        if not self.config.instance_norm:
            loc, scale = torch.zeros_like(loc), torch.ones_like(scale)
        scaled = (x_BTC - loc) / scale
        if not self.config.parity:
            scaled = scaled.masked_fill(~observed_BTC.bool(), 0.0)
        patches = scaled.transpose(1, 2).unfold(-1, self.config.patch_length, 1)
        starts = self._starts().to(x_BTC.device)
        patches_BCNP = patches[:, :, starts]
        return self.encoder(patches_BCNP, frequency_B), patches_BCNP, loc, scale

    def _starts(self) -> Tensor:
        """First step of each patch; the last patch ends at the last step of the context."""
        c = self.config
        last = c.context_length - c.patch_length
        return torch.arange(last % c.patch_stride, last + 1, c.patch_stride)


class Decoder(nn.Module):
    """A light mixer stack on adapted features; the part that fine-tuning trains."""

    def __init__(self, config: TTMConfig) -> None:
        super().__init__()
        D = config.decoder_d_model
        self.prefix = config.resolution_prefix_tuning
        self.adapter = nn.Linear(config.d_model, D) if config.d_model != D else nn.Identity()
        self.decoder_raw_embedding = (
            nn.Linear(config.patch_length, D) if config.decoder_raw_residual else None
        )
        self.decoder_block = MixerBlock(
            config,
            D,
            config.decoder_adaptive_patching_levels,
            config.decoder_num_layers,
            config.decoder_mode,
            config.head_dropout,
        )

    def forward(self, hidden_BCND: Tensor, patches_BCNP: Tensor) -> Tensor:
        x = self.adapter(hidden_BCND)
        if self.decoder_raw_embedding is not None:
            if self.prefix:  # the prefix has no raw patch of its own
                patches_BCNP = F.pad(patches_BCNP, (0, 0, 1, 0))
            x = x + self.decoder_raw_embedding(patches_BCNP)
        out: Tensor = self.decoder_block(x)
        return out


class ExogenousMixer(nn.Module):
    """Corrects each forecast step from a window of 2L+1 steps of all channels around it.

    Channels are the targets' base forecasts, then the exogenous values known in advance. The L
    steps before the horizon come from the past (`fcm_prepend_past`), the L after it are zero.
    """

    def __init__(self, config: TTMConfig) -> None:
        super().__init__()
        self.steps = config.fcm_context_length
        self.prepend = config.fcm_prepend_past
        channels = config.targets + len(config.exogenous_channel_indices or ())
        width = channels * (2 * self.steps + 1)
        self.mlp = nn.Linear(width, config.targets)
        self.fcm_gating_block = Gate(width) if config.fcm_gated_attn else NoGate()

    def forward(self, base_BHC: Tensor, exogenous_BHE: Tensor, past_BLC: Tensor) -> Tensor:
        """`past_BLC` holds the last L steps of targets then exogenous channels."""
        joined = torch.cat([base_BHC, exogenous_BHE], dim=-1)
        after = joined.new_zeros(joined.shape[0], self.steps, joined.shape[2])
        before = past_BLC if self.prepend else after
        windows = torch.cat([before, joined, after], dim=1).unfold(1, 2 * self.steps + 1, 1)
        flat = windows.flatten(2)  # (B, H, channels * (2L+1)), channel-major
        out: Tensor = self.mlp(self.fcm_gating_block(flat))
        return base_BHC + out


class Head(nn.Module):
    """All features of a channel to its horizon; then the exogenous mixer if there is one."""

    def __init__(self, config: TTMConfig) -> None:
        super().__init__()
        width = config.decoder_d_model if config.use_decoder else config.d_model
        outputs = config.prediction_length
        self.dropout_layer = nn.Dropout(config.head_dropout)
        self.base_forecast_block = nn.Linear(config.patches * width, outputs)
        self.quantile_block = (
            nn.Linear(config.patches * width, outputs * len(config.quantiles))
            if config.quantiles
            else None
        )
        self.fcm_block = ExogenousMixer(config) if config.enable_forecast_channel_mixing else None


class TinyTimeMixer(nn.Module):
    """Forecasts (B, horizon, targets) from a context (B, time, channels).

    Args:
        config: see `TTMConfig`.

    Forward takes
        past: (B, T, C) float; NaN counts as missing. T longer than the context uses its last steps;
            shorter is padded in front with missing steps.
        observed: (B, T, C) bool, or None for "where past is finite".
        frequency: (B,) int resolution token; needed with `resolution_prefix_tuning`.
        future: (B, horizon, C); only exogenous channels are read.
    and returns a dict with `forecast` (B, H, targets), and `quantiles` (B, H, targets, Q) where
    configured, both in the units of `past`.
    """

    def __init__(self, config: TTMConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.decoder = Decoder(config) if config.use_decoder else None
        self.head = Head(config)

    def forward(
        self,
        past: Tensor,
        observed: Tensor | None = None,
        frequency: Tensor | None = None,
        future: Tensor | None = None,
    ) -> dict[str, Tensor]:
        past_BTC, observed_BTC = self._context(past, observed)
        hidden, patches, loc, scale = self.backbone(past_BTC, observed_BTC, frequency)
        if self.decoder is not None:
            hidden = self.decoder(hidden, patches)
        flat_BCF = self.head.dropout_layer(hidden.flatten(2))
        targets = self._target_channels()
        base_BHC = self.head.base_forecast_block(flat_BCF).transpose(1, 2)[..., targets]
        if self.head.fcm_block is not None:
            base_BHC = self._mix_exogenous(base_BHC, past_BTC, observed_BTC, future, loc, scale)
        loc_t, scale_t = loc[..., targets], scale[..., targets]
        out = {"forecast": base_BHC * scale_t + loc_t, "loc": loc_t, "scale": scale_t}
        if self.head.quantile_block is not None:
            spread = self.head.quantile_block(flat_BCF[:, targets])
            scaled_BHCQ = self._quantiles(base_BHC, spread)
            out["quantiles"] = scaled_BHCQ * scale_t.unsqueeze(-1) + loc_t.unsqueeze(-1)
        return out

    def _target_channels(self) -> list[int]:
        c = self.config
        return sorted(c.prediction_channel_indices or range(c.num_input_channels))

    def _context(self, past: Tensor, observed: Tensor | None) -> tuple[Tensor, Tensor]:
        """The last `context_length` steps with missing ones zero, and where they are observed."""
        c = self.config
        if past.dim() != 3 or past.shape[2] != c.num_input_channels:
            raise ValueError(
                f"past has shape {tuple(past.shape)}, expected (batch, time, "
                f"{c.num_input_channels} channels)"
            )
        if observed is None:
            observed = torch.ones_like(past, dtype=torch.bool) if c.parity else past.isfinite()
        elif observed.shape != past.shape:
            raise ValueError(
                f"observed has shape {tuple(observed.shape)}, past {tuple(past.shape)}"
            )
        missing = max(0, c.context_length - past.shape[1])
        past = F.pad(past.nan_to_num(0.0), (0, 0, missing, 0))
        counts = c.parity and bool(observed.all())  # the published code counts zero padding as seen
        observed = F.pad(observed.bool(), (0, 0, missing, 0), value=counts)
        return past[:, -c.context_length :], observed[:, -c.context_length :]

    def _mix_exogenous(
        self,
        base_BHC: Tensor,
        past_BTC: Tensor,
        observed_BTC: Tensor,
        future: Tensor | None,
        loc: Tensor,
        scale: Tensor,
    ) -> Tensor:
        block = self.head.fcm_block
        assert block is not None
        c, exogenous = self.config, list(self.config.exogenous_channel_indices or ())
        if exogenous and future is None:
            raise ValueError("this model has exogenous channels: give their `future` values")
        if not c.parity:
            shift, unit = self._exogenous_units(loc, scale)
            past_BTC = ((past_BTC - shift) / unit).masked_fill(~observed_BTC, 0.0)
        order = self._target_channels() + exogenous
        past_BLC = past_BTC[:, past_BTC.shape[1] - block.steps :, order]
        known = base_BHC.new_zeros(base_BHC.shape[0], base_BHC.shape[1], 0)
        if exogenous and future is not None:
            known = future[:, : base_BHC.shape[1], exogenous]
            if not bool(known.isfinite().all()):
                raise ValueError("`future` has missing values in an exogenous channel")
            if not c.parity:
                known = (known - shift[..., exogenous]) / unit[..., exogenous]
        out: Tensor = block(base_BHC, known, past_BLC)
        return out

    def _exogenous_units(self, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """loc and scale in which the exogenous mixer works. A control that is constant within the
        context (no holiday in it) has scale sqrt(eps): its first change would arrive 316 times too
        large, which is why 'raw' leaves the controls in the units they came in."""
        if self.config.exogenous_scale == "instance":
            return loc, scale
        columns = list(self.config.exogenous_channel_indices or ())
        shift, unit = loc.clone(), scale.clone()
        shift[..., columns], unit[..., columns] = 0.0, 1.0
        return shift, unit

    def _quantiles(self, base_BHC: Tensor, spread_BCF: Tensor) -> Tensor:
        """Non-crossing by construction: steps of softplus away from the level nearest 0.5."""
        levels = torch.tensor(self.config.quantiles)
        B, H, C = base_BHC.shape
        raw_BHCQ = spread_BCF.view(B, C, H, len(levels)).transpose(1, 2)
        anchor = int((levels - 0.5).abs().argmin())
        centre = base_BHC.unsqueeze(-1) + raw_BHCQ[..., anchor : anchor + 1]
        up = F.softplus(raw_BHCQ[..., anchor + 1 :]).cumsum(-1)
        down = F.softplus(raw_BHCQ[..., :anchor].flip(-1)).cumsum(-1).flip(-1)
        return torch.cat([centre - down, centre, centre + up], dim=-1)
