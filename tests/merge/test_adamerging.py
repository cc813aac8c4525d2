"""AdaMerging: gradient, optimiser, what moves and what must not, and mistakes that are named."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from polytask.configs import parse
from polytask.errors import ConfigError, MergeError, NonFiniteError
from polytask.merge.adamerging import AdaMergingConfig, Goal, fit, learn, trust
from polytask.merge.coefficients import Groups, block_of, check_size
from polytask.merge.methods.ties import ties_vectors
from polytask.merge.vectors import TaskVectors
from polytask.objectives.classes import entropy

WIDTH = 5
CLASSES = {"a": 3, "b": 4}


class Net(nn.Module):
    """Two blocks with a normalisation that keeps running statistics, and an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
        self.norm = nn.BatchNorm1d(WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.block:
            x = torch.tanh(layer(x))
        found: Tensor = self.last(self.norm(x))
        return found


def parts(seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = Net().to(dtype)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    experts = {
        name: {
            k: v + 0.3 * torch.randn_like(v) if v.is_floating_point() else v + 7
            for k, v in base.items()
        }
        for name in CLASSES
    }
    for expert in experts.values():
        expert["norm.running_var"] = base["norm.running_var"].clone()
    heads = {name: nn.Linear(WIDTH, n).to(dtype) for name, n in CLASSES.items()}
    inputs = {name: [3 * torch.randn(6, WIDTH, dtype=dtype) for _ in range(3)] for name in CLASSES}
    return {"model": model, "base": base, "experts": experts, "heads": heads, "inputs": inputs}


def slow_objective(given: dict[str, Any], coefficients: dict[str, Tensor], taken: int) -> Tensor:
    """The paper's objective written out: probabilities, logarithms, sums."""
    model, total = given["model"].eval(), torch.zeros((), dtype=torch.float64)
    state = dict(given["base"])
    for key, row in coefficients.items():
        state[key] = given["base"][key] + sum(
            c * (expert[key] - given["base"][key])
            for c, expert in zip(row, given["experts"].values(), strict=True)
        )
    for task, head in given["heads"].items():
        for batch in given["inputs"][task][:taken]:
            p = torch.softmax(head(functional_call(model, state, (batch,))), -1)
            total = total - (p * p.log()).sum(-1).mean()
    return total


def vectors_of(given: dict[str, Any]) -> TaskVectors:
    keys = [name for name, _ in given["model"].named_parameters()]
    return TaskVectors.from_state_dicts(
        {k: given["base"][k] for k in keys},
        [{k: e[k] for k in keys} for e in given["experts"].values()],
    )


@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
def test_the_gradient_is_that_of_finite_differences(granularity: Any) -> None:
    given = parts()
    given["model"].eval()
    vectors = vectors_of(given)
    groups = Groups.of(vectors, granularity)
    buffers = dict(given["model"].named_buffers())
    forwards = {
        task: lambda state, x, head=head: head(
            functional_call(given["model"], {**buffers, **state}, (x,))
        )
        for task, head in given["heads"].items()
    }
    goal = Goal(vectors, forwards, groups, {})
    torch.manual_seed(1)
    at = 0.3 + 0.1 * torch.rand(groups.count, 2, dtype=torch.float64)
    batches = {task: given["inputs"][task][:2] for task in given["inputs"]}
    found = goal(at, batches)
    step = 1e-6
    for g in range(groups.count):
        for k in range(2):
            values = []
            for sign in (1, -1):
                moved = at.clone()
                moved[g, k] += sign * step
                values.append(slow_objective(given, groups.spread(moved), 2).item())
            slope = (values[0] - values[1]) / (2 * step)
            assert float(found.gradient[g, k]) == pytest.approx(slope, rel=1e-5, abs=1e-8)
    mean = slow_objective(given, groups.spread(at), 2).item()
    assert sum(2 * value for value in found.entropies.values()) == pytest.approx(mean)
    assert found.rows == 24


@pytest.mark.parametrize("granularity", ["task", "block", "tensor"])
@pytest.mark.parametrize("clamp", [None, (0.0, 1.0), (0.28, 0.32)])
def test_learning_is_adam_on_autograd_through_the_merge(granularity: Any, clamp: Any) -> None:
    given = parts()
    config = AdaMergingConfig(
        granularity=granularity, lr=1e-2, steps=6, batches_per_step=2, clamp=clamp
    )
    found = fit(**given, config=config)
    given["model"].eval()
    vectors = vectors_of(given)
    label = {
        "task": lambda key: "",
        "block": lambda key: {"block.0": "0", "block.1": "1"}.get(key[:7], key.split(".")[0]),
        "tensor": lambda key: key,
    }[granularity]
    raw = {
        label(key): torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True)
        for key in vectors.deltas
    }
    adam = torch.optim.Adam(raw.values(), lr=1e-2)
    order = given["inputs"]
    for step in range(6):
        used = {
            key: raw[label(key)] if clamp is None else raw[label(key)].clamp(*clamp)
            for key in vectors.deltas
        }
        turn = {t: [b[(2 * step + i) % 3] for i in range(2)] for t, b in order.items()}
        adam.zero_grad()
        slow_objective({**given, "inputs": turn}, used, 2).backward()
        adam.step()
    for key in vectors.deltas:
        wanted = raw[label(key)].detach()
        wanted = wanted if clamp is None else wanted.clamp(*clamp)
        assert torch.allclose(found.coefficients[key], wanted, atol=1e-9)
    assert found.moved == pytest.approx(
        max(float((row - 0.3).abs().max()) for row in found.coefficients.values())
    )


def test_the_merge_is_the_base_plus_the_weighted_task_vectors_and_buffers_are_the_bases() -> None:
    given = parts(dtype=torch.float32)
    found = fit(**given, config=AdaMergingConfig(steps=4, lr=1e-2))
    parameters = dict(given["model"].named_parameters())
    for key, value in found.state.items():
        if key in parameters:
            wanted = given["base"][key].double()
            for c, expert in zip(found.coefficients[key], given["experts"].values(), strict=True):
                wanted = wanted + float(c) * (expert[key] - given["base"][key]).double()
            assert torch.allclose(value.double(), wanted, atol=1e-6)
        else:
            assert torch.equal(value, given["base"][key])
    assert found.state.keys() == given["base"].keys()


def test_nothing_but_coefficients_changes() -> None:
    given = parts()
    given["model"].train()
    before = {k: v.clone() for k, v in given["model"].state_dict().items()}
    heads = {t: head.weight.clone() for t, head in given["heads"].items()}
    fit(**given, config=AdaMergingConfig(steps=3))
    assert given["model"].training
    for key, value in given["model"].state_dict().items():
        assert torch.equal(value, before[key])
    for task, head in given["heads"].items():
        assert torch.equal(head.weight, heads[task]) and head.weight.grad is None
    assert all(p.grad is None for p in given["model"].parameters())


def test_entropy_falls_where_it_is_minimised_and_rises_where_its_sign_is_turned() -> None:
    given = parts()
    config = AdaMergingConfig(steps=40, lr=1e-2)
    down = fit(**given, config=config)
    up = fit(**given, config=config, loss=lambda logits: -entropy(logits))
    first, last = (sum(values[i] for values in down.trace.values()) for i in (0, -1))
    assert last < first
    assert -sum(v[-1] for v in up.trace.values()) > -sum(v[0] for v in up.trace.values())


def test_the_plus_plus_form_learns_on_trimmed_and_elected_vectors() -> None:
    given = parts()
    found = fit(**given, config=AdaMergingConfig(steps=3, trim=0.2))
    trimmed = ties_vectors(vectors_of(given), 0.2)
    merged = trimmed.add(found.coefficients)
    for key in trimmed.deltas:
        assert torch.allclose(found.state[key], merged[key])


def test_tied_tensors_have_one_coefficient_and_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH, bias=False)
            self.second = nn.Linear(WIDTH, WIDTH, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.second(torch.tanh(self.first(x)))
            return found

    torch.manual_seed(0)
    model = Tied().double()
    base = {k: v.clone() for k, v in model.state_dict().items()}  # as read from a file: not shared
    expert = {k: v + 1.0 for k, v in base.items()}
    inputs = {"a": [torch.randn(8, WIDTH).double()]}
    heads = {"a": nn.Linear(WIDTH, 3).double()}
    config = AdaMergingConfig(steps=3)
    found = fit(model, base, {"x": expert}, heads, inputs, config)
    assert list(found.coefficients) == ["first.weight"]
    assert torch.equal(found.state["first.weight"], found.state["second.weight"])
    expert["second.weight"] = expert["second.weight"] + 1
    with pytest.raises(MergeError, match=r"x: 'first.weight' and 'second.weight' are tied"):
        fit(model, base, {"x": expert}, heads, inputs, config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_experts_are_subtracted_in_float32(dtype: torch.dtype) -> None:
    given = parts(dtype=torch.float32)
    low = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given["base"].items()}
    experts = {
        n: {k: v.to(dtype) if v.is_floating_point() else v for k, v in e.items()}
        for n, e in given["experts"].items()
    }
    inputs, heads = given["inputs"], given["heads"]
    found = fit(given["model"], low, experts, heads, inputs, AdaMergingConfig(steps=2, lr=1e-2))
    key = "last.weight"
    exact = low[key].float()
    for c, expert in zip(found.coefficients[key], experts.values(), strict=True):
        exact = exact + float(c) * (expert[key].float() - low[key].float())
    assert found.state[key].dtype == dtype
    assert torch.equal(found.state[key], exact.to(dtype))


def test_mappings_and_tuples_of_inputs_are_spread_over_the_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(WIDTH))

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return x @ self.weight * scale

    torch.manual_seed(0)
    model = Two()
    base = dict(model.state_dict())
    expert = {"weight": base["weight"] + torch.randn(WIDTH, WIDTH)}
    x, scale = torch.randn(4, WIDTH), torch.tensor(2.0)
    results = [
        fit(model, base, {"x": expert}, {"a": nn.Identity()}, {"a": [batch]}).coefficients
        for batch in ((x, scale), [x, scale], {"x": x, "scale": scale})
    ]
    for other in results[1:]:
        assert torch.equal(other["weight"], results[0]["weight"])


