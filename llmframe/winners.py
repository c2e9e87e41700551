"""Which row of a key is given back: the newest that was paid for, else the newest.

Pure. Readers and merges choose alike, so that no merge changes what is given back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmframe.index import Hits
from llmframe.parts import Heads

ID_WORDS = 2  # the words of a key, of its four, that rows are told apart by: 16 bytes do for all that a disk can hold


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Rows of one part that may be the ones to give back.

    Attributes
    ----------
    name : str
        The part.
    rows : array of int
        Their rows in the part, ascending.
    ids : array
        A row of integers each; rows with the same stand against each other.
    paid : array of bool
        Whether they were paid for.
    answered_at : array of int
        When they were answered, in microseconds since 1970.
    """

    name: str
    rows: npt.NDArray[np.integer[Any]]
    ids: npt.NDArray[Any]
    paid: npt.NDArray[np.bool_]
    answered_at: npt.NDArray[np.int64]

    @classmethod
    def of(cls, name: str, heads: Heads) -> Candidates:
        """Take all rows of a part, told apart by their keys."""
        ids = _words(heads.keys)[:, :ID_WORDS].copy()  # so that the keys themselves can be let go of
        return cls(name, np.arange(len(ids), dtype=np.int32), ids, heads.paid, heads.answered_at)

    @classmethod
    def of_hits(cls, hits: Hits, places: npt.NDArray[np.intp]) -> Candidates:
        """Take what an index found, told apart by the `places` of the keys that were looked for."""
        paid = np.ones(len(hits.rows), np.bool_)
        return cls(hits.name, hits.rows, places[hits.places][:, None], paid, hits.answered_at)


def winners(candidates: Sequence[Candidates]) -> Iterator[tuple[str, npt.NDArray[np.int64], npt.NDArray[Any]]]:
    """Choose one row for each id. Yield part, rows and their ids."""
    won = _won(candidates) if candidates else np.empty(0, np.bool_)
    start = 0
    for each in candidates:
        mine = won[start : start + len(each.rows)]
        start += len(each.rows)
        if mine.any():
            yield each.name, each.rows[mine].astype(np.int64), each.ids[mine]


def _won(candidates: Sequence[Candidates]) -> npt.NDArray[np.bool_]:
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
