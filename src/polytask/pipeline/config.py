"""`RunConfig`: everything about a run in one typed record, from YAML, JSON or Python."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from polytask.adapt.config import AdaptConfig
from polytask.configs import Config, load_yaml, parse
from polytask.errors import ConfigError
from polytask.mixture.policies import MixtureConfig
from polytask.models.specs import ModelConfig
from polytask.tasks.config import TaskConfig
from polytask.tasks.encode import ProcessorConfig
from polytask.tasks.leaks import LeakConfig
from polytask.train.config import TrainConfig


class EvaluateConfig(Config):
    """How a run is judged after training."""

    batch_size: PositiveInt = 256
    single_task: bool = True
    """Also train one model per task on the rows that task had, and compare."""
    transfer_steps: NonNegativeInt = 0
    """Steps for each task and each pair of tasks, to tabulate who helps whom; 0: no table."""
    resamples: PositiveInt = 2000
    """Bootstrap resamples of the test rows, for the intervals of differences."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    max_valid: NonNegativeInt = 512
    """Rows per task that are scored during training (all are scored at the end)."""


class RunConfig(Config):
    """One run. Only `tasks` is needed; every other section has defaults that work."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0)
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    mixture: MixtureConfig = MixtureConfig()
    encoding: ProcessorConfig = ProcessorConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig(steps=1000)
    evaluate: EvaluateConfig = EvaluateConfig()
    adapt: AdaptConfig | None = None
    """Train adapters on a pretrained model (`model.hub`) or on a finished run (`adapt.from`)."""
    leaks: LeakConfig | None = LeakConfig()
    """How rows that stand in two splits are looked for; null switches the search off."""

    @field_validator("tasks", mode="before")
    @classmethod
    def _short_form(cls, tasks: Any) -> Any:
        """`reviews: reviews.csv` is short for `reviews: {data: reviews.csv}`."""
        if not isinstance(tasks, Mapping):
            return tasks
        return {n: {"data": t} if isinstance(t, str) else t for n, t in tasks.items()}

    def resolved(self) -> dict[str, Any]:
        """Plain JSON values of every section, as a run folder keeps them."""
        found = dict(self.model_dump(mode="json", by_alias=True, exclude_unset=False))
        if self.adapt is None:
            del found["adapt"]
        else:  # what a method does not read must not come back as if it had been set
            found["adapt"] = self.adapt.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return found


# Sections whose own `seed` follows the run's unless it is given.
_SEEDED = ("train", "model", "encoding")


def parse_config(data: Mapping[str, Any], where: str = "the configuration") -> RunConfig:
    """Validate plain values; every fault is named at once, with the nearest valid key."""
    filled = dict(data)
    seed = filled.get("seed", 0)
    for section in _SEEDED:
        if section in filled and not isinstance(filled[section], Mapping):
            continue  # the parser below says what is wrong with it
        default = {"steps": 1000} if section == "train" and section not in filled else {}
        filled[section] = {"seed": seed, **default, **filled.get(section, {})}
    return parse(RunConfig, filled, where)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file. `overrides` are 'section.key=value' with YAML values, as from --set."""
    path = Path(path)
    data = load_yaml(path)
    for text in overrides:
        override(data, text)
    data.setdefault("name", path.stem)
    return parse_config(data, str(path))


def override(data: dict[str, Any], text: str) -> None:
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes KEY=VALUE, for instance train.steps=100 (given: '{text}')")
    *path, last = key.split(".")
    here = data
    for part in path:
        here = here.setdefault(part, {})
        if not isinstance(here, dict):
            raise ConfigError(f"--set {text}: '{part}' is a value, it has no keys below it")
    try:
        here[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML") from error


def read_resolved(folder: Path) -> RunConfig:
    """The configuration that a run folder was trained with."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no config.json")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return parse(RunConfig, data["config"], str(path))
