"""A simulated endpoint and a simulated client with a virtual clock: a `Pacer` driven through a run in milliseconds.

Everything follows from the seed. The client does as the engine does: requests wait in line, the first of them asks the
pacer, timers are late, answers that come together wait for each other, and each request takes of the client's one CPU.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llmframe.limits import RateHeaders
from llmframe.pacing import Caps, Pacer

TICK_S = 0.1
LATE_S = 0.004  # timers fire up to so late
NETWORK_S = 0.0005  # one way, at least; as much again by chance
GATE_S = 0.001  # the server takes so long to fail
BACKOFF_S, LONGEST_BACKOFF_S = 0.25, 30.0  # the engine's: full jitter, doubled at each attempt
TIMEOUT_S, TIMEOUT_SHARE = 5.0, 4.0  # the engine's: at least so long, and so many times the slowest answer seen
COURSE_S = 0.05  # how finely the requests in flight are recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What the endpoint does.

    Attributes
    ----------
    latency_s, sigma : float
        Median and lognormal spread of an answer's time once it is at work.
    slots : int or None
        Requests at work at one time; the others wait in order of arrival, without limit.
    crowding : float
        With so many requests at work an answer takes twice as long as alone, as where they are batched.
    rpm, burst, tpm, token_burst : float or None
        Rates, and the size of the bucket (a full minute unless given).
    limiter : {"bucket", "fixed", "sliding"}
        Refills continuously; counts by the minute of the clock; counts the last 60 s.
    headers : {None, "answer", "arrival"}
        The moment whose state the rate headers tell.
    retry_after : {None, "exact", "seconds"} or float
        What a 429 says: the time until it would pass, or that rounded up to seconds; or always so many seconds.
    most : int or None
        More at work than that are refused with 429.
    refusal_s : float
        How long a 429 takes.
    p_fault, p_hang, p_slow, slow_s : float
        Share of requests that fail at once, that never answer, and that take `slow_s`.
    down : bool
        503 to everything, also to what is at work.
    others_rps : float
        Requests a second that somebody else takes from the same bucket.
    schedule : sequence of (float, dict)
        Changes, each at its second.
    """

    latency_s: float = 0.3
    sigma: float = 0.0
    slots: int | None = None
    crowding: float = math.inf
    rpm: float | None = None
    burst: float | None = None
    tpm: float | None = None
    token_burst: float | None = None
    limiter: Literal["bucket", "fixed", "sliding"] = "bucket"
    headers: Literal["answer", "arrival"] | None = None
    retry_after: Literal["exact", "seconds"] | float | None = None
    most: int | None = None
    refusal_s: float = GATE_S
    p_fault: float = 0.0
    p_hang: float = 0.0
    p_slow: float = 0.0
    slow_s: float = 2.0
    down: bool = False
    others_rps: float = 0.0
    schedule: Sequence[tuple[float, Mapping[str, Any]]] = ()


class Limit:
    """A rate limit on the server's side."""

    def __init__(self, kind: str, per_min: float, size: float | None) -> None:
        self.kind = kind
        self.level = math.inf
        self.at = 0.0
        self.taken: deque[tuple[float, float]] = deque()
        self.resize(per_min, size)

    def resize(self, per_min: float, size: float | None) -> None:
        self.per_min = per_min
        self.size = per_min if size is None or self.kind != "bucket" else size
        self.level = min(self.level, self.size)

    def fill(self, now: float) -> None:
        if self.kind == "bucket":
            self.level = min(self.size, self.level + (now - self.at) * self.per_min / 60)
        elif self.kind == "fixed":
            if now // 60 > self.at // 60:
                self.level = self.size
        else:
            while self.taken and self.taken[0][0] <= now - 60:
                self.level += self.taken.popleft()[1]
        self.at = now

    def take(self, now: float, amount: float) -> None:
        self.level -= amount
        if self.kind == "sliding":
            self.taken.append((now, amount))

    def wait_s(self, now: float, amount: float) -> float:
        missing = amount - self.level
        if missing <= 1e-6:
            return 0.0
        if self.kind == "bucket":
            return missing * 60 / self.per_min
        if self.kind == "fixed":
            return 60 - now % 60
        for then, freed in self.taken:
            missing -= freed
            if missing <= 1e-6:
                return then + 60 - now
        return 60.0

    def full_s(self, now: float) -> float:
        return 60 - now % 60 if self.kind == "fixed" else (self.size - self.level) * 60 / self.per_min


