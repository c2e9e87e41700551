"""The parts of a checkpoint as a reader meets them, while others write and merge.

Whatever was durable when a reading began is met in it, in one part or another. A reader makes, locks and writes
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmframe.errors import CheckpointError
from llmframe.index import Index
from llmframe.notices import warn
from llmframe.origins import Origin
from llmframe.parts import NewerFormat, NotAPart, Part, Unread, completions
from llmframe.results import Completion
from llmframe.storage import Storage, storage_at, unreadable
from llmframe.winners import Candidates, winners

_T = TypeVar("_T")


class Shelf:
    """The parts at one place, to find answers in.

    Parameters
    ----------
    storage : Storage
        Where the parts lie.
    where : str
        What messages call that place.
    index : Index, optional
        One that is kept from search to search, so that none reads again what another has read.
    """

    def __init__(self, storage: Storage, where: str, index: Index | None = None) -> None:
        self._storage = storage
        self._where = where
        self._index = index
        self._held: int | None = None
        self._skipped: set[str] = set()
        self._listed: Set[str] = frozenset()  # at the last look
        self.origins: dict[str, tuple[Origin, ...]] = {}
        """The origins of every part met so far."""

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Shelf | None:
        """Look at the checkpoint at a directory or an fsspec URL.

        Returns
        -------
        Shelf or None
            None where there is none.

        Raises
        ------
        CheckpointError
            If it is not a directory, or cannot be listed.
        """
        storage, where = storage_at(path), os.fspath(path)
        try:
            storage.parts()
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise no_directory(where) from error
        except OSError as error:
            raise _unlisted(where, error) from error
        return cls(storage, where)

    @property
    def held(self) -> int:
        """The distinct answers there were, by whomever, when it was last searched."""
        if self._held is not None:
            return self._held
        with self._indexed() as index:
            return len(index)  # counted when asked: it takes a sort

    def find(self, keys: npt.NDArray[np.void]) -> Iterator[tuple[int, Completion]]:
        """Yield the answers to some of these keys, each with the place of its key, in no set order.

        The newest answer of a key that was paid for is given; failures are not. Only what is given is decoded, so ask
        for many keys at a time.

        Parameters
        ----------
        keys : array of void
            SHA-256 digests, as `packed` gives them.

        Raises
        ------
        CheckpointError
            If a part cannot be read though it may be sound, or is of a newer format.
        """
        for places, table in self.tables(keys):
            yield from zip(places.tolist(), completions(table), strict=True)

    def tables(self, keys: npt.NDArray[np.void]) -> Iterator[tuple[npt.NDArray[np.intp], pa.Table]]:
        """Yield what `find` does, many rows at a time and laid out as `COLUMNS`, with the places of their keys."""
        order = np.argsort(keys)
        while True:
            with self._indexed() as index:
                candidates = [Candidates.of_hits(hits, order) for hits in index.find(keys[order])]
            missed: list[npt.NDArray[np.int64]] = []
            for name, rows, ids in winners(candidates):
                places, given = ids[:, 0], 0
                try:
                    with self.open(name) as part:
                        for table in part.take(rows):
                            yield places[given : given + table.num_rows], table
                            given += table.num_rows
                except (FileNotFoundError, NotAPart) as error:  # merged meanwhile, or damaged: look elsewhere
                    self.lost(name, error)
                    missed.append(places[given:])
            if not missed:
                return
            order = order[np.isin(order, np.concatenate(missed))]

    def newest(self, keys: npt.NDArray[np.void]) -> int:
        """Say when the last of the answers to these keys was given, in microseconds since 1970; 0 if there is none."""
        with self._indexed() as index:
            found = [hits.answered_at for hits in index.find(np.sort(keys))]
        return max((int(each.max()) for each in found if len(each)), default=0)

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

    @contextmanager
    def _indexed(self) -> Iterator[Index]:
        """Give an index of what is on disk now: the one that is kept, locked, or one for this search."""
        index = self._index if self._index is not None else Index()
        with index.lock:
            for name, heads in self.read(Part.heads, known=index.parts):
                index.add(name, heads)
            index.forget(index.parts - self._listed)
            self._held = len(index) if index is not self._index else None
            yield index

    def _list(self) -> Set[str]:
        try:
            self._listed = self._storage.parts().keys() - self._skipped
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointError(f"there is no checkpoint at {self._where}; check the path") from error
        except OSError as error:
            raise _unlisted(self._where, error) from error
        return self._listed


def no_directory(where: str) -> CheckpointError:
    """Build the error for a path that is something else than a directory."""
    return CheckpointError(f"{where} is not a directory, and a checkpoint is one: name another path")


def reason(error: OSError) -> str:
    """Say in words why a disk or a network refused."""
    return error.strerror or str(error) or type(error).__name__


def _unlisted(where: str, error: OSError) -> CheckpointError:
    return CheckpointError(f"the checkpoint {where} cannot be listed: {reason(error)}; try again")
