"""Windows over a recording, as batches for a model: spikes now, spikes before, frames, behaviour.

A window is named by the first bin s of its current part C = [s, s + w); t = s + w is its end:

    past P         [s - w_prev, s)
    frames         the last ceil(frame_rate * frame_window) that started before t + frame_end
    behaviour      the last w / dt_b samples taken before t (at least one)

Windows tile every trial in steps of w. Nothing after t is in a window unless `frame_end` > 0. (The
published code ends the frames at t + w, one window into the future; `frame_end=window` does so.)

Splits are blocked: stretches of time in the order train, validation, test, and a window whose
past or frames reach back into an earlier stretch is left out. `split="random"` shuffles windows
instead, as the published code does; neighbours then share spikes across the splits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from polytask import rng
from polytask.data.spike_tokens import Ints, SpikeTokenizer, check_room, whole_bins
from polytask.data.spikes import Recording, fraction
from polytask.errors import ConfigError, DataError, suggestion

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SpikeBatch:
    """B windows as tensors. K = block, Kp = prev_block.

    Attributes:
        ids, dts: (B, K + 1) int64; a model reads [:, :-1] and predicts [:, 1:].
        pad: (B,) int64, PADs a row of `ids` ends with.
        past_ids, past_dts: (B, Kp) int64.
        frames: (B, T, H, W) float32, or None.
        behavior: input variable -> (B, samples) float32.
        behavior_offset: input variable -> (B, samples) float32, seconds from the window's start.
        targets: predicted variable -> (B,), its last sample before the window's end; float32, or
            int64 classes.
        start: (B,) int64 first bin of the current window.
    """

    ids: Tensor
    dts: Tensor
    pad: Tensor
    past_ids: Tensor
    past_dts: Tensor
    frames: Tensor | None
    behavior: dict[str, Tensor]
    behavior_offset: dict[str, Tensor]
    targets: dict[str, Tensor]
    start: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: Any) -> SpikeBatch:
        """The same batch on another device."""

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: each.to(device) for name, each in value.items()}
            return value if value is None else value.to(device)

        return SpikeBatch(**{name: move(value) for name, value in vars(self).items()})


class SpikeWindows:
    """All windows of a recording, split, and batches of them.

    Args:
        recording: the data.
        tokenizer: says dt, windows and blocks.
        inputs: behaviour variables that are given to the model.
        targets: behaviour variables that it predicts. Never also inputs.
        frame_window: seconds of frames; 0 leaves frames out.
        frame_end: seconds from the window's end to the end of its frames; 0 is causal.
        split: 'blocked' by time, or 'random' over windows.
        fractions: shares of train, validation, test.
        seed: of the random split.

    Attributes:
        starts: (W,) first bins of all windows. `train`, `val`, `test`: indices into it.
        truncated: share of spikes lost to full blocks, {'window': .., 'past': ..}.

    Raises:
        ConfigError, DataError: a variable is unknown, both input and target, or text given as an
            input; dt differs; frames are asked for but absent; no window fits; more than 5 % of
            the spikes find no room.
    """

    def __init__(
        self,
        recording: Recording,
        tokenizer: SpikeTokenizer,
        *,
        inputs: Sequence[str] = (),
        targets: Sequence[str] = (),
        frame_window: float = 0.0,
        frame_end: float = 0.0,
        split: Literal["blocked", "random"] = "blocked",
        fractions: tuple[float, float, float] = (0.7, 0.1, 0.2),
        seed: int = 0,
    ) -> None:
        self.recording, self.tokenizer = recording, tokenizer
        self.inputs, self.targets = tuple(inputs), tuple(targets)
        self._check_variables()
        if tokenizer.n_units != recording.n_units:
            raise DataError(
                f"the tokeniser knows {tokenizer.n_units} units, the recording has "
                f"{recording.n_units}"
            )
        if abs(tokenizer.dt - recording.dt) > 1e-9:
            raise ConfigError(
                f"the tokeniser's dt is {tokenizer.dt} s, the recording's {recording.dt} s"
            )
        self.frame_count, self.frame_end = self._frame_span(frame_window, frame_end)
        self.samples = self._sample_count()
        self.starts, self._reach = self._fitting()
        if not len(self.starts):
            raise DataError(
                f"no window fits: {recording.n_steps} bins in {len(recording.spans)} stretch(es), "
                f"but a window with its past, frames and behaviour needs more"
            )
        parts = self._divide(split, fractions, seed)
        self.train, self.val, self.test = parts
        self.truncated = self._truncated()

    def __len__(self) -> int:
        return len(self.starts)

    def part(self, name: str) -> Ints:
        """Window indices of 'train', 'val' or 'test'."""
        if name not in SPLITS:
            raise ConfigError(f"unknown split '{name}'.{suggestion(name, SPLITS)}")
        found: Ints = getattr(self, name)
        return found

    def subset(self, fraction: float = 0.01, seed: int = 0) -> Ints:
        """The few-shot set: that share of the train windows (at least two), drawn once by seed.

        Smaller sets of one seed are parts of larger ones.
        """
        if not 0 < fraction <= 1:
            raise ConfigError(f"fraction must be above 0 and at most 1, not {fraction}")
        order = rng.generator(seed, "few-shot windows").permutation(len(self.train))
        return np.sort(self.train[order[: max(2, round(fraction * len(self.train)))]])

    def batch(self, indices: ArrayLike) -> SpikeBatch:
        """The windows with these indices."""
        index = np.atleast_1d(np.asarray(indices, np.int64))
        if index.ndim != 1 or not index.size:
            raise DataError("a batch needs a list of at least one window")
        if index.min() < 0 or index.max() >= len(self.starts):
            raise DataError(f"windows are numbered 0 to {len(self.starts) - 1}; got {index.max()}")
        return self.batch_at(self.starts[index])

    def batch_at(self, starts: ArrayLike) -> SpikeBatch:
        """The windows that start at these bins, whether or not they belong to the tiling."""
        import torch

        first = np.atleast_1d(np.asarray(starts, np.int64))
        recording, tok = self.recording, self.tokenizer
        end = first + tok.window_bins
        now = tok.rows(recording.unit, recording.step, first)
        past = tok.rows(recording.unit, recording.step, first, past=True)
        values: dict[str, Tensor] = {}
        offsets: dict[str, Tensor] = {}
        targets: dict[str, Tensor] = {}
        if self.samples:
            last = recording.samples_before(end)
            take = last[:, None] + np.arange(-self.samples, 0)
            if take.min() < 0 or last.max() > len(next(iter(recording.behavior.values()))):
                raise DataError("a window reaches out of the recorded behaviour")
            assert recording.dt_b is not None
            seconds = take * recording.dt_b - first[:, None] * recording.dt
            offset = torch.from_numpy(np.round(seconds, 9).astype(np.float32))
            for name in self.inputs:
                column = recording.behavior[name][take].astype(np.float32)
                values[name], offsets[name] = torch.from_numpy(column), offset
            for name in self.targets:
                targets[name] = torch.from_numpy(recording.behavior[name][last - 1])
        return SpikeBatch(
            torch.from_numpy(now.ids),
            torch.from_numpy(now.dts),
            torch.from_numpy(now.pad),
            torch.from_numpy(past.ids[:, :-1].copy()),
            torch.from_numpy(past.dts[:, :-1].copy()),
            torch.from_numpy(self._frames(end)) if self.frame_count else None,
            values,
            offsets,
            targets,
            torch.from_numpy(first),
        )

    def counts(self, indices: ArrayLike, lags: int = 1) -> np.ndarray:
        """(B, lags, N) float32 spike counts of the current window (last) and those before it.

        What decoders without tokens read. Windows before the recording's start count nothing.
        """
        recording, width = self.recording, self.tokenizer.window_bins
        start = self.starts[np.atleast_1d(np.asarray(indices, np.int64))]
        first = (start[:, None] + width * np.arange(1 - lags, 1)).ravel()
        low, high = (np.searchsorted(recording.step, edge) for edge in (first, first + width))
        held = high - low
        row = np.repeat(np.arange(len(first)), held)
        at = np.arange(len(row)) + np.repeat(low - (np.cumsum(held) - held), held)
        flat = row * recording.n_units + recording.unit[at]
        counts = np.bincount(flat, minlength=len(first) * recording.n_units)
        return counts.reshape(len(start), lags, recording.n_units).astype(np.float32)

    def scale(self, name: str) -> tuple[float, float]:
        """Mean and standard deviation of a behaviour variable over the train windows."""
        self._known(name)
        end = self.starts[self.train] + self.tokenizer.window_bins
        column = self.recording.behavior[name][self.recording.samples_before(end) - 1]
        return float(column.mean()), float(column.std()) or 1.0

    def _known(self, name: str) -> None:
        if name not in self.recording.behavior:
            known = list(self.recording.behavior)
            said = suggestion(name, known) if known else " It has none."
            raise DataError(f"the recording has no behaviour '{name}'.{said}")

    def _check_variables(self) -> None:
        for name in (*self.inputs, *self.targets):
            self._known(name)
        both = set(self.inputs) & set(self.targets)
        if both:
            raise ConfigError(
                f"behaviour '{sorted(both)[0]}' is both an input and a target; a model would only "
                "copy it. Take it out of one of the two"
            )

    def _frame_span(self, window: float, end: float) -> tuple[int, int]:
        if window < 0 or not np.isfinite(window):
            raise ConfigError(f"frame_window must be 0 or more seconds, not {window}")
        sign = -1 if end < 0 else 1
        bins = sign * whole_bins(abs(end), self.recording.dt, "frame_end")
        if window == 0:
            return 0, 0
        if self.recording.frame_rate is None:
            raise DataError(f"frame_window = {window} s asks for frames; the recording has none")
        count = fraction(window) * fraction(self.recording.frame_rate)
        return -((-count.numerator) // count.denominator), bins

    def _sample_count(self) -> int:
        if not (self.inputs or self.targets):
            return 0
        assert self.recording.dt_b is not None
        width = self.tokenizer.window_bins * fraction(self.recording.dt)
        return max(1, int(width / fraction(self.recording.dt_b)))

    def _fitting(self) -> tuple[Ints, Ints]:
        """First bins of all windows whose parts are whole, and the first bin that each reads."""
        tok, recording = self.tokenizer, self.recording
        width = tok.window_bins
        spans = recording.spans
        tiles = [np.arange(begin + tok.prev_bins, end - width + 1, width) for begin, end in spans]
        starts = np.concatenate(tiles).astype(np.int64)
        floor = np.repeat(spans[:, 0], [len(tile) for tile in tiles])
        reach, whole = starts - tok.prev_bins, np.ones(len(starts), bool)
        if self.frame_count:
            last = recording.frames_before(starts + width + self.frame_end)
            first = last - self.frame_count
            rate = fraction(recording.dt) * fraction(recording.frame_rate or 1.0)
            begins = _floor_over(first, rate)
            whole &= (begins >= floor) & (last <= recording.n_shown)
            reach = np.minimum(reach, begins)
        if self.samples:
            last = recording.samples_before(starts + width)
            ratio = fraction(recording.dt) / fraction(recording.dt_b or 1.0)
            begins = _floor_over(last - self.samples, ratio)
            whole &= begins >= floor
            reach = np.minimum(reach, begins)
        return starts[whole], reach[whole]

    def _divide(self, split: str, fractions: tuple[float, float, float], seed: int) -> list[Ints]:
        shares = np.asarray(fractions, float)
        if shares.shape != (3,) or (shares < 0).any() or abs(shares.sum() - 1) > 1e-6:
            raise ConfigError(f"fractions must be three shares that add up to 1, not {fractions}")
        total = len(self.starts)
        cuts = np.round(np.cumsum(shares)[:2] * total).astype(int)
        if split == "random":
            order = rng.generator(seed, "window split").permutation(total)
            return [np.sort(part) for part in np.split(order, cuts)]
        if split != "blocked":
            raise ConfigError(f"unknown split '{split}'.{suggestion(split, ('blocked', 'random'))}")
        parts = np.split(np.arange(total), cuts)
        ends = self.starts + self.tokenizer.window_bins + max(self.frame_end, 0)
        for i in (1, 2):
            earlier = np.concatenate(parts[:i])
            if len(earlier) and len(parts[i]):
                parts[i] = parts[i][self._reach[parts[i]] >= ends[earlier].max()]
        return parts

    def _truncated(self) -> Mapping[str, float]:
        """Shares of spikes without room, from counts alone."""
        tok, step = self.tokenizer, self.recording.step
        found = {}
        parts = (
            ("window", self.starts, tok.window_bins, tok.block),
            ("past", self.starts - tok.prev_bins, tok.prev_bins, tok.prev_block),
        )
        for name, first, width, block in parts:
            held = np.searchsorted(step, first + width) - np.searchsorted(step, first)
            lost = np.maximum(held - (block - 2), 0).sum()
            found[name] = float(lost) / max(1, int(held.sum()))
            place = "block" if name == "window" else "prev_block"
            check_room(found[name], f"the {name}s ({place} = {block})", tok.allow_truncation)
        return found

    def _frames(self, end: Ints) -> np.ndarray:
        recording = self.recording
        assert recording.frames is not None
        last = recording.frames_before(end + self.frame_end)
        take = last[:, None] + np.arange(-self.frame_count, 0)
        if take.min() < 0 or last.max() > recording.n_shown:
            raise DataError("a window reaches out of the frames that were shown")
        order = take if recording.shown is None else recording.shown[take]
        return np.asarray(recording.frames[order], np.float32)


def _floor_over(count: Ints, ratio: Fraction) -> Ints:
    """floor(count / ratio): the bin in which frame or sample `count` begins."""
    return (count * ratio.denominator) // ratio.numerator
