"""`proof_report`: the page of a proof, from its evidence."""

from __future__ import annotations

from html import escape
from pathlib import Path

from polytask import files
from polytask.evaluate.intervals import Interval
from polytask.report import page as html
from polytask.report import proof_figures as draw
from polytask.report.drawing import looks
from polytask.report.words import amount, duration, number, plain_metric, signed
from polytask.study.evidence import Evidence, Judgement
from polytask.study.records import QUANTITIES

_TONE = {"shown": "better", "contradicted": "worse"}
_ANSWER = {
    "shown": "What was claimed holds on these seeds.",
    "contradicted": "The opposite of what was claimed holds on these seeds.",
    "not shown": "These seeds do not suffice to show all that was claimed.",
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
        html.section("Reported, not claimed", html.items(_reported(evidence))),
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
            html.paragraph(f"{evidence.reason[:1].upper()}{evidence.reason[1:]}.", "soft"),
            html.items(evidence.warnings),
        ]
    )


def _claims(evidence: Evidence, pictures: Path) -> str:
    """Each claim with its numbers, claims before ablations."""
    corrected = evidence.correction == "holm"
    heads = ["claim", "verdict", "gain", "interval", "p (Holm)" if corrected else "p"]
    ordered = sorted(evidence.judgements, key=lambda j: j.claim.kind == "ablation")
    rows = [_claim_row(j, corrected) for j in ordered]
    note = (
        "Gain: paired difference over seeds, in units of the metric, positive where the claim "
        "points. p is that of the paired t test against the margin"
    )
    note += ", corrected for the number of claims (Holm)." if corrected else "."
    both = [
        (j.claim.text, *("–" if i is None else _between(i) for i in (j.t, j.bootstrap)), _p(j.p))
        for j in ordered
    ]
    return html.section(
        "Claims",
        html.table(heads, rows, left=2, wide=True),
        html.paragraph(note, "soft small"),
        html.figure(draw.differences(evidence, pictures)),
        html.folded(
            "Both intervals",
            html.table(["claim", "Student's t", "bootstrap", "p, uncorrected"], both, wide=True),
        ),
    )


def _claim_row(judgement: Judgement, corrected: bool) -> list[html.Cell]:
    claim = judgement.claim
    text = ("Ablation: " if claim.kind == "ablation" else "") + claim.text
    interval = judgement.t if claim.interval == "t" else judgement.bootstrap
    return [
        text,
        (judgement.verdict, f"{_TONE.get(judgement.verdict, '')} whole".strip()),
        signed(interval.mean if interval else None),
        "–" if interval is None else _between(interval),
        _p(judgement.p_adjusted if corrected else judgement.p),
    ]


def _between(interval: Interval) -> str:
    return f"{signed(interval.low)} to {signed(interval.high)}"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}" if value < 0.01 else f"{value:.2f}"


def _arms(evidence: Evidence, pictures: Path) -> str:
    """A picture per metric that is claimed about, and the means of all metrics."""
    look = looks(list(evidence.arms))
    figures: list[str] = []
    directions = {j.claim.metric: j.claim.higher_is_better for j in evidence.judgements}
    for metric, up in directions.items():
        names = [n for n, arm in evidence.arms.items() if metric in arm.trials[0].metrics]
        picture = draw.arms(evidence, metric, names, up, look, pictures)
        figures.append(html.figure(picture, caption=not figures))
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


def _reported(evidence: Evidence) -> list[str]:
    """Comparisons beside the claims, which a system keeps under notes as 'reported'."""
    lines = evidence.notes.get("reported", [])
    return [str(line) for line in lines] if isinstance(lines, list) else []


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
        html.table(["compared", "quantity", "widest gap", "allowed"], checks, left=2, wide=True),
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
    notes = {name: value for name, value in evidence.notes.items() if name != "reported"}
    if notes:
        parts.append(html.folded("Notes", html.yaml_block(notes)))
    return "\n".join(parts)
