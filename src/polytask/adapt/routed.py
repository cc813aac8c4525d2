"""A linear layer's low-rank update, mixed for every row from an inventory of modules.

    A in R^{H x S x d/H x r}, B in R^{H x S x r x k/H}, w in R^{rows x H x S}
    A_t[h] = sum_s w[h, s] A[h, s]   the H blocks tile the input   -> (d, r)
    B_t[h] = sum_s w[h, s] B[h, s]   the H blocks tile the output  -> (r, k)
    y = W0 x + (alpha / r) (x A_t) B_t

Poly (arXiv 2202.13914) is H = 1, MHR (arXiv 2211.03831) H > 1. Parameters are mixed, then applied:
the product of averages is not the average of products. `combine="outputs"` is the other order,
which the published code has as an option and which is defined for H = 1 only. A starts uniform in
+-sqrt(1 / (3 d)) as in mttl (the whole d, also for H > 1) or +-sqrt(H / d) as in peft; B is 0, so
that an adapted model starts as its base, bit for bit.

Rows of one task share a mixture unless it is sampled per row: then it is computed once per task
that occurs and gathered. There is no loop over tasks.

Legend: B rows, L positions, d inputs, k outputs, r rank, H blocks, S modules, G tasks that occur.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from polytask import rng
from polytask.adapt.routing import TaskTable
from polytask.adapt.rows import RowTasks
from polytask.errors import AdaptError

Combine = Literal["parameters", "outputs"]


class RoutedLoRA(nn.Module):
    """The update of one linear layer.

    Args:
        inputs, outputs: d and k of the layer; both must be multiples of the table's H.
        table: routing weights, perhaps shared with other layers.
        tasks: which task each row belongs to.
        rank, alpha: the update is scaled by alpha / rank.
        combine: 'parameters' (published default) or 'outputs' (H = 1).
        init: bound of A, 'mttl' or 'peft'.
        name: of the layer, for errors and for the seed.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        table: TaskTable,
        tasks: RowTasks,
        rank: int = 8,
        alpha: float = 1.0,
        *,
        combine: Combine = "parameters",
        init: Literal["mttl", "peft"] = "mttl",
        seed: int = 0,
        name: str = "layer",
    ) -> None:
        super().__init__()
        blocks, modules = table.blocks, table.modules_
        if inputs % blocks or outputs % blocks:
            raise AdaptError(
                f"{name}: {blocks} heads must divide its {inputs} inputs and its {outputs} "
                f"outputs; 'heads' can be {_common(inputs, outputs)}"
            )
        if combine == "outputs" and blocks > 1:
            raise AdaptError(f"{name}: outputs can be combined for 1 head only, not {blocks}")
        self.inputs, self.outputs, self.rank = inputs, outputs, rank
        self.scaling = alpha / rank
        self.combine: Combine = combine
        self.name = name
        self._table = (table,)  # in a tuple: a table that layers share has its home elsewhere
        self.row_tasks = tasks
        self.bound = math.sqrt(1 / (3 * inputs)) if init == "mttl" else math.sqrt(blocks / inputs)
        self.lora_A = nn.Parameter(torch.empty(blocks, modules, inputs // blocks, rank))
        self.lora_B = nn.Parameter(torch.empty(blocks, modules, rank, outputs // blocks))
        self.redraw(seed)

    @torch.no_grad()
    def redraw(self, seed: int) -> None:
        """A as at the start, B = 0: the layer computes what it did without adapters."""
        drawn = torch.rand(self.lora_A.shape, generator=rng.torch_generator(seed, "A", self.name))
        self.lora_A.copy_((2 * drawn - 1) * self.bound)
        self.lora_B.zero_()

    @property
    def table(self) -> TaskTable:
        """The routing weights; `Adapters.tables` owns them."""
        return self._table[0]

    @property
    def modules_(self) -> int:
        """Size of the inventory."""
        return int(self.lora_A.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., d) -> (B, ..., k), the update alone, in the type of `x`."""
        rows = self.row_tasks.rows(x.shape[0], self.name)
        flat = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), self.inputs)  # (B, L, d)
        if not len(rows.task):
            return x.new_zeros(*x.shape[:-1], self.outputs)
        if self.combine == "outputs":
            update = self._mix_outputs(flat, self.table(rows.task))
        elif self.table.mode == "own" and not rows.single:
            a = self.lora_A[0].to(x.dtype).index_select(0, rows.task)
            b = self.lora_B[0].to(x.dtype).index_select(0, rows.task)
            update = torch.bmm(torch.bmm(flat, a), b)
        elif self.table.sampled:
            a, b = self.mixed(self.table(rows.task), x.dtype)
            update = torch.bmm(torch.bmm(flat, a), b)
        else:
            a, b = self.mixed(self.table(rows.present), x.dtype)  # (G, d, r), (G, r, k)
            if rows.single:
                update = flat @ a[0] @ b[0]
            else:
                a, b = a.index_select(0, rows.place), b.index_select(0, rows.place)
                update = torch.bmm(torch.bmm(flat, a), b)
        return (update * self.scaling).reshape(*x.shape[:-1], self.outputs)

    def mixed(self, w: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Weights (B, H, S) -> A (B, d, r) and B (B, r, k)."""
        count = len(w)
        by_block = w.to(self.lora_A.dtype).transpose(0, 1)  # (H, B, S)
        a = torch.bmm(by_block, self.lora_A.flatten(2))  # (H, B, d/H * r)
        b = torch.bmm(by_block, self.lora_B.flatten(2))
        blocks = len(by_block)
        a = a.view(blocks, count, -1, self.rank).transpose(0, 1).reshape(count, -1, self.rank)
        b = b.view(blocks, count, self.rank, -1).permute(1, 2, 0, 3)
        b = b.reshape(count, self.rank, -1)
        return (a, b) if dtype is None else (a.to(dtype), b.to(dtype))

    def _mix_outputs(self, flat_BLd: Tensor, w_B1S: Tensor) -> Tensor:
        a, b = self.lora_A[0].to(flat_BLd.dtype), self.lora_B[0].to(flat_BLd.dtype)
        hidden = flat_BLd @ a.transpose(0, 1).flatten(1)  # (B, L, S * r)
        gate = w_B1S.to(flat_BLd.dtype).repeat_interleave(self.rank, 2)  # (B, 1, S * r)
        return (hidden * gate) @ b.flatten(0, 1)

    @torch.no_grad()
    def delta(self, task: int) -> Tensor:
        """(k, d): what the update adds to the weight of a linear layer for one task."""
        index = torch.tensor([task], device=self.lora_A.device)
        training = self.table.training
        self.table.eval()
        w = self.table(index)
        self.table.train(training)
        if self.combine == "outputs":
            gate = w[0, 0].to(self.lora_A)
            found = torch.einsum("s,sdr,srk->kd", gate, self.lora_A[0], self.lora_B[0])
        else:
            a, b = self.mixed(w)
            found = (a[0] @ b[0]).T
        return found * self.scaling

    @torch.no_grad()
    def average_modules(self) -> None:
        """Replace the inventory by its mean, one module (MHR-mu with `collapse`)."""
        for name in ("lora_A", "lora_B"):
            old: nn.Parameter = getattr(self, name)
            mean = old.mean(1, keepdim=True)
            setattr(self, name, nn.Parameter(mean, requires_grad=old.requires_grad))

    @property
    def untrained(self) -> bool:
        """B is still 0 everywhere: no mixture can change anything."""
        return not bool(self.lora_B.detach().any())

    def extra_repr(self) -> str:
        return f"{self.inputs} -> {self.outputs}, rank={self.rank}, modules={self.modules_}"


def _common(inputs: int, outputs: int) -> str:
    """The numbers that divide both, for an error."""
    both = math.gcd(inputs, outputs)
    found = [n for n in range(1, min(both, 512) + 1) if both % n == 0]
    return ", ".join(map(str, found[:12]))
