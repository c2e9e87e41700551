"""A simulated Batch API in a process of its own: files, batches, and the same answers online, kept on disk.

It validates each line as strictly as the API does, takes its time, fails lines, expires, and can be killed: what it
kept is there when it is started again. `paid` counts how often each content was answered, in a batch or online: what
a user would have paid for.

    with BatchServer(lines_per_s=1000) as server:
        job = df.llm.submit_batch("{text}", model="m", base_url=server.base_url, job=...)
        ...
        assert set(server.paid().values()) == {1}

From a shell: ``python -m tests.server_batch --store DIR --port 8000``. A user message steers its line with the
directives of `tests.server_behaviour`, of which ``[[status=500]]`` and ``[[fail_first=1]]`` hold here, and with
``[[batch=drop]]`` (the line comes back nowhere), ``[[batch=twice]]`` (twice), ``[[batch=both]]`` (in the output and the
error file) and ``[[batch=refuse]]`` (the validation names the line).
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import os
import random
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import orjson
from aiohttp import web

from tests.server_behaviour import (
    Answer,
    Behaviour,
    chat_answer,
    chat_complaint,
    content_key,
    directives_in,
    embedding_answer,
    embedding_complaint,
    error_body,
    last_user_text,
    response_answer,
    response_complaint,
)
from tests.server_process import ServerProcess, stop_when_stdin_closes

CHUNK = 1_000  # lines done between two looks at anything else
TICK_S = 0.005
ENDED = ("completed", "failed", "expired", "cancelled")
Complaint = Callable[[Mapping[str, Any]], "tuple[str, str] | None"]
COMPLAINTS: dict[str, Complaint] = {
    "/v1/chat/completions": chat_complaint,
    "/v1/responses": response_complaint,
    "/v1/embeddings": lambda request: embedding_complaint(request, Behaviour()),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBehaviour:
    """The knobs of the server; all can be changed while it runs.

    Attributes
    ----------
    validate_s : float
        What the validation of a file takes.
    lines_per_s : float or None
        How fast each batch is worked on; None is as fast as it goes.
    stop_after : int or None
        Lines of a batch that are done; the others wait until it expires or is cancelled.
    window_s : float
        After which a batch expires.
    cancel_s : float
        What it takes from a cancellation to its end.
    max_requests, max_bytes : int
        Of a file.
    enqueued_tokens : int or None
        Prompt tokens that batches of a model may have in all until they end.
    say_limit : bool
        Whether a refusal for that names the limit.
    status_all : int or None
        Everything is answered with this status.
    retry_after_s : float or None
        A ``Retry-After`` with each look at a batch.
    require_key : str or None
        401 for whoever does not send it.
    hidden : bool
        Whether batches are neither shown nor listed, as for a key of another project.
    listed_after_s : float
        How late batches come into the list.
    look_status : int or None
        A look at a batch is answered with this status.
    content_share : float
        The share of a file that whoever fetches it gets, as if it were all; with 0 it is a 404.
    content_lines : int or None
        The lines of it that they get at most, in the same way.
    named : bool
        Whether a batch that has ended names its files.
    """

    validate_s: float = 0.0
    lines_per_s: float | None = None
    stop_after: int | None = None
    window_s: float = 86_400.0
    cancel_s: float = 0.0
    max_requests: int = 50_000
    max_bytes: int = 200_000_000
    enqueued_tokens: int | None = None
    say_limit: bool = True
    status_all: int | None = None
    retry_after_s: float | None = None
    require_key: str | None = None
    hidden: bool = False
    listed_after_s: float = 0.0
    look_status: int | None = None
    content_share: float = 1.0
    content_lines: int | None = None
    named: bool = True


@dataclass(slots=True)
class Trap:
    """What happens at a request to come: its reply is lost, or whoever made it is killed.

    Attributes
    ----------
    request : str
        The start of its method and path, as in ``POST /v1/batches``; empty is any.
    number : int
        The how-maniest such request from now, from 1.
    moment : {"before", "after"}
        Before anything was done for it, or when all but the reply was.
    pid : int or None
        Who is killed; None closes the connection.
    """

    request: str
    number: int
    moment: Literal["before", "after"] = "after"
    pid: int | None = None


class Store:
    """What outlives the process: files, batches, and who was paid for."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.db = sqlite3.connect(place / "state.sqlite", isolation_level=None)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("PRAGMA synchronous=OFF")  # killed is the process, not the machine
        self.db.execute("CREATE TABLE IF NOT EXISTS objects (id TEXT PRIMARY KEY, n INTEGER, kind TEXT, json BLOB)")
        self.db.execute("CREATE TABLE IF NOT EXISTS paid (content TEXT PRIMARY KEY, times INTEGER)")

    def put(self, kind: str, thing: dict[str, Any]) -> None:
        self.db.execute(
            "INSERT INTO objects VALUES (?, (SELECT COALESCE(MAX(n), 0) + 1 FROM objects), ?, ?) "
            "ON CONFLICT (id) DO UPDATE SET json = excluded.json",
            (thing["id"], kind, orjson.dumps(thing)),
        )

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        row = self.db.execute("SELECT json FROM objects WHERE id = ? AND kind = ?", (name, kind)).fetchone()
        return None if row is None else dict(orjson.loads(row[0]))

    def all(self, kind: str) -> list[dict[str, Any]]:
        """Give them all, the newest first."""
        rows = self.db.execute("SELECT json FROM objects WHERE kind = ? ORDER BY n DESC", (kind,))
        return [orjson.loads(row[0]) for row in rows]

    def delete(self, name: str) -> None:
        self.db.execute("DELETE FROM objects WHERE id = ?", (name,))
        self.content(name).unlink(missing_ok=True)

    def content(self, name: str) -> Path:
        return self.place / name

    def pay(self, contents: list[str]) -> None:
        self.db.executemany(
            "INSERT INTO paid VALUES (?, 1) ON CONFLICT (content) DO UPDATE SET times = times + 1",
            [(content,) for content in contents],
        )

    def times(self, content: str) -> int:
        row = self.db.execute("SELECT times FROM paid WHERE content = ?", (content,)).fetchone()
        return 0 if row is None else int(row[0])

    def add_file(self, name: str, purpose: str, source: Path) -> dict[str, Any]:
        number = os.urandom(8).hex()
        os.replace(source, self.content(f"file-{number}"))
        made = {
            "id": f"file-{number}",
            "object": "file",
            "bytes": self.content(f"file-{number}").stat().st_size,
            "created_at": int(time.time()),
            "filename": name,
            "purpose": purpose,
            "status": "processed",
        }
        self.put("file", made)
        return made


