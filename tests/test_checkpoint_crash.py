"""The checkpoint under attack by real means: SIGKILL, other processes, and the order of system calls at a power cut."""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llmframe.checkpoint import Checkpoint, Origin, read_checkpoint
from llmframe.requests import packed

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

SHARED = textwrap.dedent("""
    import hashlib, os, sys
    from llmframe.checkpoint import Checkpoint, Origin
    from llmframe.requests import packed
    from llmframe.results import Completion

    ORIGIN = Origin("e", "chat", "m", "{x}", "{}")

    def add(checkpoint, number):
        key = hashlib.sha256(str(number).encode()).digest()
        checkpoint.add(key, Completion(text=f"answer {number}", status="ok"))
""")

# An interpreter that forks a writer a line, so that thirty kills do not cost thirty imports.
NURSERY = SHARED + textwrap.dedent("""
    def write(path, number):
        while True:
            checkpoint = Checkpoint.open(path, ORIGIN)
            for _ in range(12):  # flushes; enough for two merges of merges
                for _ in range(25):
                    add(checkpoint, number)
                    number += 1
                checkpoint.flush()
                os.write(1, b"%d durable\\n" % number)
            checkpoint.close()

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            write(sys.argv[1], int(line))
        os.write(1, b"%d born\\n" % child)
        os.waitpid(child, 0)
        os.write(1, b"0 dead\\n")
""")

RIVAL = SHARED + textwrap.dedent("""
    import time
    start, until = int(sys.argv[2]), time.monotonic() + float(sys.argv[3])
    number = start
    while time.monotonic() < until:
        checkpoint = Checkpoint.open(sys.argv[1], ORIGIN)
        for _ in range(10):
            for _ in range(10):
                add(checkpoint, number)
                number += 1
            checkpoint.flush()
        mine = range(start, number)
        keys = packed(hashlib.sha256(str(n).encode()).digest() for n in mine)
        found = {mine[place]: answer for place, answer in checkpoint.find(keys)}
        assert found.keys() == set(mine), f"{len(mine) - len(found)} answers are gone"
        assert all(found[n].text == f"answer {n}" for n in found)
        checkpoint.close()
    print(number)
""")

POWER_CUT = SHARED + textwrap.dedent("""
    number = 0
    for _ in range(5):
        checkpoint = Checkpoint.open(sys.argv[1], ORIGIN)
        add(checkpoint, number)
        number += 1
        checkpoint.close(tidy=False)
    Checkpoint.open(sys.argv[1], ORIGIN).close()  # merges the five in this, the traced, thread
""")


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # a process that forks has one thread
    )


def found(path: Path, numbers: set[int]) -> set[int]:
    """The numbers whose answers are there; every one must be the right one."""
    checkpoint = Checkpoint.open(path, Origin("e", "chat", "m", "{x}", "{}"))
    asked = sorted(numbers)
    keys = packed(hashlib.sha256(str(number).encode()).digest() for number in asked)
    answers = {asked[place]: answer for place, answer in checkpoint.find(keys)}
    checkpoint.close()
    assert all(answer.text == f"answer {number}" for number, answer in answers.items())
    return set(answers)


@posix
def test_thirty_kills_at_random_moments_lose_nothing_that_was_durable(tmp_path: Path) -> None:
    chance = random.Random(5)
    durable: set[int] = set()
    first = 0
    with start(NURSERY, tmp_path) as nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        for _ in range(30):
            nursery.stdin.write(f"{first}\n")
            nursery.stdin.flush()
            last, killer = first, None
            for line in nursery.stdout:
                number, what = line.split()
                if what == "born":
                    killer = threading.Timer(chance.uniform(0.0, 0.4), os.kill, [int(number), signal.SIGKILL])
                    killer.start()
                elif what == "durable":
                    last = int(number)
                else:
                    break
            assert killer is not None
            killer.join()
            durable |= set(range(first, last))
            first = last + 1000

            assert found(tmp_path, durable) == durable
        nursery.stdin.close()

    assert len(durable) > 1000, "the writers wrote next to nothing"
    assert not list(tmp_path.glob(".*")), "leftovers of the dead"
    assert len(list(tmp_path.iterdir())) <= 12
    assert len(read_checkpoint(tmp_path)) >= len(durable)


