"""Jobs: parquet in, parquet out, by the same call, in memory that does not grow with the file.

The source is read a part at a time, and two parts are under way at once, so that the endpoint never waits for the
disk. The sink has its name when it is whole, and never before; whatever stopped a job, the same job goes on.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from llmframe import loops, runner
from llmframe.errors import ConfigurationError, Interrupted, LLMFrameError
from llmframe.index import Index
from llmframe.notices import say
from llmframe.options import Options, gather, shows_options
from llmframe.pacing import Pacer
from llmframe.planning import output_dtypes
from llmframe.progress import Bar
from llmframe.prompts import Prompt, Prompts
from llmframe.results import STATUSES, Usage, twin
from llmframe.runner import Call, Prepared

PART_ROWS = 16_384  # of a part: enough to be worth a plan, few enough that two of them are small
UNDER_WAY = 2  # parts: while one has its last answers to come, the next is asked
GROUP_BYTES = 128 << 20  # of a row group that is held back until it is whole
NOT_HERE = ("where", "history")  # keywords about a frame at hand
CHECKPOINT = ".checkpoint"  # is added to the sink's name


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


@shows_options
def run(
    source: str | os.PathLike[str],
    sink: str | os.PathLike[str],
    prompt: Prompt,
    *,
    limit: int | None = None,
    **keywords: Any,
) -> JobResult:
    """Ask a model once for each row of a parquet file, and write a parquet file with the answers as new columns.

    Parameters
    ----------
    source : path
        A parquet file.
    sink : path
        Where the rows go, in the same order and row groups, with the source's columns as they were and the new ones
        after them. It has this name when it is whole, and never before.
    prompt, **keywords
        As `LLMFrame.complete` takes them, those about a frame at hand aside. ``checkpoint`` is the sink's name with
        ``.checkpoint`` unless it is given: the same job again asks only what is not there.
    limit : int, optional
        Rows from the first; all of them without it.

    Returns
    -------
    JobResult
        What came of it. Columns of lists and dicts are JSON text in the sink, so that every part has one type.

    Raises
    ------
    ConfigurationError, TemplateError, SchemaError, CheckpointError
        Before any request.
    EndpointError, BudgetExceeded, Interrupted
        While it runs; the same call goes on.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as place:
    ...     source, sink = pathlib.Path(place, "in.parquet"), pathlib.Path(place, "out.parquet")
    ...     df.to_parquet(source)
    ...     job = llmframe.run(source, sink, "Translate to French: {text}", model="local", max_tokens=8)
    ...     pd.read_parquet(sink).columns.tolist()[:3]
    ['text', 'response', 'response_status']
    >>> job.rows
    2
    """
    work = _Work(os.fspath(source), os.fspath(sink), prompt, _options(sink, keywords), limit)
    bar = Bar(work.total, work.options.progress)
    try:
        loops.run(work.execute, bar.draw)
    except LLMFrameError as error:
        raise work.stopped(error) from error.__cause__
    except KeyboardInterrupt:
        raise work.stopped(Interrupted("interrupted")) from None
    finally:
        bar.close()
    return work.outcome()


def _options(sink: str | os.PathLike[str], keywords: Mapping[str, Any]) -> Options:
    for name in NOT_HERE:
        if keywords.get(name) is not None:
            raise ConfigurationError(f"{name}= is about a frame at hand, and a job reads its rows part by part")
    options = gather(keywords)
    if not options.dedupe or options.on_error == "raise":
        raise ConfigurationError(
            "dedupe=False and on_error='raise' are not for a job, which knows a part of its rows at a time; use "
            "df.llm.complete, or leave them out"
        )
    return options if options.checkpoint is not None else replace(options, checkpoint=f"{os.fspath(sink)}{CHECKPOINT}")


@dataclass(slots=True, eq=False)
class _Part:
    """Some rows of the source on their way."""

    prepared: Prepared
    table: pa.Table
    ends_group: bool
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
        statuses = np.bincount(state.outcomes.statuses(state.plan.request_of), minlength=len(STATUSES))
        self.under_way.remove(prepared)
        self.done += rows
        self.paid += state.usage
        if state.cost_usd is not None:
            self.paid_usd = (self.paid_usd or 0.0) + state.cost_usd
        self.sent_before += state.sent
        self.failed_before.update(state.failures)
        self.counts.update({status: int(count) for status, count in zip(STATUSES, statuses, strict=True) if count})
        self.pacer = state.pacer or self.pacer

    @property
    def rows_done(self) -> int:
        """Rows with an outcome."""
        return self.done + sum(each.state.rows_done for each in tuple(self.under_way))

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


class _Work:
    """One job under way."""

    def __init__(self, source: str, sink: str, prompt: Prompt, options: Options, limit: int | None) -> None:
        self._source = _opened(source)
        self._sink = sink
        self._prompt = prompt
        self._limit = limit
        self.options = options
        if not Path(sink).parent.is_dir():
            raise ConfigurationError(f"{sink} cannot be written: there is no {Path(sink).parent}; make it first")
        rows = self._source.metadata.num_rows
        self.total = Total(options, rows if limit is None else min(rows, limit))
        # Of no rows, so that all that can be known of the call is checked before anything is read.
        empty = self._source.schema_arrow.empty_table()
        self._call: Call = runner.plan_call(self._prompts(empty), options)
        runner.warn_of_open_line(self._call.endpoint.url)
        self._checkpoint = runner.open_checkpoint(self._prompts(empty), options, self._call, Index())
        self._seen = _Seen()
        self._writer: _Writer | None = None
        if self._checkpoint is not None and self._checkpoint.held:
            where, held = options.checkpoint, self._checkpoint.held
            say(f"{held:,} answers are in {where}; what is among them is not asked", quiet=options.progress is False)

    async def execute(self) -> None:
        """Ask for every part, and write each when it and all before it are whole."""
        assert self._checkpoint is not None
        under_way: deque[_Part] = deque()
        whole = False
        tables = _tables(self._source, self._limit)
        self._writer = _Writer(self._sink)
        try:
            while (read := await loops.in_thread(lambda: next(tables, None))) is not None:
                part = await loops.in_thread(lambda read=read: self._prepare(*read))  # type: ignore[misc]
                self.total.under_way.append(part.prepared)
                part.task = asyncio.create_task(self._answer(part, [each.task for each in under_way if each.task]))
                under_way.append(part)
                while len(under_way) >= UNDER_WAY:
                    await self._write(under_way.popleft(), under_way)
            while under_way:
                await self._write(under_way.popleft(), under_way)
            await loops.in_thread(self._writer.finish)
            whole = True
        finally:
            tasks = [part.task for part in under_way if part.task is not None]
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            self.total.ended = time.monotonic()
            self._writer.close()
            checkpoint = self._checkpoint
            await asyncio.shield(loops.in_thread(lambda: checkpoint.close(tidy=whole)))

    def outcome(self) -> JobResult:
        """Give what came of it."""
        total = self.total
        counts: dict[str, int] = {status: total.counts[status] for status in STATUSES if total.counts[status]}
        where = os.fspath(self.options.checkpoint or "")
        return JobResult(total.done, counts, total.sent, total.usage, total.cost_usd, total.seconds, self._sink, where)

    def stopped(self, error: Any) -> Any:
        """Give a job's error with the way to go on."""
        total = self.total
        way = f"the same call goes on from {self.options.checkpoint}"
        words = str(error) or "cancelled"
        error.args = (f"{words} ({total.rows_done:,} of {total.rows:,} rows are done; {way})",)
        return error

    def _prompts(self, table: pa.Table) -> Prompts:
        options = self.options
        frame: pd.DataFrame = table.to_pandas()
        keywords: dict[str, Any] = {"system": options.system, "examples": options.examples, "na": options.na}
        return Prompts(frame, self._prompt, **keywords)

    def _prepare(self, table: pa.Table, ends_group: bool) -> _Part:
        prompts = self._prompts(table)
        call = runner.plan_call(prompts, self.options, self._call)
        prepared = runner.ready(prompts, self.options, call, self._checkpoint)
        seen = self._seen.add(call.plan.keys)
        runner.recall(prepared)
        for number in np.flatnonzero(seen).tolist():  # an earlier row of the job carries what it cost
            outcome = prepared.state.outcomes[number]
            if outcome.status != "pending":
                prepared.state.outcomes.put(number, twin(outcome))
        return _Part(prepared, table, ends_group, seen)

    async def _answer(self, part: _Part, before: list[asyncio.Task[None]]) -> None:
        """Ask a part's requests, first those that no part before it asks."""
        prepared, outcomes = part.prepared, part.prepared.state.outcomes
        pending = outcomes.pending()
        late = pending[part.seen[pending]]
        own = pending[~part.seen[pending]]
        if len(own):
            await runner.ask(prepared, own)
        if len(late):
            if before:
                await asyncio.wait(before)
            await loops.in_thread(lambda: self._recall_late(prepared, late))
            late = late[np.isin(late, outcomes.pending())]
            if len(late):
                await runner.ask(prepared, late)
        prepared.state.ended = time.monotonic()

    def _recall_late(self, prepared: Prepared, late: npt.NDArray[np.intp]) -> None:
        assert self._checkpoint is not None
        self._checkpoint.flush()
        for place, completion in self._checkpoint.find(prepared.state.plan.keys[late]):
            kept = runner.reread(completion, prepared.state.schema)
            if kept is not None:
                prepared.state.outcomes.put(int(late[place]), twin(kept))

    async def _write(self, part: _Part, others: deque[_Part]) -> None:
        """Wait for a part, or for the failure of one after it, and write it."""
        assert part.task is not None
        assert self._writer is not None
        writer = self._writer
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
        await loops.in_thread(lambda: writer.write(_answered(part), part.ends_group))
        self.total.finish(part.prepared)


