"""Localizing skills of Hugging Face checkpoints, in Python and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
import transformers

from polytask import cli
from polytask.errors import ConfigError, MergeError, UserError
from polytask.merge.graft_delta import SparseDelta
from polytask.pipeline.localize import load_localize_config, localize
from polytask.pipeline.localize_config import LocalizeConfig

TEMPLATE = "{text} it was {mask} ."
WORDS = {"bad": "terrible", "good": "great"}


def encoded(texts: list[str]) -> Any:
    return tiny.tokenizer()(texts, padding=True, return_tensors="pt")


def head_logits(model: Any, texts: list[str]) -> torch.Tensor:
    made: torch.Tensor = model(**encoded(texts)).logits
    return made


def word_logits(model: Any, texts: list[str]) -> torch.Tensor:
    tokens = encoded([TEMPLATE.format(text=t, mask="[MASK]") for t in texts])
    scores = model(**tokens).logits[tokens["input_ids"] == 4]
    return scores[:, tiny.tokenizer().convert_tokens_to_ids(["terrible", "great"])]


def next_logits(model: Any, texts: list[str]) -> torch.Tensor:
    tokens = encoded([f"{t} it was" for t in texts])
    last = tokens["attention_mask"].sum(1) - 1
    scores = model(**tokens).logits[torch.arange(len(texts)), last]
    return scores[:, tiny.tokenizer().convert_tokens_to_ids(["terrible", "great"])]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned: with a head. prompt-base, prompt-tuned: masked. gpt-base, gpt-tuned: causal."""
    folder = tmp_path_factory.mktemp("localize")
    model = tiny.bert(folder / "base", "BertForSequenceClassification")
    tiny.tune(model, head_logits, folder / "tuned")
    model = tiny.bert(folder / "prompt-base", "BertForMaskedLM", seed=1)
    tiny.tune(model, word_logits, folder / "prompt-tuned")
    model = tiny.gpt2(folder / "gpt-base", seed=2)
    tiny.tune(model, next_logits, folder / "gpt-tuned")
    tiny.write_rows(folder / "rows.jsonl", tiny.sentences(120, seed=5))
    tiny.write_rows(folder / "more.jsonl", tiny.sentences(40, seed=6))
    return folder


def config(home: Path, kind: str = "", **values: Any) -> LocalizeConfig:
    words = {} if not kind else {"labels": WORDS, "template": TEMPLATE}
    if kind == "gpt-":
        words["template"] = "{text} it was {mask}"
    given = {
        "base": str(home / f"{kind}base"),
        "finetuned": str(home / f"{kind}tuned"),
        "data": str(home / "rows.jsonl"),
        "shifted": {"more": str(home / "more.jsonl")},
        "sparsity": 0.05,
        "steps": 6,
        **words,
    }
    return LocalizeConfig(**{**given, **values})


@pytest.mark.parametrize("kind", ["", "prompt-", "gpt-"])
def test_a_graft_keeps_the_skill_of_heads_masks_and_next_words(
    home: Path, tmp_path: Path, kind: str
) -> None:
    found = localize(config(home, kind), tmp_path / "out")
    rows = {(s.model, s.set): s for s in found.scores}
    assert rows["fine-tuned", "test"].accuracy > 0.9
    assert rows["fine-tuned", "more"].agreement == 1
    assert rows["pretrained", "test"].accuracy < 0.8
    assert rows["graft", "test"].accuracy > rows["pretrained", "test"].accuracy
    assert 0 < len(found.graft) <= int(0.05 * found.graft.layout.size) + 1
    assert not any("embeddings" in name or "wte" in name for name in found.graft.layout.shapes)
    for name in (
        "graft.safetensors",
        "localize.json",
        "report.html",
        "reliability.png",
        "bits.png",
    ):
        assert (tmp_path / "out" / name).is_file()
    assert not (tmp_path / "out" / "mask.safetensors").exists()
    assert json.loads((tmp_path / "out" / "localize.json").read_text()) == found.to_dict()


