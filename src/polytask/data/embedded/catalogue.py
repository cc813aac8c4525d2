"""All embedded data sets by name; a family is one file with a tuple `SETS`."""

from __future__ import annotations

from polytask.data.embedded import (
    code,
    dialogue,
    digits_and_tables,
    fashion,
    mnist5k,
    series,
    spikes,
    translations,
)
from polytask.data.embedded.info import Entry
from polytask.registry import Registry

FAMILIES = (
    digits_and_tables,
    mnist5k,
    translations,
    dialogue,
    code,
    series,
    spikes,
    fashion,
)

ENTRIES: Registry[Entry] = Registry("embedded data set")
for family in FAMILIES:
    for entry in family.SETS:
        ENTRIES.add(entry.info.name, entry)
