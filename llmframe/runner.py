"""The run: a call is made ready, what its checkpoint lacks is asked, and a frame comes of it.

Everything that can be known is checked before anything is spent; what is answered is kept, however the run ends.
"""

from __future__ import annotations

import asyncio
import functools
import time
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from llmframe import loops
from llmframe.call import open_checkpoint, plan_call, warn_of_open_line
from llmframe.checkpoint import Checkpoint
from llmframe.collecting import rare_collections
from llmframe.delivery import delivery_of, row_failed
from llmframe.engine import Crew
from llmframe.errors import CheckpointError, ConfigurationError, Interrupted, LLMFrameError
from llmframe.lines import Line, give_back, line_to
from llmframe.options import Options
from llmframe.planning import check_length
from llmframe.prepared import Prepared, ready, recall, tell
from llmframe.progress import Bar
from llmframe.prompts import Prompts
from llmframe.report import Run
from llmframe.state import State

FLUSH_LOOK_S = 0.1  # how often it is seen whether a flush is due

_last: Run | None = None


def last_run() -> Run:
    """Give the last run of this process, also one that is going on or was stopped.

    Raises
    ------
    ConfigurationError
        There was none yet.

    Examples
    --------
    >>> out = df.llm.complete("Translate to French: {text}", model="local")
    >>> llmframe.last_run().counts
    {'ok': 2}
    """
    if _last is None:
        raise ConfigurationError("there was no run in this process yet; df.llm.complete(...) makes one")
    return _last


def complete(prompts: Prompts, options: Options, *, listed: bool = False) -> State:
    """Run and wait; see `LLMFrame.complete`. What stops a call of a list (`listed`) carries its completions."""
    prepared = prepare(prompts, options)
    bar = Bar(prepared.state, options.progress)
    try:
        if prepared.endpoint.bound and loops.in_running_loop():
            loops.run_in_callers_loop(lambda: execute(prepared), bar.draw)
        else:
            loops.run(lambda: execute(prepared), bar.draw)
    except LLMFrameError as error:
        raise _stopped(error, prepared.state, listed) from error.__cause__
    except KeyboardInterrupt:
        raise _stopped(Interrupted("interrupted"), prepared.state, listed) from None
    finally:
        bar.close()
    return prepared.state


