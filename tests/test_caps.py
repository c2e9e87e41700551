"""The user's hard caps, as the server sees them: what it received in any second, and had in flight at any time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd
import pytest

import llmframe
from tests.server import SimulatedServer


def ask(server: SimulatedServer, texts: Sequence[str], **caps: Any) -> None:
    frame = pd.DataFrame({"text": texts})
    out = llmframe.LLMFrame(frame).complete("text", model="m", base_url=server.base_url, progress=False, **caps)
    assert (out["response_status"] == "ok").all()


def rows(count: int, start: int = 0) -> list[str]:
    return [f"row {number}" for number in range(start, start + count)]


def most_in_any(span_s: float, received: Sequence[tuple[float, float]]) -> float:
    """The largest sum that a sliding span of so many seconds holds."""
    return max(sum(amount for then, amount in received if at <= then < at + span_s) for at, _ in received)


@pytest.mark.parametrize(("rpm", "count"), [(600, 32), (90, 6), (1800, 80)])
def test_no_sliding_second_brings_more_than_its_share_of_rpm(server: SimulatedServer, rpm: int, count: int) -> None:
    ask(server, rows(count), rpm=rpm)
    received = [(request.received_s, 1.0) for request in server.requests()]
    assert len(received) == count
    assert most_in_any(1.0, received) <= math.ceil(rpm / 60)


def test_retries_are_requests_too(server: SimulatedServer) -> None:
    server.change(p_500=0.3)
    ask(server, rows(25), rpm=600)
    received = [(request.received_s, 1.0) for request in server.requests()]
    assert len(received) > 25
    assert most_in_any(1.0, received) <= 10


def test_no_sliding_second_brings_more_than_its_share_of_tpm(server: SimulatedServer) -> None:
    ask(server, [f"{number:04} {'word' * 500} [[say=ok]]" for number in range(18)], tpm=180_000)
    received = [(request.received_s, len(request.text) / 4) for request in server.requests()]
    assert 3 * 500 <= most_in_any(1.0, received) <= 3000


def test_two_calls_at_once_share_a_cap(server: SimulatedServer) -> None:
    with ThreadPoolExecutor(2) as threads:
        for made in [threads.submit(ask, server, rows(14, start), rpm=600) for start in (0, 100)]:
            made.result()
    received = [(request.received_s, 1.0) for request in server.requests()]
    assert most_in_any(1.0, received) <= 10


def test_two_calls_after_each_other_share_a_cap(server: SimulatedServer) -> None:
    for start in (0, 100):
        ask(server, rows(9, start), rpm=600)
    assert most_in_any(1.0, [(request.received_s, 1.0) for request in server.requests()]) <= 10


def test_max_concurrency_is_never_passed_whatever_fails(server: SimulatedServer) -> None:
    server.change(latency_s=0.01, p_500=0.1, p_reset=0.1)
    ask(server, rows(150), max_concurrency=7)
    assert server.stats().max_in_flight == 7