def test_processes_that_write_and_merge_in_one_directory_lose_nothing(tmp_path: Path) -> None:
    rivals = [start(RIVAL, tmp_path, first, 3) for first in (0, 10**6, 2 * 10**6)]
    ends = [rival.communicate()[0] for rival in rivals]

    assert [rival.returncode for rival in rivals] == [0, 0, 0]
    numbers = {
        number for first, end in zip((0, 10**6, 2 * 10**6), ends, strict=True) for number in range(first, int(end))
    }
    assert found(tmp_path, numbers) == numbers


# The order of system calls: what a power cut may find


@dataclass
class PowerCutJudge:
    """Watches what is written, synced, named and deleted, and objects to an order that a power cut could punish."""

    size: dict[str, int] = field(default_factory=dict)
    synced: dict[str, int] = field(default_factory=dict)
    named_but_not_synced: set[str] = field(default_factory=set)
    named: int = 0
    deleted: int = 0

    def wrote(self, path: str, size: int) -> None:
        self.size[path] = self.size.get(path, 0) + size

    def sync(self, path: str) -> None:
        self.synced[path] = self.size.get(path, 0)
        self.named_but_not_synced = {name for name in self.named_but_not_synced if os.path.dirname(name) != path}

    def name(self, old: str, new: str) -> None:
        assert self.size[old] > 0
        assert self.synced.get(old) == self.size[old], f"{new} was named before its bytes were synced"
        self.named += 1
        self.named_but_not_synced.add(new)

    def delete(self, path: str) -> None:
        if path.endswith(".parquet"):
            assert not self.named_but_not_synced, f"{path} was deleted before its successor was durable"
            self.deleted += 1


def test_no_recorded_order_of_syncs_can_lose_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = PowerCutJudge()
    really_sync, really_replace, really_unlink = os.fsync, os.replace, os.unlink

    def sync(descriptor: int) -> None:
        really_sync(descriptor)
        status = os.fstat(descriptor)
        for path in (str(tmp_path), *map(str, tmp_path.iterdir())):
            if os.path.samestat(status, os.stat(path)):
                judge.size[path] = status.st_size
                judge.sync(path)

    def replace(old: Path, new: Path) -> None:
        judge.size[str(old)] = os.stat(old).st_size
        really_replace(old, new)
        judge.name(str(old), str(new))

    def unlink(path: Path, **kwargs: object) -> None:
        really_unlink(path, **kwargs)
        judge.delete(str(path))

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path)])
    exec(POWER_CUT, {})

    assert (judge.named, judge.deleted) == (6, 5)


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_no_traced_order_of_system_calls_can_lose_an_answer(tmp_path: Path) -> None:
    path, trace = tmp_path / "runs", tmp_path / "trace"
    calls = "write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat"
    command = ["strace", "-y", "-o", trace, "-e", f"trace={calls}", sys.executable, "-c", POWER_CUT, path]
    ran = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if "ptrace" in ran.stderr.lower():
        pytest.skip("not allowed to trace")
    assert ran.returncode == 0, ran.stderr

    judge = PowerCutJudge()
    for call, arguments, result in re.findall(r"^(\w+)\((.*)\)\s+= (\d+)", trace.read_text(), re.MULTILINE):
        match call:
            case "write" | "pwrite64" | "writev":
                judge.wrote(_descriptor(arguments), int(result))
            case "fsync" | "fdatasync":
                judge.sync(_descriptor(arguments))
            case "rename" | "renameat" | "renameat2":
                old, new = _quoted(arguments)
                judge.name(old, new)
            case _:
                (gone,) = _quoted(arguments)
                judge.delete(gone)

    assert (judge.named, judge.deleted) == (6, 5)


def _descriptor(arguments: str) -> str:
    match = re.match(r"\d+<([^>]*)>", arguments)
    return match[1] if match else ""


def _quoted(arguments: str) -> Iterator[str]:
    return iter(re.findall(r'"([^"]*)"', arguments))
