"""A budget: what a run may spend, with the worst case of whatever is in flight set aside before it is sent.

Pure. What is spent and set aside together never pass a limit, whatever the order of the answers, as long as no answer
costs more than the most that `Bound` says of it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmframe.errors import ConfigurationError
from llmframe.options import answers_asked, check_count
from llmframe.prices import PriceOf
from llmframe.requests import text_bytes
from llmframe.results import Usage

PICO = 10**12  # USD are counted in whole trillionths: sums are exact, and what is set aside comes back to the last one
ENDLESS_PICO = 2**127  # more than anybody can spend
TEMPLATE_TOKENS = 256  # what a server's chat template may add to a prompt: a default system message, today's date

PART_TOKENS = (
    (b'"image_url":', 50_000),  # gpt-4o-mini takes 48,169 for the largest picture, and no other model in use so many
    (b'"type":"input_image"', 50_000),
    (b'"type":"input_audio"', 2_000_000),  # the longest context window in use: nothing less bounds these
    (b'"type":"file"', 2_000_000),
    (b'"type":"input_file"', 2_000_000),
)
"""The most that a part of a message takes whose bytes bound nothing, by how it looks in a body."""

ANSWER_LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
"""The parameters by which a call limits an answer, reasoning included, in the chat and the responses API."""

OUTPUT_LIMITS = (
    ("gpt-5-chat", 16_384),
    ("gpt-5", 128_000),
    ("gpt-4.1", 32_768),
    ("chatgpt-4o", 16_384),
    ("gpt-4o", 16_384),
    ("gpt-4-turbo", 4_096),
    ("gpt-4", 8_192),
    ("gpt-3.5-turbo", 4_096),
    ("gpt-35-turbo", 4_096),
    ("o1", 100_000),
    ("o3", 100_000),
    ("o4-mini", 100_000),
)
"""The most tokens of one answer by the start of a model's name, as OpenAI's page of each model states it.

No price list names them. A model that is not here needs `max_tokens=`: nothing else bounds its answers.
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """What something costs, or may cost: tokens, and USD in trillionths."""

    tokens: int = 0
    pico_usd: int = 0

    @classmethod
    def of(cls, usage: Usage, price: PriceOf | None) -> Cost:
        """Give the cost of a usage; without a price it is of tokens alone."""
        usd = 0.0 if price is None else price(usage)
        return cls(usage.prompt_tokens + usage.completion_tokens, math.ceil(usd * PICO))

    @classmethod
    def limit(cls, max_usd: float | None, max_tokens: int | None) -> Cost:
        """Give the most that may be spent; None is no limit."""
        pico_usd = ENDLESS_PICO if max_usd is None else min(ENDLESS_PICO, max_usd * PICO)  # floats end at 1e308
        return cls(2**63 if max_tokens is None else int(max_tokens), math.floor(pico_usd))

    @property
    def usd(self) -> float:
        """The USD."""
        return self.pico_usd / PICO

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tokens + other.tokens, self.pico_usd + other.pico_usd)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.tokens - other.tokens, self.pico_usd - other.pico_usd)


@dataclass(frozen=True, slots=True)
class Bound:
    """The most that a request can cost.

    Attributes
    ----------
    completion_tokens : int
        Of its answers.
    price : callable, optional
        What a usage costs.
    """

    completion_tokens: int
    price: PriceOf | None = None

    def __call__(self, body: bytes) -> Cost:
        """Give the most that a request with this body can cost.

        No vocabulary in use makes more than one token of a byte, and the JSON around a text takes more bytes than a
        chat format takes tokens; what comes on top is what the server adds of its own.
        """
        prompt = text_bytes(body) + TEMPLATE_TOKENS + sum(tokens * body.count(mark) for mark, tokens in PART_TOKENS)
        dearest = Cost.of(Usage(prompt, self.completion_tokens), self.price)
        if self.price is None:
            return dearest
        cached = Cost.of(Usage(prompt, self.completion_tokens, prompt), self.price)  # dearer, where a user says so
        return max(dearest, cached, key=lambda cost: cost.pico_usd)


