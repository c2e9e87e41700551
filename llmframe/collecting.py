"""Garbage collection while requests are in flight: rarer, since what a request is made of needs none."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

OBJECTS = 50_000
"""New objects before a collection; Python's own 700 (2,000 since 3.12) are those of some twenty requests in flight.

Answers come in waves of more than that. Each wave met a collection, which took what was in flight for old; and with
every so many of those, one went over all that was ever imported: a sixth of a run's time, for cycles that nobody made.
"""

_lock = threading.Lock()
_runs = 0
_before: tuple[int, int, int] = gc.get_threshold()


@contextmanager
def rare_collections() -> Iterator[None]:
    """Let new objects wait for each other, in this process, until the last run that asks for it ends."""
    global _before, _runs
    with _lock:
        _runs += 1
        found = gc.get_threshold()
        if _runs == 1:
            _before = found
            if 0 < found[0] < OBJECTS:  # 0 is what turns it off
                gc.set_threshold(OBJECTS, *found[1:])
    try:
        yield
    finally:
        with _lock:
            _runs -= 1
            if _runs == 0 and gc.get_threshold()[0] == OBJECTS:  # else somebody else has set it meanwhile
                gc.set_threshold(*_before)
