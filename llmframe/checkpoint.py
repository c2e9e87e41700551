"""The checkpoint: every answer that was paid for, by the key of its request, in a directory of parquet parts.

An answer in a part that has its name is durable, and no later step of anybody (a merge, a crash in the middle of one,
a second process, a damaged neighbour) takes it away from a reader.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from llmframe.errors import CheckpointError
from llmframe.index import Hits, Index
from llmframe.notices import warn
from llmframe.parts import (
    COLUMNS,
    Heads,
    NewerFormat,
    NotAPart,
    Origin,
    Part,
    PartWriter,
    Row,
    Rows,
    Unread,
    completions,
    write_rows,
)
from llmframe.results import STATUSES, Completion, text_dtype
from llmframe.storage import Storage, storage_at, unreadable
from llmframe.vectors import Embeddings

__all__ = ["Checkpoint", "Origin", "read_checkpoint"]

FLUSH_S = 1.0  # what a kill may cost
FLUSH_ROWS = 1_000  # the same for a fast endpoint
FLUSH_CHARACTERS = 64 << 20  # the same for long answers, and what they may hold of memory

FANOUT = 4  # parts of a size that become one: each answer is rewritten log4(n) times, and at most 3 of a size stay
SMALL_BYTES = 256 << 10  # parts below this are of one size: opening one costs more than reading it
WHOLE_BYTES = 32 << 20  # a part this large stays as it is: rewriting it would make no reader faster
MERGE_BYTES = 4 * WHOLE_BYTES  # what one merge takes on, and so what it may hold of memory
WHOLE_ROWS = 131_072  # so does one of so many short answers, and what a merge holds of its keys follows the rows
MERGE_ROWS = 2 * WHOLE_ROWS
ID_WORDS = 2  # of a key's four, that a merge goes by: 16 bytes tell any number of answers apart that a disk can hold
HANDFUL = 4  # the parts of its own a closed checkpoint leaves, the large ones aside
SHORT_CHARACTERS = 40  # of a parameter's value: worth showing when it changes
OTHER_ROWS = "the rows have changed since"  # what differs where all else is the same
CROWD = 64  # parts of the dead that make opening slow enough to tidy first

_PART = re.compile(r"part-(?P<writer>[0-9a-f]+)-[0-9]+\.parquet")

_log = logging.getLogger("llmframe")
_T = TypeVar("_T")


class Checkpoint:
    """A directory of answers, open for one run: what others left is found, what is new is added.

    `add` may run while another thread is in `flush`; one thread at a time may call `add`.
    """

    @classmethod
    def open(cls, path: str | os.PathLike[str], origin: Origin, index: Index | None = None) -> Checkpoint:
        """Open the checkpoint at a directory or an fsspec URL, and make it if it is missing.

        Parameters
        ----------
        path : str or path
            The directory or URL.
        origin : Origin
            What is asked now.
        index : Index, optional
            One that is kept from run to run on this directory, so that none reads again what another has read.

        Raises
        ------
        CheckpointError
            If it is not a directory, cannot be written, or holds a part of a newer format.
        """
        checkpoint = cls(storage_at(path), os.fspath(path), origin.well_formed(), index)
        checkpoint._claim()
        return checkpoint

    @classmethod
    def look(cls, path: str | os.PathLike[str]) -> Checkpoint | None:
        """Open the checkpoint at a directory or an fsspec URL to `find` in it: nothing is made, locked or written.

        Returns
        -------
        Checkpoint or None
            None where there is none.

        Raises
        ------
        CheckpointError
            If it is not a directory, cannot be read, or holds a part of a newer format.
        """
        storage, where = storage_at(path), os.fspath(path)
        try:
            storage.parts()
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise _no_directory(where) from error
        except OSError as error:
            raise CheckpointError(f"the checkpoint {where} cannot be listed: {_reason(error)}; try again") from error
        return cls(storage, where, Origin("", "", "", "", ""), None)

    def __init__(self, storage: Storage, where: str, origin: Origin, index: Index | None) -> None:
        self._storage = storage
        self._where = where
        self._origin = origin
        self._index = index
        self._writer = f"{time.time_ns() // 1_000_000:012x}{os.urandom(5).hex()}"  # sorts by age
        self._numbers = itertools.count(1)
        self._rows: list[Row | Rows] = []
        self._characters = 0
        self._answered_at = 0
        self._flushed = time.monotonic()
        self._flushing = threading.Lock()
        self._own: dict[str, int] = {}  # our parts and their sizes
        self._merger: threading.Thread | None = None
        self._no_merging = threading.Event()
        self._unmergeable: set[str] = set()
        self._held: int | None = None
        self._parts = _Parts(storage, where)

    def _claim(self) -> None:
        """Make the directory ours to write to, and see that its parts can be read."""
        try:
            self._storage.claim(self._writer)
        except (FileExistsError, NotADirectoryError) as error:
            raise _no_directory(self._where) from error
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {self._where} cannot be written: {_reason(error)}; name a directory that can be"
            ) from error
        try:
            names = [name for name, _ in self._parts.read(lambda part: part.origins)]
            if len(names) > CROWD:
                self._merge_dead()
        except BaseException:
            self._storage.release()
            raise

    @property
    def held(self) -> int:
        """The distinct answers the directory held, by whomever, when it was last searched."""
        if self._held is not None:
            return self._held
        with self._indexed() as index:
            return len(index)  # counted when asked: it takes a sort

    @property
    def unsaved(self) -> int:
        """The answers added and not yet durable."""
        return _count(self._rows[:])

    def find(self, keys: npt.NDArray[np.void]) -> Iterator[tuple[int, Completion]]:
        """Yield the answers on disk to some of these keys, each with the place of its key, in no set order.

        The newest answer of a key that was paid for is given; failures are not. Only what is given is decoded, so ask
        for many keys at a time.

        Parameters
        ----------
        keys : array of void
            SHA-256 digests, as `packed` gives them.
        """
        for places, table in self.tables(keys):
            yield from zip(places.tolist(), completions(table), strict=True)

    def tables(self, keys: npt.NDArray[np.void]) -> Iterator[tuple[npt.NDArray[np.intp], pa.Table]]:
        """Yield what `find` does, many rows at a time and laid out as `COLUMNS`, with the places of their keys."""
        order = np.argsort(keys)
        while True:
            with self._indexed() as index:
                candidates = [_Candidates.of_hits(hits, order) for hits in index.find(keys[order])]
            missed: list[npt.NDArray[np.int64]] = []
            for name, rows, ids in _winners(candidates):
                places, given = ids[:, 0], 0
                try:
                    with self._parts.open(name) as part:
                        for table in part.take(rows):
                            yield places[given : given + table.num_rows], table
                            given += table.num_rows
                except (FileNotFoundError, NotAPart) as error:  # merged meanwhile, or damaged: look elsewhere
                    self._parts.lost(name, error)
                    missed.append(places[given:])
            if not missed:
                return
            order = order[np.isin(order, np.concatenate(missed))]

    @contextmanager
    def _indexed(self) -> Iterator[Index]:
        """Give an index of what is on disk now: the one it was opened with, locked, or one for this search."""
        index = self._index if self._index is not None else Index()
        with index.lock:
            for name, heads in self._parts.read(Part.heads, known=index.parts):
                index.add(name, heads)
            index.forget(index.parts - self._parts.listed)
            self._held = len(index) if index is not self._index else None
            yield index

    def differs(self) -> str | None:
        """Say what has changed since the answers in the directory were asked for; None if there are none."""
        others = [origin for name, each in self._parts.origins.items() if self._writer not in name for origin in each]
        if not others:
            return None
        here = self._origin
        likeness = [sum(getattr(other, f.name) == getattr(here, f.name) for f in fields(Origin)) for other in others]
        newest_of_nearest = max(range(len(others)), key=lambda i: (likeness[i], i))
        return _difference(others[newest_of_nearest], here)

    def supersede(self, keys: npt.NDArray[np.void]) -> None:
        """Let the answers to come win over those on disk to these keys, though another clock was ahead of this one."""
        with self._indexed() as index:
            found = [hits.answered_at for hits in index.find(np.sort(keys))]
        self._answered_at = max([self._answered_at, *(int(each.max()) for each in found if len(each))])

    def add(self, key: bytes, completion: Completion) -> None:
        """Take an answer, to be made durable by the next `flush`."""
        # Strictly later than the one before, so that of two answers to a key the later one wins.
        self._answered_at = max(time.time_ns() // 1_000, self._answered_at + 1)
        self._rows.append((key, completion, self._answered_at))
        if isinstance(completion.text, str):
            self._characters += len(completion.text)

    def add_embeddings(self, keys: npt.NDArray[np.void], found: Embeddings) -> None:
        """Take the embeddings that one request gave, to be made durable by the next `flush`."""
        self._answered_at = max(time.time_ns() // 1_000, self._answered_at + 1)
        self._rows.append(Rows(keys, found, self._answered_at))
        self._characters += found.vectors.nbytes

    def due(self, now: float) -> bool:
        """Say whether it is time to flush, by `time.monotonic`; not while a flush is under way."""
        return (
            bool(self._rows)
            and (
                now - self._flushed >= FLUSH_S or len(self._rows) >= FLUSH_ROWS or self._characters >= FLUSH_CHARACTERS
            )
            and not self._flushing.locked()
        )

    def flush(self) -> None:
        """Make durable what was added before this call.

        Raises
        ------
        CheckpointError
            If it cannot be; then the answers stay where they were, and the next flush tries again.
        """
        with self._flushing:
            rows = self._rows[:]
            self._flushed = time.monotonic()
            if not rows:
                return
            self._characters = 0
            name = self._new_name()
            try:
                with self._storage.write(name) as file:
                    write_rows(file, rows, self._origin)
                    size = file.tell()
            except OSError as error:
                raise CheckpointError(
                    f"{_count(rows):,} answers could not be saved in {self._where}: {_reason(error)}; mend that and "
                    "make the same call again: what was saved before is not asked again"
                ) from error
            del self._rows[: len(rows)]
            self._own[name] = size
            self._merge_in_background()

    def close(self, *, tidy: bool = True) -> None:
        """Flush, leave a handful of parts, and let go of the directory.

        Parameters
        ----------
        tidy : bool, default True
            Merge parts, of the dead too. Without, the call takes no longer than the flush.

        Raises
        ------
        CheckpointError
            If the flush fails; the directory is let go of even so.
        """
        try:
            if not tidy:
                self._no_merging.set()
            self.flush()
            if tidy:
                self._wait_for_merger()
                self._merge_own(down_to=HANDFUL)
                self._merge_dead()
        finally:
            self._no_merging.set()
            self._wait_for_merger()
            self._storage.release()

    def _new_name(self) -> str:
        return f"part-{self._writer}-{next(self._numbers):06d}.parquet"

    def _merge_in_background(self) -> None:
        # Not in the flush: the answers that come meanwhile would have to wait for a merge to become durable.
        busy = self._merger is not None and self._merger.is_alive()
        if not busy and not self._no_merging.is_set() and self._full_tier(self._own):
            self._merger = threading.Thread(target=self._merge_own, name="llmframe-merge")
            self._merger.start()

    def _wait_for_merger(self) -> None:
        if self._merger is not None:
            self._merger.join()

    def _merge_own(self, down_to: int | None = None) -> None:
        with self._merging():
            while names := self._full_tier(self._own):
                self._merge(names, self._own)
            if down_to is None:  # a flush may add to them at any time
                return
            small = sorted(self._mergeable(self._own), key=self._own.__getitem__)
            if len(small) > down_to:
                self._merge(small[: len(small) - down_to + 1], self._own)

    def _merge_dead(self) -> None:
        """Merge what writers that are gone have left, with our own where the sizes fit."""
        with self._merging(), self._storage.housekeeping() as mine:
            if not mine:
                return
            self._storage.sweep()
            sizes = self._storage.parts()
            writers = {name: match["writer"] for name in sizes if (match := _PART.fullmatch(name))}
            dead = self._storage.dead(set(writers.values()) - {self._writer})
            left = {name: sizes[name] for name, writer in writers.items() if writer in dead or name in self._own}
            while names := self._full_tier(left):
                self._merge(names, left)

    def _mergeable(self, sizes: Mapping[str, int]) -> list[str]:
        return [name for name, size in sizes.items() if size < WHOLE_BYTES and name not in self._unmergeable]

    def _full_tier(self, sizes: Mapping[str, int]) -> list[str]:
        """Choose parts of one size, the smallest there are enough of, as many as one merge takes on."""
        sizes = dict(sizes)  # another thread may add to it
        tiers: defaultdict[int, list[str]] = defaultdict(list)
        for name in sorted(self._mergeable(sizes)):
            tiers[((sizes[name] // SMALL_BYTES).bit_length() + 1) // 2].append(name)
        for _, names in sorted(tiers.items()):
            if len(names) >= FANOUT:
                totals = itertools.accumulate(sizes[name] for name in names)
                return [name for name, total in zip(names, totals, strict=True) if total <= MERGE_BYTES]
        return []

    def _merge(self, names: Sequence[str], sizes: dict[str, int]) -> None:
        """Write the winning rows of some parts as one part, then delete them; `sizes` is kept true."""
        candidates: list[_Candidates] = []
        origins: dict[Origin, int] = {}
        for name in names:
            if sum(len(each.rows) for each in candidates) >= MERGE_ROWS:
                break
            try:
                with self._parts.open(name) as part:
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
            candidates.append(_Candidates.of(name, heads))
            self._stop_if_asked()
        if len(candidates) < 2:
            return
        old = [each.name for each in candidates]
        chosen = [(name, rows) for name, rows, _ in _winners(candidates)]
        candidates.clear()  # what follows takes memory of its own
        merged = self._new_name()
        with self._storage.write(merged) as file:
            with PartWriter(file, list(origins)) as writer:
                for name, rows in chosen:
                    with self._parts.open(name) as part:
                        for table in part.take(rows):
                            writer.write(_renumbered(table, [origins[origin] for origin in part.origins]))
                            self._stop_if_asked()
            size = file.tell()
        sizes[merged] = self._own[merged] = size
        # Freed memory is given back now: once this thread ends the allocator cannot reach it.
        pa.default_memory_pool().release_unused()
        for name in old:
            self._storage.delete(name)
            sizes.pop(name)
            self._own.pop(name, None)

    @contextmanager
    def _merging(self) -> Iterator[None]:
        """Let a merge fail without harm: what it would have merged is still there. One failure is enough for a run."""
        try:
            yield
        except _NoMerging:
            pass
        except (OSError, NotAPart, CheckpointError, pa.ArrowException, MemoryError) as error:
            self._no_merging.set()
            _log.warning("the parts of %s are not merged: %s", self._where, error)

    def _stop_if_asked(self) -> None:
        if self._no_merging.is_set():
            raise _NoMerging


def read_checkpoint(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read everything a checkpoint holds, as one frame.

    Parameters
    ----------
    path : str or path
        The directory or fsspec URL that was given as ``checkpoint=``.

    Returns
    -------
    pandas.DataFrame
        One row a request, in the order they were answered: ``key`` (hexadecimal), the columns that
        ``details=True`` adds, with ``text`` for the answer (``texts``, a list, under ``n=``; ``embedding`` for a
        vector), ``answered_at``, and what it was asked with: ``endpoint``, ``api``, ``asked_model``, ``template`` and
        ``parameters`` (JSON).
        A failure is shown where there is no answer.

    Raises
    ------
    CheckpointError
        If there is no such directory, or it holds a part of a newer format.

    Examples
    --------
    >>> import tempfile
    >>> from llmframe import read_checkpoint
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     answers = read_checkpoint(directory)
    >>> len(answers)
    0
    >>> answers["prompt_tokens"].dtype
    Int64Dtype()
    """
    where = os.fspath(path)
    if not where:  # as a path it would be the working directory
        raise CheckpointError("'' is no checkpoint; name its directory or URL")
    parts = _Parts(storage_at(path), where)
    while True:
        candidates = [_Candidates.of(name, heads) for name, heads in parts.read(Part.heads)]
        tables, origins = [], dict[Origin, int]()
        for name, rows, _ in _winners(candidates):
            try:
                with parts.open(name) as part:
                    numbers = [origins.setdefault(origin, len(origins)) for origin in part.origins]
                    tables += [_renumbered(table, numbers) for table in part.take(rows)]
            except (FileNotFoundError, NotAPart) as error:
                parts.lost(name, error)
                break
        else:
            return _frame(pa.concat_tables([COLUMNS.empty_table(), *tables]), list(origins))


