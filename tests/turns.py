"""An endpoint that turns half way through a run, for what an interrupt may find a run waiting for.

The run is made elsewhere (a script, a kernel); the code here is put before it there, and steers it from here.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from tests.server import SimulatedServer

TURNS = ("retry after a minute", "down", "gone")
ROWS = 200
STOPPED_S = 5.0 if "PYTEST_XDIST_WORKER" in os.environ else 2.0
"""From an interrupt to the end of a cell or a script: 2 s, and more where tests share the processors with others."""
MET_S = 30.0  # from the turn until the run has met it, on a machine that is busy with other tests

WATCH = """
import pathlib, threading, time
import llmframe
from llmframe import loops

def watch(flag):
    \"\"\"Touch a file when the run that comes next has met a failure, and has what was on its way before.\"\"\"
    before = llmframe.runner._last
    def met():
        if llmframe.runner._last is before:
            return False
        state = llmframe.last_run()._state
        return state.tally.failures and not state.pacer.in_flight  # the tally's own is of the last tick
    def look():
        while not met():
            time.sleep(0.01)
        pathlib.Path(flag).touch()
    threading.Thread(target=look, name="watch", daemon=True).start()

def left_behind():
    \"\"\"Name the tasks and threads of llmframe's that are there while no run is.\"\"\"
    import asyncio
    async def tasks():
        return [task.get_name() for task in asyncio.all_tasks() - {asyncio.current_task()}]
    for thread in threading.enumerate():
        if thread.name == "llmframe-work":  # it has done its work, and may be about to end
            thread.join(2.0)
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("llmframe-")]
    return names + asyncio.run_coroutine_threadsafe(tasks(), loops.background_loop()).result(2.0)
"""


def slow(server: SimulatedServer) -> None:
    """Let a run of `ROWS`, four in flight, take a second or two."""
    server.reset(latency_s=0.02)


def turn(server: SimulatedServer, how: str, flag: Path) -> int:
    """Turn when some rows are answered, and wait until the run has met it; give how many are, where that is known."""
    server.wait_for(answered=20)
    if how == "retry after a minute":
        server.change(status_all=429, retry_after="seconds", retry_after_s=60.0)
    elif how == "down":
        server.change(status_all=503)
    else:
        server.kill()
    until = time.monotonic() + MET_S
    while not flag.exists():
        assert time.monotonic() < until, "the run has not met it"
        time.sleep(0.01)
    return server.stats().answered if server.running else -1


def mend(server: SimulatedServer) -> None:
    """Answer again, with all counts at nothing."""
    if not server.running:
        server.start()
    server.reset()
