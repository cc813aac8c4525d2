"""System 18: claims of the sheet, counts of the forms, sources that must lose the gain."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch

from polytask import systems
from polytask.errors import ConfigError
from polytask.study import Budget
from polytask.systems.testbeds import sources as bed

system = systems.load("scalearn")
module = import_module("polytask.systems.18_scalearn")
SMALL = bed.SMOKE["glyphs"]


def test_claims_are_the_sheets_pass_lines() -> None:
    found = {(c.better, c.than, c.metric, c.kind) for c in system.claims}
    for kind in ("glyphs", "texts"):
        assert (f"{kind}-scalearn", f"{kind}-own", "accuracy", "claim") in found
        assert (f"{kind}-scalearn", f"{kind}-fusion", "accuracy+0.005", "claim") in found
        assert (f"{kind}-scalearn", f"{kind}-untrained", "accuracy", "ablation") in found
    assert ("glyphs-scalearn", "glyphs-shuffled", "accuracy", "ablation") in found
    assert len(found) == 7


def test_the_forms_learn_as_many_numbers_as_their_formulas() -> None:
    """S d L, S L, S d, S with S = 3 sources, d = 64, L = 2; fusion has 3 d^2 + 2 d per layer."""
    wanted = {
        "scalearn": 3 * 64 * 2,
        "uniform": 3 * 2,
        "scalearn++": 3 * 64,
        "uniform++": 3,
        "fusion": 2 * (3 * 64 * 64 + 2 * 64),
    }
    for name, count in wanted.items():
        result = module.Trial(f"glyphs-{name}", 6e-3, True)(0, Budget(steps=1))
        assert result.notes["learned"] == count, name


def test_labels_and_parts_are_disjoint_and_tasks_are_digits_cut() -> None:
    place = bed.bed(SMALL, 0)
    loop, parity = place.parts["loop"], place.parts["parity"]
    assert torch.equal(loop["few"].inputs[0], parity["few"].inputs[0])  # the same images
    flat = {p: {x.numpy().tobytes() for x in d.inputs[0]} for p, d in loop.items()}
    for a in flat:
        for b in flat:
            assert a == b or not flat[a] & flat[b]
    assert set(parity["rich"].label.tolist()) == {0, 1}


def test_stage_one_trains_every_adapter_on_its_own_rows() -> None:
    rich, few = bed.adapters_of(SMALL, 0)
    assert set(rich) == set(few) == set(SMALL.tasks)
    site = next(iter(rich["loop"]))
    assert not torch.equal(rich["loop"][site]["up"], few["loop"][site]["up"])
    assert not torch.equal(rich["loop"][site]["up"], rich["parity"][site]["up"])
    assert not hasattr(bed.bed(SMALL, 0).net, "adapters")


def test_shuffled_sources_stand_at_another_layer_and_untrained_ones_have_equal_size() -> None:
    rich, _ = bed.adapters_of(SMALL, 0)
    first, second = list(rich["loop"])
    moved = bed.shuffled(rich, 0)
    assert torch.equal(moved["loop"][first]["up"], rich["loop"][second]["up"])
    noise = bed.untrained(rich, 0)
    for part, tensor in rich["loop"][first].items():
        torch.testing.assert_close(noise["loop"][first][part].norm(), tensor.norm())
        assert not torch.allclose(noise["loop"][first][part], tensor)


def test_stage_two_changes_neither_net_nor_sources() -> None:
    place = bed.bed(SMALL, 0)
    rich, _ = bed.adapters_of(SMALL, 0)
    before = {n: t.clone() for n, t in place.net.state_dict().items()}
    kept = {s: t["up"].clone() for s, t in rich["loop"].items()}
    bed.stage2(place, "parity", rich, {"method": "scalearn"}, 1e-2, 0)
    assert all(torch.equal(t, before[n]) for n, t in place.net.state_dict().items())
    assert all(torch.equal(t["up"], kept[s]) for s, t in rich["loop"].items())


def test_the_tuning_on_record_covers_every_arm_with_equal_grids() -> None:
    tuning = system.tuning
    assert set(tuning.chosen) == set(module.NAMES)
    assert {len(points) for points in tuning.points.values()} == {4}
    assert not set(tuning.seeds) & set(range(20, 25))


def test_an_unknown_target_is_named_before_anything_trains(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("tasks: {reviews: a.csv, topics: b.csv}\nmodel: {hub: 'embedded:minilm'}\n")
    config = system.config(data=path, out=tmp_path, target="reviws")
    with pytest.raises(ConfigError, match=r"no task 'reviws'\. Did you mean 'reviews'"):
        system.run(config, lambda text: None)
