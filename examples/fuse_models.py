"""Steer a large model by small experts, token by token: `python examples/fuse_models.py`.

Trains five small models of characters on text that every installation carries (a large one and a
small base on Python's manual, Python code and C++ headers; the small one tuned on each), writes
with them, and scores a line of code with and without fusion. Less than half a minute the first
time; the models are kept in the cache.
"""

from __future__ import annotations

from polytask.infer import Fusion
from polytask.infer.fusion_generate import Sampler
from polytask.systems.testbeds import domain_models


def main() -> None:
    large, base, manual, python, cpp = domain_models.family(0, domain_models.QUICK).sources

    fusion, warm = Fusion(large, base, [manual, python, cpp]), Sampler(temperature=0.6)
    for written in fusion.write(
        ["The following", "    def __init__(self"], max_new=60, sampler=warm
    ):
        print(f"{written.prompt}{written.text}")
        print({name: round(share, 2) for name, share in written.shares.items()}, end="\n\n")

    line = "    for name, value in self.items():\n        if value is None:\n"
    for name, strength in (("large model alone", 0.0), ("proxy tuning", 1.0)):
        fixed = Fusion(large, base, [python], mode="static", alpha=(strength,))
        print(f"{name:<18} {nats(fixed, line):.3f} nats per character")
    dynamic = Fusion(large, base, [python])
    print(f"{'dynamic strength':<18} {nats(dynamic, line):.3f} nats per character")


def nats(fusion: Fusion, text: str) -> float:
    """Mean -log p of the characters after the first."""
    tokens = fusion.score(text)[0].tokens
    return sum(token.nll or 0.0 for token in tokens) / len(tokens)


if __name__ == "__main__":
    main()
