"""AdaMerging: learn how much of each task vector a merge takes, from unlabelled inputs.

    theta^l(lambda) = theta_0^l + sum_k clamp(lambda_k^l, 0, 1) tau_k^l
    J(lambda)       = sum over tasks of mean over inputs of H(softmax(logits))      no labels
    dJ/dlambda_k^l  = <dJ/dtheta^l, tau_k^l>
    lambda <- Adam(lambda, dJ/dlambda)                                 nothing else is trained

"AdaMerging: Adaptive Model Merging for Multi-Task Learning" (Yang et al. 2024, arXiv 2310.02575).
What the paper calls a layer is one tensor of the state dict in its code (a weight and its bias
have coefficients of their own): granularity 'tensor'. The clamp is in the code, not in the paper.
The code's loop takes two batches of 16 for each task and step; fusion_bench takes one, without
clamp and for 1,000 steps. The '++' forms trim task vectors and elect signs first (`trim: 0.2`).

The gradient of the chain rule's second line is formed by hand from that of the weights, so that
nothing of size K x D is kept for a backward pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn
from torch.func import functional_call

from polytask.configs import Config
from polytask.errors import MergeError, NonFiniteError, suggestion
from polytask.merge.coefficients import Groups, check_size, parameters_of
from polytask.merge.methods.ties import ties_vectors
from polytask.merge.vectors import StateDict, TaskVectors
from polytask.objectives.classes import entropy

log = logging.getLogger(__name__)
Forward = Callable[[Mapping[str, Tensor], Any], Tensor]  # (tensors, batch) -> logits (n, classes)
Loss = Callable[[Tensor], Tensor]  # logits (n, classes) -> (n,)
Batches = Iterable[Any]  # read again from its start when it ends
Progress = Callable[[int, Mapping[str, float]], None]  # steps done, entropy by task
COLLAPSED = 0.95  # share of one class from which a task's predictions are told to have collapsed


class AdaMergingConfig(Config):
    """How coefficients are learned; the defaults are those of the authors' code.

    granularity: one coefficient a 'task', a task and 'block' of layers (names up to the first
    number), or a task and 'tensor'. init: where all start. clamp: bounds of the coefficients that
    the model is built with, or None. batches_per_step: for each task. trim: fraction that the ++
    forms keep of each task vector (the paper: 0.2); None for the plain forms.
    """

    granularity: Literal["task", "block", "tensor"] = "tensor"
    init: float = Field(0.3, allow_inf_nan=False)
    lr: PositiveFloat = 1e-3
    steps: PositiveInt = 500
    batches_per_step: PositiveInt = 2
    clamp: tuple[float, float] | None = (0.0, 1.0)
    trim: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _bounds(self) -> AdaMergingConfig:
        if self.clamp is not None:
            low, high = self.clamp
            if not low < high:
                raise ValueError(f"clamp: {low} is not below {high}")
            if not low <= self.init <= high:
                # Outside, the clamp passes no gradient back and nothing would ever move.
                raise ValueError(f"init = {self.init} is outside of clamp ({low}, {high})")
        return self


@dataclass(frozen=True)
class AdaMerged:
    """What was learned.

    Attributes:
        state: the merged tensors (types of the base), and what the base has beside them.
        coefficients: tensor name -> (K,), clamped, as the merge used them.
        names: of the K experts.
        trace: task -> mean entropy of its inputs in every step, before the update.
        predicted: task -> (classes,) how often each class was predicted in the last tenth of steps.
        moved: the largest change of a coefficient.
        rows: unlabelled inputs that were read.
        warnings: reasons to doubt the result, in words.
    """

    state: dict[str, Tensor]
    coefficients: dict[str, Tensor]
    names: tuple[str, ...]
    trace: dict[str, list[float]]
    predicted: dict[str, Tensor]
    moved: float
    rows: int
    warnings: tuple[str, ...]


def fit(
    model: nn.Module,
    base: StateDict,
    experts: Mapping[str, StateDict],
    heads: Mapping[str, nn.Module],
    inputs: Mapping[str, Batches],
    config: AdaMergingConfig | None = None,
    *,
    loss: Loss = entropy,
    progress: Progress | None = None,
) -> AdaMerged:
    """Learn the coefficients for experts of one module with a frozen head for each task.

    Args:
        model: gives features; its own weights are neither used nor changed. Put in evaluation mode
            meanwhile. A batch that is a tuple or list is spread over its arguments, a mapping over
            its keyword arguments.
        base: state dict of `model` that all experts began with. Buffers are the base's.
        experts: name -> state dict; parameters that the model ties count once.
        heads: task -> module from features to logits (n, classes); frozen.
        inputs: task -> batches of unlabelled inputs, a loader that can be read again and again.
        config: see `AdaMergingConfig`.
        loss: per input, from logits; another than the entropy is for ablations.
        progress: called after every step.

    Raises:
        MergeError: unlike state dicts, tasks without inputs, no batches, a head with one class or
            with numbers instead of classes, coefficients that did not move.
        NonFiniteError: names task and step.
    """
    config = config or AdaMergingConfig()
    if heads.keys() != inputs.keys():
        odd = min(heads.keys() ^ inputs.keys())
        lacking, known = ("inputs", inputs) if odd in heads else ("head", heads)
        raise MergeError(f"task '{odd}' has no {lacking}.{suggestion(odd, known)}")
    names = parameters_of(model, base, experts)
    vectors = TaskVectors.from_state_dicts(
        {key: base[key] for key in names},
        [{key: expert[key] for key in names} for expert in experts.values()],
        names=tuple(experts),
    )
    buffers = {key: base[key].to(own) for key, own in model.named_buffers() if key in base}

    def forward(head: nn.Module) -> Forward:
        def logits(state: Mapping[str, Tensor], batch: Any) -> Tensor:
            found: Tensor = head(call(model, {**buffers, **state}, batch))
            return found

        return logits

    modes = [(module, module.training) for module in (model, *heads.values())]
    try:
        for module, _ in modes:
            module.eval()
        forwards = {task: forward(head) for task, head in heads.items()}
        types = {name: names[name].dtype for name in names}
        found = learn(vectors, forwards, inputs, config, types=types, loss=loss, progress=progress)
    finally:
        for module, training in modes:
            module.train(training)
    merged = {**base, **found.state}
    for name, other in _ties(model, names):
        merged[other] = merged[name]
    return AdaMerged(**{**vars(found), "state": merged})


def learn(
    vectors: TaskVectors,
    forwards: Mapping[str, Forward],
    inputs: Mapping[str, Batches],
    config: AdaMergingConfig,
    *,
    types: Mapping[str, torch.dtype] | None = None,
    loss: Loss = entropy,
    progress: Progress | None = None,
) -> AdaMerged:
    """The same for any functions from tensors and a batch to logits, one for each task.

    `types` are those that the functions want the tensors in; default: the vectors' own (float32).
    """
    warned = check_size(vectors)
    if config.trim is not None:
        vectors = ties_vectors(vectors, config.trim)
    groups = Groups.of(vectors, config.granularity)
    goal = Goal(vectors, forwards, groups, types or {}, loss)
    raw = torch.full((groups.count, len(vectors)), config.init, dtype=torch.float64)
    raw.requires_grad_()
    optimiser = torch.optim.Adam([raw], lr=config.lr)
    streams = {task: _again(batches, task) for task, batches in inputs.items()}
    trace: dict[str, list[float]] = {task: [] for task in inputs}
    predicted: dict[str, Tensor] = {}
    tail = config.steps - max(1, config.steps // 10)
    rows = 0
    for step in range(config.steps):
        batches = {
            task: [next(stream) for _ in range(config.batches_per_step)]
            for task, stream in streams.items()
        }
        used = clamped(raw, config.clamp)
        found = goal(used.detach(), batches, where=f"step {step}")
        optimiser.zero_grad()
        torch.autograd.backward(used, found.gradient)
        optimiser.step()
        for task, value in found.entropies.items():
            trace[task].append(value)
            if step >= tail:
                counts = found.predicted[task]
                predicted[task] = predicted.get(task, torch.zeros_like(counts)) + counts
        rows += found.rows
        if progress is not None:
            progress(step + 1, found.entropies)
    last = clamped(raw.detach(), config.clamp)
    moved = float((last - config.init).abs().max())
    if not moved > 0:
        raise MergeError(
            f"no coefficient moved from {config.init} in {config.steps} steps: the entropy has no "
            "gradient. Logits may be saturated or scaled to nothing, or the functions do not use "
            "the tensors that are merged"
        )
    coefficients = groups.spread(last)
    warnings = (*warned, *(_collapse(task, counts) for task, counts in predicted.items()))
    for text in filter(None, warnings):
        log.warning("%s", text)
    with torch.no_grad():
        state = {
            key: value.to(vectors.base[key].dtype)
            for key, value in vectors.add(coefficients).items()
        }
    return AdaMerged(
        state,
        coefficients,
        vectors.names,
        trace,
        predicted,
        moved,
        rows,
        tuple(text for text in warnings if text),
    )


@dataclass(frozen=True)
class Measured:
    """The objective at one point: entropy (mean) and class counts by task, gradient (G, K)."""

    entropies: dict[str, float]
    predicted: dict[str, Tensor]
    gradient: Tensor
    rows: int


class Goal:
    """J and its gradient at coefficients (G, K), on given batches."""

    def __init__(
        self,
        vectors: TaskVectors,
        forwards: Mapping[str, Forward],
        groups: Groups,
        types: Mapping[str, torch.dtype],
        loss: Loss = entropy,
    ) -> None:
        self.vectors, self.forwards, self.groups = vectors, forwards, groups
        self.types, self.loss = types, loss

    def __call__(
        self, coefficients: Tensor, batches: Mapping[str, Sequence[Any]], where: str = "here"
    ) -> Measured:
        """Sum over tasks and batches of the mean loss over a batch's inputs."""
        state = self._state(coefficients)
        leaves = list(state.values())
        totals = [torch.zeros_like(leaf) for leaf in leaves]
        entropies: dict[str, float] = {}
        predicted: dict[str, Tensor] = {}
        rows = 0
        for task, given in batches.items():
            values = []
            for batch in given:
                logits = self._logits(task, state, batch)
                each = self.loss(logits)
                mean = each.mean()
                if not bool(torch.isfinite(mean)):
                    raise NonFiniteError(
                        f"AdaMerging, {where}: the entropy of task '{task}' is {mean.item()}; its "
                        "logits or inputs hold NaN or infinite values"
                    )
                values.append(float(mean.detach()))
                found = torch.autograd.grad(mean, leaves, allow_unused=True)
                for total, part in zip(totals, found, strict=True):
                    if part is not None:
                        total += part
                counts = torch.bincount(logits.detach().argmax(1), minlength=logits.shape[1]).cpu()
                predicted[task] = predicted[task] + counts if task in predicted else counts
                rows += len(logits)
            entropies[task] = sum(values) / len(values)
        gradient = self.groups.gather(
            {
                key: torch.mv(self.vectors.deltas[key].flatten(1), total.flatten().to(delta.dtype))
                for (key, delta), total in zip(self.vectors.deltas.items(), totals, strict=True)
            }
        )
        return Measured(entropies, predicted, gradient, rows)

    def _state(self, coefficients: Tensor) -> dict[str, Tensor]:
        spread = self.groups.spread(coefficients)
        with torch.no_grad():
            merged = self.vectors.add(spread)
        return {
            key: merged[key].to(self.types.get(key, delta.dtype)).requires_grad_()
            for key, delta in self.vectors.deltas.items()
        }

    def _logits(self, task: str, state: Mapping[str, Tensor], batch: Any) -> Tensor:
        logits = self.forwards[task](state, batch)
        if logits.dim() != 2 or not logits.is_floating_point():
            raise MergeError(
                f"task '{task}': AdaMerging needs logits (inputs, classes), got {logits.dtype} of "
                f"shape {tuple(logits.shape)}. Entropy is that of classes: numbers (regression) "
                "and sequences have none here"
            )
        if logits.shape[1] < 2:
            raise MergeError(
                f"task '{task}': its head has one output. A single class has no entropy, and a "
                "regression none that means anything; leave the task out of the inputs"
            )
        if len(logits) == 0:
            raise MergeError(f"task '{task}': a batch of its inputs is empty")
        return logits


