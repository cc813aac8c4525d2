"""Every side-by-side timing, and one table of ratios with their aims at the end.

    python -m benchmarks                     all of them
    python -m benchmarks mixture trainer     some
    python -m benchmarks --save              also write benchmarks/results.json and the page

Each `bench_*.py` has `main(argv)`, which returns its figures, and `aims(figures)`. Peers and
polytask run in alternating order with equal threads. A benchmark whose peer is not installed is
named and left out.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.harness import Aim, machine, table

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="*", help="parts of names; all without")
    parser.add_argument("--save", action="store_true", help="write results.json and docs page")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="for a machine others use too")
    options = parser.parse_args()
    names = sorted(p.stem for p in HERE.glob("bench_*.py"))
    chosen = [n for n in names if not options.names or any(a in n for a in options.names)]
    if not chosen:
        print(f"no benchmark matches {options.names}; there are: {', '.join(names)}")
        return 2
    passed = ["--repeats", str(options.repeats), *(["--cpu-time"] if options.cpu_time else [])]
    before = machine()
    results: dict[str, Any] = {}
    aims: list[Aim] = []
    for name in chosen:
        print(f"\n== {name}", flush=True)
        module = importlib.import_module(f"benchmarks.{name}")
        try:
            figures = module.main(passed)
        except ModuleNotFoundError as error:
            print(f"left out: {error.name} is not installed")
            continue
        results[name] = {**figures, "aims": [aim.row() for aim in module.aims(figures)]}
        aims += module.aims(figures)
    print("\n== ratios")
    print(table(["what", "ratio", "aim", ""], [list(aim.row().values()) for aim in aims]))
    if options.save:
        clock = "processor time" if options.cpu_time else "wall clock"
        settings = {"clock": clock, "repeats": options.repeats}
        report.save(results, {**before, "load_after": machine()["load"]}, settings)
        print(f"\nwrote {report.RESULTS} and {report.PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
