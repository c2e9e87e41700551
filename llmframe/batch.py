"""Batch jobs: the same call through the provider's Batch API, for half the price and an answer within a day.

A job is a directory. Whatever process opens it goes on where the last one stopped, and nothing is submitted twice.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pandas as pd

from llmframe import answers, batch_view, loops
from llmframe.batch_access import Access, checked_poll
from llmframe.batch_api import Away, BatchApi, Refused
from llmframe.batch_intake import ANSWERS, check_call, keep_rows, plan_job
from llmframe.batch_ledger import Busy, Ledger, Place
from llmframe.batch_plan import FileLimits, key_of
from llmframe.batch_rows import Rows, digest_of, load_rows
from llmframe.batch_state import state_of
from llmframe.batch_work import Keeper, Worker, slower, write_parts
from llmframe.call import plan_call, warn_of_open_line
from llmframe.checkpoint import Checkpoint, Origin
from llmframe.embedding import read_embedding
from llmframe.endpoint import Endpoint
from llmframe.errors import ConfigurationError, EndpointError, Interrupted, LLMFrameError
from llmframe.notices import say, warn
from llmframe.options import POLL_S, Options, gather
from llmframe.progress import Bar
from llmframe.prompts import Prompts
from llmframe.requests import identity
from llmframe.results import Completion, Usage
from llmframe.schemas import Schema
from llmframe.shelf import Shelf
from llmframe.state import State

TRIES = 4  # looks of a submission at an endpoint that is away, before it leaves the rest to `wait`


class AnotherCall(ConfigurationError):
    """The directory keeps the job of another call."""


def submit_batch(
    prompts: Prompts, options: Options, job: str | os.PathLike[str], *, keep_files: bool, poll_s: float
) -> BatchJob:
    """Give a call to the Batch API; see `LLMFrame.submit_batch`."""
    check_call(options)
    place = Place(job)
    if options.checkpoint is None:
        options = replace(options, checkpoint=os.fspath(place.path / ANSWERS))
    call = plan_call(prompts, options)
    warn_of_open_line(call.endpoint.url)
    access = Access(options, options.schema, checked_poll(poll_s))
    with place.held():
        if place.exists:
            ledger = place.load()
            terms = ledger.terms
            if (terms.digest, terms.output) != (digest_of(call.plan), options.output):
                raise AnotherCall(
                    f"another call was submitted as {job}: name another directory, or go on with that job by "
                    f"llmframe.BatchJob.open({os.fspath(job)!r})"
                )
            say(f"{job} is this job already; going on with it", quiet=options.progress is False)
            kept = load_rows(place)
            plan = replace(kept.plan, selected=call.plan.selected, skipped=call.plan.skipped)
            rows = Rows(prompts.frame, plan, kept.asked)  # with other columns, say, or another index
            keep_rows(place, rows, options)
            place.save(replace(ledger, terms=replace(terms, details=options.details)))
            made = BatchJob(place, access, rows)
        else:
            made = BatchJob(place, access, plan_job(place, prompts, options, call, keep_files))
    return made._submitted()


class BatchJob:
    """A call that was given to the provider's Batch API, kept in a directory.

    `LLMFrame.submit_batch` makes one; `open` finds it again, in any process and at any time.

    Attributes
    ----------
    directory : str
        Where it is kept.

    Examples
    --------
    >>> job = df.llm.submit_batch("Translate: {text}", model="gpt-4o-mini", job="runs/job")  # doctest: +SKIP
    >>> job.wait().frame()  # doctest: +SKIP
    >>> llmframe.BatchJob.open("runs/job").refresh()  # doctest: +SKIP
    """

    def __init__(self, place: Place, access: Access, rows: Rows | None = None) -> None:
        self._place = place
        self._access = access
        self._rows = rows
        self._target: Endpoint | None = None
        self._ledger = place.load()
        self.directory = place.name

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        *,
        schema: Any = None,
        client: Any = None,
        base_url: str | None = None,
        api_key: str | None = None,
        poll_s: float = POLL_S,
        progress: bool | None = None,
    ) -> BatchJob:
        """Find a job again; nothing is asked.

        Parameters
        ----------
        directory : path
            As it was given as ``job=``.
        schema : pydantic model, optional
            The class that the job was submitted with, where it cannot be found by its name; labels and JSON schemas
            are kept in the directory.
        client, base_url, api_key : optional
            As for `LLMFrame.complete`: the directory holds no key.
        poll_s : float, default 10
            Seconds between two looks while something happens; thirty times that while nothing does.
        progress : bool, optional
            A bar, or none.

        Raises
        ------
        ConfigurationError
            There is no job, or it is at another endpoint.

        Examples
        --------
        >>> llmframe.BatchJob.open("no/such/job")
        Traceback (most recent call last):
        llmframe.errors.ConfigurationError: there is no Batch job in no/such/job; df.llm.submit_batch(..., ...
        """
        place = Place(directory)
        place.load()
        given = {"client": client, "base_url": base_url, "api_key": api_key, "progress": progress}
        options = gather({name: value for name, value in given.items() if value is not None})
        return cls(place, Access(options, schema, checked_poll(poll_s)))

    @property
    def ended(self) -> bool:
        """Whether nothing is left to wait for."""
        return self._ledger.over

    @property
    def usage(self) -> Usage:
        """The tokens of what was answered so far."""
        return self._ledger.usage

    @property
    def cost_usd(self) -> float | None:
        """The same in USD, at half the online price; None where no price is known."""
        return self._ledger.cost_usd

    @property
    def parts(self) -> pd.DataFrame:
        """The job's files, one a row.

        The columns are ``part``, ``requests``, ``status``, ``done``, ``failed``, ``left`` (the requests without an
        answer that `resubmit` asks again), ``cost_usd``, ``batch`` (the provider's id), and ``error`` (why it came to
        nothing, or what is missing of it).
        """
        return batch_view.parts_frame(self._ledger)

    @property
    def counts(self) -> dict[str, int]:
        """Rows by status, those that occur, as `frame` would give them."""
        return self._state().counts

    @property
    def missing(self) -> int:
        """How many requests may have an answer, paid for, in a batch or file that the provider does not give now."""
        return sum(part.missing for part in self._ledger.parts)

    def refresh(self) -> BatchJob:
        """Look once at the provider: take what has ended, send what may go out now.

        In a job that has ended, look for what is `missing`: a key of another project, or a proxy, may have hidden it.

        Raises
        ------
        EndpointError
            The endpoint is away, or takes no key; the job goes on where it stood.
        """
        self._read()
        self._run(self._look_again if self._ledger.over else self._look, lambda: None)
        return self

    def wait(self) -> BatchJob:
        """Wait until the job has ended; Ctrl-C leaves it running at the provider.

        Looks every `poll_s` seconds while something happens, and ever more seldom while nothing does. An endpoint that
        is away is waited for.

        Raises
        ------
        EndpointError
            The endpoint takes no key, or has no Batch API.
        Interrupted
            At Ctrl-C; ``.frame`` holds the rows so far.
        """
        self._read()
        awaited = batch_view.Awaited(lambda: self._ledger)
        bar = Bar(awaited, self._access.options.progress)
        try:
            self._run(self._wait, bar.draw)
        finally:
            awaited.ended = time.monotonic()
            bar.close()
        return self

    def frame(self, source: pd.DataFrame | None = None) -> pd.DataFrame:
        """Give the rows with the columns that `LLMFrame.complete` would give; what has not come is ``pending``.

        Nothing is asked: `refresh` or `wait` bring what has ended.

        Parameters
        ----------
        source : DataFrame, optional
            The frame that was submitted, where it has columns that the directory could not keep.

        Raises
        ------
        ConfigurationError
            Another frame than was submitted; a pydantic model that cannot be found.
        """
        kept = self._kept
        if source is None and kept.left_out:
            warn(
                f"the job's directory could not keep the column(s) {', '.join(kept.left_out)}; pass the frame, "
                "job.frame(df), to have them"
            )
        if source is not None:
            if not (len(source) == len(kept.frame) and source.index.equals(kept.frame.index)):
                raise ConfigurationError(
                    f"this is not the frame that was submitted: it has {len(source):,} rows where the job has "
                    f"{len(kept.frame):,}, or another index"
                )
            kept = replace(kept, frame=source)
        return self._state(kept).frame()

    def cancel(self) -> BatchJob:
        """Send no more, and ask the provider to stop what runs; `wait` then takes what was done till then.

        Raises
        ------
        EndpointError
            The endpoint is away, or takes no key. Nothing more is sent all the same; call again.
        """

        async def cancel(api: BatchApi) -> None:
            async with self._worker(api, None) as worker:
                await worker.cancel()

        self._run(cancel, lambda: None)
        return self

    def resubmit(self) -> BatchJob:
        """Submit again what has no answer and may get one: expired, cancelled, missing, or failed on their side.

        A batch or file that was not to be found is looked for once more before its rows are asked again.
        A row that the endpoint refused (a 4xx) stays ``failed``: change it and submit it anew.

        Raises
        ------
        ConfigurationError
            The job has not ended.
        EndpointError
            As for `refresh`.
        """
        self._ledger = self._place.load()
        if not self._ledger.over:
            raise ConfigurationError(f"the job in {self.directory} has not ended; job.wait() first, or job.cancel()")
        self.refresh()
        with self._place.held():
            ledger = self._ledger = self._place.load()
            sources = [part for part in ledger.parts if part.left and not part.taken]
            if sources:
                lines = self._lines_again(ledger)
                made, _ = write_parts(self._place, lines, ledger.parts[-1].number + 1, FileLimits())
                taken = [replace(part, taken=True) for part in sources]
                self._ledger = self._place.save(
                    replace(ledger.with_parts(*taken, *made), cancelled=False, swept=False, held_until_s=0.0)
                )
                for part in sources:
                    self._place.delete(part.input)
        return self._submitted()

    def _lines_again(self, ledger: Ledger) -> Iterator[bytes]:
        """Give the lines that are to be asked again: not those that were answered elsewhere meanwhile."""
        plan = self._kept.plan
        checkpoint = Shelf.at(self._place.found(ledger.terms.checkpoint))
        found = {} if checkpoint is None else dict(checkpoint.find(plan.keys))
        answered = {plan.keys[number].tobytes() for number in found}
        for part in ledger.parts:
            if part.left and not part.taken:
                again = {each.key for each in self._place.left(part, lambda each: each.again)} - answered
                yield from (line for line in self._place.lines(part.input) if key_of(line) in again)

    # -- what is kept

    @property
    def _kept(self) -> Rows:
        if self._rows is None:
            self._rows = load_rows(self._place)
        return self._rows

    def _read(self) -> Schema | None:
        """Find the schema that answers are read by, before anything is waited for."""
        return self._access.schema_of(self._ledger.terms, self.directory)

    def _state(self, rows: Rows | None = None) -> State:
        """Put together what is known of each row."""
        return state_of(self._place, self._ledger, rows or self._kept, self._read())

    # -- the work

    def _submitted(self) -> BatchJob:
        """Send what may go out now."""
        self._run(self._submit, lambda: None)
        return self

    async def _submit(self, api: BatchApi) -> None:
        for number in range(1, TRIES + 1):
            try:
                await self._look(api)
                return
            except Away:
                if number == TRIES:
                    raise
            await asyncio.sleep(min(self._access.poll_s, 2.0**number))

    async def _look(self, api: BatchApi) -> float:
        """Look once; the seconds after which the endpoint asks to look again."""
        async with self._worker(api, self._keeper()) as worker:
            await worker.look()
            return worker.asked_s

    async def _look_again(self, api: BatchApi) -> None:
        async with self._worker(api, self._keeper()) as worker:
            await worker.look_again()

    async def _wait(self, api: BatchApi) -> None:
        slow, asked_s, told = 1.0, 0.0, False
        while True:
            before = self._ledger
            try:
                asked_s = await self._look(api)
                told = False
            except Busy:  # another process looks for us
                self._ledger = self._place.load()
            except Away as away:
                asked_s = away.asked_s
                if not told:
                    say(f"{away}; the job waits, and looks again", quiet=self._access.options.progress is False)
                told = True
            if self._ledger.over:
                return
            slow = slower(slow, news=self._ledger != before)
            await asyncio.sleep(max(asked_s, self._access.poll_s * slow))

    @asynccontextmanager
    async def _worker(self, api: BatchApi, keeper: Keeper | None) -> AsyncIterator[Worker]:
        """Be the one process at work on the job, on the ledger as it stands now."""
        async with loops.entered(self._place.held()):
            worker = Worker(self._place, api, keeper, self._access.poll_s, self._place.load())
            try:
                yield worker
            except Refused as refusal:  # of what a Batch API does not refuse: asked once more, it may be done
                raise Away(str(refusal)) from refusal
            finally:
                self._ledger = worker.ledger

    def _keeper(self) -> Keeper:
        terms, schema = self._ledger.terms, self._read()
        price = self._access.price_of(terms)
        origin = Origin(terms.identity, terms.api, terms.model, terms.template, terms.parameters)

        def read(payload: Any, request_id: str | None) -> Completion | None:
            if terms.api == "embeddings":
                return read_embedding(payload, 1, price=price, latency_s=None, attempts=1, request_id=request_id)
            return answers.read_reply(
                payload,
                api=terms.api,  # type: ignore[arg-type]
                schema=schema,
                price=price,
                several=terms.several,
                latency_s=None,
                attempts=1,
                request_id=request_id,
            )

        return Keeper(lambda: Checkpoint.open(self._place.found(terms.checkpoint), origin), read)

    def _run(self, work: Callable[[BatchApi], Coroutine[Any, Any, Any]], beat: Callable[[], None]) -> None:
        """Do it by the one door from sync to async, and say how to come back if it is stopped."""
        if self._target is None:
            self._target = self._access.target(self._ledger.terms, self.directory)
        target = self._target

        async def connected() -> None:
            api = BatchApi(target, self._access.extras)
            try:
                await work(api)
            finally:
                await api.close()

        door = loops.run_in_callers_loop if target.bound and loops.in_running_loop() else loops.run
        try:
            door(connected, beat)
        except Away as away:
            raise self._stopped(EndpointError(str(away))) from away
        except LLMFrameError as error:
            raise self._stopped(error) from error.__cause__
        except KeyboardInterrupt:
            raise self._stopped(Interrupted("interrupted")) from None

    def _stopped(self, error: Any) -> Any:
        """Give an error with the rows so far, and the way to come back."""
        self._ledger = self._place.load()
        try:
            error.frame = self._state().frame()
        except LLMFrameError:
            error.frame = None
        running = any(part.stage in ("running", "creating") for part in self._ledger.parts)
        where = "the job goes on at the provider" if running else "the job is kept"
        here = identity(os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
        there = self._ledger.terms.identity
        endpoint = "" if there == here else f", base_url={there!r}"
        way = f"llmframe.BatchJob.open({self.directory!r}{endpoint}).wait() comes back to it"
        error.args = (f"{error or 'stopped'} ({where}; {way})",)
        return error

    # -- how it shows itself

    def __repr__(self) -> str:
        return batch_view.text(self.directory, self._ledger)

    def _repr_html_(self) -> str:
        return batch_view.page(self.directory, self._ledger)
