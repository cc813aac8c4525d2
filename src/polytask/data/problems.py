"""Rows that cannot be used: counted, the first shown with file and line, never dropped silently."""

from __future__ import annotations

import logging

from polytask.errors import DataError

log = logging.getLogger("polytask.data")

SHOWN = 3
MAX_CELL = 10 * 1024 * 1024
"""Bytes in one cell above which a row is refused: such a cell is a fault of the file."""


class RowProblems:
    """Collects rows that failed validation, and stops above a stated share.

    `bad` is how many rows failed, `first` describes the first three ('reviews.csv, line 18: ...').
    """

    def __init__(self, name: str, max_bad: float = 0.01) -> None:
        self.name = name
        self.max_bad = max_bad
        self.bad = 0
        self.first: list[str] = []
        self._warned = 0

    def add(self, where: str, reason: str, rows: int = 1) -> None:
        """Note a failed row, or `rows` of them that failed together."""
        self.bad += rows
        if len(self.first) < SHOWN:
            self.first.append(f"{where}: {reason}")

    def merge(self, other: RowProblems) -> None:
        """Add what `other` collected."""
        self.bad += other.bad
        self.first += other.first[: SHOWN - len(self.first)]

    def check(self, good: int) -> None:
        """Raise `DataError` when more than `max_bad` of all rows (good and bad) failed."""
        total = good + self.bad
        if self.bad > self.max_bad * total:
            raise DataError(
                f"{self.describe(total)}. That is more than max_bad = {self.max_bad:g} allows; "
                "repair the file, or raise max_bad if these rows may be left out."
            )

    def conclude(self, good: int) -> None:
        """`check`, then log a warning that names what was left out; nothing when all is well."""
        self.check(good)
        if self.bad > self._warned:
            self._warned = self.bad
            log.warning("%s; they are left out", self.describe(good + self.bad))

    def describe(self, total: int) -> str:
        """'reviews.csv: 2 of 300 rows (0.67 %) cannot be used: ...'."""
        share = 100 * self.bad / max(total, 1)
        more = ", among them" if self.bad > len(self.first) else ""
        listed = "".join(f"\n  {line}" for line in self.first)
        return (
            f"{self.name}: {self.bad:,} of {total:,} rows ({share:.3g} %) cannot be used{more}:"
            f"{listed}"
        )
