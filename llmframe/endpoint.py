"""Endpoints: from an openai client, or the pieces of one, to bytes in and bytes out.

The openai client stays the owner of the URL, the key and the headers. There are three ways to send, behind one
protocol: aiohttp with the client's public properties, where those are all there is to it; the SDK's own ``post`` for a
client with more to it (Azure, Bedrock, a transport or a refreshing key of the user's own); and the same in threads
for a synchronous one. None of them retries, follows a redirect, or hands on the key that a reply quotes.
"""

from __future__ import annotations

import asyncio
import io
import ipaddress
import os
import sys
import threading
import urllib.request
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol
from urllib.parse import parse_qsl, urlsplit

import aiohttp
import httpx2
import openai
import orjson
import yarl
from aiohttp.abc import AbstractStreamWriter

from llmframe.errors import ConfigurationError, EndpointError
from llmframe.failures import Unreachable
from llmframe.redaction import redacted, secrets_among
from llmframe.requests import PATHS, Api, identity

CONNECT_S = 10.0  # a host that takes no connection for this long is not there
LARGE_BYTES = 1 << 19  # aiohttp writes bytes in one go, and warns of it from 1 MiB on; a file it writes in pieces
KEEPALIVE_S = 30.0  # shorter than the idle limits of common servers and proxies (60 s), so none closes under a request
FILES_SHARE = 0.75  # of the files a process may open, for connections; the rest is for everything else
POOL = 100  # connections of an HTTP client that does not say how many: httpx's own default
HEADER_BYTES = 64 << 10  # of one header of a reply: some gateways' cookies are larger than the 8 KB that aiohttp takes
UNCONNECTED = (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError, aiohttp.ConnectionTimeoutError)
UNCONNECTED_NAMES = frozenset({"ConnectError", "ConnectTimeout", "PoolTimeout", "ProxyError"})  # httpx's and httpx2's
HTTP = frozenset({"aiohttp", "httpx", "httpx2", "httpcore", "httpcore2"})  # libraries that clients send by
AUTOMATIC = ("Accept", "Content-Type", "User-Agent")  # what aiohttp adds by itself where the client's owner took it out


Wrote = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: any status, the headers, the body as bytes.

    Attributes
    ----------
    redact : callable
        Takes the secrets of its request out of words that are told: a failure may quote it.
    url : str
        Who replied, where the endpoint has several URLs.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    redact: Callable[[str], str] = field(default=str, repr=False, compare=False)
    url: str = ""

    @property
    def is_success(self) -> bool:
        """Whether its status is a 2xx."""
        return 200 <= self.status < 300


class Lost(Unreachable):
    """A connection that was made, and lost before the reply was whole: somebody was there."""


class ReplicaDown(Unreachable):
    """One of several replicas gave no reply, and another is up: it can be asked at once.

    Attributes
    ----------
    taken : bool
        Somebody was there when the request was sent.
    """

    def __init__(self, message: str, *, taken: bool) -> None:
        super().__init__("connection", message)
        self.taken = taken


class Transport(Protocol):
    """A way to send: bytes in, a reply out.

    Attributes
    ----------
    most : int
        Requests that it can carry at one time; more would wait inside it, where nobody sees them.
    """

    most: int

    async def send(self, body: bytes, wrote: Wrote | None = None) -> Reply:
        """Send one request.

        Parameters
        ----------
        body : bytes
            Of the request.
        wrote : callable, optional
            Called when it goes onto the wire, or as shortly before as the way can tell.

        Raises
        ------
        Unreachable
            No reply came.
        EndpointError
            The user's own client could not send at all, or no answer can be read.
        """
        ...

    async def close(self) -> None:
        """Let go of the connections."""
        ...


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


@dataclass(frozen=True, slots=True)
class Extras:
    """What a call adds to every request beside the body, as the SDK takes it: ``extra_headers=``, ``extra_query=``."""

    headers: tuple[tuple[str, Any], ...] = ()
    query: tuple[tuple[str, Any], ...] = ()


