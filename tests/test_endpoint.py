"""Every client sends what its owner configured, by what the server received; and none gives away its key."""

from __future__ import annotations

import asyncio
import os
import ssl
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import openai
import orjson
import pytest

from llmframe.endpoint import Endpoint, is_plain, resolve
from llmframe.errors import ConfigurationError, EndpointError
from llmframe.failures import Unreachable
from llmframe.lines import close_lines, give_back, line_to
from llmframe.pacing import Caps
from llmframe.transports import AiohttpTransport, Extras, Lost, Reply, SdkTransport, ThreadTransport, Transport
from tests.server import ReceivedRequest, SimulatedServer

KEY = "sk-a-key-of-no-worth"
NO_EXTRAS = Extras()


def body_of(text: str = "Hello", **more: Any) -> bytes:
    return orjson.dumps({"model": "m", "messages": [{"role": "user", "content": text}], **more})


def send_to(endpoint: Endpoint, *bodies: bytes, client: Any = None) -> tuple[type[Transport], list[Reply]]:
    """Send one after the other over one transport; give its class and the replies."""

    async def main() -> tuple[type[Transport], list[Reply]]:
        transport = endpoint.open()
        try:
            return type(transport), [await transport.send(body) for body in bodies or (body_of(),)]
        finally:
            await transport.close()
            if isinstance(client, openai.AsyncOpenAI):
                await client.close()
            elif client is not None:
                client.close()

    return asyncio.run(main())


def send(client: Any, *bodies: bytes, extras: Extras = NO_EXTRAS) -> tuple[type[Transport], list[Reply]]:
    """Send by a user's own client, which is closed at the end."""
    return send_to(resolve(client=client, extras=extras), *bodies, client=client)


def sent_by(
    server: SimulatedServer, client: Any, extras: Extras = NO_EXTRAS
) -> tuple[type[Transport], ReceivedRequest]:
    """Send one request by a client; give the transport that was chosen, and what the server received."""
    transport, replies = send(client, extras=extras)
    assert [reply.status for reply in replies] == [200]
    (request,) = server.requests()
    return transport, request


# ---- a plain client takes the fast way


@pytest.mark.parametrize("kind", [openai.AsyncOpenAI, openai.OpenAI])
def test_a_plain_client_takes_the_fast_way_on_this_version_of_the_sdk(kind: Any) -> None:
    assert is_plain(kind(api_key=KEY, base_url="http://127.0.0.1:9/v1"))


@pytest.mark.parametrize("kind", [openai.AsyncOpenAI, openai.OpenAI])
def test_a_plain_clients_url_key_and_headers_arrive(server: SimulatedServer, kind: Any) -> None:
    client = kind(
        api_key=KEY, base_url=server.base_url, organization="org-a", project="proj-b", default_headers={"X-Team": "c"}
    )
    transport, request = sent_by(server, client)
    assert transport is AiohttpTransport
    assert (request.method, request.target) == ("POST", "/v1/chat/completions")
    sent = request.headers
    assert sent["authorization"] == f"Bearer {KEY}"
    assert (sent["openai-organization"], sent["openai-project"], sent["x-team"]) == ("org-a", "proj-b", "c")
    assert sent["content-type"] == "application/json"
    assert sent["user-agent"] == client.default_headers["User-Agent"]
    assert request.body == orjson.loads(body_of())


def test_the_fast_way_sends_the_headers_that_the_sdk_would(server: SimulatedServer) -> None:
    client = openai.AsyncOpenAI(api_key=KEY, base_url=server.base_url, default_headers={"x-team": "c"})
    _, fast = sent_by(server, client)
    server.reset()
    _, slow = sent_by(server, client.with_options(http_client=openai.DefaultAsyncHttpxClient()))
    of_the_transport = {"accept-encoding", "connection", "host", "content-length"}
    of_the_sdks_retries = {"x-stainless-retry-count", "x-stainless-read-timeout"}
    assert {**fast.headers, "x-stainless-async": ""}.keys() - of_the_transport == (
        slow.headers.keys() - of_the_transport - of_the_sdks_retries
    )


