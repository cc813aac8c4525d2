"""The page of a merge holds what is known and leaves out what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polytask.report.merge_page import merge_report

RECORD: dict[str, Any] = {
    "models": {"one & two": "x", "three": "y"},
    "method": "ties",
    "tensors": 4,
    "notes": ["a note <b>"],
    "recipe": {"method": "ties"},
    "parameters": {"density": 0.2},
}


def figure(name: str, layer: int | None, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "layer": layer,
        "kind": name,
        "count": 10,
        "sizes": (0.1, 0.2),
        "conflict": 0.3,
        "overlap": 0.1,
        "coefficients": (0.5, -0.2),
        **more,
    }


def test_everything_known_is_drawn(tmp_path: Path) -> None:
    figures = [figure(f"w{i % 2}", i // 2) for i in range(8)] + [figure("emb", None)]
    figures.append(figure("empty", None, conflict=float("nan"), overlap=float("nan")))
    compared = {
        "columns": ["base", "merge"],
        "rows": [
            {
                "task": f"t{i}",
                "model": "three",
                "metric": "accuracy",
                "higher_is_better": True,
                "rows": 30,
                "values": {"base": 0.5, "merge": 0.7},
                "gain": gain,
            }
            for i, gain in enumerate([(0.1, 0.05, 0.15), (-0.1, -0.2, -0.01), (0.0, -0.1, 0.1)])
        ],
        "scales": [[s, {f"t{i}": s / 2 for i in range(3)}] for s in (0.0, 0.5, 1.0)],
    }
    page = merge_report(tmp_path, "m", RECORD, figures, compared, {"entropy": {"all": [1, 0.5]}})
    text = page.read_text()
    assert "better on 1 of 3 tasks, worse on 1, and within chance on 1" in text
    assert "a note &lt;b&gt;" in text and text.count("<svg") == 6
    names = {"coefficients", "conflict", "overlap", "sizes", "scales", "trace-entropy"}
    assert {p.stem for p in tmp_path.glob("*.png")} == names


def test_without_a_base_there_is_no_anatomy(tmp_path: Path) -> None:
    text = merge_report(tmp_path, "m", RECORD, []).read_text()
    assert "Without a base there are no task vectors" in text and "<svg" not in text
    assert "What it is worth" not in text and "Who is in it" not in text


def test_many_kinds_of_tensor_share_a_row(tmp_path: Path) -> None:
    figures = [figure(f"kind{i}", i % 3, count=i + 1) for i in range(40)]
    text = merge_report(tmp_path, "m", RECORD, figures).read_text()
    assert "others" in text and "kind39" in text and ">kind3<" not in text
