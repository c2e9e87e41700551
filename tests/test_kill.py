"""A process that is killed in the middle of a call, and the same call after it.

The long form is ``python -m tests.attacks.kill --kills 50``.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.attacks.kill import Attack, Moment, kill, process_context, undisturbed
from tests.server import SimulatedServer

pytestmark = pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="no SIGKILL and no fork here"
)

KILLS = 12


@pytest.fixture(scope="module")
def battlefield() -> Iterator[SimulatedServer]:
    with SimulatedServer() as server:
        yield server


@pytest.fixture(scope="module")
def processes() -> Any:
    return process_context()


Calm = tuple[Attack, pd.DataFrame, float]


@pytest.fixture(
    scope="module",
    params=[Attack(160), Attack(80, flush_s=0.05)],
    ids=["flush a second", "flush all the time"],
)
def calm(
    request: pytest.FixtureRequest, battlefield: SimulatedServer, tmp_path_factory: pytest.TempPathFactory
) -> Calm:
    """A call, what it gives undisturbed, and how long it takes."""
    attack: Attack = request.param
    return (attack, *undisturbed(attack, battlefield, tmp_path_factory.mktemp("calm") / "runs"))


@pytest.mark.parametrize("seed", range(KILLS // 2))
def test_after_a_kill_the_same_call_asks_only_what_was_not_on_disk_and_ends_as_if_undisturbed(
    calm: Calm, seed: int, battlefield: SimulatedServer, processes: Any, tmp_path: Path
) -> None:
    attack, expected, seconds = calm
    moment = Moment.draw(random.Random(seed), seconds)
    outcome = kill(attack, [moment], battlefield, tmp_path / "runs", expected, processes)
    assert outcome.faults == [], outcome
