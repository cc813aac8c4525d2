"""A live view of training: loss per task, throughput, time left. Quiet when nobody is watching."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any


class Progress:
    """Shows the newest numbers; does nothing unless standard error is a terminal."""

    def __init__(self, total: int, tasks: Sequence[str], active: bool) -> None:
        self.total = total
        self.tasks = tuple(tasks)
        self._losses: dict[str, tuple[float, float]] = {}  # task -> newest, first
        self._line: dict[str, Any] = {}
        self._score: dict[str, str] = {}
        self._stage = ""
        self._live: Any = None
        if active and sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(stderr=True)
            self._live = Live(console=console, auto_refresh=False, transient=False)

    def __enter__(self) -> Progress:
        self._begun = time.perf_counter()
        self._first: int | None = None
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def stage(self, name: str) -> None:
        self._stage = name

    def train(self, step: int, line: Mapping[str, Any]) -> None:
        """Show a train line of the metrics."""
        if self._live is None:
            return
        self._first = step if self._first is None else self._first
        self._line = dict(line)
        for task, terms in line["terms"].items():
            value = sum(v for v in terms.values() if v is not None)
            self._losses[task] = (value, self._losses.get(task, (value, value))[1])
        self._live.update(self._view(step), refresh=True)

    def scores(self, step: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Show an evaluation: {task: {metric: value}}."""
        if self._live is None:
            return
        for task, metrics in scores.items():
            self._score[task] = "  ".join(f"{k} {v:.3f}" for k, v in list(metrics.items())[:2])
        self._live.update(self._view(step), refresh=True)

    def _view(self, step: int) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, padding=(0, 2, 0, 0))
        for header in ("task", "loss", "since start", "valid"):
            table.add_column(header, justify="left" if header in ("task", "valid") else "right")
        for task in self.tasks:
            if task in self._losses:
                now, first = self._losses[task]
                share = f"{now / first - 1:+.0%}" if first else ""
                table.add_row(task, f"{now:.4f}", share, self._score.get(task, ""))
        rows, tokens = self._line.get("rows_per_s", 0), self._line.get("tokens_per_s", 0)
        text = f"{self._stage}  step {step}/{self.total}  {rows:,.0f} rows/s"
        if tokens:
            text += f"  {tokens:,.0f} tokens/s"
        text += f"  {self._remaining(step)} left"
        return Group(table, ProgressBar(total=self.total, completed=step, width=60), Text(text))

    def _remaining(self, step: int) -> str:
        done = step - (self._first or step)
        if done <= 0:
            return "?"
        seconds = (time.perf_counter() - self._begun) / done * (self.total - step)
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
