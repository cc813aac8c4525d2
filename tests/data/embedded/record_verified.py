"""Writes `verified.json`: row counts and content checksums as read from the packages.

For maintainers, after a building rule changed or a set was added (fetch it first):
    POLYTASK_CACHE=/some/cache python tests/data/embedded/record_verified.py [NAME ...]
Without names: every set whose package is here; the others keep their record.
"""

from __future__ import annotations

import json
import sys

from polytask.data.embedded import store
from polytask.data.embedded.catalogue import ENTRIES, VERIFIED
from polytask.data.embedded.sources import locate
from polytask.files import write_json


def main(wanted: list[str]) -> None:
    records = json.loads(VERIFIED.read_text(encoding="utf-8"))
    for name in wanted or ENTRIES.names():
        entry = ENTRIES.get(name)
        found = locate(entry.info.sources)
        if found is None:
            print(f"{name}: not here, record kept")
            continue
        source, located = found
        splits = entry.build(located)
        records[name] = {
            "rule": entry.version,
            "verified_with": f"{source.package} {located.version}",
            "size": {split: len(next(iter(cols.values()))) for split, cols in splits.items()},
            "checksum": store.content_checksum(splits),
        }
        print(name, records[name]["size"])
    write_json(VERIFIED, {name: records[name] for name in sorted(records) if name in ENTRIES})


if __name__ == "__main__":
    main(sys.argv[1:])
