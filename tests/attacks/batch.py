"""Batch jobs under attack: 120,000 rows from end to end, and SIGKILL at every step, then the same call again.

Nothing is submitted twice, whatever a kill leaves open, and the frame is that of an undisturbed job.

    python -m tests.attacks.batch                 # 120,000 rows: three files, and memory that does not grow with them
    python -m tests.attacks.batch --rows 60000 --characters 4000
    python -m tests.attacks.batch --kills 200     # that many kills, up to three of them in one job
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import pandas as pd

import llmframe  # noqa: F401  # df.llm
from llmframe import batch_work
from tests.memory import peak_mb
from tests.server_batch import BatchServer, Trap, content_key

MODEL = "m"
POLL_S = 0.02
SETTLE_S = 0.1  # the server's lists are never late
JOB_S = 120.0  # the longest that a job of a few rows takes on a busy machine
UNLIKE = ["response_source", "response_latency_s", "response_request_id"]  # what a job may say otherwise than another
FILE_EVENTS = frozenset({"open", "os.rename", "os.remove", "os.mkdir", "os.truncate"})


@dataclass(frozen=True, slots=True)
class Step:
    """Where to kill: at the n-th request of a job, before or after the server has done it, or the n-th deed on disk."""

    kind: Literal["before", "after", "disk"]
    number: int

    def __str__(self) -> str:
        return f"{self.kind} {self.number}"


@dataclass(frozen=True, slots=True)
class Work:
    """One job, to be killed: some of its lines fail at first, and one at last."""

    name: str
    rows: int = 12

    @property
    def frame(self) -> pd.DataFrame:
        """Its rows."""
        texts = [f"{self.name} row {number}" for number in range(self.rows - 2)]
        return pd.DataFrame({"text": [*texts, f"[[status=400]] {self.name}", texts[0]]})

    def do(self, url: str, job: str, marks: Any = None, kill_at: int | None = None) -> pd.DataFrame:
        """Submit and wait, as a user's script does; count the deeds on disk, and die at one of them."""
        _watch(job, marks, kill_at)
        given: Any = {"model": MODEL, "base_url": url, "api_key": "sk-test", "job": job, "poll_s": POLL_S}
        with patch.object(batch_work, "SETTLE_S", SETTLE_S):
            made = self.frame.llm.submit_batch("{text}", details=True, progress=False, **given)
            out: pd.DataFrame = made.wait().frame()
        return out

    def paid(self, server: BatchServer) -> list[int]:
        """How often each of its texts was paid for."""
        times = server.paid()
        bodies = ({"model": MODEL, "messages": [{"role": "user", "content": text}]} for text in set(self.frame["text"]))
        return [times.get(content_key(body), 0) for body in bodies]


