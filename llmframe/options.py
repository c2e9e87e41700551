"""The keywords of a call: their defaults, what `configure` and the environment say of them, and their checks.

A value in the call beats `configure`, which beats the environment. What is no keyword of ours goes to the API.
"""

from __future__ import annotations

import functools
import inspect
import numbers
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import openai
import pandas as pd

from llmframe.errors import ConfigurationError
from llmframe.messages import well_formed
from llmframe.prompts import Na
from llmframe.requests import Api

P = ParamSpec("P")
S = TypeVar("S")
A = TypeVar("A")
R = TypeVar("R")

LONG_NAME = 8  # letters, from which a name that is one typo away from it is most likely meant to be it
POLL_S = 10.0  # between two looks at a batch job while something happens

Where = Literal["missing"] | pd.Series | npt.NDArray[np.bool_] | Sequence[bool]
OnError = Literal["column", "raise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Every keyword of a call, each with its value; `LLMFrame.complete` tells what they mean."""

    system: str | None
    examples: Iterable[tuple[str, str]] | None
    history: str | None
    images: str | Sequence[str] | None
    model: str | None
    schema: Any
    output: str
    details: bool
    where: Where | None
    refresh: bool
    na: Na
    checkpoint: str | os.PathLike[str] | None
    dedupe: bool
    max_concurrency: int | None
    rpm: float | None
    tpm: float | None
    max_cost: float | None
    max_tokens_total: int | None
    prices: Mapping[str, float] | None
    timeout: float | None
    max_attempts: int
    on_error: OnError
    api: Api
    client: openai.AsyncOpenAI | openai.OpenAI | None
    base_url: str | Sequence[str] | None
    api_key: str | None = field(repr=False)
    progress: bool | None
    params: Mapping[str, Any] = field(repr=False)  # extra_headers= may hold a key

    def __post_init__(self) -> None:
        _check_choice("na", self.na, ("skip", "raise", "keep"))
        _check_choice("on_error", self.on_error, ("column", "raise"))
        if not (isinstance(self.api, str) and self.embeds):  # what `embed` passes, and nobody else is meant to
            _check_choice("api", self.api, ("chat", "responses"))
        for name in ("details", "refresh", "dedupe"):
            _check_choice(name, getattr(self, name), (True, False))
        _check_choice("progress", self.progress, (None, True, False))
        if self.model is not None and not _is_name(self.model):
            raise ConfigurationError(f"model={self.model!r} is no model's name; pass text")
        if not _is_name(self.output):
            raise ConfigurationError(f"output={self.output!r} is no column name; pass text")
        if self.history is not None and not _is_name(self.history):
            raise ConfigurationError(f"history={self.history!r} is no column name; pass text")
        if self.history == self.output:
            raise ConfigurationError(f"history= and output= are both {self.output!r}; give each column its own name")
        several = self.several  # looked at here too, since it refuses an n= that is none
        if self.history is not None and several:
            raise ConfigurationError("n= gives several answers, and history= goes on with one; leave one of them out")
        if self.checkpoint is not None and not _is_path(self.checkpoint):
            raise ConfigurationError(f"checkpoint={self.checkpoint!r} is no directory; pass a path or an fsspec URL")
        check_count("max_attempts", self.max_attempts)
        if self.max_concurrency is not None:
            check_count("max_concurrency", self.max_concurrency)
        if self.max_tokens_total is not None:
            check_count("max_tokens_total", self.max_tokens_total)
        for name in ("rpm", "tpm", "max_cost", "timeout"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not _is_number(value) or not 0 < value < float("inf")):
                raise ConfigurationError(f"{name}={value!r} has to be a number above 0")
        _check_params(self.params)

    @property
    def embeds(self) -> bool:
        """Whether embeddings are asked for, and no answers."""
        return self.api == "embeddings"

    @property
    def several(self) -> bool:
        """Whether ``n=`` asks for a list of answers in each cell."""
        return answers_asked(self.params) > 1


def call_options(
    *,
    system: str | None = None,
    examples: Iterable[tuple[str, str]] | None = None,
    history: str | None = None,
    images: str | Sequence[str] | None = None,
    model: str | None = None,
    schema: Any = None,
    output: str = "response",
    details: bool = False,
    where: Where | None = None,
    refresh: bool = False,
    na: Na = "skip",
    checkpoint: str | os.PathLike[str] | None = None,
    dedupe: bool = True,
    max_concurrency: int | None = None,
    rpm: float | None = None,
    tpm: float | None = None,
    max_cost: float | None = None,
    max_tokens_total: int | None = None,
    prices: Mapping[str, float] | None = None,
    timeout: float | None = None,
    max_attempts: int = 8,
    on_error: OnError = "column",
    api: Api = "chat",
    client: openai.AsyncOpenAI | openai.OpenAI | None = None,
    base_url: str | Sequence[str] | None = None,
    api_key: str | None = None,
    progress: bool | None = None,
    **params: Any,
) -> Options:
    """Collect the keywords of a call; its signature is the list of them, for all that take them.

    Raises
    ------
    ConfigurationError
        A value that a keyword cannot have, or an unknown keyword that is nearly one of ours or of the API's.
    """
    given = dict(locals())
    given["params"] = {name: value for name, value in params.items() if value is not None}  # as any keyword of ours
    return Options(**given)


def embed_options(
    *,
    model: str | None = None,
    output: str = "embedding",
    dimensions: int | None = None,
    details: bool = False,
    where: Where | None = None,
    refresh: bool = False,
    na: Na = "skip",
    checkpoint: str | os.PathLike[str] | None = None,
    dedupe: bool = True,
    max_concurrency: int | None = None,
    rpm: float | None = None,
    tpm: float | None = None,
    max_cost: float | None = None,
    max_tokens_total: int | None = None,
    prices: Mapping[str, float] | None = None,
    timeout: float | None = None,
    max_attempts: int = 8,
    on_error: OnError = "column",
    client: openai.AsyncOpenAI | openai.OpenAI | None = None,
    base_url: str | Sequence[str] | None = None,
    api_key: str | None = None,
    progress: bool | None = None,
    **params: Any,
) -> Options:
    """Collect the keywords of a call for embeddings; its signature is the list of them.

    Raises
    ------
    ConfigurationError
        A value that a keyword cannot have, or a keyword that is about answers.
    """
    given = dict(locals())
    del given["dimensions"], given["params"]
    for name in params:
        if name in KEYWORDS:
            raise ConfigurationError(f"{name}= is about answers, and an embedding has none; leave it out")
        if name == "encoding_format":
            raise ConfigurationError("encoding_format= is chosen here: a column holds float32, however they were sent")
        if name != "dimensions" and _one_typo(name, "dimensions"):
            raise ConfigurationError(f"unknown keyword {name!r}; did you mean 'dimensions'?")
    if dimensions is not None:
        check_count("dimensions", dimensions)
        params["dimensions"] = int(dimensions)
    return call_options(**given, api="embeddings", **params)


KEYWORDS = tuple(keyword.name for keyword in fields(Options) if keyword.name != "params")
OF_ANY_CALL = (
    "details",
    "refresh",
    "na",
    "checkpoint",
    "dedupe",
    "max_concurrency",
    "rpm",
    "tpm",
    "max_cost",
    "max_tokens_total",
    "timeout",
    "max_attempts",
    "on_error",
    "client",
    "base_url",
    "api_key",
    "progress",
)  # what embeddings take of `configure`, whose model, its prices and parameters are those of a model that answers
FRAME_ONLY = (
    "system",
    "examples",
    "history",
    "images",
    "output",
    "details",
    "where",
    "na",
)  # what a list of message arrays has no use for

_configured: dict[str, Any] = {}


def configure(**defaults: Any) -> None:
    """Set defaults for this process: for any keyword of `complete` but ``where``, ours or the API's.

    Parameters
    ----------
    **defaults
        Keywords and their values; None takes a default back. `LLMFrame.embed` takes those that any call can have: of
        the checkpoint, the endpoint, the caps and the budgets, and ``details``, ``refresh``, ``na``, ``dedupe``,
        ``on_error`` and ``progress``. What is about answers is not for it, nor are ``model``, ``prices``, ``output``
        and the API's parameters: pass its own in the call.

    Raises
    ------
    ConfigurationError
        A value that the keyword cannot have; nothing is changed.

    Examples
    --------
    >>> llmframe.configure(model="gpt-4o-mini", temperature=0)
    >>> llmframe.configure(model=None, temperature=None)
    """
    if "where" in defaults:
        raise ConfigurationError("where= selects rows of one frame; pass it in the call")
    global _configured
    merged = {name: value for name, value in _over(_configured, defaults).items() if value is not None}
    call_options(**merged)
    _configured = merged


def gather(given: Mapping[str, Any]) -> Options:
    """Fill in what a call left out, from `configure` and the environment."""
    environment = {"model": os.environ.get("LLMFRAME_MODEL"), "checkpoint": os.environ.get("LLMFRAME_CHECKPOINT")}
    base = {name: value for name, value in environment.items() if value}
    return call_options(**base | _over(_configured, given))


def gather_embedding(given: Mapping[str, Any]) -> Options:
    """Fill in what a call for embeddings left out; its model is its own."""
    checkpoint = os.environ.get("LLMFRAME_CHECKPOINT")
    base = {"checkpoint": checkpoint} if checkpoint else {}
    ours = {name: value for name, value in _configured.items() if name in OF_ANY_CALL}
    return embed_options(**base | _over(ours, given))


def _over(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Lay what is given over the defaults; another way to the endpoint replaces theirs whole."""
    other: tuple[str, ...] = ()  # a client has its own URL and key
    if given.get("client") is not None:
        other = ("base_url", "api_key")
    elif given.get("base_url") is not None or given.get("api_key") is not None:
        other = ("client",)
    return {name: value for name, value in defaults.items() if name not in other} | dict(given)


def takes_options(
    options: Callable[P, Options],
) -> Callable[[Callable[Concatenate[A, ...], R]], Callable[Concatenate[A, P], R]]:
    """Type and show a function of one argument and ``**keywords`` as taking those of `options`."""
    return functools.partial(_show, options)


def method_takes_options(
    options: Callable[P, Options],
) -> Callable[[Callable[Concatenate[S, A, ...], R]], Callable[Concatenate[S, A, P], R]]:
    """Do as `takes_options` does, for a method of one argument."""
    return functools.partial(_show, options)


def shows_options(call: A) -> A:
    """Show a function that also has keywords of its own as taking those of `call_options` after them."""
    shown: A = _show(call_options, call)
    return shown


def _show(options: Callable[..., Options], call: Any) -> Any:
    signature = inspect.signature(call)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    named = {parameter.name for parameter in own}
    theirs = [each for name, each in inspect.signature(options).parameters.items() if name not in named]
    call.__signature__ = signature.replace(parameters=[*own, *theirs])
    return call


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)  # numpy's too


def _is_name(value: Any) -> bool:
    """Whether it is text, and such that JSON and Arrow take: found later, after rows are paid for."""
    return isinstance(value, str) and value != "" and well_formed(value) == value


def _is_path(value: Any) -> bool:
    """Whether a file system takes it; no text at all would be the working directory, and seldom meant."""
    try:
        path = os.fsencode(value)
    except (TypeError, ValueError):  # of another type, or with a lone surrogate
        return False
    return not isinstance(value, bytes) and path != b"" and b"\0" not in path


def _check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    if not any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices):
        raise ConfigurationError(f"{name}={value!r} is not known; it is one of {', '.join(map(repr, choices))}")


def check_count(name: str, value: Any) -> None:
    """Refuse what is no whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ConfigurationError(f"{name}={value!r} has to be a whole number of at least 1")


def answers_asked(params: Mapping[str, Any]) -> int:
    """Give how many answers a request asks for (``n=``).

    Raises
    ------
    ConfigurationError
        It is no whole number of at least 1.
    """
    extra = params.get("extra_body")
    count = {**params, **(extra if isinstance(extra, Mapping) else {})}.get("n", 1)
    if count is None:
        return 1
    if isinstance(count, bool) or not _is_number(count) or not float(count).is_integer() or count < 1:
        raise ConfigurationError(f"n={count!r} has to be a whole number of at least 1")
    return int(count)


def _check_params(params: Mapping[str, Any]) -> None:
    for name in params:
        if name == "stream":
            raise ConfigurationError("stream= has no meaning here: each row's answer is written when it is whole")
        if name in ("messages", "input", "prompt"):
            raise ConfigurationError(f"{name}= is made from the prompt, row by row; pass it as the first argument")
        near = next((known for known in _likely_names() if _one_typo(name, known)), None)
        if near is not None and name not in _api_parameters():
            raise ConfigurationError(
                f"unknown keyword {name!r}; did you mean {near!r}? (extra_body= sends it all the same)"
            )


@functools.cache
def _likely_names() -> tuple[str, ...]:
    """Give what a name may be meant to be; of the API's own the long ones: others have a `top_k` beside `top_p`."""
    return (*KEYWORDS, *sorted(name for name in _api_parameters() if len(name) >= LONG_NAME))


@functools.cache
def _api_parameters() -> frozenset[str]:
    """Give the API's own parameters, which may be a letter away from one of ours (``n`` and ``na``)."""
    from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as Parameters

    return frozenset(Parameters.__annotations__)


def _one_typo(word: str, known: str) -> bool:
    """Whether one letter added, left out, replaced, or swapped with the next makes one word the other."""
    if word == known or abs(len(word) - len(known)) > 1:
        return False
    start = next((i for i, (a, b) in enumerate(zip(word, known, strict=False)) if a != b), min(len(word), len(known)))
    one, two = word[start:], known[start:]
    return one[1:] == two[1:] or one[1:] == two or one == two[1:] or (one[:2] == two[1::-1] and one[2:] == two[2:])
