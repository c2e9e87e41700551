"""The run: plan, checkpoint, engine, frame.

Everything that can be known is checked before anything is spent; what is answered is kept, however the run ends.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from llmframe import answers, endpoint, loops, replicas
from llmframe.asking import Accepted, Asking
from llmframe.budget import Bound, Budget, most_completion_tokens
from llmframe.checkpoint import Checkpoint, Origin
from llmframe.collecting import rare_collections
from llmframe.embedding import Embedding
from llmframe.endpoint import Endpoint
from llmframe.engine import Ask, Crew, Policy, Read
from llmframe.errors import CheckpointError, ConfigurationError, EndpointError, Interrupted, LLMFrameError, RowFailed
from llmframe.index import Index
from llmframe.lines import Line, give_back, line_to
from llmframe.messages import Messages
from llmframe.notices import say, warn
from llmframe.options import Options
from llmframe.outcomes import Outcomes
from llmframe.pacing import Caps
from llmframe.parts import embeddings
from llmframe.planning import (
    Plan,
    check_columns,
    check_length,
    kept_dimensions,
    make_plan,
    other_length,
    rows_of,
    select,
)
from llmframe.prices import PriceOf, known_prices, read_prices
from llmframe.progress import Bar
from llmframe.prompts import Missing, Prompts
from llmframe.report import Run
from llmframe.requests import Requests
from llmframe.results import PAID, Completion, Usage, property_column
from llmframe.schemas import Schema, Unfit, read_schema
from llmframe.state import State
from llmframe.texts import Texts
from llmframe.transports import Extras

LOCAL = "local"  # the model= that means the embedded one
WORTH_SAVING = 200  # rows; a run of more without a checkpoint says what one would save
FLUSH_LOOK_S = 0.1  # how often it is seen whether a flush is due

_last: Run | None = None
_open_lines: set[str] = set()  # hosts that were warned of


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


@dataclass(frozen=True, slots=True)
class Call:
    """A call whose checks are done: what each of its rows sends, where to, and what that costs."""

    schema: Schema | None
    endpoint: Endpoint
    requests: Requests
    plan: Plan
    params: Mapping[str, Any]
    price: PriceOf | None
    budget: Budget | None
    accepted: Accepted = field(default_factory=Accepted)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that is ready to start: all checks are done, and nothing was asked."""

    state: State
    prompts: Prompts
    requests: Requests
    endpoint: Endpoint
    policy: Policy
    price: PriceOf | None
    budget: Budget | None
    checkpoint: Checkpoint | None
    accepted: Accepted

    @property
    def quiet(self) -> bool:
        """Whether the call asked not to be told anything."""
        return self.state.options.progress is False


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


def open_checkpoint(prompts: Prompts, options: Options, call: Call, index: Index | None = None) -> Checkpoint | None:
    """Open the checkpoint of a call, if it has one.

    Raises
    ------
    CheckpointError
        It cannot be read or written.
    """
    if options.checkpoint is None:
        return None
    assert options.model is not None
    origin = Origin(
        endpoint=call.endpoint.identity,
        api=options.api,
        model=options.model,
        template=prompts.description,
        parameters=call.requests.parameters,
    )
    return Checkpoint.open(options.checkpoint, origin, index)


def ready(prompts: Prompts, options: Options, call: Call, checkpoint: Checkpoint | None) -> Prepared:
    """Put together what a run needs."""
    state = State(prompts.frame, options, call.schema, call.plan, Outcomes(len(call.plan.keys)), prompts=prompts)
    if call.plan.unreadable:
        shared = rows_of(call.plan)
        for number, reason in call.plan.unreadable.items():
            state.outcomes.put(number, Completion(status="failed", error=reason))
            state.rows_done += int(shared[number])
    return Prepared(
        state=state,
        prompts=prompts,
        requests=call.requests,
        endpoint=call.endpoint,
        policy=Policy(Caps(options.max_concurrency, options.rpm, options.tpm), options.max_attempts, options.timeout),
        price=call.price,
        budget=call.budget,
        checkpoint=checkpoint,
        accepted=call.accepted,
    )


def warn_of_open_line(url: str) -> None:
    """Warn once of an endpoint on the way to which the key can be read."""
    parts = urlsplit(url)
    host = f"{parts.scheme}://{parts.hostname}"
    if endpoint.is_open(url) and host not in _open_lines:
        _open_lines.add(host)
        warn(f"the key and the prompts go to {host} unencrypted, for anybody on the way to read; use https://")


