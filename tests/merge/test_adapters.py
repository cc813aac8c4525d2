"""PEFT adapters, judged by what peft itself makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from polytask.errors import MergeError
from polytask.merge.adapter_merge import compress, concatenate, merge_adapters
from polytask.merge.adapters import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    Adapter,
    Factors,
    bind_adapter,
    load_adapter,
    parse_adapter,
    read_adapter,
)
from polytask.merge.method import make_method

peft = pytest.importorskip("peft")
Config = dict[str, Any]


class Conv(nn.Module):
    """Layers of other kinds than a language model has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.point = nn.Conv2d(6, 4, 1, bias=False)
        self.line = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.line(self.point(self.conv(x)).mean((2, 3)))
        return made


def conv() -> nn.Module:
    torch.manual_seed(0)
    return Conv()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=40,
            attention_bias=True,
            tie_word_embeddings=False,
        )
    )


def gpt() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))


def lora(**more: Any) -> Any:
    return peft.LoraConfig(**{"r": 3, "target_modules": ["q_proj", "v_proj"], **more})


def ia3(**more: Any) -> Any:
    given = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return peft.IA3Config(**{**given, **more})


def train(
    make: Callable[[], nn.Module], config: Any, folder: Path, seed: int = 1
) -> dict[str, Tensor]:
    """Save an adapter with random values; return the state that peft merges it to."""
    model = peft.get_peft_model(make(), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    merged: dict[str, Tensor] = model.merge_and_unload().state_dict()
    return merged


def applied(folder: Path, base: dict[str, Tensor]) -> dict[str, Tensor]:
    adapter = read_adapter(folder, base)
    return {k: adapter.apply(k, v) if k in adapter.changed else v for k, v in base.items()}


def loaded(make: Callable[[], nn.Module], folder: Path) -> dict[str, Tensor]:
    """What peft makes of a folder."""
    model = peft.PeftModel.from_pretrained(make(), folder)
    state: dict[str, Tensor] = model.merge_and_unload().state_dict()
    return state


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 2e-6) -> None:
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=tolerance, atol=tolerance)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "plain": (llama, lora),
    "rslora, patterns": (
        llama,
        lambda: lora(
            use_rslora=True,
            lora_alpha=7,
            rank_pattern={"layers.0.self_attn.q_proj": 2},
            alpha_pattern={"v_proj": 3},
        ),
    ),
    "dora": (llama, lambda: lora(use_dora=True)),
    "trained biases": (llama, lambda: lora(bias="lora_only")),
    "all biases": (llama, lambda: lora(bias="all")),
    "bias of B": (llama, lambda: lora(lora_bias=True)),
    "whole head": (llama, lambda: lora(modules_to_save=["lm_head"])),
    "embedding": (llama, lambda: lora(target_modules=["q_proj", "embed_tokens"])),
    "dora embedding": (llama, lambda: lora(use_dora=True, target_modules=["embed_tokens"])),
    "gpt": (gpt, lambda: lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "gpt dora": (
        gpt,
        lambda: lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True),
    ),
    "conv": (conv, lambda: lora(target_modules=["conv", "point", "line"])),
    "conv dora": (conv, lambda: lora(target_modules=["conv", "line"], use_dora=True)),
    "ia3": (llama, ia3),
    "ia3 gpt": (
        gpt,
        lambda: ia3(
            target_modules=["c_attn", "mlp.c_proj"],
            feedforward_modules=["mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ),
    "ia3 conv": (
        conv,
        lambda: ia3(target_modules=["conv", "point"], feedforward_modules=["point"]),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_worked_in_as_peft_does(kind: str, tmp_path: Path) -> None:
    make, config = KINDS[kind]
    base = make().state_dict()
    wanted = train(make, config(), tmp_path)
    found = applied(tmp_path, base)
    same(found, wanted)
    changed = read_adapter(tmp_path, base).changed
    assert changed and all(
        not torch.equal(wanted[key], base[key]) or "bias" in key or "head" in key for key in changed
    )
    assert all(torch.equal(wanted[key], base[key]) for key in base.keys() - changed)


def test_names_are_found_where_the_base_has_another_prefix(tmp_path: Path) -> None:
    wanted = train(llama, lora(), tmp_path)
    base = llama().state_dict()
    shorter = {key.removeprefix("model."): value for key, value in base.items()}
    same(applied(tmp_path, shorter), {k.removeprefix("model."): v for k, v in wanted.items()})
    longer = {f"outer.{key}": value for key, value in base.items()}
    same(applied(tmp_path, longer), {f"outer.{k}": v for k, v in wanted.items()})
    twice = {f"{side}.{key}": value for side in "ab" for key, value in base.items()}
    with pytest.raises(MergeError, match=r"may be any of a\.model"):
        read_adapter(tmp_path, twice)


def edit(folder: Path, change: Callable[[Config, dict[str, Tensor]], None]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    change(config, tensors)
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)


Q = f"{PREFIX}model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c, t: c.update(peft_type="PROMPT_TUNING"), "kind PROMPT_TUNING are not a change"),
        (lambda c, t: c.update(layer_replication=[[0, 1]]), "it repeats layers"),
        (lambda c, t: c.update(trainable_token_indices=[1]), "single rows"),
        (lambda c, t: c.update(init_lora_weights="pissa_niter_4"), "path_initial_model_for_weight"),
        (lambda c, t: c.update(use_dora=True), "'use_dora' of the configuration disagree"),
        (lambda c, t: c.pop("peft_type"), "has no 'peft_type'"),
        (lambda c, t: t.pop(f"{Q}.lora_B.weight"), "q_proj' has no lora_B"),
        (lambda c, t: t.pop(f"{Q}.lora_A.weight"), "q_proj' has no lora_A"),
        (lambda c, t: t[f"{Q}.lora_A.weight"].fill_(float("nan")), "holds NaN"),
        (
            lambda c, t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 16)}),
            "do not make one product",
        ),
        (
            lambda c, t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 8)}),
            "trained on another base",
        ),
        (
            lambda c, t: t.update({f"{PREFIX}lm_head.weight": torch.ones(3)}),
            "lm_head.weight' was trained",
        ),
        (
            lambda c, t: t.update({f"{PREFIX}score.weight": torch.ones(3)}),
            "no tensor 'score.weight'",
        ),
        (lambda c, t: t.clear(), "the adapter has no tensors"),
    ],
)
def test_what_cannot_be_exact_is_refused_with_the_reason(
    change: Callable[[Config, dict[str, Tensor]], Any], said: str, tmp_path: Path
) -> None:
    train(llama, lora(), tmp_path / "mine")
    edit(tmp_path / "mine", change)
    with pytest.raises(MergeError, match=f"mine.*{said}"):
        read_adapter(tmp_path / "mine", llama().state_dict())


