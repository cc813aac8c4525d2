"""What kind of English stands in code: a comment, an error message, or a description of what?

Texts of the Python standard library. Descriptions of functions lie in the split that
`code-docstring` gives them, and so do texts that are like one; a text that serves as two kinds is
left out.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import defaultdict
from collections.abc import Hashable, Iterator

from polytask.data.embedded.code import python_files, standard_library
from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.similar import link_similar
from polytask.data.embedded.sources import Located, StandardLibrary
from polytask.data.embedded.splits import Linked, by_split, normal, split_of

KINDS = ("comment", "error message", "description of a function", "description of a class")
COMMENT, ERROR, FUNCTION, CLASS = KINDS
_SHORTEST = 20


def read_texts(source: bytes) -> Iterator[tuple[str, str]]:
    """(kind, text) of comments on lines of their own, messages of raised errors, and class
    docstrings; placeholders of formatted messages become {}."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            message = _message(node.exc.args[0])
            if message:
                yield ERROR, message
        elif isinstance(node, ast.ClassDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield CLASS, summary(docstring)
    for comment in _comments(source):
        yield COMMENT, comment


def summary(docstring: str) -> str:
    """The first paragraph on one line."""
    return " ".join(docstring.split("\n\n")[0].split())


def _message(node: ast.expr) -> str | None:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
        return _message(node.left)
    if isinstance(node, ast.JoinedStr):
        parts = (str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
        return "".join(parts)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _comments(source: bytes) -> Iterator[str]:
    """Comment lines; those that follow each other are one text."""
    block: list[str] = []
    last = -1
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type != tokenize.COMMENT or not token.line.lstrip().startswith("#"):
            continue
        if token.start[0] != last + 1 and block:
            yield " ".join(block)
            block = []
        block.append(token.string.lstrip("#!: ").rstrip())
        last = token.start[0]
    if block:
        yield " ".join(block)


def _build(located: Located) -> Splits:
    kinds: dict[str, set[str]] = defaultdict(set)
    first: dict[str, str] = {}
    given: dict[str, set[str]] = defaultdict(set)  # splits of functions that hold this text
    for function, split in standard_library(located):
        text = summary(function.docstring)
        kinds[normal(text)].add(FUNCTION)
        given[normal(text)].add(split)
        first.setdefault(normal(text), text)
        for _, inside in read_texts(function.code.encode()):
            given[normal(inside)].add(split)
    for path in python_files(located.root):
        for kind, text in read_texts(path.read_bytes()):
            kinds[normal(text)].add(kind)
            first.setdefault(normal(text), text)
    linked = Linked()
    keys = [key for key in first if len(first[key]) >= _SHORTEST and len(kinds[key]) == 1]
    link_similar(linked, keys, [first[key] for key in keys])
    groups = {key: linked.find(key) for key in keys}
    names = linked.names()
    decided: dict[Hashable, set[str]] = defaultdict(set)  # by what functions hold of a group
    for key in keys:
        decided[groups[key]] |= given.get(key, set())
    rows = []
    for key in keys:
        splits = given.get(key) or decided[groups[key]] or {split_of("code-text", names[key])}
        if len(splits) == 1:
            rows.append((first[key], next(iter(kinds[key])), next(iter(splits))))
    columns = {"text": [text for text, *_ in rows], "kind": [kind for _, kind, _ in rows]}
    return by_split(columns, [split for *_, split in rows])


SETS = (
    Entry(
        EmbeddedInfo(
            name="code-text",
            title="What kind of text from Python code: comment, error message, description",
            licence="PSF-2.0 (Python Software Foundation)",
            modality="text",
            sources=(StandardLibrary(),),
            tasks={
                "code-text": {
                    "data": "embedded:code-text",
                    "schema": "classification",
                    "inputs": {"text": "text"},
                    "target": "kind",
                }
            },
            classes=KINDS,
            fixed=False,
            note="Content follows the running Python version. Texts of 20 characters or more, "
            "each once; functions lie in the split of code-docstring.",
        ),
        _build,
    ),
)
