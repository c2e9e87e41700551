"""Turn a frame's columns and templates into messages: what each row would send.

Pure, and made on demand a chunk at a time: only what a function or a renderer returned is kept for every row. A value
reaches a template as pandas holds it (an int stays an int), and an array as a list; see `cells`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pandas as pd

from llmframe.cells import refuse_address, values
from llmframe.errors import ConfigurationError, TemplateError
from llmframe.images import Attachment, CannotRead, attach, attachments_of
from llmframe.jinja import unknown_name
from llmframe.messages import Messages, check_messages, kind, user, well_formed
from llmframe.results import PANDAS_3
from llmframe.templates import Template, read_template, written

Na = Literal["skip", "raise", "keep"]

RENDERED = frozenset({"content", "name", "role"})  # the rest of a message is of the API: ids, calls of tools
CHUNK = 1024  # rows made into Python objects at a time: enough to make pandas' cost per call vanish


@runtime_checkable
class Renderer(Protocol):
    """Anything with a ``render(**row)``: a Jinja2 template, for one."""

    def render(self, **row: Any) -> str:
        """Give the text for a row."""
        ...


# Not Sequence[Mapping[str, Any]]: mypy holds that for hashable, and then refuses a list, which is not.
Prompt = Hashable | list[Any] | Callable[[Any], Any] | Renderer
"""A column's name, a template, a list of messages, a function of a row, or a renderer."""

Values = dict[Hashable, Any]
"""One row's values by column, a missing one as None."""


@dataclass(frozen=True, slots=True)
class Missing:
    """Why a row has no messages: a value that its prompt needs is missing."""

    reason: str


@dataclass(frozen=True, slots=True)
class Unreadable(Missing):
    """Why a row has no messages though it names all that they need: a picture that cannot be read."""


class Row(Values):
    """One row for a function: ``row["review"]``, or ``row.review`` as `DataFrame.apply` has it.

    A column goes before a method of that name: what wants the methods (``json.dumps``) is given ``dict(row)``.
    """

    def __getattribute__(self, name: str) -> Any:
        if name[:2] != "__" and name in self:  # else row.items would be a method, and its address go to the model
            return self[name]
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(str(TemplateError.unknown_column(name, self)))

    def __missing__(self, name: Hashable) -> Any:
        raise KeyError(str(TemplateError.unknown_column(str(name), self)))


@dataclass(frozen=True, slots=True)
class _Maker:
    """How a row's own messages are made, and from what."""

    make: Callable[[Values], Messages | None]
    reads: tuple[Hashable, ...]  # the columns handed to `make`
    needs: tuple[Hashable, ...]  # those of them a row cannot do without
    foreign: bool = False  # the user's own code, which may answer otherwise when it is called again


