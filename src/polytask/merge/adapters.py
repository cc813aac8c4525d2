"""PEFT adapters as what they are: changes to the tensors of a base.

`read_adapter` binds a folder in PEFT's layout (adapter_config.json, adapter_model.safetensors) to
the names of a base, so that an engine can work it into each tensor as it is read. LoRA with any
ranks, scalings (rsLoRA), patterns and biases, DoRA, (IA)^3, and whole modules or biases that were
trained along are exact; whatever is not is refused with the reason. Nothing here imports `peft`.

    LoRA  W + s B A, s = alpha / r, with rsLoRA alpha / sqrt(r)    (arXiv 2106.09685, 2312.03732)
    DoRA  m / |W + s B A| (W + s B A), norms of output rows        (arXiv 2402.09353, equation 5)
    IA3   W scaled by a vector along its outputs (with its bias) or its inputs (arXiv 2205.05638)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from polytask.errors import MergeError, suggestion
from polytask.merge.vectors import check_finite

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
PARTS = re.compile(
    r"^(?P<path>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A"
    r"|lora_embedding_B|lora_magnitude_vector(?:\.weight)?|ia3_l)$"
)
# Configurations whose effect is more than a change of the base's tensors, or another change than
# the stored factors say.
REFUSED = {
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "it acts on some tokens only, which no change of weights does",
    "use_qalora": "its factors act on pooled inputs",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters at run time",
    "kasa_config": "it changes the base's weights when it is loaded",
    "velora_config": "its factors are stored compressed",
    "monteclora_config": "its factors are sampled",
    "target_parameters": "its factors act on parameters that are not a layer's weight",
    "trainable_token_indices": "it holds single rows of the embedding",
    "megatron_config": "its factors are split over processes",
}
MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")


class HasShape(Protocol):
    """A tensor or the header of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Factors:
    """LoRA of one layer: its weight's change is `scale` * up @ down.

    Attributes:
        down: A, (r, in), (r, in, *kernel) for a convolution, (r, vocabulary) for an embedding.
        up: B, (out, r), (out, r, 1, ...) or (dimension, r).
        scale: s.
        embedding: the stored weight is (in, out), not (out, in).
        bias: of B, (out,); added to the layer's bias times `scale`.
        magnitude: DoRA's m, flat (out,).
    """

    down: Tensor
    up: Tensor
    scale: float
    embedding: bool = False
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    def product(self) -> Tensor:
        """(out, in...) float32 or float64: scale * up @ down."""
        down, up = _wide(self.down), _wide(self.up)
        made: Tensor = (up.flatten(1) @ down.flatten(1)).mul_(self.scale)
        return made.view(up.shape[0], *down.shape[1:])


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter as stored.

    Attributes:
        name: for messages: its folder's.
        config: adapter_config.json.
        factors: LoRA by path of the layer in the base.
        scales: (IA)^3 vectors by path.
        replaced: tensors of the base that were trained as a whole (modules_to_save, biases), by
            their names in the base; `stored` has the names in the file.
    """

    name: str
    config: Mapping[str, Any]
    factors: Mapping[str, Factors] = field(default_factory=dict)
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    replaced: Mapping[str, Tensor] = field(default_factory=dict)
    stored: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return str(self.config["peft_type"])

    @property
    def transposed(self) -> bool:
        """Weights are stored as (in, out), as GPT-2's Conv1D does."""
        return bool(self.config.get("fan_in_fan_out"))


def load_adapter(folder: Path, name: str | None = None) -> Adapter:
    """Read and check an adapter's folder.

    Raises:
        MergeError: no adapter, unsafe or truncated weights, NaN, a kind or option that cannot be
            made exact (with the reason).
    """
    folder = Path(folder)
    name = name or folder.name
    config = _config(folder, name)
    _refuse(config, name)
    return parse_adapter(name, config, _tensors(folder, name))


