"""Every slip of the published code that `official` reproduces, and its absence by default."""

from __future__ import annotations

from dataclasses import replace

import neuro_examples as make
import pytest
import torch

from polytask.configs import parse
from polytask.errors import ConfigError
from polytask.models.neuro import GroupConfig, NeuroformerConfig, NeuroformerModel
from polytask.models.neuro.stems import LearnedTime, TimeSinusoid
from polytask.objectives.neuro import NeuroLoss


def test_what_is_given_goes_before_official() -> None:
    config = make.small(official=True, mask_pad=True)
    assert config.mask_pad and config.scalar_norm and config.always_quarter
    again = NeuroformerConfig.model_validate(config.model_dump(mode="json"))
    assert again == config
    assert make.small().mask_pad and not make.small().scalar_norm


def test_times_are_learned_with_tables_of_their_own_for_the_past() -> None:
    model = NeuroformerModel(make.small(official=True))
    assert isinstance(model.now.time, LearnedTime) and isinstance(model.past.time, LearnedTime)
    assert not torch.equal(model.now.time.down.weight, model.past.time.down.weight)
    assert isinstance(NeuroformerModel(make.small()).now.time, TimeSinusoid)


@pytest.mark.parametrize("official", [False, True])
def test_a_layer_norm_over_one_feature_erases_behaviour(official: bool) -> None:
    batch = make.batch(full=True)
    louder = replace(batch, behavior={n: 3 * v + 1 for n, v in batch.behavior.items()})
    model = make.moved(make.rich(official=official))
    if official:
        with torch.no_grad():
            for stem in model.scalars.values():
                stem.norm.bias.zero_()
    assert torch.allclose(model(batch).ids, model(louder).ids) is official
    if official:  # what is left is the time of the sample
        later = replace(batch, offset={n: v + 5 for n, v in batch.offset.items()})
        assert not torch.allclose(model(batch).ids, model(later).ids)


@pytest.mark.parametrize("official", [False, True])
def test_patches_of_a_constant_video_are_alike_without_positions(official: bool) -> None:
    model = make.moved(make.rich(official=official))
    patches = model.video(torch.ones(1, 4, 6, 6))[0]
    assert patches.shape == (2 * 2 * 2, 16)
    assert torch.allclose(patches, patches[:1].expand_as(patches)) is official


@pytest.mark.parametrize("official", [False, True])
def test_every_group_has_the_last_ones_number_of_layers(official: bool) -> None:
    groups = (
        GroupConfig(name="a", variables=("pupil",), layers=3),
        GroupConfig(name="b", variables=("light",), layers=1),
    )
    model = NeuroformerModel(make.rich(groups=groups, official=official))
    counts = [len(model.stack.cross[name]) for name in ("a", "b")]
    assert counts == ([1, 1] if official else [3, 1])


@pytest.mark.parametrize("official", [False, True])
def test_one_sample_of_a_variable(official: bool) -> None:
    model, batch = make.moved(make.rich(official=official)), make.batch(full=True)
    samples = {n: v.shape[1] for n, v in model(batch).variables.items()}
    assert samples == (
        {"pupil": 1, "phi": 1, "light": 1} if official else {"pupil": 2, "phi": 1, "light": 3}
    )


@pytest.mark.parametrize("official", [False, True])
def test_behaviour_is_read_from_padding_as_well(official: bool) -> None:
    model, batch = make.moved(make.rich(official=official)), make.batch(full=True)
    short, full = batch.trimmed(make.UNITS + 2), batch
    same = torch.allclose(
        model.answer(model(short), "speed"), model.answer(model(full), "speed"), atol=1e-5
    )
    assert same is not official


@pytest.mark.parametrize("official", [False, True])
def test_three_quarters_of_the_spike_loss_without_alignment(official: bool) -> None:
    batch = make.batch()
    quarter = make.moved(make.small(official=official, mask_pad=True, time_code="sinusoid"))
    whole = make.moved(make.small())
    ratio = NeuroLoss()(quarter, batch).value["id"] / NeuroLoss()(whole, batch).value["id"]
    assert torch.allclose(ratio, torch.full_like(ratio, 0.75 if official else 1.0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"groups": [{"name": "a", "variables": ["speed"]}], "targets": {"speed": {}}},
            "given away",
        ),
        ({"align": ["spikes"]}, "two different"),
        ({"align": ["spikes", "video"]}, "no modality"),
        ({"dim": 15}, "multiple of heads"),
        ({"targets": {"s": {"kind": "classification"}}}, "classes"),
        ({"target_weights": {"speed": 1}}, "no target"),
        ({"video": {"frames": 1, "height": 9, "width": 9}}, "longer than frames"),
        ({"blok": 3}, "Did you mean 'block'"),
    ],
)  # fmt: skip
def test_impossible_configurations_are_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(NeuroformerConfig, {"units": 3, "times": 4, "dim": 16, "heads": 2, **change}, "model")