def resolve(
    *,
    client: Any = None,
    base_url: str | None = None,
    api_key: Any = None,
    local_model: bool = False,
    extras: Extras = Extras(),
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
            ("aiohttp", target, tuple(sorted(headers.items())), proxy, timeout),
            lambda: AiohttpTransport(target, headers, proxy, timeout),
            client=lambda: client,
        )
    # A client is its own key: another one at the same place in memory must not find this one's connections.
    shown = _without_secrets(url)
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
        bound=not _is_default_transport(client),
        client=lambda: client,
    )


def is_plain(client: openai.AsyncOpenAI | openai.OpenAI) -> bool:
    """Whether all there is to a client are its base URL, its headers and its timeout.

    What tells is private to the SDK. Where a version of it names things otherwise, the answer is no, and the
    client is sent through the SDK: slower, and as right.
    """
    if type(client) not in (openai.AsyncOpenAI, openai.OpenAI) or not _is_default_transport(client):
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


def _is_default_transport(client: openai.AsyncOpenAI | openai.OpenAI) -> bool:
    transport = getattr(client, "_client", None)
    return type(transport).__name__ in ("AsyncHttpxClientWrapper", "SyncHttpxClientWrapper")


def _merged(*mappings: Mapping[str, Any]) -> dict[str, str]:
    """Merge headers as the SDK does: the case of a name means nothing, the later wins, an Omit takes one out."""
    merged: dict[str, tuple[str, Any]] = {}
    for mapping in mappings:
        merged.update({name.lower(): (name, value) for name, value in mapping.items()})
    return {name: str(value) for name, value in merged.values() if not isinstance(value, openai.Omit | None)}


