"""Whose fault a failure is: the row's own, the endpoint's for the moment, or the whole run's.

Pure. One refusal alone does not tell: some firewalls refuse a row's words as others refuse a key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from llmframe.attempts import Attempt, Job
from llmframe.crowding import Crowding
from llmframe.failures import Failure

REFUSALS_A_STRIKE = 3  # of one row, while others are answered: bad luck with a limit, until it has lasted too long
GATEWAY = frozenset({502, 503, 504})  # statuses of whoever stands before a server that is not there
ALIKE = 20  # the same end of so many first rows, with no answer among them, is the run's failure
PERHAPS_THE_ROWS = frozenset({403, 404})
"""Statuses that end a run as a rule, and that some give to a row: a firewall to its words, a router to its images."""
DENIED = 3  # rows so refused, with no answer to what was sent after the first, are no chance


@dataclass(frozen=True, slots=True)
class Denied:
    """A row refused as a run is, where others are answered: whose fault it is will show by what is sent after it.

    Attributes
    ----------
    job, failure : Job, Failure
        The row, and how it was refused.
    sent, at : float
        When it was sent, and refused.
    answered_before : int
        Answers of the run until then.
    """

    job: Job
    failure: Failure
    sent: float
    at: float
    answered_before: int


@dataclass(slots=True)
class Blame:
    """What the refusals of a run have shown so far.

    Attributes
    ----------
    denied : list of Denied
        Rows that are put by until it shows whose fault it is, the first of them first.
    """

    denied: list[Denied] = field(default_factory=list)
    _ends: list[int | str] | None = field(default_factory=list)  # how the first rows ended, while all did so alike

    def is_put_by(self, job: Job) -> bool:
        """Whether a row is among the denied."""
        return any(each.job is job for each in self.denied)

    def deny(self, denied: Denied, flying: Iterable[Attempt], answered: int) -> bool:
        """Put a row by; True where its refusal is what comes of all that is sent.

        Parameters
        ----------
        denied : Denied
            The row.
        flying : iterable of Attempt
            In flight.
        answered : int
            Answers of the run.
        """
        self.denied.append(denied)
        first = self.denied[0]
        others = sum(other.started >= first.sent for other in flying) + answered - first.answered_before
        return len(self.denied) >= max(DENIED, others)  # half of what was sent since, though answers take longer

    def cleared(self, sent: float = math.inf) -> list[Denied]:
        """Give the rows that were put by before something was sent that is answered now: the fault is their own."""
        found = [each for each in self.denied if each.at < sent]
        self.denied = [each for each in self.denied if each.at >= sent]
        return found

    def forget(self, job: Job) -> None:
        """Put a row by no more: it has its outcome."""
        if self.denied:
            self.denied = [each for each in self.denied if each.job is not job]

    def answered(self) -> None:
        """Note an answer: what ends rows from now on is not what ends every row."""
        self._ends = None

    def all_end_alike(self, end: int | str | None) -> bool:
        """Note how a row failed; True where all the first ones failed like that, and so would the others.

        Parameters
        ----------
        end : int, str or None
            The 4xx, or what else was paid for and is no answer; None for a failure that says nothing of other rows.
        """
        if self._ends is None:
            return False
        if end is None or (self._ends and end != self._ends[0]):
            self._ends = None
            return False
        self._ends.append(end)
        return len(self._ends) == ALIKE


def is_strike(job: Job, failure: Failure, crowding: Crowding, *, answered: int, down: bool, alone: bool) -> bool:
    """Whether a failure may be the row's own, and not the endpoint's or its other users'.

    Parameters
    ----------
    job, failure : Job, Failure
        The row, and how it failed.
    crowding : Crowding
        How the last attempts ended.
    answered : int
        Answers of the run.
    down : bool
        The endpoint looks down.
    alone : bool
        Only rows that fail are left, of an endpoint that has answered: it may be they that look like an outage.
    """
    if failure.kind == "replica away" and failure.http is not None:
        job.refusals += 1  # one that is set up otherwise is soon out, and then every other says the same
        return job.refusals % REFUSALS_A_STRIKE == 0
    if failure.kind in ("connection", "replica away"):
        return False  # nobody took the request, and patience decides how long that may last
    if failure.kind == "rate limit" or crowding.often_fails:
        job.refusals += 1
        before, job.answered_before = job.answered_before, answered
        if answered > before:  # the limit is shared, and this row's turn should come
            return job.refusals % REFUSALS_A_STRIKE == 0
    return not down or (alone and failure.http not in GATEWAY)  # a gateway says that it is an outage
