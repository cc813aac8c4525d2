"""The model card of a merge: what was merged, how, and how to do it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from polytask import __version__
from polytask.merge.plan import Plan
from polytask.merge.sources import find


def card(plan: Plan, title: str) -> str:
    """README.md with Hugging Face's metadata, the recipe, and what the plan noted."""
    recipe = plan.recipe
    experts = [recipe.models[number] for number in recipe.experts]
    base = None if recipe.base is None else recipe.models[recipe.base]
    hub = [m.where for m in [*([base] if base else []), *experts] if _on_hub(m.where)]
    front: dict[str, Any] = {"tags": ["merge", "polytask"], "library_name": "transformers"}
    if hub:
        front["base_model"] = hub
    rows = [["model", "from"], *([["base", base.where]] if base else [])]
    rows += [[m.name, m.where + (f" + {m.adapter}" if m.adapter else "")] for m in experts]
    said = yaml.safe_dump(
        dict(recipe.said), sort_keys=False, allow_unicode=True, width=90, default_flow_style=None
    )
    document = " ".join((plan.method.__doc__ or "").split("\n\n")[0].split())
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False) + "---",
        f"# {title}",
        f"A merge of {len(experts)} models by **{plan.method.title}**, made with polytask "
        f"{__version__}.",
        document,
        "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---", "---"], *rows[1:]]),
        "## Recipe\n\n```yaml\n" + said + "```",
        "Write it to a file and run `polytask merge FILE --out FOLDER`: the result has the same "
        "bytes.",
        f"{len(plan.merged):,} tensors were merged, {len(plan.items) - len(plan.merged):,} are "
        f"{'the base' if base else 'the first model'}'s as they were. Arithmetic in float32.",
    ]
    if any(plan.heads[number] for number in recipe.experts):
        parts.append(
            "Heads stay each model's own and lie in `heads/`: `polytask.merge.load_with_head("
            "folder, name)` puts one on the merged trunk."
        )
    if plan.notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {note}" for note in plan.notes))
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def _on_hub(where: str) -> bool:
    return not Path(where).exists() and where.count("/") == 1 and find(where, where).exists()
