"""What is known of each row of a Batch job: its answer, why it has none, or that it has not come.

Read from the job's directory and its checkpoint; nothing is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from llmframe.batch_ledger import Ledger, Left, Place, Terms
from llmframe.batch_rows import Rows
from llmframe.options import Options, call_options
from llmframe.outcomes import Outcomes
from llmframe.prepared import kept_answers, kept_vectors
from llmframe.results import Completion
from llmframe.schemas import Schema
from llmframe.shelf import Shelf
from llmframe.state import State


def state_of(place: Place, ledger: Ledger, rows: Rows, schema: Schema | None) -> State:
    """Put together what is known of each row.

    Parameters
    ----------
    place : Place
        The job's directory, which the checkpoint is found from.
    ledger : Ledger
        The job as it stands.
    rows : Rows
        What each row sends; the columns go beside those of its frame.
    schema : Schema or None
        What the answers have to fit.
    """
    plan, terms = rows.plan, ledger.terms
    outcomes = Outcomes(len(plan.keys))
    for number, reason in plan.unreadable.items():
        outcomes.put(number, Completion(status="failed", error=reason))
    checkpoint = Shelf.at(place.found(terms.checkpoint))
    if checkpoint is not None:
        if terms.api == "embeddings":
            _recall_embeddings(outcomes, checkpoint, rows)
        else:
            _recall(outcomes, checkpoint, rows, schema)
    pending = outcomes.pending().tolist()
    left = {each.key: each for each in _left(place, ledger)} if pending else {}
    for number in pending:
        each = left.get(plan.keys[number].tobytes())
        if each is not None:
            attempts = int(each.status != "pending")
            outcomes.put(number, Completion(status=each.status, error=each.error, attempts=attempts))
        elif rows.asked[number]:
            outcomes.put(number, Completion(status="pending", error="its batch has not ended"))
    return State(rows.frame, _options_of(terms), schema, plan, outcomes)


def _recall(outcomes: Outcomes, checkpoint: Shelf, rows: Rows, schema: Schema | None) -> None:
    """Take the answers that the checkpoint holds, those that fit the schema."""
    for number, kept in kept_answers(checkpoint, rows.plan.keys, schema):
        outcomes.put(number, replace(kept, source="request") if rows.asked[number] else kept)


def _recall_embeddings(outcomes: Outcomes, checkpoint: Shelf, rows: Rows) -> None:
    """Take the vectors that the checkpoint holds, all of one length."""
    for numbers, found in kept_vectors(checkpoint, rows.plan.keys):
        for asked in (True, False):
            chosen = np.flatnonzero(rows.asked[numbers] == asked)
            if len(chosen):
                outcomes.put_embeddings(numbers[chosen], found.taken(chosen), "request" if asked else "checkpoint")


def _left(place: Place, ledger: Ledger) -> Iterator[Left]:
    """List what has no answer, what was submitted again left out."""
    for part in ledger.parts:
        yield from (each for each in place.left(part) if not (each.again and part.taken))


def _options_of(terms: Terms) -> Options:
    """Give of the call's keywords those that its columns depend on."""
    # n= itself is not kept, only that there was more than one answer: any number above 1 tells the columns so.
    several: dict[str, Any] = {"n": 2} if terms.several else {}
    return call_options(
        model=terms.model,
        output=terms.output,
        details=terms.details,
        api=terms.api,  # type: ignore[arg-type]
        **several,
    )
