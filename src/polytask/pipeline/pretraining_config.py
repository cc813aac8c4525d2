"""What `polytask pretrain` takes: a model, an objective, a corpus, how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from polytask.configs import Config, load_yaml, parse
from polytask.data.corpus import CorpusSpec
from polytask.errors import suggestion
from polytask.models.feed import Architecture
from polytask.objectives.noise import Bart, BartNoise, MaskedLM
from polytask.objectives.ul2 import (
    MODE_TOKENS,
    RELEASED_TOKENS,
    Denoiser,
    FullLM,
    MixtureOfDenoisers,
    PrefixLM,
    SpanCorruption,
    ul2_mixture,
)
from polytask.pipeline.config import override
from polytask.train.config import TrainConfig
from polytask.train.language import LanguageObjective

Preset = Literal["ul2-20b", "ul2r", "decoder"]
Kind = Literal["full_lm", "prefix_lm", "span_corruption", "masked_lm", "bart"]
RATES: dict[str, float | Literal["uniform"]] = {
    "full_lm": 0.15,
    "prefix_lm": "uniform",
    "span_corruption": 0.15,
    "masked_lm": 0.15,
    "bart": 0.3,
}
"""What a kind takes when an objective is its name alone."""


class DenoiserConfig(Config):
    """One denoiser of a mixture of one's own."""

    kind: Kind
    rate: float | Literal["uniform"] = 0.15
    """Share of a chunk that is the target, or that is masked; for prefix LM 'uniform' draws the
    split anywhere."""
    mean_span: float = Field(default=3.0, ge=1)
    mode: str = ""
    """Name of the mode that announces it: R, S, X; '' for none."""
    share: float = Field(default=1.0, gt=0)
    """How often it is drawn, beside the others' shares."""
    delete: float = Field(default=0.0, ge=0, lt=1)
    """BART: share of the tokens that vanish without a mark."""
    rotate: float = Field(default=0.0, ge=0, le=1)
    """BART: how often a chunk begins at a random token of its own."""

    def build(self, input_end: bool) -> Denoiser:
        """As `polytask.objectives` has it."""
        if self.kind == "full_lm":
            return FullLM(self.mode)
        if self.kind == "prefix_lm":
            return PrefixLM(self.rate, mode=self.mode, input_end=input_end)
        assert not isinstance(self.rate, str)
        if self.kind == "masked_lm":
            return MaskedLM(self.rate)
        if self.kind == "bart":
            noise = BartNoise(self.rate, self.mean_span, False, (), self.delete, self.rotate)
            return Bart(noise, input_end)
        return SpanCorruption(self.mean_span, self.rate, mode=self.mode, input_end=input_end)

    @model_validator(mode="after")
    def _a_number(self) -> DenoiserConfig:
        if self.kind != "prefix_lm" and self.rate == "uniform":
            raise ValueError(f"'uniform' splits are for prefix_lm; give {self.kind} a rate")
        if self.kind in ("masked_lm", "bart") and self.mode:
            raise ValueError(f"{self.kind} has no mode token; leave 'mode' out")
        if self.kind != "bart" and (self.delete or self.rotate):
            raise ValueError("'delete' and 'rotate' are for kind: bart")
        return self


