"""A small decoder goes on with one objective or a mixture, judged on continuing and filling in.

Everything a proof compares is trained and scored here. All arms start from one causal language
model of prose, read as a prefix decoder from then on (its mask changes, no weight does), and see
equally many tokens more of equal text under the same draws: UL2R, the way in which UL2 is added to
a finished model (Tay et al. 2022, arXiv 2210.11399). Held-out scores are -log p per token of the
original text among tokens of text (sentinels, mode tokens and ends neither count nor get
probability), on three tests:

    continuation   the last quarter of a chunk, given the rest
    infill 15      15 % of the tokens in spans of 3, T5's corruption
    infill 50      half of the tokens in spans of 3

A test can be put to a model in several forms: as a prefix LM ('prefix'), with sentinels ('span'),
or, for filling in, from left to right ('left': what follows a gap is not seen before the gap is
filled, which is filling in by a model that cannot look ahead). A baseline is judged by the best
form of those that show it all that is given, and, in a second account, by the best of all.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional

from polytask import files
from polytask.data.embedded.folders import builders_lock, whole
from polytask.data.embedded.sources import cache_root
from polytask.models.convert import convert
from polytask.models.lm import LanguageModel, LanguageModelConfig
from polytask.objectives import denoising, draws, pairs, ul2
from polytask.objectives.denoising import Specials, full_lm, noise_mask, prefix_lm, span_corruption
from polytask.objectives.pairs import Pairs
from polytask.objectives.ul2 import (
    Denoiser,
    MixtureOfDenoisers,
    PrefixLM,
    SpanCorruption,
    chunk_size_for,
    ul2_mixture,
)
from polytask.systems.testbeds import denoisers_downstream as downstream
from polytask.systems.testbeds.prose import Part, Prose, prose
from polytask.train import language
from polytask.train.language import LanguageObjective, PretrainConfig, Pretrained, pretrain

Arm = Literal["mod", "sc", "plm", "silent", "no-s"]
Test = Literal["continuation", "infill 15", "infill 50"]
Form = Literal["prefix", "span", "left"]
ARMS: tuple[Arm, ...] = ("mod", "sc", "plm", "silent", "no-s")
TESTS: tuple[Test, ...] = ("continuation", "infill 15", "infill 50")
FORMS: Mapping[Test, tuple[Form, ...]] = {
    "continuation": ("prefix", "span"),
    "infill 15": ("span", "left"),
    "infill 50": ("span", "left"),
}
MODE: Mapping[Test, str] = {"continuation": "S", "infill 15": "R", "infill 50": "X"}
FORM: Mapping[Test, Form] = {"continuation": "prefix", "infill 15": "span", "infill 50": "span"}
_BASE = 0  # seed of the model that all arms start from
_HELD_OUT = 7  # seed of held-out spans and splits: the same for every arm and seed


@dataclass(frozen=True)
class Bench:
    """Sizes: `inputs` bounds a corrupted chunk, `tokens` is the budget of tokens seen, `base` what
    the model that all arms start from has seen. 310 ids are bytes, special tokens and 14 pieces:
    both sides of a gap say much about it."""

    dim: int = 64
    layers: int = 3
    heads: int = 4
    vocab: int = 310
    inputs: int = 48
    chunks: int = 16
    base: int = 2_000_000
    base_length: int = 96
    base_lr: float = 4e-3
    tokens: int = 800_000
    held_out: int = 300
    finetuning: int = 150
    spans: tuple[float, float, float] = (3, 5, 16)


def mixture(bench: Bench, arm: Arm) -> MixtureOfDenoisers:
    """What an arm trains on."""
    full = ul2_mixture("decoder", spans=bench.spans)
    if arm == "sc":
        return MixtureOfDenoisers((SpanCorruption(3, 0.15, mode="", input_end=False),))
    if arm == "plm":
        return MixtureOfDenoisers((PrefixLM("uniform", mode="", input_end=False),))
    return full.without("S") if arm == "no-s" else full


def specials(text: Prose, arm: Arm) -> Specials:
    """The codec's special tokens; 'silent' writes no mode tokens."""
    found = text.specials
    return replace(found, modes={}) if arm == "silent" else found


@dataclass(frozen=True)
class Trained:
    """A model and what its training cost and showed."""

    model: LanguageModel
    done: Pretrained
    curves: dict[str, list[tuple[int, float]]]  # denoiser -> (tokens seen, loss per original token)


def base_model(bench: Bench) -> LanguageModel:
    """The causal language model that all arms start from: trained once, kept in the cache."""
    place = cache_root() / "testbeds" / "denoisers" / f"base-{_key(bench, 'base', bench.base_lr)}"
    if not whole(place):
        with builders_lock(place):
            if not whole(place, warn=True):
                _train_base(bench).save(place)
    return LanguageModel.load(place)


