"""What the simulated server does and says, as values: its knobs, its draws of fate, its answers; no sockets, no clock.

The same behaviour and the same request give the same answer and the same fault, in whatever order requests arrive.
"""

from __future__ import annotations

import binascii
import functools
import hashlib
import math
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson

__all__ = [
    "Behaviour",
    "content_key",
    "count_prompt_tokens",
    "count_tokens",
    "embedding_of",
    "label_of",
]

FAULTS = (
    "500",
    "503",
    "reset",
    "hang",
    "html",
    "slow",
    "truncated_body",
    "bad_json",
    "empty_choices",
    "no_usage",
    "error_in_200",
    "429",
)
"""What can befall a request by chance, each under the knob `p_<name>`."""

BEFORE_WORK = frozenset({"429", "500", "503", "reset", "hang", "html", "status"})
"""Faults of whatever stands before the model: they take neither a slot nor the latency, unless `faults_hold_slots`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """Every knob of the server; all can be combined, and changed while it runs.

    A request passes these gates in order: path, `status_all`, key, shape and model, rate limits, then its fault is
    drawn, then it waits for a slot, then it takes its latency. What stops at a gate takes nothing from those behind.

    Attributes
    ----------
    latency_s : float
        The median time that an answer takes once it has a slot.
    latency_sigma : float
        The spread of it: the sigma of a lognormal distribution (0 is always the median).
    slots : int or None
        Requests worked on at one time; others wait in order of arrival, without limit. None is no limit.
    requests_per_min, request_burst : float or None
        A token bucket in requests: the refill a minute, and the size (None is a full minute). It starts full, and
        a refused request takes nothing from it.
    tokens_per_min, token_burst : float or None
        The same in tokens. A request takes its prompt's and its answer's tokens when it is let in.
    rate_headers : {"openai", "azure", "anthropic"} or None
        The headers that tell the state of the buckets: `x-ratelimit-*` with resets like `6m0s`, the same with whole
        seconds, or `anthropic-ratelimit-*` with ISO dates. A reset is the time until the bucket is full.
    retry_after : {"seconds", "ms", "date"} or None
        How a 429 says when to come back: `retry-after` in whole seconds, `retry-after-ms`, or `retry-after` as a date.
    retry_after_s : float or None
        Says this time instead of the true one, and says it with 503 too.
    schedule : list of (float, dict)
        Changes of knobs, each at its second after the first request since this behaviour was set. Buckets keep
        their level and what is at work goes on; but a `status_all` of 500 or more ends all that waits or is at work.
    seed : int
        Of every draw, which also depends on the request's content and on how often that content was let in before.
    p_500, p_503, p_reset, p_hang, p_html, p_truncated_body, p_bad_json : float
        The probability of an error 500 or 503, a TCP reset, no answer ever, a web page with status 200, a body that
        ends too early, a body that is not JSON. A request has one fault at most: the sum is at most 1.
    p_empty_choices, p_no_usage, p_error_in_200, p_429 : float
        The same for an answer without choices, one without usage (it counts as answered), an error with status 200,
        a refusal without a limit behind it.
    p_slow, slow_s : float
        The probability that an answer takes `slow_s` seconds instead of its latency.
    faults_hold_slots : bool
        Errors, resets, hangs and web pages wait for a slot and take the latency too, as if the model itself had failed.
    status_all : int or None
        Everything is answered with this status.
    error_code : str or None
        The `code` of `status_all` and of `p_error_in_200`: `insufficient_quota`, `model_not_found`, ...
    error_headers : dict of str
        Headers sent with every answer that is not 200, `x-should-retry` for one.
    require_key : str or None
        401 for whoever does not send it, as `Authorization: Bearer` (or as `api-key` on Azure's paths).
    valid_models : list of str or None
        404 for every other model. None is any.
    cached_tokens, reasoning_tokens : int
        What `usage` says of them; reasoning is added to the completion's tokens.
    refuse_formats : list of str
        400 for a `response_format` (or `text.format`) of these types, in the words of an older model of OpenAI's.
    reasoning : str or None
        What the model thought, told as `reasoning_by` says.
    reasoning_by : {"reasoning_content", "reasoning", "think"}
        In which field, or in tags before the text.
    vocabulary : str or None
        Counts tokens by this vocabulary (`o200k_base`, `cl100k_base`) and OpenAI's chat format; None is by length.
    most_inputs, most_input_tokens : int
        Of one request for embeddings: 400 for more.
    shuffle : bool
        Embeddings come in another order than their texts; their index tells.
    log : bool
        Keep the newest requests for `requests()`; a benchmark can do without.
    """

    latency_s: float = 0.0
    latency_sigma: float = 0.0
    slots: int | None = None
    requests_per_min: float | None = None
    request_burst: float | None = None
    tokens_per_min: float | None = None
    token_burst: float | None = None
    rate_headers: Literal["openai", "azure", "anthropic"] | None = None
    retry_after: Literal["seconds", "ms", "date"] | None = None
    retry_after_s: float | None = None
    schedule: Sequence[tuple[float, Mapping[str, Any]]] = ()
    seed: int = 0
    p_500: float = 0.0
    p_503: float = 0.0
    p_reset: float = 0.0
    p_hang: float = 0.0
    p_html: float = 0.0
    p_slow: float = 0.0
    slow_s: float = 2.0
    p_truncated_body: float = 0.0
    p_bad_json: float = 0.0
    p_empty_choices: float = 0.0
    p_no_usage: float = 0.0
    p_error_in_200: float = 0.0
    p_429: float = 0.0
    faults_hold_slots: bool = False
    status_all: int | None = None
    error_code: str | None = None
    error_headers: Mapping[str, str] = field(default_factory=dict)
    require_key: str | None = None
    valid_models: Sequence[str] | None = None
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    refuse_formats: Sequence[str] = ()
    reasoning: str | None = None
    reasoning_by: Literal["reasoning_content", "reasoning", "think"] = "reasoning_content"
    vocabulary: str | None = None
    most_inputs: int = 2048
    most_input_tokens: int = 300_000
    shuffle: bool = False
    log: bool = True

    def __post_init__(self) -> None:
        known = {knob.name for knob in fields(self)}
        for at_s, changes in self.schedule:
            if unknown := set(changes) - known:
                raise ValueError(f"the schedule at {at_s} s changes {sorted(unknown)}; the knobs are {sorted(known)}")
        if self.rate_headers not in {None, "openai", "azure", "anthropic"}:
            raise ValueError(f"rate_headers is {self.rate_headers!r}; use openai, azure, anthropic or None")
        if self.retry_after not in {None, "seconds", "ms", "date"}:
            raise ValueError(f"retry_after is {self.retry_after!r}; use seconds, ms, date or None")
        if self.slots is not None and self.slots < 1:
            raise ValueError(f"slots is {self.slots}; use 1 or more, or None for no limit")
        if (total := sum(getattr(self, f"p_{fault}") for fault in FAULTS)) > 1.0 + 1e-9:  # tenths do not add up exactly
            raise ValueError(f"the faults' probabilities add up to {total}; they must not pass 1")

    @classmethod
    def from_json(cls, text: str | bytes) -> Behaviour:
        """Read a behaviour; knobs that are not named have their defaults."""
        return cls(**orjson.loads(text or b"{}"))

    def to_json(self) -> bytes:
        """Write every knob."""
        return orjson.dumps(asdict(self))

    def fault_thresholds(self) -> list[tuple[float, str]]:
        """List the faults that can happen, with the cumulative probability up to each."""
        thresholds, total = [], 0.0
        for fault in FAULTS:
            if (probability := getattr(self, f"p_{fault}")) > 0:
                total += probability
                thresholds.append((total, fault))
        return thresholds


# ---- what befalls a request


DIRECTIVE = re.compile(r"\[\[(\w+)(?:=(.*?))?\]\]", re.DOTALL)
NO_DIRECTIVES: Mapping[str, str] = {}


def directives_in(text: str) -> Mapping[str, str]:
    """Read the wishes in a user's message, which steer the answer to it alone.

    ``[[status=400]]``, ``[[status=400:content_filter]]``: an error, with that code.
    ``[[fail_first=2]]``, ``[[hang_first=1]]``: 500, or no answer, the first times that this content comes.
    ``[[sleep=3]]``: that many seconds more.
    ``[[say=some text]]``, ``[[content=]]``, ``[[content=null]]``: that text, whatever the schema.
    ``[[label=bad]]``: that label for every enum of the schema, fitting or not.
    ``[[unfit_first=2]]``: JSON that fits no schema, until so many answers of the assistant stand in the conversation.
    ``[[finish=length]]``, ``[[finish=content_filter]]``: that finish_reason; length gives half of the text.
    ``[[refusal=I cannot]]``, ``[[tool_calls]]``: that instead of a text.
    ``[[null]]``: a vector of nulls, in a request for embeddings (a wish in any of its texts is one of the request).
    ``[[dimensions=6]]``: vectors of that length, in the same.
    ``[[surrogate]]``: a lone surrogate in the text.
    ``[[echo_headers]]``: the text, or the error's message, is the JSON of the headers received.
    """
    return dict(DIRECTIVE.findall(text)) if "[[" in text else NO_DIRECTIVES


class Fate(NamedTuple):
    """What will happen to one request that was let in."""

    fault: str | None
    latency_s: float


STANDARD_NORMAL = NormalDist()
UNIT = 2.0**-64  # makes 8 bytes a number in [0, 1)


def fate_of(
    behaviour: Behaviour,
    thresholds: Sequence[tuple[float, str]],
    key: bytes,
    occurrence: int,
    directives: Mapping[str, str],
) -> Fate:
    """Draw the fault and the latency of a content's n-th request (from 0)."""
    fault, latency_s = None, behaviour.latency_s
    if thresholds or behaviour.latency_sigma:
        draw = hashlib.blake2b(key + b"%d/%d" % (behaviour.seed, occurrence), digest_size=16).digest()
        chance = int.from_bytes(draw[:8]) * UNIT
        fault = next((name for limit, name in thresholds if chance < limit), None)
        if behaviour.latency_sigma:
            spread = STANDARD_NORMAL.inv_cdf(max(int.from_bytes(draw[8:]) * UNIT, UNIT))
            latency_s *= math.exp(behaviour.latency_sigma * spread)
    if fault == "slow":
        latency_s = behaviour.slow_s
    if directives:
        if "status" in directives:
            fault = "status"
        elif occurrence < int(directives.get("fail_first", 0)):
            fault = "500"
        elif occurrence < int(directives.get("hang_first", 0)):
            fault = "hang"
    if fault in BEFORE_WORK and not behaviour.faults_hold_slots:
        latency_s = 0.0
    return Fate(fault, latency_s + float(directives.get("sleep", 0)))


def content_key(body: Mapping[str, Any]) -> str:
    """Name a request by its content: the SHA-256 of its canonical JSON."""
    return hashlib.sha256(canonical(body)).hexdigest()


def canonical(body: Mapping[str, Any]) -> bytes:
    """Write a body with its keys in order and no white space."""
    return orjson.dumps(body, option=orjson.OPT_SORT_KEYS)


# ---- what it says


def count_tokens(text: str) -> int:
    """Count a text's tokens by the rule of this server: one for four characters, at least one."""
    return max(1, len(text) // 4)


def count_prompt_tokens(messages: Sequence[Mapping[str, Any]]) -> int:
    """Count a prompt's tokens: those of each message's text, and three more a message."""
    return sum(count_tokens(text_of(message.get("content"))) + 3 for message in messages)


def count_chat_tokens(messages: Sequence[Mapping[str, Any]], vocabulary: str) -> int:
    """Count a prompt's tokens as OpenAI's API does: its cookbook, "How to count tokens with tiktoken"."""
    encoding = encoding_of(vocabulary)
    num_tokens = 3  # every reply is primed with <|start|>assistant<|message|>
    for message in messages:
        num_tokens += 3
        num_tokens += len(encoding.encode_ordinary(message["role"]))
        num_tokens += len(encoding.encode_ordinary(text_of(message.get("content"))))
        if "name" in message:
            num_tokens += len(encoding.encode_ordinary(message["name"])) + 1
    return num_tokens


@functools.cache
def encoding_of(vocabulary: str) -> Any:
    """Load a vocabulary, from the package that has it on disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import bpe_openai

        return bpe_openai.get_encoding(vocabulary)


def text_of(content: object) -> str:
    """Read a message's text: a string, or the text parts of a list."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if part.get("type") in ("text", "input_text"))
    return ""


def last_user_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """Find the text that is answered: the last user message's."""
    said = [text_of(message.get("content")) for message in messages if message.get("role") == "user"]
    steering = [text for text in said if "[[" in text]  # also in a conversation that goes on after it
    return (steering or said or [""])[-1]


def label_of(text: str, labels: Sequence[Any], choice: int = 0) -> Any:
    """Choose the label that this server gives to a user's text (`choice` counts the answers of `n=`)."""
    return labels[(zlib.crc32(text.encode()) + choice) % len(labels)]


MAX_NESTING = 6  # of a schema that refers to itself
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def instance_of(schema: Mapping[str, Any], text: str, choice: int, wanted: str | None) -> Any:
    """Make a small value that fits a JSON schema: strings echo the text, enums are its label (or the wanted one)."""
    root = schema

    def build(schema: Any, depth: int) -> Any:
        if not isinstance(schema, Mapping):
            return {}
        if "$ref" in schema:
            target: Any = root
            for step in schema["$ref"].removeprefix("#").strip("/").split("/"):
                target = target[step] if step else target
            return build(target, depth + 1)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return label_of(text, schema["enum"], choice) if wanted is None else wanted
        for combined in ("anyOf", "oneOf", "allOf"):
            if combined in schema:
                branches = schema[combined]
                null = {"type": "null"}
                return build(null if depth > MAX_NESTING and null in branches else branches[0], depth + 1)
        kind = schema.get("type", "object")
        if isinstance(kind, list):
            kind = kind[0]
        match kind:
            case "object":
                return {name: build(each, depth + 1) for name, each in schema.get("properties", {}).items()}
            case "array":
                least = 1 if depth <= MAX_NESTING else 0
                count = min(max(least, schema.get("minItems", 0)), schema.get("maxItems", math.inf))
                return [build(schema.get("items", {}), depth + 1) for _ in range(int(count))]
            case "string":
                return ("echo: " + text).ljust(schema.get("minLength", 0), ".")[: schema.get("maxLength")]
            case "integer" | "number":
                lowest = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
                highest = schema.get("maximum", schema.get("exclusiveMaximum", math.inf) - 1)
                return max(lowest, min(1, highest))
            case "boolean":
                return True
            case _:
                return None

    return build(schema, 0)


class Answer(NamedTuple):
    """A whole answer and its price."""

    body: dict[str, Any]
    prompt_tokens: int
    completion_tokens: int


def chat_answer(request: Mapping[str, Any], behaviour: Behaviour, directives: Mapping[str, str], text: str) -> Answer:
    """Answer a chat completion; `id` and `created` are the caller's to fill in."""
    choices, completion_tokens = [], behaviour.reasoning_tokens
    most_tokens = request.get("max_completion_tokens") or request.get("max_tokens")
    for index in range(request.get("n") or 1):
        content: str | None = content_of(request, directives, text, index)
        finish, refusal, calls = directives.get("finish", "stop"), directives.get("refusal"), None
        if content is None or refusal is not None:
            content = None
        elif finish == "length":
            content = content[: len(content) // 2]
        elif most_tokens and count_tokens(content) > most_tokens:
            content, finish = content[: 4 * most_tokens], "length"
        if "tool_calls" in directives:
            calls = [{"id": "call_0", "type": "function", "function": {"name": "look_up", "arguments": "{}"}}]
            content, finish = None, "tool_calls"
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": refusal, "annotations": []}
        if behaviour.reasoning is not None and behaviour.reasoning_by == "think":
            message["content"] = f"<think>\n{behaviour.reasoning}\n</think>\n\n{content or ''}"
        elif behaviour.reasoning is not None:
            message[behaviour.reasoning_by] = behaviour.reasoning
        if calls:
            message["tool_calls"] = calls
        choices.append({"index": index, "message": message, "logprobs": None, "finish_reason": finish})
        completion_tokens += count_tokens(content or refusal or "")
    vocabulary, messages = behaviour.vocabulary, request["messages"]
    prompt_tokens = count_prompt_tokens(messages) if vocabulary is None else count_chat_tokens(messages, vocabulary)
    body = {
        "id": "",
        "object": "chat.completion",
        "created": 0,
        "model": request["model"],
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": behaviour.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": behaviour.reasoning_tokens, "audio_tokens": 0},
        },
        "service_tier": "default",
        "system_fingerprint": "fp_simulated",
    }
    return Answer(body, prompt_tokens, completion_tokens)


def content_of(request: Mapping[str, Any], directives: Mapping[str, str], text: str, index: int) -> str | None:
    """Write the text of one choice: what was wished for, else what the format asks, else the echo."""
    if directives:
        turns = sum(message.get("role") == "assistant" for message in request["messages"])
        if turns < int(directives.get("unfit_first", 0)):
            return '{"unfit": true}'
        if "say" in directives:
            return directives["say"]
        if "content" in directives:
            return None if directives["content"] == "null" else directives["content"]
        if "surrogate" in directives:
            return "half a pair: \ud800"
    response_format = request.get("response_format") or {}
    match response_format.get("type"):
        case "json_schema":
            schema = response_format["json_schema"]["schema"]
            return orjson.dumps(instance_of(schema, text, index, directives.get("label"))).decode()
        case "json_object":
            return orjson.dumps({"echo": text}).decode()
    return f"echo: {text}" if index == 0 else f"echo: {text} ({index + 1})"


def response_answer(
    request: Mapping[str, Any], behaviour: Behaviour, directives: Mapping[str, str], text: str
) -> Answer:
    """Answer a request of the Responses API: what the chat API would say, in this one's items."""
    given = request["input"]
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
    if request.get("instructions"):
        messages.insert(0, {"role": "system", "content": request["instructions"]})
    chat: dict[str, Any] = {"model": request["model"], "messages": messages}
    if request.get("max_output_tokens"):
        chat["max_tokens"] = request["max_output_tokens"]
    form = (request.get("text") or {}).get("format")
    if form:
        chat["response_format"] = {"type": form["type"], "json_schema": form}
    said = chat_answer(chat, replace(behaviour, reasoning=None), directives, text)
    choice, usage = said.body["choices"][0], said.body["usage"]
    message = choice["message"]
    output: list[dict[str, Any]] = []
    if behaviour.reasoning is not None:
        summary = [{"type": "summary_text", "text": behaviour.reasoning}]
        output.append({"type": "reasoning", "id": "rs_1", "summary": summary})
    if message["refusal"] is not None:
        parts = [{"type": "refusal", "refusal": message["refusal"]}]
    else:
        parts = [{"type": "output_text", "text": message["content"], "annotations": []}]
    for call in message.get("tool_calls", ()):
        function = call["function"]
        output.append({"type": "function_call", "id": "fc_1", "call_id": call["id"], **function})
    if message["refusal"] is not None or message["content"] is not None:
        output.append({"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": parts})
    reasons = {"length": "max_output_tokens", "content_filter": "content_filter"}
    reason = reasons.get(choice["finish_reason"])
    body = {
        "id": "",
        "object": "response",
        "status": "incomplete" if reason else "completed",
        "incomplete_details": {"reason": reason} if reason else None,
        "error": None,
        "model": request["model"],
        "output": output,
        "usage": {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": behaviour.cached_tokens},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": behaviour.reasoning_tokens},
            "total_tokens": usage["total_tokens"],
        },
    }
    return Answer(body, said.prompt_tokens, said.completion_tokens)


