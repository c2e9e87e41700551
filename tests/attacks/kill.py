"""SIGKILL at random moments of a run with a checkpoint, each time followed by the same call.

Whatever was on disk at the kill is never asked again; what is asked again was in flight, or answered just before.

    python -m tests.attacks.kill --kills 50
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd

import llmframe
from llmframe import checkpoint
from tests.server import SimulatedServer, content_key

MODEL = "m"
JUST_BEFORE_S = 1.5  # a flush a second, and the flush itself
LATENCY_S = 0.05
CALL_S = 120.0  # the longest that a call takes on a busy machine
UNLIKE = ["response_source", "response_latency_s", "response_request_id"]  # what a run may say otherwise than another


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

    def call(self, url: str, directory: Path) -> pd.DataFrame:
        """Make the call."""
        frame = pd.DataFrame({"text": self.texts})
        with patch.object(checkpoint, "FLUSH_S", self.flush_s):
            out: pd.DataFrame = frame.llm.complete(
                "{text}",
                model=MODEL,
                base_url=url,
                api_key="sk-test-not-a-secret",
                max_concurrency=self.concurrency,
                checkpoint=directory,
                details=True,
                progress=False,
            )
        return out

    @property
    def texts(self) -> list[str]:
        """The prompts, one a row."""
        return [f"row {number} of {self.rows}" for number in range(self.rows)]


@dataclass(frozen=True, slots=True)
class Moment:
    """When to kill: so long after the call's first request, or as the n-th temporary file is being written.

    Below 0 it is the time after the process's start, whatever it has come to by then.
    """

    after_s: float | None = None
    file: int | None = None

    @classmethod
    def draw(cls, chance: random.Random, seconds: float) -> Moment:
        """Choose a moment of a call that takes so long, its start-up and its last breath included."""
        if chance.random() < 0.3:
            return cls(file=chance.randint(1, max(2, int(seconds))))
        return cls(after_s=chance.uniform(-0.1, 1.1) * seconds)


@dataclass(slots=True)
class Outcome:
    """What a kill did.

    Attributes
    ----------
    moment : Moment
        When it was meant to be.
    on_disk : int
        Answers in the checkpoint after it.
    asked_again : int
        Answered before the kill and once more after it: what it cost.
    oldest_s : float
        How long before the kill the oldest of those was answered.
    faults : list of str
        Promises broken.
    """

    moment: Moment
    on_disk: int = 0
    asked_again: int = 0
    oldest_s: float = 0.0
    faults: list[str] = field(default_factory=list)


def process_context() -> Any:
    """Give a way to start calls as processes of their own, which cost no import each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmframe"])
    return context


def undisturbed(attack: Attack, server: SimulatedServer, directory: Path) -> tuple[pd.DataFrame, float]:
    """Make the call in peace; its frame, and the seconds between its first request and its end."""
    server.reset(latency_s=LATENCY_S)
    frame = attack.call(server.base_url, directory)
    return frame, time.monotonic() - server.stats().first_request_s


def kill_once(
    attack: Attack, moment: Moment, server: SimulatedServer, directory: Path, expected: pd.DataFrame, context: Any
) -> Outcome:
    """Start the call in a process, kill that, look at the disk, and make the call again in this one."""
    server.reset(latency_s=LATENCY_S)
    outcome = Outcome(moment)
    process = context.Process(target=attack.call, args=(server.base_url, directory))
    process.start()
    _wait_for(moment, process, server, directory)
    killed_s = time.monotonic()
    if process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    process.close()
    server.wait_for(in_flight=0)

    keys = {content_key({"model": MODEL, "messages": [{"role": "user", "content": t}]}): t for t in attack.texts}
    answered_s = {
        request.text: request.received_s + LATENCY_S for request in server.requests() if request.outcome == "answered"
    }
    on_disk = _on_disk(directory)
    outcome.on_disk = len(on_disk)

    frame = attack.call(server.base_url, directory)

    times = {keys[key]: count for key, count in server.answered_by_content().items()}
    again = {text for text, count in times.items() if count > 1}
    outcome.asked_again = len(again)
    outcome.oldest_s = max((killed_s - answered_s[text] for text in again), default=0.0)
    if lost := again & on_disk:
        outcome.faults.append(f"{len(lost)} answers that were on disk were asked again: {sorted(lost)[:3]}")
    if outcome.oldest_s > JUST_BEFORE_S:
        outcome.faults.append(f"an answer {outcome.oldest_s:.2f} s old at the kill was not on disk")
    if missing := set(attack.texts) - times.keys():
        outcome.faults.append(f"{len(missing)} rows were never answered: {sorted(missing)[:3]}")
    try:
        pd.testing.assert_frame_equal(frame.drop(columns=UNLIKE), expected.drop(columns=UNLIKE))
    except AssertionError as error:
        outcome.faults.append(f"the result is not that of an undisturbed run: {error}")
    return outcome


def _wait_for(moment: Moment, process: BaseProcess, server: SimulatedServer, directory: Path) -> None:
    until = time.monotonic() + CALL_S
    if moment.file is not None:
        seen: set[str] = set()
        while len(seen) < moment.file and process.is_alive() and time.monotonic() < until:
            if directory.exists():
                seen.update(name for name in os.listdir(directory) if name.startswith(".part-"))
        return
    assert moment.after_s is not None
    if moment.after_s >= 0:
        server.wait_for(received=1, timeout_s=CALL_S)
    process.join(abs(moment.after_s))


def _on_disk(directory: Path) -> set[str]:
    """List the prompts whose answers a reader finds."""
    try:
        found = llmframe.read_checkpoint(directory)
    except llmframe.CheckpointError:  # killed before it was made
        return set()
    return set(found.loc[found["status"] == "ok", "text"].str.removeprefix("echo: "))


def main() -> int:
    """Run the attack from a shell; 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks.kill", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chance = random.Random(chosen.seed)
    attacks = [Attack(chosen.rows), Attack(chosen.rows, flush_s=0.05)]
    broken = 0
    with SimulatedServer() as server, tempfile.TemporaryDirectory() as place:
        context = process_context()
        calm = [undisturbed(attack, server, Path(place) / f"calm-{n}") for n, attack in enumerate(attacks)]
        for number in range(chosen.kills):
            attack, (expected, seconds) = attacks[number % 2], calm[number % 2]
            moment = Moment.draw(chance, seconds)
            outcome = kill_once(attack, moment, server, Path(place) / f"kill-{number}", expected, context)
            broken += bool(outcome.faults)
            print(
                f"{number + 1:3} {moment}: {outcome.on_disk} on disk, {outcome.asked_again} asked again, "
                f"the oldest {outcome.oldest_s:.2f} s; {'; '.join(outcome.faults) or 'kept'}",
                flush=True,
            )
    print(f"{chosen.kills} kills, {broken} with a promise broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
