"""From configuration, tasks and processor to a model: sizes, stems, heads, trunk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from polytask.errors import ConfigError
from polytask.models import heads as kinds
from polytask.models.heads.base import Head
from polytask.models.specs import HeadSpec, InputSpec, ModelConfig, ModelSpec, head_spec
from polytask.models.stems import (
    FeatureStem,
    ImageStem,
    SeriesStem,
    TableStem,
    TextStem,
    patch_size,
)

if TYPE_CHECKING:
    from polytask.models.multitask import MultitaskModel


def build_model(config: ModelConfig, taskset: Any, processor: Any) -> MultitaskModel:
    """The model for a `TaskSet` and its fitted `Processor`. Same seed, same parameters.

    With `config.hub` the trunk is that pretrained model, and the processor must have been fitted
    with its tokenizer. Raises `ConfigError` when the parts do not fit.
    """
    from polytask.models.multitask import MultitaskModel

    specs = tuple(head_spec(task.name, task.schema) for task in taskset.tasks)
    inputs = input_spec(processor)
    if config.hub is None:
        return MultitaskModel(ModelSpec(config=config, inputs=inputs, heads=specs))
    from polytask.models.hub import check_scoring, load_trunk

    trunk = load_trunk(config.hub)
    if inputs.vocab_size > trunk.vocab_size:
        raise ConfigError(
            f"the processor has {inputs.vocab_size} token ids and '{config.hub}' only "
            f"{trunk.vocab_size}: fit the processor with that model's tokenizer"
        )
    if any(head.kind == "generate" for head in specs) and trunk.family != "encoder":
        check_scoring(trunk, config.hub)
    loaded: Any = trunk.model.config
    described = json.loads(loaded.to_json_string(use_diff=False))
    spec = ModelSpec(config=config, inputs=inputs, heads=specs, hub=described)
    return MultitaskModel(spec, trunk)


def input_spec(processor: Any) -> InputSpec:
    """Sizes of the inputs that a `polytask.tasks.encode.Processor` produces."""
    present = set(processor.modalities)
    sizes: dict[str, int] = {}
    if "text" in present:
        sizes |= {"vocab_size": processor.vocab_size, "pad_id": processor.pad_id}
        sizes |= {"end_id": processor.codec.end, "text_length": processor.config.text_length}
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


def make_stems(inputs: InputSpec, config: ModelConfig, dim: int) -> dict[str, nn.Module]:
    """A stem for each modality that occurs; a hub model's text goes through the model itself."""
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
    if inputs.vocab_size and config.hub is None:
        stems["text"] = TextStem(inputs.vocab_size, dim)
    return stems


_VECTOR_HEADS: dict[str, Callable[[Sequence[HeadSpec], ModelConfig, int], Head]] = {
    "classify": kinds.ClassifyHead,
    "multilabel": kinds.MultiLabelHead,
    "regress": kinds.RegressHead,
    "choice": kinds.ChoiceHead,
    "tag": kinds.TagHead,
    "match": kinds.MatchHead,
}


def make_heads(spec: ModelSpec, dim: int) -> dict[str, nn.Module]:
    """A head module for each kind of label that occurs."""
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
