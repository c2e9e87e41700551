"""The sync door from everywhere: scripts, threads, running loops, forks; and the way out of it by Ctrl-C."""

from __future__ import annotations

import _thread
import asyncio
import gc
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import openai
import pandas as pd
import pydantic
import pytest

import llmframe
from llmframe import engine, loops
from llmframe.errors import ConfigurationError
from llmframe.lines import KEPT
from tests import turns
from tests.server import SimulatedServer
from tests.turns import STOPPED_S

SCRIPT_S = 60.0  # for a process on a machine that is busy with other tests
ROOT = Path(__file__).resolve().parent.parent

needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
needs_sigint = pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to one process here")


def frame(rows: int, text: str = "row") -> pd.DataFrame:
    return pd.DataFrame({"text": [f"{text} {i}" for i in range(rows)]})


def answers(rows: int, text: str = "row") -> list[str]:
    return [f"echo: {text} {i}" for i in range(rows)]


def saved_in(checkpoint: Path) -> int:
    """Count the answers in a checkpoint."""
    return int((llmframe.read_checkpoint(checkpoint)["status"] == "ok").sum())


keys = (f"sk-test-{number}" for number in itertools.count(10_000))


def ask(server: SimulatedServer, source: pd.DataFrame, **keywords: Any) -> list[str]:
    """Make a call with a key of its own, and so on a line that no test before has taught anything."""
    keywords = {"model": "m", "base_url": server.base_url, "api_key": next(keys), **keywords}
    out: pd.DataFrame = source.llm.complete("{text}", **keywords)
    return out["response"].tolist()


# ---- from where it is called


def test_a_script_gets_its_answers(server: SimulatedServer) -> None:
    assert ask(server, frame(3)) == answers(3)


def test_a_worker_thread_gets_its_answers(server: SimulatedServer) -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(ask, server, frame(3)).result() == answers(3)


def test_threads_that_call_at_once_get_each_its_own_answers(server: SimulatedServer) -> None:
    server.change(latency_s=0.05)
    names = [f"thread {i}, row" for i in range(6)]
    with ThreadPoolExecutor(len(names)) as pool:
        got = list(pool.map(lambda name: ask(server, frame(20, name)), names))
    assert got == [answers(20, name) for name in names]


def test_all_calls_of_a_process_share_one_loop_and_its_connections(server: SimulatedServer) -> None:
    for _ in range(5):
        ask(server, frame(3), max_concurrency=1, api_key="sk-test-the-same")
    assert server.stats().connections == 1


def test_a_synchronous_call_inside_a_running_loop_gets_its_answers(server: SimulatedServer) -> None:
    async def main() -> list[str]:
        return ask(server, frame(3))

    assert asyncio.run(main()) == answers(3)


def test_a_call_inside_uvloop_gets_its_answers(server: SimulatedServer) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> list[list[str]]:
        awaited = await frame(3).llm.acomplete("{text}", model="m", base_url=server.base_url)
        return [ask(server, frame(3)), awaited["response"].tolist()]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(main()) == [answers(3)] * 2


def test_acomplete_leaves_the_callers_loop_free(server: SimulatedServer) -> None:
    async def main() -> list[str]:
        call = asyncio.ensure_future(
            frame(3, "[[sleep=0.3]] row").llm.acomplete("{text}", model="m", base_url=server.base_url)
        )
        turns = 0
        while not call.done():
            await asyncio.sleep(0.01)
            turns += 1
        assert turns > 5
        return (await call)["response"].tolist()

    assert asyncio.run(main()) == answers(3, "[[sleep=0.3]] row")


def test_calls_awaited_together_get_each_its_own_answers(server: SimulatedServer) -> None:
    names = [f"call {i}, row" for i in range(4)]

    async def main() -> list[pd.DataFrame]:
        calls = [frame(10, name).llm.acomplete("{text}", model="m", base_url=server.base_url) for name in names]
        return await asyncio.gather(*calls)

    assert [out["response"].tolist() for out in asyncio.run(main())] == [answers(10, name) for name in names]


def test_more_calls_at_once_than_lines_are_kept_get_their_answers(server: SimulatedServer) -> None:
    async def main() -> list[pd.DataFrame]:
        calls = [
            frame(2).llm.acomplete("{text}", model="m", base_url=server.base_url, rpm=100_000 + number)
            for number in range(3 * KEPT)
        ]
        return await asyncio.gather(*calls)

    assert [out["response"].tolist() for out in asyncio.run(main())] == [answers(2)] * 3 * KEPT