def remove_checkpoint(path: str | os.PathLike[str]) -> None:
    """Delete the parts of a checkpoint, and its directory where nothing else is in it.

    Raises
    ------
    CheckpointError
        If they cannot be deleted.
    """
    where = os.fspath(path)
    storage = storage_at(path)
    try:
        for name in storage.parts():
            if _PART.fullmatch(name):  # a stranger's file is not ours to delete
                storage.delete(name)
        storage.remove_if_empty()
    except OSError as error:
        raise CheckpointError(f"{where} could not be deleted: {_reason(error)}") from error


class _Parts:
    """The parts of a checkpoint as a reader meets them, while others write and merge.

    Whatever was durable when a reading began is met in it, in one part or another.
    """

    def __init__(self, storage: Storage, where: str) -> None:
        self._storage = storage
        self._where = where
        self._skipped: set[str] = set()
        self.listed: Set[str] = frozenset()
        """The parts there were at the last look."""
        self.origins: dict[str, tuple[Origin, ...]] = {}
        """The origins of every part met so far."""

    def read(self, read: Callable[[Part], _T], known: Set[str] = frozenset()) -> Iterator[tuple[str, _T]]:
        """Read something of every part, each once, the oldest first; those of which it is known are left out."""
        met: set[str] = set(known)
        vanished = True
        while vanished:
            vanished = False
            for name in sorted(self._list() - met):
                met.add(name)
                try:
                    with self.open(name) as part:
                        self.origins[name] = part.origins
                        found = read(part)
                except FileNotFoundError:  # merged meanwhile, so that its rows are in a part not met yet
                    vanished = True
                except NotAPart as error:
                    self.lost(name, error)
                else:
                    yield name, found

    @contextmanager
    def open(self, name: str) -> Iterator[Part]:
        """Open one part.

        `FileNotFoundError` if it is gone, `NotAPart` if it is none, `CheckpointError` if it cannot be read now.
        """
        try:
            with self._storage.open(name) as file:
                yield Part(file)
        except PermissionError as error:  # another user's, or what a store says of a clock or a token: it may pass
            raise unreadable(f"{self._where}/{name}", error) from error
        except NewerFormat as error:
            raise CheckpointError(f"{self._where}/{name} cannot be read: {error}") from None
        except Unread as error:
            raise unreadable(f"{self._where}/{name}", error) from error.__cause__

    def lost(self, name: str, error: FileNotFoundError | NotAPart) -> None:
        """Warn of a part that is none, once, and never open it again."""
        if isinstance(error, NotAPart) and name not in self._skipped:
            self._skipped.add(name)
            warn(f"{self._where}/{name} is skipped: {error}; what it may have answered is asked again; move it away")

    def _list(self) -> Set[str]:
        try:
            self.listed = self._storage.parts().keys() - self._skipped
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(f"there is no checkpoint at {self._where}; check the path") from error
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {self._where} cannot be listed: {_reason(error)}; try again"
            ) from error
        return self.listed


