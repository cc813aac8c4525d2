"""ICD-10-CM diagnoses: which chapter of the classification a diagnosis belongs to."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Located, Wheel
from polytask.data.embedded.splits import by_split, normal, split_of


def read_diagnoses(located: Located) -> Iterator[tuple[str, str, str, str]]:
    """(code, diagnosis, chapter title, category code of three characters) in the file's order."""
    (path,) = located.files()
    for chapter in ET.parse(path).getroot().iter("chapter"):
        title = " ".join((chapter.findtext("desc") or "").split()).rsplit(" (", 1)[0]
        for node in chapter.iter("diag"):
            code = node.findtext("name") or ""
            text = " ".join((node.findtext("desc") or "").split())
            yield code, text, title, code[:3]


def _build(located: Located) -> Splits:
    rows = list(read_diagnoses(located))
    chapters: dict[str, set[str]] = {}
    for _, text, chapter, _ in rows:
        chapters.setdefault(normal(text), set()).add(chapter)
    first = {normal(row[1]): row for row in rows[::-1] if len(chapters[normal(row[1])]) == 1}
    kept = list(first.values())[::-1]
    columns = {
        "code": [code for code, *_ in kept],
        "diagnosis": [text for _, text, *_ in kept],
        "chapter": [chapter for *_, chapter, _ in kept],
        "category": [category for *_, category in kept],
    }
    return by_split(columns, [split_of("icd10", category) for category in columns["category"]])


SETS = (
    Entry(
        EmbeddedInfo(
            name="icd10-chapter",
            title="ICD-10-CM 2026: which of 22 chapters a diagnosis belongs to",
            licence="public domain in the USA (CDC, CMS); package simple-icd-10-cm: MIT",
            modality="text",
            sources=(
                Wheel(
                    "simple-icd-10-cm",
                    ("simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml",),
                    "1.5.0",
                ),
            ),
            tasks={
                "icd10-chapter": {
                    "data": "embedded:icd10-chapter",
                    "schema": "classification",
                    "inputs": {"text": "diagnosis"},
                    "target": "chapter",
                }
            },
            note="Split by category (the code's first three characters), since the diagnoses of a "
            "category repeat its words. Half of the rows are injuries: look at macro scores.",
        ),
        _build,
    ),
)
