"""Tensors that a merge stores once: are they one tensor in every model?

An output layer tied to the embedding is merged and stored as the embedding alone. A model that was
trained with the two apart, but whose configuration (or whose base) ties them, would lose its output
layer without a word. Only names that lie in two places are read, so most merges read nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from polytask.errors import MergeError
from polytask.merge.plan import Plan
from polytask.merge.sources import TensorSource

BLOCK = 1 << 22  # elements compared at a time
EMBEDDINGS = ("emb", "wte", "shared")
BIASES = ("predictions.bias", "lm_head.bias", "vocab_projector.bias")


def check_tied(plan: Plan) -> None:
    """Compare what is one tensor in the result but two in some model.

    Raises:
        MergeError: they differ; names the model and both tensors.
    """
    for source, found in zip(plan.sources, plan.matches, strict=True):
        for alias, kept in plan.aliases.items():
            first, second = found.keys.get(alias), found.keys.get(kept)
            if first and second and not equal(source, first, second):
                raise MergeError(
                    f"{source.name}: '{first}' and '{second}' are one tensor in "
                    f"{plan.sources[plan.frame].name}, but differ here; untie them there (store "
                    "both) to merge both"
                )
        _check_output_layer(source, found.spare)
    frame = plan.sources[plan.frame]
    _check_output_layer(frame, sorted(frozenset().union(*(m.dropped for m in plan.matches))))


def _check_output_layer(source: TensorSource, names: Iterable[str]) -> None:
    """Each of `names`, tied by the configuration, must equal what it is tied to."""
    for name in names:
        kinds = BIASES if name.endswith("bias") else EMBEDDINGS
        shape = source.headers[name].shape
        like = [
            key
            for key, header in source.headers.items()
            if key != name and header.shape == shape and any(kind in key for kind in kinds)
        ]
        if not any(equal(source, name, key) for key in like):
            other = f"differs from '{like[0]}'" if like else "has nothing it could be tied to"
            raise MergeError(
                f"{source.name}: '{name}' {other}, although 'tie_word_embeddings' in its "
                "config.json ties the output layer to the embedding; set it to false there if the "
                "model has an output layer of its own, or delete the tensor"
            )


def equal(source: TensorSource, first: str, second: str) -> bool:
    """Whether two tensors of a model hold the same numbers; read in blocks, if at all."""
    one, other = source.headers[first], source.headers[second]
    if one.place == other.place and one.shape == other.shape:
        return True
    if one.shape != other.shape:
        return False
    for start in range(0, one.count, BLOCK):
        count = min(BLOCK, one.count - start)
        left = torch.empty(count, dtype=one.dtype)
        right = torch.empty(count, dtype=other.dtype)
        source.read_into(first, left, start)
        source.read_into(second, right, start)
        if not torch.equal(left, right.to(left.dtype)):
            return False
    return True
