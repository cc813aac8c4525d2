"""The generative transformer over single spikes (Antoniades et al., ICLR 2024, arXiv 2311.00136).

A window of population activity is a sentence: [SOS, (neuron, time), ..., EOS]. Its tokens look at
the window before, at video and at behaviour, then at each other, and say which neuron fires next
and when. The same state, averaged, answers behaviour; its projection is compared with those of the
other modalities.

    x = causal blocks on the current tokens
    x looks at past, video, groups of variables in the order of the configuration
    x = causal blocks;   id and time of the next spike = two linear maps of x

Deviations from the published code are fields of `NeuroformerConfig`; what is the same on purpose:
projections, norms and their places, initial values N(0, 0.02), embeddings shared by current and
past tokens. The code builds but never uses a final norm after the trunk; there is none here.

Legend: B windows, L current tokens, P past tokens, E width, N ids, D times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from polytask.errors import DataError
from polytask.models.cache import KVCache
from polytask.models.init import initialise
from polytask.models.neuro.batch import NeuroBatch
from polytask.models.neuro.config import NeuroformerConfig
from polytask.models.neuro.stack import CrossModalStack, Memory, Trace, blocks, self_attend
from polytask.models.neuro.stems import ScalarEncoder, SpikeStem, VideoPatches, row_code


@dataclass
class NeuroOutput:
    """What a forward pass gives; `hidden` is the last state, `early` that before any modality."""

    ids: Tensor  # (B, L, N) logits of the next id
    times: Tensor  # (B, L, D) logits of the next time
    hidden: Tensor  # (B, L, E)
    early: Tensor  # (B, L, E)
    valid: Tensor  # (B, L) bool, False at padding
    memories: dict[str, Memory]
    variables: dict[str, Tensor]  # name -> (B, S, E) tokens of one variable
    trace: Trace = field(default_factory=Trace)


class NeuroformerModel(nn.Module):
    """See the module's text. `seed` decides the initial values by (seed, parameter name)."""

    def __init__(self, config: NeuroformerConfig, seed: int = 0) -> None:
        super().__init__()
        c = self.config = config
        self.table = nn.Embedding(c.pad + 1, c.dim)
        self.now = SpikeStem(c.block, c.dim, c.time_code, c.dropout)
        self.past = SpikeStem(c.past_block, c.dim, c.time_code, c.dropout)
        order = [("past", c.past_layers)]
        self.video: VideoPatches | None = None
        if c.video is not None:
            self.video = VideoPatches(c.video, c.dim, c.video_positions)
            depth = c.video.encoder_layers
            depth = c.video.layers if depth is None else depth
            self.video_encoder = blocks(depth, c.dim, c.heads, c.dropout)
            order.append(("video", c.video.layers))
        self.scalars = nn.ModuleDict(
            {name: ScalarEncoder(c.dim, c.dropout, c.scalar_norm) for name in c.variables}
        )
        order += [(group.name, c.group_layers(group)) for group in c.groups]
        depth = c.layers if c.encoder_layers is None else c.encoder_layers
        self.encoder = blocks(depth, c.dim, c.heads, c.dropout)
        self.stack = CrossModalStack(order, c.layers, c.dim, c.heads, c.dropout)
        self.head_id = nn.Linear(c.dim, c.pad + 1, bias=False)
        self.head_time = nn.Linear(c.dim, c.time_pad + 1, bias=False)
        self.heads = nn.ModuleDict(
            {
                name: nn.Linear(c.dim, target.classes or 1, bias=target.kind == "regression")
                for name, target in c.targets.items()
            }
        )
        self.project = nn.Linear(c.dim, c.dim, bias=False) if c.align else None
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.init_std = {"weight": 0.02}  # type: ignore[assignment]
        initialise(self, seed)

    # Whole windows -------------------------------------------------------------------------------

    def forward(self, batch: NeuroBatch, trace: Trace | None = None) -> NeuroOutput:
        """Logits at every token of `batch.ids[:, :-1]`, from that token and earlier ones only."""
        ids, times = batch.ids[:, :-1], batch.times[:, :-1]
        x = self.now(self.table, ids, times)
        memories, variables = self.memories(batch, x[:, :1])
        early = self_attend(self.encoder, x, True)
        hidden = self.stack(early, memories, trace)
        return NeuroOutput(
            self.head_id(hidden),
            self.head_time(hidden),
            hidden,
            early,
            ids != self.config.pad,
            memories,
            variables,
            trace or Trace(),
        )

    def memories(
        self, batch: NeuroBatch, first_B1E: Tensor
    ) -> tuple[dict[str, Memory], dict[str, Tensor]]:
        """What current tokens look at, by name, and the tokens of each variable.

        `first_B1E`: the embedded start token, which stands before the video's tokens.
        """
        c = self.config
        past = self.past(self.table, batch.past_ids, batch.past_times)
        found = {"past": Memory(past, batch.past_ids != c.pad if c.mask_pad else None)}
        if self.video is not None and batch.frames is not None:
            self._check_frames(batch.frames)
            x = torch.cat([first_B1E, self.video(batch.frames)], 1)
            x = nn.functional.dropout(x, c.dropout, self.training)
            found["video"] = Memory(self_attend(self.video_encoder, x, False))
        variables: dict[str, Tensor] = {}
        for group in c.groups:
            there = [name for name in group.variables if name in batch.behavior]
            if not there:
                continue
            for name in there:
                value, offset = batch.behavior[name], batch.offset[name]
                if c.one_sample:
                    value, offset = value[:, -1:], offset[:, -1:]
                variables[name] = self.scalars[name](value, offset)
            tokens = torch.cat([variables[name] for name in there], 1)
            found[group.name] = Memory(tokens + row_code(tokens.shape[1], c.dim, tokens.device))
        return found, variables

    def _check_frames(self, frames: Tensor) -> None:
        video = self.config.video
        assert video is not None
        wanted = (video.frames, video.height, video.width)
        if tuple(frames.shape[1:]) != wanted:
            raise DataError(
                f"frames of a window are {tuple(frames.shape[1:])} (time, height, width), "
                f"the model was made for {wanted}"
            )

    # Averages ------------------------------------------------------------------------------------

    def pooled(self, x_BLE: Tensor, valid_BL: Tensor) -> Tensor:
        """(B, E) mean over tokens; without `masked_mean` over padding as well."""
        if not self.config.masked_mean:
            return x_BLE.mean(1)
        weight = valid_BL.to(x_BLE.dtype)
        total: Tensor = (x_BLE * weight[..., None]).sum(1)
        return total / weight.sum(1, keepdim=True).clamp(min=1)

    def answer(self, out: NeuroOutput, name: str) -> Tensor:
        """(B, classes) logits, or (B, 1) of a regression, for a target."""
        found: Tensor = self.heads[name](self.pooled(out.hidden, out.valid))
        return found

    def vectors(self, out: NeuroOutput) -> dict[str, Tensor]:
        """(B, E) unit vectors of the aligned modalities that are there, in the order of `align`."""
        assert self.project is not None
        found = {}
        for name in self.config.align:
            if name == "spikes":
                state = out.hidden if self.config.pool == "post_fusion" else out.early
                mean = self.pooled(state, out.valid)
            elif name == "video" and "video" in out.memories:
                mean = out.memories["video"].tokens.mean(1)
            elif name in out.variables:
                mean = out.variables[name].mean(1)
            else:
                continue
            found[name] = nn.functional.normalize(self.project(mean), dim=-1)
        return found

    # One token at a time -------------------------------------------------------------------------

    def start(self, batch: NeuroBatch) -> NeuroState:
        """Encode what does not change while a window is generated."""
        first = self.now(self.table, batch.ids[:, :1], batch.times[:, :1])
        memories, _ = self.memories(batch, first)
        return NeuroState(memories)

    def advance(self, state: NeuroState, ids: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Append one token (B,) to every window: logits (B, N) and (B, D) of the next."""
        cache = state.cache
        x = self.now(self.table, ids[:, None], times[:, None], start=cache.width)
        cache.begin(len(ids), 1, None, ids.device)
        x = self_attend(self.encoder, x, True, cache)
        x = self.stack(x, state.memories, None, cache, len(self.encoder))
        cache.finish(1, None)
        return self.head_id(x[:, 0]), self.head_time(x[:, 0])


@dataclass
class NeuroState:
    """Windows on the way: encoded modalities, keys and values of the tokens so far."""

    memories: Mapping[str, Memory]
    cache: KVCache = field(default_factory=KVCache)

    def select(self, rows: Tensor) -> None:
        """Go on with some windows only."""
        self.cache.select(rows)
        self.memories = {
            name: Memory(m.tokens[rows], None if m.valid is None else m.valid[rows])
            for name, m in self.memories.items()
        }
