"""The provider's files and batches, through an openai client: upload, create, find, look, fetch, delete.

Nothing here retries what could be done twice. What went wrong is told in three ways: `Refused` was not done, `Away` may
have been, and an `EndpointError` will not be done by asking again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import openai

from llmframe import endpoint, failures, loops, transports
from llmframe.endpoint import Endpoint
from llmframe.errors import EndpointError
from llmframe.limits import retry_after_s
from llmframe.messages import well_formed
from llmframe.transports import NO_EXTRAS, Extras

T = TypeVar("T")

TRIES = 3  # of what can be asked twice without harm, before the endpoint counts as away
CHUNK_BYTES = 1 << 18  # of a file that is fetched
CLOCKS_S = 86_400.0  # how far the provider's clock may be from ours, when what we made is looked for
ENDED = frozenset({"completed", "failed", "expired", "cancelled"})


class Away(Exception):
    """The endpoint gave no answer, or one that says to come back.

    Attributes
    ----------
    asked_s : float
        Seconds after which it asks to come back; 0 where it did not say.
    maybe_done : bool
        Whether what was asked may have been done all the same.
    """

    def __init__(self, message: str, *, asked_s: float = 0.0, maybe_done: bool = True) -> None:
        super().__init__(message)
        self.asked_s = asked_s
        self.maybe_done = maybe_done


class Refused(Exception):
    """The endpoint refused, and did nothing.

    Attributes
    ----------
    http : int
        The status.
    code : str
        The endpoint's own name of it, or nothing.
    """

    def __init__(self, message: str, http: int, code: str) -> None:
        super().__init__(message)
        self.http = http
        self.code = code


@dataclass(frozen=True, slots=True)
class Problem:
    """What a validation said of a file, or of one of its lines (from 1)."""

    code: str
    message: str
    line: int | None


@dataclass(frozen=True, slots=True)
class Seen:
    """A batch as the provider shows it.

    Attributes
    ----------
    id, status : str
        The provider's.
    output_file_id, error_file_id : str or None
        Where there are such files yet.
    done, failed : int
        Requests so far.
    problems : tuple of Problem
        Of its validation.
    asked_s : float
        Seconds after which the endpoint asks to look again; 0 where it did not say.
    """

    id: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    done: int
    failed: int
    problems: tuple[Problem, ...]
    asked_s: float = 0.0

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status in ENDED


class BatchApi:
    """Files and batches at an endpoint; to be closed by whoever opened it, on the same loop.

    Parameters
    ----------
    target : Endpoint
        Whose client is used.
    extras : Extras
        Headers and query parameters of the call.
    """

    def __init__(self, target: Endpoint, extras: Extras) -> None:
        client = target.client()
        self._threads = isinstance(client, openai.OpenAI)
        own = None if self._threads else endpoint.of_default_transport(client, extras)
        self._own = own is not None
        self._client = own if own is not None else endpoint.with_extras(client, extras)
        self._url = target.identity

    async def close(self) -> None:
        """Let go of the connections, if they are ours."""
        if self._own:
            await self._client.close()

    async def upload(self, path: Path, name: str) -> str:
        """Upload an input file under a name, and give its id; it is read as it is sent."""
        with open(path, "rb") as file:  # noqa: ASYNC230  # the SDK reads it piece by piece, as it sends
            made = await self._of_path(
                self._once(lambda: self._client.files.create(file=(name, file), purpose="batch"))
            )
        return str(made.id)

    async def find_files(self, start: str, since_s: float) -> list[tuple[str, str, int]]:
        """Find input files whose names start so, made since then: id, name and bytes of each."""
        found = []
        async for file in self._pages(lambda: self._client.files.list(purpose="batch", order="desc")):
            if file.created_at >= since_s - CLOCKS_S and (file.filename or "").startswith(start):
                found.append((str(file.id), str(file.filename), int(file.bytes or 0)))
        return found

    async def delete(self, file_id: str) -> None:
        """Delete a file, if it is there."""
        try:
            await self._safely(lambda: self._client.files.delete(file_id))
        except Refused as refusal:
            if refusal.http != 404:
                raise

    async def size(self, file_id: str) -> int | None:
        """Give the bytes that a file has; None where the provider does not say."""
        try:
            file = await self._safely(lambda: self._client.files.retrieve(file_id))
        except Refused:
            return None
        return int(file.bytes) if file.bytes else None

    async def fetch(self, file_id: str, file: IO[bytes]) -> None:
        """Write a file's content to an open one, from its start.

        Raises
        ------
        Refused
            It is not there.
        """
        streaming = self._client.files.with_streaming_response

        def in_thread() -> None:
            file.seek(0)
            file.truncate()
            with streaming.content(file_id) as response:
                for chunk in response.iter_bytes(CHUNK_BYTES):
                    file.write(chunk)

        async def here() -> None:
            file.seek(0)
            file.truncate()
            async with streaming.content(file_id) as response:
                async for chunk in response.iter_bytes(CHUNK_BYTES):
                    file.write(chunk)

        await self._safely(in_thread if self._threads else here)

    async def create(self, file_id: str, path: str, tag: Mapping[str, str]) -> Seen:
        """Make a batch of an input file; the tag is by what it is found again."""
        batches = self._client.batches
        given: Any = {"input_file_id": file_id, "endpoint": path, "completion_window": "24h", "metadata": dict(tag)}
        return _seen(await self._of_path(self._once(lambda: batches.create(**given))))

    async def find_batches(self, tag: Mapping[str, str], since_s: float) -> list[Seen]:
        """Find the batches with a tag, made since then, the oldest first."""
        found = []
        async for batch in self._pages(lambda: self._client.batches.list(limit=100)):
            if batch.created_at < since_s - CLOCKS_S:
                continue  # and not the end: not every server lists the newest first
            metadata = batch.metadata or {}
            if all(metadata.get(name) == value for name, value in tag.items()):
                found.append(batch)
        return [_seen(batch) for batch in sorted(found, key=lambda batch: int(batch.created_at))]

    async def look(self, batch_id: str) -> Seen:
        """Look at a batch."""
        raw = await self._safely(lambda: self._client.batches.with_raw_response.retrieve(batch_id))
        return _seen(raw.parse(), retry_after_s(raw.headers, time.time()) or 0.0)

    async def cancel(self, batch_id: str) -> None:
        """Ask for a batch to be cancelled, if it has not ended."""
        try:
            await self._safely(lambda: self._client.batches.cancel(batch_id))
        except Refused as refusal:
            if refusal.http not in (400, 404, 409):  # it has ended, as providers variously say
                raise

    async def _pages(self, first: Callable[[], Any]) -> AsyncIterator[Any]:
        page = await self._of_path(self._safely(first))
        while True:
            for each in page.data:
                yield each
            if not page.data or not page.has_next_page():
                return
            page = await self._safely(page.get_next_page)

    async def _of_path(self, asked: Awaitable[Any]) -> Any:
        """Ask a path that every Batch API has."""
        try:
            return await asked
        except Refused as refusal:
            if refusal.http in (404, 405):
                raise EndpointError(
                    f"{refusal}; {self._url} seems to have no Batch API (its /files and /batches)"
                ) from refusal
            raise

    async def _safely(self, call: Callable[[], Any]) -> Any:
        """Ask what can be asked again, a few times."""
        for number in range(1, TRIES):
            try:
                return await self._once(call)
            except Away as away:
                if away.asked_s:
                    raise
                await asyncio.sleep(failures.backoff_s(number, random.random()))
        return await self._once(call)

    async def _once(self, call: Callable[[], Any]) -> Any:
        try:
            if self._threads:
                return await loops.in_thread(call)
            given = call()
            return await given if isinstance(given, Awaitable) else given
        except openai.APIStatusError as error:
            raise self._of_status(error) from error
        except openai.APIConnectionError as error:
            cause = transports.cause_of(error)
            words = well_formed(transports.redacts(error.request)(str(cause) or type(cause).__name__))
            maybe_done = not transports.nobody_took(cause)
            raise Away(f"no reply from {self._url}: {words}", maybe_done=maybe_done) from error
        except openai.OpenAIError as error:
            raise EndpointError(f"the client could not send the request: {error}; mend client=") from error
        except Exception as error:  # a body that ends too early comes as its transport's own error
            if transports.is_of_http(error):
                words = transports.redacted_of(self._client, NO_EXTRAS, f"{type(error).__name__}: {error}")
                raise Away(f"the reply from {self._url} broke off: {words}") from error
            raise

    def _of_status(self, error: openai.APIStatusError) -> Exception:
        response = error.response
        status = int(response.status_code)
        redact = transports.redacts(response.request)
        failure = failures.of_reply(status, response.headers, response.content, _payload(error.body), redact)
        words, code = "" if failure is None else failure.message, redact(str(error.code or ""))
        if failure is None or "token_limit" in f"{code} {words}" or status in (404, 405):
            return Refused(words, status, code)
        if failure.verdict == "retry":
            asked_s = retry_after_s(response.headers, time.time()) or 0.0
            return Away(words, asked_s=asked_s, maybe_done=status != 429)
        return (
            EndpointError(f"{words}; sent to {self._url}") if failure.verdict == "run" else Refused(words, status, code)
        )


def _payload(body: Any) -> Any:
    """Give a body as it came: the SDK takes an error out of its envelope."""
    return body if isinstance(body, dict) and "error" in body else {"error": body}


def _seen(batch: Any, asked_s: float = 0.0) -> Seen:
    counts = batch.request_counts
    given = (batch.errors.data if batch.errors is not None else None) or []
    return Seen(
        id=str(batch.id),
        status=str(batch.status),
        output_file_id=batch.output_file_id or None,
        error_file_id=batch.error_file_id or None,
        done=0 if counts is None else int(counts.completed or 0),
        failed=0 if counts is None else int(counts.failed or 0),
        problems=tuple(
            Problem(well_formed(str(each.code or "")), well_formed(str(each.message or "")), each.line)
            for each in given
        ),
        asked_s=asked_s,
    )
