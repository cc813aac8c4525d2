"""Streamed equals in memory; nothing half-done is ever seen; what was killed goes on."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_samples import near, plan_of, some_state, state_folder, tree
from safetensors.torch import load_file
from torch import Tensor

from polytask import files
from polytask.errors import DataError, MergeError
from polytask.merge import layout, merge_state_dicts
from polytask.merge.engine import work_folder
from polytask.merge.output import write

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("average", {}),
    ("linear", {"weight": [0.5, 0.3, -0.1]}),
    ("task_arithmetic", {"weight": [0.5, 0.3, 0.7], "scale": 0.9}),
    ("ties", {"density": 0.4, "weight": 0.8}),
    ("ties", {"density": [0.3, 0.5, 0.9], "trim": "model"}),
    ("ties", {"trim": "model", "vote": {"draw": "majority", "divide": "counts"}}),
    ("ties", {"vote": {"draw": "majority", "by": "count"}}),
    ("dare_linear", {"density": 0.5}),
    ("dare_linear", {"density": 0.5, "rescale": "l1"}),
    ("dare_ties", {"density": 0.3}),
    ("della", {}),
    ("breadcrumbs", {"density": 0.5}),
    ("karcher", {}),
    ("model_stock", {"vectors": "rows"}),
    ("multislerp", {}),
]


def models(home: Path, dtype: torch.dtype, count: int = 3) -> dict[str, dict[str, Tensor]]:
    base = some_state(0, dtype)
    base["layers.0.w"] = base["layers.0.w"].repeat(40, 30)  # several chunks
    states = {"base": base, **{"abc"[i]: near(base, i) for i in range(count)}}
    for name, state in states.items():
        state_folder(home / name, state)
    return states


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK", 1000)
    monkeypatch.setattr("polytask.merge.engine.CHUNK", 1000)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("method", "params"), METHODS, ids=lambda v: str(v)[:40])
def test_a_streamed_merge_equals_the_one_in_memory_bit_for_bit(
    tmp_path: Path, method: str, params: dict[str, Any], dtype: torch.dtype
) -> None:
    states = models(tmp_path, dtype)
    plan = plan_of(tmp_path, method, parameters=params, shard_size=9000, seed=3)
    found: dict[str, Tensor] = {}
    for file in write(plan, tmp_path / "out", workers=3).glob("*.safetensors"):
        found |= load_file(file)
    want = merge_state_dicts(
        method, [states[n] for n in "abc"], states["base"], names="abc", seed=3, **params
    )
    assert found.keys() == want.keys()
    for key, tensor in want.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor), key


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("method", ["ties", "dare_ties", "average"])
def test_workers_memory_and_shards_change_no_bit(tmp_path: Path, method: str) -> None:
    models(tmp_path, torch.bfloat16)
    plan = plan_of(tmp_path, method)
    write(plan, tmp_path / "one", workers=1, memory=1)
    write(plan, tmp_path / "many", workers=8, memory=1 << 30)
    one, many = tree(tmp_path / "one"), tree(tmp_path / "many")
    for name in ("README.md", "manifest.json"):
        del one[name], many[name]  # they have the folder's name
    assert one == many


def test_the_result_has_a_manifest_that_holds(tmp_path: Path) -> None:
    models(tmp_path, torch.float32)
    out = write(plan_of(tmp_path, shard_size=3000), tmp_path / "out")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    files.verify_manifest(out)
    assert not work_folder(out).exists()


@pytest.mark.parametrize("kind", ["nan", "inf"])
@pytest.mark.parametrize("model", ["base", "b"])
def test_nan_and_infinity_are_named_with_tensor_and_model(
    tmp_path: Path, kind: str, model: str
) -> None:
    states = models(tmp_path, torch.float32)
    states[model]["layers.1.w"][2, 3] = float(kind)
    state_folder(tmp_path / "bad", states[model])
    names = {"base": "base", "a": "a", "b": "b", "c": "c", model: "bad"}
    base = names.pop("base")
    plan = plan_of(tmp_path, "task_arithmetic", base, models=names)
    told = "NaN" if kind == "nan" else "infinite values"
    with pytest.raises(MergeError, match=rf"{model}: tensor 'layers\.1\.w' holds {told}"):
        write(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_large_finite_numbers_are_no_infinity(tmp_path: Path) -> None:
    """Their sum overflows, which is what the quick check looks at first."""
    state = {"w": torch.full((4000,), 3e38)}
    for name in ("a", "b"):
        state_folder(tmp_path / name, state)
    plan = plan_of(tmp_path, "linear", None, parameters={"weight": 0.5})
    found = load_file(write(plan, tmp_path / "out") / "model.safetensors")
    assert torch.equal(found["w"], state["w"])


def test_a_result_that_overflows_its_type_is_named(tmp_path: Path) -> None:
    models(tmp_path, torch.float32)
    plan = plan_of(
        tmp_path, "task_arithmetic", parameters={"weight": 1e7}, dtype="float16", check_base=False
    )
    with pytest.raises(MergeError, match=r"merged tensor '.*' does not fit into torch\.float16"):
        write(plan, tmp_path / "out")


def test_the_type_of_the_result_can_be_chosen(tmp_path: Path) -> None:
    states = models(tmp_path, torch.float32)
    out = write(plan_of(tmp_path, "average", dtype="bfloat16"), tmp_path / "out")
    want = merge_state_dicts("average", [states[n] for n in "abc"], states["base"])
    found = load_file(out / "model.safetensors")
    assert found["count"].dtype == torch.int64
    assert all(
        torch.equal(found[k], v.bfloat16()) for k, v in want.items() if v.is_floating_point()
    )


def test_statistics_reach_the_method(tmp_path: Path) -> None:
    """A method with a statistic of every model gets them; checked against memory."""
    states = models(tmp_path, torch.float32)
    fishers = {n: {k: v.abs() for k, v in near(states[n], 7).items()} for n in "abc"}
    for name, state in fishers.items():
        state_folder(tmp_path / f"f{name}", state)
    named = {n: {"model": n, "statistics": f"f{n}/model.safetensors"} for n in "abc"}
    out = write(plan_of(tmp_path, "fisher", models=named), tmp_path / "out")
    want = merge_state_dicts(
        "fisher",
        [states[n] for n in "abc"],
        states["base"],
        extras=[fishers[n] for n in "abc"],
        names="abc",
    )
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[k], v) for k, v in want.items())


def failing_pwrite(after: int, code: int) -> Callable[..., int]:
    real, count = os.pwrite, 0

    def pwrite(handle: int, data: Any, at: int) -> int:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(code, os.strerror(code))
        return real(handle, data, at)

    return pwrite


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.usefixtures("small_chunks")
def test_a_full_disk_is_said_and_the_merge_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    models(tmp_path, torch.float32)
    plan = plan_of(tmp_path, "task_arithmetic", shard_size=20_000)
    write(plan, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_pwrite(39, code))
        with pytest.raises(DataError, match="make room and run the same command again"):
            write(plan, tmp_path / "out", sync_bytes=1, workers=1)
    assert not (tmp_path / "out").exists()
    done = (work_folder(tmp_path / "out") / "journal.jsonl").read_text()
    assert "layers.0.w" in done  # the largest is made first
    calls: list[str] = []
    write(plan, tmp_path / "out", progress=lambda what, now, total: calls.append(f"{now}/{total}"))
    assert not calls[0].startswith("0/")
    assert _tensors(tmp_path / "out") == _tensors(tmp_path / "whole")


def _tensors(folder: Path) -> dict[str, bytes]:
    return {k: v for k, v in tree(folder).items() if k.endswith((".safetensors", "index.json"))}


def test_a_limit_on_file_sizes_is_said_by_a_real_system(tmp_path: Path) -> None:
    models(tmp_path, torch.float32)
    script = (
        "import resource, sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from merge_samples import plan_of\nfrom polytask.merge.output import write\n"
        f"home = Path({str(tmp_path)!r})\nplan = plan_of(home)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n    write(plan, home / 'out')\nexcept Exception as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "the limit on file sizes is reached" in done.stdout, done.stderr
    assert not (tmp_path / "out").exists()


SLOW = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from merge_samples import plan_of
from polytask.merge.output import write
real = os.pwrite
def pwrite(*given):
    time.sleep(0.01)
    return real(*given)
os.pwrite = pwrite
home = Path({home!r})
write(plan_of(home, "dare_ties", shard_size=20_000), home / "out", workers=2, sync_bytes=1)
"""


