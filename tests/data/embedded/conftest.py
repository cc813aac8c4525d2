"""A cache per test, and one per session for the sets of installed packages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from polytask.data import embedded
from polytask.data.rows import RowSource


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for one test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("POLYTASK_CACHE", str(folder))
    return folder


class Installed:
    """`embedded.load` with a cache of its own that starts empty and lives for the session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loaded: dict[str, Mapping[str, RowSource]] = {}

    def __call__(self, name: str) -> Mapping[str, RowSource]:
        if name not in self._loaded:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("POLYTASK_CACHE", str(self.folder))
                self._loaded[name] = embedded.load(name)
        return self._loaded[name]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Loads sets of installed packages; each is built once a session."""
    return Installed(tmp_path_factory.mktemp("embedded"))
