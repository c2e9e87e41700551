"""How many requests may be in flight, and how fast they may follow each other: learned, never configured.

A pure state machine: observations and the time go in, permissions come out; it owns no clock and does no I/O.
What the user capped is never passed; everything else gives way to what the endpoint shows.

    Pacer           asks all of these, and keeps the timeline
     |- _Sliding    the user's caps, exact
     |- _Allowance  rates that the endpoint's headers tell
     |- _Refusals   rates that only its 429s show
     |- _Window     how many in flight
     '- _Outage     one probe at a time while it is down
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from typing import Literal

from llmframe.limits import RateHeaders

__all__ = ["Caps", "Moment", "Pacer"]


@dataclass(frozen=True, slots=True)
class Caps:
    """Hard caps that the user set; None is no cap.

    Attributes
    ----------
    max_concurrency : int or None
        Requests in flight at one time.
    rpm : float or None
        Requests in any 60 seconds; no second gets more than its share, ``ceil(rpm / 60)``.
    tpm : float or None
        Tokens in any 60 seconds, and a sixtieth of it in any one; a request of more goes alone.
    """

    max_concurrency: int | None = None
    rpm: float | None = None
    tpm: float | None = None


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
    """

    time_s: float
    in_flight: int
    window: int
    rate: float
    refused: int
    latency_s: float
    decision: str


# ---- caps

STRETCH = 1.02  # a capped second is counted 2 % longer: the network may deliver 20 ms closer together than we sent


class _Sliding:
    """At most so much in any span of so many seconds; a single amount beyond that goes alone."""

    def __init__(self, most: float, span_s: float) -> None:
        self._most = most
        self._span_s = span_s * STRETCH
        self._entries: deque[tuple[float, float]] = deque()
        self._total = 0.0

    def wait_s(self, now: float, amount: float) -> float:
        entries = self._entries
        while entries and entries[0][0] + self._span_s <= now:
            self._total -= entries.popleft()[1]
        excess = self._total + amount - self._most
        if not entries or excess <= 0:
            return 0.0
        then = now
        for then, entry in entries:
            excess -= entry
            if excess <= 0:
                break
        return max(then + self._span_s - now, 1e-6)

    def take(self, now: float, amount: float) -> None:
        if not self._entries:
            self._total = 0.0  # what rounding left
        self._entries.append((now, amount))
        self._total += amount


def _request_caps(rpm: float | None) -> list[_Sliding]:
    if rpm is None:
        return []
    if rpm < 1:
        return [_Sliding(1, 60 / rpm)]
    return [_Sliding(math.floor(rpm), 60.0), _Sliding(math.ceil(rpm / 60), 1.0)]


def _token_caps(tpm: float | None) -> list[_Sliding]:
    return [] if tpm is None else [_Sliding(tpm, 60.0), _Sliding(tpm / 60, 1.0)]


# ---- rates

MARGIN_S = 0.05  # of a told rate stay in the endpoint's bucket: what headers are late by
HOUR_S, DAY_S = 3600.0, 86_400.0


class _Allowance:
    """One limit as the endpoint's headers tell it: a bucket that refills, and whose level every answer corrects."""

    def __init__(self, now: float) -> None:
        self.known = False
        self.rate = 0.0  # a second
        self._at = now
        self._level = 0.0
        self._limit = 0.0
        self._room = 1.0  # the most that was ever left

    def _refill(self, now: float) -> None:
        self._level = min(self._room, self._level + self.rate * (now - self._at))
        self._at = now

    def wait_s(self, now: float, amount: float) -> float:
        if not self.known:
            return 0.0
        self._refill(now)
        margin = min(MARGIN_S * self.rate, 0.25 * self._room)
        missing = min(amount + margin, self._room) - self._level
        return missing / self.rate if missing > 1e-9 else 0.0

    def take(self, now: float, amount: float) -> None:
        if self.known:
            self._refill(now)
            self._level -= amount

    def learn(
        self, now: float, limit: float | None, remaining: float | None, reset_s: float | None, since: float, age_s: float
    ) -> None:
        """Correct the level by the headers of a request sent `age_s` ago, `since` which so much was sent.

        Whether they tell the bucket at the request's arrival or at its answer is not known: the lower level holds.
        """
        if limit is None or remaining is None:
            return
        if limit != self._limit:
            self._room *= limit / self._limit if self._limit else 1.0
            self._limit = limit
        period_s = 60.0
        if reset_s is not None and reset_s > 61.0:  # it takes longer than a minute to fill: a limit an hour or a day
            period_s = HOUR_S if reset_s <= HOUR_S + 1 else DAY_S
        self.rate = limit / period_s
        self._room = max(self._room, remaining)
        self._level = min(self._room, remaining - max(0.0, since - self.rate * age_s))
        self._at = now
        self.known = True


