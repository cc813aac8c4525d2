"""Fixtures over the fakes of `train_fakes`."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from train_fakes import TinyModel

torch.set_num_threads(1)


@pytest.fixture
def model() -> TinyModel:
    return TinyModel()
