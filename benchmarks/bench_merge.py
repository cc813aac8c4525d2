"""Merging: wall time and peak memory of the command line, beside mergekit's.

    python -m benchmarks.bench_merge --mergekit /path/to/mergekit-yaml

A random Llama in bfloat16 (half a gigabyte by default) and three copies of it with small changes,
merged by whole processes in alternating order with equal threads; peak memory is the system's
figure for the process. polytask also checks every input for NaN, sums the result, flushes it and
writes a manifest; its report is switched off, mergekit has none. 'copy' reads the same inputs and
writes as many bytes as the result has, flushed: the least that a merge can do.
Without `--mergekit` (or mergekit-yaml on the path) the peer's rows are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from benchmarks.harness import Aim, options_of, show, show_versions
from safetensors.torch import save_file

MODELS = ("a", "b", "c")
METHODS = ("average", "ties", "dare_ties", "slerp")
# What mergekit computes by default, said in our words.
OURS: dict[str, dict[str, Any]] = {
    "average": {"method": "average"},
    "ties": {"method": "ties", "parameters": {"weight": 0.33, "density": 0.2}},
    "dare_ties": {
        "method": "dare_ties",
        "parameters": {
            "weight": 0.33, "density": 0.2, "rescale": "l1", "vote": {"divide": "none"},
        },
    },
    "slerp": {"method": "slerp", "parameters": {"t": 0.4}},
}  # fmt: skip


def build(home: Path, hidden: int, layers: int, vocabulary: int) -> int:
    """The base and its copies; returns bytes of one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in LlamaForCausalLM(config).state_dict().items()}
    noise = torch.Generator().manual_seed(0)
    base = {k: (0.02 * torch.randn(s, generator=noise)).bfloat16() for k, s in shapes.items()}
    for name in ("base", *MODELS):
        folder = home / name
        folder.mkdir()
        config.save_pretrained(folder)
        state = {
            k: v
            if name == "base"
            else v + (0.002 * torch.randn(v.shape, generator=noise)).bfloat16()
            for k, v in base.items()
        }
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return sum(v.nbytes for v in base.values())


def our_file(home: Path, method: str) -> Path:
    used = MODELS[:2] if method == "slerp" else MODELS
    data: dict[str, Any] = {**OURS[method], "models": {n: str(home / n) for n in used}}
    if method != "slerp":
        data["base"] = str(home / "base")
    path = home / f"ours-{method}.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


def their_file(home: Path, method: str) -> Path:
    weights = {"average": {"weight": 1.0}, "slerp": {}}
    own = weights.get(method, {"weight": 0.33, "density": 0.2})
    used = MODELS[:2] if method == "slerp" else MODELS
    data: dict[str, Any] = {
        "merge_method": "linear" if method == "average" else method,
        "models": [{"model": str(home / n), "parameters": own} for n in used],
        "dtype": "bfloat16",
    }
    if method == "slerp":
        data["base_model"] = str(home / "a")
        data["parameters"] = {"t": 0.4}
    elif method != "average":
        data["base_model"] = str(home / "base")
    path = home / f"theirs-{method}.yml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return path


# A process begins with the peak of the one that made it, so a small one stands in between.
WATCH = """
import json, os, subprocess, sys, time
begin = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
taken = time.perf_counter() - begin
print(json.dumps([taken, usage.ru_utime + usage.ru_stime, usage.ru_maxrss, status]))
"""


