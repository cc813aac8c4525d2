"""Small models to adapt: a multilayer perceptron, a BERT and a GPT-2 of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TASKS = ("alpha", "beta", "gamma")


def perceptron(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))


def bert(seed: int = 0) -> Any:
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def gpt2(seed: int = 0) -> Any:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return GPT2Model(config).eval()


def ids(rows: int = 5, length: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def hidden(model: Any, tokens: Tensor) -> Tensor:
    found: Tensor = model(input_ids=tokens).last_hidden_state
    return found


@torch.no_grad()
def stir(adapters: nn.Module, seed: int = 3) -> None:
    """Random values everywhere, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.parameters():
        parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
