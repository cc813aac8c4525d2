"""New tokens in a pretrained model's vocabulary: sentinels, mode tokens, languages.

A token that a tokenizer splits into pieces looks fine and weakens what it should announce, so each
new token is checked to be one id, alone and before text. Rows for new tokens start as the mean of
the rows that were there (Hewitt 2021, "Initializing New Word Embeddings"): their logits then stay
below the largest ones, so the model's predictions hardly change before training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from polytask import rng
from polytask.errors import ConfigError
from polytask.objectives.denoising import Specials
from polytask.objectives.ul2 import MODE_TOKENS

SENTINEL = "<extra_id_{}>"  # T5's names, which other tokenizers get as well
MASK = "<mask>"


def extend_vocabulary(
    model: Any, tokenizer: Any, tokens: Sequence[str], spread: float = 0.0, seed: int = 0
) -> dict[str, int]:
    """Give `model` (Hugging Face) a row for each of `tokens`, and `tokenizer` an id; token -> id.

    Tokens that the tokenizer has as a whole stay what they are. `spread` adds noise to new rows, in
    units of the standard deviation of the old ones. Tied heads stay tied; an untied head and its
    bias get means of their own. Both arguments are changed.

    `ConfigError` for a token given twice, or that the tokenizer does not keep as one id; nothing
    is changed in the model then.
    """
    twice = sorted({token for token in tokens if list(tokens).count(token) > 1})
    if twice:
        raise ConfigError(f"new tokens are given twice: {', '.join(twice)}")
    known = dict(tokenizer.get_vocab())
    new = [token for token in tokens if token not in known]
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
    found = {token: single_id(tokenizer, token) for token in tokens}
    rows = sorted(found[token] for token in new)
    if rows:
        _add_rows(model, len(known), rows, max(len(tokenizer), rows[-1] + 1), spread, seed)
    return found


def single_id(tokenizer: Any, token: str) -> int:
    """The one id of a token, alone and where text follows; `ConfigError` if it is split."""
    alone = list(tokenizer(token, add_special_tokens=False)["input_ids"])
    before = list(tokenizer(f"{token} text", add_special_tokens=False)["input_ids"])
    if len(alone) != 1 or before[:1] != alone:
        pieces = tokenizer.convert_ids_to_tokens(alone if len(alone) != 1 else before)
        raise ConfigError(
            f"the tokenizer splits '{token}' into {len(pieces)} pieces ({' '.join(pieces[:6])}); a "
            "mode or sentinel must be one id. Choose a name without a part that it treats apart"
        )
    return int(alone[0])


def specials_of(
    model: Any,
    tokenizer: Any,
    sentinels: int = 100,
    modes: Mapping[str, str] = MODE_TOKENS,
    spread: float = 0.0,
    mask: bool = False,
) -> Specials:
    """Sentinels, mode tokens and (with `mask`) a mask, added where they are missing, and the end.

    T5's '<extra_id_0>', '<extra_id_1>', ... are the sentinels; `modes` maps a mode to its token's
    name ({} for none). `ConfigError` if the tokenizer has no end of text.
    """
    names = [SENTINEL.format(i) for i in range(sentinels)]
    words = len(tokenizer)
    masks = [tokenizer.mask_token or MASK] if mask else []
    found = extend_vocabulary(model, tokenizer, [*names, *modes.values(), *masks], spread)
    if mask:
        tokenizer.mask_token = masks[0]
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError("the tokenizer has no token that ends a text: set its eos_token")
    return Specials(
        tuple(found[name] for name in names),
        int(end),
        {mode: found[token] for mode, token in modes.items()},
        tokenizer.mask_token_id,
        (0, words),
    )


def _add_rows(model: Any, known: int, rows: list[int], size: int, spread: float, seed: int) -> None:
    """Grow the embedding to `size` rows if it has fewer, and fill `rows` with means."""
    before: nn.Embedding = model.get_input_embeddings()
    old = min(known, before.weight.shape[0])
    if before.weight.shape[0] < size:
        model.resize_token_embeddings(size, mean_resizing=False)
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    _fill(embedding, old, rows, spread, seed, "embedding")
    if head is None:
        return
    if head.weight.data_ptr() != embedding.data_ptr():
        _fill(head.weight, old, rows, spread, seed, "head")
    bias = getattr(head, "bias", None)
    if bias is not None:
        with torch.no_grad():
            bias[rows] = bias[:old].mean()


@torch.no_grad()
def _fill(weight: Any, old: int, rows: list[int], spread: float, seed: int, name: str) -> None:
    mean = weight[:old].float().mean(0)
    values = mean.expand(len(rows), -1)
    if spread:
        noise = torch.randn(values.shape, generator=rng.torch_generator(seed, "new rows", name))
        values = values + spread * weight[:old].float().std(0) * noise.to(weight.device)
    weight[rows] = values.to(weight.dtype)
