"""`LocalizeConfig`: two checkpoints, rows of a task, and how small the graft should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from polytask.configs import Config
from polytask.data.spec import DataSpec
from polytask.merge.graft_fit import MaskConfig


class LocalizeConfig(Config):
    """Find which few parameters carry what fine-tuning taught.

    The task is text classification with a fine-tuned head, or, where `labels` gives a word for
    each class, by words: of the masked token, or the one that follows (prompt-based fine-tuning,
    as in the paper).
    """

    base: str
    """The pretrained model: a folder, a hub id or embedded:NAME."""
    finetuned: str
    """The same model after fine-tuning."""
    data: DataSpec
    """Rows with text and label. Splits train, valid, test where it has them; else drawn."""
    valid: DataSpec | None = None
    """Rows by which the best mask is chosen; drawn from `data` when None."""
    test: DataSpec | None = None
    """Rows that judge; never used for choosing. Drawn from `data` when None."""
    shifted: dict[str, DataSpec] = Field(default_factory=dict)
    """More rows to judge on, by name: other sources of the same task."""
    text: str | tuple[str, str] = "text"
    """Column of the text, or of a pair of texts."""
    label: str = "label"
    labels: dict[str | int, str] = Field(default_factory=dict)
    """Label -> word; empty for models with a classification head."""
    template: str = "{text} It was {mask}."
    """Text around the word; {text} (or {text} and {pair}) and {mask}; used with `labels`."""
    max_length: PositiveInt = 128
    """Tokens of a text; longer ones are cut at the end."""
    name: str = Field(default="graft", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0)
    sparsity: float = Field(default=1e-4, gt=0, le=1)
    """Share of the parameters that fine-tuning changed."""
    patch: float = Field(default=0.25, gt=0, le=1)
    """Share of the kept parameters that the base patch starts with; the mask grows from there."""
    steps: int = Field(default=20, ge=0)
    """Steps of mask learning; 0 takes the parameters that moved most."""
    mask: MaskConfig = MaskConfig()
    """The rest of mask learning; its `steps` is the one above."""
    official: bool = False
    """Learn as the published trainer does: lr 1e7, no cap, no limit, training + validation."""
    include: tuple[str, ...] = ()
    """Name patterns of what may be grafted; empty: all that changed."""
    exclude: tuple[str, ...] = ()
    outside: Literal["error", "base", "finetuned"] = "finetuned"
    """About tensors that changed but are not grafted, such as a head: refuse, keep the base's, or
    copy them whole into the graft."""
    batch_size: PositiveInt = 8
    eval_batch_size: PositiveInt = 64
    bins: PositiveInt = 10
    """Of the calibration error."""
    max_rows: PositiveInt = 2048
    """Rows of validation and of every test set, at most."""
    values: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type in which the graft's values are kept; it is judged as it is kept."""
    device: str = "cpu"
    lr: PositiveFloat | None = None
    """Short for mask.lr."""

    @field_validator("data", "valid", "test", mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return DataSpec.of(value) if isinstance(value, str) else value

    @field_validator("shifted", mode="before")
    @classmethod
    def _short_each(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: DataSpec.of(v) if isinstance(v, str) else v for k, v in value.items()}

    @model_validator(mode="after")
    def _consistent(self) -> LocalizeConfig:
        if self.labels:
            if self.template.count("{mask}") != 1 or "{text}" not in self.template:
                raise ValueError("template needs {text} and {mask}, each once")
            if isinstance(self.text, tuple) != ("{pair}" in self.template):
                raise ValueError("a template has {pair} when text names two columns, and only then")
            if len(self.labels) < 2:
                raise ValueError("labels needs a word for each of two classes or more")
        if "test" in self.shifted:
            raise ValueError("shifted: the name 'test' is taken; choose another")
        return self

    def learning(self) -> MaskConfig:
        """How the mask is learned, everything resolved."""
        if self.official:
            return MaskConfig.official(self.steps or 1, self.lr or 1e7, self.seed)
        changed: dict[str, Any] = {"steps": self.steps or 1, "seed": self.seed}
        if self.lr is not None:
            changed["lr"] = self.lr
        return self.mask.model_copy(update=changed)


def resolve(config: LocalizeConfig, folder: Path) -> LocalizeConfig:
    """Relative paths of models as seen from the configuration's folder."""
    changed = {}
    for key in ("base", "finetuned"):
        path = folder / getattr(config, key)
        if path.is_dir():
            changed[key] = str(path)
    return config.model_copy(update=changed)
