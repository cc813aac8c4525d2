"""`AdaptConfig`: which adapters, where, how they are mixed and how fast their parts learn.

One flat record serves YAML (`adapt:`) and Python (`attach`). A key that the chosen method does not
read is an error, so that nothing is set in vain.
"""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from polytask.configs import Config

Method = Literal[
    "mhr",  # inventory of LoRA modules, mixed per task and block of features (sheet 19)
    "poly",  # the same with one block: whole modules are mixed
    "task-lora",  # one LoRA a task, chosen by the row's task
    "bottleneck",  # one bottleneck adapter a task (stage 1 of ScaLearn)
    "scalearn",  # scaled sum of frozen source adapters (sheet 18)
    "fusion",  # AdapterFusion: attention over frozen source adapters
    "lora",  # from peft: one LoRA for all tasks
    "ia3",  # from peft
    "peft-poly",  # from peft: its own port of Poly
    "prompt",  # from peft: learned vectors before the input
]
Gate = Literal["relaxed", "sigmoid", "straight_through", "l2", "uniform", "own"]
Granularity = Literal["finegrained", "layerwise", "blockwise", "coderwise", "coarsegrained"]
Variant = Literal["scalearn", "uniform", "scalearn++", "uniform++"]
Tune = Literal["full", "z", "mu", "rand"]

ROUTED = ("mhr", "poly", "task-lora")
BOTTLENECK = ("bottleneck", "scalearn", "fusion")
PEFT = ("lora", "ia3", "peft-poly", "prompt")
_COMMON = {"method", "targets", "lr", "base", "source", "shots", "seed"}
_READ: dict[str, set[str]] = {
    "mhr": {"rank", "alpha", "modules", "heads", "gate", "granularity", "init", "gate_dropout"}
    | {"shared_module", "average_correction", "combine", "routing_lr", "tune", "collapse"},
    "task-lora": {"rank", "alpha", "init"},
    "bottleneck": {"reduction", "init_up"},
    "scalearn": {"sources", "variant", "scale", "scale_dropout", "normalise", "routing_lr"},
    "fusion": {"sources"},
    "lora": {"rank", "alpha"},
    "ia3": {"feedforward"},
    "peft-poly": {"rank", "modules", "heads", "routing_lr"},
    "prompt": {"tokens"},
}
_READ["poly"] = _READ["mhr"] - {"heads"}


class AdaptConfig(Config):
    """The `adapt:` section.

    targets: name patterns of the modules to adapt ('*' stands for anything; a name without a dot
    matches the last part). For 'bottleneck' they name normalisation layers (the adapter stands
    between a feed-forward and its normalisation, as Pfeiffer's) or any other module (the adapter
    follows it). Empty: all linear layers of the trunk, or the normalisation after every
    feed-forward.
    """

    method: Method = "mhr"
    targets: tuple[str, ...] = ()
    base: Literal["frozen", "trained"] = "frozen"  # the adapted model's own parameters
    lr: PositiveFloat | None = Field(None, description="of the adapters; None: train.lr")
    seed: int = Field(0, ge=0, description="of the adapters' initial parameters")

    rank: PositiveInt = 8
    alpha: PositiveFloat | None = Field(
        None, description="the update is scaled by alpha / rank; None: 1, and rank for one LoRA"
    )
    modules: PositiveInt = Field(8, description="size of the inventory")
    heads: PositiveInt = Field(8, description="blocks of features with a mixture of their own")
    gate: Gate = Field("relaxed", description="how logits become weights; see TaskTable")
    granularity: Granularity = "finegrained"
    init: Literal["mttl", "peft"] = Field(
        "mttl", description="bound of A: sqrt(1 / (3 d)), or peft's sqrt(heads / d)"
    )
    gate_dropout: float = Field(0.0, ge=0, lt=1)
    shared_module: bool = Field(False, description="the last module is always fully on")
    average_correction: bool = Field(
        False, description="weights times sqrt(heads / modules) instead of over their sum"
    )
    combine: Literal["parameters", "outputs"] = "parameters"
    routing_lr: PositiveFloat = Field(
        0.1, description="of the routing table (for scalearn: of the scales, default 6e-3)"
    )
    tune: Tune = Field(
        "full", description="few-shot: modules and row, the row only, uniform mixture, fresh"
    )
    collapse: bool = Field(True, description="mu: average the modules first, then tune one")

    reduction: PositiveInt = Field(16, description="width of the model over that of the adapter")
    init_up: Literal["zero", "bert"] = Field(
        "zero", description="zero: starts as the base, bit for bit; bert: N(0, .02)"
    )
    sources: tuple[str, ...] = Field((), description="run or adapter folders with bottlenecks")
    variant: Variant = "scalearn"
    scale: PositiveFloat = Field(2.0, description="initial sum of the scales over sources")
    scale_dropout: float | None = Field(
        None, ge=0, lt=1, description="on the scales; None: .3, and 0 for uniform++"
    )
    normalise: Literal["none", "mean", "softmax"] = Field(
        "none", description="ablations: scales over their sum, or softmax over sources"
    )
    feedforward: tuple[str, ...] = Field((), description="ia3: which targets scale their input")
    tokens: PositiveInt = Field(16, description="prompt: number of learned vectors")

    source: str | None = Field(None, alias="from", description="a run folder to adapt")
    shots: PositiveInt | None = Field(
        None, description="training rows per class (or per task without classes)"
    )

    @model_validator(mode="after")
    def _only_what_is_read(self) -> AdaptConfig:
        read = _COMMON | _READ[self.method]
        for name in sorted(self.model_fields_set - read):
            owners = sorted(method for method, keys in _READ.items() if name in keys)
            raise ValueError(
                f"'{name}' has no meaning for method '{self.method}' (it is for "
                f"{', '.join(owners) or 'nothing'})"
            )
        if self.combine == "outputs" and self.blocks > 1:
            raise ValueError("'combine: outputs' is defined for one block only: heads must be 1")
        if self.gate == "own" and self.blocks > 1:
            raise ValueError("'gate: own' picks whole modules: heads must be 1")
        if self.method in ("scalearn", "fusion") and not self.sources and self.source is None:
            raise ValueError(f"method '{self.method}' needs 'sources': folders with adapters")
        return self

    @property
    def blocks(self) -> int:
        """Blocks of features with a mixture of their own."""
        return self.heads if self.method in ("mhr", "peft-poly") else 1

    @property
    def scale_alpha(self) -> float:
        """alpha: 1 where modules are mixed (mttl, peft's Poly), rank where one LoRA acts."""
        if self.alpha is not None:
            return self.alpha
        return float(self.rank) if self.method in ("lora", "task-lora") else 1.0

    @property
    def table_lr(self) -> float:
        """Learning rate of routing tables or scales."""
        if self.method == "scalearn" and "routing_lr" not in self.model_fields_set:
            return 6e-3
        return self.routing_lr

    @property
    def omega_dropout(self) -> float:
        if self.scale_dropout is not None:
            return self.scale_dropout
        return 0.0 if self.variant == "uniform++" else 0.3


METHODS: tuple[str, ...] = get_args(Method)
