"""The page of benchmarks says what benchmarks/results.json says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_the_results(report: ModuleType) -> None:
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text("utf-8"))
    assert (ROOT / "docs" / "benchmarks.md").read_text("utf-8") == report.page(results)


def test_missed_aims_are_named_first(report: ModuleType) -> None:
    results = {
        "bench_trainer": {
            "aims": [
                {"what": "fast enough", "ratio": 1.0, "aim": ">= 0.97", "": "met"},
                {"what": "too slow", "ratio": 0.5, "aim": ">= 0.97", "": "missed"},
            ],
            "versions": {"python": "3.11", "machine": "x86_64"},
            "machine": {
                "processor": "some processor",
                "cores": 2,
                "memory_gb": 8,
                "system": "Linux",
                "load": 0.1,
                "load_after": 0.2,
            },
            "settings": {"clock": "wall clock", "repeats": 7},
            "trainer": [{"way": "polytask", "ms_per_step": 1234.5, "steps": 1000}],
        }
    }
    page = report.page(results)
    assert "1 of 2 aims are met. **Missed:**\n\n- too slow\n" in page
    assert "some processor, 2 cores, 8 GB" in page
    assert "| polytask | 1,234 | 1,000 |" in page