@dataclass(frozen=True, slots=True, eq=False)
class _Candidates:
    """Rows of one part that may be the ones to give back: those of one `ids` row stand against each other."""

    name: str
    rows: npt.NDArray[np.integer[Any]]
    ids: npt.NDArray[Any]
    paid: npt.NDArray[np.bool_]
    answered_at: npt.NDArray[np.int64]

    @classmethod
    def of(cls, name: str, heads: Heads) -> _Candidates:
        ids = _words(heads.keys)[:, :ID_WORDS].copy()  # so that the keys themselves can be let go of
        return cls(name, np.arange(len(ids), dtype=np.int32), ids, heads.paid, heads.answered_at)

    @classmethod
    def of_hits(cls, hits: Hits, places: npt.NDArray[np.intp]) -> _Candidates:
        paid = np.ones(len(hits.rows), np.bool_)
        return cls(hits.name, hits.rows, places[hits.places][:, None], paid, hits.answered_at)


def _winners(candidates: Sequence[_Candidates]) -> Iterator[tuple[str, npt.NDArray[np.int64], npt.NDArray[Any]]]:
    """Choose one row for each id: the newest that was paid for, else the newest. Yield part, rows and their ids."""
    won = _won(candidates) if candidates else np.empty(0, np.bool_)
    start = 0
    for each in candidates:
        mine = won[start : start + len(each.rows)]
        start += len(each.rows)
        if mine.any():
            yield each.name, each.rows[mine].astype(np.int64), each.ids[mine]


