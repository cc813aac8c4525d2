"""Experts on disk: the same results, a bounded number in memory, loads that are counted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from polytask.errors import CheckpointError, ConfigError
from polytask.infer.expert_store import open_store, write_store
from polytask.models.experts import ExpertsConfig, ExpertUsage, RoutingRecord
from polytask.models.experts.saving import single_task
from polytask.models.experts.vit import MoEViT, MoEViTConfig, VisionTask

TASKS = (VisionTask(name="seg", outputs=5), VisionTask(name="kind", outputs=3, head="image"))


def build(count: int = 32) -> MoEViT:
    return MoEViT(
        MoEViTConfig(
            image_size=16, patch=4, channels=1, dim=32, depth=4, heads=2, tasks=TASKS,
            experts=ExpertsConfig(count=count, k=2, mult=2.0),
        )
    ).eval()  # fmt: skip


X = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def used(model: MoEViT, task: str, x: torch.Tensor) -> tuple[tuple[int, ...], ...]:
    usage, record = ExpertUsage(model.config.names, 32), RoutingRecord()
    model.run(x, task, record)
    usage.add(record)
    return usage.used(task)


@pytest.mark.parametrize("resident", [1, 2, 5, 100])
def test_results_are_the_whole_models_and_at_most_so_many_are_in_memory(
    resident: int, tmp_path: Path
) -> None:
    model = build()
    stored, store = open_store(write_store(model, tmp_path / "m"), max_resident=resident)
    for task in ("seg", "kind", "seg"):
        assert torch.equal(stored.run(X, task), model.run(X, task))
    assert store.stats.peak <= resident
    assert len(store.resident) <= resident
    store.close()


def test_a_task_loads_each_of_its_experts_once_and_no_other(tmp_path: Path) -> None:
    model = build()
    stored, store = open_store(write_store(model, tmp_path / "m"))
    expert = (tmp_path / "m" / "block-1.expert-0.safetensors").stat().st_size
    for task in ("seg", "kind"):  # changing the task loads nothing beyond that task's experts
        wanted = used(model, task, X)
        store.reset()
        stored.run(X, task)
        assert store.stats.loads == sum(map(len, wanted))
        assert store.stats.bytes == store.stats.loads * expert
    assert store.stats.peak == 2


def test_with_room_for_all_nothing_is_loaded_twice(tmp_path: Path) -> None:
    stored, store = open_store(write_store(build(4), tmp_path / "m"), max_resident=8)
    for _ in range(2):
        stored.run(X, "seg")
        stored.run(X, "kind")
    assert store.stats.loads == len(store.resident) <= 8


def test_an_export_can_be_stored(tmp_path: Path) -> None:
    model = build()
    alone = single_task(model, "kind", used(model, "kind", X)).eval()
    stored, _ = open_store(write_store(alone, tmp_path / "m"))
    assert torch.allclose(stored.run(X, "kind"), model.run(X, "kind"), atol=1e-6)


def test_memory_stays_that_of_two_experts(tmp_path: Path) -> None:
    """24 experts of 8 MiB: a process that runs them all grows by far less than they take."""
    code = f"""
import resource, torch
from pathlib import Path
from polytask.infer.expert_store import ExpertStore, open_store, write_store
from polytask.models.experts.bank import Expert
from polytask.train.tensorfile import write_file
from polytask import files
folder = Path({str(tmp_path / "s")!r})
with files.building(folder) as aside:
    for e in range(24):
        write_file(aside / f"block-1.expert-{{e}}.safetensors", Expert(256, 4096).state_dict())
def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
store = ExpertStore(folder, lambda: Expert(256, 4096), 2, verify=False)
with store.using(1, 0, 1): pass
before = rss()
for e in range(24):
    with store.using(1, e, (e + 1) % 24): pass
print((rss() - before) / 2**20, store.stats.peak)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    grown, peak = told.stdout.split()
    assert float(grown) < 40 and int(peak) == 2


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    model = build(4)
    folder = write_store(model, tmp_path / "m")
    with pytest.raises(ConfigError, match="max_resident = 0"):
        open_store(folder, max_resident=0)
    with pytest.raises(CheckpointError, match="holds no saved model"):
        open_store(tmp_path)
    plain = MoEViT(model.config.model_copy(update={"experts": None}))
    with pytest.raises(ConfigError, match="no experts to store"):
        write_store(plain, tmp_path / "p")
    path = folder / "block-1.expert-2.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-4] + b"zzzz")
    with pytest.raises(CheckpointError, match=r"block-1\.expert-2.* is damaged"):
        open_store(folder)
    stored, store = open_store(folder, verify=False)
    path.write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match="missing or changed"):
        for n in range(40):
            stored.run(torch.randn(4, 1, 16, 16), n % 2)
    path.write_bytes(data)  # a store goes on after a failed load
    assert torch.equal(stored.run(X, "seg"), model.run(X, "seg"))
    assert store.stats.peak <= 2


def test_experts_that_are_all_in_use_are_named(tmp_path: Path) -> None:
    _, store = open_store(write_store(build(4), tmp_path / "m"), max_resident=1)
    with store.using(1, 0), pytest.raises(ConfigError, match="all in use"), store.using(1, 1):
        pass
    with pytest.raises(ConfigError, match="has no expert 9 of block 1"), store.using(1, 9):
        pass
