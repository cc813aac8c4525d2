"""Tiny models in Hugging Face format, and experts of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from polytask.merge.config import parse_config, recipe_of
from polytask.merge.plan import Plan, make_plan

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(35))]


def llama(seed: int = 0, layers: int = 3, **more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(
        num_hidden_layers=layers,
        num_key_value_heads=2,
        **{**size, "vocab_size": 40, "tie_word_embeddings": False, **more},
    )
    return LlamaForCausalLM(config).eval()


def bert(labels: int = 2, seed: int = 0) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        num_labels=labels,
    )
    return BertForSequenceClassification(config).eval()


def tuned(model: nn.Module, seed: int, size: float = 0.02) -> nn.Module:
    """A copy with small random changes."""
    from copy import deepcopy

    made = deepcopy(model)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=noise))
    return made


def save(model: Any, folder: Path, tokens: list[str] | None = WORDS, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    if tokens is not None:
        save_tokenizer(folder, tokens)
    return folder


def save_tokenizer(folder: Path, tokens: list[str], added: tuple[str, ...] = ()) -> None:
    made = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens([t for t in tokens if t.startswith("[")])
    if added:
        made.add_special_tokens(list(added))
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "model_max_length": 32,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def state_folder(folder: Path, state: Mapping[str, Tensor], **config: Any) -> Path:
    """A folder with tensors and, if there are keys for it, a config.json."""
    folder.mkdir(parents=True)
    save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / "model.safetensors")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def some_state(seed: int, dtype: torch.dtype = torch.float32, rows: int = 7) -> dict[str, Tensor]:
    """Tensors of many kinds: matrices, a vector, a scalar, an empty one, integers."""
    noise = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise).to(dtype)

    return {
        "emb.weight": some(rows, 6),
        "layers.0.w": some(5, 6),
        "layers.1.w": some(5, 6),
        "layers.0.b": some(6),
        "layers.1.b": some(6),
        "scalar": some(),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "count": torch.arange(3),
    }


def near(base: Mapping[str, Tensor], seed: int, size: float = 0.1) -> dict[str, Tensor]:
    """An expert of `base`."""
    noise = torch.Generator().manual_seed(1000 + seed)
    return {
        k: (v + size * torch.randn(v.shape, generator=noise).to(v.dtype)).to(v.dtype)
        if v.is_floating_point()
        else v.clone()
        for k, v in base.items()
    }


def plan_of(home: Path, method: str = "average", base: str | None = "base", **more: Any) -> Plan:
    """The plan of merging the folders a, b, ... in `home`."""
    names = more.pop("models", {n: n for n in "abc" if (home / n).exists()})
    data = {"method": method, "models": names, **more}
    if base is not None:
        data["base"] = base
    return make_plan(recipe_of(parse_config(data), home))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, by name."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
