"""`train`: tasks, processor, model, trainer, scores, report, in that order.

    open and check every task                          (before anything long)
    look for leaks between splits and across tasks
    fit the processor, build the model
    train on the mixture                               (resumes where it stopped)
    score the test split; the same for one model per task on the same rows
    write the report
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polytask import files
from polytask.errors import CheckpointError, DataError
from polytask.evaluate import evaluate
from polytask.mixture import Ledger, MixtureSampler, make_sampler
from polytask.models.multitask import MultitaskModel, build_model
from polytask.pipeline.config import RunConfig
from polytask.pipeline.run import MODEL, Run, save_model
from polytask.tasks import build_tasks, check_leaks
from polytask.tasks.encode import Processor
from polytask.tasks.task import TaskSet
from polytask.train.loader import Loader
from polytask.train.trainer import Trainer, TrainResult

log = logging.getLogger("polytask.pipeline")
Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """What a configuration becomes before the first step."""

    config: RunConfig
    taskset: TaskSet
    processor: Processor
    model: MultitaskModel
    sampler: MixtureSampler
    ledger: Ledger
