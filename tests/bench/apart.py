"""Measures that need a process of their own: the memory of a long run, and the time an import takes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.memory import peak_mb

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 7  # of imports; the fastest of each counts, since everything else only makes them slower


def peak_memory_mb(base_url: str, rows: int) -> tuple[float, float, int]:
    """Ask for short rows in a new process: MB at its peak, MB before the run, and rows answered."""
    command = [sys.executable, "-m", "tests.bench.apart", "--url", base_url, "--rows", str(rows)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    peak, before, answered = json.loads(done.stdout)
    return peak, before, answered


def import_s(code: str) -> float:
    """Give the seconds that a new interpreter takes for an import."""
    timed = f"import time; began = time.perf_counter()\n{code}\nprint(time.perf_counter() - began)"
    # An installed package has its bytecode; a clone is given it by the first of the imports.
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", timed], cwd=ROOT, env=environ, check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def imports_compared() -> tuple[float, float]:
    """Give the seconds of ``import llmframe``, and of what nobody who uses it can do without."""
    pairs = [(import_s("import llmframe"), import_s("import pandas, openai")) for _ in range(PAIRS)]
    return min(ours for ours, _ in pairs), min(theirs for _, theirs in pairs)


def main() -> None:
    """Run in the new process."""
    import pandas as pd

    import llmframe

    parser = argparse.ArgumentParser()
    parser.add_argument("--url", required=True)
    parser.add_argument("--rows", type=int, required=True)
    chosen = parser.parse_args()
    os.environ.setdefault("OPENAI_API_KEY", "sk-bench")
    frame = pd.DataFrame({"text": [f"row {number}" for number in range(chosen.rows)]})
    with tempfile.TemporaryDirectory() as directory:
        keywords = {"model": "bench", "base_url": chosen.url, "progress": False}
        llmframe.LLMFrame(frame.head(1)).complete("text", **keywords)  # what is imported at the first call counts not
        time.sleep(0.1)
        before = peak_mb()
        out = llmframe.LLMFrame(frame).complete("text", checkpoint=directory, **keywords)
        peak = peak_mb()
    answered = int((out["response_status"] == "ok").sum())
    print(json.dumps([peak, before, answered]))


if __name__ == "__main__":
    main()
