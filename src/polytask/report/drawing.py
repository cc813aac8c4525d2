"""How pictures look: one palette, one style, figures that follow the page's light or dark theme.

A figure is drawn once, in light colours, and saved twice: as a PNG beside the page, and as SVG
inside it, where ink, grid and background become CSS variables, so that the browser's theme
recolours it. Colours are Paul Tol's 'bright' scheme (safe for the common kinds of colour
blindness); a name keeps its colour in every picture of a report, and mostly across reports.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polytask import files

BRIGHT = ("#4477AA", "#EE6677", "#228833", "#AA3377", "#66CCEE", "#CCBB44", "#EE8866", "#7A7A7A")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Colours that stand for a role; each occurs in no palette, so it can be replaced in the SVG.
INK, SOFT, GRID, PAPER = "#1c2024", "#5c636b", "#dfe2e6", "#fefefe"
BETTER, WORSE = "#1d5c9e", "#a0481f"
_ROLES = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    GRID: "var(--grid)",
    PAPER: "var(--paper)",
    BETTER: "var(--better)",
    WORSE: "var(--worse)",
}
WIDTH = 7.2  # inches: the text column


@dataclass(frozen=True)
class Look:
    """How a name is drawn, wherever it occurs."""

    colour: str
    dash: Any
    marker: str


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look per name. A name prefers the colour its own letters point to, so that it tends to be
    the same in every report; the ninth name starts over with another line and marker."""
    taken: dict[int, set[int]] = {}
    found = {}
    for i, name in enumerate(dict.fromkeys(names)):
        turn = i // len(BRIGHT)
        used = taken.setdefault(turn, set())
        slot = hashlib.blake2b(name.encode(), digest_size=2).digest()[0] % len(BRIGHT)
        while slot in used:
            slot = (slot + 1) % len(BRIGHT)
        used.add(slot)
        found[name] = Look(BRIGHT[slot], DASHES[turn % len(DASHES)], MARKERS[turn % len(MARKERS)])
    return found


@contextmanager
def style() -> Iterator[Any]:
    """matplotlib with our settings; yields the `Figure` class, no window system involved."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9.5,
        "axes.labelcolor": SOFT,
        "axes.edgecolor": GRID,
        "axes.facecolor": PAPER,
        "axes.titlecolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "text.color": INK,
        "text.parse_math": False,  # names are names, dollar signs included
        "lines.linewidth": 1.8,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "figure.facecolor": PAPER,
        "savefig.facecolor": PAPER,
        "svg.fonttype": "none",
    }
    with matplotlib.rc_context(settings):
        yield Figure


@dataclass(frozen=True)
class Picture:
    """A finished picture: the SVG for the page, the name of the PNG, and what it shows."""

    name: str
    svg: str
    title: str
    caption: str


def finish(figure: Any, folder: Path, name: str, title: str, caption: str) -> Picture:
    """Write NAME.png into `folder` (whole or not at all) and give the picture for the page."""
    import matplotlib

    # Place and measure everything once, not at every save.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    around = figure.get_tightbbox().padded(0.12)  # inches
    with files.writing(folder / f"{name}.png") as aside:
        figure.savefig(aside, format="png", dpi=160, bbox_inches=around)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        metadata = {"Date": None, "Creator": None}
        figure.savefig(out, format="svg", bbox_inches=around, metadata=metadata)
    return Picture(name, themed(out.getvalue(), name, title), title, caption)


def themed(svg: str, name: str, title: str) -> str:
    """An inline SVG whose role colours are CSS variables, as wide as its column at most."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    for colour, variable in _ROLES.items():
        body = re.sub(re.escape(colour), variable, body, flags=re.IGNORECASE)
    # Identifiers are unique within one SVG; several stand on one page.
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r'url\(#([^)"]+)\)', rf"url(#{name}-\1)", body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', body)
    body = re.sub(r"font: ?([^;\"]*?)'DejaVu Sans'[^;\"]*", r"font: \1 var(--sans)", body)
    width = re.search(r'viewBox="\S+ \S+ (\S+) ', body)
    limit = f"{float(width[1]) / 72 * 96:.0f}px" if width else "100%"
    head, rest = body.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'{head} role="img" aria-label="{label}" style="max-width:{limit}">{rest}'


def diverging() -> Any:
    """From worse (rust) over paper to better (blue), the same in both themes."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("polytask", ["#b2552b", "#f3f1ee", "#2166ac"])


def ink_on(rgba: Sequence[float]) -> str:
    """Dark or light text, whichever reads better on a colour."""
    luminance = 0.2126 * rgba[0] + 0.7152 * rgba[1] + 0.0722 * rgba[2]
    return "#15181b" if luminance > 0.45 else "#ffffff"


def short(text: str, limit: int = 22) -> str:
    """A name cut in the middle, so that both ends stay readable."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 3
    return f"{text[: limit - 1 - tail]}…{text[-tail:]}"
