"""Which experts a token goes to: gates that know the task, and the choice of K among N.

    clean = x W_t                        (multi_gate: a matrix per task)
    clean = x W_x + e_t W_e              (conditioned: e_t = LN(MLP(onehot_t)))
    noisy = clean + N(0, 1) s / N        (training only)
    p     = softmax(noisy)               (over all experts, in float32)
    index = top K of p;  weight = p[index], not divided by their sum ('raw')

Source: M3ViT (arXiv 2210.14793) and V-MoE (Riquelme et al. 2021, arXiv 2106.05974). Dividing the
top K by their sum ('renormalised') is a softmax over the chosen logits alone: another gate, whose
outputs are larger by 1 / sum of the top K.

Legend: S sequences, L length, M = S * L tokens, D width, N experts, K chosen ones, T tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polytask.errors import ConfigError
from polytask.models.experts.config import ExpertsConfig, Gate
from polytask.rng import torch_generator


@dataclass(frozen=True)
class RouterOutput:
    """Where M tokens go. Numbers are float32 whatever the model's type.

    kept is False for pairs that are not run: padding, beyond an expert's capacity, or of a gate
    that is too small; `overflow` counts those beyond capacity.
    """

    index: Tensor  # (M, K) int64
    weight: Tensor  # (M, K)
    kept: Tensor | None  # (M, K) bool; None: all
    clean: Tensor  # (M, N) logits without noise
    noisy: Tensor  # (M, N) the logits that were ranked
    probability: Tensor  # (M, N)
    noise_std: float  # deviation of the noise that was added; 0: none
    task: Tensor | None  # (M,) int64
    valid: Tensor | None  # (M,) bool, False at padding; None: all
    overflow: Tensor  # () int64

    def counts(self) -> Tensor:
        """(N,) int64 how many pairs each expert runs."""
        chosen = self.index if self.kept is None else self.index[self.kept]
        return torch.bincount(chosen.reshape(-1), minlength=self.probability.shape[1])


def select_experts(
    clean_MN: Tensor,
    k: int,
    *,
    gate: Gate = "raw",
    noise_std: float = 0.0,
    allowed: Tensor | None = None,
    present: Tensor | None = None,
    capacity: float | None = None,
    min_gate: float = 0.0,
    task: Tensor | None = None,
    valid: Tensor | None = None,
) -> RouterOutput:
    """Choose K experts a token from logits.

    Args:
        clean_MN: logits; float16 and bfloat16 are raised to float32 first.
        k: experts per token.
        gate: 'raw' or 'renormalised' weights (see the module).
        noise_std: deviation of normal noise on the logits, from torch's global generator.
        allowed: (M or 1, N) bool, experts that exist for a token: others have probability 0.
        present: (N,) bool, experts that can be run; the others keep their probability, so the
            weights of those that are chosen do not change.
        capacity: an expert takes at most ceil(capacity * valid tokens * k / N) pairs, those with
            the largest weights first.
        min_gate: pairs with at most this weight are not run.
        task: (M,) kept for statistics.
        valid: (M,) bool; padding goes nowhere and counts nowhere.

    Raises:
        ConfigError: k is larger than the number of experts to choose from.
    """
    clean = clean_MN.float()
    experts = clean.shape[1]
    available = experts if present is None else int(present.sum())
    if not 1 <= k <= available:
        raise ConfigError(f"k = {k} experts per token, and there are {available} to choose from")
    noisy = clean + torch.randn_like(clean) * noise_std if noise_std > 0 else clean
    if allowed is not None:
        noisy = noisy.masked_fill(~allowed, float("-inf"))
    probability = noisy.softmax(-1)  # (M, N)
    ranked = noisy if present is None else noisy.masked_fill(~present, float("-inf"))
    index = ranked.topk(k, dim=-1).indices  # by logits: tiny probabilities may round to equal
    weight = probability.gather(1, index)  # (M, K)
    if gate == "renormalised":
        weight = weight / weight.sum(-1, keepdim=True)
    kept = None
    if valid is not None:
        kept = valid[:, None].expand_as(index)
    if min_gate > 0:
        large = weight > min_gate
        kept = large if kept is None else kept & large
    overflow = torch.zeros((), dtype=torch.int64, device=clean.device)
    if capacity is not None:
        tokens = len(clean) if valid is None else int(valid.sum())
        room = math.ceil(capacity * tokens * k / experts)
        within = _within_capacity(index, weight.detach(), kept, experts, room)
        before = torch.ones_like(within) if kept is None else kept
        overflow = (before & ~within).sum()
        kept = before & within
    return RouterOutput(
        index, weight, kept, clean, noisy, probability, noise_std, task, valid, overflow
    )


def _within_capacity(
    index: Tensor, weight: Tensor, kept: Tensor | None, experts: int, room: int
) -> Tensor:
    """(M, K) bool: among the `room` largest weights of its expert (earlier tokens win ties)."""
    flat = index.reshape(-1)
    if kept is not None:
        flat = flat.masked_fill(~kept.reshape(-1), experts)  # these take no place
    by_weight = weight.reshape(-1).argsort(descending=True, stable=True)
    order = by_weight[flat[by_weight].argsort(stable=True)]  # by expert, then by weight
    counts = torch.bincount(flat, minlength=experts + 1)
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(flat)
    rank[order] = torch.arange(len(flat), device=flat.device) - first[flat[order]]
    return (rank < room).view_as(index)


class TaskEmbedding(nn.Module):
    """e_t = LN(W2 GELU(W1 onehot_t)), one row per task: what the conditioned router also sees."""

    def __init__(self, tasks: int, dim: int) -> None:
        super().__init__()
        self.first = nn.Linear(tasks, dim)
        self.second = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self) -> Tensor:
        """(T, dim)."""
        hidden = nn.functional.gelu(self.first.weight.T + self.first.bias)
        found: Tensor = self.norm(self.second(hidden))
        return found


class TaskRouter(nn.Module):
    """Gates of one layer. `gates` has a matrix per task (multi_gate) or one for all.

    The matrices start uniform within 1 / sqrt(N): what Kaiming's rule gives on a (D, N) tensor,
    which the authors' code uses (`start: width` takes 1 / sqrt(D), the rule on (N, D)). A task's
    matrix depends on the seed and the task's name alone.
    """

    def __init__(self, dim: int, config: ExpertsConfig, tasks: Sequence[str], layer: int = 0):
        super().__init__()
        self.config = config
        self.names = tuple(tasks)
        if not self.names:
            raise ConfigError("a router needs at least one task")
        self.dim = dim
        wide = dim + (config.task_dim if config.router == "conditioned" else 0)
        gates = len(self.names) if config.router == "multi_gate" else 1
        self.gates = nn.ParameterList(torch.zeros(wide, config.count) for _ in range(gates))
        self.present: Tensor | None
        self.register_buffer("present", None, persistent=False)
        if config.kept is not None:
            present = torch.zeros(config.count, dtype=torch.bool)
            present[list(config.kept[layer])] = True
            self.present = present
        self.fill(0, "router")

    @torch.no_grad()
    def fill(self, seed: int, prefix: str) -> None:
        """The first values, a function of (seed, prefix, task name)."""
        bound = {
            "experts": self.config.count**-0.5, "width": self.dim**-0.5, "zero": 0.0
        }[self.config.start]  # fmt: skip
        names = self.names if self.config.router == "multi_gate" else ("",)
        for gate, name in zip(self.gates, names, strict=True):
            draw = torch_generator(seed, "init", prefix, name)
            gate.copy_((2 * torch.rand(gate.shape, generator=draw) - 1) * bound)

    def forward(
        self,
        x_SLD: Tensor,
        task_S: Tensor | None,
        vectors: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> RouterOutput:
        """Choose experts for S * L tokens.

        Args:
            x_SLD: tokens.
            task_S: (S,) task id of each sequence; None where the router is blind.
            vectors: (T, task_dim) of `TaskEmbedding` (conditioned).
            valid: (S, L) bool, False at padding.
        """
        config = self.config
        sequences, length, _ = x_SLD.shape
        logits = self._logits(x_SLD, task_S, vectors).reshape(-1, config.count)
        tokens = None if task_S is None else task_S.repeat_interleave(length)
        return select_experts(
            logits,
            config.k,
            gate=config.gate,
            noise_std=self.noise_std if self.training else 0.0,
            allowed=self._allowed(tokens),
            present=self.present,
            capacity=config.capacity,
            min_gate=0.0 if self.training else config.min_gate,
            task=tokens,
            valid=None if valid is None else valid.reshape(sequences * length),
        )

    @property
    def noise_std(self) -> float:
        """s / N, or s / (experts of a task) where tasks are restricted to ranges."""
        return self.config.noise / (self.config.per_task or self.config.count)

    def _logits(self, x: Tensor, task: Tensor | None, vectors: Tensor | None) -> Tensor:
        kind = self.config.router
        if kind == "blind":
            return torch.matmul(x, self.gates[0].to(x.dtype))
        if task is None:
            raise ConfigError(f"a {kind} router needs to know the task of every sequence")
        if kind == "conditioned":
            assert vectors is not None, "the trunk hands in the task embeddings"
            # [x ; e_t] W as a sum: e_t W_e is made once per task, not once per token.
            own, shared = self.gates[0][self.dim :], self.gates[0][: self.dim]
            offset = (vectors.float() @ own.float())[task]  # (S, N)
            logits: Tensor = torch.matmul(x, shared.to(x.dtype)).float() + offset[:, None]
            return logits
        if len(self.gates) == 1 or (x.device.type == "cpu" and bool((task == task[0]).all())):
            gate = self.gates[int(task[0]) if len(self.gates) > 1 else 0]
            return torch.matmul(x, gate.to(x.dtype))
        present = torch.unique(task)
        stacked = torch.stack([self.gates[int(t)] for t in present])
        own = stacked[torch.searchsorted(present, task)]  # (S, D, N)
        return torch.bmm(x, own.to(x.dtype))

    def _allowed(self, task_M: Tensor | None) -> Tensor | None:
        size, span = self.config.per_task, self.config.span
        if span is not None:
            place = torch.arange(self.config.count, device=self.gates[0].device)
            return ((place >= span[0]) & (place < span[1]))[None]
        if size is None or self.config.router == "blind":
            return None
        assert task_M is not None
        table = task_ranges(self.config.count, size, len(self.names)).to(task_M.device)
        return table[task_M]


def task_ranges(experts: int, size: int, tasks: int) -> Tensor:
    """(T, N) bool: `size` experts for each task, ranges evenly spaced over all experts.

    The authors' code adds the starts up, so that with three tasks or more the last ranges lie
    beyond the last expert, and with a gate per task adds them to indices over all experts; here
    task t starts at round(t (N - size) / (T - 1)) and the gate is restricted to its range.
    """
    step = (experts - size) / max(1, tasks - 1)
    start = torch.tensor([round(t * step) for t in range(tasks)])
    place = torch.arange(experts)
    return (place >= start[:, None]) & (place < start[:, None] + size)
