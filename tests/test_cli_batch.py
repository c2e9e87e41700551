"""Batch jobs from the shell: submit, status, wait, collect, cancel and resubmit, and a run that goes by batch first."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from llmframe import batch_work
from llmframe.cli import main
from tests.server_batch import BatchServer


@pytest.fixture(scope="module")
def server() -> Iterator[BatchServer]:
    with BatchServer() as server:
        yield server


@pytest.fixture
def here(
    tmp_path: Path, server: BatchServer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> list[str]:
    """Work in a directory with ten rows in it, whose texts no other test has."""
    server.change(stop_after=None)
    monkeypatch.setattr(batch_work, "SETTLE_S", 0.2)  # the server is never late
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    monkeypatch.setenv("LLMFRAME_MODEL", "m")
    texts = [f"{request.node.name} {number}" for number in range(10)]
    pd.DataFrame({"text": texts, "score": range(10)}).to_parquet("in.parquet")
    return texts


def batch(verb: str, *arguments: str) -> int:
    return main(["batch", verb, *arguments, "--poll-s", "0.02", "--quiet"])


def test_a_job_is_submitted_waited_for_and_collected(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert batch("submit", "in.parquet", "{text}", "--job", "job") == 0
    assert "of 10 requests answered" in capsys.readouterr().out
    assert batch("wait", "job") == 0
    assert batch("collect", "job", "out.parquet") == 0
    assert pd.read_parquet("out.parquet")["response"].tolist() == [f"echo: {text}" for text in here]


def test_json_is_one_line_of_figures(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    batch("submit", "in.parquet", "{text}", "--job", "job", "--limit", "4")
    capsys.readouterr()
    assert batch("wait", "job", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    said = json.loads(line)
    assert said["ended"]
    assert said["counts"] == {"ok": 4}
    assert said["parts"][0]["status"] == "completed"


def test_rows_without_an_answer_are_status_3_and_can_be_submitted_again(
    here: list[str], server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.change(stop_after=4)
    batch("submit", "in.parquet", "{text}", "--job", "job")
    assert batch("cancel", "job") == 0
    assert batch("wait", "job") == 3
    assert "pending; `llmframe batch resubmit` asks again" in capsys.readouterr().err
    server.change(stop_after=None)
    assert batch("resubmit", "job") == 0
    assert batch("wait", "job") == 0


def test_what_has_come_is_collected_while_the_rest_goes_on(here: list[str], server: BatchServer) -> None:
    server.change(stop_after=4)
    batch("submit", "in.parquet", "{text}", "--job", "job")
    assert batch("collect", "job", "out.parquet") == 3
    assert pd.read_parquet("out.parquet")["response_status"].eq("pending").all()
    batch("cancel", "job")


def test_no_job_is_wrong_use(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert batch("status", "job") == 2
    assert "there is no Batch job in job" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM there")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_wait_leaves_the_job_running_and_says_how_to_come_back(
    here: list[str], server: BatchServer, number: int
) -> None:
    server.change(stop_after=4)
    batch("submit", "in.parquet", "{text}", "--job", "job")
    command = [sys.executable, "-m", "llmframe.cli", "batch", "wait", "job", "--poll-s", "0.02"]
    waiting = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    before = len(server.log())
    while len(server.log()) < before + 3 and waiting.poll() is None:
        pass
    waiting.send_signal(number)
    _, said = waiting.communicate(timeout=60)
    assert waiting.returncode == 4
    assert "the job goes on at the provider" in said
    assert "BatchJob.open('job').wait() comes back to it" in said
    assert [each["status"] for each in server.batches()][:1] == ["in_progress"]
    server.change(stop_after=None)
    assert batch("wait", "job") == 0


def test_a_run_by_batch_gives_the_sink_of_a_run_and_asks_online_only_what_the_batch_left(
    here: list[str], server: BatchServer
) -> None:
    frame = pd.read_parquet("in.parquet")
    frame.loc[3, "text"] = f"[[batch=drop]] {here[3]}"
    frame.to_parquet("in.parquet")
    before = len(server.log())
    # Its polling is that of a provider, so that the batch has to be over at the first look.
    assert main(["run", "in.parquet", "out.parquet", "{text}", "--batch", "--poll-s", "0.02", "--quiet"]) == 0
    online = [line for line in server.log()[before:] if line == "POST /v1/chat/completions"]
    assert len(online) == 1
    out = pd.read_parquet("out.parquet")
    assert out["response_status"].eq("ok").all()
    assert out.columns.tolist()[:3] == ["text", "score", "response"]
    assert os.path.isdir("out.parquet.batch")


def test_a_run_by_batch_asks_no_row_online_that_may_be_in_a_batch_not_to_be_found(
    here: list[str], server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "in.parquet", "out.parquet", "{text}", "--batch", "--poll-s", "0.02", "--quiet"]
    server.change(content_share=0.45)
    paid, online = server.paid(), server.log().count("POST /v1/chat/completions")
    for _ in range(2):
        assert main(command) == 4
        assert "may be paid for, so they are not asked online" in capsys.readouterr().err
    server.change(content_share=1.0)
    assert main(command) == 0
    assert pd.read_parquet("out.parquet")["response_status"].eq("ok").all()
    assert {count - paid.get(text, 0) for text, count in server.paid().items()} <= {0, 1}
    assert server.log().count("POST /v1/chat/completions") == online


def test_a_run_by_batch_whose_source_has_grown_says_how_to_go_on_and_pays_nothing_twice(
    here: list[str], server: BatchServer, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "in.parquet", "out.parquet", "{text}", "--batch", "--poll-s", "0.02", "--quiet"]
    assert main(command) == 0
    paid = sum(server.paid().values())
    pd.DataFrame({"text": [*here, f"{here[0]} more"]}).to_parquet("in.parquet")
    assert main(command) == 2
    assert "let it end (llmframe batch wait out.parquet.batch), move that directory away" in capsys.readouterr().err
    assert main(["batch", "wait", "out.parquet.batch"]) == 0
    Path("out.parquet.batch").rename("before.batch")
    assert main(command) == 0
    assert sum(server.paid().values()) == paid + 1


@pytest.mark.skipif(sys.platform == "win32", reason="no links without a privilege there")
def test_a_run_by_batch_is_done_where_its_directory_cannot_be_deleted(
    here: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkdir("large disk")
    os.symlink("large disk", "out.parquet.batch")  # which `rmtree` refuses
    command = ["run", "in.parquet", "out.parquet", "{text}", "--batch", "--poll-s", "0.02", "--quiet", "--clean"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("llmframe: out.parquet.batch could not be deleted: ")
    assert printed.out.startswith("10 ok; ")
    assert pd.read_parquet("out.parquet")["response_status"].eq("ok").all()


def test_files_whose_types_differ_are_refused_in_words(here: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    os.mkdir("in")
    for name, scores in (("a", [1]), ("b", [1.5])):
        pd.DataFrame({"text": here[:1], "score": scores}).to_parquet(f"in/{name}.parquet")
    assert batch("submit", "in", "{text}", "--job", "job") == 2
    assert "the files of in have not all the same types" in capsys.readouterr().err
    assert not os.path.exists("job")
