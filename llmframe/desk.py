"""The desk: what the processes of one cluster settle with each other while they work on one call.

Pure, and small: which part of the rows asks a request that several have. It lives in one place (the scheduler, or the
process itself where there is only one), and whoever is gone holds nothing there.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
"""The first 8 bytes of each key: enough to tell any number of requests apart that are asked at one time."""


class Desk:
    """One call's desk.

    Every caller names itself; `alive` says of a name whether its process is still there.
    """

    def __init__(self) -> None:
        self._claims: dict[str, tuple[str, Words]] = {}  # by part: whose it is, and its requests, sorted

    def claim(self, caller: str, part: str, words: Words, alive: Container[str]) -> npt.NDArray[np.bool_]:
        """Claim requests for a part.

        Returns
        -------
        array of bool
            Those that another part asks at the moment: they are not claimed.
        """
        for other in [name for name, (whose, _) in self._claims.items() if whose not in alive]:
            del self._claims[other]
        taken = np.zeros(len(words), np.bool_)
        for name, (_, theirs) in self._claims.items():
            if name != part and len(theirs):
                at = np.minimum(np.searchsorted(theirs, words), len(theirs) - 1)
                taken |= theirs[at] == words
        self._claims[part] = caller, np.sort(words[~taken])
        return taken

    def release(self, part: str) -> None:
        """Let go of a part's requests: their answers are in the checkpoint, or will not come."""
        self._claims.pop(part, None)


def words_of(keys: npt.NDArray[np.void]) -> Words:
    """Give the words by which the desk knows some keys."""
    return keys.view(np.uint64).reshape(-1, 4)[:, 0].copy() if len(keys) else np.empty(0, np.uint64)