class _Refusals:
    """The rate that 429s alone show, and the time they ask for.

    A refusal says that the endpoint's bucket is empty just then, so what it accepted from one refusal to the next
    is its rate, whatever the size of the bucket.
    """

    EVIDENCE = 5  # accepted requests that make a rate
    BACK_OFF = 0.95  # of the rate found
    RECOVER_S = 5.0  # until the rate found is tried again; then it is passed, slowly and then faster
    HOLD_S, LONGEST_HOLD_S = 0.025, 10.0  # without Retry-After: doubled at each refusal that follows another
    RAMP_S = 0.15  # a guessed rate is doubled so often while it is reached
    RAMP = 32.0  # from this part of it
    DOUBLE_S = 3.0  # and doubled so often after that, until a refusal shows the rate

    def __init__(self, now: float) -> None:
        self._rate = math.inf
        self._sure = False  # the rate was measured from one refusal to the next
        self._decided = now  # refusals of what was sent before are news no more
        self._since = now  # when sending at the rate began
        self._level = 0.0
        self._at = now
        self._ramp = False
        self._debt = 0.0  # held back while waiting, and let go a little faster than the rate
        self._streak = 0
        self._mark = math.inf  # when the first refused request of the last episode was sent
        self._sent_by_mark = 0.0
        self._refused_since = 0.0
        self.hold_until = -math.inf

    @property
    def limits(self) -> bool:
        """Whether there is a rate at all."""
        return self._rate < math.inf

    def _speed(self, now: float) -> float:
        held_s = now - self._since
        if self._sure:
            x = held_s / self.RECOVER_S
            speed = self._rate * (self.BACK_OFF + (1 - self.BACK_OFF) * x if x < 1 else 1 + 0.05 * (x - 1) ** 3)
            return 1.5 * speed if self._debt > 0 else speed
        if self._ramp:
            ramp = 2.0 ** (held_s / self.RAMP_S) / self.RAMP
            if ramp < 1:
                return self._rate * ramp
            held_s -= 5 * self.RAMP_S
        return self._rate * 2.0 ** (held_s / self.DOUBLE_S)

    def wait_s(self, now: float) -> float:
        if now < self.hold_until:
            return self.hold_until - now
        if self._rate == math.inf:
            return 0.0
        speed = self._speed(now)
        self._level = min(max(1.0, 0.02 * speed), self._level + speed * (now - self._at))
        self._at = now
        return (1.0 - self._level) / speed if self._level < 1.0 - 1e-9 else 0.0

    def take(self) -> None:
        self._level -= 1.0
        self._debt -= 1.0 / 3

    def answered(self, sent: float) -> None:
        """Something that was sent after the last refusal is answered."""
        if sent >= self._decided:
            self._streak = 0

    def refused(
        self, now: float, sent: float, retry_after_s: float | None, explained: bool, sent_by: float, speed: float
    ) -> str:
        """Learn from a 429.

        `explained`: its headers say that the rate they tell is used up. `sent_by`: requests sent before this one.
        `speed`: answers a second of late.
        """
        if sent >= self._mark:
            self._refused_since += 1
        fresh = sent >= self._decided
        if retry_after_s is None:
            if fresh:
                self._streak += 1
                hold_s = min(self.LONGEST_HOLD_S, self.HOLD_S * 2.0**self._streak)
                self.hold_until = max(self.hold_until, now + hold_s)
        else:
            self.hold_until = max(self.hold_until, now + retry_after_s)
        if not fresh:
            self._since = self._at = max(self._since, self.hold_until)
            return ""
        self._decided = now
        self._since = self._at = self.hold_until
        self._level = 1.0
        if explained:
            return "refused"
        accepted = sent_by - self._sent_by_mark - self._refused_since
        if self._mark == math.inf:
            self._rate = max(1.0, 0.5 * speed)
            self._ramp = self.hold_until - now < 0.5
            decision = "refused: rate guessed"
        elif accepted >= self.EVIDENCE:
            self._rate = accepted / max(0.01, sent - self._mark)
            self._sure = True
            self._streak = min(self._streak, 1)
            self._debt = self._rate * (self.hold_until - now)
            decision = "refused: rate measured"
        else:
            return "refused"
        self._mark, self._sent_by_mark, self._refused_since = sent, sent_by, 1.0
        return decision


