"""Rates that are known: the user's caps, exactly, and what the endpoint's headers tell, as nearly as they tell it.

Pure. A cap is never passed; an allowance is taken to be the lowest that fits what was told.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

MINUTE_S, HOUR_S, DAY_S = 60.0, 3600.0, 86_400.0
ROUNDING = 1e-9  # difference of two amounts that are the same: sums of floats are rounded
ROUNDING_S = 1e-6  # the same for times: when a request was sent is told by its latency, which is rounded

# What the user caps.
STRETCH = (
    1.02  # times its length that a capped second is counted: the network may deliver 20 ms closer together than we sent
)
TENTHS = 10  # parts of a second over which a second's share of the requests is spread
TICKET_S = 0.5  # after which an unused ticket is void: less than the 1.2 s by which a capped minute is counted longer
TICKET_TOKENS = 1e-6  # tokens that a ticket may lack: sums of floats are rounded

# What headers tell.
MARGIN_S = 0.05  # seconds' worth of refill that is left in the endpoint's bucket: headers are stale by about that
MARGIN_SHARE = 0.25  # share of the bucket that is left in it at most, however much refills in that time
RESET_SLACK_S = 1.0  # by how much a reset may exceed a limit's period; one that is longer tells of a longer period
SILENT = 12  # answers in a row without a word of a limit that others told, after which it is there no more
EMPTIED, FULL_AGAIN = 0.25, 0.75  # shares of a bucket between which it is timed how fast it fills
SOONER = 10.0  # times as fast as by the minute it must fill: some endpoints round, and answers overtake one another
SECOND_S = 1.05  # the longest reset of a limit by the second, with what the network adds
SEEN = 0.5  # share of the limit that must have been left at some time before it can be one by the second

# What was sent.
HISTORY_STEP_S = 0.005  # how finely it is known what was sent when
HISTORY = 100_000  # steps that are kept
SPEED_S = 0.5  # how far back the speed is measured
FEW = 16  # requests that are too few to tell a speed: it is measured over a longer time then
SHORTEST_S = 0.05  # the least time over which it is measured


class Cap:
    """At most so much in any span of so many seconds; a single amount beyond that goes alone.

    What counts is when a request goes onto the wire: between the permission and that there may be a handshake, which
    would let the next ones come closer behind it than they were sent.
    """

    def __init__(self, most: float, span_s: float) -> None:
        self._most = most
        self._span_s = span_s * STRETCH
        self._entries: deque[tuple[float, float]] = deque()
        self._held: deque[float] = deque()  # let go, and not on the wire yet
        self._total = 0.0

    @property
    def rate(self) -> float:
        """How much a second it lets through."""
        return self._most / self._span_s

    def wait_s(self, now: float, amount: float) -> float:
        """Say how long so much must wait."""
        entries = self._entries
        while entries and entries[0][0] + self._span_s <= now:
            self._total -= entries.popleft()[1]
        excess = self._total + amount - self._most
        if excess <= ROUNDING or not (entries or self._held):
            return 0.0
        for then, entry in entries:
            excess -= entry
            if excess <= ROUNDING:
                return max(then + self._span_s - now, ROUNDING_S)
        # What is not on the wire yet ends at a time nobody knows; an amount beyond the cap waits for all others.
        return math.inf if self._held else max(entries[-1][0] + self._span_s - now, ROUNDING_S)

    def take(self, now: float, amount: float) -> None:
        """Count what is on the wire, besides what is held."""
        self._add(amount)
        self._entries.append((now, amount))

    def hold(self, amount: float) -> None:
        """Count what will go onto the wire in a moment."""
        self._add(amount)
        self._held.append(amount)

    def _add(self, amount: float) -> None:
        if not self._entries and not self._held:
            self._total = 0.0  # what rounding left
        self._total += amount

    def wrote(self, now: float) -> None:
        """Note that one of what is held is on the wire, or will never be."""
        self._entries.append((now, self._held.popleft()))

    def takes_s(self, amount: float) -> float:
        """Say how long so much takes at least, in all."""
        return max(0.0, self._total + amount - self._most) / self.rate


def request_caps(rpm: float | None) -> list[Cap]:
    """Build the caps of requests a minute: the minute's, each second's share of it, and each tenth's of that."""
    if rpm is None:
        return []
    if rpm < 1:
        return [Cap(1, MINUTE_S / rpm)]
    a_second = math.ceil(rpm / MINUTE_S)
    # A second's share that comes at once would fill the network's queues, and arrive as closely as it pleases these.
    return [Cap(math.floor(rpm), MINUTE_S), Cap(a_second, 1.0), Cap(math.ceil(a_second / TENTHS), 1 / TENTHS)]