class Budget:
    """What a run has spent, what it has set aside, and whether a request still fits.

    Parameters
    ----------
    max_usd : float, optional
        The most it may spend, in USD.
    max_tokens : int, optional
        The same in tokens, of prompts and answers.
    bound : Bound
        The most that one request can cost.

    Examples
    --------
    >>> budget = Budget(bound=Bound(completion_tokens=10), max_tokens=1000)
    >>> most = budget.bound(b"x" * 134)
    >>> most.tokens, budget.fits(most)
    (400, True)
    >>> budget.set_aside(most)
    >>> budget.set_aside(most)
    >>> budget.fits(most)
    False
    >>> budget.settle(most, Cost(tokens=50))
    >>> budget.fits(most)
    True
    """

    def __init__(self, *, bound: Bound, max_usd: float | None = None, max_tokens: int | None = None) -> None:
        self.bound = bound
        self.max_usd = max_usd
        self.max_tokens = max_tokens
        self._most = Cost.limit(max_usd, max_tokens)
        self.spent = Cost()
        """By what was settled."""
        self.assumed = Cost()
        """The part of it that is a worst case, since nobody said what was billed."""
        self.aside = Cost()
        """The worst case of what is in flight."""
        self._waiting: deque[Callable[[], None]] = deque()

    @property
    def idle(self) -> bool:
        """Whether nothing is set aside, so that nothing can come back."""
        return self.aside == Cost()

    def fits(self, most: Cost) -> bool:
        """Whether a request that costs so much at most can be sent without passing a limit."""
        total = self.spent + self.aside + most
        return total.tokens <= self._most.tokens and total.pico_usd <= self._most.pico_usd

    def set_aside(self, most: Cost) -> None:
        """Count a request that is to be sent."""
        self.aside += most

    def settle(self, most: Cost, paid: Cost) -> None:
        """Count what a request cost in place of what was set aside for it."""
        self.aside -= most
        self.spent += paid
        if paid == most:  # an answer hardly ever costs exactly its worst case, so equality means it was assumed
            self.assumed += paid
        self._wake()

    def _wake(self) -> None:
        while self._waiting:
            self._waiting.popleft()()

    def when_settled(self, call: Callable[[], None]) -> None:
        """Call this once, when a request is settled next: of any run, as the parts of a job share one budget."""
        self._waiting.append(call)

    def refusal(self, most: Cost) -> str:
        """Say why a request is not sent, and what to do."""
        said = []
        if self.max_usd is not None and (self.spent + most).pico_usd > self._most.pico_usd:
            said.append(
                f"max_cost={self.max_usd:g} could be passed: {self.spent.usd:.6f} USD are spent, and the next request "
                f"may cost up to {most.usd:.6f}"
            )
        if self.max_tokens is not None and (self.spent + most).tokens > self._most.tokens:
            said.append(
                f"max_tokens_total={self.max_tokens:,} could be passed: {self.spent.tokens:,} tokens are spent, and "
                f"the next request may take up to {most.tokens:,}"
            )
        if self.assumed.tokens:
            said.append(
                f"{self.assumed.tokens:,} tokens of that are the worst case of attempts that may have been billed"
            )
        if not self.bound.completion_tokens:
            return f"{'; '.join(said)}; a call's budget is its own: call again for more rows"
        return (
            f"{'; '.join(said)} ({self.bound.completion_tokens:,} of them for its answer); a call's budget is its own: "
            "call again for more rows, or with a smaller max_tokens="
        )


class Allotment(Budget):
    """The part of a budget that one of many processes holds: it asks for more when a request does not fit.

    Parameters
    ----------
    bound, max_usd, max_tokens
        Of the whole budget; see `Budget`.
    """

    def __init__(self, *, bound: Bound, max_usd: float | None = None, max_tokens: int | None = None) -> None:
        super().__init__(bound=bound, max_usd=max_usd, max_tokens=max_tokens)
        self._most = Cost()
        self._over = False
        self._elsewhere = Cost()
        self._wanted: Cost | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing is set aside, here or anywhere, and no more can be had."""
        return self._over and self.aside == Cost()

    def fits(self, most: Cost) -> bool:
        """Whether a request fits into what is held here; one that does not is asked for."""
        if super().fits(most):
            return True
        self._wanted = most
        return False

    def want(self) -> tuple[Cost, Cost | None]:
        """Give what is held, and what is wanted; who wants more keeps nothing but what is set aside."""
        wanted, self._wanted = self._wanted, None
        if wanted is not None:
            self._most = self.spent + self.aside
        return self._most - self.spent, wanted

    def allot(self, more: Cost, *, over: bool, elsewhere: Cost) -> None:
        """Take what is given, and let those who wait look again.

        Parameters
        ----------
        more : Cost
            To hold besides.
        over : bool
            What was wanted is not there, and nobody holds anything that could come back.
        elsewhere : Cost
            What all others have spent.
        """
        self._most += more
        self._over, self._elsewhere = over, elsewhere
        self._wake()

    def refusal(self, most: Cost) -> str:
        """Say why a request is not sent, and what to do."""
        whole = Budget(bound=self.bound, max_usd=self.max_usd, max_tokens=self.max_tokens)
        whole.spent = self.spent + self._elsewhere
        return whole.refusal(most)


def most_completion_tokens(model: str, params: Mapping[str, Any], keyword: str) -> int:
    """Give the most tokens that the answers of one request can have.

    Parameters
    ----------
    model : str
        Whose output limit holds where the call sets none.
    params : mapping
        The parameters of the request.
    keyword : str
        The budget's name, for the error.

    Raises
    ------
    ConfigurationError
        Nothing says how long an answer may get, or what says it is no whole number.
    """
    named = [name for name in ANSWER_LIMITS if params.get(name) is not None]
    for name in named:
        check_count(name, params[name])
    choices = answers_asked(params)
    if named:
        return choices * max(int(params[name]) for name in named)
    name = model.rpartition("/")[2].removeprefix("ft:")
    for start, limit in OUTPUT_LIMITS:
        if name.startswith(start):
            return choices * limit
    raise ConfigurationError(
        f"{keyword}= sets the worst case of each request aside, and nothing says how long an answer of {model!r} may "
        "get; pass max_tokens= (or max_completion_tokens=)"
    )