# ---- the window

START = 64  # in flight before anything is known: enough for a hosted endpoint, no flood for a small one
START_AT_ONCE = 16  # of these so many at once, the others
START_GAP_S = 0.002  # so far apart, so that a first 429 can stop them
CEILING = 4096  # in flight; a client machine keeps no more connections than that
EVIDENCE = 16  # answers before a window is judged, at least
EVIDENCE_S = 0.05  # and seconds: an event loop delivers in bunches
EARLY = 24  # answers after which the first requests can be found to queue
SERIAL = 0.5  # log of what the first four of sixteen are faster if they queue among themselves
GAIN = 1.1  # in flight for each request at work: some wait, so that no slot ever idles
SPREAD = 1.25  # and so many times its square root: few slots swing more than many
LATE_S = 0.01  # and so many seconds' worth more, for a client that is late by that much
GROWING = 0.25  # of the growth in flight must come back as growth in speed, or the knee is passed
BRAKE = 0.3  # log of the slow-down at which a growing window waits for its judgement
ROOM = math.log(1.13)  # answers no slower than that show that nothing queues
QUEUED = math.log(1.8)  # answers slower than that show a long queue, or that they have become another kind
HELD = math.log(0.85)  # of the speed is all of it: fewer in flight made no difference
SURE = 1.2  # times what was at work is growth that helps
UNSURE = 1.5  # times the window before is as far as it grows until it is known to help
NOISE = 0.07  # log of a change of the base that means nothing
PROBE_SHARE = 1.3  # a probe for the latency without a queue keeps so many times fewer in flight
PROBE_S, LONGEST_PROBE_S = 10.0, 60.0  # between probes; doubled while they find nothing new
PROBE_WINDOWS = 30  # but at least so many windows: a probe costs two of them a part of their speed
DOUBTFUL_WINDOWS = 4  # until the next one, where a probe changed the picture
BUSY_LAG_S = 0.02  # an event loop that late is out of CPU: more in flight would wait here and not there


class _Epoch:
    """What was seen since a moment."""

    __slots__ = ("answers", "began", "full", "load", "logs", "seconds", "squares")

    def __init__(self, began: float, load: int) -> None:
        self.began = began
        self.load = max(1, load)  # in flight at the beginning: what the answers of an epoch were sent beside
        self.answers = self.full = 0
        self.seconds = 0.0  # the latencies' sum
        self.logs = self.squares = 0.0  # of their logarithms, which a few slow answers do not sway


class _First:
    """The first few requests of a run: their latency is the one without a queue, or the nearest to it."""

    __slots__ = ("back", "count", "logs", "most", "until")

    def __init__(self, most: int) -> None:
        self.most = most
        self.count = self.back = 0
        self.until = -math.inf
        self.logs = 0.0


