"""Run: what a run has done so far, to look at while it goes on or after it.

Every look is of that moment; nothing here changes the run.
"""

from __future__ import annotations

import os
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from llmframe import plots
from llmframe.errors import ConfigurationError
from llmframe.pacing import Moment
from llmframe.page import Figure, Trouble, fragment, page
from llmframe.results import Usage, column_dtype, text_dtype, typed
from llmframe.state import State

COMMONEST = 5  # errors shown


class Run:
    """A run: the frame so far, and what it took.

    `llmframe.last_run` gives the last one, also from another thread or cell while it goes on. In a notebook it shows
    itself.

    Examples
    --------
    >>> out = df.llm.complete("Translate to French: {text}", model="local", max_tokens=3)
    >>> run = llmframe.last_run()
    >>> run.requests, sum(run.counts.values()), run.usage.completion_tokens
    (2, 2, 6)
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
        return self._state.counts

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
        """What the engine saw and decided while this run went on, a row a moment; ``time_s`` is from its start.

        ``in_flight`` and ``window`` (requests), ``rate`` (answers a second), ``refused`` (with 429, since its line was
        opened) and ``latency_s`` are of the endpoint, whichever runs share it.
        """
        return self._course().drop(columns="allowed")

    def _course(self) -> pd.DataFrame:
        """Give the timeline with what the limits allowed, for the picture."""
        state, pacer = self._state, self._state.pacer
        names = [column.name for column in fields(Moment)]
        moments = [] if pacer is None else [astuple(moment) for moment in tuple(pacer.timeline)]
        frame = pd.DataFrame(moments, columns=names).astype({"decision": text_dtype()})
        if pacer is not None:
            frame["time_s"] += pacer.began - state.started
        until = np.inf if state.ended is None else state.ended - state.started
        return frame[frame["time_s"].between(0, until)].reset_index(drop=True)

    def plot(self, axes: Any = None) -> npt.NDArray[np.object_]:
        """Draw the run's course and its latencies; needs the extra ``plot``.

        Parameters
        ----------
        axes : sequence of two matplotlib Axes, optional
            Where to draw; a new figure without it.

        Returns
        -------
        array of two Axes
            Answers a second and requests in flight over time, with the engine's decisions and the limit it knew of,
            and a histogram of the latencies in seconds. ``axes[0].figure`` is the figure.

        Raises
        ------
        ConfigurationError
            matplotlib is not installed.

        Examples
        --------
        >>> out = df.llm.complete("Translate to French: {text}", model="local")
        >>> len(llmframe.last_run().plot())
        2
        """
        return plots.draw(self._course(), self._state.outcomes.latencies_s(), axes)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the report as one file that needs nothing else: no script, nothing from elsewhere.

        Parameters
        ----------
        path : str or path
            Where to; what is there is replaced.

        Raises
        ------
        ConfigurationError
            It cannot be written there.

        Examples
        --------
        >>> import pathlib, tempfile
        >>> out = df.llm.complete("Translate to French: {text}", model="local")
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = pathlib.Path(directory, "run.html")
        ...     llmframe.last_run().to_html(path)
        ...     path.read_text(encoding="utf-8")[:15]
        '<!DOCTYPE html>'
        """
        try:
            Path(path).write_text(page(self._repr_html_()), encoding="utf-8")
        except OSError as error:
            raise ConfigurationError(f"the report cannot be written to {path}: {error.strerror}") from error

    def _repr_html_(self) -> str:
        course, latencies_s = self._course(), self._state.outcomes.latencies_s()
        picture = plots.svg(course, latencies_s) if len(latencies_s) else None
        return fragment(repr(self).strip("<>"), self._figures(), self._troubles(), picture)

    def _figures(self) -> list[list[Figure]]:
        state, usage, tally = self._state, self.usage, self._state.tally
        sources = state.outcomes.sources(state.plan.request_of, state.plan.first)
        latencies_s = state.outcomes.latencies_s()
        middle, late = np.percentile(latencies_s, (50, 95)) if len(latencies_s) else (None, None)
        rows = [Figure(f"rows {status}", f"{count:,}") for status, count in self.counts.items()]
        rows += [
            Figure("from the checkpoint", f"{sources['checkpoint']:,}"),
            Figure("duplicates", f"{sources['duplicate']:,}"),
            Figure("from requests", f"{sources['request']:,}"),
        ]
        paid = [
            Figure("prompt tokens", f"{usage.prompt_tokens:,}"),
            Figure("of them cached", f"{usage.cached_tokens:,}"),
            Figure("completion tokens", f"{usage.completion_tokens:,}"),
            Figure("of them reasoning", f"{usage.reasoning_tokens:,}"),
            Figure("USD", "unknown" if self.cost_usd is None else f"{self.cost_usd:,.4f}"),
        ]
        took = [
            Figure("seconds", f"{self.seconds:,.1f}"),
            Figure("rows/s", f"{state.rows_done / max(self.seconds, 1e-3):,.1f}"),
            Figure("latency p50, s", "-" if middle is None else f"{middle:.2f}"),
            Figure("latency p95, s", "-" if late is None else f"{late:.2f}"),
        ]
        sent = [Figure("requests sent", f"{tally.sent:,}")]
        sent += [Figure(f"failed: {kind}", f"{count:,}") for kind, count in tally.failures.most_common()]
        if tally.maybe_billed:
            sent.append(Figure("may have been billed without an answer", f"{tally.maybe_billed:,}"))
        return [rows, paid, took, sent]

    def _troubles(self) -> list[Trouble]:
        index = self._state.source.index
        return [
            Trouble(int(rows), str(status), str(error), repr(index[[position]].tolist()[0]))
            for status, error, rows, position in self.errors.head(COMMONEST).itertuples(index=False)
        ]

    def __repr__(self) -> str:
        counts = ", ".join(f"{count:,} {status}" for status, count in self.counts.items()) or "no rows"
        going = "" if self._state.ended is not None else ", going on"
        tokens = f"{self.usage.prompt_tokens:,} + {self.usage.completion_tokens:,} tokens"
        cost = "" if self.cost_usd is None else f"; {self.cost_usd:.4f} USD"
        return f"<Run: {counts}; {self.requests:,} requests; {tokens}{cost}; {self.seconds:.1f} s{going}>"
