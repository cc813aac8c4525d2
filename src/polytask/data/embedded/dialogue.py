"""English small talk of the chatterbot corpus: what is the opening line about?"""

from __future__ import annotations

from typing import Any

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Located, Wheel
from polytask.data.embedded.splits import Linked, by_split, normal, stratified

TOPICS = ("ai", "coding", "emotion", "psychology", "trivia")
"""Topics with at least 40 different opening lines; the corpus has 16 smaller ones."""


def read_conversations(located: Located) -> dict[str, list[list[str]]]:
    """Topic -> conversations, each a list of lines."""
    import yaml

    topics: dict[str, list[list[str]]] = {}
    for path in located.files():
        try:
            content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{path.name} is not valid YAML: {error}") from error
        topics[path.stem] = [[str(line) for line in talk] for talk in content["conversations"]]
    return topics


def _build(located: Located) -> Splits:
    linked = Linked()
    heard: dict[str, set[str]] = {}
    first: dict[str, tuple[str, str, str]] = {}
    for topic, talks in read_conversations(located).items():
        for talk in talks:
            opening = normal(talk[0])
            heard.setdefault(opening, set()).add(topic)
            for line in talk:
                linked.join(("line", normal(line)), ("line", opening))
            first.setdefault(opening, (talk[0], talk[1] if len(talk) > 1 else "", topic))
    rows = {key: row for key, row in first.items() if row[2] in TOPICS and len(heard[key]) == 1}
    names = linked.names()
    groups = [names["line", key] for key in rows]
    columns = {
        "text": [text for text, *_ in rows.values()],
        "reply": [reply for _, reply, _ in rows.values()],
        "topic": [topic for *_, topic in rows.values()],
    }
    return by_split(columns, stratified("chatterbot-topic", columns["topic"], groups))


SETS = (
    Entry(
        EmbeddedInfo(
            name="chatterbot-topic",
            title="Topic of an opening line of English small talk, five topics",
            licence="BSD-3-Clause (chatterbot-corpus)",
            modality="text",
            sources=(Wheel("chatterbot-corpus", ("chatterbot_corpus/data/english/*.yml",)),),
            tasks={
                "chatterbot-topic": {
                    "data": "embedded:chatterbot-topic",
                    "schema": "classification",
                    "inputs": {"text": "text"},
                    "target": "topic",
                }
            },
            classes=TOPICS,
            fixed=False,
            note="Small: one row per different opening line. Lines that share a reply stay in one "
            "split; lines that open talks of two topics are left out. 'trivia' is half of it.",
        ),
        _build,
        version=2,
    ),
)
