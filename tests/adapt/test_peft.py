"""peft's wrappers: each of its methods on a transformers model, and its errors as ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapt_models import bert, gpt2, hidden, ids

from polytask.adapt import peft_model
from polytask.errors import AdaptError

WAYS: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["query"]},
    "ia3": {"target_modules": ["query"], "feedforward_modules": []},
    "prompt": {"num_virtual_tokens": 3},
}


@pytest.mark.parametrize("method", WAYS)
def test_pefts_methods_wrap_an_encoder_and_only_their_parts_train(method: str) -> None:
    model = peft_model(bert(), method, **WAYS[method])
    out = hidden(model, ids())
    assert out.shape[0] == 5 and bool(out.isfinite().all())
    out.square().sum().backward()
    learned = [n for n, p in model.named_parameters() if p.grad is not None]
    assert learned and all(any(k in n for k in ("lora", "ia3", "prompt")) for n in learned)


def test_prefixes_go_before_the_keys_of_a_decoder() -> None:
    base, tokens = gpt2(), ids()
    before = hidden(base, tokens)
    model = peft_model(base, "prefix", num_virtual_tokens=4).eval()
    mask = torch.ones_like(tokens)
    after = model(input_ids=tokens, attention_mask=mask).last_hidden_state
    assert after.shape == before.shape and not torch.allclose(after, before)


def test_mistakes_are_errors_of_ours() -> None:
    with pytest.raises(AdaptError, match=r"no peft method 'lorra'\. Did you mean 'lora'"):
        peft_model(bert(), "lorra")
    with pytest.raises(AdaptError, match="peft cannot make a 'lora' model"):
        peft_model(bert(), "lora", target_modules=["nowhere"])
