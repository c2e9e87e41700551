"""How many requests may be in flight: as many as make the endpoint faster, and a few more that wait there.

Pure. An endpoint that queues silently is kept full and not flooded; one that does not queue is given ever more.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

START = 64  # in flight before anything is known: enough for a hosted endpoint, no flood for a small one
START_AT_ONCE = 16  # of these so many at once, the others
START_GAP_S = 0.002  # so far apart, so that a first 429 can stop them
CEILING = 4096  # in flight; a client machine keeps no more connections than that

EVIDENCE = 16  # answers before a window is judged, at least
EVIDENCE_S = 0.05  # and seconds: an event loop delivers in bunches
EARLY = 24  # answers after which the first requests can be found to queue
SLOWEST = 4.0  # times the usual latency is the longest that the first requests are waited for
SERIAL = 0.5  # log of how much faster the first four of sixteen are where these queue among themselves
FULL = 0.9  # of the window in flight is a full window
NEAR = 0.8  # of the allowed rate is so near that the window is not what limits
FULL_SHARE = 0.95  # of the answers must have come from a full window for it to be judged

SPREAD = 2.25  # times the square root of the requests at work may wait: no slot idles, and few swing more than many
LATE_S = 0.005  # and so many seconds' worth, for a client that is late by that much
FAST_S = 0.02  # but never less than so many seconds' worth: a queue of that length delays nobody

GROWING = 0.3  # of the growth in flight must come back as growth in speed, or the knee is passed
GROWING_AGAIN = 0.4  # at first, and where it had been passed before: chance must not move it
MORE = 0.1  # log of a growth in flight that can be judged
SURE = 1.2  # times the speed before is proof that growth helps
UNSURE = 1.4  # times the window is as far as it grows without that proof
AVERAGED = 4  # to a window: the weight of an answer in the present speed, since of a wave each sees another part
KEPT = 50_000  # answers whose time is known: more than come while one of them is out
BRAKE = 0.3  # log of the slow-down at which a growing window waits for its judgement
BATCHING = 0.15  # log of a gain in speed that is worth slower answers

ROOM = math.log(1.13)  # answers no slower than that show that nothing queues
SUDDEN = 0.2  # log by which the first answers are faster where the others queued
QUEUED = math.log(1.8)  # answers slower than that show a long queue, or that they have become another kind
HELD = math.log(0.85)  # of the speed is all of it: fewer in flight made no difference
FALLEN = 0.5  # of the speed that a probe's fewer in flight explain: it is the endpoint that has become slower
NOISE = 0.07  # log of a change of latency that means nothing
MORE_SHARE, FEWER_SHARE = 1.25, 1.3  # a probe has so many times more in flight, and then so many times fewer
PROBE_S = 10.0  # between probes
PROBE_WINDOWS = 8  # but at least so many windows: a probe costs two of them a part of their speed
RARER, RAREST = 2.0, 8.0  # both so many times more while probes find nothing new, and at most
DOUBTFUL_S, DOUBTFUL_WINDOWS = 2.0, 4  # until the next one, where a probe changed the picture
FEW_IN_FLIGHT = 6  # are not worth a probe


class Answers:
    """When answers came."""

    __slots__ = ("_times",)

    def __init__(self) -> None:
        self._times: list[float] = []

    def came(self, now: float) -> None:
        """Count one."""
        self._times.append(now)
        if len(self._times) > KEPT:
            del self._times[: KEPT // 2]

    def since(self, time_s: float) -> int:
        """Give how many came after that."""
        return len(self._times) - bisect_right(self._times, time_s)


class Epoch:
    """What was seen since a moment.

    The speed is what the answers themselves saw: those that came while one was out, by the seconds that it was out.
    By the clock it would depend on how many waves of answers happen to fall between two moments.
    """

    __slots__ = ("answers", "began", "full", "load", "logs", "passed", "seconds", "squares")

    def __init__(self, began: float, load: int) -> None:
        self.began = began
        self.load = max(1, load)  # in flight at the beginning: what the answers of an epoch were sent beside
        self.answers = self.full = 0
        self.passed = 0  # answers that came while each of these was out, itself included
        self.seconds = 0.0  # the latencies' sum
        self.logs = self.squares = 0.0  # of their logarithms, which a few slow answers do not sway

    def sample(self, now: float) -> Sample:
        """Sum it up."""
        log = self.logs / self.answers
        spread = math.sqrt(max(0.0, self.squares / self.answers - log * log))
        return Sample(
            load=self.load,
            beside=self.passed / self.answers,
            log=log,
            spread=spread,
            error=spread / math.sqrt(self.answers),
            speed=self.passed / self.seconds,
            present=min(self.passed / self.seconds, self.answers / (now - self.began)),
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One epoch, summed up.

    Attributes
    ----------
    load, beside : int, float
        In flight at its beginning; on average while its answers were out, which is less in a growing window.
    log, spread, error : float
        Of the latency's logarithm the mean, the standard deviation, and the mean's error.
    speed, present : float
        Answers a second; the same where it has just fallen, which those that were out before have not seen.
    """

    load: int
    beside: float
    log: float
    spread: float
    error: float
    speed: float
    present: float


