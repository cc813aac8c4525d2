"""A pretrained and a fine-tuned Hugging Face checkpoint as two states of one classifier.

Both are loaded into the fine-tuned model's architecture. What the base lacks (the head that
fine-tuning added) is left out of its state, so that a graft knows it. Classes are read off a
classification head, or off words: at the mask of a masked language model, or after the prompt of a
causal one, which is how the skill-grafting paper fine-tunes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from polytask.errors import ConfigError, DataError, MergeError, suggestion
from polytask.models.hub import family_of, locate
from polytask.pipeline.localize_config import LocalizeConfig


@dataclass(frozen=True)
class Example:
    """A row: its text or pair of texts, and its class number."""

    texts: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Batch:
    """tokens: what the model is called with. at: (n,) where the word is read. label: (n,)."""

    tokens: dict[str, Tensor]
    at: Tensor
    label: Tensor


@dataclass(frozen=True)
class TextClassifier:
    """One architecture, two states of it, and how rows become class logits.

    Attributes:
        model: with the base's weights, in float32, without dropout.
        base: its state dict without the tensors that only the fine-tuned model has.
        finetuned: the fine-tuned model's state dict.
        classes: labels as text, by class number.
        words: (classes,) token of each class; None for a classification head.
        causal: whether the word follows the prompt instead of standing at the mask.
    """

    model: nn.Module
    base: dict[str, Tensor]
    finetuned: dict[str, Tensor]
    tokenizer: Any
    classes: tuple[str, ...]
    config: LocalizeConfig
    words: Tensor | None = None
    causal: bool = False

    @property
    def architecture(self) -> str:
        """Name of the class in transformers."""
        return type(self.model).__name__

    def number_of(self, label: Any, where: str) -> int:
        """Class number of a row's label; `DataError` names row, label and classes."""
        text = str(label)
        if text in self.classes:
            return self.classes.index(text)
        if not self.config.labels and text.isdigit() and int(text) < len(self.classes):
            return int(text)
        raise DataError(
            f"{where}: '{text}' is no class of the model.{suggestion(text, self.classes)}"
        )

    def batches(self, examples: Sequence[Example], size: int) -> Iterator[Batch]:
        """Consecutive rows, encoded and padded."""
        for start in range(0, len(examples), size):
            yield self.encode(examples[start : start + size])

    def encode(self, examples: Sequence[Example]) -> Batch:
        """Tokens of some rows; the prompt around a text is never cut, the text is."""
        first = [e.texts[0] for e in examples]
        second = [e.texts[1] for e in examples] if len(examples[0].texts) > 1 else None
        if self.words is not None:
            first, second = [self._prompt(example) for example in examples], None
        most = self.config.max_length
        limit = {"truncation": True, "max_length": most} if self.words is None else {}
        tokens = self.tokenizer(first, second, padding=True, return_tensors="pt", **limit)
        label = torch.tensor([e.label for e in examples])
        at = torch.zeros(len(examples), dtype=torch.int64)
        if self.words is not None:
            at = self._word_place(tokens, examples)
        device = next(self.model.parameters()).device
        moved = {key: value.to(device) for key, value in tokens.items()}
        return Batch(moved, at.to(device), label.to(device))

    def logits(self, model: Any, batch: Batch) -> Tensor:
        """(n, classes): the head's scores, or those of the classes' words at their place."""
        scores: Tensor = model(**batch.tokens).logits
        if self.words is None:
            return scores
        row = torch.arange(len(scores), device=scores.device)
        return scores[row, batch.at][:, self.words.to(scores.device)]

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Mean cross-entropy over the classes."""
        return functional.cross_entropy(self.logits(model, batch).float(), batch.label)

    @torch.no_grad()
    def probabilities(self, model: Any, examples: Sequence[Example]) -> Tensor:
        """(n, classes) float32 on the CPU."""
        size = self.config.eval_batch_size
        parts = [self.logits(model, batch) for batch in self.batches(examples, size)]
        return torch.cat(parts).float().softmax(1).cpu()

    def _prompt(self, example: Example) -> str:
        before, after = self.config.template.split("{mask}")
        mask = "" if self.causal else str(self.tokenizer.mask_token)
        template = before.rstrip() if self.causal else before + mask + after
        keys = ("text", "pair")[: len(example.texts)]
        empty = _fill(template, dict.fromkeys(keys, ""))
        room = self.config.max_length - len(self.tokenizer(empty)["input_ids"])
        share = max(1, room // len(keys))
        cut = {k: self._cut(t, share) for k, t in zip(keys, example.texts, strict=True)}
        return _fill(template, cut)

    def _cut(self, text: str, tokens: int) -> str:
        """The first `tokens` tokens of a text, as text."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ends = found["offset_mapping"]
        return text if len(ends) <= tokens else text[: ends[tokens - 1][1]]

    def _word_place(self, tokens: Any, examples: Sequence[Example]) -> Tensor:
        """(n,) position of the mask, or of the prompt's last token."""
        ids = tokens["input_ids"]
        if self.causal:
            last: Tensor = tokens["attention_mask"].sum(1) - 1
            return last
        is_mask = ids == self.tokenizer.mask_token_id
        wrong = (is_mask.sum(1) != 1).nonzero().flatten()
        if len(wrong):
            text, count = examples[int(wrong[0])].texts[0], int(is_mask[wrong[0]].sum())
            raise DataError(
                f"a prompt needs one {self.tokenizer.mask_token}; that of '{text[:60]}' has {count}"
            )
        place: Tensor = is_mask.int().argmax(1)
        return place


