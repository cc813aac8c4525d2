"""Steer a large model by small experts, token by token: `python examples/fuse_models.py`.

Trains small models of characters on text that every installation carries: a large one and a small
base on prose and code, copies of the small one on kinds of text that neither has seen. Writes with
them, and scores a line of a build file with and without fusion. About half a minute the first
time; the models are kept in the cache.
"""

from __future__ import annotations

from polytask.infer import Fusion
from polytask.infer.fusion_generate import Sampler
from polytask.systems.testbeds import domain_models


def main() -> None:
    family = domain_models.family(0, domain_models.QUICK)
    large, base, cython, cmake, fonts = family.chosen(["cython", "cmake", "fonts"])

    fusion, warm = Fusion(large, base, [cython, cmake, fonts]), Sampler(temperature=0.6)
    for written in fusion.write(["if(NOT ", "C 32 ; WX 250 ; N"], max_new=60, sampler=warm):
        print(f"{written.prompt}{written.text}")
        print({name: round(share, 2) for name, share in written.shares.items()}, end="\n\n")

    line = 'if(NOT CUDA_FOUND)\n  message(STATUS "no CUDA")\nendif()\n'
    for name, strength in (("large model alone", 0.0), ("proxy tuning", 1.0)):
        fixed = Fusion(large, base, [cmake], mode="static", alpha=(strength,))
        print(f"{name:<18} {nats(fixed, line):.3f} nats per character")
    dynamic = Fusion(large, base, [cmake])
    print(f"{'dynamic strength':<18} {nats(dynamic, line):.3f} nats per character")


def nats(fusion: Fusion, text: str) -> float:
    """Mean -log p of the characters after the first."""
    tokens = fusion.score(text)[0].tokens
    return sum(token.nll or 0.0 for token in tokens) / len(tokens)


if __name__ == "__main__":
    main()
