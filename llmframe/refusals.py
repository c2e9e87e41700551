"""What 429s alone show: a rate, and the time to stay away.

Pure. A time that the endpoint asks for is always waited; everything else here is a guess that the next refusal mends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

EVIDENCE = 5  # accepted requests that make a rate
RICH_EVIDENCE = 30  # and so many make one that needs no older ones
BACK_OFF = 0.95  # of the rate found
RECOVER_S = 5.0  # until the rate found is reached again, and then passed, slowly at first
PROBING = 0.1  # of the rate more when twice that time has gone by, and then with its third power
DISPROVED = 2.25  # times that time: what a bucket may have kept at first is used up, so the rate is another one
FASTER_S = 1.0  # and is sought by doubling
CATCH_UP = 1.5  # times the rate, for what was held back
KEPT = 0.8  # of that is trusted to be there
GUESS = 0.5  # of the speed at which the first refusal came
HOLD_S, LONGEST_HOLD_S = 0.025, 10.0  # without Retry-After: doubled at each refusal with nothing let in since the last
SOON_S = 0.5  # refused within that time after a decision: it was about the same thing
RAMP_S, RAMP = 0.15, 5  # a guessed rate is reached by so many doublings, each so long
DOUBLE_S = 3.0  # and doubled so often after that, until a refusal shows the rate


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

    def wait_s(self, now: float) -> float:
        """Say how long the next request must wait."""
        if now < self.hold_until:
            return self.hold_until - now
        if self._rate == math.inf:
            return 0.0
        speed = self._speed(now)
        self._level = min(max(1.0, 0.02 * speed), self._level + speed * (now - self._at))  # 20 ms: a late timer's worth
        self._at = now
        return (1.0 - self._level) / speed if self._level < 1.0 - 1e-9 else 0.0

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
        if refusal.explained:
            return "refused"
        if self._mark is None:
            self._rate = max(1.0, GUESS * refusal.speed)
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
            hold_s = min(LONGEST_HOLD_S, HOLD_S * 2.0**self._streak) if news else 0.0
        self.hold_until = max(self.hold_until, now + hold_s)
        self._since = self._at = max(self._since, self.hold_until)
        return max(0.0, self.hold_until - now)

    def _set_mark(self, refusal: Refusal, hold_s: float) -> None:
        self._mark, self._sent_by_mark = refusal.sent, refusal.sent_before
        self._refused_since, self._held_s = 1.0, hold_s

    def _measure(self, accepted: float, refusal: Refusal, hold_s: float, went_well_s: float) -> None:
        assert self._mark is not None
        interval_s = max(0.01, refusal.sent - self._mark)
        sending_s = interval_s - self._held_s + hold_s
        rate = accepted / interval_s
        slow, share = (0.9, 0.9) if self._sure and self._owed <= 0 else (0.5, 0.7)
        slower_before = accepted < slow * refusal.speed * sending_s
        if slower_before and sending_s > 0.5 * interval_s and went_well_s > SOON_S:
            rate = max(rate, share * refusal.speed)  # else the bucket ran over unseen, and the mean is too low
        self._recover_s = min(RECOVER_S, max(0.5, 2 * interval_s))  # poor evidence is soon tried again
        if self._sure and self._owed > 0:
            self._may_catch_up = False  # the bucket does not keep what was held back
        self._rate, self._sure = rate, True
        self._owed = KEPT * rate * hold_s if self._may_catch_up else 0.0

    def _speed(self, now: float) -> float:
        held_s = now - self._since
        if self._sure:
            x = held_s / self._recover_s
            speed = self._rate * (BACK_OFF + (1 - BACK_OFF) * x if x < 1 else 1 + PROBING * (x - 1) ** 3)
            if x > DISPROVED:
                speed *= float(2.0 ** min(20.0, (x - DISPROVED) * self._recover_s / FASTER_S))
            return CATCH_UP * speed if self._owed > 0 else speed
        if self._ramp:
            held_s -= RAMP_S * RAMP
        doublings = held_s / (RAMP_S if held_s < 0 else DOUBLE_S)
        return self._rate * float(2.0 ** min(20.0, doublings))
