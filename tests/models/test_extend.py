"""New tokens: one id each, rows at the mean, heads tied or not, nothing else changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from polytask.errors import ConfigError
from polytask.models.extend import extend_vocabulary, single_id, specials_of


def tokenizer_of(extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Bytes, an end token, and `extra`."""
    marks = ["</s>", *extra]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*marks, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    found.add_special_tokens({"additional_special_tokens": list(extra)} if extra else {})
    return found


def llama(rows: int, tied: bool) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=rows,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=tied,
        )
    )


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_means_and_old_ones_stay(tied: bool) -> None:
    tokenizer = tokenizer_of()
    model = llama(len(tokenizer), tied)
    before = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings().weight.detach().clone()
    ids = extend_vocabulary(model, tokenizer, ["[R]", "[S]", "</s>"])
    assert ids == {"[R]": len(before), "[S]": len(before) + 1, "</s>": 0}
    after = model.get_input_embeddings().weight
    assert after.shape[0] == len(before) + 2 == model.config.vocab_size
    assert torch.equal(after[: len(before)], before)
    torch.testing.assert_close(after[-1], before.mean(0))
    scores = model.get_output_embeddings().weight
    assert (scores.data_ptr() == after.data_ptr()) is tied
    torch.testing.assert_close(scores[-1], head.mean(0))
    torch.testing.assert_close(scores[: len(head)], head)
    assert tokenizer("[S]xy", add_special_tokens=False)["input_ids"][0] == ids["[S]"]


def test_predictions_hardly_change() -> None:
    """A mean row's logit is the mean of the others' logits, so it takes little probability."""
    tokenizer = tokenizer_of()
    model = llama(len(tokenizer), True).eval()
    ids = torch.tensor([[5, 9, 30]])
    with torch.no_grad():
        before = model(ids).logits
        extend_vocabulary(model, tokenizer, [f"[{i}]" for i in range(10)])
        after = model(ids).logits
    torch.testing.assert_close(after[..., : before.shape[-1]], before)
    torch.testing.assert_close(after[..., -1], before.mean(-1))


def test_rows_that_stand_ready_are_used() -> None:
    """T5's matrices have more rows than its tokenizer has tokens."""
    tokenizer = tokenizer_of(("<extra_id_0>", "<extra_id_1>"))
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer) + 50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    model = T5ForConditionalGeneration(config)
    embedding = model.get_input_embeddings().weight
    mean = embedding[: len(tokenizer)].detach().mean(0)
    kept = embedding[1].detach().clone()
    specials = specials_of(model, tokenizer, sentinels=3, modes={"R": "[NLU]"})
    assert embedding.shape[0] == config.vocab_size  # nothing was resized
    assert specials.sentinels[:2] == (1, 2)  # those it had
    assert len(specials.sentinels) == 3
    assert specials.end == 0
    torch.testing.assert_close(embedding[specials.sentinels[2]], mean)
    torch.testing.assert_close(embedding[specials.modes["R"]], mean)
    assert torch.equal(embedding[1], kept)


def test_spread_parts_new_rows() -> None:
    tokenizer = tokenizer_of()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=1, n_head=2, n_positions=32)
    )
    old = model.get_input_embeddings().weight.detach().clone()
    ids = extend_vocabulary(model, tokenizer, [f"[{i}]" for i in range(200)], spread=0.5)
    new = model.get_input_embeddings().weight[list(ids.values())].detach()
    torch.testing.assert_close(new.mean(0), old.mean(0), atol=0.004, rtol=0)
    ratio = (new - old.mean(0)).std() / old.std(0).mean()
    assert 0.45 < float(ratio) < 0.55


def test_mistakes_are_named() -> None:
    tokenizer = tokenizer_of()
    model = llama(len(tokenizer), True)
    with pytest.raises(ConfigError, match=r"given twice: \[R\]"):
        extend_vocabulary(model, tokenizer, ["[R]", "[R]"])
    with pytest.raises(ConfigError, match=r"splits 'xyz' into 3 pieces \(x y z\)"):
        single_id(tokenizer, "xyz")
    assert model.get_input_embeddings().weight.shape[0] == 257
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no token that ends a text"):
        specials_of(model, tokenizer, 1, {})
