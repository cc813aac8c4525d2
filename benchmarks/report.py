"""docs/benchmarks.md from benchmarks/results.json: no figure on the page is typed.

python -m benchmarks --save      measures, writes results.json, then the page
python -m benchmarks.report      writes the page again from results.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results.json"
PAGE = ROOT / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

```text
make bench
```

times polytask beside what it is compared with, in one run: alternating order, equal threads,
medians, versions printed. Ratios of runs that took turns say more than times, and every machine has
its own: run it on yours. `python -m benchmarks mixture` runs one of them. This page is written from
`benchmarks/results.json` by `python -m benchmarks --save`.
"""

TOLD = {
    "bench_adapters": (
        "Adapters",
        "A batch whose rows belong to different tasks through one LoRA adapter a task: beside one "
        "adapter for all rows, and beside `peft`, switching adapters or mixing them in one batch "
        "(which `peft` does not train). Outputs are compared first. Then training steps.",
    ),
    "bench_experts": (
        "Experts",
        "One image through a vision transformer with sparse experts, for one task: beside a dense "
        "one of as many operations, and beside all experts computed. Operations are counted, so "
        "the ratio says what sparsity costs.",
    ),
    "bench_fusion": (
        "Logit fusion",
        "Tokens per second of dynamic fusion with caches and all strengths searched in one pass, "
        "beside the loop that runs every model again for every token, and one strength at a time.",
    ),
    "bench_language": (
        "Language pretraining",
        "Thousand tokens per second, padding left out, of a small causal decoder in float32, "
        "beside a loop by hand and `transformers.Trainer`, on chunks of one length and documents "
        "of unequal length. Then 48 tokens written after 8 prompts, with a cache and without.",
    ),
    "bench_objectives": (
        "Text objectives",
        "Million tokens per second that become inputs and targets, beside a loop over examples in "
        "NumPy; share of the places of packed rows that hold a token.",
    ),
    "bench_aggregation": (
        "Gradient aggregation",
        "A trunk 784-512-512, a linear head per task, 128 rows that every task labels: gradients "
        "of one step beside TorchJD's own recipe, differentiated all at once or one task at a "
        "time, and beside the plain sum of losses.",
    ),
    "bench_checkpoint": (
        "Checkpoints",
        "Weights and AdamW's moments, saved to new files and loaded into tensors that exist. "
        "polytask sums every byte, flushes to the disk and writes its manifest last; bare "
        "safetensors does none of that. Loading bytes that are still in memory is one copy, so "
        "reading them once more to check them shows; from the disk it hardly does.",
    ),
    "bench_forecast": (
        "Forecasting",
        "A Tiny Time Mixer with the same weights and outputs as `granite-tsfm`; exponential "
        "smoothing and statsforecast's automatic models, fitted to each series as they have to be.",
    ),
    "bench_merge": (
        "Merging",
        "A random Llama in bfloat16 and three copies of it with small changes, merged by whole "
        "processes beside `mergekit-yaml`: start-up included, peak memory as the system counts it. "
        "polytask also looks for NaN in every input, sums and flushes the result and writes its "
        "manifest; its report is switched off. 'copy' reads the same inputs and writes as many "
        "bytes, flushed.",
    ),
    "bench_mixture": (
        "Mixture",
        "Cost of a step of 32 rows by number of groups, and rows per second beside "
        "`datasets.interleave_datasets` over 16 tables; deviation from the weights in rows, worst "
        "over all prefixes.",
    ),
    "bench_neuroformer": (
        "Neuroformer",
        "Spikes drawn per second with keys and values kept, beside running the window again for "
        "every spike (the same spikes come out); windows trained on and tokenised per second up to "
        "1,000 neurons; the forward pass by number of behaviour groups and the line through it.",
    ),
    "bench_trainer": (
        "Training step",
        "The same BERT of two layers and the same batches of 32 rows of 32 tokens, beside a "
        "hand-written loop and `transformers.Trainer`; with eight tasks every task's loss is "
        "logged at every step.",
    ),
}


def save(
    results: Mapping[str, Any], machine: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    """Write results.json (keeping benchmarks that were not run now) and the page."""
    old = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    run = {"machine": dict(machine), "settings": dict(settings)}
    new = {name: {**figures, **run} for name, figures in results.items()}
    text = json.dumps({**old, **new}, indent=1, sort_keys=True, allow_nan=False)
    RESULTS.write_text(text + "\n", encoding="utf-8")
    write()


def write() -> None:
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")


def page(results: Mapping[str, Any]) -> str:
    """The whole page of Markdown."""
    aims = [aim for name in sorted(results) for aim in results[name]["aims"]]
    missed = [aim["what"] for aim in aims if aim[""] == "missed"]
    if missed:
        told = f"{len(aims) - len(missed)} of {len(aims)} aims are met. **Missed:**\n\n"
        told += "\n".join(f"- {what}" for what in missed)
    else:
        told = f"All {len(aims)} aims are met."
    parts = [HEAD, "## Aims", told, markdown(aims)]
    for name in sorted(results):
        found = results[name]
        title, about = TOLD[name]
        parts += [f"## {title}", about, conditions(found)]
        parts += [markdown(v) for k, v in found.items() if isinstance(v, list) and k != "aims"]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def conditions(found: Mapping[str, Any]) -> str:
    """Machine, versions and settings of one benchmark's run, in a sentence or two."""
    box, how = found["machine"], found["settings"]
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if k != "machine")
    return (
        f"{box['processor']}, {box['cores']} cores, {box['memory_gb']} GB, {box['system']} (load "
        f"{box['load']} before, {box['load_after']} after); {how['clock']}, median of "
        f"{how['repeats']}; {versions}."
    )


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table; numbers to the right, with three digits that matter."""
    names = list(rows[0])
    number = {name: all(isinstance(row[name], int | float) for row in rows) for name in names}
    lines = [
        "| " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "|" + "|".join("--:" if number[name] else "---" for name in names) + "|",
    ]
    lines += ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    write()
