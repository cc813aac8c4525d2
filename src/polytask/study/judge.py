"""From paired results to verdicts.

Per claim: d_s = sign * (metric of `better` - metric of `than`) for every seed s, an interval of
the mean of d, and

    shown         the interval lies above the margin
    contradicted  the interval lies below the margin
    not shown     it holds the margin

A study is shown when every claim and every ablation is; contradicted when a claim is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polytask.errors import ConfigError, suggestion
from polytask.evaluate.intervals import Interval, bootstrap_interval, holm, t_interval, t_test
from polytask.study.evidence import ArmRecord, Judgement, Verdict
from polytask.study.records import Claim


def judge_all(
    claims: Sequence[Claim], arms: Mapping[str, ArmRecord], correction: str, judged: bool = True
) -> list[Judgement]:
    """A judgement per claim, Holm-corrected when `correction` is 'holm'.

    `judged` False (a smoke run, fewer than two seeds) reports differences without verdicts.
    """
    differences = [paired_differences(claim, arms) for claim in claims]
    p_values = [
        t_test([d - claim.margin for d in complete]) if complete is not None else None
        for claim, complete in zip(claims, map(_complete, differences), strict=True)
    ]
    adjusted: list[float | None] = [None] * len(claims)
    if correction == "holm":
        for claim in claims:
            if claim.interval != "t":
                raise ConfigError(
                    f"claim '{claim.text}': Holm's correction needs the t interval, not "
                    f"'{claim.interval}'"
                )
        # A claim without a p-value counts as tested and failed.
        adjusted = list(holm([1.0 if p is None else p for p in p_values]))
    return [
        _judge(claim, d, p, q, judged)
        for claim, d, p, q in zip(claims, differences, p_values, adjusted, strict=True)
    ]


def paired_differences(claim: Claim, arms: Mapping[str, ArmRecord]) -> list[float | None]:
    """Per seed, positive where `better` is better; None where a run has no finite value."""
    for name in (claim.better, claim.than):
        for trial in arms[name].trials:
            if claim.metric not in trial.metrics:
                raise ConfigError(
                    f"claim '{claim.text}': arm '{name}' reports no metric '{claim.metric}'."
                    f"{suggestion(claim.metric, trial.metrics)}"
                )
    sign = 1.0 if claim.higher_is_better else -1.0
    pairs = zip(
        arms[claim.better].values(claim.metric), arms[claim.than].values(claim.metric), strict=True
    )
    return [None if a is None or b is None else sign * (a - b) for a, b in pairs]


def _complete(differences: Sequence[float | None]) -> list[float] | None:
    finite = [d for d in differences if d is not None]
    return finite if len(finite) == len(differences) >= 2 else None


def _judge(
    claim: Claim,
    differences: list[float | None],
    p: float | None,
    p_adjusted: float | None,
    judged: bool,
) -> Judgement:
    complete = _complete(differences)
    t = boot = None
    if complete is not None:
        t = t_interval(complete, claim.confidence)
        boot = bootstrap_interval(complete, claim.confidence)
    if not judged:
        verdict: Verdict = "not judged"
    elif complete is None:
        verdict = "not shown"
    elif p_adjusted is not None and t is not None:
        verdict = _by_p(claim, t, p_adjusted)
    else:
        verdict = _by_interval(claim, t if claim.interval == "t" else boot)
    interval = t if claim.interval == "t" else boot
    sentence = _sentence(claim, verdict, interval, p_adjusted, differences)
    return Judgement(claim, differences, t, boot, p, p_adjusted, verdict, sentence)


def _by_interval(claim: Claim, interval: Interval | None) -> Verdict:
    assert interval is not None
    if interval.low > claim.margin:
        return "shown"
    return "contradicted" if interval.high < claim.margin else "not shown"


def _by_p(claim: Claim, t: Interval, p_adjusted: float) -> Verdict:
    if p_adjusted >= 1 - claim.confidence:
        return "not shown"
    return "shown" if t.mean > claim.margin else "contradicted"


def _sentence(
    claim: Claim,
    verdict: Verdict,
    interval: Interval | None,
    p_adjusted: float | None,
    differences: Sequence[float | None],
) -> str:
    if interval is None:
        missing = sum(d is None for d in differences)
        why = f"{missing} of {len(differences)} pairs have no finite value" if missing else "1 pair"
        return f"{claim.text}: {verdict} ({why}, so no interval)"
    corrected = "" if p_adjusted is None else f", Holm-adjusted p = {p_adjusted:.3g}"
    return (
        f"{claim.text}: {verdict} (gain {interval.mean:+.3g}, {interval.confidence:.0%} interval "
        f"{interval.low:+.3g} to {interval.high:+.3g} over {interval.n} seeds{corrected})"
    )


def overall(judgements: Sequence[Judgement]) -> tuple[Verdict, str]:
    """The study's verdict and the reason in words."""
    verdicts = [j.verdict for j in judgements]
    if "not judged" in verdicts or not judgements:
        return "not judged", "nothing was judged: this run only shows that everything executes"
    claims = [j for j in judgements if j.claim.kind == "claim"]
    ablations = [j for j in judgements if j.claim.kind == "ablation"]
    against = [j for j in claims if j.verdict == "contradicted"]
    if against:
        return "contradicted", against[0].sentence
    open_claims = [j for j in claims if j.verdict != "shown"]
    if open_claims:
        return "not shown", open_claims[0].sentence
    unharmed = [j for j in ablations if j.verdict != "shown"]
    if unharmed:
        return "not shown", f"an ablation did not come out worse: {unharmed[0].sentence}"
    what = "the claim" if len(claims) == 1 else f"all {len(claims)} claims"
    if ablations:
        what += f" and {'its ablation' if len(ablations) == 1 else f'{len(ablations)} ablations'}"
    return "shown", f"{what} came out as stated"


def warnings(judgements: Sequence[Judgement], arms: Mapping[str, ArmRecord]) -> list[str]:
    """What a reader should know before believing: seeds without effect, runs that diverged."""
    found = []
    for j in judgements:
        complete = _complete(j.differences)
        if complete and len(set(complete)) == 1:
            found.append(
                f"{j.claim.text}: the difference is {complete[0]:.6g} for every seed; if the "
                "seed does not reach data, initialisation or order, the interval says nothing"
            )
    for name, arm in arms.items():
        for trial in arm.trials:
            lost = [metric for metric, value in trial.metrics.items() if value is None]
            if lost:
                found.append(f"arm '{name}', seed {trial.seed}: {', '.join(lost)} not finite")
    return found