def test_the_environments_url_and_key_arrive(server: SimulatedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-a")
    _, [reply] = send_to(resolve())
    (request,) = server.requests()
    assert reply.status == 200
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["openai-organization"] == "org-a"


@pytest.mark.parametrize("kind", [openai.AsyncOpenAI, openai.OpenAI])
@pytest.mark.parametrize("name", ["User-Agent", "user-agent", "Accept"])
def test_a_header_that_the_owner_took_out_is_not_sent(server: SimulatedServer, kind: Any, name: str) -> None:
    client = kind(api_key=KEY, base_url=server.base_url, default_headers={name: openai.Omit()})
    transport, request = sent_by(server, client)
    assert transport is AiohttpTransport
    assert name.lower() not in request.headers


def test_a_default_header_replaces_the_sdks_own_in_any_case(server: SimulatedServer) -> None:
    client = openai.AsyncOpenAI(
        api_key=KEY, base_url=server.base_url, default_headers={"authorization": "Bearer other", "USER-AGENT": "me"}
    )
    _, request = sent_by(server, client)
    assert request.headers["authorization"] == "Bearer other"
    assert request.headers["user-agent"] == "me"


def test_with_options_is_honoured_on_the_fast_way(server: SimulatedServer) -> None:
    client = openai.AsyncOpenAI(api_key="sk-another", base_url="http://127.0.0.1:9/v1")
    changed = client.with_options(api_key=KEY, base_url=server.base_url, default_headers={"X-Team": "c"})
    transport, request = sent_by(server, changed)
    assert transport is AiohttpTransport
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["x-team"] == "c"


CLIENTS = {
    "plain": lambda url: openai.AsyncOpenAI(api_key=KEY, base_url=url),
    "own http_client": lambda url: openai.AsyncOpenAI(api_key=KEY, base_url=url, http_client=httpx2.AsyncClient()),
    "sync, own http_client": lambda url: openai.OpenAI(api_key=KEY, base_url=url, http_client=httpx2.Client()),
}
OF_THE_SDK = {
    "query": lambda url: openai.AsyncOpenAI(api_key=KEY, base_url=url, default_query={"a": "b"}),
    "own aiohttp": lambda url: openai.AsyncOpenAI(api_key=KEY, base_url=url, http_client=openai.DefaultAioHttpClient()),
}  # which carry the SDK's requests over its aiohttp transport
WAYS = {"plain": AiohttpTransport, "own http_client": SdkTransport, "sync, own http_client": ThreadTransport}


@pytest.fixture(params=CLIENTS)
def way(request: pytest.FixtureRequest) -> str:
    """Each of the three ways to send."""
    return str(request.param)


def test_each_kind_of_client_takes_its_way(server: SimulatedServer, way: str) -> None:
    transport, request = sent_by(server, CLIENTS[way](server.base_url))
    assert transport is WAYS[way]
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.body == orjson.loads(body_of())


def test_extra_headers_and_query_arrive_on_every_way(server: SimulatedServer, way: str) -> None:
    extras = Extras((("X-Trace", "42"), ("user-agent", "me")), (("tier", "batch"), ("q", "a b&c")))
    _, request = sent_by(server, CLIENTS[way](server.base_url), extras)
    assert request.headers["x-trace"] == "42"
    assert request.headers["user-agent"] == "me"
    path, _, query = request.target.partition("?")
    assert path == "/v1/chat/completions"
    assert httpx2.QueryParams(query) == httpx2.QueryParams({"tier": "batch", "q": "a b&c"})


def test_extras_mean_on_every_way_what_they_mean_to_the_sdk(server: SimulatedServer, way: str) -> None:
    headers = (("X-Stainless-Lang", openai.Omit()), ("X-None", None), ("X-Number", 5))
    extras = Extras(headers, (("a", [1, 2]), ("b", True), ("c", None)))
    _, request = sent_by(server, CLIENTS[way](server.base_url), extras)
    assert not {"x-stainless-lang", "x-none"} & request.headers.keys()
    assert request.headers["x-number"] == "5"
    query = httpx2.QueryParams(request.target.partition("?")[2])
    assert query.multi_items() == [("a[]", "1"), ("a[]", "2"), ("b", "true")]


def test_no_way_tries_again_by_itself(server: SimulatedServer, way: str) -> None:
    server.reset(status_all=500)
    client = CLIENTS[way](server.base_url).with_options(max_retries=5)
    _, [reply] = send(client)
    assert reply.status == 500
    assert server.stats().received == 1


def test_a_reply_of_any_status_comes_back_whole(server: SimulatedServer, way: str) -> None:
    _, replies = send(
        CLIENTS[way](server.base_url),
        *(body_of(f"[[status={status}]]") for status in (400, 404, 429, 503)),
    )
    assert [reply.status for reply in replies] == [400, 404, 429, 503]
    assert all("error" in orjson.loads(reply.body) for reply in replies)
    assert all(reply.headers.get("x-request-id") for reply in replies)


def test_a_reply_may_have_a_long_header(server: SimulatedServer) -> None:
    server.configure(status_all=400, error_headers={"x-of-a-gateway": "a" * 20_000})
    _, (reply,) = send(openai.AsyncOpenAI(base_url=server.base_url, api_key=KEY))
    assert reply.status == 400


def test_a_redirect_to_another_host_is_not_followed(server: SimulatedServer, way: str) -> None:
    elsewhere = f"http://localhost:{server.port}/v1/chat/completions"
    server.reset(error_headers={"location": elsewhere})
    client = CLIENTS[way](server.base_url)
    if way == "own http_client":
        client = client.with_options(http_client=httpx2.AsyncClient(follow_redirects=True))
    _, replies = send(client, *(body_of(f"[[status={status}]]") for status in (302, 307, 308)))
    assert [reply.status for reply in replies] == [302, 307, 308]
    assert {request.headers["host"] for request in server.requests()} == {f"127.0.0.1:{server.port}"}


@pytest.mark.parametrize("way", [*CLIENTS, *OF_THE_SDK])
def test_a_clients_own_timeout_holds(server: SimulatedServer, way: str) -> None:
    client = (CLIENTS | OF_THE_SDK)[way](server.base_url).with_options(timeout=0.2)
    with pytest.raises(Unreachable) as caught:
        send(client, body_of("[[hang_first=9]]"))
    assert caught.value.kind == "timeout"


def test_a_reply_takes_the_secrets_of_its_request_out_of_the_words_that_quote_them(
    server: SimulatedServer, way: str
) -> None:
    extras = Extras((("X-Api-Key", "another-secret"), ("X-Team", "anthropic")), (("api_key", "abc/d+efgh"),))
    _, (reply,) = send(CLIENTS[way](server.base_url), extras=extras)
    assert reply.redact(f"{KEY} another-secret anthropic ?api_key=abc%2Fd%2Befgh") == "*** *** anthropic ?api_key=***"
    assert KEY not in repr(reply)


def test_an_answer_comes_back_as_it_was_said(server: SimulatedServer, way: str) -> None:
    extras = Extras((("X-Portkey-Provider", "anthropic"), ("X-Api-Key", "not-needed")))
    said = "Of anthropic, a key is not-needed."
    _, (reply,) = send(CLIENTS[way](server.base_url), body_of(f"[[say={said}]]"), extras=extras)
    assert orjson.loads(reply.body)["choices"][0]["message"]["content"] == said


async def send_and_close(client: Any, extras: Extras = NO_EXTRAS) -> Reply:
    """Send one request, and close the transport and the client."""
    transport = resolve(client=client, extras=extras).open()
    try:
        return await transport.send(body_of())
    finally:
        await transport.close()
        if isinstance(client, openai.AsyncOpenAI):
            await client.close()
        else:
            client.close()


async def answer_raw(way: str, answer: bytes, extras: Extras = NO_EXTRAS) -> Reply:
    """Send one request to a server that gives these bytes for an answer, and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
        writer.write(answer)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        client = (CLIENTS | OF_THE_SDK)[way](f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        return await send_and_close(client, extras)


@pytest.mark.parametrize("way", [*CLIENTS, *OF_THE_SDK])
def test_a_refused_connection_is_told_from_a_lost_one(server: SimulatedServer, way: str) -> None:
    with pytest.raises(Unreachable) as refused:
        send((CLIENTS | OF_THE_SDK)[way]("http://127.0.0.1:9/v1"))
    assert not isinstance(refused.value, Lost)
    assert refused.value.kind == "connection"
    for fault in ("reset", "truncated_body"):
        server.reset(**{f"p_{fault}": 1.0})
        with pytest.raises(Lost):
            send((CLIENTS | OF_THE_SDK)[way](server.base_url))


@pytest.mark.parametrize("way", [*CLIENTS, *OF_THE_SDK])
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"NOT HTTP AT ALL\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ncontent-length: 20\r\n\r\n{",
    ],
    ids=["closed", "no HTTP", "two lengths", "cut"],
)
def test_a_reply_that_is_none_is_a_connection_lost_and_no_fault_of_the_clients(way: str, answer: bytes) -> None:
    with pytest.raises(Lost):
        asyncio.run(answer_raw(way, answer))


@pytest.mark.skipif(any(map(find_spec, ("brotli", "brotlicffi"))), reason="it can be read here")
def test_an_answer_in_a_coding_that_cannot_be_read_ends_the_run_at_the_first() -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-encoding: br\r\ncontent-length: 2\r\n\r\n{}"
    extras = Extras((), (("key", "abc/d+efgh"),))
    with pytest.raises(EndpointError, match=r"compresses its answers as nobody asked for.*Brotli.*; sent to") as caught:
        asyncio.run(answer_raw("plain", answer, extras))
    assert "efgh" not in "".join(traceback.format_exception(caught.value))


def test_an_answer_that_is_not_compressed_as_its_head_says_ends_the_run_at_the_first() -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}"
    with pytest.raises(EndpointError, match=r"compresses its answers as nobody asked for: .*gzip; .*; sent to"):
        asyncio.run(answer_raw("plain", answer))


def test_what_a_transport_says_of_a_failure_holds_no_key_of_the_url() -> None:
    extras = Extras((), (("api_key", "abc/d+efgh"),))
    with pytest.raises(Unreachable) as caught:  # aiohttp quotes the URL
        asyncio.run(answer_raw("plain", b"NOT HTTP AT ALL\r\n\r\n", extras))
    assert "api_key=***" in caught.value.message


def test_an_endpoints_repr_shows_no_key(way: str) -> None:
    assert KEY not in repr(resolve(client=CLIENTS[way]("http://127.0.0.1:9/v1")))


def test_endpoints_share_a_line_only_where_all_that_is_sent_is_the_same() -> None:
    url = "http://127.0.0.1:9/v1"

    def key(**client: Any) -> object:
        return resolve(client=openai.AsyncOpenAI(**{"api_key": KEY, "base_url": url, **client})).key

    assert key() == key()
    different = [
        key(),
        key(api_key="sk-other"),
        key(base_url=url + "/x"),
        key(default_headers={"a": "b"}),
        key(timeout=3),
    ]
    assert len(set(different)) == len(different)
    own = [openai.AsyncOpenAI(api_key=KEY, base_url=url, http_client=httpx2.AsyncClient()) for _ in range(2)]
    assert resolve(client=own[0]).key == resolve(client=own[0]).key != resolve(client=own[1]).key


# ---- clients with more to them


def test_an_async_key_provider_is_asked_for_every_request(server: SimulatedServer) -> None:
    keys = iter(["sk-first-key", "sk-second-key"])

    async def next_key() -> str:
        return next(keys)

    client = openai.AsyncOpenAI(api_key=next_key, base_url=server.base_url)
    transport, _ = send(client, body_of("a"), body_of("b"))
    assert transport is SdkTransport
    sent = [request.headers["authorization"] for request in server.requests()]
    assert sent == ["Bearer sk-first-key", "Bearer sk-second-key"]


def test_a_sync_key_provider_is_asked_for_every_request(server: SimulatedServer) -> None:
    keys = iter(["sk-first-key", "sk-second-key"])
    client = openai.OpenAI(api_key=lambda: next(keys), base_url=server.base_url)
    transport, _ = send(client, body_of("a"), body_of("b"))
    assert transport is ThreadTransport
    sent = [request.headers["authorization"] for request in server.requests()]
    assert sent == ["Bearer sk-first-key", "Bearer sk-second-key"]


def test_a_refreshed_key_that_the_server_quotes_is_not_shown(server: SimulatedServer) -> None:
    server.reset(valid_models=["another"])

    async def fresh() -> str:
        return KEY

    client = openai.AsyncOpenAI(api_key=fresh, base_url=server.base_url)
    _, [reply] = send(client, orjson.dumps({"model": KEY, "messages": [{"role": "user", "content": "a"}]}))
    assert reply.status == 404
    assert KEY not in reply.redact(reply.body.decode())


@pytest.mark.parametrize("kind", [openai.AsyncOpenAI, openai.OpenAI])
def test_a_key_provider_that_fails_is_an_error_of_the_endpoint(kind: Any) -> None:
    def broken() -> str:
        raise OSError("the vault is closed")

    async def broken_too() -> str:
        return broken()

    client = kind(api_key=broken if kind is openai.OpenAI else broken_too, base_url="http://127.0.0.1:9/v1")
    with pytest.raises(EndpointError, match=r"OSError: the vault is closed; mend client="):
        send(client)


def test_what_a_key_provider_was_told_of_its_own_key_is_an_error_of_the_endpoint(server: SimulatedServer) -> None:
    server.reset(status_all=403)

    def broken() -> str:
        httpx2.get(server.base_url).raise_for_status()
        raise AssertionError

    with pytest.raises(EndpointError, match=r"(?s)HTTPStatusError: .*403.*; mend client="):
        send(openai.OpenAI(api_key=broken, base_url="http://127.0.0.1:9/v1"))


def test_what_is_said_of_a_client_that_cannot_send_holds_none_of_its_keys() -> None:
    def broken() -> str:
        raise OSError(f"no token for {KEY} another-secret abc%2Fd%2Befgh")

    client = openai.OpenAI(api_key=broken, base_url="http://127.0.0.1:9/v1", default_headers={"x-api-key": KEY})
    extras = Extras((("x-token", "another-secret"),), (("key", "abc/d+efgh"),))
    with pytest.raises(EndpointError, match=r"no token for \*\*\* \*\*\* \*\*\*; mend"):
        send(client, extras=extras)


def test_azure_sends_to_the_deployment_with_its_key(server: SimulatedServer) -> None:
    client = openai.AsyncAzureOpenAI(
        azure_endpoint=f"http://127.0.0.1:{server.port}", api_key=KEY, api_version="2024-10-21"
    )
    transport, request = sent_by(server, client)
    assert transport is SdkTransport
    assert request.target == "/openai/deployments/m/chat/completions?api-version=2024-10-21"
    assert request.headers["api-key"] == KEY


def test_azure_sends_its_directory_token(server: SimulatedServer) -> None:
    async def token() -> str:
        return "a-directory-token"

    client = openai.AsyncAzureOpenAI(
        azure_endpoint=f"http://127.0.0.1:{server.port}", azure_ad_token_provider=token, api_version="2024-10-21"
    )
    _, request = sent_by(server, client)
    assert request.headers["authorization"] == "Bearer a-directory-token"


def test_a_sync_azure_client_sends_to_the_deployment(server: SimulatedServer) -> None:
    client = openai.AzureOpenAI(azure_endpoint=f"http://127.0.0.1:{server.port}", api_key=KEY, api_version="2024-10-21")
    transport, request = sent_by(server, client)
    assert transport is ThreadTransport
    assert request.target.startswith("/openai/deployments/m/chat/completions")


def test_an_own_transports_hooks_headers_and_auth_hold(server: SimulatedServer) -> None:
    seen: list[int] = []

    async def stamp(request: httpx2.Request) -> None:
        request.headers["x-stamped"] = "yes"

    async def watch(response: httpx2.Response) -> None:
        seen.append(response.status_code)

    own = httpx2.AsyncClient(
        event_hooks={"request": [stamp], "response": [watch]},
        headers={"x-own": "1"},
        auth=httpx2.BasicAuth("user", "password-of-no-worth"),
    )
    transport, request = sent_by(server, openai.AsyncOpenAI(api_key=KEY, base_url=server.base_url, http_client=own))
    assert transport is SdkTransport
    assert request.headers["x-stamped"] == "yes"
    assert request.headers["x-own"] == "1"
    assert request.headers["authorization"].startswith("Basic ")
    assert seen == [200]


def test_an_own_sync_transports_hooks_hold(server: SimulatedServer) -> None:
    def stamp(request: httpx2.Request) -> None:
        request.headers["x-stamped"] = "yes"

    own = httpx2.Client(event_hooks={"request": [stamp]})
    _, request = sent_by(server, openai.OpenAI(api_key=KEY, base_url=server.base_url, http_client=own))
    assert request.headers["x-stamped"] == "yes"


def test_hooks_added_to_a_plain_clients_transport_hold(server: SimulatedServer) -> None:
    seen: list[str] = []

    async def watch(request: httpx2.Request) -> None:
        seen.append(str(request.url))

    client = openai.AsyncOpenAI(api_key=KEY, base_url=server.base_url)
    client._client.event_hooks["request"].append(watch)
    assert not is_plain(client)


def test_default_query_arrives(server: SimulatedServer) -> None:
    client = openai.AsyncOpenAI(api_key=KEY, base_url=server.base_url, default_query={"api-version": "1"})
    _, request = sent_by(server, client)
    assert request.target == "/v1/chat/completions?api-version=1"


def test_a_subclass_may_do_anything_and_is_sent_through_the_sdk(server: SimulatedServer) -> None:
    class Signed(openai.AsyncOpenAI):
        async def _prepare_request(self, request: httpx2.Request) -> None:
            request.headers["x-signature"] = str(len(request.content))

    transport, request = sent_by(server, Signed(api_key=KEY, base_url=server.base_url))
    assert transport is SdkTransport
    assert request.headers["x-signature"] == request.headers["content-length"]


def test_a_users_own_transport_is_left_open(server: SimulatedServer, way: str) -> None:
    async def main() -> None:
        client = CLIENTS[way](server.base_url)
        transport = resolve(client=client).open()
        await transport.send(body_of())
        await transport.close()
        assert not client.is_closed()
        closed = client.close()
        if closed is not None:
            await closed

    asyncio.run(main())


@pytest.mark.parametrize(
    "client",
    [
        openai.AsyncOpenAI(api_key=KEY, http_client=httpx2.AsyncClient(limits=httpx2.Limits(max_connections=7))),
        openai.OpenAI(api_key=KEY, http_client=httpx2.Client(limits=httpx2.Limits(max_connections=7))),
    ],
)
def test_no_more_is_sent_at_once_than_the_users_own_pool_takes(client: Any) -> None:
    assert resolve(client=client).open().most == 7


def test_no_more_is_sent_at_once_than_the_process_may_still_open_files() -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def most() -> int:
        opened = len(os.listdir("/dev/fd"))  # the directory itself among them
        resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 400, hard))
        try:
            transport = resolve(api_key=KEY).open()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await transport.close()
        return transport.most

    assert asyncio.run(most()) == 300


# ---- proxies and certificates


@pytest.fixture
def proxied(server: SimulatedServer, monkeypatch: pytest.MonkeyPatch) -> SimulatedServer:
    """The simulated server as the proxy that the environment names."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.port}")
    return server


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:{port}", "127.0.0.1:{port}"])
def test_the_environments_proxy_is_used(proxied: SimulatedServer, monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy.format(port=proxied.port))
    monkeypatch.setenv("http_proxy", proxy.format(port=proxied.port))
    transport, [reply] = send_to(resolve(base_url="http://far-away.invalid/v1", api_key=KEY))
    assert transport is AiohttpTransport
    assert reply.status == 200
    (request,) = proxied.requests()
    assert request.target == "http://far-away.invalid/v1/chat/completions"
    assert request.headers["host"] == "far-away.invalid"


