"""`polytask run flat-mtl` on a user's own table: two runs, their measurements, three pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from polytask.errors import ConfigError
from polytask.models.batch import Batch, Target, Terms
from polytask.systems import flat_curves, load
from polytask.systems.flat_run import FlatRunConfig, flat_run

CONFIG = """
tasks:
  kind: {data: rows.csv, inputs: {table: [a, b, c]}, target: kind}
  size: {data: rows.csv, inputs: {table: [a, b, c]}, target: size}
model: {dim: 16, layers: 1, heads: 2}
train: {steps: 12, batch_size: 16, log_every: 4, progress: false}
"""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    x = random.normal(size=(160, 3))
    lines = ["a,b,c,kind,size"]
    for a, b, c in x:
        lines.append(f"{a:.4f},{b:.4f},{c:.4f},{'up' if a + b > 0 else 'down'},{a - 2 * c:.4f}")
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    path = tmp_path / "my.yaml"
    path.write_text(CONFIG)
    return path


class Bowls(nn.Module):
    """Two tasks, L_t = a_t/2 |shared + head_t|^2: the rise uphill is known."""

    task_names = ("flat", "steep")
    curvature = (1.0, 9.0)

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Parameter(torch.tensor([1.0, -2.0]))
        self.own = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(2)])

    def shared_names(self) -> list[str]:
        return ["shared"]

    def head_names(self, task: int) -> list[str]:
        return [f"own.{task}"]

    def terms(self, batch: Batch) -> Terms:
        losses = torch.stack(
            [a / 2 * (self.shared + w).square().sum() for a, w in zip(self.curvature, self.own)]
        )
        task = batch.targets["regress"].task
        return Terms({"l": losses[task]}, {"l": task}, {"l": batch.targets["regress"].row})


def batch_of(tasks: list[int]) -> Batch:
    task = torch.tensor(tasks)
    row = torch.arange(len(tasks))
    target = Target(row[:, None], task, row, torch.zeros(len(tasks)))
    return Batch({}, {"regress": target}, task, row, len(tasks))


def test_the_rise_is_the_bowls_and_the_model_is_left_as_it_was() -> None:
    model = Bowls()
    model.train()
    found = flat_curves.measure(model, batch_of([0, 1, 1]), rhos=(0.1, 0.4))  # type: ignore[arg-type]
    for t, a in enumerate(Bowls.curvature):
        for column, rho in enumerate((0.1, 0.4)):
            # The loss depends on u = shared + head; both move, so u moves by sqrt(2) rho.
            length, step = 5**0.5, rho * 2**0.5
            rise = a / 2 * ((length + step) ** 2 - length**2)
            assert float(found.rise[t, column]) == pytest.approx(rise, rel=1e-5)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_task_without_rows_is_not_measured() -> None:
    found = flat_curves.measure(Bowls(), batch_of([1]))  # type: ignore[arg-type]
    values = flat_curves.plain_values(found, Bowls.task_names)
    assert values["flat"]["loss"] is None
    assert values["flat"]["rise"]["0.1"] is None
    assert values["steep"]["rise"]["0.1"] > 0
    json.dumps(values, allow_nan=False)


@pytest.mark.slow
def test_a_users_tasks_are_trained_both_ways_and_compared(data: Path, tmp_path: Path) -> None:
    told: list[str] = []
    config = FlatRunConfig(data=data, out=tmp_path / "runs", rho=0.1, rows=32, aggregator="pcgrad")
    outcome = flat_run(config, told.append)
    assert {path.name for path in outcome.files} == {
        "report.html",
        "sharpness.json",
        "sharpness.png",
        "training.png",
    }
    assert all(path.stat().st_size > 0 for path in outcome.files)
    for way in ("flat", "plain"):
        assert set(outcome.figures["scores"][way]) == {"kind", "size"}
        resolved = json.loads((tmp_path / "runs" / f"my-{way}" / "config.json").read_text())
        train = resolved["config"]["train"]
        assert train["aggregator"] == "pcgrad"
        assert (train["sharpness"] is not None) == (way == "flat")
    events = (tmp_path / "runs" / "my-flat" / "metrics.jsonl").read_text()
    assert '"sharpness"' in events
    assert len(outcome.lines) == 2
    json.dumps(outcome.to_dict(), allow_nan=False)
    # A second call finds both runs finished and measures the same.
    again = flat_run(config, told.append)
    assert again.figures == outcome.figures


def test_the_default_configuration_is_valid_and_needs_no_extra() -> None:
    from polytask.data import embedded
    from polytask.pipeline import load_config
    from polytask.systems.flat_run import DEFAULT

    settings = load_config(DEFAULT)
    for task in settings.tasks.values():
        name = str(task.data).removeprefix("embedded:")
        assert embedded.load(name)  # from scikit-learn, always here


def test_an_unknown_aggregator_is_named_before_training(data: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'cagrad'"):
        FlatRunConfig(data=data, aggregator="cagard")


def test_the_system_runs_by_its_own_config() -> None:
    assert load(16).config is FlatRunConfig
