"""Embedding: many texts in one request, each text's vector to its own row, and one bad text found by halving.

A request that is refused is sent again in parts until the text that it was refused for stands alone, so that it costs
no other row its answer, and the others are paid for once. How many texts a request takes is found the same way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmframe.failures import UNSUPPORTED, Failure
from llmframe.messages import well_formed
from llmframe.planning import Plan
from llmframe.prices import PriceOf
from llmframe.prompts import Missing, Prompts
from llmframe.replies import item, read_usage
from llmframe.requests import Form, Requests
from llmframe.results import Completion
from llmframe.texts import text_of
from llmframe.vectors import Embeddings, Matrix, read_vectors, shared_out

MOST_INPUTS = 2_048  # of one request, by OpenAI's reference
MOST_TOKENS = 300_000  # of one request, the same
USUAL_INPUTS = 512  # more of them make no server faster, and an answer late
USUAL_BYTES = 3 << 18  # of a reply, the same; and what is in flight has to be held
NUMBER_BYTES = 16 / 3  # of one number in base64
LEAST_INPUTS = 32  # below it a request costs more than its texts
SPREAD = 16  # requests that a small frame is spread over, to be worked on side by side
LEAST_ASCII_BYTES = 3.0  # of a token, to stay within `MOST_TOKENS`: English has 4, code and numbers about 3
LEAST_OTHER_BYTES = 2.0  # the same, in UTF-8

_TRANSPORT = re.compile(r"encoding[_ ]?format|base64", re.I)


def read_embedding(
    payload: Any, texts: int, *, price: PriceOf | None, latency_s: float | None, attempts: int, request_id: str | None
) -> Completion | None:
    """Read a reply with the vectors of so many texts; None where they are not all there."""
    vectors = read_vectors(payload, texts)
    if vectors is None:
        return None
    usage, model = read_usage(payload), item(payload, "model")
    return Completion(
        status="ok",
        parsed=vectors,
        prompt_tokens=usage.prompt_tokens if usage else None,
        cost_usd=price(usage) if price and usage else None,
        latency_s=latency_s,
        attempts=attempts,
        model=well_formed(model) if isinstance(model, str) else None,
        source="request",
        request_id=None if request_id is None else well_formed(request_id),
    )


@dataclass(slots=True, eq=False)
class _Split:
    """A request that was sent again in two halves; if neither is refused, it was too large, and no text was bad."""

    larger: _Chunk
    answered: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """The texts of one request: their requests' numbers, and the bytes of each."""

    numbers: npt.NDArray[np.intp]
    sizes: npt.NDArray[np.int64]
    tokens: float  # about
    half_of: _Split | None = None


