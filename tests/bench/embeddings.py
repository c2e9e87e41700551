"""``python -m tests.bench.embeddings``: 100,000 texts to vectors, beside `AsyncOpenAI` and `asyncio.gather`.

The machine's speed drifts, so what counts are the ratios within one run. Every way is a process of its own, whose
highest memory is printed; the texts are the same, and so is the simulated server, which runs beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import openai
import pandas as pd

import llmframe  # noqa: F401  (the accessor)
from tests.memory import peak_mb
from tests.server import SimulatedServer, embedding_of

WORDS = (
    "it",
    "has",
    "a",
    "good",
    "sound",
    "and",
    "the",
    "battery",
    "lasts",
    "a",
    "day",
    "though",
    "the",
    "case",
    "is",
    "old",
)
CHUNK, IN_FLIGHT = 512, 16  # of the way written by hand, the best of those tried


def texts(count: int, dimensions: int | None = None) -> list[str]:
    """Make texts of a review's sentence each, all different; the server gives them vectors of that length unasked."""
    wish = "" if dimensions is None else f" [[dimensions={dimensions}]]"
    return [f"review {number}: {' '.join(WORDS[number % 7 :])}{wish}" for number in range(count)]


def by_llmframe(base_url: str, frame: pd.DataFrame, dimensions: int) -> Any:
    """`df.llm.embed` with nothing passed but the model, the endpoint, the length and a checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        return frame.llm.embed(
            "text", model="bench", base_url=base_url, dimensions=dimensions, checkpoint=directory, progress=False
        )["embedding"]


def without_checkpoint(base_url: str, frame: pd.DataFrame, dimensions: int) -> Any:
    """The same, and nothing is kept."""
    return frame.llm.embed("text", model="bench", base_url=base_url, dimensions=dimensions, progress=False)["embedding"]


def unasked(base_url: str, frame: pd.DataFrame, dimensions: int) -> Any:
    """As the first, and no length is passed: what a reply will hold is known when the first has come."""
    with tempfile.TemporaryDirectory() as directory:
        return frame.llm.embed("text", model="bench", base_url=base_url, checkpoint=directory, progress=False)[
            "embedding"
        ]


def by_gather(base_url: str, frame: pd.DataFrame, dimensions: int) -> Any:
    """`embeddings.create` on chunks, a semaphore and `gather`: no store, and floats as the SDK gives them."""

    async def ask_all() -> list[Any]:
        gate = asyncio.Semaphore(IN_FLIGHT)
        column = frame["text"].tolist()
        async with openai.AsyncOpenAI(base_url=base_url, api_key="sk-bench") as client:

            async def ask(start: int) -> list[Any]:
                async with gate:
                    made = await client.embeddings.create(
                        model="bench", input=column[start : start + CHUNK], dimensions=dimensions
                    )
                return [np.array(one.embedding, np.float32) for one in made.data]

            made = await asyncio.gather(*map(ask, range(0, len(column), CHUNK)))
        return [vector for chunk in made for vector in chunk]

    return pd.Series(asyncio.run(ask_all()), dtype=object)


UNASKED = "no length passed"
WAYS = {
    "llmframe": by_llmframe,
    UNASKED: unasked,
    "without a checkpoint": without_checkpoint,
    "AsyncOpenAI + gather": by_gather,
}


def main() -> None:
    """Run every way in a process of its own, or one of them in this one."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.embeddings", description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="texts (default 100,000)")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[256, 1536])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--one", nargs=2, metavar=("WAY", "URL"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    os.environ.setdefault("OPENAI_API_KEY", "sk-bench")
    if chosen.one:
        print(json.dumps(_measured(chosen.one[0], chosen.one[1], chosen.rows, chosen.dimensions[0])))
        return
    print(f"{'':34}{'seconds':>9}{'texts/s':>10}{'CPU us/text':>13}{'highest MB':>12}")
    for dimensions in chosen.dimensions:
        print(f"{chosen.rows:,} texts, {dimensions:,} dimensions")
        for way in chosen.ways:
            with SimulatedServer(log=False) as server:
                command = [sys.executable, "-m", "tests.bench.embeddings", "--one", way, server.base_url]
                command += ["--rows", str(chosen.rows), "--dimensions", str(dimensions)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds, cpu, megabytes, before = json.loads(done.stdout.splitlines()[-1])
            figures = f"{seconds:9.1f}{chosen.rows / seconds:10,.0f}{cpu * 1e6 / chosen.rows:13.1f}{megabytes:12,.0f}"
            print(f"  {way:32}{figures}  ({before:,.0f} before the call)", flush=True)


def _measured(way: str, base_url: str, rows: int, dimensions: int) -> tuple[float, float, float, float]:
    frame = pd.DataFrame({"text": texts(rows, dimensions if way == UNASKED else None)})
    before, began, cpu = peak_mb(), time.perf_counter(), time.process_time()
    column = WAYS[way](base_url, frame, dimensions)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    highest = peak_mb()
    for place in range(0, rows, max(1, rows // 100)):
        assert np.allclose(column.iloc[place], embedding_of(frame["text"].iloc[place], dimensions), atol=1e-6)
    return seconds, cpu, highest, before


if __name__ == "__main__":
    main()
