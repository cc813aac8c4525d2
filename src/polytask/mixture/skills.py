"""Which skill helps which: a weighted directed graph between training and evaluation skills.

A row is a skill that can be trained on, a column a skill that is judged; entry (i, j) says how much
training on i helps j. Continual pretraining has the same skills on both sides, fine-tuning keeps
the columns of its targets, and out of domain the two sides are different (Chen et al., 2023,
arXiv 2307.14430). The graph is a plain value: it can be written by hand, learned
(`polytask.mixture.learn_graph`), saved as JSON and read again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from polytask import files
from polytask.errors import ConfigError, suggestion
from polytask.mixture.quota import Bools, Floats

log = logging.getLogger(__name__)
NEARLY = 0.9  # share of possible edges from which a graph counts as nearly complete


class SkillGraph:
    """How much each training skill helps each evaluation skill.

    Args:
        A: (k, m) numbers; row = training skill, column = evaluation skill. Negative entries (a
            skill that harms another) are kept with a warning.
        train_names: of the k rows.
        eval_names: of the m columns; the rows' names when left out.
        clip: set negative entries to zero.

    Raises `ConfigError` naming the row and column of an entry that is not finite, a shape that
    does not fit the names, or a name that occurs twice.

    Treat it as a value: methods return new graphs.
    """

    def __init__(
        self,
        A: npt.ArrayLike,
        train_names: Sequence[str],
        eval_names: Sequence[str] | None = None,
        *,
        clip: bool = False,
    ) -> None:
        self.train_names = tuple(map(str, train_names))
        self.eval_names = self.train_names if eval_names is None else tuple(map(str, eval_names))
        self.A = _matrix(A, self.train_names, self.eval_names)  # (k, m)
        negative = int((self.A < 0).sum())
        if negative and clip:
            self.A = np.maximum(self.A, 0.0)
        elif negative:
            i, j = (int(n) for n in np.argwhere(self.A < 0)[0])
            log.warning(
                "the skill graph has %d negative entries (the first: '%s' -> '%s', %g): skills "
                "that harm others get less of the mixture. Clip them to keep helpers only",
                negative,
                self.train_names[i],
                self.eval_names[j],
                self.A[i, j],
            )
        self.A.setflags(write=False)

    # Shape

    @property
    def shape(self) -> tuple[int, int]:
        """(training skills, evaluation skills)."""
        return len(self.train_names), len(self.eval_names)

    @property
    def square(self) -> bool:
        """Whether both sides are the same skills in the same order."""
        return self.train_names == self.eval_names

    @property
    def own(self) -> Bools:
        """(k, m) True where the training skill is the evaluation skill itself."""
        rows, columns = np.array(self.train_names), np.array(self.eval_names)
        return np.asarray(rows[:, None] == columns[None, :])

    @property
    def lone(self) -> Bools:
        """(k,) skills without an edge from or to another; of a square graph."""
        if not self.square:
            raise ConfigError("lone skills are those of a graph with the same skills on both sides")
        edges = (self.A != 0) & ~self.own
        return np.asarray(~edges.any(0) & ~edges.any(1))

    def warn_if_flat(self) -> str | None:
        """Log and return a warning where the graph orders nothing: no edges, or nearly all."""
        others = ~self.own
        possible = int(others.sum())
        edges = int(((self.A > 0) & others).sum())
        if not possible:
            return None
        if edges <= (1 - NEARLY) * possible:
            found = "almost no edges"
        elif edges >= NEARLY * possible:
            found = "almost all edges"
        else:
            return None
        text = (
            f"the skill graph has {found} ({edges} of {possible}): Skill-It then follows the "
            "losses alone and comes close to stratified sampling. Other skills, or longer runs to "
            "learn the graph, may show an order"
        )
        log.warning("%s", text)
        return text

    # Other graphs

    def only(
        self, train_names: Iterable[str] | None = None, eval_names: Iterable[str] | None = None
    ) -> SkillGraph:
        """The rows and columns named, in the order named; `ConfigError` for unknown names."""
        rows = self.train_names if train_names is None else tuple(train_names)
        columns = self.eval_names if eval_names is None else tuple(eval_names)
        at = [_index(n, self.train_names, "training skill") for n in rows]
        to = [_index(n, self.eval_names, "evaluation skill") for n in columns]
        return _quiet(self.A[np.ix_(at, to)], rows, columns)

    def transposed(self) -> SkillGraph:
        """Every edge turned round: the wrong way to use a graph, for ablations."""
        return _quiet(self.A.T, self.eval_names, self.train_names)

    def clipped(self) -> SkillGraph:
        """Without negative entries."""
        return _quiet(np.maximum(self.A, 0.0), self.train_names, self.eval_names)

    def halved_edges(self, times: int) -> SkillGraph:
        """Positive entries between different skills divided by 2^times."""
        changed = np.where((self.A > 0) & ~self.own, self.A / 2.0**times, self.A)
        return _quiet(changed, self.train_names, self.eval_names)

    @classmethod
    def identity(cls, names: Sequence[str]) -> SkillGraph:
        """Every skill helps itself alone."""
        return cls(np.eye(len(names)), names)

    @classmethod
    def by_hand(cls, A: npt.ArrayLike, names: Sequence[str]) -> SkillGraph:
        """A graph of zeros and ones as drawn by hand: edges between different skills count 0.5."""
        drawn = cls(A, names)
        halved = np.where((drawn.A == 1) & ~drawn.own, 0.5, drawn.A)
        return _quiet(halved, drawn.train_names, drawn.eval_names)

    # Files

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: {"train": [...], "eval": [...], "A": [[...], ...]}."""
        return {
            "train": list(self.train_names),
            "eval": list(self.eval_names),
            "A": self.A.tolist(),
        }

    @classmethod
    def from_dict(
        cls, record: Mapping[str, Any], where: str = "the skill graph", clip: bool = False
    ) -> SkillGraph:
        """What `to_dict` returned; 'eval' may be left out where both sides are the same."""
        unknown = sorted(set(record) - {"train", "eval", "A", "learned"})
        if unknown:
            raise ConfigError(
                f"{where}: unknown key '{unknown[0]}'."
                f"{suggestion(unknown[0], ('train', 'eval', 'A'))}"
            )
        for key in ("train", "A"):
            if key not in record:
                raise ConfigError(f"{where}: key '{key}' is required (train: names, A: rows)")
        try:
            return cls(record["A"], record["train"], record.get("eval"), clip=clip)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def save(self, path: Path | str, learned: Mapping[str, Any] | None = None) -> None:
        """Write JSON, whole or not at all. `learned`: how it came about, kept beside it."""
        record = self.to_dict()
        if learned is not None:
            record["learned"] = dict(learned)
        files.write_json(Path(path), record)

    @classmethod
    def load(cls, path: Path | str, clip: bool = False) -> SkillGraph:
        """Read what `save` wrote; `ConfigError` where the file is missing or is no graph."""
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"there is no skill graph {path}")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON: {error}") from error
        if not isinstance(record, Mapping):
            raise ConfigError(f"{path} should hold an object with 'train', 'eval' and 'A'")
        return cls.from_dict(record, str(path), clip)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SkillGraph)
            and (self.train_names, self.eval_names) == (other.train_names, other.eval_names)
            and np.array_equal(self.A, other.A)
        )

    def __hash__(self) -> int:
        return hash((self.train_names, self.eval_names, self.A.tobytes()))

    def __repr__(self) -> str:
        return f"SkillGraph({self.A.tolist()}, {self.train_names}, {self.eval_names})"


