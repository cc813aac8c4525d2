"""Pretraining in tokens per second beside a hand-written loop and `transformers.Trainer`, and
writing with and without a cache.

    python -m benchmarks language

All three train a causal decoder of the same sizes (learned positions, layer norm, GELU, tied
embeddings) in float32 with AdamW and gradient clipping on the same tokens: chunks of one length,
and documents of unequal length. The loop is what one writes in an afternoon: blocks on
`scaled_dot_product_attention`, padded batches. The Trainer runs GPT-2 with its collator's padding.
Tokens count without padding. First losses are compared before timing.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.harness import Aim, compare, options_of, show, show_versions
from torch import Tensor, nn

from polytask.infer.fusion_generate import generate
from polytask.infer.fusion_policy import Alone
from polytask.infer.language_source import LanguageSource
from polytask.models.feed import ARCHITECTURES
from polytask.models.lm import LanguageModel, LanguageModelConfig
from polytask.objectives.pairs import Pairs
from polytask.train.language import LanguageObjective, PretrainConfig, pretrain

VOCAB, DIM, LAYERS, HEADS, LENGTH, ROWS, STEPS = 1024, 128, 4, 4, 128, 16, 6


def documents(kind: str) -> list[list[np.ndarray]]:
    """STEPS batches of ROWS token sequences: of one length, or of a tenth to the whole of it."""
    random = np.random.default_rng(0)
    lengths = np.full((STEPS, ROWS), LENGTH)
    if kind == "unequal":
        lengths = random.integers(LENGTH // 10, LENGTH + 1, (STEPS, ROWS))
    return [[random.integers(3, VOCAB, n).astype(np.int32) for n in row] for row in lengths]


def sizes(architecture: str = "causal") -> LanguageModelConfig:
    return LanguageModelConfig(
        vocab_size=VOCAB,
        dim=DIM,
        layers=LAYERS,
        heads=HEADS,
        positions="learned",
        max_length=LENGTH,
        architecture=architecture,  # type: ignore[arg-type]
    )


def ours(batches: list[list[np.ndarray]]) -> Callable[[], float]:
    """`pretrain`; a batch of unequal documents is packed into rows of LENGTH."""
    model = LanguageModel(sizes())
    pairs = [Pairs.of([[]] * len(rows), rows) for rows in batches]
    config = PretrainConfig(
        tokens=sum(p.tokens for p in pairs), width=LENGTH, objective=LanguageObjective(z_loss=0)
    )

    def run() -> float:
        return pretrain(model, pairs.__getitem__, config).losses[0][1]

    return run


class Block(nn.Module):
    """Pre-norm attention and feed-forward, as everybody writes them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.up, self.down = nn.Linear(DIM, 4 * DIM), nn.Linear(4 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = (
            part.view(rows, length, HEADS, -1).transpose(1, 2)
            for part in self.qkv(self.first(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, DIM))
        return x + self.down(F.gelu(self.up(self.second(x))))


class PlainGPT(nn.Module):
    """Token and position embeddings, blocks, a norm, tied scores."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCAB, DIM), nn.Embedding(LENGTH, DIM)
        nn.init.normal_(self.token.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.token(ids) + self.place(torch.arange(ids.shape[1]))
        logits = self.norm(self.blocks(x)) @ self.token.weight.T
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def padded(rows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    for row, tokens in enumerate(rows):
        ids[row, 1 : len(tokens)] = torch.from_numpy(tokens[:-1].astype(np.int64))
        labels[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
    return ids, labels


def by_hand(batches: list[list[np.ndarray]]) -> Callable[[], float]:
    """The loop one writes."""
    torch.manual_seed(0)
    model = PlainGPT()
    tensors = [padded(rows) for rows in batches]

    def run() -> float:
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
        first = 0.0
        for step, (ids, labels) in enumerate(tensors):
            loss = model(ids, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            first = float(loss.detach()) if step == 0 else first
        return first

    return run


def trainer(batches: list[list[np.ndarray]]) -> Callable[[], float]:
    """`transformers.Trainer` with GPT-2 of these sizes."""
    import transformers as tf

    config = tf.GPT2Config(
        vocab_size=VOCAB,
        n_positions=LENGTH,
        n_embd=DIM,
        n_layer=LAYERS,
        n_head=HEADS,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = tf.GPT2LMHeadModel(config)
    # One more token in front, so that as many are predicted as in the other two.
    rows = [
        {"input_ids": [0, *tokens.tolist()][:LENGTH]}
        for tokens in itertools.chain.from_iterable(batches)
    ]

    def collate(part: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in part)
        ids = torch.zeros(len(part), width, dtype=torch.long)
        labels = torch.full((len(part), width), -100)
        mask = torch.zeros(len(part), width, dtype=torch.long)
        for place, row in enumerate(part):
            count = len(row["input_ids"])
            ids[place, :count] = torch.tensor(row["input_ids"])
            labels[place, :count], mask[place, :count] = ids[place, :count], 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    folder = tempfile.mkdtemp()
    arguments = tf.TrainingArguments(
        folder,
        per_device_train_batch_size=ROWS,
        num_train_epochs=1,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    runner = tf.Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    return lambda: float(runner.train().training_loss)


def _silent(run: Callable[[], object]) -> None:
    run()


def pretraining(clock: Callable[[], float], repeats: int) -> list[dict[str, Any]]:
    """Thousand tokens per second, padding left out."""
    found = []
    for kind in ("equal", "unequal"):
        batches = documents(kind)
        runs = {"polytask": ours(batches), "by hand": by_hand(batches), "Trainer": trainer(batches)}
        first = {name: run() for name, run in runs.items()}
        if max(first.values()) - min(first.values()) > 1.0:
            raise AssertionError(f"the three do not train the same thing: {first}")
        # `compare` takes a number for seconds, so the losses stay behind.
        timed = {name: partial(_silent, run) for name, run in runs.items()}
        taken = compare(timed, repeats, clock=clock).medians
        size = sum(len(row) for rows in batches for row in rows) / 1e3
        found.append(
            {
                "documents": kind,
                **{name: size / taken[name] for name in runs},
                "x by hand": taken["by hand"] / taken["polytask"],
                "x Trainer": taken["Trainer"] / taken["polytask"],
            }
        )
    return found


def writing(clock: Callable[[], float], repeats: int) -> list[dict[str, Any]]:
    """Seconds for 48 tokens after 8 prompts of 16 to 64 tokens, greedily."""
    random = np.random.default_rng(1)
    prompts = [random.integers(3, VOCAB, n).tolist() for n in range(16, 65, 7)]
    found = []
    for architecture in ARCHITECTURES:
        source = LanguageSource(LanguageModel(sizes(architecture), 1))

        def cached(source: LanguageSource = source) -> list[list[int]]:
            return [row.ids for row in generate([source], Alone(), prompts, max_new=48)]

        def uncached(source: LanguageSource = source) -> list[list[int]]:
            model, done = source.model, [list[int]() for _ in prompts]
            with torch.no_grad():
                for _ in range(48):
                    pairs = Pairs.of(prompts, [[*ids, 1] for ids in done])
                    batch = model.feed(pairs, pack=False)
                    last = np.flatnonzero(np.diff(batch.pair.numpy(), append=-1))
                    chosen = model.logits(batch)[torch.from_numpy(last)].argmax(-1).tolist()
                    for ids, token in zip(done, chosen, strict=True):
                        ids.append(token)
            return done

        if cached() != uncached():
            raise AssertionError(f"{architecture}: the cache changes what is written")
        taken = compare({"cached": cached, "uncached": uncached}, repeats, clock=clock).medians
        ratio = taken["uncached"] / taken["cached"]
        found.append({"architecture": architecture, **taken, "ratio": ratio})
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = options_of(__doc__, argv)
    used = show_versions(("torch", "transformers"))
    found = {
        "versions": used,
        "pretraining": pretraining(options.clock, options.repeats),
        "writing": writing(options.clock, options.repeats),
    }
    show(found, options)
    return found


def aims(figures: dict[str, Any]) -> list[Aim]:
    """1.2 times the Trainer, never slower than a loop by hand on unequal documents."""
    rows = {row["documents"]: row for row in figures["pretraining"]}
    return [
        Aim("pretraining beside transformers.Trainer", rows["equal"]["x Trainer"], at_least=1.2),
        Aim("the same, documents of unequal length", rows["unequal"]["x Trainer"], at_least=1.2),
        Aim("beside a loop by hand, unequal", rows["unequal"]["x by hand"], at_least=1.0),
        Aim(
            "writing with a cache beside without",
            min(row["ratio"] for row in figures["writing"]),
            at_least=2.0,
        ),
    ]
