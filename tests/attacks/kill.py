"""SIGKILL in every phase of a run with a checkpoint, each time followed by the same call.

Whatever was on disk at the kill is never asked again; what is asked again was in flight, or answered just before.

    python -m tests.attacks.kill --kills 50
    python -m tests.attacks.kill --kills 20 --store s3
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd

import llmframe
from llmframe import checkpoint
from llmframe.checkpoint import Checkpoint
from llmframe.merging import Merger
from tests.server import SimulatedServer, content_key

MODEL = "m"
JUST_BEFORE_S = 1.5  # a flush a second, and the flush itself
JUST_BEFORE_A_PUT_S = 5.0  # the same for a simulated S3, which takes a second and more for what a disk does at once
LATENCY_S = 0.05
CALL_S = 120.0  # the longest that a call takes on a busy machine
LOOK_S = 0.0002  # how often the killer looks whether the moment has come
UNLIKE = ["response_source", "response_latency_s", "response_request_id"]  # what a run may say otherwise than another

PHASES = ("start-up", "requests", "flush", "merge", "end")
MARKED = {"flush": (Checkpoint, "flush"), "merge": (Merger, "_merge"), "end": (Checkpoint, "close")}
"""The methods that are these phases."""


@dataclass(frozen=True, slots=True)
class Attack:
    """One call, to be killed.

    Attributes
    ----------
    rows : int
        Of its frame, all different.
    concurrency : int
        Requests in flight; with the server's latency it says how long the call takes.
    flush_s : float
        Seconds between flushes; fewer of them make more moments in which a flush or a merge goes on.
    """

    rows: int
    concurrency: int = 6
    flush_s: float = checkpoint.FLUSH_S

    def call(self, url: str, store: str, marks: Any = None) -> pd.DataFrame:
        """Make the call; `marks` counts how often each phase began and ended."""
        frame = pd.DataFrame({"text": self.texts})
        with patch.object(checkpoint, "FLUSH_S", self.flush_s), _marking(marks):
            out: pd.DataFrame = frame.llm.complete(
                "{text}",
                model=MODEL,
                base_url=url,
                api_key="sk-test-not-a-secret",
                max_concurrency=self.concurrency,
                checkpoint=store,
                details=True,
                progress=False,
            )
        return out

    @property
    def texts(self) -> list[str]:
        """The prompts, one a row."""
        return [f"row {number} of {self.rows}" for number in range(self.rows)]


@contextmanager
def _marking(marks: Any) -> Iterator[None]:
    """Count in memory that outlives the process how often its checkpoint began and ended a phase."""
    if marks is None:
        yield
        return

    def marked(phase: str) -> Callable[..., Any]:
        place, real = 2 * PHASES.index(phase), getattr(*MARKED[phase])

        def call(*arguments: Any, **keywords: Any) -> Any:
            marks[place] += 1
            try:
                return real(*arguments, **keywords)
            finally:
                marks[place + 1] += 1

        return call

    with ExitStack() as patches:
        for phase, (owner, name) in MARKED.items():
            patches.enter_context(patch.object(owner, name, marked(phase)))
        yield


@dataclass(frozen=True, slots=True)
class Moment:
    """When to kill: so long after a phase began for the n-th time; `start-up` begins with the process."""

    phase: str
    after_s: float
    time: int = 1

    @classmethod
    def draw(cls, chance: random.Random, seconds: float, phase: str | None = None) -> Moment:
        """Choose a moment of a call that takes so long from its first request to its end."""
        match phase or chance.choice(PHASES):
            case "start-up":
                return cls("start-up", chance.uniform(0.0, 0.15))
            case "requests":
                return cls("requests", chance.uniform(0.0, 0.9 * seconds))
            case "flush":
                return cls("flush", chance.uniform(0.0, 0.006), chance.randint(1, max(1, int(seconds))))
            case "merge":
                return cls("merge", chance.uniform(0.0, 0.012))
            case _:
                return cls("end", chance.uniform(0.0, 0.03))


@dataclass(slots=True)
class Outcome:
    """What a series of kills did.

    Attributes
    ----------
    phases : list of str
        Where each kill met its process: some of `PHASES`, or `over` where the call had ended before it.
    on_disk : int
        Answers in the checkpoint after the last kill.
    asked_again : int
        Answered before a kill and once more after it: what the kills cost.
    oldest_s : float
        How long before a kill the oldest of those was answered.
    faults : list of str
        Promises broken.
    """

    phases: list[str] = field(default_factory=list)
    on_disk: int = 0
    asked_again: int = 0
    oldest_s: float = 0.0
    faults: list[str] = field(default_factory=list)


def process_context() -> Any:
    """Give a way to start calls as processes of their own, which cost no import each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmframe"])
    return context


