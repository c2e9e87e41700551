"""Replicas: which of several servers with the same model gets the next request.

The emptiest of those that are up, so that all are kept equally full. One that fails is taken out, probed with a single
request now and then, and put back when it answers; what was in flight there is asked of another at once. One that
refuses for its limit rests, and the others are asked meanwhile: the pacer is told only where all refuse.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llmframe import endpoint
from llmframe.endpoint import Endpoint
from llmframe.errors import ConfigurationError
from llmframe.failures import EVENTS, Failure, Unreachable, of_reply
from llmframe.limits import retry_after_s
from llmframe.outages import LATER_S, PROBE_LATER_S, PROBE_S, SUSPECT
from llmframe.replies import read_json
from llmframe.requests import identity
from llmframe.timeouts import FLOOR_S
from llmframe.transports import Lost, ReplicaDown, Reply, Transport, Wrote

Sign = Literal["alive", "sick", "away", ""]
"""What became of a request: an answer; a fault that chance may make; nobody there; nothing learned."""

NO_POST = 405  # whoever says so is no such server; one of another key, account or model says what would end a run
REST_S, REST_MOST_S = 0.1, 5.0  # of one that refuses and does not say for how long; twice as long where it goes on
CALM = 10.0  # times its last rest without a refusal, and the next rest is a short one again
TRY_S = 0.5  # after a rest a single request tells whether it refuses still, or so much time without a word


@dataclass(slots=True)
class Replica:
    """One of them.

    Attributes
    ----------
    in_flight : int
        Requests there.
    failures : int
        In a row.
    out_since : float or None
        When it was taken out; None while it is up.
    probe_at : float
        When it may be tried again.
    probing : bool
        It is being tried.
    rests_until, rest_s : float
        Until when it is left alone for having refused, and the last rest that it did not ask for.
    tired : bool
        It has refused, and nothing shows yet that it does so no more.
    tried_at : float or None
        When it was asked again after its rest.
    """

    in_flight: int = 0
    failures: int = 0
    out_since: float | None = None
    probe_at: float = 0.0
    probing: bool = False
    rests_until: float = -math.inf
    rest_s: float = 0.0
    tired: bool = False
    tried_at: float | None = None

    def is_free(self, now: float) -> bool:
        """Whether it is up, and does not rest."""
        if self.out_since is not None or now < self.rests_until:
            return False
        return not self.tired or self.tried_at is None or now - self.tried_at >= TRY_S


class Rota:
    """Whose turn it is: pure, by what became of the requests before.

    Parameters
    ----------
    count : int
        How many replicas there are.
    """

    def __init__(self, count: int) -> None:
        self.replicas = [Replica() for _ in range(count)]
        self._turn = 0

    def take(self, now: float) -> int:
        """Choose the replica of the next request, and count it there."""
        places = [(self._turn + step) % len(self.replicas) for step in range(len(self.replicas))]
        up = [place for place in places if self.replicas[place].out_since is None]
        out = [place for place in places if self.replicas[place].out_since is not None]
        due = [place for place in out if now >= self.replicas[place].probe_at and not self.replicas[place].probing]
        if due:
            place = due[0]
        elif free := [place for place in up if self.replicas[place].is_free(now)]:
            place = min(free, key=lambda place: self.replicas[place].in_flight)
        elif up:
            place = min(up, key=lambda place: self.replicas[place].rests_until)
        else:  # all are out: the engine probes, one at a time, and each has its turn
            place = min(out, key=lambda place: self.replicas[place].probe_at)
        self._turn = (place + 1) % len(self.replicas)
        chosen = self.replicas[place]
        chosen.in_flight += 1
        chosen.probing = chosen.out_since is not None
        if chosen.tired and now >= chosen.rests_until:
            chosen.tired, chosen.tried_at = chosen.tried_at is None, chosen.tried_at or now
        return place

    def rest(self, place: int, sent: float, now: float, asked_s: float | None) -> None:
        """Leave one alone that refused what was sent then: for as long as it asks, or for a growing moment."""
        replica = self.replicas[place]
        if sent >= replica.rests_until:
            calm = now - replica.rests_until > CALM * replica.rest_s
            replica.rest_s = REST_S if calm else min(2 * replica.rest_s, REST_MOST_S)
            replica.tired, replica.tried_at = True, None
            replica.rests_until = now + replica.rest_s
        replica.rests_until = max(replica.rests_until, now + (asked_s or 0.0))

    def give_back(self, place: int, sent: float, now: float, sign: Sign) -> str:
        """Count back a request by what became of it; ``out`` or ``back`` where that changes who is up."""
        replica = self.replicas[place]
        replica.in_flight -= 1
        out_since = replica.out_since
        probed = out_since is not None and sent >= out_since
        replica.probing &= not probed
        if sign == "alive":
            if out_since is not None and not probed:
                return ""  # it was answered before the trouble, and came late
            replica.failures, replica.out_since = 0, None
            replica.tired &= sent < replica.rests_until
            return "back" if probed else ""
        if not sign:
            return ""
        replica.failures += 1
        if out_since is not None:
            if probed:  # one that takes long to fail holds up a row each time
                pause_s = PROBE_S if now - out_since < LATER_S else PROBE_LATER_S
                replica.probe_at = now + max(pause_s, now - sent)
            return ""
        if sign == "sick" and replica.failures < SUSPECT:
            return ""
        replica.out_since, replica.probe_at = now, now + PROBE_S
        return "out"

    def others_up(self, place: int) -> bool:
        """Whether any but this one is up."""
        return any(other.out_since is None for other in self.replicas if other is not self.replicas[place])

    def is_any_free(self, now: float) -> bool:
        """Whether any is up and does not rest."""
        return any(replica.is_free(now) for replica in self.replicas)

    def free_s(self, now: float) -> float:
        """Give the seconds until the first of them has rested."""
        up = [replica for replica in self.replicas if replica.out_since is None] or self.replicas
        return max(0.0, min(replica.rests_until for replica in up) - now)


class ReplicaTransport:
    """Sends each request to one of several endpoints.

    Parameters
    ----------
    endpoints : sequence of Endpoint
        Two or more.

    Attributes
    ----------
    note : callable or None
        Takes the words where a replica is taken out or put back.
    """

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.note: Callable[[str], None] | None = None
        self._urls = [each.url for each in endpoints]
        self._transports: list[Transport] = [each.open() for each in endpoints]
        self._rota = Rota(len(endpoints))
        self.most = max(transport.most for transport in self._transports)  # all share the files of one process

    async def send(self, body: bytes, wrote: Wrote | None = None) -> Reply:
        """Send one request; see `Transport`.

        Raises
        ------
        ReplicaDown
            This replica gave no reply, or one that no healthy replica would, and another is up; or it refused for its
            limit, and another rests not.
        """
        loop = asyncio.get_running_loop()
        sent = loop.time()
        place = self._rota.take(sent)
        try:
            reply = await self._transports[place].send(body, wrote)
        except Unreachable as error:
            taken = isinstance(error, Lost)
            fault: Sign = "sick" if taken or error.kind == "timeout" else "away" if error.kind == "connection" else ""
            self._end(place, sent, loop.time(), fault)
            if error.kind == "connection" and self._rota.others_up(place):
                raise ReplicaDown(f"no reply from {self._urls[place]}: {error.message}", taken=taken) from error
            raise
        except BaseException:  # cancelled: given up after so long, or sooner, where it was the run that ended
            now = loop.time()
            self._end(place, sent, now, "sick" if now - sent >= FLOOR_S else "")
            raise
        now, url, headers = loop.time(), self._urls[place], reply.headers
        failure: Failure | None = None
        if not reply.is_success:
            failure = of_reply(reply.status, headers, reply.body, read_json(reply.body), reply.redact)
        strange = reply.status == NO_POST or (reply.is_success and not _may_be_json(reply.body))
        strange |= failure is not None and failure.verdict == "run"
        self._end(place, sent, now, "sick" if strange or reply.status >= 500 else "alive")
        if strange and self._rota.others_up(place):
            status = None if reply.is_success else reply.status
            raise ReplicaDown(f"HTTP {reply.status} and no answer from {url}", taken=reply.is_success, status=status)
        if failure is not None and failure.verdict == "retry":
            asked_s = retry_after_s(headers, time.time(), failure.wait)
            if failure.kind == "rate limit" or (asked_s and failure.kind == "server error"):
                self._rota.rest(place, sent, now, asked_s)
                if self._rota.is_any_free(now):
                    raise ReplicaDown(failure.message, taken=False)
                if asked_s:  # it is waited for the first of all that refuse
                    lower = {name.lower(): value for name, value in headers.items()}
                    headers = {**lower, "retry-after-ms": f"{1000 * self._rota.free_s(now):.0f}"}
        return Reply(reply.status, headers, reply.body, reply.redact, url)

    def _end(self, place: int, sent: float, now: float, sign: Sign) -> None:
        change = self._rota.give_back(place, sent, now, sign)
        if change and self.note is not None:
            self.note(f"replica {change}: {self._urls[place]}")

    def make_room(self, more: int, *, at_most: int) -> None:
        """Close connections, at each of them: which of them keeps a request waiting is not known; see `Transport`."""
        for transport in self._transports:
            transport.make_room(more, at_most=at_most)

    async def close(self) -> None:
        """Let go of the connections to all of them."""
        for transport in self._transports:
            await transport.close()


def _may_be_json(body: bytes) -> bool:
    # A stream is none, and is every replica's: they are set up alike, and each is paid for.
    return body.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", *EVENTS))


def resolve(*, base_url: str | Sequence[str] | None = None, **keywords: Any) -> Endpoint:
    """Find out where to send and how, as `endpoint.resolve` does, to one server or to several with the same model.

    Answers are kept under the first of several, whichever gave them.

    Raises
    ------
    ConfigurationError
        No key, a client that is none, a URL that is none, or one twice.
    """
    if base_url is None or isinstance(base_url, str):
        return endpoint.resolve(base_url=base_url, **keywords)
    if not isinstance(base_url, list | tuple) or not base_url:
        raise ConfigurationError(f"base_url={base_url!r} is no URL and no list of them")
    endpoints = [endpoint.resolve(base_url=url, **keywords) for url in base_url]
    known = [identity(url) for url in base_url]
    if twice := next((url for url in known if known.count(url) > 1), None):
        raise ConfigurationError(f"base_url= names {twice!r} twice; each replica is one server, and is named once")
    if len(endpoints) == 1:
        return endpoints[0]
    return replace(
        endpoints[0],
        key=("replicas", *(each.key for each in endpoints)),
        open=lambda: ReplicaTransport(endpoints),
        replicas=tuple(each.url for each in endpoints[1:]),
    )
