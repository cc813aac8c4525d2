"""Timing side by side: everything runs in alternating order in one process, medians are compared.

A machine's speed drifts; a ratio of medians of runs that took turns drifts little. Times are wall
clock; a warm-up run of each comes first and is not counted.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Aim:
    """A ratio with the bound that it ought to keep."""

    what: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)

    @property
    def bound(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    def row(self) -> dict[str, Any]:
        met = "met" if self.met else "missed"
        return {"what": self.what, "ratio": self.value, "aim": self.bound, "": met}


@dataclass(frozen=True)
class Comparison:
    """Seconds per run: every run, and the medians, by name in the order given."""

    seconds: dict[str, list[float]]

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(runs) for name, runs in self.seconds.items()}

    def ratios(self, to: str | None = None) -> dict[str, float]:
        """How many times longer each takes than `to` (the first, unless named)."""
        medians = self.medians
        base = medians[to or next(iter(medians))]
        return {name: seconds / base for name, seconds in medians.items()}

    def spread(self, name: str) -> float:
        """Interquartile range over the median: how far to trust the figure."""
        runs = self.seconds[name]
        low, middle, high = statistics.quantiles(runs, n=4)
        return (high - low) / middle

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "medians": self.medians, "ratios": self.ratios()}


def compare(
    runs: Mapping[str, Callable[[], object]],
    repeats: int = 7,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Time functions in turns: a, b, c, then c, b, a, and so on, `repeats` times each.

    A function that returns a float has timed itself: its own seconds are taken. `clock` may be
    `time.process_time` where other programs share the machine.
    """
    for _ in range(warm_up):
        for function in runs.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(repeats):
            order = list(runs.items())
            for name, function in order if turn % 2 == 0 else reversed(order):
                gc.collect()
                begin = clock()
                own = function()
                taken = clock() - begin
                seconds[name].append(own if isinstance(own, float) else taken)
    finally:
        if collecting:
            gc.enable()
    return Comparison(seconds)


def machine() -> dict[str, Any]:
    """Kind of machine: processor, cores, memory, system, and how busy it is just now."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "processor": models[0] if models else platform.processor() or "unknown",
        "cores": os.cpu_count(),
        "memory_gb": round(pages / 1e9),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),
    }


def versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Python, the packages named, and the threads that torch (if loaded) may use."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    found |= {name: importlib.metadata.version(name) for name in packages}
    found["threads"] = os.environ.get("OMP_NUM_THREADS", f"default ({os.cpu_count()} cores)")
    return found


def show_versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Print the versions in one line; returns them for `--json`."""
    found = versions(packages)
    print(", ".join(f"{name} {version}" for name, version in found.items()), flush=True)
    return found


def options_of(document: str | None, argv: Sequence[str] | None, **more: int) -> argparse.Namespace:
    """The options that every benchmark has, and whole numbers of its own with their defaults."""
    parser = argparse.ArgumentParser(description=(document or "").strip().splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="for a machine others use too")
    parser.add_argument("--folder", default=None, help="where files are written, if any are")
    for name, default in more.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    options.clock = time.process_time if options.cpu_time else time.perf_counter
    return options


def show(found: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Print what a benchmark found: a table for each list of rows, or everything as JSON."""
    if options.json:
        print(json.dumps(found, indent=2))
        return
    for rows in found.values():
        if isinstance(rows, list):
            print("\n" + table(list(rows[0]), [list(row.values()) for row in rows]))


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns: text to the left, numbers to the right with three digits that matter."""

    def text(cell: object) -> str:
        if isinstance(cell, float):
            return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
        return str(cell)

    cells = [list(head), *([text(cell) for cell in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(head))]
    right = [all(isinstance(row[at], int | float) for row in rows) for at in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(row, widths, right)
        ).rstrip()
        for row in cells
    )
