"""What a run knows while it goes on: what each request gave, and what it took.

Written by the runner's loop alone; read by anybody, at any time, from any thread.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import orjson
import pandas as pd

from llmframe.engine import Tally
from llmframe.messages import Message
from llmframe.options import Options
from llmframe.outcomes import NOT_SELECTED, Outcomes, by_row
from llmframe.pacing import Pacer
from llmframe.planning import Plan, output_dtypes
from llmframe.prompts import Missing, Prompts
from llmframe.results import PANDAS_3, STATUSES, Completion, Usage, property_column, twin, typed
from llmframe.schemas import Schema


@dataclass(eq=False, slots=True)
class State:
    """A run under way.

    Attributes
    ----------
    source : DataFrame
        The frame as it came.
    options : Options
        The call's keywords.
    schema : Schema or None
        What the answers have to fit.
    plan : Plan
        Which row sends what.
    outcomes : Outcomes
        What each request gave, by number.
    rows_done : int
        Rows whose request has an outcome.
    usage, cost_usd : Usage, float or None
        What this run itself has paid.
    tally : Tally
        What was sent and met.
    pacer : Pacer or None
        What decides how fast; None until a request is to be sent.
    started, ended : float, float or None
        On the monotonic clock, in seconds.
    unsaved : str or None
        Why the checkpoint does not hold all that was answered.
    prompts : Prompts or None
        What each row sent, where conversations are to be kept.
    """

    source: pd.DataFrame
    options: Options
    schema: Schema | None
    plan: Plan
    outcomes: Outcomes
    rows_done: int = 0
    usage: Usage = field(default_factory=Usage)
    cost_usd: float | None = None
    tally: Tally = field(default_factory=Tally)
    pacer: Pacer | None = None
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    unsaved: str | None = None
    prompts: Prompts | None = None

    @property
    def rows(self) -> int:
        """The rows that send a request or share one."""
        return int((self.plan.request_of >= 0).sum())

    @property
    def counts(self) -> dict[str, int]:
        """Rows by status, those that occur."""
        found = np.bincount(self.outcomes.statuses(self.plan.request_of), minlength=len(STATUSES)).tolist()
        return {status: count for status, count in zip(STATUSES, found, strict=True) if count}

    @property
    def rows_a_request(self) -> float:
        """Rows that one request answers, on average."""
        return self.rows / max(1, len(self.plan.first))

    @property
    def sent(self) -> int:
        """Requests sent so far."""
        return self.tally.sent

    @property
    def in_flight(self) -> int:
        """Requests in flight now."""
        return self.tally.in_flight

    @property
    def failures(self) -> Counter[str]:
        """Attempts that gave no answer, by kind."""
        return self.tally.failures

    @property
    def seconds(self) -> float:
        """Seconds from the start to the end, or to now."""
        return (time.monotonic() if self.ended is None else self.ended) - self.started

    def pay(self, completion: Completion) -> None:
        """Add an answer to what the run has paid."""
        self.usage += Usage.of(completion)
        if completion.cost_usd is not None:
            self.cost_usd = (self.cost_usd or 0.0) + completion.cost_usd

    def completions(self) -> list[Completion]:
        """Give each row's completion, in the frame's order."""
        plan = self.plan
        made: list[Completion] = []
        for position, number in enumerate(plan.request_of.tolist()):
            if number < 0:
                made.append(Completion(status="skipped", error=plan.skipped.get(position, NOT_SELECTED)))
                continue
            outcome = self.outcomes[number]
            made.append(outcome if plan.first[number] == position else twin(outcome))
        return made

    def columns(self, *, details: bool) -> dict[str, Any]:
        """Give the columns of the call by suffix, over every row; see `Outcomes.columns`."""
        plan, schema = self.plan, self.schema
        answer: Literal["text", "parsed", "embedding"] = "text" if schema is None else schema.answer
        if self.options.embeds:
            answer = "embedding"
        made = self.outcomes.columns(plan.request_of, plan.first, plan.skipped, details=details, answer=answer)
        if schema is not None and schema.columns:
            rows = [schema.cells(parsed) for parsed in self.outcomes.cells("parsed")]
            for name in schema.columns:
                cells = np.fromiter((row.get(name) for row in rows), object, len(rows))
                made[property_column("", name)] = by_row(cells, plan.request_of, plan.first)
        return made

    def frame(self) -> pd.DataFrame:
        """Give the source with its new columns."""
        options, schema = self.options, self.schema
        values = self.columns(details=options.details)
        frame = self.source.copy(deep=False)
        new: dict[str, Any] = {}
        for name, dtype in output_dtypes(options, schema).items():
            cells = values.pop(name[len(options.output) :])
            if name in frame.columns:  # a call with where=: the rows left out keep what they hold
                left = ~self.plan.selected
                cells = np.fromiter(cells, object, len(frame))
                cells[left] = _kept(frame[name][left], dtype)
                frame[name] = typed(cells, dtype)
            else:
                new[name] = typed(cells, dtype)
        if options.history is not None and self.prompts is not None:
            conversations = self._conversations(self.prompts, options.history)
            if options.history in frame.columns:
                frame[options.history] = conversations
            else:
                new[options.history] = conversations
        return _beside(frame, new)

    def _conversations(self, prompts: Prompts, name: str) -> npt.NDArray[np.object_]:
        """Give each row's conversation: what it sent and its answer, or what it was where there is none."""
        known = name in self.source.columns
        cells: npt.NDArray[np.object_] = np.full(len(self.source), None, object)
        if known:
            cells = typed(self.source[name].tolist(), object)
        texts, calls = self.outcomes.cells("text"), self.outcomes.cells("tool_calls")
        numbers = self.plan.request_of
        codes = self.outcomes.statuses(numbers)
        answered = np.isin(codes, [STATUSES.index("ok"), STATUSES.index("truncated")])
        answered &= np.array([texts[n] is not None or calls[n] is not None for n in numbers], dtype=bool)
        positions = np.flatnonzero(answered)
        for position, sent in zip(positions.tolist(), prompts.render(positions), strict=True):
            if isinstance(sent, Missing):  # a picture of a row that was answered is gone
                continue
            number = numbers[position]
            turn: Message = {"role": "assistant", "content": texts[number]}
            if calls[number] is not None:
                turn["tool_calls"] = orjson.loads(calls[number])
            cells[position] = [*sent, turn]
        return cells


