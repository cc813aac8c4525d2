"""Weights and outputs of the published code: same names, same numbers, on random weights."""

from __future__ import annotations

import pytest
import torch

from polytask.models.ttm import TinyTimeMixer, TTMConfig

published = pytest.importorskip("tsfm_public.models.tinytimemixer", reason="needs granite-tsfm")

BASE = {
    "context_length": 64,
    "prediction_length": 12,
    "patch_length": 8,
    "patch_stride": 8,
    "num_input_channels": 3,
    "d_model": 24,
    "decoder_d_model": 16,
    "num_layers": 2,
    "decoder_num_layers": 2,
    "adaptive_patching_levels": 3,
}
EXOGENOUS = {
    "enable_forecast_channel_mixing": True,
    "prediction_channel_indices": [0, 2],
    "exogenous_channel_indices": [1],
}
CASES = {
    "base": {},
    "no levels": {"adaptive_patching_levels": 0},
    "prefix": {"resolution_prefix_tuning": True},
    "channels mixed": {"decoder_mode": "mix_channel"},
    "raw residual": {"decoder_raw_residual": True, "resolution_prefix_tuning": True},
    "no adapter": {"decoder_d_model": 24},
    "no decoder": {"use_decoder": False},
    "no gate": {"gated_attn": False},
    "decoder levels": {"decoder_adaptive_patching_levels": 2},
    "exogenous": EXOGENOUS,
    "exogenous, wide": {**EXOGENOUS, "fcm_context_length": 2},
    "exogenous, plain": {**EXOGENOUS, "fcm_prepend_past": False, "fcm_gated_attn": False},
}


@pytest.mark.parametrize("masked", [False, True], ids=["all observed", "a fifth missing"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_published_code(case: str, masked: bool) -> None:
    settings = {**BASE, **CASES[case]}
    torch.manual_seed(0)
    config = published.TinyTimeMixerConfig(**settings)
    theirs = published.TinyTimeMixerForPrediction(config).eval()
    ours = TinyTimeMixer(TTMConfig(**settings, parity=True)).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    past, future = torch.randn(5, 64, 3) * 3 + 2, torch.randn(5, 12, 3)
    observed = torch.rand(5, 64, 3) > 0.2 if masked else None
    token = torch.arange(5)
    with torch.no_grad():
        expected = theirs(
            past,
            past_observed_mask=observed,
            freq_token=token,
            future_values=future,
            return_loss=False,
        ).prediction_outputs
        found = ours(past, observed=observed, frequency=token, future=future)["forecast"]
    assert (found - expected).abs().max() < 1e-5


def test_a_short_context_is_what_the_published_code_makes_of_it_only_on_request() -> None:
    torch.manual_seed(1)
    theirs = published.TinyTimeMixerForPrediction(published.TinyTimeMixerConfig(**BASE)).eval()
    models = [TinyTimeMixer(TTMConfig(**BASE, parity=parity)).eval() for parity in (True, False)]
    past = torch.randn(2, 40, 3) + 5
    with torch.no_grad():
        for model in models:
            model.load_state_dict(theirs.state_dict())
        expected = theirs(past, return_loss=False).prediction_outputs
        same, sound = (model(past)["forecast"] for model in models)
    assert (same - expected).abs().max() < 1e-5
    assert (sound - expected).abs().max() > 0.1  # their zeros in front count as observed
