"""Merge PEFT adapters of one base into one adapter, exactly where that is possible.

PEFT's `add_weighted_adapter(combination_type="linear")` adds the factors, and a sum of products is
not the product of sums. Here factors are concatenated, which makes the merged product the weighted
sum of the products: ranks, alphas and rsLoRA may differ, because every scaling is folded into B.
A smaller rank, or a method that votes or trims, goes through a singular value decomposition whose
error is reported layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytask import files
from polytask.errors import MergeError
from polytask.merge.adapters import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Adapter,
    Factors,
    feeds_forward,
    load_adapter,
)
from polytask.merge.method import Method, cast, merge_state_dicts
from polytask.merge.methods.averages import TaskArithmetic
from polytask.merge.vectors import StateDict

TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter in PEFT's layout.

    Attributes:
        config: of adapter_config.json.
        tensors: of adapter_model.safetensors.
        errors: path of each layer -> relative Frobenius error of its weight's change; 0 where the
            merge is exact.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    errors: Mapping[str, float]

    @property
    def exact(self) -> bool:
        return not any(self.errors.values())

    def write(self, folder: Path) -> None:
        """Write the folder, whole or not at all; `PeftModel.from_pretrained` loads it."""
        from safetensors.torch import save_file

        with files.building(Path(folder)) as aside:
            files.write_json(aside / CONFIG, dict(self.config))
            ready = {key: tensor.contiguous() for key, tensor in self.tensors.items()}
            save_file(ready, aside / WEIGHTS, metadata={"format": "pt"})


def merge_adapters(
    adapters: Sequence[Adapter | Path],
    weights: float | Sequence[float] = 1.0,
    *,
    method: Method | None = None,
    rank: int | None = None,
    base: StateDict | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    same_base: bool = False,
) -> MergedAdapter:
    """One adapter whose change of the base is sum_k w_k times the changes of `adapters`.

    Args:
        adapters: folders, or what `load_adapter` made of them; all LORA or all IA3.
        weights: one for all or one each; they need not add up to one.
        method: merge the changes by this method (TIES, DARE, ...) instead of adding them up;
            it works on whole weight changes (PEFT's 'ties_svd' and the like) and brings its own
            weights.
        rank: the largest rank of the result. By default LoRA ranks add up and the sum is exact; a
            smaller rank, or a method, takes the best approximation of that rank (default for a
            method: the ranks' sum), see `MergedAdapter.errors`.
        base: the base's tensors by name, needed where adapters hold whole modules or biases that
            not all of them have, whose weights do not add up to one, or with a `method`.
        seed: of random masks.
        dtype: of the result; float32 keeps scalings exact that bfloat16 would round.
        same_base: vouch that the adapters have one base although their configurations name
            different ones.

    (IA)^3 vectors l scale, so the change of the base is l - 1: the result is 1 + sum_k w_k (l_k -
    1), and an adapter that lacks a layer leaves it alone (PEFT's own sum takes 0 for it, which
    switches the layer off).

    Raises:
        MergeError: DoRA (its change is not low in rank: merge it into the base instead), adapters
            of different kinds, bases, orientations or shapes, whole modules without the base.
    """
    loaded = [a if isinstance(a, Adapter) else load_adapter(a) for a in adapters]
    if not loaded:
        raise MergeError("there is no adapter to merge")
    loaded = _named_apart(loaded)
    _check(loaded, same_base)
    count = len(loaded)
    shares = [float(w) for w in weights] if isinstance(weights, Sequence) else [weights] * count
    if len(shares) != count:
        raise MergeError(f"{len(shares)} weights for {count} adapters")
    if rank is not None and rank < 1:
        raise MergeError(f"a rank of {rank} leaves nothing: give 1 or more")
    if method is not None:
        method.check(count, True)
        if weights != 1.0:
            raise MergeError("with a method, weights are the method's own parameter")
    config = dict(loaded[0].config)
    tensors, errors = dict[str, Tensor](), dict[str, float]()
    if loaded[0].kind == "IA3":
        form = method or TaskArithmetic(weight=tuple(shares))
        scales = _scales(loaded, form, seed)
        tensors |= {f"{PREFIX}{path}.ia3_l": scale for path, scale in scales.items()}
        errors = dict.fromkeys(scales, 0.0)
        targets = _targets(loaded, list(scales))
        forward = _forward(loaded, list(scales))
        config |= {**targets, **(forward if targets else {})}
    else:
        factors, errors = _layers(loaded, shares, method, rank, seed)
        config |= _targets(loaded, list(factors))
        config |= _ranks(factors)
        for path, made in factors.items():
            down, up = ("lora_embedding_A", "lora_embedding_B")
            if not made.embedding:
                down, up = "lora_A.weight", "lora_B.weight"
            tensors[f"{PREFIX}{path}.{down}"] = made.down
            tensors[f"{PREFIX}{path}.{up}"] = made.up
            if made.bias is not None:
                tensors[f"{PREFIX}{path}.lora_B.bias"] = made.bias
    tensors |= _whole(loaded, shares, method, base, seed)
    config |= {"inference_mode": True, "modules_to_save": _modules(loaded)}
    return MergedAdapter(config, {k: cast(t, dtype, k) for k, t in tensors.items()}, errors)


def concatenate(pieces: Sequence[tuple[Factors, float]]) -> Factors:
    """Factors of sum_k w_k s_k B_k A_k: A stacked, B side by side with w_k s_k worked in."""
    down = torch.cat([_wide(f.down) for f, _ in pieces])
    up = torch.cat([_wide(f.up) * (w * f.scale) for f, w in pieces], dim=1)
    biases = [_wide(f.bias) * (w * f.scale) for f, w in pieces if f.bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    return Factors(down, up, 1.0, pieces[0][0].embedding, bias)


def compress(factors: Factors, rank: int) -> tuple[Factors, float]:
    """The best factors of a smaller rank, and the relative Frobenius error of their product.

    Eckart-Young on the small triangular factors: A^T = Q_a R_a and B = Q_b R_b, then the singular
    values of R_b R_a^T, so that no matrix of the layer's own size is decomposed. The values are
    shared out evenly, sqrt(S) to each side.
    """
    down, up = factors.down.double().flatten(1), factors.up.double().flatten(1)
    left, right = torch.linalg.qr(up), torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(left.R @ right.R.T, full_matrices=False)
    kept = min(rank, s.numel())
    root = s[:kept].sqrt()
    small_up = (left.Q @ u[:, :kept]) * root
    small_down = (root[:, None] * vh[:kept]) @ right.Q.T
    total, lost = float(s.square().sum()), float(s[kept:].square().sum())
    made = replace(
        factors,
        down=small_down.to(factors.down.dtype).view(kept, *factors.down.shape[1:]),
        up=small_up.to(factors.up.dtype).view(up.shape[0], kept, *factors.up.shape[2:]),
    )
    return made, (lost / total) ** 0.5 if total else 0.0


def _layers(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: Method | None,
    rank: int | None,
    seed: int,
) -> tuple[dict[str, Factors], dict[str, float]]:
    made: dict[str, Factors] = {}
    errors: dict[str, float] = {}
    for path in sorted({path for adapter in adapters for path in adapter.factors}):
        pieces = [
            (a.factors[path], w)
            for a, w in zip(adapters, weights, strict=True)
            if path in a.factors
        ]
        _same_shape([(a.name, a.factors[path]) for a in adapters if path in a.factors], path)
        made[path], errors[path] = concatenate(pieces), 0.0
        if method is None and rank is not None and made[path].rank > rank:
            made[path], errors[path] = compress(made[path], rank)
    if method is not None:
        products = _products(adapters, list(made), method, seed)
        for path, product in products.items():
            wide = Factors(
                torch.eye(product[0].numel(), dtype=torch.float64).view(-1, *product.shape[1:]),
                product.flatten(1).view(product.shape[0], -1, *(1,) * (product.dim() - 2)),
                1.0,
                made[path].embedding,
                made[path].bias,
            )
            best, errors[path] = compress(wide, rank or made[path].rank)
            made[path] = replace(best, down=best.down.float(), up=best.up.float())
    if any(f.bias is not None for f in made.values()):
        made = {
            path: f if f.bias is not None else replace(f, bias=f.up.new_zeros(f.up.shape[0]))
            for path, f in made.items()
        }
    return made, errors


def _products(
    adapters: Sequence[Adapter], paths: Sequence[str], method: Method, seed: int
) -> dict[str, Tensor]:
    """The changes of all layers, merged by `method`; layer by layer unless it needs passes."""
    names = [adapter.name for adapter in adapters]

    def changes(path: str) -> list[Tensor]:
        first = next(a.factors[path] for a in adapters if path in a.factors).product()
        return [
            a.factors[path].product() if path in a.factors else torch.zeros_like(first)
            for a in adapters
        ]

    def merged(chosen: Sequence[str]) -> dict[str, Tensor]:
        found = {path: changes(path) for path in chosen}
        experts = [{path: found[path][k] for path in chosen} for k in range(len(adapters))]
        zero = {path: torch.zeros_like(found[path][0]) for path in chosen}
        return merge_state_dicts(method, experts, zero, names=names, seed=seed)

    if method.passes:
        return merged(paths)
    return {path: merged([path])[path] for path in paths}


def _scales(adapters: Sequence[Adapter], method: Method, seed: int) -> dict[str, Tensor]:
    paths = sorted({path for adapter in adapters for path in adapter.scales})
    ones = {}
    for path in paths:
        shapes = {tuple(a.scales[path].shape): a.name for a in adapters if path in a.scales}
        if len(shapes) > 1:
            raise MergeError(f"layer '{path}' has vectors of different shapes: {shapes}")
        ones[path] = torch.ones(next(iter(shapes)))
    experts = [{p: a.scales.get(p, ones[p]).float() for p in paths} for a in adapters]
    names = [adapter.name for adapter in adapters]
    return merge_state_dicts(method, experts, ones, names=names, seed=seed)


def _whole(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    method: Method | None,
    base: StateDict | None,
    seed: int,
) -> dict[str, Tensor]:
    """Modules and biases that were trained as a whole, by their names in the file."""
    merged: dict[str, Tensor] = {}
    for plain in sorted({name for adapter in adapters for name in adapter.replaced}):
        have = [adapter for adapter in adapters if plain in adapter.replaced]
        stored = have[0].stored[plain]
        if len({tuple(a.replaced[plain].shape) for a in have}) > 1:
            raise MergeError(f"'{plain}' has different shapes in the adapters")
        origin = None if base is None else base.get(plain)
        sums = abs(sum(weights) - 1) < 1e-6
        if origin is None and not (method is None and len(have) == len(adapters) and sums):
            why = "the weights do not add up to one" if method is None else "a method needs it"
            if len(have) < len(adapters):
                lacking = next(a.name for a in adapters if plain not in a.replaced)
                why = f"{lacking} left it as the base has it"
            raise MergeError(
                f"{have[0].name}: '{plain}' was trained as a whole (modules_to_save or bias), and "
                f"{why}; give the base's tensors as 'base', or weights that add up to one"
            )
        centre = torch.zeros_like(have[0].replaced[plain]) if origin is None else origin
        if centre.shape != have[0].replaced[plain].shape:
            raise MergeError(f"'{plain}' has another shape in the base")
        experts = [{plain: a.replaced.get(plain, centre).float()} for a in adapters]
        form = method or TaskArithmetic(weight=tuple(weights))
        names = [adapter.name for adapter in adapters]
        found = merge_state_dicts(form, experts, {plain: centre.float()}, names=names, seed=seed)
        merged[stored] = found[plain]
    return merged


def _check(adapters: Sequence[Adapter], same_base: bool) -> None:
    first = adapters[0]
    for adapter in adapters:
        if adapter.kind != first.kind:
            raise MergeError(
                f"{adapter.name} is {adapter.kind}, {first.name} is {first.kind}: merge each into "
                "its base, then merge the models"
            )
        if adapter.transposed != first.transposed:
            raise MergeError(
                f"{adapter.name} and {first.name} disagree on fan_in_fan_out: different bases?"
            )
        if any(f.magnitude is not None for f in adapter.factors.values()):
            raise MergeError(
                f"{adapter.name} is a DoRA adapter: it rescales whole rows of the base's weights, "
                "which a merged adapter cannot express. Merge the models instead: `polytask "
                "merge` works each adapter into its base exactly"
            )
        ours, theirs = (
            (a.config.get("base_model_name_or_path"), a.config.get("revision"))
            for a in (first, adapter)
        )
        if ours != theirs and not same_base:
            raise MergeError(
                f"{adapter.name} was trained on {theirs[0]}, {first.name} on {ours[0]}; if these "
                "are one model, say so with 'same_base'"
            )


def _named_apart(adapters: Sequence[Adapter]) -> list[Adapter]:
    names = [adapter.name for adapter in adapters]
    if len(set(names)) == len(names):
        return list(adapters)
    return [replace(a, name=f"{a.name} ({n})") for n, a in enumerate(adapters, start=1)]


def _same_shape(given: Sequence[tuple[str, Factors]], path: str) -> None:
    name, first = given[0]
    for other, factors in given[1:]:
        same = factors.down.shape[1:] == first.down.shape[1:]
        same &= factors.up.shape[0] == first.up.shape[0] and factors.embedding == first.embedding
        if not same:
            raise MergeError(f"layer '{path}' has another shape in {other} than in {name}")


def _targets(adapters: Sequence[Adapter], paths: list[str]) -> dict[str, Any]:
    """Which layers PEFT is to change: the adapters' own words where all say the same and have the
    same layers, else each layer by its path."""

    def said(adapter: Adapter) -> list[Any]:
        values = [adapter.config.get(key) for key in (*TARGETS, "feedforward_modules")]
        return [sorted(v) if isinstance(v, list) else v for v in values]

    own = [set(adapter.factors) | set(adapter.scales) for adapter in adapters]
    if all(said(a) == said(adapters[0]) for a in adapters) and all(o == set(paths) for o in own):
        return {}
    return {"target_modules": paths, **{k: None for k in TARGETS[1:] if k in adapters[0].config}}


def _forward(adapters: Sequence[Adapter], paths: list[str]) -> dict[str, Any]:
    answers = {
        path: {feeds_forward(a.config, path) for a in adapters if path in a.scales}
        for path in paths
    }
    torn = [path for path, found in answers.items() if len(found) > 1]
    if torn:
        raise MergeError(f"layer '{torn[0]}' is scaled at its inputs by one adapter, not by all")
    return {"feedforward_modules": [path for path, found in answers.items() if True in found]}


def _ranks(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """Rank and alpha of each layer; equal, so that PEFT's scaling is 1."""
    largest = max((f.rank for f in factors.values()), default=1)
    other = {f"^{path}": f.rank for path, f in factors.items() if f.rank != largest}
    return {
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": any(f.bias is not None for f in factors.values()),
        "init_lora_weights": True,
    }


def _modules(adapters: Sequence[Adapter]) -> list[str] | None:
    found = {m for a in adapters for m in (a.config.get("modules_to_save") or [])}
    return sorted(found) or None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
