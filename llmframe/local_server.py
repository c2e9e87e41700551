"""The process that serves the embedded model: ``python local_server.py MODEL.gguf [embeddings]``.

It prints its address, then serves until its standard input closes, so it never outlives whoever started it,
however that one ended. It imports nothing of llmframe: it has to start fast.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

SLOTS = 4  # requests decoded together: 1.35 x the rows a second of one; 8 would add a tenth, for 400 MB more
SLOT_TOKENS = 4096  # prompt and answer of one request; each slot has its own, so that no row's neighbours can fail it
EMBEDDED_TOKENS = 2048  # of one text that is embedded; its memory is taken whether or not any is so long
HTTP_THREADS = 64  # a kept-alive connection holds one, busy or not; with fewer, a waiting one is not even read
# The threads wait for each other hundreds of times a token, so one that shares its core with the caller, or with its
# own core's second half, stalls them all: two threads on two busy cores were up to 30 x slower than one, and 1.3 x
# faster on two idle ones.
SHARE = 0.5  # threads for each CPU
PROMPT_CACHE_MIB = 0  # slots keep the prefix that rows share; the further cache (8 GiB unless told) has no use here


def serve(model: str, *, embeddings: bool = False) -> None:
    """Serve a model, or the embeddings that it makes, until standard input closes."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.model_alias = {"local"}
    params.verbosity = 1  # errors, for whoever reads standard error
    params.n_parallel = SLOTS
    params.n_ctx = SLOTS * SLOT_TOKENS
    params.n_threads_http = HTTP_THREADS
    params.cache_prompt = False  # else an answer at temperature 0 depends on which rows came before it
    params.cache_ram_mib = PROMPT_CACHE_MIB
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = max(1, round(cpus() * SHARE))
    if embeddings:  # a text is taken whole or refused, so the batch is as long as the longest
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
        params.n_ctx = SLOTS * EMBEDDED_TOKENS
        params.n_batch = params.n_ubatch = EMBEDDED_TOKENS
    params.cors_origins = ""  # no web page gets to use it
    params.ui = params.endpoint_slots = False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    # Loaded: from here on nobody reads what it says, and a line for each refused request would fill a disk.
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    sys.stdin.buffer.read()
    os._exit(0)  # at once, answers in flight or not: nobody is left to read them


def cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Count the CPUs that this process may use."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        count = os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return max(1, min(count, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup, or "max"
        return count


if __name__ == "__main__":
    serve(sys.argv[1], embeddings="embeddings" in sys.argv[2:])
