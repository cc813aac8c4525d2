"""The page of a pretraining run: losses by denoiser, and what the model reads and must write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from polytask import files
from polytask.objectives.denoising import Specials
from polytask.objectives.pairs import Pairs
from polytask.report import page as html
from polytask.report.drawing import WIDTH, Look, Picture, finish, looks, style
from polytask.report.words import amount, number, signed

_EXAMPLES = 2  # per denoiser
_LONG = 400  # tokens of a side that are shown

_CSS = """<style>
.pair { border-left: .3rem solid var(--tone); padding: .1rem 0 .1rem .9rem; margin: 1rem 0; }
.pair p { margin: .25rem 0; overflow-wrap: anywhere; }
.pair .side { color: var(--soft); font-size: .8rem; margin-right: .5rem; }
.mark { background: var(--tone); color: #fff; border-radius: .3rem; padding: 0 .3rem;
  font-size: .78rem; margin: 0 .15rem; white-space: nowrap; }
.mark.mode { border-radius: 1rem; } .mark.end { background: var(--grid); color: var(--soft); }
.spoken { border-bottom: .16rem solid var(--tone); }
</style>"""


def write_page(
    folder: Path,
    record: Mapping[str, Any],
    names: Sequence[str],
    examples: Mapping[int, Pairs],
    decode: Callable[[int], str],
    specials: Specials,
) -> Path:
    """report.html and loss-by-denoiser.png in a run folder.

    record: what scores.json holds (before, after, plan, ledger, text, corpus). names: denoisers.
    examples: denoiser -> pairs to show. decode: one token as text.
    """
    look = looks(list(names))
    curve = loss_picture(folder, look)
    rows = []
    before, after = record["before"], record["after"]
    for name in names:
        a, b = (part.get(name, {}).get("nll") for part in (before, after))
        change = None if a is None or b is None else b - a
        rows.append((name, number(a), number(b), signed(change)))
    booked = {row["task"]: row for row in record["ledger"] or [] if row["task"] != "total"}
    read = [
        (
            line["denoiser"],
            f"{line['chunks']:,}",
            amount(line["tokens"]),
            amount(booked.get(line["denoiser"], {}).get("tokens")),
            f"{line['epochs']:,}",
        )
        for line in record["text"]
    ]
    plan = record["plan"]
    parts = [
        _CSS,
        html.paragraph("Pretraining", "kicker"),
        f"<h1>{escape(str(plan['model']))}</h1>",
        html.paragraph(sentence(before, after), "lead"),
        html.paragraph(
            f"{plan['architecture']}, {amount(plan['parameters'])} parameters, "
            f"{plan['steps']:,} steps of {plan['examples']} examples.",
            "soft",
        ),
        html.section(
            "Held-out text",
            html.table(("denoiser", "before", "after", "change"), rows),
            html.paragraph(
                "-log p per token of text, in nats. Sentinels, mode tokens and ends do not count, "
                "so denoisers can be compared.",
                "small soft",
            ),
            html.figure(curve),
        ),
        html.section("What was read", html.table(
            ("denoiser", "chunks", "text tokens", "tokens seen", "passes"), read
        )),
        html.section("What it reads, and what it has to write", *(
            shown(names[at], look[names[at]], pairs, decode, specials)
            for at, pairs in examples.items()
        )),
    ]  # fmt: skip
    path = folder / "report.html"
    files.write_text(path, html.page(f"Pretraining of {plan['model']}", parts))
    return path


def sentence(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The result in words."""
    both = [name for name in after if name in before]
    if not both:
        return "No text was held out, so there is no score; the losses of training are below."
    gain = float(np.mean([before[n]["nll"] - after[n]["nll"] for n in both]))
    better = sum(after[n]["nll"] < before[n]["nll"] for n in both)
    word = "falls" if gain > 0 else "rises"
    return (
        f"On held-out text -log p per token {word} by {abs(gain):.2f} nats on average; it is lower "
        f"for {better} of {len(both)} denoisers."
    )


