"""The upper layers of MiniLM as a module of their own, run on cached states of the lower ones.

On two cores all six layers are too slow to tune for many experts; with the embeddings and the
lower layers frozen, their output can be computed once per text. Frozen parts of experts and base
are then equal, so merging concerns the upper layers alone.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from polytask.data.embedded import weights

LAYERS, FROZEN = 6, 4  # layers 0-3 are frozen, 4 and 5 are tuned
WIDTH, HEADS, INNER = 384, 12, 1536
LENGTH = 16  # tokens of a text that are kept
Inputs = tuple[Tensor, Tensor]  # states (n, L, WIDTH) float32, mask (n, L) bool


class Layer(nn.Module):
    """One layer of BERT: attention and a feed-forward part, each normalised after its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.attention_norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(n, L, WIDTH) from states (n, L, WIDTH) and which tokens are there (n, L)."""
        n, length, _ = x.shape
        query, key, value = (
            part(x).view(n, length, HEADS, -1).transpose(1, 2)  # (n, HEADS, L, WIDTH / HEADS)
            for part in (self.query, self.key, self.value)
        )
        seen = functional.scaled_dot_product_attention(query, key, value, mask[:, None, None])
        x = self.attention_norm(x + self.out(seen.transpose(1, 2).reshape(n, length, WIDTH)))
        found: Tensor = self.norm(x + self.down(functional.gelu(self.up(x))))
        return found


class UpperLayers(nn.Module):
    """The tuned layers, mean pooling over tokens and scaling to unit length."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleDict({str(i): Layer() for i in range(FROZEN, LAYERS)})

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """(n, WIDTH) of unit length; see `Inputs`."""
        for layer in self.layer.values():
            states = layer(states, mask)
        there = mask[..., None].to(states.dtype)
        return functional.normalize((states * there).sum(1) / there.sum(1), dim=-1)


_PARTS = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm",
}  # BERT's name of a part -> ours
_TENSOR = re.compile(r"layer\.(\d+)\.(.+)\.(weight|bias)")


def upper_weights() -> dict[str, Tensor]:
    """MiniLM's own weights for `UpperLayers`."""
    from safetensors import safe_open

    found = {}
    with safe_open(str(weights("minilm") / "model.safetensors"), "pt") as file:
        for name in file.keys():  # noqa: SIM118
            matched = _TENSOR.search(name)
            if matched and int(matched[1]) >= FROZEN:
                found[f"layer.{matched[1]}.{_PARTS[matched[2]]}.{matched[3]}"] = file.get_tensor(
                    name
                ).float()
    return found


@functools.cache
def _lower() -> tuple[nn.Module, Any]:
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    folder = weights("minilm")
    config = AutoConfig.from_pretrained(str(folder), num_hidden_layers=FROZEN)
    auto: Any = AutoModel
    model = auto.from_config(config, add_pooling_layer=False)
    own = model.state_dict()
    held = load_file(folder / "model.safetensors")
    model.load_state_dict({name: held[name] for name in own})
    return model.eval(), AutoTokenizer.from_pretrained(str(folder))


@torch.no_grad()
def lower_states(texts: Sequence[str], batch: int = 64) -> tuple[Tensor, Tensor]:
    """What the frozen layers make of texts, end to end without padding.

    Returns:
        states (tokens of all texts, WIDTH) float16, and offsets (texts + 1,) int64: text i has
        rows offsets[i] to offsets[i + 1].
    """
    model, tokenizer = _lower()
    encoded = tokenizer(list(texts), truncation=True, max_length=LENGTH)["input_ids"]
    lengths = torch.tensor([len(ids) for ids in encoded])
    offsets = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0)))
    states = torch.empty(int(offsets[-1]), WIDTH, dtype=torch.float16)
    order = torch.argsort(lengths, stable=True)  # texts of like length share a batch
    for chosen in torch.split(order, batch):
        width = int(lengths[chosen].max())
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        mask = torch.arange(width) < lengths[chosen][:, None]
        ids[mask] = torch.cat([torch.tensor(encoded[i]) for i in chosen.tolist()])
        hidden = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        rows = offsets[:-1][chosen][:, None] + torch.arange(width)
        states[rows[mask]] = hidden[mask].half()
    return states, offsets


def gather(states: Tensor, offsets: Tensor, index: Tensor) -> Inputs:
    """The texts of `index` (b,), padded to the longest of them."""
    start, lengths = offsets[index], offsets[index + 1] - offsets[index]
    step = torch.arange(int(lengths.max()))
    mask = step < lengths[:, None]
    rows = (start[:, None] + step).clamp(max=len(states) - 1)
    return states[rows].float() * mask[..., None], mask
