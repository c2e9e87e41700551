"""A real HTTP server of a few threads, each of which serves one connection until it is closed.

So do llama.cpp's (cpp-httplib, a thread for each connection) and Python's own http.server (one). A connection beyond
those waits in the system's queue, where the server knows nothing of it.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any

import orjson

IDLE_S = 5.0  # after which a connection that carries nothing is closed: cpp-httplib's default
BACKLOG = 512


class ThreadsServer:
    """Serves chat completions on so many connections at once; each answer takes so long.

    Attributes
    ----------
    answered : Counter
        Answers by the prompt.
    """

    def __init__(self, threads: int, latency_s: float) -> None:
        self.latency_s = latency_s
        self.answered: Counter[str] = Counter()
        self._threads = threads
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)

    @property
    def base_url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"

    def __enter__(self) -> ThreadsServer:
        for _ in range(self._threads):
            threading.Thread(target=self._serve, name="threads-server", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for one in (self._listener, *self._open):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError:  # it is closed
                return
            self._open.add(connection)
            with suppress(OSError), connection:
                _Handler(connection, address, self)
            self._open.discard(connection)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    server: Any

    def do_POST(self) -> None:
        body = orjson.loads(self.rfile.read(int(self.headers["content-length"])))
        time.sleep(self.server.latency_s)
        text = body["messages"][-1]["content"]
        self.server.answered[text] += 1
        choice = {"index": 0, "message": {"role": "assistant", "content": f"echo: {text}"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
        reply = orjson.dumps({"object": "chat.completion", "model": "m", "choices": [choice], "usage": usage})
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""