class Prompts:
    """The messages of each row of a frame, made on demand.

    Parameters
    ----------
    frame : pandas.DataFrame
        Where the rows are.
    prompt : column name, template, list of messages, function or renderer
        See `LLMFrame.complete`.
    system : str, optional
        A template that becomes the first message.
    examples : sequence of (str, str), optional
        Few-shot pairs of a user's and an assistant's text, put before the prompt as they are.
    history : str, optional
        A column of message arrays that come before each row's own; a row without one, or a frame without the column,
        begins a conversation.
    images : str or list of str, optional
        Columns of what goes beside the text of each row's own turn; see `images`.
    na : {"skip", "raise", "keep"}
        What to do with a row where a value that it needs is missing.

    Raises
    ------
    ConfigurationError, TemplateError
        The prompt does not fit the frame.
    """

    def __init__(
        self,
        frame: pd.DataFrame,
        prompt: Prompt,
        *,
        system: str | None = None,
        examples: Iterable[tuple[str, str]] | None = None,
        history: str | None = None,
        images: str | Sequence[str] | None = None,
        na: Na = "skip",
    ) -> None:
        if isinstance(frame.columns, pd.MultiIndex):
            raise ConfigurationError(
                "the frame's columns are a MultiIndex, which a template cannot name; flatten them first, "
                "as in df.columns = ['_'.join(map(str, c)) for c in df.columns]"
            )
        if na not in ("skip", "raise", "keep"):
            raise ConfigurationError(f"na={na!r} is not known; it is 'skip', 'raise' or 'keep'")
        self.frame = frame.copy(deep=False)  # rows are rendered as they are asked: what the user edits meanwhile is not
        self._na = na
        self._labels = set(frame.columns)
        self._names = _names(frame)
        self._system = None if system is None else _read_system(system, self._names)
        self._examples = _read_examples(examples)
        self._history = history if history in self._labels else None
        self._images = _read_images(images, self._names)
        self._maker = self._read_prompt(prompt)
        system_columns = self._system.columns if self._system else ()
        before = () if self._history is None else (self._history,)
        self._reads = tuple(dict.fromkeys((*system_columns, *self._maker.reads, *before, *self._images)))
        needs = (*system_columns, *self._maker.needs, *self._images)
        self._needs = () if na == "keep" else tuple(dict.fromkeys(needs))
        labels: list[Hashable] = list(frame.columns)
        for column in self._reads:
            count = labels.count(column)
            if count > 1:
                raise TemplateError(f"column {column!r} appears {count} times in the frame; give each its own name")
            if not PANDAS_3:  # which copies on write; before it a shallow copy shares its values
                self.frame[column] = frame[column].copy()
        self._made: dict[int, Messages | None] = {}
        self._files: dict[int, bytes] = {}  # by position: the digest of what a row's files held for its key
        shown = {"prompt": self._shown(prompt), "system": system, "examples": self._examples}
        self.description = repr(shown | ({"images": list(self._images)} if self._images else {}))

    def __len__(self) -> int:
        return len(self.frame)

    def render(
        self,
        positions: npt.NDArray[np.intp] | None = None,
        *,
        wanted: npt.NDArray[np.bool_] | None = None,
        for_key: bool = False,
    ) -> Iterator[Messages | Missing]:
        """Give each row's messages.

        Parameters
        ----------
        positions : array of int, optional
            Which rows, counted from 0, in which order; all of them without it.
        wanted : array of bool, optional
            By row of the frame; one that is not wanted is missing, and no error, where it cannot be rendered.
        for_key : bool
            As the key has them: a picture by its digest.

        Yields
        ------
        list of dict or Missing
            The messages as they would be sent, or why there are none.

        Raises
        ------
        TemplateError
            A value that the template or the message array cannot take, naming the row.
        """
        if positions is None:
            positions = np.arange(len(self.frame))
        for start in range(0, len(positions), CHUNK):
            chunk = positions[start : start + CHUNK]
            for position, row in zip(chunk.tolist(), self._rows(chunk), strict=True):
                try:
                    yield self._messages(position, row, for_key)
                except TemplateError as error:
                    if wanted is not None and not wanted[position]:
                        yield Missing(str(error))
                        continue
                    (label,) = self.frame.index[[position]].tolist()
                    raise TemplateError(f"row {position} (label {label!r}): {error}") from error.__cause__

    def _rows(self, chunk: npt.NDArray[np.intp]) -> Iterator[Values]:
        if not self._reads:
            yield from ({} for _ in chunk)
            return
        columns = [values(self.frame[column].iloc[chunk], pictures=column in self._images) for column in self._reads]
        for row in zip(*columns, strict=True):
            yield dict(zip(self._reads, row, strict=True))

    def _own(self, position: int, row: Values) -> Messages | None:
        if not self._maker.foreign:
            return self._maker.make(row)
        # The key is made of the first call's answer, so what is sent has to be that answer too.
        if position not in self._made:
            self._made[position] = self._maker.make(row)
        return self._made[position]

    def _messages(self, position: int, row: Values, for_key: bool) -> Messages | Missing:
        for column in self._needs:
            if row[column] is None:
                return self._missing(f"missing value in column {column!r}")
        own = self._own(position, row)
        if own is None:
            if self._na != "keep":
                return self._missing("the prompt function returned no prompt")
            own = user("")
        if self._images:
            try:
                found = self._attachments(position, row)
                own = attach(own, [one.named() if for_key else one.part() for one in found])
            except CannotRead as error:
                return Unreadable(str(error))
        earlier = self._goes_on(row)
        if earlier:
            if self._system is not None and earlier[0]["role"] in ("system", "developer"):
                earlier = earlier[1:]  # this call's takes its place
            own = [*earlier, *own]
        if self._system is not None:
            own = [{"role": "system", "content": well_formed(self._system.render(row))}, *own]
        if not self._examples or earlier:
            return own
        turn = next((n for n, message in enumerate(own) if message["role"] not in ("system", "developer")), len(own))
        return [*own[:turn], *self._examples, *own[turn:]]

    def _attachments(self, position: int, row: Values) -> list[Attachment]:
        """Read what a row's message has beside its text."""
        cells = [(row[column], column) for column in self._images if row[column] is not None]
        found = [one for cell, column in cells for one in attachments_of(cell, column)]
        names = "".join(one.name for one in found if one.from_file)
        # What is sent has to be what the key is of, and a file may be written anew while its row waits.
        if names:
            digest = hashlib.sha256(names.encode()).digest()
            if self._files.setdefault(position, digest) != digest:
                raise CannotRead("a file of this row has changed since the run began; make the same call again")
        return found

    def _goes_on(self, row: Values) -> Messages:
        """Give the conversation that a row goes on from."""
        if self._history is None or row[self._history] is None:
            return []
        value = row[self._history]
        if isinstance(value, list | tuple | np.ndarray) and len(value) == 0:
            return []
        return check_messages(value, f"the conversation in column {self._history!r}")

    def _missing(self, reason: str) -> Missing:
        if self._na == "raise":
            raise TemplateError(f"{reason}; fill it, or pass na='skip' or na='keep'")
        return Missing(reason)

    def _read_prompt(self, prompt: Any) -> _Maker:
        """Tell the kinds of prompt apart."""
        if self._is_column(prompt):
            return _from_column(prompt)
        if isinstance(prompt, str):
            return self._from_column_or_template(prompt)
        if isinstance(prompt, list | tuple):
            return self._from_messages(prompt)
        if isinstance(prompt, Renderer):
            return self._from_renderer(prompt)
        if callable(prompt):
            return self._from_function(prompt)
        if isinstance(prompt, pd.Series):
            raise TemplateError(
                "the prompt is a Series; write a template of column names, as in 'Translate: {text}', "
                "or make the Series a column and pass its name"
            )
        raise TemplateError(
            f"the prompt is {kind(prompt)}; it has to be a column's name, a template, a list of messages or a function"
        )

    def _is_column(self, prompt: Any) -> bool:
        try:
            return prompt in self._labels and prompt in self.frame.columns  # which know False from 0
        except TypeError:  # a list of messages does not hash
            return False

    def _shown(self, prompt: Any) -> Any:
        """Give what a checkpoint's own record says of a prompt: its template or name, never a row's data."""
        if self._is_column(prompt) or isinstance(prompt, str | list | tuple):
            return prompt
        return getattr(prompt, "__qualname__", type(prompt).__name__)

    @property
    def _differs(self) -> bool:
        """Whether rows differ in more than their own turn."""
        return self._history is not None or bool(self._images) or bool(self._system and self._system.columns)

    def _from_column_or_template(self, text: str) -> _Maker:
        template = read_template(text, self._names)
        if not template.columns and not self._differs:
            if len(text) <= 60 and "\n" not in text:
                raise TemplateError(
                    f"{TemplateError.unknown_column(text, self._names)} "
                    "(for text that holds a column, write a template, as in 'Translate: {text}')"
                )
            raise TemplateError(
                f"the prompt {text!r:.60} has no {{column}} field, so every row would send the same; put one in"
            )
        return _Maker(lambda row: user(template.render(row)), template.columns, template.columns)

    def _from_messages(self, prompt: Sequence[Any]) -> _Maker:
        if prompt and all(isinstance(each, str) and each in self._names for each in prompt):
            template = " ".join(f"{{{each}}}" for each in prompt)
            raise TemplateError(f"the prompt is a list of columns; write a template, as in {template!r}")
        compiled = [
            {key: _compile(item, self._names) if key in RENDERED else item for key, item in message.items()}
            for message in check_messages(prompt, "prompt")
        ]
        columns = tuple(dict.fromkeys(_columns(compiled)))
        if not columns and not self._differs:
            raise TemplateError(
                "no message of the prompt has a {column} field, so every row would send the same; "
                "for message arrays without a frame there is llmframe.complete([...])"
            )

        def make(row: Values) -> Messages:
            messages: Messages = _fill(compiled, row)
            for number, message in enumerate(messages):
                if not message["role"]:
                    raise TemplateError(f"prompt[{number}]: its role {prompt[number]['role']!r} is empty for this row")
            return messages

        return _Maker(make, columns, columns)

    def _from_renderer(self, renderer: Renderer) -> _Maker:
        def make(row: Values) -> Messages:
            known = {name: row[label] for name, label in self._names.items()}
            unknown = None if self._made else unknown_name(renderer, known)
            if unknown is not None:
                raise unknown
            try:
                text = renderer.render(**known)
            except Exception as error:
                raise TemplateError(f"the prompt's render() raised {type(error).__name__}: {error}") from error
            if not isinstance(text, str):
                raise TemplateError(f"the prompt's render() returned a value that is {kind(text)}; it has to be text")
            refuse_address(text, row)
            return user(text)

        # What a foreign template needs cannot be known: it sees a missing value as None.
        return _Maker(make, tuple(self.frame.columns), (), foreign=True)

    def _from_function(self, function: Callable[[Row], Any]) -> _Maker:
        def make(row: Values) -> Messages | None:
            try:
                value = function(Row(row))
            except Exception as error:
                raise TemplateError(f"the prompt function raised {type(error).__name__}: {error}") from error
            if inspect.iscoroutine(value):
                value.close()  # else Python warns that nobody waited for it
                raise TemplateError("the prompt function is async; pass a plain one, which returns text or messages")
            if pd.api.types.is_scalar(value) and pd.isna(value):
                return None
            if not isinstance(value, str | list | tuple | np.ndarray):
                raise TemplateError(
                    f"the prompt function returned a value that is {kind(value)}; it has to return text or messages"
                )
            messages = user(value) if isinstance(value, str) else check_messages(value, "what the function returned")
            for message in messages:
                if isinstance(message.get("content"), str):
                    refuse_address(message["content"], row)
            return messages

        return _Maker(make, tuple(self.frame.columns), (), foreign=True)


