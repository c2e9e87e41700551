"""Lines: who may send when, what is shared between runs, and what is kept open."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable

import httpx2
import openai
import orjson
import pytest

from llmframe import lines
from llmframe.endpoint import Endpoint, resolve
from llmframe.lines import KEPT, TICK_S, Line, close_lines, give_back, line_to
from llmframe.pacing import Caps
from tests.server import SimulatedServer

BODY = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "Hello"}]})


def nowhere(port: int = 9) -> Endpoint:
    """An endpoint to which nothing is sent."""
    return resolve(base_url=f"http://127.0.0.1:{port}/v1")


def alone(test: Callable[[], Awaitable[None]]) -> None:
    """Run on a loop of its own, and close its lines."""

    async def main() -> None:
        try:
            await test()
        finally:
            await close_lines()

    asyncio.run(main())


async def turn() -> None:
    """Let everything run that can."""
    for _ in range(5):
        await asyncio.sleep(0)


def finish(line: Line) -> None:
    """Count back a request that was sent."""
    line.release()


def test_whoever_waits_is_let_in_by_order_of_arrival() -> None:
    async def test() -> None:
        line = line_to(nowhere(), Caps(max_concurrency=1))
        let_in: list[int] = []

        async def enter(number: int) -> None:
            await line.enter(1)
            let_in.append(number)

        waiting = [asyncio.create_task(enter(number)) for number in range(4)]
        for expected in ([0], [0, 1], [0, 1, 2], [0, 1, 2, 3]):
            await turn()
            assert let_in == expected
            assert line.pacer.in_flight == 1
            finish(line)
        await asyncio.gather(*waiting)

    alone(test)


def test_whoever_leaves_the_queue_holds_nobody_up() -> None:
    async def test() -> None:
        line = line_to(nowhere(), Caps(max_concurrency=1))
        await line.enter(1)
        gone, staying = asyncio.create_task(line.enter(1)), asyncio.create_task(line.enter(1))
        await turn()
        gone.cancel()
        await turn()
        finish(line)
        await staying
        assert line.pacer.in_flight == 1

    alone(test)


def test_whoever_is_cancelled_in_the_moment_of_being_let_in_gives_the_place_back() -> None:
    async def test() -> None:
        line = line_to(nowhere(), Caps(max_concurrency=1))
        await line.enter(1)
        gone, staying = asyncio.create_task(line.enter(1)), asyncio.create_task(line.enter(1))
        await turn()
        finish(line)  # which lets the next one in
        gone.cancel()  # before it can know
        await staying
        assert gone.cancelled()
        assert line.pacer.in_flight == 1

    alone(test)


def test_a_rate_cap_lets_in_at_its_pace_and_needs_no_tick() -> None:
    async def test() -> None:
        line = line_to(nowhere(), Caps(rpm=600))  # 10 a second
        loop = asyncio.get_running_loop()
        began = loop.time()
        for _ in range(12):
            await line.enter(1)
            line.wrote()
            finish(line)
        assert 1.0 <= loop.time() - began < 5.0

    alone(test)


def test_the_runs_of_a_loop_share_the_line_to_an_endpoint() -> None:
    async def test() -> None:
        assert line_to(nowhere(), Caps()) is line_to(nowhere(), Caps())
        assert line_to(nowhere(), Caps()) is not line_to(nowhere(10), Caps())
        assert line_to(nowhere(), Caps()) is not line_to(nowhere(), Caps(max_concurrency=3))

    alone(test)


def test_another_client_never_gets_the_line_of_one_that_is_gone() -> None:
    async def test() -> None:
        async def key(text: str) -> str:
            return text

        seen = set()
        for number in range(3):  # a client made where one was just freed may have its address in memory
            client = openai.AsyncOpenAI(api_key=lambda text=f"sk-{number}": key(text), base_url="http://127.0.0.1:9/v1")
            seen.add(id(line_to(resolve(client=client), Caps())))
            del client
        assert len(seen) == 3

    alone(test)


def test_idle_lines_are_closed_beyond_those_kept_the_longest_unused_first(server: SimulatedServer) -> None:
    async def test() -> None:
        opened = []
        for number in range(KEPT + 3):
            line = line_to(resolve(base_url=server.base_url, api_key=f"sk-{number}"), Caps())
            await line.transport.send(BODY)
            await give_back(line)
            opened.append(line)
        await server.until(open_connections=KEPT)
        first = line_to(resolve(base_url=server.base_url, api_key="sk-0"), Caps())
        last = line_to(resolve(base_url=server.base_url, api_key=f"sk-{KEPT + 2}"), Caps())
        assert first is not opened[0]
        assert last is opened[-1]
        await close_lines()
        await server.until(open_connections=0)

    alone(test)


def test_a_line_in_use_is_never_closed(server: SimulatedServer) -> None:
    async def test() -> None:
        used = line_to(resolve(base_url=server.base_url, api_key="sk-used"), Caps())
        for number in range(KEPT + 3):
            await give_back(line_to(resolve(base_url=server.base_url, api_key=f"sk-{number}"), Caps()))
        assert (await used.transport.send(BODY)).status == 200
        assert line_to(resolve(base_url=server.base_url, api_key="sk-used"), Caps()) is used

    alone(test)


def test_a_line_of_two_is_in_use_until_both_gave_it_back(server: SimulatedServer) -> None:
    async def test() -> None:
        endpoint = resolve(base_url=server.base_url, api_key="sk-used")
        used = line_to(endpoint, Caps())
        await give_back(line_to(endpoint, Caps()))
        for number in range(KEPT + 3):
            await give_back(line_to(resolve(base_url=server.base_url, api_key=f"sk-{number}"), Caps()))
        assert (await used.transport.send(BODY)).status == 200

    alone(test)


def test_a_line_ticks_while_a_run_uses_it_and_no_longer() -> None:
    async def test() -> None:
        line = line_to(nowhere(), Caps())
        ticked = asyncio.Event()

        def on_tick(now: float) -> None:
            ticked.set()

        assert line.idle
        line.join(on_tick)
        assert not line.idle
        await asyncio.wait_for(ticked.wait(), 20 * TICK_S)
        line.leave(on_tick)
        await turn()
        assert line.idle
        assert asyncio.all_tasks() == {asyncio.current_task()}

    alone(test)


def test_no_more_is_let_in_than_the_transport_carries() -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def test() -> None:
        endpoint = nowhere()
        opened = len(os.listdir("/dev/fd"))  # the directory itself among them
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, hard))
        try:
            line = line_to(endpoint, Caps())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert line.pacer.window == 15

    alone(test)


def pooled(connections: int) -> Endpoint:
    """An endpoint with a client of the user's own, whose pool holds so many connections."""
    pool = httpx2.AsyncClient(limits=httpx2.Limits(max_connections=connections))
    return resolve(client=openai.AsyncOpenAI(base_url="http://127.0.0.1:9/v1", api_key="sk-pooled", http_client=pool))


