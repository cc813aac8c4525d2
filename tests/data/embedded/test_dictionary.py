"""GCIDE as prose: one text an entry, marks and sources left out."""

from __future__ import annotations

import gzip
from pathlib import Path

from polytask.data.embedded.catalogue import ENTRIES
from polytask.data.embedded.sources import Bundle, Located

DICTIONARY = """
00-database-short
   A dictionary, to be left out of the documents of this set of words.

Anchoress \\An"cho*ress\\, n. [F. anachor[`e]te [see {Anchor}].]
   A female anchoret.
   [1913 Webster]

         And there, a saintly anchoress, she dwelt.
                                                  --Wordsworth.
   [1913 Webster] Anchoret

Bark \\Bark\\, v. t.
   1. To strip the {bark} from; to peel a tree of its outer skin.
      [1913 Webster]

Short \\Short\\, a.
   Not long.
"""


def test_the_dictionary_is_prose_by_entry(tmp_path: Path) -> None:
    path = tmp_path / "usr/share/dictd/gcide.dict.dz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(DICTIONARY.encode()))
    entry = ENTRIES.get("gcide")
    (source, *_) = entry.info.sources
    assert not isinstance(source, Bundle)
    splits = dict(entry.build(Located(tmp_path, source.files, source.package, "test")))
    rows = {
        word: text
        for part in splits.values()
        for word, text in zip(part["headword"], part["text"], strict=True)
    }
    assert rows == {
        "Anchoress": "Anchoress, A female anchoret. And there, a saintly anchoress, she dwelt.",
        "Bark": "Bark, To strip the bark from; to peel a tree of its outer skin.",
    }