def _names(frame: pd.DataFrame) -> dict[str, Hashable]:
    """Each column's label by its name as a template writes it; text wins over a number that reads the same."""
    names: dict[str, Hashable] = {str(column): column for column in frame.columns}
    names.update({column: column for column in frame.columns if isinstance(column, str)})
    return names


def _from_column(column: Hashable) -> _Maker:
    def make(row: Values) -> Messages:
        value = row[column]
        if value is None:
            return user("")
        if isinstance(value, pd.Series):
            value = value.tolist()
        if isinstance(value, list | tuple | np.ndarray | Mapping):
            return check_messages(value, f"the message array in column {column!r}")
        return user(value if isinstance(value, str) else written(value, column))

    return _Maker(make, (column,), (column,))


def _compile(content: Any, names: Mapping[str, Hashable]) -> Any:
    """Replace each text of a message's content by its template."""
    if isinstance(content, str):
        return read_template(content, names)
    if isinstance(content, list):
        return [_compile(part, names) for part in content]
    if isinstance(content, dict):
        return {key: item if key == "type" else _compile(item, names) for key, item in content.items()}
    return content


def _fill(compiled: Any, row: Values) -> Any:
    """Undo `_compile` for one row."""
    if isinstance(compiled, Template):
        return well_formed(compiled.render(row))
    if isinstance(compiled, list):
        return [_fill(part, row) for part in compiled]
    if isinstance(compiled, dict):
        return {key: _fill(item, row) for key, item in compiled.items()}
    return compiled


