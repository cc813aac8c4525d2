"""A layer of experts: router and bank, standing where a block has its feed-forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from polytask.models.experts.balance import balance_loss
from polytask.models.experts.bank import Experts, Order
from polytask.models.experts.config import ExpertsConfig
from polytask.models.experts.routers import RouterOutput, TaskRouter


@dataclass
class RoutingRecord:
    """What the routers of one forward pass said, by block; the caller makes one and hands it in."""

    routed: dict[int, RouterOutput] = field(default_factory=dict)

    def balance(self, tasks: int, config: ExpertsConfig) -> Tensor:
        """(T,) CV^2(importance) + CV^2(load), summed over layers; without the weight."""
        parts = [
            balance_loss(routed, tasks, published_load=config.published_load)
            for routed in self.routed.values()
        ]
        return torch.stack(parts).sum(0) if parts else torch.zeros(tasks)


class SparseMoE(nn.Module):
    """y = sum over the K chosen experts of p_k E_k(x); each token chooses its own.

    `number` counts the layers with experts of a model. `order` (attribute) is how experts are
    run; it changes no result.
    """

    def __init__(
        self, dim: int, config: ExpertsConfig, tasks: Sequence[str], number: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.number = number
        self.router = TaskRouter(dim, config, tasks, number)
        ids = None if config.kept is None else config.kept[number]
        self.experts = Experts(config.count, dim, config.width(dim), config.gated, config.bias, ids)
        self.order: Order = "expert"

    def forward(
        self,
        x_SLD: Tensor,
        task_S: Tensor | None,
        vectors: Tensor | None = None,
        valid: Tensor | None = None,
        record: RoutingRecord | None = None,
        layer: int = 0,
    ) -> Tensor:
        """(S, L, D). Padding (`valid` False) comes out as 0. `record` gets what the router said."""
        routed = self.router(x_SLD, task_S, vectors, valid)
        if record is not None:
            record.routed[layer] = routed
        out: Tensor = self.experts(x_SLD.flatten(0, 1), routed, self.order)
        return out.view_as(x_SLD)


def moe_layers(model: nn.Module) -> dict[str, SparseMoE]:
    """The layers of experts of a model, by name, in order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseMoE)}
