"""Find the few parameters that carry a skill: `python examples/localize_a_skill.py`.

A small net learns to read digits, then is fine-tuned with SGD on digits that lie on their side.
Which of its parameters hold the new skill? A mask is learned, the values under it are kept in a
file of a few kilobytes, applied to the base, and purged again. A few seconds.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from polytask.merge.graft import Graft, parameter_names
from polytask.merge.graft_delta import SparseDelta
from polytask.merge.graft_fit import MaskConfig, fit_mask, with_state
from polytask.merge.graft_map import bits_by_module

Rows = tuple[Tensor, Tensor]


def digits(turns: int) -> dict[str, Rows]:
    """Rows of 64 grey values and labels; `turns` quarter turns."""
    images, labels = load_digits(return_X_y=True)
    turned = np.rot90(images.reshape(-1, 8, 8), turns, axes=(1, 2)).reshape(-1, 64) / 16
    x, y = torch.tensor(turned, dtype=torch.float32), torch.tensor(labels)
    cuts = {"train": slice(0, 1000), "valid": slice(1000, 1300), "test": slice(1300, None)}
    return {name: (x[cut], y[cut]) for name, cut in cuts.items()}


def loss(model: Any, rows: Rows) -> Tensor:
    return functional.cross_entropy(model(rows[0]), rows[1])


def accuracy(model: Any, rows: Rows) -> float:
    return float((model(rows[0]).argmax(1) == rows[1]).float().mean())


def train(model: nn.Module, rows: Rows, steps: int, lr: float) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for step in range(steps):
        chosen = torch.randperm(len(rows[1]), generator=torch.Generator().manual_seed(step))[:64]
        optimizer.zero_grad()
        loss(model, (rows[0][chosen], rows[1][chosen])).backward()
        optimizer.step()
    return model


def main() -> None:
    torch.manual_seed(0)
    upright, sideways = digits(0), digits(1)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
    base = train(nn.Sequential(*net, nn.Linear(128, 10)), upright["train"], 600, 0.2)
    tuned = train(copy.deepcopy(base), sideways["train"], 300, 0.1)

    graft = Graft.between(
        base.state_dict(),
        tuned.state_dict(),
        sparsity=0.05,
        patch=0.25,
        parameters=parameter_names(base),
    )
    found = fit_mask(
        graft,
        base,
        loss,
        [sideways["train"]],
        lambda model: accuracy(model, sideways["valid"]),
        MaskConfig(steps=40),
    )
    kept = graft.sparse(found.mask, "sideways").to(torch.float16)
    path = Path("sideways.safetensors")
    kept.save(path)
    print(f"{kept}, {path.stat().st_size / 1024:.0f} kB, best at step {found.best}")

    moved = graft.sparse(graft.movement())
    models = {
        "base": base.state_dict(),
        "fine-tuned": tuned.state_dict(),
        "those that moved most": moved.apply(base.state_dict()),
        "graft": SparseDelta.load(path).apply(base.state_dict()),
        "fine-tuned, purged": kept.purge(tuned.state_dict(), base.state_dict()),
    }
    print(f"{'accuracy on':24}{'upright':>10}{'sideways':>10}")
    for name, state in models.items():
        scores = [with_state(base, state, accuracy, d["test"]) for d in (upright, sideways)]
        print(f"{name:24}{scores[0]:10.3f}{scores[1]:10.3f}")
    for cell in bits_by_module(kept):
        print(f"layer {cell.layer}: {cell.bits} of {cell.size} parameters")


if __name__ == "__main__":
    main()
