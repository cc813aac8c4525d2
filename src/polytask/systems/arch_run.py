"""`polytask run arch-objective`: which architecture and objective suits one's own text.

A vocabulary is learned from the text, a twentieth of it is held out, the chosen cells train on the
same number of tokens seen, and the adaptations between causal and prefix decoders are tried where
both ends are among the cells. Leaves a table, the models, and a picture of loss over tokens on
which the speed-ups are marked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from polytask import files
from polytask.errors import ConfigError, DataError
from polytask.systems.base import Outcome, Say, SystemConfig

if TYPE_CHECKING:
    from polytask.systems.arch_cells import Curve, Scale
    from polytask.systems.testbeds.prose import Prose

DEFAULT = ("cd:flm", "nd:plm", "ed:plm", "cd:mlm", "nd:mlm", "ed:mlm")
_HELD_OUT = 0.05  # of the tokens, from the end
_SENTINELS = 32


class ArchRunConfig(SystemConfig):
    """Sheet 06 on one's own text. `data` is a text file or a folder of them, or rows with a text
    column ('pages.jsonl'); without it, Webster's dictionary."""

    cells: tuple[str, ...] = Field(DEFAULT, description="cd|nd|ed with flm|plm|mlm")
    column: str = Field("text", description="of rows")
    budget_tokens: PositiveInt = Field(600_000, description="tokens every cell sees")
    adapt_share: float = Field(0.25, gt=0, le=1, description="of the budget, for an adaptation")
    lr: PositiveFloat = 5e-3
    dim: PositiveInt = 64
    layers: PositiveInt = 2
    heads: PositiveInt = 4
    vocab: PositiveInt = 1024
    rows: PositiveInt = 16
    length: int = Field(64, ge=16, description="tokens seen per example")
    seeds: tuple[int, ...] = Field((0,), min_length=1)

    @field_validator("cells", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(value.replace(",", " ").split()) if isinstance(value, str) else value


def arch_run(config: ArchRunConfig, say: Say) -> Outcome:
    """Train the grid, adapt, tabulate, draw."""
    from polytask.systems import arch_cells as study

    grid = [study.Cell.of(name) for name in dict.fromkeys(config.cells)]
    scale = study.Scale(
        dim=config.dim,
        layers=config.layers,
        heads=config.heads,
        vocab=config.vocab,
        rows=config.rows,
        length=config.length,
        t5_like=True,
    )
    steps = config.budget_tokens // scale.step_tokens
    adapt = max(1, round(config.adapt_share * steps))
    if not steps:
        raise ConfigError(
            f"budget_tokens = {config.budget_tokens} is less than one step of {config.rows} x "
            f"{config.length} tokens"
        )
    text = _text(config, say)
    scale = _fitted(scale, text, steps)
    curves: dict[str, list[Curve]] = {}
    facts: dict[str, dict[str, Any]] = {}
    ways = [(f"{b} -> {t}", b, t) for b, t in (("cd:flm", "nd:mlm"), ("nd:mlm", "cd:flm"))]
    names = {cell.name for cell in grid}
    folder = config.out / "arch-objective"
    for seed in config.seeds:
        models = {}
        for cell in grid:
            say(f"{cell.name}, seed {seed}: {steps} steps of {scale.step_tokens} tokens")
            model = study.fresh(text, cell.architecture, scale, seed)
            curve, done = study.train(model, text, cell.objective, scale, seed, steps, config.lr)
            curves.setdefault(cell.name, []).append(curve)
            facts[cell.name] = {
                "parameters": study.parameters(model),
                "tokens": done.tokens,
                "trained": done.trained,
                "tokens per second": round(done.tokens / done.seconds),
            }
            models[cell.name] = model
            model.save(folder / f"{cell.name.replace(':', '-')}-{seed}")
        for name, base, to in ways:
            if not {base, to} <= names:
                continue
            say(f"{name}, seed {seed}: the mask is switched, {adapt} steps more")
            cell = study.Cell.of(to)
            mask = cell.architecture
            assert mask != "encdec"  # no adaptation leads there
            model = study.switched(models[base], mask)
            curve, done = study.train(model, text, cell.objective, scale, seed, adapt, config.lr)
            curves.setdefault(name, []).append(curve)
            facts[name] = {"parameters": study.parameters(model), "tokens": done.tokens}
    with files.building(folder / "codec") as aside:
        text.codec.save(aside)
    return _leave(folder, config, curves, facts, [w for w in ways if w[0] in curves])


def _text(config: ArchRunConfig, say: Say) -> Prose:
    """The user's text as streams of tokens; the end of it is held out."""
    import numpy as np

    from polytask.data.corpus import CorpusSpec, open_corpus
    from polytask.systems.testbeds.prose import Prose, prose
    from polytask.tasks.tokenizer_training import train_tokenizer

    if config.data is None:
        say("no --data given: Webster's dictionary is taken")
        return prose(config.vocab)
    spec = CorpusSpec.of(str(config.data), "data")
    if spec.data is not None:
        spec = spec.model_copy(update={"column": config.column})
    documents = list(open_corpus(spec).read_from(0))
    say(f"{len(documents)} documents; learning a vocabulary of {config.vocab}")
    codec = train_tokenizer(documents, config.vocab, "bpe", _SENTINELS)
    parts = [np.array([*ids, codec.end], np.int32) for ids in codec.encode(documents)]
    stream = np.concatenate(parts)
    cut = len(stream) - max(4 * config.length, round(_HELD_OUT * len(stream)))
    if cut < 4 * config.length:
        raise DataError(
            f"{config.data} has {len(stream)} tokens: too few for examples of {config.length} "
            "and some held out"
        )
    return Prose(codec, {"train": stream[:cut], "valid": stream[cut:], "test": stream[cut:]})


def _fitted(scale: Scale, text: Prose, steps: int) -> Scale:
    """Held-out examples as far as the text has them, and about 24 points on a curve."""
    from dataclasses import replace

    there = len(text.tokens["valid"]) // scale.length
    every = max(1, steps // 24)
    return replace(scale, held_out=max(1, min(scale.held_out, there)), every=every)


def _leave(
    folder: Path,
    config: ArchRunConfig,
    curves: Mapping[str, Sequence[Curve]],
    facts: Mapping[str, Mapping[str, Any]],
    ways: Sequence[tuple[str, str, str]],
) -> Outcome:
    """Figures, a table and pictures."""
    from polytask.report.arch_page import arch_report
    from polytask.systems.arch_cells import mean, speed_up

    rows: list[dict[str, Any]] = []
    gains: dict[str, dict[str, Any]] = {}
    for name, found in curves.items():
        row: dict[str, Any] = {"cell": name, **facts[name]}
        row["held-out loss"] = mean([curve.loss[-1] for curve in found])
        row["of text alone"] = mean([curve.text[-1] for curve in found])
        rows.append(row)
    for name, _, to in ways:
        pairs = list(zip(curves[name], curves[to], strict=True))
        factors = [speed_up(adapted, scratch) for adapted, scratch in pairs]
        gains[name] = {
            "scratch": to,
            "factor": mean([factor for factor, _ in factors]),
            "reached": all(reached for _, reached in factors),
            "loss": mean([adapted.loss[-1] for adapted, _ in pairs]),
            "tokens": pairs[0][0].tokens[-1],
        }
    figures: dict[str, Any] = {
        "config": config.model_dump(mode="json"),
        "rows": rows,
        "speed-ups": gains,
        "curves": {name: [asdict(c) for c in found] for name, found in curves.items()},
    }
    files.write_json(folder / "arch-objective.json", figures)
    written = arch_report(folder, figures)
    return Outcome(folder, figures, _lines(rows, gains), [*written, folder / "arch-objective.json"])


def _lines(rows: Sequence[Mapping[str, Any]], gains: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The table, and what the adaptations gained."""
    lines = [f"{'cell':<18}{'parameters':>12}{'tokens seen':>13}{'held-out loss':>15}{'text':>8}"]
    for row in rows:
        lines.append(
            f"{row['cell']:<18}{row['parameters']:>12,}{row['tokens']:>13,}"
            f"{row['held-out loss']:>15.3f}{row['of text alone']:>8.3f}"
        )
    for name, gain in gains.items():
        least = "" if gain["reached"] else "at least "
        lines.append(
            f"{name}: {least}{gain['factor']:.1f} times as fast as {gain['scratch']} from scratch"
        )
    return lines