def call(model: nn.Module, state: Mapping[str, Tensor], batch: Any) -> Any:
    """The module on a batch (tensor, tuple of arguments, or mapping), with tensors put in."""
    device = next(iter(state.values())).device
    if isinstance(batch, Mapping):
        return functional_call(
            model, dict(state), (), {k: _to(v, device) for k, v in batch.items()}
        )
    arguments = batch if isinstance(batch, tuple | list) else (batch,)
    return functional_call(model, dict(state), tuple(_to(v, device) for v in arguments))


def clamped(raw: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Coefficients as the model is built with; differentiable where they lie within."""
    return raw * 1 if bounds is None else raw.clamp(*bounds)


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _again(batches: Batches, task: str) -> Iterator[Any]:
    """Batches without end, from the start whenever they run out."""
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if count == 0:
            raise MergeError(
                f"task '{task}': its inputs gave no batch. Give a loader or a list, which can be "
                "read again when it ends, rather than an iterator"
            )


def _collapse(task: str, counts: Tensor) -> str:
    share = float(counts.max() / counts.sum())
    if share <= COLLAPSED:
        return ""
    return (
        f"task '{task}': {share:.0%} of its last predictions are class {int(counts.argmax())}. "
        "Its entropy may have been lowered by always saying the same; look at its accuracy"
    )


def _ties(model: nn.Module, names: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, str]]:
    """(name that is merged, other name of the same parameter)."""
    first = {id(parameter): name for name, parameter in names.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first[id(parameter)] != name:
            yield first[id(parameter)], name


def trust(logits: Mapping[str, Tensor], labels: Mapping[str, Tensor]) -> float:
    """Spearman's rank correlation of entropy and error over all labelled inputs of all tasks.

    Whether the surrogate can be believed: the paper reports about 0.87 over binned test inputs;
    near 0, low entropy says nothing about accuracy. NaN when all inputs are right, or all wrong.
    """
    from scipy.stats import spearmanr

    each = torch.cat([entropy(logits[task]) for task in labels])
    wrong = torch.cat([logits[task].argmax(1) != label for task, label in labels.items()])
    if bool(wrong.all()) or not bool(wrong.any()):
        return float("nan")
    return float(spearmanr(each.numpy(), wrong.numpy()).statistic)
