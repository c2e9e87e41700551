"""Whether the endpoint is down, and when to look again.

Pure. Chance failures, however many, never make an outage: it takes failures with no sign of life between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SUSPECT = 3  # failures in a row after which sending waits for a sign of life
DOWN = 8  # failures in a row that are an outage
DOWN_ALONE = 5  # failures in a row that are one where nothing else is in flight that could tell
TIMELY = 0.5  # share of a usual latency: a failure that took as long is no fast rejection that overtook answers
MOST = 0.5  # share of what was sent since the first failure that must have failed, where all failures are fast ones
PROBE_S = 0.75  # seconds between probes: full speed is back within a second
LATER_S, PROBE_LATER_S = 60.0, 2.0  # how long an outage lasts before it is probed less, and the seconds between then
PROBE_LOST_S = 5.0  # how long a probe may be out before another is sent beside it


@dataclass(frozen=True, slots=True)
class Loss:
    """One request that failed and what was going on.

    Attributes
    ----------
    sent : float
        When it was sent.
    timed_out : bool
        It failed by waiting for an answer.
    usual_s : float or None
        How long an answer takes; None before the first.
    sent_before, sent_all : float
        Requests sent before it, and until now.
    in_flight : int
        The others.
    """

    sent: float
    timed_out: bool
    usual_s: float | None
    sent_before: float
    sent_all: float
    in_flight: int


class Outage:
    """Failures without a sign of life between them.

    Failures that come sooner than answers do overtake these, so there are two ways to count: in a row as they came
    back, if one of them took about as long as an answer; else only if half of what was sent since has failed.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        self.suspected = False
        self._failures = 0
        self._first_sent = 0.0  # when the first of them was sent
        self._sent_before = 0.0  # requests before that
        self._in_a_row = 0
        self._timely = False  # one of these took as long as an answer
        self._answered_at = -math.inf
        self._probe_at = 0.0
        self._probe_sent: float | None = None

    def wait_s(self, now: float) -> float:
        """Say how long the next probe of an endpoint that is down must wait; infinity is until this one is back."""
        if self._probe_sent is not None and now - self._probe_sent < PROBE_LOST_S:
            return math.inf
        return max(0.0, self._probe_at - now)

    def sent(self, now: float) -> None:
        """Count a request; of an endpoint that is down it is a probe."""
        if self.since is not None:
            self._probe_sent = now

    def given_up(self, sent: float) -> None:
        """Note that nothing will be heard of a request."""
        if self._probe_sent is not None and sent >= self._probe_sent:
            self._probe_sent = None

    def alive(self, now: float, sent: float) -> bool:
        """Note that something sent then was answered, were it with a refusal; True where that ends an outage."""
        self._answered_at = now
        self._in_a_row, self._timely = 0, False
        self.suspected = False
        if self._failures and sent < self._first_sent:
            return False
        self._failures = 0
        ended = self.since is not None
        self.since = self._probe_sent = None
        return ended

    def failed(self, now: float, loss: Loss) -> bool:
        """Count a failure; True where it shows that the endpoint is down."""
        if self.since is not None:
            if self._probe_sent is not None and loss.sent >= self._probe_sent:
                self._probe_sent = None
                self._probe_at = now + (PROBE_S if now - self.since < LATER_S else PROBE_LATER_S)
            return False
        if loss.timed_out and self._answered_at >= loss.sent:
            return False  # it hangs alone, or waited for its turn
        if not self._failures or loss.sent < self._first_sent:
            self._first_sent, self._sent_before = loss.sent, loss.sent_before
        self._failures += 1
        self._in_a_row += 1
        self._timely |= loss.usual_s is not None and now - loss.sent >= TIMELY * loss.usual_s
        most = self._failures >= MOST * (loss.sent_all - self._sent_before)
        failures = max(self._in_a_row if self._timely else 0, self._failures if most else 0)
        self.suspected = failures >= SUSPECT
        if failures < (DOWN if loss.in_flight else DOWN_ALONE):
            return False
        self.since, self.suspected = now, False
        self._probe_at, self._probe_sent = now + PROBE_S, None
        return True
