"""The desk: what it gives out never adds up to more than the call allows, and nothing is lost with a process."""

from __future__ import annotations

from collections import deque

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmframe.budget import Allotment, Bound, Cost
from llmframe.desk import Desk, Limits, Wants
from llmframe.rates import TICKET_S, Share
from llmframe.requests import words_of

BOTH = ("w1", "w2")


def words(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.uint64)


# ---- who asks what several have


def test_a_request_is_one_parts_until_it_lets_go() -> None:
    desk = Desk()
    assert desk.claim("w1", "a", words(3, 1), BOTH).tolist() == [False, False]
    assert desk.claim("w2", "b", words(1, 2), BOTH).tolist() == [True, False]
    assert desk.claim("w1", "c", words(1, 2), BOTH).tolist() == [True, True]
    desk.release("a")
    assert desk.claim("w2", "b", words(1), BOTH).tolist() == [False]


def test_what_a_dead_worker_claimed_is_free() -> None:
    desk = Desk()
    desk.claim("w1", "a", words(1), BOTH)
    assert desk.claim("w2", "b", words(1), ("w2",)).tolist() == [False]


def test_words_of_no_keys_are_none() -> None:
    assert words_of(np.empty(0, "V32")).tolist() == []
    assert len(set(words_of(np.array([bytes(32), bytes([1] * 32)], "V32")).tolist())) == 2


# ---- pace


@settings(deadline=None)
@given(
    st.integers(1, 600),
    st.lists(st.tuples(st.sampled_from(BOTH), st.integers(0, 40), st.floats(0.01, 5.0)), max_size=60),
)
def test_no_minute_has_more_tickets_than_the_cap(rpm: int, visits: list[tuple[str, int, float]]) -> None:
    desk = Desk(Limits(rpm=rpm))
    now, given_out = 0.0, deque[tuple[float, int]]()
    for worker, waiting, later_s in visits:
        now += later_s
        grant = desk.meet(worker, worker, Wants(queue=(10.0,) * waiting), now, BOTH)
        given_out.append((now, grant.requests))
        while given_out[0][0] <= now - 60 - TICKET_S:
            given_out.popleft()
        assert sum(number for _, number in given_out) <= rpm


def test_tokens_are_given_request_by_request_in_order() -> None:
    desk = Desk(Limits(tpm=6000))
    grant = desk.meet("w1", "w1", Wants(queue=(60.0, 30.0, 30.0)), 0.0, BOTH)
    assert (grant.requests, grant.tokens) == (2, 90.0)


@settings(deadline=None)
@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.sampled_from(("w1", "w2", "w3")), st.integers(0, 12), st.integers(0, 9)), max_size=60),
)
def test_seats_never_add_up_to_more_than_there_are(most: int, visits: list[tuple[str, int, int]]) -> None:
    desk, seats = Desk(Limits(max_concurrency=most)), dict[str, int]()
    for worker, waiting, out in visits:
        wants = Wants(queue=(1.0,) * waiting, in_flight=min(out, seats.get(worker, 0)))
        seats[worker] = desk.meet(worker, worker, wants, 0.0, ("w1", "w2", "w3")).seats or 0
        assert sum(seats.values()) <= most
        assert seats[worker] >= wants.in_flight


def test_one_who_has_all_the_seats_gives_some_up_as_they_fall_free() -> None:
    desk = Desk(Limits(max_concurrency=4))
    busy = Wants(queue=(1.0,) * 9)
    assert desk.meet("w1", "a", busy, 0.0, BOTH).seats == 4
    assert desk.meet("w2", "b", busy, 0.0, BOTH).seats == 0
    assert desk.meet("w1", "a", Wants((1.0,) * 9, in_flight=3), 0.1, BOTH).seats == 3
    assert desk.meet("w1", "a", Wants((1.0,) * 9, in_flight=1), 0.2, BOTH).seats == 2
    assert desk.meet("w2", "b", busy, 0.2, BOTH).seats == 2


def test_a_process_knows_how_many_there_are() -> None:
    desk = Desk()
    assert desk.meet("w1", "a", Wants(), 0.0, BOTH).peers == 1
    assert desk.meet("w2", "b", Wants(), 0.0, BOTH).peers == 2
    assert desk.meet("w1", "a", Wants(), 9.0, BOTH).peers == 1  # the other was not heard of for long
    desk.leave("a", Cost())
    assert desk.meet("w2", "b", Wants(), 9.0, BOTH).peers == 1


def test_a_ticket_is_void_after_a_while() -> None:
    share = Share()
    share.give(1.0, 2, 50.0)
    assert (share.wait_s(1.1, 30.0), share.wait_s(1.1, 60.0)) == (0.0, float("inf"))
    share.take(30.0)
    assert share.tickets(1.2) == 1
    share.give(1.2, 0, 0.0)
    assert share.tickets(1.0 + TICKET_S) == 0
    assert share.wait_s(1.0 + TICKET_S, 1.0) == float("inf")


# ---- money


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 2000), st.lists(st.tuples(st.integers(0, 2), st.integers(1, 60), st.booleans()), max_size=80))
def test_all_processes_together_never_pass_a_budget(most: int, turns: list[tuple[int, int, bool]]) -> None:
    """Each turn a process sends a request where it fits, or settles one, and comes to the desk; one of them dies."""
    desk, alive = Desk(Limits(max_tokens=most)), {"w0", "w1", "w2"}
    budgets = [Allotment(bound=Bound(1), max_tokens=most) for _ in range(3)]
    out: list[list[Cost]] = [[], [], []]
    for turn, (who, tokens, settles) in enumerate(turns):
        if f"w{who}" not in alive:
            continue
        budget, cost = budgets[who], Cost(tokens)
        if settles and out[who]:
            worst = out[who].pop()
            budget.settle(worst, Cost(worst.tokens // 2))
        elif budget.fits(cost):
            budget.set_aside(cost)
            out[who].append(cost)
        held, wanted = budget.want()
        grant = desk.meet(f"w{who}", f"s{who}", Wants((), 0, budget.spent, held, wanted), float(turn), alive)
        budget.allot(grant.money, over=grant.over, elsewhere=grant.elsewhere)
        if turn == 50:
            alive.discard("w0")
        assert sum(each.spent.tokens + each.aside.tokens for each in budgets) <= most


def test_a_budget_is_over_when_nobody_holds_anything_that_could_come_back() -> None:
    desk = Desk(Limits(max_tokens=100))
    first, second = (Allotment(bound=Bound(1), max_tokens=100) for _ in range(2))

    def meet(budget: Allotment, name: str) -> None:
        held, wanted = budget.want()
        grant = desk.meet("w1", name, Wants((), 0, budget.spent, held, wanted), 0.0, BOTH)
        budget.allot(grant.money, over=grant.over, elsewhere=grant.elsewhere)

    assert not first.fits(Cost(80))
    meet(first, "a")
    assert first.fits(Cost(80))
    first.set_aside(Cost(80))
    assert not second.fits(Cost(80))
    meet(second, "b")
    assert not second.fits(Cost(80))
    assert not second.idle  # 80 may come back
    first.settle(Cost(80), Cost(70))
    meet(first, "a")
    desk.leave("a", first.spent)
    meet(second, "b")
    assert second.idle
    assert "70 tokens are spent, and the next request may take up to 80" in second.refusal(Cost(80))
