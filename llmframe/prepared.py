"""A run that is ready: what its checkpoint answers is taken, what is left is known, and nothing is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmframe.asking import Accepted
from llmframe.budget import Budget
from llmframe.call import Call
from llmframe.checkpoint import Checkpoint
from llmframe.endpoint import Endpoint
from llmframe.engine import Policy
from llmframe.notices import say, warn
from llmframe.options import Options
from llmframe.outcomes import Outcomes
from llmframe.pacing import Caps
from llmframe.parts import embeddings
from llmframe.planning import rows_of
from llmframe.prices import PriceOf
from llmframe.prompts import Prompts
from llmframe.requests import Requests
from llmframe.results import Completion
from llmframe.schemas import Schema, Unfit
from llmframe.state import State
from llmframe.vectors import Embeddings

WORTH_SAVING = 200  # rows; a run of more without a checkpoint says what one would save


class Held(Protocol):
    """Answers by key: a checkpoint that is open for a run, or one that is only looked at."""

    def find(self, keys: npt.NDArray[np.void]) -> Iterator[tuple[int, Completion]]:
        """Yield the answers to some of these keys, each with the place of its key."""
        ...

    def tables(self, keys: npt.NDArray[np.void]) -> Iterator[tuple[npt.NDArray[np.intp], pa.Table]]:
        """Yield the same, many rows at a time and laid out as `parts.COLUMNS`."""
        ...


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


def recall(prepared: Prepared, numbers: npt.NDArray[np.intp] | None = None) -> int:
    """Take what the checkpoint holds, of these requests or of all; how many of them it answers."""
    state, checkpoint = prepared.state, prepared.checkpoint
    if checkpoint is None:
        return 0
    if state.options.refresh:
        checkpoint.supersede(state.plan.keys if numbers is None else state.plan.keys[numbers])
        return 0
    return take(state, checkpoint, numbers)


def take(state: State, held: Held, numbers: npt.NDArray[np.intp] | None = None) -> int:
    """Take what is held for these requests, or for all, as their outcomes; how many of them it answers."""
    keys = state.plan.keys if numbers is None else state.plan.keys[numbers]
    if numbers is None:
        numbers = np.arange(len(keys))
    shared = rows_of(state.plan)
    found = 0
    if state.options.embeds:
        for places, vectors in kept_vectors(held, keys, state.outcomes.dimensions):
            theirs = numbers[places]
            state.outcomes.put_embeddings(theirs, vectors, "checkpoint")
            state.rows_done += int(shared[theirs].sum())
            found += len(theirs)
        return found
    # A refusal is kept as what it is, until a call asks for what has no answer; a mask is no text to compare with.
    refusals = not isinstance(state.options.where, str)
    for place, completion in kept_answers(held, keys, state.schema, refusals=refusals):
        number = int(numbers[place])
        state.outcomes.put(number, completion)
        state.rows_done += int(shared[number])
        found += 1
    return found


def kept_answers(
    held: Held, keys: npt.NDArray[np.void], schema: Schema | None, *, refusals: bool = True
) -> Iterator[tuple[int, Completion]]:
    """Yield what a checkpoint gives to a call, each answer with the place of its key; all else is to be asked.

    Parameters
    ----------
    held : Held
        Where to look.
    keys : array of void
        Of the call's requests.
    schema : Schema, optional
        What the answers have to fit now.
    refusals : bool
        Whether an outcome that has no answer is given as what it is.
    """
    for place, completion in held.find(keys):
        kept = _reread(completion, schema)
        if kept is not None and (refusals or kept.text is not None or kept.status == "ok"):
            yield place, kept


def kept_vectors(
    held: Held, keys: npt.NDArray[np.void], dimensions: int | None = None
) -> Iterator[tuple[npt.NDArray[np.intp], Embeddings]]:
    """Yield what a checkpoint gives to an embedding, many at a time with the places of their keys; see `kept_answers`.

    All are of one length, that of the first where no `dimensions` are given: a call's vectors have no other.
    """
    for places, table in held.tables(keys):
        read = embeddings(table)
        if read is not None and dimensions in (None, read[1].vectors.shape[1]):
            dimensions = read[1].vectors.shape[1]
            yield places[read[0]], read[1]


def _reread(completion: Completion, schema: Schema | None) -> Completion | None:
    """Read a kept answer by the schema again, since what it reads is not kept; None where it does not fit."""
    several = isinstance(completion.text, list)  # whose status is the worst of theirs; what fits none has no text
    if schema is None or completion.text is None or (completion.status != "ok" and not several):
        return completion
    try:
        if isinstance(completion.text, list):
            parsed: Any = [None if text is None else schema.read(text) for text in completion.text]
        else:
            parsed = schema.read(completion.text)
    except Unfit:
        return None
    return replace(completion, parsed=parsed)


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