def _check_headers(headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        if not value.isascii() or not value.isprintable():
            raise ConfigurationError(
                f"the header {name} holds a character that no header may (a line break at the end of the key?); "
                "its value is not shown here"
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


def _files() -> int:
    """Give the connections that this process may open."""
    if sys.platform == "win32":
        return 2**31
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if limit == resource.RLIM_INFINITY else max(1, int(FILES_SHARE * limit))


class _Watched(aiohttp.BytesPayload):
    """A body that tells when it is written: a connection may have to be made before."""

    def __init__(self, body: bytes, wrote: Wrote) -> None:
        super().__init__(body)
        self._wrote = wrote

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        """Write it."""
        self._wrote()
        await super().write_with_length(writer, content_length)


class AiohttpTransport:
    """Sends bytes over one aiohttp session: the fast way.

    Parameters
    ----------
    url : yarl.URL
        Where to.
    headers : mapping
        With every request.
    proxy : str or None
        An HTTP proxy.
    timeout : aiohttp.ClientTimeout
        For connecting, and the client's own.
    """

    def __init__(
        self, url: yarl.URL, headers: Mapping[str, str], proxy: str | None, timeout: aiohttp.ClientTimeout
    ) -> None:
        self.most = _files()
        self._url = url
        self._proxy = proxy
        self._redact = partial(redacted, secrets=secrets_among((*headers.items(), *url.query.items())))
        given = {name.lower() for name in headers}
        self._session = aiohttp.ClientSession(
            # The window is the limit; a second one here would only hide a queue from it.
            connector=aiohttp.TCPConnector(
                limit=0, ssl=_tls() if url.scheme == "https" else True, keepalive_timeout=KEEPALIVE_S
            ),
            headers=headers,
            # No more than needed: aiohttp copies the headers of every request for it.
            skip_auto_headers=[name for name in AUTOMATIC if name.lower() not in given],
            timeout=timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            max_field_size=HEADER_BYTES,
        )

    async def send(self, body: bytes, wrote: Wrote | None = None) -> Reply:
        """Send one request; see `Transport`."""
        try:
            # A redirect would carry the key along, or turn the POST into a GET; it comes back as the failure it is.
            data: Any = body if len(body) < LARGE_BYTES else io.BytesIO(body)
            if wrote is not None and data is body:
                data = _Watched(body, wrote)
            elif wrote is not None:
                wrote()
            async with self._session.post(self._url, data=data, proxy=self._proxy, allow_redirects=False) as response:
                return Reply(response.status, response.headers, await response.read(), self._redact)
        except aiohttp.ClientConnectorCertificateError as error:
            raise Unreachable("certificate", str(error.certificate_error)) from error
        except aiohttp.SocketTimeoutError as error:
            raise Unreachable("timeout", f"the client's own timeout passed: {error}") from error
        except (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError) as error:
            raise Unreachable("connection", self._words_of(error)) from error
        except aiohttp.ConnectionTimeoutError as error:
            raise Unreachable("connection", "no connection in time") from error
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, aiohttp.ClientResponseError) and "content-encoding" in error.message:
                # Each is paid for, and the next would be no other.
                raise EndpointError(
                    f"the endpoint compresses its answers as nobody asked for: {error.message}; turn that off there, "
                    f"or install what is missing; sent to {_without_secrets(str(self._url))}"
                ) from None  # aiohttp's own quotes the URL, with a key in its query
            raise Lost("connection", self._words_of(error)) from error

    def _words_of(self, error: Exception) -> str:
        return self._redact(str(error) or type(error).__name__)  # some quote the URL, with a key in its query

    async def close(self) -> None:
        """Close the session."""
        await self._session.close()


def _tls() -> Any:
    # The SDK's own context: the system's store, and SSL_CERT_FILE and SSL_CERT_DIR where they are set.
    return httpx2.create_ssl_context()


class SdkTransport:
    """Sends through the SDK's door for custom requests, so that all the client is configured with holds.

    Parameters
    ----------
    client : openai.AsyncOpenAI
        Any client; one without a transport of its own is given the SDK's aiohttp one.
    path : str
        Of the API, under the client's base URL.
    extras : Extras
        Headers and query parameters of the call.
    """

    def __init__(self, client: openai.AsyncOpenAI, path: str, extras: Extras) -> None:
        self._own: httpx2.AsyncClient | None = None
        if _is_default_transport(client):
            self._own = openai.DefaultAioHttpClient(limits=httpx2.Limits(max_connections=None))
            client = client.with_options(http_client=self._own)
        self.most = _files() if self._own is not None else _pool(client)
        self._client = client
        self._path = path
        self._options = _request_options(extras)
        self._redact = partial(redacted_of, client, extras)

    async def send(self, body: bytes, wrote: Wrote | None = None) -> Reply:
        """Send one request; see `Transport`."""
        # As a dict: Azure reads the deployment from it, and Bedrock signs what it makes of it.
        payload = orjson.loads(body)
        post = self._client.post
        if wrote is not None:
            wrote()
        try:
            return _reply(await post(self._path, cast_to=httpx2.Response, body=payload, options=self._options))
        except Exception as error:
            return _reply_of(error, self._redact)

    async def close(self) -> None:
        """Close the transport, if it is ours."""
        if self._own is not None:
            await self._own.aclose()


class ThreadTransport:
    """Sends through a synchronous client, a thread for each request in flight.

    The threads are daemons: a request that hangs, and cannot be called back, must not keep the process.

    Parameters
    ----------
    client : openai.OpenAI
        A client that is more than its properties.
    path : str
        Of the API, under the client's base URL.
    extras : Extras
        Headers and query parameters of the call.
    """

    def __init__(self, client: openai.OpenAI, path: str, extras: Extras) -> None:
        self.most = _pool(client)
        self._client = client
        self._path = path
        self._options = _request_options(extras)
        self._redact = partial(redacted_of, client, extras)

    async def send(self, body: bytes, wrote: Wrote | None = None) -> Reply:
        """Send one request; see `Transport`."""
        if wrote is not None:
            wrote()
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Reply] = loop.create_future()

        def settle(reply: Reply | None, error: BaseException | None) -> None:
            if outcome.done():  # given up meanwhile
                return
            if reply is not None:
                outcome.set_result(reply)
            elif error is not None:
                outcome.set_exception(error)

        def work() -> None:
            reply: Reply | None = None
            problem: BaseException | None = None
            try:
                reply = self._send(body)
            except BaseException as error:
                problem = error
            with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
                loop.call_soon_threadsafe(settle, reply, problem)

        threading.Thread(target=work, name="llmframe-send", daemon=True).start()
        return await outcome

    def _send(self, body: bytes) -> Reply:
        payload = orjson.loads(body)
        try:
            return _reply(self._client.post(self._path, cast_to=httpx2.Response, body=payload, options=self._options))
        except Exception as error:
            return _reply_of(error, self._redact)

    async def close(self) -> None:
        """Leave the client as it is: it is the user's."""


