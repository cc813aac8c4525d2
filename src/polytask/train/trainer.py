"""The training loop, for any module, objective and loader.

    hold the run folder's lock
    restore the newest valid checkpoint, or start at step 0
    for each stage:
        freeze by patterns; build optimiser and gradients
        for each step of the stage:
            seed the step; set the learning rate
            sums = gradients(step, module, batches)      # fills .grad with sums over pairs
            norm = clip(.grad / sums.divisor)            # on the device
            if the guard allows:                         # all finite
                optimiser step; average weights
            every log_every:        read the window of sums, log, tell the loader
            every evaluate_every:   evaluate, log, perhaps stop early
            every checkpoint_every: save
    save; leave the model with its averaged or best weights

`gradients` is plain differentiation of the summed loss, gradient aggregation, or anything with that
interface. A batch is a function of its index and a step's random numbers are a function of the
step, so a resumed run repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polytask import files, rng
from polytask.errors import ConfigError, NonFiniteError
from polytask.mixture.ledger import Ledger
from polytask.train import checkpoints, snapshot
from polytask.train.batches import StepBatches
from polytask.train.config import TrainConfig
from polytask.train.distribution import Distribution, lost_siblings
from polytask.train.flat_step import FlatGradients
from polytask.train.gradients import (
    Gradients,
    Objective,
    StepModule,
    StepSums,
    SumGradients,
    model_terms,
)
from polytask.train.guard import Guard, find_culprits
from polytask.train.interrupts import Interrupts
from polytask.train.jacobian import AggregatedGradients, look_at_conflict
from polytask.train.loader import BatchSource, DataEnded
from polytask.train.meters import Window
from polytask.train.optim import AveragedWeights, build_optimizer, clip_, scale_at, set_scale
from polytask.train.progress import Progress
from polytask.train.scores import Scores, Stopper
from polytask.train.stages import Leg, freeze, plan_run, switch_on_checkpointing
from polytask.train.store import Store
from polytask.train.trackers import Journal
from polytask.train.validation import Validation
from polytask.train.weighting import build_weighting

Evaluator = Callable[[nn.Module, int], Scores]
Callback = Callable[["Trainer", int], None]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: `stopped` is 'done', 'early', 'interrupted', or 'ended' where an adaptive
    mixture's stopping rule came before the last step."""

    step: int
    stopped: str
    scores: Scores = field(default_factory=dict)
    best_step: int | None = None
    skipped: int = 0
    resumed_from: int | None = None


