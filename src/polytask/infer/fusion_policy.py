"""What to do with several models' logits at a step: a policy, as the decoding loop calls it.

`FusionPolicy` is dynamic logit fusion with its options; `Alone` is plain decoding with the first
model. A policy sees (B, V) logits of every source and its own state of the rows that still run,
and gives the logits to choose the next token from, with what it has to say about the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from pydantic import Field, field_validator
from torch import Tensor

from polytask.configs import Config
from polytask.errors import ConfigError
from polytask.infer.fusion import GRID, Fused, Mode, Pairing, Refine, checked_grid, fuse_step

Search = Literal["step", "prompt", "running_minimum"]
State = dict[str, Tensor]  # (B, ...) each; the loop takes the rows that go on


class Choice(NamedTuple):
    """Logits (B, V) to choose from, what is told of the step (B, ...), and the next state."""

    logits: Tensor
    told: dict[str, Tensor]
    state: State


class Policy(Protocol):
    """How sources are combined.

    sources    how many it wants; None: any number
    stateless  every step is by itself, so that the steps of a known text may be taken at once
    """

    sources: int | None
    stateless: bool

    def __call__(self, logits: Sequence[Tensor], state: State) -> Choice: ...


class Alone:
    """The first source's logits as they are."""

    sources: int | None = None
    stateless: bool = True

    def __call__(self, logits: Sequence[Tensor], state: State) -> Choice:
        return Choice(logits[0], {}, state)


class FusionConfig(Config):
    """Options of dynamic logit fusion (see `polytask.infer.fusion.fuse_step`)."""

    mode: Mode = "single"
    grid: tuple[float, ...] = GRID
    alpha: tuple[float, ...] = Field((), description="static: one strength, or one per expert")
    bounds: tuple[tuple[float, float], ...] | None = None
    refine: Refine = "none"
    pairing: Pairing = Field("matched", description="swapped: one appendix line of the paper")
    search: Search = Field(
        "step",
        description="step: anew for each token, as the paper's text says. running_minimum: its "
        "printed pseudocode to the letter, where the smallest loss so far is never reset, so that "
        "alpha freezes after the best early step. prompt: once, at the first token",
    )

    @field_validator("grid")
    @classmethod
    def _searchable(cls, grid: tuple[float, ...]) -> tuple[float, ...]:
        return checked_grid(grid)


class FusionPolicy:
    """Sources in the order large, base, expert 1, ..., expert T."""

    def __init__(self, config: FusionConfig, experts: int) -> None:
        if experts < 1:
            raise ConfigError("fusion needs at least one expert")
        if config.mode == "static" and len(config.alpha) not in (1, experts):
            raise ConfigError(
                f"mode 'static' needs alpha: one strength, or one for each of {experts} experts"
            )
        self.config = config
        self.experts = experts
        self.sources: int | None = experts + 2
        self.stateless: bool = config.search == "step"

    def __call__(self, logits: Sequence[Tensor], state: State) -> Choice:
        """Fuse a step; tells alpha (B, T), loss (B,), divergence (B, 2), target (B, T, 2)."""
        large, base, *experts = (x.to(logits[0].device) for x in logits)
        found, state = self._fused(large, base, torch.stack(experts), state)
        told = found._asdict()
        del told["logits"]
        return Choice(found.logits, told, state)

    def _fused(
        self, large: Tensor, base: Tensor, experts: Tensor, state: State
    ) -> tuple[Fused, State]:
        config = self.config
        if config.search == "prompt" and "alpha" in state:
            return self._at(large, base, experts, state["alpha"]), state
        found = fuse_step(
            large,
            base,
            experts,
            config.grid,
            config.mode,
            bounds=config.bounds,
            refine=config.refine,
            alpha=config.alpha[0] if len(config.alpha) == 1 else config.alpha or None,
            pairing=config.pairing,
        )
        if config.search == "step":
            return found, state
        if config.search == "running_minimum" and "least" in state:
            better = found.loss < state["least"]
            alpha = torch.where(better[:, None], found.alpha, state["alpha"])
            least = torch.where(better, found.loss, state["least"])
            return self._at(large, base, experts, alpha), {"alpha": alpha, "least": least}
        return found, {"alpha": found.alpha, "least": found.loss}

    def _at(self, large: Tensor, base: Tensor, experts: Tensor, alpha: Tensor) -> Fused:
        pairing = self.config.pairing
        return fuse_step(large, base, experts, mode="static", alpha=alpha, pairing=pairing)
