"""How many requests may be in flight: as many as make the endpoint faster, and a few more that wait there.

Pure. An endpoint that queues silently is kept full and not flooded; one that does not queue is given ever more.

Latencies are compared by their natural logarithms, whose mean a few slow answers do not sway. A difference of 0.1 there
is a latency 11 % longer, one of 0.3 is 35 %. What ends in `_LOG` is such a difference.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

from llmframe.rates import ROUNDING_S

CEILING = 4096  # requests in flight, at most: a client machine keeps no more connections than that

# At the start, when nothing is known of the endpoint.
START = 64  # requests in flight: enough for a hosted endpoint, and no flood for a small one
START_AT_ONCE = 16  # requests of these that are sent at once
START_GAP_S = 0.002  # seconds between each of the others, so that a first 429 comes in time to stop them
FIRST_FEW, FIRST_SOME = 4, 8  # first requests that show the latency without a queue, where START_AT_ONCE queue already
SERIAL_LOG = 0.5  # by how much these few have to be faster than all START_AT_ONCE to show that those queue
SUDDEN_LOG = 0.2  # by how much START_AT_ONCE have to be faster than all answers to show that the others queued
EARLY = 24  # answers after which the first requests may be found to queue, though not all of them are back
EARLY_LATENCIES = 3.0  # usual latencies that must have gone by for that
EARLY_MARGIN = 2.0  # how many times those that seem to be at work count then: a few answers are poor evidence
SLOWEST = 4.0  # usual latencies for which the slowest of the first requests are waited for, at most

# When answers are judged.
EVIDENCE = 16  # answers that it takes, at least
EVIDENCE_S = 0.05  # seconds that it takes, at least: an event loop delivers answers in bunches
FULL = 0.9  # share of the window that is in flight when the window counts as full
FULL_SHARE = 0.95  # share of the answers that must have come while it was full
SELDOM_FULL = 0.5  # share of the answers: if fewer came while it was full, they waited in another queue than ours
NEAR = 0.8  # share of the allowed rate: a higher speed is limited by that rate, and not by the window
STANDARD_ERRORS = 2.0  # how many standard errors of a latency a difference must be to be more than chance
AVERAGED = 4  # divisor of the window: the present speed averages so many answers, as each saw another part of a wave
KEPT = 50_000  # answers whose time is known: more than come while one of them is out

# How large a window keeps the endpoint full.
SPREAD = 2.25  # requests that may wait, in square roots of those at work: arrivals vary by about that, so no slot idles
LATE_S = 0.005  # seconds' worth of answers that may wait too, for a client that sends the next ones late by that much
FAST_S = 0.02  # seconds' worth of answers that are in flight at least: a queue of that length delays nobody

# How a window grows, and when the knee is passed: the point from which on more in flight only wait.
STEP = 2.0  # requests more for each answer, while answers are no slower
WELCOME_S = 1.0  # seconds' worth of the rate in the headers that is more for one answer, at most
FREELY = 2.0  # times what is at work, or times the window at the start: it grows so far until it is judged
UNSURE = 1.4  # times the window that was held: it grows so far without a proof that this helps
MORE_LOG = 0.1  # growth in flight that is enough to be judged
GROWN_SINCE = 1.2  # times what was in flight beside the answers judged: what more of them do is yet to be seen
GROWING = 0.3  # share of the growth in flight (as logs) that comes back as growth in speed, at least, where it helps
GROWING_AGAIN = 0.4  # the same at first, and after the knee has been passed once: chance must not move it
SURE = 1.2  # times the speed before: a proof that growth helps, if as much is at work as PROOF_SHARE says
BRAKE_LOG = 0.3  # slow-down of answers at which a growing window waits for its judgement
BATCHING_LOG = 0.15  # gain in speed that is worth slower answers: these are then the usual ones

# What changes a window that is held.
SMOOTHING = 0.3  # weight of the last answers judged in what is usual
ROOM_LOG = math.log(1.13)  # slow-down below which nothing queues, and gain on the usual latency that can show this
QUEUE_LEFT = 0.5  # share of the delay in the usual queue, or in the one that is meant: with less there is room for more
QUEUED_LOG = math.log(1.8)  # slow-down that shows a long queue, or that the answers have become another kind
HALVED = 0.5  # share of what was in flight that still counts as at work, at least, where a queue is found
PROOF_SHARE = 0.25  # share by which more must be at work than the usual speed explains to prove that growth helps,
PROOF_SPREADS = 4.0  # and how many times more than chance alone would make of it

# How a probe learns the latency without a queue: more are in flight for a moment, and then fewer.
MORE_SHARE, FEWER_SHARE = 1.25, 1.3  # how many times more, and then how many times fewer
UNQUEUED = 0.95  # share of what is at work that these fewer are, at most, so that nothing queues
HELD_LOG = math.log(0.85)  # loss of speed: if it is smaller than this, those that are missing had only queued
FALLEN = 0.5  # share of the speed that the fewer explain: with less, it is the endpoint that has become slower
NOISE_LOG = 0.07  # change of latency that means nothing
NEWS_LOG = 2 * NOISE_LOG  # change of latency that is news
PROBE_S = 10.0  # seconds between probes, at least
PROBE_WINDOWS = 8  # windows of answers between probes, at least: a probe costs two of them a part of their speed
RARER, RAREST = 2.0, 8.0  # times longer between probes after each that finds nothing new, and times longer at most
DOUBTFUL_S, DOUBTFUL_WINDOWS = 2.0, 4  # seconds and windows of answers, at least, after a probe that found something
FEW_IN_FLIGHT = 6  # requests in flight that are not worth a probe

SHORTEST_S = 1e-6  # the shortest latency: a clock may not have moved meanwhile, and zero has no logarithm


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

    __slots__ = ("answers", "began", "full", "load", "log_latencies", "passed", "seconds", "squares")

    def __init__(self, began: float, load: int) -> None:
        self.began = began
        self.load = max(1, load)  # in flight at the beginning: what the answers of an epoch were sent beside
        self.answers = self.full = 0
        self.passed = 0  # answers that came while each of these was out, itself included
        self.seconds = 0.0  # the latencies' sum
        self.log_latencies = self.squares = 0.0  # the sums of their logarithms, and of the squares of these

    def sample(self, now: float) -> Sample:
        """Sum it up."""
        log_latency = self.log_latencies / self.answers
        spread = math.sqrt(max(0.0, self.squares / self.answers - log_latency * log_latency))
        return Sample(
            load=self.load,
            beside=self.passed / self.answers,
            log_latency=log_latency,
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
    log_latency, spread, error : float
        Of the latency's logarithm the mean, the standard deviation, and the mean's error.
    speed, present : float
        Answers a second; the same where it has just fallen, which those that were out before have not seen.
    """

    load: int
    beside: float
    log_latency: float
    spread: float
    error: float
    speed: float
    present: float


