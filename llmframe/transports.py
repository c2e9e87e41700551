"""Transports: three ways to send, behind one protocol, bytes in and a reply out.

aiohttp with a client's public properties, where those are all there is to it; the SDK's own ``post`` for a client with
more to it (Azure, Bedrock, a transport or a refreshing key of the user's own); and the same in threads for a
synchronous one. None of them retries, or follows a redirect.
"""

from __future__ import annotations

import asyncio
import io
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from urllib.parse import parse_qsl

import aiohttp
import httpx2
import openai
import orjson
import yarl
from aiohttp.abc import AbstractStreamWriter

from llmframe.errors import EndpointError
from llmframe.failures import Unreachable
from llmframe.redaction import redacted, secrets_among, without_secrets

LARGE_BYTES = 1 << 19  # aiohttp writes bytes in one go, and warns of it from 1 MiB on; a file it writes in pieces
KEEPALIVE_S = 4.0
"""Idle connections are closed after it: uvicorn and node close theirs after 5 s, and what is sent just then is lost.

And where a server takes so many connections and no more (waitress 100, haproxy's maxconn), one that lies idle keeps a
request that is in flight from being taken.
"""
FILES_SHARE = 0.75  # of the files a process may still open, for connections; the rest is for everything else
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
    """One of several replicas gave no answer, and another is up: it can be asked at once.

    Attributes
    ----------
    taken : bool
        Somebody was there when the request was sent, and may have worked on it.
    status : int or None
        Of a reply that no healthy replica would give, unless it is for the row's own sake.
    """

    def __init__(self, message: str, *, taken: bool, status: int | None = None) -> None:
        super().__init__("connection", message)
        self.taken = taken
        self.status = status


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

    def make_room(self, more: int, *, at_most: int) -> None:
        """Close so many more connections, in all no more than `at_most`: idle ones now, others after a reply.

        A server that takes no more connections then takes one that waits. A client that keeps its own is left alone.
        """
        ...

    async def close(self) -> None:
        """Let go of the connections."""
        ...


@dataclass(frozen=True, slots=True)
class Extras:
    """What a call adds to every request beside the body, as the SDK takes it: ``extra_headers=``, ``extra_query=``."""

    headers: tuple[tuple[str, Any], ...] = ()
    query: tuple[tuple[str, Any], ...] = ()


NO_EXTRAS = Extras()


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
        self._to_close = 0  # connections

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
                reply = Reply(response.status, response.headers, await response.read(), self._redact)
            if self._to_close:
                self._close_idle()
            return reply
        except aiohttp.ClientConnectorCertificateError as error:
            raise Unreachable("certificate", str(error.certificate_error)) from error
        except aiohttp.SocketTimeoutError as error:
            raise Unreachable("timeout", f"the client's own timeout passed: {error}") from error
        except (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError) as error:
            raise Unreachable("connection", self._words_of(error)) from error
        except aiohttp.ConnectionTimeoutError as error:
            raise Unreachable("connection", "no connection in time") from error
        except (aiohttp.ClientError, OSError) as error:
            if (words := _undecodable(error)) is not None:
                # Each is paid for, and the next would be no other.
                raise EndpointError(
                    f"the endpoint compresses its answers as nobody asked for: {words}; turn that off there, "
                    f"or install what is missing; sent to {without_secrets(str(self._url))}"
                ) from None  # aiohttp's own quotes the URL, with a key in its query
            raise Lost("connection", self._words_of(error)) from error

    def make_room(self, more: int, *, at_most: int) -> None:
        """Close connections; see `Transport`."""
        self._to_close = min(self._to_close + more, at_most)
        self._close_idle()

    def _close_idle(self) -> None:
        # aiohttp has nothing public for it; where it keeps them elsewhere, they are closed after KEEPALIVE_S.
        for kept in getattr(self._session.connector, "_conns", {}).values():
            for connection, _ in kept:
                if self._to_close and connection.is_connected():
                    self._to_close -= 1
                    connection.close()

    def _words_of(self, error: Exception) -> str:
        return self._redact(str(error) or type(error).__name__)  # some quote the URL, with a key in its query

    async def close(self) -> None:
        """Close the session."""
        await self._session.close()


def _undecodable(error: BaseException) -> str | None:
    """Give the words for a compression that cannot be read: unknown from its head, or wrong once the body comes."""
    cause = error.__cause__ if isinstance(error, aiohttp.ClientPayloadError) else error
    words = str(getattr(cause, "message", ""))
    return " ".join(words.split()) if "content-encoding" in words else None


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
        if is_default_transport(client):
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

    def make_room(self, more: int, *, at_most: int) -> None:
        """Leave the connections to the client; see `Transport`."""

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

    def make_room(self, more: int, *, at_most: int) -> None:
        """Leave the connections to the client; see `Transport`."""

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


def is_default_transport(client: openai.AsyncOpenAI | openai.OpenAI) -> bool:
    """Whether a client has the transport that the SDK gives where its owner gives none."""
    transport = getattr(client, "_client", None)
    return type(transport).__name__ in ("AsyncHttpxClientWrapper", "SyncHttpxClientWrapper")


def _pool(client: openai.AsyncOpenAI | openai.OpenAI) -> int:
    """Give the connections that a client's transport opens at most."""
    transport: Any = client._client
    try:
        most = transport._transport._pool._max_connections
    except AttributeError:
        most = POOL
    return min(most, _files()) if isinstance(most, int) and most > 0 else POOL


def _files() -> int:
    """Give the connections that this process may open, beside the files that it has open already."""
    if sys.platform == "win32":
        return 2**31
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        opened = len(os.listdir("/dev/fd"))
    except OSError:
        opened = 0
    return 2**31 if limit == resource.RLIM_INFINITY else max(1, int(FILES_SHARE * (limit - opened)))


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


def redacts(request: Any) -> Callable[[str], str]:
    """Give what takes the secrets of a request that was sent out of words; a refreshed key is known only from there."""
    headers = ((name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers.raw)
    return partial(redacted, secrets=secrets_among((*headers, *parse_qsl(request.url.query.decode("latin-1")))))


def redacted_of(client: openai.AsyncOpenAI | openai.OpenAI, extras: Extras, words: str) -> str:
    """Give words without a client's own secrets, for an error that does not say what was sent."""
    pairs = (*client.default_headers.items(), *client.default_query.items(), *extras.headers, *extras.query)
    known = [*((name, str(value)) for name, value in pairs), ("key", str(client.api_key))]
    return redacted(words, secrets_among(known))
