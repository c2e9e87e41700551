"""Stations: one call at work in one process, for all the parts of its rows that come there.

A station has one engine, one pool of connections, one checkpoint and one index for every part; what it has answered is
on disk before a part counts as done, so that whoever takes over from a process that was killed pays for nothing again.
"""

from __future__ import annotations

import asyncio
import functools
import math
import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from llmframe import loops, runner
from llmframe.budget import Allotment, Cost
from llmframe.call import open_checkpoint, plan_call
from llmframe.checkpoint import Checkpoint
from llmframe.desk import Desk, Grant, Limits, Wants
from llmframe.errors import LLMFrameError
from llmframe.index import Index
from llmframe.lines import Line, give_back, line_to
from llmframe.options import Options
from llmframe.pacing import Caps
from llmframe.planning import check_columns, prompts_of
from llmframe.prepared import Prepared, ready, recall
from llmframe.prompts import Prompt
from llmframe.rates import Share
from llmframe.requests import Words, words_of
from llmframe.state import State

LINGER_S = 5.0  # until a station that has nothing to do is closed: the next part is on its way, as a rule
LOOK_S = 0.25  # how often it is seen whether what another part asks is there
MEET_S = 1.0  # how often a process comes to the desk; what it learns there is how many there are
TICKETS_S = 0.05  # the same where it sends by tickets, has seats, or waits for money
INDEXES = 4  # checkpoints whose index is kept


class Peers(Protocol):
    """The way to a call's desk.

    Attributes
    ----------
    many : bool
        Whether other processes come there too.
    """

    many: bool

    async def claim(self, part: str, words: Words) -> npt.NDArray[np.bool_]:
        """See `Desk.claim`."""
        ...

    async def release(self, part: str) -> None:
        """See `Desk.release`."""
        ...

    async def meet(self, caller: str, wants: Wants) -> Grant:
        """See `Desk.meet`."""
        ...

    async def leave(self, caller: str, spent: Cost) -> None:
        """See `Desk.leave`."""
        ...


class Alone:
    """The way to a desk that is in this process, to which no other comes."""

    many = False

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def claim(self, part: str, words: Words) -> npt.NDArray[np.bool_]:
        """See `Desk.claim`."""
        return self._desk.claim("", part, words, alive=("",))

    async def release(self, part: str) -> None:
        """See `Desk.release`."""
        self._desk.release(part)

    async def meet(self, caller: str, wants: Wants) -> Grant:
        """See `Desk.meet`."""
        return self._desk.meet("", caller, wants, time.monotonic(), alive=("",))

    async def leave(self, caller: str, spent: Cost) -> None:
        """See `Desk.leave`."""
        self._desk.leave(caller, spent)