def loss_picture(folder: Path, look: Mapping[str, Look]) -> Picture | None:
    """Losses by denoiser over steps, from metrics.jsonl: held-out ones as marks, those of training
    as lines. None where nothing was logged."""
    lines, marks = read_losses(folder / "metrics.jsonl", list(look))
    if not any(lines.values()) and not any(marks.values()):
        return None
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 3.2), layout="constrained")
        ax = figure.subplots()
        for name, how in look.items():
            if lines[name]:
                steps, values = zip(*lines[name], strict=True)
                ax.plot(steps, values, color=how.colour, ls=how.dash, lw=1.4, label=name)
            if marks[name]:
                steps, values = zip(*marks[name], strict=True)
                label = None if lines[name] else name
                ax.plot(steps, values, how.marker, color=how.colour, ms=4, label=label)
        ax.set_xlabel("steps")
        ax.set_ylabel("nats per target token")
        ax.legend(ncols=1, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
        caption = (
            "Lines: losses of training, means between two logs, sentinels included. Marks: held "
            "out, text alone."
        )
        return finish(figure, folder, "loss-by-denoiser", "Losses by denoiser", caption)


Points = dict[str, list[tuple[int, float]]]


def read_losses(path: Path, names: Sequence[str]) -> tuple[Points, Points]:
    """(step, nll) by denoiser: of training, and held out."""
    lines: Points = {name: [] for name in names}
    marks: Points = {name: [] for name in names}
    if not path.is_file():
        return lines, marks
    for text in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(text)
        if entry.get("kind") == "eval" and entry.get("task") in marks:
            value = entry["metrics"].get("nll")
            if value is not None:
                marks[entry["task"]].append((int(entry["step"]), float(value)))
        for name, terms in (entry.get("terms") or {}).items():
            value = terms.get("nll") if isinstance(terms, Mapping) else None
            if name in lines and value is not None:
                lines[name].append((int(entry["step"]), float(value)))
    return lines, marks


def shown(
    name: str, look: Look, pairs: Pairs, decode: Callable[[int], str], specials: Specials
) -> str:
    """A few pairs of a denoiser, its colour at every mark and under every span."""
    parts = [f"<h3>{escape(name)}</h3>"]
    for row in range(min(_EXAMPLES, len(pairs))):
        first = pairs.target_offsets[row]
        spoken = pairs.is_original[first : first + len(pairs.target(row))]
        source = marked(pairs.input(row), None, decode, specials)
        target = marked(pairs.target(row), spoken, decode, specials)
        parts.append(
            f'<div class="pair" style="--tone:{look.colour}">'
            f'<p><span class="side">reads</span>{source or "nothing"}</p>'
            f'<p><span class="side">writes</span>{target}</p></div>'
        )
    return "\n".join(parts)


def marked(
    ids: np.ndarray,
    spoken: np.ndarray | None,
    decode: Callable[[int], str],
    specials: Specials,
) -> str:
    """Tokens as HTML: sentinels, modes and ends as marks, spans of a target underlined."""
    sentinel = {token: str(i) for i, token in enumerate(specials.sentinels)}
    mode = {token: name for name, token in specials.modes.items()}
    out: list[str] = []
    for at, token in enumerate(ids[:_LONG].tolist()):
        if token in sentinel:
            out.append(f'<span class="mark">{sentinel[token]}</span>')
        elif token in mode:
            out.append(f'<span class="mark mode">{escape(mode[token])}</span>')
        elif token == specials.end:
            out.append('<span class="mark end">end</span>')
        else:
            text = escape(decode(token))
            out.append(f'<span class="spoken">{text}</span>' if _yes(spoken, at) else text)
    more = len(ids) - _LONG
    return "".join(out) + (f" … ({more} more tokens)" if more > 0 else "")


def _yes(flags: np.ndarray | None, at: int) -> bool:
    return flags is not None and bool(flags[at])
