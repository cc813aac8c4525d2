"""Django's interface translations: which language is this, and are these two a translation pair.

A message stands in one split in all its languages, and in the same split for both tasks; so do
messages that are alike ("relationship", "relationships").
"""

from __future__ import annotations

import gettext
import re
from collections import Counter
from pathlib import Path
from typing import Any

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.similar import link_similar
from polytask.data.embedded.sources import Located, Wheel
from polytask.data.embedded.splits import SPLITS, Linked, by_split, normal, split_of
from polytask.rng import generator

LANGUAGES = {
    "en": "English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "it": "Italian",
    "pt_BR": "Portuguese",
    "nl": "Dutch",
    "sv": "Swedish",
    "pl": "Polish",
    "ru": "Russian",
    "tr": "Turkish",
    "ja": "Japanese",
}
PAIRED = ("de", "fr", "es", "it", "pt_BR", "nl", "ru")
_BLOCK = 6
TextPair = tuple[str, str]
_PLACEHOLDER = re.compile(r"%\(\w+\)\w|%[sd]|\{\w*\}")


def read_messages(files: list[Path]) -> dict[str, dict[str, str]]:
    """Language -> English message -> translation, singular forms, first application first.

    Untranslated messages (equal to the English) and messages without letters are left out.
    """
    found: dict[str, dict[str, str]] = {language: {} for language in LANGUAGES if language != "en"}
    for path in files:
        language = path.parts[-3]
        if language not in found:
            continue
        with path.open("rb") as handle:
            catalogue: dict[Any, str] = gettext.GNUTranslations(handle)._catalog  # type: ignore[attr-defined]
        for key, text in catalogue.items():
            if isinstance(key, tuple) and key[1] != 0:
                continue
            english = (key[0] if isinstance(key, tuple) else key).split("\x04")[-1]
            if normal(english) and normal(text) and normal(english) != normal(text):
                found[language].setdefault(english, text)
    return found


def _language(located: Located) -> Splits:
    messages = read_messages(located.files())
    rows = [
        (english, text, language)
        for language, texts in messages.items()
        for english, text in texts.items()
    ]
    rows += [(english, english, "en") for english in dict.fromkeys(row[0] for row in rows)]
    rows = _once([row for row in rows if _letters(row[1])])
    heard = Counter(text for text, _ in {(normal(text), lang) for _, text, lang in rows})
    rows = [row for row in rows if heard[normal(row[1])] == 1]
    columns = {
        "text": [text for _, text, _ in rows],
        "language": [LANGUAGES[language] for *_, language in rows],
        "english": [english for english, *_ in rows],
    }
    splits = message_splits(messages)
    return by_split(columns, [splits[english] for english, *_ in rows])


def message_splits(messages: dict[str, dict[str, str]]) -> dict[str, str]:
    """English message -> split. Messages that are alike in any language share it."""
    linked = Linked()
    everything = dict.fromkeys(english for texts in messages.values() for english in texts)
    for english in everything:
        linked.join(normal(english), english)
    link_similar(linked, list(everything), list(everything))
    for texts in messages.values():
        link_similar(linked, list(texts), list(texts.values()))
    names = linked.names()
    return {english: split_of("django", names[english]) for english in everything}


def _letters(text: str) -> bool:
    """True where something is left to read once the placeholders are taken out."""
    return sum(letter.isalpha() for letter in _PLACEHOLDER.sub("", text)) >= 2


