"""Pretraining from a configuration: plans, checkpoints `transformers` loads, resuming, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from polytask.cli import main
from polytask.configs import parse
from polytask.errors import CheckpointError, ConfigError, DataError
from polytask.models.lm import LanguageModel
from polytask.objectives.ul2 import restored
from polytask.pipeline.pretraining import (
    PretrainLoader,
    held_out_pairs,
    plan_pretraining,
    pretrain,
)
from polytask.pipeline.pretraining_config import PretrainRunConfig
from polytask.tasks.codec import TextCodec

TRAIN = {
    "steps": 6,
    "batch_size": 8,
    "lr": 0.01,
    "log_every": 2,
    "evaluate_every": 3,
    "checkpoint_every": 2,
    "progress": False,
    "device": "cpu",
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of texts, a tiny decoder and a tiny T5."""
    folder = tmp_path_factory.mktemp("pretraining")
    (folder / "texts").mkdir()
    rng = np.random.default_rng(0)
    words = ["sun", "moon", "river", "stone", "walks", "sings", "over", "under", "the", "a"]
    for number in range(12):
        lines = [" ".join(rng.choice(words, 12)) for _ in range(10)]
        (folder / "texts" / f"{number:02d}.txt").write_text(". ".join(lines))
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    decoder = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=256,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            tie_word_embeddings=True,
        )
    )
    both = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )
    for name, model in (("decoder", decoder), ("t5", both)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def config(**given: Any) -> PretrainRunConfig:
    base: dict[str, Any] = {
        "corpus": {"path": "texts", "documents": "file"},
        "objective": {"preset": "ul2-20b", "spans": [3, 5, 16]},
        "inputs_len": 48,
        "sentinels": 40,
        "held_out": 0.2,
        "held_out_chunks": 4,
        "train": TRAIN,
        "model": {"fresh": {"dim": 16, "layers": 1, "heads": 2, "vocab": 340}},
    }
    return parse(PretrainRunConfig, base | given, "test")


def test_a_fresh_model_is_trained_saved_and_described(place: Path, tmp_path: Path) -> None:
    run = pretrain(config(), tmp_path / "run", place)
    scores = run.scores
    assert set(scores["after"]) <= {row["denoiser"] for row in scores["text"]}
    assert np.mean([s["nll"] for s in scores["after"].values()]) < np.mean(
        [s["nll"] for s in scores["before"].values()]
    )
    assert sum(row["chunks"] for row in scores["text"]) == 6 * 8
    booked = {row["task"]: row for row in scores["ledger"]}
    assert booked["total"]["examples"] == 48
    for row in scores["text"]:  # every text token of a chunk is seen, once
        assert booked[row["denoiser"]]["tokens"] >= row["tokens"]
    model = LanguageModel.load(run.model / "weights")
    codec = TextCodec.load(run.model / "tokenizer")
    assert model.architecture == "encdec"
    assert model.config.vocab_size == codec.size
    text = run.report.read_text(encoding="utf-8")
    assert "R (3, 0.15)" in text
    assert 'class="mark mode">X<' in text
    assert (run.folder / "loss-by-denoiser.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("hub", "architecture", "objective"),
    [
        ("decoder", "prefix", "ul2r"),
        ("decoder", None, "full_lm"),
        ("decoder", "prefix", "masked_lm"),
        ("t5", None, {"denoisers": [{"kind": "bart", "rate": 0.3, "delete": 0.1, "rotate": 0.5}]}),
        ("t5", None, {"preset": "ul2-20b", "spans": [3, 5, 16]}),
    ],
)
def test_transformers_loads_what_comes_out(
    place: Path, tmp_path: Path, hub: str, architecture: str | None, objective: Any
) -> None:
    given = config(model={"hub": hub, "architecture": architecture}, objective=objective)
    run = pretrain(given, tmp_path / "run", place)
    auto = AutoModelForSeq2SeqLM if hub == "t5" else AutoModelForCausalLM
    model, tokenizer = auto.from_pretrained(run.model), AutoTokenizer.from_pretrained(run.model)
    old = auto.from_pretrained(place / hub)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    changed = [
        name
        for name, value in model.state_dict().items()
        if value.shape == old.state_dict()[name].shape
        and not torch.equal(value, old.state_dict()[name])
    ]
    assert len(changed) > 3
    if objective == "ul2r" or "preset" in objective:
        assert len(tokenizer("[S]the sun", add_special_tokens=False)["input_ids"]) == 8
    prompt = tokenizer("the sun walks", return_tensors="pt", add_special_tokens=False)
    written = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert written.shape[0] == 1


def test_a_resumed_run_is_the_same_bit_for_bit(place: Path, tmp_path: Path) -> None:
    whole = pretrain(config(), tmp_path / "whole", place)
    short = config(train=TRAIN | {"steps": 6})

    import polytask.pipeline.pretraining as module

    original = module.Trainer

    class Stopping(original):  # type: ignore[misc, valid-type]
        """Stops as Ctrl-C would after four steps."""

        def _asked_to_stop(self, done: int) -> bool:
            return done == 4

    module.Trainer = Stopping  # type: ignore[misc]
    try:
        with pytest.raises(KeyboardInterrupt):
            pretrain(short, tmp_path / "parts", place)
    finally:
        module.Trainer = original  # type: ignore[misc]
    parts = pretrain(config(), tmp_path / "parts", place)
    first = LanguageModel.load(whole.model / "weights").state_dict()
    second = LanguageModel.load(parts.model / "weights").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole.scores["ledger"][-1]["tokens"] == parts.scores["ledger"][-1]["tokens"]
    assert whole.scores["text"] == parts.scores["text"]


def test_examples_hold_the_corpus_and_nothing_else(place: Path, tmp_path: Path) -> None:
    """What is merged back out of the pairs is text of the training documents, in chunks that do
    not overlap within an epoch."""
    from polytask.mixture.documents import ChunkReader, TokenStore
    from polytask.train.distribution import Distribution

    given = config()
    plan, loaded, corpus = plan_pretraining(given, place)
    stores = TokenStore.write(tmp_path / "t", corpus.read_from(0), loaded.encode, 4, held_out=0.2)
    sizes = [size.length for size in plan.sizes]
    reader = ChunkReader(stores["train"], sizes, plan.mixture.rates, 0, plan.mixture.names)
    loader = PretrainLoader(plan, reader, loaded.model.feed, 8, 0, Distribution("cpu"))
    taken: dict[int, int] = {}
    for index in range(5):
        pairs = loader.pairs(index)
        assert pairs.source is not None
        for row, source in enumerate(pairs.source.tolist()):
            number = taken.get(source, 0)
            taken[source] = number + 1
            chunk = reader.take(source, [number])[0]
            expected = [t for t in chunk.tolist() if t != 4]
            assert restored(pairs.input(row), pairs.target(row), plan.specials) == expected
    assert loader.counter.before(40).tolist() == [taken.get(i, 0) for i in range(len(sizes))]
    for made in held_out_pairs(given, plan, stores["valid"]).values():
        assert (made.input_lengths <= 48).all()


def test_the_command_checks_trains_and_tells(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place / "mine.yaml"
    given = config().model_dump(mode="json", exclude={"name"})
    path.write_text(json.dumps(given))
    out = str(tmp_path)
    assert main(["pretrain", str(path), "--out", out, "--check"]) == 0
    told = capsys.readouterr().out
    assert "chunks of 51: input up to 48, target up to 12" in told
    assert "all checks passed" in told
    assert not (tmp_path / "mine").exists()
    assert main(["pretrain", str(path), "--out", out, "--json", "--set", "train.steps=2"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["steps"] == 2
    assert main(["pretrain", str(path), "--out", out, "--set", "seed=3"]) == 2
    assert "another configuration (seed differ)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"objective": "ul2"}, ConfigError, "no objective .ul2., .*bart. Did you mean"),
        ({"objective": {"denoisers": []}}, ConfigError, "preset or denoisers"),
        (
            {"objective": {"denoisers": [{"kind": "span_corruption", "rate": "uniform"}]}},
            ConfigError,
            "for prefix_lm",
        ),
        ({"train": {"epochs": 2}}, ConfigError, "train.steps"),
        ({"model": {"hub": "x", "fresh": {}}}, ConfigError, "not both"),
        ({"model": {"hub": "./nowhere"}}, ConfigError, "no folder"),
        ({"model": {"hub": "decoder", "architecture": "encdec"}}, ConfigError, "is a decoder"),
        ({"model": {"hub": "decoder"}, "inputs_len": 400}, ConfigError, "positions for 256"),
        ({"model": {"hub": "decoder"}, "targets_len": 9}, ConfigError, "encoder-decoders"),
        ({"targets_len": 9}, ConfigError, "it needs at least"),
        ({"corpus": "nothing"}, DataError, "there is no"),
    ],
)
def test_mistakes_are_named_before_anything_long(
    place: Path, given: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        plan_pretraining(config(**given), place)


def test_a_corpus_that_is_too_small_is_named(place: Path, tmp_path: Path) -> None:
    small = config(corpus={"path": "texts/00.txt"}, held_out=0.0, inputs_len=3000)
    with pytest.raises(DataError, match=r"tokens, .* of them for the denoiser"):
        pretrain(small, tmp_path / "run", place)


def test_a_folder_of_something_else_is_not_touched(place: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(CheckpointError, match="does not remove it"):
        pretrain(config(), tmp_path / "run", place, fresh=True)
    assert (tmp_path / "run" / "thesis.txt").is_file()