class ObjectiveSection(Config):
    """A preset, or denoisers."""

    preset: Preset | None = None
    """ul2-20b for encoder-decoders, decoder for decoders, ul2r to go on with a finished decoder."""
    denoisers: tuple[DenoiserConfig, ...] = ()
    shares: dict[str, float] | None = None
    """Share of each mode (R, S, X) in a preset."""
    s_rate: float | Literal["uniform"] = 0.25
    spans: tuple[float, float, float] = (3, 8, 64)
    """Mean spans of a preset; scale them down with the inputs."""
    mode_tokens: dict[str, str] | None = None
    """Mode -> token. None: [R], [S], [X], or those of UL2-20B where the tokenizer has them."""
    loss: LanguageObjective = LanguageObjective(mean="sequence", z_loss=1e-4)
    """'sequence': every example has the same say, as in a mixture drawn by example; averaged over
    'token's, denoisers with long targets dominate."""

    @model_validator(mode="after")
    def _one_of_them(self) -> ObjectiveSection:
        if (self.preset is None) is (not self.denoisers):
            raise ValueError("give either a preset or denoisers")
        if self.denoisers and self.shares is not None:
            raise ValueError("'shares' are for presets; denoisers have a share each")
        return self

    def mixture(self, architecture: Architecture) -> MixtureOfDenoisers:
        """The denoisers and their rates. Decoders get no end between input and target."""
        encoder = architecture == "encdec"
        if self.preset is not None:
            return ul2_mixture(self.preset, self.s_rate, self.spans, self.shares)
        built = tuple(d.build(encoder) for d in self.denoisers)
        return MixtureOfDenoisers(built, tuple(d.share for d in self.denoisers))

    @property
    def masks(self) -> bool:
        """Whether some denoiser writes a mask token."""
        return any(d.kind in ("masked_lm", "bart") for d in self.denoisers)

    def tokens(self, known: Mapping[str, int]) -> dict[str, str]:
        """Mode -> token, for a tokenizer with these tokens."""
        if self.mode_tokens is not None:
            return dict(self.mode_tokens)
        released = all(token in known for token in RELEASED_TOKENS.values())
        return dict(RELEASED_TOKENS if released else MODE_TOKENS)


class FreshModel(Config):
    """A transformer of our own, with a vocabulary learned from the corpus."""

    dim: PositiveInt = 256
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    dropout: float = Field(default=0.0, ge=0, lt=1)
    t5_like: bool = False
    """RMS norm, gated feed-forward and T5's relative positions, in place of rotary ones."""
    vocab: PositiveInt = 8000
    tokenizer: Literal["bpe", "word"] = "bpe"


class ModelSection(Config):
    """`hub` continues the training of a Hugging Face model; without it a fresh one is made."""

    hub: str | None = None
    """A folder, a hub id, or embedded:NAME."""
    architecture: Architecture | None = None
    """causal, prefix or encdec. None: what the model is; prefix makes a prefix decoder of a causal
    one by its mask."""
    fresh: FreshModel | None = None

    @model_validator(mode="after")
    def _one_model(self) -> ModelSection:
        if self.hub is not None and self.fresh is not None:
            raise ValueError("give 'hub' (a model to go on with) or 'fresh' (a new one), not both")
        return self


class PretrainRunConfig(Config):
    """One pretraining run. `corpus` and `objective` are needed; the rest has defaults."""

    name: str = Field(default="pretrain", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0)
    model: ModelSection = ModelSection()
    objective: ObjectiveSection
    corpus: CorpusSpec
    inputs_len: int = Field(default=512, ge=8)
    """Longest input in tokens, mode token and end included. For decoders: of input and target."""
    targets_len: PositiveInt | None = None
    """Longest target of an encoder-decoder; None: as long as the denoisers make it."""
    sentinels: PositiveInt = 100
    held_out: float = Field(default=0.02, ge=0, lt=0.5)
    """Share of the documents that only score."""
    held_out_chunks: NonNegativeInt = 32
    """Chunks per denoiser that are scored at every evaluation."""
    train: TrainConfig = TrainConfig(steps=1000, batch_size=16, lr=1e-4, weight_decay=0.0)

    @field_validator("corpus", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return CorpusSpec.of(value) if isinstance(value, str) else value

    @field_validator("objective", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """`objective: ul2r` is short for `objective: {preset: ul2r}`, `objective: full_lm` for one
        denoiser of that kind."""
        if not isinstance(value, str):
            return value
        if value in RATES:
            return {"denoisers": [{"kind": value, "rate": RATES[value]}]}
        known = (*get_args(Preset), *RATES)
        if value not in known:
            raise ValueError(
                f"there is no objective '{value}', only {', '.join(known)}."
                f"{suggestion(value, known)}"
            )
        return {"preset": value}

    @model_validator(mode="after")
    def _steps(self) -> PretrainRunConfig:
        if self.train.epochs is not None:
            raise ValueError("pretraining is counted in train.steps, not in epochs")
        return self


def load_pretrain_config(path: Path | str, overrides: Sequence[str] = ()) -> PretrainRunConfig:
    """Read a YAML file; `overrides` as for `load_config`."""
    path = Path(path)
    data = load_yaml(path)
    for text in overrides:
        override(data, text)
    data.setdefault("name", path.stem)
    return parse(PretrainRunConfig, data, str(path))
