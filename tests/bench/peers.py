"""``python -m tests.bench.peers``: the same work through what a user would otherwise pick, each as it comes.

Every peer is installed from PyPI into a throwaway environment of its own; one that does not install, or does not get
through a case within its time, is printed as such. What is printed is a table in markdown.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.server import SimulatedServer, Stats

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("peer_ways.py")
MOST_S = 120.0  # for one peer at one case
INSTALL_S = 600.0


@dataclass(frozen=True, slots=True)
class Peer:
    """A peer: what it is called, its function in `peer_ways`, what to install (nothing: it is here), its package."""

    name: str
    function: str
    install: tuple[str, ...] = ()
    package: str = "openai"


PEERS = (
    Peer("llmframe", "llmframe", package="llmframe-pandas"),
    Peer("AsyncOpenAI + gather, 128", "gather"),
    Peer("openai over aiohttp, 128", "openai_aiohttp"),
    Peer("litellm `batch_completion`, 128", "litellm", ("litellm",), "litellm"),
    Peer("LangChain `abatch`, 128", "langchain", ("langchain-openai",), "langchain-openai"),
    Peer("saturate", "saturate", ("saturate",), "saturate"),
    Peer("flexllm, 128", "flexllm", ("flexllm",), "flexllm"),
    Peer("async-batch-llm, 128", "async_batch_llm", ("async-batch-llm[openai]",), "async-batch-llm"),
    Peer("silkloom-core, 128", "silkloom", ("silkloom-core",), "silkloom-core"),
    Peer("bare aiohttp, 128", "bare_aiohttp", package="aiohttp"),
)


@dataclass(frozen=True, slots=True)
class Work:
    """A case: what the server does, for how many rows."""

    name: str
    rows: int
    behaviour: dict[str, Any]


LIMITED: dict[str, Any] = {
    "latency_s": 0.3,
    "latency_sigma": 0.3,
    "requests_per_min": 6000,
    "request_burst": 100,
    "rate_headers": "openai",
    "retry_after": "seconds",
}
FAULTY: dict[str, Any] = {"latency_s": 0.3, "slots": 64, "p_500": 0.02, "p_reset": 0.01, "p_html": 0.01}
WORKS = (
    Work("6,000 requests/min, 0.3 s", 1500, LIMITED),
    Work("64 slots x 0.3 s, 2 % 500, 1 % reset, 1 % HTML", 1500, FAULTY),
    Work("50 ms, 128 slots", 4000, {"latency_s": 0.05, "slots": 128}),
)


def environment(peer: Peer, directory: Path) -> Path | None:
    """Make the environment of a peer; its interpreter, or None where it does not install."""
    if not peer.install:
        return Path(sys.executable)
    home = directory / peer.function
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    uv = shutil.which("uv")
    try:
        if uv:
            _run([uv, "venv", "-q", "--python", sys.executable, str(home)])
            _run([uv, "pip", "install", "-q", "--python", str(python), *peer.install])
        else:
            _run([sys.executable, "-m", "venv", str(home)])
            _run([str(python), "-m", "pip", "install", "-q", *peer.install])
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return None
    return python


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_S)


def version(python: Path, package: str) -> str:
    """Give the version of a package in an environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "here"


def ask(python: Path, peer: Peer, work: Work, rows: int) -> tuple[int | None, Stats]:
    """Run one peer at one case: the rows answered, None where it did not get through; and what the server saw."""
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if not peer.install:
        environ["PYTHONPATH"] = str(ROOT)
    environ |= {"OPENAI_API_KEY": "sk-bench", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    with SimulatedServer(**work.behaviour, log=False) as server:
        command = [str(python), str(SCRIPT), peer.function, server.base_url, str(rows)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=MOST_S, env=environ, cwd=python.parent, check=False
            )
        except subprocess.TimeoutExpired:
            return None, server.stats()
        last = (done.stdout.strip().splitlines() or [""])[-1]
        if not last.startswith("answered "):
            print(f"<!-- {peer.name}: {done.stderr.strip()[-300:]} -->", flush=True)
            return None, server.stats()
        return int(last.split()[1]), server.stats()


def cells(rows: int, answered: int | None, stats: Stats) -> str:
    """Write what a peer did as the cells of a row."""
    if answered is None or not stats.answered:
        return f"no end within {MOST_S:.0f} s | | " if answered is None and stats.answered else "failed | | "
    return f"{rows / stats.seconds:,.0f} | {stats.refused:,} | {rows - answered:,}"


def main() -> None:
    """Run every peer through every case."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers", description=__doc__)
    parser.add_argument("names", nargs="*", help="words of the peers to run (default: all)")
    parser.add_argument("--rows", type=float, default=1.0, help="times the rows of each case (default 1)")
    chosen = parser.parse_args()
    wanted = [peer for peer in PEERS if not chosen.names or any(word in peer.name for word in chosen.names)]
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    print(f"{datetime.now(UTC):%Y-%m-%d}, {machine}; rows/s from the first request to the last answer\n")
    print("| | version |" + "".join(f" {work.name}: rows/s | 429s | rows lost |" for work in WORKS))
    print("| --- | --- |" + " ---: | ---: | ---: |" * len(WORKS), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        for peer in wanted:
            python = environment(peer, Path(directory))
            if python is None:
                print(f"| {peer.name} | does not install |" + " | | |" * len(WORKS), flush=True)
                continue
            line = f"| {peer.name} | {version(python, peer.package)} |"
            for work in WORKS:
                rows = max(1, int(work.rows * chosen.rows))
                line += f" {cells(rows, *ask(python, peer, work, rows))} |"
            print(line, flush=True)


if __name__ == "__main__":
    main()
