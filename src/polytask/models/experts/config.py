"""What a user can set about experts (`model: {experts: ...}`)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from polytask.configs import Config

RouterKind = Literal["multi_gate", "conditioned", "blind"]
Gate = Literal["raw", "renormalised"]
Start = Literal["experts", "width", "zero"]


class ExpertsConfig(Config):
    """Sparse experts in place of the feed-forward of every `every`-th block.

    The defaults are M3ViT's (arXiv 2210.14793), with `k * mult` equal to a dense ratio of 4: as
    many operations per token as the dense block has.
    """

    count: int = Field(8, gt=0, description="experts per layer, N")
    k: int = Field(2, gt=0, description="experts that each token runs through, K")
    mult: float = Field(2.0, gt=0, description="width of an expert / width of the model")
    every: int = Field(2, gt=0, description="blocks every-1, 2*every-1, ... have experts")
    router: RouterKind = Field(
        "multi_gate",
        description="a gate per task; one gate that also sees a task embedding; one gate that does "
        "not know the task",
    )
    task_dim: int = Field(64, gt=0, description="width of the task embedding (conditioned)")
    gate: Gate = Field(
        "raw", description="weights: top probabilities as they are, or divided by their sum"
    )
    noise: float = Field(
        1.0, ge=0, description="deviation of the logits' noise in training is noise / count"
    )
    start: Start = Field(
        "experts",
        description="bound of the gate's first values: 1/sqrt(count) (the authors' code), "
        "1/sqrt(width), or all zero",
    )
    capacity: float | None = Field(
        None, gt=0, description="an expert takes capacity * tokens * k / count at most; None: all"
    )
    min_gate: float = Field(
        0.0, ge=0, lt=1, description="in evaluation, experts with at most this weight are not run"
    )
    per_task: int | None = Field(
        None, gt=0, description="experts a task may use, in evenly spaced ranges; None: all"
    )
    gated: bool = Field(False, description="experts are SiLU-gated instead of GELU")
    bias: bool = True
    balance: float = Field(0.01, ge=0, description="weight of CV^2(importance) + CV^2(load)")
    published_load: bool = Field(
        False,
        description="load as in the authors' code, which compares logits with probabilities",
    )
    kept: tuple[tuple[int, ...], ...] | None = Field(
        None, description="per layer with experts, those that an export has; None: all"
    )

    span: tuple[int, int] | None = Field(
        None, description="first and last + 1 of the experts of an exported task with a range"
    )

    @model_validator(mode="after")
    def _fits(self) -> ExpertsConfig:
        if self.k > self.count:
            raise ValueError(f"k = {self.k} experts per token, and there are only {self.count}")
        if self.per_task is not None and not self.k <= self.per_task <= self.count:
            raise ValueError(
                f"per_task = {self.per_task} is not between k = {self.k} and count = {self.count}"
            )
        for layer, ids in enumerate(self.kept or ()):
            if len(set(ids)) < self.k or not all(0 <= i < self.count for i in ids):
                raise ValueError(
                    f"kept: layer number {layer} needs at least k = {self.k} different experts "
                    f"below {self.count}, not {list(ids)}"
                )
        return self

    def layers(self, blocks: int) -> tuple[int, ...]:
        """The blocks that have experts, counted from 0; `ValueError` where there is none."""
        found = tuple(range(self.every - 1, blocks, self.every))
        if not found:
            raise ValueError(f"every = {self.every}, and there are {blocks} blocks: none is sparse")
        if self.kept is not None and len(self.kept) != len(found):
            raise ValueError(f"kept has {len(self.kept)} entries for {len(found)} layers")
        return found

    def width(self, dim: int) -> int:
        """Hidden width of an expert."""
        return max(1, round(self.mult * dim))
