"""``python -m tests.bench.files``: jobs over parquet files: what they take of memory, and how fast beside the accessor.

Each measurement is a process of its own, whose peak is the highest resident set that the kernel has seen.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

import llmframe
from tests.memory import peak_mb
from tests.server import SimulatedServer

MOST_MB = 600  # of a job over a million rows
MOST_GROWTH = 0.15  # of its peak over that of a fifth of the rows
INDEX_BYTES = 64  # a row, that the growth leaves out
LEAST_OF_ACCESSOR = 0.95
CHARACTERS = 200  # of a text
GROUP_ROWS = 50_000
WORDS = "the guitar arrived on time and it sounds warm and full but the strings were old and out of tune "


def main() -> None:
    """Measure, and print the figures beside what they have to be."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.files", description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the large file (default 1,000,000)")
    parser.add_argument("--speed-rows", type=int, default=30_000, help="of the comparison (default 30,000; 0: none)")
    parser.add_argument("--one", nargs=4, metavar=("WAY", "SOURCE", "URL", "SINK"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(measured(*chosen.one)))
        return
    with tempfile.TemporaryDirectory() as place, SimulatedServer(log=False) as server:
        if chosen.rows:
            memory(Path(place), server, chosen.rows)
        if chosen.speed_rows:
            speed(Path(place), server, chosen.speed_rows)


def memory(place: Path, server: SimulatedServer, rows: int) -> None:
    """Compare the peak of a large file with that of a fifth of it."""
    print(f"{'':34}{'peak MB':>9}{'most':>7}{'rows/s':>9}{'checkpoint':>12}{'bytes/row':>11}", flush=True)
    small, large = (one("job", place, server, count) for count in (rows // 5, rows))
    for count, made, most in ((rows // 5, small, MOST_MB), (rows, large, MOST_MB)):
        kept = made["checkpoint_bytes"] / count
        print(
            f"  {f'{count:,} rows of {CHARACTERS} characters':32}{made['peak_mb']:9.0f}{most:7}"
            f"{count / made['seconds']:9,.0f}{made['checkpoint_bytes'] / 1e6:9,.0f} MB{kept:11.0f}"
        )
    index_mb = INDEX_BYTES * (rows - rows // 5) / 1e6
    growth = (large["peak_mb"] - index_mb) / small["peak_mb"] - 1
    print(f"  grown by {growth:.1%}, the index of {index_mb:.0f} MB aside; at most {MOST_GROWTH:.0%}", flush=True)


def speed(place: Path, server: SimulatedServer, rows: int) -> None:
    """Compare a job with the accessor on the same rows, three times each, in turns."""
    seconds: dict[str, list[float]] = {"accessor": [], "job": []}
    for _ in range(3):
        for way, taken in seconds.items():
            taken.append(one(way, place, server, rows)["seconds"])
    accessor, job = (rows / min(taken) for taken in seconds.values())
    print(f"  {rows:,} rows, the best of 3: accessor {accessor:,.0f} rows/s, job {job:,.0f} rows/s,", end=" ")
    print(f"{job / accessor:.2f} of it; at least {LEAST_OF_ACCESSOR}", flush=True)


def one(way: str, place: Path, server: SimulatedServer, rows: int) -> dict[str, Any]:
    """Measure in a process of its own."""
    source = place / f"in-{rows}.parquet"
    if not source.exists():
        write(source, rows)
    with tempfile.TemporaryDirectory(dir=place) as sink:
        command = [sys.executable, "-m", "tests.bench.files", "--one", way, str(source), server.base_url, sink]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **KEY})
    made: dict[str, Any] = json.loads(done.stdout)
    return made


KEY = {"OPENAI_API_KEY": "sk-bench"}


def measured(way: str, source: str, base_url: str, directory: str) -> dict[str, Any]:
    """Do one, here."""
    sink = Path(directory) / "out.parquet"
    checkpoint = Path(directory) / "kept"
    call = {"model": "m", "base_url": base_url, "checkpoint": checkpoint, "progress": False}
    began = time.perf_counter()
    if way == "job":
        counts = llmframe.run(source, sink, "Positive or negative? {text}", **call).counts
    else:
        out = llmframe.LLMFrame(pd.read_parquet(source)).complete("Positive or negative? {text}", **call)
        out.to_parquet(sink)
        counts = out["response_status"].value_counts().loc[lambda count: count > 0].to_dict()
    seconds = time.perf_counter() - began
    assert counts.keys() == {"ok"}, counts
    return {
        "seconds": seconds,
        "peak_mb": peak_mb(),
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.glob("*.parquet")),
        "sink_bytes": sink.stat().st_size,
    }


def write(path: Path, rows: int) -> None:
    """Write a file of texts, each its own, and a score."""
    schema = pa.schema([("text", pa.string()), ("score", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, GROUP_ROWS):
            numbers = range(start, min(rows, start + GROUP_ROWS))
            texts = [(f"{number} " + WORDS * 3)[:CHARACTERS] for number in numbers]
            writer.write_table(pa.table([texts, list(numbers)], schema=schema))


if __name__ == "__main__":
    main()