def plan_call(prompts: Prompts, options: Options, like: Call | None = None) -> Call:
    """Check a call and plan it; nothing is asked, and no checkpoint is touched.

    Parameters
    ----------
    prompts : Prompts
        The rows and what each sends.
    options : Options
        The call's keywords.
    like : Call, optional
        The same call for other rows: all but the plan is taken from it, the budget too.

    Raises
    ------
    ConfigurationError, TemplateError, SchemaError
        The call cannot be made as it was written.
    """
    if like is not None:
        selected = select(prompts.frame, options)
        plan = make_plan(prompts, like.requests, selected, dedupe=options.dedupe)
        return replace(like, plan=plan)
    if options.embeds:
        _check_embedding(prompts, options)
    if options.model is None:
        raise ConfigurationError(
            "no model: pass model=, set it with llmframe.configure(model=...) or LLMFRAME_MODEL; "
            'model="local" needs no key and no network'
        )
    schema = read_schema(options.schema, options.output)
    if schema is not None and "response_format" in options.params:
        raise ConfigurationError("schema= and response_format= say the same; pass one of them")
    if options.api == "responses" and options.params.keys() & {"n", "background"}:
        raise ConfigurationError("api='responses' gives one answer a request, at once; leave n= and background= out")
    if schema is not None and schema.columns and options.several:
        raise ConfigurationError("n= gives a list of answers, and a schema with properties needs one; leave n= out")
    selected = select(prompts.frame, options)
    check_columns(prompts.frame, options, schema, selected)
    for name in () if schema is None else schema.columns:
        if (column := property_column(options.output, name)) != f"{options.output}_{name}":
            words = (
                f"the property {name!r} is in column {column!r}: without the underscore it is a column of llmframe's"
            )
            say(words, quiet=options.progress is False, once=True)
    price: PriceOf | None = None
    if options.prices is not None:
        price = read_prices(options.prices, embeds=options.embeds)
    params, extras = split_extras(options.params)
    target = replicas.resolve(
        client=options.client,
        base_url=options.base_url,
        api_key=options.api_key,
        local_model=options.model == LOCAL and options.client is None,
        extras=extras,
        api=options.api,
    )
    if target.bound and loops.in_running_loop():
        loops.let_callers_loop_nest()
    if price is None and options.model != LOCAL:
        price = known_prices(options.model, target.url, params.get("service_tier"))
    budget = _budget(options, params, price)
    requests = Requests(
        target.identity,
        options.model,
        params,
        schema.canonical if schema else None,
        schema.response_format if schema else None,
        options.api,
    )
    plan = make_plan(prompts, requests, selected, dedupe=options.dedupe)
    return Call(schema, target, requests, plan, params, price, budget)


def _check_embedding(prompts: Prompts, options: Options) -> None:
    if not isinstance(prompts, Texts):
        raise ConfigurationError("api='embeddings' gives no answers; embeddings are made by df.llm.embed('text')")
    if options.model is None:
        raise ConfigurationError("no model: pass model= to embed, as in model='text-embedding-3-small'")


def _budget(options: Options, params: Mapping[str, Any], price: PriceOf | None) -> Budget | None:
    if options.max_cost is None and options.max_tokens_total is None:
        return None
    assert options.model is not None
    if options.max_cost is not None and price is None:
        raise ConfigurationError(
            f"max_cost= needs a price, and none is known for {options.model!r} here (genai-prices, of the extra "
            "'cost', knows most at their own endpoints); pass prices={'input': ..., 'output': ...} in USD per million "
            "tokens, or max_tokens_total="
        )
    keyword = "max_cost" if options.max_cost is not None else "max_tokens_total"
    bound = Bound(0 if options.embeds else most_completion_tokens(options.model, params, keyword), price)
    return Budget(bound=bound, max_usd=options.max_cost, max_tokens=options.max_tokens_total)


def recall(prepared: Prepared, numbers: npt.NDArray[np.intp] | None = None) -> int:
    """Take what the checkpoint holds, of these requests or of all; how many of them it answers."""
    state, checkpoint = prepared.state, prepared.checkpoint
    if checkpoint is None:
        return 0
    keys = state.plan.keys if numbers is None else state.plan.keys[numbers]
    if state.options.refresh:
        checkpoint.supersede(keys)
        return 0
    shared = rows_of(state.plan)
    found = 0
    if state.options.embeds:
        for places, table in checkpoint.tables(keys):
            read = embeddings(table)
            if read is not None and state.outcomes.dimensions in (None, read[1].vectors.shape[1]):
                theirs = places[read[0]] if numbers is None else numbers[places[read[0]]]
                state.outcomes.put_embeddings(theirs, read[1], "checkpoint")
                state.rows_done += int(shared[theirs].sum())
                found += len(theirs)
        return found
    for place, completion in checkpoint.find(keys):
        number = place if numbers is None else int(numbers[place])
        kept = reread(completion, state.schema)
        if kept is None or (kept.text is None and kept.status != "ok" and state.options.where == "missing"):
            continue  # a refusal is kept as what it is, until a call asks for what has no answer
        state.outcomes.put(number, kept)
        state.rows_done += int(shared[number])
        found += 1
    return found


