"""Bottleneck adapters and what is made of several of them.

    u_s(x) = W_up relu(W_down x + b_down) + b_up        without any residual

Pfeiffer's placement, at the normalisation LN after a feed-forward of a post-norm encoder: with
h = the feed-forward's output and x_in = its input, s = h + x_in, the adapter reads LN(s) and the
layer puts out LN(s + u): the same LN twice, the residual taken before it. At any other module the
adapter reads and follows its output: y + u(y).

Stage 1 trains one adapter per source task. Stage 2 freezes them, runs all in parallel and combines
their up-projections (the residual is added once, never inside u_s):

    ScaLearn (arXiv 2310.01217)     sum_s omega_s * u_s, omega a vector (or a number) per source
    AdapterFusion (Pfeiffer 2021)   sum_s softmax_s(W_q x . W_k u_s) W_v u_s

Legend: N tokens of all rows, S sources, T targets, d width, m width of the bottleneck, B rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from polytask import rng
from polytask.errors import AdaptError

InitUp = Literal["zero", "bert"]


class AdapterBank(nn.Module):
    """S bottleneck adapters at one site.

    Bottlenecks may differ in width: narrow ones are padded with zeros, which relu keeps at 0, so
    the padding adds nothing.

    Args:
        names: of the adapters.
        width: d.
        bottleneck: m, d over the reduction factor.
        init_up: 'zero' starts as the base bit for bit, 'bert' draws N(0, .02) as the published
            code does. Down-projections are N(0, .02) in both.
    """

    def __init__(
        self,
        names: Sequence[str],
        width: int,
        bottleneck: int,
        init_up: InitUp = "zero",
        seed: int = 0,
        site: str = "site",
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        count = len(self.names)
        if not count:
            raise AdaptError(f"{site}: an adapter bank needs at least one adapter")

        def drawn(part: str, *shape: int) -> Tensor:
            draws = [
                torch.randn(shape, generator=rng.torch_generator(seed, part, site, name))
                for name in self.names
            ]
            return 0.02 * torch.stack(draws)

        self.down = nn.Parameter(drawn("down", bottleneck, width))  # (S, m, d)
        self.down_bias = nn.Parameter(torch.zeros(count, bottleneck))
        up = drawn("up", width, bottleneck) if init_up == "bert" else None
        self.up = nn.Parameter(torch.zeros(count, width, bottleneck) if up is None else up)
        self.up_bias = nn.Parameter(torch.zeros(count, width))

    @property
    def width(self) -> int:
        return int(self.up.shape[1])

    @property
    def bottleneck(self) -> int:
        return int(self.down.shape[1])

    def hidden(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., S, m), after the relu."""
        w, b = self.down.to(x.dtype), self.down_bias.to(x.dtype)
        h = functional.linear(x, w.flatten(0, 1), b.flatten())
        return functional.relu(h.view(*h.shape[:-1], len(self.names), self.bottleneck))

    def ups(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., S, d): what every adapter adds, without residual."""
        h = self.hidden(x)
        flat = h.reshape(-1, *h.shape[-2:]).transpose(0, 1)  # (S, N, m)
        u = torch.baddbmm(
            self.up_bias.to(x.dtype)[:, None], flat, self.up.to(x.dtype).transpose(1, 2)
        )
        return u.transpose(0, 1).reshape(*h.shape[:-1], self.width)

    def own(self, x: Tensor, index: Tensor, single: bool = False) -> Tensor:
        """(B, ..., d) -> (B, ..., d): row b through adapter index[b] alone."""
        if single:
            first = index[0]
            h = functional.linear(
                x, self.down[first].to(x.dtype), self.down_bias[first].to(x.dtype)
            )
            h = functional.relu(h)
            return functional.linear(h, self.up[first].to(x.dtype), self.up_bias[first].to(x.dtype))
        flat = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])  # (B, L, d)

        def pick(parameter: Tensor) -> Tensor:
            return parameter.to(x.dtype).index_select(0, index)

        h = torch.baddbmm(pick(self.down_bias)[:, None], flat, pick(self.down).transpose(1, 2))
        h = functional.relu(h)
        u = torch.baddbmm(pick(self.up_bias)[:, None], h, pick(self.up).transpose(1, 2))
        return u.reshape(x.shape)

    @torch.no_grad()
    def set(self, name: str, parts: dict[str, Tensor]) -> None:
        """Copy an adapter in ('down' (m, d), 'down_bias', 'up' (d, m), 'up_bias')."""
        index, narrow = self.names.index(name), int(parts["down"].shape[0])
        if parts["down"].shape[1] != self.width:
            raise AdaptError(
                f"adapter '{name}' is {parts['down'].shape[1]} wide and the model {self.width}"
            )
        for part in ("down", "down_bias", "up"):
            getattr(self, part)[index].zero_()
        self.down[index, :narrow] = parts["down"].to(self.down)
        self.down_bias[index, :narrow] = parts["down_bias"].to(self.down)
        self.up[index, :, :narrow] = parts["up"].to(self.up)
        self.up_bias[index] = parts["up_bias"].to(self.up)

    def get(self, name: str) -> dict[str, Tensor]:
        """One adapter's tensors; zero padding is left on."""
        index = self.names.index(name)
        parts = ("down", "down_bias", "up", "up_bias")
        return {part: getattr(self, part).detach()[index].clone() for part in parts}