def run(command: Sequence[str], threads: int) -> tuple[float, float, float]:
    """Seconds by the clock, seconds of the processor and peak megabytes of a process."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads)), "HF_HUB_OFFLINE": "1"}
    told = subprocess.run(
        [sys.executable, "-S", "-E", "-c", WATCH, *command],
        env=environment,
        capture_output=True,
        text=True,
    )
    taken, worked, peak, status = json.loads(told.stdout)
    if status:
        raise RuntimeError(f"{' '.join(command)}:\n{told.stderr[-2000:]}")
    return float(taken), float(worked), peak * 1024 / 1e6


def commands(home: Path, method: str, peer: str | None, threads: int) -> dict[str, list[str]]:
    ours = [sys.executable, "-m", "polytask", "merge", str(our_file(home, method))]
    found = {
        "polytask": [*ours, "--out", str(home / "out"), "--no-report", "--workers", str(threads)]
    }
    if peer is not None:
        given = [str(their_file(home, method)), str(home / "out")]
        found["mergekit"] = [peer, *given, "--no-copy-tokenizer", "--no-write-model-card"]
    return found


def side_by_side(
    home: Path, methods: Sequence[str], peer: str | None, threads: int, repeats: int
) -> list[dict[str, Any]]:
    rows = []
    for method in methods:
        asked = commands(home, method, peer, threads)
        taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in asked}
        for turn in range(repeats):
            order = list(asked.items())
            for name, command in order if turn % 2 == 0 else reversed(order):
                shutil.rmtree(home / "out", ignore_errors=True)
                taken[name].append(run(command, threads))
        for name, runs in taken.items():
            rows.append(
                {
                    "method": method,
                    "way": name,
                    "seconds": statistics.median(run[0] for run in runs),
                    "cpu_seconds": statistics.median(run[1] for run in runs),
                    "peak_mb": statistics.median(run[2] for run in runs),
                }
            )
            print(rows[-1], flush=True)
    return rows


def against_copy(
    home: Path, repeats: int, threads: int, clock: Callable[[], float]
) -> list[dict[str, Any]]:
    """The linear merge in this process, and reading and writing the same bytes."""
    from polytask.merge.config import read_recipe
    from polytask.merge.output import write
    from polytask.merge.plan import make_plan

    inputs = [home / name / "model.safetensors" for name in MODELS]
    size = inputs[0].stat().st_size
    recipe, _ = read_recipe(our_file(home, "average"))
    seconds: dict[str, list[float]] = {"copy": [], "average": []}
    for _ in range(repeats):
        shutil.rmtree(home / "out", ignore_errors=True)
        begin = clock()
        write(make_plan(recipe), home / "out", workers=threads)
        seconds["average"].append(clock() - begin)
        begin = clock()
        _copy(inputs, home / "copied")
        seconds["copy"].append(clock() - begin)
        (home / "copied").unlink()
    moved = size * (len(inputs) + 1) / 1e9
    return [
        {"what": what, "seconds": s, "gb_per_s": moved / s}
        for what, runs in seconds.items()
        for s in [statistics.median(runs)]
    ]


def _copy(inputs: Sequence[Path], out: Path) -> None:
    room = memoryview(bytearray(1 << 20))
    with out.open("wb", buffering=0) as target:
        for number, path in enumerate(inputs):
            with path.open("rb", buffering=0) as source:
                while count := source.readinto(room):
                    if number == 0:
                        target.write(room[:count])
        os.fsync(target.fileno())


def startup() -> float:
    """Peak megabytes of a process that imports what a merge imports, and merges nothing."""
    code = "import polytask.cli.merge, polytask.merge.output, polytask.pipeline.merging"
    return run([sys.executable, "-c", code], 1)[2]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--mergekit", default=None, help="mergekit-yaml of another environment")
    parser.add_argument("--methods", default=",".join(METHODS))
    own, rest = parser.parse_known_args(argv)
    options = options_of(
        __doc__,
        rest,
        hidden=1024,
        layers=16,
        vocabulary=32000,
        threads=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
    )
    peer = own.mergekit or shutil.which("mergekit-yaml")
    if peer is None:
        print("mergekit-yaml was not found: its rows are left out (--mergekit PATH)")
    repeats = min(options.repeats, 3)  # whole processes of up to minutes each
    found: dict[str, Any] = {"versions": show_versions(("torch", "safetensors", "transformers"))}
    found["versions"]["threads"] = str(options.threads)
    found["clock"] = "cpu_seconds" if options.clock is time.process_time else "seconds"
    if peer is not None:
        found["versions"]["mergekit"] = _version(peer)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        home = Path(folder)
        size = build(home, options.hidden, options.layers, options.vocabulary)
        print(f"{size / 1e6:,.0f} MB a model", flush=True)
        found["model_mb"] = size / 1e6
        found["largest_mb"] = options.hidden * options.vocabulary * 4 / 1e6
        found["startup_mb"] = startup()
        found["copy"] = against_copy(home, repeats, options.threads, options.clock)
        found["merge"] = side_by_side(home, own.methods.split(","), peer, options.threads, repeats)
    show(found, options)
    return found


def _version(peer: str) -> str:
    code = "import importlib.metadata as m; print(m.version('mergekit'))"
    python = Path(peer).with_name("python")
    told = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return told.stdout.strip() or "unknown"


def aims(found: Mapping[str, Any]) -> list[Aim]:
    """Twice as fast in half the memory; memory that depends on the largest tensor alone."""
    rows = {(row["method"], row["way"]): row for row in found["merge"]}
    made = []
    for method in dict.fromkeys(row["method"] for row in found["merge"]):
        ours, theirs = rows[method, "polytask"], rows.get((method, "mergekit"))
        if theirs is not None:
            ratio = theirs[found["clock"]] / ours[found["clock"]]
            made.append(Aim(f"merge, {method}: mergekit's time over ours", ratio, at_least=2))
            ratio = ours["peak_mb"] / theirs["peak_mb"]
            made.append(Aim(f"merge, {method}: peak memory over mergekit's", ratio, at_most=0.5))
        room = found["startup_mb"] + 3 * (len(MODELS) + 2) * found["largest_mb"]
        ratio = ours["peak_mb"] / room
        told = f"merge, {method}: peak memory over start-up and 3 (K + 2) largest tensors"
        made.append(Aim(told, ratio, at_most=1))
    copy = {row["what"]: row["seconds"] for row in found["copy"]}
    told = "merge, average: time over copying the same bytes"
    made.append(Aim(told, copy["average"] / copy["copy"], at_most=2))
    return made


if __name__ == "__main__":
    main()
