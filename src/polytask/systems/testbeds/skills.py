"""Digits seen through skills: tasks with a known shared structure, per block of the input.

Images are scikit-learn's digits (64 pixels, 1,797 of them). The pixels fall into four blocks of
16; for each block there are four skills, fixed random orthogonal maps of those 16 pixels. A task
picks one skill per block, independently for every block, and asks for the digit's parity or its
remainder by 5. So a task is a combination of skills, and the combination differs from block to
block. The base is a small network that knows plain digits; its head stays frozen: the answer to a
task is the sum of the probabilities of the digits that have it, so only adapters can learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from polytask import rng
from polytask.adapt import AdaptConfig, Adapters, attach
from polytask.adapt.diagnose import gradient_alignment, shared_parameters
from polytask.data import embedded

BLOCKS, SKILLS, WIDTH = 4, 4, 16
PARTS = {"train": 1000, "few": 300, "test": 497}


@dataclass(frozen=True)
class Setting:
    """How much of everything."""

    tasks: int = 40
    new_tasks: int = 10
    shots: int = 32
    steps: int = 1500
    batch: int = 64
    few_steps: int = 100
    reflections: int = WIDTH  # of a skill; as many as pixels make it a random orthogonal map


FULL = Setting()
SMOKE = Setting(tasks=6, new_tasks=2, shots=16, steps=20, few_steps=5)


@dataclass(frozen=True)
class World:
    """Images, skills and tasks of one seed."""

    image: dict[str, Tensor]  # part -> (n, 64)
    digit: dict[str, Tensor]  # part -> (n,)
    views: Tensor  # (tasks + new, 64, 64): what a task sees is x @ view
    modulus: Tensor  # (tasks + new,): 2 or 5
    setting: Setting

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tasks trained on."""
        return tuple(f"task {i}" for i in range(self.setting.tasks))

    @property
    def new_ids(self) -> range:
        return range(self.setting.tasks, self.setting.tasks + self.setting.new_tasks)


def orthogonal(seed: int, block: int, skill: int, reflections: int) -> Tensor:
    """(16, 16): a product of random Householder reflections."""
    found = torch.eye(WIDTH)
    for k in range(reflections):
        v = torch.randn(WIDTH, generator=rng.torch_generator(seed, "skill", block, skill, k))
        v = v / v.norm()
        found = found @ (torch.eye(WIDTH) - 2 * torch.outer(v, v))
    return found


def blocks(parts: Sequence[Tensor]) -> Tensor:
    """Square matrices along the diagonal of one, zeros elsewhere."""
    size = sum(len(part) for part in parts)
    found, start = torch.zeros(size, size), 0
    for part in parts:
        stop = start + len(part)
        found[start:stop, start:stop] = part
        start = stop
    return found


def world(setting: Setting, seed: int) -> World:
    """Everything of a seed; images of the three parts are different ones."""
    found = [embedded.arrays("digits", split) for split in embedded.load("digits")]
    image = np.concatenate([f["image"] for f in found]).reshape(-1, 64)
    digit = np.concatenate([f["label"] for f in found])
    order = rng.generator(seed, "images").permutation(len(digit))
    x = torch.from_numpy(image[order].astype(np.float32))
    x = (x - x.mean(0)) / (x.std(0) + 0.1 * x.std())
    y = torch.from_numpy(digit[order].astype(np.int64))
    sizes = [min(n, len(x)) for n in PARTS.values()]
    cut = np.cumsum([0, *sizes])
    pick = {p: slice(cut[i], cut[i + 1]) for i, p in enumerate(PARTS)}
    count = setting.tasks + setting.new_tasks
    draw = rng.generator(seed, "tasks")
    chosen = draw.integers(0, SKILLS, (count, BLOCKS))
    modulus = torch.from_numpy(np.where(np.arange(count) % 2 == 0, 2, 5))
    skill = {
        (b, k): orthogonal(seed, b, k, setting.reflections)
        for b in range(BLOCKS)
        for k in range(SKILLS)
    }
    views = torch.stack([blocks([skill[b, int(row[b])] for b in range(BLOCKS)]) for row in chosen])
    return World(
        {p: x[s] for p, s in pick.items()},
        {p: y[s] for p, s in pick.items()},
        views,
        modulus,
        setting,
    )


def answer_loss(logits: Tensor, digit: Tensor, modulus: Tensor) -> Tensor:
    """(n,) minus the log of the summed probabilities of all digits with the right answer."""
    log_p = logits.log_softmax(-1)
    digits = torch.arange(10)
    right = digits[None] % modulus[:, None] == (digit % modulus)[:, None]
    return -log_p.masked_fill(~right, -torch.inf).logsumexp(-1)


def answers(logits: Tensor, modulus: int) -> Tensor:
    """(n,) the most likely remainder."""
    p = logits.softmax(-1)
    remainder = torch.arange(10) % modulus
    return p.new_zeros(len(p), modulus).index_add(1, remainder, p).argmax(-1)