def test_files_that_are_no_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="not a PEFT adapter"):
        load_adapter(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(MergeError, match="not valid JSON"):
        load_adapter(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(MergeError, match="is a pickle"):
        load_adapter(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(MergeError, match="cannot be read"):
        load_adapter(tmp_path)


def test_a_bias_without_a_place_is_refused() -> None:
    factors = {"down": torch.ones(1, 2), "up": torch.ones(2, 1)}
    adapter = Adapter(
        "a", {"peft_type": "LORA"}, {"x": Factors(**factors, scale=1.0, bias=torch.ones(2))}
    )
    with pytest.raises(MergeError, match="the base's layer has none"):
        bind_adapter(adapter, {"x.weight": torch.ones(2, 2)})
    wrong = Adapter("a", {"peft_type": "IA3"}, scales={"x": torch.ones(3, 1)})
    with pytest.raises(MergeError, match="trained on another base"):
        bind_adapter(wrong, {"x.weight": torch.ones(2, 2)})


CONFIGS: list[tuple[str, Callable[[], nn.Module], list[Any]]] = [
    ("ranks and alphas", llama, [lora(r=2, lora_alpha=5), lora(r=4, lora_alpha=1)]),
    ("rslora", llama, [lora(use_rslora=True, lora_alpha=9), lora(r=5)]),
    ("targets", llama, [lora(), lora(r=2, target_modules=["v_proj", "up_proj"])]),
    ("patterns", llama, [lora(rank_pattern={"layers.1.self_attn.q_proj": 1}), lora(r=2)]),
    ("embedding", llama, [lora(target_modules=["embed_tokens", "q_proj"]), lora(r=1)]),
    ("bias of B", llama, [lora(lora_bias=True), lora()]),
    ("gpt", gpt, [lora(target_modules=["c_attn"], fan_in_fan_out=True)] * 2),
    (
        "conv",
        conv,
        [lora(target_modules=["conv", "point", "line"]), lora(target_modules=["conv"], r=2)],
    ),
    ("ia3", llama, [ia3(), ia3(target_modules=["v_proj", "down_proj"])]),
    ("ia3 conv", conv, [ia3(target_modules=["conv", "point"], feedforward_modules=["point"])] * 2),
]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -0.4)])
@pytest.mark.parametrize(("name", "make", "configs"), CONFIGS, ids=[c[0] for c in CONFIGS])
def test_a_merged_adapter_changes_the_base_by_the_weighted_sum(
    name: str,
    make: Callable[[], nn.Module],
    configs: list[Any],
    weights: tuple[float, float],
    tmp_path: Path,
) -> None:
    base = make().state_dict()
    states = []
    for number, config in enumerate(configs):
        states.append(train(make, config, tmp_path / str(number), seed=number))
        if name == "embedding":  # peft saves the untrained embedding along; here it is not wanted
            edit(tmp_path / str(number), _without_whole)
    merged = merge_adapters([tmp_path / "0", tmp_path / "1"], weights)
    assert merged.exact
    merged.write(tmp_path / "merged")
    wanted = {
        k: v + sum(w * (state[k] - v) for w, state in zip(weights, states, strict=True))
        for k, v in base.items()
    }
    same(loaded(make, tmp_path / "merged"), wanted, tolerance=2e-5)
    same(applied(tmp_path / "merged", base), wanted, tolerance=2e-5)


