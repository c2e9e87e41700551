"""A job under way: a part of the source is written when it and all before it are whole and their answers are on disk.

Two parts of a large source are under way at a time: while one has its last answers to come, the next is asked.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmframe import loops, runner
from llmframe.call import Call, open_checkpoint, plan_call, warn_of_open_line
from llmframe.checkpoint import Checkpoint, remove_checkpoint
from llmframe.errors import ConfigurationError, Interrupted, LLMFrameError
from llmframe.index import Index
from llmframe.notices import say, warn
from llmframe.options import Options, check_count
from llmframe.pacing import Pacer
from llmframe.planning import output_dtypes, prompts_of, rows_of
from llmframe.prepared import Prepared, kept_answers, ready, recall
from llmframe.prompts import Prompt, Prompts
from llmframe.requests import Words, among, words_of
from llmframe.results import STATUSES, Usage, twin
from llmframe.schemas import read_schema
from llmframe.sinks import Sink, sink_names, sweep, with_columns
from llmframe.sources import Piece, Source, frame_of

PART_ROWS = 16_384  # of a part: enough to be worth a plan, few enough that two of them are small
UNDER_WAY = 2  # parts: while one has its last answers to come, the next is asked
TOGETHER = 32  # pieces of the source in a part at most: a plan takes 10 ms, and to read so many a moment

__all__ = ["JobResult", "Paths", "Total", "Work"]


@dataclass(frozen=True, slots=True)
class JobResult:
    """What came of a job.

    Attributes
    ----------
    rows : int
        Of the sink.
    counts : dict of str to int
        Rows by status, those that occur.
    requests : int
        Sent, retries included.
    usage : Usage
        The tokens that this job itself paid for: what its checkpoint gave back is not in it.
    cost_usd : float or None
        The same in USD; None where the model has no known price.
    seconds : float
        From start to end.
    sink, checkpoint : str
        Where the rows are, and where the answers are kept.
    """

    rows: int
    counts: dict[str, int]
    requests: int
    usage: Usage
    cost_usd: float | None
    seconds: float
    sink: str
    checkpoint: str


@dataclass(frozen=True, slots=True)
class Paths:
    """Where a job's rows are, which of them it is about, and where they go."""

    source: str
    sink: str
    where: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(slots=True, eq=False)
class _Part:
    """Some rows of the source on their way."""

    prepared: Prepared
    table: pa.Table
    pieces: list[Piece]  # that the table is made of
    seen: npt.NDArray[np.bool_]  # which of its requests an earlier part has too
    task: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class Total:
    """A job so far, over its parts; see `progress.Going`."""

    options: Options
    rows: int
    under_way: list[Prepared] = field(default_factory=list)
    done: int = 0
    paid: Usage = field(default_factory=Usage)
    paid_usd: float | None = None
    sent_before: int = 0
    failed_before: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    pacer: Pacer | None = None
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None

    def finish(self, prepared: Prepared) -> None:
        """Take a part's figures over, and let go of it."""
        state = prepared.state
        rows = len(state.source)
        self.under_way.remove(prepared)
        self.done += rows
        self.paid += state.usage
        if state.cost_usd is not None:
            self.paid_usd = (self.paid_usd or 0.0) + state.cost_usd
        self.sent_before += state.sent
        self.failed_before.update(state.failures)
        self.counts.update(state.counts)
        self.pacer = state.pacer or self.pacer

    @property
    def rows_done(self) -> int:
        """Rows with an outcome."""
        return self.done + sum(each.state.rows_done for each in tuple(self.under_way))

    @property
    def rows_a_request(self) -> float:
        """Rows that one request answers, on average, in the parts under way."""
        states = [each.state for each in tuple(self.under_way)]
        return sum(state.rows for state in states) / max(1, sum(len(state.plan.first) for state in states))

    @property
    def usage(self) -> Usage:
        """Tokens paid."""
        return sum((each.state.usage for each in tuple(self.under_way)), self.paid)

    @property
    def cost_usd(self) -> float | None:
        """USD paid; None where no price is known."""
        known = [cost for each in tuple(self.under_way) if (cost := each.state.cost_usd) is not None]
        return self.paid_usd if not known else (self.paid_usd or 0.0) + sum(known)

    @property
    def sent(self) -> int:
        """Requests sent."""
        return self.sent_before + sum(each.state.sent for each in tuple(self.under_way))

    @property
    def in_flight(self) -> int:
        """Requests in flight."""
        return sum(each.state.in_flight for each in tuple(self.under_way))

    @property
    def failures(self) -> Counter[str]:
        """Attempts that gave no answer, by kind."""
        return sum((each.state.failures for each in tuple(self.under_way)), self.failed_before)

    @property
    def seconds(self) -> float:
        """Since its start."""
        return (time.monotonic() if self.ended is None else self.ended) - self.started


