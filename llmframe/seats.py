"""How many requests the endpoint takes at one time, where that is what it refuses by, and not how fast they come.

Pure. A limit of requests at work and a limit of requests a second say the same 429. But where it is the number, what is
sent beside so many others is refused and what is sent beside fewer is not; a rate refuses beside however many.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from llmframe.rates import ROUNDING_S

MOMENTS, MOST_MOMENTS = 4, 16  # refusals, with something let in between them, that it takes, and that are looked at
LET_IN = 16  # requests let in meanwhile that it takes: beside one or two, a rate refuses as a number does
MISTAKEN = 4  # times as many are needed of both, each time that it was not their number after all
MOSTLY = 0.75  # share of what was sent beside as many as the least crowded of them that must have been refused
KEPT = 1024  # requests that are remembered
ALIKE, ALIKE_SHARE = 1, 0.05  # requests, and share of them, by which the refusals' numbers may differ
PROBE_S, PROBE_LATEST_S = 1.0, 16.0  # seconds until one more is tried, doubled each time that it is refused
PROBE_HOLDS = 10.0  # times as long as the wait that a refusal costs, at least
GROWTH = 1.25  # times as many, once one more was let in


class Seats:
    """The most that may be in flight, as refusals show it.

    Attributes
    ----------
    most : float
        Infinite, as long as refusals do not go by their number.
    """

    def __init__(self) -> None:
        self.most = math.inf
        self._times: list[float] = []  # when each of the last requests was sent
        self._beside: list[int] = []  # and how many others were in flight
        self._was_refused: list[bool] = []
        self._moments: list[float] = []  # when those were sent that were refused first, each time
        self._needed = 1  # times the evidence
        self._decided = -math.inf  # refusals of what was sent before are no news
        self._interval_s = PROBE_S
        self._probe_at = math.inf
        self._probe: float | None = None  # when the one more was sent that is tried

    @property
    def known(self) -> bool:
        """Whether it is their number that the endpoint refuses by."""
        return self.most < math.inf

    def room(self, now: float, in_flight: int) -> bool:
        """Say whether one more may be sent."""
        return in_flight < self.most or (in_flight == self.most and self._probe is None and now >= self._probe_at)

    def sent(self, now: float, in_flight: int) -> None:
        """Count a request, by how many others are in flight."""
        if in_flight >= self.most:
            self._probe = now
        self._times.append(now)
        self._beside.append(in_flight)
        self._was_refused.append(False)
        if len(self._times) > KEPT:
            del self._times[: KEPT // 2], self._beside[: KEPT // 2], self._was_refused[: KEPT // 2]

    def answered(self, now: float, sent: float) -> None:
        """Learn from an answer: more than were thought to be let in may be."""
        if self._probe is None or not self._is_probe(sent):
            return
        self._probe = None
        self.most = float(max(self.most + 1, math.floor(GROWTH * self.most)))
        self._interval_s, self._probe_at = PROBE_S, now
        self._moments.clear()

    def lost(self, now: float, sent: float) -> None:
        """Forget a request that got neither an answer nor a refusal."""
        if self._is_probe(sent):
            self._probe, self._probe_at = None, now + self._interval_s

    def refused(self, now: float, sent: float, hold_s: float) -> bool:
        """Learn from a refusal, which asks to wait so long; True where it shows that it is their number."""
        index = self._index(sent)
        if index is None:
            return False
        self._was_refused[index] = True
        beside = self._beside[index]
        if self.known:
            self._shrink(now, sent, beside, hold_s)
            return False
        if sent < self._decided:
            return False
        self._decided = now
        if self._moments and not self._let_in(self._moments[-1], index):
            return False
        self._moments = [*self._moments[1 - MOST_MOMENTS * self._needed :], sent]
        enough = range(MOMENTS * self._needed, len(self._moments) + 1)
        least = next((least for count in enough if (least := self._least(self._moments[-count:], index))), None)
        if least is None:
            return False
        self.most, self._interval_s = float(least), PROBE_S
        self._put_off(now, hold_s)
        return True

    def _shrink(self, now: float, sent: float, beside: int, hold_s: float) -> None:
        if beside == 0:  # nobody has a seat, and yet it is refused
            self.most, self._probe = math.inf, None
            self._needed *= MISTAKEN
            self._moments.clear()
            return
        if self._is_probe(sent):
            self._probe = None
            self._interval_s = min(PROBE_LATEST_S, 2 * self._interval_s)
        elif beside < self.most:
            self._interval_s = PROBE_S
        self.most = min(self.most, float(beside))
        self._put_off(now, hold_s)

    def _put_off(self, now: float, hold_s: float) -> None:
        self._probe_at = now + hold_s + max(self._interval_s, PROBE_HOLDS * hold_s)

    def _let_in(self, since: float, until: int) -> bool:
        return not all(self._was_refused[bisect_right(self._times, since + ROUNDING_S) : until])

    def _least(self, moments: list[float], until: int) -> int | None:
        """Give the fewest others beside which one was refused, if nearly all beside so many were."""
        begin = self._index(moments[0])
        if begin is None:
            return None
        lately = list(zip(self._beside[begin : until + 1], self._was_refused[begin : until + 1], strict=True))
        least = min(beside for beside, refused in lately if refused)
        crowded = [refused for beside, refused in lately if beside >= least]
        first = [self._beside[index] for sent in moments if (index := self._index(sent)) is not None]
        alike = max(first) <= least + max(ALIKE, ALIKE_SHARE * least)
        enough = sum(not refused for _, refused in lately) >= max(least, LET_IN * self._needed)
        return least if alike and enough and sum(crowded) >= MOSTLY * len(crowded) else None

    def _is_probe(self, sent: float) -> bool:
        return self._probe is not None and abs(sent - self._probe) <= ROUNDING_S

    def _index(self, sent: float) -> int | None:
        index = bisect_right(self._times, sent + ROUNDING_S) - 1
        return index if index >= 0 and sent - self._times[index] <= ROUNDING_S else None
