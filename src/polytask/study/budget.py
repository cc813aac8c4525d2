"""Equal budgets, asserted: who spent what, and whether a comparison may stand on it."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic.dataclasses import dataclass as record

from polytask.errors import PolytaskError
from polytask.study.records import EQUAL, STRICT, Budget, Claim


class BudgetError(PolytaskError):
    """Two arms of a claim spent unequal budgets, or did not measure them: the proof fails."""


@record(frozen=True, config=STRICT)
class BudgetCheck:
    """One quantity of one claim: the largest relative gap between paired runs."""

    better: str
    than: str
    quantity: str
    better_spent: float  # of the seed with the largest gap
    than_spent: float
    gap: float  # |difference| / larger amount
    tolerance: float
    seed: int


def quantities_to_compare(
    claim: Claim, study_equal: Mapping[str, float] | None, better: Budget, than: Budget
) -> Mapping[str, float]:
    """Quantity -> tolerance: the claim's rule, else the study's, else what the arms measured."""
    stated = claim.equal if claim.equal is not None else study_equal
    if stated is not None:
        return stated
    seen = {*better.measured(), *than.measured()}
    return {name: tolerance for name, tolerance in EQUAL.items() if name in seen}


def check_pair(
    claim: Claim, study_equal: Mapping[str, float] | None, better: Budget, than: Budget, seed: int
) -> list[BudgetCheck]:
    """The checks of one seed; `BudgetError` names arm, quantity, amounts and tolerance."""
    compared = quantities_to_compare(claim, study_equal, better, than)
    pair = f"'{claim.better}' and '{claim.than}', seed {seed}"
    if not compared:
        raise BudgetError(
            f"budgets of {pair} cannot be compared: neither measured any of {', '.join(EQUAL)}. "
            "An arm returns what it spent in Result.spent."
        )
    checks = []
    mine, theirs = better.measured(), than.measured()
    for quantity, tolerance in compared.items():
        for arm, spent in ((claim.better, mine), (claim.than, theirs)):
            if quantity not in spent:
                raise BudgetError(
                    f"budgets of {pair} cannot be compared: '{arm}' did not measure '{quantity}'"
                )
        a, b = mine[quantity], theirs[quantity]
        gap = abs(a - b) / max(a, b) if max(a, b) > 0 else 0.0
        allowed = gap <= tolerance or (claim.than_may_spend_more and b > a)
        if not allowed:
            raise BudgetError(
                f"unequal budgets of {pair}: {quantity} {a:.10g} against {b:.10g}, a gap of "
                f"{gap:.2%}; allowed is {tolerance:.2%}. Give both arms the same budget, or state "
                "in the claim which quantity must be equal (`equal={...}`)."
            )
        checks.append(BudgetCheck(claim.better, claim.than, quantity, a, b, gap, tolerance, seed))
    return checks


def widest(checks: list[BudgetCheck]) -> list[BudgetCheck]:
    """Per claim and quantity the check with the largest gap, in order of first appearance."""
    found: dict[tuple[str, str, str], BudgetCheck] = {}
    for check in checks:
        key = (check.better, check.than, check.quantity)
        if key not in found or check.gap > found[key].gap:
            found[key] = check
    return list(found.values())