def test_the_environments_proxy_is_used_by_azure_too(proxied: SimulatedServer) -> None:
    client = openai.AsyncAzureOpenAI(azure_endpoint="http://far-away.invalid", api_key=KEY, api_version="2024-10-21")
    _, request = sent_by(proxied, client)
    assert request.target.startswith("http://far-away.invalid/openai/deployments/m/chat/completions")


@pytest.mark.parametrize("exempt", ["127.0.0.1", "localhost, 127.0.0.1", "127.0.0.1:{port}", "*"])
def test_no_proxy_is_respected(proxied: SimulatedServer, monkeypatch: pytest.MonkeyPatch, exempt: str) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, exempt.format(port=proxied.port))
    send_to(resolve(base_url=proxied.base_url, api_key=KEY))
    (request,) = proxied.requests()
    assert request.target == "/v1/chat/completions"


def test_a_proxy_that_is_not_there_is_no_connection(monkeypatch: pytest.MonkeyPatch, proxied: SimulatedServer) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match=r"127\.0\.0\.1:9") as caught:
        send_to(resolve(base_url="http://far-away.invalid/v1", api_key=KEY))
    assert (caught.value.kind, type(caught.value)) == ("connection", Unreachable)


# An authority and a certificate of its own for localhost, made for these tests; neither is worth anything elsewhere.
AUTHORITY = """\
-----BEGIN CERTIFICATE-----
MIIBdjCCAR2gAwIBAgIBATAKBggqhkjOPQQDAjAiMSAwHgYDVQQDDBdsbG1mcmFt
ZSB0ZXN0IGF1dGhvcml0eTAgFw0yNDAxMDEwMDAwMDBaGA8yMTIzMTIzMTAwMDAw
MFowIjEgMB4GA1UEAwwXbGxtZnJhbWUgdGVzdCBhdXRob3JpdHkwWTATBgcqhkjO
PQIBBggqhkjOPQMBBwNCAASWsS/Sfh1u7YE2O1FlMOOEbsNu+Wm26/jlQ5UFhcRk
b/73IP7UVdxcV5ZRsjFVkIqqP1Mpo5v9DjjRdIv2AiUro0IwQDAPBgNVHRMBAf8E
BTADAQH/MA4GA1UdDwEB/wQEAwIBBjAdBgNVHQ4EFgQUjwvaJGEWR/IDtxDyIMCY
Rns0U+MwCgYIKoZIzj0EAwIDRwAwRAIgMZ8bEpYs+vXedFWYpqbqOGHxCrVmHB9d
2bHwRu8lx2ICICVVfjGhQI/wSLj0W4AyM4/wvUEOef9VXpL/5LOytTUO
-----END CERTIFICATE-----
"""
LOCALHOST = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgUmQvKdcFiUvIBlaY
PZNj86cLr0YM1xH7KY73O574gzyhRANCAAT1/Ay/2MhKIo4hEfu7d/+4qjvyfSkd
58USHmKWeWwY0erBKfB7jx1YR2ItPuX0s+SYggGqG9HUMT7BiLRQMq0L
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBujCCAWCgAwIBAgIBAjAKBggqhkjOPQQDAjAiMSAwHgYDVQQDDBdsbG1mcmFt
ZSB0ZXN0IGF1dGhvcml0eTAgFw0yNDAxMDEwMDAwMDBaGA8yMTIzMTIzMTAwMDAw
MFowFDESMBAGA1UEAwwJbG9jYWxob3N0MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcD
QgAE9fwMv9jISiKOIRH7u3f/uKo78n0pHefFEh5ilnlsGNHqwSnwe48dWEdiLT7l
9LPkmIIBqhvR1DE+wYi0UDKtC6OBkjCBjzAMBgNVHRMBAf8EAjAAMA4GA1UdDwEB
/wQEAwIHgDATBgNVHSUEDDAKBggrBgEFBQcDATAdBgNVHQ4EFgQUKZWLYbCEZ7So
2X2+eMFqpVeTTq4wHwYDVR0jBBgwFoAUjwvaJGEWR/IDtxDyIMCYRns0U+MwGgYD
VR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMAoGCCqGSM49BAMCA0gAMEUCIQDah8iQ
JMHAP2fPHEZUoI3l9LUKQHa8qRaqU9FsiIjwYAIgCzmOOASlCY2pM+acNsWIhl7L
qdp4JM22lDeDy8zQbag=
-----END CERTIFICATE-----
"""


@asynccontextmanager
async def tls_server(certificate: Path) -> AsyncIterator[str]:
    """Serve one fixed JSON over TLS; gives the base URL."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
            await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    async with server:
        yield f"https://localhost:{server.sockets[0].getsockname()[1]}/v1"


