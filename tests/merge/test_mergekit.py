"""mergekit's YAML: the same numbers as mergekit, or a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from merge_samples import llama, save, tuned
from safetensors.torch import load_file

from polytask.errors import ConfigError
from polytask.merge.config import read_recipe
from polytask.merge.mergekit import recipe_of
from polytask.merge.output import write
from polytask.merge.plan import make_plan
from polytask.merge.recipe import parameters


def ties(**more: Any) -> dict[str, Any]:
    return {
        "merge_method": "ties",
        "base_model": "org/base",
        "models": [
            {"model": "org/base"},
            {"model": "org/a", "parameters": {"weight": 0.5, "density": 0.3}},
            {"model": "org/b", "parameters": {"weight": 0.2}},
        ],
        **more,
    }


def test_defaults_are_mergekits_not_ours() -> None:
    recipe = recipe_of(ties())
    found = parameters(recipe, recipe.parts[0], "w", 0)
    assert found == {"weight": (0.5, 0.2), "density": (0.3, 1.0), "vote": {"divide": "weights"}}
    assert [spec.name for spec in recipe.models] == ["org/base", "org/a", "org/b"]
    assert recipe.base == 0 and recipe.experts == (1, 2)
    no_norm = recipe_of(ties(parameters={"normalize": False, "lambda": 0.7, "int8_mask": True}))
    found = parameters(no_norm, no_norm.parts[0], "w", 0)
    assert found["vote"] == {"divide": "none"} and found["scale"] == 0.7


@pytest.mark.parametrize(
    ("method", "params", "want"),
    [
        ("dare_ties", {}, {"vote": {"divide": "none"}, "rescale": "l1"}),
        ("dare_linear", {"rescale": False}, {"rescale": "none"}),
        ("della", {}, {"vote": {"divide": "weights"}, "rescale": "l1"}),
        ("breadcrumbs_ties", {}, {"vote": {"divide": "none"}}),
        ("task_arithmetic", {"normalize": True}, {"normalize": True}),
        ("nuslerp", {"nuslerp_flatten": False}, {"vectors": "rows"}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, {"vectors": "columns"}),
        ("model_stock", {"filter_wise": True}, {"vectors": "rows"}),
        ("karcher", {}, {"iterations": 10, "tolerance": 1e-5}),
    ],
)
def test_switches_become_our_options(
    method: str, params: dict[str, Any], want: dict[str, Any]
) -> None:
    own = {} if method in ("model_stock", "karcher") else {"parameters": {"weight": 0.5}}
    data = {
        "merge_method": method,
        "models": [{"model": "org/a", **own}, {"model": "org/b", **own}],
        "parameters": params,
    }
    if method != "karcher":
        data["base_model"] = "org/base"
    recipe = recipe_of(data)
    found = parameters(recipe, recipe.parts[0], "w", 0)
    assert {k: found[k] for k in want} == want


def test_filters_and_gradients_follow_mergekits_order() -> None:
    data = {
        "merge_method": "slerp",
        "base_model": "org/a",
        "slices": [
            {
                "sources": [
                    {"model": "org/b", "layer_range": [0, 5]},
                    {"model": "org/a", "layer_range": [0, 5]},
                ]
            }
        ],
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0]},
                {"value": 0.5},
            ]
        },
    }
    recipe = recipe_of(data)
    (part,) = recipe.parts
    assert [recipe.models[m.model].name for m in part.members] == ["org/a", "org/b"]
    at = lambda name, t: parameters(recipe, part, name, t)["t"]
    assert at("model.layers.2.self_attn.q_proj.weight", 0.5) == 0.3
    assert at("model.layers.1.mlp.up_proj.weight", 0.25) == 0.75
    assert at("model.norm.weight", 0) == 0.5


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"base_modl": "x"}, "unknown key 'base_modl'. Did you mean 'base_model'?"),
        ({"merge_method": "sce"}, "polytask has no merge_method 'sce'"),
        ({"merge_method": "teis"}, "unknown merge_method 'teis'. Did you mean 'ties'?"),
        ({"parameters": {"wieght": 1}}, "'ties' has no parameter 'wieght'. Did you mean 'weight'?"),
        ({"parameters": {"rescale": True}}, "'rescale' is not supported for 'ties'"),
        ({"parameters": {"normalize": [0, 1]}}, "'normalize' must be the same"),
        ({"parameters": {"weight": "much"}}, "should be a number"),
        ({"modules": {}}, "'modules' is not supported"),
        ({"chat_template": "auto"}, "'chat_template' is not supported"),
        ({"tokenizer": {"tokens": {"x": {}}}}, "'tokenizer.tokens' is not supported"),
        ({"dtype": "bf16"}, "'dtype: bf16' is no type"),
        ({"base_model": None}, "'ties' needs 'base_model'"),
        ({"models": [{"model": "org/a"}]}, "'ties' needs 'weight' for model 'org/a'"),
        ({"models": "org/a"}, "'models' should be a list"),
        (
            {"models": [{"model": "org/a", "paramters": {}}]},
            "models[0]: unknown key 'paramters'. Did you mean 'parameters'?",
        ),
        ({"slices": []}, "give either 'models' or 'slices'"),
    ],
)
def test_what_cannot_be_done_is_refused_with_the_reason(change: dict[str, Any], told: str) -> None:
    data = {k: v for k, v in ties(**change).items() if v is not None}
    with pytest.raises(ConfigError) as caught:
        recipe_of(data, where="my.yml")
    assert told in str(caught.value) and str(caught.value).startswith("my.yml")


def test_tokenizer_sources_and_adapters(tmp_path: Path) -> None:
    assert recipe_of(ties(tokenizer_source="union")).vocabulary == "union"
    assert recipe_of(ties(tokenizer={"source": "base"})).vocabulary == "base"
    assert recipe_of(ties(tokenizer_source="org/a")).vocabulary == "org/a"
    data = ties(models=[{"model": "org/a+org/lora", "parameters": {"weight": 1}}])
    spec = recipe_of(data).models[1]
    assert spec.where == "org/a" and str(spec.adapter) == "org/lora"


FILES: dict[str, dict[str, Any]] = {
    "linear": {
        "models": [
            {"model": "a", "parameters": {"weight": 0.3}},
            {"model": "b", "parameters": {"weight": [0.2, 1.0]}},
        ],
    },
    "task_arithmetic": {
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.3}},
            {"model": "b", "parameters": {"weight": [{"filter": "mlp", "value": 1}, {"value": 0}]}},
        ],
        "parameters": {"lambda": 0.8},
    },
    "ties": {
        "base_model": "base",
        "models": [
            {"model": "base"},
            {"model": "a", "parameters": {"weight": 0.6, "density": 0.4}},
            {"model": "b", "parameters": {"weight": 0.3, "density": 0.5}},
        ],
    },
    "breadcrumbs": {
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.6, "density": 0.8, "gamma": 0.05}},
            {"model": "b", "parameters": {"weight": 0.3, "density": 0.5}},
        ],
    },
    "slerp": {
        "base_model": "a",
        "slices": [
            {
                "sources": [
                    {"model": "a", "layer_range": [0, 3]},
                    {"model": "b", "layer_range": [0, 3]},
                ]
            }
        ],
        "parameters": {"t": [{"filter": "mlp", "value": [0, 0.7, 0.2]}, {"value": 0.4}]},
    },
    "nuslerp": {
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 0.3}},
            {"model": "b", "parameters": {"weight": 0.9}},
        ],
    },
    "model_stock": {"base_model": "base", "models": [{"model": "a"}, {"model": "b"}]},
    "karcher": {"models": [{"model": "a"}, {"model": "b"}]},
    "passthrough": {
        "slices": [
            {"sources": [{"model": "a", "layer_range": [0, 2]}]},
            {
                "sources": [
                    {
                        "model": "b",
                        "layer_range": [1, 3],
                        "parameters": {
                            "scale": [{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]
                        },
                    }
                ]
            },
        ],
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("method", FILES)
def test_numbers_are_mergekits(method: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Both programs read one file; results agree to float32 rounding."""
    pytest.importorskip("mergekit")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    monkeypatch.chdir(tmp_path)
    base = llama()
    for name, model in (("base", base), ("a", tuned(base, 1)), ("b", tuned(base, 2))):
        save(model, tmp_path / name, None)
    data = {"merge_method": method, **FILES[method], "dtype": "float32"}
    (tmp_path / "my.yml").write_text(yaml.safe_dump(data))
    theirs = MergeConfiguration.model_validate(data)
    run_merge(
        theirs,
        str(tmp_path / "theirs"),
        MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True),
    )
    recipe, _ = read_recipe(tmp_path / "my.yml")
    write(make_plan(recipe), tmp_path / "ours")
    found = load_file(tmp_path / "ours" / "model.safetensors")
    want: dict[str, torch.Tensor] = {}
    for file in sorted((tmp_path / "theirs").glob("*.safetensors")):
        want |= load_file(file)
    assert found.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(found[key], want[key], rtol=1e-4, atol=2e-6)