class Judged(pydantic.BaseModel):
    text: str

    @pydantic.field_validator("text")
    @classmethod
    def judge(cls, text: str) -> str:
        question = [{"role": "user", "content": f"Is it good? {text}"}]
        return str(llmframe.complete([question], model="m", base_url="http://127.0.0.1:9/v1")[0].text)


def test_a_call_from_inside_a_run_is_refused_where_it_would_wait_for_itself(server: SimulatedServer) -> None:
    with pytest.raises(ConfigurationError, match="from inside a run"):
        frame(1, '[[say={"text": "x"}]] row').llm.complete("{text}", model="m", base_url=server.base_url, schema=Judged)


def _in_a_child(url: str, answers: Any) -> None:
    out = frame(3).llm.complete("{text}", model="m", base_url=url)
    answers.put(out["response"].tolist())


@needs_fork
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_gets_its_answers_and_its_parent_goes_on(server: SimulatedServer) -> None:
    assert ask(server, frame(3)) == answers(3)
    context = multiprocessing.get_context("fork")
    received = context.SimpleQueue()
    child = context.Process(target=_in_a_child, args=(server.base_url, received))
    child.start()
    child.join(SCRIPT_S)
    assert child.exitcode == 0
    assert received.get() == answers(3)
    assert ask(server, frame(5)) == answers(5)


# ---- the end of a process


def script(server: SimulatedServer, body: str, *flags: str, **environment: str) -> subprocess.Popen[str]:
    """Start a script with a frame, ready to call; `ask(frame)` and `await aask(frame)` do."""
    start = f"""
        import asyncio, os, sys, threading, time
        import pandas as pd, llmframe
        def frame(rows, text="row"):
            return pd.DataFrame({{"text": [f"{{text}} {{i}}" for i in range(rows)]}})
        endpoint = dict(model="m", base_url={server.base_url!r}, api_key="sk-test-not-a-secret")
        def ask(df, **keywords):
            return df.llm.complete("{{text}}", **endpoint, **keywords)
        def aask(df, **keywords):
            return df.llm.acomplete("{{text}}", **endpoint, **keywords)
    """
    source = textwrap.dedent(start) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, *flags, "-c", source],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a script; its exit code, what it printed and what it complained of."""
    with process:
        try:
            printed, complained = process.communicate(timeout=SCRIPT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return process.returncode, printed, complained


EVERY_KIND_OF_CALL = """
    ask(frame(3))
    asyncio.run(aask(frame(3)))
    thread = threading.Thread(target=ask, args=(frame(3),))
    thread.start()
    thread.join()
    async def main():
        ask(frame(3))
    asyncio.run(main())
    ask(frame(3), checkpoint=os.environ["CHECKPOINT"])
    try:
        ask(frame(3, "[[status=401]]"))
    except llmframe.EndpointError:
        pass
"""


def silent(complained: str) -> bool:
    """Whether a process in asyncio's debug mode had nothing to complain of but slow callbacks on a busy machine."""
    return all(line.startswith("Executing <") for line in complained.splitlines())


def test_a_process_ends_in_silence(server: SimulatedServer, tmp_path: Path) -> None:
    process = script(server, EVERY_KIND_OF_CALL, "-X", "dev", "-W", "error", CHECKPOINT=str(tmp_path / "runs"))
    code, printed, complained = finish(process)
    assert (code, printed) == (0, "")
    assert silent(complained), complained


ANSWERED, IN_FLIGHT, ROWS = 12, 4, 40
STANDSTILL = f"""
    df = frame({ROWS})
    df.loc[{ANSWERED}:{ANSWERED + IN_FLIGHT - 1}, "text"] += " [[hang_first=1]]"
    keywords = dict(max_concurrency={IN_FLIGHT}, checkpoint=os.environ.get("CHECKPOINT"))
"""


def test_a_process_that_ends_in_the_middle_of_a_call_saves_what_was_answered_in_silence(
    server: SimulatedServer, tmp_path: Path
) -> None:
    body = f"""{STANDSTILL}
    threading.Thread(target=ask, args=(df,), kwargs=keywords, daemon=True).start()
    while not llmframe.runner._last or llmframe.last_run().counts.get("ok") != {ANSWERED}:
        time.sleep(0.01)
    """
    process = script(server, body, "-X", "dev", "-W", "error", CHECKPOINT=str(tmp_path / "runs"))
    code, printed, complained = finish(process)
    assert (code, printed) == (0, "")
    assert silent(complained), complained
    assert saved_in(tmp_path / "runs") == ANSWERED


