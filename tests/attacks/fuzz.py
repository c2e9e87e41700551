"""Whatever text, header, reply or file comes: the readers give a value or the one error they name, and nothing else.

    python -m tests.attacks.fuzz --minutes 10 template headers reply part

Each target runs for so many minutes, one after the other. What fails is shown as small as hypothesis can make it,
with the seed of its round; it becomes a test of its own, and exit is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from llmframe.answers import read_reply
from llmframe.errors import TemplateError
from llmframe.failures import of_reply
from llmframe.limits import RateHeaders, rate_headers, retry_after_s
from llmframe.messages import well_formed
from llmframe.origins import Origin
from llmframe.outcomes import Outcomes
from llmframe.parts import NewerFormat, NotAPart, Part, completions
from llmframe.prices import Prices
from llmframe.replies import read_json
from llmframe.requests import Api
from llmframe.results import PAID, Completion
from llmframe.schemas import read_schema
from llmframe.templates import read_template
from tests.encoding import encode

ROUND = 2_000  # examples of one seed
RULES = settings(max_examples=ROUND, deadline=None, database=None, suppress_health_check=list(HealthCheck))

# ---- the template parser

COLUMNS = ("a", "b", "a.b", "a:b", "a b", "0", "__class__")
TOKENS = st.sampled_from(["{", "}", "{{", "}}", ":", "!r", ".__class__", "[0]", "{a", ":>8}", ":{b}}", "%", *COLUMNS])
TEMPLATES = st.text() | st.lists(TOKENS | st.text(max_size=3), max_size=12).map("".join)
VALUES = st.none() | st.text() | st.integers() | st.floats() | st.binary() | st.dates()


@RULES
@given(TEMPLATES, st.fixed_dictionaries(dict.fromkeys(COLUMNS, VALUES)))
def template(text: str, row: dict[Any, Any]) -> None:
    """A text is a template of these columns, or a `TemplateError`."""
    try:
        made = read_template(text, {name: name for name in COLUMNS})
        assert set(made.columns) <= set(COLUMNS)
        assert isinstance(made.render(row), str)
    except TemplateError:
        pass


# ---- the header parser

HEADERS = st.sampled_from(
    [
        "retry-after",
        "retry-after-ms",
        "x-should-retry",
        *(f"x-ratelimit-{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")),
        *(
            f"anthropic-ratelimit-{unit}-{what}"
            for what in ("limit", "remaining", "reset")
            for unit in ("requests", "tokens", "input-tokens")
        ),
    ]
)
SAID = (
    st.text(max_size=40)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.from_regex(r"-?[0-9.e]{1,12}(ms|s|m|h|d)?", fullmatch=True)
    | st.datetimes().map(lambda at: at.isoformat() + "Z")
    | st.datetimes().map(lambda at: at.strftime("%a, %d %b %Y %H:%M:%S GMT"))
)


@RULES
@given(st.dictionaries(HEADERS, SAID), st.floats(0, 4e9))
def headers(said: dict[str, str], now: float) -> None:
    """Headers give finite numbers of at least 0, or nothing."""
    waited_s, read = retry_after_s(said, now), rate_headers(said, now)
    assert waited_s is None or 0 <= waited_s < math.inf
    for name in RateHeaders.__slots__ if read is not None else ():
        value = getattr(read, name)
        assert value is None or 0 <= value < math.inf


# ---- the response reader


class Inner(BaseModel):
    when: str | None
    scores: list[float]


class Review(BaseModel):
    stars: int = Field(ge=1, le=5)
    mood: Literal["good", "bad"]
    inner: Inner | None
    tags: list[str]


DESCRIBED = {"type": "object", "properties": {"n": {"type": "integer"}, "any": {}, "text": {"type": "string"}}}
SCHEMAS = [read_schema(given, "response") for given in (None, ["good", "bad"], Review, DESCRIBED)]
FIELDS = [
    "choices",
    "message",
    "content",
    "finish_reason",
    "refusal",
    "tool_calls",
    "error",
    "code",
    "text",
    "model",
    "usage",
    "prompt_tokens",
    "completion_tokens",
    "prompt_tokens_details",
    "cached_tokens",
    "stars",
    "mood",
    "inner",
    "tags",
    "when",
    "scores",
    "n",
    "any",
]
NAMES = st.sampled_from(FIELDS)
WORDS = st.sampled_from(["length", "stop", "content_filter", "good", "bad", "", "429", "insufficient_quota", "1e999"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20) | WORDS
JSON: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=5), inner),
    max_leaves=8,
)
REVIEWS = st.fixed_dictionaries(
    {"stars": st.integers(-1, 7) | SCALARS, "mood": WORDS, "inner": JSON, "tags": st.lists(WORDS) | JSON}
)
CONTENTS = (
    SCALARS | (JSON | REVIEWS).map(json.dumps) | (JSON | REVIEWS).map(lambda v: f"```json\n{json.dumps(v)},\n```")
)
CHOICES = st.fixed_dictionaries(
    {"message": st.fixed_dictionaries({"content": CONTENTS}, optional={"refusal": JSON, "tool_calls": JSON}) | JSON},
    optional={"finish_reason": WORDS | JSON},
)
KINDS = st.sampled_from(["message", "output_text", "refusal", "reasoning", "function_call", "summary_text"])
APIS: tuple[Api, ...] = ("chat", "responses")
CHATS = st.fixed_dictionaries(
    {"choices": st.lists(CHOICES, max_size=2) | JSON}, optional={"usage": JSON, "model": JSON}
)
PARTS = st.fixed_dictionaries({}, optional={"type": KINDS | JSON, "text": CONTENTS, "refusal": JSON, "summary": JSON})
OUTPUTS = st.fixed_dictionaries({}, optional={"type": KINDS | JSON, "content": st.lists(PARTS, max_size=2) | JSON})
RESPONSES = st.fixed_dictionaries(
    {"output": st.lists(OUTPUTS, max_size=2) | JSON},
    optional={"usage": JSON, "status": WORDS | st.just("incomplete"), "incomplete_details": JSON, "model": JSON},
)
BODIES = st.binary(max_size=200) | (JSON | CHATS | RESPONSES).map(lambda value: json.dumps(value).encode())


@RULES
@given(st.integers(100, 599) | st.just(200), BODIES, st.sampled_from(SCHEMAS), st.booleans(), st.sampled_from(APIS))
def reply(status: int, body: bytes, schema: Any, several: bool, api: Api) -> None:
    """A reply is an answer that fits the columns, a failure that can be shown, or no answer."""
    payload = read_json(body)
    failure = of_reply(status, {}, body, payload)
    if failure is not None:
        assert well_formed(failure.message) == failure.message
        return
    answer = read_reply(
        payload,
        api=api,
        schema=schema,
        price=Prices(1.0, 2.0, 0.5),
        several=several,
        latency_s=0.1,
        attempts=1,
        request_id=None,
    )
    if answer is None:
        return
    assert answer.status in PAID
    assert (answer.error is None) == (answer.status == "ok")
    assert answer.cost_usd is None or 0 <= answer.cost_usd < math.inf
    outcomes = Outcomes(1)
    outcomes.put(0, answer)
    assert outcomes[0].status == answer.status
    outcomes.columns(np.array([0]), np.array([0]), {}, details=True)
    if schema is not None and schema.columns and not several:
        assert set(schema.cells(answer.parsed)) <= set(schema.columns)
    encode([(bytes(32), answer, 1)], ORIGIN)


# ---- the part reader

ORIGIN = Origin("https://x/v1", "chat", "m", "{text}", "{}")
ROWS = [
    (bytes([n]) * 32, Completion(text=f"answer {n}", status="ok", prompt_tokens=n, source="checkpoint"), n)
    for n in range(30)
]
SOUND = encode(ROWS, ORIGIN)
KNOWN = {key: answer for key, answer, _ in ROWS}
EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "copy"]), st.integers(0, len(SOUND)), st.binary(max_size=8)),
    min_size=1,
    max_size=5,
)


@RULES
@given(EDITS)
def part(edits: list[tuple[str, int, bytes]]) -> None:
    """A damaged part is refused, or gives back what was in it and nothing else."""
    data = bytearray(SOUND)
    for how, place, more in edits:
        end = min(len(data), place + len(more))
        if how == "flip":
            data[place:end] = bytes(a ^ b for a, b in zip(data[place:end], more, strict=False))
        elif how == "cut":
            del data[place:end]
        elif how == "insert":
            data[place:place] = more
        else:
            data[place:end] = data[: end - place]
    try:
        read = Part(pa.BufferReader(bytes(data)))
        heads = read.heads()
        answers = [each for table in read.take(np.flatnonzero(heads.paid)) for each in completions(table)]
    except (NotAPart, NewerFormat):
        return
    for key, answer in zip(heads.keys[heads.paid].tolist(), answers, strict=True):
        assert KNOWN[key] == answer


TARGETS: dict[str, Callable[[], None]] = {"template": template, "headers": headers, "reply": reply, "part": part}


def fuzz(target: Callable[[], None], minutes: float, start: int) -> int:
    """Run rounds of examples until the time is over; give how many there were."""
    until, rounds = time.monotonic() + 60 * minutes, 0
    while time.monotonic() < until:
        print(f"\r{target.__name__}: {rounds * ROUND:,} examples", end="", flush=True)
        seed(start + rounds)(target)()
        rounds += 1
    return rounds * ROUND


def main() -> int:
    """Fuzz the targets that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all without one")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000))
    given_ = parser.parse_args()
    failed = 0
    for name in given_.targets or TARGETS:
        try:
            count = fuzz(TARGETS[name], given_.minutes, given_.seed)
        except Exception as error:  # whatever it is, it is what was looked for
            failed += 1
            print(f"\r{name}: FAILED from seed {given_.seed}: {type(error).__name__}: {error}")
            print("\n".join(getattr(error, "__notes__", [])))
        else:
            print(f"\r{name}: {count:,} examples, none failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
