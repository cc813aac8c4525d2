"""How often each group is drawn: policies, chosen by name, and the scores that adaptive ones read.

A policy gives weights over groups. A fixed one is asked once; an adaptive one once a round, with
the losses seen so far. `unit` says what its weights count: rows, or whole steps (one group a step).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field, field_validator

from polytask.errors import ConfigError, PolytaskError, suggestion
from polytask.mixture.quota import Floats, Ints
from polytask.mixture.skillit_config import SkillOptions
from polytask.registry import Registry

STOPS = ("first_exhausted", "all_exhausted")
Stop = str | dict[str, float] | None


class MixtureConfig(SkillOptions):
    """The `mixture:` section of a configuration."""

    policy: str = "temperature"
    """uniform (or stratified), proportional, temperature, fixed, one_task_per_step,
    all_tasks_per_step, hardest, skillit, curriculum."""
    alpha: float = Field(default=0.5, ge=0, le=2)
    """Weights are size^alpha (temperature, one_task_per_step): 0 is uniform, 1 proportional."""
    cap: int | None = Field(default=None, gt=0)
    """Sizes above this count as this (proportional, temperature, one_task_per_step)."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Relative weight per group (fixed; one_task_per_step takes them instead of sizes)."""
    sizes: dict[str, int] = Field(default_factory=dict)
    """Rows to assume for streams, which do not know their length."""
    stop: Stop = None
    """first_exhausted, all_exhausted, or epochs by group, whose weight then goes to the others."""
    shuffle: bool = True
    """Shuffle the rows of every group anew each epoch (streams are always read in order)."""
    round_rows: int = Field(default=2048, gt=0)
    """Rows between two decisions of an adaptive policy (rounded up to whole steps)."""
    smoothing: float = Field(default=0.9, ge=0, lt=1)
    """Weight of the past in the smoothed losses that an adaptive policy reads."""
    sharpness: float = Field(default=1.0, ge=0)
    """hardest: weights are (smoothed loss / first loss)^sharpness."""
    floor: float = Field(default=0.1, ge=0, le=1)
    """hardest: share of the mixture that stays uniform, so that no group is given up."""

    @field_validator("policy")
    @classmethod
    def _policy(cls, value: str) -> str:
        if value not in POLICIES:
            raise ValueError(f"there is no such policy.{suggestion(value, POLICIES.names())}")
        return value

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: Stop) -> Stop:
        if isinstance(value, str) and value not in STOPS:
            raise ValueError(f"no such rule.{suggestion(value, STOPS)} Or give epochs per group.")
        return value


@dataclass(frozen=True)
class Groups:
    """What a policy knows of the row groups: names, and rows (None: a stream of unknown length)."""

    names: tuple[str, ...]
    sizes: tuple[int | None, ...]

    def known_sizes(self, policy: str) -> Ints:
        """The sizes (groups,); `ConfigError` naming the first stream without one."""
        for name, size in zip(self.names, self.sizes):
            if size is None:
                raise ConfigError(
                    f"mixture.policy '{policy}' weighs groups by size, and '{name}' is a stream of "
                    f"unknown length. State it in mixture.sizes, or choose 'uniform' or 'fixed'."
                )
        return np.array(self.sizes, dtype=np.int64)