def _watch(job: str, marks: Any, kill_at: int | None) -> None:
    """Count what this process does to the files of a job, and kill it at one of these deeds."""
    if marks is None:
        return

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in FILE_EVENTS or not str(arguments[0]).startswith(job):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        marks[0] += 1
        if marks[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def process_context() -> Any:
    """Give a way to start jobs as processes of their own, which cost no import each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmframe", "tests.server_batch"])
    return context


def steps_of(work: Work, server: BatchServer, job: Path, context: Any) -> list[Step]:
    """Do a job in peace, in a process of its own, and list its steps."""
    server.trap()
    asked = len(server.log())
    marks = context.RawArray("i", 1)
    process = context.Process(target=work.do, args=(server.base_url, os.fspath(job), marks))
    process.start()
    process.join(JOB_S)
    assert process.exitcode == 0, process.exitcode
    requests = range(1, len(server.log()) - asked + 1)
    steps = [Step("before", number) for number in requests] + [Step("after", number) for number in requests]
    return steps + [Step("disk", number) for number in range(1, marks[0] + 1)]


def kill(work: Work, steps: Sequence[Step], server: BatchServer, job: Path, context: Any) -> list[str]:
    """Kill a job at each of these steps, and do it once more in this process; the promises broken."""
    faults: list[str] = []
    for step in steps:
        gate, marks = context.Event(), context.RawArray("i", 1)
        arguments = (work, gate, server.base_url, os.fspath(job), marks, step.number if step.kind == "disk" else None)
        process = context.Process(target=_when_let, args=arguments)
        process.start()
        if step.kind == "disk":
            server.trap()
        else:
            server.trap(Trap("", step.number, step.kind, process.pid))
        gate.set()
        process.join(JOB_S)
        if process.exitcode not in (0, -signal.SIGKILL):
            faults.append(f"the process ended with {process.exitcode}")
        process.close()
    server.trap()
    out = work.do(server.base_url, os.fspath(job))
    if (paid := Counter(work.paid(server))) != {1: work.rows - 2, 0: 1}:
        faults.append(f"texts by how often they were paid for: {dict(paid)}")
    expected = ["ok"] * (work.rows - 2) + ["failed", "ok"]
    if out["response_status"].tolist() != expected:
        faults.append(f"the statuses are {out['response_status'].tolist()}")
    echoes = [f"echo: {text}" for text in work.frame["text"]]
    if out["response"].drop(index=work.rows - 2).tolist() != echoes[:-2] + echoes[-1:]:
        faults.append(f"the answers are {out['response'].tolist()}")
    mine = json.loads((job / "job.json").read_bytes())["terms"]["id"]
    if left := [file["filename"] for file in server.files() if mine in file["filename"]]:
        faults.append(f"at the provider there are still {left}")
    if left := [path.name for path in job.iterdir() if path.name.startswith(("input", "output", "error"))]:
        faults.append(f"in the directory there are still {left}")
    return faults


def _when_let(work: Work, gate: Any, url: str, job: str, marks: Any, kill_at: int | None) -> None:
    gate.wait(JOB_S)
    work.do(url, job, marks, kill_at)


def large(rows: int, characters: int) -> int:
    """Submit so many rows and take their answers; what it took."""
    with BatchServer() as server, tempfile.TemporaryDirectory() as place:
        texts = [f"row {number}: what is to be said of it".ljust(characters, ".") for number in range(rows)]
        frame = pd.DataFrame({"text": texts})
        started = time.monotonic()
        job = frame.llm.submit_batch(
            "{text}", model=MODEL, base_url=server.base_url, api_key="sk-test", job=f"{place}/job", poll_s=0.2
        )
        submitted = time.monotonic()
        submitted_mb = peak_mb()
        job.wait()
        waited = time.monotonic()
        out = job.frame()
        taken = time.monotonic()
        print(job)
        right = bool((out["response"] == "echo: " + out["text"]).all())
        paid = Counter(server.paid().values())
        sizes = [file.stat().st_size for file in Path(place, "job").rglob("*") if file.is_file()]
        print(
            f"{rows:,} rows: {submitted - started:.1f} s to submit, {waited - submitted:.1f} s to wait, "
            f"{taken - waited:.1f} s to give the frame; peak {submitted_mb:,.0f} MB at submission, "
            f"{peak_mb():,.0f} MB at the end; "
            f"{sum(sizes) / 2**20:,.1f} MiB in {len(sizes)} files left"
        )
        print(f"every answer right: {right}; requests by how often they were paid for: {dict(paid)}")
        print(f"files left at the provider: {len(server.files())}; batches: {len(server.batches())}")
        asked = len(server.log())
        started = time.monotonic()
        frame.llm.complete(
            "{text}", model=MODEL, base_url=server.base_url, api_key="sk-test", checkpoint=f"{place}/job/answers"
        )
        seconds = time.monotonic() - started
        print(f"complete with the same arguments: {len(server.log()) - asked} requests, {seconds:.1f} s")
        good = right and paid == {1: rows} and not server.files() and len(server.log()) == asked
        print("every promise held" if good else "A PROMISE WAS BROKEN")
        return 0 if good else 1


def many_kills(kills: int, seed: int) -> int:
    """Kill jobs so many times, at random steps, up to three times each."""
    chance, context = random.Random(seed), process_context()
    broken = done = number = 0
    with BatchServer() as server, tempfile.TemporaryDirectory() as place:
        steps = steps_of(Work("calm"), server, Path(place, "calm"), context)
        print(f"a job has {Counter(step.kind for step in steps)} steps")
        while done < kills:
            number += 1
            chosen = chance.sample(steps, chance.randint(1, 3))
            faults = kill(Work(f"job {number}"), chosen, server, Path(place, f"job{number}"), context)
            done += len(chosen)
            if faults:
                broken += 1
                print(f"{', '.join(map(str, chosen))}: {'; '.join(faults)}")
    print(f"{done} kills in {number} jobs; promises broken in {broken}")
    return 1 if broken else 0


def main() -> int:
    """Run the attack from a shell; 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.batch", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=120_000)
    parser.add_argument("--characters", type=int, default=0, help="of a text, at least: 4000 fill files of 200 MB")
    parser.add_argument("--kills", type=int, help="kill so many times instead")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    return large(chosen.rows, chosen.characters) if chosen.kills is None else many_kills(chosen.kills, chosen.seed)


if __name__ == "__main__":
    sys.exit(main())