@dataclass(slots=True, eq=False)
class Request:
    """One row's request."""

    tokens: int  # that it takes
    estimate: int  # that the client reserves
    sent_s: float = 0.0
    attempts: int = 0
    timeouts: int = 0
    flying: bool = False
    headers: RateHeaders | None = None


@dataclass(slots=True)
class Outcome:
    """What happened in a run."""

    began_s: float
    pacer: Pacer
    seconds: float = 0.0
    refused: int = 0
    failed: int = 0
    timed_out: int = 0
    outages: int = 0
    sent_s: list[float] = field(default_factory=list)
    arrived: list[tuple[float, int]] = field(default_factory=list)  # when, and with how many tokens
    answered_s: list[float] = field(default_factory=list)
    course: list[tuple[float, int]] = field(default_factory=list)  # in flight, the most of every 50 ms

    @property
    def share_refused(self) -> float:
        return self.refused / len(self.sent_s)

    def most_in_flight(self, since_s: float = 0.0, until_s: float = math.inf) -> int:
        return max((most for then, most in self.course if since_s <= then - self.began_s < until_s), default=0)

    def sent_between(self, since_s: float, until_s: float) -> int:
        return sum(since_s <= then - self.began_s < until_s for then in self.sent_s)

    def rate_between(self, since_s: float, until_s: float) -> float:
        return sum(since_s <= then - self.began_s < until_s for then in self.answered_s) / (until_s - since_s)


