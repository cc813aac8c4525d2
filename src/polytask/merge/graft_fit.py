"""Learning the mask of a graft: plain gradient descent on S, by hand.

    theta = theta_pre + gamma(S) delta                         # not rounded
    g     = mean over batches of dL/dtheta * delta             # = dL/dgamma
    S    <- S - lr (1 - 2 gamma_b) g sigmoid'(S - b)           # = S - lr dL/dS
    judge the rounded mask on validation rows, keep the best

Panigrahi et al. 2023 (arXiv 2302.06600) and the authors' code. sigmoid'(-10) is 4.5e-5,
so an lr of 1e-3, or Adam, moves nothing and hands back the base patch; the authors use 1e7. What lr
is right depends on the size of g, so that by default it is chosen from the first gradient: as many
coordinates as the base patch has then move by `step_size` or more. From there sigmoid' grows with S
up to 0.25: without a cap a coordinate that comes close to b jumps by thousands in one step,
saturates and never moves again.

Learning adds more bits than it removes. The paper bounds |gamma|_0 by s, its code enforces nothing;
here, with `limit`, bits beyond s are switched off again after the step, those of least gamma first,
so that the next gradient is taken where the rounded mask is. A base patch of s coordinates leaves
no room to add: give `Graft.between` a smaller `patch`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call

from polytask import files, rng
from polytask.configs import Config
from polytask.errors import CheckpointError, MergeError, NonFiniteError, suggestion
from polytask.merge.graft import BIAS, Graft
from polytask.merge.vectors import StateDict

Loss = Callable[[Any, Any], Tensor]  # (model, batch) -> mean loss, a scalar
Score = Callable[[Any], float]  # model -> what should be high, on validation rows
Batches = Callable[[int], Iterable[Any]] | Iterable[Any]  # all batches, or those of a step


class MaskConfig(Config):
    """How a mask is learned.

    `MaskConfig.official()` is the published trainer: S from U(0, 1), lr 1e7, no cap, no limit on
    the bits, the start not judged. Its score is training plus validation accuracy:
    pass such a `score`. (Reloading a mask it saved is left out: that path of the code rounds
    sigmoid(S - b) without the base patch.)
    """

    steps: PositiveInt = 20
    lr: PositiveFloat | None = None  # None: from the first gradient and step_size
    step_size: PositiveFloat = 1.0  # in S; the first steps should be of order 1 to 10
    cap: PositiveFloat | None = BIAS  # most that a coordinate of S moves in one step
    accumulate: PositiveInt = 128  # batches in a step, at most
    limit: bool = True  # never more bits than were asked for (|gamma|_0 <= s)
    judge_start: bool = True  # the coordinates that moved most are a candidate too
    uniform_start: bool = False  # S from U(0, 1) instead of 0
    seed: int = Field(0, ge=0)

    @classmethod
    def official(cls, steps: int = 10, lr: float = 1e7, seed: int = 0) -> MaskConfig:
        """What the authors' scripts do."""
        return cls(
            steps=steps,
            lr=lr,
            cap=None,
            limit=False,
            judge_start=False,
            uniform_start=True,
            seed=seed,
        )


@dataclass(frozen=True)
class MaskStep:
    """One step: the training loss before it, the rounded mask after it.

    loss: mean over the step's batches, of the un-rounded graft; None for step 0.
    count: bits that are set. added, removed: bits that differ from the base patch.
    moved: the largest |dS|. score: of the rounded mask; None where it was not judged.
    """

    step: int
    loss: float | None
    count: int
    added: int
    removed: int
    moved: float
    score: float | None


@dataclass(frozen=True)
class FittedMask:
    """What `fit_mask` found.

    Attributes:
        mask: (D,) bool, the best by validation score; of equal scores the earliest.
        scores: (D,) S of the last step.
        best: the step of `mask`; 0 is where it starts, the coordinates that moved most.
        lr: the factor of the gradient that was used.
        trace: every step, from step 0 on.
    """

    mask: Tensor
    scores: Tensor
    best: int
    lr: float
    trace: tuple[MaskStep, ...]

    @property
    def count(self) -> int:
        """Bits that are set."""
        return int(self.mask.sum())