def response_complaint(request: Mapping[str, Any]) -> tuple[str, str] | None:
    """Say what is wrong with a request of the Responses API; None where nothing is."""
    given = request.get("input")
    if "messages" in request:
        return (
            "Unsupported parameter: 'messages'. In the Responses API, this parameter has moved to 'input'.",
            "messages",
        )
    if not given or not isinstance(given, str | list):
        return "Missing required parameter: 'input'.", "input"
    for number, one in enumerate([] if isinstance(given, str) else given):
        where = f"input[{number}]"
        if not isinstance(one, dict) or not ("role" in one or "type" in one):
            return f"Invalid value for '{where}': expected an input item.", where
        if isinstance(one.get("content"), list):
            known = {"input_text", "input_image", "input_file", "output_text", "refusal"}
            for part in one["content"]:
                if part.get("type") not in known:
                    return f"Invalid value: '{part.get('type')}'. Supported values are: {sorted(known)}.", where
    return None


def format_complaint(request: Mapping[str, Any], behaviour: Behaviour) -> tuple[str, str] | None:
    """Say that a format is refused; None where it is not."""
    asked, param = request.get("response_format"), "response_format"
    if asked is None:
        asked, param = (request.get("text") or {}).get("format"), "text.format"
    if asked is None or asked.get("type") not in behaviour.refuse_formats:
        return None
    return f"Invalid parameter: '{param}' of type '{asked['type']}' is not supported with this model.", param


