"""MoEViT: a vision transformer that answers one task at a time, through that task's experts.

M3ViT (Liang, Fan, Sarkar et al., NeurIPS 2022, arXiv 2210.14793): a ViT whose feed-forward is, in
every second block, a sparse mixture routed per task. Each task makes a pass of its own; a single
request runs the dense blocks, its own gate and the K experts each token chose.

    x = patches(pixels) + position                  [class token first, where there is one]
    x = x + attention(norm(x));  x = x + drop_path(feed_forward or experts(norm(x), task))
    y = head_task(norm(x))

Weights are laid out as in the usual ViT (biases everywhere, pre-norm), so dense checkpoints can be
upcycled (`polytask.models.experts.upcycle`). The paper's cross-task attention between decoders,
which gives extra outputs in training only, is not part of the model.

Legend: S images, L tokens, D width, H heads, G grid side, C channels of an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from polytask.configs import Config
from polytask.errors import ConfigError, suggestion
from polytask.models.experts.config import ExpertsConfig
from polytask.models.experts.moe import RoutingRecord, SparseMoE, moe_layers
from polytask.models.experts.routers import TaskEmbedding, TaskRouter
from polytask.rng import torch_generator

if TYPE_CHECKING:
    from pathlib import Path

HeadKind = Literal["patch", "pup", "image"]


class VisionTask(Config):
    """One task of a `MoEViT`: its name and the head that answers it.

    patch  a linear layer per patch: (S, outputs, G, G), or finer with `upscale` pixels per patch
    pup    4 convolutions with bilinear doubling, as SETR-PUP: (S, outputs, 16 G, 16 G)
    image  a linear layer on the mean patch (or the class token): (S, outputs)
    """

    name: str = Field(min_length=1)
    outputs: int = Field(gt=0)
    head: HeadKind = "patch"
    upscale: int = Field(1, gt=0, description="patch: outputs per side of a patch")
    stages: int = Field(4, gt=0, description="pup: convolutions, each doubling the resolution")


class MoEViTConfig(Config):
    """Sizes of a `MoEViT`; `experts` None is the dense model."""

    image_size: int = Field(224, gt=0)
    patch: int = Field(16, gt=0)
    channels: int = Field(3, gt=0)
    dim: int = Field(384, gt=0)
    depth: int = Field(12, gt=0)
    heads: int = Field(6, gt=0)
    mlp_ratio: float = Field(4.0, gt=0)
    eps: float = Field(1e-6, gt=0)
    class_token: bool = True
    qkv_bias: bool = True
    drop_path: float = Field(0.0, ge=0, lt=1, description="of the last block; linear from 0")
    experts: ExpertsConfig | None = ExpertsConfig(count=16, k=4, mult=1.0)
    tasks: tuple[VisionTask, ...]
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> MoEViTConfig:
        if not self.tasks:
            raise ValueError("tasks: a model needs at least one task")
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"two tasks share a name: {', '.join(names)}")
        if self.image_size % self.patch:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {self.patch}")
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by heads {self.heads}")
        if self.experts is not None:
            self.experts.layers(self.depth)
        return self

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.grid**2 + self.class_token

    @property
    def hidden(self) -> int:
        """Width of a dense feed-forward."""
        return round(self.mlp_ratio * self.dim)

    @property
    def sparse(self) -> tuple[int, ...]:
        """Blocks with experts."""
        return () if self.experts is None else self.experts.layers(self.depth)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_SLD: Tensor) -> Tensor:
        q, k, v = self.qkv(x_SLD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)  # (S, H, L, D / H)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class _FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class _Block(nn.Module):
    def __init__(self, config: MoEViTConfig, layer: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.eps)
        self.attention = _Attention(config.dim, config.heads, config.qkv_bias)
        self.norm2 = nn.LayerNorm(config.dim, config.eps)
        self.feed_forward: SparseMoE | _FeedForward
        if layer in config.sparse and config.experts is not None:
            number = config.sparse.index(layer)
            self.feed_forward = SparseMoE(config.dim, config.experts, config.names, number)
        else:
            self.feed_forward = _FeedForward(config.dim, config.hidden)
        self.layer = layer
        self.drop = config.drop_path * layer / max(1, config.depth - 1)

    def forward(
        self, x: Tensor, task: Tensor, vectors: Tensor | None, record: RoutingRecord | None
    ) -> Tensor:
        x = x + self._path(self.attention(self.norm1(x)))
        h = self.norm2(x)
        if isinstance(self.feed_forward, SparseMoE):
            h = self.feed_forward(h, task, vectors, None, record, self.layer)
        else:
            h = self.feed_forward(h)
        return x + self._path(h)

    def _path(self, h: Tensor) -> Tensor:
        """Stochastic depth: a branch of an image is left out, the others scaled up."""
        if not self.training or self.drop == 0:
            return h
        keep = 1 - self.drop
        stays = torch.rand(len(h), 1, 1, device=h.device) < keep
        return h * stays.to(h.dtype) / keep


class PupHead(nn.Module):
    """Progressive upsampling (SETR-PUP, arXiv 2012.15840): convolution, norm, ReLU, doubling, and
    a 1 x 1 convolution at the end. (S, D, G, G) to (S, outputs, 2^stages G, 2^stages G)."""

    def __init__(self, dim: int, outputs: int, stages: int = 4, width: int | None = None) -> None:
        super().__init__()
        width = width or min(256, dim)
        sizes = [dim, *[width] * stages]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(stages))
        self.last = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        out: Tensor = self.last(x)
        return out


class _PatchHead(nn.Module):
    def __init__(self, dim: int, task: VisionTask) -> None:
        super().__init__()
        self.task = task
        self.linear = nn.Linear(dim, task.outputs * task.upscale**2)

    def forward(self, grid: Tensor) -> Tensor:
        """(S, D, G, G) to (S, outputs, upscale G, upscale G)."""
        flat = self.linear(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.pixel_shuffle(flat, self.task.upscale) if self.task.upscale > 1 else flat


class MoEViT(nn.Module):
    """See the module. `forward` is one pass for one task; `run` the same without gradients."""

    def __init__(self, config: MoEViTConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        with torch.random.fork_rng(devices=[]):
            self.patches = nn.Conv2d(config.channels, dim, config.patch, config.patch)
            self.class_token = nn.Parameter(torch.zeros(dim)) if config.class_token else None
            self.position = nn.Parameter(torch.zeros(config.tokens, dim))
            self.blocks = nn.ModuleList(_Block(config, i) for i in range(config.depth))
            self.norm = nn.LayerNorm(dim, config.eps)
            self.task_embedding: TaskEmbedding | None = None
            experts = config.experts
            if experts is not None and experts.router == "conditioned":
                self.task_embedding = TaskEmbedding(len(config.tasks), experts.task_dim)
            self.heads = nn.ModuleList(_head(task, dim) for task in config.tasks)
        self.fill()

    @torch.no_grad()
    def fill(self) -> None:
        """First values as a function of (seed, name; task name for heads and gates): truncated
        normal of deviation .02 for weights, as in ViT and DeiT, the head's included; zero biases.
        Convolutions of `PupHead` get deviation sqrt(2 / fan in)."""
        seed, names = self.config.seed, self.config.names
        for prefix, module in self.named_modules():
            if isinstance(module, TaskRouter):
                module.fill(seed, prefix)
                continue
            if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
                continue
            key = prefix
            if prefix.startswith("heads."):
                number, _, rest = prefix.removeprefix("heads.").partition(".")
                key = f"heads.{names[int(number)]}.{rest}"
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                elif parameter.dim() and not isinstance(module, nn.ParameterList):
                    std = 0.02
                    if isinstance(module, nn.Conv2d) and prefix.startswith("heads."):
                        std = (2 / parameter[0].numel()) ** 0.5
                    draw = torch_generator(seed, "init", f"{key}.{name}")
                    nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std, generator=draw)

    # -- passes

    def task_id(self, task: str | int) -> int:
        """The number of a task; `ConfigError` with the nearest name."""
        names = self.config.names
        if isinstance(task, str):
            if task not in names:
                raise ConfigError(f"no task '{task}'.{suggestion(task, names)}")
            return names.index(task)
        if not 0 <= task < len(names):
            raise ConfigError(f"no task number {task}: there are {len(names)}")
        return task

    def features(
        self,
        pixels: Tensor,
        task: str | int | Tensor,
        record: RoutingRecord | None = None,
    ) -> Tensor:
        """(S, L, D) after the final norm.

        Args:
            pixels: (S, channels, image_size, image_size), floating.
            task: one for all images, or a task id for each (S,).
            record: gets what the routers said.
        """
        ids = task
        if not isinstance(ids, Tensor):
            ids = torch.full((len(pixels),), self.task_id(ids), device=pixels.device)
        x, vectors = self._embedded(pixels), self._vectors()
        for block in self.blocks:
            x = block(x, ids, vectors, record)
        out: Tensor = self.norm(x)
        return out

    def features_by_task(
        self,
        pixels: Tensor,
        tasks: Sequence[str | int],
        record: RoutingRecord | None = None,
    ) -> list[Tensor]:
        """`features` of the same images for several tasks: what training needs.

        Blocks before the first one with experts do not know the task and run once; the others run
        on all passes together. A model whose trunk never learns the task gives one result for all.
        """
        ids = [self.task_id(task) for task in tasks]
        experts = self.config.experts
        if experts is None or experts.router == "blind":
            return [self.features(pixels, ids[0], record)] * len(ids)
        first = self.config.sparse[0]
        x, vectors = self._embedded(pixels), self._vectors()
        one = torch.zeros(len(x), dtype=torch.long, device=x.device)
        for block in self.blocks[:first]:
            x = block(x, one, vectors, None)
        x = x.repeat(len(ids), 1, 1)
        task = torch.tensor(ids, device=x.device).repeat_interleave(len(pixels))
        for block in self.blocks[first:]:
            x = block(x, task, vectors, record)
        return list(self.norm(x).chunk(len(ids)))

    def _vectors(self) -> Tensor | None:
        return None if self.task_embedding is None else self.task_embedding()

    def _embedded(self, pixels: Tensor) -> Tensor:
        """(S, L, D) tokens of images."""
        config = self.config
        wanted = (config.channels, config.image_size, config.image_size)
        if tuple(pixels.shape[1:]) != wanted:
            raise ConfigError(f"pixels are {tuple(pixels.shape)}, expected (images, *{wanted})")
        x: Tensor = self.patches(pixels).flatten(2).transpose(1, 2)  # (S, G G, D)
        if self.class_token is not None:
            x = torch.cat((self.class_token.to(x.dtype).expand(len(x), 1, -1), x), 1)
        return x + self.position

    def forward(
        self, pixels: Tensor, task: str | int, record: RoutingRecord | None = None
    ) -> Tensor:
        """The task's output from a pass of its own; shapes as in `VisionTask`."""
        number = self.task_id(task)
        x = self.features(pixels, number, record)
        return self.answer(x, number)

    def answer(self, x_SLD: Tensor, task: str | int) -> Tensor:
        """A task's head on features."""
        number = self.task_id(task)
        head, first = self.heads[number], int(self.config.class_token)
        if self.config.tasks[number].head == "image":
            pooled = x_SLD[:, 0] if self.config.class_token else x_SLD.mean(1)
            flat: Tensor = head(pooled)
            return flat
        side = self.config.grid
        patches = x_SLD[:, first:].transpose(1, 2)
        grid = patches.reshape(len(patches), -1, side, side)  # (S, D, G, G)
        out: Tensor = head(grid)
        return out

    @torch.no_grad()
    def run(self, pixels: Tensor, task: str | int, record: RoutingRecord | None = None) -> Tensor:
        """`forward` in evaluation mode (no noise on gates), without gradients."""
        training = self.training
        self.eval()
        try:
            found: Tensor = self(pixels, task, record)
            return found
        finally:
            self.train(training)

    def balance(self, record: RoutingRecord) -> Tensor:
        """() the weighted balance loss of a pass, to be added to the task's loss."""
        experts = self.config.experts
        if experts is None:
            return self.position.new_zeros(())
        return experts.balance * record.balance(len(self.config.tasks), experts).sum()

    @property
    def sparse_layers(self) -> dict[str, SparseMoE]:
        """Layers of experts by name."""
        return moe_layers(self)

    # -- making and keeping

    @classmethod
    def from_pretrained(cls, source: Any, tasks: Sequence[VisionTask], **options: Any) -> MoEViT:
        """Upcycle a dense ViT (a Hugging Face folder, id or model, or a timm-style state dict);
        see `polytask.models.experts.upcycle.upcycle`."""
        from polytask.models.experts.upcycle import upcycle

        return upcycle(source, tasks, **options)

    def export(self, folder: Path, task: str, used: Sequence[Sequence[int]] | None = None) -> Path:
        """Write one task's model; see `polytask.models.experts.saving.export_task`."""
        from polytask.models.experts.saving import export_task

        return export_task(self, folder, task, used)


def _head(task: VisionTask, dim: int) -> nn.Module:
    if task.head == "pup":
        return PupHead(dim, task.outputs, task.stages)
    return nn.Linear(dim, task.outputs) if task.head == "image" else _PatchHead(dim, task)
