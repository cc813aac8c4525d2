"""Writing with language models: the cache equals no cache, beams equal a slow search and
`transformers`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from polytask.errors import ConfigError, DataError
from polytask.infer.beam import beam_search
from polytask.infer.fusion_generate import Sampler, generate
from polytask.infer.fusion_policy import Alone
from polytask.infer.language_source import LanguageSource, PrefixHubSource, source_of
from polytask.infer.logit_sources import HubSource
from polytask.models.convert import convert
from polytask.models.feed import ARCHITECTURES, Architecture
from polytask.models.hub_lm import HubLanguageModel
from polytask.models.lm import LanguageModel, LanguageModelConfig
from polytask.objectives.pairs import Pairs

V = 19
KINDS: list[dict[str, Any]] = [
    {"positions": "rope"},
    {"positions": "relative", "relative_tables": "layer", "kv_heads": 2},
    {"positions": "relative", "relative_bidirectional": True},
    {"positions": "learned"},
    {"positions": "none"},
]


def source(architecture: Architecture, **given: Any) -> LanguageSource:
    options = {"dim": 16, "layers": 2, "heads": 4, "vocab_size": V, **given}
    model = LanguageModel(LanguageModelConfig(architecture=architecture, **options), 5)
    with torch.no_grad():  # logits that differ
        model.embedding.weight.mul_(20)
    return LanguageSource(model.double())


def uncached(one: LanguageSource, prompt: list[int], so_far: list[int]) -> torch.Tensor:
    """Logits of the next token from a whole forward pass: the prompt is the input of a pair."""
    pairs = Pairs.of([prompt], [[*so_far, 1]])
    model = one.model
    return model.logits(model.feed(pairs)).double().detach()[-1]


PROMPTS = [[3, 4, 5], [7], [2, 9, 11, 6, 8], [18, 1]]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_with_a_cache_equals_greedy_without_for_uneven_prompts(
    architecture: Architecture, kind: dict[str, Any]
) -> None:
    one = source(architecture, **kind)
    found = generate([one], Alone(), PROMPTS, max_new=7)
    for prompt, written in zip(PROMPTS, found, strict=True):
        ids: list[int] = []
        for _ in range(7):
            ids.append(int(uncached(one, prompt, ids).argmax()))
        assert written.ids == ids


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sampled_row_is_what_it_is_alone_and_follows_the_probabilities(
    architecture: Architecture,
) -> None:
    one = source(architecture)
    sampler = Sampler(temperature=0.9, top_k=8, top_p=0.95, seed=4)
    together = generate([one], Alone(), PROMPTS, sampler=sampler, max_new=6)
    alone = generate([one], Alone(), PROMPTS[:1], sampler=sampler, max_new=6)
    assert together[0].ids == alone[0].ids
    many = generate([one], Alone(), [[3, 4]] * 4000, sampler=Sampler(temperature=1), max_new=1)
    counts = np.bincount([row.ids[0] for row in many], minlength=V) / 4000
    expected = uncached(one, [3, 4], []).softmax(-1).numpy()
    assert np.abs(counts - expected).max() < 4 * math.sqrt(0.25 / 4000)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_of_every_prompt_token_stand_where_the_tokens_stood(
    architecture: Architecture,
) -> None:
    one = source(architecture)
    ids = torch.tensor([[0, 0, 7], [3, 4, 5]])
    valid = torch.tensor([[False, False, True], [True] * 3])
    if architecture == "encdec":
        with pytest.raises(ConfigError, match="scores no token of it"):
            one.forward(ids, None, valid, last=False)
        return
    found, _ = one.forward(ids, None, valid, last=False)
    last, _ = one.forward(ids, None, valid)
    torch.testing.assert_close(found[:, -1], last)
    torch.testing.assert_close(found[0, 2].double(), uncached(one, [7], []))
    if architecture == "causal":
        torch.testing.assert_close(found[1, 0].double(), uncached(one, [3], []))


def brute_force(one: LanguageSource, prompt: list[int], end: int, most: int, penalty: float) -> Any:
    """Every text of at most `most` tokens with its score."""
    texts: list[tuple[float, list[int]]] = []

    def grow(ids: list[int], log_p: float) -> None:
        each = uncached(one, prompt, ids).log_softmax(-1)
        for token in range(V):
            value = log_p + float(each[token])
            length = len(ids) + 1
            if token == end:
                texts.append((value / length**penalty, ids))
            elif length == most:
                texts.append((value / length**penalty, [*ids, token]))
            else:
                grow([*ids, token], value)

    grow([], 0.0)
    return sorted(texts, key=lambda x: -x[0])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_beam_as_wide_as_the_tree_finds_the_best_texts(
    architecture: Architecture, penalty: float
) -> None:
    one = source(architecture)
    prompts = [[3, 4, 5], [7]]
    found = beam_search(one, prompts, beams=V, max_new=2, length_penalty=penalty, stop=[2])
    for prompt, beams in zip(prompts, found, strict=True):
        best = brute_force(one, prompt, 2, 2, penalty)
        for beam, (score, ids) in zip(beams[:5], best[:5], strict=True):
            assert beam.ids == ids
            assert beam.score == pytest.approx(score, abs=1e-6)
        assert [b.score for b in beams] == sorted((b.score for b in beams), reverse=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_beam_is_greedy_and_prompts_do_not_mix(architecture: Architecture) -> None:
    one = source(architecture)
    greedy = generate([one], Alone(), PROMPTS, max_new=6, stop=[4])
    beams = beam_search(one, PROMPTS, beams=1, max_new=6, stop=[4])
    assert [b[0].ids for b in beams] == [g.ids for g in greedy]
    assert [b[0].stopped for b in beams] == [g.stopped == "stop" for g in greedy]
    wide = beam_search(one, PROMPTS, beams=3, max_new=6, stop=[4])
    for prompt, together in zip(PROMPTS, wide, strict=True):
        (alone,) = beam_search(one, [prompt], beams=3, max_new=6, stop=[4])
        assert [b.ids for b in alone] == [b.ids for b in together]


def tiny_llama() -> tuple[Any, Any]:
    import transformers as tf
    from tokenizers import Tokenizer, models

    torch.manual_seed(1)
    config = tf.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.6,
    )  # fmt: skip
    words = {f"w{i}": i for i in range(V)}
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")),
        eos_token="w2", pad_token="w0",
    )  # fmt: skip
    return tf.AutoModelForCausalLM.from_config(config).eval(), tokenizer


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("penalty", [1.0, 0.5])
def test_beams_and_greedy_equal_those_of_transformers(beams: int, penalty: float) -> None:
    hf, tokenizer = tiny_llama()
    mine = beam_search(HubSource(hf, tokenizer), PROMPTS, beams, 8, penalty)
    more: dict[str, Any] = {"num_beams": beams}
    if beams > 1:
        more |= {
            "length_penalty": penalty,
            "early_stopping": "never",
            "num_return_sequences": beams,
        }
    for prompt, found in zip(PROMPTS, mine, strict=True):
        theirs = hf.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0, **more
        )
        texts = []
        for row in theirs[:, len(prompt) :].tolist():
            texts.append(row[: row.index(2)] if 2 in row else row)
        assert [b.ids for b in found][: len(texts)] == texts


def test_a_hub_decoder_that_reads_prefixes_writes_the_same_with_and_without_a_cache() -> None:
    hf, tokenizer = tiny_llama()
    model = convert(hf, "prefix")
    assert isinstance(model, HubLanguageModel)
    one = source_of(model, tokenizer)
    assert isinstance(one, PrefixHubSource)
    found = generate([one], Alone(), PROMPTS, max_new=6)
    for prompt, written in zip(PROMPTS, found, strict=True):
        ids: list[int] = []
        for _ in range(len(written.ids)):
            batch = model.feed(Pairs.of([prompt], [[*ids, 1]]))
            ids.append(int(model.logits(batch)[-1].argmax()))
        assert written.ids == ids
    causal = generate([HubSource(hf, tokenizer)], Alone(), PROMPTS, max_new=6)
    assert [c.ids for c in causal] != [w.ids for w in found]


def test_faults_of_a_search_are_named() -> None:
    one = source("causal", positions="learned", max_length=8)
    assert beam_search(one, [], 2) == []
    assert beam_search(one, [[3]], 2, max_new=0) == [[]]
    with pytest.raises(ConfigError, match="beams = 0"):
        beam_search(one, [[3]], 0)
    with pytest.raises(DataError, match="prompt 2 is empty"):
        beam_search(one, [[3], []], 2)
    with pytest.raises(DataError, match="outside the vocabulary"):
        beam_search(one, [[V]], 2)
    with pytest.raises(ConfigError, match="8 positions"):
        beam_search(one, [[3, 4]], 2, max_new=7)
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        source_of(HubLanguageModel(tiny_llama()[0]))
