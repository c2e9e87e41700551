"""The engine against a real server: what is retried, what ends a row or the run, and what is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson
import pytest

from llmframe import answers, engine, failures, patience, timeouts
from llmframe.attempts import Job
from llmframe.budget import Bound, Budget
from llmframe.endpoint import resolve
from llmframe.engine import ALIKE, EMPTY, Crew, Policy, Read, Tally
from llmframe.errors import EndpointError
from llmframe.lines import close_lines, line_to
from llmframe.pacing import Caps, Pacer
from llmframe.results import Completion
from llmframe.window import START
from tests.server import SimulatedServer
from tests.server_threads import ThreadsServer

KEY = "sk-a-key-of-no-worth"
SEQUENTIAL = Policy(Caps(max_concurrency=1))

T = TypeVar("T")


def body_of(text: str, *, model: str = "m", role: str = "user") -> bytes:
    return orjson.dumps({"model": model, "messages": [{"role": role, "content": text}]})


def rows(count: int) -> list[str]:
    return [f"row {number}" for number in range(count)]


def read(payload: object, *, number: int, latency_s: float, attempts: int, request_id: str | None) -> Completion | None:
    assert isinstance(payload, dict)
    return answers.read_reply(
        payload, schema=None, price=None, several=False, latency_s=latency_s, attempts=attempts, request_id=request_id
    )


@dataclass
class Ran:
    """What a crew was given and did."""

    texts: Sequence[str | bytes]
    """A prompt each, or a whole body."""
    policy: Policy = field(default_factory=Policy)
    base_url: str = ""
    after: Callable[[int, Completion], None] | None = None
    read: Read = field(default=read)
    budget: Budget | None = None
    outcomes: dict[int, Completion] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    made: int = 0

    def requests(self) -> Iterator[tuple[int, bytes]]:
        for number, text in enumerate(self.texts):
            self.made += 1
            yield number, text if isinstance(text, bytes) else body_of(text)

    def deliver(self, number: int, completion: Completion) -> None:
        assert number not in self.outcomes, "a request has one outcome"
        self.outcomes[number] = completion
        if self.after is not None:
            self.after(number, completion)

    async def run(self) -> None:
        endpoint = resolve(base_url=self.base_url, api_key=KEY)
        line = line_to(endpoint, self.policy.caps)
        crew = Crew(
            line, endpoint, self.requests(), self.read, self.deliver, self.policy, self.tally, budget=self.budget
        )
        try:
            await crew.run()
        finally:
            assert line.pacer.in_flight == 0 or not line.idle, "what was sent has to be counted back"

    @property
    def statuses(self) -> list[str]:
        return [self.outcomes[number].status for number in sorted(self.outcomes)]

    @property
    def attempts(self) -> int:
        return sum(outcome.attempts for outcome in self.outcomes.values())

    def error(self, number: int) -> str:
        error = self.outcomes[number].error
        assert error is not None
        return error


def alone(work: Awaitable[T]) -> T:
    """Run on a loop of its own, whose lines are closed at the end."""

    async def main() -> T:
        try:
            return await work
        finally:
            await close_lines()

    return asyncio.run(main())


def ask(server: SimulatedServer | ThreadsServer, texts: Sequence[str | bytes], policy: Policy | None = None) -> Ran:
    """Ask for all of the texts, and wait."""
    ran = Ran(texts, policy or Policy(), server.base_url)
    alone(ran.run())
    return ran


@asynccontextmanager
async def asking(server: SimulatedServer, texts: Sequence[str], policy: Policy | None = None) -> AsyncIterator[Ran]:
    """Ask, and do what the block says meanwhile; at its end the run is waited for."""
    ran = Ran(texts, policy or Policy(), server.base_url)
    task = asyncio.create_task(ran.run())
    try:
        yield ran
        await task
    finally:
        task.cancel()
        await asyncio.wait({task})
        await close_lines()


def received(server: SimulatedServer, text: str) -> int:
    return sum(request.text == text for request in server.requests())


@pytest.fixture
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let retries follow within some hundredths of a second, where the waiting is not what is tested."""
    monkeypatch.setattr(failures, "BACKOFF_BASE_S", 0.01)


# ---- what is tried again


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_a_status_that_may_pass_is_tried_again(server: SimulatedServer, status: int) -> None:
    server.reset(status_all=status)

    async def main() -> Ran:
        async with asking(server, rows(3)) as ran:
            await server.until(received=3)
            server.change(status_all=None)
        return ran

    ran = asyncio.run(main())
    assert ran.statuses == ["ok"] * 3
    assert ran.attempts == server.stats().received
    assert set(server.answered_by_content().values()) == {1}


@pytest.mark.parametrize("fault", ["reset", "html", "bad_json", "truncated_body", "error_in_200"])
def test_a_reply_that_is_no_answer_is_tried_again(server: SimulatedServer, fault: str) -> None:
    server.reset(**{f"p_{fault}": 1.0})

    async def main() -> Ran:
        async with asking(server, rows(3)) as ran:
            await server.until(**{fault: 3})
            server.change(**{f"p_{fault}": 0.0})
        return ran

    ran = asyncio.run(main())
    assert ran.statuses == ["ok"] * 3
    assert ran.attempts == server.stats().received
    assert set(server.answered_by_content().values()) == {1}


