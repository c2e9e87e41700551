"""Which parts of a checkpoint become one, and how: the merged part is written first, then the old ones are deleted.

A merge that fails, or is told to stop half way, takes nothing away: what it would have merged is still there.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmframe.errors import CheckpointError
from llmframe.origins import Origin
from llmframe.parts import NotAPart, PartWriter, renumbered
from llmframe.shelf import Shelf
from llmframe.storage import Names, Storage, writer_of
from llmframe.winners import Candidates, winners

FANOUT = 4  # parts of a size that become one; so each answer is rewritten log4(n) times, and 3 of a size stay at most
SMALL_BYTES = 256 << 10  # parts below this count as of one size: opening one costs more than reading it
WHOLE_BYTES = 32 << 20  # a part this large stays as it is: rewriting it would make no reader faster
MERGE_BYTES = 4 * WHOLE_BYTES  # the most that one merge reads, and so the most memory that its answers take
WHOLE_ROWS = 131_072  # a part of so many answers, short as they are, stays too: a merge holds the keys of all its rows
MERGE_ROWS = 2 * WHOLE_ROWS  # with so many, a merge takes no further part on
HANDFUL = 4  # the parts of its own that a closed checkpoint leaves, besides the large ones
CROWD = 64  # with more parts than this, opening a checkpoint merges those of the dead first: each slows every reader

_log = logging.getLogger("llmframe")


class Merger:
    """Merges the parts of one checkpoint: those of its own writer beside the run, and what dead writers left.

    Its methods are called by one thread at a time; `add` may start another one, which merges.

    Parameters
    ----------
    storage : Storage
        Where the parts lie.
    where : str
        What the log calls that place.
    shelf : Shelf
        Opens them.
    names : Names
        Those of the writer's parts, and of what is merged.
    """

    def __init__(self, storage: Storage, where: str, shelf: Shelf, names: Names) -> None:
        self._storage = storage
        self._where = where
        self._shelf = shelf
        self._names = names
        self._own: dict[str, int] = {}  # the writer's parts and their sizes in bytes
        self._unmergeable: set[str] = set()
        self._thread: threading.Thread | None = None
        self._told_to_stop = threading.Event()

    def add(self, name: str, size: int) -> None:
        """Take note of a part that the writer has just written, and merge where there are enough of a size.

        In a thread beside the run: answers that come meanwhile would have to wait for a merge to become durable.
        """
        self._own[name] = size
        busy = self._thread is not None and self._thread.is_alive()
        if not busy and not self._told_to_stop.is_set() and self._full_tier(self._own):
            self._thread = threading.Thread(target=self._merge_own, name="llmframe-merge")
            self._thread.start()

    def finish(self) -> None:
        """Leave a handful of the writer's parts, and merge what the dead left."""
        self._wait()
        with self._forgiving():
            self._merge_full_tiers(self._own)
            small = sorted(mergeable(self._own, self._unmergeable), key=self._own.__getitem__)
            if len(small) > HANDFUL:
                self._merge(small[: len(small) - HANDFUL + 1], self._own)
        self.merge_dead()

    def merge_dead(self) -> None:
        """Merge what writers that are gone have left, with the writer's own where the sizes fit."""
        with self._forgiving(), self._storage.housekeeping() as mine:
            if not mine:
                return
            self._storage.sweep()
            sizes = self._storage.parts()
            writers = {name: writer for name in sizes if (writer := writer_of(name)) is not None}
            dead = self._storage.dead(set(writers.values()) - {self._names.writer})
            left = {name: sizes[name] for name, writer in writers.items() if writer in dead or name in self._own}
            self._merge_full_tiers(left)

    def tell_to_stop(self) -> None:
        """Let no merge begin any more, and one that goes on end soon."""
        self._told_to_stop.set()

    def stop(self) -> None:
        """Let no merge begin any more, and wait for the end of one that goes on."""
        self.tell_to_stop()
        self._wait()

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _merge_own(self) -> None:
        with self._forgiving():
            self._merge_full_tiers(self._own)

    def _merge_full_tiers(self, sizes: dict[str, int]) -> None:
        while names := self._full_tier(sizes):
            self._merge(names, sizes)

    def _full_tier(self, sizes: Mapping[str, int]) -> list[str]:
        return full_tier(dict(sizes), self._unmergeable)  # a copy: a flush may add to them meanwhile

    def _merge(self, names: Sequence[str], sizes: dict[str, int]) -> None:
        """Write the winning rows of some parts as one part, then delete them; `sizes` is kept true."""
        candidates, origins = self._candidates(names, sizes)
        if len(candidates) < 2:
            return
        old = [each.name for each in candidates]
        chosen = [(name, rows) for name, rows, _ in winners(candidates)]
        candidates.clear()  # what follows takes memory of its own
        merged, size = self._write(chosen, origins)
        sizes[merged] = self._own[merged] = size
        # Freed memory is given back now: once this thread ends the allocator cannot reach it.
        pa.default_memory_pool().release_unused()
        for name in old:
            self._storage.delete(name)
            sizes.pop(name)
            self._own.pop(name, None)

    def _candidates(self, names: Sequence[str], sizes: dict[str, int]) -> tuple[list[Candidates], dict[Origin, int]]:
        """Read what decides of each part's rows, of as many parts as one merge takes on; and number their origins."""
        candidates: list[Candidates] = []
        origins: dict[Origin, int] = {}
        for name in names:
            if sum(len(each.rows) for each in candidates) >= MERGE_ROWS:
                break
            try:
                with self._shelf.open(name) as part:
                    if part.extra:
                        raise NotAPart(f"a later llmframe wrote {', '.join(part.extra)}")
                    if part.rows >= WHOLE_ROWS:
                        self._unmergeable.add(name)
                        continue
                    heads = part.heads()
                    for origin in part.origins:
                        origins.setdefault(origin, len(origins))
            except FileNotFoundError:
                sizes.pop(name)
                continue
            except (NotAPart, CheckpointError):
                self._unmergeable.add(name)
                continue
            candidates.append(Candidates.of(name, heads))
            self._stop_if_told()
        return candidates, origins

    def _write(
        self, chosen: Sequence[tuple[str, npt.NDArray[np.int64]]], origins: Mapping[Origin, int]
    ) -> tuple[str, int]:
        """Write rows of some parts as one; its name and size."""
        merged = self._names.new()
        with self._storage.write(merged) as file:
            with PartWriter(file, list(origins)) as writer:
                for name, rows in chosen:
                    with self._shelf.open(name) as part:
                        for table in part.take(rows):
                            writer.write(renumbered(table, [origins[origin] for origin in part.origins]))
                            self._stop_if_told()
            size = file.tell()
        return merged, size

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Let a merge fail without harm; one failure is enough for a run."""
        try:
            yield
        except _Stopped:
            pass
        except (OSError, NotAPart, CheckpointError, pa.ArrowException, MemoryError) as error:
            self._told_to_stop.set()
            _log.warning("the parts of %s are not merged: %s", self._where, error)

    def _stop_if_told(self) -> None:
        if self._told_to_stop.is_set():
            raise _Stopped


def mergeable(sizes: Mapping[str, int], unmergeable: Set[str]) -> list[str]:
    """Leave out the parts that stay as they are: the large ones, and those that are known not to be merged."""
    return [name for name, size in sizes.items() if size < WHOLE_BYTES and name not in unmergeable]


def full_tier(sizes: Mapping[str, int], unmergeable: Set[str]) -> list[str]:
    """Choose parts of one size, the smallest there are enough of, as many as one merge takes on.

    Parameters
    ----------
    sizes : mapping
        The sizes of the parts, in bytes, by their names.
    unmergeable : set of str
        Those that stay as they are.

    Returns
    -------
    list of str
        The oldest first; nothing where there are not enough of any size.
    """
    tiers: defaultdict[int, list[str]] = defaultdict(list)
    for name in sorted(mergeable(sizes, unmergeable)):
        tiers[((sizes[name] // SMALL_BYTES).bit_length() + 1) // 2].append(name)
    for _, names in sorted(tiers.items()):
        if len(names) >= FANOUT:
            totals = itertools.accumulate(sizes[name] for name in names)
            return [name for name, total in zip(names, totals, strict=True) if total <= MERGE_BYTES]
    return []


class _Stopped(Exception):
    """The run wants to end, or a merge failed before."""
