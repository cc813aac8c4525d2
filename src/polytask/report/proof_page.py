"""`proof_report`: the page of a proof, from its evidence."""

from __future__ import annotations

from html import escape
from pathlib import Path

from polytask import files
from polytask.report import page as html
from polytask.report import proof_figures as draw
from polytask.report.drawing import looks
from polytask.report.words import amount, duration, number, plain_metric, signed
from polytask.study.evidence import Evidence, Judgement
from polytask.study.records import QUANTITIES

_TONE = {"shown": "better", "contradicted": "worse"}
_ANSWER = {
    "shown": "The claim holds on these seeds.",
    "contradicted": "The opposite of the claim holds on these seeds.",
    "not shown": "These seeds do not decide the claim.",
    "not judged": "Nothing was judged.",
}


def proof_report(evidence: Evidence, out: Path | str) -> Path:
    """Write NAME.html into `out` and its PNGs into NAME-pictures/; returns the page's path."""
    target = Path(out)
    pictures = target / f"{evidence.name}-pictures"
    parts = [
        _head(evidence),
        _claims(evidence, pictures),
        _arms(evidence, pictures),
        _budgets(evidence),
        _tuning(evidence),
        _origin(evidence),
    ]
    path = target / f"{evidence.name}.html"
    title = evidence.title or evidence.name
    files.write_text(path, html.page(f"{title} · polytask", parts))
    return path


def _head(evidence: Evidence) -> str:
    seeds = evidence.seeds
    said = f"seeds {seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"seed {seeds[0]}"
    facts = ["polytask proof", evidence.name, f"budget {evidence.size}", said]
    tone = _TONE.get(evidence.verdict, "soft")
    return "\n".join(
        [
            html.paragraph(" · ".join(facts), "kicker"),
            f"<h1>{escape(evidence.title or evidence.name)}</h1>",
            f'<p class="lead"><span class="verdict {tone}">{escape(evidence.verdict)}</span> '
            f"{_ANSWER[evidence.verdict]}</p>",
            html.paragraph(_clean(evidence.reason, evidence.verdict), "soft"),
            html.items(evidence.warnings),
        ]
    )


def _clean(reason: str, verdict: str) -> str:
    """The reason without the verdict it may begin with, as a sentence."""
    text = reason.removeprefix(f"{verdict}: ")
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _claims(evidence: Evidence, pictures: Path) -> str:
    """Each claim with its numbers, claims before ablations."""
    heads = ["claim", "verdict", "gain", "interval (t)", "interval (bootstrap)", "p"]
    corrected = evidence.correction == "holm"
    if corrected:
        heads.append("p, Holm")
    ordered = sorted(evidence.judgements, key=lambda j: j.claim.kind == "ablation")
    rows = [_claim_row(j, corrected) for j in ordered]
    note = (
        "Gain: paired difference over seeds, in units of the metric, positive where the claim "
        "points. p is that of the paired t test against the margin."
    )
    if corrected:
        note += " Verdicts use Holm's correction for the number of claims."
    return html.section(
        "Claims",
        html.table(heads, rows, left=2),
        html.paragraph(note, "soft small"),
        html.figure(draw.differences(evidence, pictures)),
    )


def _claim_row(judgement: Judgement, corrected: bool) -> list[html.Cell]:
    claim = judgement.claim
    tone = _TONE.get(judgement.verdict, "")
    text = ("ablation: " if claim.kind == "ablation" else "") + claim.text
    cells: list[html.Cell] = [text, (judgement.verdict, tone)]
    found = judgement.t
    cells.append(signed(found.mean if found else None))
    for interval in (judgement.t, judgement.bootstrap):
        known = interval is not None
        cells.append(f"{signed(interval.low)} to {signed(interval.high)}" if known else "–")
    cells.append(_p(judgement.p))
    if corrected:
        cells.append(_p(judgement.p_adjusted))
    return cells


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.01 else f"{value:.2f}"


