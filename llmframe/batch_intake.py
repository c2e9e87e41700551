"""How a call becomes a Batch job: its rows and the lines of its files are written, and then the ledger of them.

Nothing is sent here. Until the ledger is there, there is no job; from then on there is all of it.
"""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from llmframe.batch_access import kept_schema
from llmframe.batch_ledger import Ledger, Place, Terms
from llmframe.batch_plan import FileLimits, input_line
from llmframe.batch_rows import Rows, digest_of, save_rows
from llmframe.batch_work import write_parts
from llmframe.budget import Bound, Budget
from llmframe.call import LOCAL, Call, open_checkpoint
from llmframe.errors import BudgetExceeded, ConfigurationError
from llmframe.notices import say
from llmframe.options import Options
from llmframe.prepared import ready, recall, tell
from llmframe.prices import halved
from llmframe.prompts import Missing, Prompts
from llmframe.requests import PATHS
from llmframe.texts import text_of

OWN = ("job", "keep_files", "poll_s")  # the keywords of a submission alone
ANSWERS = "answers"  # the checkpoint in a job's directory, where the call names none


def check_call(options: Options) -> None:
    """Refuse what a batch cannot keep."""
    for name in options.params:
        near = difflib.get_close_matches(name, OWN, n=1, cutoff=0.8)
        if near:
            raise ConfigurationError(
                f"unknown keyword {name!r}; did you mean {near[0]!r}? (extra_body= sends it all the same)"
            )
    if options.history is not None:
        raise ConfigurationError(
            "history= goes on from an answer at once, and a batch has none yet; submit the messages as the prompt"
        )
    if options.on_error == "raise":
        raise ConfigurationError(
            "on_error='raise' stops a run at its first failure, and a batch runs elsewhere; leave it"
        )
    if options.refresh:
        raise ConfigurationError(
            "refresh=True is not for a batch: pass a checkpoint= of its own, which holds no answers"
        )
    if isinstance(options.base_url, list | tuple) and len(options.base_url) > 1:
        raise ConfigurationError("base_url= names several servers, and a batch is at one; name that one")
    if options.model == LOCAL and options.client is None:
        raise ConfigurationError('model="local" has no Batch API, and costs nothing; use df.llm.complete')


def plan_job(place: Place, prompts: Prompts, options: Options, call: Call, keep_files: bool) -> Rows:
    """Write what is to be sent and the ledger of it; nothing is sent."""
    plan = call.plan
    checkpoint = open_checkpoint(prompts, options, call)
    assert checkpoint is not None
    try:
        prepared = ready(prompts, options, call, checkpoint)
        tell(prepared, recall(prepared))
    finally:
        checkpoint.close(tidy=False)
    numbers = prepared.state.outcomes.pending()
    asked = np.zeros(len(plan.keys), np.bool_)
    asked[numbers] = True
    gone: dict[int, str] = {}
    parts, too_large = write_parts(place, _lines(prompts, options, call, numbers, gone), 0, FileLimits())
    if too_large:
        raise ConfigurationError(
            f"{too_large:,} requests are larger than a batch's file may be ({FileLimits().bytes:,} bytes); "
            "leave them out, by where="
        )
    asked[list(gone)] = False
    plan = replace(plan, unreadable={**plan.unreadable, **gone})
    rows = Rows(prompts.frame, plan, asked)
    keep_rows(place, rows, options)
    assert options.model is not None
    assert options.checkpoint is not None
    terms = Terms(
        id=os.urandom(8).hex(),
        created_s=time.time(),
        digest=digest_of(plan),
        identity=call.endpoint.identity,
        api=options.api,
        model=options.model,
        template=prompts.description,
        parameters=call.requests.parameters,
        service_tier=call.params.get("service_tier") if isinstance(call.params.get("service_tier"), str) else None,
        checkpoint=place.noted(options.checkpoint),
        output=options.output,
        details=options.details,
        several=options.several,
        prices=None if options.prices is None else dict(options.prices),
        schema=kept_schema(options.schema, call.schema),
        keep_files=keep_files,
        requests=int(asked.sum()),
    )
    place.save(Ledger(terms=terms, parts=tuple(parts), swept=not parts))
    return rows


def keep_rows(place: Place, rows: Rows, options: Options) -> None:
    """Keep the rows in a job's directory, and say which of their columns cannot be kept."""
    left_out = save_rows(place, rows.frame, rows.plan, rows.asked)
    if left_out:
        say(
            f"the column(s) {', '.join(left_out)} cannot be kept in {place.name}: in another process pass the frame, "
            "as in job.frame(df)",
            quiet=options.progress is False,
        )


def _lines(prompts: Prompts, options: Options, call: Call, numbers: Any, gone: dict[int, str]) -> Iterator[bytes]:
    """Make the line of each request, one after another; stop where the worst case of them all passes the budget.

    `gone` is given those that can be made no more, and why.
    """
    budget = None if call.budget is None else _half_budget(call.budget)
    path = f"/v1{PATHS[options.api]}"
    for number, messages in zip(numbers.tolist(), prompts.render(call.plan.first[numbers]), strict=True):
        if isinstance(messages, Missing):  # a file that could be read for the key is gone, or another one
            gone[number] = messages.reason
            continue
        body = call.requests.embedding_body([text_of(messages)]) if options.embeds else call.requests.body(messages)
        if budget is not None:
            most = budget.bound(body)
            if not budget.fits(most):
                raise BudgetExceeded(
                    f"the worst case of a batch of {len(numbers):,} requests passes the budget; nothing was sent: "
                    f"{budget.refusal(most)}"
                )
            budget.set_aside(most)
        yield input_line(call.plan.keys[number].tobytes(), path, body)


def _half_budget(budget: Budget) -> Budget:
    bound = budget.bound
    price = None if bound.price is None else halved(bound.price)
    return Budget(bound=Bound(bound.completion_tokens, price), max_usd=budget.max_usd, max_tokens=budget.max_tokens)
