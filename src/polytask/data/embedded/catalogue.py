"""All embedded data sets by name; a family is one file with a tuple `SETS`.

Row counts and content checksums stand in `verified.json`, written by
`tests/data/embedded/record_verified.py` from the packages themselves.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from polytask.data.embedded import (
    asterisk,
    brown,
    chitchat,
    cldr,
    code,
    code_text,
    demand,
    dialogue,
    digits_and_tables,
    emoji,
    emoji_names,
    fashion,
    gcide,
    icd,
    mnist5k,
    mnist10k,
    phenotypes,
    series,
    spam,
    spikes,
    translations,
    wordnet,
)
from polytask.data.embedded.info import Entry
from polytask.registry import Registry

FAMILIES = (
    asterisk,
    brown,
    chitchat,
    cldr,
    code,
    code_text,
    demand,
    dialogue,
    digits_and_tables,
    emoji,
    emoji_names,
    fashion,
    gcide,
    icd,
    mnist5k,
    mnist10k,
    phenotypes,
    series,
    spam,
    spikes,
    translations,
    wordnet,
)

VERIFIED = Path(__file__).with_name("verified.json")


def _with_record(entry: Entry, records: dict[str, dict[str, Any]]) -> Entry:
    """The entry with its verified counts and checksum, where the rule is the one recorded."""
    record = records.get(entry.info.name, {})
    if record.get("rule") != entry.version:
        return entry
    facts = {key: record[key] for key in ("size", "checksum", "verified_with")}
    return replace(entry, info=replace(entry.info, **facts))


def _collect() -> Registry[Entry]:
    records = json.loads(VERIFIED.read_text(encoding="utf-8"))
    found: Registry[Entry] = Registry("embedded data set")
    for family in FAMILIES:
        for entry in family.SETS:
            found.add(entry.info.name, _with_record(entry, records))
    return found


ENTRIES = _collect()
