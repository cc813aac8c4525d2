"""Localize a skill: learn which few parameters carry it, keep them, judge them, show them.

    found = localize(LocalizeConfig(base=..., finetuned=..., data=...), Path("runs/spam"))
    found.graft.save(...)              # written already: runs/spam/graft.safetensors

Rows for choosing the mask and rows for judging it are never the same. The graft is judged with its
values as they are stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytask import files, rng
from polytask.data.open import SPLIT_NAMES, open_rows, open_splits
from polytask.data.rows import RowSource
from polytask.errors import DataError, suggestion
from polytask.evaluate.calibration import Reliability, SetScore, compare_on_sets, reliability
from polytask.evaluate.metric import Floats
from polytask.merge.graft import Graft, parameter_names
from polytask.merge.graft_delta import SparseDelta
from polytask.merge.graft_fit import MaskStep, fit_mask, with_state
from polytask.merge.graft_map import bits_by_module
from polytask.pipeline.localize_config import LocalizeConfig, resolve
from polytask.pipeline.localize_models import Batch, Example, TextClassifier, load_classifier

Say = Callable[[str], None]
MODELS = ("pretrained", "fine-tuned", "movement", "graft")


@dataclass(frozen=True)
class Localized:
    """What `localize` leaves: the graft, its scores, and the folder that holds both."""

    folder: Path
    graft: SparseDelta
    scores: Sequence[SetScore]
    diagrams: Mapping[str, Reliability]  # model -> on the test rows
    trace: Sequence[MaskStep]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; undefined numbers are null."""
        graft = self.graft
        value: dict[str, Any] = plain(
            {
                "folder": str(self.folder),
                "graft": str(self.folder / "graft.safetensors"),
                "count": len(graft),
                "of": graft.layout.size,
                "share": graft.share,
                "scores": [asdict(score) for score in self.scores],
                "bits": [asdict(cell) for cell in bits_by_module(graft)],
                "diagrams": {
                    name: {key: value.tolist() for key, value in asdict(d).items()}
                    for name, d in self.diagrams.items()
                },
                "trace": [asdict(step) for step in self.trace],
                "notes": list(self.notes),
            }
        )
        return value


def localize(
    config: LocalizeConfig, folder: Path, base: Path = Path(), say: Say | None = None
) -> Localized:
    """Learn, keep and judge a graft; an interrupted call goes on where it was.

    Args:
        folder: gets graft.safetensors, localize.json and report.html.
        base: where relative paths of the configuration start.

    Raises:
        UserError family: data, labels or models that do not fit, before anything is learned.
    """
    from polytask.report.graft_page import graft_report

    tell = say or (lambda text: None)
    config = resolve(config, base)
    task = load_classifier(config)
    sets = _read_sets(config, task, base)
    graft = Graft.between(
        task.base,
        task.finetuned,
        config.sparsity,
        patch=1.0 if config.official else config.patch,
        parameters=parameter_names(task.model),
        include=config.include,
        exclude=config.exclude,
        outside=config.outside,
        official=config.official,
    )
    notes = list(graft.notes)
    tell(f"{graft.asked:,} of {graft.size:,} parameters in {len(graft.layout.shapes)} tensors")
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder):
        mask: Tensor = graft.movement()
        trace: tuple[MaskStep, ...] = ()
        if config.steps:
            mask, trace = _learn(graft, task, sets, folder / "mask.safetensors", tell)
        dtype = getattr(torch, config.values)
        kept = graft.sparse(mask, config.name).to(dtype)
        moved = graft.sparse(graft.movement(), "movement").to(dtype)
        scores, diagrams = _judge(task, sets, graft, kept, moved)
        model_config: Any = task.model.config
        facts = {
            **kept.facts,
            "sparsity": config.sparsity,
            "architecture": task.architecture,
            "config": plain(model_config.to_diff_dict()),
            "base": config.base,
            "scores": plain([asdict(score) for score in scores]),
        }
        kept = SparseDelta(kept.layout, kept.indices, kept.values, kept.origin, kept.dense, facts)
        kept.save(folder / "graft.safetensors")
        found = Localized(folder, kept, scores, diagrams, trace, notes)
        files.write_json(folder / "localize.json", found.to_dict())
        graft_report(folder, config.name, found.to_dict())
        (folder / "mask.safetensors").unlink(missing_ok=True)
    return found


