"""UL2 for other people's training loops: a function for `Dataset.map` of Hugging Face datasets.

    specials = specials_of(model, tokenizer)                    # polytask.models.extend
    texts.map(ul2(tokenizer, specials, inputs_len=512), batched=True, batch_size=128,
              with_indices=True, remove_columns=texts.column_names)

Documents of a batch are joined, each closed by an end, and cut into chunks of the length that the
denoiser of each example needs. What is left of a batch is too short for the next chunk and goes.
Examples are a function of seed and indices: the same map gives the same examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from polytask.errors import ConfigError
from polytask.objectives.denoising import Specials, Split
from polytask.objectives.ul2 import Preset, chunk_size_for, ul2_mixture

Columns = dict[str, list[Any]]
MapFunction = Callable[[Mapping[str, Sequence[Any]], Sequence[int]], Columns]
IGNORED = -100  # label of tokens that are read and not predicted
_MOST = 1 << 24  # examples that one batch may give


def ul2(
    tokenizer: Any,
    specials: Specials,
    inputs_len: int = 512,
    targets_len: int | None = None,
    preset: Preset = "ul2-20b",
    column: str = "text",
    s_rate: Split = 0.25,
    spans: tuple[float, float, float] = (3, 8, 64),
    seed: int = 0,
) -> MapFunction:
    """(batch, indices) -> columns.

    ul2-20b         input_ids and labels of an encoder-decoder.
    decoder, ul2r   input_ids (input and target, `inputs_len` together), labels with -100 over the
                    input, and prefix, the length of the input, for a prefix mask.

    `ConfigError` for targets that do not fit `targets_len`, or a batch without the column.
    """
    mixture = ul2_mixture(preset, s_rate, spans)
    decoder = preset != "ul2-20b"
    if decoder and targets_len is not None:
        raise ConfigError("targets_len is for encoder-decoders; a decoder's inputs_len holds both")
    context = inputs_len if decoder else None
    sizes = [
        chunk_size_for(d, inputs_len, targets_len, bool(specials.modes), context=context).length
        for d in mixture.denoisers
    ]

    def apply(batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> Columns:
        if column not in batch:
            raise ConfigError(f"the data set has no column '{column}' (has: {', '.join(batch)})")
        encoded = tokenizer(list(batch[column]), add_special_tokens=False, verbose=False)
        tail = [] if specials.end is None else [specials.end]
        stream = np.array([i for ids in encoded["input_ids"] for i in (*ids, *tail)], np.int32)
        first = int(indices[0]) * _MOST
        room = len(stream) // min(sizes) + 1
        drawn = mixture.draw(seed, first + np.arange(room))
        until = np.cumsum(np.array(sizes)[drawn])
        count = int(np.searchsorted(until, len(stream), "right"))
        begin = until - np.array(sizes)[drawn]

        def chunks(denoiser: int, rows: np.ndarray) -> np.ndarray:
            places = begin[rows - first]
            return np.asarray(stream[places[:, None] + np.arange(sizes[denoiser])])

        pairs = mixture.make(chunks, specials, seed, first + np.arange(count))
        sides = [(pairs.input(i).tolist(), pairs.target(i).tolist()) for i in range(len(pairs))]
        if not decoder:
            return {"input_ids": [a for a, _ in sides], "labels": [b for _, b in sides]}
        return {
            "input_ids": [a + b for a, b in sides],
            "labels": [[IGNORED] * len(a) + b for a, b in sides],
            "prefix": [len(a) for a, _ in sides],
        }

    return apply