async def acomplete(prompts: Prompts, options: Options, *, listed: bool = False) -> State:
    """Run without blocking the caller's loop; see `complete` and `LLMFrame.acomplete`."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise ConfigurationError(
            "an awaited call needs asyncio, whose loop is not running here; in trio write "
            "await trio.to_thread.run_sync(lambda: df.llm.complete(...))"
        ) from None
    planning = asyncio.ensure_future(loops.in_thread(functools.partial(prepare, prompts, options)))
    try:
        prepared = await asyncio.shield(planning)
    except asyncio.CancelledError:  # the thread cannot be stopped, and may hold a checkpoint when it is done
        planning.add_done_callback(_let_go)
        await asyncio.wait({planning})
        raise
    bar = Bar(prepared.state, options.progress)
    try:
        await loops.arun(lambda: execute(prepared), bar.draw, here=prepared.endpoint.bound)
    except LLMFrameError as error:
        raise _stopped(error, prepared.state, listed) from error.__cause__
    except asyncio.CancelledError as error:
        raise _stopped(error, prepared.state, listed) from None
    finally:
        bar.close()
    return prepared.state


def _let_go(planning: asyncio.Future[Prepared]) -> None:
    """End a run that was planned, and that nobody waits for any more."""
    if not planning.cancelled() and planning.exception() is None:
        prepared = planning.result()
        prepared.state.ended = time.monotonic()
        if prepared.checkpoint is not None:
            prepared.checkpoint.close(tidy=False)


def prepare(prompts: Prompts, options: Options) -> Prepared:
    """Check a call and plan its run; what the checkpoint holds is found, nothing is asked.

    Raises
    ------
    ConfigurationError, TemplateError, SchemaError, CheckpointError
        The call cannot be made as it was written.
    """
    global _last
    call = plan_call(prompts, options)
    for url in (call.endpoint.url, *call.endpoint.replicas):
        warn_of_open_line(url)
    checkpoint = open_checkpoint(prompts, options, call)
    try:
        prepared = ready(prompts, options, call, checkpoint)
        found = recall(prepared)
        check_length(prepared.state.outcomes.dimensions, prompts.frame, options, call.plan.selected)
        tell(prepared, found)
    except BaseException:
        if checkpoint is not None:
            checkpoint.close()
        raise
    _last = Run(prepared.state)
    return prepared


async def execute(prepared: Prepared) -> None:
    """Ask what is still to be asked, and keep what comes."""
    state, checkpoint = prepared.state, prepared.checkpoint
    whole = False
    try:
        if state.plan.unreadable and state.options.on_error == "raise":
            number, reason = next(iter(state.plan.unreadable.items()))
            raise row_failed(state, number, reason)
        asked = state.outcomes.pending()
        if len(asked):
            await ask(prepared, asked)
        whole = True
    finally:
        state.ended = time.monotonic()
        if checkpoint is not None:
            try:
                # Whoever stopped the run waits for it: what is saved then is saved, and tidied by the next run.
                close = functools.partial(checkpoint.close, tidy=whole)
                await asyncio.shield(loops.in_thread(close))
            except CheckpointError as error:
                state.unsaved = str(error)
                raise


async def ask(prepared: Prepared, asked: npt.NDArray[np.intp]) -> None:
    """Ask these requests, by number, and keep what comes; the checkpoint stays open."""
    line = line_to(prepared.endpoint, prepared.policy.caps)
    try:
        with rare_collections():
            await _ask_on(line, prepared, asked)
    finally:
        await give_back(line)


async def _ask_on(line: Line, prepared: Prepared, asked: npt.NDArray[np.intp]) -> None:
    state = prepared.state
    state.pacer = line.pacer
    made = delivery_of(prepared, asked)
    crew = Crew(
        line=line,
        endpoint=prepared.endpoint,
        requests=made.requests,
        read=made.read,
        deliver=made.deliver,
        policy=prepared.policy,
        tally=state.tally,
        ask=made.again,
        budget=prepared.budget,
    )
    at_work = asyncio.create_task(crew.run())
    saving = asyncio.create_task(_save(prepared.checkpoint)) if prepared.checkpoint is not None else None
    tasks = {at_work} if saving is None else {at_work, saving}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        await loops.ended({at_work})
        raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for unkept in state.tally.unkept.values():  # the run ended while they were asked again
            state.pay(unkept)
        state.tally.unkept.clear()
    if saving is not None and not saving.cancelled():
        saving.result()  # it ends by itself only where the store failed
    at_work.result()


async def _save(checkpoint: Checkpoint) -> None:
    """Flush whenever one is due, off the loop."""
    while True:
        await asyncio.sleep(FLUSH_LOOK_S)
        if checkpoint.due(time.monotonic()):
            await asyncio.shield(loops.in_thread(checkpoint.flush))


def _stopped(error: Any, state: State, listed: bool) -> Any:
    """Give a run's error with the rows done so far, and the way to go on."""
    with suppress(Exception):  # the error itself matters more than the frame
        error.frame = state.frame()
        if listed:  # of a million rows they take 12 s to make, and whoever pressed Ctrl-C waits
            error.completions = state.completions()
    words = str(error) or "cancelled"
    if state.unsaved is not None and state.unsaved not in words:
        words = f"{words}; {state.unsaved}"
    error.args = (f"{words} ({state.rows_done:,} of {state.rows:,} rows are done; {_way_on(state)})",)
    return error


def _way_on(state: State) -> str:
    """Say how a run that was stopped goes on without paying twice."""
    options = state.options
    if options.checkpoint is not None and state.unsaved is None:
        if options.refresh:
            return (
                f"refresh=True would ask them all again; without it the call takes what {options.checkpoint} holds, "
                "for rows not refreshed the old answers, and asks the rest"
            )
        return f"the same call goes on from {options.checkpoint}"
    verb, usual = ("embed", "embedding") if options.embeds else ("complete", "response")
    output = "" if options.output == usual else f", output={options.output!r}"
    if options.where is None or isinstance(options.where, str):
        return f"go on with llmframe.last_run().frame.llm.{verb}(..., where='missing'{output})"
    # where='missing' would also ask the rows that the mask left out
    status = f"{options.output}_status"
    return (
        f"go on with out = llmframe.last_run().frame; out.llm.{verb}(..., where=out[{status!r}] == 'pending'{output})"
    )
