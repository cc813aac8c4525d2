"""Character models of the domains: a large generalist, a small one, experts of the small.

All are polytask's own transformer, trained here by its trainer, once per seed, and kept in the
cache: the generalists on equal parts of the known domains, an expert by going on with the small
generalist's weights on one domain, known or new.

Legend: B rows, L length, V vocabulary.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polytask import files, rng
from polytask.data.embedded.sources import cache_root
from polytask.infer.logit_sources import PolytaskSource, Vocabulary
from polytask.models.batch import Terms
from polytask.models.language import token_scorer
from polytask.models.masks import MaskSpec
from polytask.models.multitask import MultitaskModel
from polytask.models.specs import HeadSpec, InputSpec, ModelConfig, ModelSpec
from polytask.objectives import token_cross_entropy
from polytask.systems.testbeds import domains as text
from polytask.train.config import TrainConfig
from polytask.train.loader import FunctionLoader
from polytask.train.trainer import Trainer

VERSION = 2  # raise it when the way models are trained changes


@dataclass(frozen=True)
class Setting:
    """Sizes and training of one seed's models; part of the key under which they are cached."""

    large_dim: int = 96
    large_layers: int = 2
    small_dim: int = 48
    small_layers: int = 1
    context: int = 256
    batch: int = 16
    large_steps: int = 600
    small_steps: int = 600
    expert_steps: int = 200
    lr: float = 3e-3
    expert_lr: float = 1e-3


NAMES = ("large", "base", *text.DOMAINS)
FULL = Setting()
SMOKE = Setting(32, 1, 16, 1, 64, 4, 4, 4, 2)
QUICK = Setting(64, 2, 32, 1, 128, 16, 250, 250, 100)  # a demonstration in half a minute


@dataclass(frozen=True)
class Family:
    """One seed's models: `sources` are large, base, then the experts in the order of DOMAINS."""

    models: tuple[MultitaskModel, ...]
    setting: Setting

    @property
    def sources(self) -> list[PolytaskSource]:
        return [CharacterSource(m, n) for m, n in zip(self.models, NAMES, strict=True)]

    def chosen(self, experts: Sequence[str]) -> list[PolytaskSource]:
        """Large, base and the named experts."""
        found = {source.name: source for source in self.sources}
        return [found[name] for name in ("large", "base", *experts)]

    @torch.no_grad()
    def logits(self, ids: text.Ids, models: Sequence[int]) -> dict[int, Tensor]:
        """(B, L - 1, V) of the models at these places of `NAMES`: place i predicts character i + 1
        from at least half a context (from all there is at the beginning). L should be a multiple
        of half a context."""
        half = self.setting.context // 2
        rows, length = ids.shape
        if length % half or length < 2 * half:
            raise ValueError(f"{length} characters are no multiple of {half} from {2 * half} on")
        starts = range(0, length - half, half)
        wide = torch.from_numpy(np.stack([ids[:, s : s + 2 * half] for s in starts], 1)).long()
        found = {}
        for number in models:
            source = self.sources[number]
            chunks = torch.split(wide.flatten(0, 1), 64)
            flat = torch.cat([source.forward(w, last=False)[0] for w in chunks])
            each = flat.view(rows, len(starts), *flat.shape[1:])  # (B, windows, context, V)
            pieces = [each[:, 0], *(each[:, k, half:] for k in range(1, len(starts)))]
            found[number] = torch.cat(pieces, 1)[:, :-1]
        return found


class CharacterSource(PolytaskSource):
    """A character model that reads and writes text."""

    def __init__(self, model: MultitaskModel, name: str) -> None:
        super().__init__(model, name=name, vocabulary=Vocabulary(text.TOKENS))

    def encode(self, prompt: str) -> list[int]:
        return [int(i) for i in text.encode(prompt)] or [text.PAD]

    def decode(self, ids: Sequence[int]) -> str:
        return text.decode(ids)


def family(seed: int, setting: Setting = FULL) -> Family:
    """A seed's models, from the cache or trained now."""
    key = hashlib.blake2b(f"{VERSION} {setting} {_digest()}".encode(), digest_size=8).hexdigest()
    folder = cache_root() / "domain-models" / f"seed{seed}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / files.MANIFEST).is_file():
        with files.building(folder) as aside:
            for name, model in _train_all(seed, setting).items():
                _save(aside / f"{name}.safetensors", model)
    models = []
    for name in NAMES:
        model = character_model(setting, large=name == "large", seed=seed)
        _load(folder / f"{name}.safetensors", model)
        models.append(model.eval())
    return Family(tuple(models), setting)


