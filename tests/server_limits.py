"""The rate limits of the simulated server: token buckets, and how a provider's headers tell of them.

A bucket never holds less than nothing: what is not there is not given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

from tests.server_behaviour import go_duration


class Bucket:
    """A token bucket: fills at `per_min` up to `size`, and starts full."""

    def __init__(self, per_min: float, size: float | None, now: float) -> None:
        self.level = math.inf
        self.resize(per_min, size)
        self._at = now

    def resize(self, per_min: float, size: float | None) -> None:
        """Change the limit; what is in the bucket stays, as far as it has room."""
        self.per_min, self.size = per_min, per_min if size is None else size
        self.level = min(self.level, self.size)

    def fill(self, now: float) -> None:
        """Let in what has come since the last call."""
        self.level = min(self.size, self.level + (now - self._at) * self.per_min / 60)
        self._at = now

    def wait_s(self, amount: float) -> float:
        """Say how long it takes until `amount` is there: 0 is now, infinity is never."""
        if amount <= self.level + 1e-6:  # a client that waited the exact time must not fail by a rounding
            return 0.0
        return (amount - self.level) * 60 / self.per_min if amount <= self.size and self.per_min > 0 else math.inf

    def full_s(self) -> float:
        """Say how long it takes until the bucket is full."""
        return (self.size - self.level) * 60 / self.per_min if self.per_min > 0 else math.inf


def rate_headers(kind: str, buckets: Mapping[str, Bucket]) -> str:
    """Write the state of the buckets as one provider's headers."""
    lines = []
    for what, bucket in buckets.items():
        limit, remaining, full_s = int(bucket.per_min), max(0, int(bucket.level)), min(bucket.full_s(), 86_400.0)
        if kind == "anthropic":
            reset = (datetime.now(UTC) + timedelta(seconds=full_s)).isoformat(timespec="milliseconds")
            names = [f"anthropic-ratelimit-{what}-{name}" for name in ("limit", "remaining", "reset")]
            reset = reset.replace("+00:00", "Z")
        else:
            reset = str(math.ceil(full_s)) if kind == "azure" else go_duration(full_s)
            names = [f"x-ratelimit-{name}-{what}" for name in ("limit", "remaining", "reset")]
        lines += [f"{names[0]}: {limit}\r\n", f"{names[1]}: {remaining}\r\n", f"{names[2]}: {reset}\r\n"]
    return "".join(lines)


def retry_header(kind: str, wait_s: float, *, exact: bool) -> str:
    """Write when to come back; a computed time is rounded up, an `exact` one is said as it is."""
    if kind == "ms":
        return f"retry-after-ms: {wait_s * 1000 if exact else math.ceil(wait_s * 1000):.12g}\r\n"
    if kind == "date":
        moment = datetime.fromtimestamp(math.ceil(time.time() + wait_s), UTC)
        return f"retry-after: {format_datetime(moment, usegmt=True)}\r\n"
    return f"retry-after: {wait_s if exact else math.ceil(wait_s):.12g}\r\n"
