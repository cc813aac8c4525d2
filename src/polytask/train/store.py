"""What the trainer keeps in its run folder: a run packed into a checkpoint, and found again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from polytask import files
from polytask.train import checkpoints, snapshot
from polytask.train.checkpoints import Checkpoint
from polytask.train.config import HARMLESS
from polytask.train.distribution import Distribution
from polytask.train.optim import full
from polytask.train.stages import Leg
from polytask.train.trackers import METRICS, Journal, truncate_after

if TYPE_CHECKING:
    from polytask.train.trainer import Trainer


class Store:
    """Checkpoints of one run. Rank 0 writes; reading and packing is for all processes."""

    def __init__(
        self, run: Path, identity: Mapping[str, Any], keep: int, distribution: Distribution
    ) -> None:
        self.run = run
        self.identity = identity
        self.keep = keep
        self.distribution = distribution

    def has(self, step: int) -> bool:
        """Whether this run started from, or has written, the checkpoint of `step`."""
        return bool(self.distribution.share(checkpoints.folder_of(self.run, step).is_dir()))

    def save(self, trainer: Trainer, leg: Leg) -> None:
        checkpoint = self._pack(trainer, leg)
        if self.distribution.main:
            folder = checkpoints.save(self.run, checkpoint, self.keep)
            trainer.journal.event(trainer.step, "checkpoint", folder=folder.name)
        self.distribution.barrier()

    def _pack(self, trainer: Trainer, leg: Leg) -> Checkpoint:
        random, plain_random = snapshot.pack_random(self.distribution.device)
        small = {
            "random": random,
            "window": trainer.window.state(),
            "weighting": trainer.weighting.state_dict(),
        }
        tensors: dict[str, Mapping[str, Tensor]] = {
            "model": snapshot.pack_model(trainer.model),
            "optimizer": snapshot.pack_optimizer(trainer.optimizer, _names(trainer)),
            "rest": {f"{part}/{n}": t for part, found in small.items() for n, t in found.items()},
        }
        if trainer.ema is not None:
            average = trainer.ema.average
            tensors["ema"] = {name: full(tensor) for name, tensor in average.items()}
        state = {
            "stage": leg.index,
            "random": plain_random,
            "loader": trainer.loader.state(),
            "gradients": trainer.gradients.state(),
            "skipped": trainer.guard.skipped,
            "ledger": None if (ledger := trainer.ledger) is None else ledger.state(),
            "stopper": trainer.stopper.state(),
            "scores": {task: dict(metrics) for task, metrics in trainer.scores.items()},
        }
        return Checkpoint(trainer.step, tensors, state, self.identity)

    def find(self) -> Checkpoint | None:
        """The newest valid checkpoint, with the metrics cut to it; says which it is, and why newer
        ones were refused."""
        found, refused = None, list[str]()
        if self.distribution.main:
            checkpoints.clear_leftovers(self.run)
            found, refused = checkpoints.load_newest(self.run)
        newest = self.distribution.share(None if found is None else found.step)
        if newest is not None:
            folder = checkpoints.folder_of(self.run, newest)
            found = found or checkpoints.load(folder)
            checkpoints.refuse_other_config(found.config, self.identity, folder, HARMLESS)
        if self.distribution.main:
            step = 0 if found is None else found.step
            dropped = truncate_after(self.run / METRICS, -1 if found is None else step)
            if found is not None or dropped:
                note = Journal(self.run, (), {}, True)
                note.event(step, "resumed", refused=refused, lines_dropped=dropped)
                note.close()
        return found

    def restore(self, trainer: Trainer, found: Checkpoint) -> None:
        """Everything but what belongs to the stage, which `restore_stage` brings back."""
        folder = checkpoints.folder_of(self.run, found.step)
        trainer.step = found.step
        snapshot.unpack_model(trainer.model, found.tensors["model"], f"{folder}/model.safetensors")
        trainer.weighting.load_state_dict(_part(found, "weighting"))
        snapshot.unpack_random(
            self.distribution.device, _part(found, "random"), found.state["random"]
        )
        trainer.window.restore(_part(found, "window"), found.state["ledger"])
        trainer.loader.restore(found.state["loader"])
        trainer.guard.skipped = found.state["skipped"]
        trainer.stopper.restore(found.state["stopper"])
        trainer.scores = found.state["scores"]
        if trainer.ema is not None:
            for name, tensor in found.tensors["ema"].items():
                snapshot.copy_into(trainer.ema.average[name], tensor)

    def restore_stage(self, trainer: Trainer, found: Checkpoint) -> None:
        """The optimiser and the gradients' memory of the stage that was under way."""
        where = checkpoints.folder_of(self.run, found.step) / "optimizer.safetensors"
        snapshot.unpack_optimizer(
            trainer.optimizer, _names(trainer), found.tensors["optimizer"], str(where)
        )
        trainer.gradients.restore(found.state["gradients"])

    def save_best(self, model: nn.Module) -> None:
        tensors = snapshot.pack_model(model)
        if self.distribution.main:
            sums: dict[str, str] = {}
            with files.building(self.run / "best", sums) as aside:
                path = aside / "model.safetensors"
                aliases, sums[path.name] = checkpoints.write_tensors(path, tensors)
                files.write_json(aside / "aliases.json", aliases)
        self.distribution.barrier()

    def load_best(self, model: nn.Module) -> None:
        best = self.run / "best"
        files.verify_manifest(best)
        aliases = checkpoints.read_plain(best / "aliases.json")
        found = checkpoints.read_tensors(best / "model.safetensors", aliases)
        snapshot.unpack_model(model, found, f"{best}/model.safetensors")


def _part(found: Checkpoint, part: str) -> dict[str, Tensor]:
    """The small tensors of one part."""
    return {
        name.removeprefix(f"{part}/"): tensor
        for name, tensor in found.tensors["rest"].items()
        if name.startswith(f"{part}/")
    }


def _names(trainer: Trainer) -> dict[int, str]:
    """id(parameter) -> name, for the optimiser's state."""
    own = [(f"weighting.{name}", p) for name, p in trainer.weighting.named_parameters()]
    return {id(p): name for name, p in [*trainer.model.named_parameters(), *own]}
