"""The routing table of Poly and MHR: for every task, how much of each module each block takes.

    z = Z[task]                                         (H, S) logits
    relaxed            training: sigmoid(z + logit(u)), u ~ U(0, 1), drawn anew per row and layer;
                       evaluation: sigmoid(z)
    sigmoid            sigmoid(z), in training as well
    straight_through   round(sigmoid(z)), with the gradient of sigmoid(z)
    l2                 z / ||z||, and nothing else
    uniform            1 / S, nothing is learned
    own                task t takes module t alone
    w = gate / (sum over modules + 1e-12)               or gate * sqrt(H / S)

Caccia et al. 2023 (arXiv 2211.03831) and Ponti et al. 2022 (arXiv 2202.13914), as in microsoft/mttl
(`PolytroponSelector`, `AverageSelector`, `PrivateSelector`). The released T0 recipe of MHR turns
the relaxation off ('sigmoid'); the code's default and peft's port leave it on ('relaxed').

Legend: B rows, T tasks, H blocks, S modules.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from polytask import rng
from polytask.adapt.config import Gate
from polytask.errors import AdaptError

EPS = 1e-12  # keeps a row whose gates are all shut finite
WIDTH = 1e-3  # logits start in U(-WIDTH, WIDTH)


class TaskTable(nn.Module):
    """Logits (T, H * S) and how they become weights; several layers may share one table.

    Args:
        tasks: rows of the table.
        blocks: H, blocks of features with a mixture of their own.
        modules: S, size of the inventory.
        mode: see above.
        dropout: on gates, before they are normalised.
        shared_module: the last module's gate is 1 whatever the table says.
        average_correction: weights are gates times sqrt(H / S) instead of gates over their sum.
        seed: of the initial logits.
    """

    def __init__(
        self,
        tasks: int,
        blocks: int,
        modules: int,
        mode: Gate = "relaxed",
        *,
        dropout: float = 0.0,
        shared_module: bool = False,
        average_correction: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if mode == "own" and tasks > modules:
            raise AdaptError(f"gate 'own' needs a module for every task: {modules} for {tasks}")
        self.tasks, self.blocks, self.modules_ = tasks, blocks, modules
        self.mode: Gate = mode
        self.dropout = dropout
        self.shared_module = shared_module
        self.average_correction = average_correction
        self.module_logits: nn.Parameter | None = None
        if mode not in ("uniform", "own"):
            self.module_logits = nn.Parameter(fresh_logits(tasks, blocks * modules, seed))

    @property
    def sampled(self) -> bool:
        """Whether two rows of one task may get different weights just now."""
        noisy = self.mode == "relaxed" or self.dropout > 0
        return self.training and noisy

    def forward(self, task: Tensor) -> Tensor:
        """(B,) task ids -> (B, H, S) float32 weights (float64 for a float64 table)."""
        if self.mode == "own":
            picked = functional.one_hot(task, self.modules_).float()
            return picked[:, None].expand(-1, self.blocks, -1)
        if self.module_logits is None:
            size = (len(task), self.blocks, self.modules_)
            return torch.full(size, 1 / self.modules_, device=task.device)
        table: Tensor = self.module_logits
        if table.dtype in (torch.float16, torch.bfloat16):
            table = table.float()
        z = table.index_select(0, task).view(-1, self.blocks, self.modules_)
        if self.mode == "l2":
            return functional.normalize(z, dim=-1)
        return self._weights(self._gate(z))

    def _gate(self, z: Tensor) -> Tensor:
        if self.mode == "relaxed" and self.training:
            u = torch.rand_like(z).clamp(1e-7, 1 - 1e-7)
            return torch.sigmoid(z + torch.logit(u))
        gate = torch.sigmoid(z)
        if self.mode == "straight_through":
            gate = gate + (gate.round() - gate).detach()
        return gate

    def _weights(self, gate: Tensor) -> Tensor:
        if self.dropout > 0:
            gate = functional.dropout(gate, self.dropout, self.training)
        if self.shared_module:
            on = torch.ones_like(gate[..., :1])
            gate = torch.cat((gate[..., :-1], on), -1)
        if self.average_correction:
            return gate * math.sqrt(self.blocks / self.modules_)
        return gate / (gate.sum(-1, keepdim=True) + EPS)

    @torch.no_grad()
    def table(self) -> Tensor:
        """(T, H, S) weights of all tasks as they are used in evaluation."""
        training = self.training
        self.eval()
        device = None if self.module_logits is None else self.module_logits.device
        found: Tensor = self(torch.arange(self.tasks, device=device))
        self.train(training)
        return found

    def reset(self, tasks: int, seed: int = 0) -> None:
        """Replace all rows by fresh ones, for new tasks."""
        if self.mode == "own":
            raise AdaptError("gate 'own' has no rows to reset: it has a module for every task")
        if self.module_logits is not None:
            old = self.module_logits
            fresh = fresh_logits(tasks, self.blocks * self.modules_, seed)
            self.module_logits = nn.Parameter(fresh.to(old), requires_grad=old.requires_grad)
        self.tasks = tasks

    def make_uniform(self) -> None:
        """From now on every module counts 1 / S; the logits are gone."""
        self.mode, self.module_logits = "uniform", None

    def extra_repr(self) -> str:
        return f"tasks={self.tasks}, blocks={self.blocks}, modules={self.modules_}, {self.mode}"


def fresh_logits(tasks: int, width: int, seed: int) -> Tensor:
    """(T, width) from U(-1e-3, 1e-3)."""
    drawn = torch.rand(tasks, width, generator=rng.torch_generator(seed, "routing"))
    return (2 * drawn - 1) * WIDTH
