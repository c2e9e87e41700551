"""Where the answers of a checkpoint are: every part's keys, sorted, in 44 bytes an answer.

Pure. A part never changes under its name, so an index that was made for one search serves those after it too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmframe.parts import Heads

WORDS = 4  # of a digest; only a count goes by the first: that two of a billion answers share it has a chance of 3%


@dataclass(frozen=True, slots=True, eq=False)
class Hits:
    """Rows of one part that answer some of the keys that were looked for.

    Attributes
    ----------
    name : str
        The part.
    places : array of int
        Which of the keys.
    rows : array of int
        Their rows in the part, ascending.
    answered_at : array of int
        When they were answered, in microseconds since 1970.
    """

    name: str
    places: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    answered_at: npt.NDArray[np.int64]


class Index:
    """The answers that were paid for, by key, of all the parts of one checkpoint.

    Pass one to `Checkpoint.open` again and again, and each part's keys are read only once. Who brings it up to date
    holds its `lock` until it has found what it looks for: another one's list of parts may be an older one.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._parts: dict[str, _Keys] = {}

    @property
    def parts(self) -> Set[str]:
        """The names of the parts that it knows."""
        return self._parts.keys()

    def __len__(self) -> int:
        """Count the distinct answers."""
        words = [part.keys.view(np.uint64)[::WORDS] for part in self._parts.values()]
        return len(np.unique(np.concatenate(words))) if words else 0

    def add(self, name: str, heads: Heads) -> None:
        """Learn what a part holds."""
        self._parts[name] = _Keys.of(heads)

    def forget(self, names: Set[str]) -> None:
        """Leave out parts that are gone."""
        for name in names:
            self._parts.pop(name, None)

    def find(self, keys: npt.NDArray[np.void]) -> Iterator[Hits]:
        """Look for keys in each part.

        Parameters
        ----------
        keys : array of void
            SHA-256 digests; sorted ones are found several times as fast.
        """
        for name, part in self._parts.items():
            if len(part.keys):
                at = np.searchsorted(part.keys, keys)
                at[at == len(part.keys)] = 0
                places = np.flatnonzero(part.keys[at] == keys)
                at = at[places]
                order = np.argsort(part.rows[at])
                yield Hits(name, places[order], part.rows[at][order].astype(np.int64), part.answered_at[at][order])


@dataclass(frozen=True, slots=True, eq=False)
class _Keys:
    """The answers of one part, sorted by key; the newest of each."""

    keys: npt.NDArray[np.void]
    rows: npt.NDArray[np.int32]
    answered_at: npt.NDArray[np.int64]

    @classmethod
    def of(cls, heads: Heads) -> _Keys:
        rows = np.flatnonzero(heads.paid).astype(np.int32)
        rows = rows[np.argsort(heads.answered_at[rows], kind="stable")]
        rows = rows[np.argsort(heads.keys[rows], kind="stable")]
        keys = heads.keys[rows]
        newest = np.ones(len(rows), np.bool_)
        newest[:-1] = keys[1:] != keys[:-1]
        if not newest.all():  # else it would be a copy of them for nothing
            keys, rows = keys[newest], rows[newest]
        return cls(keys, rows, heads.answered_at[rows])
