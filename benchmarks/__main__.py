"""`python -m benchmarks`: every side-by-side timing, one table of ratios a file.

Each `bench_*.py` has `main(argv)`; peers and polytask run in alternating order with equal threads.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def main() -> int:
    names = sorted(p.stem for p in Path(__file__).parent.glob("bench_*.py"))
    chosen = [n for n in names if not sys.argv[1:] or any(a in n for a in sys.argv[1:])]
    if not chosen:
        print(f"no benchmark matches {sys.argv[1:]}; there are: {', '.join(names)}")
        return 2
    for name in chosen:
        print(f"\n== {name}", flush=True)
        importlib.import_module(f"benchmarks.{name}").main([])
    return 0


if __name__ == "__main__":
    sys.exit(main())
