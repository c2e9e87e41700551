"""A simulated endpoint and a simulated client with a virtual clock: a `Pacer` driven through a run in milliseconds.

Everything follows from the seed. The client sends as the engine does: requests wait in line, the first of them asks
the pacer, timers are late, and each request takes the client's one CPU for a while.
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
GATE_S = 0.001  # the server takes so long to refuse or to fail
BACKOFF_S = 0.25  # of the engine's full jitter


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
        At so many requests at work, an answer takes twice as long as alone (batching engines); infinite is never.
    rpm, burst, tpm, token_burst : float or None
        Rates, and the size of the bucket (a full minute unless given).
    limiter : {"bucket", "fixed", "sliding"}
        Refills continuously; counts by the minute of the clock; counts the last 60 s.
    headers : {None, "answer", "arrival"}
        The moment whose state the rate headers tell.
    retry_after : {None, "exact", "seconds"}
        What a 429 says: the time until it would pass, or that rounded up to seconds.
    concurrent : int or None
        More in flight than that are refused with 429.
    refusal_s : float
        How long a 429 takes.
    p_fault, p_hang, p_slow, slow_s : float
        Share of requests that fail at once, that never answer, and that take `slow_s`.
    down : bool
        503 to everything, also to what is at work.
    shared_rps : float
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
    retry_after: Literal["exact", "seconds"] | None = None
    concurrent: int | None = None
    refusal_s: float = GATE_S
    p_fault: float = 0.0
    p_hang: float = 0.0
    p_slow: float = 0.0
    slow_s: float = 2.0
    down: bool = False
    shared_rps: float = 0.0
    schedule: Sequence[tuple[float, Mapping[str, Any]]] = ()


class Limit:
    """A rate limit on the server's side."""

    def __init__(self, kind: str, per_min: float, size: float | None) -> None:
        self.kind = kind
        self.level = math.inf
        self.at = 0.0
        self.history: deque[tuple[float, float]] = deque()
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
            while self.history and self.history[0][0] <= now - 60:
                self.level += self.history.popleft()[1]
        self.at = now

    def take(self, now: float, amount: float) -> None:
        self.level -= amount
        if self.kind == "sliding":
            self.history.append((now, amount))

    def wait_s(self, now: float, amount: float) -> float:
        if amount <= self.level + 1e-6:
            return 0.0
        if self.kind == "bucket":
            return (amount - self.level) * 60 / self.per_min
        if self.kind == "fixed":
            return 60 - now % 60
        missing = amount - self.level
        for then, freed in self.history:
            missing -= freed
            if missing <= 1e-6:
                return then + 60 - now
        return 60.0

    def full_s(self, now: float) -> float:
        if self.kind == "fixed":
            return 60 - now % 60
        return (self.size - self.level) * 60 / self.per_min


@dataclass(slots=True, eq=False)
class Request:
    tokens: int  # that it takes
    estimate: int  # that the client reserves
    row: int = 0
    sent_s: float = 0.0
    attempts: int = 0
    timeouts: int = 0
    state: str = "waiting"
    headers: RateHeaders | None = None


