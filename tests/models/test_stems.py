"""Stems and splice: where tokens stand, and what they are made of."""

from __future__ import annotations

import model_examples as make
import numpy as np
import pytest
import torch
from model_examples import Row

from polytask.models import Batch, MaskSpec
from polytask.models.collate import collate
from polytask.models.init import initialise
from polytask.models.stems import (
    Entries,
    ImageStem,
    SeriesStem,
    TableStem,
    fold,
    patch_size,
    plan_layout,
    splice,
)
from polytask.models.stems.image import unfold
from polytask.models.stems.series import instance_norm
from polytask.models.stems.splice import mask_of


def batch_of(*sequences: dict[str, object]) -> Batch:
    return collate([Row([dict(s)], {}) for s in sequences], make.KINDS)


def numbered(first: int, n: int, width: int) -> torch.Tensor:
    """Tokens (n, width, 1) that hold first, first + 1, ..."""
    return torch.arange(first, first + n * width, dtype=torch.float32).view(n, width, 1)


class TestSplice:
    entries = {
        "image": Entries(numbered(100, 2, 2), np.array([2, 0])),
        "table": Entries(
            numbered(200, 2, 3),
            np.array([0, 1]),
            valid=np.array([[True, False, True], [False, False, True]]),
        ),
        "text": Entries(numbered(300, 3, 4), np.array([0, 2, 2]), np.array([1, 4, 2])),
    }

    def test_entries_of_a_sequence_follow_each_other(self) -> None:
        layout = plan_layout(self.entries, 3)
        x = splice(self.entries, layout, torch.tensor([[7.0], [8.0], [9.0]]))
        assert x[..., 0].tolist() == [
            [102, 103, 200, 202, 300, 7, 0, 0, 0],
            [205, 8, 0, 0, 0, 0, 0, 0, 0],
            [100, 101, 304, 305, 306, 307, 308, 309, 9],
        ]
        assert layout.length.tolist() == [6, 2, 9]
        assert layout.start["text"].tolist() == [4, 2, 6]
        assert layout.entry("text").tolist() == [0, -1, 1]

    def test_without_a_summary_sequences_are_one_shorter(self) -> None:
        layout = plan_layout(self.entries, 3, summary=False)
        x = splice(self.entries, layout, None)
        assert x[1, :, 0].tolist() == [205, 0, 0, 0, 0, 0, 0, 0]
        assert layout.length.tolist() == [5, 1, 8]

    def test_a_sequence_without_tokens_is_refused(self) -> None:
        with pytest.raises(ValueError, match="sequence 3 of the batch has no tokens"):
            plan_layout(self.entries, 4, summary=False)

    def test_gradients_return_to_real_tokens_only(self) -> None:
        tokens = numbered(0, 3, 4).requires_grad_()
        entries = self.entries | {"text": Entries(tokens, np.array([0, 2, 2]), np.array([1, 4, 2]))}
        layout = plan_layout(entries, 3, summary=False)
        splice(entries, layout, None).sum().backward()
        assert tokens.grad is not None
        assert tokens.grad[..., 0].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]

    def test_modalities_of_mixed_precision_meet_in_the_wider_one(self) -> None:
        entries = {
            "image": Entries(torch.ones(1, 2, 3, dtype=torch.bfloat16), np.array([0])),
            "text": Entries(torch.ones(1, 2, 3), np.array([0])),
        }
        assert splice(entries, plan_layout(entries, 1), torch.ones(1, 3)).dtype == torch.float32


class TestMask:
    def mask(self, *parts: tuple[dict[str, object], int]) -> MaskSpec:
        batch = batch_of(*(p for p, _ in parts))
        entries = {
            name: Entries(torch.zeros(len(batch.known(f"{name}.sequence")), width, 1), seq, count)
            for name, width, seq, count in self.parts(batch)
        }
        layout = plan_layout(entries, batch.sequences)
        return mask_of(layout, batch.known("text.prefix"), torch.device("cpu"))

    def parts(self, batch: Batch) -> list[tuple[str, int, np.ndarray, np.ndarray | None]]:
        found = []
        if "image.pixels" in batch.fields:
            found.append(("image", 2, batch.known("image.sequence"), None))
        ids, length = batch.fields["text.ids"], batch.known("text.length")
        found.append(("text", ids.shape[1], batch.known("text.sequence"), length))
        return found

    def test_whole_prefixes_are_bidirectional(self) -> None:
        r = np.random.default_rng(0)
        mask = self.mask((make.text(r, 3), 0), (make.text(r, 3), 0))
        assert mask == MaskSpec()

    def test_free_texts_are_plainly_causal(self) -> None:
        r = np.random.default_rng(0)
        mask = self.mask((make.text(r, 3, 0), 0), (make.text(r, 3, 0), 0))
        assert mask == MaskSpec(causal=True)

    def test_mixtures_mark_what_all_tokens_see(self) -> None:
        r = np.random.default_rng(0)
        mask = self.mask(
            (make.text(r, 4), 0),  # bidirectional: all five tokens, the summary included
            (make.text(r, 4, 1), 0),
            (make.text(r, 3, 2) | make.image(r), 0),  # two image tokens come first
            (make.text(r, 3, 0) | make.image(r), 0),
        )
        assert mask.causal and mask.prefix is not None and mask.length is not None
        assert mask.prefix.tolist() == [5, 1, 4, 2]
        assert mask.length.tolist() == [5, 5, 6, 6]