# -- what is refused, and what is warned of


def test_coefficients_that_cannot_move_are_an_error() -> None:
    given = parts()
    given["heads"] = {t: nn.Linear(WIDTH, n).double() for t, n in CLASSES.items()}
    for head in given["heads"].values():
        nn.init.zeros_(head.weight)
    with pytest.raises(MergeError, match="no coefficient moved"):
        fit(**given, config=AdaMergingConfig(steps=2))


def test_heads_without_entropy_are_refused_by_the_tasks_name() -> None:
    given = parts()
    given["heads"]["b"] = nn.Linear(WIDTH, 1).double()
    with pytest.raises(MergeError, match="task 'b': its head has one output"):
        fit(**given)
    given["heads"]["b"] = nn.Flatten(0)
    with pytest.raises(MergeError, match="task 'b': AdaMerging needs logits"):
        fit(**given)


def test_nan_in_the_inputs_names_task_and_step() -> None:
    given = parts()
    given["inputs"]["b"][2] = torch.full((2, WIDTH), math.nan, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="step 1: the entropy of task 'b' is nan"):
        fit(**given)


def test_tasks_and_inputs_must_go_together() -> None:
    given = parts()
    given["inputs"]["bb"] = given["inputs"].pop("b")
    with pytest.raises(MergeError, match=r"task 'bb?' has no (inputs|head)"):
        fit(**given)


