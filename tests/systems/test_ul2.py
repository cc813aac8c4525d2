"""System 33: what its tests ask, who is judged how, and the arms at smoke size."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from torch.nn import functional

from polytask import systems
from polytask.cli import main
from polytask.objectives.denoising import noise_mask
from polytask.objectives.pairs import Pairs
from polytask.objectives.ul2 import restored
from polytask.study import Budget
from polytask.systems.testbeds import denoisers as bed
from polytask.systems.testbeds import denoisers_downstream as downstream
from polytask.systems.testbeds.prose import Prose, _stream
from polytask.tasks.tokenizer_training import train_tokenizer

module = import_module("polytask.systems.33_ul2")
system = systems.load("ul2")
TINY = replace(module.SMOKE, held_out=12)


@pytest.fixture(scope="module")
def text() -> Prose:
    """Python's manual in place of the dictionary: it is on every machine."""
    manual = [str(topic) for topic in topics.values()]
    codec = train_tokenizer(manual[:20], 310, sentinels=32)
    cut = {"train": manual[:40], "valid": manual[40:50], "test": manual[50:60]}
    return Prose(codec, {part: _stream(codec, texts) for part, texts in cut.items()})  # type: ignore[misc]


@pytest.fixture(autouse=True)
def own_cache(
    text: Prose, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bed, "cache_root", lambda: tmp_path_factory.getbasetemp() / "ul2")
    monkeypatch.setattr(bed, "prose", lambda vocab: text)
    monkeypatch.setattr(downstream, "here", lambda: False)
    monkeypatch.setattr(bed, "_key", lambda bench, arm, lr: f"{bench.tokens}-{arm}-{lr}")


def test_claims_are_the_sheets_pass_lines() -> None:
    found = {(c.better, c.than, c.metric, c.kind) for c in system.claims}
    assert found == {
        ("mod", "span corruption", "largest regret", "claim"),
        ("mod", "prefix LM", "largest regret", "claim"),
        ("mod", "wrong mode", "test continuation", "ablation"),
        ("mod", "wrong mode", "test infill 50", "ablation"),
        ("mod", "no S", "test continuation", "ablation"),
        ("mod", "no modes", "mode effect continuation", "ablation"),
    }
    assert all(c.higher_is_better == c.metric.startswith("mode") for c in system.claims)


@pytest.mark.parametrize("test", bed.TESTS)
def test_every_form_asks_for_the_same_tokens(text: Prose, test: bed.Test) -> None:
    length = bed.test_length(TINY, test)
    chunks = text.windows("test", length, bed._HELD_OUT, np.arange(TINY.held_out))
    wanted = []
    for form in bed.FORMS[test]:
        pairs = bed.test_pairs(text, TINY, test, form, None, "test")
        asked = [
            pairs.target(i)[pairs.is_original[a:b]].tolist()
            for i, (a, b) in enumerate(zip(pairs.target_offsets, pairs.target_offsets[1:]))
        ]
        wanted.append(asked)
        for row in range(len(pairs)):  # and everything else is given
            whole = restored(pairs.input(row), pairs.target(row), text.specials)
            assert whole == [t for t in chunks[row].tolist() if t != text.codec.end]
    assert all(asked == wanted[0] for asked in wanted)
    share = np.mean([len(row) for row in wanted[0]]) / length
    assert share == pytest.approx(
        {"continuation": 0.25, "infill 15": 0.15, "infill 50": 0.5}[test], abs=0.02
    )


def test_left_to_right_gives_what_precedes_a_gap_and_never_what_follows(text: Prose) -> None:
    chunks = np.arange(100, 120)[None]
    mask = noise_mask(20, 0, [0], 3, 0.3)
    pairs = bed.left_to_right(chunks, mask, text.specials, "R")
    first = int(np.argmax(mask[0]))
    assert pairs.input(0).tolist() == [text.specials.modes["R"], *range(100, 100 + first)]
    assert pairs.target(0).tolist() == [*range(100 + first, 120), text.codec.end]
    assert pairs.is_original.tolist() == [*mask[0, first:], False]


def test_scores_are_of_text_among_text(text: Prose) -> None:
    """Against the softmax written out; sentinels and ends have no say."""
    model = bed.base_model(TINY)
    special = sorted({*text.codec.sentinels, *text.codec.modes, text.codec.end})
    pairs = Pairs.of([[60, 61]], [[62, text.codec.end, 63, text.codec.sentinels[0], 64]],
                     [[True, True, True, False, True]])  # fmt: skip
    found = bed.honest_nll(model, pairs, special)
    logits = model.logits(model.feed(pairs)).detach().double()
    logits[:, special] = -torch.inf
    rows, labels = [0, 2, 4], torch.tensor([62, 63, 64])
    expected = functional.cross_entropy(logits[rows], labels)
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_the_mixture_is_judged_by_its_modes_and_others_by_their_best() -> None:
    found = {
        "continuation/prefix/S": 3.0, "continuation/prefix/R": 4.0, "continuation/prefix/X": 6.0,
        "continuation/span/S": 1.0,
    }  # fmt: skip
    assert bed.best("mod", found, "continuation") == 3.0
    assert bed.best("no-s", found, "continuation") == 1.0
    gaps = {"infill 15/span/-": 3.0, "infill 15/left/-": 2.0}
    assert bed.best("plm", gaps, "infill 15") == 3.0
    assert bed.best("plm", gaps, "infill 15", blind=True) == 2.0
    assert bed.wrong_mode(found, "continuation") == 5.0


