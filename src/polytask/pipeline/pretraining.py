"""`pretrain`: a language model, a mixture of denoisers, a corpus, in that order.

read tokenizer and model; add sentinels and mode tokens that are missing   (before anything long)
plan: chunk sizes, shares, tokens a step                                   (--check stops here)
encode the corpus once into the run folder; hold documents out
train with `Trainer`: checkpoints, resuming bit for bit, the ledger by denoiser
save a folder that `transformers` loads (or `LanguageModel.load`); score; write the page
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from polytask import files
from polytask.data.corpus import TextCorpus, open_corpus
from polytask.errors import CheckpointError, ConfigError
from polytask.mixture.documents import ChunkReader, DrawCounter, TokenStore
from polytask.mixture.ledger import Ledger
from polytask.models.feed import LanguageBatch
from polytask.objectives.denoising import Specials
from polytask.objectives.pairs import Pairs
from polytask.objectives.ul2 import ChunkSize, MixtureOfDenoisers, chunk_size_for
from polytask.pipeline.pretraining_config import PretrainRunConfig
from polytask.pipeline.pretraining_models import Loaded, load_model
from polytask.train import FunctionLoader, Trainer
from polytask.train.distribution import Distribution
from polytask.train.scores import Scores

Say = Callable[[str], None]
MODEL, TOKENS, PLAN, SCORES = "model", "tokens", "plan.json", "scores.json"


@dataclass(frozen=True)
class Plan:
    """What a run is going to do, before it reads the whole corpus."""

    mixture: MixtureOfDenoisers
    sizes: tuple[ChunkSize, ...]
    specials: Specials
    facts: Mapping[str, Any]

    def lines(self) -> list[str]:
        """For people."""
        rows = [
            f"  {name:<14} {rate:>5.0%}   chunks of {size.length}: input up to {size.inputs}, "
            f"target up to {size.targets}"
            for name, rate, size in zip(self.mixture.names, self.mixture.rates, self.sizes)
        ]
        facts = self.facts
        return [
            f"{facts['model']}: {facts['parameters']:,} parameters, {facts['architecture']}",
            *rows,
            f"{facts['steps']:,} steps of {facts['examples']} examples, about "
            f"{facts['tokens_a_step']:,} tokens each; {facts['new_tokens']} new tokens in the "
            "vocabulary",
        ]


@dataclass(frozen=True)
class PretrainRun:
    """A finished run: `model/` is the checkpoint, `scores` the held-out losses by denoiser."""

    folder: Path

    @cached_property
    def scores(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / SCORES).read_text(encoding="utf-8"))
        return found

    @property
    def model(self) -> Path:
        return self.folder / MODEL

    @property
    def report(self) -> Path:
        return self.folder / "report.html"


def plan_pretraining(
    config: PretrainRunConfig, base: Path = Path(), say: Say | None = None
) -> tuple[Plan, Loaded, TextCorpus]:
    """Load what a run needs and say what it would do; nothing is written.

    Errors (`UserError`): whatever is wrong with the model, its tokenizer, the objective for its
    architecture, or the corpus.
    """
    corpus = open_corpus(config.corpus, base)
    loaded = load_model(config, corpus, base, say or (lambda text: None))
    mixture = config.objective.mixture(loaded.architecture)
    sizes = chunk_sizes(config, mixture, loaded)
    tokens = sum(r * (s.inputs + s.targets) for r, s in zip(mixture.rates, sizes))
    facts = {
        "model": loaded.name,
        "architecture": loaded.architecture,
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "steps": sum(stage.steps for stage in config.train.plan()),
        "examples": config.train.batch_size,
        "tokens_a_step": round(tokens * config.train.batch_size),
        "new_tokens": loaded.added,
    }
    return Plan(mixture, sizes, loaded.specials, facts), loaded, corpus


def chunk_sizes(
    config: PretrainRunConfig, mixture: MixtureOfDenoisers, loaded: Loaded
) -> tuple[ChunkSize, ...]:
    """N of every denoiser; for decoders input and target share `inputs_len`."""
    if loaded.longest is not None and config.inputs_len > loaded.longest:
        raise ConfigError(
            f"inputs_len is {config.inputs_len}, but {loaded.name} has positions for "
            f"{loaded.longest} tokens"
        )
    together = None if loaded.architecture == "encdec" else config.inputs_len
    targets = config.targets_len if together is None else None
    if together is not None and config.targets_len is not None:
        raise ConfigError("targets_len is for encoder-decoders; a decoder's inputs_len holds both")
    return tuple(
        chunk_size_for(d, config.inputs_len, targets, bool(d.mode), context=together)
        for d in mixture.denoisers
    )


class PretrainLoader(FunctionLoader):
    """Micro-batch number i: examples i * rows .. of the mixture, as pairs, fed to the model."""

    def __init__(
        self,
        plan: Plan,
        reader: ChunkReader,
        feed: Callable[[Pairs], LanguageBatch],
        rows: int,
        seed: int,
        distribution: Distribution,
    ) -> None:
        super().__init__(plan.mixture.names, self._batch)
        self.ledger = Ledger(plan.mixture.names)
        self.plan_of, self.reader, self.seed = plan, reader, seed
        self.rows = rows // distribution.world
        self.first = self.rows * distribution.rank
        self.world_rows = rows
        self.feed = feed
        self.counter = DrawCounter(
            lambda numbers: plan.mixture.draw(seed, numbers), len(plan.mixture.denoisers)
        )

    def pairs(self, index: int) -> Pairs:
        """The examples of a micro-batch, of this process."""
        first = index * self.world_rows + self.first
        return self.examples(np.arange(first, first + self.rows))

    def examples(self, numbers: np.ndarray) -> Pairs:
        """Examples by number; neighbouring numbers, ascending."""
        drawn = self.plan_of.mixture.draw(self.seed, numbers)
        before = self.counter.before(int(numbers[0]))

        def chunks(denoiser: int, rows: np.ndarray) -> np.ndarray:
            place = before[denoiser] + np.cumsum(drawn == denoiser) - 1
            return self.reader.take(denoiser, place[drawn == denoiser])

        return self.plan_of.mixture.make(chunks, self.plan_of.specials, self.seed, numbers)

    def _batch(self, index: int) -> LanguageBatch:
        return self.feed(self.pairs(index))


def pretrain(
    config: PretrainRunConfig,
    folder: Path | str | None = None,
    base: Path = Path(),
    fresh: bool = False,
    say: Say | None = None,
) -> PretrainRun:
    """Train and save; the finished run. The same call goes on with an unfinished one.

    Args:
        folder: the run folder; runs/NAME when None.
        base: relative paths in the configuration start here.
        fresh: discard an earlier run in the folder.

    Raises: `UserError` for what is wrong with configuration, model, corpus or an earlier run;
    `NonFiniteError` when a loss became NaN or infinite; `KeyboardInterrupt` when asked to stop.
    """
    tell = say or (lambda text: None)
    run = PretrainRun(Path("runs") / config.name if folder is None else Path(folder))
    _prepare_folder(run.folder, config, base, fresh)
    if (run.folder / SCORES).is_file():
        tell(f"{run.folder} is finished; --fresh trains it again")
        return run
    plan, loaded, corpus = plan_pretraining(config, base, tell)
    for line in plan.lines():
        tell(line)
    stores = _tokens(run.folder, config, corpus, loaded, tell)
    sizes = [size.length for size in plan.sizes]
    names, rates = plan.mixture.names, plan.mixture.rates
    reader = ChunkReader(stores["train"], sizes, rates, config.seed, names)
    distribution = Distribution(config.train.device)
    feed = loaded.model.feed
    loader = PretrainLoader(plan, reader, feed, config.train.micro_batch, config.seed, distribution)
    held_out = held_out_pairs(config, plan, stores["valid"])
    judge = _judge(held_out, names)
    before = judge(loaded.model, 0)
    trainer = Trainer(
        loaded.model,
        loader,
        config.train.model_copy(update={"seed": config.seed}),
        run.folder,
        objective=config.objective.loss,
        evaluator=judge if held_out else None,
        identity={"pretraining": _identity(config), "tokens": stores["train"].tokens},
        distribution=distribution,
    )
    result = trainer.fit()
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    ledger = trainer.ledger
    if distribution.main:
        loaded.save(run.folder / MODEL)
        after = judge(loaded.model, result.step)
        counts = loader.counter.before(result.step * config.train.batch_size).tolist()
        account = [{"denoiser": name, **line} for name, line in zip(names, reader.account(counts))]
        record = {
            "before": before,
            "after": after,
            "plan": plan.facts,
            "ledger": None if ledger is None else ledger.rows(),
            "text": account,
            "corpus": {
                part: {"documents": s.documents, "tokens": s.tokens, "cut": s.cut}
                for part, s in stores.items()
            },
        }
        from polytask.report.pretrain_page import write_page

        shown = held_out or {0: loader.pairs(0)}
        write_page(run.folder, record, names, shown, loaded.decode, plan.specials)
        files.write_json(run.folder / SCORES, record)
        tell(f"the model is in {run.folder / MODEL}")
    return run


def held_out_pairs(config: PretrainRunConfig, plan: Plan, store: TokenStore) -> dict[int, Pairs]:
    """Denoiser -> pairs of held-out text, the same at every evaluation; those denoisers whose
    chunks are longer than what was held out are left out."""
    found: dict[int, Pairs] = {}
    for at, (denoiser, size) in enumerate(zip(plan.mixture.denoisers, plan.sizes)):
        count = min(config.held_out_chunks, store.tokens // size.length)
        if count:
            chunks = np.asarray(store.ids[: count * size.length]).reshape(count, size.length)
            rows = np.arange(count)
            made = denoiser(chunks, plan.specials, config.seed, rows)
            found[at] = replace(made, source=np.full(count, at, np.int64))
    return found


def _judge(
    held_out: Mapping[int, Pairs], names: Sequence[str], rows: int = 16
) -> Callable[[nn.Module, int], Scores]:
    """(model, step) -> -log p per token of text, by denoiser; sentinels, modes and ends are left
    out, so that denoisers can be compared."""

    @torch.no_grad()
    def judge(model: nn.Module, step: int) -> Scores:
        del step
        was = model.training
        model.eval()
        scored: Any = model
        device = next(model.parameters()).device
        found: dict[str, dict[str, float]] = {}
        for at, pairs in held_out.items():
            total, count = 0.0, 0
            for first in range(0, len(pairs), rows):
                part = pairs.take(np.arange(first, min(first + rows, len(pairs))))
                batch = scored.feed(part).to(device)
                nll, _ = scored.token_losses(batch)
                text = torch.from_numpy(part.is_original).to(device)[batch.target]
                total += float(nll[text].double().sum())
                count += int(text.sum())
            if count:
                found[names[at]] = {"nll": total / count}
        model.train(was)
        return found

    return judge


def _tokens(
    folder: Path, config: PretrainRunConfig, corpus: TextCorpus, loaded: Loaded, tell: Say
) -> dict[str, TokenStore]:
    """The corpus in tokens, encoded once per run folder."""
    place = folder / TOKENS
    if not (place / files.MANIFEST).is_file():
        tell(f"encoding {corpus.name}")
        TokenStore.write(
            place,
            corpus.read_from(0),
            loaded.encode,
            loaded.specials.end,
            config.seed,
            held_out=config.held_out,
        )
    stores = TokenStore.load(place)
    train, valid = stores["train"], stores["valid"]
    tell(
        f"{train.documents:,} documents, {train.tokens:,} tokens to train on; {valid.documents:,} "
        f"documents held out" + (f"; {train.cut:,} tokens of long ones cut" if train.cut else "")
    )
    return stores


def _identity(config: PretrainRunConfig) -> dict[str, Any]:
    """What a resumed run must agree on, besides `train`, which the trainer compares itself."""
    return config.model_dump(mode="json", exclude={"train", "held_out_chunks"})


def _prepare_folder(folder: Path, config: PretrainRunConfig, base: Path, fresh: bool) -> None:
    import shutil

    path = folder / "config.json"
    if fresh and folder.exists():
        if not path.is_file() and any(folder.iterdir()):
            raise CheckpointError(f"{folder} is not a run folder; --fresh does not remove it")
        shutil.rmtree(folder)
    record = config.model_dump(mode="json")
    if not path.is_file():
        files.write_json(path, {"pretraining": record, "base": str(base.resolve())})
        return
    old = json.loads(path.read_text(encoding="utf-8")).get("pretraining")
    if old is None:
        raise CheckpointError(f"{folder} holds a run of another kind; choose another name")
    differing = [k for k in record if old.get(k) != record[k] and k != "train"]
    if differing:
        raise CheckpointError(
            f"{folder} holds a run of another configuration ({', '.join(differing)} differ). "
            "Choose another name, or discard it with --fresh"
        )
