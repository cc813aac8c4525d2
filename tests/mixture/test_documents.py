"""Documents to chunks: every token in one chunk or tail, chunks by number, errors with names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from polytask.errors import CheckpointError, DataError
from polytask.mixture.documents import ChunkReader, DrawCounter, TokenStore

END = 9


def numbered(texts: Sequence[str]) -> list[list[int]]:
    """'12 3' -> [12, 3]"""
    return [[int(word) for word in text.split()] for text in texts]


def store_of(folder: Path, documents: int = 40, longest: int = 65_536) -> TokenStore:
    """Document d has d % 7 + 3 tokens, each a number of its own, and an end."""
    texts, token = [], 100
    for number in range(documents):
        count = number % 7 + 3
        texts.append(" ".join(str(token + i) for i in range(count)))
        token += count
    return TokenStore.write(folder, texts, numbered, END, longest=longest)["train"]


def test_an_epoch_holds_every_token_once_or_in_a_tail(tmp_path: Path) -> None:
    store = store_of(tmp_path / "tokens")
    assert store.tokens == store.read == sum(n % 7 + 4 for n in range(40))
    reader = ChunkReader(store, (8, 15), (2.0, 1.0), seed=3)
    seen: Counter[int] = Counter()
    for epoch in range(2):
        found: list[int] = []
        for denoiser, count in enumerate(reader.per_epoch.tolist()):
            numbers = np.arange(count) + epoch * count
            found += reader.take(denoiser, numbers).reshape(-1).tolist()
        assert len(found) == store.tokens - reader.tails.sum()
        text = [token for token in found if token != END]
        assert len(set(text)) == len(text)  # nothing twice
        seen.update(text)
    assert max(seen.values()) == 2
    account = reader.account(reader.per_epoch.tolist())
    assert sum(line["tokens"] + line["tail"] for line in account) == store.tokens
    assert [line["epochs"] for line in account] == [1, 1]


def test_documents_stay_whole_and_in_an_order_of_the_epoch(tmp_path: Path) -> None:
    store = store_of(tmp_path / "tokens")
    reader = ChunkReader(store, (store.tokens,), (1.0,))
    first, second = reader.take(0, [0, 1])
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(store.ids.tolist())
    assert first.tolist() != second.tolist()
    pieces = " ".join(map(str, first.tolist())).split(f" {END}")
    whole = {tuple(store.ids[a : b - 1].tolist()) for a, b in zip(store.offsets, store.offsets[1:])}
    assert {tuple(map(int, piece.split())) for piece in pieces if piece} == whole


def test_a_chunk_is_a_function_of_its_number(tmp_path: Path) -> None:
    store = store_of(tmp_path / "tokens")
    one, other = (ChunkReader(store, (8, 15), (1.0, 1.0), seed=3) for _ in range(2))
    numbers = np.arange(60)
    all_at_once = one.take(1, numbers)
    backwards = np.stack([other.take(1, [n])[0] for n in numbers[::-1]])[::-1]
    assert np.array_equal(all_at_once, backwards)
    assert not np.array_equal(
        all_at_once, ChunkReader(store, (8, 15), (1.0, 1.0), 4).take(1, numbers)
    )


def test_long_documents_give_a_random_piece_and_the_rest_is_accounted_for(tmp_path: Path) -> None:
    texts = [" ".join(map(str, range(100, 200)))] * 50
    stores = TokenStore.write(tmp_path / "t", texts, numbered, END, longest=20)
    store = stores["train"]
    assert store.tokens == 50 * 20
    assert store.cut == 50 * 81
    begins = {int(store.ids[at]) for at in store.offsets[:-1]}
    assert len(begins) > 20
    for at in store.offsets[:-1]:
        piece = store.ids[at : at + 19].astype(int)
        assert (np.diff(piece) == 1).all()


def test_held_out_documents_are_in_neither_both(tmp_path: Path) -> None:
    texts = [str(100 + i) for i in range(400)]
    stores = TokenStore.write(tmp_path / "t", texts, numbered, None, held_out=0.25)
    train, valid = (set(stores[part].ids.tolist()) for part in ("train", "valid"))
    assert not train & valid
    assert len(train) + len(valid) == 400
    assert 70 < len(valid) < 130
    again = TokenStore.load(tmp_path / "t")
    assert np.array_equal(again["valid"].ids, stores["valid"].ids)


def test_counts_of_draws_can_be_found_anywhere() -> None:
    draws = np.random.default_rng(0).integers(0, 3, 1000)
    counter = DrawCounter(lambda rows: draws[rows], 3, block=64)
    for row in (0, 1, 63, 64, 65, 999, 500):
        assert counter.before(row).tolist() == np.bincount(draws[:row], minlength=3).tolist()


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text to train on"):
        TokenStore.write(tmp_path / "t", ["", ""], numbered, END)
    assert not (tmp_path / "t").exists()
    store = store_of(tmp_path / "tokens", 2)
    with pytest.raises(DataError, match=r"9 tokens, 5 of them for the denoiser X, .* chunks of 50"):
        ChunkReader(store, (4, 50), (9.0, 1.0), names=("R", "X"))
    with pytest.raises(CheckpointError, match="incomplete"):
        TokenStore.load(tmp_path / "nothing")
