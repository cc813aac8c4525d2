"""The decoding loop: caches, batches, stops, sampling, streams, scoring; Llama, GPT-2, our own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fusion_models import byte_tokenizer, gpt2, llama, write

from polytask.errors import ConfigError, DataError
from polytask.infer import Fusion
from polytask.infer.fusion import fuse_step
from polytask.infer.fusion_generate import Sampler, generate, pad_left
from polytask.infer.fusion_model import TextStream, unique_names
from polytask.infer.fusion_policy import Alone, FusionConfig, FusionPolicy
from polytask.infer.fusion_score import score
from polytask.infer.logit_sources import (
    CallableSource,
    HubSource,
    PolytaskSource,
    Vocabulary,
    check_same_vocabulary,
)
from polytask.models.multitask import MultitaskModel
from polytask.models.specs import HeadSpec, InputSpec, ModelConfig, ModelSpec

PROMPTS = [[5, 9, 70], [40], [8, 8, 200, 31, 17, 99, 4]]


def own_model(seed: int, positions: str = "rope", vocabulary: int = 257) -> MultitaskModel:
    config = ModelConfig(dim=16, layers=2, heads=2, seed=seed, positions=positions, max_length=64)
    inputs = InputSpec(vocab_size=vocabulary, pad_id=0, end_id=None)
    spec = ModelSpec(
        config=config, inputs=inputs, heads=(HeadSpec(task="text", kind="generate", outputs=0),)
    )
    model = MultitaskModel(spec).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.dim() < 2 else 4.0)
    return model


def sources(kind: str, count: int = 4):
    tokenizer = byte_tokenizer()
    vocabulary = Vocabulary.of_tokenizer(tokenizer)
    if kind == "llama":
        return [HubSource(llama(i), tokenizer, f"llama{i}") for i in range(count)]
    if kind == "gpt2":
        return [HubSource(gpt2(i), tokenizer, f"gpt{i}") for i in range(count)]
    if kind == "own":
        return [
            PolytaskSource(own_model(i), name=f"own{i}", vocabulary=vocabulary)
            for i in range(count)
        ]
    models = [llama(i) for i in range(count)]

    def function(model):
        def call(ids, valid):
            position = (valid.long().cumsum(1) - 1).clamp(min=0)
            return model(input_ids=ids, attention_mask=valid.long(), position_ids=position).logits

        return call

    return [CallableSource(function(m), vocabulary, f"f{i}") for i, m in enumerate(models)]


KINDS = ["llama", "gpt2", "own", "callable"]


def policy(**options) -> FusionPolicy:
    return FusionPolicy(FusionConfig(**options), 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", ["step", "prompt", "running_minimum"])
def test_a_batch_gives_what_each_prompt_gives_alone(kind, search) -> None:
    models, fused = sources(kind), policy(search=search)
    together = generate(models, fused, PROMPTS, max_new=8)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(models, fused, [prompt], max_new=8)[0]
        assert alone.ids == together[row].ids
        assert torch.equal(alone.told["alpha"], together[row].told["alpha"])
        assert torch.allclose(alone.told["loss"], together[row].told["loss"], atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_caches_equals_full_passes(kind) -> None:
    """Every step again without any cache, batch or padding, straight from `fuse_step`."""
    models = sources(kind)
    found = generate(models, policy(), PROMPTS, max_new=6)
    for prompt, one in zip(PROMPTS, found, strict=True):
        ids = list(prompt)
        for step, token in enumerate(one.ids):
            logits = [m.forward(torch.tensor([ids]))[0] for m in models]
            fused = fuse_step(logits[0], logits[1], torch.stack(logits[2:]))
            assert int(fused.logits.argmax()) == token
            assert torch.equal(fused.alpha[0], one.told["alpha"][step])
            assert torch.allclose(fused.loss[0], one.told["loss"][step], rtol=1e-3, atol=1e-4)
            ids.append(token)


@pytest.mark.parametrize("kind", KINDS)
def test_left_padded_scores_are_those_of_the_bare_rows(kind) -> None:
    model = sources(kind, 1)[0]
    ids, valid = pad_left(PROMPTS)
    padded, _ = model.forward(ids, None, valid, last=False)
    final, _ = model.forward(ids, None, valid)
    for row, prompt in enumerate(PROMPTS):
        bare, _ = model.forward(torch.tensor([prompt]), last=False)
        assert torch.allclose(padded[row, -len(prompt) :], bare[0], atol=2e-5)
        assert torch.allclose(final[row], bare[0, -1], atol=2e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_alone_greedy_is_what_transformers_generates(kind) -> None:
    model = sources(kind, 1)[0]
    found = generate([model], Alone(), PROMPTS, max_new=10, stop=model.end)
    for prompt, one in zip(PROMPTS, found, strict=True):
        reference = model.model.generate(
            torch.tensor([prompt]), max_new_tokens=10, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert one.ids == [i for i in reference if i != 0]


def test_own_model_with_learned_positions_and_its_limit() -> None:
    vocabulary = Vocabulary.of_tokenizer(byte_tokenizer())
    model = PolytaskSource(own_model(1, "learned"), name="own", vocabulary=vocabulary)
    ids, valid = pad_left(PROMPTS)
    padded, _ = model.forward(ids, None, valid)
    bare, _ = model.forward(torch.tensor([PROMPTS[1]]))
    assert torch.allclose(padded[1], bare[0], atol=2e-5)
    with pytest.raises(ConfigError, match="64 positions"):
        generate([model], Alone(), PROMPTS, max_new=60)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("search", ["step", "running_minimum"])
def test_a_finished_row_leaves_the_caches_and_the_others_go_on(kind, search) -> None:
    """With drawn tokens: neither caches nor the policy's memory nor random numbers mix rows up."""
    models, sampler = sources(kind), Sampler(temperature=0.8, seed=1)
    options = {"max_new": 8, "sampler": sampler}
    plain = generate(models, policy(search=search), PROMPTS, **options)
    ends = plain[0].ids[2]
    stopped = generate(models, policy(search=search), PROMPTS, stop=[ends], **options)
    for before, after in zip(plain, stopped, strict=True):
        cut = before.ids.index(ends) if ends in before.ids else 8
        assert after.ids == before.ids[:cut]
        assert after.stopped == ("stop" if cut < 8 else "length")
        assert len(after.told["loss"]) == cut if cut else after.told == {}
    assert any(one.stopped == "length" for one in stopped)


