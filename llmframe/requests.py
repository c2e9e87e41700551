"""One request: its body, as bytes to send, and its key, under which its answer is kept.

The key is the SHA-256 of the request that the user meant. No upgrade of llmframe or of a library may change
it, since a key that changes bills everybody twice: `tests/test_requests.py` pins golden keys.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import orjson

from llmframe.errors import ConfigurationError
from llmframe.messages import Messages, plain_json
from llmframe.responses import as_input, text_format

CANONICAL_VERSION = 1
KEY_BYTES = 32
OURS = frozenset({"model", "messages", "stream", "input"})

Api = Literal["chat", "responses", "embeddings"]
Form = Literal["json_schema", "json_object", "prompt", "base64", "float"]
"""How a schema is put to the endpoint: enforced, as some JSON, or in words alone. And how vectors come back."""
Words = npt.NDArray[np.uint64]
"""The first 8 bytes of each key: enough to tell any number of requests apart that are asked at one time."""

PATHS: Mapping[Api, str] = {
    "chat": "/chat/completions",
    "responses": "/responses",
    "embeddings": "/embeddings",
}
"""Each API of an endpoint, by its path under the base URL."""

_write = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode

_PICTURE = re.compile(rb'(?<="url":)"data:image/[^"]*"|(?<="image_url":)"data:image/[^"]*"')  # no text has a bare quote

DEFAULT_PORTS = {"http": 80, "https": 443}


class Requests:
    """Makes the requests of one run, which differ in their messages alone.

    Parameters
    ----------
    endpoint : str
        The endpoint's identity, from `identity`: it is in the key, and not in the body.
    model : str
        The model's name.
    params : mapping
        Parameters of the API, as the user passed them.
    schema : mapping, optional
        What the answers have to fit, in its canonical form: it is in the key.
    response_format : mapping, optional
        The same as the API takes it: it is in the body.
    api : {"chat", "responses", "embeddings"}
        Which of the endpoint's APIs is asked: it is in the key.

    Examples
    --------
    >>> requests = Requests("https://api.openai.com/v1", "gpt-4o-mini", {"temperature": 0})
    >>> requests.body([{"role": "user", "content": "Hello"}])
    b'{"model":"gpt-4o-mini","messages":[{"role":"user","content":"Hello"}],"temperature":0}'
    >>> requests.key([{"role": "user", "content": "Hello"}]).hex()[:16]
    'c0ae29bec26d07e7'
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        params: Mapping[str, Any],
        schema: Mapping[str, Any] | None = None,
        response_format: Mapping[str, Any] | None = None,
        api: Api = "chat",
    ) -> None:
        for name in params.keys() & OURS:
            raise ConfigurationError(f"extra_body= has {name!r}, which is made here for each row; leave it out")
        plain = {name: plain_json(value, name, ConfigurationError) for name, value in params.items()}
        asked = _integral(plain)
        meant_schema = _integral(schema)  # pydantic 2.10 says 1.0 where 2.14 says 1
        self.parameters = canonical({**asked, **(meant_schema or {})}).decode()
        self.api = api
        self._instructed = "instructions" in plain  # the user's own: a system message is then one of the input
        words = b',"messages":' if api == "chat" else b',"input":'
        self._head = b'{"model":' + orjson.dumps(model) + words
        self._tails: dict[Form, bytes] = {"prompt": _tail(plain, None, api)}
        self._tails["json_object"] = _tail(plain, {"type": "json_object"}, api)
        self._tails["json_schema"] = _tail(plain, response_format, api)
        if api == "embeddings":
            self._tails = {"base64": _tail({**plain, "encoding_format": "base64"}, None, api)}
            self._tails["float"] = _tail(plain, None, api)  # the API's own default
        meant = {
            "version": CANONICAL_VERSION,
            "endpoint": endpoint,
            "api": api,
            "model": model,
            "params": asked,
            "schema": meant_schema,
        }
        self._meant = hashlib.sha256(canonical(meant) + b"\n")

    def body(self, messages: Messages, form: Form = "json_schema") -> bytes:
        """Give the request for one row's messages as it is sent, in JSON."""
        if self.api != "responses":
            return self._head + orjson.dumps(messages) + self._tails[form]
        instructions, items = as_input(messages, keep=self._instructed)
        said = b"" if instructions is None else b',"instructions":' + orjson.dumps(instructions)
        return self._head + orjson.dumps(items) + said + self._tails[form]

    def embedding_body(self, texts: Sequence[str], form: Form = "base64") -> bytes:
        """Give the request for the embeddings of some texts as it is sent, in JSON."""
        return self._head + orjson.dumps(texts) + self._tails[form]

    def key(self, messages: Messages, occurrence: int = 0) -> bytes:
        """Give the 32 bytes under which the answer is kept.

        Parameters
        ----------
        messages : list of dict
            The row's messages; of an embedding, whose requests are many texts each, the one turn that holds its text.
        occurrence : int
            How many rows before it send the same, where each is to have an answer of its own.
        """
        digest = self._meant.copy()
        digest.update(canonical(messages if self.api != "embeddings" else messages[0]["content"]))
        if occurrence:
            digest.update(b"\n#%d" % occurrence)
        return digest.digest()


