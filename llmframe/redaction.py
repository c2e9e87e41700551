"""Redaction: the secrets of a request, taken out of what is told of its failure.

An answer is the user's, and is never touched. Pure.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

# Whole words of a name, since many hold the letters of one by chance: x-portkey-provider, X-Design, X-Author.
SECRET_NAME = re.compile(
    r"(?:auth|authentication|authorization|token|secret|cookie|password|signature|credentials?"
    r"|(?:api|access|private|secret)key|(?<![a-z])(?:key|sig))(?![a-z])",
    re.IGNORECASE,
)
SECRET_LENGTH = 8  # characters; shorter ones are words like "EMPTY" and "local", which would blot out honest text
BACKSLASHES = re.compile(r"\\+(?:u([0-9a-fA-F]{4}))?")  # as JSON escapes, and JSON within JSON


def secrets_among(pairs: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Choose what no message may show from the headers and query parameters of a request, the longest first.

    Examples
    --------
    >>> secrets_among([("Authorization", "Bearer sk-0123456789"), ("x-portkey-provider", "anthropic")])
    ('Bearer sk-0123456789', 'sk-0123456789')
    """
    values = [value for name, value in pairs if SECRET_NAME.search(name)]
    parts = {part for value in values for part in (value.strip(), *value.split())}  # the key is quoted without "Bearer"
    return tuple(sorted((part for part in parts if len(part) >= SECRET_LENGTH), key=len, reverse=True))


def redacted(words: str, secrets: tuple[str, ...]) -> str:
    r"""Give a text without secrets, also where it has them as JSON, a URL or a web page writes them.

    Examples
    --------
    >>> redacted(r"no key abc\/d\u002be, no path /v1?key=abc%2Fd%2be", ("abc/d+e",))
    'no key ***, no path /v1?key=***'
    """
    for secret in secrets:
        words = words.replace(secret, "***")
    plain = _unescaped(words)
    if plain == words:
        return words
    hidden = [each for each in map(_unescaped, secrets) if each and each in plain]
    for secret in hidden:
        plain = plain.replace(secret, "***")
    return plain if hidden else words


def without_secrets(url: str) -> str:
    """Give a URL without its user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _unescaped(text: str) -> str:
    text = BACKSLASHES.sub(lambda found: chr(int(found[1], 16)) if found[1] else "", text)
    return html.unescape(unquote(unquote(text)))