def answer_of(endpoint: str, body: Mapping[str, Any]) -> Answer:
    """Answer a request as the online endpoint would."""
    text = _text_of(body)
    if endpoint.endswith("/embeddings"):
        return embedding_answer(body, Behaviour(), directives_in(text), text)
    make = response_answer if endpoint.endswith("/responses") else chat_answer
    return make(body, Behaviour(), directives_in(text), text)


def _text_of(body: Mapping[str, Any]) -> str:
    given = body.get("messages") or body.get("input") or ()
    if isinstance(given, str):
        return given
    if given and isinstance(given[0], str):  # texts to embed
        return str(given[0])
    return last_user_text([one for one in given if isinstance(one, dict)])


def problems(lines: list[bytes], endpoint: str, behaviour: BatchBehaviour) -> list[dict[str, Any]]:
    """Validate a file; what the API would say of each line that is not right."""
    found: list[dict[str, Any]] = []

    def wrong(code: str, message: str, line: int | None, param: str | None = None) -> None:
        found.append({"code": code, "message": message, "line": line, "param": param})

    if not lines:
        wrong("empty_file", "The input file is empty.", None)
    if len(lines) > behaviour.max_requests:
        wrong("too_many_tasks", f"The file has {len(lines)} requests; the limit is {behaviour.max_requests}.", None)
        return found
    seen: set[str] = set()
    model = None
    for number, raw in enumerate(lines, 1):
        try:
            line = orjson.loads(raw)
        except orjson.JSONDecodeError:
            wrong("invalid_json_line", "This line is not parseable as valid JSON.", number)
            continue
        if not isinstance(line, dict) or set(line) != {"custom_id", "method", "url", "body"}:
            wrong("invalid_request", "A line has a custom_id, a method, a url and a body, and nothing else.", number)
            continue
        name, body = line["custom_id"], line["body"]
        if not isinstance(name, str) or not 1 <= len(name) <= 64:
            wrong("invalid_custom_id", "The custom_id has to be a string of 1 to 64 characters.", number, "custom_id")
        elif name in seen:
            wrong("duplicate_custom_id", f"The custom_id {name} was seen before.", number, "custom_id")
        else:
            seen.add(name)
        if line["method"] != "POST":
            wrong("invalid_method", "The method has to be POST.", number, "method")
        if line["url"] != endpoint:
            wrong("url_mismatch", f"The URL {line['url']} is not the batch's {endpoint}.", number, "url")
        if not isinstance(body, dict) or not isinstance(body.get("model"), str):
            wrong("missing_required_parameter", "The body has to name a model.", number, "body.model")
            continue
        if body.get("stream"):
            wrong("invalid_request", "A batch does not stream.", number, "body.stream")
        model = model or body["model"]
        if body["model"] != model:
            wrong("model_mismatch", f"A file has one model, and {body['model']} is not {model}.", number, "body.model")
        if directives_in(_text_of(body)).get("batch") == "refuse":
            wrong("invalid_request", "This line was told to be refused.", number, "body")
    return found


