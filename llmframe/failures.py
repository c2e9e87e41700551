"""What a failure means: try the row again, give up the row, or stop the run.

Pure: a reply or an error in, a `Failure` out. The table is DESIGN's: the SDK's own policy (408, 409, 429, 5xx and
lost connections are tried again), with quota, keys and models told apart from it, since no retry mends those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmframe.messages import well_formed
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

QUOTA_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "access_terminated"})
RATE_CODES = frozenset({"rate_limit_exceeded", "rate_limit_error", "tokens", "requests"})
FILTER_CODES = frozenset({"content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation"})


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
    """

    verdict: Verdict
    kind: Kind
    message: str
    http: int | None = None
    status: Status = "failed"


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


def of_reply(status: int, headers: Mapping[str, str], body: bytes, payload: Any) -> Failure | None:
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

    Returns
    -------
    Failure or None
        None where the reply is the JSON that was asked for.
    """
    error = payload.get("error") if isinstance(payload, dict) else None
    if 200 <= status < 300 and isinstance(payload, dict) and not error:
        return None
    words = _words(error, payload, body)
    codes = _codes(error)
    if 200 <= status < 300:
        if error:  # some gateways put the failure of the server behind them into a 200
            own = next((int(code) for code in sorted(codes) if code.isdecimal() and 300 <= int(code) < 600), 500)
            return _judge(own, codes, f"error in a 200: {words}")
        if body.startswith(EVENTS):  # each is paid for, and the next would be no other
            message = f"the endpoint streams its answers, which nobody asked for; turn that off there: {words}"
            return Failure("run", "bad body", message, status)
        return Failure("retry", "bad body", f"HTTP {status} whose body is not the JSON promised: {words}", status)
    failure = _judge(status, codes, f"HTTP {status}: {words}")
    should_retry = headers.get("x-should-retry")
    if failure.verdict != "run" and should_retry in ("true", "false"):
        return replace(failure, verdict="retry" if should_retry == "true" else "row")
    return failure


def _judge(status: int, codes: frozenset[str], message: str) -> Failure:
    if codes & QUOTA_CODES or status == 402:
        return Failure("run", "access", f"{message} (no quota left: check the plan and billing of this key)", status)
    if codes & FILTER_CODES:
        return Failure("row", "request", message, status, "filtered")
    if status == 401:
        return Failure("run", "access", f"{message} (check the key: api_key=, or OPENAI_API_KEY)", status)
    if status == 403:
        return Failure("run", "access", f"{message} (this key may not do this here)", status)
    if status == 429 and "request too large" in message.lower():
        return Failure("row", "request", message, status)  # for the limit itself, so no waiting lets it in
    if status == 429 or codes & RATE_CODES:
        return Failure("retry", "rate limit", message, status)
    if status == 404 or "model_not_found" in codes:
        hint = "check model=" if "model" in message.lower() else "check base_url=: most end in /v1"
        return Failure("run", "access", f"{message} ({hint})", status)
    if 300 <= status < 400:
        return Failure("run", "access", f"{message} (a redirect: set base_url to where it leads)", status)
    if status in (408, 409, 425) or status >= 500:
        return Failure("retry", "server error", message, status)
    return Failure("row", "request", message, status)


def _codes(error: Any) -> frozenset[str]:
    """Give what the error calls itself: its ``code``, which may be an HTTP status, and its ``type``."""
    if not isinstance(error, dict):
        return frozenset()
    return frozenset(str(error[name])[:QUOTED] for name in ("code", "type") if isinstance(error.get(name), str | int))


def _words(error: Any, payload: Any, body: bytes) -> str:
    """Find the endpoint's own words, and quote them short and in one line."""
    said = error if error else payload
    if isinstance(said, dict):
        said = next((said[name] for name in ("message", "detail") if isinstance(said.get(name), str)), None)
    if not isinstance(said, str) or not said.strip():
        said = body[: 4 * QUOTED].decode("utf-8", "replace")
    words = " ".join(well_formed(said[: 4 * QUOTED]).split()) or "an empty body"
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