def test_finished_rows_are_not_run_any_more() -> None:
    sizes = []
    seen = CallableSource(
        lambda ids, valid: (sizes.append(len(ids)), torch.eye(9)[(ids[:, -1] + 1) % 9])[1],
        [str(i) for i in range(9)],
    )
    found = generate([seen], Alone(), [[1], [5], [7]], max_new=6, stop=[8])
    assert [one.ids for one in found] == [[2, 3, 4, 5, 6, 7], [6, 7], []]
    assert sizes == [3, 2, 2, 1, 1, 1]


def test_the_two_literal_searches_of_the_ablation() -> None:
    """running_minimum keeps the strength of the least loss so far, prompt that of the first."""
    models = sources("llama")
    texts = [list(range(20, 60)), list(range(90, 110))]
    free = score(models, policy(), texts)
    frozen = score(models, policy(search="running_minimum"), texts)
    once = score(models, policy(search="prompt"), texts)
    for a, b, c in zip(free, frozen, once, strict=True):
        best = np.array([int(a.told["loss"][: i + 1].argmin()) for i in range(len(a.nll))])
        assert torch.equal(b.told["alpha"], a.told["alpha"][best])
        assert torch.equal(c.told["alpha"], a.told["alpha"][:1].expand_as(c.told["alpha"]))
    assert not torch.equal(free[0].told["alpha"], frozen[0].told["alpha"])


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_fused_probabilities_of_each_token(kind) -> None:
    models = sources(kind)
    found = score(models, policy(), PROMPTS, batch_size=2)
    for text, one in zip(PROMPTS, found, strict=True):
        assert len(one.nll) == len(text) - 1
        for k in range(1, len(text)):
            logits = [m.forward(torch.tensor([text[:k]]))[0] for m in models]
            fused = fuse_step(logits[0], logits[1], torch.stack(logits[2:])).logits
            expected = -fused.log_softmax(-1)[0, text[k]]
            assert float(one.nll[k - 1]) == pytest.approx(float(expected), abs=2e-4)
    later = score(models, policy(), PROMPTS, start=3)
    assert [len(one.nll) for one in later] == [0, 0, 4]
    assert torch.allclose(later[2].nll, found[2].nll[2:], atol=1e-5)
    with pytest.raises(ConfigError, match="start = 0"):
        score(models, policy(), PROMPTS, start=0)


