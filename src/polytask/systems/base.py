"""What a system is: a card, claims, arms that can be compared, and a way to run it on one's data.

A system's module exposes `system`. Tuning done beforehand lies beside the module as JSON, so that
a proof runs with frozen settings and the evidence shows how they were chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from polytask.configs import Config
from polytask.errors import ConfigError

if TYPE_CHECKING:
    from polytask.study import Arm, Budget, Claim, Evidence, Executor, Size, Tuning


Say = Callable[[str], None]  # where progress is told


@dataclass(frozen=True)
class Card:
    """What the catalogue says about a published system, in our own words."""

    number: int
    slug: str
    name: str
    title: str
    authors: str
    year: int
    arxiv: str
    stages: tuple[str, ...]  # of a model's life: tasks, mixture, ..., evaluate
    modalities: tuple[str, ...]
    claim: str  # the paper's central claim, one sentence
    needs: str  # what a user must bring
    limits: str  # where it is known or expected to fail
    proof: str  # how a proof here is measured
    use: str = ""  # how to call it on one's own data; empty while it is planned

    @property
    def key(self) -> str:
        """'16-flat-mtl': the name of sheet, evidence and report."""
        return f"{self.number:02d}-{self.slug}"


class SystemConfig(Config):
    """What every `run` takes; a system adds its own settings in a subclass."""

    data: Path | None = None  # a training configuration; None: the embedded default
    out: Path = Path("runs")  # folder that holds run folders


@dataclass(frozen=True)
class Outcome:
    """What `run` leaves: the run folder, figures for programs, lines for people, files."""

    folder: Path
    figures: Mapping[str, Any]
    lines: Sequence[str]
    files: Sequence[Path]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        files = [str(path) for path in self.files]
        return {"folder": str(self.folder), "figures": dict(self.figures), "files": files}


@runtime_checkable
class System(Protocol):
    """A system that is implemented. `polytask.study.Provable` plus use on one's own data.

    Optional: `tune(executor) -> Tuning` (chooses settings on tuning seeds), `reported(evidence)`
    (comparisons that are told but not claimed), and what `Provable` lists.
    """

    card: Card
    config: type[SystemConfig]

    @property
    def claims(self) -> tuple[Claim, ...]: ...

    def arms(self, size: Size) -> Mapping[str, Arm]: ...

    def budget(self, size: Size) -> Budget: ...

    def run(self, config: Any, say: Say = ...) -> Outcome:
        """On the user's tasks; `config` is an instance of `self.config`."""


@runtime_checkable
class Tunable(Protocol):
    """A system whose settings are chosen on tuning seeds before anything is claimed."""

    tuning_file: Path

    def tune(self, executor: Executor) -> Tuning: ...


@runtime_checkable
class Reporting(Protocol):
    """A system with comparisons that are reported beside the claims."""

    def reported(self, evidence: Evidence) -> list[str]: ...


def read_tuning(path: Path) -> Tuning:
    """The tuning record beside a system's module."""
    from pydantic import TypeAdapter

    from polytask.study import Tuning

    if not path.is_file():
        number = path.name.split("_")[0]
        raise ConfigError(
            f"the arms of system {number} have not been tuned yet: polytask prove {number} --tune"
        )
    return TypeAdapter(Tuning).validate_json(path.read_bytes())


def write_tuning(path: Path, tuning: Tuning) -> None:
    """Keep a tuning record where `read_tuning` finds it."""
    from pydantic import TypeAdapter

    from polytask import files
    from polytask.study import Tuning

    files.write_json(path, TypeAdapter(Tuning).dump_python(tuning, mode="json"))
