"""``python -m tests.bench.cluster``: worker processes of one Dask cluster against one simulated server.

Each case names what it has to reach. ``--workers`` is the processes, ``--seconds`` about how long a case takes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask
import dask.dataframe as dd
import pandas as pd
from distributed import Client, LocalCluster

import llmframe
from tests.server import SimulatedServer

LIMIT = 6000  # requests a minute
KEY = {"OPENAI_API_KEY": "sk-bench"}


@dataclass(frozen=True, slots=True)
class Case:
    """A server, a call, and what it has to reach: of the limit, and refused."""

    name: str
    behaviour: dict[str, Any]
    call: dict[str, Any] = field(default_factory=dict)
    of_limit: float = 0.9
    refused: float = 0.03


LATENCY = {"latency_s": 0.3, "latency_sigma": 0.3}
LIMITED = {**LATENCY, "requests_per_min": LIMIT, "request_burst": LIMIT / 60, "retry_after": "seconds"}
CASES = (
    Case("6,000 requests/min, with headers", {**LIMITED, "rate_headers": "openai"}),
    Case("6,000 requests/min, 429 alone", LIMITED),
    Case("rpm=6000, of the call", LATENCY, {"rpm": LIMIT}),
)


def main() -> None:
    """Run every case, and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.cluster", description=__doc__)
    parser.add_argument("--workers", type=int, default=4, help="processes (default 4)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a case at its limit (default 30)")
    parser.add_argument("--case", type=int, help="only this one, from 0")
    parser.add_argument("--partitions", type=int, default=4, help="for each process (default 4)")
    chosen = parser.parse_args()
    rows = int(chosen.seconds * LIMIT / 60)
    print(f"llmframe {llmframe.__name__}: {chosen.workers} processes, {rows:,} rows")
    print(f"{'':36}{'rows/s':>8}{'of limit':>10}{'(needs)':>9}{'refused':>9}{'(most)':>8}{'busiest minute':>16}")
    cases = CASES if chosen.case is None else CASES[chosen.case : chosen.case + 1]
    with tempfile.TemporaryDirectory() as place, dask.config.set({"temporary-directory": place}):
        cluster = LocalCluster(n_workers=chosen.workers, threads_per_worker=1, dashboard_address=None, env=KEY)
        with cluster, Client(cluster) as client:
            for number, case in enumerate(cases):
                measure(client, case, rows, chosen.workers * chosen.partitions, Path(place) / str(number))


def measure(client: Client, case: Case, rows: int, partitions: int, checkpoint: Path) -> None:
    """Run one case."""
    frame = pd.DataFrame({"text": [f"row {number}: is this review positive or negative?" for number in range(rows)]})
    with SimulatedServer(**case.behaviour, log=False) as server:
        ddf = dd.from_pandas(frame, npartitions=partitions)
        call = {"model": "m", "base_url": server.base_url, "checkpoint": checkpoint, **case.call}
        out = client.compute(ddf.llm.complete("{text}", **call)).result()
        stats = server.stats()
    assert (out["response_status"] == "ok").all()
    rate = stats.answered / stats.seconds
    course = stats.received_course
    busiest = max(sum(course[start : start + 600]) for start in range(len(course)))
    print(
        f"{case.name:36}{rate:8.1f}{rate * 60 / LIMIT:10.1%}{case.of_limit:9.0%}"
        f"{stats.refused / stats.received:9.2%}{case.refused:8.0%}{busiest:16,}",
        flush=True,
    )


if __name__ == "__main__":
    os.environ.update(KEY)
    main()
