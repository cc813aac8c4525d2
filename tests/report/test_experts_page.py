"""The page of experts: what it says of overlap and collapse, and that it is whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from polytask.report.experts_page import experts_report, verdict


def record(tasks: int = 3, experts: int = 4, layers: int = 2, collapsed: bool = False) -> Any:
    even = [[1 / experts] * experts for _ in range(tasks)]
    entropy = [math.log(experts)] * tasks
    if collapsed:
        even[0] = [1.0] + [0.0] * (experts - 1)
        entropy[0] = 0.0
    overlap = [[1.0 if i == j else 0.25 for j in range(tasks)] for i in range(tasks)]
    return {
        "name": "<my> run",
        "router": "multi_gate",
        "k": 1,
        "usage": {
            "tasks": [f"task {t}" for t in range(tasks)],
            "experts": experts,
            "tokens": [100] * tasks,
            "layers": [
                {"block": 2 * n + 1, "share": even, "entropy": entropy, "overflow": 5 * n}
                for n in range(layers)
            ],
            "overlap": overlap,
        },
        "requests": {
            f"task {t}": {"flops": 1e6 * (t + 1), "bytes": 2e6, "all_bytes": 4e6}
            for t in range(tasks)
        },
    }


@pytest.mark.parametrize(("tasks", "experts", "layers"), [(3, 4, 2), (1, 1, 1), (45, 64, 9)])
def test_the_page_is_whole(tasks: int, experts: int, layers: int, tmp_path: Path) -> None:
    page = experts_report(tmp_path, record(tasks, experts, layers)).read_text()
    assert "&lt;my&gt; run" in page and "<my>" not in page
    assert page.count("<svg") == (3 if tasks > 1 else 2)
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert (tmp_path / "expert-use.png").stat().st_size > 5000
    assert (tmp_path / "request-cost.png").stat().st_size > 5000
    assert (tmp_path / "expert-overlap.png").is_file() == (tasks > 1)


def test_overlap_and_dropped_pairs_are_said() -> None:
    said = verdict(record())
    assert "share 25% of their use" in said
    assert "5 pairs of token and expert found no room" in said
    assert "Collapsed" not in said


def test_a_collapsed_router_is_named() -> None:
    assert "Collapsed onto 1 experts: 'task 0' in block 1" in verdict(record(collapsed=True))
