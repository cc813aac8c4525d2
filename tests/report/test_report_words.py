"""Numbers in words, looks of names, and the record behind scores.json."""

from __future__ import annotations

import json

import numpy as np
import pytest
import report_samples

from polytask.errors import DataError
from polytask.evaluate import TaskScore, compare_single, find_metric
from polytask.mixture.ledger import Ledger
from polytask.report import MixtureRow, Range, run_scores, score_rows, scores_of
from polytask.report.drawing import BRIGHT, looks, short
from polytask.report.words import amount, duration, interval, number, percent, signed, verdict


def test_numbers_have_three_figures_where_it_matters() -> None:
    said = {
        0.12345: "0.123",
        1.0: "1.000",
        41.8: "41.80",
        123.456: "123.5",
        12345.0: "12,345",
        1.5e7: "1.50e+07",
        -0.0004: "−0.0004",
        0.0: "0.000",
    }
    assert {value: number(value) for value in said} == said
    assert number(None) == number(float("nan")) == "–"
    assert (signed(0.5), signed(-0.5), signed(0.0)) == ("+0.500", "−0.500", "0.000")
    assert percent(0.0213) == "+2.1\u202f%"
    assert percent(-0.0001) == "0.0\u202f%"


def test_amounts_and_durations_are_short() -> None:
    assert [amount(v) for v in (950, 12_345, 7.8e9, 0.25)] == [
        "950",
        "12.3\u202fk",
        "7.8\u202fG",
        "0.25",
    ]
    assert [duration(v) for v in (4.21, 41.3, 200.4, 7500.0)] == [
        "4.2\u202fs",
        "41\u202fs",
        "3\u202fmin 20\u202fs",
        "2\u202fh 05\u202fmin",
    ]


def test_a_verdict_needs_an_interval_beside_zero() -> None:
    assert verdict(Range(0.1, 0.01, 0.2)) == "better"
    assert verdict(Range(-0.1, -0.2, -0.01)) == "worse"
    assert verdict(Range(0.1, -0.01, 0.2)) == "same"
    assert verdict(None) == verdict(Range(0.1, None, None)) == ""
    assert interval(Range(0.1, -0.01, 0.2)) == "−0.010 to +0.200"


def test_headline_rows_come_from_records_and_from_json() -> None:
    scores = report_samples.scores()
    rows = score_rows(json.loads(json.dumps(scores.to_dict())))
    assert rows == score_rows(scores)
    assert rows[5].metric == "perplexity ↓"
    assert (rows[5].difference, rows[5].verdict) == ("+3.100", "better")
    assert (rows[7].difference, rows[7].verdict) == ("−0.021", "worse")


def test_a_name_keeps_its_look_and_no_two_look_alike() -> None:
    names = [f"task {i}" for i in range(20)]
    found = looks(names)
    assert len(set(found.values())) == 20
    assert {look.colour for look in list(found.values())[:8]} == set(BRIGHT)
    assert looks(["only one"])["only one"] == looks(["only one", "b", "c"])["only one"]
    assert short("a_task_with_a_rather_long_name", 15) == "a_task_wit…name"
    assert short("short") == "short"


def test_the_record_round_trips_and_refuses_other_shapes() -> None:
    scores = report_samples.scores()
    data = json.loads(json.dumps(scores.to_dict(), allow_nan=False))
    assert scores_of(data) == scores
    with pytest.raises(DataError, match=r"does not fit: 'tasks\.0\.metric'"):
        scores_of({**data, "tasks": [{**data["tasks"][0], "metric": None}]})


def test_scores_are_built_from_evaluation_comparison_and_ledger() -> None:
    metric = find_metric("accuracy")
    truth = np.array([0, 1, 1, 0, 1, 0, 1, 1])

    def scored(guess: list[int]) -> dict[str, TaskScore]:
        sums = metric.statistics(np.array(guess), truth) if metric.statistics else None
        assert sums is not None
        values = {"accuracy": metric.of_sums(sums), "auroc": float("nan")}
        alone = metric.scores_of(sums)
        rows = np.arange(8)
        return {
            "t": TaskScore(
                "t", "classify", values, "accuracy", alone, rows, "g", {"accuracy": sums}
            )
        }

    multitask, single = scored([0, 1, 1, 0, 1, 0, 1, 0]), scored([0, 1, 0, 0, 0, 0, 1, 0])
    comparison = compare_single(multitask, single, spent={"rows": (100.0, 100.0)})
    ledger = Ledger(["t"], [50])
    ledger.add([0], examples=100, tokens=400, flops=1e9, seconds=2.5)
    found = run_scores(
        multitask,
        comparison,
        ledger=ledger.rows(),
        mixture=[MixtureRow("g", 1.0, 1.0, 100)],
        seconds=2.5,
    )
    row = found.tasks[0]
    assert (row.multitask, row.single, row.n) == (7 / 8, 5 / 8, 8)
    assert row.gain is not None
    assert row.gain.mean == pytest.approx(2 / 8)
    assert row.relative is not None
    assert row.relative.mean == pytest.approx(0.4)
    assert row.metrics == {"accuracy": 7 / 8, "auroc": None}
    assert found.delta_m == row.relative
    assert [entry.task for entry in found.ledger] == ["t"]
    assert found.ledger[0].epochs == 2.0
    assert scores_of(json.loads(json.dumps(found.to_dict()))) == found
    assert run_scores(multitask).delta_m is None
