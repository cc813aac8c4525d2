"""Both attention paths against the softmax written out."""

from __future__ import annotations

import math

import pytest
import torch

from polytask.models.attention import attend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("kind", ["none", "causal", "mask", "bias", "causal bias", "mask bias"])
def test_attention_is_softmax_of_scaled_scores(
    dtype: torch.dtype, kv_heads: int, kind: str
) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 8, generator=g).to(dtype)
    k, v = torch.randn(2, 2, kv_heads, 5, 8, generator=g).to(dtype)
    visible = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    if "causal" in kind:
        visible = visible.tril()
    if "mask" in kind:
        visible = (torch.arange(5) < torch.tensor([5, 2])[:, None])[:, None, None]
    bias = torch.randn(1, 4, 5, 5, generator=g) if "bias" in kind else None
    score = torch.einsum(
        "shle,shme->shlm", q.double(), k.double().repeat_interleave(4 // kv_heads, 1)
    )
    score = score / math.sqrt(8) + (0 if bias is None else bias.double())
    weight = score.masked_fill(~visible, -math.inf).softmax(-1)
    expected = weight @ v.double().repeat_interleave(4 // kv_heads, 1)
    found = attend(q, k, v, visible if "mask" in kind else None, bias, "causal" in kind)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
