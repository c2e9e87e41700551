"""Dask: ``ddf.llm.complete(...)``, the same call over the partitions of a Dask DataFrame, when they are computed.

``import llmframe.dask`` registers the accessor; so does ``import llmframe``, before or after ``import dask.dataframe``.
What travels to the workers is one object a call, whose name, token and repr say nothing of a key.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import operator
import os
import pickle
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import SecretStr

from llmframe.accessor import LLMFrame
from llmframe.budget import Cost
from llmframe.call import LOCAL, plan_call
from llmframe.desk import Desk, Grant, Limits, Wants
from llmframe.errors import ConfigurationError, LLMFrameError, TemplateError
from llmframe.estimate import Estimate, estimate
from llmframe.loops import in_thread
from llmframe.options import Options, call_options, gather, method_takes_options
from llmframe.planning import output_dtypes, prompts_of
from llmframe.prompts import Prompt
from llmframe.requests import Words
from llmframe.results import Completion, Usage, typed
from llmframe.state import State
from llmframe.stations import Alone, Peers, Station, Stations, limits_of

try:
    import cloudpickle
    import dask.dataframe as dd
    from dask.base import normalize_token
    from dask.dataframe.extensions import register_dataframe_accessor, register_series_accessor
except ImportError as missing:
    raise ImportError("llmframe.dask needs Dask: pip install 'llmframe-pandas[dask]'") from missing

__all__ = ["LLMDaskFrame", "LLMDaskSeries"]

ELSEWHERE = "; compute a part of it, as in ddf.head(100), and use df.llm there"
UNTOLD = ("api_key", "where", "progress", "params")  # are no part of a token, or a part of it in another form
DOOR = "llmframe_desk"  # of the scheduler
DESKS = 64  # calls whose desk is kept
SECRET_EXTRAS = ("extra_headers", "extra_query")  # may hold a key

_stations = Stations()
atexit.register(_stations.close)
_desks: dict[str, Desk] = {}  # of the calls whose desk is in this process: it is a scheduler


@register_dataframe_accessor("llm")  # type: ignore[no-untyped-call]
class LLMDaskFrame:
    """A language model over the rows of a Dask DataFrame."""

    def __init__(self, frame: Any) -> None:
        self._frame = frame

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(LLMFrame, name):
            raise AttributeError(f"a Dask DataFrame has llm.complete and llm.estimate, and no llm.{name}{ELSEWHERE}")
        raise AttributeError(name)

    @method_takes_options(call_options)
    def complete(self, prompt: Prompt, **keywords: Any) -> Any:
        """Ask a model once for each row, when the result is computed.

        Parameters
        ----------
        prompt, **keywords
            As `LLMFrame.complete` takes them, but for these.
        checkpoint : path or fsspec URL
            Required: `head` and `len` compute again, and would pay again. All workers have to reach it.
        where : "missing" or Dask Series of booleans, optional
            ``ddf["score"] > 1``.
        max_concurrency, rpm, tpm, max_cost, max_tokens_total : optional
            Of all workers together: the scheduler's process gives out what each may send and spend. So llmframe has to
            be installed there too.
        progress
            Of no use here: `dask.distributed.progress` and `dask.diagnostics.ProgressBar` show the whole computation.
        api_key : str, optional
            It travels to the workers, and shows in no name, repr or dashboard; without it each worker takes
            ``OPENAI_API_KEY`` from its own environment.
        client, history, refresh, dedupe=False, on_error="raise"
            Refused: a client does not travel, and the others are about a frame at hand.

        Returns
        -------
        dask.dataframe.DataFrame
            Lazy, with the columns and types that `LLMFrame.complete` gives. A request that several partitions have is
            asked once; the first row of it in each of them carries what it cost.

        Raises
        ------
        ConfigurationError, TemplateError, SchemaError
            At once, before anything is computed.

        Examples
        --------
        >>> import tempfile
        >>> import dask.dataframe as dd
        >>> ddf = dd.from_pandas(df, npartitions=2)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     out = ddf.llm.complete("Good or bad? {text}", schema=["good", "bad"], model="local", checkpoint=place)
        ...     out.compute()["response_status"].tolist()
        ['ok', 'ok']
        """
        call, masks = _call(self._frame, prompt, keywords)
        return self._frame.map_partitions(call, *masks, meta=call.meta)

    @method_takes_options(call_options)
    def estimate(self, prompt: Prompt, **keywords: Any) -> Estimate:
        """Estimate what `complete` would ask and cost; every partition is computed, and nothing is sent.

        A request that several partitions have is counted in each.

        Raises
        ------
        ConfigurationError, TemplateError, SchemaError, CheckpointError
            As `complete` would.

        Examples
        --------
        >>> import dask.dataframe as dd
        >>> ddf = dd.from_pandas(df, npartitions=2)
        >>> made = ddf.llm.estimate("Translate: {text}", model="gpt-4o-mini", max_tokens=50, checkpoint="runs/fr")
        >>> made.requests, made.completion_tokens
        (2, 100)
        """
        call, masks = _call(self._frame, prompt, keywords)
        estimates = self._frame.map_partitions(call.estimate, *masks, meta=(None, object))
        made: Estimate = functools.reduce(operator.add, estimates.compute())
        return made


@register_series_accessor("llm")  # type: ignore[no-untyped-call]
class LLMDaskSeries:
    """A language model over the values of a Dask Series."""

    def __init__(self, series: Any) -> None:
        self._series = series

    @method_takes_options(call_options)
    def complete(self, prompt: str, **keywords: Any) -> Any:
        """Ask a model once for each value, when the result is computed; see `LLMSeries.complete`.

        Examples
        --------
        >>> import tempfile
        >>> import dask.dataframe as dd
        >>> texts = dd.from_pandas(df["text"], npartitions=1)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     out = texts.llm.complete("Translate: {}", model="local", max_tokens=8, checkpoint=place).compute()
        >>> out.notna().all()
        np.True_
        """
        if not isinstance(prompt, str) or "{" not in prompt:
            raise TemplateError(f"the prompt {prompt!r:.60} has no {{}} for the value, as in 'Translate: {{}}'")
        call, masks = _call(self._series.to_frame(""), prompt, keywords)
        return self._series.map_partitions(call.of_series, *masks, meta=call.meta[call.output])


def _call(frame: Any, prompt: Prompt, keywords: Mapping[str, Any]) -> tuple[PartitionCall, list[Any]]:
    """Check a call, and give it as it travels, with the masks that go beside each partition."""
    options = gather(keywords)
    if options.checkpoint is None:
        raise ConfigurationError(
            "a Dask call needs checkpoint=, a directory or URL that every worker reaches: Dask computes a partition "
            "again for head(), len() or a lost worker, and without one each time would be paid for"
        )
    if options.client is not None:
        raise ConfigurationError(
            "client= cannot travel to the workers of a cluster; pass base_url= and, unless OPENAI_API_KEY is in the "
            "workers' environment, api_key="
        )
    if options.history is not None or options.refresh or not options.dedupe or options.on_error == "raise":
        raise ConfigurationError(
            "history=, refresh=True, dedupe=False and on_error='raise' are for a frame at hand: a partition is "
            "computed whenever Dask needs it, without knowing of the others; leave them out (another checkpoint= asks "
            "anew)"
        )
    masks: list[Any] = []
    if options.where is not None and not isinstance(options.where, str):
        if not isinstance(options.where, dd.Series):
            raise ConfigurationError(
                "where= has to be 'missing' or a Dask Series made from this frame, as in where=ddf['score'] > 1"
            )
        if options.where.npartitions != frame.npartitions:
            raise ConfigurationError(
                f"the mask in where= has {options.where.npartitions} partitions and the frame {frame.npartitions}; "
                "make it from this frame"
            )
        masks = [options.where]
    call = PartitionCall(prompt, options, frame._meta)
    try:
        cloudpickle.dumps(call)
    except Exception as error:
        raise ConfigurationError(
            f"the call cannot travel to the workers of a cluster: {error}; what cannot be pickled is in the prompt or "
            "a keyword (a template object: pass its text, or a function)"
        ) from error
    return call, masks


class PartitionCall:
    """A call as it travels to the workers: a partition in, the partition with its answers out.

    Parameters
    ----------
    prompt, options
        The call's.
    empty : DataFrame
        The columns, without a row.

    Raises
    ------
    ConfigurationError, TemplateError, SchemaError
        The call cannot be made as it was written.
    """

    __name__ = "llm-complete"  # of its tasks, on the dashboard

    def __init__(self, prompt: Prompt, options: Options, empty: pd.DataFrame) -> None:
        self._run = uuid.uuid4().hex
        self._prompt = prompt
        self._key = None if options.api_key is None else SecretStr(options.api_key)
        # Where the client's environment points to: a worker whose own says nothing would ask somebody else.
        base_url = options.base_url or os.environ.get("OPENAI_BASE_URL") or None
        if options.model == LOCAL:
            base_url = options.base_url
        masked = not isinstance(options.where, str | None)
        self._options = replace(options, api_key=None, base_url=base_url, where=None if masked else options.where)
        self._masked = masked
        self._empty = empty
        self.output = options.output
        self.meta = self._look(empty)

    def __call__(self, frame: pd.DataFrame, mask: pd.Series[Any] | None = None) -> pd.DataFrame:
        """Answer the rows of a partition."""
        return self._answer(frame, mask).frame()

    def _answer(self, frame: pd.DataFrame, mask: pd.Series[Any] | None = None) -> State:
        options = self._here(mask)
        station = _stations.enter(self._run, functools.partial(self._station, options))
        try:
            return station.answer(frame, options, _watch())
        finally:
            _stations.leave(self._run)

    def completions(self, frame: pd.DataFrame) -> Answers:
        """Answer some rows: the completions, and what they took."""
        state = self._answer(frame)
        return Answers(state.completions(), state.usage, state.cost_usd, state.sent, state.failures)

    def of_series(self, values: pd.Series[Any], mask: pd.Series[Any] | None = None) -> pd.Series[Any]:
        """Answer the values of a partition: the answers alone."""
        return self(values.to_frame(""), mask)[self.output]

    def estimate(self, frame: pd.DataFrame, mask: pd.Series[Any] | None = None) -> pd.Series[Any]:
        """Estimate a partition, as a series of one."""
        options = self._here(mask)
        return pd.Series([estimate(prompts_of(frame, self._prompt, options), options)], dtype=object)

    def __repr__(self) -> str:
        return f"<llmframe {self._options.model!r} -> {self.output!r}>"

    def __dask_tokenize__(self) -> Any:
        options = self._options
        told = {name: getattr(options, name) for name in options.__dataclass_fields__ if name not in UNTOLD}
        params = {name: value for name, value in options.params.items() if name not in SECRET_EXTRAS}
        return normalize_token([type(self).__name__, self._prompt, told, params, options.where, self._masked])

    def _look(self, empty: pd.DataFrame) -> pd.DataFrame:
        """Check all that can be known without a row, and give the columns of the result."""
        options = replace(self._here(None), where="missing" if self._masked else self._options.where)
        if options.api_key is None and not os.environ.get("OPENAI_API_KEY"):
            options = replace(options, api_key="the workers have it")
        if options.model == LOCAL:  # the embedded model is for the workers to serve
            options = replace(options, model="local model", base_url="http://localhost/v1")
        call = plan_call(prompts_of(empty, self._prompt, options), options)
        made = empty.copy()
        for name, dtype in output_dtypes(options, call.schema).items():
            made[name] = typed([], dtype)
        return made

    def _here(self, mask: pd.Series[Any] | None) -> Options:
        """Give the options in this process, for a partition."""
        key = None if self._key is None else self._key.get_secret_value()
        where = mask if self._masked and mask is not None else self._options.where
        return replace(self._options, api_key=key, where=where)

    def _station(self, options: Options) -> Station:
        if options.api_key is None and options.model != LOCAL and not os.environ.get("OPENAI_API_KEY"):
            raise ConfigurationError(
                "no API key on this worker: set OPENAI_API_KEY in the workers' environment, as in "
                "LocalCluster(env={...}), or pass api_key=, which travels unseen"
            )
        return Station(self._prompt, options, self._empty, self._peers())

    def _peers(self) -> Peers:
        """Find the desk: on the scheduler, where there is one."""
        limits = limits_of(self._options)
        try:
            from distributed import get_worker

            worker = get_worker()
        except (ImportError, ValueError):
            if multiprocessing.parent_process() is not None:
                self._refuse_caps()
            return Alone(desk_of(self._run, limits))
        return OnScheduler(self._run, limits, worker.id)

    def _refuse_caps(self) -> None:
        options = self._options
        for name in ("max_concurrency", "rpm", "tpm", "max_cost", "max_tokens_total"):
            if getattr(options, name) is not None:
                raise ConfigurationError(
                    f"{name}= holds for a cluster as a whole, and processes without a scheduler cannot share it; use "
                    "dask.distributed.Client() (or scheduler='threads')"
                )


@dataclass(frozen=True, slots=True)
class Answers:
    """What came of some rows on a worker.

    Attributes
    ----------
    completions : list of Completion
        One a row, in their order.
    usage, cost_usd, sent, failures
        See `State`.
    """

    completions: list[Completion]
    usage: Usage
    cost_usd: float | None
    sent: int
    failures: Counter[str]


def _watch() -> Callable[[], None]:
    """Give what stops a task that nobody waits for any more, once: Dask lets its thread go on, and it would spend."""
    try:
        from distributed import get_worker

        worker = get_worker()
        key = worker.get_current_task()
    except (ImportError, ValueError, KeyError):
        return lambda: None
    raised = False

    def look() -> None:
        nonlocal raised
        task = worker.state.tasks.get(key)
        if not raised and (task is None or task.state == "cancelled"):
            raised = True
            raise LLMFrameError("given up: nobody waits for this partition any more")

    return look


class OnScheduler:
    """The way to the desk of a cluster, which is on its scheduler."""

    many = True

    def __init__(self, run: str, limits: Limits, worker: str) -> None:
        from distributed import get_client

        self._run, self._limits, self._worker = run, limits, worker
        self._client = get_client()
        self._opened = False

    async def claim(self, part: str, words: Words) -> npt.NDArray[np.bool_]:
        """See `Desk.claim`."""
        taken: npt.NDArray[np.bool_] = await self._at_desk("claim", self._worker, part, words)
        return taken

    async def release(self, part: str) -> None:
        """See `Desk.release`."""
        await self._at_desk("release", part)

    async def meet(self, caller: str, wants: Wants) -> Grant:
        """See `Desk.meet`."""
        grant: Grant = await self._at_desk("meet", self._worker, caller, wants)
        return grant

    async def leave(self, caller: str, spent: Cost) -> None:
        """See `Desk.leave`."""
        await self._at_desk("leave", caller, spent)

    async def _at_desk(self, verb: str, *arguments: Any) -> Any:
        return await in_thread(functools.partial(self._ask, (self._run, self._limits, verb, *arguments)))

    def _ask(self, said: tuple[Any, ...]) -> Any:
        try:
            if not self._opened:
                self._client.run_on_scheduler(open_desks)  # type: ignore[no-untyped-call]
                self._opened = True
            # By a door of our own: what is run on a scheduler is a line of its log, and this is up to 20 a second.
            door = getattr(self._client.scheduler, DOOR)
            heard = self._client.sync(door, said=pickle.dumps(said))  # type: ignore[no-untyped-call]
            return pickle.loads(heard)
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"the scheduler of the cluster cannot import {error.name}: install llmframe there too, in the version "
                "of the workers"
            ) from error


def open_desks(dask_scheduler: Any) -> None:
    """Let a scheduler have desks; run there, by whoever comes first."""

    async def hear(said: bytes) -> bytes:
        alive = {worker.server_id for worker in dask_scheduler.workers.values()}
        return pickle.dumps(at_desk(*pickle.loads(said), alive=alive))

    dask_scheduler.handlers.setdefault(DOOR, hear)


def at_desk(run: str, limits: Limits, verb: str, *arguments: Any, alive: set[str]) -> Any:
    """Do something at a call's desk; on the scheduler, whose clock and knowledge of its workers it adds."""
    desk = desk_of(run, limits)
    if verb == "claim":
        worker, part, words = arguments
        return desk.claim(worker, part, words, alive)
    if verb == "meet":
        worker, caller, wants = arguments
        return desk.meet(worker, caller, wants, time.monotonic(), alive)
    return getattr(desk, verb)(*arguments)


def desk_of(run: str, limits: Limits) -> Desk:
    """Give the desk of a call that is in this process."""
    desk = _desks.pop(run, None) or Desk(limits)
    _desks[run] = desk  # now the last of them
    for old in list(_desks)[:-DESKS]:
        del _desks[old]
    return desk
