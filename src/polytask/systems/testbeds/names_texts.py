"""The texts of population E: six tasks of different kinds, classes that are named in words.

All of them come from Python packages or the standard library. The pool of a task is drawn once,
balanced over its classes within the splits of its data set; what the frozen layers make of it is
cached. A seed then draws its own parts from the pool.
"""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polytask import files, rng
from polytask.data import embedded
from polytask.data.embedded.sources import cache_root
from polytask.systems.testbeds import names_encoder as encoder

VERSION = 1  # raise it when pools, lower layers or the cached form change
POOL: Mapping[str, int] = {"train": 1200, "valid": 300, "test": 800}


@dataclass(frozen=True)
class Spec:
    """A task: an embedded data set, its columns, and words for class names that are no words."""

    data: str
    text: str
    label: str
    words: Mapping[str, str] = field(default_factory=dict)


SPECS: Mapping[str, Spec] = {
    "languages": Spec("django-language", "text", "language"),
    "library": Spec("code-area", "docstring", "area"),
    "code": Spec("code-text", "text", "kind"),
    "emoji": Spec("emoji-group", "name", "group"),
    "diagnoses": Spec("icd10-chapter", "diagnosis", "chapter"),
    "phenotypes": Spec("phenotype-system", "name", "system"),
}


@dataclass(frozen=True)
class Texts:
    """Labelled texts as states of the lower layers; `inputs` pads those that are asked for."""

    states: Tensor  # (tokens, WIDTH) float16
    offsets: Tensor  # (texts in the pool + 1,) int64
    label: Tensor  # (n,) int64
    rows: Tensor  # (n,) int64: which texts of the pool these are

    def __len__(self) -> int:
        return len(self.rows)

    def inputs(self, index: Tensor | None = None) -> encoder.Inputs:
        """States (b, L, WIDTH) float32 and mask (b, L) of the texts `index` (b,), or of all."""
        rows = self.rows if index is None else self.rows[index]
        return encoder.gather(self.states, self.offsets, rows)

    def take(self, index: Tensor) -> Texts:
        """Some of the texts, sharing the states."""
        return Texts(self.states, self.offsets, self.label[index], self.rows[index])


@dataclass(frozen=True)
class Pool:
    """All texts that seeds draw from, by split, and the head made of the class names.

    `key` is made from texts, labels and names: what was computed from other content is not used.
    """

    key: str
    classes: tuple[str, ...]
    head: Tensor  # (classes, WIDTH), of unit length
    splits: Mapping[str, Texts]


@functools.cache
def pool(task: str, sizes: tuple[tuple[str, int], ...]) -> Pool:
    """The pool of a task; the first call computes and caches the states of its texts."""
    spec = SPECS[task]
    found = embedded.load(spec.data)
    rows = {
        split: _balanced(
            [
                (str(row[spec.text]), str(row[spec.label]))
                for row in map(found[split].__getitem__, range(len(found[split])))
            ],
            task,
            size,
        )
        for split, size in sizes
    }
    classes = tuple(sorted({label for part in rows.values() for _, label in part}))
    number = {label: i for i, label in enumerate(classes)}
    splits = {}
    for split, part in rows.items():
        states, offsets = _cached([text for text, _ in part], f"{task}-{split}")
        label = torch.tensor([number[label] for _, label in part])
        splits[split] = Texts(states, offsets, label, torch.arange(len(part)))
    names = [spec.words.get(label, label) for label in classes]
    upper = encoder.UpperLayers()
    upper.load_state_dict(encoder.upper_weights())
    with torch.no_grad():
        head = upper(*encoder.gather(*encoder.lower_states(names), torch.arange(len(names))))
    return Pool(_key(repr((encoder.LENGTH, encoder.FROZEN, rows, names))), classes, head, splits)


def _balanced(rows: list[tuple[str, str]], task: str, size: int) -> list[tuple[str, str]]:
    """`size` rows, classes in turn as long as they have rows, each class in random order."""
    by_class: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        by_class[row[1]].append(row)
    ranked = []
    for label, members in by_class.items():
        order = rng.generator(0, "names", task, label).permutation(len(members))
        ranked += [(rank, label, members[i]) for rank, i in enumerate(order.tolist())]
    ranked.sort(key=lambda item: item[:2])
    return [row for *_, row in ranked[:size]]


def _cached(texts: list[str], name: str) -> tuple[Tensor, Tensor]:
    """`lower_states` of texts, from the cache where they were computed before."""
    from safetensors.torch import load_file, save_file

    path = (
        cache_root()
        / "testbeds"
        / "names"
        / f"{name}-{_key(repr((encoder.LENGTH, encoder.FROZEN, texts)))}.safetensors"
    )
    if not path.is_file():
        states, offsets = encoder.lower_states(texts)
        with files.writing(path) as aside:
            save_file({"states": states, "offsets": offsets}, aside)
    found = load_file(path)
    return found["states"], found["offsets"]


def _key(content: str) -> str:
    text = f"{VERSION} {content}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=8).hexdigest()
