"""The page of a pretraining run: losses by denoiser, pairs with their spans, nothing unescaped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from polytask.objectives.denoising import Specials, span_corruption
from polytask.report.drawing import looks
from polytask.report.pretrain_page import marked, read_losses, sentence, shown, write_page

SPECIALS = Specials((100, 101, 102, 103), 99, {"R": 110})


def word(token: int) -> str:
    return f"<{token}>"


def test_losses_of_training_and_of_held_out_text(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "kind": "event"},
        {"step": 5, "kind": "train", "terms": {"R": {"nll": 3.5, "z": 0.1}, "other": {"nll": 1.0}}},
        {"step": 10, "kind": "eval", "task": "R", "metrics": {"nll": 3.25}},
        {"step": 10, "kind": "train", "terms": {"S": {"nll": 2.0}}},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained, held_out = read_losses(path, ["R", "S"])
    assert trained == {"R": [(5, 3.5)], "S": [(10, 2.0)]}
    assert held_out == {"R": [(10, 3.25)], "S": []}
    assert read_losses(tmp_path / "none.jsonl", ["R"]) == ({"R": []}, {"R": []})


def test_sentinels_modes_and_ends_are_marks_and_text_is_escaped() -> None:
    text = marked(np.array([110, 7, 100, 99]), None, word, SPECIALS)
    assert '<span class="mark mode">R</span>&lt;7&gt;<span class="mark">0</span>' in text
    assert text.endswith('<span class="mark end">end</span>')
    target = marked(np.array([100, 8]), np.array([False, True]), word, SPECIALS)
    assert target.endswith('<span class="spoken">&lt;8&gt;</span>')
    assert "more tokens" in marked(np.arange(500), None, word, SPECIALS)


def test_pairs_wear_the_colour_of_their_denoiser() -> None:
    pairs = span_corruption(np.arange(20)[None], SPECIALS, 0, [0], 3, 0.3, mode="R")
    look = looks(["R (3, 0.3)"])["R (3, 0.3)"]
    text = shown("R (3, 0.3)", look, pairs, word, SPECIALS)
    assert f"--tone:{look.colour}" in text
    assert text.count('class="spoken"') == 6
    assert text.count('class="mark">0<') == 2  # where it was, and before what it stands for


def test_the_sentence_says_what_happened() -> None:
    before, after = ({"a": {"nll": 3.0}, "b": {"nll": 2.0}}, {"a": {"nll": 2.0}, "b": {"nll": 2.5}})
    assert "falls by 0.25 nats" in sentence(before, after)
    assert "lower for 1 of 2" in sentence(before, after)
    assert "No text was held out" in sentence({}, {})


def test_the_page_is_whole(tmp_path: Path) -> None:
    record: dict[str, Any] = {
        "before": {"R": {"nll": 3.0}},
        "after": {"R": {"nll": 2.0}},
        "plan": {
            "model": "a <model>", "architecture": "encdec", "parameters": 12, "steps": 3,
            "examples": 4,
        },
        "ledger": [{"task": "R", "tokens": 70}, {"task": "total", "tokens": 70}],
        "text": [{"denoiser": "R", "chunks": 2, "tokens": 40, "epochs": 1}],
    }  # fmt: skip
    line = {"step": 2, "kind": "train", "terms": {"R": {"nll": 2.5}}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    pairs = span_corruption(np.arange(20)[None], SPECIALS, 0, [0], mode="R")
    page = write_page(tmp_path, record, ["R"], {0: pairs}, word, SPECIALS)
    text = page.read_text(encoding="utf-8")
    assert "a &lt;model&gt;" in text
    assert "What was read" in text
    assert "−1.000" in text
    assert (tmp_path / "loss-by-denoiser.png").is_file()
