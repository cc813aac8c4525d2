"""Functions of the Python standard library with their docstrings.

Matching: which code does a docstring describe (`code-docstring`)? Classification: from which
part of the library is it (`code-area`)? Functions with like docstrings or bodies are one
group; both tasks share the split.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polytask.data.embedded.info import EmbeddedInfo, Entry, Splits
from polytask.data.embedded.similar import link_similar
from polytask.data.embedded.sources import Located, StandardLibrary
from polytask.data.embedded.splits import Linked, by_split, normal, split_of

_SKIPPED = (
    "test tests idle_test site-packages dist-packages __pycache__ ensurepip lib2to3 distutils "
    "tkinter idlelib turtle turtledemo venv pydoc_data __phello__ lib-dynload"
)
SKIPPED = frozenset(_SKIPPED.split())
"""Tests, and parts that many systems leave out or that later versions of Python removed."""

AREAS = {
    "network": "http urllib ftplib imaplib nntplib poplib smtplib telnetlib socket socketserver "
    "ssl xmlrpc wsgiref ipaddress cgi cgitb webbrowser netrc",
    "mail": "email mailbox mimetypes quopri uu binhex base64 mailcap smtpd",
    "concurrency": "asyncio multiprocessing threading concurrent queue sched selectors "
    "subprocess asyncore asynchat _threading_local contextvars signal",
    "language": "importlib ast dis inspect symtable typing tokenize pkgutil types code codeop "
    "pyclbr modulefinder zipimport runpy imp enum dataclasses copyreg keyword opcode "
    "functools contextlib abc weakref pickletools",
    "debugging": "unittest doctest pdb bdb cmd trace traceback pydoc logging cProfile profile "
    "pstats timeit tracemalloc warnings faulthandler",
    "files": "os pathlib shutil tempfile tarfile zipfile posixpath ntpath genericpath glob "
    "fnmatch bz2 lzma gzip _pyio io stat filecmp fileinput _compression",
    "numbers": "_pydecimal decimal numbers statistics fractions datetime calendar random "
    "_strptime heapq bisect colorsys zoneinfo",
    "markup": "xml html json csv configparser plistlib sgmllib string textwrap difflib gettext",
}
_AREA_OF = {module: area for area, modules in AREAS.items() for module in modules.split()}
_SHORTEST_DOCSTRING = 20


@dataclass(frozen=True)
class Function:
    """One function: `code` is its source without the docstring, `docstring` dedented."""

    module: str
    name: str
    docstring: str
    code: str

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


def read_functions(path: Path, module: str) -> Iterator[Function]:
    """Functions and methods of a file that have a docstring and something besides it."""
    for node in _statements(ast.parse(path.read_bytes(), filename=str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
            docstring = ast.get_docstring(node, clean=False)
            if docstring is not None:
                node.body = node.body[1:]
                yield Function(
                    module, node.name, inspect.cleandoc(docstring).strip(), ast.unparse(node)
                )


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """All statements in order; unlike `ast.walk` it spares the many times more expressions."""
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, block, ()):
            yield child
            yield from _statements(child)


def python_files(folder: Path) -> Iterator[Path]:
    """Python files below a folder, sorted, without the parts that are left out."""
    for path in sorted(folder.iterdir()):
        if path.name.removesuffix(".py") in SKIPPED:
            continue
        if path.is_dir():
            yield from python_files(path)
        elif path.suffix == ".py":
            yield path


@functools.lru_cache(maxsize=1)
def standard_library(located: Located) -> tuple[tuple[Function, str], ...]:
    """Functions with docstrings of 20 characters or more, and the split of each.

    A docstring occurs once: the first in order of path and line is kept. Remembered for the
    process, since two data sets are cut from one reading of several seconds.
    """
    linked = Linked()
    kept: list[Function] = []
    docstrings: set[str] = set()
    for path in python_files(located.root):
        relative = path.relative_to(located.root)
        parts = [part for part in relative.with_suffix("").parts if part != "__init__"]
        for function in read_functions(path, ".".join(parts)):
            key = normal(function.docstring)
            linked.join(("doc", key), ("code", normal(function.code)))
            if len(function.docstring) >= _SHORTEST_DOCSTRING and key not in docstrings:
                docstrings.add(key)
                kept.append(function)
    keys = [("doc", normal(function.docstring)) for function in kept]
    link_similar(linked, keys, [function.docstring for function in kept])
    link_similar(linked, keys, [function.code for function in kept])
    names = linked.names()
    splits = [split_of("standard-library", names[key]) for key in keys]
    return tuple(zip(kept, splits, strict=True))


def _columns(functions: list[Function]) -> dict[str, Any]:
    return {
        "module": [f.module for f in functions],
        "name": [f.name for f in functions],
        "docstring": [f.docstring for f in functions],
        "summary": [f.docstring.split("\n\n")[0].replace("\n", " ") for f in functions],
        "code": [f.code for f in functions],
    }


def _docstrings(located: Located) -> Splits:
    found = standard_library(located)
    bodies: dict[str, tuple[Function, str]] = {}
    for function, split in found:
        bodies.setdefault(normal(function.code), (function, split))
    return by_split(
        _columns([function for function, _ in bodies.values()]),
        [split for _, split in bodies.values()],
    )


def _areas(located: Located) -> Splits:
    found = [(f, split) for f, split in standard_library(located) if f.top in _AREA_OF]
    columns = _columns([f for f, _ in found])
    columns["area"] = [_AREA_OF[f.top] for f, _ in found]
    return by_split(columns, [split for _, split in found])


_NOTE = (
    "Content follows the running Python version. Docstrings occur once; functions with like "
    "docstrings or bodies lie in one split."
)

SETS = (
    Entry(
        EmbeddedInfo(
            name="code-docstring",
            title="Standard-library functions: docstring and code without it",
            licence="PSF-2.0 (Python Software Foundation)",
            modality="text",
            sources=(StandardLibrary(),),
            tasks={
                "code-docstring": {
                    "data": "embedded:code-docstring",
                    "schema": "matching",
                    "inputs": {"text": ["summary", "code"]},
                }
            },
            fixed=False,
            note=_NOTE + " The code keeps the function's name, which often repeats words of the "
            "docstring; comments are gone.",
        ),
        _docstrings,
        version=5,
    ),
    Entry(
        EmbeddedInfo(
            name="code-area",
            title="From which part of the standard library a docstring is, eight parts",
            licence="PSF-2.0 (Python Software Foundation)",
            modality="text",
            sources=(StandardLibrary(),),
            tasks={
                "code-area": {
                    "data": "embedded:code-area",
                    "schema": "classification",
                    "inputs": {"text": "docstring"},
                    "target": "area",
                }
            },
            classes=tuple(AREAS),
            fixed=False,
            note=_NOTE + " Same split as code-docstring.",
        ),
        _areas,
        version=5,
    ),
)
