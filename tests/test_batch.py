"""Batch jobs against a real server that keeps files and batches: the same call, half the price, nothing twice."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pandas as pd
import pytest
from pydantic import BaseModel

from llmframe import BatchJob, batch_work
from llmframe.batch_api import Away, BatchApi
from llmframe.batch_ledger import Part, Place
from llmframe.endpoint import resolve
from llmframe.errors import BudgetExceeded, ConfigurationError, EndpointError, Interrupted, LLMFrameWarning
from llmframe.transports import Extras
from tests.server_batch import BatchBehaviour, BatchServer, Trap

POLL_S = 0.02
UNLIKE = ["response_source", "response_latency_s", "response_request_id"]  # what a batch may say otherwise
PRICES = {"input": 1.0, "output": 2.0}


@pytest.fixture(scope="module")
def _server() -> Iterator[BatchServer]:
    with BatchServer() as server:
        yield server


@pytest.fixture
def server(_server: BatchServer) -> BatchServer:
    """A Batch API with default behaviour; what other tests were paid for is still counted."""
    _server.change(**{name: getattr(BatchBehaviour(), name) for name in BatchBehaviour.__dataclass_fields__})
    _server.trap()
    with openai.OpenAI(base_url=_server.base_url, api_key="any") as client:
        for file in _server.files():
            client.files.delete(file["id"])
    return _server


@pytest.fixture(autouse=True)
def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Believe soon that what is not there is missing: this server is never late unless it is told to be."""
    monkeypatch.setattr(batch_work, "SETTLE_S", 0.2)


@pytest.fixture
def frame(request: pytest.FixtureRequest) -> pd.DataFrame:
    """Rows whose texts no other test has, one of them twice, with an index of their own."""
    texts = [f"{request.node.name} {number}" for number in range(9)]
    return pd.DataFrame({"text": [*texts, texts[3]]}, index=pd.Index(list("aabbccddee"), name="letter"))


def submit(server: BatchServer, frame: pd.DataFrame, tmp_path: Path, **keywords: Any) -> BatchJob:
    keywords = {"model": "m", "base_url": server.base_url, "job": tmp_path / "job", "poll_s": POLL_S, **keywords}
    return frame.llm.submit_batch(keywords.pop("prompt", "{text}"), progress=False, **keywords)


def reopened(server: BatchServer, tmp_path: Path, **keywords: Any) -> BatchJob:
    return BatchJob.open(tmp_path / "job", base_url=server.base_url, poll_s=POLL_S, progress=False, **keywords)


def complete(server: BatchServer, frame: pd.DataFrame, checkpoint: Path, **keywords: Any) -> pd.DataFrame:
    keywords = {"model": "m", "base_url": server.base_url, "checkpoint": checkpoint, **keywords}
    return frame.llm.complete(keywords.pop("prompt", "{text}"), progress=False, **keywords)


def paid_for(server: BatchServer, frame: pd.DataFrame) -> list[int]:
    """How often each text of the frame was paid for."""
    from tests.server_batch import content_key

    paid = server.paid()
    bodies = [{"model": "m", "messages": [{"role": "user", "content": text}]} for text in frame["text"].unique()]
    return [paid.get(content_key(body), 0) for body in bodies]


class Review(BaseModel):
    """What a schema test asks for."""

    summary: str
    stars: int


# ---- the same call


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_a_batch_gives_the_columns_of_complete(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path, api: Any
) -> None:
    out = submit(server, frame, tmp_path, details=True, api=api, prices=PRICES).wait().frame()
    online = complete(server, frame, tmp_path / "other", details=True, api=api, prices=PRICES)
    pd.testing.assert_series_equal(out["response_cost_usd"], online["response_cost_usd"] / 2)
    unlike = [*UNLIKE, "response_cost_usd"]
    pd.testing.assert_frame_equal(out.drop(columns=unlike), online.drop(columns=unlike))


@pytest.mark.parametrize(
    "schema", [["good", "bad"], Review, Review.model_json_schema()], ids=["labels", "model", "json"]
)
def test_a_schema_gives_its_typed_columns_also_in_another_process(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path, schema: Any
) -> None:
    submit(server, frame, tmp_path, schema=schema)
    out = reopened(server, tmp_path).wait().frame()
    pd.testing.assert_frame_equal(out, complete(server, frame, tmp_path / "other", schema=schema))


