"""What a failure means: try the row again, give up the row, or stop the run.

Pure: a reply or an error in, a `Failure` out. The table is DESIGN's: the SDK's own policy (408, 409, 429, 5xx and
lost connections are tried again), with quota, keys and models told apart from it, since no retry mends those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmframe.messages import well_formed
from llmframe.replies import broken_off, error_of, item
from llmframe.results import Status

Verdict = Literal["retry", "row", "run"]
Kind = Literal[
    "rate limit",
    "server error",
    "connection",
    "timeout",
    "bad body",
    "request",
    "access",
    "replica away",
    "replica lost",
]

BACKOFF_BASE_S = 0.1  # a fault by chance is over at once, and a longer wait would be all that ends a short run
BACKOFF_CAP_S = 30.0  # beyond it a wait only idles: outages have a probe of their own
REPLICA = frozenset({"replica away", "replica lost"})  # kinds that another replica mends at once
EVENTS = (b"data:", b"event:", b"id:", b"retry:", b": ")  # how a stream of server-sent events begins
QUOTED = 500  # characters of an endpoint's own words in a message
READ = 1 << 16  # of them looked at: a secret that is cut in two is not found, so that is far beyond what is quoted

QUOTA_CODES = frozenset(
    {
        "insufficient_quota",
        "billing_hard_limit_reached",
        "billing_not_active",
        "access_terminated",
        "exceeded_current_quota_error",  # Moonshot
    }
)
RATE_CODES = frozenset({"rate_limit_exceeded", "rate_limit_error", "tokens", "requests"})
FILTER_CODES = frozenset({"content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation"})
STATUS_OF_CODE = {  # of an error in a 200, the more telling first
    "invalid_api_key": 401,
    "authentication_error": 401,
    "context_length_exceeded": 400,
    "invalid_prompt": 400,
    "invalid_request_error": 400,
}
UNSUPPORTED = frozenset({400, 404, 405, 415, 422, 500, 501})  # what comes of a parameter that a server does not know
PASSING = frozenset({408, 409, 424, 425, 498})  # 424: TGI, a fault while it generated; 498: Groq, no capacity just now

_MODERATED = re.compile(r"requires moderation|input was flagged|violates usage guidelines|SAFETY_CHECK_TYPE", re.I)
_NO_CREDIT = re.compile(r"your credit balance is too low", re.I)  # Anthropic's, a 400 like that of any bad request
_NO_MODEL = re.compile(r"invalid model name passed in model", re.I)  # LiteLLM's, a 400
_TRY_AGAIN = re.compile(
    r"(?:try again|retry) (?:in|after) ((?:\d+(?:\.\d+)?(?:ms|[smhd]))+\b|\d+(?:\.\d+)?(?= seconds?\b))", re.I
)

TOO_LONG = ("too large to process", "physical batch size", "maximum context length", "exceeds the context length")
"""Words of a 500 that mean the text: llama.cpp's and older Ollama's, which a 400 would say. No retry shortens it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """One attempt that gave no answer.

    Attributes
    ----------
    verdict : {"retry", "row", "run"}
        What it ends.
    kind : str
        What went wrong, in the words of the report.
    message : str
        What was wrong, with the endpoint's own words.
    http : int or None
        The HTTP status, where there was a reply.
    status : str
        What the row becomes if this was its last attempt.
    wait : str or None
        How long a rate limit asks to wait, or until when, as its body says it.
    """

    verdict: Verdict
    kind: Kind
    message: str
    http: int | None = None
    status: Status = "failed"
    wait: str | None = None


