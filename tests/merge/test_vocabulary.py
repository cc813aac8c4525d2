"""Rows mean tokens: aligned by string, with a report, or refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from merge_samples import WORDS, llama, plan_of, save, save_tokenizer, tree, tuned
from safetensors.torch import load_file

from polytask.errors import ConfigError, MergeError
from polytask.merge.output import write
from polytask.merge.vocabulary import difference, tokens_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def shuffled(home: Path, name: str, tokens: list[str], **more: int) -> dict[str, torch.Tensor]:
    """A model whose rows are those of `base`, each where `tokens` puts it; new tokens have rows of
    their own (constant 7 + row)."""
    base = load_file(home / "base" / "model.safetensors")
    model = llama(vocab_size=len(tokens), **more)
    state = model.state_dict()
    with torch.no_grad():
        for key in state:
            if key not in (EMBEDDING, HEAD):
                state[key].copy_(base[key])
        for row, token in enumerate(tokens):
            for key in (EMBEDDING, HEAD):
                known = token in WORDS
                state[key][row] = base[key][WORDS.index(token)] if known else 7.0 + row
    save(model, home / name, None)
    save_tokenizer(home / name, [t for t in tokens if not t.startswith("<")],
                   tuple(t for t in tokens if t.startswith("<")))  # fmt: skip
    return state


@pytest.fixture
def home(tmp_path: Path) -> Path:
    save(llama(), tmp_path / "base")
    return tmp_path


def test_rows_in_another_order_are_refused_with_counts(home: Path) -> None:
    order = [*WORDS[:5], *random.Random(0).sample(WORDS[5:], 35)]
    shuffled(home, "a", order)
    with pytest.raises(MergeError, match=r"a: its tokenizer differs .* tokens have another row"):
        plan_of(home)


@pytest.mark.parametrize("method", ["average", "ties", "task_arithmetic"])
def test_a_permuted_copy_merges_to_the_base_itself(home: Path, method: str) -> None:
    order = [*WORDS[:5], *random.Random(0).sample(WORDS[5:], 35)]
    shuffled(home, "a", order)
    shuffled(home, "b", WORDS)
    out = write(plan_of(home, method, vocabulary="base"), home / "out")
    found, want = load_file(out / "model.safetensors"), load_file(home / "base/model.safetensors")
    assert all(torch.equal(found[k], v) for k, v in want.items())
    (told,) = [
        line
        for line in json.loads((out / "vocabulary.json").read_text())["report"]
        if line.startswith("a:")
    ]
    moved = sum(WORDS[i] != token for i, token in enumerate(order))
    assert told == (
        f"a: {moved} of 40 tokens have another row, 0 are taken from elsewhere, 0 are given up"
    )


def test_a_row_that_an_expert_lacks_is_the_bases(home: Path) -> None:
    shuffled(home, "a", WORDS[:-3])
    out = write(plan_of(home, "task_arithmetic", vocabulary="base"), home / "out")
    found, base = load_file(out / "model.safetensors"), load_file(home / "base/model.safetensors")
    assert found[EMBEDDING].shape == (40, 32)
    assert torch.equal(found[EMBEDDING], base[EMBEDDING])


def test_the_union_has_everybodys_added_tokens_and_loads(home: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    one = shuffled(home, "a", [*WORDS, "<user>", "<bot>"])
    two = shuffled(home, "b", [*WORDS, "<bot>", "<tool>"])
    parameters = {"weight": [0.25, 0.75]}
    out = write(plan_of(home, "linear", vocabulary="union", parameters=parameters), home / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == 43 and model.lm_head.weight.shape == (43, 32)
    ids = tokenizer("w1 <user> <bot> <tool>")["input_ids"]
    assert ids[-3:] == [40, 41, 42]
    rows = model.get_input_embeddings().weight
    # <user> only a has, <tool> only b: their rows as they were; <bot> both have: weighted.
    assert torch.allclose(rows[40], one[EMBEDDING][40])
    assert torch.allclose(rows[42], two[EMBEDDING][41])
    want = 0.25 * one[EMBEDDING][41] + 0.75 * two[EMBEDDING][40]
    assert torch.allclose(rows[41], want)
    assert torch.allclose(rows[:40], load_file(home / "base/model.safetensors")[EMBEDDING])


def test_a_union_of_other_pieces_is_refused(home: Path) -> None:
    shuffled(home, "a", [*WORDS, "piece"])
    with pytest.raises(MergeError, match=r"1 tokens of its own vocabulary .*'piece'"):
        plan_of(home, vocabulary="union")


def test_another_models_tokenizer_can_be_the_one_that_stays(home: Path) -> None:
    order = [*WORDS[:5], *random.Random(1).sample(WORDS[5:], 35), "<user>"]
    state = shuffled(home, "a", order)
    plan = plan_of(home, "task_arithmetic", vocabulary="a", parameters={"weight": 1.0})
    out = write(plan, home / "out")
    assert (out / "tokenizer.json").read_bytes() == (home / "a/tokenizer.json").read_bytes()
    found = load_file(out / "model.safetensors")
    torch.testing.assert_close(found[EMBEDDING], state[EMBEDDING])
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 41
    with pytest.raises(ConfigError, match=r"no model 'ab'\. "):
        plan_of(home, vocabulary="ab")


def test_added_tokens_on_padding_rows_do_no_harm_and_are_noted(home: Path) -> None:
    save(llama(), home / "base", WORDS[:38])
    save(tuned(llama(), 1), home / "a", None)
    save_tokenizer(home / "a", WORDS[:38], ("<user>",))
    plan = plan_of(home)
    assert any("differs without harm: 1 tokens are additional" in note for note in plan.notes)


def test_alignment_needs_tokenizers_and_sizes(home: Path) -> None:
    save(tuned(llama(), 1), home / "a", None)
    with pytest.raises(MergeError, match=r"a: vocabularies cannot be aligned without its token"):
        plan_of(home, vocabulary="base")


def test_differences_are_counted() -> None:
    found = difference({"a": 0, "b": 2, "new": 1}, {"a": 0, "b": 1, "c": 2})
    assert (found.moved, found.missing, found.added) == (("b",), ("c",), ("new",))
    assert found.harmful and found.clashing == 1
    assert not difference({"a": 0}, {"a": 0})
    assert not difference({"a": 0, "x": 1}, {"a": 0}).harmful


def test_older_tokenizer_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[PAD]\nhello\n\nworld\n")
    assert tokens_of(tmp_path) == {"[PAD]": 0, "hello": 1, "": 2, "world": 3}
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "added_tokens.json").write_text('{"<x>": 2}')
    assert tokens_of(tmp_path) == {"a": 0, "b": 1, "<x>": 2}
    assert tokens_of(tmp_path / "none") is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(MergeError, match="cannot be read"):
        tokens_of(tmp_path)


def test_aligned_reading_is_the_same_in_any_pieces(home: Path) -> None:
    order = [*WORDS[:5], *random.Random(2).sample(WORDS[5:-2], 33), "<user>"]
    shuffled(home, "a", order)
    source = plan_of(home, vocabulary="base").sources[0]
    count = source.headers[EMBEDDING].count
    whole = torch.empty(count)
    source.read_into(EMBEDDING, whole)
    for start, size in ((0, 5), (7, 100), (31, 33), (count - 3, 3), (64, 64)):
        piece = torch.empty(size)
        source.read_into(EMBEDDING, piece, start)
        assert torch.equal(piece, whole[start : start + size])
    assert tree(home / "a")