class Embedding:
    """What is sent for the texts of a run, and what their vectors are.

    Parameters
    ----------
    requests : Requests
        Makes the bodies.
    prompts : Prompts
        Gives the texts.
    plan : Plan
        Which row sends what.
    price : callable, optional
        Gives what the usage costs.
    dimensions : callable
        Gives the length of a vector; None while it is not known.
    answered : callable
        Gives how many requests the run has had answered.
    crowded : callable
        Says whether the endpoint's limit on requests is what keeps the run waiting.
    tell : callable
        Is told, once, that the endpoint takes no base64.
    """

    def __init__(
        self,
        requests: Requests,
        prompts: Prompts,
        plan: Plan,
        price: PriceOf | None,
        *,
        dimensions: Callable[[], int | None],
        answered: Callable[[], int],
        crowded: Callable[[], bool],
        tell: Callable[[str], None],
    ) -> None:
        self._requests = requests
        self._prompts = prompts
        self._plan = plan
        self._price = price
        self._dimensions = dimensions
        self._answered = answered
        self._crowded = crowded
        self._tell = tell
        self._chunks: dict[int, _Chunk] = {}
        self._made = 0
        self._most_inputs = MOST_INPUTS
        self._most_tokens = float(MOST_TOKENS)
        self.form: Form = "base64"

    def bodies(self, asked: npt.NDArray[np.intp]) -> Iterator[tuple[int, bytes]]:
        """Make each request as a worker asks for it."""
        spread = max(LEAST_INPUTS, -(-len(asked) // SPREAD))
        numbers: list[int] = []
        texts: list[str] = []
        sizes: list[int] = []
        tokens = 0.0
        most = 0
        for number, text in zip(asked.tolist(), self._texts(asked), strict=True):
            size = len(text) if text.isascii() else len(text.encode())
            taken = size / (LEAST_ASCII_BYTES if size == len(text) else LEAST_OTHER_BYTES) + 1
            if texts and (len(texts) >= most or tokens + taken > self._most_tokens):
                yield self._chunk(numbers, sizes, tokens), self._requests.embedding_body(texts, self.form)
                numbers, texts, sizes, tokens = [], [], [], 0.0
            if not texts:  # a request begins: what was learned since the last one holds for it
                most = self._most_inputs if self._crowded() else min(spread, self._usual(), self._most_inputs)
            numbers.append(number)
            texts.append(text)
            sizes.append(size)
            tokens += taken
        if texts:
            yield self._chunk(numbers, sizes, tokens), self._requests.embedding_body(texts, self.form)

    def read(
        self, payload: Any, *, number: int, latency_s: float, attempts: int, request_id: str | None
    ) -> Completion | None:
        """Read a reply: the vectors of its texts; None where they are not all there."""
        texts = len(self._chunks[number].numbers)
        return read_embedding(
            payload, texts, price=self._price, latency_s=latency_s, attempts=attempts, request_id=request_id
        )

    def taken(self, number: int, completion: Completion) -> tuple[npt.NDArray[np.intp], Embeddings | None]:
        """Give the texts' requests of one that has its outcome, and their vectors, where it has any."""
        chunk = self._chunks.pop(number)
        vectors: Matrix | None = completion.parsed
        if vectors is None:
            return chunk.numbers, None
        self._learn(chunk)
        count = len(vectors)
        tokens, costs = np.full(count, -1), np.full(count, np.nan)
        shares = chunk.sizes / max(1, chunk.sizes.sum())
        if completion.prompt_tokens is not None:
            tokens = shared_out(completion.prompt_tokens, chunk.sizes)
            shares = tokens / max(1, completion.prompt_tokens)
        if completion.cost_usd is not None:
            costs = completion.cost_usd * shares
        return chunk.numbers, Embeddings(
            vectors=vectors,
            prompt_tokens=tokens,
            cost_usd=costs,
            latency_s=np.full(count, completion.latency_s if completion.latency_s is not None else np.nan),
            attempts=np.full(count, completion.attempts),
            models=[completion.model] * count,
            request_ids=[completion.request_id] * count,
        )

    # -- what is sent once more

    def repaired(self, number: int, repairs: int, payload: Any, completion: Completion) -> bytes | None:  # noqa: ARG002
        """Give nothing: a vector fits."""
        return None

    def fallen_back(self, number: int, form: Form, failure: Failure) -> bytes | None:
        """Give the body with lists of numbers, for an endpoint that does not know base64."""
        if failure.http not in UNSUPPORTED or not _TRANSPORT.search(failure.message) or form == "float":
            return None
        if self.form != "float":
            self.form = "float"
            self._tell(f"the endpoint sends no base64 ({failure.message:.160}); going on with lists of numbers")
        return self._requests.embedding_body(list(self._texts(self._chunks[number].numbers)), self.form)

    def divided(self, number: int, failure: Failure | None) -> Sequence[tuple[int, bytes]]:
        """Give a request in two parts, or in as many as are known to be needed; nothing where it is of one text."""
        chunk = self._chunks[number]
        count = len(chunk.numbers)
        if count == 1:
            return ()
        del self._chunks[number]
        # Before anything was answered it may be that nothing will be: one text tells, and costs no other a request.
        refused = failure is not None and failure.verdict == "row"
        alone = refused and not self._answered()
        step = self._most_inputs if refused and self._most_inputs < count // 2 else -(-count // 2)
        starts = [0, 1] if alone else list(range(0, count, step))
        split = _Split(chunk) if refused and not alone and len(starts) == 2 else None
        texts = list(self._texts(chunk.numbers))
        made = []
        for part in map(slice, starts, [*starts[1:], count]):
            sizes = chunk.sizes[part]
            tokens = chunk.tokens * float(sizes.sum() + len(sizes)) / float(chunk.sizes.sum() + count)
            numbers = chunk.numbers[part]
            name = self._add(_Chunk(numbers, sizes, tokens, split))
            made.append((name, self._requests.embedding_body(texts[part], self.form)))
        return made

    def _learn(self, chunk: _Chunk) -> None:
        """Ask for less at once where both halves of a request were answered that was refused as a whole."""
        split = chunk.half_of
        if split is None:
            return
        split.answered += 1
        if split.answered == 2:
            self._most_inputs = min(self._most_inputs, -(-len(split.larger.numbers) // 2))
            self._most_tokens = min(self._most_tokens, split.larger.tokens / 2)

    def _usual(self) -> int:
        """Give how many texts to ask for at once, by what a reply will hold."""
        dimensions = self._dimensions()
        if dimensions is None:
            return USUAL_INPUTS
        return min(USUAL_INPUTS, max(LEAST_INPUTS, int(USUAL_BYTES / (NUMBER_BYTES * dimensions))))

    def _chunk(self, numbers: list[int], sizes: list[int], tokens: float) -> int:
        return self._add(_Chunk(np.array(numbers, np.intp), np.array(sizes, np.int64), tokens))

    def _add(self, chunk: _Chunk) -> int:
        self._made += 1
        self._chunks[self._made] = chunk
        return self._made

    def _texts(self, numbers: npt.NDArray[np.intp]) -> Iterator[str]:
        for messages in self._prompts.render(self._plan.first[numbers]):
            assert not isinstance(messages, Missing)
            yield text_of(messages)