def token_caps(tpm: float | None) -> list[Cap]:
    """Build the caps of tokens a minute: the minute's, and each second's share of it."""
    return [] if tpm is None else [Cap(tpm, MINUTE_S), Cap(tpm / MINUTE_S, 1.0)]


class Share:
    """What this process may have of what several share: tickets to send with, seats, and how many they are.

    Attributes
    ----------
    peers : int
        Processes that ask the endpoint, this one included.
    seats : float
        Requests that this one may have in flight.
    """

    def __init__(self) -> None:
        self.peers = 1
        self.seats = math.inf
        self._requests = self._tokens = 0.0
        self._until = -math.inf
        self._used: list[float] = []  # the tokens of each request since `sent_since`

    def sent_since(self) -> list[float]:
        """Give the tokens of each request that was sent since it was last asked: as many more are to be expected."""
        used, self._used = self._used, []
        return used

    def give(self, now: float, requests: float, tokens: float) -> None:
        """Take tickets, which hold for `TICKET_S`: later they would be those of another minute."""
        if now >= self._until:
            self._requests = self._tokens = 0.0
        if requests:  # without this, a ticket too small for its request would be renewed for ever
            self._requests += requests
            self._tokens += tokens
            self._until = now + TICKET_S

    def tickets(self, now: float) -> int:
        """Give the requests that there are tickets for."""
        return int(self._requests) if now < self._until else 0

    def wait_s(self, now: float, tokens: float) -> float:
        """Say whether there is a ticket: 0, or infinity until some are given."""
        there = now < self._until and self._requests >= 1.0 and self._tokens >= tokens - TICKET_TOKENS
        return 0.0 if there else math.inf

    def take(self, tokens: float) -> None:
        """Use a ticket."""
        self._used.append(tokens)
        self._requests -= 1.0
        self._tokens -= tokens

    def take_tokens(self, tokens: float) -> None:
        """Make right what a request took beyond its ticket."""
        self._tokens -= tokens


