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
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from llmframe import read_checkpoint
from llmframe.checkpoint import Checkpoint, Origin
from llmframe.requests import packed
from llmframe.results import Completion
from tests.encoding import encode
from tests.server import SimulatedServer

ORIGIN = Origin("e", "chat", "m", "{x}", "{}")

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
    def flush(checkpoint, number):
        add(checkpoint, number)
        checkpoint.flush()
        os.write(1, b"durable")

    for number in range(3):  # processes that are gone
        checkpoint = Checkpoint.open(sys.argv[1], ORIGIN)
        flush(checkpoint, number)
        checkpoint.close(tidy=False)
    checkpoint = Checkpoint.open(sys.argv[1], ORIGIN)
    for number in range(3, 33):  # merged in the background, beside the flushes
        flush(checkpoint, number)
    add(checkpoint, 33)
    checkpoint.close()  # merges its own, then those of the dead
    os.write(1, b"durable")
""")

POWER_CUT_IN_A_RUN = textwrap.dedent("""
    import os, sys
    import pandas as pd
    import llmframe
    from llmframe import checkpoint, runner
    from llmframe.checkpoint import Checkpoint

    checkpoint.FLUSH_S = runner.FLUSH_LOOK_S = 0.02
    really_flush = Checkpoint.flush

    def flush(self):
        really_flush(self)
        os.write(1, b"durable")

    Checkpoint.flush = flush
    frame = pd.DataFrame({"text": [f"row {number}" for number in range(300)]})
    for rows in (frame.head(100), frame):
        rows.llm.complete("{text}", model="m", base_url=sys.argv[2], api_key="none", checkpoint=sys.argv[1],
                          max_concurrency=4, progress=False)
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
    """Watches what is written, synced, named and deleted by every thread, and objects to what a power cut could punish.

    A sync covers what was written, and of a directory what was named, before it began.
    """

    writes: Counter[str] = field(default_factory=Counter)
    synced: Counter[str] = field(default_factory=Counter)
    not_durable: dict[str, str] = field(default_factory=dict)
    """Parts that have their name, and whose directory was not synced since, with the thread that named them."""
    begun: dict[str, tuple[str, int, set[str]]] = field(default_factory=dict)
    """The sync that each thread is at."""
    last_named: dict[str, str] = field(default_factory=dict)
    """By thread; deleting a part needs one."""
    named: int = 0
    deleted: int = 0
    durable: int = 0

    def write(self, path: str) -> None:
        self.writes[path] += 1

    def begin_sync(self, thread: str, path: str) -> None:
        self.begun[thread] = path, self.writes[path], {n for n in self.not_durable if os.path.dirname(n) == path}

    def end_sync(self, thread: str) -> None:
        path, writes, names = self.begun.pop(thread)
        self.synced[path] = max(writes, self.synced[path])
        for name in names:
            self.not_durable.pop(name, None)

    def name(self, thread: str, old: str, new: str) -> None:
        assert self.writes[old] > 0
        assert self.synced[old] == self.writes[old], f"{new} was named before its bytes were synced"
        self.named += 1
        self.not_durable[new] = self.last_named[thread] = new

    def delete(self, thread: str, path: str) -> None:
        if path.endswith(".parquet"):
            merged = self.last_named.get(thread)
            assert merged is not None, f"{path} was deleted without a successor"
            assert merged != path
            assert merged not in self.not_durable, f"{path} was deleted before its successor was durable"
            self.deleted += 1

    def claim(self, thread: str) -> None:
        """Hear a thread say that what it has flushed is durable."""
        assert self.last_named.get(thread) not in self.not_durable, "claimed before the directory was synced"
        self.durable += 1


def test_no_recorded_order_of_syncs_can_lose_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, lock = PowerCutJudge(), threading.RLock()
    really_sync, really_replace, really_unlink, really_write = os.fsync, os.replace, os.unlink, os.write
    wrong: list[str] = []

    def me() -> str:
        return str(threading.get_ident())

    def judged(verdict: Callable[..., None], *arguments: str) -> None:
        with lock:
            try:
                verdict(*arguments)
            except AssertionError as error:  # a merge that fails is forgiven by the checkpoint, and not by this
                wrong.append(str(error))

    def sync(descriptor: int) -> None:
        status = os.fstat(descriptor)

        def is_it(path: str) -> bool:
            try:
                return os.path.samestat(status, os.stat(path))
            except FileNotFoundError:  # a merge in its own thread has deleted it meanwhile
                return False

        (path,) = filter(is_it, (str(tmp_path), *(entry.path for entry in os.scandir(tmp_path))))
        if path != str(tmp_path):
            judged(judge.write, path)
        judged(judge.begin_sync, me(), path)
        really_sync(descriptor)
        judged(judge.end_sync, me())

    def replace(old: Path, new: Path) -> None:
        judged(judge.name, me(), str(old), str(new))
        really_replace(old, new)

    def unlink(path: Path, **kwargs: Any) -> None:
        judged(judge.delete, me(), str(path))
        really_unlink(path, **kwargs)

    def write(descriptor: int, data: bytes) -> int:
        if data != b"durable":
            return really_write(descriptor, data)
        judged(judge.claim, me())
        return len(data)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path)])
    exec(POWER_CUT, {})

    assert wrong == []
    assert judge.durable == 3 + 30 + 1
    assert judge.deleted > 24, "next to nothing was merged"
    assert judge.not_durable == {}


