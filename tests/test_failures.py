"""Failures: what a reply or an error means for the attempt, the row and the run."""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmframe.failures import (
    BACKOFF_BASE_S,
    BACKOFF_CAP_S,
    FILTER_CODES,
    QUOTA_CODES,
    QUOTED,
    Failure,
    Unreachable,
    backoff_s,
    of_error,
    of_no_answer,
    of_reply,
)
from llmframe.messages import well_formed
from llmframe.redaction import redacted
from llmframe.replies import read_json
from tests.server import SimulatedServer

RUN, ROW, RETRY = "run", "row", "retry"


def judge(status: int, body: Any = b"", **headers: str) -> Failure | None:
    """Judge a reply with this body, bytes as they are and anything else as JSON."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return of_reply(status, {name.replace("_", "-"): value for name, value in headers.items()}, raw, read_json(raw))


def failed(status: int, body: Any = b"", **headers: str) -> Failure:
    failure = judge(status, body, **headers)
    assert failure is not None
    return failure


def error(code: Any = None, message: Any = "No.", kind: Any = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "code": code, "param": None}}


# ---- by status


VERDICTS = {
    **dict.fromkeys([301, 302, 303, 307, 308, 401, 402, 403, 404], RUN),
    **dict.fromkeys([408, 409, 424, 425, 429, 498, 500, 502, 503, 504, 520, 529, 599], RETRY),
    **dict.fromkeys([400, 405, 406, 410, 411, 413, 415, 422, 451, 100], ROW),
}


@pytest.mark.parametrize(("status", "verdict"), VERDICTS.items())
@pytest.mark.parametrize("body", [b"", b"<html>", {}, error(), error("other"), {"message": "x"}, {"detail": "x"}, []])
def test_the_status_decides_where_no_code_says_more(status: int, verdict: str, body: Any) -> None:
    failure = failed(status, body)
    assert (failure.verdict, failure.http, failure.status) == (verdict, status, "failed")
    assert f"HTTP {status}" in failure.message


@pytest.mark.parametrize("status", [200, 201, 202])
@pytest.mark.parametrize(
    "body",
    [{}, {"choices": []}, {"error": None}, {"error": ""}, {"error": {}}, {"error": {"code": 0, "message": ""}}],
)
def test_a_200_with_a_json_object_is_no_failure(status: int, body: Any) -> None:
    assert judge(status, body) is None
    assert judge(status, body, x_should_retry="true") is None


def test_a_stream_that_nobody_asked_for_is_paid_for_once_and_ends_the_run() -> None:
    failure = failed(200, b'data: {"choices": [{"delta": {"content": "yes"}}]}\n\ndata: [DONE]\n\n')
    assert (failure.verdict, failure.kind) == ("run", "bad body")
    assert "streams its answers" in failure.message


@pytest.mark.parametrize("status", [200, 201, 202, 204])
@pytest.mark.parametrize("body", [b"", b"<html>Just a moment</html>", b'{"choices": [', [], 5, None, "ok", b"\xff\x00"])
def test_a_200_without_the_json_promised_is_tried_again(status: int, body: Any) -> None:
    failure = failed(status, body)
    assert (failure.verdict, failure.kind) == (RETRY, "bad body")
    assert "whose body is not the JSON promised" in failure.message


# ---- by code


@pytest.mark.parametrize("status", [200, 400, 403, 429, 500])
@pytest.mark.parametrize("code", sorted(QUOTA_CODES))
@pytest.mark.parametrize("field", ["code", "kind"])
def test_a_spent_quota_ends_the_run_whatever_the_status(status: int, code: str, field: str) -> None:
    failure = failed(status, error(**{"code": 429, field: code}), x_should_retry="true")
    assert (failure.verdict, failure.kind) == (RUN, "access")
    assert "billing" in failure.message


def test_credit_that_runs_out_as_a_bad_request_ends_the_run() -> None:
    words = "Your credit balance is too low to access the Anthropic API. Please go to Plans & Billing."
    failure = failed(400, error(message=words, kind="invalid_request_error"))
    assert (failure.verdict, failure.kind) == (RUN, "access")
    assert "billing of this key" in failure.message


@pytest.mark.parametrize("status", [200, 400, 403, 422, 500])
@pytest.mark.parametrize("code", sorted(FILTER_CODES))
def test_a_filtered_prompt_is_its_rows_own_and_filtered(status: int, code: str) -> None:
    failure = failed(status, error(code))
    assert (failure.verdict, failure.status) == (ROW, "filtered")


@pytest.mark.parametrize(
    ("status", "body", "verdict", "kind"),
    [
        (429, error("rate_limit_exceeded", kind="tokens"), RETRY, "rate limit"),
        (429, error(), RETRY, "rate limit"),
        (429, error(kind="exceeded_current_quota_error"), RUN, "access"),  # Moonshot
        (500, error(message="input is too large to process. increase the physical batch size"), ROW, "request"),
        (500, error(message="the input length exceeds the context length"), ROW, "request"),
        (500, error(message="context deadline exceeded"), RETRY, "server error"),
        (503, error(message="the queue is too large to process"), RETRY, "server error"),
        (400, error(kind="rate_limit_error"), RETRY, "rate limit"),
        (429, error("rate_limit_exceeded", "Request too large for gpt-4o: Limit 100, Requested 200."), ROW, "request"),
        (413, error("rate_limit_exceeded", "Too much: Limit 100, Requested 200.", "tokens"), ROW, "request"),
        (200, error("rate_limit_exceeded", "Request too large: Limit 100, Requested 200."), ROW, "request"),
        (400, error("json_validate_failed", kind="invalid_request_error"), RETRY, "bad body"),
        (498, error("capacity_exceeded", kind="capacity_exceeded"), RETRY, "server error"),
        (424, {"error": "Request failed during generation", "error_type": "generation"}, RETRY, "server error"),
        (400, error("context_length_exceeded"), ROW, "request"),
        (400, error("model_not_found"), RUN, "access"),
        (404, error("model_not_found"), RUN, "access"),
        (400, error("400", "/chat/completions: Invalid model name passed in model=m."), RUN, "access"),  # LiteLLM
        (404, {"detail": "Not Found"}, RUN, "access"),
        (401, error("invalid_api_key"), RUN, "access"),
        (503, error(kind="overloaded_error"), RETRY, "server error"),
        (200, error(message="upstream failed"), RETRY, "server error"),
        (200, {"error": "upstream failed"}, RETRY, "server error"),
        (200, {"error": ["upstream failed"]}, RETRY, "server error"),
        (200, error(502), RETRY, "server error"),
        (200, error("502"), RETRY, "server error"),
        (200, error(429), RETRY, "rate limit"),
        (200, error("rate_limit_exceeded"), RETRY, "rate limit"),
        (200, error(400), ROW, "request"),
        (200, error("invalid_api_key", kind="401"), RUN, "access"),
        (200, error("invalid_api_key", kind="invalid_request_error"), RUN, "access"),
        (200, error(kind="authentication_error"), RUN, "access"),
        (200, error("context_length_exceeded", kind="invalid_request_error"), ROW, "request"),
        (200, error(kind="invalid_request_error"), ROW, "request"),
        (200, error("invalid_prompt"), ROW, "request"),
        (200, error("server_error"), RETRY, "server error"),
        (200, [error(400)], ROW, "request"),
        (200, error(402), RUN, "access"),
        (200, error("model_not_found"), RUN, "access"),
    ],
)
def test_a_code_says_more_than_the_status_and_an_error_in_a_200_is_an_error(
    status: int, body: Any, verdict: str, kind: str
) -> None:
    failure = failed(status, body)
    assert (failure.verdict, failure.kind) == (verdict, kind)
    assert ("error in a 200" in failure.message) == (status == 200)


FLAGGED = [
    error(403, 'm requires moderation on OpenAI. Your input was flagged for "violence".'),
    {"error": {"code": 403, "message": "No.", "metadata": {"reasons": ["violence"], "flagged_input": "a"}}},
    {"code": "The caller does not have permission", "error": "Content violates usage guidelines. Team: 1."},
]


@pytest.mark.parametrize("body", FLAGGED)
def test_a_403_about_what_the_row_says_is_its_own_and_filtered(body: Any) -> None:
    failure = failed(403, body)
    assert (failure.verdict, failure.status) == (ROW, "filtered")


# ---- an answer that broke off


def choice(finish: Any = "stop", **more: Any) -> dict[str, Any]:
    return {"finish_reason": finish, "message": {"role": "assistant", "content": "Half a"}, **more}


@pytest.mark.parametrize(
    "broken",
    [
        choice("error", error={"code": 502, "message": "Upstream error"}),
        choice(error={"code": 502, "message": "Upstream error"}),
        choice("error"),
        choice("abort"),
        choice("insufficient_system_resource"),
    ],
)
def test_an_answer_that_broke_off_is_no_answer_and_is_tried_again(broken: dict[str, Any]) -> None:
    for choices in ([broken], [choice(), broken]):
        failure = failed(200, {"choices": choices})
        assert (failure.verdict, failure.kind, failure.http) == (RETRY, "server error", 500)
        assert "Upstream error" in failure.message or str(broken["finish_reason"]) in failure.message


@pytest.mark.parametrize("error", [None, "", {}, {"code": 0, "message": ""}])
@pytest.mark.parametrize("finish", ["stop", "length", "content_filter", None, ["error"]])
def test_an_answer_that_ended_in_any_other_way_is_no_failure(error: Any, finish: Any) -> None:
    assert judge(200, {"choices": [choice(finish, error=error)]}) is None


def test_an_answer_that_always_breaks_off_is_its_rows_failure_and_not_its_text(server: SimulatedServer) -> None:
    frame = pd.DataFrame({"text": ["a [[finish=error]]", "b"]})
    out = frame.llm.complete("{text}", model="m", base_url=server.base_url, progress=False, max_attempts=2)
    assert out["response_status"].tolist() == ["failed", "ok"]
    assert out["response"].isna().tolist() == [True, False]
    assert server.stats().answered == 3


# ---- how long to wait


@pytest.mark.parametrize(
    ("body", "wait"),
    [
        (error(message="Rate limit reached. Limit 3, Used 3. Please try again in 20s. Visit us."), "20s"),
        (error(message="Please try again in 7m12s."), "7m12s"),
        (error(message="Please try again in 1h2m3.456s"), "1h2m3.456s"),
        (error(message="Please Try again in 300ms."), "300ms"),
        (error(message="Please retry after 26 seconds."), "26"),
        (error(message="Please try again in a moment, or in 5 days"), None),
        (error(message="Please try again in 5 minutes"), None),
        ([{"error": {"code": 429, "message": "No.", "details": [5, {"a": 1}, {"retryDelay": "34s"}]}}], "34s"),
        ({"error": {"metadata": {"headers": {"X-RateLimit-Reset": "1741305600000"}}}}, "1741305600000"),
        (error(), None),
        (b"busy", None),
    ],
)
def test_how_long_a_rate_limit_asks_to_wait_is_found_in_its_body(body: Any, wait: str | None) -> None:
    assert failed(429, body).wait == wait
    assert failed(503, body).wait is None


# ---- x-should-retry


@pytest.mark.parametrize("said", ["true", "false", "maybe"])
@pytest.mark.parametrize(("status", "verdict"), VERDICTS.items())
def test_x_should_retry_decides_between_the_row_and_a_retry_and_never_over_the_run(
    status: int, verdict: str, said: str
) -> None:
    decided = {"true": RETRY, "false": ROW}.get(said, verdict)
    assert failed(status, error(), x_should_retry=said).verdict == (RUN if verdict == RUN else decided)


# ---- what the message says


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, error(message="Incorrect API key."), ["HTTP 401: Incorrect API key.", "api_key=", "OPENAI_API_KEY"]),
        (403, error(message="Country not supported."), ["Country not supported.", "may not do this"]),
        (402, b"", ["HTTP 402: an empty body", "billing"]),
        (404, {"detail": "Not Found"}, ["HTTP 404: Not Found", "base_url=", "/v1"]),
        (404, error(message="The model `x` does not exist."), ["check model="]),
        (307, b"", ["a redirect: set base_url"]),
        (500, b"<html>\n  <h1>Oh   no</h1>\n</html>", ["<html> <h1>Oh no</h1> </html>"]),
        (422, {"detail": [{"loc": ["body", "n"], "msg": "too many"}]}, ['"msg": "too many"']),
        (400, {"error": {"reason": "odd"}}, ["HTTP 400", '"reason": "odd"']),
        (400, {"error": "bad model"}, ["HTTP 400: bad model"]),
        (400, {"message": "top"}, ["HTTP 400: top"]),
        (400, error(message=5), ['"message": 5']),
        (400, [error()], ["HTTP 400: No."]),
        (404, error("DeploymentNotFound", "The API deployment does not exist."), ["check model="]),
    ],
)
def test_the_message_has_the_endpoints_own_words_and_what_to_do(status: int, body: Any, said: list[str]) -> None:
    message = failed(status, body).message
    assert all(words in message for words in said)


def test_a_redirect_says_where_it_leads_and_not_with_what() -> None:
    assert failed(308, b"moved", location="https://api.example.com/v1/chat/completions?sig=1").message == (
        "HTTP 308 to https://api.example.com/v1/chat/completions: moved (a redirect: set base_url to where it leads)"
    )


def test_a_reply_without_an_answer_is_quoted() -> None:
    failure = of_no_answer(200, b'{"choices": null, "base_resp": {"status_msg": "login fail"}}')
    assert (failure.verdict, failure.kind) == (RETRY, "bad body")
    assert "holds no answer" in failure.message
    assert "login fail" in failure.message


@pytest.mark.parametrize("body", [b"x" * 10**6, error(message="x" * 10**6), {"error": {"a": ["x" * 10**6]}}])
def test_a_long_body_is_quoted_short(body: Any) -> None:
    assert QUOTED < len(failed(500, body).message) < QUOTED + 100


# ---- anything


NAMES = st.sampled_from(["error", "message", "code", "type", "detail", "details", "metadata", "headers", "choices"])
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | NAMES, inner, max_size=3),
    max_leaves=6,
)
CODES = st.sampled_from([*QUOTA_CODES, *FILTER_CODES, "429", 503, "rate_limit_exceeded"])
REPLIES = JSON | st.fixed_dictionaries({"error": JSON | st.dictionaries(NAMES, JSON | CODES)})


@settings(deadline=None)
@given(
    st.integers(100, 599),
    st.dictionaries(st.sampled_from(["x-should-retry", "retry-after"]), st.text()),
    st.binary() | REPLIES.map(lambda value: json.dumps(value).encode()),
)
def test_any_reply_is_an_answer_or_a_failure_that_can_be_shown(
    status: int, headers: dict[str, str], body: bytes
) -> None:
    payload = read_json(body)
    failure = of_reply(status, headers, body, payload)
    if failure is None:
        assert 200 <= status < 300
        assert isinstance(payload, dict)
    else:
        assert failure.verdict in (RUN, ROW, RETRY)
        assert well_formed(failure.message) == failure.message
        assert len(failure.message) < QUOTED + 200


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, b'{"error": {"message": "bad header Bearer abc\\/d\\u002befgh"}}'),
        (400, b'{"headers": {"authorization": "Bearer abc\\/d\\u002befgh"}}'),
        (200, b'{"error": {"message": "bad header Bearer abc\\/d\\u002befgh"}}'),
        (200, b"<html>no such page: /v1/chat/completions?key=abc%2Fd%2Befgh</html>"),
        (502, b"<html>no such page: /v1/chat/completions?key=abc&#x2F;d&#43;efgh</html>"),
        (400, b" " * 1000 + b"-" * (QUOTED - 4) + b"abc/d+efgh"),
    ],
    ids=["escaped", "no message", "in a 200", "URL", "page", "at the cut"],
)
def test_the_words_of_a_failure_hold_no_secret_however_the_server_writes_it(status: int, body: bytes) -> None:
    redact = partial(redacted, secrets=("abc/d+efgh",))
    failure = of_reply(status, {}, body, read_json(body), redact)
    assert failure is not None
    assert "***" in failure.message
    assert not {"abc", "efgh"} & set(re.split("[^a-z]", failure.message))


# ---- no reply


def test_a_request_without_a_reply_is_tried_again_unless_the_certificate_is_wrong() -> None:
    assert of_error(Unreachable("connection", "reset")) == Failure(RETRY, "connection", "no reply: reset")
    assert of_error(Unreachable("timeout", "after 5 s")) == Failure(RETRY, "timeout", "after 5 s")
    wrong = of_error(Unreachable("certificate", "self-signed"))
    assert (wrong.verdict, wrong.kind) == (RUN, "connection")
    assert "certificate was not accepted: self-signed" in wrong.message
    assert of_error(Unreachable("connection", "\udcff")).message == "no reply: \ufffd"


@settings(deadline=None)
@given(st.integers(1, 10**6), st.floats(0, 1, exclude_max=True))
def test_the_wait_before_a_retry_is_jittered_over_an_exponential_span(strikes: int, chance: float) -> None:
    longest = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0 ** min(strikes, 100))
    assert backoff_s(strikes, chance) == chance * longest
    assert backoff_s(strikes, 0.0) == 0.0
