"""Redaction: what is a secret, and that no way to write one is shown."""

from __future__ import annotations

import json
import string
from html import escape
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmframe.redaction import SECRET_LENGTH, redacted, secrets_among

SECRETS = """
    Authorization Proxy-Authorization api-key api_key apikey X-ApiKey x-api-key x-goog-api-key key token x-auth-token
    Ocp-Apim-Subscription-Key x-portkey-api-key Helicone-Auth cf-access-client-secret Cookie X-Amz-Signature sig
    accessToken x-amz-security-token X-Amz-Credential
"""
PLAIN = "x-portkey-provider portkey X-Design X-Author X-Monkey-Name X-Tokenizer X-Signal OpenAI-Organization"


@pytest.mark.parametrize("name", SECRETS.split())
def test_a_name_with_a_word_for_a_secret_is_that_of_one(name: str) -> None:
    assert secrets_among([(name, "abcdefgh")]) == ("abcdefgh",)


@pytest.mark.parametrize("name", PLAIN.split())
def test_a_name_that_holds_the_letters_of_such_a_word_by_chance_is_not(name: str) -> None:
    assert secrets_among([(name, "abcdefgh")]) == ()


def test_a_key_is_a_secret_without_the_name_of_its_scheme_and_each_cookie_is_one() -> None:
    assert "sk-0123456789" in secrets_among([("Authorization", "Bearer sk-0123456789")])
    assert {"session=abc;", "other=defgh"} <= set(secrets_among([("Cookie", "session=abc; other=defgh")]))


def test_a_short_value_is_a_word_and_stays() -> None:
    assert secrets_among([("Authorization", "Bearer EMPTY"), ("key", "local")]) == ("Bearer EMPTY",)


def test_words_without_a_secret_stay_as_they_are() -> None:
    words = r"a path C:\new\u0041 and 100%25 &amp; more"
    assert redacted(words, ("abcdefgh",)) == words


def as_php(text: str) -> str:
    return json.dumps(text).replace("/", "\\/")[1:-1]


def as_dotnet(text: str) -> str:
    return "".join(one if one.isalnum() else f"\\u{ord(one):04X}" for one in text)


KEYS = st.text(string.ascii_letters + string.digits + "-._~+/=:!$@", min_size=SECRET_LENGTH, max_size=40)


@given(KEYS)
@example("c2VjcmV0K2tle+XkvdmFs/dWU9PQ==")
def test_a_secret_is_found_however_it_is_written(secret: str) -> None:
    for write in (str, as_php, as_dotnet, lambda text: as_php(as_php(text)), lambda text: quote(text, safe=""), escape):
        shown = redacted(f"[no key: {write(secret)}]", (secret,))
        assert shown.replace("\\", "") == "[no key: ***]"


def test_a_secret_of_nothing_but_escapes_takes_no_other_words_out() -> None:
    assert redacted(r"a path C:\\new", ("\\" * SECRET_LENGTH,)) == r"a path C:\\new"
