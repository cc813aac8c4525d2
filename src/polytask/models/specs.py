"""What a model is made of, as data: sizes of inputs, one entry per task, and the options.

`ModelSpec` is everything needed to build a `MultitaskModel` without the data it was made for, so a
saved model is this JSON beside a safetensors file.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from polytask.configs import Config
from polytask.models.transformer import TransformerConfig

HeadKind = Literal[
    "classify",
    "multilabel",
    "regress",
    "choice",
    "tag",
    "generate",
    "match",
    "forecast",
    "dense",
]


class ObjectiveConfig(Config):
    """Options of the losses (polytask.objectives)."""

    label_smoothing: float = Field(0.0, ge=0, lt=1, description="classify and choice")
    token_mean: Literal["sequence", "token"] = Field(
        "sequence", description="generate, tag: mean over each sequence first, or over all tokens"
    )
    z_loss: float = Field(0.0, ge=0, description="weight of log(Z)^2 per generated token")
    forecast: Literal["huber", "mse", "mae"] = "huber"
    regress: Literal["mse", "huber", "mae"] = "mse"


class ModelConfig(TransformerConfig):
    """The `model:` section of a configuration: the transformer, stems, heads and losses."""

    hub: str | None = Field(None, description="a Hugging Face model (folder, id or embedded:NAME)")
    pool: Literal["auto", "summary", "mean", "first", "last"] = Field(
        "auto",
        description="what stands for a sequence: a learned last token (summary), or tokens; auto: "
        "summary; for hub models mean (encoders) or last (decoders)",
    )
    image_patch: int | None = Field(None, gt=0, description="pixels per patch side; must divide")
    series_patch: int = Field(8, gt=0, description="time steps per series token")
    series_level: bool = Field(
        True, description="a token with level and scale, which instance norm removes"
    )
    forecast_from: Literal["patches", "summary"] = "patches"
    tie: bool = Field(True, description="generated tokens are scored with the input embeddings")
    decoder_layers: int = Field(
        0, ge=0, description="above 0: generate with a decoder that attends to the encoded prompt"
    )
    match_dim: int = Field(128, gt=0)
    gradient_checkpointing: bool = False
    seed: int = Field(0, ge=0, description="of the initial parameters")
    objective: ObjectiveConfig = ObjectiveConfig()

    @model_validator(mode="after")
    def _own_trunk(self) -> ModelConfig:
        if self.hub is not None and self.experts is not None:
            raise ValueError(
                "experts need polytask's own trunk, not a hub model's ('hub'); a Hugging Face ViT "
                "is upcycled with MoEViT.from_pretrained"
            )
        return self


class InputSpec(Config):
    """Sizes of the inputs; 0 or None: the modality does not occur."""

    vocab_size: int = 0
    pad_id: int = 0
    end_id: int | None = None
    text_length: int = 64
    image_size: int = 0
    series_length: int = 0
    series_channels: int = 0
    number_columns: int = 0
    categories: int = 0
    feature_width: int = 0

    @property
    def modalities(self) -> tuple[str, ...]:
        """Those that occur, in the order in which their tokens stand in a sequence."""
        present = {
            "image": self.image_size,
            "series": self.series_channels,
            "table": self.number_columns + self.categories,
            "features": self.feature_width,
            "text": self.vocab_size,
        }
        return tuple(name for name, size in present.items() if size)


class HeadSpec(Config):
    """One task's head. `outputs` counts its numbers per pair, token or pixel."""

    task: str
    kind: HeadKind
    outputs: int = Field(1, ge=0)
    mean: tuple[float, ...] = ()  # regress: of the training labels, per output
    std: tuple[float, ...] = ()
    horizon: int = 0  # forecast: outputs = horizon * channels
    channels: int = 0
    height: int = 0  # dense: of the label
    width: int = 0
    classes: int = 0  # dense: 0 = real values
    temperature: float = 0.07  # match

    @model_validator(mode="after")
    def _complete(self) -> HeadSpec:
        if self.kind == "regress":
            for name in ("mean", "std"):
                given = getattr(self, name)
                if given and len(given) != self.outputs:
                    raise ValueError(f"{name} has {len(given)} entries for {self.outputs} outputs")
        if self.kind == "forecast" and self.outputs != self.horizon * self.channels:
            raise ValueError("forecast outputs must be horizon * channels")
        return self


class ModelSpec(Config):
    """A model without its weights."""

    config: ModelConfig
    inputs: InputSpec
    heads: tuple[HeadSpec, ...]
    hub: dict[str, Any] | None = Field(None, description="configuration of a hub model's trunk")


def head_spec(name: str, schema: Any) -> HeadSpec:
    """The head a task's schema asks for (polytask.tasks.schemas)."""
    kind = schema.head
    options: dict[str, Any] = {}
    if kind in ("classify", "multilabel", "tag"):
        options["outputs"] = len(schema.classes)
    elif kind == "regress":
        mean, std = getattr(schema, "mean", None), getattr(schema, "std", None)
        options["outputs"] = int(schema.outputs)
        options["mean"] = () if mean is None else tuple(float(v) for v in _sequence(mean))
        options["std"] = () if std is None else tuple(float(v) for v in _sequence(std))
    elif kind == "match":
        options["temperature"] = float(schema.temperature)
    elif kind == "forecast":
        options["horizon"], options["channels"] = int(schema.horizon), int(schema.channels)
        options["outputs"] = options["horizon"] * options["channels"]
    elif kind == "dense":
        classes = len(schema.classes) if schema.classes else 0
        options.update(height=int(schema.height), width=int(schema.width), classes=classes)
        options["outputs"] = classes or 1
    return HeadSpec(task=name, kind=kind, **options)


def _sequence(value: Any) -> tuple[Any, ...]:
    return tuple(value) if hasattr(value, "__len__") else (value,)