def test_own_prompts_put_examples_before_the_large_model_only() -> None:
    models = sources("llama")
    shots = [[60, 61, *p] for p in PROMPTS]
    found = generate(models, policy(), PROMPTS, max_new=3, own_prompts={0: shots})
    ids = [list(shots[0]), *([list(PROMPTS[0])] * 3)]
    for token in found[0].ids:
        logits = [m.forward(torch.tensor([i]))[0] for m, i in zip(models, ids, strict=True)]
        assert (
            int(fuse_step(logits[0], logits[1], torch.stack(logits[2:])).logits.argmax()) == token
        )
        ids = [[*i, token] for i in ids]
    with pytest.raises(DataError, match="2 own prompts for 3 rows"):
        generate(models, policy(), PROMPTS, own_prompts={1: shots[:2]})


# -- sampling


def test_temperature_acts_after_fusion() -> None:
    """alpha does not depend on the sampler, and shares follow softmax(fused / temperature)."""
    models = sources("gpt2")
    logits = [m.forward(torch.tensor([[5]]))[0] for m in models]
    fused = fuse_step(logits[0], logits[1], torch.stack(logits[2:])).logits.double()
    rows = 3000
    found = generate(
        models, policy(), [[5]] * rows, max_new=1, sampler=Sampler(temperature=0.7, seed=4)
    )
    drawn = torch.bincount(torch.tensor([one.ids[0] for one in found]), minlength=257)
    expected = (fused / 0.7).softmax(-1)[0] * rows
    kept = expected > 5
    chi2 = float(((drawn[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    freedom = int(kept.sum())
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_top_k_and_top_p_keep_the_right_tokens() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(400, 1)
    uniform = torch.linspace(0, 0.9999, 400)
    for options, kept in (
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.79}, [0, 1]),
        ({"top_p": 0.81}, [0, 1, 2]),
        ({"top_p": 1e-9}, [0]),
        ({}, [0, 1, 2, 3]),
    ):
        chosen = Sampler(temperature=1.0, **options).choose(logits, uniform)
        assert sorted(set(chosen.tolist())) == kept
        p = torch.tensor([0.5, 0.3, 0.15, 0.05])[kept]
        share = torch.bincount(chosen, minlength=4)[kept] / 400
        assert torch.allclose(share, p / p.sum(), atol=0.01)
    banned = torch.tensor([[-math.inf, 0.0, -math.inf]])
    for u in (0.0, 0.999999999):
        assert int(Sampler(temperature=1).choose(banned, torch.tensor([u]))) == 1


def test_a_row_draws_the_same_whatever_the_others_do() -> None:
    models, sampler = sources("llama"), Sampler(temperature=1.0, seed=3)
    all_rows = generate(models, policy(), PROMPTS, max_new=6, sampler=sampler)
    one = generate(models, policy(), PROMPTS[:1], max_new=6, sampler=sampler)
    assert one[0].ids == all_rows[0].ids
    other = generate(models, policy(), PROMPTS[:1], max_new=6, sampler=Sampler(temperature=1.0))
    assert other[0].ids != one[0].ids


# -- vocabularies


def test_vocabularies_that_differ_are_refused_naming_the_first_id() -> None:
    def source(tokens, name):
        return CallableSource(lambda ids, valid: torch.zeros(len(ids), len(tokens)), tokens, name)

    a = source(["x", "y", "z"], "one")
    check_same_vocabulary([a, source(["x", "y", "z"], "two")])
    with pytest.raises(ConfigError, match=r"'one'.*'two'.*id 1 is 'y' .*'z' .*another order"):
        check_same_vocabulary([a, source(["x", "z", "y"], "two")])
    with pytest.raises(ConfigError, match="id 3, 'w', is only in one"):
        check_same_vocabulary([a, source(["x", "y", "z", "w"], "two")])
    with pytest.raises(ConfigError, match="id 2 is 'z' in the one and None"):
        generate([a, source(["x", "y", None], "two")], Alone(), [[0]])


def test_padded_embeddings_are_cut_to_the_vocabulary(tmp_path) -> None:
    plain, padded = llama(0), llama(0, padded=7)
    with torch.no_grad():
        for name, value in padded.named_parameters():
            value[:257] = dict(plain.named_parameters())[name] if "embed" in name else value[:257]
            if "lm_head" in name:
                value[:257], value[257:] = dict(plain.named_parameters())[name], 50.0
            elif "embed" not in name:
                value.copy_(dict(plain.named_parameters())[name])
    tokenizer = byte_tokenizer()
    models = [HubSource(m, tokenizer, "m") for m in (plain, padded)]
    check_same_vocabulary(models)
    (a, _), (b, _) = (m.forward(torch.tensor([[4, 5]])) for m in models)
    assert a.shape == b.shape == (1, 257)
    assert torch.allclose(a, b)
    with pytest.raises(ConfigError, match="do not belong together"):
        HubSource(plain, byte_tokenizer(("extra",)), "short")


# -- text


def test_folders_in_hub_format_from_text_to_text(tmp_path) -> None:
    places = [write(tmp_path / f"m{i}", llama(i)) for i in range(3)]
    places.append(write(tmp_path / "m3", gpt2(3)))  # another architecture, the same vocabulary
    fusion = Fusion.load(places[0], places[1], places[2:])
    streamed: dict[int, str] = {}

    def take(row: int, piece: str) -> None:
        streamed[row] = streamed.get(row, "") + piece

    found = fusion.write(["abc", "ä question"], max_new=12, on_text=take)
    assert fusion.names == ("m2", "m3")
    for row, one in enumerate(found):
        assert streamed.get(row, "") == one.text == "".join(t.text for t in one.tokens)
        assert sum(one.shares.values()) == pytest.approx(1)
        assert all((t.alpha > 0) == (t.expert in fusion.names) for t in one.tokens)
    scored = fusion.score("ä question")[0]
    assert scored.prompt + scored.text == "ä question"
    assert all(t.nll is not None and t.nll > 0 for t in scored.tokens)
    with pytest.raises(DataError, match="prompt 2 is empty"):
        fusion.write(["a", ""])
    with pytest.raises(ConfigError, match=r"there is no folder"):
        Fusion.load(places[0], places[1], [str(tmp_path / "nothing")])
    odd = write(tmp_path / "odd", llama(5, padded=3), byte_tokenizer(("x1", "x2")))
    with pytest.raises(ConfigError, match="id 257, 'x1', is only in one"):
        Fusion.load(places[0], places[1], [odd])
    with pytest.raises(ConfigError, match="Did you mean 'mode'"):
        Fusion.load(places[0], places[1], places[2:], mod="single")


def test_stop_texts_are_cut_off_and_never_streamed(tmp_path) -> None:
    words = ["so", " it", " en", "ds", " he", "re", "."]
    tokens = Vocabulary(tuple(words))

    def next_word(ids, valid):
        return torch.eye(len(words))[(ids[:, -1] + 1) % len(words)] * 9

    def source(name):
        return CallableSource(
            next_word,
            tokens,
            name,
            encode=lambda text: [words.index(text)],
            decode=lambda ids: "".join(words[i] for i in ids),
        )

    fusion = Fusion(source("l"), source("b"), [source("e")])
    pieces: list[str] = []
    found = fusion.write("so", max_new=6, stop=["ends h"], on_text=lambda r, p: pieces.append(p))[0]
    assert found.text == " it " and found.stopped == "stop"
    assert "".join(pieces) == " it "
    found = fusion.write("so", max_new=3, stop=["ends x"], on_text=lambda r, p: pieces.append(p))[0]
    assert found.text == " it ends" and "".join(pieces) == " it  it ends"


def test_characters_of_several_tokens_are_given_whole() -> None:
    tokenizer = byte_tokenizer()
    stream = TextStream(tokenizer.decode)
    given = [stream.add(i) for i in tokenizer("aä€")["input_ids"]]
    assert given == ["a", "", "ä", "", "", "€"]
    assert stream.finish() == ""
    stream = TextStream(tokenizer.decode)
    for i in tokenizer("a€")["input_ids"][:2]:
        stream.add(i)
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"
    assert "".join(stream.pieces) == stream.text


def test_names_are_short_and_unique() -> None:
    assert unique_names(["a/x", "b/x", "y", "y"]) == ("a/x", "b/x", "y (1)", "y (2)")


def test_faults_of_calls() -> None:
    models = sources("llama", 3)
    with pytest.raises(ConfigError, match="combines 4 models, not 3"):
        generate(models, policy(), PROMPTS)
    with pytest.raises(DataError, match="prompt 2 is empty"):
        generate(models, Alone(), [[1], []])
    with pytest.raises(DataError, match="outside the vocabulary"):
        generate(models, Alone(), [[257]])
    with pytest.raises(ConfigError, match="negative"):
        generate(models, Alone(), [[1]], max_new=-1)
    with pytest.raises(ConfigError, match="at least one expert"):
        Fusion(models[0], models[1], [])
    with pytest.raises(ConfigError, match="needs alpha"):
        Fusion(models[0], models[1], models[2:], mode="static")
    assert generate(models, Alone(), []) == []
    assert [one.ids for one in generate(models, Alone(), PROMPTS, max_new=0)] == [[], [], []]
    one_way = CallableSource(lambda ids, valid: torch.zeros(len(ids), 2), ["a", "b"])
    with pytest.raises(ConfigError, match="last token only"):
        score([one_way], Alone(), [[0, 1]])