def _fill(template: str, values: dict[str, str]) -> str:
    """Put texts into their slots; braces within a text stay as they are."""
    parts = template.split("{text}")
    if "pair" in values:
        parts = [part.replace("{pair}", values["pair"]) for part in parts]
    return values["text"].join(parts)


def load_classifier(config: LocalizeConfig) -> TextClassifier:
    """Load both checkpoints. `ConfigError` for what cannot be loaded, `MergeError` for a base that
    is no base of the fine-tuned model."""
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer

    base, finetuned = locate(config.base), locate(config.finetuned)
    try:
        known = AutoConfig.from_pretrained(finetuned)
        tokenizer = AutoTokenizer.from_pretrained(finetuned)
        family = family_of(known)
        auto = _auto(family, bool(config.labels))
        options = {"use_safetensors": True, "dtype": torch.float32}
        with quiet():
            tuned = auto.from_pretrained(finetuned, **options)
            model, info = auto.from_pretrained(
                base, config=known, output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"localize: cannot load the models: {reason}") from error
    added = set(info["missing_keys"])
    state = model.state_dict()
    if len(added) * 2 > len(state):
        raise MergeError(
            f"{config.base} is no base of {config.finetuned}: it lacks {len(added)} of its "
            f"{len(state)} tensors ('{min(added)}', ...)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    model = model.to(config.device).eval()
    states = {k: v for k, v in model.state_dict().items() if k not in added}
    tuned_state = {k: v.to(config.device) for k, v in tuned.state_dict().items()}
    causal = bool(config.labels) and family == "decoder"
    if not config.labels:
        names = tuple(str(known.id2label[i]) for i in range(int(known.num_labels)))
        return TextClassifier(model, states, tuned_state, tokenizer, names, config)
    if causal and config.template.split("{mask}")[1].strip():
        raise ConfigError("localize: a causal model reads the word last: end template with {mask}")
    words = torch.tensor([_word(tokenizer, word) for word in config.labels.values()])
    if len(set(words.tolist())) < len(words):
        raise ConfigError("localize: two labels have the same word")
    names = tuple(str(label) for label in config.labels)
    return TextClassifier(model, states, tuned_state, tokenizer, names, config, words, causal)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without bars and without its table of missing tensors: we tell it ourselves."""
    from transformers.utils import logging as told

    logging: Any = told
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _auto(family: str, words: bool) -> Any:
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
    )

    if not words:
        return AutoModelForSequenceClassification
    if family == "encoder-decoder":
        raise ConfigError("localize: label words need a masked or a causal language model")
    return AutoModelForMaskedLM if family == "encoder" else AutoModelForCausalLM


def _word(tokenizer: Any, word: str) -> int:
    """The one token of a label's word, as it stands after a blank."""
    for text in (f" {word}", word):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            return int(ids[0])
    raise ConfigError(f"localize: '{word}' is not one token of the model; choose another word")
