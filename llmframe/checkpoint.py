"""The checkpoint: every answer that was paid for, by the key of its request, in a directory of parquet parts.

An answer in a part that has its name is durable, and no later step of anybody (a merge, a crash in the middle of one,
a second process, a damaged neighbour) takes it away from a reader.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmframe.errors import CheckpointError
from llmframe.index import Index
from llmframe.merging import CROWD, Merger
from llmframe.origins import Origin, difference
from llmframe.parts import Row, Rows, write_rows
from llmframe.results import Completion
from llmframe.shelf import Shelf, no_directory, reason
from llmframe.storage import Names, Storage, storage_at, writer_of
from llmframe.vectors import Embeddings

__all__ = ["Checkpoint", "Origin", "remove_checkpoint"]

FLUSH_S = 1.0  # seconds between flushes: the answers of that time are all that a kill -9 can lose
FLUSH_ROWS = 1_000  # answers that make a flush due sooner: a fast endpoint gives more than that in a second
FLUSH_CHARACTERS = 64 << 20  # characters of text, or bytes of vectors, that do so too: until a flush they take memory


class Checkpoint:
    """A directory of answers, open for one run: what others left is found, what is new is added.

    `add` may run while other threads are in `flush` and `supersede`; one thread at a time may call `add`.
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

    def __init__(self, storage: Storage, where: str, origin: Origin, index: Index | None) -> None:
        self._storage = storage
        self._where = where
        self._origin = origin
        self._names = Names()
        self._shelf = Shelf(storage, where, index)
        self._merger = Merger(storage, where, self._shelf, self._names)
        self._rows: list[Row | Rows] = []
        self._characters = 0
        self._answered_at = 0
        self._timing = threading.Lock()
        self._flushed = time.monotonic()
        self._flushing = threading.Lock()

    def _claim(self) -> None:
        """Make the directory ours to write to, and see that its parts can be read."""
        try:
            self._storage.claim(self._names.writer)
        except (FileExistsError, NotADirectoryError) as error:
            raise no_directory(self._where) from error
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {self._where} cannot be written: {reason(error)}; name a directory that can be"
            ) from error
        try:
            names = [name for name, _ in self._shelf.read(lambda part: part.origins)]
            if len(names) > CROWD:
                self._merger.merge_dead()
        except BaseException:
            self._storage.release()
            raise

    @property
    def held(self) -> int:
        """The distinct answers the directory held, by whomever, when it was last searched."""
        return self._shelf.held

    def find(self, keys: npt.NDArray[np.void]) -> Iterator[tuple[int, Completion]]:
        """Yield the answers on disk to some of these keys, each with the place of its key, as `Shelf.find` does."""
        return self._shelf.find(keys)

    def tables(self, keys: npt.NDArray[np.void]) -> Iterator[tuple[npt.NDArray[np.intp], pa.Table]]:
        """Yield what `find` does, many rows at a time and laid out as `COLUMNS`, with the places of their keys."""
        return self._shelf.tables(keys)

    def differs(self) -> str | None:
        """Say what a person changed since the answers in the directory were asked for.

        Returns
        -------
        str or None
            None where there are none, and where only the rows can have changed.
        """
        theirs = [
            origin
            for name, each in self._shelf.origins.items()
            if writer_of(name) != self._names.writer
            for origin in each
        ]
        return difference(theirs, self._origin)

    def supersede(self, keys: npt.NDArray[np.void]) -> None:
        """Let the answers to come win over those on disk to these keys, though another clock was ahead of this one."""
        newest = self._shelf.newest(keys)
        with self._timing:
            self._answered_at = max(self._answered_at, newest)

    def add(self, key: bytes, completion: Completion) -> None:
        """Take an answer, to be made durable by the next `flush`."""
        self._rows.append((key, completion, self._later()))
        if isinstance(completion.text, str):
            self._characters += len(completion.text)

    def add_embeddings(self, keys: npt.NDArray[np.void], found: Embeddings) -> None:
        """Take the embeddings that one request gave, to be made durable by the next `flush`."""
        self._rows.append(Rows(keys, found, self._later()))
        self._characters += found.vectors.nbytes

    def _later(self) -> int:
        """Give the time in microseconds, or one after the last that was given: of two answers the later one wins."""
        with self._timing:
            self._answered_at = max(time.time_ns() // 1_000, self._answered_at + 1)
            return self._answered_at

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
            name = self._names.new()
            try:
                with self._storage.write(name) as file:
                    write_rows(file, rows, self._origin)
                    size = file.tell()
            except OSError as error:
                raise CheckpointError(
                    f"{_count(rows):,} answers could not be saved in {self._where}: {reason(error)}; mend that and "
                    "make the same call again: what was saved before is not asked again"
                ) from error
            del self._rows[: len(rows)]
            self._merger.add(name, size)

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
                self._merger.tell_to_stop()
            self.flush()
            if tidy:
                self._merger.finish()
        finally:
            self._merger.stop()
            self._storage.release()


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
            if writer_of(name) is not None:  # a stranger's file is not ours to delete
                storage.delete(name)
        storage.remove_if_empty()
    except OSError as error:
        raise CheckpointError(f"{where} could not be deleted: {reason(error)}") from error


def _count(rows: Sequence[Row | Rows]) -> int:
    return sum(len(row.keys) if isinstance(row, Rows) else 1 for row in rows)
