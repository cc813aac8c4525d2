"""Architectures and objectives on Webster's dictionary, and three tasks on WordNet's definitions.

Pretrained models are shared by arms (two are what others adapt) and kept in the cache. Multitask
finetuning mixes three kinds of question about a definition, each in two phrasings: its field of
eight, its part of speech, and whether one definition follows from another. All cells get the same
pairs; answers are ranked by log-likelihood, summed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial

import numpy as np
import torch

from polytask import files, rng
from polytask.data import embedded
from polytask.data.embedded.sources import cache_root
from polytask.data.rows import Row
from polytask.evaluate.rank import Question, RankScores, rank_eval
from polytask.infer.language_source import LanguageSource
from polytask.models.lm import LanguageModel
from polytask.objectives.pairs import Pairs
from polytask.systems import arch_cells as cells
from polytask.systems.arch_cells import Cell, Curve, Scale
from polytask.systems.testbeds.prose import Part, Prose, prose
from polytask.train.language import PretrainConfig, Pretrained, pretrain

FIELDS = {
    "noun.animal": "animal",
    "noun.artifact": "object",
    "noun.person": "person",
    "noun.plant": "plant",
    "noun.act": "act",
    "noun.communication": "message",
    "noun.food": "food",
    "noun.body": "body",
}
SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
FOLLOWS = {"entails": "yes", "neutral": "maybe", "contradicts": "no"}


@dataclass(frozen=True)
class Bed:
    """How much of everything."""

    scale: Scale = field(default_factory=partial(Scale, t5_like=True))
    entries: int = 30_000  # of the dictionary
    steps: int = 500  # of pretraining
    adapt: int = 125  # of adaptation
    tasks_steps: int = 100  # of multitask finetuning
    tasks_rows: int = 32
    tasks_lr: float = 3e-3
    tasks_dropout: float = 0.1
    questions: int = 150  # a task and phrasing


FULL = Bed()
SMOKE = Bed(
    scale=Scale(dim=16, layers=2, heads=2, rows=4, length=32, held_out=8, every=2, t5_like=True),
    steps=4,
    adapt=2,
    tasks_steps=2,
    tasks_rows=4,
    questions=6,
)


def text_of(bed: Bed) -> Prose:
    """The dictionary under the bed's vocabulary."""
    return prose(bed.scale.vocab, "bpe", bed.entries)


def pretrained(
    bed: Bed, name: str, seed: int, lr: float, part: Part
) -> tuple[LanguageModel, Curve, dict[str, float]]:
    """A cell after `bed.steps` from scratch, its held-out curve, and what it spent. Made once per
    (bed, cell, seed, rate, code) and kept in the cache."""
    cell = Cell.of(name)
    key = _key(bed, name, seed, lr, part)
    folder = cache_root() / "testbeds" / "architectures" / f"{name.replace(':', '-')}-{key}"
    if (folder / files.MANIFEST).is_file():
        kept = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
        model = LanguageModel.load(folder)
        return model, Curve(**kept["curve"]), kept["spent"]
    text = text_of(bed)
    model = cells.fresh(text, cell.architecture, bed.scale, seed)
    curve, done = cells.train(
        model, text, cell.objective, bed.scale, seed, bed.steps, lr, part=part
    )
    spent = spent_of(done)
    model.save(folder, {"curve.json": json.dumps({"curve": asdict(curve), "spent": spent})})
    return model, curve, spent


def spent_of(done: Pretrained) -> dict[str, float]:
    """What a run is compared by, and what it trained on."""
    return {
        "steps": done.steps,
        "tokens": done.tokens,
        "rows": done.pairs,
        "trained": done.trained,
        "seconds": done.seconds,
    }


def _key(bed: Bed, *parts: object) -> str:
    """Changes with the setting and with the code that decides the result."""
    from polytask.models import feed, init, lm, masks, positions, transformer
    from polytask.objectives import denoising, draws, tokens
    from polytask.train import language, optim

    digest = hashlib.blake2b(f"{bed}/{parts}/{torch.__version__}".encode())
    modules = (feed, init, lm, masks, positions, transformer, denoising, draws, tokens)
    for module in (*modules, language, optim, cells, sys.modules[__name__]):
        digest.update(inspect.getsource(module).encode())
    return digest.hexdigest()[:16]


# -- multitask finetuning


@dataclass(frozen=True)
class TextTask:
    """Rows with an answer, the answers' words, and phrasings with the row's columns."""

    name: str
    source: str  # embedded data set
    choices: tuple[str, ...]
    answer: Callable[[Row], str | None]  # a choice; None: the row is not of this task
    phrasings: Mapping[str, str]


def _field(row: Row) -> str | None:
    return FIELDS.get(str(row["field"]))


def _speech(row: Row) -> str | None:
    return SPEECH.get(str(row["field"]).partition(".")[0])


def _follows(row: Row) -> str | None:
    return FOLLOWS.get(str(row["relation"]))