class First:
    """The first few requests of a run: their latency is the one without a queue, or the nearest to it."""

    __slots__ = ("back", "began", "count", "left", "logs", "size", "until")

    def __init__(self, size: int) -> None:
        self.size = size
        self._restart()

    def _restart(self) -> None:
        self.left = self.size  # yet to be sent
        self.count = self.back = 0
        self.began, self.until = math.inf, -math.inf  # when the first and the last of them were sent
        self.logs = 0.0

    @property
    def complete(self) -> bool:
        """Whether all are back."""
        return not self.left and self.back == self.count

    def sent(self, now: float) -> None:
        """Count a request, if it is among them."""
        if self.left:
            self.left -= 1
            self.count += 1
            self.began, self.until = min(self.began, now), now

    def answered(self, sent: float, log: float) -> None:
        """Count an answer, if it is to one of them."""
        if self._has(sent):
            self.back += 1
            self.logs += log

    def lost(self, sent: float) -> None:
        """Forget a request, if it is one of them; where all are lost the next ones are the first."""
        if self._has(sent):
            self.count -= 1
            if not self.count:
                self._restart()

    def _has(self, sent: float) -> bool:
        return sent <= self.until + 1e-6 and self.back < self.count  # a latency is rounded

    def log(self, now: float) -> float:
        """Give the mean logarithm of their latency; those still out took at least the time since."""
        age = math.log(max(1e-6, now - self.began)) if self.count else 0.0
        return (self.logs + (self.count - self.back) * age) / max(self.count, 1)