class Work:
    """One job: checked and ready, and then under way.

    Raises
    ------
    ConfigurationError, TemplateError, SchemaError, CheckpointError
        The job cannot be done as it was written.
    """

    def __init__(self, paths: Paths, prompt: Prompt, options: Options) -> None:
        self._paths = paths
        self._prompt = prompt
        self.options = options
        if paths.limit is not None:
            check_count("limit", paths.limit)
        self._source = Source(paths.source, paths.where, paths.limit)
        self._sinks = sink_names(paths.sink, self._source)
        self.total = Total(options, self._source.rows)
        self._check_names()
        # Of no rows, so that all that can be known of the call is checked before anything is asked.
        first, *others = {schema.serialize().to_pybytes(): schema for schema in self._source.schemas}.values()
        prompts = self._prompts(first.empty_table())
        self._call: Call = plan_call(prompts, options)
        for schema in others:  # a client takes 20 ms to make, and one does for all files
            self._prompts(schema.empty_table())
        warn_of_open_line(self._call.endpoint.url)
        self._open_checkpoint = functools.partial(open_checkpoint, prompts, options, self._call)
        self._checkpoint: Checkpoint | None = None
        self._seen = _Keys()
        self._refreshed = _Keys()  # what this job itself has had answered, where answers of before do not count
        self._sink: Sink | None = None
        self.began = False
        """Whether there was something to write to, so that what stops it now leaves answers behind."""

    def _check_names(self) -> None:
        """Refuse to write a column that the source has, be it as its index: a file with two cannot be read."""
        written = output_dtypes(self.options, read_schema(self.options.schema, self.options.output))
        for schema in self._source.schemas:
            taken = next((name for name in written if name in schema.names), None)
            if taken is not None:
                raise ConfigurationError(
                    f"{self._source.where} has a column {taken!r} already; pass output= to write under another name"
                )

    def run(self, beat: Callable[[], None], ended: Callable[[], None], *, partial: bool, clean: bool) -> JobResult:
        """Do it, and wait; see `run` for what it raises.

        Parameters
        ----------
        beat, ended : callable
            Called in this thread every tenth of a second, and at the end.
        partial, clean : bool
            See `run`.
        """
        try:
            with _memory_given_back():
                loops.run(self._execute, beat)
        except LLMFrameError as error:
            if not self.began:
                raise
            raise self._stopped(error, partial) from error.__cause__
        except KeyboardInterrupt:
            raise self._stopped(Interrupted("interrupted"), partial) from None
        finally:
            ended()
        if clean and not self.total.counts.keys() & {"failed", "pending"}:
            assert self.options.checkpoint is not None
            if self._paths.limit is None and not self._paths.where:
                remove_checkpoint(self.options.checkpoint)
            else:
                said = f"{self.options.checkpoint} is kept: a job of some rows may not delete the answers of the others"
                say(said, quiet=self.options.progress is False)
        return self.outcome()

    @property
    def _part_rows(self) -> int:
        return PART_ROWS

    @property
    def _under_way(self) -> int:
        return UNDER_WAY

    async def _ask(self, prepared: Prepared, numbers: npt.NDArray[np.intp]) -> None:
        """Ask some of a part's requests."""
        await runner.ask(prepared, numbers)

    async def _execute(self, *, asking: bool = True) -> None:
        """Ask for every part, and write each when it and all before it are whole."""
        under_way: deque[_Part] = deque()
        whole = False
        gathered = _gathered(self._source.pieces(self._part_rows), self._part_rows)
        try:
            await loops.to_its_end(self._begin)
            held = 0 if self._checkpoint is None else self._checkpoint.held
            if asking and held:
                said = f"{held:,} answers are in {self.options.checkpoint}; what is among them is not asked"
                say(said, quiet=self.options.progress is False)
            while (pieces := await loops.in_thread(lambda: self._read(gathered))) is not None:
                part = await loops.in_thread(functools.partial(self._prepare, pieces))
                self.total.under_way.append(part.prepared)
                before = [each.task for each in under_way if each.task]
                part.task = asyncio.create_task(self._answer(part, before, asking=asking))
                under_way.append(part)
                # By rows, since the parts of a source of small files are small; what is read next has room.
                while sum(max(1, len(each.table)) for each in under_way) > (self._under_way - 1) * self._part_rows:
                    await self._write(under_way.popleft(), under_way)
            while under_way:
                await self._write(under_way.popleft(), under_way)
            await loops.to_its_end(self._finish)  # with a limit the last of the source's files need not be read
            whole = True
        finally:
            try:
                await loops.ended({part.task for part in under_way if part.task is not None})
            finally:  # interrupted twice too
                self.total.ended = time.monotonic()
                if self._sink is not None:
                    self._sink.close()
                if (checkpoint := self._checkpoint) is not None:
                    await asyncio.shield(loops.in_thread(lambda: checkpoint.close(tidy=whole)))

    def _begin(self) -> None:
        """Open what is written to: what is wrong with it is known before anything is paid."""
        try:
            busy = sweep(self._sinks)
            self._sink = Sink(self._sinks[0])
        except Exception as error:
            raise ConfigurationError(f"{self._sinks[0]} cannot be written: {_reason(error)}") from error
        if busy:
            warn(f"another job writes {self._paths.sink} now; what both ask is paid for twice, so stop one of them")
        self._checkpoint = self._open_checkpoint(Index())
        self.began = True

    def outcome(self) -> JobResult:
        """Give what came of it, so far."""
        total = self.total
        counts: dict[str, int] = {status: total.counts[status] for status in STATUSES if total.counts[status]}
        where = os.fspath(self.options.checkpoint or "")
        return JobResult(
            total.done, counts, total.sent, total.usage, total.cost_usd, total.seconds, self._paths.sink, where
        )

    def _stopped(self, error: Any, partial: bool) -> Any:
        """Give a job's error with the way to go on."""
        total = self.total
        way = f"the same job goes on from {self.options.checkpoint}"
        if self.options.refresh:
            way = f"without refresh {way}; with it every row is asked and paid for again"
        if partial:
            try:
                again = Work(self._paths, self._prompt, replace(self.options, refresh=False))
                loops.run(functools.partial(again._execute, asking=False), lambda: None)
                way += f"; what there is is in {self._paths.sink}"
            except (LLMFrameError, OSError, KeyboardInterrupt) as failure:
                way += f"; {self._paths.sink} could not be written ({failure})"
        words = str(error) or "cancelled"
        error.args = (f"{words} ({total.rows_done:,} of {total.rows:,} rows are done; {way})",)
        return error

    def _read(self, gathered: Iterator[list[Piece]]) -> list[Piece] | None:
        try:
            return next(gathered, None)
        except Exception as error:  # each file system has exception types of its own
            raise LLMFrameError(f"{self._paths.source} cannot be read any more: {_reason(error)}; mend that") from error

    def _prompts(self, table: pa.Table) -> Prompts:
        return prompts_of(frame_of(table), self._prompt, self.options)

    def _prepare(self, pieces: list[Piece]) -> _Part:
        table = pa.concat_tables(piece.table for piece in pieces)
        prompts = self._prompts(table)
        call = plan_call(prompts, self.options, self._call)
        prepared = ready(prompts, self.options, call, self._checkpoint)
        seen = self._seen.add(call.plan.keys)
        recall(prepared)
        for number in np.flatnonzero(seen).tolist():  # an earlier row of the job carries what it cost
            outcome = prepared.state.outcomes[number]
            if outcome.status != "pending":
                prepared.state.outcomes.put(number, twin(outcome))
        return _Part(prepared, table, pieces, seen)

    async def _answer(self, part: _Part, before: list[asyncio.Task[None]], *, asking: bool) -> None:
        """Ask a part's requests, first those that no part before it asks."""
        prepared, outcomes = part.prepared, part.prepared.state.outcomes
        pending = outcomes.pending()
        late = pending[part.seen[pending]]
        own = pending[~part.seen[pending]]
        if len(own) and asking:
            await self._ask(prepared, own)
        if len(late):
            if before:
                await asyncio.wait(before)
            kept = late
            if self.options.refresh:  # of one that failed before, the disk has the answer that is not wanted any more
                kept = late[self._refreshed.has(prepared.state.plan.keys[late])]
            await loops.in_thread(lambda: self._recall_late(prepared, kept))
            late = late[np.isin(late, outcomes.pending())]
            if len(late) and asking:
                await self._ask(prepared, late)
        if self.options.refresh:
            self._refreshed.add(prepared.state.plan.keys[outcomes.paid()])
        prepared.state.ended = time.monotonic()

    def _recall_late(self, prepared: Prepared, late: npt.NDArray[np.intp]) -> None:
        assert self._checkpoint is not None
        self._checkpoint.flush()
        state = prepared.state
        shared = rows_of(state.plan)
        for place, kept in kept_answers(self._checkpoint, state.plan.keys[late], state.schema):
            number = int(late[place])
            state.outcomes.put(number, twin(kept))
            state.rows_done += int(shared[number])

    async def _write(self, part: _Part, others: deque[_Part]) -> None:
        """Wait for a part, or for the failure of one after it, and write it."""
        assert part.task is not None
        tasks = [part.task, *(each.task for each in others if each.task is not None)]
        try:
            while not part.task.done():
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                tasks = [task for task in tasks if not task.done()]
            part.task.result()
        except BaseException:
            others.appendleft(part)
            raise
        await loops.to_its_end(functools.partial(self._put, part))
        self.total.finish(part.prepared)

    def _put(self, part: _Part) -> None:
        if self._checkpoint is not None:
            self._checkpoint.flush()
        state, at = part.prepared.state, 0
        answered = with_columns(part.table, state.frame()[[*output_dtypes(state.options, state.schema)]])
        for piece in part.pieces:
            where = self._sinks[piece.file]
            with _writing(where):
                self._sink = self._sink or Sink(where)
                self._sink.write(answered.slice(at, len(piece.table)), piece.ends_group)
            at += len(piece.table)
            if piece.ends_file and self._sinks[piece.file + 1 : piece.file + 2] != [where]:
                self._finish()

    def _finish(self) -> None:
        """Give the file that is written its name."""
        if self._sink is not None:
            with _writing(self._sink.where):
                self._sink.finish()
            self._sink = None


