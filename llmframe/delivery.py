"""What a run sends for each request, and where its outcome goes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from llmframe import answers
from llmframe.asking import Asking
from llmframe.embedding import Embedding
from llmframe.engine import Ask, Read
from llmframe.errors import EndpointError, RowFailed
from llmframe.messages import Messages
from llmframe.notices import say
from llmframe.planning import kept_dimensions, other_length, rows_of
from llmframe.prepared import Prepared
from llmframe.prompts import Missing
from llmframe.results import PAID, Completion
from llmframe.state import State

Deliver = Callable[[int, Completion], None]


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the engine is given of a run.

    Attributes
    ----------
    requests : iterator of (int, bytes)
        Each request's number and body, made as it is asked for.
    read : callable
        Reads a reply.
    deliver : callable
        Takes each request's outcome, once; what it raises stops the run.
    again : Ask or None
        Says what to send for a request once more, where an answer may not do.
    """

    requests: Iterator[tuple[int, bytes]]
    read: Read
    deliver: Deliver
    again: Ask | None


def delivery_of(prepared: Prepared, asked: npt.NDArray[np.intp]) -> Delivery:
    """Put together what is sent for these requests, by number, and where their outcomes go."""
    deliver = _deliverer(prepared)
    if prepared.state.options.embeds:
        made = _embedding(prepared)
        return Delivery(made.bodies(asked), made.read, _embeddings_deliverer(prepared, made, deliver), made)
    asking = _asking(prepared)
    again = None if prepared.state.schema is None else asking
    return Delivery(_bodies(prepared, asked, asking, deliver), _reader(prepared), deliver, again)


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
    prepared: Prepared, asked: npt.NDArray[np.intp], asking: Asking, deliver: Deliver
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


def _deliverer(prepared: Prepared) -> Deliver:
    state, checkpoint = prepared.state, prepared.checkpoint
    shared = rows_of(state.plan)

    def deliver(number: int, completion: Completion) -> None:
        state.outcomes.put(number, completion)
        state.rows_done += int(shared[number])
        if completion.status in PAID or completion.source == "request":  # some failures are on the bill
            state.pay(completion)
        if checkpoint is not None:
            checkpoint.add(state.plan.keys[number].tobytes(), completion)
        if completion.status == "failed" and state.options.on_error == "raise":
            raise row_failed(state, number, completion.error)

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


def _embeddings_deliverer(prepared: Prepared, made: Embedding, deliver: Deliver) -> Deliver:
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
            state.pay(completion)
            if checkpoint is not None:
                checkpoint.add_embeddings(state.plan.keys[numbers], found)
            raise EndpointError(other_length(found.vectors.shape[1], kept, state.options))
        if known not in (None, found.vectors.shape[1]):
            # Of no use, and billed all the same.
            words = f"the endpoint gave {found.vectors.shape[1]:,} numbers, where it gave {known:,} before"
            failed = replace(completion, status="failed", error=words, parsed=None)
            shares = zip(numbers.tolist(), found.prompt_tokens.tolist(), found.cost_usd.tolist(), strict=True)
            for each, tokens, usd in shares:
                told, cost = None if tokens < 0 else tokens, None if math.isnan(usd) else usd
                deliver(each, replace(failed, prompt_tokens=told, cost_usd=cost))
            return
        state.outcomes.put_embeddings(numbers, found, "request")
        state.rows_done += int(shared[numbers].sum())
        state.pay(completion)
        if checkpoint is not None:
            checkpoint.add_embeddings(state.plan.keys[numbers], found)

    return give


def row_failed(state: State, number: int, reason: str | None) -> RowFailed:
    """Give the error that stops a run at its first failed row."""
    position = int(state.plan.first[number])
    label = state.source.index[[position]].tolist()[0]  # Python's own type, as `tolist` gives it
    return RowFailed(f"row {position} (label {label!r}) failed: {reason}", position=position, label=label)
