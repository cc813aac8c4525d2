"""A page: one column, no external resource, light or dark as the reader's system is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from polytask.report.drawing import Picture

_CSS = """
:root { --ink:#1c2024; --soft:#5c636b; --grid:#dfe2e6; --paper:#fefefe; --band:#f5f6f8;
  --better:#1d5c9e; --worse:#a0481f; --sans: system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "Noto Sans", "DejaVu Sans", sans-serif; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink:#e8eaed; --soft:#a4abb3; --grid:#3a4047;
  --paper:#16191d; --band:#1f2429; --better:#7db4ea; --worse:#e79a72; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.55 var(--sans); }
main { max-width: 50rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height:1.2; letter-spacing:-.01em; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; margin: 3rem 0 .6rem; letter-spacing:-.005em; }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; }
p { margin: .5rem 0; } .soft { color: var(--soft); } .small { font-size: .85rem; }
.lead { font-size: 1.15rem; line-height:1.5; margin: 1.1rem 0 1.4rem; }
.kicker { color: var(--soft); font-size: .85rem; margin:0 0 .6rem; }
.verdict { display:inline-block; padding:.1rem .6rem; border-radius:1rem; font-weight:600;
  border:1.5px solid currentColor; font-size:.9rem; vertical-align: .12em; }
.better { color: var(--better); } .worse { color: var(--worse); }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 500; font-size:.82rem;
  vertical-align: bottom; }
th, td { padding: .38rem 1rem .38rem 0; border-bottom: 1px solid var(--grid); }
td { vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; } .whole { white-space: nowrap; }
table.wide td:first-child { min-width: 15rem; }
tr.total td { font-weight: 600; border-bottom: 0; }
figure { margin: 1rem 0 1.2rem; } figure svg { display:block; width:100%; height:auto; }
figcaption { color: var(--soft); font-size: .85rem; margin-top:.35rem; }
details { margin: .6rem 0; border-bottom: 1px solid var(--grid); padding-bottom: .6rem; }
summary { cursor: pointer; font-weight: 500; }
pre { background: var(--band); padding: .9rem 1rem; overflow-x: auto; border-radius: .4rem;
  font: .8rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
ul { padding-left: 1.2rem; } details ul { font-size: .9rem; } li { margin: .2rem 0; }
@media print { body { font-size: 11pt; } main { padding: 0; } details { display: none; } }
""".strip()


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_CSS}\n</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A heading and what stands below it; nothing when nothing does."""
    inside = "\n".join(part for part in parts if part)
    return f"<h2>{escape(title)}</h2>\n{inside}" if inside else ""


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text."""
    attribute = f' class="{kind}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>"


def figure(picture: Picture | None, caption: bool = True) -> str:
    """A picture with its caption (left out where the same one stood above)."""
    if picture is None:
        return ""
    below = f"\n<figcaption>{escape(picture.caption)}</figcaption>" if caption else ""
    return f"<figure>\n{picture.svg}{below}\n</figure>"


Cell = str | tuple[str, str]  # text, or (text, class)


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[Cell]],
    left: int = 1,
    total: bool = False,
    wide: bool = False,
) -> str:
    """A table; the first `left` columns are words, the others numbers. `total`: the last row is
    one. `wide`: the first column holds sentences."""
    found = list(rows)
    if not found:
        return ""

    def cell(tag: str, i: int, content: Cell) -> str:
        text, kind = content if isinstance(content, tuple) else (content, "")
        kinds = " ".join(k for k in ("" if i < left else "n", kind) if k)
        attribute = f' class="{kinds}"' if kinds else ""
        return f"<{tag}{attribute}>{escape(text)}</{tag}>"

    head = "".join(cell("th", i, name) for i, name in enumerate(heads))
    lines = []
    for number, row in enumerate(found):
        last = ' class="total"' if total and number == len(found) - 1 else ""
        inside = "".join(cell("td", i, content) for i, content in enumerate(row))
        lines.append(f"<tr{last}>{inside}</tr>")
    body = "\n".join(lines)
    kind = ' class="wide"' if wide else ""
    return (
        f'<div class="scroll"><table{kind}>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def items(texts: Iterable[str]) -> str:
    """A list of plain texts."""
    inside = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<ul>{inside}</ul>" if inside else ""


def folded(summary: str, content: str) -> str:
    """Something to open."""
    return f"<details><summary>{escape(summary)}</summary>\n{content}\n</details>"


def yaml_block(values: Mapping[str, Any]) -> str:
    """A mapping as YAML."""
    import yaml

    text = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=90)
    return f"<pre>{escape(text)}</pre>"


def environment_table(environment: Mapping[str, Any]) -> str:
    """Versions and machine."""
    rows = []
    for key, value in environment.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {version}" for name, version in value.items())
        if value is not None:
            rows.append((str(key), str(value)))
    return table(("", ""), rows, left=2)
