"""Whose fault a failure is: values in, values out."""

from __future__ import annotations

import pytest

from llmframe.attempts import Attempt, Job
from llmframe.blame import ALIKE, DENIED, REFUSALS_A_STRIKE, Blame, Denied, is_strike
from llmframe.crowding import Crowding
from llmframe.failures import Failure

FORBIDDEN = Failure("run", "access", "no", 403)


def job(number: int = 0) -> Job:
    return Job(number, b"{}", 1)


def denied(number: int, *, sent: float = 0.0, at: float = 1.0) -> Denied:
    return Denied(job(number), FORBIDDEN, sent, at, answered_before=0)


def strikes(failures: list[Failure], *, answers: bool = False, down: bool = False, alone: bool = False) -> list[bool]:
    row, crowding = job(), Crowding()
    return [
        is_strike(row, failure, crowding, answered=count if answers else 0, down=down, alone=alone)
        for count, failure in enumerate(failures, 1)
    ]


# ---- rows that are refused as a run is


def test_a_few_denied_rows_among_many_in_flight_are_no_ones_fault_yet() -> None:
    blame, flying = Blame(), [Attempt(job(number), b"{}", 0.5, 0) for number in range(10)]
    assert not any(blame.deny(denied(number), flying, answered=0) for number in range(9))
    assert blame.deny(denied(9), flying, answered=0)


def test_with_nothing_else_sent_so_many_denied_rows_are_no_chance() -> None:
    blame = Blame()
    assert [blame.deny(denied(number), (), answered=0) for number in range(DENIED)] == [False] * (DENIED - 1) + [True]


def test_an_answer_to_what_was_sent_after_a_row_was_denied_clears_the_endpoint() -> None:
    blame = Blame()
    early, late = denied(0, at=1.0), denied(1, at=3.0)
    for each in (early, late):
        blame.deny(each, (), answered=0)
    assert blame.cleared(sent=0.5) == []
    assert blame.cleared(sent=2.0) == [early]
    assert blame.denied == [late]
    assert blame.cleared() == [late]


def test_a_row_that_has_its_outcome_is_put_by_no_more() -> None:
    blame, each = Blame(), denied(0)
    blame.deny(each, (), answered=0)
    assert blame.is_put_by(each.job)
    blame.forget(each.job)
    assert not blame.is_put_by(each.job)


# ---- first rows that all end alike


def test_the_same_end_of_all_first_rows_is_the_runs() -> None:
    blame = Blame()
    assert [blame.all_end_alike(422) for _ in range(ALIKE)] == [False] * (ALIKE - 1) + [True]


@pytest.mark.parametrize("other", [400, "no answer", None])
def test_another_end_among_them_leaves_it_with_the_rows_for_good(other: int | str | None) -> None:
    blame = Blame()
    blame.all_end_alike(422)
    blame.all_end_alike(other)
    assert not any(blame.all_end_alike(422) for _ in range(2 * ALIKE))


def test_an_answer_among_them_leaves_it_with_the_rows_for_good() -> None:
    blame = Blame()
    blame.all_end_alike(422)
    blame.answered()
    assert not any(blame.all_end_alike(422) for _ in range(2 * ALIKE))


# ---- what counts against a row


def test_a_fault_counts_against_its_row_while_the_endpoint_is_up() -> None:
    fault = Failure("retry", "server error", "oh", 500)
    assert strikes([fault]) == [True]
    assert strikes([fault], down=True) == [False]


def test_nobody_there_never_counts_against_a_row() -> None:
    assert strikes([Failure("retry", "connection", "no reply")] * 20, answers=True) == [False] * 20


def test_a_rate_limit_counts_now_and_then_while_others_are_answered() -> None:
    limited = Failure("retry", "rate limit", "slow down", 429)
    counted = strikes([limited] * 4 * REFUSALS_A_STRIKE, answers=True)
    assert counted == ([False] * (REFUSALS_A_STRIKE - 1) + [True]) * 4


def test_where_only_failing_rows_are_left_an_outage_may_be_theirs_unless_a_gateway_says_so() -> None:
    assert strikes([Failure("retry", "server error", "oh", 500)], down=True, alone=True) == [True]
    assert strikes([Failure("retry", "server error", "oh", 502)], down=True, alone=True) == [False]