class Trainer:
    """Trains `model` on `loader` as `config` says, in `run_folder`.

    Args:
        model: any module; parameter names are what patterns match.
        loader: gives batches by index (see `BatchSource`).
        run_folder: metrics, checkpoints and the lock live here; training again in the same folder
            resumes.
        objective: (model, batch) -> Terms; by default `model.terms(batch)`.
        evaluator: (model, step) -> {task: {metric: value}}, on validation data.
        callbacks: called as (trainer, step) after every step.
        gradients: replaces the gradients that `config` describes, built anew for each stage.
        identity: what else a checkpoint has to agree on (tasks, data, model configuration).
        distribution: processes and device; found out when not given.
        work: batch -> FLOPs per task (tasks,), for the ledger; not counted when not given.
        validation: losses on validation rows, for mixtures that follow them.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: BatchSource,
        config: TrainConfig,
        run_folder: Path | str,
        objective: Objective = model_terms,
        evaluator: Evaluator | None = None,
        callbacks: Sequence[Callback] = (),
        gradients: Callable[[Trainer], Gradients] | None = None,
        identity: Mapping[str, Any] | None = None,
        distribution: Distribution | None = None,
        work: Callable[[Any], Any] | None = None,
        validation: Validation | None = None,
    ) -> None:
        self.config = config
        self.run = Path(run_folder)
        self.distribution = distribution or Distribution(config.device)
        self.model = model.to(self.distribution.device)
        self.loader = loader
        self.tasks = tuple(loader.tasks)
        self.evaluator = evaluator
        self.validation = validation
        self.callbacks = tuple(callbacks)
        self.make_gradients = gradients
        self.legs = plan_run(config, loader)
        self.total = self.legs[-1].stop
        self.identity = {
            "train": config.model_dump(mode="json"),
            "tasks": list(self.tasks),
            **(identity or {}),
        }
        self.store = Store(self.run, self.identity, config.keep, self.distribution)
        if config.gradient_checkpointing:
            switch_on_checkpointing(model)
        self.weighting = build_weighting(config, self.tasks).to(self.distribution.device)
        bf16 = config.precision == "bf16"
        self.inner = StepModule(model, objective, self.weighting, len(self.tasks), bf16)
        self.distribution.share_weights([*self.inner.parameters(), *self.inner.buffers()])
        if self.distribution.kind == "fsdp2":
            self._shard()
        self.ema = AveragedWeights(model, config.ema) if config.ema else None
        self.window = Window(self.tasks, self.distribution, loader.ledger, loader.learns, work)
        self.guard = Guard(
            self.distribution.device,
            self.distribution.device.type == "cpu" or self.distribution.kind == "fsdp2",
            config.max_skipped,
        )
        self.stopper = Stopper(config.early_stopping, self.tasks)
        self.scores: Scores = {}
        self.step = 0  # updates done

    @property
    def ledger(self) -> Ledger | None:
        """What each task has been given so far, over all processes (all have to ask)."""
        return self.window.ledger_of_all()

    # The loop

    def fit(self) -> TrainResult:
        """Train to the end, resuming where the run folder's newest valid checkpoint left off.

        Raises:
            UserError: the folder is in use, its checkpoints do not fit, or the disk is full.
            NonFiniteError: a loss or gradient became NaN or infinite (weights are unharmed).
        """
        lock = files.locked(self.run) if self.distribution.main else nullcontext()
        with lock, lost_siblings(), Interrupts() as self.interrupts:
            resumed = self.store.find()
            active = self.distribution.main
            self.journal = Journal(self.run, self.config.trackers, self.identity, active)
            with Progress(self.total, self.tasks, self.config.progress and active) as self.progress:
                try:
                    stopped = self._run_stages(resumed)
                finally:
                    self.journal.close()
        return TrainResult(
            self.step,
            stopped,
            self.scores,
            self.stopper.best_step,
            self.guard.skipped,
            resumed.step if resumed else None,
        )

    def _run_stages(self, resumed: checkpoints.Checkpoint | None) -> str:
        if resumed is not None:
            self.store.restore(self, resumed)
        stopped = "done"
        for leg in self.legs:
            if leg.start <= self.step < leg.stop and not self.stopper.stopped:
                self._enter(leg, resumed)
                stopped = self._run_stage(leg)
                if stopped in ("interrupted", "ended"):
                    break
        if self.stopper.stopped:
            stopped = "early"
        if stopped != "interrupted":
            self._finish()
        return stopped

    def _run_stage(self, leg: Leg) -> str:
        every = self.config
        while self.step < leg.stop:
            try:
                self._update(leg)
            except DataEnded as end:
                return self._end_of_data(end)
            done = self.step = self.step + 1
            if done % every.log_every == 0 or done == leg.stop:
                self._log()
            for callback in self.callbacks:
                callback(self, done)
            if every.evaluate_every and done % every.evaluate_every == 0 and done < self.total:
                self._evaluate()
            asked = done < self.total and self._asked_to_stop(done)
            due = every.checkpoint_every and done % every.checkpoint_every == 0
            if (due and done < self.total) or asked:
                self._save(leg)
            if asked:
                self._say_goodbye()
                return "interrupted"
            if self.stopper.stopped:
                break
        return "done"

    def _update(self, leg: Leg) -> None:
        """One step: gradients, and the update if all is finite."""
        step, config = self.step, self.config
        self._validate(step)
        batches = self._batches(step)
        if config.conflict_every and step % config.conflict_every == 0:
            self._look_at_conflict(step, batches)
        snapshot.seed_step(self._seed(step), self.distribution.device)
        rate = set_scale(self.optimizer, scale_at(step, leg, config))
        sums = self.gradients(step, self.module, batches, len(self.tasks))
        norm = self._clip(sums)
        if self.guard.allows(step, norm, sums.losses, self.optimizer):
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(step)
        else:
            self._handle_bad_steps()
        self.optimizer.zero_grad(set_to_none=True)
        self.weighting.observe(sums.losses, sums.pairs)
        self.window.add(step, sums, norm, rate, batches)

    def _batches(self, step: int) -> StepBatches:
        first, count = step * self.config.accumulate, self.config.accumulate
        if self.loader.waits_for_losses(first + count - 1):
            self._tell_losses()
        found = [self.loader.batch(index)[0] for index in range(first, first + count)]
        return StepBatches(found, self.distribution.device)

    def _seed(self, step: int) -> int:
        return rng.derive(self.config.seed, "step", step, self.distribution.rank)

    def _clip(self, sums: StepSums) -> Tensor:
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"]]
        one = torch.ones((), device=self.distribution.device)
        divisor = one if sums.divisor is None else sums.divisor
        return clip_([g for g in gradients if g is not None], divisor, self.config.clip)

    # Stages

    def _enter(self, leg: Leg, resumed: checkpoints.Checkpoint | None) -> None:
        """Freeze, build the optimiser and gradients, wrap for processes, restore their state."""
        frozen = freeze(self.model, leg.config)
        self.model.train()
        self.optimizer: torch.optim.Optimizer = build_optimizer(
            self.model, leg.config, self.config, self.weighting
        )
        self.gradients = self._build_gradients()
        self.module: nn.Module = self.inner
        if not isinstance(self.gradients, AggregatedGradients):  # which sums by itself
            self.module = self.distribution.wrap(self.inner)
        if resumed is not None and resumed.state["stage"] == leg.index and resumed.step > leg.start:
            self.store.restore_stage(self, resumed)
        self.progress.stage(leg.config.name)
        self.journal.log(self.step, "event", **frozen.event())

    def _shard(self) -> None:
        """FSDP2: shard parameters before anything else holds on to them."""
        for key, used in (
            ("weighting: uncertainty", self.config.weighting == "uncertainty"),
            ("conflict_every", self.config.conflict_every > 0),
        ):
            if used:
                raise ConfigError(f"'{key}' runs on one process or with DDP, not with FSDP2")
        self.distribution.shard(self.inner)
        self.inner.touch_all = True

    def _build_gradients(self) -> Gradients:
        if self.make_gradients is not None:
            return self.make_gradients(self)
        if self.config.aggregator is None:
            return SumGradients(self.distribution, self.config.balance)
        if self.config.sharpness is not None:
            return FlatGradients.of(self)
        return AggregatedGradients(self.model, len(self.tasks), self.config, self.distribution)

    # Reading and telling

    def _log(self) -> None:
        self._handle_bad_steps()
        self._tell_losses()
        line = self.window.read()
        if line["loss"] is None and not self.guard.skipped:
            raise ConfigError(
                f"the steps up to {self.step} had no loss: no row has a label, or the objective "
                "returned no term"
            )
        self.journal.log(self.step, "train", **line)
        self.progress.train(self.step, line)

    def _tell_losses(self) -> None:
        """Give the loader each step's mean losses, all that it has not been given yet."""
        for step, losses in self.window.take_losses():
            self.loader.observe(step, losses)

    def _look_at_conflict(self, step: int, batches: StepBatches) -> None:
        """Log how the tasks' gradients lie to each other, on the step's first micro-batch."""
        snapshot.seed_step(self._seed(step), self.distribution.device)
        found = look_at_conflict(self.model, self.inner, batches, self.config)
        if found is not None:
            tasks = [self.tasks[t] for t in found["tasks"]]
            self.journal.event(step + 1, "conflict", tasks=tasks, cosine=found["cosine"])

    def _evaluate(self) -> None:
        """Score the (averaged) weights on validation data; every process gets the scores."""
        if self.evaluator is None:
            return
        averaged = self.ema.applied() if self.ema is not None else nullcontext()
        with self.window.paused(), averaged:
            self.scores = self._judged(self.evaluator) or {}
            if self.stopper.improved(self.step, self.scores):
                self.store.save_best(self.model)
        for task, metrics in self.scores.items():
            self.journal.log(self.step, "eval", task=task, split="valid", metrics=metrics)
        self.progress.scores(self.step, self.scores)

    def _judged(self, judge: Callable[[nn.Module, int], Any]) -> Any:
        """What `judge` says of the model in evaluation mode, on every process."""
        found = None
        if self.distribution.main or self.distribution.kind == "fsdp2":
            self.model.eval()
            with self.distribution.whole(self.inner):
                found = judge(self.model, self.step)
            self.model.train()
        return self.distribution.share(found)

    def _validate(self, step: int) -> None:
        """Give a mixture that follows validation losses what it wants before this step."""
        if self.validation is None or not self.validation.due(step):
            return
        with self.window.paused():
            losses = self._judged(self.validation.measure)
        self._tell_losses()
        self.journal.event(step + 1, "mixture", **self.validation.tell(step, losses))

    def _handle_bad_steps(self) -> None:
        """Name who was not finite; stop unless skipping is still allowed."""
        for step in self.guard.bad_steps():
            snapshot.seed_step(self._seed(step), self.distribution.device)
            with self.distribution.whole(self.inner):
                culprits = find_culprits(self.inner, self._batches(step), self.tasks)
            self.optimizer.zero_grad(set_to_none=True)
            told = "; ".join(map(str, culprits[:4])) or (
                "it was finite when run again: another process or an unseeded random number"
            )
            self.journal.event(
                step + 1, "non_finite", culprits=[c.event() for c in culprits], told=told
            )
            if self.guard.exhausted:
                allowed = self.config.max_skipped
                after = f" (after {allowed} skipped steps)" if allowed else ""
                raise NonFiniteError(
                    f"step {step + 1}{after}: not finite: {told}. The update was not made and the "
                    "weights are unharmed. Look at these rows, lower the learning rate, or allow "
                    "skipping with 'max_skipped'."
                )

    def _asked_to_stop(self, done: int) -> bool:
        if self.distribution.world == 1:
            return self.interrupts.asked
        if done % self.config.log_every:
            return False
        return self.distribution.any(self.interrupts.asked)

    def _say_goodbye(self) -> None:
        self.journal.event(self.step, "interrupted")
        if self.distribution.main:
            self.interrupts.say(
                f"stopped at step {self.step} of {self.total}; everything is saved in {self.run}. "
                "Run the same command again to go on."
            )

    def _end_of_data(self, end: DataEnded) -> str:
        if not self.step:
            raise ConfigError(str(end)) from end
        if self.window.terms:
            self._log()
        self.journal.event(self.step, "data_ended", told=str(end))
        return "ended"

    def _save(self, leg: Leg) -> None:
        self._handle_bad_steps()
        self._tell_losses()
        with self.window.paused():
            self.store.save(self, leg)

    def _finish(self) -> None:
        """Last evaluation and checkpoint; the model is left with its averaged or best weights."""
        fresh = not self.store.has(self.step)
        if fresh:
            self._evaluate()
            self._save(next(leg for leg in self.legs if leg.start < self.step <= leg.stop))
        if self.ema is not None:
            self.ema.settle()
        if self.stopper.best_step is not None:
            self.store.load_best(self.model)
        if fresh:
            self.journal.event(self.step, "finished", best_step=self.stopper.best_step)
