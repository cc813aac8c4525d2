"""Source adapters on a frozen encoder, and targets with 64 labels that may use them.

glyphs  MNIST digits cut into seven related tasks (parity, size, primes, loops, ...); a two-layer
        transformer over 16 patches, pretrained without labels (masked patches, contrast of views).
        Adapters stand at the normalisation after each feed-forward, heads are linear.
texts   MiniLM (real pretrained weights) and the six text tasks of `testbeds.names`; one adapter at
        the last normalisation, everything below computed once; classes are scored by the vectors
        of their names, so only adapters and scales learn.

Every target's own adapter has seen only its 64 labels; the others have seen a thousand or so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from polytask import rng
from polytask.adapt import AdaptConfig, Adapters, attach
from polytask.data import embedded

Inputs = tuple[Tensor, ...]
Bank = dict[str, dict[str, dict[str, Tensor]]]  # adapter -> site -> tensors
GLYPH_TASKS: Mapping[str, tuple[int, ...]] = {  # class of each digit
    "parity": (0, 1, 0, 1, 0, 1, 0, 1, 0, 1),
    "large": (0, 0, 0, 0, 0, 1, 1, 1, 1, 1),
    "prime": (0, 0, 1, 1, 0, 1, 0, 1, 0, 0),
    "loop": (1, 0, 0, 0, 0, 0, 1, 0, 1, 1),
    "curved": (1, 0, 0, 1, 0, 0, 1, 0, 1, 1),
    "mod 3": (0, 1, 2, 0, 1, 2, 0, 1, 2, 0),
    "straight": (0, 1, 0, 0, 1, 0, 0, 1, 0, 0),
}


@dataclass(frozen=True)
class Setting:
    """How much of everything."""

    kind: str  # glyphs or texts
    tasks: tuple[str, ...]
    rich: int  # labels of a source
    few: int = 64  # labels of a target
    valid: int = 64
    test: int = 1000
    pretraining: int = 500  # steps
    stage1: int = 300
    stage2: int = 100
    batch: int = 32


GLYPHS = Setting("glyphs", tuple(GLYPH_TASKS), rich=1500)
TEXTS = Setting(
    "texts",
    ("languages", "library", "code", "emoji", "diagnoses", "phenotypes"),
    rich=400,
    test=300,
    stage1=100,
    stage2=60,
)
SMOKE: Mapping[str, Setting] = {
    "glyphs": Setting("glyphs", ("parity", "loop", "mod 3"), 64, 16, 16, 32, 3, 3, 3, 8),
    "texts": Setting("texts", ("languages", "library"), 48, 16, 16, 32, 0, 3, 3, 8),
}


@dataclass(frozen=True)
class Part:
    """Labelled rows; inputs are what the net is called with."""

    inputs: Inputs
    label: Tensor

    def rows(self, index: Tensor) -> tuple[Inputs, Tensor]:
        return tuple(x[index] for x in self.inputs), self.label[index]


@dataclass(frozen=True)
class Bed:
    """A frozen net and its tasks: task -> part ('rich', 'few', 'valid', 'test') -> rows.

    `names` holds the vectors of a task's classes where heads are those; `sites` name patterns.
    """

    setting: Setting
    net: nn.Module
    width: int  # of its features
    sites: tuple[str, ...]
    classes: Mapping[str, int]
    parts: Mapping[str, Mapping[str, Part]]
    names: Mapping[str, Tensor] | None = None


class PatchEncoder(nn.Module):
    """16 patches of 7 x 7, a post-norm transformer, the patches' states side by side."""

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(49, width)
        self.place = nn.Parameter(0.02 * torch.randn(16, width))
        self.mask = nn.Parameter(0.02 * torch.randn(width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
        self.fill = nn.Linear(width, 49)

    def tokens(self, patches: Tensor, hidden: Tensor | None = None) -> Tensor:
        """(n, 16, width) of patches (n, 16, 49); `hidden` (n, 16) are replaced by one vector."""
        x: Tensor = self.embed(patches)
        if hidden is not None:
            x = torch.where(hidden[..., None], self.mask, x)
        x = x + self.place
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, patches: Tensor) -> Tensor:
        """(n, 16 * width)."""
        return self.tokens(patches).flatten(1)


class LastNorm(nn.Module):
    """The last normalisation of MiniLM, the mean over tokens, unit length."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(len(weight), eps=1e-12)
        self.norm.load_state_dict({"weight": weight, "bias": bias})

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """(n, width) from what goes into the normalisation (n, L, width) and which tokens exist."""
        x = self.norm(states)
        there = mask[..., None].to(x.dtype)
        return functional.normalize((x * there).sum(1) / there.sum(1), dim=-1)


@lru_cache(maxsize=8)
def bed(setting: Setting, seed: int) -> Bed:
    """Net and tasks of a seed, kept while its arms run."""
    return _glyphs(setting, seed) if setting.kind == "glyphs" else _texts(setting, seed)


def _glyphs(setting: Setting, seed: int) -> Bed:
    found = [embedded.arrays("mnist5k", split) for split in ("train", "test")]
    image = np.concatenate([f["image"] for f in found]).reshape(-1, 28, 28)
    digit = torch.from_numpy(np.concatenate([f["label"] for f in found]).astype(np.int64))
    pixels = torch.from_numpy(image.astype(np.float32) / 255)
    x = patches_of(pixels)
    order = torch.from_numpy(rng.generator(seed, "glyphs").permutation(len(x)))
    sizes = {"net": 1500, "rich": setting.rich, "few": setting.few, "valid": setting.valid}
    start, pick = 0, {}
    for name, size in {**sizes, "test": setting.test}.items():
        pick[name] = order[start : start + size]
        start += size
    net = _pretrain(pixels[pick["net"]], setting.pretraining, seed)
    parts = {
        task: {
            name: Part((x[index],), torch.tensor(GLYPH_TASKS[task])[digit[index]])
            for name, index in pick.items()
        }
        for task in setting.tasks
    }
    classes = {task: max(GLYPH_TASKS[task]) + 1 for task in setting.tasks}
    return Bed(setting, net, 16 * 64, ("norm2",), classes, parts)


def patches_of(pixels: Tensor) -> Tensor:
    """(n, 28, 28) -> (n, 16, 49)."""
    return pixels.view(-1, 4, 7, 4, 7).transpose(2, 3).reshape(-1, 16, 49)


def _moved(pixels: Tensor, draw: np.random.Generator) -> Tensor:
    """Every image shifted by up to two pixels each way, with a little noise."""
    count = len(pixels)
    wide = functional.pad(pixels, (2, 2, 2, 2))
    step = torch.arange(28)
    down, right = torch.from_numpy(draw.integers(0, 5, (2, count, 1)))
    rows, columns = (down + step)[:, :, None], (right + step)[:, None]
    noise = torch.from_numpy(draw.normal(0, 0.1, (count, 28, 28)).astype(np.float32))
    return wide[torch.arange(count)[:, None, None], rows, columns] + noise


def _pretrain(pixels: Tensor, steps: int, seed: int) -> PatchEncoder:
    """No labels: half of the patches are filled in from the other half, and two moved views of an
    image must find each other among those of 64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive(seed, "encoder"))
        net, project = PatchEncoder(), nn.Linear(16 * 64, 64)
    optimizer = torch.optim.AdamW([*net.parameters(), *project.parameters()], lr=2e-3)
    for step in range(steps):
        _set_rate(optimizer, 2e-3, step, steps)
        draw = rng.generator(seed, "fill", step)
        rows = torch.from_numpy(draw.integers(0, len(pixels), 64))
        hidden = torch.from_numpy(draw.random((64, 16)) < 0.5)
        patches = patches_of(pixels[rows])
        loss = (net.fill(net.tokens(patches, hidden)) - patches)[hidden].square().mean()
        views = torch.cat([patches_of(_moved(pixels[rows], draw)) for _ in range(2)])
        first, second = torch.split(functional.normalize(project(net(views)), dim=-1), 64)
        loss = loss + functional.cross_entropy(first @ second.T / 0.2, torch.arange(64))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return net.requires_grad_(False)


