"""Endpoints: from an openai client, or the pieces of one, to where a run sends and by which transport.

The openai client stays the owner of the URL, the key and the headers.
"""

from __future__ import annotations

import ipaddress
import os
import urllib.request
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import openai
import yarl

from llmframe.errors import ConfigurationError
from llmframe.messages import kind
from llmframe.redaction import without_secrets
from llmframe.requests import PATHS, Api, identity
from llmframe.transports import (
    NO_EXTRAS,
    AiohttpTransport,
    Extras,
    SdkTransport,
    ThreadTransport,
    Transport,
    is_default_transport,
)

TRUSTED = ("SSL_CERT_FILE", "SSL_CERT_DIR")  # of the environment: whom a connection trusts, once it is made
CONNECT_S = 10.0  # a host that takes no connection for this long is not there


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a run sends its requests.

    Attributes
    ----------
    identity : str
        What its answers are kept under, whatever key or port it was reached with.
    url : str
        Where requests go, as built, for messages.
    key : hashable
        Two endpoints with the same key share connections and learned limits. It holds the API key.
    open : callable
        Makes the transport, on the loop that will use it.
    bound : bool
        Whether its connections belong to the caller's event loop: a client with a transport of its own.
    client : callable
        Gives the openai client that owns all this, for what is no row's request: files and batches. One that was made
        here is made anew: the SDK's starts a task wherever it is dropped.
    replicas : tuple of str
        Where else requests go, as built.
    """

    identity: str
    url: str
    key: Hashable = field(repr=False)
    open: Callable[[], Transport] = field(repr=False)
    bound: bool = False
    client: Callable[[], Any] = field(default=lambda: None, repr=False)
    replicas: tuple[str, ...] = ()


def resolve(
    *,
    client: Any = None,
    base_url: str | None = None,
    api_key: Any = None,
    local_model: bool = False,
    extras: Extras = NO_EXTRAS,
    api: Api = "chat",
) -> Endpoint:
    """Find out where to send and how.

    Parameters
    ----------
    client : openai.AsyncOpenAI, openai.OpenAI or a subclass, optional
        The user's own client.
    base_url, api_key : str, optional
        The pieces of one; else ``OPENAI_BASE_URL`` and ``OPENAI_API_KEY``.
    local_model : bool
        Serve the embedded model and send there.
    extras : Extras
        Headers and query parameters of the call.
    api : {"chat", "responses", "embeddings"}
        Which of the endpoint's APIs is asked.

    Raises
    ------
    ConfigurationError
        No key, a client that is none, or a URL that is none.
    """
    if client is not None:
        if base_url is not None or api_key is not None:
            raise ConfigurationError("client= brings its own URL and key; pass it, or base_url= and api_key=, not both")
        return _of_client(client, extras, PATHS[api])
    if local_model:
        if base_url is not None:
            raise ConfigurationError(
                'model="local" is the embedded model, which has no base_url; leave one of them out'
            )
        from llmframe import local

        served = _of_client(_client(local.serve(embeddings=api == "embeddings"), "local"), extras, PATHS[api])
        return Endpoint(local.identity(), served.url, served.key, served.open)
    if base_url is not None:
        check_url(base_url)
    if api_key == "" or (api_key is None and not os.environ.get("OPENAI_API_KEY")):
        raise ConfigurationError(
            "no API key: set the environment variable OPENAI_API_KEY, or pass api_key= "
            '(any text will do for a server that asks for none); model="local" needs none'
        )
    if api_key is not None and not isinstance(api_key, str) and not callable(api_key):
        raise ConfigurationError(f"api_key= is {kind(api_key)}; it has to be text")
    made = _client(base_url, api_key)
    url, key = str(made.base_url), api_key if callable(api_key) else made.api_key
    return replace(_of_client(made, extras, PATHS[api]), client=lambda: _client(url, key))


def check_url(base_url: Any, name: str = "base_url") -> None:
    """Refuse what is no URL of an endpoint.

    Raises
    ------
    ConfigurationError
        Naming what is wrong with it.
    """
    parts = urlsplit(base_url) if isinstance(base_url, str) else None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(f"{name}={base_url!r} is no URL; write it as in 'http://localhost:8000/v1'")


def is_open(url: str) -> bool:
    """Whether a key on its way to a URL can be read by whoever stands between: no TLS, and a host out of the house.

    Examples
    --------
    >>> is_open("http://api.example.com/v1"), is_open("http://192.168.1.7:8000/v1"), is_open("http://vllm:8000/v1")
    (True, False, False)
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme != "http":
        return False
    try:
        return not ipaddress.ip_address(host).is_private  # a loopback is
    except ValueError:  # a name; one without a dot is of this machine, its containers or its network
        return "." in host and not host.endswith((".local", ".localhost", ".internal", ".lan"))


def _client(base_url: str | None, api_key: Any) -> openai.AsyncOpenAI:
    try:
        return openai.AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    except (ImportError, OSError, ValueError, openai.OpenAIError) as error:  # of the environment, as a rule
        raise ConfigurationError(
            f"the openai client cannot be made: {error}; look at SSL_CERT_FILE, SSL_CERT_DIR and the proxy variables "
            "of the environment"
        ) from error


