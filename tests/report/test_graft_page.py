"""The page of a graft: its sentence, its pictures, and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from polytask.report.graft_page import (
    bits_picture,
    graft_report,
    overlap_report,
    reliability_picture,
    trace_picture,
)


def score(model: str, accuracy: float, ece: float) -> dict[str, Any]:
    return {
        "model": model,
        "set": "test",
        "n": 100,
        "accuracy": accuracy,
        "ece": ece,
        "overconfidence": None,
        "agreement": 0.9,
    }


def found(**changes: Any) -> dict[str, Any]:
    diagram = {"count": [0, 40, 60], "confidence": [None, 0.6, 0.9], "accuracy": [None, 0.5, 0.95]}
    values = {
        "count": 30,
        "of": 1000,
        "share": 0.03,
        "scores": [
            score("pretrained", 0.5, 0.2),
            score("fine-tuned", 0.9, 0.08),
            score("movement", 0.6, 0.1),
            score("graft", 0.88, 0.02),
        ],
        "bits": [
            {"layer": None, "module": "pooler", "bits": 0, "size": 10},
            {"layer": 0, "module": "a <b>", "bits": 20, "size": 500},
            {"layer": 1, "module": "a <b>", "bits": 10, "size": 490},
        ],
        "diagrams": {"fine-tuned": diagram, "graft": diagram},
        "trace": [
            {"step": 0, "score": 0.6, "count": 30, "added": 20, "removed": 0},
            {"step": 1, "score": 0.7, "count": 12, "added": 3, "removed": 1},
        ],
        "notes": ["2 buffers <changed>"],
    }
    return {**values, **changes}


def test_the_lead_says_how_much_of_the_gain_is_kept(tmp_path: Path) -> None:
    text = graft_report(tmp_path, "spam & eggs", found()).read_text()
    assert "30 of 1,000 parameters (3.000%) keep 95% of what fine-tuning gained" in text
    assert "spam &amp; eggs" in text
    assert "2 buffers &lt;changed&gt;" in text
    for name in ("reliability", "bits", "mask"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 600


def test_without_a_gain_there_is_no_skill_to_keep(tmp_path: Path) -> None:
    scores = [score(m, 0.5, 0.1) for m in ("pretrained", "fine-tuned", "movement", "graft")]
    text = graft_report(tmp_path, "spam", found(scores=scores, trace=[], diagrams={})).read_text()
    assert "no skill to keep" in text
    assert not (tmp_path / "mask.png").exists()


def test_movement_that_is_never_beaten_is_said(tmp_path: Path) -> None:
    trace = [dict(step, score=s) for step, s in zip(found()["trace"], (0.9, 0.7), strict=True)]
    assert "moved most were kept" in trace_picture(tmp_path, trace).caption
    trace[0]["score"] = None  # the published trainer does not judge the start
    assert "ring" in trace_picture(tmp_path, trace).caption


def test_many_modules_are_summed_up(tmp_path: Path) -> None:
    cells = [{"layer": 0, "module": f"part{i}", "bits": i, "size": 50} for i in range(30)]
    svg = bits_picture(tmp_path, cells, sum(range(30))).svg
    assert "(others)" in svg
    assert "part29" in svg
    assert "part3<" not in svg


def test_empty_bins_and_one_model_are_drawn(tmp_path: Path) -> None:
    diagram = {"count": [0, 0], "confidence": [None, None], "accuracy": [None, None]}
    assert "ECE 0.000" in reliability_picture(tmp_path, {"graft": diagram}).svg


def test_overlap_pages_show_the_matrix(tmp_path: Path) -> None:
    page = overlap_report(tmp_path / "new", ["a", "b"], [[1, 0.25], [None, 1]], ["a: 3", "b: 0"])
    assert "0.25" in page.read_text()
    assert (tmp_path / "new" / "overlap.png").is_file()


@pytest.mark.parametrize("count", [0, 30])
def test_a_graft_without_bits_has_a_map(tmp_path: Path, count: int) -> None:
    cells = [{"layer": 0, "module": "a", "bits": count, "size": 50}]
    assert bits_picture(tmp_path, cells, count).svg
