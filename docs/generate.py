"""Everything in the documentation that comes from files: the table of systems, cards, reference.

    python docs/generate.py            write README's table, docs/systems/, docs/reference/
    python docs/generate.py --check    fail when what is committed differs (continuous integration)

Numbers are never typed: verdicts and intervals come from evidence/.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
START, END = "<!-- systems: generated -->", "<!-- end of systems -->"
PARTS = {
    "polytask.data": "Rows: files, hubs, embedded sets",
    "polytask.tasks": "Tasks, schemas, splits, leak checks, encoding",
    "polytask.mixture": "Mixtures, sampler, skills, ledger, packing",
    "polytask.models": "Stems, trunk, heads, hub models",
    "polytask.objectives": "Losses",
    "polytask.train": "Trainer, stages, aggregation, checkpoints",
    "polytask.adapt": "Adapters, routed and scaled",
    "polytask.merge": "Models trained apart, joined",
    "polytask.infer": "Predictions, fusion, generation, spiking populations",
    "polytask.evaluate": "Metrics, comparisons, transfer, forgetting",
    "polytask.study": "Arms, claims, evidence",
    "polytask.report": "Pictures and pages",
    "polytask.pipeline": "Configuration to finished run",
}


# Packages whose names are best read module by module.
MODULES = {
    "polytask.data": [
        "spec",
        "open",
        "rows",
        "problems",
        "proposing",
        "images",
        "embedded",
        "spikes",
        "spike_tokens",
        "spike_windows",
        "circuits",
    ],
    "polytask.mixture": [
        "policies",
        "sampler",
        "skillit",
        "skills",
        "graph_learning",
        "ledger",
        "packing",
    ],
    "polytask.train": [
        "config",
        "trainer",
        "loader",
        "validation",
        "checkpoints",
        "aggregation",
        "weighting",
        "conflict",
        "guard",
        "sam",
        "flat",
    ],
    "polytask.infer": [
        "predict",
        "fusion_model",
        "fusion",
        "fusion_policy",
        "fusion_generate",
        "fusion_score",
        "logit_sources",
        "neuro",
    ],
    "polytask.evaluate": ["", "spikes"],
    "polytask.merge": [
        "config",
        "plan",
        "output",
        "method",
        "methods",
        "vectors",
        "adamerging",
        "search",
        "graft",
        "graft_fit",
        "graft_map",
        "graft_delta",
    ],
}


def cards() -> list[dict[str, Any]]:
    text = resources.files("polytask.systems").joinpath("cards.json").read_text("utf-8")
    found: list[dict[str, Any]] = json.loads(text)
    return found


def evidence(card: dict[str, Any]) -> dict[str, Any] | None:
    path = ROOT / "evidence" / f"{card['number']:02d}-{card['slug']}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def table(link: str) -> str:
    """One row a system; proved ones first link to their card."""
    lines = ["| | system | stage | modality | verdict |", "|---|---|---|---|---|"]
    for card in cards():
        found = evidence(card)
        verdict = f"**{found['verdict']}**" if found else "planned"
        name = f"[{card['name']}]({link.format(page(card))})" if found else card["name"]
        stages, kinds = ", ".join(card["stages"]), ", ".join(card["modalities"])
        lines.append(f"| {card['number']:02d} | {name} | {stages} | {kinds} | {verdict} |")
    return "\n".join(lines)


def page(card: dict[str, Any]) -> str:
    return f"{card['number']:02d}-{card['slug']}"


def card_text(card: dict[str, Any]) -> str:
    """A system's page: what it is, what it needs, what was proved."""
    lines = [
        f"# {card['number']:02d} {card['name']}",
        "",
        f"{card['title']}. {card['authors']}, {card['year']}, "
        f"[arXiv {card['arxiv']}](https://arxiv.org/abs/{card['arxiv']}).",
        "",
        f"**Claim.** {card['claim']}",
        "",
        f"**Needs.** {card['needs']}",
        "",
        f"**Limits.** {card['limits']}",
        "",
        f"**How it is measured here.** {card['proof']}",
        "",
    ]
    found = evidence(card)
    if found is None:
        return "\n".join([*lines, "Not built yet: no evidence.", ""])
    lines += ["```bash", f"polytask systems {card['slug']}", "```", "", *judged(card, found)]
    return "\n".join(lines)


def judged(card: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    yield f"## What was proved: {found['verdict']}"
    yield ""
    yield found["reason"]
    yield ""
    seeds = ", ".join(map(str, found["seeds"]))
    yield f"Seeds {seeds}; `polytask prove {card['slug']} --seeds {len(found['seeds'])}`."
    yield ""
    yield "| claim | metric | difference | 95 % interval | verdict |"
    yield "|---|---|---:|---:|---|"
    for item in found["judgements"]:
        claim, t = item["claim"], item["t"]
        text = f"{claim['better']} over {claim['than']}"
        if claim["kind"] == "ablation":
            text += " (ablation)"
        numbers = f"{t['mean']:+.4f} | {t['low']:+.4f} to {t['high']:+.4f}" if t else " | "
        yield f"| {text} | {claim['metric']} | {numbers} | {item['verdict']} |"
    yield ""
    for picture in sorted((ROOT / "evidence" / f"{page(card)}-pictures").glob("*.png")):
        yield f"![{picture.stem}](../assets/{page(card)}-{picture.name})"
        yield ""


def texts() -> dict[Path, str]:
    """Every generated file and its content."""
    docs = ROOT / "docs"
    made = {docs / "systems" / f"{page(card)}.md": card_text(card) for card in cards()}
    made[docs / "systems" / "index.md"] = (
        "# The 64 systems\n\nEach becomes a part that works on your own models and data, and a "
        "recipe that proves its central claim. Verdicts come from the files in `evidence/`.\n\n"
        + table("{}.md").replace("](", "](")
        + "\n"
    )
    rows = "\n".join(f"- [`{m}`]({m.split('.')[1]}.md): {what}" for m, what in PARTS.items())
    made[docs / "reference" / "index.md"] = f"# Reference\n\n{rows}\n"
    for module, what in PARTS.items():
        name = module.split(".")[1]
        inside = [f"{module}.{part}".rstrip(".") for part in MODULES.get(module, [""])]
        listed = "\n".join(f"::: {one}\n" for one in inside)
        made[docs / "reference" / f"{name}.md"] = f"# {what}\n\n{listed}"
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    if START in text:
        before, rest = text.split(START)
        after = rest.split(END)[1]
        made[readme] = f"{before}{START}\n{table('docs/systems/{}.md')}\n{END}{after}"
    return made


def pictures() -> dict[Path, bytes]:
    return {
        ROOT
        / "docs"
        / "assets"
        / f"{path.parent.name.removesuffix('pictures')}{path.name}": path.read_bytes()
        for path in sorted((ROOT / "evidence").glob("*-pictures/*.png"))
    }


def main() -> int:
    made: dict[Path, bytes] = {p: t.encode() for p, t in texts().items()} | pictures()
    stale = [p for p, b in made.items() if not p.is_file() or p.read_bytes() != b]
    if "--check" in sys.argv:
        for path in stale:
            print(f"out of date: {path.relative_to(ROOT)}")
        if stale:
            print("run: python docs/generate.py")
        return int(bool(stale))
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made[path])
    print(f"{len(stale)} of {len(made)} generated files written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