def base_network(place: World, seed: int, steps: int = 600) -> nn.Sequential:
    """64-128-128-10, trained on plain digits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive(seed, "base"))
        net = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.1)
    x, y = place.image["train"], place.digit["train"]
    for step in range(steps):
        rows = torch.from_numpy(rng.generator(seed, "base", step).integers(0, len(x), 64))
        loss = functional.cross_entropy(net(x[rows]), y[rows])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return net.requires_grad_(False)


@dataclass
class Pretrained:
    """A network with adapters, after multitask training."""

    net: nn.Sequential
    adapters: Adapters
    alignment: float  # mean over four moments of training


def seen(place: World, part: str, rows: Tensor, task: Tensor) -> Tensor:
    """(n, 64): images as their tasks see them."""
    return torch.bmm(place.image[part][rows][:, None], place.views[task])[:, 0]


def pretrain(
    place: World, base: nn.Sequential, config: AdaptConfig, lr: float, seed: int, shuffled: bool
) -> Pretrained:
    """Mixed batches of all training tasks. `shuffled`: task ids are drawn at random for every row,
    so that routing learns nothing about tasks."""
    import copy

    setting = place.setting
    net = copy.deepcopy(base)
    adapters = attach(net, config, place.names)
    optimizer = torch.optim.AdamW(adapters.groups(lr), weight_decay=0.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    measured = []
    net.train()
    torch.manual_seed(rng.derive(seed, "gates"))
    for step in range(setting.steps):
        draw = rng.generator(seed, "batch", step)
        rows = torch.from_numpy(draw.integers(0, len(place.image["train"]), setting.batch))
        task = torch.from_numpy(draw.integers(0, setting.tasks, setting.batch))
        told = (
            torch.from_numpy(draw.integers(0, setting.tasks, setting.batch)) if shuffled else task
        )
        scale = min(1.0, (step + 1) / (0.06 * setting.steps)) * (1 - step / setting.steps)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * scale
        with adapters.rows(told):
            logits = net(seen(place, "train", rows, task))
        loss = answer_loss(logits, place.digit["train"][rows], place.modulus[task]).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        if (step + 1) % max(1, setting.steps // 4) == 0:
            measured.append(_alignment(place, net, adapters))
    return Pretrained(net, adapters, float(np.mean(measured)))


def _alignment(place: World, net: nn.Sequential, adapters: Adapters) -> float:
    """Of the gradients of all training tasks, on all training images each, gates at rest."""
    net.eval()
    digit = place.digit["train"]

    def loss(name: str) -> Tensor:
        number = place.names.index(name)
        with adapters.rows(number):
            logits = net(place.image["train"] @ place.views[number])
        return answer_loss(logits, digit, place.modulus[number].expand(len(digit))).mean()

    found = gradient_alignment(loss, place.names, shared_parameters(adapters))
    net.train()
    return found.mean


def few_shot(
    place: World,
    start: Pretrained,
    task: int,
    lr: float,
    seed: int,
    prepare: Callable[[Adapters], None],
) -> float:
    """Test accuracy of a new task after tuning on its shots; `prepare` says what is tuned."""
    import copy

    setting = place.setting
    net = copy.deepcopy(start.net)
    adapters = net.adapters
    assert isinstance(adapters, Adapters)
    adapters._model = (net,)
    prepare(adapters)
    rows = rng.generator(seed, "shots", task).permutation(len(place.image["few"]))[: setting.shots]
    x = place.image["few"][rows] @ place.views[task]
    digit, modulus = place.digit["few"][rows], place.modulus[task].expand(len(rows))
    groups = adapters.groups(lr)
    net.train()
    if groups:
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        peaks = [group["lr"] for group in optimizer.param_groups]
        torch.manual_seed(rng.derive(seed, "few", task))
        for step in range(setting.few_steps):
            scale = min(1.0, (step + 1) / max(1.0, 0.06 * setting.few_steps))
            scale *= 1 - step / setting.few_steps
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
            with adapters.rows(0):
                loss = answer_loss(net(x), digit, modulus).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
            optimizer.step()
    net.eval()
    with torch.no_grad(), adapters.rows(0):
        logits = net(place.image["test"] @ place.views[task])
    number = int(place.modulus[task])
    right = answers(logits, number) == place.digit["test"] % number
    return float(right.float().mean())


@lru_cache(maxsize=64)
def pretrained(
    setting: Setting, seed: int, options: tuple[tuple[str, object], ...], lr: float, shuffled: bool
) -> Pretrained:
    """`pretrain` of a seed, kept for the arms that tune it in different ways."""
    place, base = prepared(setting, seed)
    config = AdaptConfig.model_validate({**dict(options), "targets": ("0", "2")})
    return pretrain(place, base, config, lr, seed, shuffled)


@lru_cache(maxsize=16)
def prepared(setting: Setting, seed: int) -> tuple[World, nn.Sequential]:
    """World and base network of a seed, kept while arms of the seed run one after another."""
    place = world(setting, seed)
    return place, base_network(place, seed, 600 if setting.steps > 100 else 60)
