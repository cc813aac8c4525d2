"""What is learned next, row by row: the sampler turns a policy into exact counts.

Any row of the mixture can be asked for directly: which group it is from, which row of the group,
in which epoch. With a policy of fixed weights that is a function of (configuration, seed, row
number) alone, so there is nothing to replay after an interruption and nothing that depends on the
number of processes: a rank takes its slice of the global row numbers.

Proven and tested, for every group and every number n of rows: |rows of the group - due(n)| <= 1,
where due(n) is weight * n, also while groups stop and leave their weight to the others. An adaptive
policy cannot know its future weights; its rounds are dealt out in whole rows, what rounding
withholds is carried over, and due(n) is the sum of what was dealt, which stays within one row of
the policy's own sum at the end of every round. Policies that deal out steps are exact in steps.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import numpy as np

from polytask import rng
from polytask.errors import CheckpointError, ConfigError, PolytaskError, suggestion
from polytask.mixture.plan import (
    Block,
    EndlessPlan,
    Plan,
    RepeatingPlan,
    RoundsPlan,
    make_plan,
    spill,
    whole_rows,
)
from polytask.mixture.policies import POLICIES, Groups, MixtureConfig, Policy, ScoreHistory, Stop
from polytask.mixture.quota import Floats, Ints
from polytask.mixture.rules import check_groups, slots_to_end, stop_slots
from polytask.mixture.shuffle import permute

_NONE = np.zeros(0, dtype=np.int64)
_CHUNK = 4096  # rows whose indices are worked out at a time
_KEPT = 4  # chunks and blocks held, and rounds of an adaptive policy that can still be drawn


@dataclass(frozen=True)
class Draw:
    """Rows of the mixture in order, (n,) int64 each."""

    group: Ints
    index: Ints  # row in the group's split; position in a stream
    epoch: Ints  # how often the group has been gone through before; 0 for a stream

    def __len__(self) -> int:
        return len(self.group)


def rank_rows(step: int, batch_size: int, rank: int, world: int) -> tuple[int, int]:
    """First row and number of rows of a rank's slice of a step's global batch."""
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} is not in 0..{world - 1}")
    first, last = rank * batch_size // world, (rank + 1) * batch_size // world
    return step * batch_size + first, last - first


class MixtureSampler:
    """Draws rows from groups by a policy.

    Args:
        sizes: rows of each group's training split; None for a stream, which is read in order.
        policy: whose weights to follow.
        seed: of the shuffling; the order of groups has no randomness in it.
        batch_size: rows per step over all ranks; matters where the policy speaks of steps.
        names: of the groups, for messages and for `stop`.
        stop: 'first_exhausted' ends before a group would repeat a row, 'all_exhausted' once every
            group has been gone through, a mapping stops groups after so many epochs.
        stream_sizes: rows to assume for streams, by name, where a stopping rule needs them.

    Attributes: `total_rows` is where the mixture ends, or None.
    """

    def __init__(
        self,
        sizes: Sequence[int | None],
        policy: Policy,
        seed: int,
        batch_size: int,
        *,
        names: Sequence[str] | None = None,
        stop: Stop = None,
        stream_sizes: Mapping[str, int] | None = None,
        shuffle: bool = True,
        round_rows: int = 2048,
        smoothing: float = 0.9,
    ) -> None:
        self.names = tuple(names or (f"group {i}" for i in range(len(sizes))))
        self.sizes = tuple(sizes)
        self.policy, self.seed, self.batch_size, self.shuffle = policy, seed, batch_size, shuffle
        check_groups(self.names, self.sizes, policy, batch_size)
        self.history = ScoreHistory(len(sizes), smoothing)
        self._width = batch_size if policy.unit == "step" else 1  # rows per slot of the plan
        self._steps = -(-round_rows // batch_size)  # per round
        self._known = np.array([0 if s is None else s for s in self.sizes], dtype=np.int64)
        lengths = [
            (stream_sizes or {}).get(n) if size is None else size
            for n, size in zip(self.names, sizes)
        ]
        self._limits = stop_slots(stop, self.names, lengths, self._width)
        self._owed = np.zeros(len(sizes))
        self._dealt: Floats | None = None  # the weights of the latest round decided
        self._blocks: OrderedDict[int, Block] = OrderedDict()
        self._chunks: OrderedDict[int, tuple[int, Draw]] = OrderedDict()
        self._print = self._fingerprint(stop, round_rows, smoothing)
        self._plan, self._end = self._make_plan(stop, lengths)

    def _make_plan(self, stop: Stop, lengths: Sequence[int | None]) -> tuple[Plan, int | None]:
        if self.policy.adaptive:
            if isinstance(stop, str):
                raise ConfigError(
                    f"mixture.stop '{stop}' needs fixed weights; give an adaptive policy epochs "
                    "per group instead"
                )
            slots = self._steps * self.batch_size // self._width
            return RoundsPlan(len(self.sizes), slots), None
        weights = self._weights()
        fixed = make_plan(weights, self._limits)
        end = fixed.total
        if isinstance(stop, str) and isinstance(fixed, EndlessPlan | RepeatingPlan):
            end = slots_to_end(stop, fixed.shares, weights, lengths, self._width, self.names)
        return fixed, end

    @property
    def total_rows(self) -> int | None:
        """Rows until the mixture ends; None while it goes on."""
        end = self._plan.total if self._end is None else self._end
        return None if end is None else end * self._width

    @property
    def weights(self) -> Floats:
        """The policy's weights now, (groups,)."""
        return self._weights()

    def due(self, row: int) -> Floats:
        """Rows the policy grants each group among the first `row`: counts stay within one of it
        (for policies that deal out steps: within one step)."""
        slot, rest = divmod(row, self._width)
        if rest:
            raise ValueError(f"this policy deals out steps of {self._width} rows")
        return self._plan.due(slot) * self._width

    def draw(self, start_row: int, n: int) -> Draw:
        """Rows `start_row` to `start_row + n`; fewer where the mixture ends before.

        With an adaptive policy the first draw that reaches a round decides it, by the losses known
        then: draw in order and not ahead of the losses. Its last four rounds can be drawn again.
        """
        if start_row < 0 or n < 0:
            raise ValueError(f"cannot draw {n} rows from row {start_row}")
        parts: list[tuple[Ints, Ints, Ints]] = []
        row, end = start_row, start_row + n
        while row < end and row < (end := int(min(end, self._end_seen_from(row)))):
            first, chunk = self._chunk(row)
            here = slice(row - first, end - first)
            parts.append((chunk.group[here], chunk.index[here], chunk.epoch[here]))
            row = first + len(chunk)
        if len(parts) == 1:
            group, index, epoch = parts[0]
            return Draw(group.copy(), index.copy(), epoch.copy())
        return Draw(*(np.concatenate(column) for column in zip((_NONE, _NONE, _NONE), *parts)))

    def ready_rows(self) -> int | None:
        """Rows whose round an adaptive policy has decided; None where nothing waits for losses.

        Tell all losses so far (`observe`) before drawing beyond, so that a decision does not depend
        on how far ahead somebody reads.
        """
        plan = self._plan
        return plan.rounds * plan.length * self._width if isinstance(plan, RoundsPlan) else None

    def observe(self, step: int, losses: Sequence[float] | Floats) -> None:
        """Tell an adaptive policy the mean losses up to update `step`, (groups,); NaN: not seen.

        Every rank passes the same (reduced) values. Fixed policies only keep them in the history.
        """
        self.history.observe(step, losses)

    def wants_validation(self, step: int, row: int) -> bool:
        """Whether the policy wants losses on validation rows before step `step`, whose last row is
        `row`: where that row's round is not decided yet, or (`official`) every so many steps."""
        ready = self.ready_rows()
        if ready is None or not self.policy.validates:
            return False
        every = self._checkpoints
        return step % every == 0 if every else row >= ready

    def evaluate(self, step: int, row: int, losses: Sequence[float] | Floats) -> Floats:
        """Tell the policy the losses on validation rows after `step` updates, (groups,), where
        `wants_validation` said so; returns the shares that hold from `row` on, (groups,).

        Every rank passes the same values.
        """
        if self._checkpoints:  # as in the authors' code a round does not see its own first losses
            self.draw(row, 1)
            self.history.evaluate(step, losses)
        else:
            self.history.evaluate(step, losses)
            self.draw(row, 1)
        return self._weights() if self._dealt is None else self._dealt

    @property
    def _checkpoints(self) -> int:
        """Steps between validation losses of a policy that does not ask for them once a round."""
        if not getattr(self.policy, "official", False):
            return 0
        return int(getattr(self.policy, "loss_every", 0)) or self._steps

    @property
    def round_rows(self) -> int | None:
        """Rows between two decisions of an adaptive policy; None for a fixed one."""
        return self._steps * self.batch_size if self.policy.adaptive else None

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, as plain JSON: a few integers, and for adaptive policies the
        smoothed losses and the last rounds."""
        state: dict[str, Any] = {"seed": self.seed, "fingerprint": self._print}
        if isinstance(self._plan, RoundsPlan):
            state["history"] = self.history.state()
            state["owed"] = self._owed.tolist()
            state["dealt"] = None if self._dealt is None else self._dealt.tolist()
            state["first_round"] = self._plan.first
            state["counts"] = [counts.tolist() for counts in self._plan.counts]
            state["total"] = self._plan.total
        return state

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned; `CheckpointError` if it is of another mixture."""
        if int(state["fingerprint"]) != self._print:
            raise CheckpointError(
                "the checkpoint was written with another mixture (groups, sizes, policy, stopping "
                "rule, seed or shuffling differ); rows would be repeated or skipped. Restore that "
                "configuration, or start a new run from the checkpoint's weights."
            )
        if isinstance(self._plan, RoundsPlan):
            self.history.restore(state["history"])
            self._owed = np.array(state["owed"], dtype=np.float64)
            dealt = state.get("dealt")
            self._dealt = None if dealt is None else np.array(dealt, dtype=np.float64)
            counts = [np.array(counts, dtype=np.int64) for counts in state["counts"]]
            length, first = self._plan.length, int(state["first_round"])
            self._plan = RoundsPlan(len(self.sizes), length, state["total"], first, counts)
            self._blocks.clear()
            self._chunks.clear()

    def _weights(self) -> Floats:
        weights = np.asarray(self.policy.weights(self.history), dtype=np.float64)
        if weights.shape != (len(self.sizes),) or not np.isfinite(weights).all():
            raise PolytaskError(f"the policy gave weights {weights} for {len(self.sizes)} groups")
        if (weights < 0).any() or abs(weights.sum() - 1) > 1e-9:
            raise PolytaskError(f"the policy's weights {weights} are not shares that sum to 1")
        return weights

    def _end_seen_from(self, row: int) -> float:
        """Where the mixture ends, as far as is known at `row`; decides the rounds up to there."""
        plan = self._plan
        while isinstance(plan, RoundsPlan) and plan.total is None:
            if row < plan.rounds * plan.length * self._width:
                break
            self._decide_round(plan)
        return math.inf if self.total_rows is None else self.total_rows

    def _decide_round(self, plan: RoundsPlan) -> None:
        """Deal out an adaptive policy's next round: whole rows, true to the policy on the whole."""
        self._check_told(plan)
        limits = self._limits
        room = np.where(limits < 0, plan.length, limits - plan.counts[-1])
        self._dealt = self._weights()
        wish = spill(self._dealt * plan.length, room)
        rows = whole_rows(wish + self._owed, room, plan.length)
        self._owed = np.where(room > rows, wish + self._owed - rows, 0.0)
        plan.add(rows, _KEPT)
        if (plan.counts[-1] == limits).all():
            plan.total = int(limits.sum())

    def _check_told(self, plan: RoundsPlan) -> None:
        """Validation losses that nobody gives would leave the mixture as it is, without a word."""
        if not self.policy.validates:
            return
        needed = min(1, plan.rounds) if self._checkpoints else plan.rounds + 1
        if len(self.history.evaluations) < needed:
            raise PolytaskError(
                f"round {plan.rounds + 1} of the mixture needs losses on validation rows, and none "
                "were given: see MixtureSampler.wants_validation and evaluate (polytask.train "
                "passes them on where the trainer has a 'validation')"
            )

    def _block(self, slot: int) -> Block:
        for first, block in self._blocks.items():
            if first <= slot < first + len(block[1]):
                self._blocks.move_to_end(first)
                return block
        if isinstance(self._plan, RoundsPlan) and slot < self._plan.first * self._plan.length:
            raise PolytaskError(
                f"row {slot * self._width} lies before round {self._plan.first} of the mixture, "
                "the earliest that an adaptive policy still knows"
            )
        block = self._plan.block(slot)
        _remember(self._blocks, block[0], block)
        return block

    def _chunk(self, row: int) -> tuple[int, Draw]:
        for first, chunk in self._chunks.values():
            if first <= row < first + len(chunk):
                return first, chunk
        first, group, ordinal = self._block(row // self._width)
        if self._width > 1:  # a slot is a step: only some of the block's, with all their rows
            steps = max(1, _CHUNK // self._width)
            start = (row // self._width - first) // steps * steps
            group = np.repeat(group[start : start + steps], self._width)
            ordinal = np.repeat(ordinal[start : start + steps], self._width) * self._width
            ordinal = ordinal + np.arange(len(group)) % self._width
            first = (first + start) * self._width
        chunk = self._rows(group, ordinal)
        _remember(self._chunks, first, (first, chunk))
        return first, chunk

    def _rows(self, group: Ints, ordinal: Ints) -> Draw:
        size = self._known[group]
        stream = size == 0
        size = np.where(stream, ordinal + 1, size)
        epoch, index = np.divmod(ordinal, size)
        if self.shuffle and not stream.all():
            mixed = permute(self.seed, group, epoch, index, size)
            index = np.where(stream, index, mixed)
        return Draw(group, index, epoch)

    def _fingerprint(self, stop: Stop, round_rows: int, smoothing: float) -> int:
        what: list[Any] = [self.names, self.sizes, stop, self.shuffle, self._limits.tolist()]
        if self.policy.adaptive:
            kind = type(self.policy)
            settings: dict[str, Any] = asdict(self.policy) if is_dataclass(self.policy) else {}
            what += [kind.__qualname__, settings, self.batch_size, round_rows, smoothing]
        else:
            what += [self._weights().tolist(), self._width]
        return rng.derive(self.seed, "mixture", json.dumps(what, sort_keys=True, default=_plain))


def build_sampler(
    config: MixtureConfig,
    names: Sequence[str],
    sizes: Sequence[int | None],
    seed: int,
    batch_size: int,
) -> MixtureSampler:
    """The sampler of a configuration's `mixture:` section, for groups of these names and sizes."""
    for name in config.sizes:
        if name not in names:
            raise ConfigError(f"mixture.sizes names '{name}'.{suggestion(name, names)}")
    lengths = tuple(config.sizes.get(n) if size is None else size for n, size in zip(names, sizes))
    policy = POLICIES.get(config.policy)(config, Groups(tuple(names), lengths))
    rounds = config.round_rows if config.update_steps is None else config.update_steps * batch_size
    return MixtureSampler(
        sizes,
        policy,
        seed,
        batch_size,
        names=names,
        stop=config.stop,
        stream_sizes=config.sizes,
        shuffle=config.shuffle,
        round_rows=rounds,
        smoothing=config.smoothing,
    )


def _plain(setting: Any) -> Any:
    """A policy's setting that is no plain JSON value (a skill graph) as one."""
    return setting.to_dict()


def _remember(cache: OrderedDict[int, Any], key: int, value: Any) -> None:
    cache[key] = value
    if len(cache) > _KEPT:
        cache.popitem(last=False)