class Unreachable(Exception):
    """A request that got no reply.

    Attributes
    ----------
    kind : {"connection", "timeout", "certificate"}
        At what it failed.
    message : str
        The transport's own words.
    """

    def __init__(self, kind: Literal["connection", "timeout", "certificate"], message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


def of_error(error: Unreachable) -> Failure:
    """Judge a request that got no reply."""
    words = well_formed(error.message)
    if error.kind == "certificate":
        return Failure("run", "connection", f"the endpoint's certificate was not accepted: {words}")
    if error.kind == "timeout":
        return Failure("retry", "timeout", words)
    return Failure("retry", "connection", f"no reply: {words}")


def of_reply(
    status: int, headers: Mapping[str, str], body: bytes, payload: Any, redact: Callable[[str], str] = str
) -> Failure | None:
    """Judge a reply.

    Parameters
    ----------
    status : int
        The HTTP status.
    headers : mapping
        The reply's headers.
    body : bytes
        As it came.
    payload : object
        The body read as JSON, None where it is none.
    redact : callable
        Takes the request's secrets out of the endpoint's words, which may quote it.

    Returns
    -------
    Failure or None
        None where the reply is the JSON that was asked for.
    """
    error = error_of(payload)
    if not 200 <= status < 300:
        leads = headers.get("location", "").partition("?")[0][:QUOTED] if 300 <= status < 400 else ""
        to = f" to {well_formed(redact(leads))}" if leads else ""
        failure = _judge(status, error, f"HTTP {status}{to}: {_words(error, payload, body, redact)}")
        should_retry = headers.get("x-should-retry")
        if failure.verdict != "run" and should_retry in ("true", "false"):
            return replace(failure, verdict="retry" if should_retry == "true" else "row")
        return failure
    if error is not None:  # some gateways put the failure of the server behind them into a 200
        return _judge(_status_of(error), error, f"error in a 200: {_words(error, payload, body, redact)}")
    if (broken := broken_off(payload)) is not None:
        own = min(500, _status_of(broken))  # a 502 of one answer is no outage: it had begun
        return _judge(own, broken, f"error in an answer: {_words(broken, payload, body, redact)}")
    if isinstance(payload, dict):
        return None
    words = _words(None, payload, body, redact)
    if body.startswith(EVENTS):  # each is paid for, and the next would be no other
        message = f"the endpoint streams its answers, which nobody asked for; turn that off there: {words}"
        return Failure("run", "bad body", message, status)
    return Failure("retry", "bad body", f"HTTP {status} whose body is not the JSON promised: {words}", status)


def of_no_answer(status: int, body: bytes, redact: Callable[[str], str] = str) -> Failure:
    """Judge a reply that is JSON, but holds no answer: some gateways say in words of their own why (MiniMax)."""
    words = _words(None, None, body, redact)
    return Failure("retry", "bad body", f"the reply holds no answer (no choices): {words}", status)


def _judge(status: int, error: Any, message: str) -> Failure:
    codes, lower = _codes(error), message.lower()
    if codes & QUOTA_CODES or status == 402 or _NO_CREDIT.search(message):
        return Failure("run", "access", f"{message} (no quota left: check the plan and billing of this key)", status)
    if codes & FILTER_CODES or (status == 403 and _is_moderated(error, message)):
        return Failure("row", "request", message, status, "filtered")
    if status == 401:
        return Failure("run", "access", f"{message} (check the key: api_key=, or OPENAI_API_KEY)", status)
    if status == 403:
        return Failure("run", "access", f"{message} (this key may not do this here)", status)
    limited = status == 429 or bool(codes & RATE_CODES)
    if status == 413 or (limited and "request too large" in lower):
        return Failure("row", "request", message, status)  # for the limit itself, so no waiting lets it in
    if status == 500 and any(words in lower for words in TOO_LONG):
        return Failure("row", "request", message, status)
    if limited:
        return Failure("retry", "rate limit", message, status, wait=_wait(error, message))
    if status == 404 or "model_not_found" in codes or _NO_MODEL.search(message):
        hint = "check model=" if "model" in lower or "deployment" in lower else "check base_url=: most end in /v1"
        return Failure("run", "access", f"{message} ({hint})", status)
    if 300 <= status < 400:
        return Failure("run", "access", f"{message} (a redirect: set base_url to where it leads)", status)
    if "json_validate_failed" in codes:  # Groq's: what the model wrote fits no schema, and the next may
        return Failure("retry", "bad body", message, status)
    if status in PASSING or status >= 500:
        return Failure("retry", "server error", message, status)
    return Failure("row", "request", message, status)


def _status_of(error: Any) -> int:
    """Give the HTTP status that an error in a 200 stands for."""
    codes = _codes(error)
    number = next((int(code) for code in sorted(codes) if code.isdecimal() and 300 <= int(code) < 600), None)
    return number or next((status for code, status in STATUS_OF_CODE.items() if code in codes), 500)


def _is_moderated(error: Any, message: str) -> bool:
    """Whether a 403 is about what the row says: OpenRouter names what was flagged, xAI has only words for it."""
    about = item(error, "metadata")
    return bool(item(about, "reasons") or item(about, "flagged_input") or _MODERATED.search(message))


def _wait(error: Any, message: str) -> str | None:
    """Find how long a rate limit asks to wait, or until when, where its body says so."""
    details = item(error, "details")  # of Google's, one is a RetryInfo
    delays = [item(detail, "retryDelay") for detail in details] if isinstance(details, list) else []
    reset = item(error, "metadata", "headers", "X-RateLimit-Reset")  # OpenRouter's, in milliseconds of the epoch
    said = next((str(one) for one in (*delays, reset) if isinstance(one, str | int)), None)
    if said is None and (found := _TRY_AGAIN.search(message)):
        said = found[1]
    return said


def _codes(error: Any) -> frozenset[str]:
    """Give what the error calls itself: its ``code``, which may be an HTTP status, and its ``type``."""
    if not isinstance(error, dict):
        return frozenset()
    return frozenset(str(error[name])[:QUOTED] for name in ("code", "type") if isinstance(error.get(name), str | int))


def _words(error: Any, payload: Any, body: bytes, redact: Callable[[str], str]) -> str:
    """Find the endpoint's own words, and quote them short, in one line and without secrets."""
    said = error if error else payload
    if isinstance(said, dict):
        said = next((said[name] for name in ("message", "detail") if isinstance(said.get(name), str)), None)
    if not isinstance(said, str) or not said.strip():
        said = body[:READ].decode("utf-8", "replace")
    words = well_formed(redact(" ".join(said[:READ].split()))) or "an empty body"
    return words if len(words) <= QUOTED else words[:QUOTED] + "..."


def backoff_s(strikes: int, chance: float) -> float:
    """Give the seconds to wait before a retry: exponential, with full jitter.

    Parameters
    ----------
    strikes : int
        Failures of this row so far, from 1.
    chance : float
        A random number in [0, 1).

    References
    ----------
    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """
    return chance * min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0 ** min(strikes, 30))