@needs_sigint
def test_a_ctrl_c_while_a_process_ends_does_not_lose_what_it_saves(server: SimulatedServer, tmp_path: Path) -> None:
    body = f"""{STANDSTILL}
    import atexit, signal
    from llmframe import checkpoint
    checkpoint.FLUSH_S = 60.0  # so that all is saved at the end
    save, ending = checkpoint.Checkpoint.flush, []
    def interrupted(self):
        if ending:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        save(self)
    checkpoint.Checkpoint.flush = interrupted
    atexit.register(ending.append, True)
    threading.Thread(target=ask, args=(df,), kwargs=keywords, daemon=True).start()
    while not llmframe.runner._last or llmframe.last_run().counts.get("ok") != {ANSWERED}:
        time.sleep(0.01)
    """
    process = script(server, body, CHECKPOINT=str(tmp_path / "runs"))
    assert finish(process) == (0, "", "")
    assert saved_in(tmp_path / "runs") == ANSWERED


def test_a_call_in_a_thread_goes_on_when_the_main_thread_has_ended(server: SimulatedServer, tmp_path: Path) -> None:
    body = """
    def work():
        threading.main_thread().join()
        ask(frame(3), checkpoint=os.environ["CHECKPOINT"])
        asyncio.run(aask(frame(5), checkpoint=os.environ["CHECKPOINT"]))
    threading.Thread(target=work).start()
    """
    process = script(server, body, CHECKPOINT=str(tmp_path / "runs"))
    code, _, complained = finish(process)
    assert (code, complained) == (0, f"llmframe: 3 of 5 answers are in {tmp_path / 'runs'}; asking 2\n")
    assert saved_in(tmp_path / "runs") == 5


# ---- Ctrl-C in a process


def standing_frame() -> pd.DataFrame:
    """Make in this process the frame of `STANDSTILL`."""
    source = frame(ROWS)
    source.loc[ANSWERED : ANSWERED + IN_FLIGHT - 1, "text"] += " [[hang_first=1]]"
    return source