class Simulation:
    """One endpoint, one client, one virtual clock."""

    def __init__(
        self,
        server: Server,
        *,
        seed: int = 0,
        pacer: Pacer | None = None,
        caps: Caps | None = None,
        client_s: float = 0.0003,
        connect_s: float = 0.0,
        stop_s: float = 5000.0,
    ) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.now = 0.0
        self.pacer = Pacer(caps or Caps(), 0.0) if pacer is None else pacer
        self.client_s = client_s  # of CPU for one request
        self.connect_s = connect_s  # of CPU for one connection
        self._connections = 0
        self.stop_s = stop_s
        self.out = Outcome(0.0, self.pacer)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = 0
        self._client_free_s = 0.0
        self._rows: deque[Request] = deque()
        self._left = 0
        self._line: deque[Request] = deque()
        self._flying: dict[Request, None] = {}
        self._timer = 0
        self._slowest_s = 0.0
        self._limits: dict[str, Limit] = {}
        self._queue: deque[Request] = deque()
        self._at_work = 0
        self._change({})
        for at_s, changes in server.schedule:
            self._at(at_s, self._change, changes)
        self._at(TICK_S, self._tick, TICK_S)

    def run(self, rows: Sequence[tuple[int, int]], after_s: float = 0.0) -> Outcome:
        """Run rows of (tokens taken, tokens estimated) to the end, `after_s` seconds from now."""
        self._rows.extend(Request(taken, estimate) for taken, estimate in rows)
        self._left = len(rows)
        began_s = self.now + after_s
        self.out = Outcome(began_s, self.pacer)
        self._at(began_s, self._hire)
        while self._left:
            self.now, _, what, arguments = heapq.heappop(self._events)
            assert self.now < began_s + self.stop_s, f"{self._left} rows are left: {self.pacer.limited_by}"
            what(*arguments)
        self.out.seconds = self.now - began_s
        return self.out

    def _at(self, time_s: float, what: Callable[..., None], *arguments: Any) -> None:
        self._serial += 1
        heapq.heappush(self._events, (time_s, self._serial, what, arguments))

    def _network_s(self) -> float:
        return NETWORK_S * (1 + self.random.random())

    # -- the client

    def _take_cpu(self, seconds: float) -> float:
        begin = max(self.now, self._client_free_s)
        self._client_free_s = begin + seconds
        return begin

    def _hire(self) -> None:
        """Keep a few more requests in line than the window takes; one that waits for its retry holds no place."""
        while self._rows and len(self._line) + len(self._flying) < self.pacer.window + 2:
            self._line.append(self._rows.popleft())
        self._admit()

    def _admit(self) -> None:
        self._timer += 1
        while self._line:
            now = max(self.now, self._client_free_s)
            wait_s = self.pacer.wait_s(now, self._line[0].estimate)
            if wait_s > 0:
                if wait_s < math.inf:
                    self._at(now + wait_s + LATE_S * self.random.random(), self._timer_fires, self._timer)
                return
            self._send(self._line.popleft(), now)

    def _send(self, request: Request, now: float) -> None:
        out, pacer = self.out, self.pacer
        pacer.sent(now, request.estimate)
        self._take_cpu(self.client_s / 2)
        request.sent_s, request.flying, request.headers = now, True, None
        request.attempts += 1
        self._flying[request] = None
        if len(self._flying) > self._connections:
            self._connections += 1
            self._take_cpu(self.connect_s)
        out.sent_s.append(now)
        if not out.course or now - out.course[-1][0] >= COURSE_S:
            out.course.append((now, pacer.in_flight))
        elif pacer.in_flight > out.course[-1][1]:
            out.course[-1] = (out.course[-1][0], pacer.in_flight)
        self._at(now + self._network_s(), self._arrive, request, request.attempts)

    def _timer_fires(self, timer: int) -> None:
        if timer == self._timer:
            self._admit()

    def _tick(self, due_s: float) -> None:
        now = self._take_cpu(0.0001)
        self.pacer.tick(now, lag_s=now - due_s)
        if self.server.p_hang and self._slowest_s:
            patience_s = max(TIMEOUT_S, TIMEOUT_SHARE * self._slowest_s)
            for request in [each for each in self._flying if now - each.sent_s > patience_s * 2**each.timeouts]:
                self.out.timed_out += 1
                request.timeouts += 1
                self._come_back(request, request.attempts, "timeout", None)
        self._hire()
        self._at(now + TICK_S, self._tick, now + TICK_S)

    def _come_back(self, request: Request, attempt: int, kind: str, retry_after_s: float | None) -> None:
        if request.attempts != attempt or not request.flying:
            return  # it had timed out
        now, out, pacer = self._take_cpu(self.client_s / 2), self.out, self.pacer
        latency_s, reserved, headers = now - request.sent_s, request.estimate, request.headers
        request.flying = False
        del self._flying[request]
        if kind == "answer":
            pacer.answered(now, latency_s=latency_s, reserved=reserved, used=request.tokens, headers=headers)
            self._slowest_s = max(self._slowest_s, latency_s)
            out.answered_s.append(now)
            self._left -= 1
            self._hire()
            return
        backoff_s = self.random.random() * min(LONGEST_BACKOFF_S, BACKOFF_S * 2 ** (request.attempts - 1))
        if kind == "refused":
            out.refused += 1
            backoff_s += retry_after_s or 0.0
            pacer.refused(now, latency_s=latency_s, reserved=reserved, retry_after_s=retry_after_s, headers=headers)
        else:
            out.failed += 1
            was_up = pacer.down_since is None
            pacer.failed(now, latency_s=latency_s, kind=kind)
            out.outages += was_up and pacer.down_since is not None
        self._at(now + backoff_s, self._again, request)
        self._hire()

    def _again(self, request: Request) -> None:
        self._line.appendleft(request)
        self._admit()

    # -- the server

    def _change(self, changes: Mapping[str, Any]) -> None:
        self.server = server = replace(self.server, **changes)
        for name, per_min, size in (
            ("requests", server.rpm, server.burst),
            ("tokens", server.tpm, server.token_burst),
        ):
            if per_min is None:
                self._limits.pop(name, None)
            elif name in self._limits:
                self._limits[name].fill(self.now)
                self._limits[name].resize(per_min, size)
            else:
                self._limits[name] = Limit(server.limiter, per_min, size)
        if server.others_rps:
            self._at(self.now + 1 / server.others_rps, self._somebody_else)
        self._work()

    def _somebody_else(self) -> None:
        limit = self._limits["requests"]
        limit.fill(self.now)
        if limit.level >= 1:
            limit.take(self.now, 1)
        self._at(self.now + self.random.expovariate(self.server.others_rps), self._somebody_else)

    def _arrive(self, request: Request, attempt: int) -> None:
        server, now = self.server, self.now
        self.out.arrived.append((now, request.tokens))
        if server.down:
            self._reply(request, attempt, "server error", None, GATE_S)
            return
        amounts = {"requests": 1.0, "tokens": float(request.tokens)}
        wait_s = 0.0
        for name, limit in self._limits.items():
            limit.fill(now)
            wait_s = max(wait_s, limit.wait_s(now, amounts[name]))
        if wait_s > 0 or (server.most is not None and self._at_work >= server.most):
            request.headers = self._headers()
            said = server.retry_after
            said_s = wait_s if said == "exact" else float(math.ceil(wait_s)) if said == "seconds" else said
            self._reply(request, attempt, "refused", said_s, server.refusal_s)
            return
        for name, limit in self._limits.items():
            limit.take(now, amounts[name])
        if server.headers == "arrival":
            request.headers = self._headers()
        chance = self.random.random()
        if chance < server.p_fault:
            self._reply(request, attempt, "server error", None, GATE_S)
        elif chance >= server.p_fault + server.p_hang:
            self._queue.append(request)
            self._work()

    def _work(self) -> None:
        server = self.server
        while self._queue and self._at_work < (server.slots or math.inf):
            request = self._queue.popleft()
            self._at_work += 1
            took_s = server.latency_s * (1 + self._at_work / server.crowding)
            if server.sigma:
                took_s *= math.exp(server.sigma * self.random.gauss(0.0, 1.0))
            if server.p_slow and self.random.random() < server.p_slow:
                took_s = server.slow_s
            self._at(self.now + took_s, self._finish, request, request.attempts)

    def _finish(self, request: Request, attempt: int) -> None:
        self._at_work -= 1
        if self.server.headers == "answer":
            request.headers = self._headers()
        self._reply(request, attempt, "server error" if self.server.down else "answer", None, 0.0)
        self._work()

    def _headers(self) -> RateHeaders | None:
        if self.server.headers is None:
            return None
        told: list[float | None] = []
        for name in ("requests", "tokens"):
            limit = self._limits.get(name)
            if limit is None:
                told += [None, None, None]
            else:
                limit.fill(self.now)
                told += [limit.per_min, float(int(max(0.0, limit.level))), limit.full_s(self.now)]
        return RateHeaders(*told)

    def _reply(self, request: Request, attempt: int, kind: str, retry_after_s: float | None, after_s: float) -> None:
        self._at(self.now + after_s + self._network_s(), self._come_back, request, attempt, kind, retry_after_s)


def simulate(server: Server, rows: int | Sequence[tuple[int, int]], **options: Any) -> Outcome:
    """Run so many rows (of 100 tokens, or of the tokens given) through a new simulation."""
    return Simulation(server, **options).run([(100, 100)] * rows if isinstance(rows, int) else rows)
