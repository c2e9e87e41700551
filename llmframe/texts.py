"""Texts: what a row gives to an embedding, by the same columns, templates and functions as a prompt."""

from __future__ import annotations

from llmframe.errors import TemplateError
from llmframe.messages import Messages
from llmframe.prompts import Missing, Prompts, Values


class Texts(Prompts):
    """The text of each row of a frame, as one turn of a user."""

    def _messages(self, position: int, row: Values, for_key: bool) -> Messages | Missing:
        made = super()._messages(position, row, for_key)
        if not isinstance(made, Missing) and (len(made) != 1 or not isinstance(made[0].get("content"), str)):
            raise TemplateError("it holds a message array, and an embedding is of a text; name a column of texts")
        return made


def text_of(messages: Messages) -> str:
    """Give the text of one row's turn."""
    text: str = messages[0]["content"]
    return text
