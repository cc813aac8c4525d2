"""What Fisher averaging and RegMean need to know of every model: collected from its own inputs.

Fisher: how much the predictions change with a weight, coordinate by coordinate (Matena & Raffel
2022, arXiv 2111.09832). RegMean: the Gram matrix of what every linear layer takes in (Jin et al.
2023, arXiv 2212.09849). Neither needs labels. The results go into `merge_state_dicts(...,
extras=[...])`, or into a file that `statistics:` of a merge's configuration names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from polytask import files, rng
from polytask.errors import MergeError, NonFiniteError
from polytask.merge.adamerging import Forward

Mask = Callable[[Any], Tensor]  # batch -> (n, L) bool, tokens that are there


def fisher_diagonal(
    forward: Forward,
    state: Mapping[str, Tensor],
    batches: Iterable[Any],
    *,
    targets: Literal["expected", "sampled", "labels"] = "expected",
    at_once: int = 8,
    seed: int = 0,
) -> dict[str, Tensor]:
    """F = mean over inputs x of E_y (d log p(y|x) / d theta)^2, the diagonal of the Fisher matrix.

    Args:
        forward: (tensors, batch) -> logits (n, classes); as AdaMerging's. It is run on single
            inputs under `torch.func.vmap`, so it must not branch on values.
        state: the tensors whose Fisher information is wanted (floating point).
        batches: a tensor, tuple or mapping of tensors whose first axis counts inputs; with
            `targets: labels` pairs (batch, labels).
        targets: y by the model's own probabilities, all classes ('expected', the definition) or
            one drawn ('sampled', for many classes: as many times faster); or the given 'labels'
            (the empirical Fisher, another quantity).
        at_once: inputs whose gradients are held in memory together.
        seed: of drawn classes.

    Returns:
        Name -> tensor of the shape of `state`'s, float32.

    Raises:
        MergeError: no input. NonFiniteError: a gradient that is not finite (tensor named).
    """
    leaves = {name: value.detach() for name, value in state.items()}
    total = {name: torch.zeros_like(v, dtype=torch.float64) for name, v in leaves.items()}
    count = 0

    def log_p(tensors: Mapping[str, Tensor], one: Any, label: Tensor) -> Tensor:
        logits = forward(tensors, _map(one, lambda t: t[None]))[0]
        return torch.log_softmax(logits, -1).gather(0, label[None])[0]

    slopes = vmap(grad(log_p), in_dims=(None, 0, 0), randomness="error")
    for batch in batches:
        inputs, labels = batch if targets == "labels" else (batch, None)
        with torch.no_grad():
            p = torch.softmax(forward(leaves, inputs).float(), -1)  # (n, classes)
        if targets == "expected":
            # Classes masked with minus infinity have no probability and no slope.
            there = p.amax(0).nonzero()[:, 0].tolist()
            draws = [(torch.full((len(p),), c), p[:, c]) for c in there]
        elif targets == "sampled":
            generator = rng.torch_generator(seed, "fisher", count)
            drawn = torch.multinomial(p.cpu(), 1, generator=generator)[:, 0]
            draws = [(drawn, torch.ones(len(p)))]
        else:
            assert labels is not None
            draws = [(labels, torch.ones(len(p)))]
        for label, weight in draws:
            for rows in torch.split(torch.arange(len(p)), at_once):
                found = slopes(leaves, _rows(inputs, rows), label.to(p.device)[rows])
                for name, slope in found.items():
                    share = weight.to(slope)[rows].double()
                    total[name] += torch.tensordot(share, slope.double().square(), 1)
        count += len(p)
    if not count:
        raise MergeError("Fisher information: there was no input")
    for name, value in total.items():
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"Fisher information: gradients of '{name}' are not finite")
    return {name: (value / count).float() for name, value in total.items()}


def gram_matrices(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    run: Callable[[nn.Module, Any], Any] | None = None,
    valid: Mask | None = None,
) -> dict[str, Tensor]:
    """G = X^T X of the inputs of every linear layer, under the name of its weight.

    Args:
        model: with `nn.Linear` layers, or GPT-2's `Conv1D` (give RegMean `inputs: first` then).
        batches: whatever `run` takes.
        run: calls the model on a batch; default model(batch), spread if a tuple or mapping.
        valid: which tokens of a batch are there; padding must not count. Applied to layers whose
            input has these leading axes.

    Returns:
        'layer.weight' -> (in, in) float32; sums over all rows, so that a model seen on more inputs
        weighs more. Layers that were never run are missing; layers that share a weight add up.

    Raises:
        MergeError: no batch, or no linear layer that ran. NonFiniteError: names the layer.
    """
    call = run or _spread
    total: dict[str, Tensor] = {}
    seen: list[Tensor | None] = [None]
    count = 0
    with torch.no_grad(), _watching(model, total, seen):
        training = model.training
        model.eval()
        try:
            for batch in batches:
                seen[0] = None if valid is None else valid(batch)
                call(model, batch)
                count += 1
        finally:
            model.train(training)
    if not count:
        raise MergeError("Gram matrices: there was no input")
    if not total:
        raise MergeError("Gram matrices: no linear layer was run")
    for name, value in total.items():
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"Gram matrices: inputs of '{name}' hold NaN or infinite values")
    return {name: value.float() for name, value in total.items()}


def write_statistics(path: Path, statistics: Mapping[str, Tensor]) -> None:
    """A safetensors file for `statistics:` of a merge's configuration; whole or not at all."""
    from safetensors.torch import save_file

    with files.writing(path) as aside:
        save_file({name: value.contiguous() for name, value in statistics.items()}, aside)


@contextmanager
def _watching(
    model: nn.Module, total: dict[str, Tensor], seen: list[Tensor | None]
) -> Iterator[None]:
    first: dict[int, str] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows: Tensor = inputs[0]
            mask = seen[0]
            if mask is not None and rows.shape[: mask.dim()] == mask.shape:
                rows = rows[mask.to(rows.device)]
            rows = rows.reshape(-1, rows.shape[-1]).double()
            total[name] = total.get(name, 0) + rows.T @ rows

        return take

    handles = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                weight: Any = module.weight
                key = first.setdefault(id(weight), f"{name}.weight" if name else "weight")
                handles.append(module.register_forward_pre_hook(hook(key)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _spread(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def _rows(value: Any, rows: Tensor) -> Any:
    return _map(value, lambda tensor: tensor[rows.to(tensor.device)])


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The function on every tensor of a batch."""
    if isinstance(value, Mapping):
        return {key: _map(each, function) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_map(each, function) for each in value)
    return function(value) if isinstance(value, Tensor) else value
