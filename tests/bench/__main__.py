"""``python -m tests.bench``: llmframe beside 32 in flight, 128 in flight and bare aiohttp, on simulated servers.

The machine's speed drifts, so what counts are the ratios within one case. ``--rows`` scales the cases.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass, field
from typing import Any

from tests.bench.ways import Way, by_aiohttp, by_gather, by_llmframe
from tests.server import SimulatedServer


@dataclass(frozen=True, slots=True)
class Case:
    """A server, and how many rows it is asked for."""

    name: str
    rows: int
    behaviour: dict[str, Any]
    ways: dict[str, Way] = field(
        default_factory=lambda: {
            "AsyncOpenAI + gather, 32": by_gather(32),
            "AsyncOpenAI + gather, 128": by_gather(128),
            "bare aiohttp, 128": by_aiohttp(128),
        }
    )


CASES = (
    Case("answers at once", 10_000, {}),
    Case("50 ms each", 8_000, {"latency_s": 0.05}),
    Case("64 slots x 0.3 s, queues without limit", 3_000, {"latency_s": 0.3, "slots": 64}),
    Case(
        "6,000 requests/min, 0.3 s each, with headers",
        1_500,
        {
            "latency_s": 0.3,
            "latency_sigma": 0.3,
            "requests_per_min": 6000,
            "request_burst": 100,
            "rate_headers": "openai",
            "retry_after": "seconds",
        },
    ),
)


def main() -> None:
    """Run every case through every way, and print the figures."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--rows", type=float, default=1.0, help="times the rows of each case (default 1)")
    scale = parser.parse_args().rows
    os.environ.setdefault("OPENAI_API_KEY", "sk-bench")
    print(f"{'':42}{'seconds':>9}{'rows/s':>9}{'CPU ms/row':>12}{'refused':>9}{'lost':>6}")
    for case in CASES:
        rows = max(1, int(case.rows * scale))
        prompts = [f"row {number}: is this review positive or negative?" for number in range(rows)]
        print(f"{case.name}, {rows:,} rows")
        for name, way in {"llmframe": by_llmframe, **case.ways}.items():
            with SimulatedServer(**case.behaviour, log=False) as server:
                cpu_before = time.process_time()
                seconds, answered = way(server.base_url, prompts)
                cpu_ms = (time.process_time() - cpu_before) * 1000 / rows
                stats = server.stats()
            print(
                f"  {name:40}{seconds:9.2f}{rows / seconds:9,.0f}{cpu_ms:12.2f}{stats.refused:9,}{rows - answered:6,}",
                flush=True,
            )


if __name__ == "__main__":
    main()