def _columns(compiled: Any) -> Iterator[Hashable]:
    if isinstance(compiled, Template):
        yield from compiled.columns
    elif isinstance(compiled, list | dict):
        for part in compiled.values() if isinstance(compiled, dict) else compiled:
            yield from _columns(part)


def _read_images(images: Any, names: Mapping[str, Hashable]) -> tuple[Hashable, ...]:
    if images is None:
        return ()
    given = list(images) if isinstance(images, list | tuple) else [images]
    for name in given:
        if not isinstance(name, str):
            raise TemplateError(f"images= is {kind(images)}; it has to be a column's name, or a list of them")
        if name not in names:
            raise TemplateError(f"images=: {TemplateError.unknown_column(name, names)}")
    return tuple(dict.fromkeys(names[name] for name in given))


def _read_system(system: Any, names: Mapping[str, Hashable]) -> Template:
    if not isinstance(system, str):
        raise TemplateError(f"system= is {kind(system)}; it has to be text, with or without {{column}} fields")
    if system in names:
        raise TemplateError(f"system={system!r} is a column's name, and system= is a template: write '{{{system}}}'")
    return read_template(system, names)


def _read_examples(examples: Iterable[Any] | None) -> Messages:
    messages: Messages = []
    if isinstance(examples, Iterator):
        raise TemplateError(
            f"examples= is {kind(examples)}, which the first call would use up; write list(...) around it"
        )
    try:
        pairs = [] if examples is None else list(examples)
    except TypeError as error:  # no iterable, or an array without a dimension
        raise TemplateError(
            f"examples= is {kind(examples)}; it has to be a list of pairs (user text, assistant text)"
        ) from error
    for number, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TemplateError(f"examples[{number}] is {kind(pair)}; it has to be a pair (user text, assistant text)")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            if not isinstance(text, str):
                raise TemplateError(f"examples[{number}]: its {role} side is {kind(text)}; it has to be text")
            messages.append({"role": role, "content": well_formed(text)})
    return messages