def _kept(held: pd.Series[Any], dtype: Any) -> npt.NDArray[np.object_]:
    """Give what a column keeps as one of its type has it: alone, as it was found to fit before anything was paid.

    Beside new answers the numbers that a file made of true and false, or its nulls for another type, would not fit.
    """
    values = held.tolist()
    if dtype is not object:
        values = [None if missing else value for value, missing in zip(values, held.isna(), strict=True)]
    return np.fromiter(typed(values, dtype), object, len(values))


def _beside(frame: pd.DataFrame, new: Mapping[str, Any]) -> pd.DataFrame:
    """Give a frame with new columns after its own, and all else as it has it.

    They are joined at once: one by one pandas warns of a frame that was built by many assignments, and where warnings
    are errors an answer that was paid for would be lost to it.
    """
    if not new:
        return frame
    columns = frame.columns
    for name in new:
        columns = columns.insert(len(columns), name)  # keeps the index's own name and kind, which a join does not
    added = pd.DataFrame(dict(new), index=frame.index, copy=False)
    shared: Any = {} if PANDAS_3 else {"copy": False}  # which pandas 3 does unasked
    joined: Any = pd.concat([frame, added], axis=1, **shared)
    joined.columns = columns
    made: pd.DataFrame = joined.__finalize__(frame)  # attrs, flags, and what a subclass names in `_metadata`
    return made
