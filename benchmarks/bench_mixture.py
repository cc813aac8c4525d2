"""The mixture: cost per step by number of groups, and rows per second beside `datasets`.

    python -m benchmarks mixture

Both deliver the same thing from the same 16 Arrow tables of 5,000 rows: batches of 32 rows as
columns of Python values, mixed by the same weights. `datasets` draws groups at random, polytask
deals them out exactly; the deviation column is the worst over all prefixes, in rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from benchmarks.harness import Aim, compare, options_of, show, show_versions

from polytask.mixture import FixedPolicy, MixtureSampler

BATCH = 32
SOURCES, ROWS = 16, 5000


def weights_of(groups: int) -> np.ndarray:
    """Uneven weights without a short period: the general case."""
    raw = np.exp(np.random.default_rng(groups).normal(0, 1, groups))
    return np.asarray(raw / raw.sum())


def sampler_of(groups: int) -> MixtureSampler:
    return MixtureSampler([ROWS] * groups, FixedPolicy(tuple(weights_of(groups))), 0, BATCH)


def step_costs(clock: Callable[[], float], repeats: int) -> list[dict[str, Any]]:
    """Microseconds per step of 32 rows over 2,048 steps, and milliseconds of a cold seek."""

    def steps(groups: int) -> Callable[[], None]:
        def run() -> None:
            sampler = sampler_of(groups)
            for step in range(2048):
                sampler.draw(step * BATCH, BATCH)

        return run

    def seek(groups: int) -> Callable[[], None]:
        return lambda: (sampler_of(groups).draw(10**6, BATCH), None)[1]

    sizes = (2, 20, 200, 2000)
    cost = compare({str(g): steps(g) for g in sizes}, repeats, clock=clock).medians
    cold = compare({str(g): seek(g) for g in sizes}, repeats, clock=clock).medians
    return [
        {
            "groups": g,
            "us_per_step": cost[str(g)] / 2048 * 1e6,
            "relative_to_20": cost[str(g)] / cost["20"],
            "seek_ms": cold[str(g)] * 1e3,
        }
        for g in sizes
    ]


def worst_deviation(groups: np.ndarray, weights: np.ndarray) -> float:
    """Worst |count - weight * n| over groups and prefixes, in rows."""
    slots = np.arange(1, len(groups) + 1)
    return max(
        float(np.abs(np.cumsum(groups == group) - weight * slots).max())
        for group, weight in enumerate(weights)
    )


def beside_datasets(clock: Callable[[], float], repeats: int, rows: int) -> list[dict[str, Any]]:
    """Rows per second and worst deviation, of `datasets` in its ways and of polytask."""
    import pyarrow as pa
    from datasets import Dataset, interleave_datasets

    weights = weights_of(SOURCES)
    sources = [
        Dataset.from_dict(
            {"text": [f"row {i} of source {s}" for i in range(ROWS)], "source": [s] * ROWS}
        )
        for s in range(SOURCES)
    ]
    everything = pa.concat_tables([source.data.table for source in sources]).combine_chunks()
    settings: dict[str, Any] = {
        "probabilities": weights.tolist(),
        "seed": 0,
        "stopping_strategy": "all_exhausted",
    }

    mixed = interleave_datasets(sources, **settings)  # built once, outside the timing
    stream = interleave_datasets([source.to_iterable_dataset() for source in sources], **settings)

    def ours(total: int) -> Iterator[dict[str, list[Any]]]:
        sampler = sampler_of(SOURCES)
        for start in range(0, total, BATCH):
            draw = sampler.draw(start, BATCH)
            yield everything.take(draw.group * ROWS + draw.index).to_pydict()

    def ours_ahead(total: int) -> Iterator[dict[str, list[Any]]]:
        sampler = sampler_of(SOURCES)  # any row is known in advance: fetch 128 batches at once
        for start in range(0, total, 128 * BATCH):
            draw = sampler.draw(start, 128 * BATCH)
            columns = everything.take(draw.group * ROWS + draw.index).to_pydict()
            for at in range(0, len(draw), BATCH):
                yield {name: values[at : at + BATCH] for name, values in columns.items()}

    def our_order(total: int) -> Iterator[dict[str, list[Any]]]:
        sampler = sampler_of(SOURCES)
        for start in range(0, total, BATCH):
            yield {"source": sampler.draw(start, BATCH).group}  # type: ignore[dict-item]

    def slices(total: int) -> Iterator[dict[str, list[Any]]]:
        for start in range(0, total, BATCH):
            yield mixed[start : start + BATCH]

    def one_by_one(total: int) -> Iterator[dict[str, list[Any]]]:
        for row in range(total):
            yield {name: [value] for name, value in mixed[row].items()}

    def iterable(total: int) -> Iterator[dict[str, list[Any]]]:
        for row, _ in zip(stream, range(total)):
            yield {name: [value] for name, value in row.items()}

    ways = {
        "polytask, rows fetched": (ours, rows),
        "polytask, fetched 128 batches ahead": (ours_ahead, rows),
        "polytask, order only": (our_order, rows),
        "datasets map-style, slices of 32": (slices, rows),
        "datasets map-style, one by one": (one_by_one, rows // 4),
        "datasets iterable": (iterable, rows // 8),
    }

    def drain(way: Callable[[int], Iterator[Any]], total: int) -> Callable[[], None]:
        def run() -> None:
            for _ in way(total):
                pass

        return run

    runs = {name: drain(way, total) for name, (way, total) in ways.items()}
    medians = compare(runs, repeats, clock=clock).medians
    rate = {name: ways[name][1] / seconds for name, seconds in medians.items()}
    ours_rate = rate["polytask, rows fetched"]
    out = []
    for name, (way, total) in ways.items():
        drawn = np.concatenate([np.asarray(batch["source"]) for batch in way(total)])
        out.append(
            {
                "way": name,
                "rows_per_s": rate[name],
                "polytask_times_faster": ours_rate / rate[name],
                "worst_deviation_rows": worst_deviation(drawn, weights),
            }
        )
    return out


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    options = options_of(__doc__, argv, rows=32768)
    clock = options.clock
    found: dict[str, Any] = {"versions": show_versions(("numpy", "pyarrow", "datasets"))}
    found["steps"] = step_costs(clock, options.repeats)
    found["datasets"] = beside_datasets(clock, options.repeats, options.rows)
    show(found, options)
    return found


def aims(found: dict[str, Any]) -> list[Aim]:
    """Flat: within a fifth of the step with 20 groups. Rows against every way of `datasets`."""
    flat = [
        Aim(f"{row['groups']} groups: step over 20 groups", row["relative_to_20"], at_most=1.2)
        for row in found["steps"]
        if row["groups"] != 20
    ]
    rows = [
        Aim(f"rows per second over {row['way']}", row["polytask_times_faster"], at_least=5)
        for row in found["datasets"]
        if row["way"].startswith("datasets")
    ]
    ahead = {row["way"]: row["rows_per_s"] for row in found["datasets"]}
    ratio = ahead["polytask, fetched 128 batches ahead"] / ahead["datasets map-style, slices of 32"]
    return [
        *flat,
        *rows,
        Aim("rows per second over the same slices, fetching ahead", ratio, at_least=5),
    ]


if __name__ == "__main__":
    main()