def test_the_file_applied_to_the_base_is_the_graft_that_was_judged(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = localize(config(home), tmp_path / "out")
    call = ["graft", "apply", str(tmp_path / "out" / "graft.safetensors")]
    call += ["--base", str(home / "base"), "--out", str(tmp_path / "model")]
    assert cli.main([*call, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["changed"] == len(found.graft)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = tiny.sentences(40, seed=6)
    with torch.no_grad():
        tokens = tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt")
        guess = model(**tokens).logits.argmax(1).tolist()
    share = (
        sum(model.config.id2label[g] == r["label"] for g, r in zip(guess, rows, strict=True)) / 40
    )
    expected = next(s for s in found.scores if (s.model, s.set) == ("graft", "more"))
    assert share == pytest.approx(expected.accuracy)
    assert cli.main(call) == 2
    assert "exists" in capsys.readouterr().err


def test_localizing_from_the_command_line(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "my.yaml").write_text(
        "base: prompt-base\nfinetuned: prompt-tuned\ndata: rows.jsonl\nsparsity: 0.9\n"
        f"labels: {{bad: terrible, good: great}}\ntemplate: '{TEMPLATE}'\n"
    )
    call = ["localize", str(home / "my.yaml"), "--sparsity", ".02", "--steps", "4"]
    call += ["--shifted", f"more={home / 'more.jsonl'}", "--set", "mask.step_size=9"]
    assert cli.main([*call, "--out", str(tmp_path / "one"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["share"] <= 0.02
    assert len(told["trace"]) == 5
    assert {row["set"] for row in told["scores"]} == {"test", "more"}
    assert cli.main([*call, "--seed", "1"]) == 2  # no such option: seed is --set seed=1
    capsys.readouterr()
    more = [*call, "--set", "seed=1", "--set", "name=other", "--out", str(tmp_path / "two")]
    assert cli.main(more) == 0
    shown = capsys.readouterr().out
    assert "fine-tuned" in shown and "step 4" in shown
    paths = [str(tmp_path / name / "graft.safetensors") for name in ("one", "two")]
    assert cli.main(["graft", "overlap", *paths, "--json", "--out", str(tmp_path / "page")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["overlap"][0][0] == 1
    assert (tmp_path / "page" / "overlap.html").is_file()
    united = tmp_path / "both.safetensors"
    assert cli.main(["graft", "union", *paths, "--out", str(united)]) == 0
    one, two = (SparseDelta.load(Path(path)) for path in paths)
    assert len(SparseDelta.load(united)) == len(one) + len(two.without(one))
    call = ["graft", "purge", paths[0], "--model", str(home / "prompt-tuned")]
    call += ["--base", str(home / "prompt-base"), "--out", str(tmp_path / "purged")]
    assert cli.main(call) == 0
    load = transformers.AutoModelForMaskedLM.from_pretrained
    purged, base = (load(p).state_dict() for p in (tmp_path / "purged", home / "prompt-base"))
    tuned = load(home / "prompt-tuned").state_dict()
    assert torch.equal(one.taken(purged), one.taken(base))
    differing = sum(int((purged[k] != tuned[k]).sum()) for k in purged if k in one.layout.shapes)
    assert differing == int((one.taken(tuned) != one.taken(base)).sum())
    capsys.readouterr()
    assert cli.main(["graft", "show", paths[0], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sum(cell["bits"] for cell in told["bits"]) == told["count"]


def test_an_interrupted_call_goes_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = localize(config(home), tmp_path / "whole")

    def killed(text: str) -> None:
        if text.startswith("step 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        localize(config(home), tmp_path / "cut", say=killed)
    told: list[str] = []
    resumed = localize(config(home), tmp_path / "cut", say=told.append)
    assert [t.split(":")[0] for t in told if t.startswith("step")] == ["step 4", "step 5", "step 6"]
    assert resumed.trace == whole.trace
    assert torch.equal(resumed.graft.indices, whole.graft.indices)


def test_movement_alone_and_the_published_trainer(home: Path, tmp_path: Path) -> None:
    moved = localize(config(home, steps=0), tmp_path / "moved")
    assert moved.trace == ()
    assert len(moved.graft) == int(0.05 * moved.graft.layout.size)
    published = localize(config(home, official=True, steps=3, lr=1e6), tmp_path / "official")
    assert published.trace[0].score is None


def test_plain_files_of_tensors_are_grafted_too(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from polytask.merge.graft import Graft
    from polytask.pipeline.graft_files import apply_graft, purge_graft

    base = {"w": torch.zeros(4), "n": torch.tensor(3)}
    tuned = {"w": torch.tensor([0.0, 2.0, 1.0, 0.5]), "n": torch.tensor(3)}
    save_file(base, tmp_path / "base.safetensors", {"format": "pt"})
    save_file(tuned, tmp_path / "tuned.safetensors")
    graft = Graft.between(base, tuned, count=2)
    made = graft.sparse(graft.gamma_b)
    apply_graft(str(tmp_path / "base.safetensors"), made, tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["w"].tolist() == [0, 2, 1, 0]
    paths = str(tmp_path / "tuned.safetensors"), str(tmp_path / "base.safetensors")
    purge_graft(*paths, made, tmp_path / "purged.safetensors")
    assert load_file(tmp_path / "purged.safetensors")["w"].tolist() == [0, 0, 0, 0.5]


# -- mistakes


def failing(home: Path, tmp_path: Path, **values: Any) -> str:
    with pytest.raises(UserError) as caught:
        localize(config(home, **values), tmp_path / "out")
    assert not (tmp_path / "out" / "graft.safetensors").exists()
    return str(caught.value)


def test_mistakes_are_named_before_anything_is_learned(home: Path, tmp_path: Path) -> None:
    assert "smallest usable sparsity" in failing(home, tmp_path, sparsity=1e-9)
    assert "equals the base" in failing(
        home, tmp_path, kind="prompt-", finetuned=str(home / "prompt-base")
    )
    assert "no column 'txt'" in failing(home, tmp_path, text="txt")
    wrong = tiny.write_rows(tmp_path / "w.jsonl", [{"text": "a", "label": "god"}] * 9)
    assert "Did you mean 'good'" in failing(home, tmp_path, data=str(wrong))
    assert "there is no folder" in failing(home, tmp_path, base="./nowhere")
    assert "not one token" in failing(
        home, tmp_path, kind="prompt-", labels={"bad": "x", "good": "y"}
    )
    same = {"bad": "great", "good": "great"}
    assert "same word" in failing(home, tmp_path, kind="prompt-", labels=same)
    assert "read" in failing(home, tmp_path, kind="gpt-", template="{text} {mask} yes")
    assert "leaves out" in failing(
        home, tmp_path, kind="prompt-", exclude=["*.1.*"], outside="error"
    )
    masked = tiny.write_rows(
        tmp_path / "m.jsonl", [{"text": "the [MASK]", "label": "good"} for _ in range(9)]
    )
    assert "needs one [MASK]" in failing(home, tmp_path, kind="prompt-", data=str(masked))


def test_another_base_is_refused(home: Path, tmp_path: Path) -> None:
    other = transformers.BertConfig(
        vocab_size=26,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=40,
    )
    transformers.BertModel(other).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises((MergeError, ConfigError), match=r"shape|no base of|size"):
        localize(config(home, base=str(tmp_path / "other")), tmp_path / "out")


def test_configurations_are_checked(home: Path, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("base: a\nfinetuned: b\ndata: c\nsparsty: 0.1\n")
    with pytest.raises(ConfigError, match="Did you mean 'sparsity'"):
        load_localize_config(tmp_path / "my.yaml")
    with pytest.raises(ValueError, match="template needs"):
        config(home, "prompt-", template="{text}")
    with pytest.raises(ValueError, match="the name 'test' is taken"):
        config(home, shifted={"test": "x"})


def test_long_texts_are_cut_and_prompts_are_not(home: Path) -> None:
    from polytask.pipeline.localize_models import Example, load_classifier

    task = load_classifier(config(home, "prompt-", max_length=12))
    batch = task.encode([Example(("the film was very dull and cold and grim the day",), 0)] * 2)
    assert batch.tokens["input_ids"].shape[1] == 12
    assert (batch.tokens["input_ids"][torch.arange(2), batch.at] == 4).all()
    word = tiny.tokenizer().convert_tokens_to_ids(["terrible", "great"])
    assert task.words is not None and task.words.tolist() == word
