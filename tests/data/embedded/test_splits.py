"""No content and no group stands in two splits; splits are fixed for all time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polytask.data.embedded.similar import link_similar
from polytask.data.embedded.splits import (
    Linked,
    by_split,
    draw,
    normal,
    split_of,
    stratified,
    subject,
)

Load = Callable[[str], Any]


def contents(splits: Any, key: Callable[[dict[str, Any]], Any]) -> dict[str, set[Any]]:
    return {name: {key(row) for row in s.take(range(len(s)))} for name, s in splits.items()}


KEYS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "digits": lambda row: row["image"].tobytes(),
    "mnist5k": lambda row: row["image"].tobytes(),
    "breast-cancer": lambda row: tuple(v for k, v in row.items() if k != "diagnosis"),
    "wine": lambda row: tuple(v for k, v in row.items() if k != "cultivar"),
    "diabetes": lambda row: tuple(v for k, v in row.items() if k != "progression"),
    "django-language": lambda row: normal(row["english"]),
    "django-translation-pairs": lambda row: normal(row["english"]),
    "chatterbot-topic": lambda row: normal(row["text"]),
    "code-docstring": lambda row: normal(row["code"]),
    "code-area": lambda row: normal(row["docstring"]),
    "m3-monthly": lambda row: row["series"],
    "m3-kind": lambda row: row["values"].tobytes(),
    "m1-monthly": lambda row: row["series"],
    "tourism-monthly": lambda row: row["series"],
}


@pytest.mark.parametrize("name", KEYS)
def test_no_group_stands_in_two_splits(name: str, installed: Load) -> None:
    found = contents(installed(name), KEYS[name])
    for one, other in itertools.combinations(found.values(), 2):
        assert one.isdisjoint(other)


@pytest.mark.parametrize("name", ["django-language", "chatterbot-topic", "code-area"])
def test_no_text_stands_in_two_splits(name: str, installed: Load) -> None:
    column = "docstring" if name == "code-area" else "text"
    found = contents(installed(name), lambda row: normal(row[column]))
    for one, other in itertools.combinations(found.values(), 2):
        assert one.isdisjoint(other)


@pytest.mark.parametrize(
    ("one", "other", "column"),
    [
        ("django-language", "django-translation-pairs", "english"),
        ("code-docstring", "code-area", "docstring"),
        ("m3-monthly", "m3-kind", "series"),
        ("m3-monthly", "m3", "series"),
    ],
)
def test_tasks_over_the_same_material_share_the_split(
    one: str, other: str, column: str, installed: Load
) -> None:
    here = contents(installed(one), lambda row: normal(row[column]))
    there = contents(installed(other), lambda row: normal(row[column]))
    for a, b in itertools.permutations(here, 2):
        assert here[a].isdisjoint(there[b])


def test_spike_windows_of_two_splits_never_overlap(installed: Load) -> None:
    for recording in (1, 2):
        spans = {
            split: [
                row["start_ms"]
                for row in source.take(range(len(source)))
                if row["recording"] == recording
            ]
            for split, source in installed("nitime-spikes").items()
        }
        assert max(spans["train"]) + 40 <= min(spans["valid"])
        assert max(spans["valid"]) + 40 <= min(spans["test"])


def test_copies_among_m3_series_lie_in_one_split(installed: Load) -> None:
    place: dict[tuple[float, ...], str] = {}
    for split, source in installed("m3").items():
        for row in source.take(range(len(source))):
            values = np.concatenate([row["history"], row["future"]])
            for i in range(len(values) - 8):
                run = tuple(values[i : i + 8])
                if len(set(run)) >= 4:
                    assert place.setdefault(run, split) == split


def test_shares_are_met_in_every_class(installed: Load) -> None:
    for name, target in (("digits", "label"), ("wine", "cultivar")):
        splits = installed(name)
        labels = {s: [r[target] for r in src.take(range(len(src)))] for s, src in splits.items()}
        for label in set(labels["train"]):
            counts = {s: found.count(label) for s, found in labels.items()}
            total = sum(counts.values())
            assert abs(counts["test"] - 0.2 * total) <= 1
            assert abs(counts["valid"] - 0.1 * total) <= 1


def test_draws_are_the_same_for_all_time() -> None:
    # A change here would silently move rows between the splits of published results.
    found = {i: split_of("m3", f"N{i:04d}") for i in range(1, 41)}
    assert [i for i, split in found.items() if split == "test"] == [10, 16, 23, 27]
    assert [i for i, split in found.items() if split == "valid"] == [13, 18, 19, 24, 29, 35]
    assert draw("django", "yes") == pytest.approx(0.9453094246526791, abs=1e-15)


@given(st.lists(st.tuples(st.integers(0, 3), st.text(max_size=3)), min_size=1, max_size=60))
def test_stratified_never_parts_a_group(rows: list[tuple[int, str]]) -> None:
    split = stratified("s", [a for a, _ in rows], [b for _, b in rows])
    places: dict[str, set[str]] = {}
    for (_, group), name in zip(rows, split, strict=True):
        places.setdefault(group, set()).add(name)
    assert all(len(found) == 1 for found in places.values())


def test_more_rows_move_no_row() -> None:
    few = {key: split_of("s", key) for key in map(str, range(100))}
    many = {key: split_of("s", key) for key in map(str, range(1000))}
    assert few.items() <= many.items()
    shares = np.array([list(many.values()).count(s) for s in ("train", "valid", "test")]) / 1000
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.04)


def test_by_split_keeps_the_order_and_cuts_lists_and_arrays() -> None:
    cut = by_split({"a": np.arange(4), "b": list("wxyz")}, ["test", "train", "test", "valid"])
    assert {name: columns["a"].tolist() for name, columns in cut.items()} == {
        "train": [1],
        "valid": [3],
        "test": [0, 2],
    }
    assert cut["test"]["b"] == ["w", "y"]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=30))
def test_linked_is_the_connected_components(edges: list[tuple[int, int]]) -> None:
    linked = Linked()
    reach = np.eye(13, dtype=bool)
    for a, b in edges:
        linked.join(a, b)
        reach[a, b] = reach[b, a] = True
    for _ in range(4):
        reach = (reach.astype(int) @ reach.astype(int)) > 0
    for a, b in itertools.product(range(13), repeat=2):
        assert (linked.find(a) == linked.find(b)) == reach[a, b]


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("Enter a valid email address.", "Enter a valid email address, please.", True),
        ("Ensure this value is a multiple", "Ensure this value is a multiple of 3", True),
        ("User", "Username", False),
        ("user name", "Choose another user name for this account", False),
        ("Delete", "delete!", True),
        ("The cat sat on the mat.", "A dog lay under the table.", False),
    ],
)
def test_texts_that_nearly_repeat_are_linked(one: str, other: str, alike: bool) -> None:
    linked = Linked()
    link_similar(linked, ["a", "b"], [one, other])
    assert (linked.find("a") == linked.find("b")) == alike


def test_boilerplate_links_nobody() -> None:
    linked = Linked()
    texts = [f"return the value of the {word} field" for word in map(chr, range(97, 97 + 26))]
    texts += [f"return the value of the {word * 9} field" for word in map(chr, range(97, 97 + 26))]
    link_similar(linked, range(len(texts)), texts)
    assert len({linked.find(i) for i in range(len(texts))}) == len(texts)


def test_names_of_groups_do_not_depend_on_the_order_of_joining() -> None:
    edges = [(1, 2), (3, 4), (2, 4), (6, 5)]
    names = []
    for order in itertools.permutations(edges):
        linked = Linked()
        for a, b in order:
            linked.join(a, b)
        names.append(linked.names())
    assert all(found == names[0] for found in names)
    assert names[0] == {1: "1", 2: "1", 3: "1", 4: "1", 5: "5", 6: "5"}


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("woman teacher", "teacher"),
        ("man-teacher", "teacher"),
        ("teacher", "teacher"),
        ("woman’s hat", "womanshat"),
        ("womans-hat", "womanshat"),
        ("man", "man"),
    ],
)
def test_emoji_of_men_and_women_show_one_subject(name: str, shown: str) -> None:
    assert subject(name) == shown


@pytest.mark.parametrize("name", ["django-language", "django-translation-pairs", "code-area"])
def test_no_group_of_like_texts_swallows_the_set(name: str, installed: Load) -> None:
    sizes = {split: len(source) for split, source in installed(name).items()}
    total = sum(sizes.values())
    assert sizes["train"] / total == pytest.approx(0.7, abs=0.05)
    assert sizes["test"] / total == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize(("one", "other"), [("m1", "m3"), ("m3", "tourism"), ("m1", "tourism")])
def test_records_in_two_competitions_lie_in_one_split(
    one: str, other: str, installed: Load
) -> None:
    def runs(source: Any) -> set[tuple[float, ...]]:
        found = set()
        for row in source.take(range(len(source))):
            values = np.concatenate([row["history"], row["future"]]).tolist()
            pieces = (tuple(values[i : i + 8]) for i in range(len(values) - 7))
            found |= {piece for piece in pieces if len(set(piece)) >= 4}
        return found

    here = {split: runs(source) for split, source in installed(one).items()}
    there = {split: runs(source) for split, source in installed(other).items()}
    for a, b in itertools.permutations(here, 2):
        assert here[a].isdisjoint(there[b])
