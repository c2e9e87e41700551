"""A server in a process of its own: started, ended at once or in good order, and found again at the same port."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

END_S = 30.0  # for a process to end, on a machine that is busy with other tests


class ServerProcess:
    """What the simulated servers share; the module that is run says its address in its first line."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    def _command(self) -> list[str]:
        """Give the module, and its arguments but the port's."""
        raise NotImplementedError

    def start(self) -> Self:
        """Start the process; the port is the same after every start."""
        module, *arguments = self._command()
        process = subprocess.Popen(
            [sys.executable, "-m", module, "--port", str(self._port), "--until-stdin-closes", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).resolve().parent.parent,
        )
        assert process.stdout is not None
        self._process = process
        line = process.stdout.readline().decode()
        if not line:
            self.kill()
            raise RuntimeError(f"the server {module!r} did not start; its stderr says why")
        self._port = urlsplit(line.strip()).port or 0
        return self

    def stop(self) -> None:
        """End the process in good order."""
        self._end(subprocess.Popen.terminate)

    def kill(self) -> None:
        """End the process at once, as a power cut would; `start()` brings it back with no more than it kept on disk."""
        self._end(subprocess.Popen.kill)

    def _end(self, how: Callable[[subprocess.Popen[bytes]], None]) -> None:
        process, self._process = self._process, None
        if process is not None:
            how(process)
            process.wait(END_S)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process's number."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def port(self) -> int:
        """The TCP port, on 127.0.0.1."""
        return self._port

    @property
    def base_url(self) -> str:
        """What a client takes as `base_url`."""
        return f"http://127.0.0.1:{self._port}/v1"


def stop_when_stdin_closes(stop: asyncio.Event) -> None:
    """Set an event of the running loop when whoever started this process is gone."""
    loop = asyncio.get_running_loop()

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=watch, daemon=True).start()