@pytest.mark.parametrize(
    ("caps", "let_in", "limited_by"),
    [
        (Caps(), 3, "connections"),
        (Caps(max_concurrency=9), 3, "connections"),
        (Caps(max_concurrency=3), 3, "max_concurrency"),
        (Caps(max_concurrency=2), 2, "max_concurrency"),
    ],
)
def test_max_concurrency_is_named_as_the_limit_only_where_the_users_own_cap_is_reached(
    caps: Caps, let_in: int, limited_by: str
) -> None:
    async def test() -> None:
        line = line_to(pooled(3), caps)
        for _ in range(let_in):
            await line.enter(1)
        one_more = asyncio.create_task(line.enter(1))
        await turn()
        assert line.pacer.in_flight == let_in
        assert line.pacer.limited_by == limited_by
        one_more.cancel()

    alone(test)


def test_the_lines_of_a_closed_loop_are_forgotten() -> None:
    async def left_open() -> None:
        client = openai.AsyncOpenAI(base_url="http://127.0.0.1:9/v1", default_query={"a": "b"})
        line = line_to(resolve(client=client), Caps())
        await line.close()

    asyncio.run(left_open())
    assert any(loop.is_closed() for loop in lines._lines)

    async def another() -> None:
        line_to(nowhere(), Caps())
        assert not any(loop.is_closed() for loop in lines._lines)

    alone(another)
