"""Verdicts: what an interval says about a claim, for every way a proof can end."""

from __future__ import annotations

import pytest
from scipy import stats

from polytask.errors import ConfigError
from polytask.rng import generator
from polytask.study import ArmRecord, Budget, Claim, Trial
from polytask.study.judge import judge_all, overall, warnings


def arm(*values: float | None, metric: str = "accuracy") -> ArmRecord:
    return ArmRecord({}, [Trial(i, {metric: v}, Budget(rows=1)) for i, v in enumerate(values)])


BASE = arm(0.70, 0.72, 0.68, 0.71)
BETTER = arm(0.80, 0.815, 0.79, 0.80)
SAME = arm(0.71, 0.71, 0.67, 0.72)


def verdict(claim: Claim, arms: dict[str, ArmRecord], correction: str = "none") -> str:
    return judge_all([claim], arms, correction)[0].verdict


def test_a_claim_is_shown_contradicted_or_not_shown() -> None:
    arms = {"new": BETTER, "old": BASE, "same": SAME}
    assert verdict(Claim("new", "old", "accuracy"), arms) == "shown"
    assert verdict(Claim("old", "new", "accuracy"), arms) == "contradicted"
    assert verdict(Claim("same", "old", "accuracy"), arms) == "not shown"


def test_differences_are_positive_where_better_is_better() -> None:
    arms = {"a": arm(1.0, 2.0, metric="loss"), "b": arm(1.5, 2.25, metric="loss")}
    down = judge_all([Claim("a", "b", "loss", higher_is_better=False)], arms, "none")[0]
    up = judge_all([Claim("a", "b", "loss")], arms, "none")[0]
    assert down.differences == [0.5, 0.25]
    assert up.differences == [-0.5, -0.25]


def test_the_margin_must_be_exceeded_by_the_whole_interval() -> None:
    arms = {"new": BETTER, "old": BASE}
    low = judge_all([Claim("new", "old", "accuracy")], arms, "none")[0].t
    assert low is not None
    below, above = low.low - 1e-9, low.low + 1e-9
    assert verdict(Claim("new", "old", "accuracy", margin=below), arms) == "shown"
    assert verdict(Claim("new", "old", "accuracy", margin=above), arms) == "not shown"
    assert verdict(Claim("new", "old", "accuracy", margin=low.high + 1e-9), arms) == "contradicted"


def test_p_is_that_of_the_paired_t_test_at_the_margin() -> None:
    arms = {"new": BETTER, "old": BASE}
    j = judge_all([Claim("new", "old", "accuracy", margin=0.08)], arms, "none")[0]
    expected = stats.ttest_1samp([0.10, 0.095, 0.11, 0.09], 0.08).pvalue
    assert j.p == pytest.approx(expected)


def test_holm_can_take_a_claim_back() -> None:
    g = generator(0, "weak")
    base = [float(v) for v in g.normal(size=6)]
    arms = {"base": arm(*base)}
    claims = []
    for i, shift in enumerate((0.9, 1.0, 1.1)):
        arms[f"a{i}"] = arm(*[b + shift * (1 + 0.85 * (-1) ** s) for s, b in enumerate(base)])
        claims.append(Claim(f"a{i}", "base", "accuracy"))
    alone = [j.verdict for j in judge_all(claims, arms, "none")]
    together = judge_all(claims, arms, "holm")
    assert alone == ["shown"] * 3
    assert [j.verdict for j in together] == ["not shown"] * 3
    assert all(j.p_adjusted == pytest.approx(3 * (j.p or 0)) for j in together)
    with pytest.raises(ConfigError, match="needs the t interval"):
        judge_all([Claim("a0", "base", "accuracy", interval="bootstrap")], arms, "holm")


def test_a_run_that_diverged_leaves_its_claim_not_shown() -> None:
    arms = {"new": arm(0.9, None, 0.9, 0.9), "old": BASE}
    j = judge_all([Claim("new", "old", "accuracy")], arms, "none")[0]
    assert j.verdict == "not shown"
    assert "1 of 4 pairs have no finite value" in j.sentence
    assert warnings([j], arms) == ["arm 'new', seed 1: accuracy not finite"]


def test_an_ablation_must_lose_for_the_study_to_be_shown() -> None:
    arms = {"new": BETTER, "old": BASE, "new without its part": arm(0.80, 0.80, 0.80, 0.80)}
    claim = Claim("new", "old", "accuracy")
    ablation = Claim("new", "new without its part", "accuracy", kind="ablation")
    judgements = judge_all([claim, ablation], arms, "none")
    assert [j.verdict for j in judgements] == ["shown", "not shown"]
    assert overall(judgements)[0] == "not shown"
    assert "ablation did not come out worse" in overall(judgements)[1]
    arms["new without its part"] = BASE
    done = overall(judge_all([claim, ablation], arms, "none"))
    assert done == ("shown", "the claim and its ablation came out as stated")


def test_one_contradicted_claim_contradicts_the_study() -> None:
    arms = {"new": BETTER, "old": BASE}
    both = [Claim("new", "old", "accuracy"), Claim("old", "new", "accuracy")]
    assert overall(judge_all(both, arms, "none"))[0] == "contradicted"


def test_seeds_without_effect_are_pointed_out() -> None:
    arms = {"a": arm(0.75, 0.75, 0.75), "b": arm(0.5, 0.5, 0.5)}
    judgements = judge_all([Claim("a", "b", "accuracy")], arms, "none")
    assert "0.25 for every seed" in warnings(judgements, arms)[0]


def test_an_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"reports no metric 'acuracy'\. Did you mean 'accuracy'"):
        judge_all([Claim("a", "b", "acuracy")], {"a": BASE, "b": BASE}, "none")


def test_equal_arms_are_told_apart_about_one_time_in_twenty() -> None:
    """True difference 0, five seeds: false 'shown' plus false 'contradicted' is about 5 %."""
    g, runs, false = generator(3, "equal arms"), 1500, 0
    claim = Claim("a", "b", "accuracy")
    for _ in range(runs):
        shared = g.normal(size=5)
        arms = {n: arm(*(shared + 0.2 * g.normal(size=5)).tolist()) for n in "ab"}
        false += verdict(claim, arms) != "not shown"
    assert false / runs == pytest.approx(0.05, abs=3.5 * (0.05 * 0.95 / runs) ** 0.5)


def test_claims_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="compared with itself"):
        Claim("a", "a", "accuracy")
    with pytest.raises(ConfigError, match="confidence"):
        Claim("a", "b", "accuracy", confidence=95)
    with pytest.raises(ConfigError, match="margin"):
        Claim("a", "b", "accuracy", margin=-0.1)
    with pytest.raises(ConfigError, match=r"no quantity 'step'\. Did you mean 'steps'"):
        Claim("a", "b", "accuracy", equal={"step": 0.0})
