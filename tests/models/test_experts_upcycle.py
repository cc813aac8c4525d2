"""Dense checkpoints as a start: the same function before the first step, names of two libraries."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from polytask.errors import ConfigError
from polytask.models.experts import ExpertsConfig
from polytask.models.experts.upcycle import resized_positions, upcycle
from polytask.models.experts.vit import MoEViT, VisionTask

TASKS = (VisionTask(name="seg", outputs=5), VisionTask(name="kind", outputs=3, head="image"))


def hub(**changes: Any) -> Any:
    from transformers import ViTConfig, ViTModel

    sizes = {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
        "intermediate_size": 128, "image_size": 16, "patch_size": 4, "num_channels": 3,
    }  # fmt: skip
    torch.manual_seed(0)
    model = ViTModel(ViTConfig(**(sizes | changes)), add_pooling_layer=False).eval()
    with torch.no_grad():  # biases and embeddings that would be missed
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pixels(size: int = 16) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_a_hub_vit_without_experts_gives_the_same_features(tmp_path: Path) -> None:
    theirs, x = hub(), pixels()
    with torch.no_grad():
        wanted = theirs(x).last_hidden_state
    model = upcycle(theirs, TASKS, experts=None).eval()
    assert torch.allclose(model.features(x, 0), wanted, atol=2e-5)
    theirs.save_pretrained(tmp_path / "vit")
    again = MoEViT.from_pretrained(tmp_path / "vit", TASKS, experts=None).eval()
    assert torch.equal(again.features(x, 0), model.features(x, 0))


@pytest.mark.parametrize(
    "options", [{"gate": "renormalised"}, {"gate": "raw", "start": "zero"}], ids=str
)
def test_copies_compute_what_the_dense_model_did(options: dict[str, Any]) -> None:
    theirs, x = hub(), pixels()
    experts = ExpertsConfig(count=5, k=3, mult=4.0, **options)
    model = upcycle(theirs, TASKS, experts=experts).eval()
    with torch.no_grad():
        wanted = theirs(x).last_hidden_state
    for task in range(2):
        assert torch.allclose(model.features(x, task), wanted, atol=2e-5)
    assert len(model.sparse_layers) == 2


def test_narrow_experts_are_parts_whose_mean_is_the_dense_layer() -> None:
    theirs = hub()
    experts = ExpertsConfig(count=8, k=4, mult=1.0, gate="renormalised")
    bank = upcycle(theirs, TASKS, experts=experts).sparse_layers["blocks.1.feed_forward"].experts
    dense: Any = upcycle(theirs, TASKS, experts=None).blocks[1].feed_forward
    x = torch.randn(7, 32)
    mean = torch.stack([bank[str(e)](x) for e in range(4)]).mean(0)
    assert torch.allclose(mean, dense(x), atol=1e-5)


def test_timms_names_are_read() -> None:
    dense = upcycle(hub(layer_norm_eps=1e-6), TASKS, experts=None).eval()
    ours = dense.state_dict()
    state = {
        "patch_embed.proj.weight": ours["patches.weight"],
        "patch_embed.proj.bias": ours["patches.bias"],
        "cls_token": ours["class_token"].view(1, 1, -1),
        "pos_embed": ours["position"][None],
    }
    state |= {n: t for n, t in ours.items() if n.startswith("norm.")}
    parts = {
        "attention.qkv": "attn.qkv", "attention.out": "attn.proj", "feed_forward.up": "mlp.fc1",
        "feed_forward.down": "mlp.fc2", "norm1": "norm1", "norm2": "norm2",
    }  # fmt: skip
    for block, (mine, theirs), kind in itertools.product(
        range(4), parts.items(), ("weight", "bias")
    ):
        state[f"blocks.{block}.{theirs}.{kind}"] = ours[f"blocks.{block}.{mine}.{kind}"]
    again = upcycle(state, TASKS, heads=2, experts=None).eval()
    assert torch.equal(again.features(pixels(), 0), dense.features(pixels(), 0))
    with pytest.raises(ConfigError, match="how many attention heads"):
        upcycle(state, TASKS)


def test_noise_parts_the_copies() -> None:
    model = upcycle(hub(), TASKS, experts=ExpertsConfig(mult=4.0), noise=0.01)
    bank: Any = model.sparse_layers["blocks.1.feed_forward"].experts
    assert not torch.equal(bank["0"].up.weight, bank["1"].up.weight)
    assert torch.allclose(bank["0"].up.weight, bank["1"].up.weight, atol=0.02)


def test_positions_keep_the_class_token_and_constants() -> None:
    position = torch.cat((torch.full((1, 8), 7.0), torch.full((16, 8), 2.0)))
    wide = resized_positions(position, 6, 1)
    assert wide.shape == (37, 8) and (wide[0] == 7).all()
    assert torch.allclose(wide[1:], torch.tensor(2.0))
    assert resized_positions(position, 4, 1) is position
    model = upcycle(hub(), TASKS, experts=None, image_size=24)
    assert model.run(pixels(24), "seg").shape == (3, 5, 6, 6)


def test_what_cannot_be_upcycled_is_named() -> None:
    with pytest.raises(ConfigError, match=r"48 hidden units cannot start from .* 128"):
        upcycle(hub(), TASKS, experts=ExpertsConfig(mult=1.5))
    state = hub().state_dict()
    state["embeddings.position_embeddings"] = torch.zeros(1, 19, 32)
    with pytest.raises(ConfigError, match="no square grid"):
        upcycle(state, TASKS, heads=2)
    with pytest.raises(ConfigError, match="under a name of Hugging Face's"):
        upcycle({"a": torch.zeros(2), "b": torch.zeros(2)}, TASKS)
    with pytest.raises(ConfigError, match="plain GELU"):
        upcycle(hub(hidden_act="relu"), TASKS)
