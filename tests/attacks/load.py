"""A million rows in one process: the memory they take, the files they leave, and how long the finished run resumes.

    python -m tests.attacks.load --rows 1000000

The server answers after 5 ms from a process of its own; what is measured is the process that makes the call.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

import llmframe
from llmframe import runner
from tests.memory import peak_mb
from tests.server import SimulatedServer

LATENCY_S = 0.005
REPORT_S = 10.0
MB = 1e6
MOST_OVER_MB = 1000.0  # memory beyond the frame's own, at a million rows
MOST_FILES = 12  # a handful of small parts, and those that are large enough to stay as they are
MOST_RESUME_S = 60.0
LEAST_SPEED = 0.9  # rows/s of the last tenth, of those of the first
LOOK_S = 0.1


@dataclass(frozen=True, slots=True)
class Measured:
    """What one call took.

    Attributes
    ----------
    seconds, cpu_s : float
        From the call to its frame, and the process's CPU time in it.
    before_mb, peak_mb : float
        Resident memory of the process before the call, and the highest.
    frame_mb, result_mb : float
        What pandas says that the frame and the result take.
    rows, answered, requests : int
        Of the result; that are ``ok``; that were sent.
    tenths : list of (float, float)
        Rows a second in each tenth of the rows, and rows a second of this process's CPU time.
    """

    seconds: float
    cpu_s: float
    before_mb: float
    peak_mb: float
    frame_mb: float
    result_mb: float
    rows: int
    answered: int
    requests: int
    tenths: list[tuple[float, float]]

    @property
    def over_mb(self) -> float:
        """The whole process at its highest, interpreter and libraries included, less the frame that it was given."""
        return self.peak_mb - self.frame_mb


def resident_mb() -> float:
    """Give the memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / MB


def make_call(url: str, rows: int, directory: str, measured: Any) -> None:
    """Make the call in a process of its own, saying how it gets on."""
    frame = pd.DataFrame({"text": [f"row {number}: is this good or bad?" for number in range(rows)]})
    frame_mb = float(frame.memory_usage(deep=True, index=True).sum()) / MB
    before = resident_mb()
    over = threading.Event()
    course: list[tuple[int, float, float]] = []
    watcher = threading.Thread(target=_report, args=(over, Path(directory), course), daemon=True)
    watcher.start()
    began, cpu = time.monotonic(), time.process_time()
    out = llmframe.LLMFrame(frame).complete(
        "{text}", model="m", base_url=url, api_key="sk-test-not-a-secret", checkpoint=directory, progress=False
    )
    seconds = time.monotonic() - began
    cpu = time.process_time() - cpu
    peak = peak_mb()
    over.set()
    watcher.join()
    measured.put(
        Measured(
            seconds,
            cpu,
            before,
            peak,
            frame_mb,
            float(out.memory_usage(deep=True, index=True).sum()) / MB,
            len(out),
            int((out["response_status"] == "ok").sum()),
            llmframe.last_run().requests,
            _tenths(course, rows),
        )
    )


def _tenths(course: list[tuple[int, float, float]], rows: int) -> list[tuple[float, float]]:
    """Give the speed of each tenth, from the first row on."""
    asked = [moment for moment in course if moment[0]]
    marks = [next((moment for moment in asked if moment[0] >= rows * n / 10), None) for n in range(11)]
    return [
        ((end[0] - start[0]) / (end[1] - start[1]), (end[0] - start[0]) / (end[2] - start[2]))
        for start, end in itertools.pairwise(mark for mark in marks if mark is not None)
        if end[1] > start[1]
    ]


def _report(over: threading.Event, directory: Path, course: list[tuple[int, float, float]]) -> None:
    began, then, done = time.monotonic(), time.monotonic(), 0
    while not over.wait(LOOK_S):
        now, run = time.monotonic(), runner._last
        rows = 0 if run is None else run._state.rows_done
        course.append((rows, now, time.process_time()))
        if now - then < REPORT_S:
            continue
        files, size = files_in(directory)
        print(
            f"  {now - began:6.0f} s {rows:9,} rows {(rows - done) / (now - then):7,.0f} rows/s "
            f"{resident_mb():7,.0f} MB resident, {files} files, {size / MB:,.1f} MB",
            flush=True,
        )
        then, done = now, rows


