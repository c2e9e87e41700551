"""What a line of a batch's output or error file means: an answer, the row's end, or a request to ask again.

Pure. A line is judged as the same reply would be online, by `answers` and `failures`; what the provider says of a line
that it never executed is not the row's fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from llmframe import failures
from llmframe.batch_ledger import Left
from llmframe.messages import well_formed
from llmframe.replies import item
from llmframe.requests import KEY_BYTES, packed
from llmframe.results import Completion
from llmframe.vectors import Embeddings

QUOTED = 300  # characters of the provider's own words
NOT_EXECUTED = ("batch_expired", "batch_cancelled", "batch_canceled")

Read = Callable[[Any, str | None], Completion | None]
"""Reads a reply's JSON and its request id; None where it holds no answer."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A request that was answered, and paid for."""

    key: bytes
    completion: Completion


def read_line(line: bytes, read: Read) -> Answered | Left | None:
    """Read a line.

    Parameters
    ----------
    line : bytes
        As it stands in the file.
    read : callable
        Reads a reply of the API that was asked.

    Returns
    -------
    Answered, Left or None
        None for a line that names no request of ours.
    """
    try:
        said = orjson.loads(line)
        key = bytes.fromhex(said["custom_id"])
    except (ValueError, TypeError, KeyError):
        return None
    if len(key) != KEY_BYTES:
        return None
    response, error = item(said, "response"), item(said, "error")
    if not isinstance(response, dict):
        return _not_executed(key, error)
    payload, status = response.get("body"), response.get("status_code")
    status = status if isinstance(status, int) else 0
    body = orjson.dumps(payload)
    request_id = response.get("request_id")
    failure = failures.of_reply(status, {}, body, payload)
    if failure is None:
        completion = read(payload, request_id if isinstance(request_id, str) else None)
        if completion is not None and completion.status != "failed":
            return Answered(key, completion)
        failure = failures.of_no_answer(status, body)
    return Left(key, failure.status, failure.message, again=failure.verdict != "row")


def stacked(found: Sequence[Answered]) -> tuple[npt.NDArray[np.void], Embeddings]:
    """Give answers with vectors of one length as the checkpoint takes them."""
    answers = [each.completion for each in found]
    tokens = [-1 if answer.prompt_tokens is None else answer.prompt_tokens for answer in answers]
    costs = [np.nan if answer.cost_usd is None else answer.cost_usd for answer in answers]
    return packed(each.key for each in found), Embeddings(
        vectors=np.concatenate([answer.parsed for answer in answers]),
        prompt_tokens=np.array(tokens, np.int64),
        cost_usd=np.array(costs, np.float64),
        latency_s=np.full(len(answers), np.nan),
        attempts=np.ones(len(answers), np.int64),
        models=[answer.model for answer in answers],
        request_ids=[answer.request_id for answer in answers],
    )


def _not_executed(key: bytes, error: Any) -> Left:
    code, message = item(error, "code"), item(error, "message")
    words = well_formed(f"{message or error or 'neither a response nor an error'}"[:QUOTED])
    if code in NOT_EXECUTED:
        return Left(key, "pending", f"not asked: {words} ({code})", again=True)
    return Left(key, "failed", f"the batch could not execute it: {words}" + (f" ({code})" if code else ""), again=True)
