"""All embedded data sets by name; a family is one file with a tuple `SETS`."""

from __future__ import annotations

from polytask.data.embedded import (
    asterisk,
    brown,
    chitchat,
    cldr,
    code,
    demand,
    dialogue,
    digits_and_tables,
    emoji,
    fashion,
    icd,
    mnist5k,
    mnist10k,
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
    demand,
    dialogue,
    digits_and_tables,
    emoji,
    fashion,
    icd,
    mnist5k,
    mnist10k,
    series,
    spam,
    spikes,
    translations,
    wordnet,
)

ENTRIES: Registry[Entry] = Registry("embedded data set")
for family in FAMILIES:
    for entry in family.SETS:
        ENTRIES.add(entry.info.name, entry)