class ScaledSum(nn.Module):
    """ScaLearn: sum_s omega[t, s] * u_s.

    omega starts as N(scale / S, .001), so the scales sum to `scale` = 2. Dropout acts on omega
    itself (entries vanish, the rest is divided by the keep rate), not on activations. Nothing is
    normalised; `normalise` 'mean' and 'softmax' are the paper's ablations.

    Args:
        targets, sources: T and S.
        width: d for a scale per feature, 1 for a single one ('uniform').
        seed, key: of the draw.
    """

    def __init__(
        self,
        targets: int,
        sources: int,
        width: int,
        *,
        scale: float = 2.0,
        dropout: float = 0.3,
        normalise: Literal["none", "mean", "softmax"] = "none",
        seed: int = 0,
        key: str = "",
    ) -> None:
        super().__init__()
        generator = rng.torch_generator(seed, "omega", key)
        noise = torch.randn(targets, sources, width, generator=generator)
        self.omega = nn.Parameter(scale / sources + 0.001 * noise)
        self.dropout = dropout
        self.normalise = normalise

    def scales(self) -> Tensor:
        """(T, S, d or 1) as they are applied now."""
        omega: Tensor = self.omega
        if self.normalise == "softmax":
            omega = omega.softmax(1)
        elif self.normalise == "mean":
            omega = omega / omega.sum(1, keepdim=True)
        return functional.dropout(omega, self.dropout, self.training)

    def forward(self, bank: AdapterBank, x: Tensor, index: Tensor, single: bool) -> Tensor:
        """(B, ..., d) -> (B, ..., d): the scaled sum for the target `index` (B,) of each row."""
        omega = self.scales().to(x.dtype)
        if single:
            # Scales move into the up-projections: one product, no (tokens, S, d) in between.
            own = omega[index[0]]  # (S, d or 1)
            up = bank.up.to(x.dtype) * own[:, :, None]  # (S, d, m)
            bias = (bank.up_bias.to(x.dtype) * own).sum(0)
            return functional.linear(
                bank.hidden(x).flatten(-2), up.transpose(0, 1).flatten(1), bias
            )
        rows = omega.index_select(0, index)  # (B, S, d or 1)
        rows = rows.reshape(len(index), *[1] * (x.ndim - 2), *rows.shape[1:])
        return (bank.ups(x) * rows).sum(-2)


class Fusion(nn.Module):
    """AdapterFusion (arXiv 2005.00247), the baseline: attention over the adapters' outputs.

    Query the adapter's input, keys and values the up-projections; W_v starts as the identity
    (1e-6 off the diagonal), W_q and W_k as N(0, .02); dropout .1 on the scores. The published
    trainer adds `regularizer()` to the loss.
    """

    def __init__(self, targets: int, width: int, *, dropout: float = 0.1, seed: int = 0) -> None:
        super().__init__()

        def drawn(part: str) -> Tensor:
            generator = rng.torch_generator(seed, "fusion", part)
            return 0.02 * torch.randn(targets, width, width, generator=generator)

        self.query = nn.Parameter(drawn("query"))
        self.key = nn.Parameter(drawn("key"))
        self.query_bias = nn.Parameter(torch.zeros(targets, width))
        self.key_bias = nn.Parameter(torch.zeros(targets, width))
        eye = torch.full((width, width), 1e-6).fill_diagonal_(1.0)
        self.value = nn.Parameter(eye.repeat(targets, 1, 1))
        self.dropout = dropout

    def forward(self, bank: AdapterBank, x: Tensor, index: Tensor, single: bool) -> Tensor:
        """(B, ..., d) -> (B, ..., d)."""
        ups = bank.ups(x)  # (B, ..., S, d)
        flat_x = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
        flat_u = ups.reshape(x.shape[0], math.prod(ups.shape[1:-1]), x.shape[-1])  # (B, L * S, d)

        def through(flat: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            w = weight.to(x.dtype)
            if single:
                return functional.linear(
                    flat, w[index[0]], None if bias is None else bias[index[0]]
                )
            out = torch.bmm(flat, w.index_select(0, index).transpose(1, 2))
            return out if bias is None else out + bias.index_select(0, index)[:, None]

        q = through(flat_x, self.query, self.query_bias).reshape(x.shape)
        k = through(flat_u, self.key, self.key_bias).reshape(ups.shape)
        v = through(flat_u, self.value, None).reshape(ups.shape)
        scores = (k @ q.unsqueeze(-1)).squeeze(-1)  # (B, ..., S), unscaled as published
        scores = functional.dropout(scores, self.dropout, self.training)
        mixed: Tensor = (scores.softmax(-1).unsqueeze(-2) @ v).squeeze(-2)
        return mixed

    def regularizer(self) -> Tensor:
        """0.01 * sum over targets of ||I - W_v||^2."""
        eye = torch.eye(self.value.shape[-1], device=self.value.device)
        return 0.01 * (eye - self.value).square().sum()


class BottleneckSite(nn.Module):
    """What stands at one site: a bank, and what combines it (None: each row its task's adapter)."""

    def __init__(self, bank: AdapterBank, combine: ScaledSum | Fusion | None, name: str) -> None:
        super().__init__()
        self.bank = bank
        self._combine = (combine,)  # in a tuple: scales that layers share have their home elsewhere
        self.name = name

    @property
    def combine(self) -> ScaledSum | Fusion | None:
        """What combines the bank; `Adapters.tables` owns it."""
        return self._combine[0]

    def forward(self, x: Tensor, index: Tensor, single: bool) -> Tensor:
        """(B, ..., d) adapter input -> (B, ..., d) what is added, residual left out."""
        if self.combine is None:
            return self.bank.own(x, index, single)
        found: Tensor = self.combine(self.bank, x, index, single)
        return found
