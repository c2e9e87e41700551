"""The ways to ask a model for every row: llmframe's, and those a user would write by hand.

Each takes the server's URL and the prompts, and gives the seconds it took and the rows that got an answer.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine
from typing import Any

import aiohttp
import httpx2
import openai
import pandas as pd

import llmframe

Way = Callable[[str, list[str]], tuple[float, int]]
MODEL = "bench"


def by_llmframe(base_url: str, prompts: list[str]) -> tuple[float, int]:
    """`df.llm.complete` with nothing passed but the model, the endpoint and a checkpoint."""
    frame = pd.DataFrame({"text": prompts})
    with tempfile.TemporaryDirectory() as directory:
        began = time.perf_counter()
        out = llmframe.LLMFrame(frame).complete(
            "text", model=MODEL, base_url=base_url, checkpoint=directory, progress=False
        )
        return time.perf_counter() - began, int((out["response_status"] == "ok").sum())


def by_llmframe_with_own_transport(base_url: str, prompts: list[str]) -> tuple[float, int]:
    """The same with a client whose `http_client` is the user's, which only the SDK can send through."""

    async def ask_all() -> int:
        frame = pd.DataFrame({"text": prompts})
        limits = httpx2.Limits(max_connections=128, max_keepalive_connections=128)
        async with openai.AsyncOpenAI(
            base_url=base_url, api_key="sk-bench", http_client=httpx2.AsyncClient(limits=limits)
        ) as client:
            out = await llmframe.LLMFrame(frame).acomplete(
                "text", model=MODEL, client=client, checkpoint=directory, progress=False
            )
        return int((out["response_status"] == "ok").sum())

    with tempfile.TemporaryDirectory() as directory:
        return _timed(ask_all())


def by_gather(in_flight: int) -> Way:
    """`AsyncOpenAI`, a semaphore and `asyncio.gather`."""

    async def ask_all(base_url: str, prompts: list[str]) -> int:
        gate = asyncio.Semaphore(in_flight)
        async with openai.AsyncOpenAI(base_url=base_url, api_key="sk-bench") as client:

            async def ask(text: str) -> bool:
                async with gate:
                    try:
                        await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}])
                    except openai.OpenAIError:
                        return False
                    return True

            return sum(await asyncio.gather(*map(ask, prompts)))

    return lambda base_url, prompts: _timed(ask_all(base_url, prompts))


def by_aiohttp(in_flight: int) -> Way:
    """Bare aiohttp and a pool of workers: no retries, no keys, no store; the client machine's own limit."""

    async def ask_all(base_url: str, prompts: list[str]) -> int:
        waiting = iter(prompts)
        answered = 0
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, headers={"Authorization": "Bearer sk-bench"}) as session:

            async def work() -> None:
                nonlocal answered
                for text in waiting:
                    body = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
                    async with session.post(f"{base_url}/chat/completions", json=body) as response:
                        await response.json()
                        answered += response.status == 200

            await asyncio.gather(*(work() for _ in range(in_flight)))
        return answered

    return lambda base_url, prompts: _timed(ask_all(base_url, prompts))


def _timed(work: Coroutine[Any, Any, int]) -> tuple[float, int]:
    began = time.perf_counter()
    answered = asyncio.run(work)
    return time.perf_counter() - began, answered
