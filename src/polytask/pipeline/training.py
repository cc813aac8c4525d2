"""`train`: tasks, processor, model, trainer, scores, report, in that order.

open and check every task                          (before anything long)
learn the skill graph                              (only a mixture that wants one)
train on the mixture                               (resumes where it stopped)
save the model
score the test split; the same for one model per task on as many rows as the task had
write the report
"""

from __future__ import annotations

import shutil
from pathlib import Path

from polytask import files
from polytask.errors import CheckpointError
from polytask.pipeline.config import RunConfig
from polytask.pipeline.fit import fit
from polytask.pipeline.judging import judge
from polytask.pipeline.prepare import Prepared, Say, prepare
from polytask.pipeline.run import Run
from polytask.pipeline.skill_runs import with_graph
from polytask.study.versions import environment
from polytask.train.distribution import Distribution


def train(
    config: RunConfig,
    folder: Path | str | None = None,
    base: Path = Path(),
    fresh: bool = False,
    say: Say | None = None,
) -> Run:
    """Train, judge and report; the finished run.

    Args:
        config: what to train (see `load_config`).
        folder: the run folder; runs/NAME when None. An unfinished run in it goes on where it
            stopped, a finished one is returned as it is.
        base: relative paths in the configuration start here.
        fresh: discard an earlier run in the folder.
        say: is told what is being done.

    Raises:
        UserError: whatever is wrong with configuration, data, disk or an earlier run.
        NonFiniteError: a loss or gradient became NaN or infinite; weights are unharmed.
        KeyboardInterrupt: asked to stop; everything is saved and the same call goes on.
    """
    tell = say or (lambda text: None)
    run = Run(Path("runs") / config.name if folder is None else folder)
    if fresh and run.folder.exists():
        _discard(run.folder)
    if (run.folder / "scores.json").is_file():
        _same_config(run, config)
        tell(f"{run.folder} is finished; --fresh trains it again")
        return run
    prepared = prepare(config, base, tell)
    _write_config(run.folder, prepared, config, base)
    prepared = with_graph(prepared, run.folder, tell)
    result = fit(prepared, run.folder)
    if result.stopped == "interrupted":
        raise KeyboardInterrupt
    distribution = Distribution(config.train.device)
    if distribution.main:
        judge(prepared, run, tell)
    return run


def _write_config(folder: Path, prepared: Prepared, config: RunConfig, base: Path) -> None:
    """config.json, unless an unfinished run of another configuration is there.

    What adapters decide (which parameters train, what an adapted run hands on) is not written: it
    follows from the configuration.
    """
    run = Run(folder)
    kept = prepared.config
    if config.adapt is not None:
        asked = {k: getattr(config, k) for k in ("train", "model", "encoding", "adapt")}
        kept = kept.model_copy(update=asked)
    if (folder / "config.json").is_file():
        _same_config(run, kept)
        return
    record = {
        "config": kept.resolved(),
        "base": str(base.resolve()),
        "environment": environment(),
    }
    files.write_json(folder / "config.json", record)


def _same_config(run: Run, config: RunConfig) -> None:
    old, new = run.config.resolved(), config.resolved()
    keys = [*new, *(key for key in old if key not in new)]
    differing = [key for key in keys if old.get(key) != new.get(key) and key != "evaluate"]
    if differing:
        raise CheckpointError(
            f"{run.folder} holds a run of another configuration ({', '.join(differing)} differ). "
            "Choose another name, or discard it with --fresh"
        )


def _discard(folder: Path) -> None:
    """Remove an earlier run; refuse a folder that is not one."""
    if not (folder / "config.json").is_file() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not a run folder; --fresh does not remove it")
    with files.locked(folder):
        pass
    shutil.rmtree(folder)
