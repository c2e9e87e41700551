"""Tokens: how many a prompt takes, counted without the network, and by what.

Pure. A count is either by the model's own vocabulary, or a guess that says it is one.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmframe.messages import Messages

A_MESSAGE = 3  # tokens around a message, its role aside; with the next two, OpenAI's own way to count (its cookbook,
A_NAME = 1  # "How to count tokens with tiktoken"), which its API's usage agrees with
THE_REPLY = 3  # tokens that begin the answer

VOCABULARIES = (
    (r"(gpt-4o|gpt-4\.1|gpt-4\.5|gpt-5|gpt-oss|chatgpt-4o|o1|o3|o4)(-|\.|$)", "o200k_base"),
    (r"(gpt-4|gpt-3\.5|gpt-35)(-|$)", "cl100k_base"),
    (r"text-embedding-(3|ada)-", "cl100k_base"),
)
"""The vocabulary of OpenAI's models by the start of their names, dates and sizes left open (tiktoken's table)."""

GUESS = "o200k_base"  # for a model of an unknown vocabulary, where bpe-openai is installed: of a size with the others
ASCII_A_TOKEN = 4.1  # characters; measured over the reviews of data/ with o200k_base (with cl100k_base 4.0)
OTHERS_A_TOKEN = 1.5  # characters that are not ASCII; over a paragraph in eight scripts 2.0 (with cl100k_base 1.0)
PIECE = 100_000  # characters counted at once: the encoder refuses a million; a cut adds one token at most


@dataclass(frozen=True, slots=True)
class Counter:
    """Counts the tokens of prompts.

    Attributes
    ----------
    count : callable
        Gives the tokens of a text.
    known : bool
        Whether that is by the model's own vocabulary.
    how : str
        By what, in words.
    """

    count: Callable[[str], int]
    known: bool
    how: str

    def prompt(self, messages: Messages) -> int:
        """Count a message array as a chat API does: its texts, its roles, and what stands around them.

        Pictures, files and audio are not counted.
        """
        tokens = THE_REPLY
        for message in messages:
            tokens += A_MESSAGE
            for name, value in message.items():
                tokens += sum(map(self.count, _texts(value)))
                if name == "name":
                    tokens += A_NAME
        return tokens


def counter_for(model: str) -> Counter:
    """Choose how a model's tokens are counted.

    Examples
    --------
    >>> counter = counter_for("gpt-4o-mini")
    >>> counter.prompt([{"role": "user", "content": "Hello, world"}])
    10
    >>> counter.how
    'counted with o200k_base'
    >>> counter_for("mistral-small").how
    'a guess, counted with o200k_base: the vocabulary of mistral-small is not known'
    """
    name = model.rpartition("/")[2].removeprefix("ft:")
    vocabulary = next((each for start, each in VOCABULARIES if re.match(start, name)), None)
    count = _counted(vocabulary or GUESS)
    if count is None:
        why = "bpe-openai is not installed (pip install 'llmframe-pandas[cost]')"
        return Counter(guess, False, f"a guess by the number of characters: {why}")
    if vocabulary is None:
        return Counter(count, False, f"a guess, counted with {GUESS}: the vocabulary of {model} is not known")
    return Counter(count, True, f"counted with {vocabulary}")


def guess(text: str) -> int:
    """Guess the tokens of a text by its characters.

    Examples
    --------
    >>> guess("The best player I have owned."), guess("")
    (7, 0)
    """
    ascii_ = len(text) if text.isascii() else sum(character.isascii() for character in text)
    return round(ascii_ / ASCII_A_TOKEN + (len(text) - ascii_) / OTHERS_A_TOKEN)


@functools.cache
def _counted(vocabulary: str) -> Callable[[str], int] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it opens its files in a way of older Pythons
        try:
            from bpe_openai import get_encoding
        except ImportError:
            return None
        encode = get_encoding(vocabulary).encode_ordinary
    roles = {role: len(encode(role)) for role in ("system", "developer", "user", "assistant")}  # in every message

    def count(text: str) -> int:
        if text in roles:
            return roles[text]
        if len(text) <= PIECE:
            return len(encode(text))
        return sum(len(encode(text[start : start + PIECE])) for start in range(0, len(text), PIECE))

    return count


def _texts(value: Any) -> Iterable[str]:
    """Give the texts in a message's field: it, or those of its parts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                yield part["text"]
