"""A simulated OpenAI-compatible server in a process of its own, for the tests and the benchmarks.

What it counts is what happened: a request that it answered with a completion is one that a user would have paid for.

    with SimulatedServer(latency_s=0.05, p_500=0.1) as server:
        client = AsyncOpenAI(base_url=server.base_url)
        ...
        assert max(server.answered_by_content().values()) == 1

From a shell: ``python -m tests.server --port 8000 --config '{"latency_s": 0.05}'``. The knobs are those of `Behaviour`;
a user message steers the answer to it with directives like ``[[status=400]]`` (`tests.server_behaviour.directives_in`).
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, cast
from urllib.parse import urlencode

import orjson

from tests.server_behaviour import (
    FAULTS,
    Behaviour,
    content_key,
    count_prompt_tokens,
    count_tokens,
    embedding_of,
    label_of,
    last_user_text,
)
from tests.server_process import ServerProcess
from tests.server_simulation import BINS_PER_S, LOG_LENGTH, serve

__all__ = [
    "Behaviour",
    "ReceivedRequest",
    "SimulatedServer",
    "Stats",
    "content_key",
    "count_prompt_tokens",
    "count_tokens",
    "embedding_of",
    "label_of",
]

CONTROL_S = 30.0  # for what the server does at once, on a machine that is busy with other tests


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The server's counts at one moment; times are `time.monotonic()`, which all processes of a machine share.

    Attributes
    ----------
    received, answered, refused, abandoned, other : int
        Requests whose last byte came; those that got a completion (and are paid for), a 429, nothing because the
        client went away first, or something that is no completion.
    failed : dict of int
        The rest, by the fault's name or the status: `reset`, `html`, `500`, `401`.
    in_flight, max_in_flight : int
        Requests that came and have not ended, now and at the highest.
    connections, open_connections : int
        TCP connections that carried a request, in all and now.
    prompt_tokens, completion_tokens : int
        Of what was answered.
    first_request_s, last_request_s, last_answer_s : float
        When; 0 where there was none.
    received_course, answered_course, refused_course, in_flight_course : list of int
        The same in tenths of a second from the first request; of those in flight the highest in each.
    cpu_s : float
        CPU time of the server since it started.
    """

    received: int
    answered: int
    refused: int
    abandoned: int
    other: int
    failed: dict[str, int]
    in_flight: int
    max_in_flight: int
    connections: int
    open_connections: int
    prompt_tokens: int
    completion_tokens: int
    first_request_s: float
    last_request_s: float
    last_answer_s: float
    received_course: list[int]
    answered_course: list[int]
    refused_course: list[int]
    in_flight_course: list[int]
    cpu_s: float

    @property
    def seconds(self) -> float:
        """The time from the first request to the last answer."""
        return max(0.0, self.last_answer_s - self.first_request_s)

    @property
    def max_in_flight_after_2_s(self) -> int:
        """The most in flight at one time, the first 2 s left out."""
        return max(self.in_flight_course[2 * BINS_PER_S :], default=0)

    def per_second(self, what: str) -> list[int]:
        """Give `received`, `answered` or `refused` for each second, or the highest of `in_flight` in it."""
        course: list[int] = getattr(self, f"{what}_course")
        seconds = [course[start : start + BINS_PER_S] for start in range(0, len(course), BINS_PER_S)]
        return [max(bins) if what == "in_flight" else sum(bins) for bins in seconds]


COUNTS = {*Stats.__dataclass_fields__, *FAULTS}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedRequest:
    """One request as the server got it, and what became of it.

    Attributes
    ----------
    method, target : str
        Of the request line; the target is the path with its query (or the whole URL, from a client with a proxy).
    headers : dict of str
        With names in lower case.
    body : object
        The JSON read, or the text where it is none.
    received_s : float
        When, in `time.monotonic()`.
    status : int
        Of the answer; 0 where there is none.
    outcome : str or None
        `answered`, `refused`, `abandoned`, `other`, the name of the failure; None while it is in flight.
    """

    method: str
    target: str
    headers: dict[str, str]
    body: Any
    received_s: float
    status: int
    outcome: str | None

    @property
    def text(self) -> str:
        """The text of the last user message."""
        return last_user_text(self.body["messages"])


class SimulatedServer(ServerProcess):
    """The server in a process of its own, steered and asked from here.

    Parameters
    ----------
    **behaviour
        The knobs of `Behaviour`.
    """

    def __init__(self, **behaviour: Any) -> None:
        super().__init__()
        self._behaviour = Behaviour(**behaviour)

    def _command(self) -> list[str]:
        return ["tests.server", "--config", self._behaviour.to_json().decode()]

    def __enter__(self) -> Self:
        return self if self.running else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def reset(self, **behaviour: Any) -> None:
        """Forget all counts, close all connections, and begin anew with these knobs and the others' defaults."""
        self._behaviour = Behaviour(**behaviour)
        self._ask("/_reset", self._behaviour.to_json())

    def configure(self, **behaviour: Any) -> None:
        """Set these knobs and all others to their defaults: full buckets, and the schedule from the next request on."""
        self._behaviour = Behaviour(**behaviour)
        self._ask("/_configure", self._behaviour.to_json())

    def change(self, **behaviour: Any) -> None:
        """Set these knobs and leave the others, the buckets' level and the running schedule."""
        self._behaviour = replace(self._behaviour, **behaviour)
        self._ask("/_change", orjson.dumps(behaviour))

    def stats(self) -> Stats:
        """Count what happened since the start or the last `reset`."""
        return Stats(**self._ask("/_stats"))

    def requests(self, limit: int = LOG_LENGTH) -> list[ReceivedRequest]:
        """Give the newest requests, the oldest of them first."""
        return [ReceivedRequest(**record) for record in self._ask(f"/_requests?limit={limit}")]

    def answered_by_content(self) -> dict[str, int]:
        """Give how often each request was answered and so paid for, by its `content_key`."""
        return cast("dict[str, int]", self._ask("/_answered"))

    def wait_for(self, *, timeout_s: float = 30.0, **counts: int) -> Stats:
        """Wait until the counts are reached, which are names of `Stats`, or of its failures.

        `in_flight` and `open_connections` must be met exactly, all others at least. Inside a running event loop,
        use `until`.
        """
        if unknown := {name for name in counts if not name.isdigit()} - COUNTS:
            raise ValueError(f"{sorted(unknown)} are no counts; use a status or one of {sorted(COUNTS)}")
        try:
            return Stats(**self._ask(f"/_wait?{urlencode(counts)}", timeout_s=timeout_s))
        except TimeoutError:
            raise TimeoutError(f"{counts} was not reached in {timeout_s} s; the server says {self.stats()}") from None

    async def until(self, *, timeout_s: float = 30.0, **counts: int) -> Stats:
        """Wait as `wait_for` does, and let the event loop run."""
        return await asyncio.to_thread(self.wait_for, timeout_s=timeout_s, **counts)

    def _ask(self, path: str, body: bytes = b"", *, timeout_s: float = CONTROL_S) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=timeout_s)
        try:
            connection.request("POST", path, body)
            response = connection.getresponse()
            reply = orjson.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(reply)
        return reply


def main() -> None:
    """Run the server from a shell."""
    parser = argparse.ArgumentParser(prog="python -m tests.server", description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--config", default="{}", help="a Behaviour as JSON")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end when whoever holds stdin is gone")
    chosen = parser.parse_args()
    asyncio.run(serve(chosen.port, Behaviour.from_json(chosen.config), until_stdin_closes=chosen.until_stdin_closes))


if __name__ == "__main__":
    main()