class _Seen:
    """The requests of the parts so far, in 8 bytes each."""

    def __init__(self) -> None:
        self._sorted: list[npt.NDArray[np.uint64]] = []

    def add(self, keys: npt.NDArray[np.void]) -> npt.NDArray[np.bool_]:
        """Add a part's keys; which of them were there before."""
        words = keys.view(np.uint64).reshape(-1, 4)[:, 0] if len(keys) else np.empty(0, np.uint64)
        known = np.zeros(len(words), np.bool_)
        for each in self._sorted:
            at = np.minimum(np.searchsorted(each, words), len(each) - 1)
            known |= each[at] == words
        if len(words):
            self._sorted.append(np.sort(words))
        while len(self._sorted) > 1 and len(self._sorted[-1]) * 2 > len(self._sorted[-2]):  # few arrays, and long ones
            self._sorted.append(np.sort(np.concatenate([self._sorted.pop(), self._sorted.pop()])))
        return known


class _Writer:
    """Writes parts as one parquet file under a temporary name, in the row groups of the source."""

    def __init__(self, sink: str) -> None:
        self._sink = Path(sink)
        self._temporary = self._sink.with_name(f".{self._sink.name}-{os.getpid()}.tmp")
        self._writer: pq.ParquetWriter | None = None
        self._held: list[pa.Table] = []

    def write(self, table: pa.Table, ends_group: bool) -> None:
        """Take a part; its row group is written when it is whole."""
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._temporary, table.schema, compression="zstd")
        self._held.append(table.cast(self._writer.schema))
        if ends_group or sum(each.nbytes for each in self._held) > GROUP_BYTES:
            self._flush()

    def finish(self) -> None:
        """Give the file its name."""
        self._flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            with open(self._temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(self._temporary, self._sink)

    def close(self) -> None:
        """Leave nothing of a file that is not whole."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._writer is not None and self._held:
            whole = pa.concat_tables(self._held)
            self._held = []
            self._writer.write_table(whole, row_group_size=max(1, whole.num_rows))


def _opened(source: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(source)
    except FileNotFoundError:
        raise ConfigurationError(f"there is no {source}; name a parquet file") from None
    except (OSError, pa.ArrowException) as error:
        raise ConfigurationError(f"{source} cannot be read as parquet: {str(error).splitlines()[0]}") from error


def _tables(source: pq.ParquetFile, limit: int | None) -> Iterator[tuple[pa.Table, bool]]:
    """Read part after part, each with whether it ends a row group; a source of no rows is one part."""
    left = source.metadata.num_rows if limit is None else min(limit, source.metadata.num_rows)
    if not left:
        yield source.schema_arrow.empty_table(), True
    for group in range(source.num_row_groups):
        rest = min(left, source.metadata.row_group(group).num_rows)
        for batch in source.iter_batches(PART_ROWS, row_groups=[group]):
            if rest <= 0:
                break
            table = pa.Table.from_batches([batch], schema=source.schema_arrow).slice(0, rest)
            rest -= table.num_rows
            left -= table.num_rows
            yield table, rest == 0
        if not left:
            return


def _answered(part: _Part) -> pa.Table:
    """Give a part's rows as they were, with the new columns after them."""
    state = part.prepared.state
    names = list(output_dtypes(state.options, state.schema))
    new = state.frame()[names].reset_index(drop=True)
    for name in names:
        if new[name].dtype == object:
            new[name] = pd.array([_as_json(cell) for cell in new[name]], dtype="string")
    made = pa.Table.from_pandas(new, preserve_index=False)
    table = part.table
    for name in names:
        column = made[name]
        table = table.append_column(made.schema.field(name), column)
    return table.replace_schema_metadata(_metadata(part.table.schema.metadata, made.schema.metadata))


def _as_json(cell: Any) -> str | None:
    return None if cell is None else json.dumps(cell, ensure_ascii=False, default=str)


def _metadata(source: Mapping[bytes, bytes] | None, new: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Add the new columns to what pandas has noted of the old ones; without it they would come back as other types."""
    kept = dict(source or {})
    added = json.loads(new[b"pandas"])
    noted = json.loads(kept[b"pandas"]) if b"pandas" in kept else {**added, "columns": [], "index_columns": []}
    noted["columns"] = [*noted["columns"], *added["columns"]]
    kept[b"pandas"] = json.dumps(noted).encode()
    return kept


__all__ = ["JobResult", "Total", "run"]