@dataclass
class ScoreHistory:
    """Smoothed losses per group, NaN until a group has been seen.

    `smoothed` is an exponential mean without start-up bias: the weights of the values it averages
    always add up to one. `evaluations` are losses on validation rows, for policies that go by them:
    (updates made, losses (groups,)), the first before training.
    """

    groups: int
    smoothing: float = 0.9
    step: int = -1  # the latest observed
    first: Floats = field(init=False)  # (groups,) mean over the first values seen, see `observe`
    smoothed: Floats = field(init=False)  # (groups,)
    seen: Floats = field(init=False)  # (groups,) total weight of the values in `smoothed`, < 1
    evaluations: list[tuple[int, Floats]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.first = np.full(self.groups, np.nan)
        self.smoothed = np.full(self.groups, np.nan)
        self.seen = np.zeros(self.groups)

    def observe(self, step: int, losses: Sequence[float] | Floats) -> None:
        """Take in the mean losses up to update `step`, (groups,); NaN for groups not seen.

        Steps increase, so that a resumed run has the history of an unbroken one.
        """
        values = np.asarray(losses, dtype=np.float64)
        if values.shape != (self.groups,):
            raise ValueError(f"losses have shape {values.shape}, expected ({self.groups},)")
        if step <= self.step:
            raise PolytaskError(f"losses of step {step} came after those of step {self.step}")
        if np.isinf(values).any():
            raise ValueError(f"the losses of step {step} are not finite")
        self.step = step
        there = ~np.isnan(values)
        fresh = there & np.isnan(self.first)
        self.first[fresh] = values[fresh]
        total = self.smoothing * self.seen + (1 - self.smoothing)
        past = np.where(np.isnan(self.smoothed), 0.0, self.smoothed) * self.smoothing * self.seen
        self.smoothed[there] = ((past + (1 - self.smoothing) * values) / total)[there]
        self.seen[there] = total[there]

    def evaluate(self, step: int, losses: Sequence[float] | Floats) -> None:
        """Take in losses on validation rows after `step` updates, (groups,); NaN: not measured."""
        values = np.array(losses, dtype=np.float64)
        if values.shape != (self.groups,):
            raise ValueError(f"losses have shape {values.shape}, expected ({self.groups},)")
        if self.evaluations and step <= self.evaluations[-1][0]:
            raise PolytaskError(
                f"validation losses of step {step} came after those of step "
                f"{self.evaluations[-1][0]}"
            )
        self.evaluations.append((step, values))

    def state(self) -> dict[str, Any]:
        """Plain JSON; NaN is written as null."""

        def plain(values: Floats) -> list[float | None]:
            return [None if np.isnan(v) else float(v) for v in values]

        return {
            "step": self.step,
            "first": plain(self.first),
            "smoothed": plain(self.smoothed),
            "seen": plain(self.seen),
            "evaluations": [[step, plain(losses)] for step, losses in self.evaluations],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned."""
        self.step = int(state["step"])
        for name in ("first", "smoothed", "seen"):
            values = [np.nan if v is None else float(v) for v in state[name]]
            if len(values) != self.groups:
                raise ValueError(
                    f"the score history is for {len(values)} groups, not {self.groups}"
                )
            setattr(self, name, np.array(values))
        self.evaluations = [
            (int(step), np.array([np.nan if v is None else float(v) for v in losses]))
            for step, losses in state.get("evaluations", [])
        ]


class Policy(Protocol):
    """What is drawn next. `weights` are >= 0 and sum to 1, one per group."""

    @property
    def adaptive(self) -> bool:
        """Whether the weights follow the losses (then they are asked for once a round)."""

    @property
    def unit(self) -> Literal["row", "step"]:
        """Whether the weights count rows, or steps that belong to one group each."""

    @property
    def every_step(self) -> bool:
        """Whether every group has to be in every step."""

    @property
    def validates(self) -> bool:
        """Whether the weights need losses on validation rows (`ScoreHistory.evaluations`)."""

    def weights(self, history: ScoreHistory) -> Floats: ...


@dataclass(frozen=True)
class FixedPolicy:
    """The same weights throughout; given in any scale."""

    shares: tuple[float, ...]
    unit: Literal["row", "step"] = "row"
    every_step: bool = False
    adaptive: bool = field(default=False, init=False)

    @property
    def validates(self) -> bool:
        return False

    def weights(self, history: ScoreHistory) -> Floats:
        shares = np.array(self.shares, dtype=np.float64)
        return np.asarray(shares / shares.sum())


@dataclass(frozen=True)
class HardestPolicy:
    """More of what is learned least: weight ~ (smoothed loss / first loss)^sharpness.

    The ratio to a group's own first loss makes losses of different kinds comparable (the inverse
    training rate of GradNorm, Chen et al., 2018). Groups not yet seen count as unlearned (ratio 1).
    A `floor` share of the mixture stays uniform.
    """

    groups: int
    sharpness: float = 1.0
    floor: float = 0.1
    unit: Literal["row", "step"] = "row"
    every_step: bool = False
    adaptive: bool = field(default=True, init=False)

    @property
    def validates(self) -> bool:
        return False

    def weights(self, history: ScoreHistory) -> Floats:
        first = np.where(history.first > 0, history.first, np.nan)
        ratio = np.nan_to_num(history.smoothed / first, nan=1.0)
        raw = np.maximum(ratio, 1e-12) ** self.sharpness
        return np.asarray(self.floor / self.groups + (1 - self.floor) * raw / raw.sum())


PolicyFactory = Callable[[MixtureConfig, Groups], Policy]
POLICIES: Registry[PolicyFactory] = Registry("mixture policy")


@POLICIES.register("uniform")
def uniform(config: MixtureConfig, groups: Groups) -> Policy:
    """The same share for every group."""
    return FixedPolicy((1.0,) * len(groups.names))


@POLICIES.register("stratified")
def stratified(config: MixtureConfig, groups: Groups) -> Policy:
    """`uniform` under the name that work on skills gives it."""
    return uniform(config, groups)


@POLICIES.register("proportional")
def proportional(config: MixtureConfig, groups: Groups) -> Policy:
    """Shares as the sizes: every row equally often."""
    return _by_size("proportional", groups, 1.0, config.cap)


@POLICIES.register("temperature")
def temperature(config: MixtureConfig, groups: Groups) -> Policy:
    """min(size, cap)^alpha: between uniform and proportional (Raffel et al., 2020, T = 1/alpha)."""
    return _by_size("temperature", groups, config.alpha, config.cap)


@POLICIES.register("fixed")
def fixed(config: MixtureConfig, groups: Groups) -> Policy:
    """The weights given by name; each group needs one."""
    return FixedPolicy(_given(config.weights, groups))


@POLICIES.register("one_task_per_step")
def one_task_per_step(config: MixtureConfig, groups: Groups) -> Policy:
    """All rows of a step from one group; `weights` or size^alpha count steps."""
    if config.weights:
        return FixedPolicy(_given(config.weights, groups), unit="step")
    return _by_size("one_task_per_step", groups, config.alpha, config.cap, unit="step")


@POLICIES.register("all_tasks_per_step")
def all_tasks_per_step(config: MixtureConfig, groups: Groups) -> Policy:
    """Rows of every group in every step, as evenly as possible."""
    return FixedPolicy((1.0,) * len(groups.names), every_step=True)


@POLICIES.register("hardest")
def hardest(config: MixtureConfig, groups: Groups) -> Policy:
    """More rows for groups whose loss has come down least."""
    return HardestPolicy(len(groups.names), config.sharpness, config.floor)


@POLICIES.register("skillit")
def skillit(config: MixtureConfig, groups: Groups) -> Policy:
    """What a skill graph says helps where validation losses are still high."""
    from polytask.mixture.skillit import skillit_policy

    return skillit_policy(config, groups)


@POLICIES.register("curriculum")
def curriculum(config: MixtureConfig, groups: Groups) -> Policy:
    """One group after the other joins, in a given order or by the losses before training."""
    from polytask.mixture.skillit import Curriculum

    return Curriculum(groups.names, config.order, config.phase_steps, config.cumulative)


def _by_size(
    policy: str,
    groups: Groups,
    alpha: float,
    cap: int | None,
    unit: Literal["row", "step"] = "row",
) -> Policy:
    if alpha == 0:
        return FixedPolicy((1.0,) * len(groups.names), unit)
    sizes = np.minimum(groups.known_sizes(policy), cap or np.iinfo(np.int64).max)
    return FixedPolicy(tuple((sizes.astype(np.float64) ** alpha).tolist()), unit)


def _given(weights: Mapping[str, float], groups: Groups) -> tuple[float, ...]:
    for name, weight in weights.items():
        if name not in groups.names:
            raise ConfigError(f"mixture.weights names '{name}'.{suggestion(name, groups.names)}")
        if not np.isfinite(weight) or weight < 0:
            raise ConfigError(f"mixture.weights.{name} = {weight}: should be a number >= 0")
    missing = [name for name in groups.names if name not in weights]
    if missing:
        raise ConfigError(
            f"mixture.weights has no weight for {', '.join(map(repr, missing))}; give 0 to leave a "
            "group out"
        )
    if not any(weights.values()):
        raise ConfigError("mixture.weights are all 0: there is nothing to draw")
    return tuple(float(weights[name]) for name in groups.names)