def undisturbed(attack: Attack, server: SimulatedServer, store: str | os.PathLike[str]) -> tuple[pd.DataFrame, float]:
    """Make the call in peace; its frame, and the seconds between its first request and its end."""
    server.reset(latency_s=LATENCY_S)
    frame = attack.call(server.base_url, os.fspath(store))
    return frame, time.monotonic() - server.stats().first_request_s


def kill(
    attack: Attack,
    moments: Sequence[Moment],
    server: SimulatedServer,
    store: str | os.PathLike[str],
    expected: pd.DataFrame,
    context: Any,
    *,
    beside: bool = False,
) -> Outcome:
    """Kill the call at each moment, one after another, look at the store, and make the call again in this process.

    Parameters
    ----------
    beside : bool
        Let another process make the same call at the same time, and live.
    """
    store = os.fspath(store)
    server.reset(latency_s=LATENCY_S)
    outcome = Outcome()
    killed_s: list[float] = []
    survivor = context.Process(target=attack.call, args=(server.base_url, store)) if beside else None
    if survivor is not None:
        survivor.start()
    on_disk: set[str] = set()
    for moment in moments:
        already = server.stats().received
        marks = context.RawArray("i", 2 * len(PHASES))
        process = context.Process(target=attack.call, args=(server.base_url, store, marks))
        process.start()
        _wait_for(moment, process, marks, server, already)
        killed_s.append(time.monotonic())
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        ended = process.exitcode == 0
        outcome.phases.append("over" if ended else _phase(marks, server.stats().received > already or beside))
        process.close()
        if survivor is None:
            server.wait_for(in_flight=0)
        found = _on_disk(store)
        if lost := on_disk - found:
            outcome.faults.append(f"{len(lost)} answers are on disk no more: {sorted(lost)[:3]}")
        on_disk = found
    if survivor is not None:
        survivor.join(CALL_S)
        if survivor.exitcode != 0:
            outcome.faults.append(f"the process beside it ended with {survivor.exitcode}")
        on_disk = _on_disk(store)
        if missing := set(attack.texts) - on_disk:
            outcome.faults.append(f"the process beside it left {len(missing)} answers out: {sorted(missing)[:3]}")

    keys = {content_key({"model": MODEL, "messages": [{"role": "user", "content": t}]}): t for t in attack.texts}
    received_s: dict[str, list[float]] = {}
    for request in server.requests():
        if request.outcome == "answered":
            received_s.setdefault(request.text, []).append(request.received_s)
    before = {keys[key]: count for key, count in server.answered_by_content().items()}
    outcome.on_disk = len(on_disk)

    frame = attack.call(server.base_url, store)

    times = {keys[key]: count for key, count in server.answered_by_content().items()}
    again = {text for text, count in times.items() if count > 1}
    outcome.asked_again = len(again)
    if lost := {text for text in on_disk if times[text] > before.get(text, 0)}:
        outcome.faults.append(f"{len(lost)} answers that were on disk were asked again: {sorted(lost)[:3]}")
    if survivor is None:
        outcome.oldest_s = max((_age_s(received_s[text], times[text], killed_s) for text in again), default=0.0)
    if outcome.oldest_s > (JUST_BEFORE_A_PUT_S if store.startswith("s3://") else JUST_BEFORE_S):
        outcome.faults.append(f"an answer {outcome.oldest_s:.2f} s old at the kill was not on disk")
    if missing := set(attack.texts) - times.keys():
        outcome.faults.append(f"{len(missing)} rows were never answered: {sorted(missing)[:3]}")
    try:
        pd.testing.assert_frame_equal(frame.drop(columns=UNLIKE), expected.drop(columns=UNLIKE))
    except AssertionError as error:
        outcome.faults.append(f"the result is not that of an undisturbed run: {error}")
    return outcome