def tell(prepared: Prepared, found: int) -> None:
    """Say what the checkpoint holds before anything is asked."""
    state, checkpoint, quiet = prepared.state, prepared.checkpoint, prepared.quiet
    total = len(state.plan.keys) - len(state.plan.unreadable)
    if checkpoint is None:
        if total > WORTH_SAVING:
            say(
                "this run has no checkpoint; with checkpoint='runs/name' an interrupted one would go on where it "
                "stopped, and no answer would be paid for twice",
                quiet=quiet,
                once=True,
            )
        return
    where = state.options.checkpoint
    if found:
        rest = f"asking {total - found:,}" if found < total else "nothing to ask"
        say(f"{found:,} of {total:,} answers are in {where}; {rest}", quiet=quiet)
    elif not state.options.refresh and total and checkpoint.held:
        why = checkpoint.differs()
        if why is None:  # the other half of a frame, as often as not
            say(f"none of the {checkpoint.held:,} answers in {where} is for these rows; asking {total:,}", quiet=quiet)
        else:
            warn(f"0 of {checkpoint.held:,} answers in {where} fit: {why}; asking {total:,}")


def reread(completion: Completion, schema: Schema | None) -> Completion | None:
    """Read a kept answer by the schema again, since what it reads is not kept; None where it does not fit."""
    if schema is None or completion.text is None or completion.status != "ok":
        return completion
    try:
        if isinstance(completion.text, list):
            parsed: Any = [None if text is None else schema.read(text) for text in completion.text]
        else:
            parsed = schema.read(completion.text)
    except Unfit:
        return None
    return replace(completion, parsed=parsed)


