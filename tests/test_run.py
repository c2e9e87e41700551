"""Whole calls against a real server: what comes back, what is kept, and what is asked again."""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import orjson
import pandas as pd
import pytest

import llmframe
from llmframe import failures, loops, patience
from llmframe.errors import BudgetExceeded, ConfigurationError, EndpointError, Interrupted, LLMFrameError, RowFailed
from tests.server import SimulatedServer
from tests.test_endpoint import LOCALHOST, tls_server

_keys = itertools.count()


class Caller:
    """Calls the simulated server, each time as somebody new, so that no test paces another."""

    def __init__(self, server: SimulatedServer) -> None:
        self.server = server

    def __call__(self, frame: pd.DataFrame, prompt: Any = "{text}", **keywords: Any) -> pd.DataFrame:
        keywords = {"base_url": self.server.base_url, "api_key": f"sk-of-no-worth-{next(_keys)}", **keywords}
        out = frame.llm.complete(prompt, model="m", progress=False, **keywords)
        assert isinstance(out, pd.DataFrame)
        return out


@pytest.fixture
def ask(server: SimulatedServer) -> Caller:
    """Call the simulated server."""
    return Caller(server)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory for the answers."""
    return tmp_path / "checkpoint"


@pytest.fixture
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let retries follow within some hundredths of a second, where the waiting is not what is tested."""
    monkeypatch.setattr(failures, "BACKOFF_BASE_S", 0.01)


def texts(count: int, *more: str) -> pd.DataFrame:
    return pd.DataFrame({"text": [*(f"row {number}" for number in range(count)), *more]})


def meanwhile(do: Callable[[], object]) -> threading.Thread:
    """Do something in another thread while a call runs in this one."""
    thread = threading.Thread(target=do)
    thread.start()
    return thread


def count(frame: pd.DataFrame) -> dict[str, int]:
    counts = frame["response_status"].value_counts()
    return {str(status): int(number) for status, number in counts.items() if number}


# ---- the frame


@pytest.mark.usefixtures("quick_backoff")
def test_through_every_fault_each_row_gets_its_own_answer_once(ask: Caller, checkpoint: Path) -> None:
    faults = ("500", "reset", "html", "bad_json", "truncated_body", "empty_choices", "error_in_200")
    ask.server.reset(latency_s=0.01, latency_sigma=0.5, **{f"p_{fault}": 0.03 for fault in faults})
    frame = texts(400)
    out = ask(frame, checkpoint=checkpoint, details=True)
    assert out["response"].tolist() == [f"echo: {text}" for text in frame["text"]]
    assert count(out) == {"ok": 400}
    assert list(ask.server.answered_by_content().values()) == [1] * 400
    assert out["response_attempts"].sum() == ask.server.stats().received == llmframe.last_run().requests
    assert out["response_request_id"].nunique() == 400


def test_the_second_call_answers_from_the_checkpoint_and_asks_nothing(ask: Caller, checkpoint: Path) -> None:
    first = ask(texts(50), checkpoint=checkpoint)
    again = ask(texts(50), checkpoint=checkpoint)
    pd.testing.assert_frame_equal(first, again)
    assert ask.server.stats().received == 50


def test_a_failed_row_keeps_its_reason_and_is_asked_again_by_the_next_call(ask: Caller, checkpoint: Path) -> None:
    frame = texts(5, "[[status=400:context_length_exceeded]]")
    out = ask(frame, checkpoint=checkpoint, details=True)
    assert count(out) == {"ok": 5, "failed": 1}
    last = out.iloc[-1]
    assert pd.isna(last["response"])
    assert last["response_error"] == "HTTP 400: This model's maximum context length is 8192 tokens."
    assert last["response_attempts"] == 1
    ask(frame, checkpoint=checkpoint)
    assert ask.server.stats().received == 6 + 1


def test_the_details_tell_how_a_row_was_answered(ask: Caller) -> None:
    ask.server.reset(latency_s=0.05, cached_tokens=2, reasoning_tokens=3)
    row = ask(texts(0, "[[fail_first=1]] a"), details=True).iloc[0]
    assert (row["response_attempts"], row["response_source"], row["response_finish_reason"]) == (2, "request", "stop")
    assert (row["response_cached_tokens"], row["response_reasoning_tokens"], row["response_model"]) == (2, 3, "m")
    assert row["response_request_id"].startswith("req_")
    assert 0.05 <= row["response_latency_s"] < 0.5