def _train_base(bench: Bench) -> LanguageModel:
    text = prose(bench.vocab)
    config = LanguageModelConfig(
        architecture="causal",
        vocab_size=text.codec.size,
        dim=bench.dim,
        layers=bench.layers,
        heads=bench.heads,
        bos_id=text.codec.pad,
        pad_id=text.codec.pad,
        end_id=text.codec.end,
    )
    model = LanguageModel(config, _BASE)

    def draw(step: int) -> Pairs:
        rows = np.arange(bench.chunks) + bench.chunks * step
        return full_lm(text.windows("train", bench.base_length, _BASE, rows))

    pretrain(model, draw, _options(bench, bench.base, bench.base_lr, _BASE))
    return model


def _options(bench: Bench, tokens: int, lr: float, seed: int) -> PretrainConfig:
    return PretrainConfig(
        tokens=tokens,
        lr=lr,
        schedule="cosine",
        warmup=0.05,
        floor=0.1,
        seed=seed,
        width=4 * bench.inputs,
        objective=LanguageObjective(mean="sequence", z_loss=0.0),
    )


def train(bench: Bench, arm: Arm, lr: float, seed: int) -> Trained:
    """Go on with the base as a prefix decoder until it has seen `bench.tokens` tokens more."""
    text = prose(bench.vocab)
    model = convert(base_model(bench), "prefix")
    assert isinstance(model, LanguageModel)
    mixed, marks = mixture(bench, arm), specials(text, arm)
    sizes = [chunk_length(bench, denoiser) for denoiser in mixed.denoisers]

    def draw(step: int) -> Pairs:
        rows = np.arange(bench.chunks) + bench.chunks * step
        return mixed.make(
            lambda at, numbers: text.windows("train", sizes[at], seed, numbers), marks, seed, rows
        )

    found: dict[str, list[tuple[int, float]]] = {name: [] for name in mixed.names}

    def note(done: Pretrained, terms: Any) -> None:
        value, task = terms.value["nll"].numpy(), terms.task["nll"].numpy()
        for at in np.unique(task).tolist():
            found[mixed.names[at]].append((done.tokens, float(value[task == at].mean())))

    done = pretrain(model, draw, _options(bench, bench.tokens, lr, seed), note)
    return Trained(model, done, {name: _binned(points) for name, points in found.items()})


def chunk_length(bench: Bench, denoiser: Denoiser) -> int:
    """Tokens of a training chunk. Prefix LMs of every split share the length of UL2's S, so that
    none meets a longer text in the tests than in training."""
    kind = PrefixLM(0.25, input_end=False) if isinstance(denoiser, PrefixLM) else denoiser
    return chunk_size_for(kind, bench.inputs, modes=True).length


def _binned(points: list[tuple[int, float]], bins: int = 24) -> list[tuple[int, float]]:
    """Means of neighbouring points, few enough to keep."""
    parts = np.array_split(np.array(points, np.float64).reshape(-1, 2), min(bins, len(points)))
    return [(int(part[-1, 0]), round(float(part[:, 1].mean()), 4)) for part in parts if len(part)]


def test_length(bench: Bench, test: Test) -> int:
    """Tokens of a held-out chunk, such that its input fits."""
    kinds: Mapping[Test, Denoiser] = {
        "continuation": PrefixLM(0.25),
        "infill 15": SpanCorruption(3, 0.15),
        "infill 50": SpanCorruption(3, 0.5),
    }
    return chunk_size_for(kinds[test], bench.inputs, modes=True).length


def test_pairs(
    text: Prose, bench: Bench, test: Test, form: Form, mode: str | None, part: Part
) -> Pairs:
    """A test in one form; `mode` names the token that announces it, None writes none."""
    length, rows = test_length(bench, test), np.arange(bench.held_out)
    chunks = text.windows(part, length, _HELD_OUT, rows)
    marks = text.specials
    if test == "continuation":
        if form == "prefix":
            return prefix_lm(chunks, marks, _HELD_OUT, rows, 0.25, mode=mode, input_end=False)
        return span_corruption(
            chunks, marks, _HELD_OUT, rows, length, 0.25, 1, mode, input_end=False
        )
    rate = 0.15 if test == "infill 15" else 0.5
    if form == "span":
        return span_corruption(chunks, marks, _HELD_OUT, rows, 3, rate, mode=mode, input_end=False)
    return left_to_right(chunks, noise_mask(length, _HELD_OUT, rows, 3, rate), marks, mode)