def test_arms_start_from_one_model_and_see_as_much() -> None:
    trained = {arm: bed.train(TINY, arm, 1e-3, 1) for arm in bed.ARMS}
    tokens = [t.done.tokens for t in trained.values()]
    assert max(tokens) - min(tokens) < 110
    base = bed.base_model(TINY).state_dict()
    for found in trained.values():
        assert found.model.architecture == "prefix"
        assert set(found.model.state_dict()) == set(base)
    assert set(trained["no-s"].curves) < set(trained["mod"].curves)
    assert len(trained["mod"].curves) == 7
    assert list(trained["sc"].curves) == ["spans (3, 0.15)"]


def test_no_mode_tokens_are_written_by_the_silent_arm(text: Prose) -> None:
    marks = bed.specials(text, "silent")
    mixed = bed.mixture(TINY, "silent")
    sizes = [bed.chunk_length(TINY, d) for d in mixed.denoisers]
    pairs = mixed.make(
        lambda at, rows: text.windows("train", sizes[at], 0, rows), marks, 0, np.arange(60)
    )
    assert not set(pairs.input_ids.tolist()) & set(text.codec.modes)
    assert set(bed.mixture(TINY, "mod").names) == set(mixed.names)


def test_arms_at_smoke_size() -> None:
    arms = system.arms("smoke")
    budget = system.budget("smoke")
    results = {name: arm.run(1, budget) for name, arm in arms.items()}
    assert results["mod"].metrics == arms["mod"].run(1, Budget(tokens=budget.tokens)).metrics
    least = min(results[name].metrics["test infill 15"] for name in module.RIVALS)
    for name in module.RIVALS:
        metrics = results[name].metrics
        assert metrics["regret infill 15"] == pytest.approx(metrics["test infill 15"] - least)
        assert metrics["largest regret"] >= 0
        assert metrics["largest regret (left to right too)"] >= 0
    assert min(results[n].metrics["regret continuation"] for n in module.RIVALS) == 0
    wrong = results["wrong mode"].metrics["test continuation"]
    right = results["mod"].metrics["test continuation"]
    assert results["mod"].metrics["mode effect continuation"] == pytest.approx(wrong - right)
    spent = [r.spent.tokens for r in results.values()]
    assert max(spent) / min(spent) < 1.05


def test_finetuning_learns_fields_and_second_halves(
    text: Prose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Definitions whose first words give the field away."""
    words = {0: "an act of doing", 3: "a part of the body", 9: "a substance made"}

    def read(text: Prose, part: str, most: int) -> downstream.Glosses:
        fields = np.array([0, 3, 9] * 20)
        return downstream.Glosses(text.codec.encode([words[f] for f in fields.tolist()]), fields)

    monkeypatch.setattr(downstream, "read", read)
    found = read(text, "train", 0)
    pairs = downstream.classify(text, found, [1], 10, modes=True)
    assert pairs.input(0)[0] == text.specials.modes["R"]
    assert len(pairs.input(0)) == 10
    assert pairs.target(0).tolist() == [downstream.label_tokens(text)[3]]
    halves = downstream.complete(text, found, [0], 48, modes=False)
    assert [*halves.input(0), *halves.target(0)] == found.ids[0]
    model = bed.train(TINY, "mod", 1e-3, 1).model
    before = downstream.accuracy(text, model, found, 40, True)
    after = downstream.finetuned(text, model, True, 40, 0, 60)
    assert after["field accuracy"] > max(0.6, before)
    assert after["completion"] < 4.5  # ln 310 is 5.7


@pytest.mark.slow
def test_the_command_pretrains_on_a_users_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts").mkdir()
    for name, topic in list(topics.items())[:15]:
        (tmp_path / "texts" / f"{name}.txt").write_text(str(topic))
    config = {
        "corpus": "texts",
        "objective": {"preset": "ul2-20b", "spans": [3, 5, 16]},
        "model": {"fresh": {"dim": 16, "layers": 1, "heads": 2, "vocab": 340}},
        "inputs_len": 48,
        "sentinels": 40,
        "train": {"steps": 3, "batch_size": 8, "progress": False, "device": "cpu"},
    }
    (tmp_path / "mine.yaml").write_text(json.dumps(config))
    given = ["run", "ul2", "--data", str(tmp_path / "mine.yaml"), "--out", str(tmp_path), "--json"]
    assert main([*given, "--steps", "2"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["figures"]["plan"]["steps"] == 2
    assert all(Path(path).is_file() for path in outcome["files"])
    (tmp_path / "plain.yaml").write_text(json.dumps({**config, "objective": "prefix_lm"}))
    given[3] = str(tmp_path / "plain.yaml")
    assert main(given) == 2
    assert "has no modes" in capsys.readouterr().err