def test_extra_headers_query_and_body_are_sent(ask: Caller) -> None:
    ask(texts(1), extra_headers={"X-Team": "a"}, extra_query={"tier": "b"}, extra_body={"top_k": 5}, temperature=0.2)
    (request,) = ask.server.requests()
    assert request.headers["x-team"] == "a"
    assert request.target == "/v1/chat/completions?tier=b"
    assert (request.body["top_k"], request.body["temperature"]) == (5, 0.2)


@pytest.mark.parametrize(
    "client",
    [
        lambda url: openai.AsyncOpenAI(api_key="sk-a", base_url=url),
        lambda url: openai.OpenAI(api_key="sk-a", base_url=url),
        lambda url: openai.OpenAI(api_key="sk-a", base_url=url, http_client=httpx2.Client()),
        lambda url: openai.AsyncOpenAI(api_key="sk-a", base_url=url, default_query={"a": "b"}),
    ],
    ids=["async", "sync", "sync with its own transport", "async with more to it"],
)
def test_a_users_client_answers_every_row(ask: Caller, client: Any) -> None:
    ask.server.reset(latency_s=0.02)
    own = client(ask.server.base_url)
    out = ask(texts(200), client=own, base_url=None, api_key=None)
    assert out["response"].tolist() == [f"echo: row {number}" for number in range(200)]
    if isinstance(own, openai.OpenAI):
        own.close()


def test_runs_of_several_threads_share_one_endpoint_and_its_cap(ask: Caller) -> None:
    ask.server.reset(latency_s=0.01)
    outs: dict[str, pd.DataFrame] = {}

    def call(name: str) -> None:
        frame = pd.DataFrame({"text": [f"{name} {number}" for number in range(50)]})
        outs[name] = ask(frame, api_key="sk-shared", max_concurrency=5)

    for thread in [meanwhile(lambda name=name: call(name)) for name in "abc"]:  # type: ignore[misc]
        thread.join()
    assert all(outs[name]["response"].tolist() == [f"echo: {name} {i}" for i in range(50)] for name in "abc")
    assert ask.server.stats().max_in_flight == 5


def test_max_concurrency_1_asks_in_row_order(ask: Caller) -> None:
    frame = texts(10, "[[fail_first=1]] a", "b")
    ask(frame, max_concurrency=1)
    asked = [request.text for request in ask.server.requests()]
    assert list(dict.fromkeys(asked)) == frame["text"].tolist()


# ---- what stops a run


def test_a_row_that_fails_for_good_is_raised_with_its_place_and_the_frame_so_far(ask: Caller, checkpoint: Path) -> None:
    ask.server.reset(latency_s=0.05)
    frame = texts(200, "[[status=400]]")
    frame.index = pd.Index([f"label {number}" for number in range(201)])
    frame = frame.iloc[::-1]  # so that it is among the first to be asked
    with pytest.raises(RowFailed, match=r"row 0 \(label 'label 200'\) failed: HTTP 400") as caught:
        ask(frame, on_error="raise", checkpoint=checkpoint)
    error = caught.value
    assert (error.position, error.label) == (0, "label 200")
    assert error.frame is not None
    assert error.frame.index.equals(frame.index)
    answered = ask.server.stats().answered
    assert count(error.frame) == {"ok": answered, "failed": 1, "pending": 200 - answered}
    assert (llmframe.read_checkpoint(checkpoint)["status"] == "ok").sum() == answered > 0
    ask.server.change(latency_s=0.0)
    rest = frame[frame["text"] != "[[status=400]]"]
    assert count(ask(rest, on_error="raise", checkpoint=checkpoint)) == {"ok": 200}
    assert set(ask.server.answered_by_content().values()) == {1}


TURNS = {
    "the key is revoked": ({"require_key": "another"}, "api_key="),
    "the quota is used up": ({"status_all": 429, "error_code": "insufficient_quota"}, "no quota left"),
    "the model is deleted": ({"valid_models": ["another"]}, "check model="),
}


@pytest.mark.parametrize("turn", TURNS)
def test_what_was_answered_before_the_endpoint_turned_is_kept_and_the_same_call_goes_on(
    ask: Caller, checkpoint: Path, turn: str
) -> None:
    change, words = TURNS[turn]
    ask.server.reset(latency_s=0.02)
    server = ask.server
    turning = meanwhile(lambda: (server.wait_for(answered=200), server.change(**change)))
    with pytest.raises(EndpointError, match=words) as caught:
        ask(texts(3000), checkpoint=checkpoint)
    turning.join()
    error = caught.value
    answered = server.stats().answered
    assert error.frame is not None
    assert count(error.frame) == {"ok": answered, "pending": 3000 - answered}
    assert f"({answered:,} of 3,000 rows are done; the same call goes on from {checkpoint})" in str(error)
    assert len(llmframe.read_checkpoint(checkpoint)) == answered
    assert server.stats().received - answered < 500
    assert not asyncio.all_tasks(loops.background_loop())

    server.change(require_key=None, status_all=None, valid_models=None, latency_s=0.0)
    assert count(ask(texts(3000), checkpoint=checkpoint)) == {"ok": 3000}
    assert set(server.answered_by_content().values()) == {1}


