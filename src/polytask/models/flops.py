"""How much arithmetic a step takes, from shapes alone, and how many parameters a model has.

Counts are of matrix products, 2 per multiply-add, as `torch.utils.flop_counter` counts them (tests
hold both together within 1 percent). Padding counts, because it is computed. It takes microseconds
and runs nothing, so a ledger can ask at every step.

Legend: S sequences, L length, M memory length, N rows of a product, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from polytask.models.batch import Batch
from polytask.models.buckets import buckets_for
from polytask.models.heads import (
    ChoiceHead,
    ClassifyHead,
    DenseHead,
    ForecastHead,
    GenerateHead,
    MatchHead,
    TagHead,
)
from polytask.models.heads.tokens import IGNORE, first_label
from polytask.models.hub import HubTrunk
from polytask.models.masks import MaskSpec
from polytask.models.multitask import MultitaskModel
from polytask.models.stems import FeatureStem, ImageStem, SeriesStem
from polytask.models.task_linear import TaskLinear, plan_blocks
from polytask.models.transformer import Transformer

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Flops:
    """Forward and backward floating-point operations of one step, by part."""

    forward: dict[str, int]
    backward: dict[str, int]

    @property
    def total(self) -> int:
        """Everything that a training step computes in matrix products."""
        return sum(self.forward.values()) + sum(self.backward.values())


def flops(model: MultitaskModel, batch: Batch) -> Flops:
    """The work of `model.terms(batch)` and of its backward pass, all parameters training."""
    forward: dict[str, int] = {}
    backward: dict[str, int] = {}
    counts, stem_work = _stems(model, batch)
    length = _lengths(model, batch, counts)
    if isinstance(model.trunk, HubTrunk):
        _measure_hub(model, batch)
    forward["stems"], backward["stems"] = stem_work
    passes = [(batch.sequences, int(length.max(initial=1)))]
    if model.route is None and not model.sparse:
        device = next(model.parameters()).device
        plan = buckets_for(length, device)
        passes = [(len(part), int(length[part].max(initial=1))) for part in plan]
    valid = int(length.sum())
    forward["trunk"] = sum(_trunk(model, rows, width, valid) for rows, width in passes)
    backward["trunk"] = 2 * forward["trunk"]
    if model.config.gradient_checkpointing:
        tokens = sum(rows * width for rows, width in passes)
        backward["trunk"] += forward["trunk"] - _not_repeated(model.trunk, tokens)
    if model.has_decoder and "generate" in batch.targets:
        pairs, steps = _decoded(model, batch)
        forward["decoder"] = _decoder(model, pairs, steps, int(length.max(initial=1)))
        backward["decoder"] = 2 * forward["decoder"]
        if model.config.gradient_checkpointing:
            side = model.trunk if model.decoder is None else model.decoder
            backward["decoder"] += forward["decoder"] - _not_repeated(side, pairs * steps)
    for kind in batch.targets:
        forward[kind] = _head(model, batch, kind, counts)
        backward[kind] = 2 * forward[kind]
    return Flops(forward, backward)


def flops_by_task(model: MultitaskModel, batch: Batch) -> npt.NDArray[np.float64]:
    """The work of a step booked on tasks, (tasks,) float64; adds up to `flops(...).total`.

    Stems and trunk go by the length of each sequence, to the first task of its row (tasks that
    share rows share that work); heads go by pairs.
    """
    work = flops(model, batch)
    parts = {name: work.forward[name] + work.backward[name] for name in work.forward}
    tasks = len(model.task_names)
    counts, _ = _stems(model, batch)
    length = _lengths(model, batch, counts).astype(np.float64)
    first = batch.known("task")
    shared = sum(parts.pop(name, 0) for name in ("stems", "trunk", "decoder"))
    booked: npt.NDArray[np.float64] = np.bincount(first, length, tasks) * (
        shared / max(1.0, length.sum())
    )
    for kind, value in parts.items():
        pairs = np.bincount(batch.known(f"{kind}.task"), minlength=tasks)
        booked += pairs * (value / max(1, pairs.sum()))
    return booked


def _stems(model: MultitaskModel, batch: Batch) -> tuple[dict[str, Counts], tuple[int, int]]:
    """Tokens of every entry, by modality, and the work of the stems.

    Pixels and series need no gradient, so their linear layers have half a backward pass; features
    pass a norm with parameters first.
    """
    counts: dict[str, Counts] = {}
    forward = backward = 0
    for modality in model.spec.inputs.modalities:
        if f"{modality}.sequence" not in batch.fields:
            continue
        stem = dict(model.stems.items()).get(modality)
        entries = len(batch.known(f"{modality}.sequence"))
        work = 0
        if isinstance(stem, ImageStem):
            patches = len(stem.position)
            counts[modality] = np.full(entries, patches)
            work = _product(entries * patches, stem.project.in_features, model.dim)
            backward += work
        elif isinstance(stem, SeriesStem):
            patches = np.maximum(1, -(-batch.known("series.length") // stem.patch))
            counts[modality] = patches + (stem.level is not None)
            rows = entries * int(patches.max(initial=1))
            work = _product(rows, stem.project.in_features, model.dim)
            if stem.level is not None:
                work += _product(entries, stem.level.in_features, model.dim)
            backward += work
        elif isinstance(stem, FeatureStem):
            counts[modality] = batch.known("features.length")
            rows = entries * int(batch.fields["features.values"].shape[1])
            work = _product(rows, stem.width, model.dim)
            backward += 2 * work
        elif modality == "table":
            ids = [n for n in ("table.number_id", "table.category") if n in batch.fields]
            counts[modality] = np.sum([(batch.known(n) >= 0).sum(1) for n in ids], 0)
        else:
            counts[modality] = model.text_lengths(batch)
        forward += work
    return counts, (forward, backward)


def _lengths(model: MultitaskModel, batch: Batch, counts: dict[str, Counts]) -> Counts:
    length = np.full(batch.sequences, int(model.summary is not None))
    for modality, count in counts.items():
        np.add.at(length, batch.known(f"{modality}.sequence"), count)
    return length


def _product(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _trunk(model: MultitaskModel, rows: int, length: int, valid: int) -> int:
    trunk = model.trunk
    if isinstance(trunk, Transformer):
        return _transformer(trunk, rows, length) + _experts(trunk, rows * length, valid)
    return _hub(trunk, rows, length)


def _transformer(trunk: Transformer, rows: int, length: int, memory: int = 0) -> int:
    """Projections and feed-forwards of S * L tokens, and 4 S L M D per attention."""
    config = trunk.config
    dim, tokens = config.dim, rows * length
    kv = 2 * (config.kv_heads or config.heads) * (dim // config.heads)
    layer = _product(tokens, dim, dim + kv) + _product(tokens, dim, dim)
    layer += 4 * rows * length * length * dim
    dense = _product(tokens, dim, config.ffn_dim) * (3 if config.gated else 2)
    if memory:
        layer += 2 * _product(tokens, dim, dim) + _product(rows * memory, dim, kv)
        layer += 4 * rows * length * memory * dim
    return layer * len(trunk.blocks) + dense * (len(trunk.blocks) - len(trunk.sparse))


def _experts(trunk: Transformer, tokens: int, valid: int) -> int:
    """Gates of all tokens, and K experts for each valid one. What a capacity or a gate threshold
    leaves out is counted all the same: shapes do not tell."""
    experts = trunk.config.experts
    if experts is None:
        return 0
    pairs, hidden = valid * experts.k, experts.width(trunk.dim)
    layer = _product(tokens, trunk.dim, experts.count)
    layer += _product(pairs, trunk.dim, hidden) * (3 if experts.gated else 2)
    embedding = 0
    if trunk.task_embedding is not None:
        names, wide = trunk.task_embedding.first.in_features, experts.task_dim
        layer += _product(names, wide, experts.count)
        embedding = _product(names, wide, wide)
    return layer * len(trunk.sparse) + embedding


def _not_repeated(trunk: Transformer | HubTrunk, tokens: int) -> int:
    """Checkpointing recomputes a block up to its last product, whose result nobody needs."""
    if isinstance(trunk, HubTrunk):
        return 0
    dense = len(trunk.blocks) - len(trunk.sparse)
    return dense * _product(tokens, trunk.config.ffn_dim, trunk.dim)


def _decoded(model: MultitaskModel, batch: Batch) -> tuple[int, int]:
    """Generation pairs, and decoder steps of each."""
    pairs = model.all_pairs(batch, "generate")
    assert pairs.value is not None
    place = np.where(pairs.value != IGNORE, np.arange(pairs.value.shape[1]), 0)
    steps = place.max(1, initial=0) - first_label(pairs.value) + 1
    return len(pairs), max(1, int(steps.max(initial=1)))


def _decoder(model: MultitaskModel, pairs: int, steps: int, memory: int) -> int:
    if model.decoder is not None:
        return _transformer(model.decoder, pairs, steps, memory)
    assert isinstance(model.trunk, HubTrunk)
    return _hub(model.trunk, pairs, steps, memory)


def _hub(trunk: HubTrunk, rows: int, length: int, memory: int = 0) -> int:
    """A hub model's work follows rows * (a L + b L^2), and with a memory + c M + d L M: the
    coefficients are measured once on short inputs, so they hold for any architecture."""
    part = "decoder" if memory else "trunk"
    if part not in trunk.work:
        trunk.work[part] = _measured(trunk, with_memory=bool(memory))
    terms = (length, length**2, memory, length * memory)
    return round(rows * sum(c * t for c, t in zip(trunk.work[part], terms, strict=True)))


def _measure_hub(model: MultitaskModel, batch: Batch) -> None:
    """Measure a hub trunk once, as it is with its adapters: the rows it runs on are of one task."""
    trunk = model.trunk
    assert isinstance(trunk, HubTrunk)
    with_memory = model.has_decoder and "generate" in batch.targets
    if "trunk" in trunk.work and (not with_memory or "decoder" in trunk.work):
        return
    model.announce(batch.task[:1])
    trunk.work["trunk"] = _measured(trunk, with_memory=False)
    if with_memory:
        trunk.work["decoder"] = _measured(trunk, with_memory=True)
    model.announce(batch.task)


@torch.no_grad()
def _measured(trunk: HubTrunk, with_memory: bool) -> tuple[float, ...]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    points = [(8, 0), (16, 0)] if not with_memory else [(8, 8), (16, 8), (8, 16), (16, 16)]
    found = []
    device = trunk.embedding.weight.device
    for length, memory in points:
        x = torch.zeros(1, length, trunk.dim, device=device)
        # The fused kernels of some devices are not counted; the plain products are.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            if memory:
                trunk.decode(x, torch.zeros(1, memory, trunk.dim, device=device), None)
            else:
                trunk(x, MaskSpec(causal=trunk.family == "decoder"))
        found.append(counter.get_total_flops())
    design = np.array([(n, n * n, m, n * m) for n, m in points], float)
    solution = np.linalg.lstsq(design, np.array(found, float), rcond=None)[0]
    return tuple(float(c) for c in solution)


def _task_linear(linear: TaskLinear, slot: Counts) -> int:
    inputs = int(linear.weight.shape[1])
    if len(slot) == 0:
        return 0
    if (slot == slot[0]).all():
        return _product(len(slot), inputs, int(linear.outputs[slot[0]]))
    plan = plan_blocks(slot)
    widest = int(linear.outputs[plan.task].max())
    return _product(len(plan.task) * plan.rows, inputs, widest)


def _head(model: MultitaskModel, batch: Batch, kind: str, counts: dict[str, Counts]) -> int:
    head, pairs = model.heads[kind], model.pairs(batch, kind)
    if isinstance(head, ChoiceHead):
        return _task_linear(head.linear, np.repeat(pairs.slot, pairs.sequence.shape[1]))
    if isinstance(head, TagHead):
        entry = batch.entries("text")[pairs.sequence[:, 0]]
        return _task_linear(head.linear, np.repeat(pairs.slot, counts["text"][entry]))
    if isinstance(head, DenseHead):
        return _task_linear(head.linear, np.repeat(pairs.slot, head.patches))
    if isinstance(head, ClassifyHead | ForecastHead):
        return _task_linear(head.linear, pairs.slot)
    if isinstance(head, MatchHead):
        width = head.project.out_features
        project = _product(2 * len(pairs), model.dim, width)
        return project + _product(len(pairs), width, len(pairs))
    assert isinstance(head, GenerateHead) and pairs.value is not None
    tokens = int((pairs.value[:, 1:] != IGNORE).sum())
    vocabulary = model.spec.inputs.vocab_size
    if isinstance(model.trunk, HubTrunk):
        vocabulary = int(model.trunk.scorer()[0].shape[0])
    return _product(tokens, model.dim, vocabulary)


@dataclass(frozen=True)
class ParameterRow:
    """One line of `parameter_table`."""

    part: str
    parameters: int
    trainable: int


def parameter_table(model: torch.nn.Module, depth: int = 2) -> list[ParameterRow]:
    """Parameters by the first `depth` components of their names, in order; the last row is all."""
    totals: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        row = totals.setdefault(".".join(name.split(".")[:depth]), [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() * parameter.requires_grad
    rows = [ParameterRow(part, n, t) for part, (n, t) in totals.items()]
    everything = ParameterRow(
        "total", sum(r.parameters for r in rows), sum(r.trainable for r in rows)
    )
    return [*rows, everything]