def parse_adapter(name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    """An `Adapter` from its configuration and its tensors by PEFT's names."""
    _refuse(config, name)
    parts: dict[str, dict[str, Tensor]] = {}
    scales: dict[str, Tensor] = {}
    replaced: dict[str, Tensor] = {}
    stored: dict[str, str] = {}
    for key in sorted(tensors):
        check_finite(tensors[key], key, name)
        inner = key.removeprefix(PREFIX)
        found = PARTS.match(inner)
        if found is None:
            plain = inner.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            replaced[plain], stored[plain] = tensors[key], key
        elif found["part"] == "ia3_l":
            scales[found["path"]] = tensors[key]
        else:
            part = found["part"].removesuffix(".weight")
            parts.setdefault(found["path"], {})[part] = tensors[key]
    factors = {path: _factors(name, config, path, given) for path, given in parts.items()}
    if not factors and not scales and not replaced:
        raise MergeError(f"{name}: the adapter has no tensors")
    return Adapter(name, dict(config), factors, scales, replaced, stored)


@dataclass(frozen=True)
class AppliedAdapter:
    """An adapter bound to the names of a base; see `read_adapter`.

    Attributes:
        adapter: as stored.
        changed: names of the base's tensors that it changes.
    """

    adapter: Adapter
    changed: frozenset[str]
    layers: Mapping[str, str]  # name in the base -> layer's path in the adapter, weights
    biases: Mapping[str, str]  # the same for biases
    whole: Mapping[str, str]  # name in the base -> name in `adapter.replaced`

    def apply(self, key: str, weight: Tensor) -> Tensor:
        """The base's tensor `key` with the adapter worked in: what `merge_and_unload` makes.

        `weight` is float32 or float64, (*shape); a new tensor of its type comes back.
        """
        if key in self.whole:
            weight = self.adapter.replaced[self.whole[key]].to(weight)
        made = weight.clone()
        if key in self.layers:
            return self._weight(self.layers[key], made)
        if key in self.biases:
            path = self.biases[key]
            if path in self.adapter.scales:
                return made.mul_(self.adapter.scales[path].to(made).view_as(made))
            factors = self.adapter.factors[path]
            if factors.bias is not None:
                made.add_(factors.bias.to(made), alpha=factors.scale)
        return made

    def _weight(self, path: str, made: Tensor) -> Tensor:
        adapter = self.adapter
        if path in adapter.scales:
            scale = adapter.scales[path].to(made)
            if made.dim() > 2 and not feeds_forward(adapter.config, path):
                scale = scale.transpose(0, 1)  # stored (1, out, 1, ...)
            return made.mul_(scale.T if adapter.transposed else scale)
        factors = adapter.factors[path]
        turned = made.dim() == 2 and (factors.embedding or adapter.transposed)
        rows = made.T if turned else made  # (out, in, ...)
        rows = rows + factors.product().to(made)
        if factors.magnitude is not None:
            norms = torch.linalg.vector_norm(rows.flatten(1), dim=1)
            ratio = factors.magnitude.to(made) / norms
            rows = rows * ratio.view(-1, *(1,) * (rows.dim() - 1))
        return (rows.T if turned else rows).contiguous()


def read_adapter(
    folder: Path, base: Mapping[str, HasShape], name: str | None = None
) -> AppliedAdapter:
    """The adapter in `folder`, bound to a base with the tensors `base` (name -> shape holder).

    Names are matched as PEFT has them; where the base was saved with or without an outer module
    ('model.', 'bert.'), by the one name that ends in the adapter's or that the adapter's ends in.

    Raises:
        MergeError: as `load_adapter`; a layer that the base lacks or has in another shape.
    """
    return bind_adapter(load_adapter(folder, name), base)


def bind_adapter(adapter: Adapter, base: Mapping[str, HasShape]) -> AppliedAdapter:
    """`read_adapter` for an adapter that is in memory."""
    layers: dict[str, str] = {}
    biases: dict[str, str] = {}
    for path in [*adapter.factors, *adapter.scales]:
        key = _find(f"{path}.weight", base, adapter.name)
        _check_shape(adapter, path, key, tuple(base[key].shape))
        layers[key] = path
        bias = key.removesuffix("weight") + "bias"
        factors = adapter.factors.get(path)
        if factors is not None and factors.bias is not None and bias not in base:
            raise MergeError(
                f"{adapter.name}: layer '{path}' adds a bias (lora_bias), but the base's layer has "
                "none to add it to"
            )
        scaled = path in adapter.scales and not feeds_forward(adapter.config, path)
        if bias in base and (scaled or (factors is not None and factors.bias is not None)):
            biases[bias] = path
    whole = {}
    for plain, tensor in adapter.replaced.items():
        key = _find(plain, base, adapter.name)
        if tuple(base[key].shape) != tuple(tensor.shape):
            raise MergeError(
                f"{adapter.name}: '{plain}' was trained as a whole with shape "
                f"{tuple(tensor.shape)}, the base's has {tuple(base[key].shape)}"
            )
        whole[key] = plain
    changed = frozenset(layers) | frozenset(biases) | frozenset(whole)
    return AppliedAdapter(adapter, changed, layers, biases, whole)


def feeds_forward(config: Mapping[str, Any], path: str) -> bool:
    """Whether (IA)^3 scales a layer's inputs, not its outputs (as PEFT decides it)."""
    modules = config.get("feedforward_modules") or []
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    return any(path.endswith(str(module)) for module in modules)


def _config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise MergeError(f"{name}: there is no {CONFIG} in {folder}: not a PEFT adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise MergeError(f"{name}: {path} is not valid JSON: {error}") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise MergeError(f"{name}: {path} has no 'peft_type'")
    return config


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    if not path.is_file():
        reason = f"there is no {WEIGHTS} in {folder}"
        if (folder / "adapter_model.bin").is_file():
            reason += (
                "; adapter_model.bin is a pickle, which may run code when it is read: load it with "
                "peft where you trust it, and save it again"
            )
        raise MergeError(f"{name}: {reason}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise MergeError(f"{name}: {path} cannot be read: {error}") from error


def _refuse(config: Mapping[str, Any], name: str) -> None:
    kind = str(config.get("peft_type", "")).upper()
    if kind not in ("LORA", "IA3"):
        raise MergeError(
            f"{name}: adapters of kind {kind or '?'} are not a change of the base's weights that "
            "could be merged; LORA and IA3 are"
        )
    for key, reason in REFUSED.items():
        if config.get(key):
            raise MergeError(f"{name}: '{key}' cannot be merged: {reason}")
    start = str(config.get("init_lora_weights", "")).lower()
    if start.startswith(MUTATING):
        raise MergeError(
            f"{name}: it was started with '{start}', which changes the base's weights whenever it "
            "is loaded; save it with peft's path_initial_model_for_weight_conversion first"
        )


def _factors(
    name: str, config: Mapping[str, Any], path: str, given: Mapping[str, Tensor]
) -> Factors:
    embedding = "lora_embedding_A" in given
    down = given.get("lora_embedding_A" if embedding else "lora_A")
    up = given.get("lora_embedding_B" if embedding else "lora_B")
    if down is None or up is None:
        half = "A" if down is None else "B"
        raise MergeError(f"{name}: layer '{path}' has no lora_{half}")
    rank = int(down.shape[0])
    if up.dim() != down.dim() or up.shape[1] != rank or up[0, 0].numel() != 1:
        raise MergeError(
            f"{name}: layer '{path}' has factors of shapes {tuple(up.shape)} and "
            f"{tuple(down.shape)}, which do not make one product (a grouped convolution?)"
        )
    alpha = _pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
    root = math.sqrt(rank) if config.get("use_rslora") else rank
    magnitude = given.get("lora_magnitude_vector")
    if bool(config.get("use_dora")) != (magnitude is not None):
        raise MergeError(f"{name}: layer '{path}' and 'use_dora' of the configuration disagree")
    flat = None if magnitude is None else magnitude.reshape(-1)
    return Factors(down, up, float(alpha) / root, embedding, given.get("lora_B.bias"), flat)


def _pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def _find(wanted: str, base: Collection[str], name: str) -> str:
    if wanted in base:
        return wanted
    ends = [key for key in base if key.endswith(f".{wanted}") or wanted.endswith(f".{key}")]
    if len(ends) == 1:
        return ends[0]
    if ends:
        raise MergeError(
            f"{name}: '{wanted}' may be any of {', '.join(sorted(ends)[:3])} in the base"
        )
    raise MergeError(f"{name}: the base has no tensor '{wanted}'.{suggestion(wanted, base)}")


def _check_shape(adapter: Adapter, path: str, key: str, shape: tuple[int, ...]) -> None:
    flat = len(shape) == 2
    if path in adapter.scales:
        made = tuple(adapter.scales[path].shape)
        turned = made[::-1] if adapter.transposed else made
        side = 1 if feeds_forward(adapter.config, path) else 0
        fits = turned in ((shape[0], 1), (1, shape[1])) if flat else math.prod(made) == shape[side]
    else:
        factors = adapter.factors[path]
        made = (int(factors.up.shape[0]), *factors.down.shape[1:])
        fits = made == (
            shape[::-1] if flat and (factors.embedding or adapter.transposed) else shape
        )
    if not fits:
        raise MergeError(
            f"{adapter.name}: layer '{path}' changes a weight of shape {made}, but '{key}' of the "
            f"base has {shape}: trained on another base?"
        )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