def test_a_reply_that_costs_something_and_holds_no_answer_is_paid_for_thrice_at_most(server: SimulatedServer) -> None:
    server.reset(p_empty_choices=1.0)
    ran = ask(server, ["a", "b"])
    assert ran.statuses == ["failed"] * 2
    assert [ran.outcomes[number].attempts for number in range(2)] == [EMPTY] * 2
    assert server.stats().received == 2 * EMPTY
    assert all("holds no answer" in (ran.outcomes[number].error or "") for number in range(2))


def test_what_replies_without_an_answer_cost_is_in_their_rows_tokens(server: SimulatedServer) -> None:
    server.reset(p_empty_choices=0.5)
    ran = ask(server, [f"row {number:03d}" for number in range(60)])
    outcomes = [ran.outcomes[number] for number in range(60)]
    a_reply = min(each.prompt_tokens or 0 for each in outcomes)
    assert [each.prompt_tokens for each in outcomes] == [a_reply * each.attempts for each in outcomes]
    assert {each.attempts for each in outcomes} == {1, 2, 3}
    assert {each.status for each in outcomes} == {"ok", "failed"}
    assert ran.tally.failures.total() == ran.tally.sent - ran.statuses.count("ok")


def test_a_run_stops_where_the_first_rows_are_all_paid_for_and_have_no_answer(server: SimulatedServer) -> None:
    server.reset(p_empty_choices=1.0)
    with pytest.raises(EndpointError, match=f"the first {ALIKE} rows were all refused: the reply holds no answer"):
        ask(server, rows(500), SEQUENTIAL)
    assert server.stats().received == EMPTY * ALIKE


def test_a_timeout_of_the_users_that_the_queue_is_too_long_for_makes_the_queue_shorter(server: SimulatedServer) -> None:
    server.reset(slots=4, latency_s=0.3)
    ran = ask(server, rows(80), Policy(timeout_s=0.8))
    assert ran.statuses == ["ok"] * 80
    assert ran.tally.sent < 3 * 80  # as many as wait at the start, once more, and a few


@pytest.mark.parametrize(("threads", "latency_s", "count"), [(1, 0.02, 80), (4, 0.1, 200), (1, 0.5, 4)])
def test_a_server_of_few_connections_answers_each_row_once(threads: int, latency_s: float, count: int) -> None:
    with ThreadsServer(threads, latency_s) as server:
        ran = ask(server, rows(count))
        assert ran.statuses == ["ok"] * count
        assert set(server.answered.values()) == {1}
        assert ran.tally.sent == count


@pytest.mark.usefixtures("quick_backoff")
def test_with_every_fault_at_once_each_row_is_answered_once(server: SimulatedServer) -> None:
    faults = ("500", "503", "reset", "html", "bad_json", "truncated_body", "empty_choices", "error_in_200")
    server.reset(latency_s=0.01, **{f"p_{fault}": 0.04 for fault in faults})
    ran = ask(server, rows(300))
    assert ran.statuses == ["ok"] * 300
    assert list(server.answered_by_content().values()) == [1] * 300
    assert ran.attempts == ran.tally.sent == server.stats().received
    assert ran.tally.failures.total() == ran.tally.sent - 300


@pytest.mark.usefixtures("quick_backoff")
def test_the_attempts_of_an_answer_are_counted(server: SimulatedServer) -> None:
    ran = ask(server, ["[[fail_first=2]] a", "b"])
    assert [ran.outcomes[0].attempts, ran.outcomes[1].attempts] == [3, 1]


@pytest.mark.usefixtures("quick_backoff")
def test_latency_is_that_of_the_attempt_that_answered(server: SimulatedServer) -> None:
    server.reset(latency_s=0.05)
    ran = ask(server, ["[[fail_first=2]] a"])
    assert ran.outcomes[0].latency_s == pytest.approx(0.05, abs=0.045)


