"""Our own YAML: typed, with the nearest name for whatever is misspelt."""

from __future__ import annotations

from pathlib import Path

import pytest
from merge_samples import some_state, state_folder

from polytask.errors import ConfigError
from polytask.merge.config import parse_config, read_recipe, recipe_of
from polytask.merge.recipe import Gradient, bytes_of, depths, layer_of, parameters

GOOD = {"method": "ties", "base": "org/base", "models": {"a": "org/a", "b": {"model": "org/b"}}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"method": "tie"}, "unknown merging method 'tie'. Did you mean 'ties'?"),
        ({"method": "adamerging"}, "it is `polytask run adamerging`"),
        ({"method": None}, "key 'method' is required"),
        ({"bse": "x"}, "unknown key 'bse'. Did you mean 'base'?"),
        ({"parameters": {"densty": 0.2}}, "ties has no parameter 'densty'. Did you mean 'density'"),
        (
            {"models": {"a": {"model": "x", "wieght": 1}}},
            "models.a: unknown key 'wieght'. Did you mean 'weight'?",
        ),
        ({"models": [{"model": "x", "adaptr": "y"}]}, "Did you mean 'adapter'?"),
        ({"models": 3}, "'models' is a list of models or a mapping"),
        ({"models": [3]}, r"models[0] should hold 'key: value' lines, not 3"),
        ({"models": {}}, "key 'models'"),
        ({"models": {"a": {"weight": 1}}}, "key 'models.0.model' is required"),
        (
            {"tensors": [{"mtach": "*", "weight": 1}]},
            "tensors[0]: unknown key 'mtach'. Did you mean 'match'?",
        ),
        ({"tensors": [{"weight": 1}]}, "key 'tensors.0.match' is required"),
        ({"dtype": "bf16"}, "key 'dtype' = 'bf16'"),
        ({"compare": {"tsks": {}}}, "unknown key 'compare.tsks'. Did you mean 'tasks'?"),
        (
            {"compare": {"tasks": {"t": {"data": "x", "modl": "a"}}}},
            "unknown key 'compare.tasks.t.modl'. Did you mean 'model'?",
        ),
        ({"seed": -1}, "key 'seed' = -1"),
    ],
)
def test_faults_name_key_value_and_the_nearest(change: dict[str, object], told: str) -> None:
    data = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    with pytest.raises(ConfigError) as caught:
        parse_config(data, "my.yaml")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"parameters": {"density": 2}}, "density"),
        ({"parameters": {"density": [0.2, 0.3, 0.4]}}, "has 3 values for 2 models"),
        ({"parameters": {"vote": {"divde": "counts"}}}, "Did you mean 'vote.divide'"),
        ({"models": ["org/base", "org/a"]}, "'org/base' is the base itself"),
        ({"models": ["org/a", "org/a"]}, "two models are called 'org/a'"),
        ({"tensors": [{"match": "*", "weight": {"layers": 1}}]}, "'layers' is a list of values"),
        ({"shard_size": "five"}, "'five' is no size"),
    ],
)
def test_values_that_cannot_work_are_refused(change: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_of(parse_config({**GOOD, **change}))
    assert told.replace("vote.divide", "divide") in str(caught.value)


def test_short_forms_and_relative_paths(tmp_path: Path) -> None:
    for name in ("base", "one", "two"):
        state_folder(tmp_path / name, some_state(0))
    path = tmp_path / "my.yaml"
    path.write_text(
        "method: task_arithmetic\nbase: base\nmodels: [one, {model: two, weight: 0.5, name: zwei}]"
        "\nparameters: {weight: 0.2}\ncompare: {tasks: {t: rows.csv}}\n"
    )
    recipe, config = read_recipe(path)
    assert [spec.name for spec in recipe.models] == ["one", "zwei", "base"]
    assert all(Path(spec.where).is_absolute() for spec in recipe.models)
    assert recipe.experts == (0, 1) and recipe.base == 2
    assert parameters(recipe, recipe.parts[0], "w", 0) == {"weight": (0.2, 0.5)}
    assert config is not None and config.compare is not None
    assert config.compare.tasks["t"].data == "rows.csv"


def test_gradients_interpolate_numbers_and_hold_other_values() -> None:
    assert [Gradient((0.0, 1.0, 0.5)).at(t) for t in (0, 0.25, 0.5, 0.75, 1)] == [
        0, 0.5, 1, 0.75, 0.5,
    ]  # fmt: skip
    assert [Gradient((True, False)).at(t) for t in (0, 0.9, 1)] == [True, True, False]
    assert Gradient((3,)).at(0.7) == 3


def test_layers_are_found_by_the_first_number_of_a_name() -> None:
    assert layer_of("model.layers.11.mlp.experts.3.w1.weight") == ("model.layers", 11)
    assert layer_of("h.0.attn.bias") == ("h", 0)
    assert layer_of("0.weight") == ("", 0)
    assert layer_of("conv1.weight") is None
    names = ["e.block.0.x", "e.block.2.x", "d.block.0.x", "embed", "odd.7.x"]
    assert depths(names) == {"e.block": 3, "d.block": 1}


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("200 MB", 2 * 10**8), ("1.5GiB", 3 * 2**29), ("7k", 7000), (12, 12)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert bytes_of(text) == size