def _learn(
    graft: Graft, task: TextClassifier, sets: _Sets, checkpoint: Path, tell: Say
) -> tuple[Tensor, tuple[MaskStep, ...]]:
    """The mask that is best on validation rows."""
    config = task.config

    def batches(step: int) -> Sequence[Batch] | Any:
        order = rng.generator(config.seed, "mask batches", step).permutation(len(sets.train))
        return task.batches([sets.train[i] for i in order], config.batch_size)

    def score(model: Any) -> float:
        reached = _accuracy(task, model, sets.valid)
        if config.official:
            learning = config.learning()
            reached += _accuracy(task, model, sets.train[: learning.accumulate * config.batch_size])
        return reached

    def told(step: MaskStep) -> None:
        shown = "" if step.score is None else f", validation {step.score:.4f}"
        loss = "" if step.loss is None else f" loss {step.loss:.4f},"
        tell(f"step {step.step}:{loss} {step.count:,} bits (+{step.added} -{step.removed}){shown}")

    found = fit_mask(
        graft,
        task.model,
        task.loss,
        batches,
        score,
        config.learning(),
        checkpoint=checkpoint,
        key=hashlib.blake2b(repr((sets.train, sets.valid)).encode()).hexdigest(),
        say=told,
    )
    return found.mask, found.trace


def _accuracy(task: TextClassifier, model: Any, examples: Sequence[Example]) -> float:
    guess = task.probabilities(model, examples).argmax(1)
    return float((guess == torch.tensor([e.label for e in examples])).float().mean())


def _judge(
    task: TextClassifier, sets: _Sets, graft: Graft, kept: SparseDelta, moved: SparseDelta
) -> tuple[list[SetScore], dict[str, Reliability]]:
    """All models on test and shifted rows. The pretrained model borrows the head it lacks."""
    states = {
        "pretrained": {**task.base, **graft.dense},
        "fine-tuned": task.finetuned,
        "movement": moved.apply(task.base),
        "graft": kept.apply(task.base),
    }
    targets = {name: np.array([e.label for e in rows]) for name, rows in sets.judged.items()}
    predictions: dict[str, dict[str, Floats]] = {
        model: {
            name: with_state(task.model, state, task.probabilities, rows).double().numpy()
            for name, rows in sets.judged.items()
        }
        for model, state in states.items()
    }
    scores = compare_on_sets(predictions, targets, "fine-tuned", task.config.bins)
    diagrams = {
        model: reliability(by_set["test"], targets["test"], task.config.bins)
        for model, by_set in predictions.items()
    }
    return scores, diagrams


@dataclass(frozen=True)
class _Sets:
    """Rows to learn from, to choose by, and to judge on by name ('test' first)."""

    train: list[Example]
    valid: list[Example]
    judged: dict[str, list[Example]]


def _read_sets(config: LocalizeConfig, task: TextClassifier, base: Path) -> _Sets:
    splits = open_splits(config.data, base)
    named = {SPLIT_NAMES.get(name, name): source for name, source in splits.items()}
    train = _examples(config, task, named.get("train", next(iter(named.values()))))
    order = rng.generator(config.seed, "localize split").permutation(len(train)).tolist()
    given: dict[str, list[Example]] = {}
    for part in ("valid", "test"):
        spec = getattr(config, part)
        if spec is not None:
            given[part] = _examples(config, task, open_rows(spec, base))
        elif part in named:
            given[part] = _examples(config, task, named[part])
        else:
            count = max(1, len(train) // 5)
            given[part] = [train[i] for i in order[:count]]
            order = order[count:]
    rest = [train[i] for i in order]
    if not rest:
        raise DataError(f"{config.data.name} has too few rows: {len(train)}")
    judged = {"test": given["test"]}
    for name, spec in config.shifted.items():
        judged[name] = _examples(config, task, open_rows(spec, base))
    most = config.max_rows
    return _Sets(rest, given["valid"][:most], {name: rows[:most] for name, rows in judged.items()})


def _examples(config: LocalizeConfig, task: TextClassifier, source: Any) -> list[Example]:
    """Rows as examples; `DataError` names column, row and file."""
    columns = (config.text,) if isinstance(config.text, str) else config.text
    for column in (*columns, config.label):
        if column not in source.columns:
            raise DataError(
                f"{source.name} has no column '{column}'.{suggestion(column, source.columns)}"
            )
    rows = (
        source.take(range(len(source)))
        if isinstance(source, RowSource)
        else list(source.read_from(0))
    )
    if not rows:
        raise DataError(f"{source.name} has no rows")
    found = []
    for number, row in enumerate(rows):
        where = source.where(number)
        if row[config.label] is None:
            raise DataError(f"{where}: no label")
        texts = tuple(str(row[column] or "") for column in columns)
        found.append(Example(texts, task.number_of(row[config.label], where)))
    return found


def load_localize_config(path: Path) -> LocalizeConfig:
    """A YAML file as a checked configuration."""
    from polytask.configs import load_yaml, parse

    return parse(LocalizeConfig, load_yaml(path), str(path))


def plain(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value


__all__ = ["Localized", "load_localize_config", "localize"]