def start_slow(home: Path) -> subprocess.Popen[bytes]:
    script = SLOW.format(tests=str(Path(__file__).parent), home=str(home))
    return subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, preexec_fn=heed_interrupts
    )


def heed_interrupts() -> None:
    """A suite that a shell started in the background hands down that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_journal(home: Path, names: int) -> None:
    path = work_folder(home / "out") / "journal.jsonl"
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if path.is_file() and len(path.read_bytes().splitlines()) >= names:
            return
        time.sleep(0.005)
    raise AssertionError("the merge did not begin")


@pytest.mark.slow
@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT])
def test_resume_after_kill_is_bit_identical(tmp_path: Path, way: signal.Signals) -> None:
    base = {f"layers.{i}.w": torch.randn(50, 20) for i in range(60)}
    for i, name in enumerate(["base", "a", "b", "c"]):
        state_folder(tmp_path / name, near(base, i))
    plan = plan_of(tmp_path, "dare_ties", shard_size=20_000)
    write(plan, tmp_path / "whole")
    process = start_slow(tmp_path)
    wait_for_journal(tmp_path, 5)
    process.send_signal(way)
    process.wait(30)
    assert not (tmp_path / "out").exists()
    done = {
        name
        for line in (work_folder(tmp_path / "out") / "journal.jsonl").read_bytes().splitlines()
        for name in json.loads(line)
    }
    assert 5 <= len(done) < 60
    # Bytes of finished tensors are not written again, those of the others are.
    seen: list[str] = []
    real = os.pwrite

    def spy(handle: int, data: Any, at: int) -> int:
        seen.append(str(at))
        return real(handle, data, at)

    os.pwrite = spy
    try:
        write(plan, tmp_path / "out")
    finally:
        os.pwrite = real
    assert len(seen) == 60 - len(done)
    assert _tensors(tmp_path / "out") == _tensors(tmp_path / "whole")
    files.verify_manifest(tmp_path / "out")


def test_a_work_folder_of_another_merge_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models(tmp_path, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_pwrite(3, errno.ENOSPC))
        with pytest.raises(DataError):
            write(plan_of(tmp_path, "ties"), tmp_path / "out", sync_bytes=1)
    plan = plan_of(tmp_path, "average")
    write(plan, tmp_path / "out")
    write(plan, tmp_path / "whole")
    assert _tensors(tmp_path / "out") == _tensors(tmp_path / "whole")


def test_models_that_changed_since_are_merged_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = models(tmp_path, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing_pwrite(3, errno.ENOSPC))
        with pytest.raises(DataError):
            write(plan_of(tmp_path), tmp_path / "out", sync_bytes=1)
    path = tmp_path / "a" / "model.safetensors"
    path.unlink()
    (tmp_path / "a").rmdir()
    state_folder(tmp_path / "a", near(states["base"], 77))
    write(plan_of(tmp_path), tmp_path / "out")
    write(plan_of(tmp_path), tmp_path / "whole")
    assert _tensors(tmp_path / "out") == _tensors(tmp_path / "whole")


def test_a_folder_that_exists_is_kept_unless_told(tmp_path: Path) -> None:
    models(tmp_path, torch.float32)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    plan = plan_of(tmp_path)
    with pytest.raises(DataError, match="exists already"):
        write(plan, tmp_path / "out")
    assert (tmp_path / "out" / "precious").exists()
    out = write(plan, tmp_path / "out", overwrite=True)
    assert not (out / "precious").exists()
    before = (out / "model.safetensors").stat().st_mtime_ns
    write(plan, out)  # it is this very merge: left as it is
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_two_processes_do_not_write_one_merge(tmp_path: Path) -> None:
    models(tmp_path, torch.float32)
    plan = plan_of(tmp_path)
    out = tmp_path / "out"
    with files.locked(work_folder(out)), pytest.raises(Exception, match="in use by another"):
        write(plan, out)


def test_memory_is_bounded_by_the_largest_tensor_not_by_the_model(tmp_path: Path) -> None:
    """The engine says how much it needs: K + 1 copies of the largest in float32, and its result."""
    base = {f"layers.{i}.w": torch.randn(200, 300) for i in range(40)}
    for i, name in enumerate(["base", "a", "b", "c"]):
        state_folder(tmp_path / name, near(base, i))
    whole = plan_of(tmp_path, "ties", parameters={"density": 0.5})
    assert max(item.memory for item in whole.items) == 60_000 * (4 * 4 + 4)
    chunked = plan_of(tmp_path, "average")
    assert max(item.memory for item in chunked.items) == 60_000 * (3 * 4 + 4)


def test_workers_keep_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polytask.merge import engine

    base = {f"layers.{i}.w": torch.randn(50, 30) for i in range(30)}
    for i, name in enumerate(["base", "a", "b"]):
        state_folder(tmp_path / name, near(base, i))
    plan = plan_of(tmp_path, "ties")
    least = [10**9]
    real = engine._Budget.take

    def take(self: Any, wanted: int) -> bool:
        taken = real(self, wanted)
        least[0] = min(least[0], self.free)
        return taken

    monkeypatch.setattr(engine._Budget, "take", take)
    monkeypatch.setattr(engine, "FLOOR", 1)
    write(plan, tmp_path / "out", workers=8)
    assert least[0] == 0  # one tensor at a time, and never more than that
