"""How many requests may be in flight, and how fast they may follow each other: learned, never configured.

A pure state machine: observations and the time go in, permissions come out; it owns no clock and does no I/O.
What the user capped is never passed; everything else gives way to what the endpoint shows.

    Pacer           asks all of these, and keeps the timeline
     |- rates       the user's caps, exact; what the endpoint's headers tell
     |- refusals    what only its 429s show
     |- seats       how many at one time, where these go by that
     |- window      how many in flight
     '- outages     one probe at a time while it is down
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmframe.limits import RateHeaders
from llmframe.outages import Loss, Outage
from llmframe.rates import MARGIN_S, MINUTE_S, Allowance, History, Share, request_caps, token_caps
from llmframe.refusals import Refusal, Refusals
from llmframe.seats import Seats
from llmframe.window import CEILING, START_AT_ONCE, START_GAP_S, Window

__all__ = ["Caps", "Moment", "Pacer"]

BUSY_LAG_S = 0.02  # lateness of the event loop above which this machine is out of CPU
LAG_FADES = 0.7  # share of the lag that is remembered from one tick to the next
RATIO_FADES = 0.98  # share of the tokens used and reserved that is remembered from one answer to the next
NEARLY_EMPTY = 2.0  # requests of its size: a refusal is explained by headers that leave fewer tokens than these take
SPACING_S = 1.0  # a shorter wait after a 429 only spaces requests, so the rate limits and not `retry-after`
LOOKS_S = (0.2, 1.0, 5.0)  # how long ago a bucket was full at best: what was sent since bounds what old headers tell
STALE = 2.0  # how many times older than such a moment the headers must be for it to count
MOMENT_S = 1.0  # seconds between entries of the timeline without a decision, at most
MOMENT_PART = 0.1  # of the time since work began is between them at first, so that a short run's course has a shape too
MOMENTS = 4000  # entries of the timeline at which it is thinned
SHORTEST_S = 1e-3  # the least time that an entry's answers a second are counted over


@dataclass(frozen=True, slots=True)
class Caps:
    """Hard caps that the user set; None is no cap.

    Attributes
    ----------
    max_concurrency : int or None
        Requests in flight at one time.
    rpm : float or None
        Requests in any 60 seconds; no second gets more than its share, ``ceil(rpm / 60)``, spread over its tenths.
    tpm : float or None
        Tokens in any 60 seconds, and a sixtieth of it in any one; a request of more goes alone. They are counted as
        reserved, made right by what answers used; what is in flight is as exact as its estimate.
    share : Share or None
        What this process has of what it shares with others: of all three, and of what the endpoint's headers tell.
    ticketed : bool
        Whether it sends by the tickets of its share alone.
    """

    max_concurrency: int | None = None
    rpm: float | None = None
    tpm: float | None = None
    share: Share | None = None
    ticketed: bool = False


@dataclass(frozen=True, slots=True)
class Moment:
    """One entry of the timeline.

    Attributes
    ----------
    time_s : float
        Since the pacer was made.
    in_flight, window : int
        Requests out, and the most that may be.
    rate : float
        Answers a second since the entry before.
    refused : int
        Requests refused with 429 so far.
    latency_s : float
        Mean of the answers since the entry before; NaN where none came.
    decision : str
        What was decided; empty for a mere look at the clock.
    allowed : float
        Requests a second that the limits known by then let through for long; infinite where none was.
    """

    time_s: float
    in_flight: int
    window: int
    rate: float
    refused: int
    latency_s: float
    decision: str
    allowed: float


class Pacer:
    """Decide when the next request may be sent.

    Ask `wait_s`, send, call `sent`, and then exactly one of `answered`, `refused`, `failed` and `released` for each;
    call `tick` about ten times a second. Runs that share an endpoint share a pacer.

    Parameters
    ----------
    caps : Caps
        Never passed.
    now : float
        The time, in seconds, on the clock that every later call uses.
    connections : int
        Requests that can be sent at one time, whatever the caps: each takes a connection of its own.
    """

    def __init__(self, caps: Caps, now: float, *, connections: int = CEILING) -> None:
        self._began = now
        self._capped = caps.max_concurrency or math.inf
        self._connections = min(connections, CEILING)
        self._share = caps.share or Share()
        self._ticketed = caps.ticketed
        self._request_caps = request_caps(caps.rpm)
        self._token_caps = token_caps(caps.tpm)
        self._requests = Allowance(now)
        self._tokens = Allowance(now)
        self._refusals = Refusals(now)
        self._seats = Seats()
        self._window = Window(int(min(self._capped, self._connections)), now)
        self._outage = Outage()
        self._history = History()
        self._in_flight = 0
        self._first_sent: float | None = None
        self._starting = True
        self._ratio = 1.0  # tokens used for each one reserved
        self._used = self._reserved = 0.0  # of late
        self._excess = 0.0  # tokens used beyond those counted; what was counted too much is remembered
        self._credit = (caps.tpm or 0.0) / MINUTE_S  # up to a second's worth
        self._lag_s = 0.0
        self._wanted = False  # more would be sent if the window were wider
        self._limit = self._last_limit = ""
        self._answers = 0
        self._latencies_s = 0.0
        self._first_latency_s: float | None = None
        self._noted = (now, 0, 0.0)
        self._woke = now
        self.timeline: list[Moment] = []

    # -- what it says

    @property
    def began(self) -> float:
        """When it was made, from which its timeline counts."""
        return self._began

    @property
    def in_flight(self) -> int:
        """Requests sent and not yet reported on."""
        return self._in_flight

    @property
    def window(self) -> int:
        """Requests that may be in flight."""
        return 1 if self._outage.since is not None else int(min(self._window.size, self._seats.most))

    @property
    def full(self) -> bool:
        """Whether what is in flight is all that ever may be."""
        return self._in_flight >= min(self._capped, self._connections, self._share.seats)

    @property
    def capped(self) -> bool:
        """Whether the user capped a rate: then it matters when a request goes onto the wire."""
        return bool(self._request_caps or self._token_caps)

    @property
    def limited_by(self) -> str:
        """What keeps more from being sent.

        - ``requests/min``, ``tokens/min``: a rate, of the user's cap or of the endpoint's limit
        - ``retry-after``: the endpoint answered 429, and is left alone for as long as it asked, or for some seconds
        - ``max_concurrency``: the user's cap on what is in flight, or this process's share of it
        - ``connections``: this process may open no more (its open files, or the pool of the user's client)
        - ``server``: more in flight would wait there, and make nothing faster
        - ``this machine``: it is out of CPU
        - ``outage``: the endpoint is down
        - empty: nothing does
        """
        return self._limit or self._last_limit

    @property
    def down_since(self) -> float | None:
        """When the endpoint was found to be down; None while it is not."""
        return self._outage.since

    @property
    def usual_s(self) -> float | None:
        """How long an answer takes where nothing queues: the first one, until more is known; None before it."""
        return self._window.usual_s or self._first_latency_s

    @property
    def allowed(self) -> float:
        """Requests a second that the known limits let through for long; infinite where none is known."""
        each = self._history.tokens / max(1.0, self._history.requests) or 1.0  # tokens
        known = [self._refusals.rate, *(cap.rate for cap in self._request_caps)]
        known += [cap.rate / each for cap in self._token_caps]
        if self._requests.known:
            known.append(self._requests.rate)
        if self._tokens.known:
            known.append(self._tokens.rate / each)
        return min(known)

    def takes_s(self, requests: float) -> float:
        """Say how long so many more requests take at least, by the limits that are known."""
        tokens = requests * self._history.tokens / max(1.0, self._history.requests)
        known = [requests / self._refusals.rate, self._requests.takes_s(requests), self._tokens.takes_s(tokens)]
        known += [cap.takes_s(requests) for cap in self._request_caps]
        known += [cap.takes_s(tokens) for cap in self._token_caps]
        return max(known)

    def worth(self, tokens: int) -> float:
        """Give what so many estimated tokens take, by what is known of the estimates."""
        return tokens * self._ratio

    # -- what happens

    def woke(self, now: float) -> None:
        """Note that there is work again: the timeline's answers a second are not of the time between runs."""
        self._woke = now
        self.note(now, "")

    def wait_s(self, now: float, tokens: int, *, trial: bool = False) -> float:
        """Say how long the next request must wait.

        Parameters
        ----------
        now : float
            The time.
        tokens : int
            Estimated for the request.
        trial : bool, default False
            It shows whether what is in flight is lost, and so does not wait until some of that comes back.

        Returns
        -------
        float
            0.0: send it now. Finite: ask again in so many seconds. Infinite: ask again when something came back,
            or at the next tick.
        """
        if self._outage.since is not None:
            self._limit = "outage"
            return self._outage.wait_s(now)
        in_flight = self._in_flight
        more = in_flight < int(self._window.size) and self._seats.room(now, in_flight)
        if self.full or (not trial and (not more or (in_flight and self._outage.suspected))):
            self._wanted = True
            self._limit = self._most_in_flight_by()
            return math.inf
        wait_s, limit = 0.0, ""
        if self._starting and in_flight >= START_AT_ONCE and self._first_sent is not None:
            wait_s = max(0.0, self._first_sent + (in_flight + 1 - START_AT_ONCE) * START_GAP_S - now)
        amount = self.worth(tokens)
        if self._ticketed and (one_s := self._share.wait_s(now, amount)) > wait_s:
            wait_s, limit = one_s, "requests/min"
        for cap in self._request_caps:
            if (one_s := cap.wait_s(now, 1.0)) > wait_s:
                wait_s, limit = one_s, "requests/min"
        for cap in self._token_caps:
            if (one_s := cap.wait_s(now, amount)) > wait_s:
                wait_s, limit = one_s, "tokens/min"
        if (one_s := self._requests.wait_s(now, 1.0)) > wait_s:
            wait_s, limit = one_s, "requests/min"
        if (one_s := self._tokens.wait_s(now, amount)) > wait_s:
            wait_s, limit = one_s, "tokens/min"
        if (one_s := self._refusals.wait_s(now)) > wait_s:
            wait_s, limit = one_s, "requests/min" if one_s < SPACING_S else "retry-after"
        if limit:
            self._wanted, self._limit = False, limit
        return wait_s

    def _most_in_flight_by(self) -> str:
        """Say who keeps more from being in flight: a cap of the user's comes before what would bind anyway."""
        if self._in_flight >= min(self._capped, self._share.seats):
            return "max_concurrency"
        if self._in_flight >= self._connections:
            return "connections"
        return "this machine" if self._busy else "server"

    def sent(self, now: float, tokens: int, *, written: bool = True) -> None:
        """Count a request that is being sent; where it is not `written` yet, `wrote` has to be called once it is."""
        self._seats.sent(now, self._in_flight)
        self._in_flight += 1
        if self._first_sent is None:
            self._first_sent = now
        self._window.sent(now)
        amount = self.worth(tokens)
        if self._ticketed:
            self._share.take(amount)
        for cap in self._request_caps:
            cap.hold(1.0)
        for cap in self._token_caps:
            cap.hold(amount)
        if written:
            self.wrote(now)
        self._requests.take(now, 1.0)
        self._tokens.take(now, amount)
        self._refusals.take()
        self._outage.sent(now)
        self._history.sent(now, amount)
        if self._in_flight >= int(self._window.size):
            self._wanted = True

    def wrote(self, now: float) -> None:
        """Note that a request is on the wire, or that it will never be."""
        for cap in (*self._request_caps, *self._token_caps):
            cap.wrote(now)

    def answered(
        self, now: float, *, latency_s: float, reserved: int, used: int | None, headers: RateHeaders | None
    ) -> None:
        """Learn from an answer that was paid for.

        Parameters
        ----------
        now : float
            The time.
        latency_s : float
            Seconds since it was sent.
        reserved : int
            The tokens that were estimated for it.
        used : int or None
            The tokens it took, where the answer said so.
        headers : RateHeaders or None
            What it said about rates.
        """
        in_flight = self._in_flight
        self._in_flight = in_flight - 1
        self._answers += 1
        self._latencies_s += latency_s
        if self._first_latency_s is None:
            self._first_latency_s = latency_s
        self._starting = False
        self._alive(now, now - latency_s)
        self._seats.answered(now, now - latency_s)
        if used is not None and reserved > 0:
            self._settle(now, reserved, used)
        if headers is not None:
            self._read(now, headers, latency_s)
        else:
            self._requests.untold()
            self._tokens.untold()
        welcome = self._requests.rate
        if not welcome and self._tokens.known:
            welcome = self._tokens.rate * self._history.requests / max(1.0, self._history.tokens)
        if decision := self._window.answered(
            now,
            latency_s,
            in_flight,
            wanted=self._wanted,
            busy=self._busy,
            welcome=welcome,
            allowed=min(welcome or math.inf, self._refusals.rate),
        ):
            self.note(now, decision)

    def refused(
        self, now: float, *, latency_s: float, reserved: int, retry_after_s: float | None, headers: RateHeaders | None
    ) -> None:
        """Learn from a 429 that is a rate limit; the parameters are those of `answered`."""
        self._in_flight -= 1
        self._history.refused += 1
        sent = now - latency_s
        if self._starting:
            self._starting = False
            self._window.stop_start(self._in_flight)
        self._alive(now, sent)
        self._window.lost(sent)
        few_tokens = NEARLY_EMPTY * reserved * self._ratio
        explained = headers is not None and (
            (headers.remaining_requests is not None and headers.remaining_requests < 1)
            or (headers.remaining_tokens is not None and headers.remaining_tokens < few_tokens)
        )
        refusal = Refusal(
            sent=sent,
            retry_after_s=retry_after_s,
            explained=explained,
            sent_before=self._history.by(sent)[0],
            sent_all=self._history.requests,
            speed=self._history.speed(now),
        )
        decision = self._refusals.refused(now, refusal)
        if not explained and self._seats.refused(now, sent, max(0.0, retry_after_s or 0.0)):
            decision = "refused: seats counted"
        self._refusals.by_rate = not self._seats.known
        if decision:
            self.note(now, decision)
        if headers is not None:
            self._read(now, headers, latency_s)

    def failed(self, now: float, *, latency_s: float, kind: str, limit_s: float | None = None) -> None:
        """Learn from an attempt that got no answer: 5xx, connection, ``timeout``, a body that is none.

        Where the user says how long one may take (`limit_s`), more than are answered in that time would time out.
        """
        self._in_flight -= 1
        sent = now - latency_s
        loss = Loss(
            sent=sent,
            timed_out=kind == "timeout",
            usual_s=self._window.usual_s,
            sent_before=self._history.by(sent)[0],
            sent_all=self._history.requests,
            in_flight=self._in_flight,
        )
        if kind != "timeout" or limit_s is None:
            self._window.lost(sent)
        elif decision := self._window.timed_out(now, sent, self._in_flight + 1):
            self.note(now, decision)
        self._seats.lost(now, sent)
        if self._outage.failed(now, loss):
            self.note(now, f"down: {kind}")

    def released(self, now: float, *, latency_s: float = 0.0, alive: bool = False) -> None:
        """Count back a request that taught nothing, but that the endpoint is `alive` (a 4xx of the row's own)."""
        self._in_flight -= 1
        self._window.lost(now - latency_s)
        self._seats.lost(now, now - latency_s)
        if alive:
            self._alive(now, now - latency_s)
        else:
            self._outage.given_up(now - latency_s)

    def tick(self, now: float, *, lag_s: float) -> None:
        """Look at the whole: `lag_s` is how late the event loop was."""
        self._lag_s = max(lag_s, LAG_FADES * self._lag_s)
        self._last_limit, self._limit = self._limit, ""
        if now - self._noted[0] >= min(MOMENT_S, MOMENT_PART * (now - self._woke)):
            self.note(now, "")

    # -- how it learns

    @property
    def _busy(self) -> bool:
        return self._lag_s > BUSY_LAG_S

    def _alive(self, now: float, sent: float) -> None:
        if self._outage.alive(now, sent):
            self._window.resume(now)
            self.note(now, "up again")

    def _settle(self, now: float, reserved: int, used: int) -> None:
        """Make right what was counted for a request, and learn what a reserved token is worth."""
        if self._token_caps:
            self._excess = max(-self._credit, self._excess + used - reserved * self._ratio)
            if self._excess > 0:
                if self._ticketed:
                    self._share.take_tokens(self._excess)
                for cap in self._token_caps:
                    cap.take(now, self._excess)
                self._excess = 0.0
        self._used = RATIO_FADES * self._used + used
        self._reserved = RATIO_FADES * self._reserved + reserved
        self._ratio = self._used / self._reserved

    def _read(self, now: float, headers: RateHeaders, age_s: float) -> None:
        """Learn from the headers of a request sent so long ago."""
        history, late_s = self._history, MARGIN_S + self._lag_s
        ages = (late_s, age_s, *(age for age in LOOKS_S if age < age_s / STALE))
        sums = [(age, history.by(now - age)) for age in ages]
        at = max(now, self._refusals.hold_until)  # an endpoint that asks to stay away may refill only then
        peers = self._share.peers  # each takes its part of what the headers tell them all
        self._requests.learn(
            at,
            _part(headers.limit_requests, peers),
            _part(headers.remaining_requests, peers),
            headers.reset_requests_s,
            [(history.requests - requests, age) for age, (requests, _, _) in sums],
        )
        self._tokens.learn(
            at,
            _part(headers.limit_tokens, peers),
            _part(headers.remaining_tokens, peers),
            headers.reset_tokens_s,
            [(history.tokens - tokens, age) for age, (_, tokens, _) in sums],
        )

    def note(self, now: float, decision: str) -> None:
        """Write an entry of the timeline."""
        then, answers, latencies_s = self._noted
        came = self._answers - answers
        self._noted = (now, self._answers, self._latencies_s)
        moment = Moment(
            time_s=now - self._began,
            in_flight=self._in_flight,
            window=self.window,
            rate=came / max(SHORTEST_S, now - then),
            refused=int(self._history.refused),
            latency_s=(self._latencies_s - latencies_s) / came if came else math.nan,
            decision=decision,
            allowed=self.allowed,
        )
        if len(self.timeline) >= MOMENTS:
            decisions = sum(bool(each.decision) for each in self.timeline)
            spared = decisions < MOMENTS / 2
            self.timeline = [each for n, each in enumerate(self.timeline) if n % 2 or (spared and each.decision)]
        self.timeline.append(moment)


def _part(told: float | None, peers: int) -> float | None:
    return None if told is None else told / peers
