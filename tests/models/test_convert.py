"""Architectures by masks: ours copied one to one, Hugging Face decoders under 4-D masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from polytask.errors import ConfigError
from polytask.models.convert import convert
from polytask.models.hub_lm import HubLanguageModel
from polytask.models.lm import LanguageModel, LanguageModelConfig
from polytask.objectives.pairs import Pairs
from polytask.train.language import PretrainConfig, pretrain

V = 31


def ours(**given: Any) -> LanguageModel:
    options = {"dim": 16, "layers": 2, "heads": 4, "vocab_size": V, **given}
    return LanguageModel(LanguageModelConfig(**options), 2)


def hub(kind: str, kernel: str = "sdpa") -> Any:
    import transformers as tf

    torch.manual_seed(0)
    small = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llama = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    configs: dict[str, Any] = {
        "gpt2": lambda: tf.GPT2Config(
            n_embd=16, n_layer=2, n_head=4, n_positions=64,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **small,
        ),
        "llama": lambda: tf.LlamaConfig(**llama, **small),
        "qwen2": lambda: tf.Qwen2Config(**llama, **small),
    }  # fmt: skip
    config = configs[kind]()
    return tf.AutoModelForCausalLM.from_config(config, attn_implementation=kernel).eval().double()


def t5() -> Any:
    import transformers as tf

    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=V, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return tf.AutoModelForSeq2SeqLM.from_config(config).eval().double()


def pairs_of(sizes: list[tuple[int, int]], seed: int = 0) -> Pairs:
    rng = np.random.default_rng(seed)
    return Pairs.of(
        [rng.integers(3, V, a) for a, _ in sizes], [rng.integers(3, V, b) for _, b in sizes]
    )


SIZES = [(5, 4), (2, 6), (7, 1), (0, 5)]


@pytest.mark.parametrize("positions", ["rope", "relative", "learned", "none"])
def test_conversion_copies_every_parameter_and_changes_the_mask(positions: str) -> None:
    model = ours(architecture="causal", positions=positions)
    other = convert(model, "prefix")
    assert other.architecture == "prefix" and model.architecture == "causal"
    assert list(other.state_dict()) == list(model.state_dict())
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
        assert value.data_ptr() != model.state_dict()[name].data_ptr()
    pairs = pairs_of(SIZES)
    before, after = model.logits(model.feed(pairs)), other.logits(other.feed(pairs))
    # Without an input the two are one; with one they differ.
    plain = model.feed(pairs).pair == 3
    torch.testing.assert_close(before[plain], after[plain])
    assert not torch.allclose(before[~plain], after[~plain])
    back = convert(other, "causal")
    torch.testing.assert_close(back.logits(back.feed(pairs)), before)


def test_an_encoder_decoder_is_refused_with_the_reason_unless_forced() -> None:
    model = ours(architecture="encdec")
    with pytest.raises(ConfigError, match="worse than training a decoder from scratch"):
        convert(model, "causal")
    forced = convert(model, "causal", force=True)
    assert not forced.has_encoder
    own = forced.decoder.state_dict()
    assert all(torch.equal(own[n], model.decoder.state_dict()[n]) for n in own)
    with pytest.raises(ConfigError, match="not to 'encdec'"):
        convert(model, "encdec")  # type: ignore[call-overload]


def test_untrained_buckets_of_the_future_are_refused() -> None:
    model = ours(architecture="causal", positions="relative", relative_bidirectional=True)
    with pytest.raises(ConfigError, match="never trained those of the future"):
        convert(model, "prefix")
    assert convert(model, "prefix", force=True).architecture == "prefix"


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_a_hub_decoder_keeps_packed_pairs_apart_and_reads_prefixes_both_ways(
    kind: str, kernel: str
) -> None:
    hf = hub(kind, kernel)
    pairs = pairs_of(SIZES)
    for architecture in ("causal", "prefix"):
        model = convert(hf, architecture)
        assert isinstance(model, HubLanguageModel) and model.hub is hf
        packed = model.feed(pairs, 40)
        assert len(packed.ids) == 1
        together = model.logits(packed)
        for index in range(len(pairs)):
            alone = model.logits(model.feed(pairs.take([index])))
            torch.testing.assert_close(together[packed.pair == index], alone, rtol=1e-4, atol=1e-4)
    # As transformers itself sees one text, causally.
    ids = torch.tensor([np.concatenate([pairs.input(0), pairs.target(0)]).tolist()])
    own = hf(input_ids=ids).logits[0, 4:-1].float()
    causal = convert(hf, "causal")
    torch.testing.assert_close(
        causal.logits(causal.feed(pairs.take([0]))), own, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_no_loss_of_a_hub_prefix_decoder_depends_on_its_own_target(kind: str) -> None:
    model = convert(hub(kind), "prefix")
    assert isinstance(model, HubLanguageModel)
    batch = model.feed(pairs_of([(4, 3), (3, 4)]), 40)
    kept: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    hook = model.hub.get_input_embeddings().register_forward_hook(keep)
    nll, _ = model.token_losses(batch)
    hook.remove()
    for row in range(len(nll)):
        (gradient,) = torch.autograd.grad(nll[row], kept, retain_graph=True)
        sizes = gradient.abs().sum(-1).flatten()
        slot, pair = int(batch.slot[row]), int(batch.pair[row])
        same = batch.segments.flatten() == batch.segments.flatten()[slot]  # type: ignore[union-attr]
        assert sizes[~same].sum() == 0 and sizes[slot + 1 :].sum() == 0, (pair, row)
        assert bool((sizes[same & (torch.arange(len(sizes)) <= slot)] > 0).all())


def test_an_encoder_decoder_of_the_hub_may_be_packed_where_positions_are_relative() -> None:
    model = HubLanguageModel(t5())
    pairs = pairs_of([(5, 4), (2, 6), (7, 1)])
    packed = model.feed(pairs, (20, 20))
    assert len(packed.ids) == 1
    padded = model.feed(pairs, pack=False)
    torch.testing.assert_close(model.logits(packed), model.logits(padded), rtol=1e-4, atol=1e-4)
    one = pairs.take([1])
    ids, labels = (torch.tensor([x.tolist()]) for x in (one.input(0), one.target(0)))
    loss = model.hub(input_ids=ids, labels=labels).loss
    mine, _ = model.token_losses(model.feed(one))
    assert float(mine.mean().detach()) == pytest.approx(float(loss.detach()), rel=1e-4)
    with pytest.raises(ConfigError, match="'prefix' is not what a mask can make of it"):
        HubLanguageModel(t5(), "prefix")
    with pytest.raises(ConfigError, match="dropping its encoder"):
        convert(t5(), "causal")


def test_what_ignores_masks_is_refused() -> None:
    model = hub("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match="load the model with attn_implementation='sdpa'"):
        convert(model, "prefix")
    leaky = hub("llama")
    plain = leaky.forward
    leaky.forward = lambda input_ids, attention_mask=None, position_ids=None, **k: plain(
        input_ids=input_ids, **k
    )
    with pytest.raises(ConfigError, match="does not attend as its mask says"):
        convert(leaky, "prefix")


def test_layers_with_a_window_take_no_longer_rows() -> None:
    model = hub("qwen2")
    wrapped = convert(model, "prefix")
    model.config.sliding_window = 8
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ConfigError, match="layers that see 8 tokens back"):
        wrapped.logits(wrapped.feed(pairs_of([(9, 4), (2, 2)])))  # type: ignore[operator]


def test_a_hub_model_trains_on_pairs() -> None:
    model = convert(hub("llama").float(), "prefix")
    pairs = pairs_of([(6, 4)] * 4)
    config = PretrainConfig(tokens=40 * 30, lr=1e-2)
    done = pretrain(model, lambda step: pairs, config)
    assert done.losses[-1][1] < 0.5 * done.losses[0][1]
