"""Stations: one call at work in one process, for all the parts of its rows that come there.

A station has one engine, one pool of connections, one checkpoint and one index for every part; what it has answered is
on disk before a part counts as done, so that whoever takes over from a process that was killed pays for nothing again.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pandas as pd

from llmframe import loops, runner
from llmframe.checkpoint import Checkpoint
from llmframe.desk import Desk, Words, words_of
from llmframe.errors import LLMFrameError
from llmframe.index import Index
from llmframe.options import Options
from llmframe.planning import check_columns
from llmframe.prompts import Prompt, Prompts
from llmframe.runner import Prepared

LINGER_S = 5.0  # until a station that has nothing to do is closed: the next part is on its way, as a rule
LOOK_S = 0.25  # how often it is seen whether what another part asks is there
INDEXES = 4  # checkpoints whose index is kept


class Peers(Protocol):
    """The way to the desk."""

    async def claim(self, part: str, words: Words) -> npt.NDArray[np.bool_]:
        """See `Desk.claim`."""
        ...

    async def release(self, part: str) -> None:
        """See `Desk.release`."""
        ...


class Alone:
    """The desk of a process that is all there is."""

    def __init__(self) -> None:
        self._desk = Desk()

    async def claim(self, part: str, words: Words) -> npt.NDArray[np.bool_]:
        """See `Desk.claim`."""
        return self._desk.claim("", part, words, alive=("",))

    async def release(self, part: str) -> None:
        """See `Desk.release`."""
        self._desk.release(part)


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
        self._reading = threading.Lock()  # the index takes one reader at a time
        prompts = prompts_of(empty, prompt, options)
        self._call = runner.plan_call(prompts, replace(options, where=None if options.where is None else "missing"))
        assert options.checkpoint is not None
        checkpoint = runner.open_checkpoint(prompts, options, self._call, _index_of(os.fspath(options.checkpoint)))
        assert checkpoint is not None
        self._checkpoint: Checkpoint = checkpoint

    def answer(self, frame: pd.DataFrame, options: Options, beat: Callable[[], None] = lambda: None) -> pd.DataFrame:
        """Answer some of the rows, and wait: the frame with its new columns.

        Parameters
        ----------
        frame : DataFrame
            The rows.
        options : Options
            The call's, with this part's mask.
        beat : callable
            Called in this thread ten times a second.

        Raises
        ------
        LLMFrameError
            What stopped it; what was answered is kept.
        """
        prompts = prompts_of(frame, self._prompt, options)
        call = runner.plan_call(prompts, options, self._call)
        check_columns(frame, options, call.schema, call.plan.selected)
        prepared = runner.ready(prompts, options, call, self._checkpoint)
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
        return prepared.state.frame()

    async def _ask(self, prepared: Prepared) -> None:
        """Ask what no other part asks, then see to the rest."""
        part, keys = uuid.uuid4().hex, prepared.state.plan.keys
        left = np.arange(len(keys))
        while len(left):
            taken = await self._peers.claim(part, words_of(keys[left]))
            try:
                # After the claim: whoever held one of these until now has made its answer durable first.
                own = await loops.in_thread(functools.partial(self._recall, prepared, left[~taken]))
                if len(own):
                    await runner.ask(prepared, own)
                await asyncio.shield(loops.in_thread(self._checkpoint.flush))
            finally:
                await asyncio.shield(self._peers.release(part))
            left = left[taken]
            if len(left):
                await asyncio.sleep(LOOK_S)

    def _recall(self, prepared: Prepared, numbers: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """Take what the checkpoint holds; give the rest."""
        with self._reading:
            runner.recall(prepared, numbers)
        return numbers[np.isin(numbers, prepared.state.outcomes.pending())]

    def close(self, *, tidy: bool) -> None:
        """Let go of the checkpoint."""
        self._checkpoint.close(tidy=tidy)


def prompts_of(frame: pd.DataFrame, prompt: Prompt, options: Options) -> Prompts:
    """Give what the rows of a frame send."""
    return Prompts(frame, prompt, system=options.system, examples=options.examples, na=options.na)


class Stations:
    """The stations of this process, by call; each is there while parts of its call come.

    Parameters
    ----------
    linger_s : float
        How long one stays that has nothing to do.
    """

    def __init__(self, linger_s: float = LINGER_S) -> None:
        self._linger_s = linger_s
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
                timer = threading.Timer(self._linger_s, self._close, [name, mark])
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


_indexes: OrderedDict[str, Index] = OrderedDict()


def _index_of(checkpoint: str) -> Index:
    index = _indexes.setdefault(checkpoint, Index())
    _indexes.move_to_end(checkpoint)
    while len(_indexes) > INDEXES:
        _indexes.popitem(last=False)
    return index