def interrupt(server: SimulatedServer, process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Send SIGINT to a script that has come to a standstill; see `finish`."""
    try:
        server.wait_for(answered=ANSWERED, in_flight=IN_FLIGHT, timeout_s=SCRIPT_S)
        process.send_signal(signal.SIGINT)
    except BaseException:
        process.kill()
        raise
    finally:
        ended = finish(process)
    return ended


@dataclass(frozen=True, slots=True)
class Stopped:
    """What is left of a script that was interrupted."""

    code: int
    printed: str
    last_line: str
    checkpoint: Path
    saved: int


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SimulatedServer, Stopped]]:
    """A script that was interrupted within `except Exception`, and the server it sent to."""
    checkpoint = tmp_path_factory.mktemp("stopped") / "runs"
    body = f"""{STANDSTILL}
    try:
        ask(df, **keywords)
    except Exception:
        print("swallowed")
    """
    with SimulatedServer() as server:
        code, printed, complained = interrupt(server, script(server, body, CHECKPOINT=str(checkpoint)))
        yield server, Stopped(code, printed, complained.splitlines()[-1], checkpoint, saved_in(checkpoint))


@needs_sigint
def test_ctrl_c_ends_a_script_with_a_message_that_says_how_to_go_on(stopped: tuple[SimulatedServer, Stopped]) -> None:
    _, script = stopped
    assert script.code != 0
    assert script.last_line == (
        f"llmframe.errors.Interrupted: interrupted ({ANSWERED} of {ROWS} rows are done; "
        f"the same call goes on from {script.checkpoint})"
    )


@needs_sigint
def test_except_exception_does_not_swallow_ctrl_c(stopped: tuple[SimulatedServer, Stopped]) -> None:
    _, script = stopped
    assert script.printed == ""


@needs_sigint
def test_what_was_answered_before_ctrl_c_is_in_the_checkpoint_and_never_asked_again(
    stopped: tuple[SimulatedServer, Stopped],
) -> None:
    server, script = stopped
    assert script.saved == ANSWERED
    ask(server, standing_frame(), checkpoint=script.checkpoint)
    answered = server.answered_by_content()
    assert len(answered) == ROWS
    assert set(answered.values()) == {1}


@needs_sigint
@pytest.mark.parametrize("how", turns.TURNS)
def test_ctrl_c_in_a_script_whose_endpoint_has_turned_returns_in_time_with_all_that_was_answered(
    server: SimulatedServer, how: str, tmp_path: Path
) -> None:
    turns.slow(server)
    body = turns.WATCH + textwrap.dedent(f"""
        import json
        keywords = dict(max_concurrency=4, checkpoint={str(tmp_path / "runs")!r})
        watch({str(tmp_path / "flag")!r})
        try:
            ask(frame({turns.ROWS}), **keywords)
        except llmframe.Interrupted as error:
            print(json.dumps([int((error.frame["response_status"] == "ok").sum()), left_behind()]), flush=True)
    """)
    process = script(server, body)
    assert process.stdout is not None
    answered = turns.turn(server, how, tmp_path / "flag")
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    done, left = json.loads(process.stdout.readline())
    assert time.monotonic() - began < STOPPED_S
    assert finish(process)[0] == 0
    assert left == []
    assert done == saved_in(tmp_path / "runs")
    assert answered in (done, -1)
    turns.mend(server)
    ask(server, frame(turns.ROWS), checkpoint=tmp_path / "runs")
    assert server.stats().answered == turns.ROWS - done


# ---- an interrupt in this process


def press_ctrl_c() -> None:
    """Interrupt this process."""
    if sys.platform == "win32":
        _thread.interrupt_main()
    else:
        os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def interrupted_when(condition: Callable[[], bool], *, times: int = 1) -> Iterator[list[float]]:
    """Interrupt the main thread as soon as something is so; gives when that was."""
    began: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while not condition():
            if over.wait(0.01):
                return
        began.append(time.monotonic())
        for _ in range(times):
            press_ctrl_c()
            if over.wait(0.3):  # two that come together are one to the process
                return

    watcher = threading.Thread(target=watch, name="watcher")
    watcher.start()
    try:
        yield began
    finally:
        over.set()
        watcher.join()


def failed(kind: str) -> Callable[[], bool]:
    """Give a condition: the run that goes on has met such a failure."""
    before = llmframe.runner._last

    def look() -> bool:
        run = llmframe.runner._last
        return run is not None and run is not before and run._state.tally.failures[kind] > 0

    return look


def stop_in_time(server: SimulatedServer, source: pd.DataFrame, kind: str, **keywords: Any) -> llmframe.Interrupted:
    """Make a call, interrupt it at the first such failure, and give what it raised."""
    with interrupted_when(failed(kind)) as began, pytest.raises(llmframe.Interrupted) as stopped:
        ask(server, source, **keywords)
    assert time.monotonic() - began[0] < STOPPED_S
    return stopped.value


@pytest.mark.parametrize("max_concurrency", [None, 1])
def test_an_interrupt_ends_the_wait_for_a_retry_after_of_a_minute(
    server: SimulatedServer, max_concurrency: int | None
) -> None:
    server.change(status_all=429, retry_after="seconds", retry_after_s=60.0)
    stop_in_time(server, frame(5), "rate limit", max_concurrency=max_concurrency)


def test_an_interrupt_ends_the_wait_for_an_endpoint_that_is_down(server: SimulatedServer) -> None:
    server.change(status_all=503)
    stop_in_time(server, frame(5), "server error")


def test_an_interrupt_ends_the_wait_for_an_endpoint_that_takes_no_connections(server: SimulatedServer) -> None:
    server.kill()
    stop_in_time(server, frame(5), "connection")


@pytest.fixture
def standstill(server: SimulatedServer) -> Callable[[], bool]:
    """A condition: the server has come to the rows that hang."""

    def reached() -> bool:
        stats = server.stats()
        return stats.answered == ANSWERED and stats.in_flight == IN_FLIGHT

    return reached


def test_a_second_interrupt_does_not_wait_for_what_is_in_flight(
    server: SimulatedServer, standstill: Callable[[], bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "GRACE_S", SCRIPT_S)
    with interrupted_when(standstill, times=2) as began, pytest.raises(llmframe.Interrupted):
        ask(server, standing_frame(), max_concurrency=IN_FLIGHT, checkpoint=tmp_path / "runs")
    assert time.monotonic() - began[0] < STOPPED_S
    assert saved_in(tmp_path / "runs") == ANSWERED


@pytest.mark.parametrize("awaited", [True, False], ids=["acomplete", "complete"])
def test_ctrl_c_ends_asyncio_run_in_time_and_what_was_answered_is_kept(
    server: SimulatedServer,
    standstill: Callable[[], bool],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    awaited: bool,
) -> None:
    keywords: dict[str, Any] = {"max_concurrency": IN_FLIGHT, "checkpoint": tmp_path / "runs"}

    async def main() -> None:
        if awaited:
            keywords.update(model="m", base_url=server.base_url, api_key=next(keys))
            await standing_frame().llm.acomplete("{text}", **keywords)
        else:
            ask(server, standing_frame(), **keywords)

    with interrupted_when(standstill) as began, pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert time.monotonic() - began[0] < STOPPED_S
    assert saved_in(tmp_path / "runs") == ANSWERED
    assert caplog.records == []


def test_ctrl_c_out_of_a_loop_that_nobody_guards_ends_the_run_too(
    server: SimulatedServer, standstill: Callable[[], bool], tmp_path: Path
) -> None:
    keywords = {"max_concurrency": IN_FLIGHT, "checkpoint": tmp_path / "runs", "model": "m", "api_key": next(keys)}
    loop = asyncio.new_event_loop()  # IPython awaits so in a terminal
    try:
        awaited = standing_frame().llm.acomplete("{text}", base_url=server.base_url, **keywords)
        with interrupted_when(standstill), pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(awaited)
        until = time.monotonic() + SCRIPT_S
        while llmframe.last_run()._state.ended is None and time.monotonic() < until:
            time.sleep(0.01)
        assert saved_in(tmp_path / "runs") == ANSWERED
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        (left,) = asyncio.all_tasks(loop)
        with pytest.raises(asyncio.CancelledError, match="the same call goes on from"):
            loop.run_until_complete(left)
    finally:
        loop.close()


def test_a_cancellation_that_is_repeated_at_every_turn_of_the_loop_is_one(
    server: SimulatedServer, standstill: Callable[[], bool], tmp_path: Path
) -> None:
    keywords = {"max_concurrency": IN_FLIGHT, "checkpoint": tmp_path / "runs", "model": "m", "api_key": next(keys)}

    async def main() -> None:
        task = asyncio.ensure_future(standing_frame().llm.acomplete("{text}", base_url=server.base_url, **keywords))
        while not standstill():
            await asyncio.wait({task}, timeout=0.01)
        while not task.done():  # anyio does so
            task.cancel()
            await asyncio.sleep(0)
        assert saved_in(tmp_path / "runs") == ANSWERED

    asyncio.run(main())


def test_a_run_whose_loop_is_closed_ends(
    server: SimulatedServer, standstill: Callable[[], bool], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keywords = {"max_concurrency": IN_FLIGHT, "checkpoint": tmp_path / "runs", "model": "m", "api_key": next(keys)}
    loop = asyncio.new_event_loop()

    async def main() -> None:
        task = asyncio.ensure_future(standing_frame().llm.acomplete("{text}", base_url=server.base_url, **keywords))
        while not standstill():
            await asyncio.wait({task}, timeout=0.01)

    loop.run_until_complete(main())
    caplog.clear()
    loop.close()
    del loop
    gc.collect()
    until = time.monotonic() + SCRIPT_S
    while llmframe.last_run()._state.ended is None and time.monotonic() < until:
        time.sleep(0.01)
    assert saved_in(tmp_path / "runs") == ANSWERED
    assert [record.message for record in caplog.records if "Task was destroyed" not in record.message] == []


def test_what_was_answered_before_an_interrupt_is_in_its_frame(
    server: SimulatedServer, standstill: Callable[[], bool]
) -> None:
    with interrupted_when(standstill), pytest.raises(llmframe.Interrupted) as stopped:
        ask(server, standing_frame(), max_concurrency=IN_FLIGHT)
    out = stopped.value.frame
    assert out is not None
    assert out["response"].dropna().tolist() == answers(ANSWERED)
    assert out["response_status"].tolist() == ["ok"] * ANSWERED + ["pending"] * (ROWS - ANSWERED)


def test_an_answer_that_comes_within_a_second_of_an_interrupt_is_kept(server: SimulatedServer, tmp_path: Path) -> None:
    source = frame(IN_FLIGHT, "[[sleep=0.5]] row")
    keywords: dict[str, Any] = {"checkpoint": tmp_path / "runs"}
    with (
        interrupted_when(lambda: server.stats().in_flight == IN_FLIGHT),
        pytest.raises(llmframe.Interrupted) as stopped,
    ):
        ask(server, source, **keywords)
    assert stopped.value.frame is not None
    assert (stopped.value.frame["response_status"] == "ok").all()
    assert ask(server, source, **keywords) == answers(IN_FLIGHT, "[[sleep=0.5]] row")
    assert server.stats().answered == IN_FLIGHT


def test_an_answer_that_was_being_repaired_at_an_interrupt_is_in_the_usage_and_asked_anew(
    server: SimulatedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "GRACE_S", 0.0)
    source = frame(4, "[[unfit_first=1]] [[sleep=0.3]] row")
    schema = {"type": "object", "properties": {"stars": {"type": "integer"}}, "required": ["stars"]}
    keywords: dict[str, Any] = {"checkpoint": tmp_path / "runs", "schema": schema}
    with (
        interrupted_when(lambda: server.stats().received == 8),
        pytest.raises(llmframe.Interrupted) as stopped,
    ):
        ask(server, source, **keywords)
    stats = server.wait_for(in_flight=0)
    assert stats.answered == 4
    assert stopped.value.frame is not None
    assert stopped.value.frame["response_status"].tolist() == ["pending"] * 4
    usage = llmframe.last_run().usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (stats.prompt_tokens, stats.completion_tokens)
    ask(server, source, **keywords)
    assert server.stats().answered == 4 + 8


def test_whatever_a_signal_handler_raises_stops_the_run(
    server: SimulatedServer, standstill: Callable[[], bool], tmp_path: Path
) -> None:
    def leave(number: int, frame: object) -> None:
        raise SystemExit(143)

    previous = signal.signal(signal.SIGINT, leave)
    try:
        with interrupted_when(standstill), pytest.raises(SystemExit):
            ask(server, standing_frame(), max_concurrency=IN_FLIGHT, checkpoint=tmp_path / "runs")
    finally:
        signal.signal(signal.SIGINT, previous)
    assert saved_in(tmp_path / "runs") == ANSWERED
    assert server.wait_for(in_flight=0).answered == ANSWERED


RAISED_AT = """
import asyncio, random, signal
from llmframe import loops

loops.HEARTBEAT_S = 1e-4
chance, armed, raised = random.Random(1), False, 0

def leave(number, frame):
    if armed:
        raise SystemExit(143)

async def answer():
    return "answer"

signal.signal(signal.SIGALRM, leave)
for _ in range(500):
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-4, 6e-3))
            armed = True
            loops.run(lambda: asyncio.sleep(0.003), lambda: None)
        finally:
            armed = False
    except SystemExit:
        raised += 1
