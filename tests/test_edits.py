"""An edited call asks exactly what changed, and calls at one time share a directory; the server counts."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import llmframe
from tests.server import SimulatedServer

ROWS = 30


def frame() -> pd.DataFrame:
    return pd.DataFrame({"text": [f"row {number}" for number in range(ROWS)]})


def call(server: SimulatedServer, rows: pd.DataFrame, prompt: str = "Say: {text}", **keywords: Any) -> pd.DataFrame:
    given = {"model": "m", "temperature": 0.5, "base_url": server.base_url, "progress": False, **keywords}
    out: pd.DataFrame = rows.llm.complete(prompt, **given)
    assert (out["response_status"] == "ok").all()
    said = [text.removeprefix("echo: ") for text in out["response"]]
    assert said == [prompt.replace("{text}", text) for text in out["text"]]
    return out


def replaced(rows: pd.DataFrame) -> pd.DataFrame:
    rows.loc[7, "text"] = "row seven"
    return rows


EDITS: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], dict[str, Any], int]] = {
    "nothing": (lambda rows: rows, {}, 0),
    "one character of the prompt": (lambda rows: rows, {"prompt": "Say, {text}"}, ROWS),
    "one row's text": (replaced, {}, 1),
    "the order": (lambda rows: rows.iloc[::-1], {}, 0),
    "the index": (lambda rows: rows.set_axis(["same"] * ROWS), {}, 0),
    "rows added": (lambda rows: pd.concat([rows, pd.DataFrame({"text": ["new", "newer"]})]), {}, 2),
    "rows dropped": (lambda rows: rows.drop(index=[3, 4]), {}, 0),
    "duplicate rows": (lambda rows: pd.concat([rows, rows, rows.head(3)]), {}, 0),
    "duplicates that are to have answers of their own": (
        lambda rows: pd.concat([rows, rows.head(3)]),
        {"dedupe": False},
        3,
    ),
    "a column added": (lambda rows: rows.assign(other=1), {}, 0),
    "another model": (lambda rows: rows, {"model": "n"}, ROWS),
    "another temperature": (lambda rows: rows, {"temperature": 0.6}, ROWS),
    "the temperature, written otherwise": (lambda rows: rows, {"temperature": 5e-1}, 0),
    "another key, timeout, pace and price": (
        lambda rows: rows,
        {"api_key": "sk-b", "timeout": 9, "max_concurrency": 3, "max_attempts": 2, "details": True}
        | {"extra_headers": {"x-trace": "1"}, "prices": {"input": 1, "output": 1}, "on_error": "raise"},
        0,
    ),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.filterwarnings("ignore:llmframe. 0 of 30 answers")
def test_exactly_the_changed_requests_are_asked(server: SimulatedServer, tmp_path: Path, edit: str) -> None:
    change, keywords, asked = EDITS[edit]
    call(server, frame(), checkpoint=tmp_path)
    server.reset()
    call(server, change(frame()), checkpoint=tmp_path, **keywords)
    assert server.stats().received == asked


@pytest.mark.filterwarnings("ignore:llmframe. 0 of 30 answers")
def test_another_endpoint_is_asked_anew_and_another_spelling_of_it_is_not(
    server: SimulatedServer, tmp_path: Path
) -> None:
    call(server, frame(), checkpoint=tmp_path)
    call(server, frame(), checkpoint=tmp_path, base_url=server.base_url + "/")
    assert server.stats().received == ROWS
    call(server, frame(), checkpoint=tmp_path, base_url=server.base_url.replace("127.0.0.1", "localhost"))
    assert server.stats().received == 2 * ROWS


def test_two_threads_on_one_directory_both_get_every_answer(server: SimulatedServer, tmp_path: Path) -> None:
    server.configure(latency_s=0.01)
    call(server, frame().head(10), checkpoint=tmp_path)
    outs: list[pd.DataFrame] = []
    threads = [
        threading.Thread(target=lambda: outs.append(call(server, frame(), checkpoint=tmp_path))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outs) == 2
    assert 0 <= server.stats().answered - ROWS <= ROWS - 10  # those on disk when both began are asked by neither
    server.reset()
    call(server, frame(), checkpoint=tmp_path)
    assert server.stats().received == 0


PROCESS = """
import sys, pandas as pd, llmframe
url, directory, start, stop = sys.argv[1:]
frame = pd.DataFrame({"text": [f"row {n}" for n in range(int(start), int(stop))]})
out = frame.llm.complete("Say: {text}", model="m", temperature=0.5, base_url=url, checkpoint=directory, progress=False)
assert (out["response"] == "echo: Say: " + out["text"]).all()
print("right")
"""


def test_two_processes_on_one_directory_ask_nothing_that_was_on_disk_when_they_began(
    server: SimulatedServer, tmp_path: Path
) -> None:
    call(server, frame(), checkpoint=tmp_path)
    server.reset(latency_s=0.05)
    spans = (("0", "120"), ("0", "120"))
    command = [sys.executable, "-c", PROCESS, server.base_url, str(tmp_path)]
    both = [subprocess.Popen([*command, *span], stdout=subprocess.PIPE, text=True) for span in spans]
    assert [process.communicate()[0] for process in both] == ["right\n", "right\n"]
    first = {f"Say: row {number}" for number in range(ROWS)}
    assert not first & {request.text for request in server.requests()}
    server.reset()
    rows = pd.DataFrame({"text": [f"row {number}" for number in range(120)]})
    call(server, rows, checkpoint=tmp_path)
    assert server.stats().received == 0
    assert len(llmframe.read_checkpoint(tmp_path)) == 120