def left_to_right(chunks: np.ndarray, mask: np.ndarray, marks: Specials, mode: str | None) -> Pairs:
    """Everything from the first missing token on is the target; only missing tokens count."""
    first = np.argmax(mask, axis=1).tolist()
    head, end = marks.mode(mode), () if marks.end is None else (marks.end,)
    return Pairs.of(
        [[*head, *row[:at].tolist()] for row, at in zip(chunks, first)],
        [[*row[at:].tolist(), *end] for row, at in zip(chunks, first)],
        [[*flags[at:].tolist(), *(False for _ in end)] for flags, at in zip(mask, first)],
    )


@torch.no_grad()
def honest_nll(
    model: LanguageModel, given: Pairs, special: Sequence[int], rows: int = 100
) -> float:
    """-log p per target token that belongs to the text, among tokens that do.

    Chunks of one length teach a model where ends and sentinels come; that knowledge, right or
    wrong for a test, is taken out: `special` ids get no probability.
    """
    model.eval()
    hidden = torch.tensor(special, dtype=torch.long)
    total, count = 0.0, 0
    for first in range(0, len(given), rows):
        part = given.take(np.arange(first, min(first + rows, len(given))))
        batch = model.feed(part)
        counts = torch.from_numpy(part.is_original)[batch.target]
        counts &= ~torch.isin(batch.label, hidden)  # ends of documents within a chunk
        logits = model.logits(batch)[counts].index_fill(1, hidden, -torch.inf)
        total += float(functional.cross_entropy(logits, batch.label[counts], reduction="sum"))
        count += int(counts.sum())
    return total / count


def score(
    text: Prose, bench: Bench, arm: Arm, model: LanguageModel, part: Part
) -> dict[str, float]:
    """'test/form/mode' -> `honest_nll`; mode '-' where none is written."""
    found = {}
    special = sorted({*text.codec.sentinels, *text.codec.modes, text.codec.end})
    for test in TESTS:
        for form in FORMS[test]:
            modes: tuple[str, ...] = ("-",)
            if arm in ("mod", "silent", "no-s"):
                modes = ("R", "S", "X", "-") if form == FORM[test] else (MODE[test],)
            for mode in modes:
                mark = None if mode == "-" else mode
                made = test_pairs(text, bench, test, form, mark, part)
                found[f"{test}/{form}/{mode}"] = honest_nll(model, made, special)
    return found


def scores(bench: Bench, arm: Arm, lr: float, seed: int) -> dict[str, Any]:
    """Train and score, or what was kept of it: scores by part, what was spent, curves."""
    path = cache_root() / "testbeds" / "denoisers" / f"{arm}-{seed}-{_key(bench, arm, lr)}.json"
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    text, trained = prose(bench.vocab), train(bench, arm, lr, seed)
    found: dict[str, Any] = {
        part: score(text, bench, arm, trained.model, part) for part in ("valid", "test")
    }
    done = trained.done
    found |= {
        "tokens": done.tokens,
        "steps": done.steps,
        "trained": done.trained,
        "efficiency": round(done.efficiency, 4),
        "parameters": sum(p.numel() for p in trained.model.parameters()),
        "curves": trained.curves,
    }
    if arm in ("mod", "sc", "plm") and downstream.here():
        found["downstream"] = downstream.finetuned(
            text, trained.model, arm == "mod", bench.inputs, seed, bench.finetuning
        )
    files.write_json(path, found)
    return found


def best(arm: Arm, found: Mapping[str, float], test: Test, blind: bool = False) -> float:
    """What an arm is judged by: the mixture by the form and mode that UL2 prescribes, every other
    arm by the best of all forms and modes that it was asked in. `blind` counts the form that hides
    what follows a gap among them."""
    if arm == "mod":
        return found[f"{test}/{FORM[test]}/{MODE[test]}"]
    forms = [form for form in FORMS[test] if blind or form != "left"]
    return min(
        v for key, v in found.items() if key.rsplit("/", 1)[0] in [f"{test}/{f}" for f in forms]
    )


def wrong_mode(found: Mapping[str, float], test: Test) -> float:
    """The same form under the other two modes' tokens, on average."""
    others = [mode for mode in ("R", "S", "X") if mode != MODE[test]]
    return sum(found[f"{test}/{FORM[test]}/{mode}"] for mode in others) / len(others)


def _key(bench: Bench, arm: str, lr: float) -> str:
    """Changes with the setting and with the code that decides the result."""
    from polytask.models import feed, lm, transformer

    digest = hashlib.blake2b(f"{bench}/{arm}/{lr}/{torch.__version__}".encode())
    for module in (
        denoising,
        draws,
        pairs,
        ul2,
        feed,
        lm,
        transformer,
        language,
        sys.modules[prose.__module__],
        downstream,
        sys.modules[__name__],
    ):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()[:16]
