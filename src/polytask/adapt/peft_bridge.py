"""What comes from `peft`: LoRA, IA3, its Poly, prompts and prefixes, used as they are.

`insert` puts peft's layers into any module (`peft.inject_adapter_in_model`); `peft_model` gives
peft's own wrapper around a transformers model, which prompts and prefixes need. Rows' tasks reach
peft's Poly layers through the same `RowTasks` as ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from polytask.adapt.config import AdaptConfig
from polytask.adapt.sites import linear_sites
from polytask.errors import AdaptError

if TYPE_CHECKING:
    from polytask.adapt.adapters import Adapters


def insert(model: nn.Module, adapters: Adapters) -> None:
    """Put the layers of `adapters.config.method` into the model; they train, the rest keeps its
    state."""
    config = adapters.config
    if config.method == "prompt":
        _insert_prompt(model, adapters)
        return
    import peft

    sites = linear_sites(model, config.targets)
    kept = {id(p): p.requires_grad for p in model.parameters()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        try:
            peft.inject_adapter_in_model(
                _peft_config(config, list(sites), len(adapters.tasks)), model
            )
        except (ValueError, TypeError) as error:
            raise AdaptError(f"peft cannot adapt {type(model).__name__}: {error}") from error
    for parameter in model.parameters():
        if id(parameter) in kept:
            parameter.requires_grad_(kept[id(parameter)])
    adapters._sites = {name: _module(model, name) for name in sites}
    if config.method == "peft-poly":
        for name, layer in adapters._sites.items():
            hook = _GiveTasks(adapters, name)
            adapters._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))


class _GiveTasks:
    """Pre-hook: peft's Poly layers are called with the rows' task ids."""

    def __init__(self, adapters: Adapters, name: str) -> None:
        self.tasks, self.name = adapters.row_tasks, name

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        kwargs["task_ids"] = self.tasks.rows(args[0].shape[0], self.name).task
        return args, kwargs


def _peft_config(config: AdaptConfig, names: list[str], tasks: int) -> Any:
    import peft

    if config.method == "lora":
        alpha: Any = config.scale_alpha  # peft divides it by r, whole number or not
        return peft.LoraConfig(
            r=config.rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=names
        )
    if config.method == "ia3":
        inner = [n for n in names if any(_ends(n, p) for p in config.feedforward)]
        for pattern in config.feedforward:
            if not any(_ends(n, pattern) for n in names):
                raise AdaptError(f"feedforward: no target is '{pattern}'")
        return peft.IA3Config(target_modules=names, feedforward_modules=inner)
    return peft.PolyConfig(
        r=config.rank,
        n_tasks=tasks,
        n_skills=config.modules,
        n_splits=config.heads,
        target_modules=names,
    )


def _ends(name: str, pattern: str) -> bool:
    from fnmatch import fnmatchcase

    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _module(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def _tuner_layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]


def fold(adapters: Adapters) -> None:
    """Add peft's updates to the base's weights, where peft can (`AdaptError` where not)."""
    if adapters.config.method in ("prompt", "peft-poly"):
        raise AdaptError(
            f"'{adapters.config.method}' adapters cannot be folded into weights"
            + (": use method 'poly', which can" if adapters.config.method == "peft-poly" else "")
        )
    for _, layer in _tuner_layers(adapters.model):
        layer.merge()


def remove(adapters: Adapters) -> None:
    """Put the base's own layers back."""
    model = adapters.model
    for name, layer in _tuner_layers(model):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent) if parent else model, last, layer.get_base_layer())


def tensors(adapters: Adapters) -> dict[str, Tensor]:
    """What peft's layers learned, under the names that peft gives them in its files."""
    marks = {"lora": "lora_", "ia3": "ia3_l", "peft-poly": "poly_"}
    if adapters.config.method == "prompt":
        layer: Any = adapters.layers["prompt"]
        return {"prompt_embeddings": layer.embedding.weight.detach()}
    mark = marks[adapters.config.method]
    found = {}
    for name, tensor in adapters.model.state_dict().items():
        if mark in name:
            plain = name.replace(".default.", ".").removesuffix(".default")
            found[f"base_model.model.{plain}"] = tensor.detach()
    return found