def _tail(params: Mapping[str, Any], response_format: Mapping[str, Any] | None, api: Api) -> bytes:
    """Write what is the same in every body of a run, after the messages."""
    body = dict(params)
    if response_format is not None and api == "responses":
        text = body.get("text")
        body["text"] = {**(text if isinstance(text, dict) else {}), "format": text_format(response_format)}
    elif response_format is not None:
        body["response_format"] = response_format
    return b"," + orjson.dumps(body)[1:] if body else b"}"


def packed(keys: Iterable[bytes]) -> npt.NDArray[np.void]:
    """Give keys as one array: as objects of their own they would take three times the memory."""
    return np.frombuffer(b"".join(keys), f"V{KEY_BYTES}")


def words_of(keys: npt.NDArray[np.void]) -> Words:
    """Give the first word of each key."""
    return keys.view(np.uint64).reshape(-1, KEY_BYTES // 8)[:, 0].copy() if len(keys) else np.empty(0, np.uint64)


def among(words: Words, ordered: Words) -> npt.NDArray[np.bool_]:
    """Say which of the words are among others, which are sorted."""
    if not len(ordered):
        return np.zeros(len(words), np.bool_)
    at = np.minimum(np.searchsorted(ordered, words), len(ordered) - 1)
    found: npt.NDArray[np.bool_] = ordered[at] == words
    return found


def text_bytes(body: bytes) -> int:
    """Give the bytes of a body that a model reads as text: all but the pictures that are written out in it."""
    if b'":"data:image/' not in body:
        return len(body)
    return len(body) - sum(found.end() - found.start() for found in _PICTURE.finditer(body))


def canonical(value: Any) -> bytes:
    """Give a JSON value as its canonical bytes: sorted keys, no white space, UTF-8.

    By the standard library, whose way to write a number is fixed; faster ones write 1e-07 as they please.
    """
    return _write(value).encode()


def identity(base_url: str) -> str:
    """Give an endpoint's identity: its base URL, however it was spelled.

    Examples
    --------
    >>> identity("HTTPS://API.OpenAI.com:443/v1/")
    'https://api.openai.com/v1'
    """
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    if ":" in host:
        host = f"[{host}]"
    scheme = parts.scheme.lower()
    if parts.port is not None and parts.port != DEFAULT_PORTS.get(scheme):
        host = f"{host}:{parts.port}"
    return f"{scheme}://{host}{parts.path.rstrip('/')}"


def _integral(value: Any) -> Any:
    """Give 0.0 as 0, and so on: the same request, however the number was written."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _integral(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_integral(item) for item in value]
    return value