def _request_options(extras: Extras) -> Any:
    options: dict[str, Any] = {"max_retries": 0, "follow_redirects": False}
    if extras.headers:
        options["headers"] = {
            name: value if isinstance(value, openai.Omit) else str(value)
            for name, value in extras.headers
            if value is not None
        }
    if extras.query:
        options["params"] = dict(extras.query)
    return options


def _pool(client: openai.AsyncOpenAI | openai.OpenAI) -> int:
    """Give the connections that a client's transport opens at most."""
    transport: Any = client._client
    try:
        most = transport._transport._pool._max_connections
    except AttributeError:
        most = POOL
    return min(most, _files()) if isinstance(most, int) and most > 0 else POOL


def of_default_transport(client: openai.AsyncOpenAI, extras: Extras) -> Any:
    """Give an async client for other requests than a row's, on a transport that is the caller's to close; or None.

    None where its owner gave it a transport of its own.
    """
    if not _is_default_transport(client):
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


def redacts(request: Any) -> Callable[[str], str]:
    """Give what takes the secrets of a request that was sent out of words; a refreshed key is known only from there."""
    headers = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw)
    return partial(redacted, secrets=secrets_among((*headers, *parse_qsl(request.url.query.decode("latin-1")))))


def redacted_of(client: openai.AsyncOpenAI | openai.OpenAI, extras: Extras, words: str) -> str:
    """Give words without a client's own secrets, for an error that does not say what was sent."""
    pairs = (*client.default_headers.items(), *client.default_query.items(), *extras.headers, *extras.query)
    known = [*((name, str(value)) for name, value in pairs), ("key", str(client.api_key))]
    return redacted(words, secrets_among(known))


def _reply(response: Any) -> Reply:
    return Reply(
        response.status_code,
        response.headers,
        response.content,
        lambda words: redacts(response.request)(words),  # when it is needed: most replies are answers
    )


def _reply_of(error: Exception, redact: Callable[[str], str]) -> Reply:
    """Read what the SDK raised: a reply of another status, no reply, or a fault of the user's own client."""
    if isinstance(error, openai.APIStatusError):
        return _reply(error.response)
    if isinstance(error, openai.APIConnectionError):
        redact = redacts(error.request)
    elif not is_of_http(error) or type(error).__name__ in ("HTTPStatusError", "InvalidURL"):  # a key provider's
        words = redact(f"{type(error).__name__}: {error}")
        raise EndpointError(f"the client could not send the request: {words}; mend client=") from error
    cause = cause_of(error)
    words = redact(str(cause) or type(cause).__name__)
    if "certificate" in words.lower():
        raise Unreachable("certificate", words) from error
    if nobody_took(cause):
        raise Unreachable("connection", words) from error
    if "Timeout" in type(cause).__name__:
        raise Unreachable("timeout", f"the client's own timeout passed: {words}") from error
    raise Lost("connection", words) from error


def is_of_http(error: Exception) -> bool:
    """Whether an error is an HTTP library's own: the SDK hands on some of them as they are."""
    return type(error).__module__.partition(".")[0] in HTTP


def cause_of(error: Exception) -> BaseException:
    """Give what became of a request that got no reply.

    The SDK's aiohttp transport calls a lost connection a ConnectTimeout; aiohttp's own error is the cause of that.
    """
    cause = error if is_of_http(error) else error.__cause__ or error
    return cause.__cause__ if isinstance(cause.__cause__, aiohttp.ClientError) else cause


def nobody_took(cause: BaseException) -> bool:
    """Whether a request failed before there was a connection that could take it."""
    return isinstance(cause, UNCONNECTED) or type(cause).__name__ in UNCONNECTED_NAMES


def _without_secrets(url: str) -> str:
    """Give a URL without its user, password and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