def test_without_a_checkpoint_the_partial_frame_says_how_to_go_on(ask: Caller) -> None:
    ask.server.reset(latency_s=0.02)
    turning = meanwhile(lambda: (ask.server.wait_for(answered=20), ask.server.change(status_all=401)))
    with pytest.raises(EndpointError, match=r"last_run\(\)\.frame\.llm\.complete\(\.\.\., where='missing'\)"):
        ask(texts(500))
    turning.join()
    ask.server.change(status_all=None)
    out = ask(llmframe.last_run().frame, where="missing")
    assert count(out) == {"ok": 500}
    assert set(ask.server.answered_by_content().values()) == {1}


def test_the_way_on_for_a_mask_keeps_to_its_rows(ask: Caller) -> None:
    mask = np.arange(60) < 20
    with pytest.raises(BudgetExceeded, match=r"\.complete\(\.\.\., where=out\['response_status'\] == 'pending'\)"):
        ask(texts(60), where=mask, max_tokens=5, max_tokens_total=450, max_concurrency=1)
    out = llmframe.last_run().frame
    assert 0 < (out["response_status"] == "pending").sum() < 20
    out = ask(out, where=out["response_status"] == "pending", max_tokens=5)
    assert out["response_status"].tolist() == ["ok"] * 20 + ["skipped"] * 40
    assert ask.server.stats().answered == 20


def test_a_refusal_in_the_checkpoint_is_kept_by_a_call_with_a_mask(ask: Caller, checkpoint: Path) -> None:
    frame = texts(2, "[[refusal=no]]")
    ask(frame, checkpoint=checkpoint)
    out = ask(frame, where=frame["text"] != "row 0", checkpoint=checkpoint)
    assert count(out) == {"ok": 1, "refused": 1, "skipped": 1}
    assert ask.server.stats().received == 3


def test_a_refresh_that_was_stopped_does_not_say_that_the_same_call_goes_on(ask: Caller, checkpoint: Path) -> None:
    budget: dict[str, Any] = {"max_tokens": 5, "max_tokens_total": 450, "max_concurrency": 1}
    with pytest.raises(BudgetExceeded, match="refresh=True would ask them all again; without it the call takes"):
        ask(texts(60), checkpoint=checkpoint, refresh=True, **budget)
    paid = ask.server.stats().answered
    assert 0 < paid < 60
    assert count(ask(texts(60), checkpoint=checkpoint, max_tokens=5)) == {"ok": 60}
    assert ask.server.stats().answered == 60


def test_an_awaited_call_without_asyncios_loop_says_what_to_write_in_trio() -> None:
    awaited = texts(1).llm.acomplete("{text}", model="m", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(ConfigurationError, match=r"needs asyncio.*await trio\.to_thread\.run_sync\(lambda: df\.llm\."):
        awaited.send(None)  # as another library's loop does


def test_a_login_page_in_place_of_every_answer_is_an_endpoint_that_does_not_answer(
    ask: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "FIRST_PATIENCE_S", 0.5)
    ask.server.reset(p_html=1.0)
    with pytest.raises(EndpointError, match=r"is not the JSON promised: .*Please log in"):
        ask(texts(100))
    assert ask.server.stats().received < 2 * 64


def test_a_name_that_nobody_knows_ends_the_run_and_names_it(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PATIENCE_S", 0.5)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with pytest.raises(
        EndpointError, match=r"no answer from https://nowhere\.invalid/v1.*check that.*base_url"
    ) as caught:
        texts(50).llm.complete(
            "{text}", model="m", base_url="https://nowhere.invalid/v1", checkpoint=checkpoint, progress=False
        )
    assert caught.value.frame is not None
    assert count(caught.value.frame) == {"pending": 50}


def test_a_certificate_that_nobody_vouches_for_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "localhost.pem").write_text(LOCALHOST)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)

    async def main() -> None:
        async with tls_server(tmp_path / "localhost.pem") as base_url:
            await texts(50).llm.acomplete("{text}", model="m", base_url=base_url, api_key="sk-a", progress=False)

    with pytest.raises(EndpointError, match=r"the endpoint's certificate was not accepted.*https://localhost"):
        asyncio.run(main())