def test_the_pacer_knows_each_answer_by_the_moment_it_was_told_of_the_request(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[float] = []
    answered: list[float] = []
    is_sent, is_answered = Pacer.sent, Pacer.answered

    def note_sent(pacer: Pacer, now: float, tokens: int, **rest: object) -> None:
        sent.append(now)
        is_sent(pacer, now, tokens, **rest)

    def note_answered(pacer: Pacer, now: float, *, latency_s: float, **rest: object) -> None:
        answered.append(now - latency_s)
        is_answered(pacer, now, latency_s=latency_s, **rest)

    monkeypatch.setattr(Pacer, "sent", note_sent)
    monkeypatch.setattr(Pacer, "answered", note_answered)
    ask(server, rows(200))
    assert sorted(answered) == pytest.approx(sorted(sent), abs=1e-6)


def test_x_should_retry_false_gives_up_what_would_be_tried_again(server: SimulatedServer) -> None:
    server.reset(error_headers={"x-should-retry": "false"})
    ran = ask(server, ["[[status=503]]", "fine"])
    assert ran.statuses == ["failed", "ok"]
    assert server.stats().received == 2


def test_x_should_retry_true_tries_again_what_would_be_given_up(server: SimulatedServer) -> None:
    server.reset(error_headers={"x-should-retry": "true"})
    ran = ask(server, ["[[status=400]]", "fine"], Policy(max_attempts=2))
    assert ran.statuses == ["failed", "ok"]
    assert received(server, "[[status=400]]") == 2


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("unit", ["seconds", "ms", "date"])
def test_retry_after_is_waited_out_in_full(server: SimulatedServer, unit: str, status: int) -> None:
    server.reset(status_all=status, retry_after=unit, retry_after_s=0.4)

    async def main() -> None:
        async with asking(server, ["a"]):
            await server.until(received=1)
            server.change(status_all=None)

    asyncio.run(main())
    first, second = server.requests()
    waited_s = second.received_s - first.received_s
    assert 0.4 <= waited_s < 2.0  # a date has whole seconds


def test_a_retry_after_beyond_patience_ends_the_run_and_says_until_when(server: SimulatedServer) -> None:
    server.reset(status_all=429, retry_after="seconds", retry_after_s=7200)
    until = time.strftime("%Y-%m-%d %H:", time.localtime(time.time() + 7200))
    with pytest.raises(EndpointError, match=rf"at {until}.* in 7,200 s"):
        ask(server, rows(500))
    assert server.stats().received <= START


@pytest.mark.usefixtures("quick_backoff")
def test_one_servers_page_of_maintenance_ends_no_run_that_others_answer(server: SimulatedServer) -> None:
    server.reset(latency_s=0.02, retry_after="seconds", retry_after_s=3600)
    ran = ask(server, [*rows(20), "[[status=503]]", *rows(40)[20:]], Policy(Caps(max_concurrency=4), max_attempts=2))
    assert ran.statuses == ["ok"] * 20 + ["failed"] + ["ok"] * 20


@pytest.mark.usefixtures("quick_backoff")
def test_maintenance_of_every_server_ends_the_run_and_says_until_when(server: SimulatedServer) -> None:
    server.reset(retry_after="seconds", retry_after_s=3600, schedule=[(0.2, {"status_all": 503})], latency_s=0.02)
    with pytest.raises(EndpointError, match=r"asks to come back at .* in 3,600 s"):
        ask(server, rows(5000), Policy(Caps(max_concurrency=10)))


# ---- what ends a row


@pytest.mark.parametrize(
    ("wish", "status"),
    [
        ("400", "failed"),
        ("413", "failed"),
        ("422", "failed"),
        ("400:context_length_exceeded", "failed"),
        ("400:content_filter", "filtered"),
    ],
)
def test_a_request_that_cannot_succeed_ends_its_row_alone(server: SimulatedServer, wish: str, status: str) -> None:
    ran = ask(server, ["before", f"[[status={wish}]]", "after"])
    assert ran.statuses == ["ok", status, "ok"]
    assert f"HTTP {wish[:3]}" in ran.error(1)
    assert server.stats().received == 3


@pytest.mark.usefixtures("quick_backoff")
def test_a_row_that_always_fails_is_asked_max_attempts_times(server: SimulatedServer) -> None:
    texts = ["[[status=500]]", *rows(20)]
    ran = ask(server, texts, Policy(max_attempts=3))
    assert ran.statuses == ["failed"] + ["ok"] * 20
    assert received(server, texts[0]) == 3
    assert ran.outcomes[0] == Completion(
        status="failed", error="HTTP 500: The simulated server was told to answer 500.", attempts=3
    )


@pytest.mark.usefixtures("quick_backoff")
def test_rows_that_always_fail_are_not_taken_for_an_outage_when_only_they_are_left(server: SimulatedServer) -> None:
    ran = ask(server, [*rows(20), *(f"[[status=500]] {number}" for number in range(9))], Policy(max_attempts=2))
    assert ran.statuses == ["ok"] * 20 + ["failed"] * 9
    assert {ran.outcomes[number].attempts for number in range(20, 29)} <= {2, 3, 4}


def test_a_refusal_weighs_less_while_others_are_answered(server: SimulatedServer) -> None:
    server.reset(latency_s=0.02, retry_after="ms", retry_after_s=0.03)
    ran = ask(server, ["[[status=429]]", *rows(15)], Policy(Caps(max_concurrency=4), max_attempts=2))
    assert ran.statuses == ["failed"] + ["ok"] * 15
    assert ran.outcomes[0].attempts > 2


@pytest.mark.usefixtures("quick_backoff")
def test_a_row_that_meets_full_slots_weighs_that_less_while_others_are_answered(server: SimulatedServer) -> None:
    # For a second two of three attempts fail. By three strikes a quarter of the rows is lost in it: 244 to 296 came
    # through, and where three such failures make one strike 369 to 400.
    server.reset(p_503=0.5, p_reset=0.3, schedule=[(1.0, {"p_503": 0.0, "p_reset": 0.0})])
    ran = ask(server, rows(400), Policy(Caps(max_concurrency=20), max_attempts=3))
    assert ran.statuses.count("ok") >= 340


# ---- what ends the run


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ({"require_key": "another"}, "api_key="),
        ({"status_all": 402}, "billing"),
        ({"status_all": 403}, "403"),
        ({"status_all": 429, "error_code": "insufficient_quota"}, "quota"),
        ({"valid_models": ["another"]}, "check model="),
        ({"p_error_in_200": 1.0, "error_code": "insufficient_quota"}, "quota"),
    ],
    ids=["401", "402", "403", "insufficient_quota", "model_not_found", "quota in a 200"],
)
def test_what_no_row_can_mend_ends_the_run_at_once(
    server: SimulatedServer, behaviour: dict[str, object], words: str
) -> None:
    server.reset(**behaviour)
    with pytest.raises(EndpointError, match=words) as caught:
        ask(server, rows(1000))
    assert server.base_url + "/chat/completions" in str(caught.value)
    assert server.stats().received <= START