class Window:
    """The window: start, grow, probe, hold.

    Known of the endpoint are the latency while nothing queues (the base), the speed, and by both the number of
    requests that it works on at one time. Grow while more in flight is faster; have fewer for a moment to learn the
    base; hold what that gives. From there grow again where nothing queues, or when it is time to see; have fewer
    again where answers have become slow.

    An epoch is judged when as many answers came as were in flight, and only if the window was full: a window that
    something else keeps from filling says nothing about the endpoint.
    """

    def __init__(self, most: int, now: float) -> None:
        self.size = min(float(START), most)
        self._most = float(most)
        self._phase: Literal["start", "grow", "probe", "hold"] = "start"
        self._base: float | None = None  # log of seconds
        self._error = 0.0  # of the base
        self._speed = 0.0  # answers a second
        self._at_work = 0.0
        self._epoch = Epoch(now, 0)
        self._settling = 0  # answers yet to come that belong to the size before
        self._recent: float | None = None  # log latency of the last few answers
        self._answers = Answers()
        # Of the last few answers, on average: those that came while each was out, and for how long it was.
        self._passed = self._seconds = 0.0
        # start
        self._began: float | None = None
        self._firsts = (First(4), First(8), First(START_AT_ONCE))
        self._began_well = False  # the base is no longer that of the quickest answers alone
        # grow
        self._grew = now
        self._proof = 0.0  # more at work than that show that growth helps
        self._limit = 2.0 * self.size  # of growth without that proof
        self._before: tuple[float, float] | None = None  # speed and load
        # probe
        self._load = 0  # in flight before it
        self._probe_rarely = 1.0  # so many times less often than at first
        self._probe_at = math.inf
        self._doubtful = False  # the last one changed the picture
        # hold
        self._usual: float | None = None  # log latency
        self._slow = True  # the last epoch was, or there was none

    @property
    def _working(self) -> float:
        """Requests that the endpoint was lately at work on, by Little's law with the latency without a queue."""
        return 0.0 if self._base is None else self._passed / self._seconds * math.exp(self._base)

    @property
    def usual_s(self) -> float | None:
        """The latency while nothing queues; None while it is not known."""
        return None if self._base is None else math.exp(self._base)

    def sent(self, now: float) -> None:
        """Count a request."""
        if self._began_well:
            return
        if self._began is None:
            self._began = now
            self._epoch = Epoch(now, START_AT_ONCE)
        for first in self._firsts:
            first.sent(now)

    def lost(self, sent: float) -> None:
        """Forget a request that got no answer."""
        if not self._began_well:
            for first in self._firsts:
                first.lost(sent)

    def stop_start(self, in_flight: int) -> None:
        """End the start at what is in flight: the endpoint refuses more."""
        if self._phase == "start":
            self.size = max(1.0, min(self.size, in_flight + 1.0))

    def resume(self, now: float) -> None:
        """Go on as before an outage; what was being tried then is forgotten."""
        if self._phase == "probe":
            self._hold(now, self._at_work, self._speed, 0)
        self._before = None
        self._settling = int(self.size)  # until the window is full again
        self._recent = self._base

    def answered(
        self,
        now: float,
        latency_s: float,
        in_flight: int,
        *,
        wanted: bool,
        busy: bool,
        welcome: float,
        allowed: float,
    ) -> str:
        """Learn from an answer; the decision that it leads to, if any.

        Parameters
        ----------
        now : float
            The time.
        latency_s : float
            Seconds since it was sent.
        in_flight : int
            When it came, itself included.
        wanted : bool
            Nothing but the window kept more from being sent.
        busy : bool
            This machine is short of CPU: more in flight would wait here and not there.
        welcome : float
            Requests a second that the endpoint's headers allow; 0 where they do not say.
        allowed : float
            The same by headers or refusals; infinite where neither say.
        """
        self._answers.came(now)
        # Itself at least: a clock that ticks 64 times a second, as on Windows, may not have moved since it was sent.
        seconds, passed = max(latency_s, 1e-6), max(1, self._answers.since(now - latency_s))
        log = math.log(seconds)
        part = min(1 / AVERAGED, AVERAGED / self.size) if self._seconds else 1.0
        self._passed += (passed - self._passed) * part
        self._seconds += (seconds - self._seconds) * part
        self._recent = log if self._recent is None else self._recent + (log - self._recent) / EVIDENCE
        if self._phase == "start" or not self._began_well:
            self._note_first(now, now - latency_s, log)
        if self._settling:
            self._settling -= 1
            if not self._settling:
                self._epoch = Epoch(now, in_flight)
            return ""
        epoch = self._epoch
        epoch.answers += 1
        epoch.passed += passed
        epoch.seconds += seconds
        epoch.logs += log
        epoch.squares += log * log
        # The first answers come in a bunch, all of them before any of the next requests is sent.
        if wanted and (self._phase == "start" or in_flight >= FULL * int(self.size)):
            epoch.full += 1
            if not busy and (self._phase == "start" or self._phase == "grow"):
                self._grow(now, self._recent, welcome)
        self._grew = now
        if self._base is None:
            if epoch.answers == 1:
                epoch.load = in_flight
            if epoch.answers >= EARLY and self._queues_early(now, epoch, self._recent, in_flight):
                return "knee"
        if epoch.answers < max(EVIDENCE, epoch.load) or now - epoch.began < EVIDENCE_S:
            return ""
        self._epoch = Epoch(now, in_flight)
        return self._judge(now, epoch, in_flight, busy, allowed)

    # -- the first answers

    def _note_first(self, now: float, sent: float, log: float) -> None:
        for each in self._firsts:
            each.answered(sent, log)
        if self._phase == "grow" and self._base is not None:  # the quickest came first, and made it too low
            self._base = max(self._base, self._first_base(now))
            first = self._firsts[-1]
            self._began_well = first.complete or now - first.began > SLOWEST * math.exp(self._base)

    def _first_base(self, now: float) -> float:
        """Log latency of the first requests, or of the first few where even these wait for each other."""
        few, some, most = (first.log(now) for first in self._firsts)
        return few if few < most - SERIAL else some if some < most - SERIAL else most

    def _queues_early(self, now: float, epoch: Epoch, recent: float, in_flight: int) -> bool:
        """See whether the first requests wait for each other, long before all of them are back."""
        base = self._first_base(now)
        usual_s = math.exp(base)
        if recent <= base + SERIAL or now - epoch.began <= 3 * usual_s:
            return False
        self._base = base
        speed = epoch.answers / (now - epoch.began - usual_s)
        self._hold(now, 2 * speed * usual_s, speed, in_flight)  # twice, since a few answers are poor evidence
        self._probe_at = now
        return True

    # -- judgements

    def _judge(self, now: float, epoch: Epoch, in_flight: int, busy: bool, allowed: float) -> str:
        sample = epoch.sample(now)
        full = epoch.full >= FULL_SHARE * epoch.answers
        if self._base is None:
            self._judge_start(now, epoch, sample, full)
            return ""
        if not full:
            self._before = None
            if self._phase == "probe":
                self._hold(now, self._at_work, self._speed, in_flight)
            elif self._phase == "grow" and epoch.full < 0.5 * epoch.answers:
                self._base, self._error = sample.log, sample.error  # it is not our queue that they wait in
            return ""
        if self._phase == "probe":
            return self._judge_probe(now, sample, self._base, in_flight)
        if sample.speed >= NEAR * allowed:  # a flat speed is the rate's doing, and a little more gets all of it
            self._before = None
            return self._look_for_room(now, in_flight, "room") if self._phase == "hold" else ""
        if self._phase == "hold":
            return self._judge_hold(now, sample, self._base, in_flight, busy)
        return self._judge_growth(now, sample, self._base, in_flight, busy)

    def _judge_start(self, now: float, epoch: Epoch, sample: Sample, full: bool) -> None:
        first = self._first_base(now)
        self._base, self._error = sample.log, sample.error
        if self._firsts[-1].count and first < sample.log - SUDDEN:  # what was sent at once is faster: the rest queued
            self._base, self._error = first, sample.spread / math.sqrt(START_AT_ONCE)
        self._phase = "grow"
        if full:
            load = max(epoch.load, int(min(START, self._most)))
            # Little's law, by the first if these were faster: a client short of CPU makes the others look slow.
            self._at_work, self._speed = load, load / min(epoch.seconds / epoch.answers, math.exp(first))
            self._before = (self._speed, load)

    def _judge_growth(self, now: float, sample: Sample, base: float, in_flight: int, busy: bool) -> str:
        load, speed = sample.beside, sample.speed
        if self._before is None:
            self._before = (speed, load)
            if not self._speed:
                self._at_work, self._speed = load, speed
            return ""
        speed_before, load_before = self._before
        more, faster = math.log(load / load_before), math.log(speed / speed_before)
        if more < MORE and (sample.log < base + BRAKE or in_flight > SURE * load) and not busy:
            return ""  # what it has grown to since is yet to be seen
        if not self._began_well:
            return ""  # the base may be too low, with the slow ones among the first still out
        share = GROWING if self._limit == math.inf else GROWING_AGAIN
        sure = speed > SURE * speed_before and self._working > self._proof > 0
        helped = sure or (more >= MORE and faster >= share * more)
        if helped and busy:
            return ""  # it may be the new connections that take the CPU; nothing grows until it is free again
        if helped:
            self._limit = math.inf
            self._before = (speed, load)
            self._at_work, self._speed = load, speed
            if faster > max(BATCHING, GROWING_AGAIN * more) and sample.log > base:
                self._base, self._error = sample.log, sample.error
            return "grow"
        self._hold(now, min(load, self._at_work * max(1.0, speed / self._speed)), speed, in_flight)
        return self._have_fewer(in_flight, "knee")

    def _judge_probe(self, now: float, sample: Sample, base: float, in_flight: int) -> str:
        log, speed, load = sample.log, sample.speed, sample.load
        if speed < FALLEN * self._speed * load / self._load:
            speed = self._speed = sample.present
        fastest, held = max(speed, self._speed), math.log(speed / self._speed) > HELD
        doubt = math.hypot(sample.error, self._error)
        if held and log > with_grace(base) + NOISE + 2 * doubt:
            self._hold(now, max(load / 2, speed * math.exp(base)), fastest, in_flight)
            return self._have_fewer(in_flight, "queue")
        news = abs(log - base) > 2 * NOISE + doubt
        self._base, self._error = log, sample.error
        self._probe_rarely = 1.0 if news else min(RAREST, RARER * self._probe_rarely)
        self._hold(now, min(self._load, load * fastest / speed), fastest, in_flight)
        self._doubtful = news
        if news:
            self._probe_at = now + max(DOUBTFUL_S, DOUBTFUL_WINDOWS * self.size / speed)
        if held and log < base - NOISE - doubt:
            return self._have_fewer(in_flight, "queue shorter")
        return "measured"

    def _judge_hold(self, now: float, sample: Sample, base: float, in_flight: int, busy: bool) -> str:
        log = sample.log
        usual, self._usual = self._usual, log if self._usual is None else self._usual + 0.3 * (log - self._usual)
        self._speed = sample.speed if usual is None else self._speed + 0.3 * (sample.speed - self._speed)
        expected = self._speed * math.exp(base)
        self._proof = expected + max(0.25 * expected, 4 * sample.spread * math.sqrt(expected))
        half = base + max(ROOM, 0.5 * (self._usual - base))
        doubt = math.hypot(sample.error, self._error)
        dropped = usual is not None and log < usual - ROOM and log < half
        meant = math.log(max(1.0, self.size / self._at_work))  # the queue that is meant to be there
        if (dropped or log + doubt < base + 0.5 * meant) and not busy:
            return self._look_for_room(now, in_flight, "room")
        was_slow, self._slow = self._slow, log - 2 * doubt > with_grace(base) + QUEUED
        if self._slow and was_slow:  # twice, so that the speed to compare with is the present one
            self._hold(now, max(self.size / 2, sample.present * math.exp(base)), sample.present, in_flight)
            return self._have_fewer(in_flight, "slower")
        if now < self._probe_at or self.size < FEW_IN_FLIGHT or busy:
            return ""
        if self._doubtful:
            return self._have_fewer(in_flight, "probe")
        return self._look_for_room(now, in_flight, "probe", MORE_SHARE)

    # -- decisions

    def _grow(self, now: float, recent: float, welcome: float) -> None:
        """Let out two more for an answer while answers are no slower, or as many as the headers say are welcome."""
        if recent >= (self._first_base(now) if self._base is None else self._base) + BRAKE:
            return
        limit = self._limit
        if welcome:
            limit = self._most
        elif self._base is not None and (limit == math.inf or self._working > self._proof):
            limit = 2.0 * self._working
        more = max(2.0, welcome * min(1.0, now - self._grew))
        self.size = min(self._most, max(self.size, limit), self.size + more)

    def _look_for_room(self, now: float, in_flight: int, decision: str, share: float = UNSURE) -> str:
        self._phase, self._limit = "grow", share * self.size
        self._before = (self._speed, in_flight)
        self._epoch = Epoch(now, in_flight)
        return decision

    def _have_fewer(self, in_flight: int, decision: str) -> str:
        fewer = max(1.0, min(self.size / FEWER_SHARE, 0.95 * self._at_work), FAST_S * self._speed)
        if fewer < self.size and self.size > FEW_IN_FLIGHT:
            self._phase, self._load = "probe", in_flight
            self.size, self._settling = fewer, in_flight
        return decision

    def _hold(self, now: float, at_work: float, speed: float, in_flight: int) -> None:
        """Keep as many in flight as are worked on at one time, and a few more."""
        self._phase, self._usual, self._proof, self._slow = "hold", None, 0.0, True
        self._began_well = True
        self._at_work, self._speed = at_work, speed
        size = max(at_work + SPREAD * math.sqrt(at_work) + LATE_S * speed, FAST_S * speed, 1.0)
        self.size = min(self._most, size)
        self._settling = in_flight
        self._probe_at = now + self._probe_rarely * max(PROBE_S, PROBE_WINDOWS * size / speed)


def with_grace(base: float) -> float:
    """Give the log latency with a queue so short that it does not matter."""
    return math.log(math.exp(base) + FAST_S)