@pytest.mark.skipif(sys.platform == "win32", reason="a signal cannot be sent to a thread there")
def test_an_interrupt_keeps_what_was_answered_and_the_same_call_asks_the_rest(ask: Caller, checkpoint: Path) -> None:
    ask.server.reset(latency_s=0.05)
    main = threading.get_ident()
    interrupting = meanwhile(lambda: (ask.server.wait_for(answered=100), signal.pthread_kill(main, signal.SIGINT)))
    with pytest.raises(Interrupted) as caught:
        ask(texts(5000), checkpoint=checkpoint)
    interrupting.join()
    stats = ask.server.stats()
    assert caught.value.frame is not None
    assert count(caught.value.frame) == {"ok": stats.answered, "pending": 5000 - stats.answered}
    assert stats.abandoned == 0
    assert not asyncio.all_tasks(loops.background_loop())
    assert count(ask(texts(1000), checkpoint=checkpoint)) == {"ok": 1000}
    assert set(ask.server.answered_by_content().values()) == {1}


def test_a_timeout_is_told_in_the_rows_error(ask: Caller) -> None:
    out = ask(texts(3, "[[hang_first=9]]"), timeout=0.2, max_attempts=1)
    assert count(out) == {"ok": 3, "failed": 1}
    assert out["response_error"].iloc[-1].startswith("no answer within 0.")


# ---- what a server may answer