@pytest.fixture
def certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory with the certificates, and no word of them in the environment."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)
    (tmp_path / "authority.pem").write_text(AUTHORITY)
    (tmp_path / "localhost.pem").write_text(LOCALHOST)
    return tmp_path


async def over_tls(certificates: Path, way: str) -> Reply:
    async with tls_server(certificates / "localhost.pem") as base_url:
        return await send_and_close(await asyncio.to_thread(CLIENTS[way], base_url))


def test_a_certificate_that_nobody_vouches_for_is_told_as_such(certificates: Path, way: str) -> None:
    with pytest.raises(Unreachable) as caught:
        asyncio.run(over_tls(certificates, way))
    assert caught.value.kind == "certificate"
    assert "certificate" in caught.value.message.lower()


def test_ssl_cert_file_vouches_for_it(certificates: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "authority.pem"))
    reply = asyncio.run(over_tls(certificates, way))
    assert (reply.status, reply.body) == (200, b"{}")


def test_a_variable_that_is_set_after_a_certificate_was_refused_holds_for_the_next_call(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> list[Reply | str]:
        found: list[Reply | str] = []
        async with tls_server(certificates / "localhost.pem") as base_url:
            for _ in range(2):
                line = line_to(resolve(base_url=base_url, api_key=KEY), Caps())
                try:
                    found.append(await line.transport.send(b"{}"))
                except Unreachable as error:
                    found.append(error.kind)
                await give_back(line)
                monkeypatch.setenv("SSL_CERT_FILE", str(certificates / "authority.pem"))
        await close_lines()
        return found

    refused, reply = asyncio.run(main())
    assert refused == "certificate"
    assert isinstance(reply, Reply)


# ---- what is refused before anything is sent


def test_without_a_key_the_variable_and_the_local_model_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigurationError, match=r'OPENAI_API_KEY.*api_key=.*model="local" needs none'):
        resolve()