@dataclass(slots=True)
class Outcome:
    """What happened in a run."""

    seconds: float = 0.0
    sent: int = 0
    answered: int = 0
    refused: int = 0
    failed: int = 0
    timed_out: int = 0
    twice: int = 0  # rows that a timeout cut off and that were asked again though the answer was coming
    sent_times: list[float] = field(default_factory=list)
    answer_times: list[float] = field(default_factory=list)
    flight: list[tuple[float, int]] = field(default_factory=list)  # the highest of each 50 ms
    went_down: int = 0
    pacer: Pacer | None = None

    def most_in_flight(self, since_s: float, until_s: float = math.inf) -> int:
        return max((count for time_s, count in self.flight if since_s <= time_s < until_s), default=0)

    def sent_between(self, since_s: float, until_s: float) -> int:
        return sum(since_s <= time_s < until_s for time_s in self.sent_times)

    def rate(self, since_s: float, until_s: float) -> float:
        return sum(since_s <= time_s < until_s for time_s in self.answer_times) / (until_s - since_s)


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
        workers: int = 10_000,
        stop_s: float = 20_000.0,
    ) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.serial = 0
        self.pacer = pacer if pacer is not None else Pacer(caps or Caps(), 0.0)
        self.client_s = client_s
        self.client_free = 0.0
        self.stop_s = stop_s
        self.workers = workers
        self.limits: dict[str, Limit] = {}
        self.queue: deque[Request] = deque()
        self.busy = 0
        self.arrived = 0  # in the server
        self.line: deque[Request] = deque()
        self.ready: deque[Request] = deque()
        self.timer = 0
        self.open = 0
        self.todo = 0
        self.slowest = 0.0
        self.out = Outcome(pacer=self.pacer)
        self.change({})
        for at_s, changes in server.schedule:
            self.at(at_s, self.change, changes)

    # -- the clock

    def at(self, time_s: float, what: Callable[..., None], *args: Any) -> None:
        self.serial += 1
        heapq.heappush(self.events, (time_s, self.serial, what, args))

    def run(self, rows: Sequence[tuple[int, int]]) -> Outcome:
        """Run rows of (tokens taken, tokens estimated) to the end."""
        self.rows = iter([Request(taken, estimate, row) for row, (taken, estimate) in enumerate(rows)])
        self.todo = len(rows)
        start = self.now
        self.out = Outcome(pacer=self.pacer)
        self.at(self.now, self.hire)
        self.at(self.now + TICK_S, self.tick, self.now + TICK_S)
        events = self.events
        while self.todo and events:
            self.now, _, what, args = heapq.heappop(events)
            if self.now > start + self.stop_s:
                raise AssertionError(f"{self.todo} rows are left after {self.stop_s} s: {self.pacer.limited_by!r}")
            what(*args)
        self.out.seconds = self.now - start
        return self.out

    # -- the client

    def busy_client(self, cost_s: float) -> float:
        """Take the client's CPU; the time at which it begins."""
        begin = max(self.now, self.client_free)
        self.client_free = begin + cost_s
        return begin

    def hire(self) -> None:
        """Keep more requests in line than the window takes."""
        while self.open < min(self.workers, self.pacer.window + 2):
            request = next(self.rows, None)
            if request is None:
                break
            self.open += 1
            self.line.append(request)
        self.admit()

    def admit(self) -> None:
        self.timer += 1
        line = self.line
        while line:
            now = max(self.now, self.client_free)
            wait_s = self.pacer.wait_s(now, line[0].estimate)
            if wait_s > 0:
                if wait_s < math.inf:
                    late = self.random.random() * LATE_S
                    self.at(now + wait_s + late, self.timed, self.timer)
                return
            request = line.popleft()
            self.pacer.sent(now, request.estimate)
            self.busy_client(self.client_s / 2)
            request.sent_s = now
            request.attempts += 1
            request.state = "flying"
            self.out.sent += 1
            self.out.sent_times.append(now)
            if not self.out.flight or now - self.out.flight[-1][0] >= 0.05:
                self.out.flight.append((now, self.pacer.in_flight))
            elif self.pacer.in_flight > self.out.flight[-1][1]:
                self.out.flight[-1] = (self.out.flight[-1][0], self.pacer.in_flight)
            timeout_s = 600.0 if not self.slowest else max(5.0, 4 * self.slowest) * 2**request.timeouts
            if self.server.p_hang or timeout_s < 600:
                self.at(now + timeout_s, self.time_out, request, request.attempts)
            self.at(now + self.network(), self.arrive, request, request.attempts)

    def timed(self, timer: int) -> None:
        if timer == self.timer:
            self.admit()

    def tick(self, due: float) -> None:
        begin = self.busy_client(0.0001)
        self.pacer.tick(begin, lag_s=begin - due)
        self.hire()
        self.at(begin + TICK_S, self.tick, begin + TICK_S)

    def network(self) -> float:
        return NETWORK_S * (1 + self.random.random())

    def come_back(self, request: Request, attempt: int, kind: str, retry_after_s: float | None) -> None:
        if request.attempts != attempt or request.state != "flying":
            return  # timed out meanwhile
        now = self.busy_client(self.client_s / 2)
        latency_s = now - request.sent_s
        request.state = "waiting"
        self.open -= 1
        pacer, out = self.pacer, self.out
        if kind == "answer":
            pacer.answered(
                now, latency_s=latency_s, reserved=request.estimate, used=request.tokens, headers=request.headers
            )
            request.state = "done"
            self.slowest = max(self.slowest, latency_s)
            out.answered += 1
            out.answer_times.append(now)
            self.todo -= 1
            self.hire()
            return
        if kind == "refused":
            out.refused += 1
            pacer.refused(
                now,
                latency_s=latency_s,
                reserved=request.estimate,
                retry_after_s=retry_after_s,
                headers=request.headers,
            )
        else:
            out.failed += 1
            down = pacer.down_since
            pacer.failed(now, latency_s=latency_s, reserved=request.estimate, kind=kind)
            out.went_down += down is None and pacer.down_since is not None
        backoff_s = self.random.random() * min(30.0, BACKOFF_S * 2 ** min(request.attempts, 7))
        if retry_after_s is not None:
            backoff_s = retry_after_s + 0.1 * backoff_s
        self.at(now + backoff_s, self.again, request)
        self.hire()

    def again(self, request: Request) -> None:
        self.open += 1
        self.line.appendleft(request)
        self.admit()

    def time_out(self, request: Request, attempt: int) -> None:
        if request.attempts == attempt and request.state == "flying":
            self.out.timed_out += 1
            request.timeouts += 1
            self.come_back(request, attempt, "timeout", None)

    # -- the server

    def change(self, changes: Mapping[str, Any]) -> None:
        self.server = server = replace(self.server, **changes)
        for name, per_min, size in (
            ("requests", server.rpm, server.burst),
            ("tokens", server.tpm, server.token_burst),
        ):
            if per_min is None:
                self.limits.pop(name, None)
            elif name in self.limits:
                self.limits[name].fill(self.now)
                self.limits[name].resize(per_min, size)
            else:
                self.limits[name] = Limit(server.limiter, per_min, size)
        if server.shared_rps and "requests" in self.limits:
            self.at(self.now + 1 / server.shared_rps, self.somebody)
        self.work()

    def somebody(self) -> None:
        limit = self.limits["requests"]
        limit.fill(self.now)
        if limit.level >= 1:
            limit.take(self.now, 1)
        self.at(self.now + self.random.expovariate(self.server.shared_rps), self.somebody)

    def arrive(self, request: Request, attempt: int) -> None:
        server, now = self.server, self.now
        if server.down:
            self.reply(request, attempt, "server error", None, GATE_S)
            return
        if server.concurrent is not None and self.arrived >= server.concurrent:
            self.reply(request, attempt, "refused", None, server.refusal_s)
            return
        amounts = {"requests": 1.0, "tokens": float(request.tokens)}
        wait_s = 0.0
        for name, limit in self.limits.items():
            limit.fill(now)
            wait_s = max(wait_s, limit.wait_s(now, amounts[name]))
        if wait_s > 0:
            said = None
            if server.retry_after is not None:
                said = float(math.ceil(wait_s)) if server.retry_after == "seconds" else wait_s
            request.headers = self.headers()
            self.reply(request, attempt, "refused", said, server.refusal_s)
            return
        for name, limit in self.limits.items():
            limit.take(now, amounts[name])
        if server.headers == "arrival":
            request.headers = self.headers()
        chance = self.random.random()
        if chance < server.p_fault:
            self.reply(request, attempt, "server error", None, GATE_S)
        elif chance < server.p_fault + server.p_hang:
            pass
        else:
            self.arrived += 1
            self.queue.append(request)
            self.work()

    def work(self) -> None:
        server = self.server
        slots = math.inf if server.slots is None else server.slots
        while self.queue and self.busy < slots:
            request = self.queue.popleft()
            self.busy += 1
            took_s = server.latency_s * (1 + self.busy / server.crowding)
            if server.sigma:
                took_s *= math.exp(server.sigma * self.random.gauss(0.0, 1.0))
            if server.p_slow and self.random.random() < server.p_slow:
                took_s = server.slow_s
            self.at(self.now + took_s, self.finish, request, request.attempts)

    def finish(self, request: Request, attempt: int) -> None:
        self.busy -= 1
        self.arrived -= 1
        if self.server.down:
            self.reply(request, attempt, "server error", None, 0.0)
        else:
            if self.server.headers == "answer":
                request.headers = self.headers()
            self.reply(request, attempt, "answer", None, 0.0)
        self.work()

    def headers(self) -> RateHeaders | None:
        if self.server.headers is None:
            return None
        found: list[float | None] = []
        for name in ("requests", "tokens"):
            limit = self.limits.get(name)
            if limit is None:
                found += [None, None, None]
            else:
                limit.fill(self.now)
                found += [limit.per_min, float(int(max(0.0, limit.level))), limit.full_s(self.now)]
        return RateHeaders(*found)

    def reply(self, request: Request, attempt: int, kind: str, retry_after_s: float | None, after_s: float) -> None:
        self.at(self.now + after_s + self.network(), self.come_back, request, attempt, kind, retry_after_s)


def simulate(server: Server, rows: int | Sequence[tuple[int, int]], **options: Any) -> Outcome:
    """Run so many rows (of 100 tokens, or of the tokens given) through a new simulation."""
    if isinstance(rows, int):
        rows = [(100, 100)] * rows
    return Simulation(server, **options).run(rows)
