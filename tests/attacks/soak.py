"""Many runs in one process, every fault at 1 %: memory, tasks, threads, sockets and files do not grow.

    python -m tests.attacks.soak --minutes 20

Each round is another kind of call (frame, schema, await, job, interrupt, a client of the user's own, a wrong key), with
a key of its own every few rounds, so that lines are opened and closed too. What is held is counted between rounds; the
medians of the last third are held against those of the third before it.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import itertools
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import openai
import pandas as pd
import pyarrow as pa
import pytest
from pydantic import BaseModel

import llmframe
from llmframe import loops
from llmframe.transports import KEEPALIVE_S
from tests.attacks.load import files_in, resident_mb
from tests.server import SimulatedServer
from tests.server_behaviour import FAULTS

ROWS = 200
CHANCE = 0.01  # of each fault
LATENCY_S, SLOW_S, TIMEOUT_S = 0.005, 0.3, 1.0
KEYS_LAST = 5  # rounds on one key, and so on one line
REPORT_S = 30.0
WITHIN = {"objects": 0.02, "sockets": 0.15, "descriptors": 0.15, "connections": 0.15}
"""What a median may be above the other without having grown, as a share: the kept lines' windows differ."""
MEMORY_MB = 8.0  # the same for resident memory: pages that are held in part
FEW = 6  # the same for tasks, threads, files, and for sockets when all connections have been idle
M_ARENA_MAX = -8  # of glibc's malloc.h
MOST_FILES = 12  # of a checkpoint that every tenth round goes on with


class Review(BaseModel):
    stars: int
    mood: Literal["good", "bad"]
    text: str


@dataclass(frozen=True, slots=True)
class Held:
    """What the process holds between two rounds."""

    memory_mb: float
    objects: int
    tasks: int
    threads: int
    sockets: int
    descriptors: int
    connections: int
    """Open at the server."""
    temporary: int
    """Files in the directory for temporary files, and in the working directory."""

    @classmethod
    def now(cls, server: SimulatedServer, place: Path) -> Held:
        """Count."""
        gc.collect()
        _let_threads_end()
        _let_allocator_go()
        links = [link for link in map(_link, Path("/proc/self/fd").iterdir()) if link]
        return cls(
            resident_mb(),
            len(gc.get_objects()),
            len(_tasks()),
            threading.active_count(),
            sum(link.startswith("socket:") for link in links),
            len(links),
            server.stats().open_connections,
            sum(len(files) + len(names) for _, names, files in os.walk(place)),
        )


def _link(path: Path) -> str:
    with suppress(OSError):
        return os.readlink(path)
    return ""


def _let_allocator_go() -> None:
    """Give back to the system what nobody holds: how much of it is kept is the allocator's habit."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _let_threads_share_one_arena() -> None:
    """Keep glibc from giving threads arenas of their own: in 300 rounds they held 15 MB that nobody used."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


def _let_threads_end() -> None:
    for thread in threading.enumerate():
        if thread.name == "llmframe-work":
            thread.join(5.0)


def _tasks() -> set[asyncio.Task[Any]]:
    async def look() -> set[asyncio.Task[Any]]:
        return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]

    return asyncio.run_coroutine_threadsafe(look(), loops.background_loop()).result(10.0)


def _start_executor() -> None:
    """Start all threads that asyncio gives a loop to resolve names: it adds them one by one, as they are missed."""

    async def start() -> None:
        async with asyncio.timeout(30.0):
            most = min(32, (os.cpu_count() or 1) + 4)
            barrier = threading.Barrier(most)
            await asyncio.gather(*[asyncio.to_thread(barrier.wait) for _ in range(most)])

    asyncio.run_coroutine_threadsafe(start(), loops.background_loop()).result(30.0)