async def execute(prepared: Prepared) -> None:
    """Ask what is still to be asked, and keep what comes."""
    state, checkpoint = prepared.state, prepared.checkpoint
    whole = False
    try:
        if state.plan.unreadable and state.options.on_error == "raise":
            number, reason = next(iter(state.plan.unreadable.items()))
            raise _row_failed(state, number, reason)
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
    deliver = _deliverer(prepared)
    read: Read
    again: Ask | None
    if state.options.embeds:
        made = _embedding(prepared)
        requests, read, again = made.bodies(asked), made.read, made
        deliver = _embeddings_deliverer(prepared, made, deliver)
    else:
        asking = _asking(prepared)
        requests, read = _bodies(prepared, asked, asking, deliver), _reader(prepared)
        again = None if state.schema is None else asking
    crew = Crew(
        line=line,
        endpoint=prepared.endpoint,
        requests=requests,
        read=read,
        deliver=deliver,
        policy=prepared.policy,
        tally=state.tally,
        ask=again,
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
            _count(state, unkept)
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


def _asking(prepared: Prepared) -> Asking:
    state = prepared.state

    def messages_of(number: int) -> Messages | None:
        (messages,) = prepared.prompts.render(state.plan.first[[number]])
        return None if isinstance(messages, Missing) else messages

    def tell(words: str) -> None:
        say(words, quiet=prepared.quiet)

    several = state.options.several
    return Asking(prepared.requests, state.schema, messages_of, tell, prepared.accepted, repairs=not several)


def _bodies(
    prepared: Prepared, asked: npt.NDArray[np.intp], asking: Asking, deliver: Callable[[int, Completion], None]
) -> Iterator[tuple[int, bytes]]:
    """Make each request as a worker asks for it."""
    positions = prepared.state.plan.first[asked]
    for number, messages in zip(map(int, asked), prepared.prompts.render(positions), strict=True):
        if isinstance(messages, Missing):  # a file that could be read for the key is gone, or another one
            deliver(number, Completion(status="failed", error=messages.reason))
        else:
            yield number, asking.body(messages)


def _reader(prepared: Prepared) -> Read:
    schema, price, options = prepared.state.schema, prepared.price, prepared.state.options
    api, several = options.api, options.several

    def read(
        payload: Any,
        *,
        number: int,  # noqa: ARG001
        latency_s: float,
        attempts: int,
        request_id: str | None,
    ) -> Completion | None:
        return answers.read_reply(
            payload,
            api=api,
            schema=schema,
            price=price,
            several=several,
            latency_s=latency_s,
            attempts=attempts,
            request_id=request_id,
        )

    return read


def _deliverer(prepared: Prepared) -> Callable[[int, Completion], None]:
    state, checkpoint = prepared.state, prepared.checkpoint
    shared = rows_of(state.plan)

    def deliver(number: int, completion: Completion) -> None:
        state.outcomes.put(number, completion)
        state.rows_done += int(shared[number])
        if completion.status in PAID:
            _count(state, completion)
        if checkpoint is not None:
            checkpoint.add(state.plan.keys[number].tobytes(), completion)
        if completion.status == "failed" and state.options.on_error == "raise":
            raise _row_failed(state, number, completion.error)

    return deliver


def _embedding(prepared: Prepared) -> Embedding:
    state = prepared.state
    return Embedding(
        prepared.requests,
        prepared.prompts,
        state.plan,
        prepared.price,
        dimensions=lambda: state.outcomes.dimensions or state.options.params.get("dimensions"),
        answered=lambda: state.tally.answered,
        crowded=lambda: state.pacer is not None and state.pacer.limited_by == "requests/min",
        tell=functools.partial(say, quiet=prepared.quiet),
    )


def _embeddings_deliverer(
    prepared: Prepared, made: Embedding, deliver: Callable[[int, Completion], None]
) -> Callable[[int, Completion], None]:
    """Give each text of a request its outcome; what is no vector is delivered as any failure is."""
    state, checkpoint = prepared.state, prepared.checkpoint
    shared = rows_of(state.plan)
    kept = kept_dimensions(state.source, state.options, state.plan.selected)

    def give(number: int, completion: Completion) -> None:
        numbers, found = made.taken(number, completion)
        known = state.outcomes.dimensions
        if found is None:
            for each in numbers.tolist():
                deliver(each, completion)
            return
        if kept not in (None, found.vectors.shape[1]):  # every row would be paid for, and fail
            _count(state, completion)
            if checkpoint is not None:
                checkpoint.add_embeddings(state.plan.keys[numbers], found)
            raise EndpointError(other_length(found.vectors.shape[1], kept, state.options))
        if known not in (None, found.vectors.shape[1]):
            _count(state, completion)  # of no use, and billed all the same
            words = f"the endpoint gave {found.vectors.shape[1]:,} numbers, where it gave {known:,} before"
            failed = replace(completion, status="failed", error=words, parsed=None)
            shares = zip(numbers.tolist(), found.prompt_tokens.tolist(), found.cost_usd.tolist(), strict=True)
            for each, tokens, usd in shares:
                told, cost = None if tokens < 0 else tokens, None if math.isnan(usd) else usd
                deliver(each, replace(failed, prompt_tokens=told, cost_usd=cost))
            return
        state.outcomes.put_embeddings(numbers, found, "request")
        state.rows_done += int(shared[numbers].sum())
        _count(state, completion)
        if checkpoint is not None:
            checkpoint.add_embeddings(state.plan.keys[numbers], found)

    return give


def _row_failed(state: State, number: int, reason: str | None) -> RowFailed:
    position = int(state.plan.first[number])
    label = state.source.index[[position]].tolist()[0]  # Python's own type, as `tolist` gives it
    return RowFailed(f"row {position} (label {label!r}) failed: {reason}", position=position, label=label)


def _count(state: State, paid: Completion) -> None:
    """Add an answer to what the run has paid."""
    state.usage += Usage.of(paid)
    if paid.cost_usd is not None:
        state.cost_usd = (state.cost_usd or 0.0) + paid.cost_usd


def split_extras(params: Any) -> tuple[dict[str, Any], Extras]:
    """Take apart what goes into the body and what goes beside it (the SDK's ``extra_*``)."""
    body = dict(params)
    extras: dict[str, dict[str, Any]] = {}
    for name in ("extra_headers", "extra_query", "extra_body"):
        given = body.pop(name, None)
        extras[name] = {} if given is None else given
        if not isinstance(extras[name], dict):
            raise ConfigurationError(f"{name}={extras[name]!r:.60} has to be a dict")
    body.update(extras["extra_body"])
    return body, Extras(tuple(extras["extra_headers"].items()), tuple(extras["extra_query"].items()))


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
