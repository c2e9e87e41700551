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
        if now <= self._at:
            return
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
        self,
        now: float,
        limit: float | None,
        remaining: float | None,
        reset_s: float | None,
        sent: tuple[tuple[float, float], ...],
    ) -> None:
        """Correct the level by headers, which tell it as it was some time ago.

        `sent`: for each time that this may have been (the request's arrival, the answer's sending), how much was sent
        since, and how many seconds ago it is. Which one it is nobody says, so the lowest level holds.
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
        self._refill(now)
        behind = max(amount - self.rate * age_s for amount, age_s in sent)
        level = max(0.0, min(self._room, remaining - max(0.0, behind)))  # what it refuses takes nothing
        if not level <= self._level < level + 1:  # it is told in whole numbers
            self._level = level
        self._at = now
        self.known = True


class _Refusals:
    """The rate that 429s alone show, and the time they ask for.

    A refusal says that the endpoint's bucket is empty just then, so what it accepted from one refusal to a later one
    is its rate, whatever the size of the bucket. Until there are two, the rate is guessed.
    """

    EVIDENCE = 5  # accepted requests that make a rate
    RICH_EVIDENCE = 30  # and so many make one that needs no older ones
    BACK_OFF = 0.95  # of the rate found
    RECOVER_S, LONGEST_RECOVER_S = 5.0, 20.0  # until the rate found is tried again; then it is passed, slowly at first
    CATCH_UP = 1.5  # times the rate, for what was held back
    HOLD_S, LONGEST_HOLD_S = 0.025, 10.0  # without Retry-After: doubled at each refusal that follows another
    RAMP_S = 0.15  # a guessed rate is doubled so often while it is reached
    RAMP = 32.0  # from this part of it
    DOUBLE_S = 3.0  # and doubled so often after that, until a refusal shows the rate

    def __init__(self, now: float) -> None:
        self.hold_until = -math.inf
        self._rate = math.inf
        self._sure = False  # the rate was measured
        self._ramp = False
        self._recover_s = self.RECOVER_S
        self._since = now  # when sending at the rate began
        self._at = now
        self._level = 0.0
        self._owed = 0.0  # held back while waiting
        self._may_catch_up = True
        self._decided = now  # refusals of what was sent before are no news
        self._streak = 0
        self._mark: float | None = None  # when a request was sent that found the bucket empty
        self._sent_by_mark = 0.0
        self._refused_since = 0.0
        self._held_s = 0.0  # since then

    def _speed(self, now: float) -> float:
        held_s = now - self._since
        if self._sure:
            x = held_s / self._recover_s
            speed = self._rate * (self.BACK_OFF + (1 - self.BACK_OFF) * x if x < 1 else 1 + 0.1 * (x - 1) ** 3)
            return self.CATCH_UP * speed if self._owed > 0 else speed
        if self._ramp:
            ramp = 2.0 ** (held_s / self.RAMP_S) / self.RAMP
            if ramp < 1:
                return self._rate * ramp
            held_s -= 5 * self.RAMP_S
        return self._rate * 2.0 ** min(20.0, held_s / self.DOUBLE_S)

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
        if self._rate < math.inf:
            self._level -= 1.0
            self._owed -= 1 - 1 / self.CATCH_UP

    def answered(self, sent: float) -> None:
        """Something that was sent after the last refusal is answered."""
        if sent >= self._decided:
            self._streak = 0

    def refused(
        self, now: float, sent: float, retry_after_s: float | None, explained: bool, sent_by: float, speed: float
    ) -> str:
        """Learn from a 429.

        `explained`: its headers say that the rate they tell is used up. `sent_by`: requests sent before this one.
        `speed`: requests accepted a second, of late.
        """
        if self._mark is not None and sent >= self._mark:
            self._refused_since += 1
        news = sent >= self._decided
        hold_s = retry_after_s
        if hold_s is None:
            self._streak += news
            hold_s = min(self.LONGEST_HOLD_S, self.HOLD_S * 2.0**self._streak) if news else 0.0
        self.hold_until = max(self.hold_until, now + hold_s)
        self._since = self._at = max(self._since, self.hold_until)
        if not news:
            return ""
        self._decided, self._level = now, 1.0
        if explained:
            return "refused"
        if self._mark is None:
            self._rate = max(1.0, 0.5 * speed)
            self._ramp = hold_s < 0.5  # else the bucket has filled meanwhile, at whatever rate
            self._mark, self._sent_by_mark, self._refused_since, self._held_s = sent, sent_by, 1.0, hold_s
            return "refused: rate guessed"
        accepted, interval_s = sent_by - self._sent_by_mark - self._refused_since + 1, max(0.01, sent - self._mark)
        if accepted < self.EVIDENCE:
            self._held_s += hold_s
            return "refused"
        rate = accepted / interval_s
        slow, share = (0.9, 0.9) if self._sure and self._owed <= 0 else (0.5, 0.7)
        if accepted < slow * speed * (interval_s - self._held_s):  # it was slower before, and the bucket ran over
            rate = max(rate, share * speed)
        alike = self._sure and abs(rate / self._rate - 1) < 0.1
        self._recover_s = (
            min(self.LONGEST_RECOVER_S, 2 * self._recover_s) if alike else min(self.RECOVER_S, max(0.5, 2 * interval_s))
        )
        if self._sure and self._owed > 0:
            self._may_catch_up = False  # the bucket does not keep what was held back
        self._rate, self._sure = rate, True
        self._owed = 0.8 * rate * (self.hold_until - now) if self._may_catch_up else 0.0
        if accepted >= self.RICH_EVIDENCE:
            self._mark, self._sent_by_mark, self._refused_since, self._held_s = sent, sent_by, 1.0, 0.0
        self._held_s += hold_s
        return "refused: rate measured"


# ---- the window

START = 64  # in flight before anything is known: enough for a hosted endpoint, no flood for a small one
START_AT_ONCE = 16  # of these so many at once, the others
START_GAP_S = 0.002  # so far apart, so that a first 429 can stop them
CEILING = 4096  # in flight; a client machine keeps no more connections than that
EVIDENCE = 16  # answers before a window is judged, at least
EVIDENCE_S = 0.05  # and seconds: an event loop delivers in bunches
EARLY = 24  # answers after which the first requests can be found to queue
SERIAL = 0.5  # log of how much faster the first four of sixteen are where these queue among themselves
GAIN = 1.1  # in flight for each request at work: some wait, so that no slot ever idles
SPREAD = 1.25  # and so many times its square root: a few slots swing more than many
LATE_S = 0.01  # and so many seconds' worth, for a client that is late by that much
FAST_S = 0.02  # but never less than so many seconds' worth: a queue of that length delays nobody
GROWING = 0.25  # of the growth in flight must come back as growth in speed, or the knee is passed
GROWING_AGAIN = 0.4  # where it had been passed before: chance must not move it
MORE = 0.1  # log of a growth in flight that can be judged
SURE = 1.2  # times as many at work as before is proof that growth helps
UNSURE = 1.5  # times the window is as far as it grows without that proof
BRAKE = 0.3  # log of the slow-down at which a growing window waits for its judgement
ROOM = math.log(1.13)  # answers no slower than that show that nothing queues
SUDDEN = 0.2  # log of a drop in latency that is no chance
QUEUED = math.log(1.8)  # answers slower than that show a long queue, or that they have become another kind
HELD = math.log(0.85)  # of the speed is all of it: fewer in flight made no difference
NOISE = 0.07  # log of a change of latency that means nothing
PROBE_SHARE = 1.3  # a probe for the latency without a queue keeps so many times fewer in flight
PROBE_S, LONGEST_PROBE_S = 10.0, 60.0  # between probes; doubled while they find nothing new
PROBE_WINDOWS = 30  # but at least so many windows: a probe costs two of them a part of their speed
DOUBTFUL_WINDOWS = 4  # until the next one, where a probe changed the picture
FEW_IN_FLIGHT = 6  # are not worth a probe
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

    Known of the endpoint are the latency while nothing queues (`base`), the speed, and the requests it works on at
    one time. An epoch is judged when as many answers came as were in flight, and only if the window was full: a
    window that something else keeps from filling says nothing about the endpoint.

    start -> grow -> probe -> hold: grow until more in flight is not faster, have fewer for a moment to learn the
    base, hold what that gives. From there it grows again where nothing queues or it is time to see, and has fewer
    again where answers have become slow.
    """

    def __init__(self, most: int, now: float) -> None:
        self.size = min(float(START), most)
        self.base: float | None = None  # log of seconds
        self._error = 0.0  # of it
        self._most = float(most)
        self._phase: Literal["start", "grow", "probe", "hold"] = "start"
        self._began: float | None = None
        self._firsts = (_First(4), _First(8), _First(16))
        self._epoch = _Epoch(now, 0)
        self._settling = 0  # answers yet to come that belong to the size before
        self._recent = 0.0  # log latency of the last few answers
        self._usual: float | None = None  # the same of the epochs at the size held
        self._sudden = -math.inf  # below it the recent latency shows that nothing queues any more
        self._lately: deque[float] = deque()  # when answers came, within the base latency: what was at work
        self._speed = 0.0  # answers a second
        self._at_work = 0.0
        self._proof = 0.0  # so many at work show that growth helps
        self._limit = 2.0 * self.size  # of growth without that proof
        self._grew = now
        self._before: tuple[float, int, int] | None = None  # speed, load and what was at work, in a growing window
        self._load = 0  # in flight before a probe
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
        self._recent = self.base or 0.0

    def answered(
        self, now: float, latency_s: float, in_flight: int, wanted: bool, busy: bool, welcome: float
    ) -> str:
        """Learn from an answer that came when `in_flight` were out, itself among them; the decision, if any.

        `wanted`: nothing but the window kept more from being sent. `busy`: this machine is short of CPU. `welcome`:
        requests a second that the endpoint's headers allow.
        """
        log = math.log(max(latency_s, 1e-6))
        self._recent += (log - self._recent) / 16 if self._recent else log
        lately = self._lately
        lately.append(now)
        if self.base is None:
            self._note_first(now - latency_s, log)
        else:
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
        if wanted and in_flight >= 0.9 * int(self.size):
            epoch.full += 1
            if not busy:
                if self._phase == "start" or self._phase == "grow":
                    self._grow(now, welcome)
                elif self._phase == "hold" and self._recent < self._sudden:
                    return self._look_for_room(now, in_flight, "room")
        self._grew = now
        if self.base is None:
            if epoch.answers == 1:
                epoch.load = in_flight
            if epoch.answers >= EARLY and (decision := self._early(now, epoch, in_flight)):
                return decision
        if epoch.answers >= max(EVIDENCE, epoch.load) and now - epoch.began >= EVIDENCE_S:
            self._epoch = _Epoch(now, in_flight)
            return self._judge(now, epoch, in_flight, busy)
        return ""

    # -- the first answers

    def _note_first(self, sent: float, log: float) -> None:
        for first in self._firsts:
            if sent <= first.until and first.back < first.count:
                first.back += 1
                first.logs += log

    def _first_base(self, now: float) -> float:
        """Log latency of the first requests; those still out took at least the time since.

        Where even these were worked on one after the other, the first few of them are nearer to it.
        """
        age = math.log(max(1e-6, now - (self._began or 0.0)))
        few, some, most = (
            (first.logs + (first.count - first.back) * age) / max(first.count, 1) for first in self._firsts
        )
        return few if few < most - SERIAL else some if some < most - SERIAL else most

    def _early(self, now: float, epoch: _Epoch, in_flight: int) -> str:
        """See whether the first requests wait for each other, long before all of them are back."""
        base = self._first_base(now)
        usual_s = math.exp(base)
        if self._recent <= base + SERIAL or now - epoch.began <= 3 * usual_s:
            return ""
        self.base = base
        speed = epoch.answers / (now - epoch.began - usual_s)
        self._hold(now, 2 * speed * usual_s, speed, in_flight)  # twice, since a few answers are poor evidence
        self._probe_at = now
        return "knee"

    # -- judgements

    def _grow(self, now: float, welcome: float) -> None:
        """Let two more out for each answer while answers are not slower, or as many as the headers say are welcome."""
        base = self._first_base(now) if self.base is None else self.base
        if self._recent >= base + BRAKE:
            return
        limit = self._limit
        if welcome:
            limit = self._most
        elif self.base is not None and (limit == math.inf or len(self._lately) > self._proof):
            limit = 2.0 * len(self._lately)
        more = max(2.0, welcome * min(1.0, now - self._grew))
        self.size = min(self._most, max(self.size, limit), self.size + more)

    def _judge(self, now: float, epoch: _Epoch, in_flight: int, busy: bool) -> str:
        count = epoch.answers
        log = epoch.logs / count
        error = math.sqrt(max(0.0, epoch.squares / count - log * log) / count)
        speed = count / (now - epoch.began)
        full = epoch.full >= 0.7 * count
        if self._phase == "start":
            return self._judge_start(now, epoch, log, error, full)
        if not full:
            self._before = None
            if self._phase == "probe":
                self._hold(now, self._at_work, self._speed, in_flight)
            return ""
        if self._phase == "grow":
            return self._judge_growth(now, epoch.load, log, error, speed, in_flight, busy)
        if self._phase == "probe":
            return self._judge_probe(now, epoch.load, log, error, speed, in_flight)
        return self._judge_hold(now, epoch, log, error, speed, in_flight, busy)

    def _judge_start(self, now: float, epoch: _Epoch, log: float, error: float, full: bool) -> str:
        first = self._first_base(now)
        self.base, self._error = log, error
        if first < log - SUDDEN:  # what was sent at once is faster than what followed: that queues
            self.base, self._error = first, error * math.sqrt(epoch.answers / START_AT_ONCE)
        self._phase = "grow"
        if full:
            self._limit = math.inf
            self._at_work, self._speed = epoch.load, epoch.load / (epoch.seconds / epoch.answers)
            self._before = (self._speed, epoch.load, epoch.load)
        return ""

    def _judge_growth(
        self, now: float, load: int, log: float, error: float, speed: float, in_flight: int, busy: bool
    ) -> str:
        assert self.base is not None
        at_work = len(self._lately)
        if self._before is None:
            self._before = (speed, load, at_work)
            if not self._speed:
                self._at_work, self._speed = load, speed
            return ""
        speed_before, load_before, at_work_before = self._before
        more, faster = math.log(load / load_before), math.log(speed / speed_before)
        if more < MORE and log < self.base + BRAKE and not busy:
            return ""
        helps = GROWING if self._limit == math.inf else GROWING_AGAIN
        if not busy and ((more >= MORE and faster >= helps * more) or at_work > max(SURE * at_work_before, self._proof)):
            self._limit = math.inf
            self._before = (speed, load, at_work)
            self._at_work, self._speed = load, speed
            if faster > 0.15 and log > self.base:  # slower, but worth it: batches grow
                self.base, self._error = log, error
            return "grow"
        self._hold(now, min(load, self._at_work * max(1.0, speed / self._speed)), speed, in_flight)
        return self._have_fewer(in_flight, "knee")

    def _judge_probe(self, now: float, load: int, log: float, error: float, speed: float, in_flight: int) -> str:
        assert self.base is not None
        fastest, held = max(speed, self._speed), math.log(speed / self._speed) > HELD
        doubt = math.hypot(error, self._error)
        if held and log > self._with_grace() + NOISE + 2 * doubt:
            self._hold(now, max(load / 2, speed * math.exp(self.base)), fastest, in_flight)
            return self._have_fewer(in_flight, "queue")
        moved = log - self.base
        news = abs(moved) > 2 * NOISE + doubt
        self.base, self._error = log, error
        self._probe_after_s = PROBE_S if news else min(LONGEST_PROBE_S, 2 * self._probe_after_s)
        self._hold(now, min(self._load, load * fastest / speed), fastest, in_flight)
        if news:
            self._probe_at = now + DOUBTFUL_WINDOWS * self.size / speed
        if held and moved < -NOISE - doubt:
            return self._have_fewer(in_flight, "queue shorter")
        return "measured"

    def _judge_hold(
        self, now: float, epoch: _Epoch, log: float, error: float, speed: float, in_flight: int, busy: bool
    ) -> str:
        assert self.base is not None
        usual = self._usual
        self._usual = log if usual is None else usual + 0.3 * (log - usual)
        self._speed = speed if usual is None else self._speed + 0.3 * (speed - self._speed)
        spread = error * math.sqrt(epoch.answers)
        half = self.base + max(ROOM, 0.5 * (self._usual - self.base))
        self._sudden = min(self._usual - max(SUDDEN, 0.7 * spread), half)
        expected = self._speed * math.exp(self.base)
        self._proof = expected + max(0.25 * expected, 4 * spread * math.sqrt(expected))
        slower, doubt = log - self.base, math.hypot(error, self._error)
        room = 0.5 * math.log(max(1.0, self.size / self._at_work))  # half of what the queue meant to be there takes
        dropped = usual is not None and log < usual - ROOM and log < half
        if (dropped or slower + doubt < room) and not busy:
            return self._look_for_room(now, in_flight, "room")
        if log - self._with_grace() - 2 * doubt > QUEUED:
            self._hold(now, max(self.size / 2, expected), self._speed, in_flight)
            return self._have_fewer(in_flight, "slower")
        if now >= self._probe_at and self.size >= FEW_IN_FLIGHT and not busy:
            return self._look_for_room(now, in_flight, "probe", PROBE_SHARE)
        return ""

    def _with_grace(self) -> float:
        """The base with a queue that does not matter."""
        assert self.base is not None
        return math.log(math.exp(self.base) + FAST_S)

    # -- decisions

    def _look_for_room(self, now: float, in_flight: int, decision: str, share: float = UNSURE) -> str:
        self._phase, self._limit = "grow", share * self.size
        self._before = (self._speed, in_flight, len(self._lately))
        self._epoch = _Epoch(now, in_flight)
        return decision

    def _have_fewer(self, in_flight: int, decision: str) -> str:
        fewer = max(1.0, min(self.size / PROBE_SHARE, 0.95 * self._at_work), FAST_S * self._speed)
        if fewer < self.size and self.size > FEW_IN_FLIGHT:
            self._phase, self._load = "probe", in_flight
            self.size, self._settling = fewer, in_flight
        return decision

    def _hold(self, now: float, at_work: float, speed: float, in_flight: int) -> None:
        """Keep as many in flight as are worked on at one time, and a few more."""
        self._phase, self._usual, self._sudden, self._proof = "hold", None, -math.inf, 0.0
        self._at_work, self._speed = at_work, speed
        size = max(GAIN * at_work + SPREAD * math.sqrt(at_work) + LATE_S * speed, FAST_S * speed, 1.0)
        self.size = min(self._most, size)
        self._settling = in_flight
        self._probe_at = now + max(self._probe_after_s, PROBE_WINDOWS * size / speed)


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
        self.suspected = False
        if self._failures and sent < self._first_sent:
            return False
        self._failures = 0
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
FEW = 16  # requests are too few to tell a speed
MOMENT_S = 1.0  # between entries of the timeline without a decision
MOMENTS = 4000  # entries of the timeline before it is thinned


