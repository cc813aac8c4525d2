"""Tokens per second of dynamic logit fusion beside the naive loop, and the cost of its search.

    python -m benchmarks fusion

Four Llamas with random weights (a large one, a small base, two experts) continue a batch of
prompts. The naive loop is the method as one would first write it: no caches, one prompt at a time,
one strength at a time with both divergences from probabilities. It writes the same tokens (checked
before timing). The search alone is timed on logits of a common vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmarks.harness import Aim, compare, options_of, show, show_versions
from torch import Tensor

from polytask.infer.fusion import GRID, fuse_step
from polytask.infer.fusion_generate import generate
from polytask.infer.fusion_policy import Choice, FusionConfig, FusionPolicy, State
from polytask.infer.logit_sources import HubSource

VOCABULARY = 8192


class NoTokenizer:
    """Ids are all this benchmark needs."""

    eos_token_id = None

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(VOCABULARY)}


def sources(seed: int = 0) -> list[HubSource]:
    """Large (4 layers of 256), base and two experts (2 layers of 128)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    found = []
    for number, (width, layers) in enumerate([(256, 4), (128, 2), (128, 2), (128, 2)]):
        torch.manual_seed(seed + number)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=512,
            eos_token_id=None,
            bos_token_id=None,
            initializer_range=0.08,
        )
        found.append(HubSource(LlamaForCausalLM(config), NoTokenizer(), f"model {number}"))
    return found


def one_at_a_time(large: Tensor, base: Tensor, experts: Tensor) -> Tensor:
    """(V,) fused logits of one row: 21 strengths for each expert, one after the other."""

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum()

    best, chosen = float("inf"), large
    for alpha in GRID:
        for moved in experts:
            fused = large + alpha * (moved - base)
            loss = 0.0
            for expert in experts:
                a, b = divergence(expert, base), divergence(base, expert)
                forward, reverse = divergence(fused, large), divergence(large, fused)
                loss += float((forward - a) ** 2 + (reverse - b) ** 2)
            if loss < best:
                best, chosen = loss, fused
    return chosen


@torch.no_grad()
def naive(models: Sequence[HubSource], prompts: list[list[int]], new: int) -> list[list[int]]:
    """No cache, no batch, one strength at a time."""
    found = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(new):
            seen = torch.tensor([ids])
            logits = [s.model(input_ids=seen).logits[0, -1].double() for s in models]
            fused = one_at_a_time(logits[0], logits[1], torch.stack(logits[2:]))
            ids.append(int(fused.argmax()))
        found.append(ids[len(prompt) :])
    return found


class Unsearched:
    """All models run and the large one's logits are taken: what decoding costs by itself."""

    sources: int | None = None
    stateless = True

    def __call__(self, logits: Sequence[Tensor], state: State) -> Choice:
        return Choice(logits[0], {}, state)


def decoding(
    clock: Callable[[], float], repeats: int, rows: int, length: int, new: int
) -> list[dict[str, Any]]:
    """Tokens per second of the loops; all of them write `rows` x `new` tokens."""
    models = sources()
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, VOCABULARY, (rows, length), generator=generator).tolist()
    policy = FusionPolicy(FusionConfig(), len(models) - 2)

    def fused() -> list[list[int]]:
        return [one.ids for one in generate(models, policy, prompts, max_new=new)]

    def unsearched() -> None:
        generate(models, Unsearched(), prompts, max_new=new)

    ours, theirs = fused(), naive(models, prompts, new)
    if ours != theirs:
        raise RuntimeError("the fused loop and the naive one wrote different tokens")
    runs = {"fused": fused, "no search": unsearched, "naive": lambda: naive(models, prompts, new)}
    times = compare(runs, repeats, warm_up=0, clock=clock)
    return [
        {"loop": name, "tokens_per_s": rows * new / seconds, "times_fused": ratio}
        for (name, seconds), ratio in zip(times.medians.items(), times.ratios().values())
    ]


def searching(
    clock: Callable[[], float], repeats: int, rows: int, vocabulary: int
) -> list[dict[str, Any]]:
    """Milliseconds of one step's search for a batch."""
    generator = torch.Generator().manual_seed(0)
    large, base = torch.randn(2, rows, vocabulary, generator=generator).unbind()
    experts = base + torch.randn(2, rows, vocabulary, generator=generator)

    def ours() -> None:
        fuse_step(large, base, experts)

    def theirs() -> None:
        for row in range(rows):
            one_at_a_time(large[row], base[row], experts[:, row])

    times = compare({"one pass": ours, "one at a time": theirs}, repeats, clock=clock)
    return [
        {"search": name, "ms_per_step": 1000 * seconds, "times_one_pass": ratio}
        for (name, seconds), ratio in zip(times.medians.items(), times.ratios().values())
    ]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = options_of(__doc__, argv, rows=4, length=32, new=24, vocabulary=32_000, threads=1)
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"versions": show_versions(("torch", "transformers"))}
    few = max(2, options.repeats // 2)
    found["decoding"] = decoding(options.clock, few, options.rows, options.length, options.new)
    found["search"] = searching(options.clock, options.repeats, options.rows, options.vocabulary)
    show(found, options)
    return found


def aims(found: dict[str, Any]) -> list[Aim]:
    loops = {row["loop"]: row["times_fused"] for row in found["decoding"]}
    search = {row["search"]: row["times_one_pass"] for row in found["search"]}
    return [
        Aim("fusion: naive loop over ours", loops["naive"], at_least=5),
        Aim("fusion: one strength at a time over one pass", search["one at a time"], at_least=3),
        Aim("fusion: ours over decoding without search", 1 / loops["no search"], at_most=2),
    ]


if __name__ == "__main__":
    main()