def test_an_iterator_that_runs_dry_is_explained() -> None:
    given = parts()
    given["inputs"]["a"] = iter(given["inputs"]["a"])
    with pytest.raises(MergeError, match="task 'a': its inputs gave no batch"):
        fit(**given)
    given["inputs"]["a"] = []
    with pytest.raises(MergeError, match="task 'a': its inputs gave no batch"):
        fit(**given)


def test_state_dicts_that_do_not_fit_the_model_are_refused() -> None:
    given = parts()
    odd = {**given["base"], "lost.weight": torch.zeros(2)}
    with pytest.raises(MergeError, match=r"no tensor 'lost.weight'.*last.weight"):
        fit(given["model"], odd, given["experts"], given["heads"], given["inputs"])
    del given["experts"]["b"]["last.weight"]
    with pytest.raises(MergeError, match=r"b: tensor 'last.weight'"):
        fit(**given)
    less = {k: v for k, v in given["base"].items() if k != "last.weight"}
    with pytest.raises(MergeError, match=r"base lacks the model's parameter 'last.weight'"):
        fit(given["model"], less, given["experts"], given["heads"], given["inputs"])


def test_predictions_of_a_single_class_are_warned_of() -> None:
    given = parts()
    with torch.no_grad():
        given["heads"]["a"].bias.copy_(torch.tensor([0.0, 50.0, 0.0]))
        given["heads"]["b"].bias.zero_()
        given["heads"]["b"].weight.copy_(5 * torch.eye(4, WIDTH))
    found = fit(**given, config=AdaMergingConfig(steps=3, lr=1e-2))
    assert any("task 'a': 100% of its last predictions are class 1" in w for w in found.warnings)
    assert not any("task 'b'" in w for w in found.warnings)
    assert found.predicted["a"].tolist() == [0, 12, 0]