class TestImages:
    def test_fold_undoes_unfold(self) -> None:
        pixels = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
        assert torch.equal(fold(unfold(pixels, 4), 4), pixels)

    def test_patches_equal_a_strided_convolution(self) -> None:
        stem = ImageStem(8, 4, 5)
        initialise(stem, 0)
        batch = batch_of(make.image(np.random.default_rng(0)))
        weight = stem.project.weight.view(5, 3, 4, 4)
        x = batch.fields["image.pixels"].float() / 64 - 2
        expected = torch.nn.functional.conv2d(x, weight, stem.project.bias, stride=4)
        found = stem(batch).tokens - stem.position
        torch.testing.assert_close(found[0], expected[0].flatten(1).T)

    @pytest.mark.parametrize(("image", "patch"), [(28, 7), (32, 8), (8, 4), (224, 16), (1, 1)])
    def test_the_default_patch_is_about_a_quarter(self, image: int, patch: int) -> None:
        assert patch_size(image, None) == patch


class TestSeries:
    def test_instance_norm_gives_mean_0_and_deviation_1_of_what_is_known(self) -> None:
        values = torch.randn(3, 40, 2, generator=torch.Generator().manual_seed(0)) * 5 + 30
        values[0, ::3] = float("nan")
        x, observed, loc, scale = instance_norm(values)
        for n in range(3):
            for c in range(2):
                known = values[n, observed[n, :, c], c]
                assert float(loc[n, 0, c]) == pytest.approx(float(known.mean()), rel=1e-5)
                assert float(scale[n, 0, c]) == pytest.approx(
                    float(known.std(correction=0)), rel=1e-4
                )
        assert not x[~observed].any()

    def test_the_last_patch_holds_the_newest_steps(self) -> None:
        stem = SeriesStem(channels=2, patch=4, dim=8, level=False)
        initialise(stem, 0)
        r = np.random.default_rng(0)
        long = make.series(r, 10)["series.values"]
        short = {"series.values": long[3:]}
        entries = stem(batch_of({"series.values": long}, short))
        assert entries.count is not None and entries.count.tolist() == [3, 2]
        x, observed, _, _ = instance_norm(torch.from_numpy(long[3:])[None])
        last = torch.stack((x[0, 3:], observed[0, 3:].float()), -1).reshape(1, -1)
        torch.testing.assert_close(entries.tokens[1, 1:2], stem.project(last))
        first = torch.zeros(4, 2, 2)
        first[1:] = torch.stack((x[0, :3], observed[0, :3].float()), -1)
        torch.testing.assert_close(entries.tokens[1, :1], stem.project(first.reshape(1, -1)))

    def test_more_channels_than_the_stem_has_are_refused(self) -> None:
        stem = SeriesStem(channels=1, patch=4, dim=8, level=False)
        with pytest.raises(ValueError, match="has 2 channels, the stem takes 1"):
            stem(batch_of(make.series(np.random.default_rng(0), 8)))


class TestTables:
    def test_a_token_per_column_and_a_token_for_missing(self) -> None:
        stem = TableStem(numbers=4, categories=7, dim=3)
        initialise(stem, 0)
        row = {
            "table.number": np.array([2.0, np.nan], np.float32),
            "table.number_id": np.array([1, 3]),
            "table.category": np.array([5]),
        }
        entries = stem(batch_of(row))
        assert entries.valid is None
        expected = torch.stack(
            [
                2 * stem.weight.weight[1] + stem.bias.weight[1],
                stem.missing.weight[3] + stem.bias.weight[3],
                stem.category.weight[5],
            ]
        )
        torch.testing.assert_close(entries.tokens[0], expected)

    def test_columns_that_other_tables_have_are_no_tokens(self) -> None:
        stem = TableStem(numbers=4, categories=7, dim=3)
        r = np.random.default_rng(0)
        entries = stem(batch_of(make.table(r, 3, 1), make.table(r, 1, 2)))
        assert entries.valid is not None
        assert entries.valid.tolist() == [
            [True, True, True, True, False],
            [True, False, False, True, True],
        ]
