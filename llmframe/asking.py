"""Asking: how a schema is put to the endpoint, and what is sent where that is refused or the answer does not fit.

The key knows nothing of it: it is the request that the user meant, before any repair and before any fallback.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from llmframe.failures import UNSUPPORTED, Failure
from llmframe.messages import Messages, user, well_formed
from llmframe.replies import read_choices, read_output
from llmframe.requests import Form, Requests
from llmframe.results import Completion
from llmframe.schemas import Schema

REPAIRS = 2  # times an answer that does not fit is asked again; a model that failed thrice fails the fourth time too
NEXT: dict[Form, Form] = {"json_schema": "json_object", "json_object": "prompt"}

MISFITS = 8  # answers that the endpoint itself found not to fit, with none that did, before it is asked another way

# What OpenAI's older models, Azure, Gemini, vLLM, Ollama, LM Studio and gateways name when they do not take a schema.
_FORM = re.compile(
    r"response[_ .]?(format|schema)|json[_ ]?(schema|object)|text\.format|structured[_ ]output|guided[_ ]|\bgrammar\b",
    re.I,
)


@dataclass(slots=True)
class Accepted:
    """What is known of an endpoint's way with a schema; the parts of a job share it.

    Attributes
    ----------
    form : Form
        How the schema is put to it.
    taken : bool
        An answer came under this form, so no refusal is about it.
    """

    form: Form = "json_schema"
    taken: bool = False


class Asking:
    """What is sent for each request of a run.

    Parameters
    ----------
    requests : Requests
        Makes the bodies.
    schema : Schema, optional
        What the answers have to fit.
    messages_of : callable
        Gives a request's messages by its number; None where a file that they hold is gone.
    tell : callable
        Is told, once at each step, that the endpoint does not take a form.
    accepted : Accepted, optional
        What the parts of the same job before this one have learned.
    repairs : bool
        Whether an answer that does not fit is asked again: not where a row has several.
    """

    def __init__(
        self,
        requests: Requests,
        schema: Schema | None,
        messages_of: Callable[[int], Messages | None],
        tell: Callable[[str], None],
        accepted: Accepted | None = None,
        *,
        repairs: bool = True,
    ) -> None:
        self._requests = requests
        self._schema = schema
        self._messages_of = messages_of
        self._tell = tell
        self._repairs = REPAIRS if repairs and schema is not None else 0
        self._accepted = accepted or Accepted()
        self._misfits = 0
        self._turns: dict[int, Messages] = {}  # of the requests that are asked again

    @property
    def form(self) -> Form:
        """How the schema is put to the endpoint now."""
        return self._accepted.form

    def body(self, messages: Messages) -> bytes:
        """Give the body of a request, in the form that the endpoint takes as far as is known."""
        return self._requests.body(self._told(messages), self.form)

    def repaired(self, number: int, repairs: int, payload: Any, completion: Completion) -> bytes | None:
        """Give the body that asks again after an answer that does not fit; None to take the answer as it is."""
        self._accepted.taken = True
        if completion.status != "invalid" or repairs >= self._repairs:
            self._turns.pop(number, None)
            return None
        said = (read_output(payload) if self._requests.api == "responses" else read_choices(payload)) or []
        text = said[0].text if said else None
        messages = self._messages_of(number) if text else None
        if not text or messages is None:
            return None
        words = f"{completion.error}. Answer again."
        if self.form == "json_schema":  # else it is in the prompt
            words = f"{words} This is the schema:\n{self._schema_text()}"
        own = {"role": "assistant", "content": well_formed(text)}
        turns = self._turns.setdefault(number, [])
        turns += [own, *user(words)]
        return self.body([*messages, *turns])

    def fallen_back(self, number: int, form: Form, failure: Failure) -> bytes | None:
        """Give the body for an endpoint that refused the form of a request; None where that is not what it refused."""
        if self._schema is None or failure.http not in UNSUPPORTED:
            return None
        if failure.kind == "bad body":  # the form was taken, and the answer did not fit, most likely by chance
            self._misfits += 1
            if self._misfits < MISFITS:
                return None
        elif not _FORM.search(failure.message):
            return None
        messages = self._messages_of(number)
        if messages is None:
            return None
        if form == self.form:
            step = NEXT.get(form)
            if step is None or self._accepted.taken:
                return None
            self._accepted.form, self._misfits = step, 0
            way = "json_object with the schema in the prompt" if step == "json_object" else "the schema in the prompt"
            self._tell(f"the endpoint does not take {form} ({failure.message:.160}); going on with {way}")
        return self.body(messages)

    def divided(self, number: int, failure: Failure | None) -> Sequence[tuple[int, bytes]]:  # noqa: ARG002
        """Give nothing: a request is of one row."""
        return ()

    def _told(self, messages: Messages) -> Messages:
        """Put the schema into the last user turn, where it is not enforced: some models refuse a system turn."""
        if self._schema is None or self.form == "json_schema":
            return messages
        words = f"Answer with nothing but one JSON object that fits this JSON schema:\n{self._schema_text()}"
        place = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=None)
        if place is None:
            return [*messages, *user(words)]
        turn = messages[place]
        content = turn["content"]
        if isinstance(content, list):
            told: Any = [*content, {"type": "text", "text": words}]
        else:
            told = f"{content}\n\n{words}"
        return [*messages[:place], {**turn, "content": told}, *messages[place + 1 :]]

    def _schema_text(self) -> str:
        assert self._schema is not None
        return orjson.dumps(self._schema.response_format["json_schema"]["schema"]).decode()
