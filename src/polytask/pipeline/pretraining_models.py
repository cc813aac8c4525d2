"""The model of a pretraining run: a Hugging Face one to go on with, or a fresh transformer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from polytask import files
from polytask.data.corpus import TextCorpus
from polytask.errors import ConfigError
from polytask.models.feed import Architecture
from polytask.models.lm import LanguageModel, LanguageModelConfig
from polytask.objectives.denoising import Specials
from polytask.pipeline.pretraining_config import FreshModel, PretrainRunConfig
from polytask.tasks.codec import TextCodec

LEARNED_FROM = 20_000  # documents that a fresh vocabulary is learned from


@dataclass(frozen=True)
class Loaded:
    """A model and its way with text."""

    name: str
    model: Any  # LanguageModel or HubLanguageModel
    specials: Specials
    encode: Callable[[Sequence[str]], Sequence[Sequence[int]]]
    decode: Callable[[int], str]
    """One token as text, special ones by their name."""
    save: Callable[[Path], None]
    """Write a folder, whole or not at all."""
    added: int  # tokens that the vocabulary lacked

    @property
    def architecture(self) -> Architecture:
        found: Architecture = self.model.architecture
        return found

    @property
    def longest(self) -> int | None:
        """Tokens that it has positions for; None: no limit."""
        found: int | None = getattr(self.model, "longest", None)
        if hasattr(self.model, "hub"):
            config = self.model.hub.config
            found = getattr(config, "max_position_embeddings", None)
        return found


def load_model(
    config: PretrainRunConfig, corpus: TextCorpus, base: Path, say: Callable[[str], None]
) -> Loaded:
    """As `config.model` says. Errors: `ConfigError` for a model that is not there, an architecture
    that it cannot have, or a tokenizer that splits a mode token."""
    if config.model.hub is None:
        return _fresh(config, config.model.fresh or FreshModel(), corpus, say)
    return _hub(config, config.model.hub, base, say)


def _hub(config: PretrainRunConfig, source: str, base: Path, say: Callable[[str], None]) -> Loaded:
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

    from polytask.models.extend import specials_of
    from polytask.models.hub import locate
    from polytask.models.hub_lm import HubLanguageModel

    relative = base / source
    place = str(relative) if relative.is_dir() else locate(source)
    say(f"loading {source}")
    try:
        settings = AutoConfig.from_pretrained(place)
        tokenizer = AutoTokenizer.from_pretrained(place)
        auto = AutoModelForSeq2SeqLM if settings.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_pretrained(place, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"model.hub: '{source}' cannot be loaded: {error}") from error
    mixture = config.objective.mixture("encdec" if settings.is_encoder_decoder else "causal")
    known = tokenizer.get_vocab()
    tokens = config.objective.tokens(known)
    missing = set(mixture.modes) - set(tokens)
    if missing:
        raise ConfigError(f"objective.mode_tokens names no token for {', '.join(sorted(missing))}")
    before = len(tokenizer)
    specials = specials_of(
        model,
        tokenizer,
        config.sentinels,
        {mode: tokens[mode] for mode in mixture.modes},
        mask=config.objective.masks,
    )
    wrapped = HubLanguageModel(model, config.model.architecture)

    def save(folder: Path) -> None:
        with files.building(folder) as aside:
            wrapped.save(aside)
            tokenizer.save_pretrained(aside)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        found = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [list(ids) for ids in found]

    def decode(token: int) -> str:
        return str(tokenizer.decode([token], skip_special_tokens=False))

    return Loaded(source, wrapped, specials, encode, decode, save, len(tokenizer) - before)


def _fresh(
    config: PretrainRunConfig, chosen: FreshModel, corpus: TextCorpus, say: Callable[[str], None]
) -> Loaded:
    from polytask.tasks.tokenizer_training import train_tokenizer

    architecture = config.model.architecture or "encdec"
    mixture = config.objective.mixture(architecture)
    say(f"learning a vocabulary of {chosen.vocab} from {corpus.name}")
    codec = train_tokenizer(
        islice(corpus.read_from(0), LEARNED_FROM),
        chosen.vocab,
        chosen.tokenizer,
        config.sentinels,
        [config.objective.tokens({})[mode] for mode in mixture.modes],
    )
    make = LanguageModelConfig.t5_like if chosen.t5_like else LanguageModelConfig
    model = LanguageModel(
        make(
            architecture=architecture,
            vocab_size=codec.size,
            dim=chosen.dim,
            layers=chosen.layers,
            heads=chosen.heads,
            dropout=chosen.dropout,
            bos_id=codec.pad,
            pad_id=codec.pad,
            end_id=codec.end,
        ),
        config.seed,
    )
    modes = dict(zip(mixture.modes, codec.modes))
    masks = () if codec.mask is None else (codec.mask,)
    first = max((codec.pad, codec.end, *masks, *codec.sentinels, *codec.modes)) + 1
    specials = Specials(codec.sentinels, codec.end, modes, codec.mask, (first, codec.size))

    def save(folder: Path) -> None:
        with files.building(folder) as aside:
            model.save(aside / "weights")
            write_codec(codec, aside / "tokenizer")

    def decode(token: int) -> str:
        return str(codec.tokenizer.decode([token], skip_special_tokens=False))

    return Loaded(
        f"a fresh transformer ({chosen.layers} layers of {chosen.dim})",
        model,
        specials,
        codec.encode,
        decode,
        save,
        0,
    )


def write_codec(codec: TextCodec, folder: Path) -> None:
    """A codec's files in a folder of their own."""
    folder.mkdir()
    codec.save(folder)