print(raised > 50, loops.run(answer, lambda: None))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no timer that signals here")
def test_a_signal_handler_may_raise_at_any_moment_and_the_loop_lives_on() -> None:
    done = subprocess.run([sys.executable, "-c", RAISED_AT], capture_output=True, text=True, timeout=SCRIPT_S)
    assert done.stdout.split() == ["True", "answer"], done.stderr


@needs_sigint
def test_a_sigterm_that_is_made_a_ctrl_c_raises_in_nothing_that_it_meets() -> None:
    beats = 0

    def beat() -> None:
        nonlocal beats
        if beats == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        beats += 1  # which a handler that raises would leave out

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for what it starts in the background
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            loops.run(lambda: asyncio.sleep(60), beat)
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    assert beats > 0


def _tasks() -> set[asyncio.Task[Any]]:
    loop = loops.background_loop()

    async def look() -> set[asyncio.Task[Any]]:
        return asyncio.all_tasks() - {asyncio.current_task()}

    return asyncio.run_coroutine_threadsafe(look(), loop).result(STOPPED_S)


def test_an_interrupt_leaves_no_task_and_no_thread_behind(
    server: SimulatedServer, standstill: Callable[[], bool], tmp_path: Path
) -> None:
    ask(server, frame(ROWS), checkpoint=tmp_path / "other")
    server.reset()
    threads = {thread.name for thread in threading.enumerate()}

    with interrupted_when(standstill), pytest.raises(llmframe.Interrupted):
        ask(server, standing_frame(), max_concurrency=IN_FLIGHT, checkpoint=tmp_path / "runs")

    for thread in threading.enumerate():
        if thread.name == "llmframe-work":  # it has done its work, and may be about to end
            thread.join(STOPPED_S)
    assert {thread.name for thread in threading.enumerate()} <= threads
    assert _tasks() == set()