class Worker:
    """Works on the batches, a chunk of lines at a time, and keeps where it is."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lines: dict[str, list[bytes]] = {}

    async def run(self, behaviour: Callable[[], BatchBehaviour]) -> None:
        while True:
            busy = False
            for batch in reversed(self.store.all("batch")):
                if batch["status"] not in ENDED:
                    busy |= self.advance(batch, behaviour())
                    await asyncio.sleep(0)
            await asyncio.sleep(0 if busy else TICK_S)

    def advance(self, batch: dict[str, Any], behaviour: BatchBehaviour) -> bool:
        """Bring one batch on; whether there is more to do for it at once."""
        own, now = batch["_"], time.time()
        match batch["status"]:
            case "validating":
                if now - own["created"] < behaviour.validate_s:
                    return False
                self._validate(batch, behaviour)
            case "in_progress":
                if now - own["created"] >= behaviour.window_s:
                    self._end(batch, "expired", "batch_expired", "could not be executed before the window expired")
                    return False
                return self._work(batch, behaviour)
            case "cancelling":
                if now - own["cancelled"] < behaviour.cancel_s:
                    return False
                self._end(batch, "cancelled", "batch_cancelled", "was cancelled before it was executed")
        return True

    def _lines_of(self, batch: dict[str, Any]) -> list[bytes]:
        if batch["id"] not in self._lines:
            self._lines[batch["id"]] = self.store.content(batch["id"]).read_bytes().splitlines()
        return self._lines[batch["id"]]

    def _validate(self, batch: dict[str, Any], behaviour: BatchBehaviour) -> None:
        lines = self._lines_of(batch)
        found = problems(lines, batch["endpoint"], behaviour)
        if not found:
            model = batch["model"] = orjson.loads(lines[0])["body"]["model"]
            tokens = batch["_"]["tokens"] = sum(
                answer_of(batch["endpoint"], body).prompt_tokens
                for body in (orjson.loads(line)["body"] for line in lines)
                if COMPLAINTS[batch["endpoint"]](body) is None
            )
            others = sum(
                other["_"]["tokens"]
                for other in self.store.all("batch")
                if other["status"] in ("in_progress", "cancelling") and other["model"] == model
            )
            limit = behaviour.enqueued_tokens
            if limit is not None and others + tokens > limit:
                words = f"Enqueued token limit reached for {model} in organization org-simulated."
                if behaviour.say_limit:
                    words += f" Limit: {limit:,} enqueued tokens."
                words += " Please try again once some in_progress batches have been completed."
                found = [{"code": "token_limit_exceeded", "message": words, "line": None, "param": None}]
        if found:
            batch["status"], batch["failed_at"] = "failed", int(time.time())
            batch["errors"] = {"object": "list", "data": found}
            self._forget(batch)
        else:
            batch["status"], batch["in_progress_at"] = "in_progress", int(time.time())
            batch["request_counts"]["total"] = len(lines)
            batch["_"]["begun"] = time.time()
        self.store.put("batch", batch)

    def _work(self, batch: dict[str, Any], behaviour: BatchBehaviour) -> bool:
        lines, own = self._lines_of(batch), batch["_"]
        order = _order(batch, len(lines))
        until = len(lines) if behaviour.stop_after is None else min(len(lines), behaviour.stop_after)
        if behaviour.lines_per_s is not None:
            until = min(until, int((time.time() - own["begun"]) * behaviour.lines_per_s))
        until = min(until, own["done"] + CHUNK)
        if until > own["done"]:
            with self._appending(batch) as write:
                paid = [self._do(batch, lines[number], write) for number in order[own["done"] : until]]
            own["done"] = until
            self.store.db.execute("BEGIN")
            self.store.pay([content for content in paid if content is not None])
            self.store.put("batch", batch)
            self.store.db.execute("COMMIT")
        if own["done"] == len(lines):
            self._end(batch, "completed", "", "")
            return False
        return until > own["done"]

    def _appending(self, batch: dict[str, Any]) -> Any:
        return _Appending(self.store, batch)

    def _do(self, batch: dict[str, Any], raw: bytes, write: Callable[[str, dict[str, Any]], None]) -> str | None:
        """Execute one line; what was paid for, by its content."""
        line = orjson.loads(raw)
        body, counts = line["body"], batch["request_counts"]
        directives = directives_in(_text_of(body))
        content = content_key(body)
        status, reply = 200, None
        complaint = COMPLAINTS[batch["endpoint"]](body)
        if complaint is not None:
            status, reply = 400, orjson.loads(error_body(400, None, *complaint))
        elif "status" in directives:
            number, _, code = directives["status"].partition(":")
            status, reply = int(number), orjson.loads(error_body(int(number), code or None))
        elif self.store.times(f"failed {content}") < int(directives.get("fail_first", 0)):
            self.store.pay([f"failed {content}"])
            status, reply = 500, orjson.loads(error_body(500))
        else:
            reply = answer_of(batch["endpoint"], body).body
            if "id" in reply:
                reply["id"] = f"chatcmpl-{os.urandom(4).hex()}"
        said = {
            "id": f"batch_req_{os.urandom(4).hex()}",
            "custom_id": line["custom_id"],
            "response": {"status_code": status, "request_id": f"req_{os.urandom(4).hex()}", "body": reply},
            "error": None,
        }
        counts["completed" if status == 200 else "failed"] += 1
        how = directives.get("batch")
        if how != "drop":
            write("output" if status == 200 else "error", said)
            if how == "twice":
                write("output" if status == 200 else "error", said)
            if how == "both":
                response = {**said["response"], "status_code": 500, "body": orjson.loads(error_body(500))}
                write("error", {**said, "response": response})
        return content if status == 200 else None

    def _end(self, batch: dict[str, Any], status: str, code: str, words: str) -> None:
        lines, own = self._lines_of(batch), batch["_"]
        left = _order(batch, len(lines))[own["done"] :]
        with self._appending(batch) as write:
            for number in left:
                name = orjson.loads(lines[number])["custom_id"]
                error = {"code": code, "message": f"This request {words}."}
                said = {"id": f"batch_req_{number}", "custom_id": name, "response": None, "error": error}
                write("error", said)
        for kind in ("output", "error"):
            path = self.store.content(f"{batch['id']}.{kind}")
            if path.exists():
                made = self.store.add_file(f"{batch['id']}_{kind}.jsonl", "batch_output", path)
                batch[f"{kind}_file_id"] = made["id"]
        batch["status"], batch[f"{status}_at"] = status, int(time.time())
        self.store.put("batch", batch)
        self._forget(batch)

    def _forget(self, batch: dict[str, Any]) -> None:
        self._lines.pop(batch["id"], None)
        self.store.content(batch["id"]).unlink(missing_ok=True)


class _Appending:
    """Adds lines to a batch's output and error files; what a killed process wrote too far is cut off first."""

    def __init__(self, store: Store, batch: dict[str, Any]) -> None:
        self._store, self._batch = store, batch
        self._written: dict[str, list[bytes]] = {"output": [], "error": []}

    def __enter__(self) -> Callable[[str, dict[str, Any]], None]:
        return lambda kind, said: self._written[kind].append(_dumps(said) + b"\n")

    def __exit__(self, *_: object) -> None:
        for kind, lines in self._written.items():
            if lines:
                path, at = self._store.content(f"{self._batch['id']}.{kind}"), self._batch["_"][kind]
                with open(path, "ab") as file:
                    file.truncate(at)
                    file.write(b"".join(lines))
                    self._batch["_"][kind] = file.tell()


