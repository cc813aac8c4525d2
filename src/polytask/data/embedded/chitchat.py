"""The chitchat data set: students' dialogues of 2018 with ratings of each other."""

from __future__ import annotations

import json
from typing import Any

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Located, Wheel
from polytask.data.embedded.splits import by_split, normal, split_of

RATINGS = ("witty", "upbeat", "interesting")


def transcript(turns: list[list[dict[str, str]]]) -> str:
    """One line per turn, speakers named A and B in order of appearance."""
    letters: dict[str, str] = {}
    lines = []
    for turn in turns:
        if turn:
            letter = letters.setdefault(turn[0]["sender"], "ABCDEFGH"[len(letters)])
            lines.append(f"{letter}: " + " ".join(" ".join(m["text"].split()) for m in turn))
    return "\n".join(lines)


def _build(located: Located) -> Splits:
    (path,) = located.files()
    dialogues: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    rows: dict[str, list[Any]] = {
        name: [] for name in ("dialogue", "prompt", "text", "turns", "start", *RATINGS)
    }
    seen: set[str] = set()
    for name, dialogue in dialogues.items():
        turns = dialogue["messages"]
        text = transcript(turns)
        if len(turns) < 2 or normal(text) in seen:
            continue
        seen.add(normal(text))
        ratings = dialogue.get("ratings", {})
        cells = (name, dialogue.get("prompt") or "", text, len(turns))
        scores = tuple(float(ratings.get(rating, "nan")) for rating in RATINGS)
        for column, cell in zip(rows, (*cells, dialogue["start"], *scores), strict=True):
            rows[column].append(cell)
    return by_split(rows, [split_of("chitchat", name) for name in rows["dialogue"]])


SETS = (
    Entry(
        EmbeddedInfo(
            name="chitchat",
            title="Chitchat: 7,168 student dialogues of 2018 with ratings of 1 to 10",
            licence="MIT (chitchat-dataset)",
            modality="text",
            sources=(Wheel("chitchat-dataset", ("chitchat_dataset/dataset.json",), "0.9.0"),),
            tasks={
                "chitchat-interesting": {
                    "data": "embedded:chitchat",
                    "schema": "regression",
                    "inputs": {"text": "text"},
                    "target": "interesting",
                    "max_bad": 0.2,
                },
                "chitchat-language": {
                    "data": "embedded:chitchat",
                    "schema": "language_model",
                    "inputs": {"text": "text"},
                },
            },
            note="Uncensored talk of students. Copies and dialogues of one turn are left out; "
            "ratings are NaN where nobody rated (5 is the form's default). Split by dialogue; "
            "speakers occur in several splits.",
        ),
        _build,
    ),
)