def _without_whole(config: Config, tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if "lora" not in key]:
        del tensors[key]


def test_one_adapter_at_weight_one_stays_that_adapter(tmp_path: Path) -> None:
    wanted = train(llama, lora(use_rslora=True, lora_alpha=5, r=3), tmp_path / "a")
    merge_adapters([tmp_path / "a"]).write(tmp_path / "b")
    same(loaded(llama, tmp_path / "b"), wanted)
    merge_adapters([tmp_path / "a"] * 3, 1 / 3).write(tmp_path / "c")
    same(loaded(llama, tmp_path / "c"), wanted)


def test_pefts_own_concatenation_is_the_same(tmp_path: Path) -> None:
    for number in range(2):
        train(llama, lora(r=2 + number, lora_alpha=5), tmp_path / str(number), seed=number)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "0", adapter_name="a")
    model.load_adapter(tmp_path / "1", adapter_name="b")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.2], "c", combination_type="cat")
    model.set_adapter("c")
    wanted = model.merge_and_unload(adapter_names=["c"]).state_dict()
    merge_adapters([tmp_path / "0", tmp_path / "1"], [0.7, 0.2]).write(tmp_path / "m")
    same(loaded(llama, tmp_path / "m"), wanted)


@pytest.mark.parametrize("form", ["svd", "ties_svd"])
def test_pefts_svd_merges_are_the_same(form: str, tmp_path: Path) -> None:
    for number in range(2):
        train(llama, lora(), tmp_path / str(number), seed=number)
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "0", adapter_name="a")
    model.load_adapter(tmp_path / "1", adapter_name="b")
    density = None if form == "svd" else 0.4
    model.add_weighted_adapter(
        ["a", "b"], [0.7, 0.2], "c", combination_type=form, svd_rank=3, density=density
    )
    wanted = model.merge_and_unload(adapter_names=["c"]).state_dict()
    folders = [tmp_path / "0", tmp_path / "1"]
    if form == "svd":
        merged = merge_adapters(folders, [0.7, 0.2], rank=3)
    else:
        vote = {"weigh": "after", "divide": "counts"}
        ties = make_method("ties", {"density": 0.4, "weight": [0.7, 0.2], "vote": vote})
        merged = merge_adapters(folders, method=ties, rank=3)
    merged.write(tmp_path / "m")
    same(loaded(llama, tmp_path / "m"), wanted, tolerance=1e-4)
    assert 0 < max(merged.errors.values()) < 1 and not merged.exact


def test_compression_is_the_best_of_its_rank_and_says_its_error() -> None:
    torch.manual_seed(3)
    pieces = [
        (Factors(torch.randn(r, 9), torch.randn(7, r), scale), weight)
        for r, scale, weight in ((2, 0.5, 1.0), (3, 2.0, -0.3))
    ]
    whole = concatenate(pieces)
    dense = sum(w * f.product() for f, w in pieces)
    torch.testing.assert_close(whole.product(), dense)
    values = torch.linalg.svdvals(dense.double())
    for rank in range(1, 6):
        made, error = compress(whole, rank)
        best = float(values[rank:].square().sum().sqrt() / values.norm())
        assert error == pytest.approx(best, abs=1e-6)
        found = float((made.product() - dense).norm() / dense.norm())
        assert found == pytest.approx(best, abs=1e-5)
    assert compress(Factors(torch.zeros(2, 3), torch.zeros(4, 2), 1.0), 1)[1] == 0.0