@pytest.mark.parametrize("wish", ["403", "404"])
@pytest.mark.parametrize("place", [0, 60, 119])
def test_a_row_that_a_firewall_or_a_router_refuses_fails_alone_where_others_are_answered(
    server: SimulatedServer, wish: str, place: int
) -> None:
    server.reset(latency_s=0.02)
    texts = rows(120)
    texts[place] = f"[[status={wish}]]"

    async def main() -> Ran:
        await Ran(["first"], base_url=server.base_url).run()
        async with asking(server, texts) as ran:
            pass
        return ran

    ran = asyncio.run(main())
    assert [number for number in range(120) if ran.outcomes[number].status == "failed"] == [place]
    assert f"HTTP {wish}" in ran.error(place)
    assert received(server, texts[place]) == 1


def test_many_rows_that_are_refused_at_once_fail_alone_though_answers_take_longer(server: SimulatedServer) -> None:
    server.reset(latency_s=0.3)
    texts = ["first", *(f"[[status=404]] {number}" if number % 4 == 0 else f"{number}" for number in range(80))]
    policy = Policy(Caps(max_concurrency=8))
    ran = Ran(texts, policy, server.base_url)

    async def main() -> None:
        await Ran(["first"], policy, server.base_url).run()
        await ran.run()

    alone(main())
    assert ran.statuses == ["failed" if text.startswith("[[") else "ok" for text in texts]


def test_a_run_of_which_nothing_is_answered_ends_though_the_endpoint_answered_another(server: SimulatedServer) -> None:
    async def main() -> None:
        await Ran(["first"], base_url=server.base_url).run()
        async with asking(server, ["[[status=404]]", "[[status=404]] b"]):
            pass

    with pytest.raises(EndpointError, match="HTTP 404"):
        asyncio.run(main())


@pytest.mark.parametrize("latency_s", [0.0, 0.05])
def test_a_key_that_may_no_more_half_way_fails_no_row_and_ends_the_run_soon(
    server: SimulatedServer, latency_s: float
) -> None:
    server.reset(latency_s=latency_s, schedule=[(0.3, {"status_all": 403})])
    ran = Ran(rows(100_000), base_url=server.base_url)
    with pytest.raises(EndpointError, match=r"HTTP 403: .*this key may not do this here"):
        alone(ran.run())
    assert set(ran.statuses) == {"ok"}
    assert server.stats().received - len(ran.outcomes) < 1500  # about twice what was in flight; they cost nothing


def test_a_base_url_without_v1_is_shown_as_built_and_hinted_at(server: SimulatedServer) -> None:
    ran = Ran(rows(100), base_url=server.base_url.removesuffix("/v1"))
    with pytest.raises(EndpointError, match="/v1") as caught:
        alone(ran.run())
    assert f"http://127.0.0.1:{server.port}/chat/completions" in str(caught.value)


def test_an_error_in_a_200_that_may_pass_is_tried_again(server: SimulatedServer) -> None:
    server.reset(p_error_in_200=1.0, error_code="502")
    ran = ask(server, rows(1), Policy(max_attempts=2))
    assert ran.statuses == ["failed"]
    assert server.stats().received == 2


def test_the_same_refusal_of_the_first_rows_ends_the_run(server: SimulatedServer) -> None:
    server.reset(status_all=422)
    with pytest.raises(EndpointError, match=f"first {ALIKE} rows were all refused: HTTP 422"):
        ask(server, rows(1000))
    assert server.stats().received < 2 * START


@pytest.mark.parametrize(
    "texts",
    [
        [f"[[status=422]] {number}" for number in range(ALIKE - 1)],
        ["fine", *(f"[[status=422]] {number}" for number in range(ALIKE + 10))],
        ["[[status=400]]", *(f"[[status=422]] {number}" for number in range(ALIKE + 10))],
    ],
    ids=["fewer rows", "an answer among them", "another status among them"],
)
def test_refusals_that_may_be_the_rows_own_end_only_the_rows(server: SimulatedServer, texts: list[str]) -> None:
    ran = ask(server, texts, SEQUENTIAL)
    assert ran.statuses == ["ok" if text == "fine" else "failed" for text in texts]


def test_what_deliver_raises_stops_the_run_and_answers_in_flight_are_kept(server: SimulatedServer) -> None:
    server.reset(latency_s=0.1)

    def stop(number: int, completion: Completion) -> None:
        if completion.status == "failed":
            raise ValueError("stop here")

    texts = ["[[status=400]]", *rows(1000)]
    ran = Ran(texts, base_url=server.base_url, after=stop)
    with pytest.raises(ValueError, match="stop here"):
        alone(ran.run())
    stats = server.stats()
    assert 0 < stats.answered == len(ran.outcomes) - 1
    assert stats.received <= START


# ---- concurrency


def test_max_concurrency_1_asks_in_row_order_one_at_a_time(server: SimulatedServer) -> None:
    server.reset(latency_s=0.002)
    texts = rows(40)
    ran = ask(server, texts, SEQUENTIAL)
    assert ran.statuses == ["ok"] * 40
    assert [request.text for request in server.requests()] == texts
    assert server.stats().max_in_flight == 1


@pytest.mark.parametrize("behaviour", [{}, {"retry_after": "ms", "retry_after_s": 0.05}], ids=["500", "Retry-After"])
@pytest.mark.usefixtures("quick_backoff")
def test_max_concurrency_1_keeps_row_order_through_retries(
    server: SimulatedServer, behaviour: dict[str, object]
) -> None:
    server.reset(**behaviour, p_503=0.2, p_reset=0.1)
    texts = ["a", "[[fail_first=2]] b", "c", "[[fail_first=1]] d", *rows(20)]
    ran = ask(server, texts, SEQUENTIAL)
    assert ran.statuses == ["ok"] * len(texts)
    order = [request.text for request in server.requests() if request.outcome == "answered"]
    assert order == texts
    assert list(dict.fromkeys(request.text for request in server.requests())) == texts
    assert server.stats().max_in_flight == 1


