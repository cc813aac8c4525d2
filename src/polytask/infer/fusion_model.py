"""Three lines of Python: a large model, a small base, its experts; text in, text out.

fusion = Fusion.load("large", "small", ["small-maths", "small-law"])
written = fusion.write("The contract says", max_new=40)[0]
written.text, written.shares, written.tokens[0].alpha
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polytask.errors import ConfigError, DataError
from polytask.infer.fusion_generate import Continuation, Sampler, generate
from polytask.infer.fusion_policy import FusionConfig, FusionPolicy
from polytask.infer.fusion_score import Scored, score
from polytask.infer.logit_sources import LogitSource, check_same_vocabulary, load_hub_sources

OnText = Callable[[int, str], None]  # (row, text that has become certain)
NOBODY = "large model"  # who acts where every strength is 0


@dataclass(frozen=True)
class Token:
    """One step: what was chosen, who moved the large model, and how far.

    text      what the token adds; empty while a character is not complete
    expert    the expert with the largest strength; `NOBODY` where all are 0
    alphas    strength of every expert; `alpha` is the expert's
    loss      how far the two divergences are from those of the experts, squared and summed
    moved     KL(fused || large), and `back` KL(large || fused)
    nll       -log p of the token, in nats; only where a given text was scored
    """

    id: int
    text: str
    expert: str
    alpha: float
    alphas: tuple[float, ...]
    loss: float
    moved: float
    back: float
    nll: float | None = None


@dataclass(frozen=True)
class Written:
    """A continuation (or a scored text, with an empty prompt) and its steps."""

    prompt: str
    text: str
    stopped: str  # 'stop', 'length' or, for a scored text, 'given'
    tokens: tuple[Token, ...]

    @property
    def shares(self) -> dict[str, float]:
        """Share of the tokens on which each expert, or nobody, acted; sums to 1."""
        count = max(1, len(self.tokens))
        names = sorted({token.expert for token in self.tokens})
        return {n: sum(token.expert == n for token in self.tokens) / count for n in names}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "tokens": [asdict(t) for t in self.tokens], "shares": self.shares}


class Fusion:
    """Dynamic logit fusion of a large model with experts of a small one.

    Args:
        large: any source; its tokenizer reads prompts and writes text.
        base: the small model that the experts were tuned from.
        experts: at least one.
        config: options, or give them by name (`mode="static", alpha=(1.0,)`).

    Errors: `ConfigError` when vocabularies differ, naming the first id that does.
    """

    def __init__(
        self,
        large: LogitSource,
        base: LogitSource,
        experts: Sequence[LogitSource],
        config: FusionConfig | None = None,
        **options: Any,
    ) -> None:
        from polytask.configs import parse

        if config is not None and options:
            raise ConfigError("give a config or options by name, not both")
        self.config = config or parse(FusionConfig, options, "fusion")
        self.sources = (large, base, *experts)
        self.names = unique_names([source.name for source in experts])
        self.policy = FusionPolicy(self.config, len(experts))
        check_same_vocabulary(self.sources)

    @classmethod
    def load(
        cls,
        large: str,
        base: str,
        experts: Sequence[str],
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        **options: Any,
    ) -> Fusion:
        """From folders in Hugging Face format, hub ids, or 'embedded:NAME'."""
        places = [str(place) for place in (large, base, *experts)]
        sources = load_hub_sources(places, dtype=dtype, device=device)
        return cls(sources[0], sources[1], sources[2:], **options)

    @property
    def large(self) -> LogitSource:
        return self.sources[0]

    def write(
        self,
        prompts: str | Sequence[str],
        *,
        max_new: int = 64,
        sampler: Sampler | None = None,
        stop: Sequence[str] = (),
        on_text: OnText | None = None,
        before_large: str = "",
    ) -> list[Written]:
        """Continue prompts.

        Args:
            stop: texts that end a row; what follows them, and they, are cut off. The large model's
                end tokens end a row as well.
            on_text: told (row, piece) as soon as a piece of text is certain.
            before_large: text that stands before every prompt for the large model only (examples
                that would not fit the small ones).
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        encoded = [self._encode(text, number) for number, text in enumerate(texts)]
        own = {}
        if before_large:
            own[0] = [self._encode(before_large + t, n) for n, t in enumerate(texts)]
        streams = [TextStream(self.large.decode, stop) for _ in texts]

        def on_token(row: int, token: int) -> bool:
            piece = streams[row].add(token)
            if piece and on_text is not None:
                on_text(row, piece)
            return streams[row].stopped

        found = generate(
            self.sources,
            self.policy,
            encoded,
            sampler=sampler,
            max_new=max_new,
            stop=self.large.end,
            on_token=on_token,
            own_prompts=own,
        )
        for row, stream in enumerate(streams):
            rest = stream.finish()
            if rest and on_text is not None:
                on_text(row, rest)
        return [
            self._written(text, one, stream)
            for text, one, stream in zip(texts, found, streams, strict=True)
        ]

    def score(self, texts: str | Sequence[str], *, start: int = 1) -> list[Written]:
        """The steps of given texts, with the -log p of each token; `start` tokens are prompt."""
        given = [texts] if isinstance(texts, str) else list(texts)
        encoded = [self._encode(text, number) for number, text in enumerate(given)]
        written = []
        scored = score(self.sources, self.policy, encoded, start=start)
        for ids, one in zip(encoded, scored, strict=True):
            stream = TextStream(self.large.decode)
            for token in ids:
                stream.add(token)
            stream.finish()
            prompt, pieces = "".join(stream.pieces[:start]), stream.pieces[start:]
            tokens = self._tokens(ids[start:], pieces, one.told, one)
            written.append(Written(prompt, "".join(pieces), "given", tokens))
        return written

    def _encode(self, text: str, number: int) -> list[int]:
        found = self.large.encode(text)
        if not found:
            raise DataError(f"prompt {number + 1} is empty; there is nothing to continue")
        return found

    def _written(self, prompt: str, one: Continuation, stream: TextStream) -> Written:
        tokens = self._tokens(one.ids, stream.pieces, one.told, None)
        return Written(prompt, stream.text, one.stopped, tokens)

    def _tokens(
        self,
        ids: Sequence[int],
        pieces: Sequence[str],
        told: dict[str, Tensor],
        scored: Scored | None,
    ) -> tuple[Token, ...]:
        if not ids:
            return ()
        alpha, loss, moved = (told[k].tolist() for k in ("alpha", "loss", "divergence"))
        nll = scored.nll.tolist() if scored is not None else [None] * len(ids)
        found = []
        for i, (token, piece) in enumerate(zip(ids, pieces, strict=True)):
            strengths = tuple(round(a, 6) for a in alpha[i])
            most = max(range(len(strengths)), key=strengths.__getitem__)
            who = self.names[most] if strengths[most] > 0 else NOBODY
            forward, back = moved[i]
            found.append(
                Token(token, piece, who, strengths[most], strengths, loss[i], forward, back, nll[i])
            )
        return tuple(found)


