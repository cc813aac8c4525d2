"""What is known about an embedded data set before anything is read: `EmbeddedInfo`, `Sources`.

A data set that travels inside a package has one description, a list of places where its files may
stand, and a builder that turns those files into columns. Nothing here reads data; locating is
`sources.py`, caching `store.py`, downloading `fetching.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

    from polytask.data.embedded.sources import Located, Source

EmbeddedModality = Literal["text", "image", "series", "table", "audio", "spikes", "weights"]
Columns = Mapping[str, "np.ndarray | Sequence[Any]"]
"""Column name -> cells: an array whose first axis is the row, or a list (text, ragged arrays)."""
Splits = Mapping[str, Columns]
Builder = Callable[["Located"], Splits]


@dataclass(frozen=True)
class EmbeddedInfo:
    """One embedded data set as `polytask data show` prints it.

    `size` (rows per split), `checksum` and `verified_with` come from `verified.json`. Where
    `fixed` is set, the content is the same in every version of the package and another checksum
    is an error; elsewhere (translations, the standard library) it follows the installed version.
    `tasks` holds suggested task configurations by name, the main one first.
    """

    name: str
    title: str
    licence: str
    modality: EmbeddedModality
    sources: tuple[Source, ...]
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    size: Mapping[str, int] = field(default_factory=dict)
    checksum: str = ""
    verified_with: str = ""
    fixed: bool = True
    classes: tuple[str, ...] = ()
    note: str = ""

    @property
    def task(self) -> Mapping[str, Any]:
        """The first suggested task configuration; empty when there is none."""
        return next(iter(self.tasks.values()), {})

    @property
    def rows(self) -> int:
        """Rows over all splits, as verified."""
        return sum(self.size.values())


@dataclass(frozen=True)
class Entry:
    """An info with the function that builds its columns; raise `version` when its rule changes."""

    info: EmbeddedInfo
    build: Builder
    version: int = 1
