"""A process that is killed at each step of a Batch job, and the same call after it.

The long form is ``python -m tests.attacks.batch --kills 200``.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.attacks.batch import Step, Work, kill, process_context, steps_of
from tests.server_batch import BatchServer

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="no SIGKILL and no fork here"
)

REQUESTS = 7  # upload, create, look, fetch twice, delete twice: the first steps of a job, whatever its timing


@pytest.fixture(scope="module")
def battlefield() -> Iterator[BatchServer]:
    with BatchServer() as server:
        yield server


@pytest.fixture(scope="module")
def processes() -> Any:
    return process_context()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", range(1, REQUESTS + 1))
def test_after_a_kill_at_any_request_nothing_is_submitted_twice(
    number: int, moment: Any, battlefield: BatchServer, processes: Any, tmp_path: Path
) -> None:
    work = Work(f"request {number} {moment}")
    assert kill(work, [Step(moment, number)], battlefield, tmp_path / "job", processes) == []


def test_after_a_kill_at_deeds_on_disk_nothing_is_submitted_twice(
    battlefield: BatchServer, processes: Any, tmp_path: Path
) -> None:
    steps = [each for each in steps_of(Work("calm"), battlefield, tmp_path / "calm", processes) if each.kind == "disk"]
    for step in steps[:: max(1, len(steps) // 8)]:
        work = Work(f"deed {step.number}")
        assert kill(work, [step], battlefield, tmp_path / f"job{step.number}", processes) == [], step