def test_the_handler_of_ctrl_c_is_what_it_was_after_a_call_in_a_running_loop(server: SimulatedServer) -> None:
    async def main() -> bool:
        before = signal.getsignal(signal.SIGINT)
        ask(server, frame(1))
        return signal.getsignal(signal.SIGINT) is before

    assert asyncio.run(main())


def test_a_cancelled_acomplete_has_unwound_when_it_raises(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "GRACE_S", 0.0)

    async def main() -> None:
        call = asyncio.ensure_future(
            standing_frame().llm.acomplete("{text}", model="m", base_url=server.base_url, api_key=next(keys))
        )
        await server.until(answered=ROWS - IN_FLIGHT, in_flight=IN_FLIGHT)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(main())
    assert _tasks() == set()
    assert server.wait_for(in_flight=0).answered == ROWS - IN_FLIGHT


def test_an_acomplete_that_is_cancelled_while_it_plans_holds_no_checkpoint(
    server: SimulatedServer, tmp_path: Path
) -> None:
    planning, cancelled = threading.Event(), threading.Event()

    def prompt(row: Any) -> str:
        planning.set()
        assert cancelled.wait(10)
        return str(row.text)

    async def main() -> None:
        keywords: dict[str, Any] = {"model": "m", "base_url": server.base_url, "checkpoint": tmp_path / "runs"}
        call = asyncio.ensure_future(frame(3).llm.acomplete(prompt, **keywords))
        await asyncio.get_running_loop().run_in_executor(None, planning.wait)
        call.cancel()
        asyncio.get_running_loop().call_later(0.01, cancelled.set)
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(main())
    assert os.listdir(tmp_path / "runs") == []
    ended_s = llmframe.last_run().seconds
    assert llmframe.last_run().seconds == ended_s
    assert server.stats().received == 0


