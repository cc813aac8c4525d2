"""Adapters: one batch of many tasks beside peft's ways, and a training step beside peft's LoRA.

    python -m benchmarks adapters

A Llama of 256 x 4 layers with random weights, 32 rows of 64 tokens, LoRA of rank 8 on the query and
value projections, as many different adapters as rows ask for. 'one adapter' runs the whole batch
through one LoRA of peft. peft's mixed batch (`adapter_names=`) works in evaluation only; ours also
trains. All ways are checked to give the same outputs before they are timed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmarks.harness import Aim, compare, options_of, show, show_versions
from torch import Tensor

from polytask.adapt import AdaptConfig, Adapters, RoutedLoRA, attach

ROWS, LENGTH, RANK = 32, 64, 8
TARGETS = ("q_proj", "v_proj")
COUNTS = (1, 4, 16)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    return LlamaModel(config)


def tokens() -> Tensor:
    return torch.randint(0, 512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def run(model: Any, ids: Tensor, **more: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False, **more).last_hidden_state
    return found


def peft_model(count: int) -> Any:
    """peft's model with `count` LoRA adapters named '0', '1', ..., all different."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=list(TARGETS), init_lora_weights=False
    )
    torch.manual_seed(2)
    model = get_peft_model(llama(), config, adapter_name="0")
    for number in range(1, count):
        model.add_adapter(str(number), config)
    model.set_adapter("0")
    return model


@torch.no_grad()
def ours_from(peft: Any, count: int) -> tuple[Any, Adapters]:
    """The same base with the same adapters as one bank."""
    model = llama()
    config = AdaptConfig(method="task-lora", rank=RANK, targets=TARGETS)
    adapters = attach(model, config, [str(i) for i in range(count)])
    layers: dict[str, RoutedLoRA] = adapters.routed()
    for name, layer in layers.items():
        theirs = peft.base_model.model.get_submodule(name)
        for number in range(count):
            layer.lora_A[0, number].copy_(theirs.lora_A[str(number)].weight.T)
            layer.lora_B[0, number].copy_(theirs.lora_B[str(number)].weight.T)
    return model, adapters


def mixed(count: int, repeats: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Inference on a batch that mixes `count` adapters."""
    ids, task = tokens(), torch.arange(ROWS) % count
    peft = peft_model(count).eval()
    model, adapters = ours_from(peft, count)
    model.eval()
    names = [str(int(t)) for t in task]

    @torch.no_grad()
    def one() -> Tensor:
        peft.set_adapter("0")
        return run(peft, ids)

    @torch.no_grad()
    def switching() -> Tensor:
        out = torch.empty(ROWS, LENGTH, 256)
        for number in range(count):
            peft.set_adapter(str(number))
            out[task == number] = run(peft, ids[task == number])
        return out

    @torch.no_grad()
    def together() -> Tensor:
        return run(peft, ids, adapter_names=names)

    @torch.no_grad()
    def ours() -> Tensor:
        with adapters.rows(task):
            return run(model, ids)

    wanted = switching()
    gaps = {"peft, mixed batch": together(), "polytask, mixed batch": ours()}
    for way, found in gaps.items():
        gap = float((found - wanted).abs().max())
        if gap > 1e-4:
            raise AssertionError(f"{way} differs from switching by {gap}")
    ways = {
        "one adapter (peft)": one,
        "peft, switching": switching,
        "peft, mixed batch": together,
        "polytask, mixed batch": ours,
    }
    found = compare(ways, repeats, clock=clock)
    ratios = found.ratios()
    return [
        {
            "adapters": count,
            "way": way,
            "ms": 1000 * found.medians[way],
            "over_one": ratios[way],
            "gap": float((gaps[way] - wanted).abs().max()) if way in gaps else 0.0,
        }
        for way in ways
    ]


def training(repeats: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """Forward, backward and AdamW step: peft's LoRA, and ours for one and for sixteen tasks."""
    ids = tokens()
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(llama(), LoraConfig(r=RANK, target_modules=list(TARGETS))).train()
    ways: dict[str, Callable[[], object]] = {"peft LoRA": _stepper(peft, lambda: run(peft, ids))}
    kinds: dict[str, dict[str, Any]] = {
        "LoRA per task, one task": {"method": "task-lora"},
        "LoRA per task, 16 tasks": {"method": "task-lora"},
        "MHR, 16 tasks, 8 modules": {"method": "mhr", "modules": 8, "heads": 8},
    }
    for name, options in kinds.items():
        model = llama().train()
        config = AdaptConfig(rank=RANK, targets=TARGETS, **options)
        adapters = attach(model, config, [str(i) for i in range(16)])
        task = torch.arange(ROWS) % 16 if "16" in name else torch.zeros(ROWS, dtype=torch.long)
        ways[name] = _stepper(model, _within(model, adapters, task, ids))
    found = compare(ways, repeats, clock=clock)
    ratios = found.ratios()
    return [
        {"step": way, "ms": 1000 * found.medians[way], "over_peft": ratios[way]} for way in ways
    ]


def _within(model: Any, adapters: Adapters, task: Tensor, ids: Tensor) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with adapters.rows(task):
            return run(model, ids)

    return forward


def _stepper(model: Any, forward: Callable[[], Tensor]) -> Callable[[], None]:
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(forward().square().mean())
        optimizer.step()

    return step


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = options_of(__doc__, argv)
    used = show_versions(("torch", "transformers", "peft"))
    warnings.filterwarnings("ignore")
    rows = [row for n in COUNTS for row in mixed(n, options.repeats, options.clock)]
    found = {"versions": used, "mixed": rows, "training": training(options.repeats, options.clock)}
    show(found, options)
    return found


def aims(figures: dict[str, Any]) -> list[Aim]:
    """The bounds that issue and peers give."""
    by = {(r["adapters"], r["way"]): r for r in figures["mixed"]}
    most = by[16, "polytask, mixed batch"]
    step = {r["step"]: r["over_peft"] for r in figures["training"]}
    return [
        Aim("batch of 16 adapters over one adapter", most["over_one"], at_most=1.15),
        Aim(
            "batch of 16 adapters over peft's mixed batch",
            most["ms"] / by[16, "peft, mixed batch"]["ms"],
            at_most=1.0,
        ),
        Aim(
            "training step, LoRA per task, over peft's LoRA",
            step["LoRA per task, one task"],
            at_most=1.1,
        ),
    ]


if __name__ == "__main__":
    main()
