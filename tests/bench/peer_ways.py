"""One peer at work, in a process and an environment of its own: ``python peer_ways.py PEER URL ROWS``.

Each asks for every row as its own documentation shows it, with 128 in flight where a number has to be chosen, and
prints how many rows got an answer. Nothing is imported but what the peer needs.
"""

import asyncio
import logging
import os
import sys
import tempfile
from typing import Any

IN_FLIGHT = 128
MODEL = "bench"
KEY = "sk-bench"


def messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


async def _gather(url: str, texts: list[str], **client: Any) -> int:
    import openai

    gate = asyncio.Semaphore(IN_FLIGHT)
    async with openai.AsyncOpenAI(base_url=url, api_key=KEY, **client) as asked:

        async def ask(text: str) -> bool:
            async with gate:
                try:
                    await asked.chat.completions.create(model=MODEL, messages=messages(text))  # type: ignore[arg-type]
                except openai.OpenAIError:
                    return False
                return True

        return sum(await asyncio.gather(*map(ask, texts)))


def gather(url: str, texts: list[str]) -> int:
    return asyncio.run(_gather(url, texts))


def openai_aiohttp(url: str, texts: list[str]) -> int:
    async def ask_all() -> int:
        import openai

        return await _gather(url, texts, http_client=openai.DefaultAioHttpClient())

    return asyncio.run(ask_all())


def bare_aiohttp(url: str, texts: list[str]) -> int:
    import aiohttp

    async def ask_all() -> int:
        waiting, answered = iter(texts), 0
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, headers={"Authorization": f"Bearer {KEY}"}) as session:

            async def work() -> None:
                nonlocal answered
                for text in waiting:
                    body = {"model": MODEL, "messages": messages(text)}
                    async with session.post(f"{url}/chat/completions", json=body) as response:
                        await response.read()
                        answered += response.status == 200

            await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
        return answered

    return asyncio.run(ask_all())


def llmframe(url: str, texts: list[str]) -> int:
    import pandas as pd

    import llmframe as ours

    with tempfile.TemporaryDirectory() as directory:
        out = ours.LLMFrame(pd.DataFrame({"text": texts})).complete(
            "text", model=MODEL, base_url=url, api_key=KEY, checkpoint=directory, progress=False
        )
    return int((out["response_status"] == "ok").sum())


def litellm(url: str, texts: list[str]) -> int:
    import litellm as peer

    peer.suppress_debug_info = True
    made = peer.batch_completion(
        model=f"openai/{MODEL}", messages=[messages(text) for text in texts], api_base=url, api_key=KEY, max_workers=128
    )
    return sum(hasattr(each, "choices") for each in made)


def langchain(url: str, texts: list[str]) -> int:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model=MODEL, base_url=url, api_key=KEY)
    made = asyncio.run(model.abatch(texts, config={"max_concurrency": IN_FLIGHT}, return_exceptions=True))
    return sum(not isinstance(each, Exception) for each in made)


def saturate(url: str, texts: list[str]) -> int:
    from saturate import pump

    with tempfile.TemporaryDirectory() as directory:
        stats = pump(
            [(str(number), {"text": text}) for number, text in enumerate(texts)],
            to_request=lambda row: {"model": MODEL, "messages": messages(row["text"])},
            parse=lambda _, reply: {"answer": reply["choices"][0]["message"]["content"]},
            endpoint=url,
            output=directory,
        )
    return int(stats.rows_processed)


def flexllm(url: str, texts: list[str]) -> int:
    from flexllm import LLMClient

    async def ask_all() -> int:
        client = LLMClient(base_url=url, model=MODEL, api_key=KEY, concurrency_limit=IN_FLIGHT)
        made = await client.chat_completions_batch([messages(text) for text in texts], show_progress=False)
        return sum(isinstance(each, str) and each.startswith("echo") for each in made)

    return asyncio.run(ask_all())


def async_batch_llm(url: str, texts: list[str]) -> int:
    from async_batch_llm import llm, process_prompts

    async def ask_all() -> int:
        strategy = llm(f"openai-compatible:{MODEL}", base_url=url, api_key=KEY)
        batch = await process_prompts(strategy, texts, concurrency=IN_FLIGHT)
        return sum(each.success for each in batch.results)

    return asyncio.run(ask_all())


def silkloom(url: str, texts: list[str]) -> int:
    import pandas as pd
    import silkloom_core

    silkloom_core.configure(api_key=KEY, base_url=url)
    frame = pd.DataFrame({"text": [f'{text} [[say={{"label": "good"}}]]' for text in texts]})
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)  # it keeps a cache where it runs
        out = frame.llm.extract("{{ text }}", model=MODEL, max_workers=IN_FLIGHT, json_mode=True)
    return int((out["label"] == "good").sum())


def main() -> None:
    """Run one of them."""
    name, url, rows = sys.argv[1:]
    logging.disable(logging.CRITICAL)
    texts = [f"row {number}: is this review positive or negative?" for number in range(int(rows))]
    answered = globals()[name](url, texts)
    print(f"\nanswered {answered}", flush=True)


if __name__ == "__main__":
    main()