def test_a_method_that_needs_passes_sees_the_whole_adapter(tmp_path: Path) -> None:
    states = [train(llama, lora(), tmp_path / str(n), seed=n) for n in range(2)]
    base = llama().state_dict()
    keys = [key for key in base if "q_proj.weight" in key or "v_proj.weight" in key]
    method = make_method("ties", {"trim": "model", "density": 0.3})
    from polytask.merge import merge_state_dicts

    zero = {key: torch.zeros_like(base[key]) for key in keys}
    wanted = merge_state_dicts(
        method, [{k: state[k] - base[k] for k in keys} for state in states], zero
    )
    merged = merge_adapters([tmp_path / "0", tmp_path / "1"], method=method, rank=16)
    assert max(merged.errors.values()) < 1e-6
    adapter = bind_adapter(parse_adapter("m", merged.config, merged.tensors), base)
    for key in keys:
        found = adapter.apply(key, base[key]) - base[key]
        torch.testing.assert_close(found, wanted[key], rtol=1e-3, atol=2e-4)


def test_whole_modules_and_biases_are_averaged_or_need_the_base(tmp_path: Path) -> None:
    both = [lora(modules_to_save=["lm_head"], bias="lora_only")] * 2
    states = [train(llama, c, tmp_path / str(n), seed=n) for n, c in enumerate(both)]
    base = llama().state_dict()
    folders = [tmp_path / "0", tmp_path / "1"]
    merge_adapters(folders, [0.3, 0.7]).write(tmp_path / "m")
    wanted = {k: v + 0.3 * (states[0][k] - v) + 0.7 * (states[1][k] - v) for k, v in base.items()}
    same(loaded(llama, tmp_path / "m"), wanted, tolerance=2e-5)
    with pytest.raises(MergeError, match="the weights do not add up to one; give the base"):
        merge_adapters(folders, 1.0)
    merge_adapters(folders, 1.0, base=base).write(tmp_path / "sum")
    wanted = {k: states[0][k] + states[1][k] - v for k, v in base.items()}
    same(loaded(llama, tmp_path / "sum"), wanted, tolerance=2e-5)


def test_a_whole_module_that_one_adapter_lacks_counts_as_the_base(tmp_path: Path) -> None:
    states = [
        train(llama, lora(modules_to_save=["lm_head"]), tmp_path / "0"),
        train(llama, lora(), tmp_path / "1", seed=2),
    ]
    base = llama().state_dict()
    folders = [tmp_path / "0", tmp_path / "1"]
    with pytest.raises(MergeError, match="1 left it as the base has it"):
        merge_adapters(folders, 0.5)
    merge_adapters(folders, 0.5, base=base).write(tmp_path / "m")
    wanted = {k: (states[0][k] + states[1][k]) / 2 for k in base}
    same(loaded(llama, tmp_path / "m"), wanted, tolerance=2e-5)


def test_adapters_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    train(llama, lora(), tmp_path / "a")
    train(llama, lora(use_dora=True), tmp_path / "dora")
    train(llama, ia3(), tmp_path / "ia3")
    train(llama, lora(), tmp_path / "other")
    edit(tmp_path / "other", lambda c, t: c.update(base_model_name_or_path="another/model"))
    for folder, said in (
        ("dora", "dora is a DoRA adapter"),
        ("ia3", "ia3 is IA3, a is LORA"),
        ("other", "other was trained on another/model"),
    ):
        with pytest.raises(MergeError, match=said):
            merge_adapters([tmp_path / "a", tmp_path / folder])
    assert merge_adapters([tmp_path / "a", tmp_path / "other"], same_base=True).exact
    with pytest.raises(MergeError, match="2 weights for 1 adapters"):
        merge_adapters([tmp_path / "a"], [1, 2])
    with pytest.raises(MergeError, match="no adapter"):
        merge_adapters([])
    with pytest.raises(MergeError, match="a rank of 0"):
        merge_adapters([tmp_path / "a"], rank=0)
    with pytest.raises(MergeError, match="weights are the method's own"):
        merge_adapters([tmp_path / "a"], [0.5], method=make_method("ties", {}))
    edit(tmp_path / "other", lambda c, t: c.update(fan_in_fan_out=True))
    with pytest.raises(MergeError, match="disagree on fan_in_fan_out"):
        merge_adapters([tmp_path / "a", tmp_path / "other"], same_base=True)
    edit(tmp_path / "other", lambda c, t: c.update(fan_in_fan_out=False))
    edit(tmp_path / "other", lambda c, t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 5)}))
    with pytest.raises(MergeError, match="has another shape in other than in a"):
        merge_adapters([tmp_path / "a", tmp_path / "other"], same_base=True)