@contextmanager
def _writing(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # each file system has exception types of its own
        raise LLMFrameError(f"{where} cannot be written: {_reason(error)}; the answers are safe, mend that") from error


def _gathered(pieces: Iterator[Piece], rows: int) -> Iterator[list[Piece]]:
    """Put small pieces together, so many rows at most, while pandas reads them the same way."""
    held: list[Piece] = []
    count = 0
    for piece in pieces:
        alike = not held or piece.table.schema.equals(held[0].table.schema, check_metadata=True)
        if not alike or count + len(piece.table) > rows:
            yield held
            held, count = [], 0
        held.append(piece)
        count += len(piece.table)
        if 2 * count > rows or len(held) == TOGETHER:  # large enough: what comes after it is not read yet
            yield held
            held, count = [], 0
    if held:
        yield held


@contextmanager
def _memory_given_back() -> Iterator[None]:
    """Let Arrow take its memory from the system while a job is under way.

    Of a job's many threads, Arrow's own allocator keeps most of what each has freed: over 100 MB of a million rows, by
    ``python -m tests.bench.files``.
    """
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


class _Keys:
    """Requests of the parts so far, in 8 bytes each."""

    def __init__(self) -> None:
        self._sorted: list[Words] = []

    def has(self, keys: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        """Say which of some keys are there."""
        words = words_of(keys)
        known = np.zeros(len(words), np.bool_)
        for each in self._sorted:
            known |= among(words, each)
        return known

    def add(self, keys: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        """Add a part's keys; which of them were there before."""
        words, known = words_of(keys), self.has(keys)
        if len(words):
            self._sorted.append(np.sort(words))
        while len(self._sorted) > 1 and len(self._sorted[-1]) * 2 > len(self._sorted[-2]):  # few arrays, and long ones
            self._sorted.append(np.sort(np.concatenate([self._sorted.pop(), self._sorted.pop()])))
        return known


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