class First:
    """The first few requests of a run: their latency is the one without a queue, or the nearest to it."""

    __slots__ = ("back", "began", "count", "left", "log_latencies", "size", "until")

    def __init__(self, size: int) -> None:
        self.size = size
        self._restart()

    def _restart(self) -> None:
        self.left = self.size  # yet to be sent
        self.count = self.back = 0
        self.began, self.until = math.inf, -math.inf  # when the first and the last of them were sent
        self.log_latencies = 0.0

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

    def answered(self, sent: float, log_latency: float) -> None:
        """Count an answer, if it is to one of them."""
        if self._has(sent):
            self.back += 1
            self.log_latencies += log_latency

    def lost(self, sent: float) -> None:
        """Forget a request, if it is one of them; where all are lost the next ones are the first."""
        if self._has(sent):
            self.count -= 1
            if not self.count:
                self._restart()

    def _has(self, sent: float) -> bool:
        return sent <= self.until + ROUNDING_S and self.back < self.count

    def log_latency(self, now: float) -> float:
        """Give the mean logarithm of their latency; those still out took at least the time since."""
        log_age = math.log(max(SHORTEST_S, now - self.began)) if self.count else 0.0
        return (self.log_latencies + (self.count - self.back) * log_age) / max(self.count, 1)


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
        self._base: float | None = None  # log of the latency while nothing queues, in seconds
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
        self._firsts = (First(FIRST_FEW), First(FIRST_SOME), First(START_AT_ONCE))
        self._began_well = False  # the base is no longer that of the quickest answers alone
        # grow
        self._grew = now
        self._proof = 0.0  # more at work than that show that growth helps
        self._limit = FREELY * self.size  # of growth without that proof
        self._before: tuple[float, float] | None = None  # speed and load
        # probe
        self._load = 0  # in flight before it
        self._probe_rarely = 1.0  # so many times less often than at first
        self._probe_at = math.inf
        self._doubtful = False  # the last one changed the picture
        # hold
        self._crowded_at = -math.inf
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

    def timed_out(self, now: float, sent: float, in_flight: int) -> str:
        """Forget a request that was given up; where more wait than are answered in that time, give the decision.

        The others would be given up in their turn, though the endpoint works on them.
        """
        self.lost(sent)
        came = self._answers.since(sent)
        full = in_flight >= FULL * int(self.size)  # else few were answered because few were sent
        if sent < self._crowded_at or not full or not 0 < came < int(self.size) or self._recent is None:
            return ""
        self._crowded_at = now  # what was sent before waits among as many, and says nothing new
        if self._base is None:
            self._base = self._recent
        speed = came / (now - sent)
        self._hold(now, min(came, speed * math.exp(self._base)), speed, came)
        self.size = min(self.size, float(came))
        return "too many wait"

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
        seconds, passed = max(latency_s, SHORTEST_S), max(1, self._answers.since(now - latency_s))
        log_latency = math.log(seconds)
        part = min(1 / AVERAGED, AVERAGED / self.size) if self._seconds else 1.0
        self._passed += (passed - self._passed) * part
        self._seconds += (seconds - self._seconds) * part
        self._recent = log_latency if self._recent is None else self._recent + (log_latency - self._recent) / EVIDENCE
        if self._phase == "start" or not self._began_well:
            self._note_first(now, now - latency_s, log_latency)
        if self._settling:
            self._settling -= 1
            if not self._settling:
                self._epoch = Epoch(now, in_flight)
            return ""
        epoch = self._epoch
        epoch.answers += 1
        epoch.passed += passed
        epoch.seconds += seconds
        epoch.log_latencies += log_latency
        epoch.squares += log_latency * log_latency
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

    def _note_first(self, now: float, sent: float, log_latency: float) -> None:
        for each in self._firsts:
            each.answered(sent, log_latency)
        if self._phase == "grow" and self._base is not None:  # the quickest came first, and made it too low
            self._base = max(self._base, self._first_base(now))
            first = self._firsts[-1]
            self._began_well = first.complete or now - first.began > SLOWEST * math.exp(self._base)

    def _first_base(self, now: float) -> float:
        """Log latency of the first requests, or of the first few where even these wait for each other."""
        few, some, most = (first.log_latency(now) for first in self._firsts)
        return few if few < most - SERIAL_LOG else some if some < most - SERIAL_LOG else most

    def _queues_early(self, now: float, epoch: Epoch, recent: float, in_flight: int) -> bool:
        """See whether the first requests wait for each other, long before all of them are back."""
        base = self._first_base(now)
        usual_s = math.exp(base)
        if recent <= base + SERIAL_LOG or now - epoch.began <= EARLY_LATENCIES * usual_s:
            return False
        self._base = base
        speed = epoch.answers / (now - epoch.began - usual_s)
        self._hold(now, EARLY_MARGIN * speed * usual_s, speed, in_flight)
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
            elif self._phase == "grow" and epoch.full < SELDOM_FULL * epoch.answers:
                self._base, self._error = sample.log_latency, sample.error
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
        self._base, self._error = sample.log_latency, sample.error
        if self._firsts[-1].count and first < sample.log_latency - SUDDEN_LOG:
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
        if more < MORE_LOG and (sample.log_latency < base + BRAKE_LOG or in_flight > GROWN_SINCE * load) and not busy:
            return ""  # what it has grown to since is yet to be seen
        if not self._began_well:
            return ""  # the base may be too low, with the slow ones among the first still out
        share = GROWING if self._limit == math.inf else GROWING_AGAIN
        sure = speed > SURE * speed_before and self._working > self._proof > 0
        helped = sure or (more >= MORE_LOG and faster >= share * more)
        if helped and busy:
            return ""  # it may be the new connections that take the CPU; nothing grows until it is free again
        if helped:
            self._limit = math.inf
            self._before = (speed, load)
            self._at_work, self._speed = load, speed
            if faster > max(BATCHING_LOG, GROWING_AGAIN * more) and sample.log_latency > base:
                self._base, self._error = sample.log_latency, sample.error
            return "grow"
        self._hold(now, min(load, self._at_work * max(1.0, speed / self._speed)), speed, in_flight)
        return self._have_fewer(in_flight, "knee")

    def _judge_probe(self, now: float, sample: Sample, base: float, in_flight: int) -> str:
        log_latency, speed, load = sample.log_latency, sample.speed, sample.load
        if speed < FALLEN * self._speed * load / self._load:
            speed = self._speed = sample.present
        fastest, held = max(speed, self._speed), math.log(speed / self._speed) > HELD_LOG
        doubt = math.hypot(sample.error, self._error)
        if held and log_latency > with_grace(base) + NOISE_LOG + STANDARD_ERRORS * doubt:
            self._hold(now, max(HALVED * load, speed * math.exp(base)), fastest, in_flight)
            return self._have_fewer(in_flight, "queue")
        news = abs(log_latency - base) > NEWS_LOG + doubt
        self._base, self._error = log_latency, sample.error
        self._probe_rarely = 1.0 if news else min(RAREST, RARER * self._probe_rarely)
        self._hold(now, min(self._load, load * fastest / speed), fastest, in_flight)
        self._doubtful = news
        if news:
            self._probe_at = now + max(DOUBTFUL_S, DOUBTFUL_WINDOWS * self.size / speed)
        if held and log_latency < base - NOISE_LOG - doubt:
            return self._have_fewer(in_flight, "queue shorter")
        return "measured"

    def _judge_hold(self, now: float, sample: Sample, base: float, in_flight: int, busy: bool) -> str:
        log_latency, usual = sample.log_latency, self._usual
        self._usual = log_latency if usual is None else usual + SMOOTHING * (log_latency - usual)
        self._speed = sample.speed if usual is None else self._speed + SMOOTHING * (sample.speed - self._speed)
        expected = self._speed * math.exp(base)
        self._proof = expected + max(PROOF_SHARE * expected, PROOF_SPREADS * sample.spread * math.sqrt(expected))
        short = base + max(ROOM_LOG, QUEUE_LEFT * (self._usual - base))
        doubt = math.hypot(sample.error, self._error)
        dropped = usual is not None and log_latency < usual - ROOM_LOG and log_latency < short
        meant = math.log(max(1.0, self.size / self._at_work))  # the queue that is meant to be there
        if (dropped or log_latency + doubt < base + QUEUE_LEFT * meant) and not busy:
            return self._look_for_room(now, in_flight, "room")
        was_slow, self._slow = self._slow, log_latency - STANDARD_ERRORS * doubt > with_grace(base) + QUEUED_LOG
        if self._slow and was_slow:  # twice, so that the speed to compare with is the present one
            self._hold(now, max(HALVED * self.size, sample.present * math.exp(base)), sample.present, in_flight)
            return self._have_fewer(in_flight, "slower")
        if now < self._probe_at or self.size < FEW_IN_FLIGHT or busy:
            return ""
        if self._doubtful:
            return self._have_fewer(in_flight, "probe")
        return self._look_for_room(now, in_flight, "probe", MORE_SHARE)

    # -- decisions

    def _grow(self, now: float, recent: float, welcome: float) -> None:
        """Let out `STEP` more for an answer while answers are no slower, or as many as the headers say are welcome."""
        if recent >= (self._first_base(now) if self._base is None else self._base) + BRAKE_LOG:
            return
        limit = self._limit
        if welcome:
            limit = self._most
        elif self._base is not None and (limit == math.inf or self._working > self._proof):
            limit = FREELY * self._working
        more = max(STEP, welcome * min(WELCOME_S, now - self._grew))
        self.size = min(self._most, max(self.size, limit), self.size + more)

    def _look_for_room(self, now: float, in_flight: int, decision: str, share: float = UNSURE) -> str:
        self._phase, self._limit = "grow", share * self.size
        self._before = (self._speed, in_flight)
        self._epoch = Epoch(now, in_flight)
        return decision

    def _have_fewer(self, in_flight: int, decision: str) -> str:
        fewer = max(1.0, min(self.size / FEWER_SHARE, UNQUEUED * self._at_work), FAST_S * self._speed)
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
