"""A request on its way, and each time that it is sent."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from llmframe.failures import Failure
from llmframe.requests import Form
from llmframe.results import Completion


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way.

    Attributes
    ----------
    number, body, tokens : int, bytes, int
        The request, and about what it takes of a token limit.
    attempts, strikes, timeouts, refusals : int
        Requests sent; failures that count against the most a row may have; attempts that timed out; that met a limit.
    going : int
        Attempts that are in flight or wait for their turn: two, where one is overdue and it is asked again beside it.
    answered_before : int
        How many answers the run had when the row was last refused, or taken up.
    failed : int
        Attempts that gave no answer, and were tried again.
    form : str
        How the schema is put to the endpoint.
    repairs : int
        Answers that did not fit and were asked again.
    empty : int
        Replies that cost something, and held no answer.
    unfit : Completion or None
        The last of these answers or replies, with what all of them cost.
    failure : Failure or None
        What it fails with, unless an attempt that is still open is answered.
    url : str
        Who replied last, where the endpoint has several URLs.
    over : bool
        It has its outcome, or others were made of it.
    """

    number: int
    body: bytes
    tokens: int
    attempts: int = 0
    strikes: int = 0
    timeouts: int = 0
    refusals: int = 0
    going: int = 1
    answered_before: int = 0
    failed: int = 0
    form: Form = "json_schema"
    repairs: int = 0
    empty: int = 0
    unfit: Completion | None = None
    failure: Failure | None = None
    url: str = ""
    over: bool = False


@dataclass(slots=True, eq=False)
class Attempt:
    """A request in flight.

    Attributes
    ----------
    job, body : Job, bytes
        Whose, and what was sent: since then another body may have been made for it.
    started, beside : float, int
        When it was let in, and others of the run in flight then.
    deadline : asyncio.Timeout or None
        Ends it when it has taken too long.
    doubted : bool
        It is overdue, and counted as failed; its row was asked again, and what it may yet say is heard.
    starved : int
        How often a connection was closed because it may lack one.
    """

    job: Job
    body: bytes
    started: float
    beside: int
    deadline: asyncio.Timeout | None = None
    doubted: bool = False
    starved: int = 0

    @property
    def moot(self) -> bool:
        """Whether its row waits for it no more."""
        return self.job.over or self.body is not self.job.body

    @property
    def given_up(self) -> bool:
        """Whether its end is near."""
        return self.deadline is not None and self.deadline.when() is not None

    def give_up(self, now: float) -> None:
        """End it, if nobody did."""
        if self.deadline is not None and not self.given_up:
            self.deadline.reschedule(now)
