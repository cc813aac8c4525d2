"""Dense ViT checkpoints as a start for a model with experts (Komatsuzaki et al. 2023,
arXiv 2212.05055): every expert begins as a copy of the block's feed-forward, or of a part of it.

- Experts as wide as the dense feed-forward are copies. With renormalised weights the model then
  computes what the dense one did, exactly. With raw weights the copies' last layer is scaled by
  N / K, so that even probabilities (`start: zero`) give the dense function exactly and other
  starts come close.
- Narrower experts (hidden = dense / m) take the dense hidden units in m equal parts, expert e part
  e mod m, scaled by m as well: the mean of all parts is the dense function; a choice of K is not.

`noise` adds a share of each weight's deviation to copies, so that equal ones part ways sooner.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polytask.errors import ConfigError
from polytask.models.experts.config import ExpertsConfig
from polytask.models.experts.vit import MoEViT, MoEViTConfig, VisionTask
from polytask.rng import torch_generator

COPIES = ExpertsConfig(count=16, k=4, mult=4.0, gate="renormalised")

# Hugging Face's names (transformers 4 and 5) and timm's -> ours.
_HUB = (
    (r"^(?:vit\.)?embeddings\.patch_embeddings\.projection\.", "patches."),
    (r"^(?:vit\.)?embeddings\.cls_token$", "class_token"),
    (r"^(?:vit\.)?embeddings\.position_embeddings$", "position"),
    (r"^(?:vit\.)?(?:encoder\.layer|layers|encoder\.layers)\.(\d+)\.", r"blocks.\1."),
    (r"attention\.attention\.query\.|attention\.q_proj\.", "attention.query."),
    (r"attention\.attention\.key\.|attention\.k_proj\.", "attention.key."),
    (r"attention\.attention\.value\.|attention\.v_proj\.", "attention.value."),
    (r"attention\.output\.dense\.|attention\.o_proj\.", "attention.out."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"intermediate\.dense\.|mlp\.fc1\.", "feed_forward.up."),
    (r"(?<=\d\.)output\.dense\.|mlp\.fc2\.", "feed_forward.down."),
    (r"^(?:vit\.)?layernorm\.", "norm."),
)
_TIMM = (
    (r"^patch_embed\.proj\.", "patches."),
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "position"),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.mlp\.fc1\.", ".feed_forward.up."),
    (r"\.mlp\.fc2\.", ".feed_forward.down."),
)


def upcycle(
    source: Path | str | nn.Module | Mapping[str, Tensor],
    tasks: Sequence[VisionTask],
    *,
    heads: int | None = None,
    experts: ExpertsConfig | None = COPIES,
    image_size: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
    **options: Any,
) -> MoEViT:
    """A `MoEViT` that starts from a dense ViT.

    Args:
        source: a Hugging Face ViT (model, folder or id in the local cache), or a state dict with
            Hugging Face's or timm's names.
        tasks: what the new model answers; heads are fresh.
        heads: attention heads; needed for a state dict, which does not tell.
        experts: see `ExpertsConfig`; None gives the dense model.
        image_size: another size than the checkpoint's: position embeddings are interpolated
            (bicubic), as M3ViT does.
        noise: deviation of what is added to copies, as a share of each weight's own deviation.
        seed: of gates, heads and noise.
        options: other fields of `MoEViTConfig`.

    Raises:
        ConfigError: the checkpoint is no ViT, or its feed-forward cannot be cut into such experts.
    """
    state, known = _read(source)
    state = _renamed(state)
    patches, position = state["patches.weight"], state["position"]
    dim, channels, patch = patches.shape[0], patches.shape[1], patches.shape[2]
    heads = heads or known.get("heads")
    if heads is None:
        raise ConfigError("a state dict does not say how many attention heads it has: give heads")
    first = int("class_token" in state)
    side = round((position.shape[0] - first) ** 0.5)
    if side**2 + first != position.shape[0]:
        raise ConfigError(
            f"{position.shape[0]} position embeddings are no square grid and a class token; "
            "distilled checkpoints have a second one and are not read"
        )
    hidden = state["blocks.0.feed_forward.up.weight"].shape[0]
    depth = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))
    config = MoEViTConfig(
        image_size=image_size or side * patch,
        patch=patch,
        channels=channels,
        dim=dim,
        depth=depth,
        heads=heads,
        mlp_ratio=hidden / dim,
        eps=known.get("eps", 1e-6),
        class_token=bool(first),
        qkv_bias="blocks.0.attention.qkv.bias" in state,
        experts=experts,
        tasks=tuple(tasks),
        seed=seed,
        **options,
    )
    model = MoEViT(config)
    state["position"] = resized_positions(position, config.grid, first)
    _copy(model, state, noise)
    return model


def resized_positions(position_LD: Tensor, grid: int, first: int) -> Tensor:
    """Position embeddings for another grid, bicubic; `first` of them (class token) are kept."""
    own, rest = position_LD[:first], position_LD[first:]
    side = round(len(rest) ** 0.5)
    if side == grid:
        return position_LD
    plane = rest.T.reshape(1, -1, side, side).float()
    wide = nn.functional.interpolate(plane, (grid, grid), mode="bicubic", align_corners=False)
    return torch.cat((own, wide[0].flatten(1).T.to(own.dtype)))


def _read(source: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if isinstance(source, Mapping):
        return dict(source), {}
    if not isinstance(source, nn.Module):
        from transformers import AutoConfig, ViTModel

        from polytask.models.hub import locate

        place = locate(str(source))
        kind = AutoConfig.from_pretrained(place).model_type
        if kind != "vit":
            raise ConfigError(f"'{source}' is a '{kind}' model; upcycling reads 'vit' models")
        source = ViTModel.from_pretrained(place, add_pooling_layer=False, use_safetensors=True)
    config: Any = source.config
    if getattr(config, "model_type", "") != "vit" or config.hidden_act != "gelu":
        raise ConfigError("upcycling reads ViT models whose feed-forward has plain GELU")
    known = {"heads": int(config.num_attention_heads), "eps": float(config.layer_norm_eps)}
    return {k: v.detach() for k, v in source.state_dict().items()}, known


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    rules = _TIMM if "patch_embed.proj.weight" in state else _HUB
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        for pattern, ours in rules:
            name = re.sub(pattern, ours, name)
        found[name] = tensor.float()
    missing = {"patches.weight", "position", "blocks.0.norm1.weight"} - found.keys()
    if missing:
        raise ConfigError(
            f"the checkpoint has no {', '.join(sorted(missing))} under a name of Hugging Face's "
            f"or timm's ViT (it has {', '.join(list(state)[:4])}, ...)"
        )
    found["position"] = found["position"].reshape(-1, found["position"].shape[-1])
    if "class_token" in found:
        found["class_token"] = found["class_token"].reshape(-1)
    for name in [n for n in found if ".attention.query." in n]:
        parts = [found.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        found[name.replace("query", "qkv")] = torch.cat(parts)
    return found


@torch.no_grad()
def _copy(model: MoEViT, state: dict[str, Tensor], noise: float) -> None:
    config = model.config
    for name, parameter in model.named_parameters():
        if ".feed_forward.experts." not in name and name in state:
            parameter.copy_(state[name])
    experts = config.experts
    if experts is None:
        return
    hidden = experts.width(config.dim)
    if experts.gated or not experts.bias or config.hidden % hidden:
        raise ConfigError(
            f"experts with {hidden} hidden units{' and gates' if experts.gated else ''} cannot "
            f"start from a plain feed-forward of {config.hidden}: their width must divide it, and "
            "they need biases and no gates"
        )
    parts = config.hidden // hidden
    scale = parts * (experts.count / experts.k if experts.gate == "raw" else 1.0)
    for block in config.sparse:
        base = f"blocks.{block}.feed_forward"
        up, up_bias = state[f"{base}.up.weight"], state[f"{base}.up.bias"]
        down, down_bias = state[f"{base}.down.weight"], state[f"{base}.down.bias"]
        bank = model.sparse_layers[base].experts
        for number in bank.ids:
            expert: Any = bank[str(number)]
            part = slice(number % parts * hidden, (number % parts + 1) * hidden)
            expert.up.weight.copy_(up[part])
            expert.up.bias.copy_(up_bias[part])
            expert.down.weight.copy_(down[:, part] * scale)
            expert.down.bias.copy_(down_bias * scale / parts)
            if noise > 0:
                for key, parameter in expert.named_parameters():
                    draw = torch_generator(config.seed, "upcycle", block, number, key)
                    jitter = torch.randn(parameter.shape, generator=draw)
                    parameter.add_(noise * parameter.std() * jitter)