class _Window:
    """How many may be in flight: as many as make the endpoint faster, and a few more that wait there.

    Two numbers are learned, the latency while nothing queues (`base`) and the speed; their product is what the
    endpoint works on at one time. An epoch is judged when as many answers came as were in flight, and only if the
    window was full: a window that something else keeps from filling says nothing about the endpoint.
    """

    def __init__(self, most: int, now: float) -> None:
        self.size = min(float(START), most)
        self.base: float | None = None  # log of seconds
        self._error = 0.0  # of it
        self._most = float(most)
        self._phase: Literal["start", "grow", "hold", "probe"] = "start"
        self._speed = 0.0  # answers a second
        self._at_work = 0.0  # requests that the endpoint works on at one time
        self._load = 0  # in flight before a probe
        self._usual: float | None = None  # log latency at the size held
        self._step = 2.0  # that a growing window grows by at each answer
        self._sudden = -math.inf  # a recent latency below it shows that nothing queues any more
        self._surprising = 0.0  # so many answers within the latency of one show that more are worked on than before
        self._lately: deque[float] = deque()  # when answers came, within the latency of one
        self._most_unsure = 2.0 * self.size  # it grows no further until that has shown to help
        self._before: tuple[float, int] | None = None  # speed and load of the epoch before
        self._recent: float | None = None  # log latency of the last few answers
        self._settling = 0  # answers that belong to the size before
        self._epoch = _Epoch(now, 0)
        self._began: float | None = None
        self._firsts = (_First(4), _First(8), _First(16))
        self._grew = now
        self._probe_after_s = PROBE_S
        self._probe_at = math.inf

    def sent(self, now: float) -> None:
        """Count a request among the first."""
        if self._began is None:
            self._began = now
            self._epoch = _Epoch(now, START_AT_ONCE)
        for first in self._firsts:
            if first.count < first.most:
                first.count += 1
                first.until = now

    def restart(self, in_flight: int) -> None:
        """Judge nothing that is in flight."""
        self._settling = max(1, in_flight)
        self._recent = self.base

    def answered(self, now: float, latency_s: float, in_flight: int, busy: bool, welcome: float) -> str:
        """Learn from an answer that came when `in_flight` were out, itself among them.

        `busy`: this machine is. `welcome`: requests a second that the endpoint's headers allow.
        """
        log = math.log(max(latency_s, 1e-6))
        self._recent = log if self._recent is None else self._recent + (log - self._recent) / 16
        if self.base is None:
            for first in self._firsts:
                if now - latency_s <= first.until and first.back < first.count:
                    first.back += 1
                    first.logs += log
        lately = self._lately
        lately.append(now)
        if self.base is not None:
            since = now - math.exp(self.base)
            while lately[0] < since:
                lately.popleft()
        if self._settling:
            self._settling -= 1
            if not self._settling:
                self._epoch = _Epoch(now, in_flight)
            return ""
        epoch = self._epoch
        epoch.answers += 1
        epoch.seconds += latency_s
        epoch.logs += log
        epoch.squares += log * log
        full = in_flight >= 0.9 * int(self.size)
        epoch.full += full
        if full and not busy:
            if self._phase == "start" or self._phase == "grow":
                self._grow(now, welcome)
            elif self._phase == "hold" and self._recent < self._sudden:
                self._phase, self._most_unsure = "grow", UNSURE * self.size
                return "room"
        self._grew = now
        if self.base is None:
            if epoch.answers == 1:
                epoch.load = in_flight
            base = self._first_base(now)
            usual_s = math.exp(base)
            if epoch.answers >= EARLY and self._recent > base + SERIAL and now - epoch.began > 3 * usual_s:
                self.base = base
                speed = epoch.answers / (now - epoch.began - usual_s)
                self._hold(now, 2 * speed * usual_s, speed, in_flight)
                self._probe_at = now
                return "knee"
        if epoch.answers >= max(EVIDENCE, epoch.load) and now - epoch.began >= EVIDENCE_S:
            self._epoch = _Epoch(now, in_flight)
            return self._judge(now, epoch, in_flight, busy)
        return ""

    def _grow(self, now: float, welcome: float) -> None:
        base = self._first_base(now) if self.base is None else self.base
        assert self._recent is not None
        if self._recent >= base + BRAKE:
            return
        most, at_work = self._most_unsure, len(self._lately)
        if welcome:
            most = self._most
        elif self.base is not None and at_work > max(SURE * self._at_work, self._surprising):
            most = 2.0 * at_work
        more = max(self._step, welcome * min(1.0, now - self._grew))
        self.size = min(self._most, max(self.size, most), self.size + more)

    def _first_base(self, now: float) -> float:
        """Log latency of the first requests; those still out took at least the time since.

        Where even these were worked on one after the other, the first few of them are nearer to it.
        """
        age = math.log(max(1e-6, now - (self._began or 0.0)))
        few, some, most = (
            (first.logs + (first.count - first.back) * age) / max(first.count, 1) for first in self._firsts
        )
        return few if few < most - SERIAL else some if some < most - SERIAL else most

    def _judge(self, now: float, epoch: _Epoch, in_flight: int, busy: bool) -> str:
        count, load = epoch.answers, epoch.load
        log = epoch.logs / count
        error = math.sqrt(max(0.0, epoch.squares / count - log * log) / count)
        speed = count / (now - epoch.began)
        full = epoch.full >= 0.7 * count
        if self._phase == "start":
            first = self._first_base(now)
            self.base, self._error = (first, error * math.sqrt(count / 16)) if first < log - 0.2 else (log, error)
            self._phase = "grow"
            self._before = (load / (epoch.seconds / count), load) if full else None
            self._at_work = load / 2
            return ""
        assert self.base is not None
        if not full:
            if self._phase == "probe":
                self._hold(now, self._at_work, self._speed, in_flight)
            self._before = None
            return ""
        before, self._before = self._before, (speed, load)
        if self._phase == "grow":
            if before is None:
                return ""
            more, faster = math.log(load / before[1]), math.log(speed / before[0])
            if more < 0.1 and log < self.base + BRAKE:
                return ""
            if more >= 0.1 and faster >= GROWING * more:
                if faster > 0.15 and log > self.base:
                    self.base, self._error = log, error
                return "grow"
            self._hold(now, min(load, before[1] * max(1.0, speed / before[0])), speed, in_flight)
            return self._probe(in_flight, "knee")
        if self._phase == "probe":
            return self._probed(now, speed, load, log, error, in_flight)
        usual, self._usual = self._usual, log if self._usual is None else self._usual + 0.3 * (log - self._usual)
        self._speed = speed if usual is None else self._speed + 0.3 * (speed - self._speed)
        expected = self._speed * math.exp(self.base)
        self._sudden = min(self._usual - max(0.2, 0.7 * error * math.sqrt(count)), self.base + ROOM)
        self._surprising = expected + max(0.15 * expected, 3 * error * math.sqrt(count * expected))
        slower, doubt = log - self.base, math.hypot(error, self._error)
        dropped = usual is not None and log < usual - ROOM and slower + 0.3 * doubt < ROOM
        if (dropped or slower < 0.05) and not busy:
            self._phase, self._most_unsure = "grow", UNSURE * self.size
            return "room"
        if slower - 2 * doubt > QUEUED:
            self.size = max(self.size / 2, speed * math.exp(self.base)) * PROBE_SHARE
            return self._probe(in_flight, "slower")
        if now >= self._probe_at:
            return self._probe(in_flight, "probe")
        return ""

    def _probed(self, now: float, speed: float, load: int, log: float, error: float, in_flight: int) -> str:
        """Judge an epoch with fewer in flight, beside the speed and the load before it."""
        assert self.base is not None and self._load
        fell, fastest = math.log(speed / self._speed), max(speed, self._speed)
        at_work = min(self._load, load * fastest / speed)
        doubt = math.hypot(error, self._error)
        if fell > HELD and log > self.base + NOISE + 2 * doubt:
            self._hold(now, max(load / 2, speed * math.exp(self.base)), fastest, in_flight)
            self.size = min(self.size, load / 1.2)
            return self._probe(in_flight, "queue")
        moved = log - self.base
        self.base, self._error = log, error
        self._probe_after_s = PROBE_S if abs(moved) > 2 * NOISE + doubt else min(LONGEST_PROBE_S, 2 * self._probe_after_s)
        self._hold(now, at_work, fastest, in_flight)
        if abs(moved) > 2 * NOISE + doubt:
            self._probe_at = now + DOUBTFUL_WINDOWS * self.size / speed
        return self._probe(in_flight, "queue shorter") if moved < -NOISE - doubt and fell > HELD else "measured"

    def _probe(self, in_flight: int, decision: str) -> str:
        self._load = in_flight
        self._phase = "probe"
        self.size = max(1.0, self.size / PROBE_SHARE)
        self._settling = in_flight
        return decision

    def _hold(self, now: float, at_work: float, speed: float, in_flight: int) -> None:
        """Keep as many in flight as are worked on at one time, and a few more."""
        self._phase, self._surprising, self._sudden = "hold", 0.0, -math.inf
        self._at_work, self._speed, self._usual = at_work, speed, None
        self.size = min(self._most, max(1.0, GAIN * at_work + SPREAD * math.sqrt(at_work) + LATE_S * speed))
        self._settling = in_flight
        self._probe_at = now + max(self._probe_after_s, PROBE_WINDOWS * self.size / speed)


