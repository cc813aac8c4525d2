"""Sparse mixtures of experts: routers that know the task, experts, balance losses, execution.

    routed = router(x, task)              # which K of N experts each token goes to, and how much
    y = experts(x, routed)                # expert by expert (or token by token, or dense)
    loss += balance_loss(routed, tasks)   # per task, never pooled

One part for every system that routes tokens: only the router's input and the gate differ.
"""

from polytask.models.experts.balance import BalanceWeights, balance_loss
from polytask.models.experts.bank import Expert, Experts, Order
from polytask.models.experts.config import ExpertsConfig
from polytask.models.experts.moe import RoutingRecord, SparseMoE, moe_layers
from polytask.models.experts.routers import RouterOutput, TaskEmbedding, TaskRouter, select_experts
from polytask.models.experts.usage import ExpertUsage

__all__ = [
    "BalanceWeights",
    "Expert",
    "ExpertUsage",
    "Experts",
    "ExpertsConfig",
    "Order",
    "RouterOutput",
    "RoutingRecord",
    "SparseMoE",
    "TaskEmbedding",
    "TaskRouter",
    "balance_loss",
    "moe_layers",
    "select_experts",
]
