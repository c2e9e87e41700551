"""Timeouts: an attempt is given up late rather than early."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llmframe.timeouts import DOUBT_S, FLOOR_S, MARGIN, UNKNOWN_S, Timeout

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


# ---- trials


def learned(*answers: tuple[float, int]) -> Timeout:
    """Make one that has seen a fast answer, and then these: the seconds each took, and its row's failures."""
    timeout = Timeout()
    timeout.answered(0.1)
    for latency_s, failures in answers:
        timeout.answered(latency_s, failures)
    return timeout


def most_trials(timeout: Timeout, *, silent: bool = False) -> int:
    """Count the rows that may be on trial together."""
    return next(n for n in range(100) if not timeout.gives_up(5.1, failures=0, trials=n, silent=silent))


def test_one_overdue_row_is_tried_before_the_others_are_given_up() -> None:
    assert most_trials(learned()) == 1
    assert not learned().gives_up(5.0, failures=0, trials=0, silent=False)


@given(st.integers(0, 6))
def test_with_each_trial_that_is_answered_in_time_twice_as_many_are_tried(proofs: int) -> None:
    assert most_trials(learned(*[(0.1, 1)] * proofs)) == 2**proofs


def test_an_answer_that_comes_late_shows_that_what_is_overdue_is_slow() -> None:
    timeout = learned((0.1, 1), (0.1, 1))
    assert most_trials(timeout) == 4
    timeout.answered(12.0)
    assert not timeout.gives_up(48.0, failures=0, trials=0, silent=False)
    assert timeout.gives_up(48.1, failures=0, trials=0, silent=False)
    assert not timeout.gives_up(48.1, failures=0, trials=1, silent=False)


def test_where_nothing_is_answered_one_row_at_a_time_is_tried_whatever_was_proven() -> None:
    assert most_trials(learned(*[(0.1, 1)] * 5), silent=True) == 1


def test_a_row_that_is_overdue_again_is_waited_for_until_a_trial_was_answered() -> None:
    assert not learned().gives_up(10.1, failures=1, trials=0, silent=False)
    assert learned((0.1, 1)).gives_up(10.1, failures=1, trials=0, silent=False)


@given(st.integers(0, 3), st.integers(0, 100), st.booleans())
def test_nothing_is_waited_for_much_longer_than_its_limit(failures: int, trials: int, silent: bool) -> None:
    timeout = learned()
    assert timeout.gives_up(timeout.seconds(failures) + DOUBT_S + 0.1, failures=failures, trials=trials, silent=silent)


@given(st.integers(0, 9), st.integers(0, 100), st.booleans())
def test_the_users_own_limit_knows_no_trial(failures: int, trials: int, silent: bool) -> None:
    timeout = Timeout(2.5)
    timeout.answered(0.1)
    assert timeout.gives_up(2.6, failures=failures, trials=trials, silent=silent)
