"""What tokens cost: USD for the usage of one request.

Prices come from the user, or from genai-prices where it is installed; an unknown price is None, never 0.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from llmframe.errors import ConfigurationError
from llmframe.results import Usage

ABSURD = 1e12  # USD per million tokens, from where sums of them leave what a float holds
BATCH_SHARE = 0.5  # of the price, which OpenAI's and Azure's Batch APIs take
STANDARD_TIERS = (None, "auto", "default")

PriceOf = Callable[[Usage], float]
"""The USD that a usage costs."""


@dataclass(frozen=True, slots=True)
class Prices:
    """USD per million tokens."""

    input: float
    output: float
    cached: float

    def __call__(self, usage: Usage) -> float:
        """Give the USD that a usage costs."""
        fresh = usage.prompt_tokens - usage.cached_tokens
        cost = fresh * self.input + usage.cached_tokens * self.cached + usage.completion_tokens * self.output
        return cost / 1_000_000


def halved(price: PriceOf) -> PriceOf:
    """Give a price at which a batch is had: half of it."""
    return lambda usage: BATCH_SHARE * price(usage)


def read_prices(prices: Mapping[str, float], *, embeds: bool = False) -> Prices:
    """Read the ``prices=`` of a call; one that `embeds` has no output, and need not name its price.

    Raises
    ------
    ConfigurationError
        An unknown or missing name, or a price that is no number of at least 0.

    Examples
    --------
    >>> read_prices({"input": 0.15, "output": 0.60})(Usage(prompt_tokens=1000, completion_tokens=100))
    0.00021
    """
    if not isinstance(prices, Mapping):
        raise ConfigurationError(f"prices={prices!r:.60} is no dict; write {{'input': 0.15, 'output': 0.60}}")
    if embeds:
        prices = {"output": 0.0, **prices}
    unknown = set(prices) - {"input", "output", "cached"}
    missing = {"input", "output"} - set(prices)
    if unknown or missing:
        raise ConfigurationError(
            f"prices={dict(prices)!r} has to name 'input' and 'output', and may name 'cached': USD per million tokens"
        )
    given: Mapping[str, Any] = prices
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < ABSURD:
            raise ConfigurationError(f"prices[{name!r}]={value!r} is not a price; pass USD per million tokens")
    return Prices(float(prices["input"]), float(prices["output"]), float(prices.get("cached", prices["input"])))


def known_prices(model: str, base_url: str, service_tier: object = None) -> PriceOf | None:
    """Find a model's prices in genai-prices.

    Parameters
    ----------
    model, base_url : str
        The model, and the endpoint whose prices hold.
    service_tier : str, optional
        As the API takes it.

    Returns
    -------
    callable or None
        None where the library is not installed or does not know the model at this endpoint, or not in this tier.
    """
    try:
        import genai_prices
    except ImportError:
        return None

    context: Any = {} if service_tier in STANDARD_TIERS else {"price_context": {"service_tier": service_tier}}

    def price(usage: Usage) -> Any:
        counted = genai_prices.Usage(
            input_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
            cache_read_tokens=usage.cached_tokens,
        )
        return genai_prices.calc_price(counted, model, provider_api_url=base_url, **context)

    try:
        rates = price(Usage(1, 1)).model_price
    except (LookupError, TypeError):  # its first versions know no tiers
        return None
    fresh, output = rates.input_mtok, rates.output_mtok
    cached = fresh if rates.cache_read_mtok is None else rates.cache_read_mtok
    if isinstance(fresh, Decimal) and isinstance(output, Decimal) and isinstance(cached, Decimal):
        # The library takes 0.1 ms a call, a third of what a whole row may cost; flat rates need one call only.
        return Prices(float(fresh), float(output), float(cached))
    return lambda usage: float(price(usage).total_price)
