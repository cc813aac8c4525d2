"""mergekit's methods in our words: names, parameters, defaults that differ from ours (0.1.5)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ABSENT = {
    "sce": "it selects by variance, which no method here does; 'ties' is the nearest",
    "nearswap": "use 'slerp' or 'linear'",
    "arcee_fusion": "use 'ties' with a low density",
    "ram": "it is for models of reinforcement learning; use 'ties'",
    "ramplus_tl": "it is for models of reinforcement learning; use 'ties'",
}


@dataclass(frozen=True)
class Form:
    """A method of mergekit: the name here, parameters (theirs -> ours), defaults of theirs that
    differ from ours, and what the base is: 'delta' (models are seen as differences from it),
    'member' (it is merged like the others), 'either' (delta where given)."""

    name: str
    own: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)
    base: str = "delta"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: tuple[str, ...] = ()


ARITHMETIC = {"lambda": "scale", "normalize": "normalize", "rescale": "rescale"}
THIN = {"weight": "weight", "density": "density"}


def _thin(name: str, own: Mapping[str, str] = THIN) -> Form:
    return Form(name, own, ARITHMETIC, defaults={"density": 1.0}, required=("weight",))


FORMS: dict[str, Form] = {
    "linear": Form(
        "linear", {"weight": "weight"}, {"normalize": "normalize"}, "member", {}, ("weight",)
    ),
    "task_arithmetic": Form(
        "task_arithmetic",
        {"weight": "weight"},
        {"lambda": "scale", "normalize": "normalize"},
        required=("weight",),
    ),
    "ties": _thin("ties"),
    "dare_ties": _thin("dare_ties"),
    "dare_linear": _thin("dare_linear"),
    "breadcrumbs": _thin("breadcrumbs", {**THIN, "gamma": "gamma"}),
    "breadcrumbs_ties": _thin("breadcrumbs_ties", {**THIN, "gamma": "gamma"}),
    "della": _thin("della", {**THIN, "epsilon": "epsilon"}),
    "della_linear": _thin("della_linear", {**THIN, "epsilon": "epsilon"}),
    "slerp": Form("slerp", {}, {"t": "t"}, "member", required=("t",)),
    "nuslerp": Form(
        "nuslerp",
        {"weight": "weight"},
        {"nuslerp_flatten": "flatten", "nuslerp_row_wise": "row_wise"},
        "either",
        required=("weight",),
    ),
    "multislerp": Form(
        "multislerp",
        {"weight": "weight"},
        {"normalize_weights": "normalize"},
        "either",
        required=("weight",),
    ),
    "karcher": Form(
        "karcher",
        {},
        {"max_iter": "iterations", "tol": "tolerance"},
        "member",
        {"iterations": 10, "tolerance": 1e-5},
    ),
    "model_stock": Form("model_stock", {}, {"filter_wise": "filter_wise"}),
    "passthrough": Form("linear", {"scale": "weight"}, {}, "member", {"normalize": False}),
}
NORMALIZED = {"ties", "della"}  # mergekit's default of `normalize` is true for these
RESCALED = {"dare_ties", "dare_linear", "della", "della_linear"}  # and of `rescale` for these
VOTING = {"ties", "dare_ties", "breadcrumbs_ties", "della"}