class _History:
    """How much had been sent by when."""

    def __init__(self) -> None:
        self.requests = self.tokens = self.refused = 0.0
        self._times: list[float] = []
        self._sums: list[tuple[float, float, float]] = []  # the three above, before that time

    def sent(self, now: float, tokens: float) -> None:
        if not self._times or now - self._times[-1] >= HISTORY_STEP_S:
            self._times.append(now)
            self._sums.append((self.requests, self.tokens, self.refused))
            if len(self._times) > HISTORY:
                del self._times[: HISTORY // 2], self._sums[: HISTORY // 2]
        self.requests += 1
        self.tokens += tokens

    def by(self, time_s: float) -> tuple[float, float, float]:
        """Requests and tokens that had been sent, and requests refused, before what was sent then."""
        index = bisect_right(self._times, time_s + 1e-6) - 1
        return self._sums[index] if index >= 0 else (0.0, 0.0, 0.0)

    def speed(self, now: float) -> float:
        """Requests accepted a second: of the last half second, or of longer where those are few."""
        if not self._times:
            return 0.0
        begun_s = max(0.05, now - self._times[0])
        span_s = min(0.5, begun_s)
        while True:
            sent, _, refused = self.by(now - span_s)
            accepted = self.requests - sent - (self.refused - refused)
            if accepted >= FEW or span_s >= begun_s:
                return max(0.0, accepted) / span_s
            span_s = min(2 * span_s, begun_s)


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
        self._wanted = False  # more would be sent if the window were wider
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
        if self._in_flight >= int(self._window.size) or (self._outage.suspected and self._in_flight):
            self._limit = "this machine" if self._lag_s > BUSY_LAG_S else "server"
            self._wanted = True
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
            self._limit, self._wanted = limit, False
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
        if decision := self._window.answered(now, latency_s, in_flight, self._wanted, busy, welcome):
            self._note(now, decision)

    def refused(
        self, now: float, *, latency_s: float, reserved: int, retry_after_s: float | None, headers: RateHeaders | None
    ) -> None:
        """Learn from a 429 that is a rate limit; the parameters are those of `answered`."""
        self._in_flight -= 1
        self._refused += 1
        self._history.refused += 1
        sent = now - latency_s
        if self._ramping:
            self._ramping = False
            self._window.size = max(1.0, self._in_flight + 1.0)
        self._alive(now, sent)
        explained = False
        if headers is not None:
            explained = headers.remaining_requests is not None and headers.remaining_requests < 1
            explained |= headers.remaining_tokens is not None and headers.remaining_tokens < 2 * reserved * self._ratio
        sent_by, speed = self._history.by(sent)[0], self._history.speed(now)
        if decision := self._refusals.refused(now, sent, retry_after_s, explained, sent_by, speed):
            self._note(now, decision)
        if headers is not None:
            self._read(now, headers, latency_s)

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
        requests, tokens, _ = history.by(now - age_s)
        late_s = MARGIN_S + self._lag_s
        late_requests, late_tokens, _ = history.by(now - late_s)
        at = max(now, self._refusals.hold_until)  # a window that has no room may refill only then
        self._requests.learn(
            at,
            headers.limit_requests,
            headers.remaining_requests,
            headers.reset_requests_s,
            ((history.requests - requests - 1, age_s), (history.requests - late_requests, late_s)),
        )
        self._tokens.learn(
            at,
            headers.limit_tokens,
            headers.remaining_tokens,
            headers.reset_tokens_s,
            ((history.tokens - tokens, age_s), (history.tokens - late_tokens, late_s)),
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
