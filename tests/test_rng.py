from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from polytask.rng import derive, generator, torch_generator


@given(st.integers(0, 2**31), st.text(max_size=8), st.integers(0, 2**40))
def test_equal_keys_give_equal_draws(seed: int, stream: str, index: int) -> None:
    first, second = generator(seed, stream, index), generator(seed, stream, index)
    assert np.array_equal(first.integers(0, 1000, 5), second.integers(0, 1000, 5))


def test_every_part_of_the_key_matters() -> None:
    seeds = {derive(0), derive(1), derive(0, "a"), derive(0, "a", 1), derive(0, "a1"), derive(0, 1)}
    assert len(seeds) == 6


def test_a_number_and_its_text_are_different_keys() -> None:
    assert derive(0, 1) != derive(0, "1")


def test_torch_generator_is_a_function_of_its_keys() -> None:
    import torch

    first = torch.rand(4, generator=torch_generator(3, "x", 1))
    assert torch.equal(first, torch.rand(4, generator=torch_generator(3, "x", 1)))
    assert not torch.equal(first, torch.rand(4, generator=torch_generator(3, "x", 2)))