class Allowance:
    """One limit as the endpoint's headers tell it: a bucket that refills, and whose level every answer corrects."""

    def __init__(self, now: float) -> None:
        self.known = False
        self.rate = 0.0  # a second
        self._at = now
        self._level = 0.0
        self._limit = 0.0
        self._room = 1.0  # the most that was ever left
        self._silent = 0  # answers in a row that told nothing
        self._longest_s = 0.0  # of the resets told
        self._emptied_at: float | None = None  # when hardly anything was left
        self._by_second = False

    def wait_s(self, now: float, amount: float) -> float:
        """Say how long so much must wait."""
        if not self.known:
            return 0.0
        self._refill(now)
        margin = min(MARGIN_S * self.rate, MARGIN_SHARE * self._room)
        missing = min(amount + margin, self._room) - self._level
        return missing / self.rate if missing > ROUNDING else 0.0

    def take(self, now: float, amount: float) -> None:
        """Count what is sent."""
        if self.known:
            self._refill(now)
            self._level -= amount

    def takes_s(self, amount: float) -> float:
        """Say how long so much takes at least, in all."""
        return max(0.0, amount - self._level) / self.rate if self.known and self.rate else 0.0

    def learn(
        self,
        now: float,
        limit: float | None,
        remaining: float | None,
        reset_s: float | None,
        sent: Sequence[tuple[float, float]],
    ) -> None:
        """Correct the level by headers, which tell it as it was some time ago.

        Parameters
        ----------
        now : float
            When the level is that again; nothing refills before.
        limit, remaining, reset_s : float or None
            As the headers say.
        sent : sequence of (float, float)
            How much was sent since a moment, and how many seconds ago that is: for the two moments that they may tell
            of (the answer's departure, the request's arrival), and for others since. Which of the two it is nobody
            says, so the lowest level holds; at the others the bucket was full at best.
        """
        if limit is None or remaining is None:
            self.untold()
            return
        self._silent = 0
        if limit != self._limit:
            self._room *= limit / self._limit if self._limit else 1.0
            self._limit = limit
            self._longest_s, self._by_second = 0.0, False
        self._room = max(self._room, remaining)
        period_s = 1.0 if self._is_by_second(now, remaining, reset_s) else MINUTE_S
        if reset_s is not None and reset_s > MINUTE_S + RESET_SLACK_S:  # a limit an hour or a day: it fills more slowly
            period_s = HOUR_S if reset_s <= HOUR_S + RESET_SLACK_S else DAY_S
        self.rate = limit / period_s
        self._refill(now)
        gone = [amount - self.rate * age_s for amount, age_s in sent]
        level = min(remaining - max(0.0, gone[0], gone[1]), self._room - max(0.0, *gone[2:], 0.0))
        level = max(0.0, level)  # what the endpoint refuses takes nothing from it
        if not (self.known and level <= self._level < level + 1):  # it is told in whole numbers
            self._level = level
        self._at = now
        self.known = True

    def _is_by_second(self, now: float, remaining: float, reset_s: float | None) -> bool:
        """Whether it was seen to fill far sooner than by the minute, and no reset was ever longer than a second.

        A small reset alone proves nothing: a minute's bucket that is small or nearly full has one, and a minute's
        window has one at its end.
        """
        self._longest_s = max(self._longest_s, reset_s or 0.0)
        if remaining <= EMPTIED * self._room:
            self._emptied_at = now
        elif remaining >= FULL_AGAIN * self._room and self._emptied_at is not None:
            by_minute = (now - self._emptied_at) * self._limit / MINUTE_S
            self._by_second |= reset_s is not None and (FULL_AGAIN - EMPTIED) * self._room > SOONER * by_minute
            self._emptied_at = None
        return self._by_second and self._longest_s <= SECOND_S and self._room > SEEN * self._limit

    def untold(self) -> None:
        """Note an answer that told nothing; what nobody tells of for a while is forgotten."""
        self._silent += 1
        if self.known and self._silent >= SILENT:
            self.known, self.rate, self._limit, self._room = False, 0.0, 0.0, 1.0

    def _refill(self, now: float) -> None:
        if now > self._at:
            self._level = min(self._room, self._level + self.rate * (now - self._at))
            self._at = now


class History:
    """How much had been sent, and refused, by when."""

    def __init__(self) -> None:
        self.requests = self.tokens = self.refused = 0.0
        self._times: list[float] = []
        self._sums: list[tuple[float, float, float]] = []  # the three above, before that time

    def sent(self, now: float, tokens: float) -> None:
        """Count a request."""
        if not self._times or now - self._times[-1] >= HISTORY_STEP_S:
            self._times.append(now)
            self._sums.append((self.requests, self.tokens, self.refused))
            if len(self._times) > HISTORY:
                del self._times[: HISTORY // 2], self._sums[: HISTORY // 2]
        self.requests += 1
        self.tokens += tokens

    def by(self, time_s: float) -> tuple[float, float, float]:
        """Give requests and tokens sent, and requests refused, before what was sent then."""
        index = bisect_right(self._times, time_s + ROUNDING_S) - 1
        return self._sums[index] if index >= 0 else (0.0, 0.0, 0.0)

    def speed(self, now: float) -> float:
        """Give requests accepted a second: of the last `SPEED_S`, or of longer where those are few."""
        if not self._times:
            return 0.0
        begun_s = max(SHORTEST_S, now - self._times[0])
        span_s = min(SPEED_S, begun_s)
        while True:
            sent, _, refused = self.by(now - span_s)
            accepted = self.requests - sent - (self.refused - refused)
            if accepted >= FEW or span_s >= begun_s:
                return max(0.0, accepted) / span_s
            span_s = min(2 * span_s, begun_s)
