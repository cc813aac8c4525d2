"""Skill-It: the mixture follows a skill graph and the losses that are still high.

Chen et al., 2023, arXiv 2307.14430. With k training skills, m evaluation skills and a graph A
(`polytask.mixture.skills`), the share of training skill i is

    round 1      p[i] ~ exp(eta sum_j A[i, j])                         (every loss counts as 1)
    round t + 1  p[i] ~ exp(eta sum_{tau = t-w+1..t} sum_j A[i, j] L_j(f_tau))

where L_j(f_tau) is the loss of evaluation skill j on validation rows after round tau. The sum over
the window stands where multiplicative weights (Hedge) would multiply the previous shares: what lies
further back than w rounds is forgotten, so a skill whose loss has come down gets its share back to
the level of the others. A skill without any edge keeps exp(0) = 1 before normalising.

    continual pretraining    the same skills on both sides; window sum
    fine-tuning              `targets` names the columns that count; window mean
    out of domain            training and evaluation skills differ; window sum

`official=True` takes the losses as the authors' code does: at checkpoints, the first one after the
first step, so that the newest loss a decision sees is older than the end of the round; the losses
"before training" are those of the second checkpoint, and a prior also replaces the unit losses of
the first round. That code cannot combine `ignore_lone_nodes` with no prior (it fails) and spoils
the prior with one; here both work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from polytask.errors import ConfigError, PolytaskError, suggestion
from polytask.mixture.policies import Groups, MixtureConfig, Policy, ScoreHistory
from polytask.mixture.quota import Floats, Ints
from polytask.mixture.skillit_config import AUTO
from polytask.mixture.skills import SkillGraph


@dataclass(frozen=True)
class SkillIt:
    """The policy. `names` are the groups in the order of the history and of the weights; left out,
    they are the graph's training skills, then the evaluation skills that are not trained on.

    Groups that are no row of the graph get nothing (they are only judged); a group that is neither
    row nor column is an error, as is a window below 1 or a prior that is negative.
    """

    graph: SkillGraph
    eta: float = 0.5
    window: int = 3
    reduce: Literal["auto", "sum", "mean"] = "auto"
    targets: tuple[str, ...] = ()
    prior: Mapping[str, float] = field(default_factory=dict)
    normalize_loss: bool = False
    eta_schedule: bool = False
    dynamic_lambda: bool = False
    ignore_lone_nodes: bool = False
    official: bool = False
    loss_every: int = 0  # official: steps between evaluations; 0: one a round
    update_steps: int = 0  # official with dynamic_lambda: steps of a round
    names: tuple[str, ...] = ()
    unit: Literal["row", "step"] = field(default="row", init=False)
    every_step: bool = field(default=False, init=False)
    adaptive: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        whole = self.graph
        graph = whole.only(eval_names=self.targets) if self.targets else whole
        names = self.names or tuple(dict.fromkeys((*graph.train_names, *graph.eval_names)))
        object.__setattr__(self, "graph", graph)
        object.__setattr__(self, "names", names)
        _check_settings(self)
        self._check_names({*whole.train_names, *whole.eval_names})

    def _check_names(self, known: set[str]) -> None:
        for side in (self.graph.train_names, self.graph.eval_names):
            for name in side:
                if name not in self.names:
                    hint = suggestion(name, self.names)
                    raise ConfigError(f"the skill graph names '{name}', which is no task.{hint}")
        for name in self.names:
            if name not in known:
                raise ConfigError(
                    f"the skill graph has neither a row nor a column for '{name}': every task "
                    "needs a row (it is trained on) or a column (it is judged)"
                )
        for name, factor in self.prior.items():
            if name not in self.graph.train_names:
                hint = suggestion(name, self.graph.train_names)
                raise ConfigError(f"mixture.prior names '{name}'.{hint}")
            if not np.isfinite(factor) or factor < 0:
                raise ConfigError(f"mixture.prior.{name} = {factor}: should be a number >= 0")
        if not self._prior.any():
            raise ConfigError("mixture.prior is 0 for every skill: there is nothing to draw")

    @property
    def validates(self) -> bool:
        """Whether the weights need losses on validation rows."""
        return True

    @property
    def mean(self) -> bool:
        """Whether the window is averaged instead of summed."""
        return self.reduce == "mean" or (self.reduce == "auto" and bool(self.targets))

    @property
    def _rows(self) -> Ints:
        return np.array([self.names.index(n) for n in self.graph.train_names])

    @property
    def _columns(self) -> Ints:
        return np.array([self.names.index(n) for n in self.graph.eval_names])

    @property
    def _prior(self) -> Floats:
        return np.array([self.prior.get(n, 1.0) for n in self.graph.train_names])

    def weights(self, history: ScoreHistory) -> Floats:
        """The next round's shares (groups,), from the validation losses on record."""
        out = np.zeros(len(self.names))
        out[self._rows] = self._shares(history)
        return out

    def _shares(self, history: ScoreHistory) -> Floats:
        """(k,) shares of the training skills."""
        steps = np.array([step for step, _ in history.evaluations], dtype=np.int64)
        found = [self._losses(step, losses) for step, losses in history.evaluations]
        table = np.array(found).reshape(len(steps), len(self.graph.eval_names))
        counted = table if self.official else table[steps > 0]  # losses after a round
        if not len(counted):
            return self._normalised(self.graph.A @ self._first_losses() * self.eta)
        start = table[1 if self.official and len(table) > 1 else 0]
        window = counted[-self.window :]
        recent = window.mean(0) if self.mean else window.sum(0)  # (m,)
        if self.normalize_loss:
            recent = self._relative(recent, start)
        eta = self.eta
        if self.eta_schedule:
            eta *= self._slowdown(start, counted[-1])
        graph = self.graph
        if self.dynamic_lambda:
            graph = graph.halved_edges(self._rounds(steps))
        return self._normalised(graph.A @ recent * eta)

    def _first_losses(self) -> Floats:
        """Ones; the code takes the prior instead where both sides are the same skills."""
        if self.official and self.graph.square and not self.targets:
            return self._prior
        return np.ones(len(self.graph.eval_names))

    def _normalised(self, score: Floats) -> Floats:
        """prior * exp(score), as shares; lone skills keep 1/k where asked."""
        if not self.ignore_lone_nodes:
            return _softmax(score, self._prior)
        lone = self.graph.lone
        out = np.full(len(score), 1 / len(score))
        if not lone.all():
            joined = ~lone
            out[joined] = joined.mean() * _softmax(score[joined], self._prior[joined])
        return out

    def _rounds(self, steps: Ints) -> int:
        """Rounds finished when the next one is decided, (evaluations,) -> count."""
        if not self.official:
            return int((steps > 0).sum())
        return int(steps[-1]) // self.update_steps + 1

    def _losses(self, step: int, losses: Floats) -> Floats:
        """(m,) the evaluation skills' losses; `PolytaskError` naming one that is none."""
        chosen = losses[self._columns]
        for name, loss in zip(self.graph.eval_names, chosen):
            if not np.isfinite(loss) or loss < 0:
                what = "negative" if loss < 0 else "not a finite number"
                raise PolytaskError(
                    f"Skill-It: the validation loss of skill '{name}' at step {step} is {loss}: "
                    f"{what}. Shares are exponentials of losses, which should be >= 0"
                )
        return np.asarray(chosen)

    def _relative(self, losses: Floats, start: Floats) -> Floats:
        for name, first in zip(self.graph.eval_names, start):
            if first == 0:
                raise PolytaskError(
                    f"normalize_loss: the loss of skill '{name}' before training is 0, so there is "
                    "nothing to compare with; drop 'normalize_loss' or the skill"
                )
        return np.asarray(losses / start)

    def _slowdown(self, start: Floats, now: Floats) -> float:
        """Sum of the losses before training over their sum now."""
        if now.sum() == 0:
            return 1.0  # every skill is learned; the exponent is 0 whatever eta is
        return float(start.sum() / now.sum())


