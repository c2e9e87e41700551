"""What it means that a server fails many requests: it is full, or fails by chance, or neither of the two.

Pure. Some servers say by a 500, a 503 or a reset that all their slots are taken (Ray Serve, BentoML, nginx and Ollama's
queue say 503): those requests fail that are sent beside more others. A fault by chance (a backend that is gone, "the
model is overloaded") does not ask how many there are, and sending less does not mend it. In either case some of what is
sent after a failure is answered; in an outage nothing is.
"""

from __future__ import annotations

from collections import deque

LATELY = 32  # how many last attempts are the present
SPELL = (
    128  # how many last attempts are a spell: answers and failures come in bunches, so the present alone may mislead
)
MOSTLY = 0.5  # share of the last attempts above which most fail
OFTEN = 0.4  # share of a spell's attempts above which failures are common: eight in one row would be no wonder
LET_IN = 2  # answers, to what was sent after a failure, that tell a server that lets some in from one that is down
MORE = 1.4  # how many times as many others are in flight beside those that fail, on average, where a server is full


class _Last:
    """How the last few attempts ended, and how many others were in flight when each was sent."""

    __slots__ = ("_ended", "_most", "beside_answered", "beside_failed", "failures")

    def __init__(self, most: int) -> None:
        self._most = most
        self._ended: deque[tuple[bool, int]] = deque()
        self.failures = 0
        self.beside_failed = self.beside_answered = 0  # sums

    def add(self, failed: bool, beside: int) -> None:
        if len(self._ended) == self._most:
            self._count(*self._ended.popleft(), -1)
        self._ended.append((failed, beside))
        self._count(failed, beside, 1)

    def _count(self, failed: bool, beside: int, one: int) -> None:
        if failed:
            self.failures += one
            self.beside_failed += one * beside
        else:
            self.beside_answered += one * beside

    @property
    def answers(self) -> int:
        return len(self._ended) - self.failures

    def failed(self, share: float) -> bool:
        return self.failures > share * self._most

    @property
    def failed_beside_more(self) -> bool:
        return self.beside_failed * self.answers > MORE * self.beside_answered * self.failures


class Crowding:
    """How the last attempts ended.

    Examples
    --------
    Two slots, and waves of eight requests:

    >>> crowding = Crowding()
    >>> for second in range(20):
    ...     for beside in range(2, 8):
    ...         crowding.failed(now=second + 0.1, beside=beside)
    ...     for beside in range(2):
    ...         crowding.answered(sent=second, beside=beside)
    >>> crowding.often_fails, crowding.full, crowding.by_chance
    (True, True, True)
    """

    def __init__(self) -> None:
        self._lately, self._spell = _Last(LATELY), _Last(SPELL)
        self._attempts = 0
        self._since = 0.0  # when the first of the failures came that are looked at
        self._let_in: deque[int] = deque(maxlen=LET_IN)  # answers to what was sent after it, by their attempt's number

    @property
    def often_fails(self) -> bool:
        """Whether failures are so common that a row may meet many of them."""
        return self._lately.failed(MOSTLY) or self._spell.failed(OFTEN)

    @property
    def full(self) -> bool:
        """Whether most fail for want of room: with less in flight more would be answered."""
        return self._lately.failed(MOSTLY) and self._lets_in(SPELL) and self._spell.failed_beside_more

    @property
    def by_chance(self) -> bool:
        """Whether failures, however many in a row, are no outage."""
        return self._lets_in(LATELY)

    def answered(self, sent: float, beside: int) -> None:
        """Count an attempt that was answered, by when it was sent, and how many others were in flight then."""
        self._add(False, beside)
        if self._spell.failures and sent > self._since:
            self._let_in.append(self._attempts)

    def failed(self, now: float, beside: int) -> None:
        """Count one that failed, by when that was known."""
        if not self._spell.failures:
            self._since = now
        self._add(True, beside)

    def _add(self, failed: bool, beside: int) -> None:
        self._attempts += 1
        self._lately.add(failed, beside)
        self._spell.add(failed, beside)

    def _lets_in(self, attempts: int) -> bool:
        return len(self._let_in) == LET_IN and self._attempts - self._let_in[0] < attempts
