"""Checkpoints: saving and loading a training state, beside bare `safetensors`.

    python -m benchmarks checkpoint

The state is a model with AdamW's two moments. Both sides write new files and remove the old ones,
and both load into tensors that exist, as resuming does. polytask also sums every byte, flushes to
the disk, and writes its manifest last; `safetensors` does none of that, so a third way gives it
the flush. 'cold' loads come from the disk, after the system was told to forget the files.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.harness import Aim, compare, options_of, show, show_versions
from torch import Tensor

from polytask.train import checkpoints
from polytask.train.checkpoints import Checkpoint

State = dict[str, dict[str, Tensor]]


def some_state(megabytes: int) -> State:
    """Weights and two moments of transformer-like shapes, `megabytes` in all."""
    torch.manual_seed(0)
    shapes = {"attention": (1024, 256), "up": (256, 1024), "down": (1024, 256), "norm": (256,)}
    layers = max(1, megabytes * 2**20 // (3 * 4 * (3 * 1024 * 256 + 256)))
    model = {f"layers.{n}.{k}": torch.randn(s) for n in range(layers) for k, s in shapes.items()}
    moments = {
        f"{name}/{part}": torch.randn_like(tensor)
        for name, tensor in model.items()
        for part in ("exp_avg", "exp_avg_sq")
    }
    return {"model": model, "optimizer": moments}


def flush(folder: Path) -> None:
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def forget(folder: Path) -> None:
    """Ask the system to drop a folder's files from its cache (they are flushed)."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def copy_all(found: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(found[name])


def ways(state: State, home: Path) -> tuple[dict[str, Callable[[], object]], Callable[[], Path]]:
    """Saving by name, and polytask's newest folder."""
    from safetensors.torch import save_file

    count = 0

    def bare(flushed: bool) -> Callable[[], None]:
        def run() -> None:
            nonlocal count
            count += 1
            folder = home / f"bare-{flushed}-{count}"
            folder.mkdir()
            for name, tensors in state.items():
                save_file(tensors, folder / f"{name}.safetensors")
            if flushed:
                flush(folder)
            for old in home.glob(f"bare-{flushed}-*"):
                if old != folder:
                    shutil.rmtree(old)

        return run

    newest = Path()

    def ours() -> None:
        nonlocal count, newest
        count += 1
        newest = checkpoints.save(home / "run", Checkpoint(count, state, {}, {}), keep=1)

    saves = {"safetensors": bare(False), "safetensors, flushed": bare(True), "polytask": ours}
    return saves, lambda: newest


def loads(state: State, bare: Path, ours: Path, cold: bool) -> dict[str, Callable[[], object]]:
    from safetensors.torch import load_file

    targets = {part: {n: torch.empty_like(t) for n, t in ts.items()} for part, ts in state.items()}

    def load_bare() -> None:
        if cold:
            forget(bare)
        for part, tensors in targets.items():
            copy_all(load_file(bare / f"{part}.safetensors"), tensors)

    def load_ours() -> None:
        if cold:
            forget(ours)
        found = checkpoints.load(ours)
        for part, tensors in targets.items():
            copy_all(found.tensors[part], tensors)

    return {"safetensors": load_bare, "polytask": load_ours}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = options_of(__doc__, argv, megabytes=192)
    found: dict[str, Any] = {"versions": show_versions(("torch", "safetensors"))}
    state = some_state(options.megabytes)
    size = sum(t.nbytes for tensors in state.values() for t in tensors.values())
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        home = Path(folder)
        saves, newest = ways(state, home)
        rows += _rows("save", compare(saves, options.repeats, clock=options.clock).medians, size)
        bare = next(home.glob("bare-True-*"))
        for name, cold in (("load", False), ("load, cold", True)):
            runs = loads(state, bare, newest(), cold)
            rows += _rows(name, compare(runs, options.repeats, clock=options.clock).medians, size)
    found["checkpoint"] = rows
    show(found, options)
    return found


def _rows(what: str, medians: Mapping[str, float], size: int) -> list[dict[str, Any]]:
    return [
        {
            "what": what,
            "way": way,
            "ms": seconds * 1e3,
            "gb_per_s": size / seconds / 1e9,
            "times_as_long": seconds / medians["safetensors"],
        }
        for way, seconds in medians.items()
    ]


def aims(found: dict[str, Any]) -> list[Aim]:
    """The strict aim, against a peer that neither sums nor flushes; and against one that flushes,
    or has to fetch the file."""
    ms = {(row["what"], row["way"]): row["ms"] for row in found["checkpoint"]}
    pairs = [
        ("save", "safetensors", "save: time over safetensors, not flushed"),
        ("save", "safetensors, flushed", "save: time over safetensors, flushed"),
        ("load", "safetensors", "load from memory: time over safetensors"),
        ("load, cold", "safetensors", "load from disk: time over safetensors"),
    ]
    return [
        Aim(told, ms[what, "polytask"] / ms[what, peer], at_most=1.1) for what, peer, told in pairs
    ]


if __name__ == "__main__":
    main()
