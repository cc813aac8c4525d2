"""What a Tiny Time Mixer does with reshapes, masks, constants, controls, quantiles, precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from polytask.models.ttm import TinyTimeMixer, TTMConfig
from polytask.models.ttm.mixers import AdaptiveLevel, InstanceNorm, MixerLayer

SMALL: dict[str, Any] = {
    "context_length": 32,
    "prediction_length": 6,
    "patch_length": 8,
    "patch_stride": 8,
    "d_model": 16,
    "decoder_d_model": 8,
    "adaptive_patching_levels": 2,
}
EXOGENOUS: dict[str, Any] = {
    "num_input_channels": 3,
    "prediction_channel_indices": (0, 1),
    "exogenous_channel_indices": (2,),
    "enable_forecast_channel_mixing": True,
}


def mixer(**settings: Any) -> TinyTimeMixer:
    torch.manual_seed(0)
    return TinyTimeMixer(TTMConfig(**{**SMALL, **settings})).eval()


def window(channels: int = 1, batch: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(batch, 32, channels, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def forecast(model: TinyTimeMixer, past: Tensor, **more: Any) -> Tensor:
    return model(past, **more)["forecast"]


# Reshapes -----------------------------------------------------------------------------------------


def test_a_level_cuts_every_patch_into_contiguous_parts() -> None:
    config = TTMConfig(**SMALL)
    level = AdaptiveLevel(config, 16, 1, 1, "common_channel", 0.0).eval()
    x = torch.randn(2, 3, 4, 16)
    by_hand = torch.empty(2, 3, 8, 8)
    for patch in range(4):
        for part in range(2):
            by_hand[:, :, 2 * patch + part] = x[:, :, patch, 8 * part : 8 * part + 8]
    with torch.no_grad():
        expected = level.mixer_layers[0](by_hand).view(2, 3, 4, 16)
        assert torch.equal(level(x), expected)
        assert not torch.allclose(level(x), level(x.transpose(2, 3).reshape(x.shape)))


def test_a_mixer_layer_is_its_formula() -> None:
    config = TTMConfig(**SMALL, num_input_channels=3)
    layer = MixerLayer(config, 16, 4, "mix_channel", 0.0).eval()
    x = torch.randn(2, 3, 4, 16)
    with torch.no_grad():
        expected = x
        for name, axis in (("channel_feature_mixer", 1), ("patch_mixer", 2), ("feature_mixer", 3)):
            part = getattr(layer, name)
            u = part.norm(expected).transpose(axis, 3)
            gate = part.gating_block.attn_layer
            if axis == 1:  # over channels the gate comes first
                u = u * gate(u).softmax(-1)
            u = part.mlp.fc2(F.gelu(part.mlp.fc1(u)))
            if axis != 1:
                u = u * gate(u).softmax(-1)
            expected = expected + u.transpose(axis, 3)
        assert (layer(x) - expected).abs().max() < 1e-6


def test_a_width_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(ValidationError, match=r"d_model = 27 must be divisible by 2"):
        TTMConfig(**{**SMALL, "d_model": 27})


def test_a_level_too_narrow_to_split_keeps_its_layers_at_the_full_width() -> None:
    level = AdaptiveLevel(TTMConfig(**SMALL), 8, 1, 2, "common_channel", 0.0)
    assert level.factor == 1 and len(level.mixer_layers) == 2


def test_one_patch_has_no_patch_mixer() -> None:
    assert MixerLayer(TTMConfig(**SMALL), 16, 1, "common_channel", 0.0).patch_mixer is None


# Instance norm and masks --------------------------------------------------------------------------


def test_loc_and_scale_are_the_mean_and_population_deviation_of_observed_steps() -> None:
    x, seen = window(2), torch.rand(4, 32, 2) > 0.3
    loc, scale = InstanceNorm()(x, seen)
    for row in range(4):
        for channel in range(2):
            values = x[row, seen[row, :, channel], channel]
            assert loc[row, 0, channel] == pytest.approx(float(values.mean()), abs=1e-5)
            expected = float((values.var(unbiased=False) + 1e-5).sqrt())
            assert scale[row, 0, channel] == pytest.approx(expected, abs=1e-5)


def test_a_forecast_follows_the_units_of_its_series() -> None:
    model, past = mixer(), window()
    assert torch.allclose(
        forecast(model, past * 50 + 7), forecast(model, past) * 50 + 7, atol=1e-2, rtol=1e-3
    )


def test_a_constant_channel_is_forecast_near_its_value() -> None:
    found = forecast(mixer(), torch.full((2, 32, 1), 12.0))
    assert (found - 12.0).abs().max() < 0.05


def test_a_channel_with_nothing_observed_gives_a_finite_forecast_near_zero() -> None:
    past = window(2)
    past[:, :, 1] = float("nan")
    found = forecast(mixer(num_input_channels=2), past)
    assert found.isfinite().all() and found[..., 1].abs().max() < 0.05


@pytest.mark.parametrize("placeholder", [0.0, 1e6, float("nan")])
def test_what_stands_at_a_missing_step_does_not_change_the_forecast(placeholder: float) -> None:
    model, past, seen = mixer(), window(), torch.rand(4, 32, 1) > 0.3
    expected = forecast(model, past, observed=seen)
    filled = torch.where(seen, past, torch.tensor(placeholder))
    assert torch.equal(forecast(model, filled, observed=seen), expected)


def test_a_short_context_is_one_with_missing_steps_in_front_and_a_long_one_is_cut() -> None:
    model, past = mixer(), window()
    padded = torch.cat([torch.full((4, 12, 1), float("nan")), past[:, 12:]], dim=1)
    assert torch.equal(forecast(model, past[:, 12:]), forecast(model, padded))
    longer = torch.cat([torch.randn(4, 9, 1) * 100, past], dim=1)
    assert torch.equal(forecast(model, longer), forecast(model, past))


def test_channels_are_independent_unless_the_decoder_mixes_them() -> None:
    past = window(2)
    other = past.clone()
    other[..., 1] += torch.randn(4, 32)
    apart, mixed = (
        mixer(num_input_channels=2, decoder_mode=mode) for mode in ("common_channel", "mix_channel")
    )
    assert torch.equal(forecast(apart, past)[..., 0], forecast(apart, other)[..., 0])
    assert not torch.equal(forecast(mixed, past)[..., 0], forecast(mixed, other)[..., 0])


def test_the_frequency_token_matters_and_has_to_be_given() -> None:
    model = mixer(resolution_prefix_tuning=True)
    tokens = torch.zeros(4, dtype=torch.long)
    assert not torch.equal(
        forecast(model, window(), frequency=tokens), forecast(model, window(), frequency=tokens + 1)
    )
    with pytest.raises(ValueError, match="resolution prefix"):
        model(window())


# Known-future controls ----------------------------------------------------------------------------


def test_future_targets_change_nothing_and_future_controls_do() -> None:
    model, past, future = mixer(**EXOGENOUS), window(3), torch.randn(4, 6, 3)
    expected = forecast(model, past, future=future)
    disturbed = future.clone()
    disturbed[..., :2] = torch.randn(4, 6, 2) * 1e3
    assert torch.equal(forecast(model, past, future=disturbed), expected)
    disturbed[..., :2] = float("nan")
    assert torch.equal(forecast(model, past, future=disturbed), expected)
    disturbed[..., 2] += 1
    assert not torch.equal(forecast(model, past, future=disturbed), expected)


def test_a_control_reaches_only_the_steps_within_the_mixers_window() -> None:
    model, past, future = mixer(**EXOGENOUS, fcm_context_length=1), window(3), torch.zeros(4, 6, 3)
    moved = future.clone()
    moved[:, 3, 2] = 5.0
    change = (forecast(model, past, future=moved) - forecast(model, past, future=future)).abs()
    assert change[:, 2:5].amin() > 0 and change[:, [0, 1, 5]].max() == 0


def test_a_window_of_one_step_without_a_gate_works() -> None:
    settings = {**EXOGENOUS, "fcm_context_length": 0, "fcm_gated_attn": False}
    assert forecast(mixer(**settings), window(3), future=torch.zeros(4, 6, 3)).shape == (4, 6, 2)


def test_missing_future_controls_are_an_error() -> None:
    future = torch.zeros(4, 6, 3)
    future[0, 0, 2] = float("nan")
    with pytest.raises(ValueError, match="missing values in an exogenous channel"):
        mixer(**EXOGENOUS)(window(3), future=future)
    with pytest.raises(ValueError, match="give their `future` values"):
        mixer(**EXOGENOUS)(window(3))


def test_a_channel_is_predicted_or_exogenous_not_both() -> None:
    with pytest.raises(ValidationError, match="both predicted and exogenous"):
        TTMConfig(**{**SMALL, **EXOGENOUS, "exogenous_channel_indices": (1,)})


# Quantiles, gradients, precision ------------------------------------------------------------------


def test_quantiles_never_cross() -> None:
    model = mixer(quantiles=(0.05, 0.25, 0.5, 0.75, 0.95))
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(0, 3)
        found = model(window(batch=64))["quantiles"]
    assert found.shape == (64, 6, 1, 5)
    assert (found.diff(dim=-1) >= 0).all()


def test_gradients_are_finite_differences() -> None:
    model = mixer(**EXOGENOUS, decoder_mode="mix_channel").double()
    past, future = window(3, batch=2).double(), torch.randn(2, 6, 3).double()
    model.backbone.scaler.forward = lambda x, seen: (  # in double, as the rest
        x.mean(1, keepdim=True),
        (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt(),
    )

    def loss() -> Tensor:
        return model(past, future=future)["forecast"].square().sum()

    loss().backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat, step = parameter.view(-1), 1e-6
            kept = float(flat[0])
            flat[0] = kept + step
            above = float(loss())
            flat[0] = kept - step
            slope = (above - float(loss())) / (2 * step)
            flat[0] = kept
            assert parameter.grad is not None, name
            assert float(parameter.grad.view(-1)[0]) == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_bf16_is_near_fp32() -> None:
    model, past = mixer(), window() * 1000 + 5000
    exact = forecast(model, past)
    with torch.autocast("cpu", torch.bfloat16):
        near = forecast(model, past)
    assert (near.float() - exact).abs().max() < 0.03 * past.std()


def test_a_wrong_number_of_channels_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected \\(batch, time, 1 channels\\)"):
        mixer()(window(2))


def test_mixing_channels_after_pretraining_apart_starts_close_to_the_pretrained_forecast() -> None:
    pretrained = mixer(num_input_channels=2)
    tuned = mixer(num_input_channels=2, decoder_mode="mix_channel")
    left = tuned.load_state_dict(pretrained.state_dict(), strict=False)
    assert not left.unexpected_keys
    assert all("channel_feature_mixer" in name for name in left.missing_keys)
    past = window(2)
    # The new mixers are residual: switched off they leave the pretrained forecast as it was.
    with torch.no_grad():
        for name in left.missing_keys:
            if "mlp.fc2" in name:
                tuned.get_parameter(name).zero_()
    assert torch.allclose(forecast(tuned, past), forecast(pretrained, past), atol=1e-6)
