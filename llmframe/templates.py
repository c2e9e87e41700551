"""Templates: `str.format` over column names with format specs, and nothing more.

A value is only ever formatted: no attribute, index or conversion reaches into it.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from llmframe.cells import BYTES, as_text
from llmframe.errors import TemplateError

TOKEN = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]")


@dataclass(frozen=True, slots=True)
class Field:
    """A ``{column:spec}`` of a template."""

    column: Hashable
    spec: str

    def render(self, value: Any) -> str:
        """Format one value; a missing one (None) is empty text."""
        if value is None:
            return ""
        if not self.spec:
            return value if type(value) is str else written(value, self.column)
        try:
            return format(as_text(value) if isinstance(value, BYTES) else value, self.spec)
        except Exception as error:  # a value's own __format__ may raise anything
            raise TemplateError(
                f"column {self.column!r} holds {_shown(value)}, which the spec {self.spec!r} does not take: {error}"
            ) from None


def written(value: Any, column: Hashable) -> str:
    """Give a value as text.

    Raises
    ------
    TemplateError
        It has no text, or its own ``__str__`` raises.
    """
    try:
        return as_text(value)
    except TemplateError as error:
        raise TemplateError(f"column {column!r} holds {error}") from None
    except Exception as error:
        raise TemplateError(
            f"column {column!r} holds a value of type {type(value).__name__} that cannot be written as text: {error}"
        ) from error


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except Exception:  # its own __repr__ may raise anything too
        return f"a value of type {type(value).__name__}"


@dataclass(frozen=True, slots=True)
class Template:
    """A template, read once."""

    pieces: tuple[str | Field, ...]

    @property
    def columns(self) -> tuple[Hashable, ...]:
        """The columns that its fields name, in order of first use."""
        return tuple(dict.fromkeys(piece.column for piece in self.pieces if isinstance(piece, Field)))

    def render(self, row: Mapping[Hashable, Any]) -> str:
        """Fill the fields from a row.

        Raises
        ------
        TemplateError
            A value that its format spec does not take.
        """
        return "".join([piece if isinstance(piece, str) else piece.render(row[piece.column]) for piece in self.pieces])


def read_template(text: str, columns: Mapping[str, Hashable]) -> Template:
    """Read a template.

    Parameters
    ----------
    text : str
        ``{column}`` or ``{column:spec}``; ``{{`` and ``}}`` for braces.
    columns : mapping
        Each column's name as text, to its label in the frame.

    Raises
    ------
    TemplateError
        A field that names no column, an attribute or index access, a conversion, or a lone brace.

    Examples
    --------
    >>> read_template("{price:.2f} for {what}", {"price": "price", "what": "what"}).render({"price": 3, "what": "tea"})
    '3.00 for tea'
    """
    pieces: list[str | Field] = []
    end = 0
    for found in TOKEN.finditer(text):
        if found.start() > end:
            pieces.append(text[end : found.start()])
        token, end = found.group(), found.end()
        if token in ("{{", "}}"):
            pieces.append(token[0])
        elif len(token) == 1:
            raise TemplateError(
                f"the template has a lone {token!r} at {text[max(0, end - 20) : end + 20]!r}; "
                "write {{ and }} for braces that are text (JSON, code)"
            )
        else:
            pieces.append(_field(token[1:-1], columns))
    if end < len(text):
        pieces.append(text[end:])
    return Template(tuple(pieces))


def _field(whole: str, columns: Mapping[str, Hashable]) -> Field:
    name = whole
    while name not in columns and ":" in name:  # the longest name first: `a:b` may be a column
        name = name.rpartition(":")[0]
    if name in columns:
        return Field(columns[name], whole[len(name) + 1 :])
    name = whole.partition(":")[0]
    if not whole:
        raise TemplateError("a field of the template is empty: {}; name a column in it, as in {review}")
    if name.partition("!")[0] in columns:
        raise TemplateError(f"the field {{{whole}}} has a conversion; only a format spec may follow: {{x:.2f}}")
    if re.split(r"[.\[]", name)[0] in columns:
        raise TemplateError(
            f"no column {name!r}; a template reaches columns only, not into their values: "
            "make it a column of its own, or pass a function as the prompt"
        )
    if not re.fullmatch(r"[\w .\-]+", name):
        raise TemplateError(f"no column {whole!r}; for braces that are text (JSON, code) write {{{{ and }}}}")
    raise TemplateError.unknown_column(name, columns)