def test_an_expert_far_from_the_base_is_warned_of() -> None:
    base = {"near": torch.ones(4), "far": torch.ones(4)}
    expert = {"near": torch.ones(4), "far": torch.full((4,), 3.0)}
    (text,) = check_size(TaskVectors.from_state_dicts(base, [expert], names=["other"]))
    assert "other" in text and "1.41 times" in text and "'far'" in text
    assert check_size(TaskVectors.from_state_dicts(base, [base])) == ()


@pytest.mark.parametrize(
    "bad",
    [{"init": 2.0}, {"clamp": (1.0, 0.0)}, {"steps": 0}, {"trim": 0.0}, {"granularity": "layer"}],
)
def test_settings_that_cannot_work_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        parse(AdaMergingConfig, bad, "test")


# -- parts


def test_blocks_are_names_up_to_the_first_number() -> None:
    assert block_of("bert.encoder.layer.4.attention.query.weight") == "bert.encoder.layer.4"
    assert block_of("h.0.experts.3.up.weight") == "h.0"
    assert block_of("4.weight") == "4"
    assert block_of("embeddings.word.weight") == "embeddings.word"
    assert block_of("scale") == ""


def test_entropy_is_that_of_the_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 5, dtype=torch.float64)
    p = torch.softmax(logits, -1)
    assert torch.allclose(entropy(logits), -(p * p.log()).sum(-1))
    assert torch.allclose(entropy(torch.zeros(1, 8)), torch.tensor([math.log(8)]))
    sure = torch.tensor([[0.0, -1e4]], requires_grad=True)
    entropy(sure).backward(torch.ones(1))
    assert sure.grad is not None and bool(torch.isfinite(sure.grad).all())
    masked = torch.cat((logits, torch.full((7, 2), -math.inf)), 1).requires_grad_()
    found = entropy(masked)
    assert torch.allclose(found, entropy(logits))
    (slope,) = torch.autograd.grad(found.sum(), masked)
    assert bool(torch.isfinite(slope).all())
    assert bool(entropy(torch.full((1, 3), math.nan)).isnan())


def test_trust_is_one_when_the_unsure_are_wrong() -> None:
    sharp = torch.tensor([[9.0, 0.0]] * 4 + [[0.2, 0.0]] * 4)
    label = torch.tensor([0] * 4 + [1] * 4)
    assert trust({"a": sharp}, {"a": label}) == pytest.approx(1.0)
    assert trust({"a": sharp}, {"a": 1 - label}) == pytest.approx(-1.0)
    assert math.isnan(trust({"a": sharp}, {"a": torch.zeros(8, dtype=torch.long)}))


def test_any_functions_can_be_merged_for() -> None:
    vectors = TaskVectors.from_state_dicts({"w": torch.eye(3)}, [{"w": 4 * torch.eye(3)}])

    def stream() -> Iterator[Tensor]:
        yield torch.eye(3)

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            return stream()

    found = learn(
        vectors, {"t": lambda s, x: x @ s["w"]}, {"t": Loader()}, AdaMergingConfig(steps=5)
    )
    assert float(found.coefficients["w"][0]) > 0.3  # larger logits are surer
