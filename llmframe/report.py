"""Run: what a run has done so far, to look at while it goes on or after it.

Every look is of that moment; nothing here changes the run.
"""

from __future__ import annotations

from dataclasses import astuple, fields

import numpy as np
import pandas as pd

from llmframe.pacing import Moment
from llmframe.results import STATUSES, Usage, column_dtype, text_dtype, typed
from llmframe.state import State


class Run:
    """A run: the frame so far, and what it took.

    `llmframe.last_run` gives the last one, also from another thread or cell while it goes on.
    """

    def __init__(self, state: State) -> None:
        self._state = state

    @property
    def frame(self) -> pd.DataFrame:
        """The frame with its new columns, as they are now; rows not reached are ``pending``."""
        return self._state.frame()

    @property
    def counts(self) -> dict[str, int]:
        """Rows by status, those that occur."""
        codes = self._state.outcomes.statuses(self._state.plan.request_of)
        counts = np.bincount(codes, minlength=len(STATUSES)).tolist()
        return {status: count for status, count in zip(STATUSES, counts, strict=True) if count}

    @property
    def usage(self) -> Usage:
        """The tokens that this run itself paid for: what a checkpoint gave back is not in it."""
        return self._state.usage

    @property
    def cost_usd(self) -> float | None:
        """What this run itself paid, in USD; None where the model has no known price."""
        return self._state.cost_usd

    @property
    def requests(self) -> int:
        """The requests sent, retries included."""
        return self._state.tally.sent

    @property
    def seconds(self) -> float:
        """Seconds from the start to the end, or to now."""
        return self._state.seconds

    @property
    def errors(self) -> pd.DataFrame:
        """The errors of this run, the commonest first: ``status``, ``error``, ``rows``, a ``position`` to look at."""
        columns = self._state.columns(details=False)
        statuses, errors = columns["_status"], columns["_error"]
        told = ~errors.isna() & ~statuses.isin(["skipped", "pending"])
        seen: dict[tuple[str, str], list[int]] = {}
        for position in np.flatnonzero(told).tolist():
            seen.setdefault((statuses[position], errors[position]), []).append(position)
        ranked = sorted(seen.items(), key=lambda item: -len(item[1]))
        return pd.DataFrame(
            {
                "status": typed([status for (status, _), _ in ranked], column_dtype("_status", None)),
                "error": typed([error for (_, error), _ in ranked], text_dtype()),
                "rows": np.array([len(positions) for _, positions in ranked], dtype="int64"),
                "position": np.array([positions[0] for _, positions in ranked], dtype="int64"),
            }
        )

    @property
    def timeline(self) -> pd.DataFrame:
        """What the engine saw and decided, a row a moment; ``time_s`` is from when its line was opened."""
        pacer = self._state.pacer
        moments = [] if pacer is None else [astuple(moment) for moment in tuple(pacer.timeline)]
        frame = pd.DataFrame(moments, columns=[column.name for column in fields(Moment)])
        return frame.astype({"decision": text_dtype()})

    def __repr__(self) -> str:
        counts = ", ".join(f"{count:,} {status}" for status, count in self.counts.items()) or "no rows"
        going = "" if self._state.ended is not None else ", going on"
        tokens = f"{self.usage.prompt_tokens:,} + {self.usage.completion_tokens:,} tokens"
        cost = "" if self.cost_usd is None else f"; {self.cost_usd:.4f} USD"
        return f"<Run: {counts}; {self.requests:,} requests; {tokens}{cost}; {self.seconds:.1f} s{going}>"
