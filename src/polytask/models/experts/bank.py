"""The experts of a layer, and three ways to run them that give the same numbers.

expert   sort the (token, slot) pairs by expert; for every expert in turn gather its queue, run it
         once, and put p * E(x) back at each pair's own place; sums over slots come last. Only one
         expert is needed at a time, and the order of experts cannot change a result.
token    every token runs through its experts one by one: the textbook order
dense    every expert on every token, masked: what 'sparse' must not cost

Experts are modules of their own, so one that no token reached has no gradient at all (None) and
AdamW leaves it alone; optimisers that decay weights without looking at gradients shrink it.

Legend: M tokens, D width, N experts, K chosen ones, P pairs that are run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from polytask.errors import ConfigError
from polytask.models.experts.routers import RouterOutput

Order = Literal["expert", "token", "dense"]


class Expert(nn.Module):
    """down(GELU(up x)), or down(SiLU(gate x) * up x) when gated."""

    def __init__(self, dim: int, hidden: int, gated: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.gated = gated
        self.up = nn.Linear(dim, hidden * (2 if gated else 1), bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.gated:
            gate, h = h.chunk(2, -1)
            h = F.silu(gate) * h
        else:
            h = F.gelu(h)
        out: Tensor = self.down(h)
        return out


class Experts(nn.ModuleDict):
    """N experts by number. `ids`: those that are here (an export has fewer than N)."""

    def __init__(
        self,
        count: int,
        dim: int,
        hidden: int,
        gated: bool = False,
        bias: bool = True,
        ids: Sequence[int] | None = None,
    ) -> None:
        chosen = range(count) if ids is None else sorted(set(ids))
        super().__init__({str(i): Expert(dim, hidden, gated, bias) for i in chosen})
        self.count = count
        self.dim = dim
        self.hidden = hidden
        self.gated = gated

    @property
    def ids(self) -> tuple[int, ...]:
        """Numbers of the experts that are here."""
        return tuple(int(i) for i in self.keys())

    @contextmanager
    def using(self, expert: int) -> Iterator[nn.Module]:
        """An expert, for as long as it is needed (subclasses load it and let it go)."""
        if str(expert) not in self:
            raise ConfigError(
                f"expert {expert} is not here (there are {', '.join(map(str, self.ids))}): the "
                "model was exported without it; export again with the data it is to be used on"
            )
        yield self[str(expert)]

    def upcoming(self, experts: Sequence[int]) -> None:
        """Told which experts run next, in order; subclasses may fetch them ahead."""

    def forward(self, x_MD: Tensor, routed: RouterOutput, order: Order = "expert") -> Tensor:  # type: ignore[override]
        """(M, D) in the type of x: sum over kept slots of weight * E_index(x)."""
        if order == "expert":
            return self._by_expert(x_MD, routed)
        if order == "token":
            return self._by_token(x_MD, routed)
        return self._dense(x_MD, routed)

    def _by_expert(self, x: Tensor, routed: RouterOutput) -> Tensor:
        tokens, slots = routed.index.shape
        queue = routed.index.reshape(-1)  # (M K,)
        if routed.kept is not None:
            queue = queue.masked_fill(~routed.kept.reshape(-1), self.count)
        order = queue.argsort(stable=True)
        counts = torch.bincount(queue, minlength=self.count + 1).tolist()
        run = len(queue) - counts[self.count]
        pairs = order[:run]
        rows = self._gather(x, pairs, slots)  # (P, D), sorted by expert
        parts, start = [], 0
        used = [e for e, n in enumerate(counts[: self.count]) if n]
        self.upcoming(used)
        for expert in used:
            stop = start + counts[expert]
            with self.using(expert) as module:
                parts.append(module(rows[start:stop]))
            start = stop
        if not parts:
            return torch.zeros_like(x)
        weight = routed.weight.reshape(-1)[pairs]
        weighted = torch.cat(parts).float()
        if weighted.requires_grad or weight.requires_grad:
            weighted = weighted * weight[:, None]
        else:
            weighted *= weight[:, None]
        # Every pair has a place of its own, so nothing is added up in an order left to chance.
        if run == len(queue) and not weighted.requires_grad:
            back = torch.empty_like(pairs)
            back[pairs] = torch.arange(run, device=x.device)
            places = weighted.index_select(0, back)
        else:  # whose gradient is a gather
            places = weighted.new_zeros(tokens * slots, self.dim).index_copy_(0, pairs, weighted)
        return places.view(tokens, slots, self.dim).sum(1).to(x.dtype)

    @staticmethod
    def _gather(x: Tensor, pairs: Tensor, slots: int) -> Tensor:
        """Rows of the pairs' tokens. On an accelerator, where the gradient of a gather adds in
        any order, over a copy per slot: then every row is gathered once."""
        if x.requires_grad and x.device.type != "cpu":
            copies = x[:, None].expand(-1, slots, -1).reshape(-1, x.shape[1])
            return copies.index_select(0, pairs)
        return x.index_select(0, pairs // slots)

    def _by_token(self, x: Tensor, routed: RouterOutput) -> Tensor:
        rows = []
        for m in range(len(x)):
            total = x.new_zeros(self.dim, dtype=torch.float32)
            for slot in range(routed.index.shape[1]):
                if routed.kept is None or bool(routed.kept[m, slot]):
                    with self.using(int(routed.index[m, slot])) as module:
                        total = total + module(x[m]).float() * routed.weight[m, slot]
            rows.append(total)
        return torch.stack(rows).to(x.dtype) if rows else torch.zeros_like(x)

    def _dense(self, x: Tensor, routed: RouterOutput) -> Tensor:
        weight = routed.weight if routed.kept is None else routed.weight * routed.kept
        full = torch.zeros_like(routed.probability).scatter(1, routed.index, weight)  # (M, N)
        total = torch.zeros_like(x, dtype=torch.float32)
        for expert in self.ids:
            with self.using(expert) as module:
                total = total + module(x).float() * full[:, expert : expert + 1]
        return total.to(x.dtype)