class Soak:
    """The calls of the rounds, each with rows that no round had before."""

    def __init__(self, server: SimulatedServer, place: Path) -> None:
        self._server = server
        self._place = place
        self._numbers = itertools.count()
        self._rounds = 0
        self.rows = 0
        self.interrupted = 0
        self.kinds: tuple[Callable[[], None], ...] = (
            self.saved_and_resumed,
            self.labels,
            self.awaited,
            self.objects,
            self.job,
            self.interrupt,
            self.sdk_client,
            self.wrong_key,
            self.unfit,
            self.one_checkpoint,
        )

    def round(self) -> str:
        """Make the next kind of call; give its name."""
        kind = self.kinds[self._rounds % len(self.kinds)]
        kind()
        self._rounds += 1
        return kind.__name__

    def _frame(self, more: str = "") -> pd.DataFrame:
        self.rows += ROWS
        return pd.DataFrame({"text": [f"row {next(self._numbers)}{more}" for _ in range(ROWS)]})

    def _keywords(self) -> dict[str, Any]:
        key = f"sk-soak-{self._rounds // KEYS_LAST:06d}"
        return {"model": "m", "base_url": self._server.base_url, "api_key": key, "progress": False} | {
            "timeout": TIMEOUT_S if self._rounds % 20 else None
        }

    def _call(self, frame: pd.DataFrame, **keywords: Any) -> pd.DataFrame:
        out: pd.DataFrame = frame.llm.complete("{text}", **(self._keywords() | keywords))
        return self._check(frame, out)

    def _check(self, frame: pd.DataFrame, out: pd.DataFrame) -> pd.DataFrame:
        assert out.index.equals(frame.index)
        bad = out[out["response_status"] != "ok"]
        assert bad.empty, bad[["response_status", "response_error"]].to_dict()
        return out

    # -- the kinds

    def saved_and_resumed(self) -> None:
        """A checkpoint of its own; the same call again asks nothing."""
        frame, runs = self._frame(), self._place / "runs"
        out = self._call(frame, checkpoint=runs)
        assert (out["response"] == "echo: " + frame["text"]).all()
        self._call(frame, checkpoint=runs)
        assert llmframe.last_run().requests == 0
        llmframe.last_run().to_html(self._place / "run.html")
        (self._place / "run.html").unlink()
        shutil.rmtree(runs)

    def labels(self) -> None:
        """A list of labels."""
        self._call(self._frame(), schema=["good", "bad"], details=True)

    def awaited(self) -> None:
        """Four calls at once in a loop of the caller's."""

        async def main() -> None:
            frames = [self._frame().head(ROWS // 4) for _ in range(4)]
            calls = [frame.llm.acomplete("{text}", **self._keywords()) for frame in frames]
            for frame, out in zip(frames, await asyncio.gather(*calls), strict=True):
                self._check(frame, out)

        asyncio.run(main())

    def objects(self) -> None:
        """A pydantic model, over the Responses API."""
        self._call(self._frame(), schema=Review, api="responses")

    def job(self) -> None:
        """Parquet to parquet."""
        source, sink = self._place / "in.parquet", self._place / "out.parquet"
        self._frame().to_parquet(source, row_group_size=50)
        result = llmframe.run(source, sink, "{text}", clean=True, **self._keywords())
        assert result.counts == {"ok": ROWS}, result
        source.unlink()
        sink.unlink()

    def interrupt(self) -> None:
        """Ctrl-C half way, and the same call after it."""
        frame, runs = self._frame(" [[sleep=0.05]]"), self._place / "runs"
        already = self._server.stats().answered

        def press() -> None:
            with suppress(TimeoutError):
                self._server.wait_for(answered=already + ROWS // 4, timeout_s=20.0)
            os.kill(os.getpid(), signal.SIGINT)

        pressing = threading.Thread(target=press)
        pressing.start()
        stopped: BaseException | None = None
        try:
            self._call(frame, checkpoint=runs, max_concurrency=8)
            pressing.join()
            time.sleep(0.1)  # too late: it comes between two lines of this
        except KeyboardInterrupt as error:
            stopped = error
        pressing.join()
        if isinstance(stopped, llmframe.Interrupted):
            assert stopped.frame is not None
            saved = llmframe.read_checkpoint(runs)["status"] == "ok"
            assert saved.sum() == (stopped.frame["response_status"] == "ok").sum()
            self.interrupted += 1
        self._call(frame, checkpoint=runs)
        shutil.rmtree(runs)

    def sdk_client(self) -> None:
        """A client of the user's own that is more than its address, and so is sent through: by turns of either kind.

        What hangs in a thread ends with the client's own timeout; nobody can call it back.
        """
        kind = (openai.OpenAI, openai.AsyncOpenAI)[self._rounds // len(self.kinds) % 2]
        client = kind(
            base_url=self._server.base_url,
            api_key=f"sk-own-{self._rounds}",
            default_query={"api-version": "1"},
            timeout=2 * TIMEOUT_S,
        )
        frame = self._frame()
        out = frame.llm.complete("{text}", model="m", client=client, progress=False, timeout=TIMEOUT_S)
        self._check(frame, out)
        if isinstance(client, openai.OpenAI):
            client.close()
        else:
            asyncio.run(client.close())

    def wrong_key(self) -> None:
        """The run ends at once, with what it has."""
        self._server.change(require_key="another")
        with pytest.raises(llmframe.EndpointError):
            self._call(self._frame(), checkpoint=self._place / "runs")
        self._server.change(require_key=None)
        shutil.rmtree(self._place / "runs")

    def unfit(self) -> None:
        """Answers that do not fit are asked again."""
        self._call(self._frame(" [[unfit_first=1]]"), schema=Review)

    def one_checkpoint(self) -> None:
        """A checkpoint that grows from round to round."""
        self._call(self._frame(), checkpoint=self._place / "one")
        files, _ = files_in(self._place / "one")
        assert files <= MOST_FILES, f"{files} files"


def grown(course: list[Held]) -> Iterator[tuple[bool, str]]:
    """Hold the last third against the one before it: whether each is no more, and the figures."""
    third = len(course) // 3
    before, after = course[third : 2 * third], course[-third:]
    for field in fields(Held):
        was, now = (statistics.median(getattr(held, field.name) for held in part) for part in (before, after))
        most = was + {"memory_mb": MEMORY_MB}.get(field.name, was * WITHIN[field.name] if field.name in WITHIN else FEW)
        yield now <= most, f"{field.name}: {was:,.0f} before, {now:,.0f} after, at most {most:,.0f}"


def main() -> int:
    """Run the soak from a shell; 1 where something grew, or a call went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    chosen = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has it ignored
    faults = {f"p_{fault}": CHANCE for fault in FAULTS}
    course: list[Held] = []
    with (
        tempfile.TemporaryDirectory() as directory,
        SimulatedServer(latency_s=LATENCY_S, slow_s=SLOW_S, log=False, **faults) as server,
    ):
        place = Path(directory)
        os.environ["TMPDIR"] = tempfile.tempdir = str(place / "tmp")
        (place / "tmp").mkdir()
        _let_threads_share_one_arena()
        # Arrow's own allocator keeps some 60 MB of what it has freed, more as threads come and go.
        pa.set_memory_pool(pa.system_memory_pool())
        soak = Soak(server, place)
        _start_executor()
        began = said = time.monotonic()
        while time.monotonic() - began < 60 * chosen.minutes:
            at = time.monotonic()
            kind = soak.round()
            course.append(Held.now(server, place))
            now = time.monotonic()
            if now - at > 60:
                print(f"  {kind} took {now - at:.0f} s", flush=True)
            if now - said > REPORT_S or len(course) == 1:
                said = now
                print(
                    f"  {now - began:5.0f} s, {len(course)} rounds, {soak.rows:,} rows: {_row(course[-1])}", flush=True
                )
        stats = server.stats()
        print(f"{len(course)} rounds, {soak.rows:,} rows, {soak.interrupted} interrupts, {stats.received:,} requests")
        met = {"refused": stats.refused, "abandoned": stats.abandoned, **stats.failed}
        print("faults met: " + ", ".join(f"{count:,} {name}" for name, count in met.items()))
        held = list(grown(course))
        time.sleep(2 * KEEPALIVE_S)  # by then every line has let go of its connections
        idle = Held.now(server, place)
        print(f"  idle: {_row(idle)}")
        held.append((idle.sockets <= FEW, f"{idle.sockets} sockets when idle, at most {FEW}"))
        held.append((soak.interrupted > 0, f"{soak.interrupted} interrupts met, at least 1"))
        held.append((idle.tasks == 0, f"{idle.tasks} tasks when idle, at most 0"))
    for kept, said_ in held:
        print(f"{'kept  ' if kept else 'BROKEN'} {said_}")
    return 0 if all(kept for kept, _ in held) else 1


def _row(held: Held) -> str:
    return ", ".join(f"{getattr(held, field.name):,.0f} {field.name}" for field in fields(Held))


if __name__ == "__main__":
    sys.exit(main())