class _Inside(nn.Module):
    """Makes a function of a model a module, so that weights can be put in from outside."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        return self.function(self.model, *arguments)


def with_state(
    model: nn.Module, state: StateDict, function: Callable[..., Any], *arguments: Any
) -> Any:
    """function(model, *arguments) with `state` in the model, whose own weights stay as they are.

    The function may use anything of the model, not only its forward. Dropout is off and running
    statistics stand still.
    """
    own = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    # One name of those that are tied stands for all of them.
    single = {id(own.get(name, name)): name for name in reversed(list(state))}
    inside = {f"model.{name}": state[name] for name in single.values()}
    training = model.training
    model.eval()
    try:
        return functional_call(_Inside(model, function).eval(), inside, arguments)
    finally:
        model.train(training)


def gamma_gradient(
    graft: Graft,
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    gamma: Tensor,
    accumulate: int = 128,
) -> tuple[Tensor, float]:
    """g = dL/dgamma (D,) at theta(gamma), and L, both means over at most `accumulate` batches.

    Raises:
        NonFiniteError: the loss of a batch, or a gradient, is not finite.
        MergeError: no batch, a loss that is no scalar or does not depend on the grafted tensors.
    """
    with torch.no_grad():
        state = graft.state(gamma)
    leaves = {name: state[name].requires_grad_() for name in graft.layout.shapes}
    total = torch.zeros_like(graft.delta)
    summed, count = 0.0, 0
    for batch in batches:
        value = with_state(model, state, loss, batch)
        if value.numel() != 1 or not value.requires_grad:
            raise MergeError(
                "the loss must be one number that depends on the grafted tensors; got shape "
                f"{tuple(value.shape)}"
                + ("" if value.requires_grad else " without a gradient (is it under no_grad?)")
            )
        amount = float(value.detach())
        if not math.isfinite(amount):
            raise NonFiniteError(f"learning the mask: the loss of batch {count} is {amount}")
        parts = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        place = 0
        for part, leaf in zip(parts, leaves.values(), strict=True):
            if part is not None:
                total[place : place + leaf.numel()] += part.reshape(-1)
            place += leaf.numel()
        summed, count = summed + amount, count + 1
        if count >= accumulate:
            break
    if count == 0:
        raise MergeError(
            "no batch to learn the mask from. Batches are gone through in every step: pass a list, "
            "a loader or a function of the step, not an iterator"
        )
    if not bool(torch.isfinite(total).all()):
        raise NonFiniteError("learning the mask: a gradient is not finite")
    return total * graft.delta / count, summed / count


def score_gradient(graft: Graft, scores: Tensor, gradient: Tensor) -> Tensor:
    """dL/dS = (1 - 2 gamma_b) dL/dgamma sigmoid'(S - b), all (D,)."""
    pushed = torch.sigmoid(scores - graft.bias)
    return graft.sign() * gradient * pushed * (1 - pushed)


def fit_mask(
    graft: Graft,
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    score: Score,
    config: MaskConfig | None = None,
    *,
    checkpoint: Path | None = None,
    key: str = "",
    say: Callable[[MaskStep], None] | None = None,
) -> FittedMask:
    """Learn which coordinates to graft.

    Args:
        graft: from `Graft.between`.
        model: any module with the graft's tensors; its own weights are left alone.
        loss: (model, batch) -> mean loss of the batch.
        batches: training batches, gone through anew in every step; or a function that gives
            those of a step (to shuffle).
        score: model -> number, higher is better, on validation rows. Never on the test set: the
            best mask is chosen by it.
        checkpoint: file that is rewritten after every step; an interrupted fit goes on from there,
            bit by bit as if it had not been interrupted (batches given by step, or all at once).
        key: what else makes a checkpoint this fit's: a hash of the rows.
        say: told every step.

    Raises:
        MergeError: the model lacks the graft's tensors, or no bit has moved at any step (then
            the result would be the base patch: lr is too small).
        NonFiniteError: loss, gradient or score is not finite.
        CheckpointError: the checkpoint is damaged or of another fit.
    """
    config = config or MaskConfig()
    _check_model(graft, model)
    limit = graft.asked if config.limit else None
    run = _Fit(graft, config, checkpoint, key)
    if not run.trace:
        hard = graft.movement()
        judged = _judge(graft, model, score, hard) if config.judge_start else None
        run.add(hard, None, 0.0, judged, say)
    for step in range(len(run.trace), config.steps + 1):
        given = batches(step) if callable(batches) else batches
        gamma = graft.soft(run.scores)
        gradient, value = gamma_gradient(graft, model, loss, given, gamma, config.accumulate)
        slope = score_gradient(graft, run.scores, gradient)
        if run.lr is None:
            run.lr = config.lr or _first_lr(graft, slope, config.step_size)
        change = run.lr * slope
        if config.cap is not None:
            change.clamp_(-config.cap, config.cap)
        run.scores = run.scores - change
        hard = graft.hard(run.scores, limit)
        over = graft.hard(run.scores) & ~hard
        off = torch.where(graft.gamma_b, 2 * graft.bias, 0.0).to(run.scores)
        run.scores = torch.where(over, off, run.scores)
        judged = _judge(graft, model, score, hard)
        run.add(hard, value, float(change.abs().max()), judged, say)
    return run.result()


def _first_lr(graft: Graft, slope: Tensor, step_size: float) -> float:
    """The lr with which as many coordinates as the base patch has move by `step_size` or more."""
    count = max(1, int(graft.gamma_b.sum()))
    reached = float(slope.abs().topk(count).values[-1])
    if reached <= 0:
        raise MergeError(
            f"the loss has no gradient at {slope.numel() - count + 1:,} of {slope.numel():,} "
            "grafted coordinates: does it use the tensors that were fine-tuned?"
        )
    return step_size / reached


