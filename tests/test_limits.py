"""What headers say about limits, and what they may not do to us."""

from __future__ import annotations

import math
import time
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from llmframe.limits import RateHeaders, rate_headers, retry_after_s

NOW = 1_700_000_000.0  # 2023-11-14T22:13:20Z


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "20"}, 20.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": " 7 "}, 7.0),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "2"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "2"}, 2.0),
        ({"retry-after": formatdate(NOW + 42, usegmt=True)}, 42.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:14:02 -0000"}, 42.0),
        ({"retry-after": "1700000002"}, 2.0),
        ({"retry-after": "1700000002000"}, 2.0),
    ],
)
def test_retry_after_is_read_in_every_form(headers: dict[str, str], seconds: float) -> None:
    assert retry_after_s(headers, NOW) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["-3", formatdate(NOW - 500, usegmt=True)])
def test_a_retry_after_in_the_past_is_no_wait(text: str) -> None:
    assert retry_after_s({"retry-after": text}, NOW) == 0.0


@pytest.mark.parametrize(
    "text", ["", "soon", "nan", "inf", "-inf", "1e999", "12 parsecs", "Tue, 99 Nov 2023", "\ud800"]
)
def test_rubbish_in_retry_after_is_ignored(text: str) -> None:
    assert retry_after_s({"retry-after": text}, NOW) is None


@pytest.mark.parametrize("name", ["retry-after", "retry-after-ms"])
def test_a_retry_after_that_is_absurd_is_one_that_a_date_can_tell(name: str) -> None:
    seconds = retry_after_s({name: "1e20"}, NOW)
    assert seconds is not None
    assert time.localtime(NOW + seconds).tm_year < 3000


def test_no_retry_after_is_none() -> None:
    assert retry_after_s({}, NOW) is None


@pytest.mark.parametrize(
    ("in_body", "seconds"),
    [("34s", 34.0), ("7m12s", 432.0), ("26", 26.0), ("1700000030000", 30.0), ("1600000000000", 0.0), ("soon", None)],
)
def test_what_the_body_says_of_it_holds_where_no_header_does(in_body: str, seconds: float | None) -> None:
    assert retry_after_s({}, NOW, in_body) == seconds
    assert retry_after_s({"retry-after": "2"}, NOW, in_body) == 2.0


def test_openai_headers_are_read() -> None:
    headers = {
        "x-ratelimit-limit-requests": "10000",
        "x-ratelimit-remaining-requests": "9999",
        "x-ratelimit-reset-requests": "6ms",
        "x-ratelimit-limit-tokens": "2000000",
        "x-ratelimit-remaining-tokens": "1999842",
        "x-ratelimit-reset-tokens": "1m4.5s",
    }
    assert rate_headers(headers, NOW) == RateHeaders(10_000, 9_999, 0.006, 2_000_000, 1_999_842, 64.5)


def test_azure_headers_are_read_with_what_is_missing_as_none() -> None:
    headers = {"x-ratelimit-remaining-requests": "299", "x-ratelimit-reset-requests": "10"}
    assert rate_headers(headers, NOW) == RateHeaders(remaining_requests=299, reset_requests_s=10)


def test_anthropic_headers_are_read_with_their_dates() -> None:
    headers = {
        "anthropic-ratelimit-requests-limit": "50",
        "anthropic-ratelimit-requests-remaining": "49",
        "anthropic-ratelimit-requests-reset": "2023-11-14T22:13:21Z",
        "anthropic-ratelimit-tokens-limit": "40000",
        "anthropic-ratelimit-tokens-remaining": "39000",
        "anthropic-ratelimit-tokens-reset": "2023-11-14T22:13:22.500Z",
    }
    assert rate_headers(headers, NOW) == RateHeaders(50, 49, 1.0, 40_000, 39_000, 2.5)


def test_names_in_any_case_are_found_in_what_the_client_hands_out() -> None:
    headers = CIMultiDict({"X-RateLimit-Limit-Requests": "60", "X-RateLimit-Remaining-Requests": "59"})
    assert rate_headers(headers, NOW) == RateHeaders(limit_requests=60, remaining_requests=59)


def test_an_answer_without_rate_headers_says_nothing() -> None:
    assert rate_headers({"content-type": "application/json"}, NOW) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("6m0s", 360.0),
        ("1.2s", 1.2),
        ("120ms", 0.12),
        ("1h2m", 3720.0),
        ("2m59.56s", 179.56),
        ("1d", 86_400.0),
        ("8", 8.0),
        ("0s", 0.0),
        ("1700000030", 30.0),
        ("1700000030000", 30.0),
        ("2023-11-14T22:13:50+00:00", 30.0),
        ("2023-11-14T22:13:50", 30.0),
        ("2020-01-01T00:00:00Z", 0.0),
        ("-5", 0.0),
    ],
)
def test_a_reset_is_read_in_every_form(text: str, seconds: float) -> None:
    headers = {"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": text}
    read = rate_headers(headers, NOW)
    assert read is not None
    assert read.reset_requests_s == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "soon", "6m0", "m", "nan", "inf", "1e999", "2023-14-99T00:00:00Z", "5 s"])
def test_rubbish_in_a_reset_is_ignored_and_the_rest_is_read(text: str) -> None:
    headers = {"x-ratelimit-remaining-requests": "1", "x-ratelimit-reset-requests": text}
    assert rate_headers(headers, NOW) == RateHeaders(remaining_requests=1)


@pytest.mark.parametrize("limit", ["0", "-1", "unlimited"])
def test_a_limit_that_means_none_is_none(limit: str) -> None:
    headers = {"x-ratelimit-limit-requests": limit, "x-ratelimit-remaining-requests": "0"}
    assert rate_headers(headers, NOW) == RateHeaders(remaining_requests=0)


names = st.sampled_from(
    [
        "retry-after",
        "retry-after-ms",
        *(f"x-ratelimit-{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")),
        *(
            f"anthropic-ratelimit-{unit}-{what}"
            for what in ("limit", "remaining", "reset")
            for unit in ("requests", "tokens")
        ),
    ]
)


formed = st.from_regex(r"-?[0-9.e]{1,12}(ms|s|m|h)?", fullmatch=True)
values = st.text("0123456789.-+:einfatTZmshd \ud800²", max_size=12) | formed


@given(st.dictionaries(names, values))
def test_whatever_headers_hold_it_is_a_finite_number_or_none(headers: dict[str, str]) -> None:
    waited_s, read = retry_after_s(headers, NOW), rate_headers(headers, NOW)
    assert waited_s is None or 0 <= waited_s < math.inf
    if read is not None:
        for name in RateHeaders.__slots__:
            value = getattr(read, name)
            assert value is None or 0 <= value < math.inf
