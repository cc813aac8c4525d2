"""`method: adamerging` in a merge's configuration: learn coefficients first, then merge as ever.

method: adamerging
base: models/base
models: {reviews: models/reviews, topics: models/topics}
inputs:
  reviews: {data: reviews.csv, text: review}
  topics: {data: news.csv, text: [title, body]}
parameters: {granularity: tensor, steps: 200, lr: 0.001}

Every expert answers through its own head on unlabelled rows of its own task. What comes out is an
ordinary recipe, task arithmetic (with `trim` TIES without the mean) with coefficients for every
tensor, so that writing, comparing and the page are those of any merge, and the recipe on the
model's card gives the same model again without learning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.func import functional_call

from polytask import files, rng
from polytask.configs import Config, load_yaml, parse
from polytask.data import DataSpec, open_rows
from polytask.data.rows import Row, RowSource
from polytask.errors import ConfigError, MergeError, suggestion
from polytask.merge.adamerging import AdaMerged, AdaMergingConfig, Forward, learn
from polytask.merge.config import MergeConfig, parse_config, recipe_of
from polytask.merge.plan import Plan
from polytask.merge.recipe import Recipe
from polytask.merge.sources import read
from polytask.merge.vectors import TaskVectors

METHOD = "adamerging"
Say = Callable[[str], None]


class InputsConfig(Config):
    """Unlabelled rows of an expert's task. Labels, where the data have some, are not read."""

    data: str | dict[str, Any]
    """Rows: a path, 'hub:ID', 'embedded:NAME' or a mapping."""
    text: str | tuple[str, ...] | None = None
    """The column with the text, or two for pairs. A polytask run knows its columns."""
    task: str | None = None
    """Which task of a polytask run that has several."""


class LearnedConfig(Config):
    """What `method: adamerging` adds to a merge's configuration."""

    inputs: dict[str, InputsConfig] = Field(default_factory=dict)
    """By model name."""
    parameters: AdaMergingConfig = AdaMergingConfig()
    batch_size: PositiveInt = 16
    limit: PositiveInt = 10_000
    """At most this many rows of a task."""
    max_length: PositiveInt | None = None
    """Tokens of a text; default: the tokenizer's limit."""


@dataclass(frozen=True)
class Voice:
    """How one expert answers its task: its module, logits of a batch, and unlabelled batches."""

    module: nn.Module
    logits: Callable[[nn.Module, Mapping[str, Tensor], Any], Tensor]
    batches: Any


