"""The nouns of an honest comparison: budget, result, arm, claim, study.

An arm is something that can be run with a seed under a budget and says what it reached and what
it spent. A claim says which arm is better than which, by what measure. A study holds the arms,
the claims and the rule by which budgets count as equal; `prove` turns it into `Evidence`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as record

from polytask.errors import ConfigError, suggestion

Size = Literal["smoke", "full"]
Kind = Literal["claim", "ablation"]
STRICT = ConfigDict(extra="forbid")


@record(frozen=True, config=STRICT)
class Budget:
    """What an arm may spend, or what it measured that it spent. None: not limited, not measured.

    steps: optimiser steps. rows: examples seen, repeats counted. tokens: positions the trunk ran
    on, padding left out. flops: floating-point operations. seconds: wall time, set by the runner
    where the arm does not. calls: calls to a language model or an environment.
    """

    steps: float | None = None
    rows: float | None = None
    tokens: float | None = None
    flops: float | None = None
    seconds: float | None = None
    calls: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.measured().items():
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"budget: '{name}' = {value} is not a finite amount >= 0")

    def measured(self) -> dict[str, float]:
        """The quantities that are stated, by name."""
        amounts = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in amounts.items() if value is not None}

    def __add__(self, other: Budget) -> Budget:
        """Amounts added; a quantity that one side did not measure is not measured in the sum."""
        mine, theirs = self.measured(), other.measured()
        return Budget(**{name: mine[name] + theirs[name] for name in mine if name in theirs})


QUANTITIES = tuple(f.name for f in fields(Budget))

# Relative gap that still counts as equal. Wall time is reported but not compared: it belongs to
# the machine. A study that trades one quantity for another (more FLOPs in fewer steps) says so.
EQUAL: Mapping[str, float] = {
    "steps": 0.0,
    "rows": 0.0,
    "tokens": 0.01,
    "flops": 0.02,
    "calls": 0.0,
}


@record(frozen=True, config=STRICT)
class Result:
    """What one arm reached with one seed.

    `metrics` by name; a value that is not finite (a run that diverged) is kept as None. `notes`
    is anything JSON can hold that a reader of the evidence may want: curves, chosen checkpoints.
    """

    metrics: dict[str, float | None]
    spent: Budget
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        finite = {
            name: None if value is None or not math.isfinite(value) else float(value)
            for name, value in self.metrics.items()
        }
        object.__setattr__(self, "metrics", finite)


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: `run(seed, budget)` gives a `Result`.

    To run in another process `run` must be importable there: a function of a module,
    `functools.partial` of one, or an instance of a dataclass with `__call__`. `params` are the
    settings that tell this arm from others; they are recorded and make part of the key under
    which finished results are found again.
    """

    name: str
    run: Callable[[int, Budget], Result]
    params: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@record(frozen=True, config=STRICT)
class Claim:
    """`better` beats `than` in `metric` by more than `margin` (in units of the metric).

    kind 'ablation': `than` is the method with a named part taken out, and must lose.
    equal: quantities whose budgets must be equal for this claim and the relative gap allowed;
    None takes the study's. `than_may_spend_more`: a baseline that spends more makes the claim
    harder, so it may be allowed; it must be said here.
    interval: which interval decides; the other one is reported beside it.
    """

    better: str
    than: str
    metric: str
    margin: float = 0.0
    confidence: float = 0.95
    higher_is_better: bool = True
    kind: Kind = "claim"
    equal: dict[str, float] | None = None
    than_may_spend_more: bool = False
    interval: Literal["t", "bootstrap"] = "t"

    def __post_init__(self) -> None:
        if self.better == self.than:
            raise ConfigError(f"claim: '{self.better}' is compared with itself")
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(f"claim: confidence = {self.confidence} is not between 0.5 and 1")
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise ConfigError(f"claim: margin = {self.margin} is not a finite amount >= 0")
        if self.equal is not None:
            check_tolerances(self.equal, "claim")

    @property
    def text(self) -> str:
        """The claim in words."""
        more = "higher" if self.higher_is_better else "lower"
        by = f" by more than {self.margin:g}" if self.margin else ""
        return f"'{self.better}' has {more} {self.metric} than '{self.than}'{by}"


def check_tolerances(equal: Mapping[str, float], where: str) -> None:
    """Every name is a quantity of `Budget`, every tolerance a share >= 0."""
    for name, tolerance in equal.items():
        if name not in QUANTITIES:
            raise ConfigError(f"{where}: no quantity '{name}'.{suggestion(name, QUANTITIES)}")
        if not 0 <= tolerance < math.inf:
            raise ConfigError(f"{where}: tolerance of '{name}' = {tolerance} is not a share >= 0")


@dataclass(frozen=True)
class Study:
    """Arms, claims and the rule for equal budgets: everything `prove` needs.

    `correction='holm'` adjusts for several claims, so that the chance of any false one stays
    below 1 - confidence. Without it each claim is judged by itself; 'all of them are shown' needs
    no correction, since a false one must pass its own test (intersection-union).
    `equal` None: every quantity of `EQUAL` that an arm of the claim measured.
    """

    name: str
    arms: Mapping[str, Arm]
    claims: tuple[Claim, ...]
    budget: Budget
    title: str = ""
    size: Size = "full"
    equal: Mapping[str, float] | None = None
    correction: Literal["none", "holm"] = "none"
    tuning: Any = None  # study.tuning.Tuning
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.equal is not None:
            check_tolerances(self.equal, f"study '{self.name}'")
        for key, arm in self.arms.items():
            if key != arm.name:
                raise ConfigError(f"study '{self.name}': arm '{arm.name}' is listed as '{key}'")
        for claim in self.claims:
            for name in (claim.better, claim.than):
                if name not in self.arms:
                    raise ConfigError(
                        f"study '{self.name}': a claim names the arm '{name}', which it does not "
                        f"have.{suggestion(name, self.arms)}"
                    )


class Provable(Protocol):
    """What `prove` asks of a system: its card, its claims, and arms and budget for a size.

    Optional attributes are read too: `equal`, `correction`, `tuning`, `notes`, as in `Study`.
    """

    @property
    def card(self) -> Any: ...  # number, name (slug) and title are read

    @property
    def claims(self) -> tuple[Claim, ...]: ...

    def arms(self, size: Size) -> Mapping[str, Arm]: ...

    def budget(self, size: Size) -> Budget: ...


def study_of(system: Provable, size: Size) -> Study:
    """The study that a system states for a size."""
    card = system.card
    slug = str(getattr(card, "slug", None) or card.name)
    return Study(
        name=f"{int(card.number):02d}-{slug}",
        arms=system.arms(size),
        claims=system.claims,
        budget=system.budget(size),
        title=str(card.title),
        size=size,
        equal=getattr(system, "equal", None),
        correction=getattr(system, "correction", "none"),
        # A smoke run takes settings from the grid, so it also runs before anything was tuned.
        tuning=getattr(system, "tuning", None) if size == "full" else None,
        notes=getattr(system, "notes", None) or {},
    )