def _age_s(received_s: Sequence[float], times: int, killed_s: Sequence[float]) -> float:
    """Give the greatest age at the next kill of an answer that was asked again; 0 of one that was still in flight.

    A busy server may answer what it has before it sees that nobody is there any more, so the request's time decides
    which kill it met.
    """
    lost = sorted(received_s)[: times - 1]  # the last answer is the one that was kept
    kills = [(at_s, min((kill_s for kill_s in killed_s if kill_s >= at_s), default=at_s)) for at_s in lost]
    return max(max(0.0, kill_s - at_s - LATENCY_S) for at_s, kill_s in kills)


def _wait_for(moment: Moment, process: BaseProcess, marks: Any, server: SimulatedServer, already: int) -> None:
    place, until = 2 * PHASES.index(moment.phase), time.monotonic() + CALL_S

    def begun() -> bool:
        match moment.phase:
            case "start-up":
                return True
            case "requests":
                return server.stats().received > already
            case _:
                return bool(marks[place] >= moment.time)

    while not begun() and process.is_alive() and time.monotonic() < until:
        time.sleep(LOOK_S)
    process.join(moment.after_s)


def _phase(marks: Any, asked: bool) -> str:
    """Say where a process was when it was killed; a flush or a merge may go on beside requests, and at the end."""
    inside = [phase for phase in PHASES if marks[2 * PHASES.index(phase)] > marks[2 * PHASES.index(phase) + 1]]
    return " + ".join(inside) or ("requests" if asked else "start-up")


def _on_disk(store: str) -> set[str]:
    """List the prompts whose answers a reader finds."""
    try:
        found = llmframe.read_checkpoint(store)
    except llmframe.CheckpointError:  # killed before it was made
        return set()
    return set(found.loc[found["status"] == "ok", "text"].str.removeprefix("echo: "))


@contextmanager
def place_for(store: str) -> Iterator[str]:
    """Give the start of the stores' paths: a directory, its URL, or a bucket of a simulated S3."""
    if store != "s3":
        with tempfile.TemporaryDirectory() as directory:
            yield Path(directory).as_uri() if store == "file" else directory
        return
    import s3fs
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    bucket = ThreadedMotoServer(port=0, verbose=False)
    bucket.start()
    host, port = bucket.get_host_and_port()
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }
    try:
        s3fs.S3FileSystem().mkdir("kills")
        yield "s3://kills"
    finally:
        bucket.stop()


def main() -> int:
    """Run the attack from a shell; 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.kill", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", choices=["directory", "file", "s3"], default="directory")
    chosen = parser.parse_args()
    chance = random.Random(chosen.seed)
    attacks = [Attack(chosen.rows), Attack(chosen.rows, flush_s=0.05)]
    broken = kills = number = 0
    met: Counter[str] = Counter()
    with SimulatedServer() as server, place_for(chosen.store) as place:
        context = process_context()
        calm = [undisturbed(attack, server, f"{place}/calm-{n}") for n, attack in enumerate(attacks)]
        while kills < chosen.kills:
            # Flushes and merges are short, so they are waited for; every third series is of two or three kills in a
            # row, and every seventh kill is of one of two processes at work in one directory.
            which = 1 if number % len(PHASES) in (2, 3) else number % 2
            attack, (expected, seconds) = attacks[which], calm[which]
            beside = number % 7 == 6
            moments = [Moment.draw(chance, seconds, PHASES[number % len(PHASES)])]
            if not beside and number % 3 == 2:
                moments += [Moment.draw(chance, seconds / 2) for _ in range(chance.randint(1, 2))]
            outcome = kill(attack, moments, server, f"{place}/kill-{number}", expected, context, beside=beside)
            broken += bool(outcome.faults)
            met.update(phase for phases in outcome.phases for phase in phases.split(" + "))
            kills += len(moments)
            number += 1
            print(
                f"{kills:3} {', '.join(outcome.phases)}{' beside another process' if beside else ''}: "
                f"{outcome.on_disk} on disk, {outcome.asked_again} asked again, "
                f"the oldest {outcome.oldest_s:.2f} s; {'; '.join(outcome.faults) or 'kept'}",
                flush=True,
            )
    print(
        f"{kills} kills ({', '.join(f'{count} in {phase}' for phase, count in met.most_common())}) in {number} series"
    )
    unmet = [phase for phase in PHASES if not met[phase]]
    print(f"promises broken in {broken} of them{f'; no kill met: {unmet}' if unmet else ''}")
    return 1 if broken or unmet else 0


if __name__ == "__main__":
    sys.exit(main())
