"""What a user can set about training: typed, with defaults that work on a small machine.

`TrainConfig` holds for the whole run; a `StageConfig` is one leg of it (which tasks, which
parameters, how long) and inherits what it leaves out.
"""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from polytask.configs import Config
from polytask.errors import ConfigError
from polytask.train.flat_config import SharpnessConfig

Schedule = Literal["constant", "linear", "cosine", "wsd"]

# What may change between a run and its continuation without changing a single parameter update.
HARMLESS = frozenset(
    {
        "checkpoint_every",
        "keep",
        "trackers",
        "progress",
        "max_skipped",
        "conflict_every",
        "prefetch",
    }
)


class EarlyStopping(Config):
    """Stop when a metric has not improved for `patience` evaluations; the best weights are kept.

    Without `task` the mean of `metric` over the tasks that report it counts.
    """

    metric: str
    task: str | None = None
    patience: PositiveInt = 5
    margin: NonNegativeFloat = 0.0
    higher_is_better: bool = True


class StageConfig(Config):
    """One leg of training. Patterns are `fnmatch` patterns over parameter names."""

    name: str = "main"
    steps: PositiveInt
    tasks: tuple[str, ...] = ()  # empty: every task
    train: tuple[str, ...] = ("*",)  # parameters that train ...
    freeze: tuple[str, ...] = ()  # ... except these
    lr: PositiveFloat | None = None
    schedule: Schedule | None = None
    warmup: float | int | None = None


class TrainConfig(Config):
    """How one model is trained; `stages` replace `steps` or `epochs` where there are several legs.

    `batch_size` counts rows per update, over all processes and accumulated micro-batches.
    """

    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None  # passes over all rows of all groups together
    stages: tuple[StageConfig, ...] = ()
    trains: tuple[str, ...] = ("*",)  # patterns of what trains, where there are no stages
    batch_size: PositiveInt = 32
    accumulate: PositiveInt = 1  # micro-batches per update
    seed: int = 0
    device: str = "auto"  # 'auto' takes the accelerator there is, 'cpu' keeps off it
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False

    lr: PositiveFloat = 1e-3
    lrs: dict[str, PositiveFloat] = Field(default_factory=dict)  # pattern -> learning rate
    schedule: Schedule = "cosine"
    warmup: float | int = 0.05  # a share of the stage below 1, a number of steps from 1 on
    decay: float = Field(default=0.2, gt=0, le=1)  # 'wsd': share of the stage that decays
    floor: float = Field(default=0.0, ge=0, le=1)  # final learning rate as a share of the peak
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    no_decay: tuple[str, ...] = ()  # patterns, besides norms and biases
    clip: NonNegativeFloat = 1.0  # largest gradient norm; 0 does not clip
    ema: float = Field(default=0.0, ge=0, lt=1)  # decay of the averaged weights; 0: none

    balance: Literal["rows", "tasks"] = "rows"  # every pair counts the same, or every task does
    weighting: Literal["equal", "uncertainty", "dynamic"] = "equal"
    weighting_every: PositiveInt = 50  # 'dynamic': steps per round of mean losses
    temperature: PositiveFloat = 2.0  # 'dynamic': softness of its weights
    task_weights: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    aggregator: str | None = None  # None: the sum of the losses is differentiated once
    aggregator_options: dict[str, float] = Field(default_factory=dict)
    aggregate_every: PositiveInt = 1  # in between, the last weights are used: one backward pass
    sharpness: SharpnessConfig | None = None  # seek flat regions; needs an aggregator
    shared: tuple[str, ...] = ()  # patterns of what is aggregated; empty: the model says
    chunk: PositiveInt | None = 1  # tasks differentiated at once; None: all (faster, more memory)
    conflict_every: NonNegativeInt = 0  # steps between logs of gradient cosines; 0: never

    log_every: PositiveInt = 10
    evaluate_every: NonNegativeInt = 0  # 0: only at the end
    early_stopping: EarlyStopping | None = None
    checkpoint_every: NonNegativeInt = 200  # 0: only at the end
    keep: PositiveInt = 2
    max_skipped: NonNegativeInt = 0  # steps with a non-finite loss or gradient to skip, then stop
    trackers: tuple[str, ...] = ()  # besides metrics.jsonl: tensorboard, trackio, wandb
    progress: bool = True
    prefetch: NonNegativeInt = 0  # batches encoded ahead in a thread

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        given = [n for n in ("steps", "epochs", "stages") if getattr(self, n)]
        if len(given) != 1:
            found = " and ".join(given) if given else "none"
            raise ValueError(f"give exactly one of 'steps', 'epochs', 'stages' (given: {found})")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"'batch_size' = {self.batch_size} is not a multiple of "
                f"'accumulate' = {self.accumulate}"
            )
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"two stages share a name: {', '.join(names)}")
        if self.aggregator is not None and self.weighting == "uncertainty":
            raise ValueError("'weighting: uncertainty' needs one loss; it excludes an aggregator")
        if self.sharpness is not None and (self.aggregator is None or self.aggregate_every > 1):
            raise ValueError("'sharpness' needs an 'aggregator' that runs in every step")
        if self.aggregator is None and self.aggregate_every > 1:
            raise ValueError("'aggregate_every' needs an 'aggregator'")
        return self

    @property
    def micro_batch(self) -> int:
        """Rows per micro-batch, over all processes."""
        return self.batch_size // self.accumulate

    def plan(self, rows_per_epoch: int | None = None) -> tuple[StageConfig, ...]:
        """The stages with their number of steps; `epochs` needs the number of rows."""
        if self.stages:
            return self.stages
        if self.steps is not None:
            return (StageConfig(steps=self.steps, train=self.trains),)
        if rows_per_epoch is None:
            raise ConfigError(
                "'epochs' needs data whose length is known; give 'steps' for a stream"
            )
        assert self.epochs is not None  # the validator's promise
        steps = max(1, round(self.epochs * rows_per_epoch / self.batch_size))
        return (StageConfig(steps=steps, train=self.trains),)