def _texts(setting: Setting, seed: int) -> Bed:
    from polytask.systems.testbeds import names
    from polytask.systems.testbeds import names_encoder as encoder

    wanted = names.Setting(
        setting.tasks, names.FULL.pool, train=setting.rich + setting.few, valid=setting.valid
    )
    base = names.untrained(seed, wanted)
    layers = list(base.model.layer.values())
    last: Any = layers[-1]
    net = LastNorm(last.norm.weight.detach(), last.norm.bias.detach())
    parts: dict[str, dict[str, Part]] = {}
    for name, task in base.tasks.items():
        train = task.parts["train"]
        few = train.take(torch.arange(setting.few))
        rich = train.take(torch.arange(setting.few, min(len(train), setting.few + setting.rich)))
        test = task.parts["test"]
        test = test.take(torch.arange(min(len(test), setting.test)))
        data = {"few": few, "rich": rich, "valid": task.parts["valid"], "test": test}
        parts[name] = {
            p: Part(_before_last_norm(d.inputs(), layers), d.label) for p, d in data.items()
        }
    names_of = {name: task.head.get_buffer("names") for name, task in base.tasks.items()}
    classes = {name: len(task.classes) for name, task in base.tasks.items()}
    return Bed(
        setting, net.requires_grad_(False), encoder.WIDTH, ("norm",), classes, parts, names_of
    )