def test_embeddings_come_by_batch_too_and_embed_finds_them(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    keywords: dict[str, Any] = {"model": "m", "base_url": server.base_url, "progress": False, "details": True}
    frame.iloc[1, 0] = "[[fail_first=1]] " + frame.iloc[1, 0]
    job = submit(server, frame, tmp_path, prompt="text", api="embeddings", prices={"input": 2.0}, details=True).wait()
    assert job.counts == {"ok": 9, "failed": 1}
    out = reopened(server, tmp_path).resubmit().wait().frame()
    asked = len(server.log())
    found = frame.llm.embed("text", checkpoint=tmp_path / "job" / "answers", **keywords)
    assert len(server.log()) == asked
    online = frame.llm.embed("text", **keywords)
    unlike = [f"embedding_{name}" for name in ("source", "latency_s", "request_id", "cost_usd")]
    for column in ("embedding", "embedding_status", "embedding_error", "embedding_prompt_tokens"):
        assert out[column].map(repr).tolist() == found[column].map(repr).tolist() == online[column].map(repr).tolist()
    assert out.drop(columns=unlike).columns.tolist() == online.drop(columns=unlike).columns.tolist()
    tokens = out["embedding_prompt_tokens"].sum()
    assert out["embedding_cost_usd"].sum() == pytest.approx(tokens * 1e-6)


def test_complete_finds_the_answers_of_a_batch_and_asks_nothing(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    job = submit(server, frame, tmp_path, checkpoint=tmp_path / "runs").wait()
    asked = len(server.log())
    out = complete(server, frame, tmp_path / "runs")
    assert len(server.log()) == asked
    pd.testing.assert_frame_equal(job.frame(), out)


def test_rows_that_the_checkpoint_answers_are_not_submitted(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    complete(server, frame.iloc[:4], tmp_path / "runs")
    job = submit(server, frame, tmp_path, checkpoint=tmp_path / "runs", details=True).wait()
    assert job.parts["requests"].tolist() == [5]
    assert job.frame()["response_source"].tolist() == ["checkpoint"] * 4 + ["request"] * 5 + ["duplicate"]
    assert paid_for(server, frame) == [1] * 9


def test_a_job_whose_rows_are_all_answered_submits_nothing(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    complete(server, frame, tmp_path / "runs")
    asked = len(server.log())
    job = submit(server, frame, tmp_path, checkpoint=tmp_path / "runs")
    assert job.ended
    assert job.wait().frame()["response_status"].eq("ok").all()
    assert len(server.log()) == asked


def test_rows_left_out_and_rows_without_a_value_are_skipped(server: BatchServer, tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["skips a", None, "skips c"]})
    out = submit(server, frame, tmp_path, where=[True, True, False]).wait().frame()
    assert out["response_status"].tolist() == ["ok", "skipped", "skipped"]


def test_the_frame_comes_back_in_another_process_with_its_types_and_index(server: BatchServer, tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "text": [f"types {number}" for number in range(4)],
            "small": pd.array([1, None, 3, 4], dtype="Int8"),
            "day": pd.date_range("2024-01-01", periods=4, tz="Europe/Berlin"),
            "kind": pd.Categorical(["a", "b", "a", None]),
            "tags": [["x"], [], None, ["y", "z"]],
            "nested": [{"a": {"b": 1}}] * 4,
            7: [1.5, 2.5, 3.5, 4.5],
        },
        index=pd.MultiIndex.from_tuples([("x", 1), ("x", 1), ("y", 2), ("y", 3)], names=["one", None]),
    )
    job = submit(server, frame, tmp_path).wait()
    pd.testing.assert_frame_equal(reopened(server, tmp_path).frame(), job.frame())


def test_a_column_that_no_file_keeps_comes_back_with_the_frame_itself(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    frame["thing"] = [object() for _ in range(len(frame))]
    expected = submit(server, frame, tmp_path).wait().frame()
    with pytest.warns(LLMFrameWarning, match=r"could not keep the column\(s\) thing"):
        assert "thing" not in reopened(server, tmp_path).frame()
    pd.testing.assert_frame_equal(reopened(server, tmp_path).frame(frame), expected)
    with pytest.raises(ConfigurationError, match="not the frame that was submitted"):
        reopened(server, tmp_path).frame(frame.iloc[:3])


# ---- what a line may come to


def test_each_end_of_a_line_reaches_its_row(server: BatchServer, tmp_path: Path) -> None:
    texts = {
        "ok": "ends as it should",
        "twice": "[[batch=twice]] ends twice",
        "both": "[[batch=both]] ends in both files",
        "4xx": "[[status=400]] ends",
        "filtered": "[[status=400:content_filter]] ends",
        "5xx": "[[status=500]] ends",
        "missing": "[[batch=drop]] ends",
        "refusal": "[[refusal=I cannot]] ends",
        "cut": "[[finish=length]] ends",
    }
    frame = pd.DataFrame({"text": texts.values()}, index=texts.keys())
    out = submit(server, frame, tmp_path).wait().frame()
    statuses = out["response_status"].astype(str).to_dict()
    assert statuses == {
        "ok": "ok",
        "twice": "ok",
        "both": "ok",
        "4xx": "failed",
        "filtered": "filtered",
        "5xx": "failed",
        "missing": "pending",
        "refusal": "refused",
        "cut": "truncated",
    }
    assert out.loc["4xx", "response_error"] == "HTTP 400: The simulated server was told to answer 400."
    assert out.loc["missing", "response_error"] == "not asked: the batch (completed) gave no line for it"
    assert paid_for(server, frame.loc[["twice", "both"]]) == [1, 1]


def test_resubmit_asks_again_what_may_get_an_answer_and_nothing_else(server: BatchServer, tmp_path: Path) -> None:
    texts = ["again ok", "[[status=400]] again", "[[fail_first=1]] again", "[[status=400]] again too"]
    frame = pd.DataFrame({"text": texts})
    job = submit(server, frame, tmp_path).wait()
    assert job.counts == {"ok": 1, "failed": 3}
    assert job.parts["left"].tolist() == [1]
    out = reopened(server, tmp_path).resubmit().wait().frame()
    assert out["response_status"].tolist() == ["ok", "failed", "ok", "failed"]
    assert paid_for(server, frame) == [1, 0, 1, 0]


def test_resubmit_leaves_out_what_complete_has_answered_meanwhile(server: BatchServer, tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["[[fail_first=1]] m 1", "[[fail_first=1]] m 2"]})
    job = submit(server, frame, tmp_path, checkpoint=tmp_path / "runs").wait()
    complete(server, frame.iloc[:1], tmp_path / "runs")
    job.resubmit().wait()
    assert job.counts == {"ok": 2}
    assert paid_for(server, frame) == [1, 1]


def test_a_line_that_the_validation_names_fails_its_row_and_the_others_go_again_by_themselves(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    frame.iloc[2, 0] = "[[batch=refuse]] " + frame.iloc[2, 0]
    out = submit(server, frame, tmp_path).wait().frame()
    assert out["response_status"].tolist() == ["ok", "ok", "failed", *["ok"] * 7]
    assert out["response_error"].iloc[2] == (
        "the batch refused it: This line was told to be refused. (invalid_request)"
    )


def test_a_batch_that_expires_gives_what_was_done_and_the_rest_can_be_asked_again(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    server.change(stop_after=4, window_s=0.2)
    job = submit(server, frame, tmp_path).wait()
    assert job.counts["pending"] >= 5
    assert set(job.frame()["response_error"].dropna()) == {
        "not asked: This request could not be executed before the window expired. (batch_expired)"
    }
    server.change(stop_after=None, window_s=3600.0)
    assert job.resubmit().wait().counts == {"ok": 10}
    assert paid_for(server, frame) == [1] * 9


def test_a_batch_that_is_cancelled_gives_what_was_done(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    server.change(stop_after=4, cancel_s=0.1)
    job = submit(server, frame, tmp_path)
    while job.refresh().parts["done"].sum() < 4:
        pass
    job.cancel()
    assert sum(paid_for(server, frame)) == 4
    out = reopened(server, tmp_path).wait().frame()
    assert out["response_status"].iloc[:9].value_counts().to_dict()["ok"] == 4
    assert job.wait().counts == reopened(server, tmp_path).counts


# ---- limits


def test_files_wait_for_their_turn_where_tokens_are_limited(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    server.change(enqueued_tokens=150)  # of a file of nine requests, which has about 180
    job = submit(server, frame, tmp_path).wait()
    assert job.counts == {"ok": 10}
    assert len(job.parts) > 1
    assert paid_for(server, frame) == [1] * 9
    assert not list((tmp_path / "job").glob("input-*"))


def test_a_limit_that_is_not_named_is_found_by_halving(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    server.change(enqueued_tokens=150, say_limit=False)
    assert submit(server, frame, tmp_path).wait().counts == {"ok": 10}
    assert paid_for(server, frame) == [1] * 9


def test_a_budget_that_the_worst_case_passes_stops_the_batch_before_anything_is_sent(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    asked = len(server.log())
    with pytest.raises(BudgetExceeded, match="nothing was sent"):
        submit(server, frame, tmp_path, max_cost=0.001, prices=PRICES, max_tokens=100)
    assert len(server.log()) == asked
    assert submit(server, frame, tmp_path, max_cost=1.0, prices=PRICES, max_tokens=100).wait().counts == {"ok": 10}


def test_a_cancelled_job_sends_what_waited_no_more_until_it_is_resubmitted(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    server.change(enqueued_tokens=150, stop_after=0)
    job = submit(server, frame, tmp_path)
    while "in_progress" not in job.parts["status"].tolist():
        job.refresh()
    batches = len(server.batches())
    out = job.cancel().wait().frame()
    assert set(out["response_status"]) == {"pending"}
    assert "not asked: cancelled" in out["response_error"].tolist()
    assert len(server.batches()) == batches
    server.change(enqueued_tokens=None, stop_after=None)
    assert job.resubmit().wait().counts == {"ok": 10}
    assert paid_for(server, frame) == [1] * 9


def test_an_output_file_that_is_gone_leaves_its_rows_to_be_asked_again(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    with openai.OpenAI(base_url=server.base_url, api_key="any") as client:
        server.change(validate_s=0.3)
        lost = submit(server, frame, tmp_path)
        until = time.monotonic() + 60
        while not lost.ended and server.batches()[0]["status"] != "completed":
            assert time.monotonic() < until
            time.sleep(0.01)
        client.files.delete(server.batches()[0]["output_file_id"])
    (why,) = set(lost.wait().frame()["response_error"])
    assert why.startswith("not here yet: the batch's files have 0 lines, and it has 9 requests that are done")
    assert lost.resubmit().wait().counts == {"ok": 10}


def test_a_batch_that_cannot_be_created_fails_its_rows_with_the_reason_and_they_can_be_asked_again(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    server.change(enqueued_tokens=10, say_limit=False)
    job = submit(server, frame, tmp_path, poll_s=0.3)
    while job.parts["status"].tolist() != ["waits for its turn"]:
        job.refresh()
    with openai.OpenAI(base_url=server.base_url, api_key="any") as client:
        for file in server.files():
            client.files.delete(file["id"])
    server.change(enqueued_tokens=None)
    out = job.wait().frame()
    assert set(out["response_status"]) == {"failed"}
    assert out["response_error"].str.startswith("HTTP 400: No such file: file-").all()
    assert reopened(server, tmp_path).resubmit().wait().counts == {"ok": 10}
    assert paid_for(server, frame) == [1] * 9


# ---- no submission twice


def test_the_same_call_with_the_same_directory_goes_on_with_the_job_that_is_there(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    submit(server, frame, tmp_path)
    assert submit(server, frame, tmp_path).wait().counts == {"ok": 10}
    assert paid_for(server, frame) == [1] * 9


def test_the_same_prompts_in_another_frame_come_back_with_that_frame(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    submit(server, frame, tmp_path).wait()
    other = frame.reset_index(drop=True).assign(id=range(100, 110))
    job = submit(server, other, tmp_path, details=True)
    for found in (job, reopened(server, tmp_path)):
        out = found.wait().frame()
        pd.testing.assert_frame_equal(out[["text", "id"]], other)
        assert out["response_source"].tolist() == ["request"] * 9 + ["duplicate"]
    assert paid_for(server, frame) == [1] * 9


def test_another_call_with_the_same_directory_is_refused(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    submit(server, frame, tmp_path)
    with pytest.raises(ConfigurationError, match="another call was submitted as"):
        submit(server, frame, tmp_path, prompt="{text}!")


@pytest.mark.parametrize("request_", ["POST /v1/files", "POST /v1/batches"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_reply_that_is_lost_submits_nothing_twice(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path, request_: str, moment: Any
) -> None:
    server.trap(Trap(request_, 1, moment))
    assert submit(server, frame, tmp_path).wait().counts == {"ok": 10}
    assert paid_for(server, frame) == [1] * 9
    assert server.files() == []


@pytest.mark.parametrize("reached", [True, False])
def test_a_batch_that_was_perhaps_made_is_told_from_one_that_nobody_was_asked_for(
    server: BatchServer, reached: bool
) -> None:
    async def create() -> None:
        own = openai.DefaultAioHttpClient()  # calls both a ConnectTimeout or ConnectError
        url = server.base_url if reached else "http://127.0.0.1:9/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="any", http_client=own) as client:
            await BatchApi(resolve(client=client), Extras()).create("file", "/v1/chat/completions", {})

    server.trap(Trap("POST /v1/batches", 1, "before"))
    with pytest.raises(Away) as caught:
        asyncio.run(create())
    assert caught.value.maybe_done == reached


def test_the_servers_death_loses_nothing(server: BatchServer, frame: pd.DataFrame, tmp_path: Path) -> None:
    server.change(stop_after=3)
    job = submit(server, frame, tmp_path)
    while job.refresh().parts["done"].sum() < 3:
        pass
    server.kill()
    with pytest.raises(EndpointError, match="the job goes on at the provider") as caught:
        job.refresh()
    assert caught.value.frame is not None
    assert f"BatchJob.open({job.directory!r}, base_url={server.base_url!r}).wait()" in str(caught.value)
    server.start()
    server.change(stop_after=None)
    assert job.wait().counts == {"ok": 10}
    assert paid_for(server, frame) == [1] * 9


def test_a_batch_that_is_listed_late_is_not_created_twice_whatever_poll_s_is(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_work, "SETTLE_S", 60.0)
    batches = len(server.batches())
    server.change(listed_after_s=0.5)
    server.trap(Trap("POST /v1/batches", 1, "after"))
    assert submit(server, frame, tmp_path, poll_s=0.01).wait().counts == {"ok": 10}
    assert len(server.batches()) == batches + 1


# ---- what the provider says in passing, and what it does not give


@pytest.mark.parametrize("status", [400, 404, 405])
def test_a_look_that_is_refused_gives_no_batch_up(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path, status: int
) -> None:
    server.change(stop_after=2)
    job = submit(server, frame, tmp_path)
    server.change(look_status=status)
    for _ in range(2):
        with pytest.raises(EndpointError, match=f"HTTP {status}.*the job goes on at the provider"):
            job.refresh()
        time.sleep(batch_work.SETTLE_S)
    server.change(look_status=None, stop_after=None)
    assert job.wait().counts == {"ok": 10}
    assert paid_for(server, frame) == [1] * 9


def test_a_batch_that_is_hidden_for_a_moment_goes_on(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_work, "SETTLE_S", 60.0)
    job = submit(server, frame, tmp_path)
    server.change(hidden=True)
    assert not job.refresh().refresh().ended
    server.change(hidden=False)
    assert job.wait().counts == {"ok": 10}
    assert server.files() == []


def test_a_batch_that_is_hidden_for_long_keeps_its_files_and_is_looked_for_before_it_is_paid_for_again(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    server.change(stop_after=2)
    job = submit(server, frame, tmp_path)
    server.change(hidden=True)
    assert job.wait().counts == {"failed": 10}
    assert job.missing == 9
    assert job.frame()["response_error"].str.contains("neither shows nor lists the batch batch_").all()
    assert len(server.files()) == 1
    server.change(hidden=False, stop_after=None)
    assert reopened(server, tmp_path).resubmit().wait().counts == {"ok": 10}
    assert paid_for(server, frame) == [1] * 9
    assert server.files() == []


def test_a_batch_that_stays_hidden_is_asked_again_by_resubmit(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    server.change(stop_after=0)
    job = submit(server, frame, tmp_path)
    server.change(hidden=True)
    job.wait()
    batches = len(server.batches())
    job.resubmit()
    assert len(server.batches()) == batches + 1
    server.change(hidden=False, stop_after=None)
    assert job.wait().counts == {"ok": 10}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_file_that_comes_short_is_fetched_again(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_work, "SETTLE_S", 60.0)
    server.change(content_share=share)
    job = submit(server, frame, tmp_path)
    while job.refresh().parts["status"].tolist() != ["completed"]:
        pass
    assert not job.ended
    server.change(content_share=1.0)
    assert job.wait().counts == {"ok": 10}
    assert paid_for(server, frame) == [1] * 9
    assert server.files() == []


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_file_that_stays_short_stays_at_the_provider_and_is_fetched_again_before_it_is_paid_for_again(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path, share: float
) -> None:
    server.change(content_share=share)
    job = submit(server, frame, tmp_path).wait()
    assert job.counts["pending"] >= job.missing >= 5
    assert job.refresh().parts["status"].tolist() == ["cut"]
    assert "job.resubmit() fetches them once more" in job.parts["error"].iloc[0]
    assert "batch_output" in [file["purpose"] for file in server.files()]
    server.change(content_share=1.0)
    assert reopened(server, tmp_path).resubmit().wait().counts == {"ok": 10}
    assert paid_for(server, frame) == [1] * 9
    assert server.files() == []


@pytest.mark.parametrize("cut", [{"named": False}, {"content_lines": 0}, {"content_lines": 4}], ids=str)
def test_what_is_cut_between_two_lines_or_not_named_is_not_taken_for_what_never_was(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path, cut: dict[str, Any]
) -> None:
    server.change(**cut)
    job = submit(server, frame, tmp_path).wait()
    assert job.parts["status"].tolist() == ["cut"]
    assert job.missing == 9 - cut.get("content_lines", 0)
    server.change(named=True, content_lines=None)
    assert job.refresh().missing == 0
    assert job.counts == {"ok": 10}
    assert paid_for(server, frame) == [1] * 9


def test_a_line_too_few_in_a_file_that_is_whole_never_was(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    frame["text"] = frame["text"].where(frame["text"] != frame["text"].iloc[0], "[[batch=drop]] " + frame["text"])
    job = submit(server, frame, tmp_path).wait()
    assert job.parts["status"].tolist() == ["completed"]
    assert (job.missing, job.counts) == (0, {"pending": 1, "ok": 9})


@pytest.mark.parametrize(
    ("content", "counts", "fault"),
    [
        (b"{}\n{}\n", {"done": 2}, None),
        (b"{}\n{}", {"done": 2, "status": "completed"}, None),
        (b"{}\n", {"done": 2}, "the batch's files have 1 lines, and it has 2 requests that are done"),
        (b"{}\n", {"status": "completed"}, "the batch's files have 1 lines, and it has 2 requests that are done"),
        (b"{}\n", {"status": "expired"}, None),
        (b'{}\n{"a": ', {"done": 2}, "output-00000.jsonl breaks off in its line 2"),
        (b'{"a": "\\ud800"}\n', {"done": 1}, None),
        (None, {"failed": 1}, "the batch's files have 0 lines, and it has 1 requests that are done"),
    ],
)
def test_the_lines_of_a_batch_are_held_against_what_it_counts(
    tmp_path: Path, content: bytes | None, counts: Any, fault: str | None
) -> None:
    part = Part(number=0, requests=2, bytes=0, tokens=0, **counts)
    if content is not None:
        (tmp_path / part.output).write_bytes(content)
    found = batch_work.incomplete(part, Place(tmp_path))
    assert (found and found.words) == fault


# ---- the provider's files, the key, the directory


def test_the_files_at_the_provider_are_deleted_unless_they_are_wanted(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    submit(server, frame, tmp_path).wait()
    assert server.files() == []
    submit(server, frame, tmp_path, job=tmp_path / "other", checkpoint=tmp_path / "runs", keep_files=True).wait()
    assert sorted(file["purpose"] for file in server.files()) == ["batch", "batch_output"]


def test_a_job_with_a_relative_path_goes_on_where_it_began_whatever_directory_the_process_is_in(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = submit(server, frame, tmp_path, job="job")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert job.wait().counts == {"ok": 10}
    assert list(Path().iterdir()) == []
    assert job.directory == "job"


def test_a_job_that_is_moved_has_its_answers_and_takes_those_to_come(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    server.change(stop_after=4, window_s=0.2)
    answered = submit(server, frame, tmp_path).wait().counts
    (tmp_path / "job").rename(tmp_path / "moved")
    moved = BatchJob.open(tmp_path / "moved", base_url=server.base_url, poll_s=POLL_S, progress=False)
    assert moved.counts == answered
    server.change(stop_after=None, window_s=3600.0)
    assert moved.resubmit().wait().counts == {"ok": 10}
    assert paid_for(server, frame) == [1] * 9
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("checkpoint", "noted"),
    [
        ("job/answers", "answers"),
        ("job/a/b", "a/b"),
        ("runs", None),
        ("job-answers", None),
        ("job/../runs", None),
        ("{here}/job/answers", "answers"),
        ("s3://bucket/job/answers", "s3://bucket/job/answers"),
    ],
)
def test_a_checkpoint_is_noted_by_its_place_in_the_job_or_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: str, noted: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    place, checkpoint = Place("job"), checkpoint.format(here=os.getcwd())
    full = checkpoint if "://" in checkpoint else os.path.abspath(checkpoint)
    noted = noted or full
    assert place.noted(checkpoint) == noted
    assert place.found(noted) == place.found(full) == full  # in full it was noted by versions before


def test_the_directory_never_holds_the_key(server: BatchServer, frame: pd.DataFrame, tmp_path: Path) -> None:
    key = "sk-secret-0123456789"
    job = submit(server, frame, tmp_path, api_key=key, extra_headers={"x-api-key": "another-secret-1"})
    server.change(require_key="another")
    with pytest.raises(EndpointError, match="Incorrect API key") as caught:
        job.refresh()
    assert key not in str(caught.value)
    for path in (tmp_path / "job").rglob("*"):
        if path.is_file():
            assert b"secret" not in path.read_bytes()


def test_the_key_of_one_endpoint_does_not_go_to_another(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path
) -> None:
    submit(server, frame, tmp_path)
    asked = len(server.log())
    with pytest.raises(ConfigurationError, match=r"this call's key is for https://api\.openai\.com/v1"):
        BatchJob.open(tmp_path / "job").refresh()
    assert len(server.log()) == asked


def test_a_users_own_clients_hold(server: BatchServer, frame: pd.DataFrame, tmp_path: Path) -> None:
    import httpx2

    clients = [
        openai.OpenAI(base_url=server.base_url, api_key="k"),
        openai.AsyncOpenAI(base_url=server.base_url, api_key="k"),
        openai.OpenAI(base_url=server.base_url, api_key="k", http_client=httpx2.Client()),
    ]
    for number, client in enumerate(clients):
        rows = frame.assign(text=frame["text"] + f" {number}")
        job = submit(server, rows, tmp_path, job=tmp_path / f"job{number}", client=client, base_url=None)
        assert job.wait().counts == {"ok": 10}
    for client in clients:
        if isinstance(client, openai.OpenAI):
            client.close()


def test_an_endpoint_without_a_batch_api_says_so(server: BatchServer, frame: pd.DataFrame, tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="seems to have no Batch API"):
        submit(server, frame, tmp_path, base_url=server.base_url.replace("/v1", "/v2"))


@pytest.mark.parametrize(
    "keywords",
    [
        {"history": "messages"},
        {"on_error": "raise"},
        {"refresh": True},
        {"model": "local", "base_url": None},
        {"poll_s": 0},
        {"job": "s3://bucket/job"},
        {"job": 3},
        {"pol_s": 3},
    ],
    ids=lambda keywords: "-".join(map(str, next(iter(keywords.items())))).replace("/", ""),
)
def test_what_a_batch_cannot_keep_is_refused_before_anything_is_sent(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path, keywords: Any
) -> None:
    asked = len(server.log())
    with pytest.raises(ConfigurationError):
        submit(server, frame, tmp_path, **keywords)
    assert len(server.log()) == asked


def test_a_class_that_is_not_imported_is_asked_for(server: BatchServer, frame: pd.DataFrame, tmp_path: Path) -> None:
    submit(server, frame, tmp_path, schema=Review).wait()
    code = f"import llmframe; llmframe.BatchJob.open({os.fspath(tmp_path / 'job')!r}).frame()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "was submitted with schema=Review, a class of tests.test_batch that is not imported here" in done.stderr


def test_a_damaged_ledger_is_told_apart_from_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no Batch job in"):
        BatchJob.open(tmp_path)
    (tmp_path / "job.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        BatchJob.open(tmp_path)
    (tmp_path / "job.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ConfigurationError, match="upgrade llmframe"):
        BatchJob.open(tmp_path)


# ---- how it shows itself


def test_a_job_shows_its_parts(server: BatchServer, frame: pd.DataFrame, tmp_path: Path) -> None:
    job = submit(server, frame, tmp_path, prices=PRICES).wait()
    assert "9 of 9 requests answered" in repr(job)
    html = job._repr_html_()
    assert "<th scope='col'" in html
    assert "completed" in html
    assert job.cost_usd is not None
    assert job.cost_usd == pytest.approx(job.usage.prompt_tokens * 0.5e-6 + job.usage.completion_tokens * 1e-6)


def test_a_jobs_view_escapes_what_the_provider_said(server: BatchServer, frame: pd.DataFrame, tmp_path: Path) -> None:
    submit(server, frame, tmp_path).wait()
    ledger = tmp_path / "job" / "job.json"
    ledger.write_text(ledger.read_text().replace('"error": null', '"error": "<script>alert(1)</script>"'))
    html = reopened(server, tmp_path)._repr_html_()
    assert "&lt;script&gt;alert(1)" in html
    assert "<script>" not in html
    assert "color" not in html


def test_polling_waits_as_long_as_the_endpoint_asks(server: BatchServer, frame: pd.DataFrame, tmp_path: Path) -> None:
    server.change(retry_after_s=1.0, validate_s=0.5)
    job = submit(server, frame, tmp_path)
    before = len(server.log())
    job.wait()
    looks = [line for line in server.log()[before:] if line.startswith("GET /v1/batches/")]
    assert len(looks) <= 2  # without it there would be more than ten


def test_looks_become_rare_while_nothing_happens(server: BatchServer, frame: pd.DataFrame, tmp_path: Path) -> None:
    server.change(stop_after=2, window_s=2.0)
    job = submit(server, frame, tmp_path)
    before = len(server.log())
    job.wait()
    looks = [line for line in server.log()[before:] if line.startswith("GET /v1/batches/")]
    assert len(looks) <= 20  # 100 at the pace of the first


def test_two_processes_may_wait_for_one_job(server: BatchServer, frame: pd.DataFrame, tmp_path: Path) -> None:
    server.change(lines_per_s=10)
    job = submit(server, frame, tmp_path)
    code = (
        "import sys, llmframe\n"
        f"job = llmframe.BatchJob.open(sys.argv[1], base_url={server.base_url!r}, poll_s=0.02)\n"
        "print(job.wait().counts, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, job.directory], stdout=subprocess.PIPE, text=True)
    assert job.wait().counts == {"ok": 10}
    said, _ = process.communicate(timeout=60)
    assert said == "{'ok': 10}\n"
    assert paid_for(server, frame) == [1] * 9


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to one process here")
@pytest.mark.parametrize("interrupts", [1, 2])
def test_an_interrupt_while_another_is_at_work_on_the_job_leaves_it_free_for_the_next_call(
    server: BatchServer, frame: pd.DataFrame, tmp_path: Path, interrupts: int
) -> None:
    job = submit(server, frame, tmp_path)
    other = Place(job.directory).held()

    def interrupt() -> None:
        while not any(thread.name == "llmframe-work" for thread in threading.enumerate()):  # waits for its turn
            time.sleep(0.01)
        for _ in range(interrupts):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        other.__exit__(None, None, None)

    other.__enter__()
    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(Interrupted) as caught:
        job.refresh()
    interrupting.join()
    job.refresh()
    assert "interrupted" in str(caught.value)  # its traceback is held until here, and the frames in it


def test_waiting_survives_an_endpoint_that_is_away(server: BatchServer, frame: pd.DataFrame, tmp_path: Path) -> None:
    server.change(stop_after=2)
    job = submit(server, frame, tmp_path)
    server.change(status_all=503, stop_after=None)
    code = (
        "import sys, llmframe\n"
        f"job = llmframe.BatchJob.open(sys.argv[1], base_url={server.base_url!r}, poll_s=0.05)\n"
        "print(job.wait().counts, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, job.directory], stdout=subprocess.PIPE, text=True)
    server.wait_for_a_look()
    server.change(status_all=None)
    said, _ = process.communicate(timeout=60)
    assert said == "{'ok': 10}\n"