@pytest.mark.usefixtures("quick_backoff")
def test_max_concurrency_is_never_passed(server: SimulatedServer) -> None:
    server.reset(latency_s=0.02, p_500=0.1, p_slow=0.05, slow_s=0.1)
    ran = ask(server, rows(200), Policy(Caps(max_concurrency=5)))
    assert ran.statuses == ["ok"] * 200
    assert server.stats().max_in_flight == 5


def test_max_concurrency_holds_across_runs_at_once(server: SimulatedServer) -> None:
    server.reset(latency_s=0.02)
    policy = Policy(Caps(max_concurrency=5))
    both = [Ran([f"{name} {number}" for number in range(60)], policy, server.base_url) for name in "ab"]

    async def main() -> None:
        await asyncio.gather(*(ran.run() for ran in both))

    alone(main())
    assert [ran.statuses for ran in both] == [["ok"] * 60] * 2
    assert server.stats().max_in_flight == 5


# ---- time


def test_a_fixed_timeout_gives_an_attempt_up_and_asks_again(server: SimulatedServer) -> None:
    ran = ask(server, ["[[hang_first=1]] a", "b"], Policy(timeout_s=0.3))
    assert ran.statuses == ["ok", "ok"]
    assert [ran.outcomes[0].attempts, ran.outcomes[1].attempts] == [2, 1]
    assert ran.tally.failures["timeout"] == server.stats().failed["hang"] == 1


@pytest.mark.usefixtures("quick_backoff")
def test_a_row_that_always_hangs_fails_and_says_for_how_long(server: SimulatedServer) -> None:
    ran = ask(server, ["[[hang_first=9]] a", "b"], Policy(max_attempts=2, timeout_s=0.2))
    assert ran.statuses == ["failed", "ok"]
    assert ran.error(0).startswith("no answer within 0.")


def test_hung_requests_are_rescued_once_others_show_how_long_one_takes(server: SimulatedServer) -> None:
    server.reset(latency_s=0.05)
    texts = [*(f"[[hang_first=1]] {number}" for number in range(10)), *rows(100)]
    began = time.monotonic()
    ran = ask(server, texts)
    assert ran.statuses == ["ok"] * 110
    assert ran.tally.failures == {"timeout": 10}
    assert 5.0 <= time.monotonic() - began < 10.0
    assert list(server.answered_by_content().values()) == [1] * 110


def test_where_all_that_is_in_flight_is_lost_at_once_it_is_soon_sent_anew(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "FLOOR_S", 0.5)
    server.reset(latency_s=0.05, slots=32, schedule=[(0.5, {"p_hang": 1.0}), (0.8, {"p_hang": 0.0})])
    began = time.monotonic()
    ran = ask(server, rows(1500))
    assert ran.statuses == ["ok"] * 1500
    assert ran.tally.failures["timeout"] >= 16
    assert set(server.answered_by_content().values()) == {1}
    assert time.monotonic() - began < 10.0  # 2.3 s of work, 0.5 s of doubt, and the trials


def test_slow_answers_are_never_cut_off(server: SimulatedServer) -> None:
    server.reset(latency_s=0.05, p_slow=0.01, slow_s=2.0)
    ran = ask(server, rows(1000))
    assert ran.statuses == ["ok"] * 1000
    stats = server.stats()
    assert (stats.received, stats.answered, stats.abandoned) == (1000, 1000, 0)


def test_of_rows_that_are_slow_among_fast_ones_one_is_asked_twice(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "FLOOR_S", 0.5)
    server.reset(latency_s=0.05)
    texts = [f"[[sleep=1.2]] {number}" if number % 50 == 0 else f"row {number}" for number in range(2000)]
    ran = ask(server, texts)
    assert ran.statuses == ["ok"] * 2000
    assert server.stats().received <= 2001
    assert set(server.answered_by_content().values()) == {1}  # the first attempt was waited for, and taken


def test_answers_that_are_slow_by_chance_are_waited_for_once_one_has_come(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "FLOOR_S", 0.3)
    server.reset(latency_s=0.05, slots=32, p_slow=0.02, slow_s=2.0)
    ran = ask(server, rows(4000))
    assert ran.statuses == ["ok"] * 4000
    slow = 0.02 * 4000
    assert ran.tally.failures["timeout"] < 0.5 * slow  # those of the first seconds, and no more


def test_what_an_overdue_attempt_answers_after_all_ends_the_one_beside_it(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "FLOOR_S", 0.3)
    server.reset(latency_s=0.02)
    ran = ask(server, [*rows(20), "[[sleep=3]] slow"])
    assert ran.statuses == ["ok"] * 21
    outcome = ran.outcomes[20]
    assert (outcome.attempts, ran.tally.maybe_billed, ran.tally.failures["timeout"]) == (2, 1, 1)
    assert outcome.latency_s == pytest.approx(3.0, abs=0.5)  # not 0.3 s more, and a retry's


def test_a_lone_slow_row_is_asked_twice_at_most(server: SimulatedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timeouts, "FLOOR_S", 0.3)
    ran = ask(server, ["fast", "[[sleep=3]] slow"])
    assert ran.statuses == ["ok"] * 2
    assert server.stats().received <= 3


