"""The multitask model: a mixed batch gives each row what it would get alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import model_examples as make
import numpy as np
import pytest
import torch
from model_examples import Row
from torch import Tensor, nn

from polytask.errors import ConfigError
from polytask.models import (
    Batch,
    HeadSpec,
    InputSpec,
    ModelConfig,
    ModelSpec,
    MultitaskModel,
    RouteContext,
    Terms,
)
from polytask.models.collate import collate
from polytask.models.specs import ObjectiveConfig

ARCHITECTURES: list[dict[str, Any]] = [
    {},
    {"pool": "mean", "positions": "learned", "norm": "rms"},
    {"pool": "last", "positions": "relative", "kv_heads": 2},
    {"decoder_layers": 2, "tie": False},
    {"forecast_from": "summary", "series_level": False, "gated": True, "pool": "first"},
]
NAMES = ["plain", "mean", "last", "decoder", "first"]


def batch_of(rows: list[Row]) -> Batch:
    return collate(rows, make.KINDS)


def by_pair(terms: Terms) -> dict[tuple[str, int, int], float]:
    """(term, task, row) -> loss."""
    return {
        (name, int(task), int(row)): float(value)
        for name in terms.value
        for value, task, row in zip(
            terms.value[name].detach(), terms.task[name], terms.row[name], strict=True
        )
    }


@pytest.fixture(params=ARCHITECTURES, ids=NAMES)
def model(request: pytest.FixtureRequest) -> MultitaskModel:
    return MultitaskModel(make.spec(**request.param))


class TestMixedBatches:
    def test_every_row_gets_the_losses_it_gets_alone(self, model: MultitaskModel) -> None:
        rows = make.everything()
        mixed = by_pair(model.terms(batch_of(rows)))
        alone: dict[tuple[str, int, int], float] = {}
        for row in rows:
            alone |= by_pair(model.terms(batch_of([row])))
        assert mixed.keys() == alone.keys()
        for pair, loss in alone.items():
            if pair[0] != "match":  # a lone pair has no negatives
                assert mixed[pair] == pytest.approx(loss, rel=1e-4, abs=1e-5), pair

    def test_the_order_of_rows_does_not_matter(self, model: MultitaskModel) -> None:
        rows = make.everything()
        one = by_pair(model.terms(batch_of(rows)))
        other = by_pair(model.terms(batch_of(rows[::-1])))
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)

    def test_predictions_are_those_of_the_row_alone(self, model: MultitaskModel) -> None:
        rows = make.everything()
        mixed = model.predict(batch_of(rows))
        for row in rows:
            for kind, single in model.predict(batch_of([row])).items():
                which = np.nonzero(mixed[kind].row == row.row)[0]
                assert mixed[kind].task[which].tolist() == single.task.tolist()
                found = mixed[kind].value[which]
                for axis in range(1, found.ndim):
                    found = np.take(
                        found, range(min(found.shape[axis], single.value.shape[axis])), axis
                    )
                expected = single.value[tuple(slice(n) for n in found.shape)]
                if kind == "classify":  # columns beyond a task's classes
                    found, expected = np.nan_to_num(found), np.nan_to_num(expected)
                np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-4)

    def test_every_parameter_gets_a_gradient(self, model: MultitaskModel) -> None:
        terms = model.terms(batch_of(make.everything()))
        total = torch.stack([v.sum() for v in terms.value.values()]).sum()
        total.backward()
        without = [name for name, p in model.named_parameters() if p.grad is None]
        assert without == []
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_terms_are_float32_and_finite_under_bfloat16(self, model: MultitaskModel) -> None:
        exact = by_pair(model.terms(batch_of(make.everything())))
        with torch.autocast("cpu", torch.bfloat16):
            terms = model.terms(batch_of(make.everything()))
        assert {v.dtype for v in terms.value.values()} == {torch.float32}
        for pair, loss in by_pair(terms).items():
            assert loss == pytest.approx(exact[pair], rel=0.1, abs=0.15), pair
        torch.stack([v.sum() for v in terms.value.values()]).sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)

    def test_checkpointing_gives_the_same_gradients(self, model: MultitaskModel) -> None:
        found = []
        for on in (False, True):
            config = model.config.model_copy(update={"gradient_checkpointing": on})
            built = MultitaskModel(model.spec.model_copy(update={"config": config}))
            terms = built.terms(batch_of(make.everything()))
            torch.stack([v.sum() for v in terms.value.values()]).sum().backward()
            found.append({name: p.grad for name, p in built.named_parameters()})
        for name, gradient in found[0].items():
            torch.testing.assert_close(found[1][name], gradient, msg=name)


class TestLabels:
    def test_a_row_with_several_labels_runs_the_trunk_once(self) -> None:
        model = MultitaskModel(make.spec())
        seen: list[int] = []
        model.trunk.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        terms = model.terms(batch_of(make.everything()[:1]))
        assert seen == [1]
        assert sum(len(v) for v in terms.value.values()) == 3

    def test_missing_labels_change_nothing(self) -> None:
        model = MultitaskModel(make.spec())
        rows = make.everything()
        complete = batch_of(rows)
        holes = batch_of(
            [*rows, Row([make.text(np.random.default_rng(3), 4)], {}, 99)],
        )
        assert by_pair(model.terms(holes)) == pytest.approx(
            by_pair(model.terms(complete)), rel=1e-4, abs=1e-5
        )

    def test_pairs_marked_unknown_by_hand_are_left_out(self) -> None:
        model = MultitaskModel(make.spec())
        batch = batch_of(make.everything())
        expected = by_pair(model.terms(batch))
        targets = dict(batch.targets)
        for kind, fill in (("classify", -1), ("regress", float("nan")), ("generate", -100)):
            value = targets[kind].value.clone()
            value[0] = fill
            targets[kind] = replace(targets[kind], value=value)
        marked = replace(batch, targets=targets, complete=False)
        found = by_pair(model.terms(marked))
        gone = {("classify", 0, 10), ("regress", 2, 10), ("generate", 5, 15)}
        assert found.keys() == expected.keys() - gone
        assert found == pytest.approx({p: expected[p] for p in found}, rel=1e-4, abs=1e-5)

    def test_unknown_labels_have_no_gradient(self) -> None:
        model = MultitaskModel(make.spec())
        rows = [make.everything()[0]]  # multilabel: third unknown; regress: second unknown
        terms = model.terms(batch_of(rows))
        (terms.value["multilabel"].sum() + terms.value["regress"].sum()).backward()
        multilabel = model.heads["multilabel"].linear.weight.grad
        regress = model.heads["regress"].linear.weight.grad
        assert (multilabel.abs().sum(1) > 0).tolist() == [True, True, False, True]
        assert (regress.abs().sum(1) > 0).tolist() == [True, False]

    def test_labels_of_one_task_move_no_other_head(self) -> None:
        model = MultitaskModel(make.spec())
        terms = model.terms(batch_of(make.everything()))
        of_digit = terms.value["classify"][terms.task["classify"] == 10]
        of_digit.sum().backward()
        gradient = model.heads["classify"].linear.weight.grad.abs().sum(1) > 0
        rows = model.head_rows("digit")["heads.classify.linear.weight"]
        assert gradient[rows].all() and int(gradient.sum()) == 10


class TestForecasts:
    def test_follow_a_change_of_units(self) -> None:
        model = MultitaskModel(make.spec(series_level=False))
        r = np.random.default_rng(1)
        rows = [Row([make.series(r, 24)], {7: np.zeros((6, 2), np.float32)})]
        moved = [
            Row(
                [{"series.values": rows[0].sequences[0]["series.values"] * 50 - 3000}],
                rows[0].targets,
            )
        ]
        base = model.predict(batch_of(rows))["forecast"].value
        found = model.predict(batch_of(moved))["forecast"].value
        np.testing.assert_allclose(found, base * 50 - 3000, rtol=1e-3)

    def test_the_level_token_tells_levels_apart(self) -> None:
        model = MultitaskModel(make.spec(series_level=True))
        r = np.random.default_rng(1)
        values = make.series(r, 24)["series.values"]
        rows = [Row([{"series.values": v}], {0: 1}) for v in (values, values + 500, values.copy())]
        found = model.predict(batch_of(rows))["classify"].value
        assert np.abs(found[0] - found[1]).max() > 1e-4
        np.testing.assert_allclose(found[0], found[2], rtol=1e-5)

    def test_a_constant_or_empty_series_is_finite(self) -> None:
        model = MultitaskModel(make.spec())
        for fill in (0.0, 7.0, 1e9, np.nan):
            values = np.full((24, 2), fill, np.float32)
            rows = [Row([{"series.values": values}], {7: np.ones((6, 2), np.float32)})]
            loss = model.terms(batch_of(rows)).value["forecast"]
            assert loss.isfinite().all(), fill


class TestSharing:
    def test_names_divide_into_shared_and_heads(self) -> None:
        model = MultitaskModel(make.spec())
        heads = {name for task in model.task_names for name in model.head_names(task)}
        assert heads.isdisjoint(model.shared_names())
        assert heads | set(model.shared_names()) == {n for n, _ in model.named_parameters()}
        assert model.head_names("demand") == [
            "heads.forecast.linear.weight",
            "heads.forecast.linear.bias",
        ]
        with pytest.raises(ConfigError, match="Did you mean 'demand'"):
            model.head_names("demnd")

    def test_gradients_meet_at_the_features(self) -> None:
        model = MultitaskModel(make.spec())
        batch = batch_of(make.everything())
        model.terms(batch).per_task(len(make.HEADS))[0].sum().backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        features = model.shared_features(batch)
        losses = model.terms_from(features, batch).per_task(len(make.HEADS))[0]
        cut = features.tensors()
        gradients = torch.autograd.grad(losses.sum(), cut, retain_graph=True, allow_unused=True)
        used = [(c, g) for c, g in zip(cut, gradients, strict=True) if g is not None]
        torch.autograd.backward([c for c, _ in used], [g for _, g in used])
        for name in model.shared_names():
            grad = model.get_parameter(name).grad
            torch.testing.assert_close(grad, expected[name], msg=name, rtol=1e-3, atol=1e-5)

    def test_torchjd_backpropagates_through_the_split(self) -> None:
        from torchjd.aggregation import Sum
        from torchjd.autojac import jac_to_grad, mtl_backward

        model = MultitaskModel(make.spec())
        batch = batch_of([row for row in make.everything() if {0, 7, 10} & row.targets.keys()])
        model.terms(batch).per_task(len(make.HEADS))[0].sum().backward()
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        features = model.shared_features(batch)
        losses = model.terms_from(features, batch).per_task(len(make.HEADS))[0]
        present = [i for i in range(len(losses)) if float(losses[i].detach()) != 0]
        shared = [model.get_parameter(n) for n in model.shared_names() if n in expected]
        mtl_backward([losses[i] for i in present], features=features.tensors(), retain_graph=True)
        jac_to_grad(shared, Sum())
        for name in model.shared_names():
            if name in expected:
                grad = model.get_parameter(name).grad
                torch.testing.assert_close(grad, expected[name], msg=name, rtol=1e-3, atol=1e-5)

    def test_initial_weights_do_not_depend_on_other_tasks(self) -> None:
        many = MultitaskModel(make.spec()).state_dict()
        one = make.spec().model_copy(update={"heads": (make.HEADS[10],)})
        single = MultitaskModel(one)
        rows = MultitaskModel(make.spec()).head_rows("digit")
        for name, value in single.state_dict().items():
            expected = many[name][rows[name]] if name in rows else many[name]
            assert torch.equal(value, expected), name

    def test_building_leaves_the_global_random_state_alone(self) -> None:
        torch.manual_seed(0)
        before = torch.get_rng_state()
        MultitaskModel(make.spec())
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_model_returns_from_json_and_weights(self) -> None:
        model = MultitaskModel(make.spec(seed=3))
        again = MultitaskModel.from_json(model.to_json())
        assert again.spec == model.spec
        other = MultitaskModel.from_json(MultitaskModel(make.spec(seed=4)).to_json())
        other.load_state_dict(model.state_dict())
        batch = batch_of(make.everything())
        assert by_pair(other.terms(batch)) == by_pair(model.terms(batch))

    def test_a_route_stands_in_for_the_feed_forwards(self) -> None:
        model = MultitaskModel(make.spec())
        batch = batch_of(make.everything())
        plain = by_pair(model.terms(batch))
        contexts: list[RouteContext] = []

        def route(layer: int, feed_forward: nn.Module, x: Tensor, context: RouteContext) -> Tensor:
            contexts.append(context)
            out: Tensor = feed_forward(x)
            return out

        model.route = route
        assert by_pair(model.terms(batch)) == plain
        assert [c.task.tolist() for c in contexts if c.task is not None] == [
            batch.task.tolist()
        ] * 2
        assert contexts[0].valid is not None and contexts[0].valid.shape[0] == batch.sequences


class TestSizes:
    def heads(self, tasks: int) -> tuple[HeadSpec, ...]:
        kinds = (("classify", 3), ("multilabel", 4), ("regress", 1), ("tag", 5))
        return tuple(
            HeadSpec(task=f"t{i}", kind=kinds[i % 4][0], outputs=kinds[i % 4][1])
            for i in range(tasks)
        )

    def test_a_step_does_as_much_work_with_2000_tasks_as_with_8(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        r = np.random.default_rng(0)
        texts = [make.text(r, 6) for _ in range(16)]
        labels = (1, np.ones(4, np.float32), np.ones(1, np.float32), np.full(6, 2, np.int32))
        work, operations = [], []
        for tasks in (8, 2000):
            heads = self.heads(tasks)
            model = MultitaskModel(make.spec().model_copy(update={"heads": heads}))
            step = tasks // 8
            rows = [
                Row([text], {(i % 8) * step // 4 * 4 + i % 4: labels[i % 4]}, i)
                for i, text in enumerate(texts)
            ]
            batch = collate(rows, [head.kind for head in heads])
            with FlopCounterMode(display=False) as counter:
                terms = model.terms(batch)
                torch.stack([v.sum() for v in terms.value.values()]).sum().backward()
            work.append(counter.get_total_flops())
            with torch.profiler.profile() as profile:
                model.terms(batch)
            operations.append(sum(event.count for event in profile.key_averages()))
        assert work[0] == work[1]
        assert operations[1] <= operations[0] * 1.1

    def test_one_task_of_one_class_trains(self) -> None:
        spec = ModelSpec(
            config=ModelConfig(dim=8, layers=1, heads=2),
            inputs=InputSpec(vocab_size=50),
            heads=(HeadSpec(task="only", kind="classify", outputs=1),),
        )
        model = MultitaskModel(spec)
        rows = [Row([make.text(np.random.default_rng(0), 3)], {0: 0})]
        loss = model.terms(collate(rows, ["classify"])).value["classify"]
        loss.sum().backward()
        assert loss.tolist() == [0.0]

    def test_a_batch_without_labels_gives_no_terms(self) -> None:
        model = MultitaskModel(make.spec())
        batch = batch_of([Row([make.text(np.random.default_rng(0), 3)], {})])
        terms = model.terms(batch)
        assert terms.value == {}
        mean, count = terms.per_task(3)
        assert mean.tolist() == count.tolist() == [0.0] * 3


class TestOptions:
    def test_the_z_loss_is_a_term_of_its_own(self) -> None:
        objective = ObjectiveConfig(z_loss=0.1)
        plain, with_z = (
            MultitaskModel(make.spec(objective=o)).terms(batch_of(make.everything()))
            for o in (ObjectiveConfig(), objective)
        )
        assert set(with_z.value) - set(plain.value) == {"z_loss"}
        torch.testing.assert_close(with_z.value["generate"], plain.value["generate"])
        assert (with_z.value["z_loss"] > 0).all()

    def test_generation_logits_and_losses_agree(self) -> None:
        model = MultitaskModel(make.spec())
        batch = batch_of(make.everything())
        output = model(batch)["generate"]
        assert output.pair is not None and output.position is not None
        label = batch.targets["generate"].value[output.pair, output.position]
        nll = nn.functional.cross_entropy(output.value, label, reduction="none")
        for i in range(2):
            mean = nll[output.pair == i].mean()
            torch.testing.assert_close(mean, model.terms(batch).value["generate"][i])
        head, pairs = model.heads["generate"], model.pairs(batch, "generate")
        torch.testing.assert_close(
            head.losses(output, pairs)["generate"], model.terms(batch).value["generate"]
        )
        likeliest = head.predict(output, pairs)
        value = batch.targets["generate"].value.numpy()
        assert ((likeliest == -100) == (value == -100)).all()
        assert (likeliest[likeliest >= 0] == output.value.argmax(-1).numpy()).all()

    @pytest.mark.parametrize(
        ("heads", "message"),
        [
            (HeadSpec(task="t", kind="tag", outputs=2), "'t' .tag. needs text"),
            (
                HeadSpec(task="t", kind="dense", outputs=1, height=2, width=2),
                "'t' .dense. needs image",
            ),
        ],
    )
    def test_a_head_without_its_inputs_is_refused(self, heads: HeadSpec, message: str) -> None:
        spec = ModelSpec(config=ModelConfig(), inputs=InputSpec(feature_width=3), heads=(heads,))
        with pytest.raises(ConfigError, match=message):
            MultitaskModel(spec)

    def test_a_patch_that_does_not_divide_the_image_is_refused(self) -> None:
        with pytest.raises(
            ConfigError, match="does not divide the image size 8; possible: 1, 2, 4"
        ):
            MultitaskModel(make.spec(image_patch=3))

    def test_a_model_without_inputs_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="needs inputs"):
            MultitaskModel(ModelSpec(config=ModelConfig(), inputs=InputSpec(), heads=()))

    def test_inputs_the_model_has_no_stem_for_are_refused(self) -> None:
        spec = ModelSpec(
            config=ModelConfig(),
            inputs=InputSpec(vocab_size=50),
            heads=(HeadSpec(task="t", kind="classify", outputs=2),),
        )
        rows = [Row([make.image(np.random.default_rng(0))], {0: 1})]
        with pytest.raises(ValueError, match="the batch has image inputs"):
            MultitaskModel(spec).terms(collate(rows, ["classify"]))
