"""Unicode CLDR: names and keywords of emoji in many languages."""

from __future__ import annotations

import json
from typing import Any

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Located, Npm
from polytask.data.embedded.splits import by_split, normal, split_of, subject

_LOCALES = (
    "ar bg bn ca cs da de el en es et fa fi fr he hi hr hu id it ja ko lt lv mr nl no pl pt ro ru "
    "sk sl sr sv sw ta te th tr uk ur vi zh"
)
LOCALES = tuple(_LOCALES.split())
"""Languages (not regional variants) that name most emoji and are spoken by millions."""


def read_names(located: Located) -> dict[str, dict[str, tuple[str, tuple[str, ...]]]]:
    """Locale -> sign -> (name, keywords)."""
    found = {}
    for path in located.files():
        content = json.loads(path.read_text(encoding="utf-8"))["annotations"]
        found[path.parent.name] = {
            sign: (entry["tts"][0], tuple(entry.get("default", ())))
            for sign, entry in content["annotations"].items()
            if entry.get("tts")
        }
    return found


def _is_picture(sign: str) -> bool:
    """True for pictures: signs of ASCII, arrows and mathematics (below U+2300) are left out."""
    return ord(sign[0]) >= 0x2300


def _build(located: Located) -> Splits:
    names = read_names(located)
    english = names["en"]
    rows: dict[str, list[Any]] = {
        name: [] for name in ("emoji", "language", "name", "keywords", "english")
    }
    taken: set[tuple[str, str]] = set()
    for locale in LOCALES:
        for sign, (name, keywords) in names.get(locale, {}).items():
            pair = (english[sign][0], name) if sign in english else (name, name)
            if normal(pair[0]) != normal(name) and _is_picture(sign) and pair not in taken:
                taken.add(pair)
                cells = (sign, locale, name, " | ".join(keywords), english[sign][0])
                for column, cell in zip(rows, cells, strict=True):
                    rows[column].append(cell)
    return by_split(rows, [split_of("emoji", subject(name)) for name in rows["english"]])


SETS = (
    Entry(
        EmbeddedInfo(
            name="cldr-names",
            title=f"Unicode CLDR: emoji names and keywords in {len(LOCALES)} languages",
            licence="Unicode-3.0 (Unicode, Inc.)",
            modality="text",
            sources=(
                Npm(
                    "cldr-annotations-full",
                    tuple(f"package/annotations/{locale}/annotations.json" for locale in LOCALES),
                    "48.2.0",
                ),
            ),
            tasks={
                "cldr-names": {
                    "data": "embedded:cldr-names",
                    "schema": "matching",
                    "inputs": {"a": {"text": "english"}, "b": {"text": "name"}},
                }
            },
            note="Short texts. Split by English name, the same split as emoji-pictures. A pair "
            "of names occurs once (Serbian and Croatian share many); names that equal the English "
            "are left out.",
        ),
        _build,
    ),
)
