"""What an attempt cost, and whether it may be on the bill though nobody says so. Pure."""

from __future__ import annotations

from typing import Any

from llmframe.budget import Budget, Cost
from llmframe.failures import Failure
from llmframe.replies import read_usage
from llmframe.results import Completion, Usage
from llmframe.transports import Reply

MAYBE_BILLED = frozenset({408, 502, 504, 520, 524})
"""Statuses of whoever stands before the server and gave up waiting, or could not read its answer: it may have answered.

521 to 523 say that it was not reached, and a 500 or 503 is its own: nobody bills for those.
"""


def may_be_billed(reply: Reply | None, failure: Failure) -> bool:
    """Whether an attempt that gave no answer may be on the bill: somebody took it, and nobody says that it failed."""
    if reply is None:
        return failure.kind not in ("connection", "replica away")  # there nobody took the request
    return reply.is_success or reply.status in MAYBE_BILLED


def paid(budget: Budget, most: Cost, reply: Reply | None, payload: Any, outcome: Completion | Failure | None) -> Cost:
    """Give what an attempt cost, as far as anybody says; the most that it can have cost where nobody does."""
    usage: Usage | None = None
    if isinstance(outcome, Completion):
        if outcome.prompt_tokens and (outcome.completion_tokens or not outcome.text):
            usage = Usage(outcome.prompt_tokens, outcome.completion_tokens or 0, outcome.cached_tokens or 0)
    elif outcome is not None and not may_be_billed(reply, outcome):
        return Cost()
    elif reply is not None and reply.is_success:  # an answer that could not be used
        usage = read_usage(payload)
    return most if usage is None else Cost.of(usage, budget.bound.price)