def _won(candidates: Sequence[_Candidates]) -> npt.NDArray[np.bool_]:
    """Say of every row, of one candidate after the other, whether it is the one of its id."""
    ids = np.concatenate([each.ids for each in candidates])
    paid = np.concatenate([each.paid for each in candidates])
    answered_at = np.concatenate([each.answered_at for each in candidates])
    order = np.lexsort((answered_at, paid, *ids.T))
    last = np.ones(len(order), np.bool_)
    last[:-1] = False
    for column in ids.T:  # one by one: whole rows at a time would take more memory
        ordered = column[order]
        last[:-1] |= ordered[1:] != ordered[:-1]
    won = np.zeros(len(order), np.bool_)
    won[order[last]] = True
    return won


def _words(keys: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    """See digests as rows of four integers, which sort fast."""
    return keys.view(np.uint64).reshape(-1, 4)


def _renumbered(table: pa.Table, numbers: Sequence[int]) -> pa.Table:
    """Point each row to its origin's number in another part."""
    index = COLUMNS.get_field_index("origin")
    old = table["origin"].to_numpy(zero_copy_only=False)  # floats where one is null
    known = (old >= 0) & (old < len(numbers))
    new = np.asarray(numbers or [0], np.int32)[np.where(known, old, 0).astype(np.int64)]
    return table.set_column(index, COLUMNS.field(index), pa.array(new, pa.int32(), mask=~known))


def _difference(then: Origin, now: Origin) -> str:
    """Say in words what a person changed between two origins."""
    said = [
        f"the {name} was {getattr(then, name)}, now {getattr(now, name)}"
        for name in ("endpoint", "api", "model")
        if getattr(then, name) != getattr(now, name)
    ]
    if then.template != now.template:
        said.append("the prompt has changed since")
    if then.parameters != now.parameters:
        old, new = _parameters(then), _parameters(now)
        names = sorted(old.keys() | new.keys())
        said += [_parameter(name, old, new) for name in names if old.get(name) != new.get(name)]
    return "; ".join(said) or OTHER_ROWS


def _parameters(origin: Origin) -> dict[str, object]:
    try:
        read = json.loads(origin.parameters)
    except ValueError:  # what is on disk need not be ours
        return {}
    return read if isinstance(read, dict) else {}


def _parameter(name: str, old: Mapping[str, object], new: Mapping[str, object]) -> str:
    was, now = (json.dumps(each[name]) if name in each else "not set" for each in (old, new))
    if max(len(was), len(now)) > SHORT_CHARACTERS:
        return f"{name} has changed since"
    return f"{name} was {was}, now {now}"


def _frame(table: pa.Table, origins: Sequence[Origin]) -> pd.DataFrame:
    text = text_dtype()
    dtypes = {pa.string(): text, pa.int64(): pd.Int64Dtype(), pa.float64(): pd.Float64Dtype()}
    table = table.sort_by("answered_at")
    plain = table.drop_columns(["key", "texts", "embedding", "origin"])
    frame: pd.DataFrame = plain.to_pandas(types_mapper=dtypes.get)
    frame.insert(0, "key", pd.Series([key.hex() for key in table["key"].to_pylist()], dtype=text))
    frame.insert(3, "texts", pd.Series(table["texts"].to_pylist(), dtype=object))
    vectors = [_vector(raw) for raw in table["embedding"].to_pylist()]
    frame.insert(len(frame.columns) - 1, "embedding", pd.Series(vectors, dtype=object))
    frame["status"] = pd.Categorical(frame["status"], categories=list(STATUSES))
    codes = table["origin"].fill_null(-1).to_numpy()
    for field in fields(Origin):
        values = [getattr(origin, field.name) for origin in origins]
        categories = pd.Index(sorted(set(values)), dtype=text)
        places = categories.get_indexer([*values, None])  # the last, -1, is where a code of -1 points
        name = "asked_model" if field.name == "model" else field.name
        frame[name] = pd.Categorical.from_codes(places[codes], categories=categories)
    return frame


def _vector(raw: bytes | None) -> npt.NDArray[np.float32] | None:
    return None if raw is None else np.frombuffer(raw[: len(raw) // 4 * 4], "<f4")


def _no_directory(where: str) -> CheckpointError:
    return CheckpointError(f"{where} is not a directory, and a checkpoint is one: name another path")


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _count(rows: Sequence[Row | Rows]) -> int:
    return sum(len(row.keys) if isinstance(row, Rows) else 1 for row in rows)


class _NoMerging(Exception):
    """The run wants to end, or a merge failed before."""
