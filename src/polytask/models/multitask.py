"""The model of a run: stems -> splice -> trunk -> heads, for any mixture of tasks in one batch.

    features = model.shared_features(batch)      # the trunk, once per sequence
    terms = model.terms_from(features, batch)    # every (row, task) pair's loss, unreduced

The split is where gradients of tasks meet: everything before it is shared, the heads after it are
per task. `model.terms(batch)` does both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from polytask.errors import ConfigError, suggestion
from polytask.models import heads as kinds
from polytask.models.batch import Batch, Terms
from polytask.models.features import Features
from polytask.models.heads.base import Head, Output, Pairs, known_pairs, pairs_of
from polytask.models.heads.tokens import GenerateHead
from polytask.models.init import initialise
from polytask.models.specs import HeadSpec, InputSpec, ModelConfig, ModelSpec, head_spec
from polytask.models.stems import (
    Entries,
    FeatureStem,
    ImageStem,
    SeriesStem,
    TableStem,
    TextStem,
    patch_size,
    plan_layout,
    splice,
)
from polytask.models.stems.splice import mask_of
from polytask.models.transformer import Route, RouteContext, Transformer, make_norm


class Prediction(NamedTuple):
    """Predictions of one kind: `value` has one row per pair (see the heads' `predict`)."""

    task: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    value: npt.NDArray[Any]


def build_model(config: ModelConfig, taskset: Any, processor: Any) -> MultitaskModel:
    """The model for a `TaskSet` and its fitted `Processor`. Same seed, same parameters."""
    specs = tuple(head_spec(task.name, task.schema) for task in taskset.tasks)
    return MultitaskModel(ModelSpec(config=config, inputs=input_spec(processor), heads=specs))


def input_spec(processor: Any) -> InputSpec:
    """Sizes of the inputs that a `polytask.tasks.encode.Processor` produces."""
    present = set(processor.modalities)
    sizes: dict[str, int] = {}
    if "text" in present:
        sizes |= {"vocab_size": processor.vocab_size, "pad_id": processor.pad_id}
        sizes["end_id"] = processor.codec.end
    if "image" in present:
        sizes["image_size"] = processor.config.image_size
    if "series" in present:
        sizes["series_length"] = processor.config.series_length
        sizes["series_channels"] = processor.series_channels
    if "table" in present:
        sizes["number_columns"] = processor.number_columns
        sizes["categories"] = processor.category_ids
    if "features" in present:
        sizes["feature_width"] = processor.feature_width
    return InputSpec(**sizes)


class MultitaskModel(nn.Module):
    """Built from a `ModelSpec`; `route` (optional) stands in for the trunk's feed-forwards."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.config = config = spec.config
        if not spec.inputs.modalities:
            raise ConfigError("a model needs inputs, and no task has any")
        # Constructors draw from torch's global generator: leave that as it was.
        with torch.random.fork_rng(devices=[]):
            self.trunk = Transformer(config)
            self.dim = config.dim
            self.stems = nn.ModuleDict(_stems(spec.inputs, config, self.dim))
            self.embed_norm = make_norm(config.norm, self.dim)
            self.modality = nn.Embedding(len(spec.inputs.modalities), self.dim)
            self.summary = nn.Parameter(torch.zeros(self.dim))
            self.heads = nn.ModuleDict(_heads(spec, self.dim))
        self.route: Route | None = None
        self.task_names = tuple(head.task for head in spec.heads)
        self._kind = [head.kind for head in spec.heads]
        counts: dict[str, int] = {}
        slots = [counts.setdefault(k, 0) or 0 for k in self._kind]
        for i, kind in enumerate(self._kind):
            slots[i] = counts[kind]
            counts[kind] += 1
        self._slot = np.asarray(slots, np.int64)
        self.init_std = {"summary": 0.02}
        initialise(self, config.seed)
        self.trunk.gradient_checkpointing = config.gradient_checkpointing

    # -- the shared part

    def shared_features(self, batch: Batch) -> Features:
        """Stems, splice and trunk: what all tasks of the batch share."""
        entries = self._entries(batch)
        layout = plan_layout(entries, batch.sequences, summary=self._has_summary)
        summary = None
        if self._has_summary:
            summary = self.summary.expand(batch.sequences, -1)
        x_SLD = self.embed_norm(splice(entries, layout, summary))
        prefix = batch.known("text.prefix") if "text" in entries else None
        mask = mask_of(layout, prefix, x_SLD.device)
        context = None
        if self.route is not None:
            valid = mask.valid(layout.width, x_SLD.device)
            context = RouteContext(batch.task, valid, batch.row)
        hidden = self.trunk(x_SLD, mask, route=self.route, context=context)
        pooled = self._pool(hidden, layout.length, mask.length)
        text = self.stems["text"] if "text" in self.stems else None
        lm_weight = None
        if isinstance(text, TextStem) and "generate" in batch.targets:
            # An alias, so that the tied weight counts as a shared feature (Features.tensors).
            lm_weight = text.embedding.weight.view_as(text.embedding.weight)
        return Features(hidden, pooled, layout, entries, lm_weight)

    @property
    def _has_summary(self) -> bool:
        return self.config.pool == "summary"

    def _entries(self, batch: Batch) -> dict[str, Entries]:
        found: dict[str, Entries] = {}
        present = {name.partition(".")[0] for name in batch.fields}
        for number, modality in enumerate(self.spec.inputs.modalities):
            if modality in present:
                entries = self.stems[modality](batch)
                kind = self.modality.weight[number]
                tokens = entries.tokens + kind.to(entries.tokens.dtype)
                found[modality] = _with_tokens(entries, tokens)
        unknown = present - set(self.spec.inputs.modalities)
        if unknown:
            raise ValueError(f"the batch has {sorted(unknown)} inputs, the model has no such stem")
        return found

    def _pool(self, hidden_SLD: Tensor, length: npt.NDArray[Any], padded: Tensor | None) -> Tensor:
        how = self.config.pool
        if how == "first":
            return hidden_SLD[:, 0]
        if how == "mean":
            if padded is None:
                return hidden_SLD.mean(1)
            step = torch.arange(hidden_SLD.shape[1], device=hidden_SLD.device)
            real = (step < padded[:, None]).to(hidden_SLD.dtype)
            return torch.einsum("sld,sl->sd", hidden_SLD, real) / padded[:, None].to(real.dtype)
        if padded is None:
            return hidden_SLD[:, -1]
        last = np.arange(len(length)) * hidden_SLD.shape[1] + length - 1
        index = torch.from_numpy(last).to(hidden_SLD.device)
        return hidden_SLD.flatten(0, 1).index_select(0, index)

    # -- the heads

    def pairs(self, batch: Batch, kind: str) -> Pairs:
        """The labelled pairs of one kind."""
        keep = None
        if not batch.complete:
            known = known_pairs(kind, batch.targets[kind])
            if not bool(known.all()):
                keep = known.nonzero()[:, 0]
        return pairs_of(kind, batch, self._slot, keep)

    def forward(self, batch: Batch) -> dict[str, Output]:
        """What the heads say about every pair of the batch, by kind."""
        features = self.shared_features(batch)
        return {
            kind: self._head(kind)(features, pairs_of(kind, batch, self._slot, None))
            for kind in batch.targets
        }

    def terms(self, batch: Batch) -> Terms:
        """Losses per pair, by term. Pairs without a known label do not occur."""
        return self.terms_from(self.shared_features(batch), batch)

    def terms_from(self, features: Features, batch: Batch) -> Terms:
        """Losses from features that `shared_features` made of the same batch."""
        terms = Terms({}, {}, {})
        for kind in batch.targets:
            pairs = self.pairs(batch, kind)
            if not len(pairs):
                continue
            head = self._head(kind)
            if isinstance(head, GenerateHead):
                losses = head.direct_losses(features, pairs)
            else:
                losses = head.losses(head(features, pairs), pairs)
            for name, value in losses.items():
                terms.value[name] = value
                terms.task[name] = pairs.target.task
                terms.row[name] = pairs.target.row
        return terms

    def predict(self, batch: Batch) -> dict[str, Prediction]:
        """Predictions for every pair, labelled or not, by kind (see the heads' `predict`)."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return self._predict(batch)
        finally:
            self.train(training)

    def _predict(self, batch: Batch) -> dict[str, Prediction]:
        found: dict[str, Prediction] = {}
        features = self.shared_features(batch)
        for kind in batch.targets:
            pairs = pairs_of(kind, batch, self._slot, None)
            head = self._head(kind)
            value = head.predict(head(features, pairs), pairs)
            task, row = batch.known(f"{kind}.task"), pairs.target.row.cpu().numpy()
            found[kind] = Prediction(task, row, value)
        return found

    def _head(self, kind: str) -> Head:
        if kind not in self.heads:
            raise ValueError(f"the batch has '{kind}' labels and the model no such head")
        head = self.heads[kind]
        assert isinstance(head, Head)
        return head

    # -- names

    def shared_names(self) -> list[str]:
        """Names of the parameters that all tasks share."""
        return [name for name, _ in self.named_parameters() if not name.startswith("heads.")]

    def head_names(self, task: int | str) -> list[str]:
        """Names of the parameters that a task's head uses; see `head_rows` for its part of them."""
        kind, _ = self._kind_slot(task)
        prefix = f"heads.{kind}."
        return [name for name, _ in self.named_parameters() if name.startswith(prefix)]

    def head_rows(self, task: int | str) -> dict[str, slice]:
        """Parameter name -> the rows that belong to this task alone."""
        kind, slot = self._kind_slot(task)
        rows = self._head(kind).task_rows(slot)
        return {f"heads.{kind}.{name}": part for name, part in rows.items()}

    def _kind_slot(self, task: int | str) -> tuple[str, int]:
        if isinstance(task, str):
            if task not in self.task_names:
                raise ConfigError(f"no task '{task}'.{suggestion(task, self.task_names)}")
            task = self.task_names.index(task)
        return self._kind[task], int(self._slot[task])

    # -- saving

    def to_json(self) -> str:
        """The model without its weights; `from_json` builds it again."""
        return self.spec.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str) -> MultitaskModel:
        """A model of the same shape, freshly initialised."""
        return cls(ModelSpec.model_validate_json(text))


def _with_tokens(entries: Entries, tokens: Tensor) -> Entries:
    return Entries(
        tokens, entries.sequence, entries.count, entries.valid, entries.loc, entries.scale
    )


def _stems(inputs: InputSpec, config: ModelConfig, dim: int) -> dict[str, nn.Module]:
    stems: dict[str, nn.Module] = {}
    if inputs.image_size:
        patch = patch_size(inputs.image_size, config.image_patch)
        stems["image"] = ImageStem(inputs.image_size, patch, dim)
    if inputs.series_channels:
        stems["series"] = SeriesStem(
            inputs.series_channels, config.series_patch, dim, config.series_level
        )
    if inputs.number_columns + inputs.categories:
        stems["table"] = TableStem(inputs.number_columns, inputs.categories, dim)
    if inputs.feature_width:
        stems["features"] = FeatureStem(inputs.feature_width, dim)
    if inputs.vocab_size:
        stems["text"] = TextStem(inputs.vocab_size, dim)
    return stems


_VECTOR_HEADS = {
    "classify": kinds.ClassifyHead,
    "multilabel": kinds.MultiLabelHead,
    "regress": kinds.RegressHead,
    "choice": kinds.ChoiceHead,
    "tag": kinds.TagHead,
    "match": kinds.MatchHead,
}


def _heads(spec: ModelSpec, dim: int) -> dict[str, nn.Module]:
    by_kind: dict[str, list[HeadSpec]] = {}
    for head in spec.heads:
        by_kind.setdefault(head.kind, []).append(head)
    return {kind: _head(kind, specs, spec, dim) for kind, specs in by_kind.items()}


def _head(kind: str, specs: Sequence[HeadSpec], spec: ModelSpec, dim: int) -> Head:
    config, inputs = spec.config, spec.inputs
    needs = {"tag": "text", "generate": "text", "forecast": "series", "dense": "image"}
    if kind in needs and needs[kind] not in inputs.modalities:
        raise ConfigError(f"task '{specs[0].task}' ({kind}) needs {needs[kind]} inputs")
    if kind == "generate":
        return kinds.GenerateHead(specs, config, dim, inputs.vocab_size, config.tie)
    if kind == "forecast":
        return kinds.ForecastHead(
            specs, config, dim, max(1, -(-inputs.series_length // config.series_patch))
        )
    if kind == "dense":
        patch = patch_size(inputs.image_size, config.image_patch)
        return kinds.DenseHead(specs, config, dim, (inputs.image_size // patch) ** 2, patch)
    return _VECTOR_HEADS[kind](specs, config, dim)
