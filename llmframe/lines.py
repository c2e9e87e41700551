"""Lines: one endpoint on one event loop, its connections and its pacer, shared by the runs that use it.

Whoever waits here is let in by order of arrival, as soon as the pacer allows and never before.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import Callable

from llmframe.collecting import collect_young
from llmframe.endpoint import Endpoint
from llmframe.pacing import Caps, Pacer
from llmframe.replicas import ReplicaTransport
from llmframe.transports import Transport

TICK_S = 0.1  # how often the pacer looks at the whole, and timeouts and patience are checked
KEPT = 8  # idle lines kept open a loop, so that the next cell finds its connections and learned limits


class Line:
    """One endpoint on one event loop.

    Parameters
    ----------
    endpoint : Endpoint
        Where to send.
    caps : Caps
        Hard caps, held across the runs that share the line.

    Attributes
    ----------
    transport : Transport
        How to send.
    pacer : Pacer
        When to send.
    answered : bool
        Whether the endpoint has answered any run.
    users : int
        Those who were given it and have not given it back.
    """

    def __init__(self, endpoint: Endpoint, caps: Caps) -> None:
        self._loop = asyncio.get_running_loop()
        self.transport: Transport = endpoint.open()
        self.pacer = Pacer(caps, self._loop.time(), connections=self.transport.most)
        if isinstance(self.transport, ReplicaTransport):
            self.transport.note = lambda words: self.pacer.note(self._loop.time(), words)
        self.answered = False
        self.users = 0
        self._waiting: deque[tuple[asyncio.Future[float], int]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._on_tick: set[Callable[[float], None]] = set()

    @property
    def idle(self) -> bool:
        """Whether no run is under way on it."""
        return not self._on_tick

    @property
    def waiting(self) -> list[int]:
        """The tokens of each request that waits here, in order."""
        return [tokens for ticket, tokens in self._waiting if not ticket.done()]

    def join(self, on_tick: Callable[[float], None]) -> None:
        """Begin a run: `on_tick` is called with the time, every `TICK_S`, until `leave`."""
        if self.idle:
            self.pacer.woke(self._loop.time())
        self._on_tick.add(on_tick)
        if self._ticker is None:
            self._ticker = self._loop.create_task(self._tick())

    def leave(self, on_tick: Callable[[float], None]) -> None:
        """End a run."""
        self.pacer.note(self._loop.time(), "")  # so that the shortest run has a course
        self._on_tick.discard(on_tick)
        if self.idle:
            if self._ticker is not None:
                self._ticker.cancel()
                self._ticker = None
            self.admit()  # nobody waits any more: no timer is left behind

    async def enter(self, tokens: int) -> float:
        """Wait until a request may be sent; from then on, which is what it gives, it counts as in flight."""
        now = self._loop.time()
        if not self._waiting and self.pacer.wait_s(now, tokens) <= 0.0:
            self.pacer.sent(now, tokens, written=not self.pacer.capped)
            return now
        ticket: asyncio.Future[float] = self._loop.create_future()
        self._waiting.append((ticket, tokens))
        self.admit()
        try:
            return await ticket
        except asyncio.CancelledError:
            if ticket.done() and not ticket.cancelled():  # let in and cancelled in the same turn of the loop
                self.wrote()
                self.release()
            raise

    def admit(self) -> None:
        """Let in whoever may send now, and come back when the next one may."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            ticket, tokens = self._waiting[0]
            if not ticket.done():
                now = self._loop.time()
                wait_s = self.pacer.wait_s(now, tokens)
                if wait_s > 0.0:
                    if wait_s < math.inf:
                        self._timer = self._loop.call_later(wait_s, self.admit)
                    return
                self.pacer.sent(now, tokens, written=not self.pacer.capped)
                ticket.set_result(now)
            self._waiting.popleft()

    def wrote(self) -> None:
        """Note that a request that was let in is on the wire, or will never be; to be called once for each."""
        if self.pacer.capped:
            self.pacer.wrote(self._loop.time())
            self.admit()

    def release(self) -> None:
        """Count back a request that was let in and of which nothing was learned."""
        self.pacer.released(self._loop.time())
        self.admit()

    async def close(self) -> None:
        """Let go of the connections."""
        if self._timer is not None:
            self._timer.cancel()
        await self.transport.close()

    async def _tick(self) -> None:
        while True:
            due = self._loop.time() + TICK_S
            await asyncio.sleep(TICK_S)
            now = self._loop.time()
            self.pacer.tick(now, lag_s=max(0.0, now - due))
            for on_tick in tuple(self._on_tick):
                on_tick(now)
            self.admit()
            collect_young()


_lines: dict[asyncio.AbstractEventLoop, OrderedDict[object, Line]] = {}


def line_to(endpoint: Endpoint, caps: Caps) -> Line:
    """Give the running loop's line to an endpoint: the one that is there, or a new one. `give_back` it when done."""
    for loop in [loop for loop in _lines if loop.is_closed()]:
        del _lines[loop]
    lines = _lines.setdefault(asyncio.get_running_loop(), OrderedDict())
    key = (endpoint.key, caps)
    if key not in lines:
        lines[key] = Line(endpoint, caps)
    lines.move_to_end(key)
    lines[key].users += 1
    return lines[key]


async def give_back(line: Line) -> None:
    """Note that somebody needs a line no more; of those that nobody needs, the longest unused are closed."""
    line.users -= 1
    lines = _lines.get(asyncio.get_running_loop(), OrderedDict())
    unused = [key for key, line in lines.items() if not line.users]
    # All are taken out at once, before anybody can be given one that is being closed.
    if old := [lines.pop(key) for key in unused[:-KEPT]]:
        await asyncio.shield(asyncio.gather(*[each.close() for each in old]))


async def close_lines() -> None:
    """Close every line of the running loop."""
    lines = _lines.pop(asyncio.get_running_loop(), OrderedDict[object, Line]())
    for line in lines.values():
        await line.close()
