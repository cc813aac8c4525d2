"""What is learned next: policies, the exact sampler, shuffling, packing, the ledger.

Names are imported when first used, so `import polytask.mixture` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polytask.mixture.graph_learning import LearnedGraph as LearnedGraph
    from polytask.mixture.graph_learning import learn_graph as learn_graph
    from polytask.mixture.ledger import Ledger as Ledger
    from polytask.mixture.packer import Packer as Packer
    from polytask.mixture.packing import Packed as Packed
    from polytask.mixture.packing import PackPlan as PackPlan
    from polytask.mixture.packing import Tokens as Tokens
    from polytask.mixture.packing import pack as pack
    from polytask.mixture.packing import unpack as unpack
    from polytask.mixture.policies import POLICIES as POLICIES
    from polytask.mixture.policies import FixedPolicy as FixedPolicy
    from polytask.mixture.policies import Groups as Groups
    from polytask.mixture.policies import HardestPolicy as HardestPolicy
    from polytask.mixture.policies import MixtureConfig as MixtureConfig
    from polytask.mixture.policies import Policy as Policy
    from polytask.mixture.policies import ScoreHistory as ScoreHistory
    from polytask.mixture.sampler import Draw as Draw
    from polytask.mixture.sampler import MixtureSampler as MixtureSampler
    from polytask.mixture.sampler import build_sampler as build_sampler
    from polytask.mixture.sampler import rank_rows as rank_rows
    from polytask.mixture.shuffle import permute as permute
    from polytask.mixture.skillit import Curriculum as Curriculum
    from polytask.mixture.skillit import OnlineMixture as OnlineMixture
    from polytask.mixture.skillit import SkillIt as SkillIt
    from polytask.mixture.skills import SkillGraph as SkillGraph

_HOMES = {
    "Curriculum": "skillit",
    "Draw": "sampler",
    "FixedPolicy": "policies",
    "Groups": "policies",
    "HardestPolicy": "policies",
    "LearnedGraph": "graph_learning",
    "Ledger": "ledger",
    "MixtureConfig": "policies",
    "MixtureSampler": "sampler",
    "OnlineMixture": "skillit",
    "POLICIES": "policies",
    "PackPlan": "packing",
    "Packed": "packing",
    "Packer": "packer",
    "Policy": "policies",
    "ScoreHistory": "policies",
    "SkillGraph": "skills",
    "SkillIt": "skillit",
    "Tokens": "packing",
    "build_sampler": "sampler",
    "learn_graph": "graph_learning",
    "pack": "packing",
    "permute": "shuffle",
    "rank_rows": "sampler",
    "unpack": "packing",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'polytask.mixture' has no attribute '{name}'")
    return getattr(importlib.import_module(f"polytask.mixture.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