@torch.no_grad()
def _before_last_norm(inputs: Inputs, layers: list[nn.Module]) -> Inputs:
    """What goes into the last normalisation, for all texts at once."""
    states, mask = inputs
    seen: list[Tensor] = []
    last = layers[-1]
    handle = last.norm.register_forward_hook(  # type: ignore[union-attr, operator]
        lambda module, given, out: seen.append(given[0])
    )
    try:
        for chunk in torch.split(torch.arange(len(states)), 128):
            x = states[chunk]
            for layer in layers:
                x = layer(x, mask[chunk])
    finally:
        handle.remove()
    return torch.cat(seen), mask


# -- stage 1


@lru_cache(maxsize=8)
def adapters_of(setting: Setting, seed: int, lr: float = 1e-3) -> tuple[Bank, Bank]:
    """One adapter per task on its many labels, and one on its 64: (rich, few).

    All are trained in one go on batches that mix the tasks: every row runs through its own.
    """
    place = bed(setting, seed)
    kinds = [(task, part) for part in ("rich", "few") for task in setting.tasks]
    config = AdaptConfig(method="bottleneck", reduction=8, targets=place.sites, seed=seed)
    adapters = attach(place.net, config, [f"{t} {p}" for t, p in kinds])
    heads = [_Head(place, task, seed) for task, _ in kinds]
    learned = [p for head in heads for p in head.parameters()]
    groups = [*adapters.groups(lr), *([{"params": learned, "lr": lr}] if learned else [])]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rows = max(1, 3 * setting.batch // 4)
    task = torch.arange(len(kinds)).repeat_interleave(rows)
    for step in range(setting.stage1):
        _set_rate(optimizer, lr, step, setting.stage1)
        given = [_draw(place.parts[t][p], rows, seed, "stage 1", t, p, step) for t, p in kinds]
        with adapters.rows(task):
            features = place.net(*_together([inputs for inputs, _ in given]))
        parts = features.split(rows)
        loss = torch.stack(
            [
                functional.cross_entropy(head(part), label)
                for head, part, (_, label) in zip(heads, parts, given, strict=True)
            ]
        ).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    found: dict[str, Bank] = {"rich": {}, "few": {}}
    for t, p in kinds:
        found[p][t] = {site: layer.bank.get(f"{t} {p}") for site, layer in adapters.banks().items()}
    adapters.detach()
    return found["rich"], found["few"]


def _draw(part: Part, rows: int, seed: int, *stream: rng.Key) -> tuple[Inputs, Tensor]:
    index = rng.generator(seed, *stream).integers(0, len(part.label), rows)
    return part.rows(torch.from_numpy(index))


def _together(inputs: list[Inputs]) -> Inputs:
    """Rows of several tasks in one batch, padded to the longest."""
    longest = max(given[0].shape[1] for given in inputs)
    padded = [
        tuple(
            functional.pad(
                x, (0, 0, 0, longest - x.shape[1]) if x.ndim == 3 else (0, longest - x.shape[1])
            )
            for x in given
        )
        for given in inputs
    ]
    return tuple(torch.cat(column) for column in zip(*padded, strict=True))


class _Head(nn.Module):
    """Class logits: a fresh linear layer, or 20 times the cosine with the classes' names."""

    def __init__(self, place: Bed, task: str, seed: int) -> None:
        super().__init__()
        self.names = None if place.names is None else place.names[task]
        self.linear: nn.Linear | None = None
        if self.names is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(rng.derive(seed, "head", task))
                self.linear = nn.Linear(place.width, place.classes[task])

    def forward(self, features: Tensor) -> Tensor:
        if self.linear is not None:
            found: Tensor = self.linear(features)
            return found
        assert self.names is not None
        return 20 * functional.linear(features, self.names)


def _set_rate(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int) -> None:
    """Linear decay; every group keeps its own peak."""
    for group in optimizer.param_groups:
        group.setdefault("peak", group["lr"])
        group["lr"] = group["peak"] * (1 - step / steps)


# -- stage 2


def shuffled(bank: Bank, seed: int) -> Bank:
    """Every source's weights at another layer; with one layer, input features permuted."""
    found: Bank = {}
    for name, parts in bank.items():
        sites = list(parts)
        if len(sites) > 1:
            moved = [*sites[1:], sites[0]]
            found[name] = {site: parts[other] for site, other in zip(sites, moved, strict=True)}
        else:
            order = torch.from_numpy(
                rng.generator(seed, "shuffled", name).permutation(parts[sites[0]]["up"].shape[0])
            )
            one = parts[sites[0]]
            found[name] = {sites[0]: {**one, "down": one["down"][:, order], "up": one["up"][order]}}
    return found


def untrained(bank: Bank, seed: int) -> Bank:
    """Sources of the same shape and size that have learned nothing."""
    found: Bank = {}
    for name, parts in bank.items():
        found[name] = {}
        for site, tensors in parts.items():
            draw = {
                part: torch.randn(t.shape, generator=rng.torch_generator(seed, name, site, part))
                for part, t in tensors.items()
            }
            found[name][site] = {
                part: noise * (tensors[part].norm() / noise.norm()) for part, noise in draw.items()
            }
    return found


@dataclass(frozen=True)
class Score:
    """Accuracy of one target, and how many numbers were learned besides the head."""

    test: float
    valid: float
    learned: int


def stage2(
    place: Bed, target: str, bank: Bank | None, options: Mapping[str, object], lr: float, seed: int
) -> Score:
    """Learn the target from its 64 labels, with sources (`bank`) or its own adapter alone."""
    setting = place.setting
    own = adapters_of(setting, seed)[1][target]
    if bank is None:
        config = AdaptConfig(method="bottleneck", reduction=8, targets=place.sites)
        adapters = attach(place.net, config, (target,))
        for site, layer in adapters.banks().items():
            layer.bank.set(target, own[site])
    else:
        given = {"targets": place.sites, "sources": ("here",), "seed": seed, **options}
        config = AdaptConfig.model_validate(given)
        adapters = attach(place.net, config, (target,), sources={**bank, target: own})
    learned = adapters.share().trained
    head = _Head(place, target, seed)
    trained = [*adapters.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in trained if p.requires_grad]}], lr=lr, weight_decay=0.0
    )
    place.net.train()
    torch.manual_seed(rng.derive(seed, "stage 2", target))
    few = place.parts[target]["few"]
    for step in range(setting.stage2):
        _set_rate(optimizer, lr, step, setting.stage2)
        inputs, label = _draw(few, setting.batch, seed, "stage 2", target, step)
        with adapters.rows(0):
            loss = functional.cross_entropy(head(place.net(*inputs)), label)
        loss = loss + _regularizer(adapters)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    place.net.eval()
    scores = [_accuracy(place, adapters, head, target, part) for part in ("test", "valid")]
    adapters.detach()
    return Score(scores[0], scores[1], learned)


def _regularizer(adapters: Adapters) -> Tensor:
    """AdapterFusion pulls its values to the identity, as its published trainer does."""
    from polytask.adapt import Fusion

    parts = [t.regularizer() for t in adapters.tables.values() if isinstance(t, Fusion)]
    return torch.stack(parts).sum() if parts else torch.zeros(())


@torch.no_grad()
def _accuracy(place: Bed, adapters: Adapters, head: nn.Module, target: str, part: str) -> float:
    data = place.parts[target][part]
    right = 0
    for chunk in torch.split(torch.arange(len(data.label)), 256):
        inputs, label = data.rows(chunk)
        with adapters.rows(0):
            right += int((head(place.net(*inputs)).argmax(1) == label).sum())
    return right / len(data.label)
