"""Several servers with the same model: all kept full, and none missed when it dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llmframe
from llmframe.errors import ConfigurationError, EndpointError
from llmframe.outages import PROBE_S, SUSPECT
from llmframe.replicas import REST_S, Rota, Sign, resolve
from tests.server import SimulatedServer, Stats

URLS = ["http://one:8000/v1", "http://two:8000/v1", "http://three:8000/v1"]


@pytest.fixture(scope="module")
def _processes() -> Iterator[list[SimulatedServer]]:
    made = [SimulatedServer() for _ in range(3)]
    yield made
    for server in made:
        server.stop()


@pytest.fixture
def servers(_processes: list[SimulatedServer]) -> list[SimulatedServer]:
    """Three servers in processes of their own."""
    for server in _processes:
        if not server.running:
            server.start()
        server.reset(latency_s=0.05, slots=16, log=False)
    return _processes


def ask(servers: list[SimulatedServer], rows: int, **keywords: Any) -> pd.DataFrame:
    frame = pd.DataFrame({"text": [f"row {number}" for number in range(rows)]})
    urls = [server.base_url for server in servers]
    return llmframe.LLMFrame(frame).complete("text", model="m", base_url=urls, progress=False, **keywords)


# ---- whose turn it is


def test_the_emptiest_gets_the_next_and_equals_take_turns() -> None:
    rota = Rota(3)
    assert [rota.take(0.0) for _ in range(6)] == [0, 1, 2, 0, 1, 2]
    rota.give_back(1, 0.0, 1.0, "alive")
    assert rota.take(1.0) == 1


def test_a_refused_connection_takes_a_replica_out_at_once() -> None:
    rota = Rota(2)
    assert rota.give_back(rota.take(0.0), 0.0, 0.1, "away") == "out"
    assert {rota.take(0.2) for _ in range(5)} == {1}


def test_chance_failures_take_nobody_out() -> None:
    rota = Rota(2)
    for sign in ("sick", "sick", "alive") * 10:
        place = rota.take(0.0)
        while place != 0:
            place = rota.take(0.0)
        assert rota.give_back(0, 0.0, 0.1, sign) == ""  # type: ignore[arg-type]


def test_failures_in_a_row_take_a_replica_out_so_that_the_quickest_to_fail_does_not_draw_all_rows() -> None:
    rota = Rota(2)
    sent_there = 0
    for step in range(50):
        now = step / 1000
        place = rota.take(now)
        if place == 0:
            sent_there += 1
            rota.give_back(0, now, now, "sick")
    assert sent_there == SUSPECT


def test_one_probe_at_a_time_and_an_answer_to_it_puts_the_replica_back() -> None:
    rota = Rota(2)
    assert rota.take(0.0) == 0
    rota.give_back(0, 0.0, 0.0, "away")
    assert rota.take(PROBE_S - 0.01) == 1
    assert rota.take(PROBE_S) == 0
    assert rota.take(PROBE_S) == rota.take(PROBE_S) == 1
    assert rota.give_back(0, PROBE_S, PROBE_S + 0.1, "alive") == "back"
    assert rota.take(PROBE_S + 0.1) == 0


def test_one_that_refuses_rests_and_then_a_single_request_tells_whether_it_still_does() -> None:
    rota = Rota(2)
    assert rota.take(0.0) == 0
    rota.rest(0, 0.0, 0.05, None)
    rota.give_back(0, 0.0, 0.05, "alive")
    assert {rota.take(0.05 + REST_S / 2) for _ in range(5)} == {1}
    after = 0.06 + REST_S
    assert [rota.take(after) for _ in range(3)] == [0, 1, 1]
    rota.rest(0, after, after + 0.01, None)
    assert {rota.take(after + 1.9 * REST_S) for _ in range(5)} == {1}, "it rests for longer"
    assert [rota.take(after + 2.1 * REST_S) for _ in range(3)] == [0, 1, 1]
    rota.give_back(0, after + 2.1 * REST_S, after + 2.2 * REST_S, "alive")
    assert {rota.take(after + 2.2 * REST_S) for _ in range(3)} == {0}


def test_one_that_asks_for_a_wait_rests_for_as_long_and_where_all_do_the_first_is_waited_for() -> None:
    rota = Rota(2)
    rota.rest(0, 0.0, 0.1, 30.0)
    assert {rota.take(30.0) for _ in range(5)} == {1}
    assert rota.is_any_free(30.0)
    rota.rest(1, 10.0, 20.0, 5.0)
    assert not rota.is_any_free(20.0)
    assert rota.free_s(20.0) == 5.0
    assert rota.take(20.0) == 1


def test_an_answer_from_before_the_trouble_puts_nobody_back() -> None:
    rota = Rota(2)
    assert [rota.take(0.0), rota.take(0.0), rota.take(0.0)] == [0, 1, 0]
    rota.give_back(0, 0.0, 0.1, "away")
    assert rota.give_back(0, 0.0, 0.2, "alive") == ""
    assert rota.take(0.3) == 1


def test_a_probe_that_takes_long_to_fail_is_as_long_in_coming_again() -> None:
    rota = Rota(2)
    rota.give_back(rota.take(0.0), 0.0, 0.0, "away")
    assert rota.take(1.0) == 0
    rota.give_back(0, 1.0, 11.0, "away")
    assert {rota.take(20.9) for _ in range(3)} == {1}
    assert rota.take(21.0) == 0


@given(st.lists(st.tuples(st.sampled_from(["alive", "sick", "away", ""]), st.floats(0, 2)), max_size=300))
def test_whatever_happens_every_request_has_a_replica_and_is_counted_back(events: list[tuple[Sign, float]]) -> None:
    rota, now, out = Rota(3), 0.0, []
    for sign, gap_s in events:
        now += gap_s
        out.append((rota.take(now), now))
        if gap_s > 1:
            place, sent = out.pop(0)
            rota.give_back(place, sent, now, sign)
    assert sum(replica.in_flight for replica in rota.replicas) == len(out)
    for place, sent in out:
        rota.give_back(place, sent, now, "alive")
    assert all(replica.in_flight == 0 and not replica.probing for replica in rota.replicas if not replica.out_since)


# ---- real servers


def test_all_replicas_are_kept_equally_full(servers: list[SimulatedServer]) -> None:
    out = ask(servers, 600)
    assert (out["response_status"] == "ok").all()
    answered = [server.stats().answered for server in servers]
    assert sum(answered) == 600
    assert max(answered) <= 1.2 * min(answered)


def test_a_replica_that_is_killed_loses_no_row_and_one_that_returns_is_used_again(
    servers: list[SimulatedServer], tmp_path: Path
) -> None:
    first, second, third = servers
    for server in servers:
        server.change(latency_s=0.1)
    died: list[Stats] = []

    def kill_and_restart() -> None:
        second.wait_for(answered=100)
        died.append(second.stats())
        second.kill()
        third.wait_for(answered=250)
        second.start()

    attack = threading.Thread(target=kill_and_restart)
    attack.start()
    out = ask(servers, 1500, checkpoint=tmp_path / "runs")
    attack.join()
    assert (out["response_status"] == "ok").all()
    assert second.stats().answered >= 50, "it was put back"
    paid = first.stats().answered + second.stats().answered + third.stats().answered + died[0].answered
    assert paid <= 1500 + 64, "only what was in flight there was asked again"
    decisions = [each for each in llmframe.last_run().timeline["decision"] if "replica" in each]
    assert decisions[0] == f"replica out: {second.base_url}/chat/completions"
    assert decisions[-1] == f"replica back: {second.base_url}/chat/completions"
    assert not any("down" in each for each in llmframe.last_run().timeline["decision"]), "the endpoint was never away"


def test_a_replica_that_was_never_there_costs_no_row(servers: list[SimulatedServer]) -> None:
    servers[0].stop()
    out = ask(servers, 200)
    assert (out["response_status"] == "ok").all()


def test_a_replica_that_answers_everything_with_503_gets_hardly_a_request(servers: list[SimulatedServer]) -> None:
    servers[1].change(status_all=503)
    out = ask(servers, 600)
    assert (out["response_status"] == "ok").all()
    assert servers[1].stats().received <= 40  # those of the first moment, and probes


STRANGE = [
    {"status_all": 401},
    {"status_all": 402},
    {"status_all": 404},
    {"status_all": 429, "error_code": "insufficient_quota"},
    {"p_html": 1.0},
]


@pytest.mark.parametrize("fault", STRANGE, ids=str)
def test_a_replica_that_is_set_up_otherwise_than_the_rest_costs_no_row(
    servers: list[SimulatedServer], fault: dict[str, Any]
) -> None:
    servers[1].change(latency_s=0.0, **fault)  # a quick fault would draw all rows
    out = ask(servers, 300)
    assert (out["response_status"] == "ok").all()
    assert servers[1].stats().received <= 40  # those of the first moment, and probes


@pytest.mark.parametrize(
    "fault", [{"status_all": 429}, {"status_all": 429, "retry_after_s": 30}, {"status_all": 503, "retry_after_s": 30}]
)
def test_a_replica_that_refuses_everything_holds_no_row_and_no_other_replica(
    servers: list[SimulatedServer], fault: dict[str, Any]
) -> None:
    servers[1].change(latency_s=0.0, **fault)
    began = time.monotonic()
    out = ask(servers[:2], 300)
    assert (out["response_status"] == "ok").all()
    assert time.monotonic() - began < 10.0
    assert servers[1].stats().received <= 60  # those of the first moment, and tries


def test_where_every_replica_refuses_the_first_to_be_free_is_waited_for(servers: list[SimulatedServer]) -> None:
    for server, wait_s in zip(servers[:2], (1, 30), strict=True):
        server.reset(status_all=429, retry_after_s=wait_s, schedule=[(0.5, {"status_all": None})])
    began = time.monotonic()
    out = ask(servers[:2], 30)
    assert (out["response_status"] == "ok").all()
    assert 1.0 <= time.monotonic() - began < 10.0


def test_a_row_that_every_replica_refuses_as_a_stranger_would_fails_alone(servers: list[SimulatedServer]) -> None:
    frame = pd.DataFrame({"text": [f"row {number}" if number != 100 else "[[status=403]]" for number in range(300)]})
    urls = [server.base_url for server in servers]
    out = llmframe.LLMFrame(frame).complete("text", model="m", base_url=urls, progress=False)
    assert out["response_status"].tolist() == ["ok"] * 100 + ["failed"] + ["ok"] * 199
    assert sum(server.stats().received for server in servers) < 330


def test_a_refusal_by_every_replica_is_the_endpoints_and_names_one_that_refused(servers: list[SimulatedServer]) -> None:
    servers[0].stop()
    servers[1].change(status_all=404)
    with pytest.raises(EndpointError, match=f"HTTP 404: .*; sent to {servers[1].base_url}/chat/completions"):
        ask(servers[:2], 50)
    assert servers[1].stats().received <= 40


def test_replicas_that_are_all_away_are_the_endpoints_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmframe.patience.FIRST_PATIENCE_S", 1.0)
    nobody = [f"http://127.0.0.1:{port}/v1" for port in (1, 7, 9)]
    with pytest.raises(EndpointError, match=r"no answer from http://127\.0\.0\.1:1/v1/chat"):
        llmframe.LLMFrame(pd.DataFrame({"text": ["row"]})).complete("text", model="m", base_url=nobody, progress=False)


def test_answers_are_kept_under_the_first_replica(servers: list[SimulatedServer], tmp_path: Path) -> None:
    ask(servers, 30, checkpoint=tmp_path / "runs")
    asked = sum(server.stats().received for server in servers)
    ask(servers[:1], 30, checkpoint=tmp_path / "runs")
    ask([servers[0], servers[2]], 30, checkpoint=tmp_path / "runs")
    assert sum(server.stats().received for server in servers) == asked == 30


# ---- the call


def test_a_list_of_one_is_that_one() -> None:
    assert resolve(base_url=URLS[:1], api_key="sk-x").key == resolve(base_url=URLS[0], api_key="sk-x").key


@pytest.mark.parametrize(
    ("base_url", "words"),
    [
        ([], "no URL and no list of them"),
        ({"http://one/v1"}, "no URL and no list of them"),
        (["http://one/v1", "two"], "'two' is no URL"),
        (["http://one/v1", "http://ONE:80/v1/"], "names 'http://one/v1' twice"),
    ],
)
def test_a_list_that_is_none_is_refused(base_url: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        resolve(base_url=base_url, api_key="sk-x")


def test_every_replica_on_an_open_line_is_warned_of() -> None:
    end = resolve(base_url=["https://one.example.com/v1", "http://two.example.com/v1"], api_key="sk-x")
    assert end.replicas == ("http://two.example.com/v1/chat/completions",)
