"""Failures: what a reply or an error means for the attempt, the row and the run."""

from __future__ import annotations

import json
from typing import Any

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
    of_reply,
)
from llmframe.messages import well_formed
from llmframe.replies import read_json

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
    **dict.fromkeys([408, 409, 425, 429, 500, 502, 503, 504, 520, 529, 599], RETRY),
    **dict.fromkeys([400, 405, 406, 410, 411, 413, 415, 422, 451, 100], ROW),
}


@pytest.mark.parametrize(("status", "verdict"), VERDICTS.items())
@pytest.mark.parametrize("body", [b"", b"<html>", {}, error(), error("other"), {"message": "x"}, {"detail": "x"}, []])
def test_the_status_decides_where_no_code_says_more(status: int, verdict: str, body: Any) -> None:
    failure = failed(status, body)
    assert (failure.verdict, failure.http, failure.status) == (verdict, status, "failed")
    assert f"HTTP {status}" in failure.message


@pytest.mark.parametrize("status", [200, 201, 202])
@pytest.mark.parametrize("body", [{}, {"choices": []}, {"error": None}, {"error": ""}, {"error": {}}])
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
        (400, error(kind="rate_limit_error"), RETRY, "rate limit"),
        (429, error("rate_limit_exceeded", "Request too large for gpt-4o: Limit 100, Requested 200."), ROW, "request"),
        (400, error("context_length_exceeded"), ROW, "request"),
        (400, error("model_not_found"), RUN, "access"),
        (404, error("model_not_found"), RUN, "access"),
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
        (400, [error()], ["No."]),
    ],
)
def test_the_message_has_the_endpoints_own_words_and_what_to_do(status: int, body: Any, said: list[str]) -> None:
    message = failed(status, body).message
    assert all(words in message for words in said)


@pytest.mark.parametrize("body", [b"x" * 10**6, error(message="x" * 10**6), {"error": {"a": ["x" * 10**6]}}])
def test_a_long_body_is_quoted_short(body: Any) -> None:
    assert QUOTED < len(failed(500, body).message) < QUOTED + 100


# ---- anything


NAMES = st.sampled_from(["error", "message", "code", "type", "detail"])
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