def raw_chat(**message: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": "stop"}], "model": "m"}


ANSWERS: dict[str, tuple[bytes, str, str | None]] = {
    "usage missing": (orjson.dumps(raw_chat(content="hi")), "ok", "hi"),
    "numbers as text": (
        orjson.dumps({**raw_chat(content="hi"), "usage": {"prompt_tokens": "3", "completion_tokens": "1"}}),
        "ok",
        "hi",
    ),
    "usage of no sense": (orjson.dumps({**raw_chat(content="hi"), "usage": {"prompt_tokens": -1}}), "ok", "hi"),
    "usage is text": (orjson.dumps({**raw_chat(content="hi"), "usage": "none"}), "ok", "hi"),
    "NaN": (b'{"choices":[{"message":{"content":"hi"},"logprobs":NaN}],"usage":{"prompt_tokens":NaN}}', "ok", "hi"),
    "invalid UTF-8": (b'{"choices":[{"message":{"content":"h\xff"}}]}', "ok", "h\ufffd"),
    "a lone surrogate": (b'{"choices":[{"message":{"content":"h\\ud800"}}]}', "ok", "h\ufffd"),
    "30 MB": (orjson.dumps(raw_chat(content="x" * 30_000_000)), "ok", "x" * 30_000_000),
    "content parts": (orjson.dumps(raw_chat(content=[{"type": "text", "text": "hi"}])), "ok", "hi"),
    "content null": (orjson.dumps(raw_chat(content=None)), "invalid", None),
    "content a number": (orjson.dumps(raw_chat(content=5)), "invalid", None),
    "a refusal": (orjson.dumps(raw_chat(content=None, refusal="I cannot")), "refused", None),
    "tool calls": (orjson.dumps(raw_chat(content=None, tool_calls=[{"id": "a"}])), "ok", None),
    "no message": (b'{"choices":[{"finish_reason":"stop"}]}', "invalid", None),
    "a finish_reason that is a number": (b'{"choices":[{"message":{"content":"hi"},"finish_reason":7}]}', "ok", "hi"),
    "no choices": (orjson.dumps({"choices": [], "usage": {"prompt_tokens": 3}}), "failed", None),
    "a number that is no number": (
        b'{"choices":[{"message":{"content":"hi"}}],"usage":{"prompt_tokens":1e999,"completion_tokens":-Infinity}}',
        "ok",
        "hi",
    ),
    "choices are text": (b'{"choices":"none"}', "failed", None),
    "a list": (b"[1, 2, 3]", "failed", None),
    "null": (b"null", "failed", None),
    "nothing": (b"", "failed", None),
    "deep nesting": (b"[" * 100_000, "failed", None),
    "an error of text": (b'{"error":"out of memory"}', "failed", None),
    "an error of errors": (b'{"error":{"message":{"a":1},"code":[1],"type":null}}', "failed", None),
}


async def serve_raw(body: bytes, head: bytes | None = None) -> asyncio.Server:
    """Answer every request with the same bytes, and close the connection."""
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body) if head is None else head

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            length = int(request.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            writer.write(head + body)
            await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", 0)


def call_raw(body: bytes, head: bytes | None = None, **keywords: Any) -> pd.DataFrame:
    async def main() -> pd.DataFrame:
        async with await serve_raw(body, head) as server:
            base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            frame: Any = texts(1)
            out = await frame.llm.acomplete(
                "{text}", model="m", base_url=base_url, api_key="sk-a", progress=False, max_attempts=2, **keywords
            )
            assert isinstance(out, pd.DataFrame)
            return out

    return asyncio.run(main())


@pytest.mark.parametrize("what", ANSWERS)
@pytest.mark.usefixtures("quick_backoff")
def test_whatever_a_server_answers_is_a_status_and_an_error(what: str, checkpoint: Path) -> None:
    body, status, text = ANSWERS[what]
    row = call_raw(body, checkpoint=checkpoint, details=True).iloc[0]
    assert row["response_status"] == status
    assert row["response"] == text if text is not None else pd.isna(row["response"])
    assert pd.isna(row["response_error"]) == (status == "ok")
    assert len(llmframe.read_checkpoint(checkpoint)) == 1


HEADS = {
    "a content-length that promises more": b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\nconnection: close\r\n\r\n",
    "a content-length that promises less": b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\nconnection: close\r\n\r\n",
    "chunks that break off": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{",
    "no HTTP": b"hello\r\n\r\n",
    "a content-length of no sense": b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n",
}


@pytest.mark.parametrize("what", HEADS)
@pytest.mark.usefixtures("quick_backoff")
def test_whatever_a_server_speaks_is_a_status_and_an_error(what: str) -> None:
    row = call_raw(b"{}", HEADS[what], timeout=0.5).iloc[0]
    assert row["response_status"] == "failed"
    assert row["response_error"]


def test_a_wait_that_only_the_body_of_a_429_asks_for_is_kept() -> None:
    body = orjson.dumps({"error": {"message": "Rate limit reached. Please try again in 2h3m.", "type": "tokens"}})
    head = b"HTTP/1.1 429 Busy\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
    with pytest.raises(EndpointError, match=r"asks to come back at .*, in 7,380 s"):
        call_raw(body, head)


def test_every_error_of_a_run_is_of_one_family() -> None:
    assert issubclass(EndpointError, LLMFrameError)
    assert issubclass(RowFailed, LLMFrameError)
    assert not issubclass(Interrupted, Exception)


# ---- what is left behind


@pytest.fixture
def threads_before() -> set[str]:
    """The names of the threads there are."""
    loops.background_loop()
    return {thread.name for thread in threading.enumerate()}


def test_a_stopped_run_leaves_no_thread_of_its_own(ask: Caller, threads_before: set[str], checkpoint: Path) -> None:
    client = openai.OpenAI(api_key="sk-a", base_url=ask.server.base_url, http_client=httpx2.Client())
    ask.server.reset(latency_s=0.02)
    turning = meanwhile(lambda: (ask.server.wait_for(answered=50), ask.server.change(status_all=401)))
    with pytest.raises(EndpointError):
        ask(texts(500), client=client, base_url=None, api_key=None, checkpoint=checkpoint)
    turning.join()
    client.close()
    for thread in threading.enumerate():
        if thread.name == "llmframe-work":  # it has given its result, and is on its way out
            thread.join(1)
    own = {name for name in (thread.name for thread in threading.enumerate()) if name.startswith("llmframe")}
    assert own - threads_before == set()


@pytest.mark.parametrize("name", ["extra_headers", "extra_query", "extra_body"])
@pytest.mark.parametrize("value", [pd.NA, np.array([1, 2]), "x"], ids=repr)
def test_extras_that_are_no_dict_are_refused(ask: Caller, name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}=.* has to be a dict"):
        ask(texts(1), **{name: value})
    assert ask.server.stats().received == 0


def test_extra_headers_and_queries_reach_the_endpoint_as_the_sdk_takes_them(ask: Caller) -> None:
    ask(texts(1), extra_headers={"User-Agent": openai.Omit(), "x-team": "a"}, extra_query={"a": [1, 2]})
    (request,) = ask.server.requests()
    assert "user-agent" not in request.headers
    assert request.headers["x-team"] == "a"
    assert request.target.endswith("?a%5B%5D=1&a%5B%5D=2")


def test_a_refreshed_answer_is_the_one_that_is_kept_though_the_clock_of_the_first_run_was_ahead(
    ask: Caller, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def request_ids(**keywords: bool) -> list[str]:
        return list(ask(texts(2), checkpoint=checkpoint, details=True, **keywords)["response_request_id"])

    now = time.time_ns()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: now + 60 * 10**9)
        first = request_ids()
    refreshed = request_ids(refresh=True)
    assert not set(first) & set(refreshed)
    assert request_ids() == refreshed
