"""Every example runs from the command line, cut short."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from polytask.data import embedded

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = {
    "three_csv_files.py": ["--steps", "2"],
    "adapt_with_32_examples.py": ["--steps", "2", "--shots", "4"],
    "continue_pretraining.py": ["--steps", "1", "--tokens", "64", "--examples", "1"],
    "forecast_demand.py": ["--pretraining", "2", "--steps", "2", "--days", "1"],
    "neuroformer_recording.py": ["--steps", "2", "--seconds", "30"],
    "forecast_sales.py": ["--pretraining", "2", "--steps", "2"],
}
# What is fetched, not installed: hundreds of megabytes that tests do not download.
NEEDS = {"forecast_demand.py": "electricity-demand", "continue_pretraining.py": "smollm2"}


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_the_example_runs(script: Path, tmp_path: Path) -> None:
    if script.name in NEEDS and embedded.state(NEEDS[script.name]) is None:
        pytest.skip(f"{NEEDS[script.name]} is not on this machine")
    result = subprocess.run(
        [sys.executable, str(script), *SHORT.get(script.name, [])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