def embedding_of(text: str, dimensions: int = 8) -> list[float]:
    """Give the vector of a text: numbers in [-1, 1] that depend on nothing else."""
    return vector_of(text, dimensions).tolist()


def vector_of(text: str, dimensions: int) -> npt.NDArray[np.float32]:
    raw = hashlib.shake_128(text.encode("utf-8", "replace")).digest(dimensions)
    return np.frombuffer(raw, np.uint8).astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)


def embedding_answer(
    request: Mapping[str, Any], behaviour: Behaviour, directives: Mapping[str, str], text: str
) -> Answer:
    """Answer an embedding request: one vector an input, as base64 where that is asked for."""
    texts = [request["input"]] if isinstance(request["input"], str) else request["input"]
    dimensions = request.get("dimensions") or int(directives.get("dimensions", 8))
    arrays = [vector_of(text, dimensions) for text in texts]
    vectors: list[Any]
    if request.get("encoding_format") == "base64":
        vectors = [binascii.b2a_base64(vector.tobytes(), newline=False).decode() for vector in arrays]
    else:
        vectors = [vector.tolist() for vector in arrays]
    if "null" in directives:
        vectors[texts.index(text)] = [None] * 8
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    if behaviour.shuffle:
        data.reverse()
    tokens = sum(map(count_tokens, texts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return Answer({"object": "list", "data": data, "model": request["model"], "usage": usage}, tokens, 0)


def chat_complaint(request: Mapping[str, Any]) -> tuple[str, str] | None:
    """Say what is wrong with a chat request and where, as the real API does; None where nothing is."""
    messages = request.get("messages")
    if not isinstance(messages, list):
        return "Missing required parameter: 'messages'.", "messages"
    if not messages:
        return "Invalid 'messages': empty array. Expected an array with minimum length 1.", "messages"
    if request.get("stream"):
        return "This server does not stream.", "stream"
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            kind = "an array" if isinstance(message, list) else "something else"
            return f"Invalid type for '{where}': expected an object, but got {kind} instead.", where
        role, content = message.get("role"), message.get("content")
        if role is None:
            return f"Missing required parameter: '{where}.role'.", f"{where}.role"
        if role not in ROLES:
            return f"Invalid value: {role!r}. Supported values are: {', '.join(map(repr, ROLES))}.", f"{where}.role"
        if isinstance(content, list):
            if not all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in content):
                return f"Invalid value for '{where}.content': expected parts with a type.", f"{where}.content"
        elif not isinstance(content, str) and not (content is None and role == "assistant"):
            got = "null" if content is None else type(content).__name__
            return f"Invalid value for 'content': expected a string, got {got}.", f"{where}.content"
    return None


def embedding_complaint(request: Mapping[str, Any], behaviour: Behaviour) -> tuple[str, str] | None:
    """Say what is wrong with an embedding request, as the real API does; None where nothing is."""
    given = request.get("input")
    if not given or not isinstance(given, str | list):
        return "Invalid 'input': expected a string or an array of strings, not empty.", "input"
    if not all(given) or not all(isinstance(text, str) for text in given):
        return "'$.input' is invalid. Please check the API reference: https://platform.openai.com/docs.", "input"
    texts = [given] if isinstance(given, str) else given
    if len(texts) > behaviour.most_inputs:
        return f"'$.input' is invalid: {len(texts)} inputs, at most {behaviour.most_inputs}.", "input"
    sizes = list(map(count_tokens, texts))
    if max(sizes) > MOST_TOKENS_A_TEXT:
        return f"This model's maximum context length is {MOST_TOKENS_A_TEXT} tokens; {max(sizes)} requested.", "input"
    if sum(sizes) > behaviour.most_input_tokens:
        words = f"Requested {sum(sizes)} tokens, max {behaviour.most_input_tokens} tokens per request"
        return words, "input"
    if "base64" in behaviour.refuse_formats and request.get("encoding_format") == "base64":
        return "Invalid value for 'encoding_format': 'base64' is not supported.", "encoding_format"
    return None


MOST_TOKENS_A_TEXT = 8192


ERRORS = {
    "insufficient_quota": (
        "insufficient_quota",
        "You exceeded your current quota, please check your plan and billing.",
    ),
    "invalid_api_key": ("invalid_request_error", "Incorrect API key provided."),
    "model_not_found": ("invalid_request_error", "The model does not exist or you do not have access to it."),
    "context_length_exceeded": ("invalid_request_error", "This model's maximum context length is 8192 tokens."),
    "content_filter": ("invalid_request_error", "The response was filtered by the content management policy."),
    "rate_limit_exceeded": ("requests", "Rate limit reached."),
}
USUAL_CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


def error_body(status: int, code: str | None = None, message: str | None = None, param: str | None = None) -> bytes:
    """Write an error in OpenAI's shape."""
    kind, usual = ERRORS.get(code or "", ("server_error" if status >= 500 else "invalid_request_error", None))
    text = message or usual or f"The simulated server was told to answer {status}."
    return orjson.dumps({"error": {"message": text, "type": kind, "param": param, "code": code}})


def go_duration(seconds: float) -> str:
    """Write a time as OpenAI's reset headers do: `120ms`, `1.2s`, `6m0s`."""
    ms = math.ceil(seconds * 1000 - 1e-6)
    if 0 < ms < 1000:
        return f"{ms}ms"
    minutes, rest = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{rest / 1000:g}s"