def _judge(graft: Graft, model: nn.Module, score: Score, mask: Tensor) -> float:
    with torch.no_grad():
        found = float(with_state(model, graft.state(mask), score))
    if not math.isfinite(found):
        raise NonFiniteError(f"learning the mask: the score on validation rows is {found}")
    return found


def _check_model(graft: Graft, model: nn.Module) -> None:
    """The graft's tensors are parameters of the model, of the same shapes."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in graft.layout.shapes:
        if name not in parameters:
            where = "a buffer" if name in dict(model.named_buffers()) else "no parameter"
            raise MergeError(
                f"'{name}' is {where} of the model.{suggestion(name, parameters)} Cut the graft "
                "with parameters=parameter_names(model)"
            )
    graft.layout.check(parameters, "the model")
    known = model.state_dict()
    for name in graft.dense:
        if name not in known:
            raise MergeError(f"the model has no tensor '{name}'.{suggestion(name, known)}")


class _Fit:
    """Where a fit stands; written after every step when there is a checkpoint."""

    def __init__(self, graft: Graft, config: MaskConfig, path: Path | None, key: str) -> None:
        self.graft, self.config, self.path = graft, config, path
        self.trace: list[MaskStep] = []
        self.lr: float | None = None
        self.scores = torch.zeros_like(graft.delta)
        if config.uniform_start:
            generator = rng.torch_generator(config.seed, "mask scores")
            drawn = torch.rand(graft.size, generator=generator, dtype=graft.delta.dtype)
            self.scores = drawn.to(graft.delta)
        self.best_mask, self.best = graft.gamma_b, -1
        self.key = "" if path is None else self._key(key)
        if path is not None and path.is_file():
            self._load(path)

    def add(
        self,
        hard: Tensor,
        loss: float | None,
        moved: float,
        score: float | None,
        say: Callable[[MaskStep], None] | None,
    ) -> None:
        """Record a step; keep it if it is the best so far."""
        patch = self.graft.gamma_b
        step = MaskStep(
            step=len(self.trace),
            loss=loss,
            count=int(hard.sum()),
            added=int((hard & ~patch).sum()),
            removed=int((patch & ~hard).sum()),
            moved=moved,
            score=score,
        )
        best = self.trace[self.best].score if self.best >= 0 else None
        if score is not None and (best is None or score > best):
            self.best, self.best_mask = step.step, hard
        self.trace.append(step)
        if self.path is not None:
            self._save(self.path)
        if say is not None:
            say(step)

    def result(self) -> FittedMask:
        if not any(step.added or step.removed for step in self.trace[1:]):
            far = float(self.scores.max())
            raise MergeError(
                f"no bit of the mask moved in {self.config.steps} steps: S went up to {far:.3g} of "
                f"the {self.graft.bias:g} it must travel, so the result would be the base patch. "
                f"Use more steps or a larger lr (it was {self.lr:.3g})"
            )
        lr = float(self.lr or 0)
        return FittedMask(self.best_mask, self.scores, self.best, lr, tuple(self.trace))

    def _key(self, key: str) -> str:
        """What makes a checkpoint this fit's: settings (but for the number of steps) and graft."""
        digest = hashlib.blake2b(digest_size=8)
        settings = self.config.model_dump(exclude={"steps"})
        shapes = self.graft.layout.shapes
        digest.update(json.dumps([settings, self.graft.bias, shapes, key], sort_keys=True).encode())
        for vector in (self.graft.delta, self.graft.gamma_b):
            digest.update(vector.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _save(self, path: Path) -> None:
        from safetensors.torch import save_file

        tensors = {"scores": self.scores.cpu(), "mask": self.best_mask.cpu()}
        facts = {
            "key": self.key,
            "lr": self.lr,
            "best": self.best,
            "trace": [asdict(step) for step in self.trace],
        }
        with files.writing(path) as aside:
            save_file(tensors, aside, {"fit": json.dumps(facts)})

    def _load(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as handle:  # type: ignore[no-untyped-call]
                facts = json.loads((handle.metadata() or {})["fit"])
                scores, mask = handle.get_tensor("scores"), handle.get_tensor("mask")
            trace = [MaskStep(**step) for step in facts["trace"]]
            key, lr, number = facts["key"], facts["lr"], int(facts["best"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is no checkpoint of a fit: {error}") from error
        if key != self.key:
            raise CheckpointError(
                f"{path} belongs to another fit (other models, data, sparsity or settings): remove "
                "it or choose another file"
            )
        if len(trace) > self.config.steps + 1:
            raise CheckpointError(
                f"{path} holds {len(trace) - 1} steps, more than the {self.config.steps} asked for"
            )
        self.scores, self.best_mask = scores.to(self.scores), mask.to(self.best_mask)
        self.trace, self.lr, self.best = trace, lr, number
