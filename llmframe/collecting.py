"""Garbage collection while requests are in flight: rarer, since what a request is made of needs none."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

OBJECTS = 49_999
"""New objects before a collection; Python's own 700 (2,000 since 3.12) are those of some twenty requests in flight.

Answers come in waves of more than that. Each wave met a collection, which took what was in flight for old; and with
every so many of those, one went over all that was ever imported: a sixth of a run's time, for cycles that nobody made.
It is odd, so that what somebody else sets is told from it.
"""

_lock = threading.Lock()
_runs: set[object] = set()
_before: tuple[int, int, int] = gc.get_threshold()
_raised: tuple[int, int, int] | None = None


@contextmanager
def rare_collections() -> Iterator[None]:
    """Let new objects wait for each other, in this process, until the last run that asks for it ends."""
    global _before, _raised
    run = object()
    with _lock:
        found = gc.get_threshold()
        if not _runs and found != _raised:  # else somebody put back what was found there in a run
            _before = found
            if 0 < found[0] < OBJECTS:  # 0 is what turns it off
                gc.set_threshold(OBJECTS, *found[1:])
                _raised = gc.get_threshold()
        _runs.add(run)
    try:
        yield
    finally:
        with _lock:
            _runs.discard(run)
            if not _runs:
                _give_back()


def collect_young() -> None:
    """Collect what is new, where Python would have done so; to be called now and then while requests are in flight.

    Cycles with much memory in them (a page that a validator parsed) are few objects: by their number alone they would
    wait for each other until nothing is left. What survives is little, so this takes no time worth a word; going over
    all that is old does, and is left to Python.
    """
    young, middle, _ = gc.get_count()
    if gc.get_threshold() == _raised and gc.isenabled() and young > _before[0]:
        gc.collect(1 if middle > _before[1] else 0)


def _give_back() -> None:
    if gc.get_threshold() == _raised:  # else somebody else has set it meanwhile
        gc.set_threshold(*_before)


def _start_anew() -> None:
    """Forget the parent's runs in a forked child, in which they never end."""
    global _lock
    _lock = threading.Lock()
    _runs.clear()
    _give_back()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
