"""Neuroformer's page: whole with everything, with little, and at the edges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from polytask.report.neuro_figures import (
    Activity,
    Latent,
    Trace,
    Wiring,
    hub_order,
    strength_order,
)
from polytask.report.neuro_page import NeuroRecord, neuro_report

PICTURES = ["raster", "psth", "trace-speed", "connectivity", "latent", "attribution", "loss"]


def record(n: int = 12, windows: int = 80, seed: int = 0) -> NeuroRecord:
    rng = np.random.default_rng(seed)
    edges = rng.random((n, n)) < 0.1
    spikes = rng.integers(0, n, 300), rng.uniform(0, 5, 300)
    made = rng.integers(0, n, 280), rng.uniform(0, 5, 280)
    speed = np.cumsum(rng.standard_normal(windows))
    true = rng.gamma(2, 2, (n, 40))
    return NeuroRecord(
        "<mouse> 7",
        lead="It works.",
        facts={"neurons": str(n)},
        scores={"Generated spikes": [("F1", 0.4), ("rate r", None)]},
        activity=Activity(n, 0.0, 5.0, spikes, {"generated": made}),
        psth=(true, {"one ahead": true + 1, "free": true[::-1]}),
        traces=[Trace("speed", np.arange(windows) * 0.05, speed, speed + 1, "r = 0.9.")],
        wiring=Wiring({"attention": rng.random((n, n)), "ablation": rng.standard_normal((n, n))},
                      edges, {"attention": (0.9, 0.5)}),
        latent=Latent(rng.standard_normal((windows, 8)), speed, "speed"),
        losses={f"{c} {t}": [(k, 3 / (k + 1)) for k in range(9)]
                for c in ("train", "validation") for t in ("id", "time", "align", "speed")},
        attribution=rng.random((3, 8, 8)),
        notes=["Attention is a hypothesis."],
    )  # fmt: skip


@pytest.mark.parametrize(("n", "windows"), [(12, 80), (2, 3), (90, 3000)])
def test_the_page_is_whole(n: int, windows: int, tmp_path: Path) -> None:
    page = neuro_report(tmp_path, record(n, windows)).read_text()
    assert "&lt;mouse&gt; 7" in page and "<mouse>" not in page
    assert page.count("<svg") == len(PICTURES)
    for name in PICTURES:
        assert (tmp_path / f"{name}.png").stat().st_size > 4000
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert ("more neurons are not drawn" in page) == (n > 60)


def test_a_page_with_nothing_but_a_name(tmp_path: Path) -> None:
    page = neuro_report(tmp_path, NeuroRecord("empty")).read_text()
    assert "<svg" not in page and "empty" in page


def test_silence_constant_behaviour_and_unseen_pairs_are_drawn(tmp_path: Path) -> None:
    none = np.zeros(0, int), np.zeros(0)
    sparse = NeuroRecord(
        "silent",
        activity=Activity(3, 0.0, 1.0, none, {"generated": none}),
        psth=(np.zeros((3, 4)), {"generated": np.zeros((3, 4))}),
        traces=[Trace("speed", np.arange(2.0), np.ones(2), np.ones(2))],
        wiring=Wiring({"attention": np.zeros((3, 3))}),
        latent=Latent(np.ones((4, 1)), np.ones(4), "speed"),
    )
    assert neuro_report(tmp_path, sparse).read_text().count("<svg") == 5


def test_hubs_stand_first_and_followers_by_their_hub() -> None:
    edges = np.zeros((7, 7))
    edges[[0, 3, 6], 5] = 1.0  # 5 drives three
    edges[[2, 3], 1] = -1.0  # 1 drives two
    order, hubs = hub_order(edges)
    assert hubs == 2 and order.tolist() == [5, 1, 0, 3, 6, 2, 4]
    assert strength_order(edges + 9 * np.eye(7)).tolist()[:2] == [5, 1]
