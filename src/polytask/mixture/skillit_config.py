"""The part of `mixture:` that policies over skills read: Skill-It and curricula."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from polytask.configs import Config

AUTO = "auto"


class SkillOptions(Config):
    """Options of `policy: skillit` and `policy: curriculum` (polytask.mixture.skillit)."""

    graph: str | dict[str, Any] | None = None
    """skillit: a JSON file, the graph itself {train: names, eval: names, A: rows}, or auto: learned
    before training. None: every skill helps itself alone."""
    graph_steps: int = Field(default=200, gt=0)
    """auto: steps of each run that the graph is learned from."""
    graph_mode: Literal["single", "pairwise"] = "single"
    """auto: a run per skill, or a run per skill and pair of skills."""
    eval_only: tuple[str, ...] = ()
    """auto: tasks that are judged and not trained on (out of domain)."""
    clip_graph: bool = False
    """Set negative entries of the graph to zero."""
    eta: float = Field(default=0.5, gt=0)
    """skillit: how strongly the mixture follows the losses."""
    window: int = Field(default=3, ge=1)
    """skillit: evaluations whose losses count."""
    reduce: Literal["auto", "sum", "mean"] = "auto"
    """skillit: over the window; auto: the mean where there are targets, the sum otherwise."""
    targets: tuple[str, ...] = ()
    """skillit: evaluation skills that matter (fine-tuning); empty: all of the graph."""
    prior: dict[str, float] = Field(default_factory=dict)
    """skillit: factors on the mixture by training skill; 1 where left out."""
    normalize_loss: bool = False
    """skillit: losses count relative to those before training."""
    eta_schedule: bool = False
    """skillit: eta grows as the sum of the losses falls."""
    dynamic_lambda: bool = False
    """skillit: positive edges between different skills are halved after every round."""
    ignore_lone_nodes: bool = False
    """skillit: skills without edges keep the share 1/k."""
    official: bool = False
    """skillit: losses as in the authors' code, every `loss_every` steps and none at a round's
    end."""
    loss_every: int | None = Field(default=None, gt=0)
    """official: steps between evaluations; a round's length when left out."""
    update_steps: int | None = Field(default=None, gt=0)
    """Steps between two decisions of an adaptive policy, instead of round_rows."""
    order: tuple[str, ...] = ()
    """curriculum: tasks from first to last; empty: by their loss before training, lowest first."""
    phase_steps: int = Field(default=200, gt=0)
    """curriculum: steps until the next task joins (or takes over)."""
    cumulative: bool = True
    """curriculum: earlier tasks stay in the mixture."""

    @model_validator(mode="after")
    def _fit(self) -> SkillOptions:
        if self.loss_every is not None and not self.official:
            raise ValueError(
                "'loss_every' belongs to 'official: true'; otherwise losses are measured at the "
                "end of every round"
            )
        twice = [n for i, n in enumerate(self.targets) if n in self.targets[:i]]
        if twice:
            raise ValueError(f"'targets' names '{twice[0]}' twice")
        return self
