"""Prices: what a usage costs in USD; unknown is None and never 0."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from llmframe.errors import ConfigurationError
from llmframe.prices import known_prices, read_prices
from llmframe.results import Usage

OPENAI = "https://api.openai.com/v1/chat/completions"
GOOGLE = "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions"


def test_cached_tokens_have_their_own_price_and_reasoning_is_part_of_the_completion() -> None:
    price = read_prices({"input": 0.15, "output": 0.60, "cached": 0.075})
    assert price(Usage(1000, 100, 400, 50)) == pytest.approx((600 * 0.15 + 400 * 0.075 + 100 * 0.60) / 1e6)
    assert price(Usage()) == 0.0


def test_cached_tokens_without_a_price_of_their_own_cost_the_full_one() -> None:
    assert read_prices({"input": 1, "output": 0})(Usage(1000, 0, 1000)) == 0.001


def test_a_price_may_be_a_number_of_numpys() -> None:
    assert read_prices({"input": np.int64(1), "output": np.float64(0.5)}) == read_prices({"input": 1, "output": 0.5})


@pytest.mark.parametrize(
    ("prices", "said"),
    [
        ({}, "has to name 'input' and 'output'"),
        ({"input": 1}, "has to name 'input' and 'output'"),
        ({"input": 1, "output": 2, "cache": 1}, "and may name 'cached'"),
        ({"input": -1, "output": 2}, r"prices\['input'\]=-1 is not a price; pass USD per million tokens"),
        ({"input": 1, "output": float("nan")}, r"prices\['output'\]=nan"),
        ({"input": 1, "output": float("inf")}, r"prices\['output'\]=inf"),
        ({"input": 1, "output": 1e300}, r"prices\['output'\]=1e\+300"),
        ({"input": 1, "output": "2"}, r"prices\['output'\]='2'"),
        ({"input": True, "output": 1}, r"prices\['input'\]=True"),
        (0.15, "prices=0.15 is no dict"),
        ("cheap", "prices='cheap' is no dict"),
    ],
)
def test_prices_that_are_none_are_refused(prices: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        read_prices(prices)


def test_known_models_are_priced_at_their_endpoint() -> None:
    price = known_prices("gpt-4o-mini", OPENAI)
    assert price is not None
    assert price(Usage(1_000_000, 1_000_000, 500_000)) == pytest.approx(0.5 * 0.15 + 0.5 * 0.075 + 0.60)


def test_a_price_that_depends_on_the_length_of_the_prompt_is_the_librarys_own() -> None:
    genai_prices = pytest.importorskip("genai_prices")
    price = known_prices("gemini-2.5-pro", GOOGLE)
    assert price is not None
    for tokens in (1_000, 300_000):
        counted = genai_prices.Usage(input_tokens=tokens, output_tokens=500, cache_read_tokens=100)
        expected = genai_prices.calc_price(counted, "gemini-2.5-pro", provider_id="google").total_price
        assert price(Usage(tokens, 500, 100)) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("model", "url"),
    [("no-such-model", OPENAI), ("gpt-4o-mini", "http://127.0.0.1:8000/v1"), ("", ""), ("m", "no url")],
)
def test_an_unknown_price_is_none(model: str, url: str) -> None:
    assert known_prices(model, url) is None


def test_without_the_library_every_price_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "genai_prices", None)
    assert known_prices("gpt-4o-mini", OPENAI) is None