def _dumps(value: Any) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError:  # a lone surrogate
        import json

        return json.dumps(value).encode()


def _order(batch: dict[str, Any], count: int) -> list[int]:
    """Give the order in which a batch's lines are done: any but their own."""
    order = list(range(count))
    random.Random(batch["id"]).shuffle(order)
    return order


def _shown(thing: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in thing.items() if name != "_"}


class Api:
    """The HTTP side."""

    def __init__(self, store: Store, behaviour: BatchBehaviour) -> None:
        self.store = store
        self.behaviour = behaviour
        self.traps: list[Trap] = []
        self.log: list[str] = []

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._gate], client_max_size=1 << 32)
        app.add_routes(
            [
                web.post("/v1/files", self.upload),
                web.get("/v1/files", self.list_files),
                web.get("/v1/files/{id}", self.show_file),
                web.get("/v1/files/{id}/content", self.file_content),
                web.delete("/v1/files/{id}", self.delete_file),
                web.post("/v1/batches", self.create),
                web.get("/v1/batches", self.list_batches),
                web.get("/v1/batches/{id}", self.show_batch),
                web.post("/v1/batches/{id}/cancel", self.cancel),
                *(web.post(path, self.online) for path in COMPLAINTS),
                web.post("/_change", self.change),
                web.post("/_trap", self.trap),
                web.post("/_stats", self.stats),
            ]
        )
        return app

    @web.middleware
    async def _gate(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.path.startswith("/_"):
            return await handler(request)
        named = f"{request.method} {request.path}"
        self.log.append(named)
        sprung = None
        for trap in list(self.traps):
            if named.startswith(trap.request):
                trap.number -= 1
                if trap.number == 0:
                    self.traps.remove(trap)
                    sprung = trap
        if sprung is not None and sprung.moment == "before":
            return self._spring(sprung, request)
        behaviour = self.behaviour
        if behaviour.status_all is not None:
            await request.read()
            return _error(behaviour.status_all, None)
        if behaviour.require_key is not None:
            given = request.headers.get("authorization", "")
            if given != f"Bearer {behaviour.require_key}":
                await request.read()
                key = given.removeprefix("Bearer ")
                return _error(401, "invalid_api_key", f"Incorrect API key provided: {key}.")
        response = await handler(request)
        if sprung is not None:
            return self._spring(sprung, request)
        return response

    def _spring(self, trap: Trap, request: web.Request) -> web.Response:
        if trap.pid is not None:
            os.kill(trap.pid, signal.SIGKILL)
        if request.transport is not None:
            request.transport.close()
        return web.Response(status=500)

    async def upload(self, request: web.Request) -> web.Response:
        fields: dict[str, str] = {}
        name, path = None, self.store.content(f"upload-{os.urandom(4).hex()}")
        async for part in await request.multipart():
            if part.name == "file":  # type: ignore[union-attr]
                name = part.filename  # type: ignore[union-attr]
                with open(path, "wb") as file:  # noqa: ASYNC230  # a test server may block
                    while chunk := await part.read_chunk(1 << 20):  # type: ignore[union-attr]
                        file.write(chunk)
            else:
                fields[str(part.name)] = await part.text()  # type: ignore[union-attr]
        if name is None or fields.get("purpose") != "batch" or not name.endswith(".jsonl"):
            return _error(400, None, "A batch needs a .jsonl file with the purpose batch.", "file")
        if path.stat().st_size > self.behaviour.max_bytes:
            path.unlink()
            return _error(413, None, f"The file is larger than {self.behaviour.max_bytes} bytes.", "file")
        return web.json_response(self.store.add_file(name, "batch", path))

    async def list_files(self, request: web.Request) -> web.Response:
        purpose = request.query.get("purpose")
        files = [file for file in self.store.all("file") if purpose in (None, file["purpose"])]
        if request.query.get("order") == "asc":
            files.reverse()
        return _page(files, request, 10_000)

    async def show_file(self, request: web.Request) -> web.Response:
        file = self.store.get("file", request.match_info["id"])
        return _missing(request) if file is None else web.json_response(file)

    async def file_content(self, request: web.Request) -> web.StreamResponse:
        file = self.store.get("file", request.match_info["id"])
        share = self.behaviour.content_share
        if file is None or not share:
            return _missing(request)
        path = self.store.content(file["id"])
        if self.behaviour.content_lines is not None:
            return web.Response(body=b"".join(path.read_bytes().splitlines(True)[: self.behaviour.content_lines]))
        return web.FileResponse(path) if share == 1 else web.Response(body=_share_of(path, share))

    async def delete_file(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        if self.store.get("file", name) is None:
            return _missing(request)
        self.store.delete(name)
        return web.json_response({"id": name, "object": "file", "deleted": True})

    async def create(self, request: web.Request) -> web.Response:
        given = await request.json()
        metadata = given.get("metadata") or {}
        if given.get("completion_window") != "24h":
            return _error(400, None, "The completion_window has to be 24h.", "completion_window")
        if given.get("endpoint") not in COMPLAINTS:
            return _error(400, None, f"Invalid endpoint {given.get('endpoint')!r}.", "endpoint")
        if len(metadata) > 16 or any(
            len(name) > 64 or not isinstance(value, str) or len(value) > 512 for name, value in metadata.items()
        ):
            return _error(400, None, "Metadata is at most 16 pairs of text.", "metadata")
        file = self.store.get("file", str(given.get("input_file_id")))
        if file is None:
            return _error(400, None, f"No such file: {given.get('input_file_id')}.", "input_file_id")
        number = os.urandom(8).hex()
        made = {
            "id": f"batch_{number}",
            "object": "batch",
            "endpoint": given["endpoint"],
            "model": None,
            "errors": None,
            "input_file_id": file["id"],
            "completion_window": "24h",
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": int(time.time()),
            "expires_at": int(time.time() + self.behaviour.window_s),
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": metadata,
            "_": {"created": time.time(), "done": 0, "tokens": 0, "output": 0, "error": 0},
        }
        shutil.copyfile(self.store.content(file["id"]), self.store.content(f"batch_{number}"))
        self.store.put("batch", made)
        return web.json_response(_shown(made))

    async def list_batches(self, request: web.Request) -> web.Response:
        before = 0.0 if self.behaviour.hidden else time.time() - self.behaviour.listed_after_s
        listed = [_shown(batch) for batch in self.store.all("batch") if batch["_"]["created"] <= before]
        return _page(listed, request, 20)

    async def show_batch(self, request: web.Request) -> web.Response:
        batch = self.store.get("batch", request.match_info["id"])
        if self.behaviour.look_status is not None:
            return _error(self.behaviour.look_status, None)
        if batch is None or self.behaviour.hidden:
            return _missing(request)
        if not self.behaviour.named:
            batch |= {"output_file_id": None, "error_file_id": None}
        wait_s = self.behaviour.retry_after_s
        return web.json_response(_shown(batch), headers={} if wait_s is None else {"retry-after": f"{wait_s:g}"})

    async def cancel(self, request: web.Request) -> web.Response:
        batch = self.store.get("batch", request.match_info["id"])
        if batch is None:
            return _missing(request)
        if batch["status"] in ENDED:
            return _error(409, None, f"A batch that is {batch['status']} cannot be cancelled.")
        batch["status"], batch["cancelling_at"] = "cancelling", int(time.time())
        batch["_"]["cancelled"] = time.time()
        self.store.put("batch", batch)
        return web.json_response(_shown(batch))

    async def online(self, request: web.Request) -> web.Response:
        """Answer a request at once, as `complete` asks."""
        body = await request.json()
        if (complaint := COMPLAINTS[request.path](body)) is not None:
            return _error(400, None, *complaint)
        content = content_key(body)
        self.store.pay([content])
        return web.Response(body=_dumps(answer_of(request.path, body).body), content_type="application/json")

    # -- what the tests ask

    async def change(self, request: web.Request) -> web.Response:
        self.behaviour = replace(self.behaviour, **await request.json())
        return web.json_response(None)

    async def trap(self, request: web.Request) -> web.Response:
        self.traps = [Trap(**each) for each in await request.json()]
        return web.json_response(None)

    async def stats(self, _: web.Request) -> web.Response:
        rows = self.store.db.execute("SELECT content, times FROM paid WHERE content NOT LIKE 'failed %'")
        return web.json_response(
            {
                "paid": dict(rows.fetchall()),
                "files": self.store.all("file"),
                "batches": [_shown(batch) for batch in self.store.all("batch")],
                "log": self.log,
            }
        )


def _error(status: int, code: str | None, message: str | None = None, param: str | None = None) -> web.Response:
    return web.Response(status=status, body=error_body(status, code, message, param), content_type="application/json")


def _share_of(path: Path, share: float) -> bytes:
    content = path.read_bytes()
    return content[: int(len(content) * share)]


def _missing(request: web.Request) -> web.Response:
    return _error(404, None, f"No such object: {request.match_info['id']}.", "id")


def _page(things: list[dict[str, Any]], request: web.Request, usual: int) -> web.Response:
    after, limit = request.query.get("after"), int(request.query.get("limit", usual))
    names = [thing["id"] for thing in things]
    start = names.index(after) + 1 if after in names else 0
    page = things[start : start + limit]
    return web.json_response(
        {
            "object": "list",
            "data": page,
            "has_more": start + limit < len(things),
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
        }
    )


async def serve(place: Path, port: int, behaviour: BatchBehaviour, *, until_stdin_closes: bool) -> None:
    """Serve on 127.0.0.1 until a SIGTERM (or until whoever started this is gone)."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    store = Store(place)
    api = Api(store, behaviour)
    runner = web.AppRunner(api.app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, shutdown_timeout=0.1, reuse_address=True)
    await site.start()
    working = loop.create_task(Worker(store).run(lambda: api.behaviour))
    working.add_done_callback(lambda _: stop.set())
    signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(stop.set))
    if until_stdin_closes:
        stop_when_stdin_closes(stop)
    print(f"http://127.0.0.1:{runner.addresses[0][1]}/v1", flush=True)
    await stop.wait()
    if working.done():
        working.result()
    working.cancel()
    await runner.cleanup()


class BatchServer(ServerProcess):
    """The server in a process of its own, steered and asked from here.

    Parameters
    ----------
    **behaviour
        The knobs of `BatchBehaviour`.
    """

    def __init__(self, **behaviour: Any) -> None:
        super().__init__()
        self._behaviour = BatchBehaviour(**behaviour)
        self._place = tempfile.TemporaryDirectory(prefix="llmframe-batches-", ignore_cleanup_errors=True)

    def _command(self) -> list[str]:
        config = orjson.dumps(asdict(self._behaviour)).decode()
        return ["tests.server_batch", "--store", self._place.name, "--config", config]

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._place.cleanup()

    def change(self, **behaviour: Any) -> None:
        """Set these knobs and leave the others."""
        self._behaviour = replace(self._behaviour, **behaviour)
        self._ask("/_change", behaviour)

    def trap(self, *traps: Trap) -> None:
        """Set these traps, and no others."""
        self._ask("/_trap", [asdict(trap) for trap in traps])

    def paid(self) -> dict[str, int]:
        """Give how often each content was answered, in a batch or online."""
        found: dict[str, int] = self._ask("/_stats")["paid"]
        return found

    def files(self) -> list[dict[str, Any]]:
        """Give the files that it keeps."""
        found: list[dict[str, Any]] = self._ask("/_stats")["files"]
        return found

    def batches(self) -> list[dict[str, Any]]:
        """Give the batches, the newest first."""
        found: list[dict[str, Any]] = self._ask("/_stats")["batches"]
        return found

    def log(self) -> list[str]:
        """Give the requests since it was started: method and path."""
        found: list[str] = self._ask("/_stats")["log"]
        return found

    def wait_for_a_look(self, timeout_s: float = 60.0) -> None:
        """Wait until somebody has lately looked how a batch is."""
        until = time.monotonic() + timeout_s
        while not any(line.startswith("GET /v1/batches/") for line in self.log()[-3:]):
            if time.monotonic() > until:
                raise TimeoutError(f"nobody looked in {timeout_s} s; the last requests were {self.log()[-3:]}")
            time.sleep(0.01)

    def _ask(self, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request("POST", path, orjson.dumps(body))
            response = connection.getresponse()
            reply = orjson.loads(response.read())
        finally:
            connection.close()
        return reply


def main() -> None:
    """Run the server from a shell."""
    parser = argparse.ArgumentParser(prog="python -m tests.server_batch", description=__doc__.split("\n")[0])
    parser.add_argument("--store", type=Path, required=True, help="a directory that keeps its files and batches")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--config", default="{}", help="a BatchBehaviour as JSON")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end when whoever holds stdin is gone")
    chosen = parser.parse_args()
    behaviour = BatchBehaviour(**orjson.loads(chosen.config))
    asyncio.run(serve(chosen.store, chosen.port, behaviour, until_stdin_closes=chosen.until_stdin_closes))


if __name__ == "__main__":
    main()