@dataclass(frozen=True)
class Learning:
    """A merge whose coefficients are still to be learned.

    `config` and `recipe` are the merge at the initial coefficients, to plan and check with.
    """

    settings: LearnedConfig
    config: MergeConfig
    recipe: Recipe
    home: Path

    def learn(self, plan: Plan, say: Say | None = None) -> tuple[Recipe, AdaMerged]:
        """Learn, and give the recipe with what was learned. `plan` is that of `self.recipe`.

        Raises:
            ConfigError, MergeError: models or rows that cannot be used, before anything is learned;
                and what `merge.adamerging.learn` raises.
        """
        voices = self.voices(plan)
        vectors = _vectors(plan, next(iter(voices.values())).module)
        forwards = {name: _forward(plan, name, voice) for name, voice in voices.items()}
        inputs = {name: voice.batches for name, voice in voices.items()}

        def progress(done: int, entropies: Mapping[str, float]) -> None:
            if say is not None and (done % 10 == 0 or done == 1):
                total = sum(entropies.values())
                say(f"step {done} of {self.settings.parameters.steps}: entropy {total:.3f}")

        found = learn(vectors, forwards, inputs, self.settings.parameters, progress=progress)
        rules = [
            {"match": _exactly(name), "weight": [float(c) for c in row]}
            for name, row in found.coefficients.items()
        ]
        # Whatever has no coefficient (running statistics, other tasks' parts) stays the base's.
        rules = [{"match": "*", "weight": [0.0] * len(plan.names)}, *rules]
        return self._recipe(rules), found

    def _recipe(self, rules: list[dict[str, Any]]) -> Recipe:
        plain = self.config.model_dump(mode="json", exclude_defaults=True, by_alias=True)
        return recipe_of(parse_config({**plain, "tensors": rules}), self.home)

    def voices(self, plan: Plan) -> dict[str, Voice]:
        """Experts with their heads and rows; checks everything that can go wrong."""
        numbers = dict(zip(plan.names, plan.recipe.experts, strict=True))
        for name in self.settings.inputs:
            if name not in numbers:
                raise ConfigError(f"inputs: there is no model '{name}'.{suggestion(name, numbers)}")
        found = {}
        for name, number in numbers.items():
            folder = plan.sources[number].folder
            given = self.settings.inputs.get(name)
            if given is None:
                continue  # its task vector takes part; nothing is learned from its task
            if folder is not None and (folder / "model.json").is_file():
                found[name] = self._run_voice(folder.parent, name, given)
            else:
                found[name] = self._hub_voice(folder, name, given)
        if not found:
            raise ConfigError(
                "inputs: AdaMerging learns from unlabelled rows; give some by model name"
            )
        return found

    def _rows(self, given: InputsConfig, name: str) -> list[Row]:
        source = open_rows(DataSpec.of(given.data, f"inputs.{name}"), self.home)
        if isinstance(source, RowSource):
            rows = source.take(range(min(len(source), self.settings.limit)))
        else:
            rows = [row for _, row in zip(range(self.settings.limit), source.read_from(0))]
        if not rows:
            raise ConfigError(f"inputs.{name}: there are no rows")
        return rows

    def _hub_voice(self, folder: Path | None, name: str, given: InputsConfig) -> Voice:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if folder is None:
            raise ConfigError(f"inputs.{name}: the model has no folder with a tokenizer")
        rows = self._rows(given, name)
        columns = (given.text,) if isinstance(given.text, str) else given.text or ()
        if not 1 <= len(columns) <= 2:
            raise ConfigError(f"inputs.{name}: 'text' names one column, or two for pairs")
        for column in columns:
            if column not in rows[0]:
                raise ConfigError(
                    f"inputs.{name}: there is no column '{column}'.{suggestion(column, rows[0])}"
                )
        try:
            model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise MergeError(
                f"{name} is no sequence classifier with a tokenizer: {error}"
            ) from error
        texts = [[str(row[column]) for row in rows] for column in columns]

        def encode(index: list[int]) -> Any:
            chosen = [[column[i] for i in index] for column in texts]
            return dict(
                tokenizer(
                    *chosen,
                    padding=True,
                    truncation=True,
                    max_length=self.settings.max_length,
                    return_tensors="pt",
                )
            )

        def logits(module: nn.Module, state: Mapping[str, Tensor], batch: Any) -> Tensor:
            found: Tensor = functional_call(module, dict(state), (), batch).logits
            return found

        return Voice(model.eval(), logits, self._shuffled(len(rows), encode, name))

    def _run_voice(self, folder: Path, name: str, given: InputsConfig) -> Voice:
        from polytask.models.collate import Collator
        from polytask.pipeline.run import load_run

        run = load_run(folder)
        tasks = {t.name: (n, t) for n, x in enumerate(run.processor.layouts) for t in x.tasks}
        chosen = given.task or next(iter(tasks))
        if chosen not in tasks:
            raise ConfigError(
                f"inputs.{name}: the run has no task '{chosen}'.{suggestion(chosen, tasks)}"
            )
        if given.task is None and len(tasks) > 1:
            raise ConfigError(f"inputs.{name}: say which 'task' of the run: {', '.join(tasks)}")
        group, task = tasks[chosen]
        if task.schema.head != "classify":
            raise MergeError(
                f"task '{chosen}' of {name} does not choose one of several classes; its answers "
                "have no entropy to lower"
            )
        rows = self._rows(given, name)
        layouts = run.processor.layouts
        collate = Collator(
            [t.schema.head for layout in layouts for t in layout.tasks],
            [range(x.first_id, x.first_id + len(x.tasks)) for x in layouts],
            run.processor.pad_id,
        )
        number = list(tasks).index(chosen)

        def encode(index: list[int]) -> Any:
            some = [rows[i] for i in index]
            made = run.processor.encode(
                group, some, lambda i: f"{name}, row {index[i] + 1}", with_targets=False
            )
            return (collate(made, [group] * len(made), unlabelled=True),)

        def logits(module: nn.Module, state: Mapping[str, Tensor], batch: Any) -> Tensor:
            output = functional_call(module, dict(state), batch)["classify"]
            found: Tensor = output.value[output.task == number]
            return found

        return Voice(run.model, logits, self._shuffled(len(rows), encode, name))

    def _shuffled(self, rows: int, encode: Callable[[list[int]], Any], name: str) -> Any:
        return Shuffled(rows, self.settings.batch_size, encode, self.config.seed, name)


