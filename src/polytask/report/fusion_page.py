"""The page of a fusion: what was written, who moved the large model at which token, how far.

Pictures: strength over the steps, share of each expert per prompt, and the text itself with every
token in its expert's colour, paler where the strength is smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polytask import files
from polytask.report import page as html
from polytask.report.drawing import (
    INK,
    PAPER,
    SOFT,
    WIDTH,
    Look,
    Picture,
    finish,
    looks,
    short,
    style,
)

if TYPE_CHECKING:
    from polytask.infer.fusion_model import Written

_PANELS = 4  # prompts whose strengths are drawn
_ROWS = 400  # steps of a prompt in the table
_TEXT = 0.25  # of an expert's colour behind a token of the smallest strength above 0
_STYLE = """<style>
.fused { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--band);
  padding: .9rem 1rem; margin: .7rem 0; border-radius: .4rem;
  font: .85rem/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas,
  "DejaVu Sans Mono", monospace; }
.fused .prompt { color: var(--soft); } .fused span.t { border-radius: .2rem; padding: .1rem 0; }
.key { font-size: .85rem; } .key i { display: inline-block; width: .8rem; height: .8rem;
  border-radius: .2rem; margin: 0 .35rem 0 1rem; vertical-align: -.08rem; }
.key i:first-child { margin-left: 0; }
</style>"""


def fusion_report(
    folder: Path, written: Sequence[Written], names: Sequence[str], figures: Mapping[str, Any]
) -> Path:
    """Write report.html and its pictures into `folder`.

    Args:
        names: the experts, in the order of `Token.alphas`.
        figures: 'models', 'options', 'tokens', 'seconds', 'tokens_per_second' of the run.
    """
    colours = looks(names)
    models = figures["models"]
    parts = [
        _STYLE,
        html.paragraph("Logit fusion", "kicker"),
        f"<h1>{escape(short(str(models['large']), 60))} with {_listed(names)}</h1>",
        html.paragraph(_said(written, names), "lead"),
        html.section("Text", _key(colours), *(_text(one, colours) for one in written)),
    ]
    if any(one.tokens for one in written):
        strength = strength_picture(folder, written, names, colours, figures["options"])
        parts.append(html.section("Strength over the steps", html.figure(strength)))
        parts.append(
            html.section("Who acted", html.figure(share_picture(folder, written, names, colours)))
        )
    parts.append(html.section("Every step", *(_steps(i, one) for i, one in enumerate(written, 1))))
    parts.append(html.section("How it was run", _how(figures)))
    path = folder / "report.html"
    files.write_text(path, html.page(f"Fusion with {', '.join(names)}", parts))
    return path


def _listed(names: Sequence[str]) -> str:
    return escape(", ".join(short(name, 30) for name in names))


def _said(written: Sequence[Written], names: Sequence[str]) -> str:
    tokens = [token for one in written for token in one.tokens]
    if not tokens:
        return "Nothing was written."
    acted = [token for token in tokens if token.expert in names]
    mean = sum(token.alpha for token in acted) / max(1, len(acted))
    count = f"{len(tokens)} tokens in {len(written)} text{'s' if len(written) > 1 else ''}."
    if not acted:
        return f"{count} The large model was left alone at every step."
    most = max(names, key=lambda name: sum(token.expert == name for token in acted))
    share = sum(token.expert == most for token in tokens) / len(tokens)
    return (
        f"{count} An expert moved the large model at {len(acted) / len(tokens):.0%} of them, with "
        f"a mean strength of {mean:.2f}; '{most}' acted most often ({share:.0%})."
    )


def _key(colours: Mapping[str, Look]) -> str:
    marks = "".join(
        f'<i style="background:{look.colour}"></i>{escape(name)}' for name, look in colours.items()
    )
    return f'<p class="key">{marks}<i></i>no mark: the large model alone</p>'


def _text(one: Written, colours: Mapping[str, Look]) -> str:
    """The prompt, then every token on its expert's colour."""
    most = max((token.alpha for token in one.tokens), default=0.0) or 1.0
    spans = [f'<span class="prompt">{escape(one.prompt)}</span>']
    for token in one.tokens:
        if token.expert not in colours:
            spans.append(escape(token.text))
            continue
        share = _TEXT + (1 - _TEXT) * 0.6 * token.alpha / most
        colour = f"color-mix(in srgb, {colours[token.expert].colour} {share:.0%}, transparent)"
        title = f"{token.expert}, strength {token.alpha:g}"
        if token.nll is not None:
            title += f", {token.nll:.2f} nats"
        spans.append(
            f'<span class="t" style="background:{colour}" title="{escape(title)}">'
            f"{escape(token.text)}</span>"
        )
    return f'<div class="fused">{"".join(spans)}</div>'


