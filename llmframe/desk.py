"""The desk: what the processes of one cluster settle with each other while they work on one call.

Pure, and small: who asks a request that several have, and who may send and spend how much of what the call allows. It
lives in one place (the scheduler, or the process itself where there is only one), what it gives out never adds up to
more than the call's caps, and whoever is gone holds nothing there but what it may have spent.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Container
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from llmframe.budget import Cost
from llmframe.rates import Cap, request_caps, token_caps
from llmframe.requests import Words, among

NOTHING = Cost()
PRESENT_S = 5.0  # since a process was last heard of; it comes by once a second at least
AT_ONCE = 32  # requests' worth of money given out at a time


@dataclass(frozen=True, slots=True)
class Limits:
    """What a call allows all processes together; None is no limit.

    Attributes
    ----------
    max_concurrency, rpm, tpm
        See `Caps`.
    max_usd, max_tokens
        See `Budget`.
    """

    max_concurrency: int | None = None
    rpm: float | None = None
    tpm: float | None = None
    max_usd: float | None = None
    max_tokens: int | None = None

    @property
    def paced(self) -> bool:
        """Whether there is one on requests."""
        return self.max_concurrency is not None or self.rpm is not None or self.tpm is not None

    @property
    def most(self) -> Cost:
        """The most that may be spent."""
        return Cost.limit(self.max_usd, self.max_tokens)


@dataclass(frozen=True, slots=True)
class Wants:
    """What a process has, and would have more of.

    Attributes
    ----------
    queue : tuple of float
        About the tokens of each request that waits to be sent, the next first.
    in_flight : int
        Requests out.
    spent, held : Cost
        What it has paid, and what it keeps for requests that are out or to come.
    most : Cost or None
        What its next request may cost; None where it needs no money.
    """

    queue: tuple[float, ...] = ()
    in_flight: int = 0
    spent: Cost = NOTHING
    held: Cost = NOTHING
    most: Cost | None = None


@dataclass(frozen=True, slots=True)
class Grant:
    """What a process is given.

    Attributes
    ----------
    peers : int
        Processes at work, itself included.
    requests, tokens : int, float
        To send now.
    seats : int or None
        Requests that it may have in flight from now on.
    money : Cost
        To hold, beside what it holds.
    over : bool
        What it wanted is not there, and nobody holds anything that could come back.
    elsewhere : Cost
        What all others have spent.
    """

    peers: int = 1
    requests: int = 0
    tokens: float = 0.0
    seats: int | None = None
    money: Cost = NOTHING
    over: bool = False
    elsewhere: Cost = NOTHING


@dataclass(slots=True)
class _Book:
    """What is known of one process."""

    worker: str
    seen: float
    seats: int = 0
    short: bool = False  # it had less than it could use
    spent: Cost = field(default_factory=Cost)
    held: Cost = field(default_factory=Cost)


class Desk:
    """One call's desk.

    Callers name the worker that they are; `alive` says which workers are still there.

    Parameters
    ----------
    limits : Limits
        What the call allows.
    """

    def __init__(self, limits: Limits = Limits()) -> None:
        self._limits = limits
        self._claims: dict[str, tuple[str, Words]] = {}  # by part: whose it is, and its requests, sorted
        self._books: dict[str, _Book] = {}
        # The minute's and the second's: a tenth of a second's share would be lost wherever nobody came by in it.
        self._request_caps: list[Cap] = request_caps(limits.rpm)[:2]
        self._token_caps: list[Cap] = token_caps(limits.tpm)

    def claim(self, worker: str, part: str, words: Words, alive: Container[str]) -> npt.NDArray[np.bool_]:
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
            if name != part:
                taken |= among(words, theirs)
        self._claims[part] = worker, np.sort(words[~taken])
        return taken

    def release(self, part: str) -> None:
        """Let go of a part's requests: their answers are in the checkpoint, or will not come."""
        self._claims.pop(part, None)

    def meet(self, worker: str, caller: str, wants: Wants, now: float, alive: Container[str]) -> Grant:
        """Hear what a process has and wants, and give it what there is.

        Parameters
        ----------
        worker, caller : str
            The worker, and the station in it.
        wants : Wants
            What it says.
        now : float
            The time, in seconds.
        alive : container of str
            The workers that are there.
        """
        for book in self._books.values():
            if book.worker not in alive:  # what it had in flight may have been paid for
                book.spent, book.held, book.seats, book.seen = book.spent + book.held, Cost(), 0, -math.inf
        mine = self._books.setdefault(caller, _Book(worker, now))
        mine.seen, mine.spent, mine.held = now, wants.spent, wants.held
        requests = self._send(wants.queue, now)
        money, over = self._pay(mine, wants.most)
        others = [book for name, book in self._books.items() if name != caller]
        return Grant(
            peers=sum(now - book.seen < PRESENT_S for book in self._books.values()),
            requests=requests,
            tokens=sum(wants.queue[:requests]),
            seats=self._seat(mine, others, wants, now),
            money=money,
            over=over,
            elsewhere=functools.reduce(operator.add, (book.spent for book in others), Cost()),
        )

    def leave(self, caller: str, spent: Cost) -> None:
        """Hear that a process has no more to do: it holds nothing, and sends nothing."""
        if caller in self._books:
            book = self._books[caller]
            book.seats, book.short, book.seen, book.spent, book.held = 0, False, -math.inf, spent, Cost()

    def _send(self, queue: tuple[float, ...], now: float) -> int:
        """Let as many of the requests go as the caps allow now."""
        if not (self._request_caps or self._token_caps):
            return len(queue)
        for number, tokens in enumerate(queue):
            if any(cap.wait_s(now, 1.0) > 0 for cap in self._request_caps):
                return number
            if any(cap.wait_s(now, tokens) > 0 for cap in self._token_caps):
                return number
            for cap in self._request_caps:
                cap.take(now, 1.0)
            for cap in self._token_caps:
                cap.take(now, tokens)
        return len(queue)

    def _seat(self, mine: _Book, others: list[_Book], wants: Wants, now: float) -> int | None:
        """Share out the requests that may be in flight; one who has more than its share gives up what falls free."""
        if self._limits.max_concurrency is None:
            return None
        most, could_use = self._limits.max_concurrency, wants.in_flight + len(wants.queue)
        free = most - sum(book.seats for book in others)
        wanting = sum(book.short and now - book.seen < PRESENT_S for book in others)
        fair = math.ceil(most / (wanting + 1)) if wanting else most
        mine.seats = max(wants.in_flight, min(could_use, free, fair))
        mine.short = mine.seats < could_use
        return mine.seats

    def _pay(self, mine: _Book, most: Cost | None) -> tuple[Cost, bool]:
        """Give out money for some requests, or say that there will be none."""
        if most is None:
            return NOTHING, False
        left = self._limits.most
        for book in self._books.values():
            left = left - book.spent - book.held
        if not _within(most, left):
            return NOTHING, all(book.held == NOTHING for book in self._books.values())
        count = AT_ONCE
        while count > 1 and not _within(_times(most, 2 * count * len(self._books)), left):
            count //= 2
        money = _times(most, count)
        mine.held += money
        return money, False


def _times(cost: Cost, count: int) -> Cost:
    return Cost(cost.tokens * count, cost.pico_usd * count)


def _within(cost: Cost, left: Cost) -> bool:
    return cost.tokens <= left.tokens and cost.pico_usd <= left.pico_usd
