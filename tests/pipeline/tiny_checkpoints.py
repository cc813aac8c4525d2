"""Tiny Hugging Face checkpoints with a skill: base and fine-tuned, made in a second or two."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

GOOD = ("lovely", "superb", "warm", "bright")
BAD = ("dull", "broken", "cold", "grim")
FILLER = ("the", "it", "was", "film", "a", "day", "very", "and", "seat", "door")
WORDS = (*GOOD, *BAD, *FILLER, "great", "terrible", ".")


def sentences(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows with a sentence and a label that one of its words decides."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        words = [draw.choice(FILLER) for _ in range(5)]
        words[draw.randrange(5)] = draw.choice(GOOD if i % 2 else BAD)
        rows.append({"text": " ".join(words), "label": ["bad", "good"][i % 2]})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {
        w: i for i, w in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS))
    }
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def bert(folder: Path, kind: str, seed: int = 0) -> Any:
    """A random tiny BERT of the class `kind`, saved as the base (a classifier without head)."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        id2label={0: "bad", 1: "good"},
        label2id={"bad": 0, "good": 1},
    )
    model = getattr(transformers, kind)(config)
    saved = model.bert if kind == "BertForSequenceClassification" else model
    saved.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def gpt2(folder: Path, seed: int = 0) -> Any:
    import transformers

    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=5 + len(WORDS),
        n_embd=24,
        n_layer=2,
        n_head=2,
        n_positions=40,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.3,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def tune(
    model: Any, logits: Any, folder: Path, steps: int = 100, frozen: str = "embedding"
) -> None:
    """Fine-tune all but the embeddings on 192 sentences; `logits` gives two columns."""
    rows = sentences(192, seed=1)
    texts = [row["text"] for row in rows]
    label = torch.tensor([row["label"] == "good" for row in rows]).long()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(
            not any(part in name for part in (frozen, "wte", "wpe", "decoder"))
        )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.2, 0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits(model, texts), label).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
