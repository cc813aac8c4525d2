"""`polytask infer fuse` and `polytask run 37`: a large model with small experts on one's prompts.

Models are folders in Hugging Face format, hub ids, 'embedded:NAME', or run folders of polytask
(with a language_model task). Without models, small ones of characters are trained once, in about
half a minute, on text that every installation carries.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator

from polytask import files
from polytask.configs import parse
from polytask.errors import ConfigError, DataError
from polytask.infer.fusion import GRID, Bounds, Mode, Refine, checked_grid, parse_grid
from polytask.systems.base import Outcome, Say, SystemConfig

DEMONSTRATION = ("cdef class ", "if(NOT ", "C 32 ; WX 250 ; N space ;")
COLUMNS = ("prompt", "step", "id", "token", "expert", "alpha", "loss", "moved", "back", "nll")


class FusionRunConfig(SystemConfig):
    """A large model, a small base, experts tuned from it, and prompts.

    `data` holds prompts: a .jsonl file has one a line under 'prompt' or 'text'; any other file is
    one prompt.
    """

    large: str | None = None
    base: str | None = None
    experts: tuple[str, ...] = ()
    prompt: tuple[str, ...] = ()
    shots: Path | None = Field(None, description="text before every prompt, large model only")
    score: bool = Field(False, description="score the given texts instead of continuing them")
    grid: tuple[float, ...] = GRID
    mode: Mode = "single"
    alpha: tuple[float, ...] = ()
    bounds: tuple[tuple[float, float], ...] | None = None
    refine: Refine = "none"
    max_new: PositiveInt = 64
    temperature: float = Field(0.0, ge=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0)
    stop: tuple[str, ...] = ()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"

    @field_validator("grid", mode="before")
    @classmethod
    def _grid(cls, value: Any) -> Any:
        """'0:2:.1' or '0,.5,1'."""
        return parse_grid(value) if isinstance(value, str) else checked_grid(tuple(value))

    @field_validator("experts", mode="before")
    @classmethod
    def _experts(cls, value: Any) -> Any:
        """'a,b' is two models."""
        return tuple(v.strip() for v in value.split(",")) if isinstance(value, str) else value

    @field_validator("prompt", "stop", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("alpha", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(v.strip() for v in value.split(","))
        return (value,) if isinstance(value, int | float) else value

    @field_validator("bounds", mode="before")
    @classmethod
    def _bounds(cls, value: Any) -> Any:
        """'0:1,0:.5' is a pair for each expert."""
        return parse_bounds(value) if isinstance(value, str) else value


def parse_bounds(text: str) -> Bounds:
    """'0:1,0:.5' -> ((0, 1), (0, .5))."""
    try:
        pairs = [tuple(float(v) for v in part.split(":")) for part in text.split(",")]
        return tuple((low, high) for low, high in pairs)
    except ValueError:
        raise ConfigError(f"bounds '{text}' should be low:high for each expert: 0:1,0:.5") from None


def fusion_run(config: FusionRunConfig, say: Say, stream: Say | None = None) -> Outcome:
    """Load, continue or score, and leave fusion.json, tokens.csv, report.html and pictures.

    `stream` is told the text of a single prompt as it is written.
    """
    from polytask.infer.fusion_generate import Sampler
    from polytask.infer.fusion_model import Fusion
    from polytask.infer.fusion_policy import FusionConfig, FusionPolicy

    options = {k: getattr(config, k) for k in ("mode", "grid", "alpha", "bounds", "refine")}
    fused = parse(FusionConfig, options, "fusion")
    FusionPolicy(fused, len(config.experts) or 1)  # faults of the options, before anything is read
    prompts = _prompts(config)
    sources = _sources(config, say)
    fusion = Fusion(sources[0], sources[1], sources[2:], fused)
    say(f"{len(fusion.large.vocabulary):,} tokens, the same in all {len(sources)} models")
    begin = time.perf_counter()
    if config.score:
        written = fusion.score(prompts)
    else:
        sampler = Sampler(
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            seed=config.seed,
        )
        told = stream if len(prompts) == 1 else None
        written = fusion.write(
            prompts,
            max_new=config.max_new,
            sampler=sampler,
            stop=config.stop,
            on_text=None if told is None else lambda row, piece: told(piece),
            before_large=_read(config.shots) if config.shots is not None else "",
        )
    seconds = time.perf_counter() - begin
    return _leave(config, fusion, written, seconds)


def _prompts(config: FusionRunConfig) -> list[str]:
    found = list(config.prompt)
    if config.data is not None:
        found += _prompts_in(config.data)
    if not found:
        if config.large is not None:
            raise DataError("give --prompt TEXT or --file FILE: there is nothing to continue")
        found = list(DEMONSTRATION)
    return found


def _prompts_in(path: Path) -> list[str]:
    text = _read(path)
    if path.suffix != ".jsonl":
        return [text]
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append(str(row["prompt"] if "prompt" in row else row["text"]))
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f"{path}, line {number}: should be a JSON object with 'prompt' or 'text'"
            ) from None
    return found


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not text.strip():
        raise DataError(f"{path} is empty")
    return text


def _sources(config: FusionRunConfig, say: Say) -> list[Any]:
    given = {"large": config.large, "base": config.base, "experts": config.experts or None}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if len(missing) == 3:
        from polytask.systems.testbeds import domain_models
        from polytask.systems.testbeds.domains import NEW

        say("no models given: character models, experts of cython, cmake and fonts (trained once)")
        return list(domain_models.family(0, domain_models.QUICK).chosen(NEW))
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} missing: fusion takes a large model, the small base that the "
            "experts were tuned from, and at least one expert"
        )
    places = [str(config.large), str(config.base), *config.experts]
    say(f"loading {', '.join(places)}")
    return load_sources(places, config.dtype, config.device)


def load_sources(places: Sequence[str], dtype: str = "float32", device: str = "cpu") -> list[Any]:
    """Models as sources of logits: Hugging Face causal LMs and run folders of polytask.

    Vocabularies are compared before any weight is read.
    """
    import torch

    from polytask.infer import logit_sources as sources
    from polytask.pipeline import load_run

    runs = {
        place: load_run(place)
        for place in places
        if (Path(place).expanduser() / "model" / "model.json").is_file()
    }
    for place, run in runs.items():
        _check_writes(place, run)
    hub = {place: sources.hub_tokenizer(place) for place in places if place not in runs}
    tokenizers = {place: run.processor.codec.tokenizer for place, run in runs.items()} | hub
    vocabularies = {p: sources.Vocabulary.of_tokenizer(t) for p, t in tokenizers.items()}
    sources.check_vocabularies([(place, vocabularies[place]) for place in places])
    found: list[Any] = []
    for place in places:
        if place in runs:
            model = runs[place].model.to(device)
            found.append(sources.PolytaskSource(model, runs[place].processor.codec, place))
        else:
            precision, tokenizer = getattr(torch, dtype), hub[place]
            found.append(
                sources.HubSource.load(place, dtype=precision, device=device, tokenizer=tokenizer)
            )
    return found


def _check_writes(place: str, run: Any) -> None:
    kinds = {t.name: t.schema.kind for layout in run.processor.layouts for t in layout.tasks}
    if "language_model" not in kinds.values():
        told = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        raise ConfigError(
            f"{place}: the run has no language_model task ({told}), so it cannot continue texts"
        )


def _leave(config: FusionRunConfig, fusion: Any, written: Sequence[Any], seconds: float) -> Outcome:
    from polytask.report.fusion_page import fusion_report

    folder = config.out / f"fusion-{config.data.stem if config.data is not None else 'prompt'}"
    folder.mkdir(parents=True, exist_ok=True)
    tokens = sum(len(one.tokens) for one in written)
    models = {
        "large": fusion.sources[0].name,
        "base": fusion.sources[1].name,
        "experts": dict(zip(fusion.names, (s.name for s in fusion.sources[2:]), strict=True)),
    }
    figures: dict[str, Any] = {
        "models": models,
        "vocabulary": len(fusion.large.vocabulary),
        "options": fusion.config.model_dump(mode="json"),
        "tokens": tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 2) if tokens else None,
        "results": [one.to_dict() for one in written],
    }
    files.write_json(folder / "fusion.json", figures)
    _table(folder / "tokens.csv", written, fusion.names)
    page = fusion_report(folder, written, fusion.names, figures)
    lines = []
    for number, one in enumerate(written, 1):
        shares = ", ".join(f"{name} {share:.0%}" for name, share in one.shares.items())
        lines.append(f"{number}. {len(one.tokens)} tokens ({shares})")
        if not config.score:
            lines.append(one.prompt + one.text)
        elif one.tokens:
            nats = sum(t.nll for t in one.tokens) / len(one.tokens)
            lines.append(f"   {nats:.4f} nats per token")
    speed = figures["tokens_per_second"]
    lines.append(
        f"{tokens} tokens in {seconds:.1f} s" + (f" ({speed:.1f} a second)" if speed else "")
    )
    left = [folder / "fusion.json", folder / "tokens.csv", page, *sorted(folder.glob("*.png"))]
    return Outcome(folder, figures, lines, left)


def _table(path: Path, written: Sequence[Any], names: Sequence[str]) -> None:
    """tokens.csv: a row per step, with a column for each expert's strength."""
    import csv

    with files.writing(path) as aside, aside.open("w", encoding="utf-8", newline="") as handle:
        table = csv.writer(handle)
        table.writerow([*COLUMNS, *(f"alpha {name}" for name in names)])
        for number, one in enumerate(written, 1):
            for step, t in enumerate(one.tokens, 1):
                row = (
                    number,
                    step,
                    t.id,
                    t.text,
                    t.expert,
                    t.alpha,
                    t.loss,
                    t.moved,
                    t.back,
                    t.nll,
                )
                table.writerow(["" if v is None else v for v in (*row, *t.alphas)])