def test_an_empty_key_is_none_and_the_variable_does_not_take_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ConfigurationError, match="no API key: set the environment variable OPENAI_API_KEY, or pass"):
        resolve(base_url="http://127.0.0.1:9/v1", api_key="")


@pytest.mark.parametrize("base_url", ["localhost:8000/v1", "", "ftp://host/v1", "http://", 8000])
def test_what_is_no_url_is_refused(base_url: Any) -> None:
    with pytest.raises(ConfigurationError, match="is no URL; write it as in 'http://localhost:8000/v1'"):
        resolve(base_url=base_url, api_key=KEY)


def test_what_is_no_url_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "localhost:8000")
    with pytest.raises(ConfigurationError, match="is no URL"):
        resolve()


@pytest.mark.parametrize(
    ("name", "value"), [("SSL_CERT_FILE", "/no/such/file.pem"), ("ALL_PROXY", "ftp://127.0.0.1:9")]
)
def test_what_the_environment_says_wrong_is_told_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=r"the openai client cannot be made: .*SSL_CERT_FILE.*proxy"):
        resolve(api_key=KEY)


def test_what_is_no_client_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"client= is of type AsyncClient; it has to be an openai\.AsyncOpenAI"
    ):
        resolve(client=httpx2.AsyncClient())


def test_a_client_and_the_pieces_of_one_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="not both"):
        resolve(client=openai.AsyncOpenAI(api_key=KEY), base_url="http://127.0.0.1:9/v1")


@pytest.mark.parametrize(
    ("key", "likely"),
    [(KEY + "\n", "a line break at the end of the key"), (KEY + "\u2026", "a letter that is not ASCII")],
)
def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(key: str, likely: str) -> None:
    with pytest.raises(ConfigurationError, match=f"the header Authorization holds a character .*{likely}") as caught:
        resolve(base_url="http://127.0.0.1:9/v1", api_key=key)
    assert KEY not in str(caught.value)


def test_a_key_that_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="api_key= is of type int; it has to be text"):
        resolve(base_url="http://127.0.0.1:9/v1", api_key=5)


def test_a_url_is_shown_without_user_and_password() -> None:
    client = openai.AsyncOpenAI(api_key=KEY, base_url="http://user:password@127.0.0.1:9/v1")
    assert resolve(client=client).url == "http://127.0.0.1:9/v1/chat/completions"