def _once(rows: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """The first of the rows whose texts read alike in one language."""
    return list(
        {(normal(text), lang): (eng, text, lang) for eng, text, lang in rows[::-1]}.values()
    )[::-1]


def _pairs(located: Located) -> Splits:
    messages = read_messages(located.files())
    columns: dict[str, list[str]] = {"english": [], "other": [], "language": [], "label": []}
    splits: list[str] = []
    right = _right_pairs(messages)
    splits_of = message_splits(messages)
    taken = {_key(pair) for pairs in right.values() for pair in pairs}
    for language, rows in right.items():
        for split in SPLITS:
            chosen = [pair for pair in rows if splits_of[pair[0]] == split]
            wrong = swapped(chosen, f"{language}/{split}", taken)
            for label, pairs in (("yes", chosen), ("no", wrong)):
                for english, other in pairs:
                    columns["english"].append(english)
                    columns["other"].append(other)
                    columns["language"].append(LANGUAGES[language])
                    columns["label"].append(label)
                    splits.append(split)
    return by_split(columns, splits)


def _right_pairs(messages: dict[str, dict[str, str]]) -> dict[str, list[TextPair]]:
    """Language -> pairs; English and translation once per language, a pair in one language only."""
    taken: set[TextPair] = set()
    found: dict[str, list[TextPair]] = {}
    for language in PAIRED:
        rows = [(eng, text, language) for eng, text in messages[language].items()]
        rows = _once([row for row in rows if _letters(row[1])])
        rows = list({normal(row[0]): row for row in rows[::-1]}.values())[::-1]
        found[language] = [row[:2] for row in rows if _key(row[:2]) not in taken]
        taken.update(_key(pair) for pair in found[language])
    return found


def _key(pair: TextPair) -> TextPair:
    return normal(pair[0]), normal(pair[1])


def swapped(pairs: list[TextPair], stream: str, taken: set[TextPair]) -> list[TextPair]:
    """Every English text with another's translation, alike in placeholders and length.

    Pairs are ordered by placeholders and length and translations handed round in blocks, so each
    text serves once in a right pair and once in a wrong one: neither side alone tells the label.
    No wrong pair is in `taken` (right in some language, or used already); new ones are added.
    """
    if len(pairs) < 2:
        return []
    order = sorted(pairs, key=lambda p: (sorted(_PLACEHOLDER.findall(p[0])), len(p[1]), p[0]))
    blocks = [order[i : i + _BLOCK] for i in range(0, len(order), _BLOCK)]
    if len(blocks[-1]) == 1:
        blocks[-2:] = [blocks[-2] + blocks[-1]]
    wrong = []
    for number, block in enumerate(blocks):
        dealt = generator(0, "embedded", "translation-pairs", stream, number).permutation(
            len(block)
        )
        wrong += _dealt([block[i] for i in dealt], taken)
    return wrong


def _dealt(ring: list[TextPair], taken: set[TextPair]) -> list[TextPair]:
    """Translations handed on by the first number of places that gives no pair of `taken`."""
    for step in range(1, len(ring)):
        wrong = [(ring[i][0], ring[i - step][1]) for i in range(len(ring))]
        keys = {_key(pair) for pair in wrong}
        if keys.isdisjoint(taken):
            taken |= keys
            return wrong
    return []


_SOURCES = (Wheel("django", ("django/**/locale/*/LC_MESSAGES/*.mo",)),)
_NOTE = (
    "Interface texts: short (median two words), with placeholders such as %(name)s kept. Content "
    "follows the installed Django version. The split is by English message, like ones together."
)

SETS = (
    Entry(
        EmbeddedInfo(
            name="django-language",
            title="Which of 12 languages an interface text of Django is written in",
            licence="BSD-3-Clause (Django Software Foundation and translators)",
            modality="text",
            sources=_SOURCES,
            tasks={
                "django-language": {
                    "data": "embedded:django-language",
                    "schema": "classification",
                    "inputs": {"text": "text"},
                    "target": "language",
                }
            },
            classes=tuple(LANGUAGES.values()),
            fixed=False,
            note=_NOTE + " Texts that read the same in two languages are left out.",
        ),
        _language,
        version=4,
    ),
    Entry(
        EmbeddedInfo(
            name="django-translation-pairs",
            title="Does the second text translate the first? English with seven languages",
            licence="BSD-3-Clause (Django Software Foundation and translators)",
            modality="text",
            sources=_SOURCES,
            tasks={
                "django-translation-pairs": {
                    "data": "embedded:django-translation-pairs",
                    "schema": "pair",
                    "inputs": {"text": ["english", "other"]},
                    "target": "label",
                }
            },
            classes=("no", "yes"),
            fixed=False,
            note=_NOTE + " Wrong pairs are alike in length and placeholders; every text stands "
            "once in a right and once in a wrong pair.",
        ),
        _pairs,
        version=4,
    ),
)