# ---- outages

SUSPECT = 3  # failures in a row after which sending waits for a sign of life
DOWN = 8  # failures in a row that are an outage, or fewer when nothing else is in flight
DOWN_ALONE = 5
OUTAGE_PROBE_S = 0.5  # between the probes of an endpoint that is down
OUTAGE_PROBE_LATE_S = 2.0  # after a minute
PROBE_LOST_S = 5.0  # a probe that is out for so long is no reason not to send another


class _Outage:
    """Whether the endpoint is down, by failures without a sign of life between them.

    Failures that come sooner than answers do overtake them: those count only if half of all that was sent since
    has failed.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        self.suspected = False
        self._failures = 0
        self._first_sent = 0.0  # when the first of the failures was sent
        self._sent_before = 0.0  # requests before that
        self._in_a_row = 0  # that took as long as an answer does
        self._answered_at = -math.inf
        self._probe_at = 0.0
        self._probe_sent: float | None = None

    def wait_s(self, now: float) -> float:
        if self._probe_sent is not None and now - self._probe_sent < PROBE_LOST_S:
            return math.inf
        return max(0.0, self._probe_at - now)

    def sent(self, now: float) -> None:
        if self.since is not None:
            self._probe_sent = now

    def alive(self, now: float, sent: float) -> bool:
        """The endpoint answered something sent then, were it only with a refusal; True where that ends an outage."""
        self._answered_at = now
        self._in_a_row = 0
        if self._failures and sent < self._first_sent:
            return False
        self._failures = 0
        self.suspected = False
        ended, self.since, self._probe_sent = self.since is not None, None, None
        return ended

    def lost(self, sent: float) -> None:
        """A request was given up."""
        if self._probe_sent is not None and sent >= self._probe_sent:
            self._probe_sent = None

    def failed(
        self, now: float, sent: float, kind: str, usual_s: float | None, sent_before: float, sent_all: float, out: int
    ) -> bool:
        """Count a failure; True where it shows that the endpoint is down.

        `usual_s`: how long an answer takes. `sent_before`, `sent_all`: requests sent before this one, and until now.
        `out`: requests in flight.
        """
        if self.since is not None:
            if self._probe_sent is not None and sent >= self._probe_sent:
                self._probe_sent = None
                self._probe_at = now + (OUTAGE_PROBE_S if now - self.since < 60 else OUTAGE_PROBE_LATE_S)
            return False
        if not self._failures or sent < self._first_sent:
            self._first_sent, self._sent_before = sent, sent_before
        self._failures += 1
        timely = usual_s is not None and now - sent >= 0.5 * usual_s
        if timely and (kind != "timeout" or self._answered_at < sent):
            self._in_a_row += 1
        most = self._failures >= 0.5 * (sent_all - self._sent_before)
        failures = max(self._in_a_row, self._failures if most else 0)
        self.suspected = failures >= SUSPECT and out > 0
        if failures < (DOWN if out else DOWN_ALONE):
            return False
        self.since, self.suspected = now, False
        self._probe_at, self._probe_sent = now + OUTAGE_PROBE_S, None
        return True


# ---- all of it

HISTORY_STEP_S = 0.005  # how finely it is known what was sent when
HISTORY = 100_000  # entries kept
MOMENT_S = 1.0  # between entries of the timeline without a decision
MOMENTS = 4000  # entries of the timeline before it is thinned


class _History:
    """How much had been sent by when."""

    def __init__(self) -> None:
        self.requests = self.tokens = 0.0
        self._times: list[float] = []
        self._sums: list[tuple[float, float]] = []  # before that time

    def sent(self, now: float, tokens: float) -> None:
        if not self._times or now - self._times[-1] >= HISTORY_STEP_S:
            self._times.append(now)
            self._sums.append((self.requests, self.tokens))
            if len(self._times) > HISTORY:
                del self._times[: HISTORY // 2], self._sums[: HISTORY // 2]
        self.requests += 1
        self.tokens += tokens

    def by(self, time_s: float) -> tuple[float, float]:
        """Requests and tokens that had been sent before what was sent then."""
        index = bisect_right(self._times, time_s + 1e-6) - 1
        return self._sums[index] if index >= 0 else (0.0, 0.0)


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
    """

    def __init__(self, caps: Caps, now: float) -> None:
        self._began = now
        self._request_caps = _request_caps(caps.rpm)
        self._token_caps = _token_caps(caps.tpm)
        self._requests = _Allowance(now)
        self._tokens = _Allowance(now)
        self._refusals = _Refusals(now)
        self._window = _Window(min(caps.max_concurrency or CEILING, CEILING), now)
        self._outage = _Outage()
        self._history = _History()
        self._in_flight = 0
        self._first_sent: float | None = None
        self._ramping = True
        self._ratio = 1.0  # tokens used for each one reserved
        self._used = self._reserved = 0.0
        self._lag_s = 0.0
        self._limit = self._last_limit = ""
        self._answers = self._refused = 0
        self._latencies_s = 0.0
        self._noted = (now, 0, 0.0)
        self._course = deque([(now, 0)])  # answers by time, of the last seconds
        self.timeline: list[Moment] = []

    # -- what it says

    @property
    def in_flight(self) -> int:
        """Requests sent and not yet reported on."""
        return self._in_flight

    @property
    def window(self) -> int:
        """Requests that may be in flight."""
        return 1 if self._outage.since is not None else int(self._window.size)

    @property
    def limited_by(self) -> str:
        """What keeps more from being sent.

        ``requests/min``, ``tokens/min``, ``retry-after``, ``server``, ``this machine``, ``outage``, or empty where
        nothing does.
        """
        return self._limit or self._last_limit

    @property
    def down_since(self) -> float | None:
        """When the endpoint was found to be down; None while it is not."""
        return self._outage.since

    # -- what happens

    def wait_s(self, now: float, tokens: int) -> float:
        """Say how long the next request must wait.

        Parameters
        ----------
        now : float
            The time.
        tokens : int
            Estimated for the request.

        Returns
        -------
        float
            0.0: send it now. Finite: ask again in so many seconds. Infinite: ask again when something came back,
            or at the next tick.
        """
        if self._outage.since is not None:
            self._limit = "outage"
            return self._outage.wait_s(now)
        if self._in_flight >= int(self._window.size) or self._outage.suspected:
            self._limit = "this machine" if self._lag_s > BUSY_LAG_S else "server"
            return math.inf
        wait_s, limit = 0.0, ""
        if self._ramping and self._in_flight >= START_AT_ONCE and self._first_sent is not None:
            wait_s = self._first_sent + (self._in_flight + 1 - START_AT_ONCE) * START_GAP_S - now
        amount = tokens * self._ratio
        for cap in self._request_caps:
            if (one_s := cap.wait_s(now, 1)) > wait_s:
                wait_s, limit = one_s, "requests/min"
        for cap in self._token_caps:
            if (one_s := cap.wait_s(now, amount)) > wait_s:
                wait_s, limit = one_s, "tokens/min"
        if (one_s := self._requests.wait_s(now, 1.0)) > wait_s:
            wait_s, limit = one_s, "requests/min"
        if (one_s := self._tokens.wait_s(now, amount)) > wait_s:
            wait_s, limit = one_s, "tokens/min"
        if (one_s := self._refusals.wait_s(now)) > wait_s:
            wait_s, limit = one_s, "requests/min" if one_s < 1.0 else "retry-after"
        if limit:
            self._limit = limit
        return max(0.0, wait_s)

    def sent(self, now: float, tokens: int) -> None:
        """Count a request that is being sent."""
        self._in_flight += 1
        if self._first_sent is None:
            self._first_sent = now
        if self._history.requests < START_AT_ONCE:
            self._window.sent(now)
        amount = tokens * self._ratio
        for cap in self._request_caps:
            cap.take(now, 1)
        for cap in self._token_caps:
            cap.take(now, amount)
        self._requests.take(now, 1.0)
        self._tokens.take(now, amount)
        self._refusals.take()
        self._outage.sent(now)
        self._history.sent(now, amount)

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
        self._ramping = False
        self._alive(now, now - latency_s)
        self._refusals.answered(now - latency_s)
        if used is not None and reserved > 0:
            self._settle(now, reserved, used)
        welcome = 0.0
        if headers is not None:
            self._read(now, headers, latency_s)
            welcome = self._requests.rate
        busy = self._lag_s > BUSY_LAG_S
        if decision := self._window.answered(now, latency_s, in_flight, busy, welcome):
            self._note(now, decision)

    def refused(
        self, now: float, *, latency_s: float, reserved: int, retry_after_s: float | None, headers: RateHeaders | None
    ) -> None:
        """Learn from a 429 that is a rate limit; the parameters are those of `answered`."""
        self._in_flight -= 1
        self._refused += 1
        sent = now - latency_s
        if self._ramping:
            self._ramping = False
            self._window.size = max(1.0, self._in_flight + 1.0)
        self._alive(now, sent)
        explained = False
        if headers is not None:
            self._read(now, headers, latency_s)
            explained = headers.remaining_requests is not None and headers.remaining_requests < 1
            explained |= headers.remaining_tokens is not None and headers.remaining_tokens < 2 * reserved * self._ratio
        sent_by = self._history.by(sent)[0]
        speed = (sent_by - self._history.by(sent - 0.5)[0]) / min(0.5, max(0.05, sent - (self._first_sent or 0.0)))
        if decision := self._refusals.refused(now, sent, retry_after_s, explained, sent_by, speed):
            self._note(now, decision)

    def failed(self, now: float, *, latency_s: float, reserved: int, kind: str) -> None:
        """Learn from an attempt that got no answer: 5xx, connection, ``timeout``, a body that is none."""
        self._in_flight -= 1
        sent = now - latency_s
        usual_s = None if self._window.base is None else math.exp(self._window.base)
        before, all_sent = self._history.by(sent)[0], self._history.requests
        if self._outage.failed(now, sent, kind, usual_s, before, all_sent, self._in_flight):
            self._note(now, f"down: {kind}")

    def released(self, now: float, *, latency_s: float = 0.0, reserved: int, alive: bool = False) -> None:
        """Count back a request that taught nothing, but that the endpoint is `alive` (a 4xx of the row's own)."""
        self._in_flight -= 1
        if alive:
            self._alive(now, now - latency_s)
        else:
            self._outage.lost(now - latency_s)

    def tick(self, now: float, *, lag_s: float) -> None:
        """Look at the whole: `lag_s` is how late the event loop was."""
        self._lag_s = max(lag_s, 0.7 * self._lag_s)
        self._last_limit, self._limit = self._limit, ""
        self._course.append((now, self._answers))
        while len(self._course) > 2 and now - self._course[0][0] > 2.0:
            self._course.popleft()
        if now - self._noted[0] >= MOMENT_S:
            self._note(now, "")

    # -- how it learns

    def _speed(self, now: float) -> float:
        """Answers a second, of late."""
        then, answers = self._course[0]
        return (self._answers - answers) / max(0.1, now - then)

    def _alive(self, now: float, sent: float) -> None:
        if self._outage.alive(now, sent):
            self._window.restart(self._in_flight)
            self._note(now, "up again")

    def _settle(self, now: float, reserved: int, used: int) -> None:
        self._used = 0.98 * self._used + used
        self._reserved = 0.98 * self._reserved + reserved
        excess = used - reserved * self._ratio
        self._ratio = self._used / self._reserved
        if excess > 0:
            for cap in self._token_caps:
                cap.take(now, excess)

    def _read(self, now: float, headers: RateHeaders, age_s: float) -> None:
        history = self._history
        requests, tokens = history.by(now - age_s)
        self._requests.learn(
            now,
            headers.limit_requests,
            headers.remaining_requests,
            headers.reset_requests_s,
            history.requests - requests - 1,
            age_s,
        )
        self._tokens.learn(
            now,
            headers.limit_tokens,
            headers.remaining_tokens,
            headers.reset_tokens_s,
            history.tokens - tokens,
            age_s,
        )

    def _note(self, now: float, decision: str) -> None:
        then, answers, latencies_s = self._noted
        came = self._answers - answers
        self._noted = (now, self._answers, self._latencies_s)
        moment = Moment(
            time_s=now - self._began,
            in_flight=self._in_flight,
            window=self.window,
            rate=came / max(1e-3, now - then),
            refused=self._refused,
            latency_s=(self._latencies_s - latencies_s) / came if came else math.nan,
            decision=decision,
        )
        if len(self.timeline) >= MOMENTS:
            self.timeline = [each for number, each in enumerate(self.timeline) if each.decision or number % 2]
            if len(self.timeline) > MOMENTS / 2:
                self.timeline = self.timeline[::2]
        self.timeline.append(moment)