def _check_settings(policy: SkillIt) -> None:
    if policy.window < 1:
        raise ConfigError(f"mixture.window = {policy.window}: should be at least 1")
    if not np.isfinite(policy.eta) or policy.eta <= 0:
        raise ConfigError(f"mixture.eta = {policy.eta}: should be a number above 0")
    if policy.reduce not in ("auto", "sum", "mean"):
        hint = suggestion(policy.reduce, ("auto", "sum", "mean"))
        raise ConfigError(f"mixture.reduce = '{policy.reduce}'.{hint}")
    if policy.ignore_lone_nodes and not policy.graph.square:
        raise ConfigError(
            "ignore_lone_nodes needs a graph with the same skills on both sides, so it goes with "
            "neither 'targets' nor out-of-domain evaluation skills"
        )
    if policy.official and policy.dynamic_lambda and policy.update_steps < 1:
        raise ConfigError("official with dynamic_lambda needs update_steps, a round's length")


def _softmax(score: Floats, prior: Floats) -> Floats:
    """prior * exp(score) / sum, safe for scores of any size."""
    scale = np.where(prior > 0, score, -np.inf)
    raw = prior * np.exp(scale - scale.max())
    return np.asarray(raw / raw.sum())


@dataclass(frozen=True)
class Curriculum:
    """One group after the other: a new one joins (or takes over) every `phase_steps` steps.

    order: from first to last; empty: by the groups' validation losses before training, lowest
    first (the skill curriculum of Chen et al.; Bengio et al., 2009). The last phase has no end.
    Decisions fall on rounds, so `phase_steps` should be a multiple of a round.
    """

    names: tuple[str, ...]
    order: tuple[str, ...] = ()
    phase_steps: int = 200
    cumulative: bool = True
    unit: Literal["row", "step"] = field(default="row", init=False)
    every_step: bool = field(default=False, init=False)
    adaptive: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        for name in self.order:
            if name not in self.names:
                raise ConfigError(f"mixture.order names '{name}'.{suggestion(name, self.names)}")
        if self.order and sorted(self.order) != sorted(self.names):
            missing = [n for n in self.names if n not in self.order] or ["a task twice"]
            raise ConfigError(f"mixture.order needs every task once; look at {missing}")

    @property
    def validates(self) -> bool:
        return not self.order

    def weights(self, history: ScoreHistory) -> Floats:
        """(groups,) equal shares of the groups in play."""
        steps = max(history.step + 1, *(step for step, _ in history.evaluations), 0)
        phase = min(steps // self.phase_steps, len(self.names) - 1)
        ranked = self._ranked(history)
        playing = ranked[: phase + 1] if self.cumulative else ranked[phase : phase + 1]
        out = np.zeros(len(self.names))
        out[playing] = 1 / len(playing)
        return out

    def _ranked(self, history: ScoreHistory) -> Ints:
        if self.order:
            return np.array([self.names.index(n) for n in self.order])
        if not history.evaluations:
            raise PolytaskError("a curriculum by losses needs the validation losses first")
        _, losses = history.evaluations[0]
        return np.argsort(np.nan_to_num(losses, nan=np.inf), kind="stable")


class OnlineMixture:
    """A policy in a training loop of one's own: losses in, shares out.

    mixture = OnlineMixture(SkillIt(graph, eta=0.5, window=3))
    shares = mixture.shares                       # of round 1
    ...                                           # train a round, measure validation losses
    shares = mixture.update({"a": 0.7, ...}, step)
    """

    def __init__(self, policy: SkillIt | Curriculum) -> None:
        self.policy = policy
        self.history = ScoreHistory(len(policy.names))

    @property
    def shares(self) -> dict[str, float]:
        """The next round's share of every group, by name."""
        weights = self.policy.weights(self.history)
        return dict(zip(self.policy.names, map(float, weights)))

    def update(self, losses: Mapping[str, float], step: int) -> dict[str, float]:
        """Take in validation losses by name, after `step` steps (0: before training; steps
        increase); the next round's shares. Names may be left out where the policy does not look at
        them. Errors name the skill whose loss is missing, negative or not finite."""
        for name in losses:
            if name not in self.policy.names:
                hint = suggestion(name, self.policy.names)
                raise ConfigError(f"a loss is given for '{name}', which is no skill here.{hint}")
        values = [float(losses.get(name, np.nan)) for name in self.policy.names]
        self.history.evaluate(step, values)
        return self.shares


def graph_of(config: MixtureConfig, names: Sequence[str]) -> SkillGraph:
    """The graph that a configuration gives: inline, from a file, or every skill for itself."""
    if config.graph is None:
        return SkillGraph.identity(names)
    if isinstance(config.graph, Mapping):
        graph = SkillGraph.from_dict(config.graph, "mixture.graph", config.clip_graph)
    elif config.graph == AUTO:
        raise ConfigError(
            "mixture.graph 'auto' is learned by `polytask train` before training; here, give a "
            "graph, or learn one with polytask.mixture.learn_graph"
        )
    else:
        graph = SkillGraph.load(config.graph, config.clip_graph)
    graph.warn_if_flat()
    return graph


def skillit_policy(
    config: MixtureConfig, groups: Groups, graph: SkillGraph | None = None
) -> Policy:
    """Skill-It as `mixture:` says, for these groups."""
    chosen = graph_of(config, groups.names) if graph is None else graph
    return SkillIt(
        chosen,
        config.eta,
        config.window,
        config.reduce,
        config.targets,
        dict(config.prior),
        config.normalize_loss,
        config.eta_schedule,
        config.dynamic_lambda,
        config.ignore_lone_nodes,
        config.official,
        config.loss_every or 0,
        config.update_steps or 0,
        groups.names,
    )