class Station:
    """One call in this process.

    Parameters
    ----------
    prompt, options
        The call's. It has a checkpoint.
    empty : DataFrame
        The frame's columns, without a row.
    peers : Peers
        The way to the desk.

    Raises
    ------
    ConfigurationError, TemplateError, SchemaError, CheckpointError
        The call cannot be made here: no key, most often.
    """

    def __init__(self, prompt: Prompt, options: Options, empty: pd.DataFrame, peers: Peers) -> None:
        self._prompt = prompt
        self._peers = peers
        self._name = uuid.uuid4().hex
        self._parts = 0  # under way
        self._meeting: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._door = asyncio.Lock()
        prompts = prompts_of(empty, prompt, options)
        self._call = plan_call(prompts, replace(options, where=None if options.where is None else "missing"))
        assert options.checkpoint is not None
        checkpoint = open_checkpoint(prompts, options, self._call, _index_of(os.fspath(options.checkpoint)))
        assert checkpoint is not None
        self._checkpoint: Checkpoint = checkpoint
        self._limits = limits_of(options)
        # Without caps of a call's own one share will do for all calls, so that they find each other's connections.
        self._share = Share() if self._limits.paced else _uncapped
        self._caps = Caps(options.max_concurrency, options.rpm, options.tpm)
        if peers.many:
            ticketed = options.rpm is not None or options.tpm is not None
            self._caps = replace(self._caps, share=self._share, ticketed=ticketed)
        self._budget: Allotment | None = None
        if (whole := self._call.budget) is not None:
            self._budget = Allotment(bound=whole.bound, max_usd=whole.max_usd, max_tokens=whole.max_tokens)

    def answer(self, frame: pd.DataFrame, options: Options, beat: Callable[[], None]) -> State:
        """Answer some of the rows, and wait.

        Parameters
        ----------
        frame : DataFrame
            The rows.
        options : Options
            The call's, with this part's mask.
        beat : callable
            Called in this thread ten times a second; what it raises, once, stops the part.

        Raises
        ------
        LLMFrameError
            What stopped it; what was answered is kept.
        """
        prompts = prompts_of(frame, self._prompt, options)
        call = plan_call(prompts, options, self._call)
        check_columns(frame, options, call.schema, call.plan.selected)
        prepared = ready(prompts, options, call, self._checkpoint)
        prepared = replace(prepared, policy=replace(prepared.policy, caps=self._caps), budget=self._budget)
        try:
            loops.run(functools.partial(self._ask, prepared), beat)
        except LLMFrameError as error:
            # Without the frame so far, which would go to whoever waits for the whole; and without its cause, which
            # need not be fit to travel.
            error.frame = error.completions = None
            error.args = (
                f"{error} ({prepared.state.rows_done:,} of {len(frame):,} rows of this partition are done; what was "
                f"answered is in {options.checkpoint}, and the same call goes on from it)",
            )
            raise error from None
        return prepared.state

    async def _ask(self, prepared: Prepared) -> None:
        """Ask what no other part asks, then see to the rest."""
        meeting = await self._begin()
        asking = asyncio.create_task(self._ask_all(prepared))
        tasks = {asking} if meeting is None else {asking, meeting}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done() and meeting is not None:
                meeting.result()  # it ends by itself only where the desk cannot be reached
            asking.result()
        finally:
            asking.cancel()
            await asyncio.wait({asking})
            await asyncio.shield(self._end())

    async def _begin(self) -> asyncio.Task[None] | None:
        """Begin a part: whoever is the first goes to the desk for all."""
        async with self._door:
            self._parts += 1
            if self._meeting is None and (self._peers.many or self._budget is not None):
                self._closing.clear()
                self._meeting = asyncio.create_task(self._meet())
            return self._meeting

    async def _end(self) -> None:
        """End a part: whoever is the last tells the desk, after all that was asked there was answered."""
        async with self._door:
            self._parts -= 1
            if not self._parts and self._meeting is not None:
                meeting, self._meeting = self._meeting, None
                self._closing.set()
                await asyncio.wait({meeting})
                with suppress(Exception):  # where it cannot be reached, it knows soon that nobody comes any more
                    await self._peers.leave(self._name, self._spent)

    @property
    def _spent(self) -> Cost:
        return Cost() if self._budget is None else self._budget.spent

    async def _meet(self) -> None:
        """Come to the desk now and again, and make known here what it gives."""
        line = line_to(self._call.endpoint, self._caps)
        try:
            await self._meet_for(line)
        finally:
            await give_back(line)

    async def _meet_for(self, line: Line) -> None:
        loop = asyncio.get_running_loop()
        limits, budget, share = self._limits, self._budget, self._share
        while not self._closing.is_set():
            held, most = (Cost(), None) if budget is None else budget.want()
            queue = self._queue(line) if limits.paced and self._peers.many else ()
            wants = Wants(queue, line.pacer.in_flight, self._spent, held, most)
            if limits.max_concurrency is not None and self._peers.many:
                share.seats = wants.in_flight  # until the desk answers, all seats not in use are offered back
            grant = await self._peers.meet(self._name, wants)
            share.peers = grant.peers
            if self._peers.many:
                share.seats = math.inf if grant.seats is None else grant.seats
                if self._caps.ticketed:
                    share.give(loop.time(), grant.requests, grant.tokens)
                line.admit()
            if budget is not None:
                budget.allot(grant.money, over=grant.over, elsewhere=grant.elsewhere)
            with suppress(TimeoutError):
                pause_s = TICKETS_S if limits.paced or budget is not None else MEET_S
                await asyncio.wait_for(self._closing.wait(), pause_s)

    def _queue(self, line: Line) -> tuple[float, ...]:
        """Give what waits to be sent and, by tickets, what will wait before it comes again, less what has a ticket."""
        waiting = [line.pacer.worth(tokens) for tokens in line.waiting]
        if not self._caps.ticketed:
            return tuple(waiting)
        soon = self._share.sent_since()
        return tuple([*waiting, *soon][self._share.tickets(asyncio.get_running_loop().time()) :])

    async def _ask_all(self, prepared: Prepared) -> None:
        part, keys = uuid.uuid4().hex, prepared.state.plan.keys
        left = np.arange(len(keys))
        while len(left):
            taken = await self._peers.claim(part, words_of(keys[left]))
            try:
                # After the claim: whoever held one of these until now has made its answer durable first.
                own = await loops.in_thread(functools.partial(self._recall, prepared, left[~taken]))
                if len(own):
                    await runner.ask(prepared, own)
            finally:
                try:  # before others may have them: what was answered is durable, however it ended
                    await asyncio.shield(loops.in_thread(self._checkpoint.flush))
                finally:
                    await asyncio.shield(self._peers.release(part))
            left = left[taken]
            if len(left):
                await asyncio.sleep(LOOK_S)

    def _recall(self, prepared: Prepared, numbers: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """Take what the checkpoint holds; give the rest."""
        recall(prepared, numbers)
        return numbers[np.isin(numbers, prepared.state.outcomes.pending())]

    def close(self, *, tidy: bool) -> None:
        """Let go of the checkpoint."""
        self._checkpoint.close(tidy=tidy)


def limits_of(options: Options) -> Limits:
    """Give what a call allows all processes together."""
    return Limits(options.max_concurrency, options.rpm, options.tpm, options.max_cost, options.max_tokens_total)


class Stations:
    """The stations of this process, by call; each is there while parts of its call come."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, Station] = {}
        self._parts: dict[str, int] = {}
        self._last: dict[str, object] = {}

    def enter(self, name: str, make: Callable[[], Station]) -> Station:
        """Begin a part at the station of a call, which is made where there is none."""
        with self._lock:
            if name not in self._open:
                self._open[name] = make()
            self._parts[name] = self._parts.get(name, 0) + 1
            self._last.pop(name, None)
            return self._open[name]

    def leave(self, name: str) -> None:
        """End a part."""
        with self._lock:
            self._parts[name] -= 1
            if not self._parts[name]:
                self._last[name] = mark = object()
                timer = threading.Timer(LINGER_S, self._close, [name, mark])
                timer.daemon = True
                timer.start()

    def _close(self, name: str, mark: object) -> None:
        with self._lock:
            if self._last.get(name) is not mark:
                return
            del self._last[name], self._parts[name]
            station = self._open.pop(name)
        station.close(tidy=True)

    def close(self) -> None:
        """Close them all, at the end of the process."""
        with self._lock:
            stations = list(self._open.values())
            self._open.clear()
            self._parts.clear()
            self._last.clear()
        for station in stations:
            station.close(tidy=False)


_uncapped = Share()
_indexes: OrderedDict[str, Index] = OrderedDict()


def _index_of(checkpoint: str) -> Index:
    index = _indexes.setdefault(checkpoint, Index())
    _indexes.move_to_end(checkpoint)
    while len(_indexes) > INDEXES:
        _indexes.popitem(last=False)
    return index
