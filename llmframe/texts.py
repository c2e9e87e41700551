"""Texts: what a row gives to an embedding, by the same columns, templates and functions as a prompt."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import numpy as np
import numpy.typing as npt
import pandas as pd

from llmframe.errors import TemplateError
from llmframe.messages import Messages, kind, user
from llmframe.prompts import CHUNK, Missing, Na, Prompt, Prompts, Values


class Texts(Prompts):
    """The text of each row of a frame, as one turn of a user.

    Parameters
    ----------
    frame : pandas.DataFrame
        Where the rows are.
    text : column name, template, function or renderer
        See `LLMFrame.embed`.
    na : {"skip", "raise", "keep"}
        What to do with a row where a value that it needs is missing.

    Raises
    ------
    ConfigurationError, TemplateError
        The text does not fit the frame.
    """

    def __init__(self, frame: pd.DataFrame, text: Prompt, *, na: Na = "skip") -> None:
        if isinstance(text, pd.Series | list):
            raise TemplateError(
                f"the text to embed is {kind(text)}; it has to be a column's name, a template or a function (for a "
                "column at hand there is series.llm.embed())"
            )
        super().__init__(frame, text, na=na)
        self._column: Hashable | None = text if self._is_column(text) else None  # type: ignore[assignment]

    def render(
        self,
        positions: npt.NDArray[np.intp] | None = None,
        *,
        wanted: npt.NDArray[np.bool_] | None = None,
        for_key: bool = False,
    ) -> Iterator[Messages | Missing]:
        """Give each row's text, as `Prompts.render` does its messages."""
        if positions is None:
            positions = np.arange(len(self.frame))
        for start in range(0, len(positions), CHUNK):
            chunk = positions[start : start + CHUNK]
            # A column of texts with none missing is what is embedded most, and a tenth of the work.
            plain = [] if self._column is None else self.frame[self._column].iloc[chunk].tolist()
            if plain and all(type(value) is str for value in plain):
                yield from map(user, plain)
            else:
                yield from super().render(chunk, wanted=wanted, for_key=for_key)

    def _messages(self, position: int, row: Values, for_key: bool) -> Messages | Missing:
        made = super()._messages(position, row, for_key)
        if not isinstance(made, Missing) and (len(made) != 1 or not isinstance(made[0].get("content"), str)):
            raise TemplateError("it holds a message array, and an embedding is of a text; name a column of texts")
        return made


def text_of(messages: Messages) -> str:
    """Give the text of one row's turn."""
    text: str = messages[0]["content"]
    return text
