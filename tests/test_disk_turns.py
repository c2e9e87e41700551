"""The disk turns half way through a run: it stops with what it has in `.frame`, and claims nothing it has not saved."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

import llmframe
from llmframe.errors import CheckpointError
from tests.server import SimulatedServer

ROWS = 3_000
LONG = "x" * 400


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, where this user may mount one."""
    place = tmp_path / "small"
    place.mkdir()
    if sys.platform != "linux" or run("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)):
        pytest.skip("no file system can be mounted here")
    yield place
    run("umount", "-l", str(place))


def run(*command: str) -> int:
    return subprocess.run(command, capture_output=True, check=False).returncode


def fill(place: Path) -> None:
    with open(place / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def stopped(server: SimulatedServer, directory: Path, turn: Callable[[], object]) -> CheckpointError:
    """Run, and let the disk turn when something is saved."""
    server.configure(latency_s=0.02)
    frame = pd.DataFrame({"text": [f"row {number}" for number in range(ROWS)]})

    def wait_and_turn() -> None:
        server.wait_for(answered=200)
        while not list(directory.glob("part-*.parquet")):
            server.wait_for(answered=server.stats().answered + 1)
        turn()

    turning = threading.Thread(target=wait_and_turn)
    turning.start()
    with pytest.raises(CheckpointError) as caught:
        frame.llm.complete(
            "{text}", model="m", base_url=server.base_url, checkpoint=directory, progress=False, max_concurrency=16
        )
    turning.join()
    return caught.value


def check(server: SimulatedServer, error: CheckpointError) -> int:
    """Check that all that was answered is in the frame, and that the way on is from there."""
    assert error.frame is not None
    done = int((error.frame["response_status"] == "ok").sum())
    assert 0 < done < ROWS
    assert server.stats().answered - done <= 16 + 2  # in flight when it stopped
    assert "could not be saved" in str(error)
    assert "last_run().frame.llm.complete(..., where='missing')" in str(error)
    assert "the same call goes on from" not in str(error)
    server.change(latency_s=0.0)
    out = llmframe.last_run().frame.llm.complete(
        "{text}", model="m", base_url=server.base_url, where="missing", progress=False
    )
    assert (out["response_status"] == "ok").all()
    assert server.stats().answered <= ROWS + 16 + 2
    return done


def test_a_disk_that_fills(server: SimulatedServer, mounted: Path) -> None:
    error = stopped(server, mounted / "run", lambda: fill(mounted))
    assert "No space left" in str(error)
    done = check(server, error)
    saved = llmframe.read_checkpoint(mounted / "run")
    assert 0 < len(saved) < done
    assert not list((mounted / "run").glob(".part*.tmp"))


def test_a_directory_that_is_deleted(server: SimulatedServer, tmp_path: Path) -> None:
    error = stopped(server, tmp_path / "run", lambda: shutil.rmtree(tmp_path / "run"))
    check(server, error)
    assert not (tmp_path / "run").exists()


def lock(place: Path) -> bool:
    """Make a directory read-only, for root too where there is a way; whether it is."""
    if sys.platform != "win32" and os.geteuid() != 0:
        place.chmod(0o555)
        return True
    return sys.platform == "linux" and run("chattr", "+i", str(place)) == 0


def unlock(place: Path) -> None:
    if sys.platform == "win32" or os.geteuid() != 0:
        place.chmod(0o755)
    else:
        run("chattr", "-i", str(place))


@pytest.fixture
def lockable(tmp_path: Path) -> Iterator[Path]:
    """A directory that can be made read-only."""
    place = tmp_path / "run"
    place.mkdir()
    if not lock(place):
        pytest.skip("no directory can be made read-only here")
    unlock(place)
    yield place
    unlock(place)


def test_a_directory_that_becomes_read_only(server: SimulatedServer, lockable: Path) -> None:
    error = stopped(server, lockable, lambda: lock(lockable))
    assert re.search("Operation not permitted|Permission denied", str(error))
    check(server, error)
    unlock(lockable)
    assert len(llmframe.read_checkpoint(lockable)) > 0