@torch.no_grad()
def load(adapters: Adapters, found: dict[str, Tensor]) -> None:
    """Copy tensors of `tensors` back; `AdaptError` for one that is missing or does not fit."""
    own = tensors(adapters)
    for name, tensor in own.items():
        if name not in found:
            raise AdaptError(f"the adapter file has no tensor '{name}'")
        if found[name].shape != tensor.shape:
            raise AdaptError(
                f"'{name}' has shape {tuple(found[name].shape)}, the model needs "
                f"{tuple(tensor.shape)}"
            )
        tensor.copy_(found[name])


def describe(adapters: Adapters) -> dict[str, Any]:
    """The peft configuration as peft writes it."""
    config = _peft_config(adapters.config, list(adapters.sites), len(adapters.tasks))
    plain: dict[str, Any] = config.to_dict()
    return {k: sorted(v) if isinstance(v, set) else v for k, v in plain.items()}


def peft_model(
    model: Any, method: str, task_type: str = "FEATURE_EXTRACTION", **options: Any
) -> Any:
    """A `peft.PeftModel` around a transformers model.

    Args:
        method: 'lora', 'ia3', 'poly', 'prompt' or 'prefix'.
        task_type: as peft names it: SEQ_CLS, CAUSAL_LM, SEQ_2_SEQ_LM, TOKEN_CLS, ...
        options: fields of peft's configuration (r, target_modules, num_virtual_tokens, ...).
    """
    import peft

    from polytask.errors import suggestion

    kinds = {
        "lora": peft.LoraConfig,
        "ia3": peft.IA3Config,
        "poly": peft.PolyConfig,
        "prompt": peft.PromptTuningConfig,
        "prefix": peft.PrefixTuningConfig,
    }
    if method not in kinds:
        raise AdaptError(f"no peft method '{method}'.{suggestion(method, kinds)}")
    try:
        return peft.get_peft_model(model, kinds[method](task_type=task_type, **options))
    except (TypeError, ValueError) as error:
        raise AdaptError(f"peft cannot make a '{method}' model: {error}") from error


# -- prompts on our own trunks and hub trunks


def _insert_prompt(model: Any, adapters: Adapters) -> None:
    """Learned vectors before the tokens of a trunk that is called with (x, mask)."""
    import peft
    from peft.tuners.prompt_tuning import PromptEmbedding

    if not hasattr(model, "dim"):
        raise AdaptError(
            f"method 'prompt' goes on the trunk of a polytask model; for {type(model).__name__} "
            "use `peft_model(model, 'prompt', num_virtual_tokens=...)`"
        )
    count = adapters.config.tokens
    config = peft.PromptTuningConfig(
        num_virtual_tokens=count, token_dim=model.dim, num_transformer_submodules=1
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(adapters.config.seed)
        layer: Any = _plain(PromptEmbedding)(config, None)
        nn.init.normal_(layer.embedding.weight, std=0.02)
    adapters.layers["prompt"] = layer
    adapters._sites = {"prompt": model}
    before, after = _Prepend(layer, count), _Drop(count)
    adapters._handles.append(model.register_forward_pre_hook(before, with_kwargs=True))
    adapters._handles.append(model.register_forward_hook(after, with_kwargs=True))


def _continues(kwargs: dict[str, Any]) -> bool:
    """Whether a call goes on with a cache that holds the prompt already."""
    cache = kwargs.get("cache")
    return cache is not None and (
        getattr(cache, "length", None) is not None or bool(getattr(cache, "width", 0))
    )


def _plain(kind: Any) -> Any:
    """An untyped class of peft, called from typed code."""
    return kind


class _Prepend:
    def __init__(self, layer: nn.Module, count: int) -> None:
        self.layer, self.count = layer, count

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        from dataclasses import replace

        from polytask.models.masks import MaskSpec

        if _continues(kwargs):
            return args, kwargs
        x = args[0]
        mask = args[1] if len(args) > 1 and args[1] is not None else kwargs.pop("mask", None)
        mask = mask or MaskSpec()
        learned = self.layer(torch.arange(self.count, device=x.device)).to(x.dtype)
        x = torch.cat((learned.expand(len(x), -1, -1), x), 1)
        length = None if mask.length is None else mask.length + self.count
        prefix = None if mask.prefix is None else mask.prefix + self.count
        if mask.segments is not None:
            raise AdaptError("a prompt cannot stand before packed sequences")
        module.__dict__["_prompted"] = True
        return (x, replace(mask, length=length, prefix=prefix), *args[2:]), kwargs


class _Drop:
    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return output[:, self.count :] if module.__dict__.pop("_prompted", False) else output