@pytest.mark.parametrize("second", [400, 403])
def test_a_row_whose_second_attempt_is_refused_has_the_answer_of_its_first(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch, second: int
) -> None:
    monkeypatch.setattr(timeouts, "FLOOR_S", 0.3)
    slow = "[[sleep=3]] slow"

    async def main() -> Ran:
        async with asking(server, [*rows(50), slow], Policy(max_attempts=2)) as ran:
            await server.until(received=51)
            server.change(status_all=second)
            await asyncio.sleep(2.0)
            server.change(status_all=None)
        return ran

    ran = alone(main())
    assert ran.statuses == ["ok"] * 51
    assert set(server.answered_by_content().values()) == {1}


def test_a_row_fails_when_none_of_its_attempts_is_open_any_more(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "FLOOR_S", 0.3)
    monkeypatch.setattr(engine, "DOUBT_S", 1.0)
    began = time.monotonic()
    ran = ask(server, [*rows(50), "[[hang_first=1]][[status=400]] lost"])
    assert ran.statuses == ["ok"] * 50 + ["failed"]
    assert time.monotonic() - began < 4.0


def test_what_comes_for_a_row_that_has_its_answer_is_read_no_more(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "FLOOR_S", 0.3)
    given: set[int] = set()

    def read_once(payload: Any, *, number: int, **told: Any) -> Completion | None:
        assert number not in given, "what was delivered is there no more"  # as with the texts of an embedding
        return read(payload, number=number, **told)

    async def main() -> Ran:
        ran = Ran([*rows(400), "[[sleep=4]] last"], Policy(Caps(max_concurrency=8)), server.base_url, read=read_once)
        ran.after = lambda number, _: given.add(number)
        task = asyncio.create_task(ran.run())
        await server.until(answered=40)
        server.change(p_slow=1.0, slow_s=2.5)
        await server.until(in_flight=8)
        await asyncio.sleep(0.2)
        server.change(p_slow=0.0)
        await task
        return ran

    ran = alone(main())
    assert ran.statuses == ["ok"] * 401
    assert ran.tally.failures["timeout"] >= 1
    assert max(server.answered_by_content().values()) == 2  # the server did answer one that was no longer waited for


def test_a_row_that_two_attempts_were_denied_for_is_one_row(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "FLOOR_S", 0.3)
    ran = ask(server, [*rows(60), "[[sleep=1]][[status=403]] denied", "[[sleep=3]] slow"])
    assert ran.statuses == ["ok"] * 60 + ["failed", "ok"]


def test_where_lost_requests_fill_a_cap_one_of_them_makes_room_for_a_trial(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "FLOOR_S", 0.5)
    server.reset(latency_s=0.02)
    texts = [f"[[hang_first=1]] {number}" if number % 10 == 9 else f"row {number}" for number in range(120)]
    began = time.monotonic()
    ran = ask(server, texts, Policy(Caps(max_concurrency=4)))
    assert ran.statuses == ["ok"] * 120
    assert time.monotonic() - began < 20.0  # a trial that is never sent would be waited for a minute


def test_a_run_does_not_wait_for_what_its_rows_no_longer_wait_for(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "FLOOR_S", 0.3)

    async def main() -> float:
        began = time.monotonic()
        async with asking(server, [*rows(50), "[[hang_first=1]] lost"]) as ran:
            pass
        took_s = time.monotonic() - began
        assert ran.outcomes[50].attempts == 2
        await server.until(open_connections=0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return took_s

    assert alone(main()) < 2.0


def test_an_overdue_row_is_charged_twice_at_most_and_its_budget_comes_back(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "FLOOR_S", 0.3)
    budget = Budget(bound=Bound(100), max_tokens=10**6)
    ran = Ran([*rows(50), "[[sleep=3]] slow"], base_url=server.base_url, budget=budget)
    alone(ran.run())
    assert ran.tally.failures["timeout"] == 1
    assert ran.statuses == ["ok"] * 51
    assert budget.idle
    used = sum((each.prompt_tokens or 0) + (each.completion_tokens or 0) for each in ran.outcomes.values())
    assert used < budget.spent.tokens <= used + budget.bound(body_of("[[sleep=3]] slow")).tokens


def test_where_the_budget_has_no_room_for_a_second_attempt_the_first_is_waited_for(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "FLOOR_S", 0.3)
    slow = "[[sleep=3]] slow"
    budget = Budget(bound=Bound(100), max_tokens=50 * 50 + int(1.5 * Bound(100)(body_of(slow)).tokens))
    ran = Ran([*rows(50), slow], base_url=server.base_url, budget=budget)
    alone(ran.run())
    assert ran.statuses == ["ok"] * 51
    assert budget.idle


def test_what_was_set_aside_for_a_row_that_waits_for_its_turn_is_free_again_when_the_run_is_cancelled(
    server: SimulatedServer,
) -> None:
    budget = Budget(bound=Bound(10), max_tokens=10**9)
    ran = Ran(rows(5), Policy(Caps(rpm=1)), server.base_url, budget=budget)

    async def main() -> None:
        task = asyncio.create_task(ran.run())
        await server.until(answered=1)
        task.cancel()
        await asyncio.wait({task})

    alone(main())
    assert budget.idle


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="signals")
def test_what_an_endpoint_that_stands_still_has_taken_is_waited_for(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeouts, "FLOOR_S", 0.5)
    server.reset(latency_s=0.1)

    def stand_still() -> None:
        server.wait_for(answered=300)
        os.kill(server.pid, signal.SIGSTOP)
        time.sleep(2.5)
        os.kill(server.pid, signal.SIGCONT)

    thread = threading.Thread(target=stand_still)
    thread.start()
    ran = ask(server, rows(2000))
    thread.join()
    assert ran.statuses == ["ok"] * 2000
    assert server.stats().received <= 2003  # one row at a time tells whether it still does