def strength_picture(
    folder: Path,
    written: Sequence[Written],
    names: Sequence[str],
    colours: Mapping[str, Look],
    options: Mapping[str, Any],
) -> Picture:
    """A panel per prompt, four at most: every expert's strength where it acts."""
    shown = [one for one in written if one.tokens][:_PANELS]
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 0.8 + 1.5 * len(shown)), layout="constrained")
        axes = figure.subplots(len(shown), 1, squeeze=False)[:, 0]
        for ax, one in zip(axes, shown, strict=True):
            for k, name in enumerate(names):
                look = colours[name]
                steps = [i for i, t in enumerate(one.tokens, 1) if t.alphas[k] > 0]
                values = [one.tokens[i - 1].alphas[k] for i in steps]
                ax.vlines(steps, 0, values, color=look.colour, lw=1.1, alpha=0.35)
                ax.plot(steps, values, look.marker, ms=3.4, color=look.colour, label=name)
            none = [i for i, t in enumerate(one.tokens, 1) if max(t.alphas) == 0]
            ax.plot(none, [0] * len(none), "|", ms=5, color=SOFT, label="large model alone")
            ax.set_title(short(" ".join(one.prompt.split()) or "(given text)", 70))
            ax.set_ylabel("strength")
            ax.set_ylim(bottom=-0.05)
            ax.margins(x=0.01)
        axes[-1].set_xlabel("step (token)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4)
        rest = len([one for one in written if one.tokens]) - len(shown)
        more = f" {rest} more prompts are in tokens.csv." if rest else ""
        chosen = "chosen at every step" if options["mode"] != "static" else "fixed"
        caption = f"Strength of the expert that acts, {chosen}; one mark a token.{more}"
        return finish(figure, folder, "strength", "Strength over the steps", caption)


def share_picture(
    folder: Path, written: Sequence[Written], names: Sequence[str], colours: Mapping[str, Look]
) -> Picture:
    """A bar per prompt: the share of its tokens on which each expert acted."""
    shown = [(i, one) for i, one in enumerate(written, 1) if one.tokens][:24]
    with style() as figure_class:
        figure = figure_class(figsize=(WIDTH, 0.9 + 0.34 * len(shown)), layout="constrained")
        ax = figure.subplots()
        left = [0.0] * len(shown)
        for name in names:
            values = [one.shares.get(name, 0.0) for _, one in shown]
            ax.barh(
                range(len(shown)),
                values,
                left=left,
                color=colours[name].colour,
                edgecolor=PAPER,
                label=name,
                height=0.72,
            )
            left = [a + b for a, b in zip(left, values, strict=True)]
        rest = [1 - value for value in left]
        ax.barh(
            range(len(shown)), rest, left=left, color=SOFT, alpha=0.25, height=0.72, label="nobody"
        )
        labels = [
            f"{i}  {short(' '.join(one.prompt.split()) or '(given text)', 34)}" for i, one in shown
        ]
        ax.set_yticks(range(len(shown)), labels, color=INK)
        ax.invert_yaxis()
        ax.set_xlim(0, 1)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("share of tokens")
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper left", ncols=5)
        caption = "Share of each text's tokens on which an expert moved the large model."
        return finish(figure, folder, "shares", "Who acted in which text", caption)


def _steps(number: int, one: Written) -> str:
    heads = ["step", "token", "expert", "strength", "KL(fused|large)", "KL(large|fused)", "loss"]
    given = any(token.nll is not None for token in one.tokens)
    heads += ["nats"] if given else []
    rows = []
    for step, token in enumerate(one.tokens[:_ROWS], 1):
        row = [str(step), repr(token.text), short(token.expert, 24), f"{token.alpha:g}"]
        row += [f"{token.moved:.4f}", f"{token.back:.4f}", f"{token.loss:.2e}"]
        rows.append(row + ([f"{token.nll:.3f}"] if token.nll is not None else []))
    what = f"Text {number}: {len(one.tokens)} steps"
    if len(one.tokens) > _ROWS:
        what += f" (the first {_ROWS}; all are in tokens.csv)"
    return html.folded(what, html.table(heads, rows, left=3)) if rows else ""


def _how(figures: Mapping[str, Any]) -> str:
    models, options = figures["models"], dict(figures["options"])
    grid = options.pop("grid")
    options["grid"] = f"{len(grid)} strengths from {grid[0]:g} to {grid[-1]:g}"
    speed = figures["tokens_per_second"]
    rows = [
        ("large", models["large"]),
        ("base", models["base"]),
        *((f"expert {name}", place) for name, place in models["experts"].items()),
        ("vocabulary", f"{figures['vocabulary']:,} tokens, the same in all models"),
        ("speed", "-" if speed is None else f"{speed:.1f} tokens a second, all prompts together"),
        *((key, str(value)) for key, value in options.items() if value not in (None, [], ())),
    ]
    said = html.paragraph(
        "At each step the strength is the one at which the large model moves away from its own "
        "distribution as far, in both KL directions, as the experts moved from the small base.",
        "small soft",
    )
    return html.table(("", ""), rows, left=2) + said