def _arms(evidence: Evidence, pictures: Path) -> str:
    """A picture per metric that is claimed about, and the means of all metrics."""
    look = looks(list(evidence.arms))
    figures = []
    directions = {j.claim.metric: j.claim.higher_is_better for j in evidence.judgements}
    for metric, up in directions.items():
        names = [n for n, arm in evidence.arms.items() if metric in arm.trials[0].metrics]
        figures.append(html.figure(draw.arms(evidence, metric, names, up, look, pictures)))
    metrics = list(
        dict.fromkeys(m for arm in evidence.arms.values() for m in arm.trials[0].metrics)
    )
    rows = []
    for name, arm in evidence.arms.items():
        cells: list[html.Cell] = [name]
        for metric in metrics:
            known = [v for v in arm.values(metric) if v is not None]
            cells.append(number(sum(known) / len(known)) if known else "–")
        rows.append(cells)
    notes = [f"{name}: {arm.note}" for name, arm in evidence.arms.items() if arm.note]
    return html.section(
        "Arms",
        *figures,
        html.table(["mean over seeds", *map(plain_metric, metrics)], rows),
        html.items(notes),
    )


def _budgets(evidence: Evidence) -> str:
    """What every arm spent, and the checks that comparisons rest on."""
    spent = {
        name: {
            quantity: [
                value
                for trial in arm.trials
                if (value := getattr(trial.spent, quantity)) is not None
            ]
            for quantity in QUANTITIES
        }
        for name, arm in evidence.arms.items()
    }
    used = [q for q in QUANTITIES if any(of[q] for of in spent.values())]
    rows: list[list[html.Cell]] = [
        [name, *(_range(of[quantity], quantity) for quantity in used)] for name, of in spent.items()
    ]
    checks = [
        (f"{c.better} / {c.than}", c.quantity, f"{c.gap:.2%}", f"{c.tolerance:.2%}")
        for c in evidence.budget_checks
    ]
    return html.section(
        "Budgets",
        html.table(["spent per seed", *used], rows),
        html.table(["compared", "quantity", "widest gap", "allowed"], checks, left=2),
    )


def _range(values: list[float], quantity: str) -> str:
    if not values:
        return "–"
    show = duration if quantity == "seconds" else amount
    low, high = show(min(values)), show(max(values))
    return low if low == high else f"{low} to {high}"


def _tuning(evidence: Evidence) -> str:
    tuning = evidence.tuning
    if tuning is None:
        return ""
    goal = "highest" if tuning.higher_is_better else "lowest"
    seeds = ", ".join(map(str, tuning.seeds))
    rows: list[tuple[html.Cell, ...]] = []
    for arm, points in tuning.points.items():
        for point in points:
            said = ", ".join(f"{key} = {value}" for key, value in point.params.items()) or "(none)"
            taken = "chosen" if point.params == tuning.chosen[arm] else ""
            rows.append((arm, said, (taken, "better"), number(point.mean)))
    runs = ", ".join(f"{arm} {count}" for arm, count in tuning.trials.items())
    return html.section(
        "Tuning",
        html.paragraph(
            f"Settings were chosen by the {goal} mean {plain_metric(tuning.metric)} over tuning "
            f"seeds {seeds}, apart from the seeds above. Runs per arm: {runs}."
        ),
        html.folded(
            "Every point that was tried",
            html.table(["arm", "setting", "", plain_metric(tuning.metric)], rows, left=3),
        ),
    )


def _origin(evidence: Evidence) -> str:
    facts = {
        **evidence.environment,
        "code": evidence.code,
        "started": evidence.started,
        "wall time of the last call": duration(evidence.seconds),
        "trials found in the cache": evidence.reused or None,
    }
    settings = {name: arm.params for name, arm in evidence.arms.items() if arm.params}
    parts = [html.folded("Environment", html.environment_table(facts))]
    if settings:
        parts.append(html.folded("Settings of the arms", html.yaml_block(settings)))
    if evidence.notes:
        parts.append(html.folded("Notes", html.yaml_block(evidence.notes)))
    return "\n".join(parts)