def traced(trace: Path, *command: object) -> None:
    """Run a script with every call of every thread that a power cut may come between written down."""
    calls = "write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat"
    told = ["strace", "-f", "-y", "-o", trace, "-e", f"trace={calls}", "-e", "signal=none", sys.executable, "-c"]
    ran = subprocess.run([*map(str, told), *map(str, command)], capture_output=True, text=True, check=False)
    if "ptrace" in ran.stderr.lower() or "PTRACE" in ran.stderr:
        pytest.skip("not allowed to trace")
    assert ran.returncode == 0, ran.stderr


def judged(trace: Path, directory: Path) -> PowerCutJudge:
    """Judge a trace: a call takes effect when it begins, but a sync has its effect only when it ends."""
    judge = PowerCutJudge()
    line = re.compile(r"(?P<thread>\d+) +(?:<\.\.\. (?P<ended>\w+) resumed>|(?P<call>\w+)\()(?P<rest>.*)")
    for match in filter(None, map(line.fullmatch, trace.read_text(errors="replace").splitlines())):
        thread, rest = match["thread"], match["rest"]
        whole = "<unfinished ...>" not in rest
        if whole and re.search(r"= -1 E\w+", rest):
            judge.begun.pop(thread, None)  # it came to nothing
            continue
        match match["call"]:
            case "write" | "pwrite64" | "writev":
                path = _descriptor(rest)
                if '"durable"' in rest:
                    judge.claim(thread)
                elif path.startswith(str(directory)):
                    judge.write(path)
            case "fsync" | "fdatasync":
                judge.begin_sync(thread, _descriptor(rest))
            case "rename" | "renameat" | "renameat2":
                old, new = _quoted(rest)
                judge.name(thread, old, new)
            case "unlink" | "unlinkat":
                (gone,) = _quoted(rest)
                judge.delete(thread, gone)
        if whole and (match["call"] or match["ended"]) in ("fsync", "fdatasync"):
            judge.end_sync(thread)
    return judge


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_no_traced_run_can_lose_an_answer(server: SimulatedServer, tmp_path: Path) -> None:
    server.configure(latency_s=0.01)
    traced(tmp_path / "trace", POWER_CUT_IN_A_RUN, tmp_path / "runs", server.base_url)
    judge = judged(tmp_path / "trace", tmp_path / "runs")
    assert judge.durable > 8
    assert judge.deleted > 4, "next to nothing was merged"
    assert judge.not_durable == {}
    assert len(read_checkpoint(tmp_path / "runs")) == server.stats().answered == 300


def test_a_judge_of_traces_objects_to_a_name_before_the_bytes_and_a_deletion_before_the_name(tmp_path: Path) -> None:
    old, new, other = f"{tmp_path}/.p.tmp", f"{tmp_path}/p.parquet", f"{tmp_path}/q.parquet"
    write, sync = f'1 write(3<{old}>, "x", 1) = 1', f"1 fsync(3<{old}>) = 0"
    name, sync_name = f'1 rename("{old}", "{new}") = 0', f"1 fsync(4<{tmp_path}>) = 0"
    delete = f'1 unlink("{other}") = 0'
    torn = ["1 fsync(3<{}> <unfinished ...>", "2 getpid() = 2", "1 <... fsync resumed>) = 0"]
    sound = [write, sync, name, sync_name, delete]
    broken = {
        "not synced": [write, name, sync_name, delete],
        "synced too early": [sync, write, name, sync_name, delete],
        "the sync was at it": [write, torn[0].format(old), name.replace("1", "2", 1), torn[2], sync_name],
        "not named": [write, sync, delete, name, sync_name],
        "the name is not durable": [write, sync, name, delete, sync_name],
        "the directory's sync was at it": [write, sync, name, torn[0].format(tmp_path), delete],
        "claimed too early": [write, sync, name, '1 write(1</dev/null>, "durable", 7) = 7', sync_name],
    }
    trace = tmp_path / "trace"
    trace.write_text("\n".join(sound))
    assert judged(trace, tmp_path).deleted == 1
    for lines in broken.values():
        trace.write_text("\n".join(lines))
        with pytest.raises(AssertionError, match=r"synced|successor|durable"):
            judged(trace, tmp_path)


def test_a_part_cut_at_every_length_is_reported_by_name_and_skipped(tmp_path: Path) -> None:
    whole = encode([(bytes(32), Completion(text="kept", status="ok"), 1)], ORIGIN)
    for length in range(len(whole) + 1):
        (tmp_path / f"part-0a-{length:06d}.parquet").write_bytes(whole[:length])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = read_checkpoint(tmp_path)
    assert found["text"].tolist() == ["kept"]
    named = {match[1] for each in caught if (match := re.search(r"/(part-\S+) is skipped", str(each.message)))}
    assert named == {f"part-0a-{length:06d}.parquet" for length in range(len(whole))}


def _descriptor(arguments: str) -> str:
    match = re.match(r"\d+<([^>]*)>", arguments)
    return match[1] if match else ""


def _quoted(arguments: str) -> Iterator[str]:
    return iter(re.findall(r'"([^"]*)"', arguments))