TASKS = (
    TextTask(
        "field",
        "wordnet",
        tuple(FIELDS.values()),
        _field,
        {"kind": "{definition}. This is a kind of", "what": "What is it? {definition}. It is"},
    ),
    TextTask(
        "speech",
        "wordnet",
        tuple(SPEECH.values()),
        _speech,
        {"word": "{definition}. The word is a", "part": "Part of speech of: {definition}. Answer:"},
    ),
    TextTask(
        "follows",
        "wordnet-pairs",
        tuple(FOLLOWS.values()),
        _follows,
        {"so": "{a}. So it is {b}?", "follow": "{b}. Does it follow from {a}?"},
    ),
)


@cache
def _rows(number: int, part: Part, limit: int) -> tuple[tuple[Row, str], ...]:
    """Rows of a task with their answers, in a shuffled order, every answer about equally often."""
    task = TASKS[number]
    rows = embedded.load(task.source)[part]
    by_answer: dict[str, list[tuple[Row, str]]] = {choice: [] for choice in task.choices}
    share = -(-limit // len(task.choices))
    order = rng.generator(0, "rows of", task.name, part).permutation(len(rows))
    for index in order.tolist():
        answer = task.answer(rows[index])
        if answer is not None and len(by_answer[answer]) < share:
            by_answer[answer].append((rows[index], answer))
        if all(len(found) == share for found in by_answer.values()):
            break
    flat = [pair for found in by_answer.values() for pair in found]
    mixed = rng.generator(1, "rows of", task.name, part).permutation(len(flat))
    return tuple(flat[i] for i in mixed.tolist())[:limit]


def _prompt(text: Prose, task: TextTask, phrasing: str, row: Row, room: int) -> list[int]:
    """The phrased row; columns lose their ends, words of the phrasing never."""
    columns = {name: str(row[name]) for name in ("definition", "a", "b") if name in row}
    full = text.codec.encode([task.phrasings[phrasing].format(**columns)])[0]
    over = len(full) - room
    if over > 0:
        used = {n: text.codec.encode([columns[n]])[0] for n in columns if f"{{{n}}}" in
                task.phrasings[phrasing]}  # fmt: skip
        cut = -(-over // len(used)) + 2
        columns |= {
            n: text.codec.tokenizer.decode(list(ids[: max(1, len(ids) - cut)])).strip()
            for n, ids in used.items()
        }
        full = text.codec.encode([task.phrasings[phrasing].format(**columns)])[0]
    return list(full[-room:])


def questions(bed: Bed, part: Part) -> dict[str, dict[str, list[Question]]]:
    """Every task and phrasing, for `rank_eval`."""
    text, room = text_of(bed), bed.scale.length - 8
    found: dict[str, dict[str, list[Question]]] = {}
    for number, task in enumerate(TASKS):
        answers = [_answer(text, choice) for choice in task.choices]
        rows = _rows(number, part, bed.questions)
        found[task.name] = {
            phrasing: [
                Question(_prompt(text, task, phrasing, row, room), answers, task.choices.index(a))
                for row, a in rows
            ]
            for phrasing in task.phrasings
        }
    return found


def _answer(text: Prose, choice: str) -> list[int]:
    return [*text.codec.encode([choice])[0], text.codec.end]


def task_draw(bed: Bed, seed: int) -> Callable[[int], Pairs]:
    """step -> pairs: tasks and phrasings in equal shares, rows as drawn for (seed, step)."""
    text, room = text_of(bed), bed.scale.length - 8
    rows = [_rows(number, "train", 40 * bed.tasks_rows) for number in range(len(TASKS))]
    answers = [{c: _answer(text, c) for c in task.choices} for task in TASKS]

    def at(step: int) -> Pairs:
        random = rng.generator(seed, "tasks", step)
        inputs: list[Sequence[int]] = []
        targets: list[Sequence[int]] = []
        for place in range(bed.tasks_rows):
            number = (step * bed.tasks_rows + place) % len(TASKS)
            task = TASKS[number]
            row, answer = rows[number][int(random.integers(len(rows[number])))]
            phrasing = list(task.phrasings)[int(random.integers(len(task.phrasings)))]
            inputs.append(_prompt(text, task, phrasing, row, room))
            targets.append(answers[number][answer])
        return Pairs.of(inputs, targets)

    return at


def finetuned(
    bed: Bed, model: LanguageModel, seed: int, part: Part
) -> tuple[RankScores, Pretrained]:
    """Multitask finetuning of a pretrained model, in place, and its answers on held-out rows."""
    for block in model.decoder.blocks if model.encoder is None else [
        *model.encoder.blocks, *model.decoder.blocks
    ]:  # fmt: skip
        block.dropout = bed.tasks_dropout  # type: ignore[assignment]
    source = task_draw(bed, seed)
    first = [source(step).tokens for step in range(bed.tasks_steps)]
    settings = PretrainConfig(
        tokens=int(np.sum(first)),
        lr=bed.tasks_lr,
        pack=False,  # a few short prompts: one relative bias for all rows is cheaper
        seed=seed,
    )
    done = pretrain(model, source, settings)
    scores = rank_eval(LanguageSource(model, text_of(bed).codec), questions(bed, part))
    return scores, done