def _of_client(client: Any, extras: Extras, path: str) -> Endpoint:
    if not isinstance(client, openai.AsyncOpenAI | openai.OpenAI):
        raise ConfigurationError(
            f"client= is of type {type(client).__name__}; it has to be an openai.AsyncOpenAI or openai.OpenAI client"
        )
    base_url = str(client.base_url)
    check_url(base_url, "the client's base_url")
    url = base_url.rstrip("/") + path
    proxy = _proxy(base_url)
    if is_plain(client) and (proxy is None or proxy.startswith(("http://", "https://"))):
        headers = _merged(client.auth_headers, client.default_headers, dict(extras.headers))
        _check_headers(headers)
        query = client.qs.stringify(dict(extras.query))
        target = yarl.URL(f"{url}?{query}" if query else url, encoded=True)
        timeout = _timeout(client)
        return Endpoint(
            identity(base_url),
            url,
            ("aiohttp", target, tuple(sorted(headers.items())), proxy, timeout, *map(os.environ.get, TRUSTED)),
            lambda: AiohttpTransport(target, headers, proxy, timeout),
            client=lambda: client,
        )
    # A client is its own key: another one at the same place in memory must not find this one's connections.
    shown = without_secrets(url)
    if isinstance(client, openai.OpenAI):
        return Endpoint(
            identity(base_url),
            shown,
            ("threads", client, path, repr(extras)),
            lambda: ThreadTransport(client, path, extras),
            client=lambda: client,
        )
    return Endpoint(
        identity(base_url),
        shown,
        ("sdk", client, path, repr(extras)),
        lambda: SdkTransport(client, path, extras),
        bound=not is_default_transport(client),
        client=lambda: client,
    )


def is_plain(client: openai.AsyncOpenAI | openai.OpenAI) -> bool:
    """Whether all there is to a client are its base URL, its headers and its timeout.

    What tells is private to the SDK. Where a version of it names things otherwise, the answer is no, and the
    client is sent through the SDK: slower, and as right.
    """
    if type(client) not in (openai.AsyncOpenAI, openai.OpenAI) or not is_default_transport(client):
        return False
    try:
        return (
            client._api_key_provider is None
            and client._provider_runtime is None
            and client.workload_identity is None
            and not client.default_query
            and not client.base_url.query
            and not client.base_url.userinfo
            and not any(client._client.event_hooks.values())
            and client._client.auth is None
            and not client._client.cookies
            and bool(client.auth_headers)
        )
    except AttributeError:
        return False


def _merged(*mappings: Mapping[str, Any]) -> dict[str, str]:
    """Merge headers as the SDK does: the case of a name means nothing, the later wins, an Omit takes one out."""
    merged: dict[str, tuple[str, Any]] = {}
    for mapping in mappings:
        merged.update({name.lower(): (name, value) for name, value in mapping.items()})
    return {name: str(value) for name, value in merged.values() if not isinstance(value, openai.Omit | None)}


def _check_headers(headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        if not value.isascii() or not value.isprintable():
            likely = "a line break at the end of the key?" if value.isascii() else "a letter that is not ASCII"
            raise ConfigurationError(
                f"the header {name} holds a character that no header may ({likely}); its value is not shown here"
            )


def _timeout(client: openai.AsyncOpenAI | openai.OpenAI) -> aiohttp.ClientTimeout:
    """Give the client's own timeouts, where its owner set any; the engine's come on top."""
    own: Any = client.timeout
    if own == openai.DEFAULT_TIMEOUT:
        return aiohttp.ClientTimeout(total=None, connect=CONNECT_S)
    return aiohttp.ClientTimeout(total=None, connect=getattr(own, "connect", own), sock_read=getattr(own, "read", own))


def _proxy(base_url: str) -> str | None:
    """Give the proxy that the environment names for a URL, by the standard library's reading of it."""
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    if urllib.request.proxy_bypass(host if parts.port is None else f"{host}:{parts.port}"):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def of_default_transport(client: openai.AsyncOpenAI, extras: Extras) -> Any:
    """Give an async client for other requests than a row's, on a transport that is the caller's to close; or None.

    None where its owner gave it a transport of its own.
    """
    if not is_default_transport(client):
        return None
    own = openai.DefaultAsyncHttpxClient(follow_redirects=False)  # a redirect would carry the key along
    return client.with_options(http_client=own, **_client_options(extras))


def with_extras(client: Any, extras: Extras) -> Any:
    """Give a client that sends what a call adds to every request, and that does not retry by itself."""
    return client.with_options(**_client_options(extras))


def _client_options(extras: Extras) -> dict[str, Any]:
    options: dict[str, Any] = {"max_retries": 0}
    if extras.headers:
        options["default_headers"] = {name: str(value) for name, value in extras.headers if value is not None}
    if extras.query:
        options["default_query"] = dict(extras.query)
    return options
