"""The record of a proof: every arm, every seed, every figure, intervals, verdicts, budgets.

`Evidence` is what `prove` returns and what stands in evidence/NN-name.json. The file is plain JSON
with the fields below; `load_evidence` checks it against this definition, so a record that was
edited into another shape is refused.
"""

from __future__ import annotations

import json
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as record

from polytask import files
from polytask.errors import DataError, UserError
from polytask.evaluate.intervals import Interval
from polytask.study.budget import BudgetCheck
from polytask.study.records import STRICT, Budget, Claim, Size
from polytask.study.tuning import Tuning

SCHEMA = 1
Verdict = Literal["shown", "not shown", "contradicted", "not judged"]


@record(frozen=True, config=STRICT)
class Trial:
    """One arm with one seed."""

    seed: int
    metrics: dict[str, float | None]
    spent: Budget
    notes: dict[str, Any] = field(default_factory=dict)


@record(frozen=True, config=STRICT)
class ArmRecord:
    """One arm: its settings and a trial per seed, in the order of `Evidence.seeds`."""

    params: dict[str, Any]
    trials: list[Trial]
    note: str = ""

    def values(self, metric: str) -> list[float | None]:
        """The metric of every trial; None where the run had none that is finite."""
        return [trial.metrics.get(metric) for trial in self.trials]


@record(frozen=True, config=STRICT)
class Judgement:
    """A claim with its numbers. `differences` are per seed, positive where `better` is better."""

    claim: Claim
    differences: list[float | None]
    t: Interval | None
    bootstrap: Interval | None
    p: float | None  # two-sided, of 'the mean difference is the margin'
    p_adjusted: float | None  # Holm's, when the study asks for it
    verdict: Verdict
    sentence: str


@record(frozen=True, config=STRICT)
class Evidence:
    """Everything a reader needs to believe or to doubt a claim. JSON round trip is exact."""

    name: str
    title: str
    size: Size
    verdict: Verdict
    reason: str  # the overall verdict in words
    seeds: list[int]
    arms: dict[str, ArmRecord]
    judgements: list[Judgement]
    budget: Budget  # what every arm was given
    budget_checks: list[BudgetCheck]  # the widest gap per claim and quantity; all within tolerance
    correction: Literal["none", "holm"]
    environment: dict[str, Any]
    code: str
    started: str  # ISO 8601, UTC
    seconds: float  # wall time of this call; results found in the cache cost none
    reused: int  # how many trials came from the cache
    warnings: list[str] = field(default_factory=list)
    tuning: Tuning | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        value: dict[str, Any] = _EVIDENCE.dump_python(self, mode="json")
        return value

    def write(self, folder: Path) -> Path:
        """Write FOLDER/NAME.json. A smoke run only shows that things execute: refused."""
        if self.size != "full":
            raise UserError(
                f"'{self.name}' was run with budget '{self.size}', which proves nothing; evidence "
                "is written only from budget 'full'"
            )
        path = folder / f"{self.name}.json"
        files.write_json(path, self.to_dict())
        return path


_EVIDENCE: TypeAdapter[Evidence] = TypeAdapter(Evidence)


def load_evidence(path: Path) -> Evidence:
    """The record at `path`; `DataError` names the file and what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"there is no evidence at {path}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    return evidence_of(data, str(path))


def evidence_of(data: Any, where: str) -> Evidence:
    """`Evidence` from plain JSON values."""
    try:
        found = _EVIDENCE.validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{where} is not an evidence record: '{key}': {first['msg']}") from error
    if found.schema != SCHEMA:
        raise DataError(f"{where} has schema {found.schema}; this version reads {SCHEMA}")
    return found