class Shuffled:
    """Encoded batches of all rows; each time it is read, in another order."""

    def __init__(
        self, rows: int, size: int, encode: Callable[[list[int]], Any], seed: int, name: str
    ) -> None:
        self.rows, self.size, self.encode, self.seed, self.name = rows, size, encode, seed, name
        self.epoch = 0

    def __iter__(self) -> Iterator[Any]:
        order = rng.generator(self.seed, METHOD, self.name, self.epoch).permutation(self.rows)
        self.epoch += 1
        for start in range(0, self.rows, self.size):
            yield self.encode(order[start : start + self.size].tolist())


def find_learning(path: Path) -> Learning | None:
    """The learning that a configuration file asks for; None for any other method.

    Raises:
        ConfigError: names keys and values, with the nearest valid name.
    """
    data = load_yaml(path)
    return learning_of(data, path.parent, str(path)) if data.get("method") == METHOD else None


def learning_of(data: Mapping[str, Any], home: Path, where: str = "the configuration") -> Learning:
    """The same from plain values; relative paths start at `home`."""
    own, known = LearnedConfig.model_fields, MergeConfig.model_fields
    settings = parse(LearnedConfig, {k: v for k, v in data.items() if k in own}, where)
    rest = {k: v for k, v in data.items() if k not in own}
    if "tensors" in rest:
        raise ConfigError(f"{where}: 'tensors' is what AdaMerging learns; leave it out")
    if "base" not in rest:
        raise ConfigError(f"{where}: AdaMerging works on what training added to a base: 'base'")
    for key in rest:
        if key not in known:
            raise ConfigError(f"{where}: unknown key '{key}'.{suggestion(key, [*known, *own])}")
    trim, init = settings.parameters.trim, settings.parameters.init
    form: dict[str, Any] = {"method": "task_arithmetic", "parameters": {"weight": init}}
    if trim is not None:
        vote = {"weigh": "after", "divide": "none", "draw": "majority"}
        shared = {"weight": init, "density": trim, "trim": "model", "vote": vote}
        form = {"method": "ties", "parameters": shared}
    config = parse_config({**rest, **form}, where)
    return Learning(settings, config, recipe_of(config, home), home)


def check_free(out: Path, overwrite: bool) -> None:
    """`MergeError` when the folder is taken, before minutes of learning for it."""
    if out.exists() and not overwrite:
        raise MergeError(f"{out} exists; choose another folder, or --overwrite")


def write_traces(folder: Path, found: AdaMerged) -> None:
    """trace.json (entropy by task and step) and coefficients.json in a merged folder."""
    files.write_json(folder / "trace.json", {"entropy": found.trace})
    coefficients = {name: [float(c) for c in row] for name, row in found.coefficients.items()}
    files.write_json(
        folder / "coefficients.json",
        {"models": list(found.names), "coefficients": coefficients},
    )


def _vectors(plan: Plan, module: nn.Module) -> TaskVectors:
    """Task vectors of what is a parameter, under the names of the result."""
    assert plan.recipe.base is not None
    trained = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    number = plan.recipe.experts[0]
    keys = plan.matches[number].keys
    names = [item.name for item in plan.merged if keys.get(item.name, item.name) in trained]
    base = plan.sources[plan.recipe.base]
    experts = []
    for number in plan.recipe.experts:
        own = plan.matches[number].keys
        experts.append({n: read(plan.sources[number], own.get(n, n)) for n in names})
    return TaskVectors.from_state_dicts(
        {n: read(base, n) for n in names}, experts, names=plan.names
    )


def _forward(plan: Plan, name: str, voice: Voice) -> Forward:
    """Logits of the expert's module with merged tensors beneath its own head."""
    number = plan.recipe.experts[plan.names.index(name)]
    keys = plan.matches[number].keys

    def forward(state: Mapping[str, Tensor], batch: Any) -> Tensor:
        return voice.logits(voice.module, {keys.get(n, n): t for n, t in state.items()}, batch)

    return forward


def _exactly(name: str) -> str:
    """A pattern that matches this name only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
