"""Read what a response says about limits: how long to wait, and, in its headers, what is left of the rate.

Rubbish in it is never an error and never a number: whatever cannot be read is None.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

__all__ = ["RateHeaders", "rate_headers", "retry_after_s"]

_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhd]))+")
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])")
_FIELDS = [(of, what) for of in ("requests", "tokens") for what in ("limit", "remaining", "reset")]
_NAMES = (
    [f"x-ratelimit-{what}-{of}" for of, what in _FIELDS],  # OpenAI's, which nearly all others have taken over
    [f"anthropic-ratelimit-{of}-{what}" for of, what in _FIELDS],
)
_EPOCH_S = 1e9  # a plain number of seconds beyond this is a moment of this century, not a duration
_EPOCH_MS = 1e12  # and beyond this it counts milliseconds
_LONGEST_S = 3.2e9  # a century: no clock goes on for ever, and nobody waits for longer


@dataclass(frozen=True, slots=True)
class RateHeaders:
    """What an endpoint says about its request and token rates; None where it does not say.

    Attributes
    ----------
    limit_requests, limit_tokens : float or None
        Allowed in a period, a minute nearly everywhere.
    remaining_requests, remaining_tokens : float or None
        Left just now.
    reset_requests_s, reset_tokens_s : float or None
        Seconds until all of the limit is there again.
    """

    limit_requests: float | None = None
    remaining_requests: float | None = None
    reset_requests_s: float | None = None
    limit_tokens: float | None = None
    remaining_tokens: float | None = None
    reset_tokens_s: float | None = None


def rate_headers(headers: Mapping[str, str], wall_now: float) -> RateHeaders | None:
    """Read ``x-ratelimit-*`` or ``anthropic-ratelimit-*``; None where there are none.

    Parameters
    ----------
    headers : Mapping
        Case-insensitive, or with lower-case names.
    wall_now : float
        Seconds since the epoch, for resets that are dates.
    """
    get = headers.get
    for limit_requests, left_requests, reset_requests, limit_tokens, left_tokens, reset_tokens in _NAMES:
        remaining_requests, remaining_tokens = get(left_requests), get(left_tokens)
        if remaining_requests is not None or remaining_tokens is not None:
            return RateHeaders(
                _limit(get(limit_requests)),
                _count(remaining_requests),
                _duration_s(get(reset_requests), wall_now),
                _limit(get(limit_tokens)),
                _count(remaining_tokens),
                _duration_s(get(reset_tokens), wall_now),
            )
    return None


def retry_after_s(headers: Mapping[str, str], wall_now: float, in_body: str | None = None) -> float | None:
    """Read how many seconds to wait from ``retry-after-ms`` or ``retry-after`` (seconds, or a moment).

    Parameters
    ----------
    headers : Mapping
        Case-insensitive, or with lower-case names.
    wall_now : float
        Seconds since the epoch, for dates.
    in_body : str, optional
        What the body says of it, for where no header does: seconds, a duration, or a moment.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return _wait_s(milliseconds / 1000)
    text = headers.get("retry-after")
    if text is None:
        return _duration_s(in_body, wall_now)
    seconds = _number(text)
    if seconds is None:
        try:
            when = parsedate_to_datetime(text)
        except (ValueError, TypeError, IndexError, OverflowError):
            return None
        return _wait_s(_seconds_until(when, wall_now))
    return _wait_s(_since(seconds, wall_now))


def _number(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def _limit(text: str | None) -> float | None:
    value = _number(text)
    return value if value is not None and value > 0 else None  # 0 and -1 say "none set" at several gateways


def _count(text: str | None) -> float | None:
    value = _number(text)
    return None if value is None else max(0.0, value)


def _duration_s(text: str | None, wall_now: float) -> float | None:
    if text is None:
        return None
    value = _number(text)
    if value is None:
        text = text.strip()
        if _DURATION.fullmatch(text):
            value = sum(float(number) * _UNIT_S[unit] for number, unit in _DURATION_PART.findall(text))
        else:
            try:
                when = datetime.fromisoformat(text)
            except ValueError:
                return None
            value = _seconds_until(when, wall_now)
    else:
        value = _since(value, wall_now)
    return _wait_s(value)


def _since(value: float, wall_now: float) -> float:
    """Give the seconds that a number stands for, which may be a moment of the epoch."""
    if value > _EPOCH_MS:
        return value / 1000 - wall_now
    return value - wall_now if value > _EPOCH_S else value


def _wait_s(seconds: float | None) -> float | None:
    return None if seconds is None or not math.isfinite(seconds) else min(max(0.0, seconds), _LONGEST_S)


def _seconds_until(when: datetime, wall_now: float) -> float | None:
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    try:
        return when.timestamp() - wall_now
    except (OverflowError, OSError, ValueError):
        return None
