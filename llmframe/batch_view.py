"""A Batch job as it shows itself: a table of its parts, a line, a piece of HTML.

All of it is read from the ledger; nothing is asked.
"""

from __future__ import annotations

import html
import time
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from llmframe.batch_ledger import Ledger, Part
from llmframe.options import Options, call_options
from llmframe.pacing import Pacer
from llmframe.results import Usage

NUMBERS = frozenset({"part", "requests", "done", "failed", "left", "cost_usd"})  # aligned at the right


def parts_frame(ledger: Ledger) -> pd.DataFrame:
    """Give the files of a job, one a row; see `BatchJob.parts`."""
    rows = [
        (
            part.number,
            part.requests,
            _status_of(part),
            part.done,
            part.failed,
            0 if part.taken else part.left,
            part.cost_usd,
            part.batch_id,
            part.error,
        )
        for part in ledger.parts
        if part.stage != "replaced"
    ]
    names = ["part", "requests", "status", "done", "failed", "left", "cost_usd", "batch", "error"]
    return pd.DataFrame(rows, columns=names).astype({"cost_usd": "Float64"})


def summary(ledger: Ledger) -> str:
    """Say in a line how far a job is."""
    if not ledger.parts:
        return "every answer was in the checkpoint; nothing was submitted"
    statuses = Counter(_status_of(part) for part in ledger.parts if part.stage != "replaced")
    said = ", ".join(f"{count:,} {status}" for status, count in statuses.items())
    done = sum(part.done for part in ledger.parts)
    cost = "" if ledger.cost_usd is None else f", {ledger.cost_usd:,.4f} USD so far"
    return f"{done:,} of {ledger.terms.requests:,} requests answered{cost}; parts: {said}"


def text(directory: str, ledger: Ledger) -> str:
    """Give what a terminal shows of the job in a directory."""
    lines = [f"<BatchJob {directory}: {summary(ledger)}"]
    parts = parts_frame(ledger)
    if len(parts):
        shown = parts.drop(columns="error").map(_cell).to_string(index=False)
        lines += [f"  {each}" for each in shown.splitlines()]
    return "\n".join(lines) + ">"


def page(directory: str, ledger: Ledger) -> str:
    """Give what a notebook shows of the job in a directory, as HTML."""
    title = f"<strong>BatchJob</strong> <code>{html.escape(directory)}</code>: {html.escape(summary(ledger))}"
    parts = parts_frame(ledger)
    heads = "".join(f"<th scope='col' {_aligned(name)}>{name}</th>" for name in parts)
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td {_aligned(name)}>{html.escape(_cell(value))}</td>"
            for name, value in zip(parts.columns, row, strict=True)
        )
        + "</tr>"
        for row in parts.itertuples(index=False)
    )
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    return f"<div class='llmframe-batch'>{title}{table}</div>"


@dataclass(slots=True, eq=False)
class Awaited:
    """A job that is waited for, as its bar shows it; see `progress.Going`.

    Attributes
    ----------
    ledger : callable
        Gives the ledger as it stands now.
    started, ended : float, float or None
        When the wait began and ended, on the monotonic clock, in seconds.
    in_flight, pacer : int, None
        A run's; a batch is at work elsewhere, and has neither.
    """

    ledger: Callable[[], Ledger]
    started: float = field(default_factory=time.monotonic)
    ended: float | None = None
    in_flight: int = 0
    pacer: Pacer | None = None

    @property
    def options(self) -> Options:
        """Of the call."""
        return call_options(output=self.ledger().terms.output)

    @property
    def rows(self) -> int:
        """Requests submitted."""
        return self.ledger().terms.requests

    @property
    def rows_done(self) -> int:
        """Those that the provider is done with."""
        return sum(part.done + part.failed - part.left for part in self.ledger().parts)

    @property
    def rows_a_request(self) -> float:
        """One: requests are what is counted."""
        return 1.0

    @property
    def usage(self) -> Usage:
        """Of what was taken."""
        return self.ledger().usage

    @property
    def cost_usd(self) -> float | None:
        """The same in USD."""
        return self.ledger().cost_usd

    @property
    def sent(self) -> int:
        """None by this process."""
        return 0

    @property
    def failures(self) -> Counter[str]:
        """None: what a line failed at is known when its batch has ended."""
        return Counter()

    @property
    def seconds(self) -> float:
        """Since this process began to wait."""
        return (time.monotonic() if self.ended is None else self.ended) - self.started


def _status_of(part: Part) -> str:
    if part.stage == "withdrawn":
        return "withdrawn"
    if part.stage in ("planned", "uploading", "uploaded", "creating"):
        return part.status or "to submit"
    return part.status or part.stage


def _aligned(column: Hashable) -> str:
    return f"style='text-align:{'right' if column in NUMBERS else 'left'}'"


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float):
        return f"{value:,.4f}"
    return f"{value:,}" if isinstance(value, int | np.integer) else str(value)[:200]
