"""Review: a sample of rows with what was sent and what came back side by side, to look at before it is believed.

Nothing is sent. What came from a row or a model is escaped, and the table can be read where no script runs.
"""

from __future__ import annotations

import html
import json
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from llmframe.errors import ConfigurationError, TemplateError
from llmframe.prompts import Missing, Prompts

SHOWN = 2_000  # characters of a cell: more of them is a file, not something to look at
PRINTED = 200  # characters of a text where there is no page
NOT_ASKED = ("skipped", "pending")

# Without a script (a notebook that is not trusted) the box does nothing, and the browser's own search still finds all.
SEARCH = (
    "const words=this.value.toLowerCase();"
    "for(const row of this.closest('.llmframe-review').querySelectorAll('tbody tr'))"
    "row.hidden=!row.textContent.toLowerCase().includes(words)"
)


@dataclass(frozen=True, slots=True)
class Reviewed:
    """One row to look at.

    Attributes
    ----------
    label : str
        Its index label.
    sent : str
        Its messages, or its columns where no prompt is known.
    answer : str or None
        The answer and its properties.
    status : str
        As the column says.
    error : str or None
        As the column says.
    """

    label: str
    sent: str
    answer: str | None
    status: str
    error: str | None


@dataclass(frozen=True, slots=True, repr=False)
class Review:
    """A sample of rows; it shows itself in a notebook, with a box to search it.

    Attributes
    ----------
    output : str
        The response column.
    of : int
        How many rows it was taken from.
    rows : tuple of Reviewed
        The sample, in the frame's order.

    Examples
    --------
    >>> review = pd.DataFrame({"text": ["hello"], "response": ["bonjour"]}).llm.review()
    >>> review.of, review.rows[0].answer
    (1, 'bonjour')
    """

    output: str
    of: int
    rows: tuple[Reviewed, ...]

    def __repr__(self) -> str:
        lines = [f"<Review: {len(self.rows):,} of {self.of:,} rows>"]
        for row in self.rows:
            lines.append(f"[{row.label}] {row.status}: {_short(row.answer if row.answer is not None else row.error)}")
            lines.append(f"    {_short(row.sent)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        heads = "".join(
            f"<th scope='col' style='text-align:left'>{html.escape(name)}</th>"
            for name in ("row", "sent", self.output, "status")
        )
        cell = "text-align:left;vertical-align:top"
        text = f"{cell};white-space:pre-wrap;overflow-wrap:anywhere;max-width:38em"
        body = "".join(
            f"<tr><td style='{cell}'>{html.escape(row.label)}</td><td style='{text}'>{html.escape(row.sent)}</td>"
            f"<td style='{text}'>{_answer(row.answer)}</td>"
            f"<td style='{text}'>{html.escape(row.status)}{_error(row.error)}</td></tr>"
            for row in self.rows
        )
        return (
            f"<div class='llmframe-review'><strong>{len(self.rows):,} of {self.of:,} rows</strong> "
            f'<input type="search" placeholder="search" aria-label="search the rows" oninput="{SEARCH}">'
            "<div style='max-height:36em;overflow:auto'>"
            f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></div>"
        )


def review(
    frame: pd.DataFrame, output: str, prompts: Prompts | None = None, *, rows: int = 20, seed: int = 0
) -> Review:
    """Take a sample of the rows that were asked.

    Parameters
    ----------
    frame : DataFrame
        As `LLMFrame.complete` gave it.
    output : str
        The response column.
    prompts : Prompts, optional
        What the rows sent; their columns are shown without it.
    rows : int
        How many at most.
    seed : int
        Another one gives other rows.

    Raises
    ------
    ConfigurationError
        ``rows=`` is no positive number, or the frame has no such column, or more than one.
    """
    if isinstance(rows, bool) or not isinstance(rows, int | np.integer) or rows < 1:
        raise ConfigurationError(f"rows={rows!r} is no number of rows to look at; it is 1 or more")
    if output not in frame.columns:
        raise ConfigurationError(str(TemplateError.unknown_column(output, list(frame.columns))))
    for name in (output, f"{output}_status", f"{output}_error"):
        if int((frame.columns == name).sum()) > 1:
            raise ConfigurationError(f"the frame has more than one column {name!r}; give each its own name")
    asked = np.arange(len(frame))
    if f"{output}_status" in frame.columns:
        asked = np.flatnonzero(~frame[f"{output}_status"].isin(NOT_ASKED).to_numpy(dtype=bool))
    chosen = np.sort(np.random.default_rng(seed).permutation(asked)[:rows])
    taken = frame.iloc[chosen]
    if prompts is None:
        own = [name != output and not str(name).startswith(f"{output}_") for name in frame.columns]
        sent = [_columns(frame.columns[own], values) for values in _each_row(taken, own)]
    else:
        sent = [_messages(made) for made in prompts.render(chosen)]
    details = ("prompt_tokens", "completion_tokens")
    properties = [
        str(name).startswith(f"{output}_") and str(name)[len(output) + 1 :] not in ("status", "error", *details)
        for name in frame.columns
    ]
    reviewed = [
        Reviewed(
            label=str(label),
            sent=_cut(what),
            answer=_said(answer, frame.columns[properties], others),
            status=_text(status) or "",
            error=_text(error),
        )
        for label, what, answer, others, status, error in zip(
            taken.index.tolist(),
            sent,
            taken[output].tolist(),
            _each_row(taken, properties),
            _cells(taken, f"{output}_status"),
            _cells(taken, f"{output}_error"),
            strict=True,
        )
    ]
    return Review(output, len(asked), tuple(reviewed))


def _each_row(frame: pd.DataFrame, chosen: list[bool]) -> list[tuple[Any, ...]]:
    """Give each row's values in some columns, which are told by place: a name may stand twice."""
    # pandas 2.2 gives no tuple at all, not an empty one per row, when there are no columns
    return list(frame.loc[:, chosen].itertuples(index=False, name=None)) if any(chosen) else [()] * len(frame)


def _cells(frame: pd.DataFrame, name: str) -> list[Any]:
    return frame[name].tolist() if name in frame.columns else [None] * len(frame)


def _messages(made: list[dict[str, Any]] | Missing) -> str:
    if isinstance(made, Missing):
        return made.reason
    return "\n\n".join(f"{message.get('role')}: {_content(message)}" for message in made)


def _content(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    return json.dumps(message if content is None else content, ensure_ascii=False, default=str)


def _columns(names: Iterable[Hashable], values: tuple[Any, ...]) -> str:
    said = zip(names, map(_text, values), strict=True)
    return "\n".join(f"{name}: {value}" for name, value in said if value is not None)


def _said(answer: Any, names: pd.Index[Any], values: tuple[Any, ...]) -> str | None:
    text = _text(answer)
    return text if text is None or not len(names) else _cut(f"{text}\n\n{_columns(names, values)}")


def _text(value: Any) -> str | None:
    """Give a cell as text; None for a missing one (a list is never missing)."""
    if value is None or (pd.api.types.is_scalar(value) and pd.isna(value)):
        return None
    return _cut(str(value))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}… ({len(text) - SHOWN:,} characters more)"


def _short(text: str | None) -> str:
    one = "" if text is None else " ".join(text.split())
    return one if len(one) <= PRINTED else f"{one[: PRINTED - 1]}…"


def _answer(answer: str | None) -> str:
    return "<em style='opacity:.6'>none</em>" if answer is None else html.escape(answer)


def _error(error: str | None) -> str:
    return "" if error is None else f"\n{html.escape(error)}"
