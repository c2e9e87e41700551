"""The simulated server does what its knobs say; what other tests conclude from it rests on this."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Coroutine
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest

from tests.server import Behaviour, SimulatedServer, Stats, content_key, count_prompt_tokens, count_tokens, label_of
from tests.server_behaviour import go_duration

SENTIMENT = {
    "type": "object",
    "properties": {"label": {"enum": ["positive", "negative"]}},
    "required": ["label"],
    "additionalProperties": False,
}


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: Any

    @property
    def content(self) -> Any:
        return self.body["choices"][0]["message"]["content"]


def chat(text: str, **parameters: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **parameters}


def asking(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


async def post(
    session: aiohttp.ClientSession,
    server: SimulatedServer,
    body: object,
    path: str = "/chat/completions",
    headers: dict[str, str] | None = None,
) -> Reply:
    async with session.post(server.base_url + path, json=body, headers=headers) as response:
        text = await response.text()
        as_json = response.content_type == "application/json"
        received = {name.lower(): value for name, value in response.headers.items()}
        return Reply(response.status, received, json.loads(text) if as_json else text)


def send(server: SimulatedServer, *bodies: object, path: str = "/chat/completions", **headers: str) -> list[Reply]:
    """Send the bodies one after the other over one session."""

    async def one_by_one() -> list[Reply]:
        async with aiohttp.ClientSession() as session:
            return [await post(session, server, body, path, headers) for body in bodies]

    return asyncio.run(one_by_one())


async def outcome(attempt: Coroutine[Any, Any, Reply]) -> str:
    """Tell what a client sees of a request."""
    try:
        reply = await attempt
    except aiohttp.ClientPayloadError:
        return "truncated_body"
    except aiohttp.ClientConnectionError:
        return "reset"
    except json.JSONDecodeError:
        return "bad_json"
    if reply.status != 200:
        return str(reply.status)
    if isinstance(reply.body, str):
        return "html"
    if "error" in reply.body:
        return "error_in_200"
    if "usage" not in reply.body:
        return "no_usage"
    return "answered" if reply.body["choices"] else "empty_choices"


def together(server: SimulatedServer, bodies: list[dict[str, Any]]) -> list[str]:
    """Send the bodies all at one time and tell what became of each."""

    async def all_at_once() -> list[str]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
            return await asyncio.gather(*(outcome(post(session, server, body)) for body in bodies))

    return asyncio.run(all_at_once())


def adds_up(stats: Stats) -> bool:
    ended = stats.answered + stats.refused + stats.abandoned + stats.other + sum(stats.failed.values())
    return stats.received == ended + stats.in_flight


def test_the_answer_echoes_the_last_user_message_in_the_full_shape(server: SimulatedServer) -> None:
    server.configure(cached_tokens=2, reasoning_tokens=5)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Grüße, 🐼!"}]
    (reply,) = send(server, {"model": "m-1", "messages": messages})
    content, usage = reply.content, reply.body["usage"]
    assert content == "echo: Grüße, 🐼!"
    assert reply.body["object"] == "chat.completion"
    assert reply.body["model"] == "m-1"
    assert reply.body["choices"][0]["finish_reason"] == "stop"
    assert usage["prompt_tokens"] == count_prompt_tokens(messages)
    assert usage["completion_tokens"] == count_tokens(content) + 5
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 5
    assert reply.headers["x-request-id"].startswith("req_")


def test_a_schema_is_answered_with_an_instance_of_it(server: SimulatedServer) -> None:
    node = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "count": {"type": "integer", "minimum": 3},
            "share": {"type": "number", "maximum": 0.5},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
            "sure": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
            "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]},
        },
    }
    schema = {"$defs": {"Node": node}, "$ref": "#/$defs/Node"}
    labels, nested = send(
        server,
        chat("fine", response_format=asking(SENTIMENT), n=2),
        chat("fine", response_format=asking(schema)),
    )
    first, second = (json.loads(choice["message"]["content"])["label"] for choice in labels.body["choices"])
    assert [first, second] == [label_of("fine", ["positive", "negative"], choice) for choice in (0, 1)]
    assert first != second
    value = json.loads(nested.content)
    assert [value["name"], value["count"], value["share"], value["sure"]] == ["echo: fi", 3, 0.5, True]
    assert value["next"]["next"] is not None
    while value is not None:
        assert set(value["tags"]) <= {"a", "b"}
        value = value["next"]


def test_directives_in_a_message_steer_its_answer_alone(server: SimulatedServer) -> None:
    wishes = {
        "[[say=some text]]": ("some text", "stop"),
        "[[content=null]]": (None, "stop"),
        "[[content=]]": ("", "stop"),
        "[[refusal=I cannot]]": (None, "stop"),
        "[[finish=content_filter]]": ("echo: [[finish=content_filter]]", "content_filter"),
        "[[finish=length]]": ("echo: [[fin", "length"),
        "[[tool_calls]]": (None, "tool_calls"),
        "[[surrogate]]": ("half a pair: \ud800", "stop"),
        "plain": ("echo: plain", "stop"),
    }
    replies = send(server, *map(chat, wishes))
    assert [(r.content, r.body["choices"][0]["finish_reason"]) for r in replies] == list(wishes.values())
    assert replies[3].body["choices"][0]["message"]["refusal"] == "I cannot"
    bad, heard = send(
        server, chat("[[label=bad]]", response_format=asking(SENTIMENT)), chat("[[echo_headers]]"), X_a="1"
    )
    assert json.loads(bad.content) == {"label": "bad"}
    assert json.loads(heard.content)["x_a"] == "1"


def test_a_directive_fails_a_content_the_first_times_only(server: SimulatedServer) -> None:
    patient, filtered = chat("[[fail_first=2]] a"), chat("[[status=400:content_filter]]")
    replies = send(server, patient, filtered, patient, patient)
    assert [reply.status for reply in replies] == [500, 400, 500, 200]
    assert replies[1].body["error"]["code"] == "content_filter"
    stats = server.stats()
    assert (stats.answered, stats.failed) == (1, {"500": 2, "400": 1})
    assert server.answered_by_content() == {content_key(patient): 1}


def test_what_the_real_api_refuses_is_refused_in_its_words(server: SimulatedServer) -> None:
    message = {"role": "user", "content": "hi"}
    shapes: dict[str | None, object] = {
        "model": {"messages": [message]},
        "messages": {"model": "m"},
        "messages[0]": {"model": "m", "messages": [[message], [message]]},
        "messages[1].role": {"model": "m", "messages": [message, {"content": "hi"}]},
        "messages[0].content": {"model": "m", "messages": [{"role": "user", "content": None}]},
    }
    replies = send(server, *shapes.values())
    assert [(r.status, r.body["error"]["param"]) for r in replies] == [(400, param) for param in shapes]
    assert replies[2].body["error"]["type"] == "invalid_request_error"
    assert server.stats().answered == 0


def test_key_model_and_path_are_checked(server: SimulatedServer) -> None:
    server.configure(require_key="sk-right", valid_models=["m"])
    right = {"Authorization": "Bearer sk-right"}
    (wrong_key,) = send(server, chat("hi"), Authorization="Bearer sk-wrong")
    (no_model,) = send(server, chat("hi") | {"model": "x"}, **right)
    (no_path,) = send(server, chat("hi"), path="/../chat/completions", **right)
    (good,) = send(server, chat("hi"), **right)
    azure = "/../openai/deployments/d/chat/completions?api-version=1"
    (good_azure,) = send(server, chat("hi"), path=azure, **{"api-key": "sk-right"})
    assert (wrong_key.status, wrong_key.body["error"]["code"]) == (401, "invalid_api_key")
    assert (no_model.status, no_model.body["error"]["code"]) == (404, "model_not_found")
    assert (no_path.status, no_path.body["error"]["code"]) == (404, None)
    assert (good.status, good_azure.status) == (200, 200)


def test_a_token_bucket_refuses_what_is_too_much_and_says_when_to_come_back(server: SimulatedServer) -> None:
    server.configure(requests_per_min=60, request_burst=3, rate_headers="openai", retry_after="ms")
    replies = send(server, *[chat(f"row {i}") for i in range(4)])
    assert [reply.status for reply in replies] == [200, 200, 200, 429]
    assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["2", "1", "0", "0"]
    assert replies[0].headers["x-ratelimit-limit-requests"] == "60"
    assert 0 < int(replies[3].headers["retry-after-ms"]) <= 1000
    assert 2 < float(replies[3].headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 3
    assert server.stats().refused == 1


def test_tokens_are_limited_by_prompt_and_answer(server: SimulatedServer) -> None:
    cost = count_prompt_tokens([{"role": "user", "content": "row 0"}]) + count_tokens("echo: row 0")
    server.configure(tokens_per_min=1, token_burst=2.5 * cost, retry_after="seconds")
    fits, fits_too, waits = send(server, *[chat(f"row {i}") for i in range(3)])
    (never,) = send(server, chat("long " * 100))
    assert [fits.status, fits_too.status, waits.status, never.status] == [200, 200, 429, 429]
    assert int(waits.headers["retry-after"]) == 60 * cost / 2
    assert "too large" in never.body["error"]["message"]
    assert "retry-after" not in never.headers


def test_rate_headers_come_in_each_providers_form(server: SimulatedServer) -> None:
    server.configure(requests_per_min=60, tokens_per_min=6000, rate_headers="azure")
    (azure,) = send(server, chat("hi"))
    assert azure.headers["x-ratelimit-reset-requests"] == "1"
    assert azure.headers["x-ratelimit-limit-tokens"] == "6000"
    server.configure(requests_per_min=60, rate_headers="anthropic")
    (anthropic,) = send(server, chat("hi"))
    assert anthropic.headers["anthropic-ratelimit-requests-remaining"] == "59"
    assert anthropic.headers["anthropic-ratelimit-requests-reset"].endswith("Z")
    server.configure(status_all=429, error_code="insufficient_quota", retry_after="date", retry_after_s=5)
    (date,) = send(server, chat("hi"))
    assert 3 < parsedate_to_datetime(date.headers["retry-after"]).timestamp() - time.time() <= 6
    assert date.body["error"]["code"] == "insufficient_quota"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (0.12, "120ms"), (1.2, "1.2s"), (360, "6m0s"), (3661, "1h1m1s")]
)
def test_a_reset_is_written_as_a_go_duration(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text


def test_slots_are_never_overbooked_and_the_rest_waits_in_order(server: SimulatedServer) -> None:
    server.configure(slots=4, latency_s=0.05)
    assert together(server, [chat(f"row {i}") for i in range(20)]) == ["answered"] * 20
    stats = server.stats()
    assert stats.max_in_flight == 20
    assert 0.24 < stats.seconds < 0.75  # five rounds of 50 ms: no slot rests between two requests


def test_faults_happen_as_often_as_they_should_and_are_what_they_say(server: SimulatedServer) -> None:
    kinds = ["500", "503", "reset", "html", "truncated_body", "bad_json", "empty_choices", "no_usage", "error_in_200"]
    server.configure(**{f"p_{kind}": 0.1 for kind in kinds})
    bodies = [chat(f"row {i}") for i in range(400)]
    seen = together(server, bodies)
    stats = server.stats()
    assert {kind: seen.count(kind) for kind in kinds if kind != "no_usage"} == stats.failed
    assert all(15 <= seen.count(kind) <= 75 for kind in [*kinds, "answered"])
    assert stats.answered == seen.count("answered") + seen.count("no_usage")
    assert adds_up(stats)


def test_the_same_seed_brings_the_same_faults_in_any_order(server: SimulatedServer) -> None:
    bodies = [chat(f"row {i}") for i in range(60)]
    server.configure(p_500=0.3, p_html=0.3, seed=7)
    first = together(server, bodies)
    server.reset(p_500=0.3, p_html=0.3, seed=7)
    assert together(server, bodies[::-1])[::-1] == first
    server.reset(p_500=0.3, p_html=0.3, seed=8)
    assert together(server, bodies) != first


def test_a_hang_lasts_until_the_client_gives_up(server: SimulatedServer) -> None:
    async def give_up() -> None:
        async with aiohttp.ClientSession() as session:
            hanging = asyncio.create_task(post(session, server, chat("[[hang_first=1]]")))
            slow = asyncio.create_task(post(session, server, chat("[[sleep=60]]")))
            await server.until(in_flight=2)
            hanging.cancel()
            slow.cancel()
            await server.until(in_flight=0)
            assert (await post(session, server, chat("[[hang_first=1]]"))).status == 200

    asyncio.run(give_up())
    stats = server.stats()
    assert (stats.answered, stats.abandoned, stats.failed) == (1, 1, {"hang": 1})
    assert adds_up(stats)


def test_a_client_that_gives_up_frees_its_slot(server: SimulatedServer) -> None:
    server.configure(slots=1)

    async def give_up() -> Reply:
        async with aiohttp.ClientSession() as session:
            slow = asyncio.create_task(post(session, server, chat("[[sleep=60]]")))
            await server.until(in_flight=1)
            waiting = asyncio.create_task(post(session, server, chat("next")))
            await server.until(in_flight=2)
            slow.cancel()
            return await waiting

    assert asyncio.run(give_up()).content == "echo: next"


def test_the_schedule_runs_from_the_first_request(server: SimulatedServer) -> None:
    server.configure(latency_s=0.01, schedule=[(0.3, {"status_all": 503}), (0.6, {"status_all": None})])

    async def go_on() -> None:
        async with aiohttp.ClientSession() as session:
            start = time.monotonic()
            while (at_s := time.monotonic() - start) < 0.8:
                await post(session, server, chat(f"at {at_s}"))

    asyncio.run(go_on())
    requests = server.requests()
    seen = [(request.received_s - requests[0].received_s, request.status) for request in requests]
    assert {status for at_s, status in seen if at_s < 0.25 or at_s > 0.65} == {200}
    assert {status for at_s, status in seen if 0.35 < at_s < 0.55} == {503}
    assert sum(server.stats().received_course) == len(seen)


def test_an_outage_ends_what_waits_and_what_is_at_work(server: SimulatedServer) -> None:
    server.configure(slots=1, latency_s=60, schedule=[(0.05, {"status_all": 503})])
    assert together(server, [chat("a"), chat("b")]) == ["503", "503"]
    assert server.answered_by_content() == {}


def test_a_change_leaves_the_rest_of_the_behaviour(server: SimulatedServer) -> None:
    server.configure(slots=1, latency_s=60, require_key="k")

    async def hurry() -> int:
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer k"}) as session:
            slow = asyncio.create_task(post(session, server, chat("slow")))
            await server.until(in_flight=1)
            server.change(slots=2, latency_s=0)
            status = (await post(session, server, chat("quick"))).status
            slow.cancel()
            return status

    assert asyncio.run(hurry()) == 200
    with pytest.raises(ValueError, match="latncy_s"):
        server.configure(schedule=[(1, {"latncy_s": 0})])


def test_the_log_holds_what_was_received_and_how_it_ended(server: SimulatedServer) -> None:
    bodies = [chat("one", temperature=0), chat("[[status=422]] two")]
    send(server, *bodies, X_trace="t-1")
    one, two = server.requests()
    assert [one.body, two.body] == bodies
    assert (one.method, one.target, one.headers["x_trace"]) == ("POST", "/v1/chat/completions", "t-1")
    assert [(r.status, r.outcome) for r in (one, two)] == [(200, "answered"), (422, "422")]
    assert server.requests(limit=1) == [two]
    server.configure(log=False)
    send(server, chat("three"))
    assert server.requests(limit=1) == [two]


def test_waiting_for_a_count_that_does_not_come_says_what_came(server: SimulatedServer) -> None:
    send(server, chat("one"))
    assert server.wait_for(answered=1, in_flight=0).received == 1
    with pytest.raises(TimeoutError, match=r"received=1\b"):
        server.wait_for(received=2, timeout_s=0.05)
    with pytest.raises(ValueError, match="recieved"):
        server.wait_for(recieved=1)


def test_a_reset_forgets_everything_and_hangs_up(server: SimulatedServer) -> None:
    async def cut() -> str:
        async with aiohttp.ClientSession() as session:
            waiting = asyncio.create_task(outcome(post(session, server, chat("[[sleep=60]]"))))
            await server.until(in_flight=1)
            server.reset()
            return await waiting

    assert asyncio.run(cut()) == "reset"
    stats = server.stats()
    assert (stats.received, stats.in_flight, stats.abandoned, server.requests()) == (0, 0, 0, [])


def test_a_killed_server_comes_back_on_the_same_port() -> None:
    with SimulatedServer(require_key="k") as server:
        before = server.base_url
        server.kill()
        assert not server.running
        server.start()
        assert server.base_url == before
        (reply,) = send(server, chat("again"), Authorization="Bearer k")
        assert reply.content == "echo: again"


def test_the_server_does_not_outlive_whoever_started_it() -> None:
    server = SimulatedServer().start()
    process = server._process
    assert process is not None
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(30) == 0
    server.stop()


def test_from_a_shell_it_prints_its_url_first() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.server", "--config", '{"status_all": 503}'],
        cwd=Path(__file__).resolve().parent.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        process.terminate()
        assert process.wait(30) == 0
    assert url.startswith("http://127.0.0.1:")
    assert url.endswith("/v1")


def test_embeddings_and_models_are_there(server: SimulatedServer) -> None:
    (reply,) = send(server, {"model": "e", "input": ["a", "b", "a"], "dimensions": 4}, path="/embeddings")
    a, b, again = (each["embedding"] for each in reply.body["data"])
    assert a == again != b
    assert len(a) == 4
    assert reply.body["usage"]["prompt_tokens"] == 3


def test_a_long_body_in_pieces_and_two_requests_in_one_packet_are_read(server: SimulatedServer) -> None:
    long = json.dumps(chat("x" * 300_000)).encode()
    short = json.dumps(chat("y")).encode()

    async def speak() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nCoNtEnT-LeNgTh: %d\r\n%s\r\n"
        writer.write(head % (len(long), b"") + long + head % (len(short), b"Connection: close\r\n") + short)
        answers = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answers

    answers = asyncio.run(speak())
    assert answers.count(b"HTTP/1.1 200 OK") == 2
    assert answers.index(b"echo: xxx") < answers.index(b"echo: y")


def test_every_knob_is_documented_and_survives_json() -> None:
    documentation = Behaviour.__doc__ or ""
    names = [knob.name for knob in dataclasses.fields(Behaviour)]
    assert [name for name in names if name not in documentation] == []
    behaviour = Behaviour(latency_s=0.1, schedule=[(1.0, {"slots": 3})], valid_models=["m"])
    assert Behaviour.from_json(behaviour.to_json()).to_json() == behaviour.to_json()


def test_no_key_of_the_developer_reaches_a_test() -> None:
    assert {name: value for name, value in os.environ.items() if name.startswith(("OPENAI_", "LLMFRAME_"))} == {
        "OPENAI_API_KEY": "sk-test-not-a-secret"
    }
