"""The budget: never passed, whatever comes back in whatever order; and what is left undone says so."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmframe
from llmframe import failures
from llmframe.billing import paid
from llmframe.budget import PART_TOKENS, TEMPLATE_TOKENS, Bound, Budget, Cost, most_completion_tokens
from llmframe.errors import BudgetExceeded, ConfigurationError
from llmframe.prices import Prices, read_prices
from llmframe.results import Usage
from llmframe.tokens import counter_for
from llmframe.transports import Reply
from tests.server import SimulatedServer

PRICES = {"input": 10.0, "output": 40.0, "cached": 5.0}
PRICE = Prices(10.0, 40.0, 5.0)

# ---- the law

COSTS = st.tuples(st.integers(0, 10**6), st.floats(0, 10.0))
REQUESTS = st.lists(st.tuples(COSTS, st.floats(0, 1), st.integers(0, 100)), max_size=40)


def cost(tokens: int, usd: float) -> Cost:
    return Cost(tokens, math.ceil(usd * 10**12))


@settings(deadline=None)
@given(REQUESTS, st.none() | st.floats(1e-6, 50), st.none() | st.integers(1, 10**7))
def test_it_is_never_passed_whatever_the_order_of_the_answers(
    requests: list[tuple[tuple[int, float], float, int]], max_usd: float | None, max_tokens: int | None
) -> None:
    budget = Budget(bound=Bound(1), max_usd=max_usd, max_tokens=max_tokens)
    flying: list[tuple[Cost, Cost]] = []

    def land(place: int) -> None:
        budget.settle(*flying.pop(place % len(flying)))

    for worst, share, place in requests:
        most = cost(*worst)
        paid = Cost(int(most.tokens * share), int(most.pico_usd * share))
        if budget.fits(most):
            budget.set_aside(most)
            flying.append((most, paid))
        elif flying:
            land(place)
        total = budget.spent + budget.aside
        assert max_usd is None or total.usd <= max_usd
        assert max_tokens is None or total.tokens <= max_tokens
    while flying:
        land(0)
    assert budget.idle


TEXTS = (
    st.text() | st.text(st.sampled_from('\x00\x1f"\\{}<|endoftext|> \n')) | st.text(st.characters(min_codepoint=0x300))
)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXTS), min_size=1, max_size=6))
@pytest.mark.parametrize("model", ["gpt-4o-mini", "gpt-3.5-turbo"])
def test_no_prompt_takes_more_tokens_than_its_bound(model: str, messages: list[tuple[str, str]]) -> None:
    sent = [{"role": role, "content": text.encode("utf-8", "replace").decode()} for role, text in messages]
    body = orjson.dumps({"model": model, "messages": sent})
    assert counter_for(model).prompt(sent) <= Bound(0)(body).tokens - TEMPLATE_TOKENS


def test_a_picture_is_bounded_by_the_dearest_and_text_that_speaks_of_one_is_not() -> None:
    part = {"type": "image_url", "image_url": {"url": "https://x/y.png"}}
    sent = orjson.dumps({"messages": [{"role": "user", "content": [part]}]})
    assert Bound(0)(sent).tokens == len(sent) + TEMPLATE_TOKENS + PART_TOKENS[0][1]
    spoken = orjson.dumps({"messages": [{"role": "user", "content": orjson.dumps(part).decode()}]})
    assert Bound(0)(spoken).tokens == len(spoken) + TEMPLATE_TOKENS


def test_the_bound_is_of_the_dearest_kind_of_token() -> None:
    assert Bound(10, Prices(1.0, 2.0, 9.0))(b"").pico_usd == Bound(10, Prices(9.0, 2.0, 1.0))(b"").pico_usd


@pytest.mark.parametrize(
    ("model", "params", "most"),
    [
        ("m", {"max_tokens": 7}, 7),
        ("m", {"max_completion_tokens": 7, "max_tokens": 9}, 9),
        ("m", {"max_output_tokens": 7}, 7),
        ("m", {"max_tokens": 7, "n": 3}, 21),
        ("m", {"max_tokens": np.int64(7), "n": np.int64(3)}, 21),
        ("m", {"max_tokens": 7, "n": 3.0}, 21),
        ("gpt-4o-mini", {}, 16_384),
        ("gpt-4o-mini", {"max_tokens": None, "n": 2}, 32_768),
        ("openai/gpt-4.1-nano-2025-04-14", {}, 32_768),
    ],
)
def test_an_answer_is_bounded_by_its_parameter_or_by_the_models_limit(model: str, params: Any, most: int) -> None:
    assert most_completion_tokens(model, params, "max_cost") == most


@pytest.mark.parametrize("value", [0, 7.5, "7", True])
def test_a_limit_of_answers_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"max_tokens=.* has to be a whole number of at least 1"):
        most_completion_tokens("m", {"max_tokens": value}, "max_cost")


def test_a_budget_that_nobody_can_spend_is_no_limit() -> None:
    budget = Budget(bound=Bound(10, read_prices({"input": 1, "output": 1})), max_usd=1e300)
    assert budget.fits(budget.bound(b"x" * 1000))


# ---- runs


def frame(count: int, more: str = "") -> pd.DataFrame:
    return pd.DataFrame({"text": [f"row {number} {more}" for number in range(count)]})


def call(server: SimulatedServer, rows: pd.DataFrame, **keywords: Any) -> pd.DataFrame:
    given = {"model": "m", "max_tokens": 20, "base_url": server.base_url, "progress": False, **keywords}
    out: pd.DataFrame = rows.llm.complete("{text}", **given)
    return out


def spent_usd(server: SimulatedServer) -> float:
    stats = server.stats()
    return PRICE(Usage(stats.prompt_tokens, stats.completion_tokens))


def stopped(server: SimulatedServer, rows: pd.DataFrame, **keywords: Any) -> BudgetExceeded:
    with pytest.raises(BudgetExceeded) as caught:
        call(server, rows, **keywords)
    return caught.value


@pytest.fixture
def quick_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "BACKOFF_BASE_S", 0.01)
    monkeypatch.setattr(failures, "BACKOFF_CAP_S", 0.05)


def test_max_cost_is_not_passed_and_is_used_but_for_one_worst_case(server: SimulatedServer) -> None:
    server.configure(latency_s=0.01)
    error = stopped(server, frame(400), max_cost=0.05, prices=PRICES)
    assert 0.05 - 0.005 < spent_usd(server) <= 0.05
    assert error.frame is not None
    counts = error.frame["response_status"].value_counts()
    assert counts["ok"] == server.stats().answered
    assert counts["ok"] + counts["pending"] == 400
    assert re.search(r"max_cost=0.05 could be passed: 0\.0\d+ USD are spent, and the next request may cost", str(error))
    assert "rows are done; go on with" in str(error)


def test_max_tokens_total_needs_no_price_and_is_not_passed(server: SimulatedServer) -> None:
    server.configure(latency_s=0.01)
    error = stopped(server, frame(400), max_tokens_total=3_000)
    stats = server.stats()
    assert 2_500 < stats.prompt_tokens + stats.completion_tokens <= 3_000
    assert "max_tokens_total=3,000 could be passed" in str(error)


@pytest.mark.parametrize("n", [4, np.int64(4)])
def test_several_answers_a_row_are_all_in_the_worst_case(server: SimulatedServer, n: Any) -> None:
    stopped(server, frame(400, "and much more to say about it"), max_tokens_total=4_000, n=n)
    stats = server.stats()
    assert 3_000 < stats.prompt_tokens + stats.completion_tokens <= 4_000


def test_answers_that_are_asked_again_are_counted_each_time(server: SimulatedServer) -> None:
    rows = frame(200, "[[say=neither of them]]")
    stopped(server, rows, max_tokens_total=9_000, schema=["good", "bad"])
    stats = server.stats()
    assert any(len(request.body["messages"]) > 1 for request in server.requests())
    assert stats.prompt_tokens + stats.completion_tokens <= 9_000


def test_a_first_request_that_does_not_fit_is_not_sent(server: SimulatedServer) -> None:
    error = stopped(server, frame(3), max_tokens_total=100)
    assert server.stats().received == 0
    assert error.frame is not None
    assert error.frame["response_status"].tolist() == ["pending"] * 3


def test_a_budget_that_suffices_is_not_noticed(server: SimulatedServer) -> None:
    out = call(server, frame(40), max_cost=10.0, max_tokens_total=10**6, prices=PRICES)
    assert (out["response_status"] == "ok").all()


def test_what_the_checkpoint_gives_back_costs_nothing_and_the_same_call_goes_on(
    server: SimulatedServer, tmp_path: Path
) -> None:
    budget: dict[str, Any] = {"max_tokens_total": 2_000, "checkpoint": tmp_path / "run"}
    first = stopped(server, frame(400), **budget)
    assert "the same call goes on from" in str(first)
    for _ in range(20):
        try:
            out = call(server, frame(400), **budget)
        except BudgetExceeded:
            continue
        break
    assert (out["response_status"] == "ok").all()
    assert server.stats().answered == 400


@pytest.mark.usefixtures("quick_backoff")
@pytest.mark.parametrize("fault", ["truncated_body", "bad_json", "no_usage", "reset", "html"])
def test_what_may_have_been_billed_counts_at_its_worst(server: SimulatedServer, fault: str) -> None:
    server.configure(**{f"p_{fault}": 0.5}, seed=3)
    stopped(server, frame(60), max_tokens_total=9_000)  # a worst case is some 370 tokens, an answer 15
    assert server.stats().received < 60


def half(directive: str) -> pd.DataFrame:
    """Rows of which every other one is answered, and so shows that the endpoint is there."""
    return pd.DataFrame({"text": [f"row {number} " + directive * (number % 2) for number in range(60)]})


@pytest.mark.usefixtures("quick_backoff")
@pytest.mark.parametrize("status", [408, 502, 504, 520, 524])
def test_a_gateway_that_got_no_answer_may_have_been_billed_for_one(server: SimulatedServer, status: int) -> None:
    error = stopped(server, half(f"[[status={status}]]"), max_tokens_total=2_500)
    assert "are the worst case of attempts that may have been billed" in str(error)
    assert 1 <= llmframe.last_run()._state.tally.maybe_billed <= 2_500 // 300


@pytest.mark.parametrize("status", [400, 429, 500, 501, 503, 521, 522, 523, 529])
def test_a_server_that_says_that_it_failed_bills_nothing(status: int) -> None:
    reply = Reply(status, {}, b"")
    failure = failures.of_reply(status, {}, b"", None)
    assert failure is not None
    budget = Budget(bound=Bound(10), max_tokens=1_000)
    assert paid(budget, budget.bound(b""), reply, None, failure) == Cost()


def test_an_attempt_that_timed_out_may_have_been_billed(server: SimulatedServer) -> None:
    out = call(server, half("[[sleep=5]]").head(8), max_tokens_total=9_000, timeout=0.3, max_attempts=1)
    assert out["response_status"].tolist() == ["ok", "failed"] * 4
    assert llmframe.last_run()._state.tally.maybe_billed == 4
    assert "may have been billed without an answer" in llmframe.last_run()._repr_html_()
    stopped(server, half("[[sleep=5]]"), max_tokens_total=5_000, timeout=0.3, max_attempts=1)
    assert server.stats().answered < 8 + 60


@pytest.mark.usefixtures("quick_backoff")
def test_an_error_that_nobody_bills_costs_nothing(server: SimulatedServer) -> None:
    server.configure(p_500=0.3, seed=5)
    out = call(server, frame(60), max_tokens_total=3_000)
    assert (out["response_status"] == "ok").all()
    assert server.stats().failed["500"] * TEMPLATE_TOKENS > 3_000


def test_a_model_without_a_price_is_refused_with_the_way_out(server: SimulatedServer) -> None:
    with pytest.raises(ConfigurationError, match=r"none is known for 'm'.*prices=.*max_tokens_total="):
        call(server, frame(3), max_cost=1.0)
    assert server.stats().received == 0


def test_an_answer_that_nothing_bounds_is_refused_with_the_way_out(server: SimulatedServer) -> None:
    with pytest.raises(ConfigurationError, match="how long an answer of 'm' may get; pass max_tokens="):
        call(server, frame(3), max_cost=1.0, prices=PRICES, max_tokens=None)
    assert server.stats().received == 0


@pytest.mark.parametrize(
    "keywords", [{"max_cost": 0}, {"max_cost": "1"}, {"max_tokens_total": 1.5}, {"max_cost": True}]
)
def test_a_budget_that_is_none_is_refused(server: SimulatedServer, keywords: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(keywords))):
        call(server, frame(1), **keywords)


def test_the_costs_of_the_rows_add_up_to_what_the_server_counted_cached_tokens_at_their_price(
    server: SimulatedServer,
) -> None:
    server.configure(cached_tokens=3)
    out = call(server, frame(50), details=True, prices=PRICES)
    stats = server.stats()
    due = PRICE(Usage(stats.prompt_tokens, stats.completion_tokens, 3 * stats.answered))
    assert out["response_cost_usd"].sum() == pytest.approx(due, abs=1e-9)
    assert llmframe.last_run().cost_usd == pytest.approx(due, abs=1e-9)
