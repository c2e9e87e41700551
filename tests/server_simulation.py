"""The simulated server itself: connections, gates, slots, counts, and what is asked about them.

Every request is counted when its last byte came, and ends in exactly one way: answered (it is paid for), refused
(429), failed, abandoned (the client went away first) or other (no completion was asked for).
A new endpoint is one more entry in `ENDPOINTS`; what it does and says is in `tests.server_behaviour`.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import http.client
import json
import math
import signal
import socket
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast
from urllib.parse import parse_qsl, urlsplit

import orjson

from tests.server_behaviour import (
    BEFORE_WORK,
    NO_DIRECTIVES,
    USUAL_CODES,
    Answer,
    Behaviour,
    canonical,
    chat_answer,
    chat_complaint,
    directives_in,
    embedding_answer,
    embedding_complaint,
    error_body,
    fate_of,
    format_complaint,
    last_user_text,
    response_answer,
    response_complaint,
)
from tests.server_limits import Bucket, rate_headers, retry_header
from tests.server_process import stop_when_stdin_closes

if sys.platform != "win32":
    import resource

__all__ = ["BINS_PER_S", "LOG_LENGTH", "serve"]

BINS_PER_S = 10  # fine enough to see an outage begin and end
LOG_LENGTH = 20_000  # requests; a test looks at its last ones, and a long run must not fill the memory
BACKLOG = 4096  # connections not yet accepted; a client may open them all at once


class Counts:
    """What has happened since the last reset: totals, and courses in tenths of a second from the first request."""

    def __init__(self) -> None:
        self.received = self.answered = self.refused = self.abandoned = self.other = 0
        self.failed: Counter[str] = Counter()
        self.in_flight = self.max_in_flight = 0
        self.connections = self.open_connections = 0
        self.prompt_tokens = self.completion_tokens = 0
        self.first_request_s = self.last_request_s = self.last_answer_s = 0.0
        self.received_course: list[int] = []
        self.answered_course: list[int] = []
        self.refused_course: list[int] = []
        self.in_flight_course: list[int] = []  # the highest of each bin

    def bin(self, now: float) -> int:
        """Find the bin of this moment, opening those up to it with what is in flight."""
        if not self.received:
            return -1
        index = int((now - self.first_request_s) * BINS_PER_S)
        while len(self.received_course) <= index:
            self.received_course.append(0)
            self.answered_course.append(0)
            self.refused_course.append(0)
            self.in_flight_course.append(self.in_flight)
        return index

    def begin(self, now: float) -> None:
        """Count a request that came."""
        if not self.received:
            self.first_request_s = now
        self.received += 1
        self.last_request_s = now
        index = self.bin(now)
        self.received_course[index] += 1
        self.in_flight += 1
        if self.in_flight > self.in_flight_course[index]:
            self.in_flight_course[index] = self.in_flight
            self.max_in_flight = max(self.max_in_flight, self.in_flight)

    def end(self, now: float, outcome: str) -> None:
        """Count how a request ended."""
        index = self.bin(now)
        self.in_flight -= 1
        if outcome == "answered":
            self.answered += 1
            self.answered_course[index] += 1
            self.last_answer_s = now
        elif outcome == "refused":
            self.refused += 1
            self.refused_course[index] += 1
        elif outcome == "abandoned":
            self.abandoned += 1
        elif outcome == "other":
            self.other += 1
        else:
            self.failed[outcome] += 1

    def value(self, name: str) -> int:
        """Read one total, or the failures of one kind."""
        if name == "failed":
            return self.failed.total()
        return cast("int", getattr(self, name)) if name in vars(self) else self.failed[name]


# ---- one request on one connection


class Exchange:
    """One request and what has become of it; `place` says where it is now."""

    __slots__ = (
        "answer",
        "body",
        "connection",
        "directives",
        "due_s",
        "fault",
        "head",
        "key",
        "latency_s",
        "outcome",
        "place",
        "received_s",
        "status",
        "timer",
    )

    def __init__(self, connection: Connection, head: bytes, body: bytes, received_s: float) -> None:
        self.connection = connection
        self.head = head
        self.body = body
        self.received_s = received_s
        self.place = "gate"  # then "queue", "slot" or "free" (at work without a slot), and "over"
        self.timer: asyncio.TimerHandle | None = None
        self.due_s = received_s
        self.status = 0
        self.outcome: str | None = None
        self.fault: str | None = None
        self.latency_s = 0.0
        self.directives = NO_DIRECTIVES
        self.key = b""
        self.answer: Answer | None = None

    def headers(self) -> dict[str, str]:
        """Read the headers, their names in lower case."""
        pairs = (line.partition(":") for line in self.head.decode("latin-1").split("\r\n")[1:])
        return {name.lower(): value.strip() for name, _, value in pairs}

    def record(self) -> dict[str, Any]:
        """Write the exchange for the log."""
        method, target = self.head.split(b" ", 2)[:2]
        try:
            body = orjson.loads(self.body) if self.body else None
        except orjson.JSONDecodeError:
            body = self.body.decode("utf-8", "replace")
        return {
            "method": method.decode("latin-1"),
            "target": target.decode("latin-1"),
            "headers": self.headers(),
            "body": body,
            "received_s": self.received_s,
            "status": self.status,
            "outcome": self.outcome,
        }


REASONS = {status: f"{status} {reason}" for status, reason in http.client.responses.items()}
RESET = struct.pack("ii", 1, 0)  # SO_LINGER for 0 s: closing sends RST


class Connection(asyncio.Protocol):
    """HTTP/1.1 as far as clients of an API use it: keep-alive, and bodies that say their length."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._buffer = bytearray()
        self._last = False  # the client asked for this connection to be closed after the answer
        self.exchange: Exchange | None = None
        self.counted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self._simulation.connections.add(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self.exchange is None:
            self._next()

    def _next(self) -> None:
        """Hand on the request at the buffer's start, once it is whole."""
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or self.exchange is not None:
            return
        head = bytes(self._buffer[:end])
        lowered = head.lower()
        length, at = 0, lowered.find(b"\r\ncontent-length:")
        if at >= 0:
            length = int(lowered[at + 17 :].split(b"\r\n", 1)[0])
        if b"\r\nexpect:" in lowered and len(self._buffer) == end + 4 and length:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if len(self._buffer) < end + 4 + length:
            return
        body = bytes(self._buffer[end + 4 : end + 4 + length])
        del self._buffer[: end + 4 + length]
        self._last = b"\r\nconnection: close" in lowered
        self.exchange = Exchange(self, head, body, time.monotonic())
        self._simulation.receive(self.exchange)

    def send(self, status: int, headers: str, body: bytes, *, missing: int = 0) -> None:
        """Send an answer; `missing` bytes more are promised than sent, and then the connection ends."""
        self.exchange = None
        head = f"HTTP/1.1 {REASONS.get(status, status)}\r\n{headers}content-length: {len(body) + missing}\r\n\r\n"
        self.transport.write(head.encode("latin-1") + body)
        if missing or self._last:
            self.transport.close()
        elif self._buffer:
            asyncio.get_running_loop().call_soon(self._next)

    def reset(self) -> None:
        """End the connection with a TCP reset."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()

    def connection_lost(self, _: Exception | None) -> None:
        self._simulation.lost(self)


# ---- the server


class Endpoint(NamedTuple):
    """What is different between the paths that are asked."""

    complaint: Callable[[Mapping[str, Any], Behaviour], tuple[str, str] | None]
    answer: Callable[[Mapping[str, Any], Behaviour, Mapping[str, str], str], Answer]


ENDPOINTS = {
    "/chat/completions": Endpoint(lambda request, _: chat_complaint(request), chat_answer),
    "/responses": Endpoint(lambda request, _: response_complaint(request), response_answer),
    "/embeddings": Endpoint(embedding_complaint, embedding_answer),
}
JSON_TYPE = "content-type: application/json\r\n"
WEB_PAGE = b"<!DOCTYPE html><html><body><h1>Please log in to the network</h1></body></html>"


class Simulation:
    """The server's state: the behaviour, the buckets, the slots and who waits for them, the counts."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        self._changes: list[asyncio.TimerHandle] = []
        self._serial = 0
        self.restart(behaviour)

    def restart(self, behaviour: Behaviour, *, spare: Connection | None = None) -> None:
        """Forget everything, and close every connection but the one that asks for it."""
        self.counts = Counts()  # first, so that what is dropped counts nowhere
        self._queue: deque[Exchange] = deque()  # and starts nobody
        self._waiting: list[tuple[dict[str, int], Exchange]] = []
        for connection in self.connections - {spare}:
            if connection.exchange is not None:
                self._leave(connection.exchange)
                connection.exchange = None
            connection.counted = False  # in the counts that begin here
            connection.transport.abort()
        self._busy = 0  # slots taken
        self._seen: Counter[bytes] = Counter()  # how often each content was let in
        self._answered: Counter[bytes] = Counter()
        self._log: deque[Exchange] = deque(maxlen=LOG_LENGTH)
        self.configure(behaviour)

    def configure(self, behaviour: Behaviour) -> None:
        """Begin with a behaviour: full buckets, and its schedule from the next request on."""
        for change in self._changes:
            change.cancel()
        self._changes, self._scheduled = [], bool(behaviour.schedule)
        self._buckets: dict[str, Bucket] = {}
        self.change(behaviour)

    def change(self, behaviour: Behaviour) -> None:
        """Go on with another behaviour: buckets keep their level, what is at work goes on."""
        now = time.monotonic()
        self.behaviour = behaviour
        self._thresholds = behaviour.fault_thresholds()
        limits = {
            "requests": (behaviour.requests_per_min, behaviour.request_burst),
            "tokens": (behaviour.tokens_per_min, behaviour.token_burst),
        }
        for what, (per_min, size) in limits.items():
            if per_min is None:
                self._buckets.pop(what, None)
            elif (bucket := self._buckets.get(what)) is not None:
                bucket.fill(now)
                bucket.resize(per_min, size)
            else:
                self._buckets[what] = Bucket(per_min, size, now)
        if behaviour.status_all is not None and behaviour.status_all >= 500:
            self._fail_all(behaviour.status_all, behaviour.error_code)
        self._fill_slots(now)

    # -- the gates

    def receive(self, exchange: Exchange) -> None:
        """Take a request through the gates, up to a refusal or to its place."""
        method, target, _ = exchange.head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        path = target
        if path[0] != "/" or "?" in path:
            path = urlsplit(target).path  # a client that takes this for its proxy sends the whole URL
        if path.startswith("/_"):
            self._control(exchange, path, dict(parse_qsl(urlsplit(target).query)))
            return
        behaviour, counts = self.behaviour, self.counts
        if self._scheduled:
            self._scheduled = False
            for at_s, changes in behaviour.schedule:
                self._changes.append(
                    self.loop.call_later(at_s, lambda these: self.change(replace(self.behaviour, **these)), changes)
                )
        counts.begin(exchange.received_s)
        if not exchange.connection.counted:
            exchange.connection.counted = True
            counts.connections += 1
            counts.open_connections += 1
        if behaviour.log:
            self._log.append(exchange)
        if self._waiting:
            self._wake()

        root, endpoint = "/v1", ENDPOINTS.get(path[3:]) if path.startswith("/v1/") else None
        if path.startswith("/openai/"):  # Azure: /openai/v1/... or /openai/deployments/<name>/...
            root = "/openai/v1" if path.startswith("/openai/v1/") else "/".join(path.split("/")[:4])
            endpoint = ENDPOINTS.get(path.removeprefix(root))
        listing = method == "GET" and path == f"{root}/models"
        if behaviour.status_all is not None:
            self._fail(exchange, behaviour.status_all, behaviour.error_code)
        elif not listing and (endpoint is None or method != "POST"):
            self._fail(exchange, 404, None, f"Invalid URL ({method} {path})")
        elif behaviour.require_key is not None and not self._has_key(exchange, behaviour.require_key, root):
            self._fail(exchange, 401, "invalid_api_key")
        elif listing:
            models = [{"id": name, "object": "model"} for name in behaviour.valid_models or ["simulated"]]
            self._end(exchange, 200, "other")
            exchange.connection.send(200, JSON_TYPE, orjson.dumps({"object": "list", "data": models}))
        else:
            self._admit(exchange, cast("Endpoint", endpoint))

    def _has_key(self, exchange: Exchange, key: str, root: str) -> bool:
        headers = exchange.headers()
        return headers.get("authorization") == f"Bearer {key}" or (root != "/v1" and headers.get("api-key") == key)

    def _admit(self, exchange: Exchange, endpoint: Endpoint) -> None:
        """Check the request itself and the rate limits, draw its fate, and give it its place."""
        behaviour = self.behaviour
        try:
            request = orjson.loads(exchange.body)
        except orjson.JSONDecodeError as error:
            self._fail(exchange, 400, None, f"We could not parse the JSON body of your request: {error}")
            return
        if not isinstance(request, dict) or not request.get("model") or not isinstance(request["model"], str):
            self._fail(exchange, 400, None, "You must provide a model parameter.", "model")
            return
        if (complaint := endpoint.complaint(request, behaviour)) is not None:
            self._fail(exchange, 400, None, *complaint)
            return
        if behaviour.refuse_formats and (refusal := format_complaint(request, behaviour)) is not None:
            self._fail(exchange, 400, None, *refusal)
            return
        if behaviour.valid_models is not None and request["model"] not in behaviour.valid_models:
            name = request["model"]
            self._fail(
                exchange, 404, "model_not_found", f"The model `{name}` does not exist or you have no access to it."
            )
            return
        given = request.get("messages") or request.get("input") or ()
        if isinstance(given, list) and given and isinstance(given[0], str):
            text = next((one for one in given if "[[" in one), "")
        else:
            text = given if isinstance(given, str) else last_user_text([one for one in given if isinstance(one, dict)])
        exchange.directives = directives = directives_in(text)
        exchange.answer = answer = endpoint.answer(request, behaviour, directives, text)

        if self._buckets:
            cost = {"requests": 1, "tokens": answer.prompt_tokens + answer.completion_tokens}
            for bucket in self._buckets.values():
                bucket.fill(exchange.received_s)
            waits = {what: bucket.wait_s(cost[what]) for what, bucket in self._buckets.items()}
            what = max(waits, key=waits.__getitem__)
            if waits[what] > 0:
                name, limit = request["model"], self._buckets[what].per_min
                problem = "Rate limit reached" if waits[what] < math.inf else "Request too large"
                message = f"{problem} for {name} on {what} per min: Limit {limit:.12g}, Requested {cost[what]}."
                self._fail(exchange, 429, "rate_limit_exceeded", message, wait_s=waits[what])
                return
            for what, bucket in self._buckets.items():
                bucket.level -= cost[what]

        exchange.key = key = hashlib.sha256(canonical(request)).digest()
        occurrence = self._seen[key]
        self._seen[key] = occurrence + 1
        exchange.fault, exchange.latency_s = fate_of(behaviour, self._thresholds, key, occurrence, directives)
        if behaviour.slots is None or (exchange.fault in BEFORE_WORK and not behaviour.faults_hold_slots):
            exchange.place = "free"
            self._start(exchange, exchange.received_s)
        else:
            exchange.place = "queue"
            self._queue.append(exchange)
            self._fill_slots(exchange.received_s)

    # -- slots and time

    def _fill_slots(self, now: float) -> None:
        """Start those who waited longest, as far as there are slots."""
        slots = self.behaviour.slots or math.inf
        while self._queue and self._busy < slots:
            exchange = self._queue.popleft()
            if exchange.place == "queue":
                exchange.place = "slot"
                self._busy += 1
                self._start(exchange, max(now, exchange.received_s))

    def _start(self, exchange: Exchange, now: float) -> None:
        if exchange.fault == "hang":
            exchange.outcome, exchange.due_s = "hang", math.inf  # counted when the client gives up
        elif exchange.latency_s <= 0 and exchange.place == "free":
            self._finish(exchange)
        else:
            exchange.due_s = now + exchange.latency_s
            exchange.timer = self.loop.call_at(exchange.due_s, self._finish, exchange)

    def _leave(self, exchange: Exchange) -> None:
        """Give back what the request held; whoever waited starts at the moment it was due, so that no time is lost."""
        place, exchange.place = exchange.place, "over"
        if exchange.timer is not None:
            exchange.timer.cancel()
        if place == "slot":
            self._busy -= 1
            self._fill_slots(min(exchange.due_s, time.monotonic()))

    def _end(self, exchange: Exchange, status: int, outcome: str) -> None:
        """Record how a request ended, before the client can know it."""
        exchange.status, exchange.outcome = status, outcome
        self.counts.end(time.monotonic(), outcome)
        self._leave(exchange)
        if self._waiting:
            self._wake()

    def lost(self, connection: Connection) -> None:
        """Take leave of a connection, and of the request that it was waiting for."""
        if connection not in self.connections:
            return
        self.connections.discard(connection)
        if connection.counted:
            self.counts.open_connections -= 1
        exchange, connection.exchange = connection.exchange, None
        if exchange is None:
            return
        self._waiting = [(wanted, waiter) for wanted, waiter in self._waiting if waiter is not exchange]
        if exchange.place != "gate":
            self._end(exchange, 0, exchange.outcome or "abandoned")

    # -- the answers

    def _finish(self, exchange: Exchange) -> None:
        """Answer, or let the fault happen that was drawn."""
        behaviour, fault, directives = self.behaviour, exchange.fault, exchange.directives
        connection, answer = exchange.connection, exchange.answer
        assert answer is not None
        if fault == "status":
            number, _, code = directives["status"].partition(":")
            message = json.dumps(exchange.headers()) if "echo_headers" in directives else None
            self._fail(exchange, int(number), code or USUAL_CODES.get(int(number)), message)
            return
        if fault in {"429", "500", "503"}:
            self._fail(exchange, int(fault), USUAL_CODES.get(int(fault)))
            return
        if fault == "reset":
            self._end(exchange, 0, fault)
            connection.exchange = None
            connection.reset()
            return

        body = answer.body
        self._serial += 1
        if body.get("object") == "response":
            body["id"], body["created_at"] = f"resp_{self._serial}", int(time.time())
        elif "id" in body:
            body["id"], body["created"] = f"chatcmpl-{self._serial}", int(time.time())
        if "echo_headers" in directives:
            body["choices"][0]["message"]["content"] = json.dumps(exchange.headers())
        if fault == "no_usage":
            del body["usage"]
        elif fault == "empty_choices":
            body[next(name for name in ("choices", "output", "data") if name in body)] = []
        elif fault == "error_in_200":
            body = {"error": {"message": "Provider returned error", "code": behaviour.error_code or 502}}
        try:
            payload = orjson.dumps(body)
        except TypeError:  # a lone surrogate, which orjson does not write
            payload = json.dumps(body).encode()
        headers = self._headers(JSON_TYPE)
        missing = 0
        if fault == "html":
            payload, headers = WEB_PAGE, "content-type: text/html; charset=utf-8\r\n"
        elif fault == "bad_json":
            payload = payload[:-7]
        elif fault == "truncated_body":
            payload, missing = payload[: len(payload) // 2], len(payload) - len(payload) // 2

        if fault in {None, "slow", "no_usage"}:
            self._answered[exchange.key] += 1
            self.counts.prompt_tokens += answer.prompt_tokens
            self.counts.completion_tokens += answer.completion_tokens
            fault = "answered"
        exchange.answer = None  # the log keeps exchanges, and needs no answers
        self._end(exchange, 200, fault)
        connection.send(200, headers, payload, missing=missing)

    def _fail_all(self, status: int, code: str | None) -> None:
        """End all that waits or is at work."""
        self._queue.clear()
        for connection in list(self.connections):
            exchange = connection.exchange
            if exchange is not None and exchange.place != "gate" and exchange.fault != "hang":
                self._fail(exchange, status, code)

    def _headers(self, kind: str) -> str:
        headers = f"{kind}x-request-id: req_{self._serial}\r\n"
        if self.behaviour.rate_headers is not None and self._buckets:
            now = time.monotonic()
            for bucket in self._buckets.values():
                bucket.fill(now)
            headers += rate_headers(self.behaviour.rate_headers, self._buckets)
        return headers

    def _fail(
        self,
        exchange: Exchange,
        status: int,
        code: str | None,
        message: str | None = None,
        param: str | None = None,
        *,
        wait_s: float | None = None,
    ) -> None:
        """Answer with an error in OpenAI's shape."""
        behaviour = self.behaviour
        self._serial += 1
        headers = self._headers(JSON_TYPE)
        headers += "".join(f"{name}: {value}\r\n" for name, value in behaviour.error_headers.items())
        if behaviour.retry_after_s is not None and status in {429, 503}:
            headers += retry_header(behaviour.retry_after or "seconds", behaviour.retry_after_s, exact=True)
        elif behaviour.retry_after is not None and wait_s is not None and wait_s < math.inf:
            headers += retry_header(behaviour.retry_after, wait_s, exact=False)
        exchange.answer = None
        self._end(exchange, status, "refused" if status == 429 else str(status))
        exchange.connection.send(status, headers, error_body(status, code, message, param))

    # -- what the tests ask

    def _control(self, exchange: Exchange, path: str, query: dict[str, str]) -> None:
        connection = exchange.connection
        try:
            reply: Any = None
            match path:
                case "/_reset":
                    self.restart(Behaviour.from_json(exchange.body), spare=connection)
                case "/_configure":
                    self.configure(Behaviour.from_json(exchange.body))
                case "/_change":
                    self.change(replace(self.behaviour, **orjson.loads(exchange.body)))
                case "/_stats":
                    reply = self._stats()
                case "/_requests":
                    newest = list(self._log)[-int(query.get("limit", LOG_LENGTH)) :]
                    reply = [logged.record() for logged in newest]
                case "/_answered":
                    reply = {key.hex(): count for key, count in self._answered.items()}
                case "/_wait":
                    wanted = {name: int(value) for name, value in query.items()}
                    self._waiting.append((wanted, exchange))
                    self._wake()
                    return
                case _:
                    raise ValueError(f"no control endpoint {path}")
        except (TypeError, ValueError) as error:
            connection.send(400, JSON_TYPE, orjson.dumps(str(error)))
        else:
            connection.send(200, JSON_TYPE, orjson.dumps(reply))

    def _stats(self) -> dict[str, Any]:
        self.counts.bin(time.monotonic())
        return vars(self.counts) | {"cpu_s": time.process_time()}

    def _wake(self) -> None:
        """Answer those whose counts are met: what is in flight or open exactly, all others at least."""
        for waiting in list(self._waiting):
            wanted, exchange = waiting
            counts = self.counts
            if all(
                counts.value(name) == value
                if name in {"in_flight", "open_connections"}
                else counts.value(name) >= value
                for name, value in wanted.items()
            ):
                self._waiting.remove(waiting)
                exchange.connection.send(200, JSON_TYPE, orjson.dumps(self._stats()))


async def serve(port: int, behaviour: Behaviour, *, until_stdin_closes: bool) -> None:
    """Serve on 127.0.0.1 until a SIGTERM or SIGINT (or until whoever started this is gone)."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    simulation = Simulation(behaviour)
    server = await loop.create_server(lambda: Connection(simulation), "127.0.0.1", port, backlog=BACKLOG)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))
    if until_stdin_closes:
        stop_when_stdin_closes(stop)
    if sys.platform != "win32":
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is a file, and 1,024 are soon used
    gc.freeze()
    gc.set_threshold(200_000, 20, 100)  # a full collection of a long run's counts would be a pause that no server has
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await stop.wait()
    server.close()
    for connection in simulation.connections:
        connection.transport.abort()