class TextStream:
    """Text of tokens that come one by one, given out as soon as it cannot change any more.

    A character of several tokens waits until it is complete; text that may be the beginning of a
    stop text waits until it is not. `pieces` has what each token added.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self.decode = decode
        self.stop = tuple(s for s in stop if s)
        self.ids: list[int] = []
        self.text = ""
        self.given = 0  # characters given out
        self.stopped = False
        self.pieces: list[str] = []

    def add(self, token: int) -> str:
        """Text that has become certain with this token."""
        self.ids.append(token)
        before = self.text
        text = self.decode(self.ids)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.pieces.append("")
            return ""
        places = [text.find(s) for s in self.stop if s in text]
        if places:
            self.stopped = True
            text = text[: min(places)]
        self.text = text
        self.pieces.append(text[len(before) :])
        held = 0 if self.stopped else self._held(text)
        piece = text[self.given : len(text) - held]
        self.given += len(piece)
        return piece

    def finish(self) -> str:
        """What is left when no token follows."""
        if self.ids and not self.stopped:
            whole = self.decode(self.ids)
            if self.pieces:
                self.pieces[-1] += whole[len(self.text) :]
            self.text = whole
        piece = self.text[self.given :]
        self.given += len(piece)
        return piece

    def _held(self, text: str) -> int:
        """Characters at the end that a stop text may begin with."""
        most = max((len(s) - 1 for s in self.stop), default=0)
        for size in range(min(most, len(text) - self.given), 0, -1):
            if any(s.startswith(text[-size:]) for s in self.stop):
                return size
        return 0


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """Short names: the last part of a path, the whole where that is not unique, then numbers."""
    short = [Path(name).name or name for name in names]
    found = [s if short.count(s) == 1 else n for s, n in zip(short, names, strict=True)]
    return tuple(
        n if found.count(n) == 1 else f"{n} ({found[: i + 1].count(n)})"
        for i, n in enumerate(found)
    )
