"""The HTML of a run: what came of it, its commonest errors, and its picture, on one page without a script.

Everything that came from a row, a model or an endpoint is escaped; the page has no colours of its own, so that it is
read on whatever theme is around it.
"""

from __future__ import annotations

import html
from dataclasses import dataclass

QUOTED = 300  # characters of an error


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a page: its name, and how it reads."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Trouble:
    """One kind of error.

    Attributes
    ----------
    rows : int
        How many rows have it.
    status, error : str
        As their columns say.
    label : str
        The index label of one of them, to look at.
    """

    rows: int
    status: str
    error: str
    label: str


def fragment(title: str, figures: list[list[Figure]], troubles: list[Trouble], picture: str | None) -> str:
    """Give a run as a piece of HTML, for a notebook.

    Parameters
    ----------
    title : str
        The run in a line.
    figures : list of list of Figure
        Columns of figures.
    troubles : list of Trouble
        The commonest errors.
    picture : str or None
        SVG, which is put in as it is.

    Examples
    --------
    >>> "&lt;b&gt;" in fragment("run", [[Figure("rows", "<b>")]], [], None)
    True
    """
    parts = [f"<div class='llmframe-run' style='max-width:72em'><strong>{html.escape(title)}</strong>"]
    parts.append("<div style='display:flex;flex-wrap:wrap;align-items:flex-start;gap:0 2em'>")
    for column in figures:
        rows = "".join(
            f"<tr><th scope='row' style='text-align:left;font-weight:normal;opacity:.75'>{html.escape(each.name)}</th>"
            f"<td style='text-align:right'>{html.escape(each.value)}</td></tr>"
            for each in column
        )
        parts.append(f"<table style='margin:.5em 0'><tbody>{rows}</tbody></table>")
    parts.append("</div>")
    if troubles:
        rows = "".join(
            f"<tr><td style='text-align:right'>{each.rows:,}</td><td style='text-align:left'>{each.status}</td>"
            f"<td style='text-align:left;white-space:pre-wrap'>{html.escape(each.error[:QUOTED])}</td>"
            f"<td style='text-align:left'>{html.escape(each.label)}</td></tr>"
            for each in troubles
        )
        heads = "".join(
            f"<th scope='col' style='text-align:left'>{name}</th>"
            for name in ("rows", "status", "error", "such as row")
        )
        parts.append(f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>")
    if picture is not None:
        parts.append(f"<div style='max-width:100%;overflow-x:auto;margin-top:1em'>{picture}</div>")
    parts.append("</div>")
    return "".join(parts)


def page(body: str) -> str:
    """Give a fragment as a page of its own, light or dark as the reader's system is."""
    return (
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'><title>llmframe: a run</title>"
        "<meta name='color-scheme' content='light dark'>"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        "<style>:root{color-scheme:light dark}body{font:14px system-ui,sans-serif;margin:2em}"
        "td,th{padding:.15em .6em;vertical-align:top}</style></head>"
        f"<body>{body}</body></html>\n"
    )