def files_in(directory: Path) -> tuple[int, int]:
    """Count a checkpoint's files and their bytes."""
    sizes = []
    for path in directory.iterdir() if directory.exists() else ():
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # merged meanwhile
            continue
    return len(sizes), sum(sizes)


def in_a_process(url: str, rows: int, directory: str) -> Measured:
    """Make the call in a fresh process."""
    context = multiprocessing.get_context("spawn")
    measured = context.SimpleQueue()
    process = context.Process(target=make_call, args=(url, rows, directory, measured))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the call ended with {process.exitcode}")
    result: Measured = measured.get()
    return result


def main() -> int:
    """Run the attack from a shell; 1 where a bound was passed."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.load", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--over-mb", type=float, default=MOST_OVER_MB, help="the most memory over the frame's own")
    chosen = parser.parse_args()
    with SimulatedServer(latency_s=LATENCY_S, log=False) as server, tempfile.TemporaryDirectory() as place:
        directory = str(Path(place) / "runs")
        print(f"{chosen.rows:,} rows, a server of {LATENCY_S * 1000:.0f} ms, one process", flush=True)
        first = in_a_process(server.base_url, chosen.rows, directory)
        server_cpu_s = server.stats().cpu_s
        files, size = files_in(Path(directory))
        _say("the run", first)
        print(
            f"  {first.rows / first.seconds:,.0f} rows/s; CPU a row {first.cpu_s / first.rows * 1e3:.3f} ms here, "
            f"{server_cpu_s / first.rows * 1e3:.3f} ms the server's; {files} files, {size / MB:,.1f} MB",
            flush=True,
        )
        print("  rows/s by tenths: " + ", ".join(f"{speed:,.0f}" for speed, _ in first.tenths))
        print("  rows/s of CPU time: " + ", ".join(f"{speed:,.0f}" for _, speed in first.tenths))
        again = in_a_process(server.base_url, chosen.rows, directory)
        _say("the same call after it", again)
    by_clock, by_cpu = (first.tenths[-1][n] / first.tenths[0][n] for n in range(2))
    bounds = [
        (first.answered == chosen.rows, f"{first.answered:,} of {chosen.rows:,} rows answered"),
        (first.over_mb <= chosen.over_mb, f"{first.over_mb:,.0f} MB over the frame's own, at most {chosen.over_mb:,g}"),
        (by_clock >= LEAST_SPEED, f"the last tenth at {by_clock:.2f} of the first's rows/s, at least {LEAST_SPEED}"),
        (by_cpu >= LEAST_SPEED, f"the same in rows a second of CPU time: {by_cpu:.2f}, at least {LEAST_SPEED}"),
        (files <= MOST_FILES, f"{files} files, at most {MOST_FILES}"),
        (again.requests == 0 and again.answered == chosen.rows, f"{again.requests} requests to resume, at most 0"),
        (again.seconds <= MOST_RESUME_S, f"{again.seconds:.1f} s to resume, at most {MOST_RESUME_S:.0f}"),
        (again.over_mb <= chosen.over_mb, f"{again.over_mb:,.0f} MB to resume, at most {chosen.over_mb:,g}"),
    ]
    for held, said in bounds:
        print(f"{'kept  ' if held else 'BROKEN'} {said}")
    return 0 if all(held for held, _ in bounds) else 1


def _say(what: str, call: Measured) -> None:
    print(
        f"{what}: {call.seconds:.1f} s, {call.cpu_s:.1f} of CPU time, {call.requests:,} requests; "
        f"{call.peak_mb:,.0f} MB at the highest, "
        f"{call.over_mb:,.0f} over the frame's own {call.frame_mb:,.0f} ({call.before_mb:,.0f} before the call; "
        f"the result is {call.result_mb:,.0f})",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
