"""prove: budgets asserted, resume exact, processes, evidence whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import study_arms
from study_arms import Noisy, Slow, dies, raises, reports_pid_and_threads, steps_as_asked

from polytask.errors import ConfigError, DataError, MissingExtra, UserError
from polytask.study import (
    Arm,
    ArmError,
    Budget,
    BudgetError,
    Claim,
    Result,
    Study,
    evidence_of,
    load_evidence,
    prove,
)

ROWS = Budget(rows=100)
CLAIM = Claim("good", "bad", "accuracy")


def pair(log: Path | None = None, **bad: Any) -> dict[str, Arm]:
    where = str(log or "")
    return {
        "good": Arm("good", Noisy(0.8, log=where), {"mean": 0.8}),
        "bad": Arm("bad", Noisy(**{"mean": 0.7, "log": where, **bad}), {"mean": 0.7, **bad}),
    }


def study(arms: dict[str, Arm] | None = None, **changes: Any) -> Study:
    settings: dict[str, Any] = {"claims": (CLAIM,), "budget": ROWS, "title": "A demo"}
    return Study("99-demo", arms or pair(), **{**settings, **changes})


def test_paired_seeds_show_what_unpaired_noise_would_hide(tmp_path: Path) -> None:
    evidence = prove(study(), seeds=5, seed_base=10, cache=tmp_path)
    assert evidence.verdict == "shown"
    assert evidence.seeds == [10, 11, 12, 13, 14]
    judged = evidence.judgements[0]
    assert judged.t is not None
    assert judged.t.low < 0.1 < judged.t.high
    values = evidence.arms["good"].values("accuracy")
    spread = max(v or 0.0 for v in values) - min(v or 0.0 for v in values)
    assert spread > 5 * (judged.t.high - judged.t.low)


def test_evidence_survives_the_round_trip_exactly(tmp_path: Path) -> None:
    evidence = prove(study(notes={"regime": "confirmed on fresh seeds"}), cache=tmp_path)
    path = evidence.write(tmp_path / "evidence")
    assert path.name == "99-demo.json"
    assert load_evidence(path) == evidence
    assert evidence_of(json.loads(json.dumps(evidence.to_dict())), "here") == evidence


def test_evidence_in_another_shape_is_refused(tmp_path: Path) -> None:
    data = prove(study(), seeds=2, cache=tmp_path).to_dict()
    for change, match in (
        ({"verdict": "proved"}, "'verdict'"),
        ({"extra": 1}, "'extra'"),
        ({"schema": 2}, "schema 2"),
    ):
        with pytest.raises(DataError, match=match):
            evidence_of({**data, **change}, "edited.json")
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(DataError, match=r"torn\.json is not JSON"):
        load_evidence(tmp_path / "torn.json")
    with pytest.raises(DataError, match="there is no evidence"):
        load_evidence(tmp_path / "absent.json")


def test_a_smoke_run_judges_nothing_and_writes_no_evidence(tmp_path: Path) -> None:
    evidence = prove(study(size="smoke"), seeds=1, cache=tmp_path)
    assert evidence.verdict == "not judged"
    with pytest.raises(UserError, match="only from budget 'full'"):
        evidence.write(tmp_path / "evidence")
    assert not (tmp_path / "evidence").exists()


def test_one_seed_is_not_enough() -> None:
    with pytest.raises(UserError, match="at least 2"):
        prove(study(), seeds=1)


def test_unequal_budgets_fail_the_proof_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"seed 0: rows 100 against 103, a gap of 2.91%"):
        prove(study(pair(rows=103)), cache=tmp_path)
    loose = study(pair(rows=103), equal={"rows": 0.03})
    assert prove(loose, cache=tmp_path).budget_checks[0].gap == pytest.approx(3 / 103)


def test_only_a_claim_that_says_so_lets_the_baseline_spend_more(tmp_path: Path) -> None:
    generous = Claim("good", "bad", "accuracy", than_may_spend_more=True)
    assert prove(study(pair(rows=300), claims=(generous,)), cache=tmp_path).verdict == "shown"
    with pytest.raises(BudgetError, match="rows 100 against 50"):
        prove(study(pair(rows=50), claims=(generous,)), cache=tmp_path)


def test_a_quantity_that_an_arm_did_not_measure_fails_the_proof(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="'good' did not measure 'flops'"):
        prove(study(equal={"flops": 0.1}), cache=tmp_path)
    mixed = pair() | {"bad": Arm("bad", steps_as_asked)}
    with pytest.raises(BudgetError, match="did not measure"):
        prove(study(mixed, budget=Budget(steps=3)), cache=tmp_path)


def test_finished_results_are_not_run_again_until_something_changes(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()
    kept = tmp_path / "cache"
    first = prove(study(pair(log)), seeds=3, cache=kept)
    assert len(list(log.iterdir())) == 6
    again = prove(study(pair(log)), seeds=4, cache=kept)
    assert len(list(log.iterdir())) == 8
    assert (first.reused, again.reused) == (0, 6)
    assert again.arms["good"].trials[:3] == first.arms["good"].trials
    prove(study(pair(log)), seeds=3, cache=kept, code="another version")
    assert len(list(log.iterdir())) == 14
    prove(study(pair(log), budget=Budget(rows=99)), seeds=3, cache=kept)
    assert len(list(log.iterdir())) == 20
    same_params = pair(log) | {"bad": Arm("bad", Noisy(0.6, log=str(log)), {"mean": 0.7})}
    prove(study(same_params), seeds=3, cache=kept)
    assert len(list(log.iterdir())) == 23


def test_a_damaged_result_is_computed_again(tmp_path: Path) -> None:
    first = prove(study(), seeds=2, cache=tmp_path)
    victim = next(tmp_path.rglob("good-seed1-*.json"))
    victim.write_text(victim.read_text()[:20])
    again = prove(study(), seeds=2, cache=tmp_path)
    assert again.reused == 3
    assert again.arms["good"].values("accuracy") == first.arms["good"].values("accuracy")


def test_processes_give_the_results_of_this_process(tmp_path: Path) -> None:
    here = prove(study(), seeds=2, cache=tmp_path / "here")
    beside = prove(study(), seeds=2, workers=2, cache=tmp_path / "beside")
    assert beside.judgements == here.judgements
    assert beside.environment["workers"] == 2


def test_each_job_has_a_process_and_a_thread_limit_of_its_own(tmp_path: Path) -> None:
    arms = {name: Arm(name, reports_pid_and_threads) for name in ("good", "bad")}
    before = os.environ.get("OMP_NUM_THREADS")
    evidence = prove(
        study(arms, claims=(Claim("good", "bad", "pid"),)),
        seeds=2,
        workers=2,
        threads=3,
        cache=tmp_path,
    )
    pids = {p for arm in evidence.arms.values() for p in arm.values("pid")}
    assert len(pids) == 4
    assert os.getpid() not in pids
    assert {t for arm in evidence.arms.values() for t in arm.values("threads")} == {3.0}
    assert os.environ.get("OMP_NUM_THREADS") == before


@pytest.mark.parametrize("workers", [0, 1])
def test_an_arm_that_fails_is_named_with_its_seed(tmp_path: Path, workers: int) -> None:
    arms = pair() | {"bad": Arm("bad", raises)}
    with pytest.raises(ArmError, match=r"(?s)arm 'bad', seed 0 failed.*ZeroDivisionError: boom"):
        prove(study(arms), seeds=2, workers=workers, cache=tmp_path)
    assert len(list(tmp_path.rglob("good-seed0-*.json"))) == 1


def test_a_process_that_is_killed_is_named_with_the_signal(tmp_path: Path) -> None:
    arms = pair() | {"bad": Arm("bad", dies)}
    with pytest.raises(ArmError, match=r"(?s)arm 'bad', seed 0.*killed by signal 9 \(out of mem"):
        prove(study(arms), seeds=2, workers=1, cache=tmp_path)


def test_a_local_function_cannot_go_to_another_process(tmp_path: Path) -> None:
    def local(seed: int, budget: Budget) -> Result:
        return Result({"accuracy": 1.0}, ROWS)

    arms = {name: Arm(name, local) for name in ("good", "bad")}
    with pytest.raises(ConfigError, match="cannot be sent to another process"):
        prove(study(arms), workers=2, cache=tmp_path)
    assert prove(study(arms), workers=0, cache=tmp_path).verdict == "not shown"


def test_ray_without_the_extra_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"polytask\[scale\]"):
        prove(study(), backend="ray", cache=tmp_path)


@pytest.mark.sockets
@pytest.mark.slow
@pytest.mark.enable_socket
def test_ray_gives_the_results_of_this_process(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    here = prove(study(), seeds=2, cache=tmp_path / "here")
    there = prove(study(), seeds=2, backend="ray", threads=1, cache=tmp_path / "there")
    assert there.judgements == here.judgements


SCRIPT = """
import sys
from pathlib import Path
from study_arms import Slow
from polytask.study import Arm, Budget, Claim, Study, prove
if __name__ == "__main__":
    folder = sys.argv[1]
    arms = {n: Arm(n, Slow(folder)) for n in ("good", "bad")}
    s = Study("kill", arms, (Claim("good", "bad", "accuracy"),), Budget(rows=1))
    prove(s, seeds=2, workers=1, cache=Path(folder) / "cache", code="fixed")
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_proof_goes_on_where_it_was_and_leaves_no_process(
    tmp_path: Path, how: signal.Signals
) -> None:
    folder = Path(study_arms.__file__).parent
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env=environment,
        stderr=subprocess.DEVNULL,
        # A suite that a shell started in the background hands down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_for(lambda: (tmp_path / "began-1").exists())
        worker = int(children(process.pid)[-1])
        process.send_signal(how)
        assert process.wait(120) != 0
        wait_for(lambda: not Path(f"/proc/{worker}/cmdline").exists() or state(worker) == "Z")
    finally:
        process.kill()
    (tmp_path / "hurry").touch()
    arms = {n: Arm(n, Slow(str(tmp_path))) for n in ("good", "bad")}
    resumed = Study("kill", arms, (CLAIM,), Budget(rows=1))
    evidence = prove(resumed, seeds=2, cache=tmp_path / "cache", code="fixed")
    assert evidence.reused == 2
    assert evidence.arms["good"].values("accuracy") == [0.0, 1.0]


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def children(pid: int) -> list[str]:
    """Spawned workers of `pid` (the resource tracker is the first child)."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0]


def test_values_that_are_not_finite_are_kept_as_none() -> None:
    result = Result({"loss": float("nan"), "accuracy": 0.5}, ROWS)
    assert result.metrics == {"loss": None, "accuracy": 0.5}


def test_budgets_add_and_refuse_nonsense() -> None:
    total = Budget(steps=2, rows=3) + Budget(steps=5, flops=1)
    assert total.measured() == {"steps": 7}
    with pytest.raises(ConfigError, match="'rows' = -1"):
        Budget(rows=-1)


def test_a_study_names_arms_it_has() -> None:
    with pytest.raises(ConfigError, match="names the arm 'bat'"):
        study(claims=(Claim("good", "bat", "accuracy"),))
    with pytest.raises(ConfigError, match="listed as 'x'"):
        study({"x": Arm("y", raises)})
    with pytest.raises(ConfigError, match="no arms or no claims"):
        prove(study(claims=()))
    with pytest.raises(ConfigError, match="no claim"):
        prove(study(claims=(Claim("good", "bad", "accuracy", kind="ablation"),)))


@dataclass(frozen=True)
class Card:
    number: int = 7
    name: str = "demo"
    title: str = "A system"


class System:
    card = Card()
    claims = (CLAIM,)
    equal: dict[str, float] = {"rows": 0.05}

    def arms(self, size: str) -> dict[str, Arm]:
        return pair(rows=103)

    def budget(self, size: str) -> Budget:
        return Budget(rows=100 if size == "full" else 2)


def test_a_system_is_proved_by_its_card(tmp_path: Path) -> None:
    evidence = prove(System(), seeds=2, cache=tmp_path)
    assert (evidence.name, evidence.title) == ("07-demo", "A system")
    assert prove(System(), seeds=1, size="smoke", cache=tmp_path).budget == Budget(rows=2)


def test_progress_is_told_after_every_result(tmp_path: Path) -> None:
    seen: list[tuple[int, int, str, int, bool]] = []
    note = lambda p: seen.append((p.done, p.total, p.arm, p.seed, p.reused))
    prove(study(), seeds=2, cache=tmp_path, on_result=note)
    assert seen == [
        (1, 4, "good", 0, False),
        (2, 4, "bad", 0, False),
        (3, 4, "good", 1, False),
        (4, 4, "bad", 1, False),
    ]


def test_partial_functions_are_arms_too(tmp_path: Path) -> None:
    arms = {n: Arm(n, partial(steps_as_asked)) for n in ("good", "bad")}
    claim = Claim("good", "bad", "loss", higher_is_better=False)
    evidence = prove(
        study(arms, claims=(claim,), budget=Budget(steps=4)), workers=1, seeds=2, cache=tmp_path
    )
    assert evidence.verdict == "not shown"
    assert evidence.arms["good"].trials[1].spent.steps == 4


def test_importing_the_study_is_cheap() -> None:
    code = (
        "import sys, polytask.study; print(sorted({'torch','scipy','pydantic'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
