"""Timeouts: an attempt is given up late rather than early."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llmframe.timeouts import FLOOR_S, MARGIN, UNKNOWN_S, Timeout

SECONDS = st.floats(0, 3600)


def test_until_a_first_answer_it_is_the_sdks_own() -> None:
    assert Timeout().seconds(failures=0) == Timeout().seconds(failures=3) == UNKNOWN_S == 600.0


@settings(deadline=None)
@given(st.lists(SECONDS, min_size=1), st.integers(0, 5))
def test_it_is_four_times_the_slowest_answer_and_never_under_5_s_and_doubles_at_each_retry(
    latencies: list[float], failures: int
) -> None:
    timeout = Timeout()
    for latency_s in latencies:
        timeout.answered(latency_s)
    assert (FLOOR_S, MARGIN) == (5.0, 4.0)
    assert timeout.seconds(failures=0) == max(5.0, 4.0 * max(latencies))
    assert timeout.seconds(failures) == timeout.seconds(failures=0) * 2**failures


@settings(deadline=None)
@given(SECONDS, st.integers(0, 9))
def test_the_users_own_is_kept(latency_s: float, failures: int) -> None:
    timeout = Timeout(2.5)
    timeout.answered(latency_s)
    assert timeout.seconds(failures) == 2.5


def test_it_stays_a_number_of_seconds_after_any_number_of_failures() -> None:
    timeout = Timeout()
    timeout.answered(1.0)
    assert timeout.seconds(failures=10**6) == 5.0 * 1024