def test_a_cancelled_acomplete_says_how_to_go_on_and_has_the_frame_so_far(
    server: SimulatedServer, tmp_path: Path
) -> None:
    async def main() -> asyncio.CancelledError:
        keywords = {"model": "m", "base_url": server.base_url, "checkpoint": tmp_path / "runs", "max_concurrency": 4}
        call = asyncio.ensure_future(standing_frame().llm.acomplete("{text}", api_key=next(keys), **keywords))
        await server.until(answered=ANSWERED, in_flight=IN_FLIGHT)
        call.cancel()
        with pytest.raises(asyncio.CancelledError) as cancelled:
            await call
        return cancelled.value

    error: Any = asyncio.run(main())
    assert str(error) == (
        f"cancelled ({ANSWERED} of {ROWS} rows are done; the same call goes on from {tmp_path / 'runs'})"
    )
    assert error.frame["response"].dropna().tolist() == answers(ANSWERED)


def test_a_client_of_a_loop_that_cannot_be_patched_is_told_the_way_out(server: SimulatedServer, tmp_path: Path) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def main() -> None:
        async with httpx2.AsyncClient() as own:
            client = openai.AsyncOpenAI(base_url=server.base_url, http_client=own)
            frame(3).llm.complete("{text}", model="m", client=client, checkpoint=tmp_path / "runs")

    with (
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        pytest.raises(llmframe.ConfigurationError) as told,
    ):
        runner.run(main())
    assert str(told.value).endswith("write `await df.llm.acomplete(...)`, or leave client= out")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("cancels", [1, 2])
def test_a_lock_that_comes_after_its_waiter_was_cancelled_is_released(cancels: int) -> None:
    lock = threading.Lock()

    async def main() -> None:
        lock.acquire()
        waiting = asyncio.ensure_future(hold())
        await asyncio.sleep(0.1)
        for _ in range(cancels):
            waiting.cancel()
            await asyncio.sleep(0.1)
        assert waiting.done() == (cancels == 2)  # cancelled once, it waits for the thread
        lock.release()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await asyncio.sleep(0.3)  # for the thread to take it
        assert lock.acquire(blocking=False)

    async def hold() -> None:
        async with loops.entered(lock):
            raise AssertionError("the block is not entered")

    asyncio.run(main())
