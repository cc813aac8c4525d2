"""Running arms: here, in processes side by side, or over Ray. All three give the same results.

Every (arm, seed) is a job of its own in a fresh process, so arms cannot leak state into each
other, and a crash names the arm and seed it struck. Processes are spawned, not forked; a script
that calls `prove` with workers guards its main part with `if __name__ == "__main__":`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

from polytask.errors import ConfigError, MissingExtra, PolytaskError, UserError
from polytask.study import cache
from polytask.study.records import Arm, Budget, Result

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
)


class ArmError(PolytaskError):
    """An arm raised an error or its process died; the message names arm and seed."""


@dataclass(frozen=True)
class Job:
    """One arm with one seed, and the file its result goes to."""

    arm: Arm
    seed: int
    budget: Budget
    path: Path

    @property
    def label(self) -> str:
        return f"arm '{self.arm.name}', seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What a job's process reports: a result, or an error in words."""

    result: Result | None
    error: str = ""
    users_fault: bool = False


def run_job(arm: Arm, seed: int, budget: Budget) -> Result:
    """Run one arm once; wall time is filled in where the arm did not measure it."""
    started = time.perf_counter()
    result = arm.run(seed, budget)
    if not isinstance(result, Result):
        raise TypeError(f"run returned {type(result).__name__}, not polytask.study.Result")
    if result.spent.seconds is None:
        seconds = round(time.perf_counter() - started, 3)
        result = replace(result, spent=replace(result.spent, seconds=seconds))
    return result


def _attempt(arm: Arm, seed: int, budget: Budget) -> Outcome:
    try:
        return Outcome(run_job(arm, seed, budget))
    except UserError as error:
        return Outcome(None, str(error), users_fault=True)
    except Exception:
        return Outcome(None, traceback.format_exc().rstrip())


def _unwrap(job: Job, outcome: Outcome) -> Result:
    if outcome.result is not None:
        return outcome.result
    if outcome.users_fault:
        raise UserError(f"{job.label}: {outcome.error}")
    raise ArmError(f"{job.label} failed:\n{outcome.error}")


def run_here(jobs: Sequence[Job]) -> Iterator[tuple[Job, Result]]:
    """One after the other in this process, with its threads."""
    for job in jobs:
        result = _unwrap(job, _attempt(job.arm, job.seed, job.budget))
        cache.save(job.path, result)
        yield job, result


def run_processes(jobs: Sequence[Job], workers: int, threads: int) -> Iterator[tuple[Job, Result]]:
    """Up to `workers` jobs at a time, each in its own process with `threads` threads.

    Results come in the order in which they finish. Leaving the loop early (an error, Ctrl-C) ends
    the processes that still run; what had finished is kept.
    """
    _check_importable(jobs)
    waiting = list(reversed(jobs))
    running: dict[Connection, tuple[Job, SpawnProcess]] = {}
    try:
        with thread_limit(threads):
            while waiting or running:
                while waiting and len(running) < workers:
                    job = waiting.pop()
                    pipe, process = _start(job)
                    running[pipe] = (job, process)
                ready = connection.wait(list(running))
                for pipe in [pipe for pipe in running if pipe in ready]:
                    job, process = running.pop(pipe)
                    yield job, _unwrap(job, _receive(pipe, process))
    finally:
        for _, process in running.values():
            process.terminate()
        for pipe, (_, process) in running.items():
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
            pipe.close()


def _start(job: Job) -> tuple[Connection, SpawnProcess]:
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, theirs), daemon=False)
    process.start()
    theirs.close()  # so that a dead child reads as end of file
    return ours, process


def _receive(pipe: Connection, process: SpawnProcess) -> Outcome:
    try:
        outcome: Outcome = pipe.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        reason = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        outcome = Outcome(None, f"its process {reason}{hint} without a result")
    pipe.close()
    process.join()
    return outcome


def _child(job: Job, pipe: Connection) -> None:
    """In the new process: run, keep the result on disk, report."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()
    outcome = _attempt(job.arm, job.seed, job.budget)
    if outcome.result is not None:
        try:
            cache.save(job.path, outcome.result)
        except UserError as error:
            outcome = Outcome(None, str(error), users_fault=True)
    pipe.send(outcome)
    pipe.close()


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _check_importable(jobs: Sequence[Job]) -> None:
    for job in jobs:
        try:
            ForkingPickler.dumps(job)
        except Exception as error:  # whatever a field of the arm raises when it is packed
            raise ConfigError(
                f"{job.label} cannot be sent to another process: {error}. Let `run` be a function "
                "of a module, a functools.partial of one, or an instance of a dataclass with "
                "__call__; or run with workers=0 (in this process)."
            ) from error


@contextmanager
def thread_limit(threads: int) -> Iterator[None]:
    """Child processes started inside compute with this many threads each."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update({name: str(threads) for name in THREAD_VARIABLES})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def run_ray(jobs: Sequence[Job], threads: int) -> Iterator[tuple[Job, Result]]:
    """Jobs as Ray tasks of `threads` CPUs each, on the cluster that `ray.init` finds or starts."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", "scale", "running arms over Ray") from error
    _check_importable(jobs)
    if not ray.is_initialized():
        ray.init(
            log_to_driver=False,
            runtime_env={"env_vars": {name: str(threads) for name in THREAD_VARIABLES}},
        )
    attempt = ray.remote(num_cpus=threads, max_retries=0)(_attempt)
    waiting = {attempt.remote(job.arm, job.seed, job.budget): job for job in jobs}
    try:
        while waiting:
            done, _ = ray.wait(list(waiting))
            for reference in done:
                job = waiting.pop(reference)
                result = _unwrap(job, _fetch(ray, reference))
                cache.save(job.path, result)
                yield job, result
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def _fetch(ray: object, reference: object) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)  # type: ignore[attr-defined]
    except ray.exceptions.RayError as error:  # type: ignore[attr-defined]
        return Outcome(None, f"Ray lost it: {error}")
    return outcome