# ---- outages


def test_an_outage_fails_no_row_and_is_met_with_few_requests(server: SimulatedServer) -> None:
    server.reset(latency_s=0.05, slots=32, schedule=[(1.0, {"status_all": 503}), (3.0, {"status_all": None})])
    ran = ask(server, rows(1500))
    assert ran.statuses == ["ok"] * 1500
    assert set(server.answered_by_content().values()) == {1}
    course = server.stats().received_course
    assert sum(course[10:30]) < 100 + START
    assert server.stats().failed["503"] < 100 + START


def test_a_server_that_is_killed_and_comes_back_loses_no_row(server: SimulatedServer) -> None:
    server.reset(latency_s=0.05)

    async def main() -> Ran:
        async with asking(server, rows(1500)) as ran:
            await server.until(answered=300)
            server.kill()
            await asyncio.to_thread(server.start)
        return ran

    ran = asyncio.run(main())
    assert ran.statuses == ["ok"] * 1500
    assert ran.tally.failures.total() > 0


def test_an_outage_at_the_end_of_one_run_is_not_held_against_the_next(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FIRST_PATIENCE_S", 1.5)
    server.reset(status_all=502)

    async def main() -> Ran:
        with pytest.raises(EndpointError, match="no answer from"):
            await Ran(rows(100), base_url=server.base_url).run()
        server.reset(latency_s=0.3)  # longer than a tick, so that patience is looked at before the first answer
        ran = Ran(rows(10), base_url=server.base_url)
        await ran.run()
        return ran

    assert alone(main()).statuses == ["ok"] * 10


def test_one_lost_connection_is_no_outage_while_slow_requests_are_at_work(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FIRST_PATIENCE_S", 0.2)
    server.reset(latency_s=0.8)

    async def main() -> Ran:
        async with asking(server, ["a"]) as ran:
            await server.until(in_flight=1)
            server.reset(latency_s=0.8)  # which closes the connections
        return ran

    assert asyncio.run(main()).statuses == ["ok"]


def test_a_server_that_says_503_while_it_loads_is_waited_for(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FIRST_PATIENCE_S", 0.3)
    server.reset(status_all=503, schedule=[(1.0, {"status_all": None})])
    assert ask(server, rows(20)).statuses == ["ok"] * 20


def test_a_retry_after_is_waited_out_though_it_is_longer_than_patience(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FIRST_PATIENCE_S", 0.3)
    server.reset(status_all=502, error_headers={"retry-after-ms": "1000"})

    async def main() -> Ran:
        async with asking(server, rows(10)) as ran:
            await server.until(received=10)
            server.change(status_all=None)
        return ran

    assert asyncio.run(main()).statuses == ["ok"] * 10


@pytest.mark.parametrize("answered_before", [0, 5])
def test_429s_without_end_end_the_run_in_the_endpoints_own_words(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch, answered_before: int
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.3)
    texts = [*rows(answered_before), *(f"[[status=429]] {number}" for number in range(20))]
    ran = Ran(texts, Policy(Caps(max_concurrency=4)), server.base_url)
    with pytest.raises(EndpointError, match=r"refused every request for .* Rate limit reached"):
        alone(ran.run())
    assert ran.statuses == ["ok"] * answered_before


def test_a_limit_that_lets_a_row_through_now_and_then_ends_no_run(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.5)
    server.reset(requests_per_min=600, request_burst=1, retry_after="ms")
    assert ask(server, rows(12)).statuses == ["ok"] * 12


def test_429s_beside_a_slow_request_at_work_end_no_run(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "PATIENCE_S", 0.1)
    refusing = [(0.05, {"status_all": 429}), (0.7, {"status_all": None})]
    server.reset(latency_s=0.8, retry_after="ms", retry_after_s=0.05, schedule=refusing)
    assert ask(server, ["slow", "[[fail_first=1]]"], Policy(max_attempts=50)).statuses == ["ok"] * 2


@dataclass
class Unanswered:
    """How a run went that nobody ever answered."""

    error: EndpointError
    seconds: float
    url: str


@pytest.fixture(scope="module")
def unanswered() -> dict[str, Unanswered]:
    """Runs to endpoints that are not there, all at the same time, since each of them takes its patience."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        refusing = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    async def one(base_url: str, count: int) -> Unanswered:
        began = time.monotonic()
        with pytest.raises(EndpointError) as caught:
            await Ran(rows(count), base_url=base_url).run()
        return Unanswered(caught.value, time.monotonic() - began, base_url + "/chat/completions")

    async def all_of_them() -> dict[str, Unanswered]:
        try:
            lone, many, nowhere = await asyncio.gather(
                one(refusing.replace("127.0.0.1", "localhost"), 1),
                one(refusing, 1000),
                one("http://no-such-host.invalid/v1", 5),
            )
        finally:
            await close_lines()
        return {"one row": lone, "1,000 rows": many, "no such host": nowhere}

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("case", ["one row", "1,000 rows", "no such host"])
def test_an_endpoint_that_is_not_there_is_said_within_15_s_with_what_to_check(
    unanswered: dict[str, Unanswered], case: str
) -> None:
    result = unanswered[case]
    assert result.seconds < 15
    for words in (result.url, "base_url=", "the server runs", "network"):
        assert words in str(result.error)
    assert str(result.error).count("no reply") == 1


# ---- memory, and what is left behind


def test_rows_that_wait_are_neither_tasks_nor_bodies(server: SimulatedServer) -> None:
    server.reset(latency_s=0.02)
    gc.collect()
    seen: list[int] = []

    def look(number: int, completion: Completion) -> None:
        if len(ran.outcomes) == 500:
            jobs = sum(type(one) is Job for one in gc.get_objects())
            seen.extend([len(asyncio.all_tasks()), jobs, ran.made - len(ran.outcomes)])
            raise ValueError("enough")

    ran = Ran(rows(20_000), base_url=server.base_url, after=look)
    with pytest.raises(ValueError, match="enough"):
        alone(ran.run())
    assert max(seen) < 500


def test_rows_do_not_pile_up_during_an_outage(server: SimulatedServer) -> None:
    server.reset(latency_s=0.02)

    async def main() -> int:
        ran = Ran(rows(20_000), base_url=server.base_url)
        task = asyncio.create_task(ran.run())
        await server.until(answered=500)
        server.change(status_all=503)
        begun = server.stats().failed.get("503", 0)
        await server.until(**{"503": begun + 3})  # the probes of an endpoint that is down
        task.cancel()
        await asyncio.wait({task})
        return ran.made - len(ran.outcomes)

    assert alone(main()) < 500


async def nothing_is_left(server: SimulatedServer, end: Callable[[asyncio.Task[None]], object]) -> Ran:
    """Run, let it end as `end` does it, and look at what is left."""
    loop = asyncio.get_running_loop()
    ran = Ran(rows(5000), base_url=server.base_url)
    task = asyncio.create_task(ran.run())
    await server.until(received=50)
    end(task)
    await asyncio.wait({task})
    with pytest.raises((EndpointError, asyncio.CancelledError)):
        task.result()
    for _ in range(5):  # the SDK closes a client that is collected meanwhile, an earlier test's too, in its own task
        await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert ran.tally.in_flight == 0
    await close_lines()
    await server.until(open_connections=0)
    assert not [timer for timer in loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
    return ran


def test_a_run_that_ended_by_an_error_leaves_no_task_timer_or_socket(server: SimulatedServer) -> None:
    server.reset(latency_s=0.05, p_500=0.2)
    asyncio.run(nothing_is_left(server, lambda _: server.change(status_all=401)))


def test_an_interrupted_run_keeps_what_is_answered_within_the_grace_and_leaves_nothing(server: SimulatedServer) -> None:
    server.reset(latency_s=0.3)
    ran = asyncio.run(nothing_is_left(server, asyncio.Task.cancel))
    assert len(ran.outcomes) == server.stats().answered > 0
    assert server.stats().abandoned == 0


def test_an_interrupt_waits_for_no_answer_longer_than_the_grace(server: SimulatedServer) -> None:
    server.reset(latency_s=30)
    began = time.monotonic()
    asyncio.run(nothing_is_left(server, asyncio.Task.cancel))
    assert engine.GRACE_S <= time.monotonic() - began < engine.GRACE_S + 1.5


def test_a_second_interrupt_does_not_wait(server: SimulatedServer) -> None:
    server.reset(latency_s=30)

    def twice(task: asyncio.Task[None]) -> None:
        task.cancel()
        asyncio.get_running_loop().call_later(0.05, task.cancel)

    began = time.monotonic()
    asyncio.run(nothing_is_left(server, twice))
    assert time.monotonic() - began < engine.GRACE_S


@pytest.mark.parametrize("policy", [Policy(), SEQUENTIAL], ids=["many in flight", "sequential"])
def test_an_interrupt_while_a_retry_after_is_waited_out_returns_at_once(
    server: SimulatedServer, policy: Policy
) -> None:
    server.reset(status_all=429, retry_after="seconds", retry_after_s=60)

    async def main() -> float:
        task = asyncio.create_task(Ran(rows(100), policy, server.base_url).run())
        await server.until(refused=1)
        await server.until(in_flight=0)
        began = time.monotonic()
        task.cancel()
        await asyncio.wait({task})
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return time.monotonic() - began

    assert alone(main()) < engine.GRACE_S


def test_a_fault_of_ours_stops_the_run_and_gives_its_place_back(server: SimulatedServer) -> None:
    def broken(payload: object, **_: object) -> Completion | None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        alone(Ran(rows(100), base_url=server.base_url, read=broken).run())


def test_no_requests_at_all_is_a_run_too(server: SimulatedServer) -> None:
    assert ask(server, []).outcomes == {}
    assert server.stats().received == 0


@pytest.mark.usefixtures("quick_backoff")
def test_every_request_gets_its_own_answer(server: SimulatedServer) -> None:
    server.reset(latency_s=0.005, latency_sigma=1.0, p_500=0.1)
    texts = rows(300)
    ran = ask(server, texts)
    assert [ran.outcomes[number].text for number in range(300)] == [f"echo: {text}" for text in texts]


def test_a_key_that_the_server_quotes_is_not_in_the_runs_error(server: SimulatedServer) -> None:
    server.reset(valid_models=["another"])
    with pytest.raises(EndpointError, match=r"The model `\*\*\*` does not exist") as caught:
        ask(server, [body_of("a", model=KEY)])
    assert KEY not in str(caught.value)


def test_a_key_that_the_server_quotes_is_not_in_a_rows_error(server: SimulatedServer) -> None:
    ran = ask(server, [body_of("a", role=KEY)])
    assert ran.statuses == ["failed"]
    assert "Invalid value: '***'" in ran.error(0)
