"""Square images to patch tokens (ViT, Dosovitskiy et al. 2021, arXiv 2010.11929)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polytask.errors import ConfigError
from polytask.models.batch import Batch
from polytask.models.stems.entries import Entries


def patch_size(image: int, wanted: int | None) -> int:
    """Pixels per patch side; by default about a quarter of the image, between 4 and 16."""
    divisors = [d for d in range(1, image + 1) if image % d == 0]
    if wanted is None:
        aim = max(4, min(16, image // 4))
        return min(divisors, key=lambda d: (abs(d - aim), d))
    if wanted not in divisors:
        raise ConfigError(
            f"image_patch {wanted} does not divide the image size {image}; "
            f"possible: {', '.join(map(str, divisors))}"
        )
    return wanted


def fold(patches: Tensor, patch: int) -> Tensor:
    """(n, patches, C * patch * patch) to (n, C, height, width); the inverse of `unfold`."""
    n, count, _ = patches.shape
    side = round(count**0.5)
    grid = patches.view(n, side, side, -1, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(n, -1, side * patch, side * patch)


def unfold(pixels: Tensor, patch: int) -> Tensor:
    """(n, C, height, width) to (n, patches, C * patch * patch)."""
    n, channels, height, width = pixels.shape
    grid = pixels.view(n, channels, height // patch, patch, width // patch, patch)
    patches = (height // patch) * (width // patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(n, patches, channels * patch * patch)


class ImageStem(nn.Module):
    """Patches through one linear layer, plus a learned position for each place in the grid."""

    def __init__(self, image: int, patch: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.project = nn.Linear(3 * patch * patch, dim)
        self.position = nn.Parameter(torch.zeros((image // patch) ** 2, dim))
        self.init_std = {"position": 0.5}

    def forward(self, batch: Batch) -> Entries:
        pixels = batch.fields["image.pixels"]
        patches = unfold(pixels, self.patch).to(self.project.weight.dtype)
        # Bytes 0..255 to -2..2: about one standard deviation of natural images is one unit.
        tokens = self.project(patches * (1 / 64) - 2.0) + self.position
        return Entries(tokens, batch.known("image.sequence"))
