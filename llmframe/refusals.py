"""What 429s alone show: a rate, and the time to stay away.

Pure. A time that the endpoint asks for is always waited; everything else here is a guess that the next refusal mends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmframe.rates import SPEED_S

MOST_DOUBLINGS = 20.0  # of a speed or a wait: a million times is as good as endless, and more powers would be no float

# How a rate is measured: by what was accepted from one refusal to a later one, and the time between them.
EVIDENCE = 5  # accepted requests that are enough to measure a rate
RICH_EVIDENCE = 30  # accepted requests that are enough to measure the rate without any before them
SHORTEST_S = 0.01  # the least time over which a rate is measured
# Where fewer were accepted in that time than SLOWER of what the speed just before the refusal gives, sending was slower
# before, and the bucket ran over unseen. The rate is then at least AT_LEAST of that speed. The other two numbers are
# for a rate that was measured before, with nothing to catch up.
SLOWER, AT_LEAST = 0.5, 0.7
SLOWER_MEASURED, AT_LEAST_MEASURED = 0.9, 0.9
SENDING = 0.5  # share of that time in which requests were sent, and not held back, above which this can be told
SOON_S = 0.5  # seconds after a decision: a refusal of what was sent in them is about the same thing, and tells less

# How fast to send once it is measured.
BACK_OFF = 0.95  # share of the rate at which sending goes on
RECOVER_S = 5.0  # seconds until the rate is reached again; then it is passed, slowly at first
# A rate measured in a short time is poor evidence, and soon tried again: after RECOVER_INTERVALS times that time where
# this is less than RECOVER_S, but at least SHORTEST_RECOVER_S.
RECOVER_INTERVALS, SHORTEST_RECOVER_S = 2.0, 0.5
# A wait of LONG_S may fill the bucket, and what would refill after that is lost. What was accepted, by all of the time,
# is then the least that the rate may be, and by the time of sending about the most: it is taken to lie between. As a
# refusal costs such a wait, the rate is reached only in COSTS times as long, in less where it is that uncertain.
LONG_S, COSTS = 2.0, 4.0
OVERSHOT = 1.5  # times the mean speed that the last one counts for, at most: it may have doubled several times
PROBING = 0.1  # share of the rate by which it is passed after twice the time until then; more with the third power
DISPROVED = 2.25  # times the time until then: a bucket has used up what it had kept by then, so the rate is another one
FASTER_S = 1.0  # seconds in which the speed doubles from then on
CATCH_UP = 1.5  # times the rate at which what was held back is sent
KEPT = 0.8  # share of what refills in a wait that is trusted to be in the bucket after it
BURST_S = 0.02  # seconds' worth of requests that may go at once: a timer may be late by so much
ROUNDING = 1e-9  # of a request; sums of floats are rounded

# How fast to send before that.
GUESS = 0.5  # share of the speed at the first refusal that the rate is guessed to be
LOWEST_GUESS = 1.0  # requests a second, at least
RAMP_S, RAMP = 0.15, 5  # seconds in which the speed doubles, and the doublings that lead up to the guessed rate
DOUBLE_S = 3.0  # seconds in which it doubles after that, until a refusal shows the rate

# How long to stay away where no Retry-After says it.
HOLD_S = 0.025  # half of the first wait; each is twice the last, if nothing was let in since then
LONGEST_HOLD_S = 10.0


@dataclass(frozen=True, slots=True)
class Refusal:
    """One 429 and what was going on.

    Attributes
    ----------
    sent : float
        When the request was sent.
    retry_after_s : float or None
        What it asks for.
    explained : bool
        Its headers say that the rate that they tell is used up.
    sent_before, sent_all : float
        Requests sent before it, and until now.
    speed : float
        Requests accepted a second, of late.
    """

    sent: float
    retry_after_s: float | None
    explained: bool
    sent_before: float
    sent_all: float
    speed: float


class Refusals:
    """The rate at which to send to an endpoint that says no more than 429.

    A refusal says that the endpoint's bucket is empty just then, so what it accepted from one refusal to a later one
    is its rate, whatever the size of the bucket. Until there are two, the rate is guessed.
    """

    def __init__(self, now: float) -> None:
        self.hold_until = -math.inf
        self._by_rate = True
        self._rate = math.inf
        self._sure = False  # the rate was measured
        self._ramp = False
        self._recover_s = RECOVER_S
        self._since = now  # when sending at the rate began
        self._at = now
        self._level = 0.0
        self._owed = 0.0  # requests held back while waiting
        self._may_catch_up = True
        self._decided = now  # refusals of what was sent before are no news
        self._sent_by_decision = 0.0
        self._streak = 0  # refusals with nothing let in between them
        self._mark: float | None = None  # when a request was sent that found the bucket empty
        self._sent_by_mark = 0.0
        self._refused_since = 0.0  # of what was sent since the mark
        self._held_s = 0.0  # since the mark

    @property
    def rate(self) -> float:
        """Requests a second, as far as measured; infinite before."""
        return self._rate if self._sure else math.inf

    @property
    def by_rate(self) -> bool:
        """Whether it is a rate that they show; without one there is only a time to stay away."""
        return self._by_rate

    @by_rate.setter
    def by_rate(self, by_rate: bool) -> None:
        if self._by_rate and not by_rate:
            self._rate, self._sure, self._mark, self._owed = math.inf, False, None, 0.0
        self._by_rate = by_rate

    def wait_s(self, now: float) -> float:
        """Say how long the next request must wait."""
        if now < self.hold_until:
            return self.hold_until - now
        if self._rate == math.inf:
            return 0.0
        speed = self._speed(now)
        self._level = min(max(1.0, BURST_S * speed), self._level + speed * (now - self._at))
        self._at = now
        return (1.0 - self._level) / speed if self._level < 1.0 - ROUNDING else 0.0

    def take(self) -> None:
        """Count a request that is sent."""
        if self._rate < math.inf:
            self._level -= 1.0
            self._owed -= 1 - 1 / CATCH_UP

    def refused(self, now: float, refusal: Refusal) -> str:
        """Learn from a 429; the decision, if any."""
        if self._mark is not None and refusal.sent >= self._mark:
            self._refused_since += 1
        news = refusal.sent >= self._decided
        let_in = refusal.sent_before > self._sent_by_decision
        hold_s = self._hold(now, refusal, news, let_in)
        if not news:
            return ""
        went_well_s = refusal.sent - self._decided
        self._decided, self._level, self._sent_by_decision = now, 1.0, refusal.sent_all
        if refusal.explained or not self._by_rate:
            return "refused"
        if self._mark is None:
            self._rate = max(LOWEST_GUESS, GUESS * refusal.speed)
            self._ramp = hold_s < RAMP_S * RAMP  # else the bucket has filled meanwhile, at whatever rate
            self._set_mark(refusal, hold_s)
            return "refused: rate guessed"
        self._held_s += hold_s
        accepted = refusal.sent_before - self._sent_by_mark - self._refused_since + 1
        if accepted < EVIDENCE or not let_in:
            return "refused"
        self._measure(accepted, refusal, hold_s, went_well_s)
        if accepted >= RICH_EVIDENCE:
            self._set_mark(refusal, hold_s)
        return "refused: rate measured"

    def _hold(self, now: float, refusal: Refusal, news: bool, let_in: bool) -> float:
        hold_s = refusal.retry_after_s
        if hold_s is None:
            if news:
                self._streak = 1 if let_in else self._streak + 1
            # What is beyond their number is let in as soon as another is answered.
            hold_s = min(LONGEST_HOLD_S, HOLD_S * 2.0 ** min(MOST_DOUBLINGS, self._streak)) if news else 0.0
            if let_in and not self._by_rate:
                hold_s = 0.0
        self.hold_until = max(self.hold_until, now + hold_s)
        self._since = self._at = max(self._since, self.hold_until)
        return max(0.0, self.hold_until - now)

    def _set_mark(self, refusal: Refusal, hold_s: float) -> None:
        self._mark, self._sent_by_mark = refusal.sent, refusal.sent_before
        self._refused_since, self._held_s = 1.0, hold_s

    def _measure(self, accepted: float, refusal: Refusal, hold_s: float, went_well_s: float) -> None:
        assert self._mark is not None
        interval_s = max(SHORTEST_S, refusal.sent - self._mark)
        sending_s = interval_s - self._held_s + hold_s
        rate = accepted / interval_s
        measured = self._sure and self._owed <= 0
        slower, at_least = (SLOWER_MEASURED, AT_LEAST_MEASURED) if measured else (SLOWER, AT_LEAST)
        slower_before = accepted < slower * refusal.speed * sending_s
        if slower_before and sending_s > SENDING * interval_s and went_well_s > SOON_S:
            rate = max(rate, at_least * refusal.speed)
        self._recover_s = min(RECOVER_S, max(SHORTEST_RECOVER_S, RECOVER_INTERVALS * interval_s))
        if refusal.retry_after_s is not None and refusal.retry_after_s >= LONG_S:
            least, mean = accepted / interval_s, accepted / max(SPEED_S, sending_s)
            most = max(least, mean, min(refusal.speed, OVERSHOT * mean))
            rate = math.sqrt(least * most)
            self._recover_s = max(self._recover_s, COSTS * refusal.retry_after_s * least / rate)
        if self._sure and self._owed > 0:
            self._may_catch_up = False  # the bucket does not keep what was held back
        self._rate, self._sure = rate, True
        self._owed = KEPT * rate * hold_s if self._may_catch_up else 0.0

    def _speed(self, now: float) -> float:
        held_s = now - self._since
        if self._sure:
            recovered = held_s / self._recover_s
            back, beyond = BACK_OFF + (1 - BACK_OFF) * recovered, 1 + PROBING * (recovered - 1) ** 3
            speed = self._rate * (back if recovered < 1 else beyond)
            if recovered > DISPROVED:
                speed *= float(2.0 ** min(MOST_DOUBLINGS, (recovered - DISPROVED) * self._recover_s / FASTER_S))
            return CATCH_UP * speed if self._owed > 0 else speed
        if self._ramp:
            held_s -= RAMP_S * RAMP
        doublings = held_s / (RAMP_S if held_s < 0 else DOUBLE_S)
        return self._rate * float(2.0 ** min(MOST_DOUBLINGS, doublings))