def character_model(setting: Setting, *, large: bool, seed: int) -> MultitaskModel:
    """An untrained model of characters, tied embeddings, rotary positions."""
    config = ModelConfig(
        dim=setting.large_dim if large else setting.small_dim,
        layers=setting.large_layers if large else setting.small_layers,
        heads=4 if large else 2,
        seed=rng.derive(seed, "large" if large else "small") % 2**31,
    )
    inputs = InputSpec(
        vocab_size=len(text.TOKENS), pad_id=text.PAD, end_id=None, text_length=setting.context
    )
    head = HeadSpec(task="text", kind="generate", outputs=0)
    return MultitaskModel(ModelSpec(config=config, inputs=inputs, heads=(head,)))


@dataclass(frozen=True)
class Characters:
    """Windows of one step, (B, L + 1); every row is of the one task."""

    ids: Tensor

    @property
    def rows(self) -> int:
        return len(self.ids)

    @property
    def task(self) -> Tensor:
        return torch.zeros(len(self.ids), dtype=torch.long, device=self.ids.device)

    @property
    def row(self) -> Tensor:
        return torch.arange(len(self.ids), device=self.ids.device)

    def to(self, device: Any, non_blocking: bool = False) -> Characters:
        """The same windows on another device."""
        return Characters(self.ids.to(device, non_blocking=non_blocking))


def next_character(model: MultitaskModel, batch: Characters) -> Terms:
    """Mean -log p of the next character over each window."""
    x = model.embed_text(batch.ids[:, :-1])
    hidden = model.trunk(x, MaskSpec(causal=True))
    logits = token_scorer(model)(hidden).flatten(0, 1)
    nll = token_cross_entropy(logits, batch.ids[:, 1:].flatten())[0]
    return Terms(
        {"text": nll.view(len(batch.ids), -1).mean(1)}, {"text": batch.task}, {"text": batch.row}
    )


def train(
    model: MultitaskModel,
    names: Sequence[str],
    setting: Setting,
    steps: int,
    lr: float,
    seed: int,
    stream: str,
) -> None:
    """Train in place on windows of the named domains in turn; batches depend on (seed, step)."""
    texts = [text.corpus(name)["train"] for name in names]

    def take(step: int) -> Characters:
        # The first domain of a batch moves on, so that all get the same number of rows.
        turned = [texts[(step * setting.batch + i) % len(texts)] for i in range(len(texts))]
        drawn = text.windows(turned, setting.context + 1, setting.batch, seed, stream, step)
        return Characters(torch.from_numpy(drawn).long())

    config = TrainConfig(
        steps=steps,
        batch_size=setting.batch,
        seed=seed,
        device="cpu",
        lr=lr,
        schedule="cosine",
        warmup=0.1,
        log_every=max(1, min(50, steps)),
        checkpoint_every=0,
        keep=1,
        progress=False,
    )
    loader = FunctionLoader(("text",), take, sum(map(len, texts)) // setting.context)
    with tempfile.TemporaryDirectory() as run:
        Trainer(model, loader, config, run, next_character).fit()
    model.eval()


def _train_all(seed: int, setting: Setting) -> dict[str, MultitaskModel]:
    found = {}
    for name, steps in (("large", setting.large_steps), ("base", setting.small_steps)):
        model = character_model(setting, large=name == "large", seed=seed)
        train(model, text.KNOWN, setting, steps, setting.lr, seed, name)
        found[name] = model
    for domain in text.DOMAINS:
        expert = character_model(setting, large=False, seed=seed)
        expert.load_state_dict(found["base"].state_dict())
        train(expert, [domain], setting, setting.expert_steps, setting.expert_lr, seed, domain)
        found[domain] = expert
    return found


def _digest() -> str:
    """What the models learn from."""
    digest = hashlib.blake2b(digest_size=8)
    for domain in text.DOMAINS:
        digest.update(text.corpus(domain)["train"].tobytes())
    return digest.hexdigest()


def _save(path: Path, model: MultitaskModel) -> None:
    from safetensors.torch import save_model

    save_model(model, str(path))


def _load(path: Path, model: MultitaskModel) -> None:
    from safetensors.torch import load_model

    load_model(model, str(path))