def restricted(graph: Any, names: Sequence[str]) -> Any:
    """A configuration's graph for some of its tasks only (a stage that trains on those): an inline
    graph keeps their rows and columns; None, a file's name or 'auto' stays as it is."""
    if not isinstance(graph, Mapping):
        return graph
    whole = SkillGraph.from_dict(graph, "mixture.graph")
    rows = [n for n in whole.train_names if n in names]
    columns = [n for n in whole.eval_names if n in names]
    if not rows or not columns:
        raise ConfigError(
            f"the skill graph has no row or no column for the tasks of a stage ({', '.join(names)})"
        )
    return whole.only(rows, columns).to_dict()


def _matrix(A: npt.ArrayLike, rows: Sequence[str], columns: Sequence[str]) -> Floats:
    try:
        found = np.array(A, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the entries of a skill graph are rows of numbers of one length: {error}"
        ) from error
    if not rows or not columns:
        raise ConfigError("a skill graph needs at least one skill on each side")
    for names in (rows, columns):
        twice = next((n for i, n in enumerate(names) if n in names[:i]), None)
        if twice is not None:
            raise ConfigError(f"the skill graph names '{twice}' twice")
    if found.shape != (len(rows), len(columns)):
        raise ConfigError(
            f"the skill graph has shape {found.shape}; {len(rows)} training and {len(columns)} "
            f"evaluation skills need ({len(rows)}, {len(columns)})"
        )
    for i, j in np.argwhere(~np.isfinite(found)):
        raise ConfigError(
            f"the skill graph's entry '{rows[i]}' -> '{columns[j]}' is {found[i, j]}, not a "
            "finite number"
        )
    return found


def _index(name: str, names: Sequence[str], what: str) -> int:
    if name not in names:
        raise ConfigError(f"the skill graph has no {what} '{name}'.{suggestion(name, names)}")
    return list(names).index(name)


def _quiet(A: Floats, rows: Sequence[str], columns: Sequence[str]) -> SkillGraph:
    """A graph made of one that has been checked (and warned of) already."""
    made = SkillGraph.__new__(SkillGraph)
    made.train_names, made.eval_names = tuple(rows), tuple(columns)
    made.A = _matrix(A, made.train_names, made.eval_names)
    made.A.setflags(write=False)
    return made
