"""The model of a run: stems -> splice -> trunk -> heads, for any mixture of tasks in one batch.

    features = model.shared_features(batch)      # the trunk, once per sequence
    terms = model.terms_from(features, batch)    # every (row, task) pair's loss, unreduced

The split is where gradients of tasks meet: everything before it is shared, the heads after it are
per task. `model.terms(batch)` does both.

Legend: S sequences, L length, P pairs, T decoder length, M memory length, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from polytask.errors import ConfigError, suggestion
from polytask.models.batch import Batch, Terms
from polytask.models.buckets import run_bucketed
from polytask.models.build import make_heads, make_stems
from polytask.models.cache import KVCache
from polytask.models.experts.moe import RoutingRecord
from polytask.models.experts.tasks import check_one_task_a_row
from polytask.models.features import Features
from polytask.models.generate import CausalState, MemoryState, generate
from polytask.models.heads.base import Head, Output, Pairs, known_pairs, on_device, pairs_of
from polytask.models.hub import HubCache, HubTrunk, empty_trunk
from polytask.models.init import initialise
from polytask.models.language import decoder_states, lm_weight
from polytask.models.masks import MaskSpec
from polytask.models.specs import ModelSpec
from polytask.models.stems import Entries, Layout, TextStem, plan_layout, splice
from polytask.models.stems.splice import mask_of
from polytask.models.transformer import LayerNorm, Route, RouteContext, Transformer, make_norm


class Prediction(NamedTuple):
    """Predictions of one kind: `value` has one row per pair (see the heads' `predict`).

    generate: (P, N) token ids after the prompt, padded.
    """

    task: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    value: npt.NDArray[Any]


class MultitaskModel(nn.Module):
    """Built from a `ModelSpec` (see `build_model`).

    `trunk` is a loaded hub model; without it, one of the shape that `spec.hub` describes.
    `route` (an attribute, None by default) stands in for the feed-forwards of the trunk.
    `tell_tasks` (None by default) is told the task (S,) of every row before a part of the model
    runs on these rows: adapters that route by task listen there. `on_routed` (None by default) is
    given what the routers of a pass said, where the trunk has experts.
    """

    def __init__(self, spec: ModelSpec, trunk: HubTrunk | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.config = config = spec.config
        modalities = spec.inputs.modalities
        if not modalities:
            raise ConfigError("a model needs inputs, and no task has any")
        self.decoder: Transformer | None = None
        # Constructors draw from torch's global generator: leave that as it was.
        with torch.random.fork_rng(devices=[]):
            self.trunk: Transformer | HubTrunk
            if config.hub is None:
                names = [head.task for head in spec.heads]
                self.trunk = Transformer(config, tasks=names)
                if config.decoder_layers:
                    changed = {"layers": config.decoder_layers, "experts": None}
                    sizes = config.model_copy(update=changed)
                    self.decoder = Transformer(sizes, cross=True, bidirectional=False)
            else:
                self.trunk = trunk or empty_trunk(spec.hub or {})
            self.dim = self.trunk.dim
            self.stems = nn.ModuleDict(make_stems(spec.inputs, config, self.dim))
            self.embed_norm = self._make_embed_norm()
            self.modality = nn.Embedding(len(modalities), self.dim) if self.stems else None
            self.pool = self._pooling()
            self.summary = nn.Parameter(torch.zeros(self.dim)) if self.pool == "summary" else None
            self.heads = nn.ModuleDict(make_heads(spec, self.dim))
        self.route: Route | None = None
        self.tell_tasks: Callable[[Tensor], None] | None = None
        self.on_routed: Callable[[RoutingRecord], None] | None = None
        self.task_names = tuple(head.task for head in spec.heads)
        self._kind = [head.kind for head in spec.heads]
        self._slot = _slots(self._kind)
        self._check_generation()
        self.init_std = {"summary": 0.02}
        initialise(self, config.seed, skip=("trunk.",) if config.hub else ())
        self.trunk.gradient_checkpointing = config.gradient_checkpointing
        if self.decoder is not None:
            self.decoder.gradient_checkpointing = config.gradient_checkpointing

    def _make_embed_norm(self) -> nn.Module | None:
        """Own trunk: brings all stems to one scale. Hub trunk: brings media to its text's scale."""
        if isinstance(self.trunk, Transformer):
            return make_norm(self.config.norm, self.dim)
        if not self.stems:
            return None
        norm = LayerNorm(self.dim)
        scale = self.trunk.embedding.weight.detach().square().mean().sqrt()
        nn.init.constant_(norm.weight, float(scale))
        return norm

    def _pooling(self) -> str:
        if self.config.pool != "auto":
            return self.config.pool
        if isinstance(self.trunk, Transformer):
            return "summary"
        return "last" if self.trunk.family == "decoder" else "mean"

    def _check_generation(self) -> None:
        if "generate" in self._kind and isinstance(self.trunk, HubTrunk):
            task = self.task_names[self._kind.index("generate")]
            if self.trunk.family == "encoder":
                raise ConfigError(
                    f"task '{task}' generates text, and '{self.config.hub}' is an encoder; "
                    "choose a decoder or an encoder-decoder"
                )

    @property
    def has_decoder(self) -> bool:
        """Whether answers come from a decoder that attends to the encoded prompt."""
        if isinstance(self.trunk, HubTrunk):
            return self.trunk.family == "encoder-decoder"
        return self.decoder is not None

    # -- the shared part

    def shared_features(self, batch: Batch) -> Features:
        """Stems, splice and trunk (and decoder): what all tasks of the batch share."""
        entries = self.entries(batch)
        layout = plan_layout(entries, batch.sequences, summary=self.summary is not None)
        x_SLD, mask = self.spliced(batch, entries, layout, self.summary)
        record = None
        if self.route is None and not self.sparse:
            hidden = self._by_buckets(batch, x_SLD, mask, layout)
        else:
            # Routers balance their load over the whole batch: they get it in one piece.
            valid = mask.valid(layout.width, x_SLD.device)
            record = RoutingRecord()
            context = RouteContext(batch.task, valid, batch.row, record=record)
            if self.config.experts is not None and self.config.experts.router != "blind":
                check_one_task_a_row(batch, self.task_names)
            hidden = self.trunk(x_SLD, mask, route=self.route, context=context)
        # Heads read an alias: then no feature is computed from another one, and gradients with
        # respect to all of them add up to the whole (Features.tensors).
        pooled = self._pooled(hidden, layout, mask)
        features = Features(hidden.view_as(hidden), pooled, layout, entries)
        experts = self.config.experts
        if experts is not None and record is not None and self.training and experts.balance:
            balance = experts.balance * record.balance(len(self.task_names), experts)
            features = replace(features, balance=balance)
        if self.on_routed is not None and record is not None:
            self.on_routed(record)
        if "generate" in batch.targets:
            decoded = decoder_states(self, features, hidden, batch) if self.has_decoder else None
            weight, bias = lm_weight(self)
            features = replace(features, lm_weight=weight, lm_bias=bias, decoded=decoded)
        return features

    @property
    def sparse(self) -> tuple[int, ...]:
        """The blocks of the trunk that have experts."""
        return self.trunk.sparse if isinstance(self.trunk, Transformer) else ()

    def announce(self, task: Tensor) -> None:
        """Say which task (S,) each row of what runs next belongs to."""
        if self.tell_tasks is not None:
            self.tell_tasks(task)

    def _by_buckets(self, batch: Batch, x_SLD: Tensor, mask: MaskSpec, layout: Layout) -> Tensor:
        """The trunk over sequences of like length; rows' tasks are announced where asked for."""
        if self.tell_tasks is None:
            return run_bucketed(self.trunk, x_SLD, mask, layout.length)

        def announce(rows: Tensor | None) -> None:
            self.announce(batch.task if rows is None else batch.task[rows])

        whole = self.trunk.gradient_checkpointing and torch.is_grad_enabled()
        return run_bucketed(self.trunk, x_SLD, mask, layout.length, announce, whole)

    def entries(self, batch: Batch) -> dict[str, Entries]:
        """What the stems make of the batch, in the order of a sequence.

        With a decoder, a text that is to be continued only enters up to its prefix.
        """
        modalities = self.spec.inputs.modalities
        present = {name.partition(".")[0] for name in batch.fields}
        if not present <= set(modalities):
            unknown = ", ".join(sorted(present - set(modalities)))
            raise ValueError(f"the batch has {unknown} inputs and the model no such stem")
        found: dict[str, Entries] = {}
        for number, modality in enumerate(modalities):
            if modality not in present:
                continue
            if modality == "text":
                entries = self._text_entries(batch)
            else:
                entries = self.stems[modality](batch)
            if self.modality is not None and modality in self.stems:
                tokens = entries.tokens + self.modality.weight[number].to(entries.tokens.dtype)
                if isinstance(self.trunk, HubTrunk):
                    tokens = self._norm(tokens)
                entries = replace(entries, tokens=tokens)
            found[modality] = entries
        return found

    def _text_entries(self, batch: Batch) -> Entries:
        tokens = self._embed(batch.fields["text.ids"])
        return Entries(tokens, batch.known("text.sequence"), self.text_lengths(batch))

    def text_lengths(self, batch: Batch) -> npt.NDArray[np.int64]:
        """(n,) text tokens that enter the trunk."""
        length = batch.known("text.length")
        if not self.has_decoder:
            return length
        prefix = batch.known("text.prefix")
        found: npt.NDArray[np.int64] = np.where(prefix < length, prefix.clip(1, length), length)
        return found

    def spliced(
        self, batch: Batch, entries: dict[str, Entries], layout: Layout, summary: Tensor | None
    ) -> tuple[Tensor, MaskSpec]:
        """The trunk's input (S, L, D) and mask."""
        if summary is not None:
            summary = summary.expand(batch.sequences, -1)
        x_SLD = splice(entries, layout, summary)
        if isinstance(self.trunk, Transformer):
            x_SLD = self._norm(x_SLD)
        prefix = None
        if "text" in entries and not self.has_decoder:
            prefix = batch.known("text.prefix")
        return x_SLD, mask_of(layout, prefix, x_SLD.device)

    def _pooled(self, hidden_SLD: Tensor, layout: Layout, mask: MaskSpec) -> Tensor:
        if self.pool == "first":
            return hidden_SLD[:, 0]
        if self.pool == "mean":
            valid = mask.valid(layout.width, hidden_SLD.device)
            if valid is None:
                return hidden_SLD.mean(1)
            share = valid / valid.sum(1, keepdim=True)
            return (hidden_SLD * share[:, :, None].to(hidden_SLD.dtype)).sum(1)
        last = np.arange(layout.sequences) * layout.width + layout.length - 1
        return hidden_SLD.flatten(0, 1).index_select(0, on_device(last, hidden_SLD))

    # -- text in and out, and the decoder

    def _embed(self, ids: Tensor) -> Tensor:
        if isinstance(self.trunk, HubTrunk):
            return self.trunk.embed(ids)
        stem = self.stems["text"]
        assert isinstance(stem, TextStem)
        found: Tensor = stem.embedding(ids)
        return found

    def embed_text(self, ids_SN: Tensor) -> Tensor:
        """(S, N, D) tokens as they enter the trunk behind the others."""
        x = self._embed(ids_SN)
        if isinstance(self.trunk, HubTrunk):
            return x
        assert self.modality is not None
        return self._norm(x + self.modality.weight[self.spec.inputs.modalities.index("text")])

    def embed_decoder(self, ids_PT: Tensor) -> Tensor:
        """(P, T, D) tokens as they enter the decoder."""
        x = self._embed(ids_PT)
        return x if isinstance(self.trunk, HubTrunk) else self._norm(x)

    def _norm(self, x: Tensor) -> Tensor:
        assert self.embed_norm is not None
        found: Tensor = self.embed_norm(x)
        return found

    def decode(
        self,
        x_PTD: Tensor,
        memory_PMD: Tensor,
        length_P: Tensor,
        cache: KVCache | HubCache | None = None,
    ) -> Tensor:
        """(P, T, D) decoder states over a memory of which `length` tokens are valid."""
        if isinstance(self.trunk, HubTrunk):
            assert cache is None or isinstance(cache, HubCache)
            return self.trunk.decode(x_PTD, memory_PMD, length_P, cache)
        assert self.decoder is not None and not isinstance(cache, HubCache)
        mask = MaskSpec(causal=True, memory_length=length_P)
        found: Tensor = self.decoder(x_PTD, mask, memory=memory_PMD, cache=cache)
        return found

    def decoder_state(self, prompts: Batch) -> CausalState | MemoryState:
        """Generation after the prompts: logits of the next token, and how to go on."""
        return MemoryState(self, prompts) if self.has_decoder else CausalState(self, prompts)

    def new_cache(self) -> KVCache | HubCache:
        """An empty cache for the part that generates."""
        return HubCache() if isinstance(self.trunk, HubTrunk) else KVCache()

    # -- the heads

    def pairs(self, batch: Batch, kind: str) -> Pairs:
        """The labelled pairs of one kind."""
        keep = None
        if not batch.complete:
            known = known_pairs(kind, batch.targets[kind])
            if not bool(known.all()):
                keep = known.nonzero()[:, 0]
        return pairs_of(kind, batch, self._slot, keep)

    def all_pairs(self, batch: Batch, kind: str) -> Pairs:
        """The pairs of one kind, labelled or not."""
        return pairs_of(kind, batch, self._slot, None)

    def forward(self, batch: Batch) -> dict[str, Output]:
        """What the heads say about every pair of the batch, by kind."""
        features = self.shared_features(batch)
        return {
            kind: self._head(kind)(features, self.all_pairs(batch, kind)) for kind in batch.targets
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
            for name, value in self._head(kind).terms(features, pairs).items():
                terms.value[name] = value
                terms.task[name] = pairs.target.task
                terms.row[name] = pairs.target.row
            if features.balance is not None:
                # A value per pair, so that a task's mean is its loss however terms are reduced.
                task = pairs.target.task
                name = f"balance.{kind}"
                terms.value[name] = features.balance[task]
                terms.task[name], terms.row[name] = task, pairs.target.row
        return terms

    def predict(self, batch: Batch, max_new: int | None = None) -> dict[str, Prediction]:
        """Predictions for every pair, labelled or not, by kind (see the heads' `predict`).

        `max_new` bounds generated tokens (see `generate`).
        """
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                return self._predict(batch, max_new)
        finally:
            self.train(training)

    def _predict(self, batch: Batch, max_new: int | None) -> dict[str, Prediction]:
        found: dict[str, Prediction] = {}
        features = None
        for kind in batch.targets:
            pairs = self.all_pairs(batch, kind)
            if kind == "generate":
                value: npt.NDArray[Any] = generate(self, batch, pairs, max_new)
            else:
                features = features or self.shared_features(batch)
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
        """A model of the same shape; its weights are fresh (hub trunks: random)."""
        return cls(ModelSpec.model_validate_json(text))


def _slots(kind_of: Sequence[str]) -> npt.NDArray[np.int64]:
    """(tasks,) how many tasks of its kind stand before each task."""
    seen: dict[str, int] = {}
    slots = []
    for kind in kind_of:
        slots.append(seen.get(kind, 0))
        seen[kind] = slots[-1] + 1
    return np.asarray(slots, np.int64)
