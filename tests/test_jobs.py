"""Jobs: a parquet file in, the same with answers out, in order, whole or not at all, and each row paid for once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel

import llmframe
from llmframe import JobResult, jobs
from llmframe.errors import BudgetExceeded, ConfigurationError, EndpointError, TemplateError
from tests.server import SimulatedServer


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PART_ROWS", 40)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """100 rows in row groups of 30, of many types, with an index of their own."""
    frame = pd.DataFrame(
        {
            "text": [f"row {number}" for number in range(100)],
            "small": pd.array([1, None] * 50, dtype="Int8"),
            "day": pd.date_range("2024-01-01", periods=100, tz="Europe/Berlin"),
            "kind": pd.Categorical(["a", "b"] * 50),
            "tags": [["x"], []] * 50,
        },
        index=pd.Index(range(1000, 1100), name="id"),
    )
    path = tmp_path / "in.parquet"
    frame.to_parquet(path, row_group_size=30)
    return path


def run(server: SimulatedServer, source: Path, prompt: Any = "{text}", **keywords: Any) -> JobResult:
    keywords = {"model": "m", "base_url": server.base_url, "progress": False, **keywords}
    return llmframe.run(source, source.with_name("out.parquet"), prompt, **keywords)


def out_of(source: Path) -> pd.DataFrame:
    return pd.read_parquet(source.with_name("out.parquet"))


def test_the_sink_is_what_the_accessor_gives(server: SimulatedServer, source: Path) -> None:
    job = run(server, source, details=True)
    expected = pd.read_parquet(source).llm.complete(
        "{text}", model="m", base_url=server.base_url, progress=False, details=True
    )
    unlike = ["response_latency_s", "response_request_id"]
    pd.testing.assert_frame_equal(out_of(source).drop(columns=unlike), expected.drop(columns=unlike))
    assert (job.rows, job.counts, job.requests) == (100, {"ok": 100}, 100)
    assert job.usage.prompt_tokens == expected["response_prompt_tokens"].sum()


def test_the_sources_columns_and_row_groups_come_through_untouched(server: SimulatedServer, source: Path) -> None:
    run(server, source)
    before, after = pq.ParquetFile(source), pq.ParquetFile(source.with_name("out.parquet"))
    groups = [after.metadata.row_group(group).num_rows for group in range(after.num_row_groups)]
    assert groups == [30, 30, 30, 10]
    assert after.schema_arrow.names[: len(before.schema_arrow.names)] == before.schema_arrow.names
    assert after.read(before.schema_arrow.names).equals(before.read())


def test_a_file_that_pandas_did_not_write_gets_typed_columns_too(server: SimulatedServer, tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "n": pa.array([1, None], pa.int32())}), source)
    run(server, source, schema=["yes", "no"])
    out = out_of(source)
    assert str(out["response_prompt_tokens"].dtype) == "Int64"
    assert out["response"].cat.categories.tolist() == ["yes", "no"]
    assert pq.read_schema(source.with_name("out.parquet")).field("n").type == pa.int32()


def test_the_same_job_again_asks_nothing(server: SimulatedServer, source: Path) -> None:
    run(server, source)
    first = out_of(source)
    job = run(server, source)
    assert server.stats().received == 100
    assert job.requests == 0
    pd.testing.assert_frame_equal(out_of(source), first)


def test_rows_that_say_the_same_are_asked_once_however_far_apart(server: SimulatedServer, tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    pd.DataFrame({"text": ["same", *(f"row {number}" for number in range(98)), "same"] * 2}).to_parquet(source)
    server.change(latency_s=0.02)
    job = run(server, source, details=True)
    out = out_of(source)
    assert server.stats().received == 99
    assert job.usage.prompt_tokens == out["response_prompt_tokens"].sum() == server.stats().prompt_tokens
    assert out["response_source"].value_counts().to_dict() == {"request": 99, "duplicate": 101, "checkpoint": 0}
    assert (out.loc[out["text"] == "same", "response"] == "echo: same").all()


def test_limit_takes_the_first_rows(server: SimulatedServer, source: Path) -> None:
    assert run(server, source, limit=45).rows == 45
    assert out_of(source)["text"].tolist() == [f"row {number}" for number in range(45)]
    assert server.stats().received == 45


def test_a_source_of_no_rows_gives_a_sink_of_the_same_types(server: SimulatedServer, source: Path) -> None:
    run(server, source)
    full = out_of(source)
    assert run(server, source, limit=0).rows == 0
    assert out_of(source).dtypes.astype(str).equals(full.dtypes.astype(str))


def test_nested_properties_are_json_text_in_the_sink(server: SimulatedServer, source: Path) -> None:
    class Person(BaseModel):
        name: str
        tags: list[str]

    run(server, source, schema=Person, limit=3)
    out = out_of(source)
    assert all(isinstance(json.loads(cell), list) for cell in out["response_tags"])
    assert out["response_status"].tolist() == ["ok"] * 3


@pytest.mark.parametrize(
    ("prompt", "keywords", "error", "said"),
    [
        ("{txt}", {}, TemplateError, "did you mean 'text'"),
        ("{text}", {"output": "text"}, ConfigurationError, "has a column 'text' already"),
        ("{text}", {"where": "missing"}, ConfigurationError, "where= is about a frame at hand"),
        ("{text}", {"dedupe": False}, ConfigurationError, "dedupe=False"),
        ("{text}", {"modell": "m"}, ConfigurationError, "did you mean 'model'"),
    ],
)
def test_what_is_wrong_is_known_before_anything_is_asked_or_written(
    server: SimulatedServer, source: Path, prompt: str, keywords: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        run(server, source, prompt, **keywords)
    assert server.stats().received == 0
    assert {path.name for path in source.parent.iterdir()} == {"in.parquet"}


def test_a_source_that_is_not_there_or_no_parquet_says_so(server: SimulatedServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"there is no .*in.parquet"):
        run(server, tmp_path / "in.parquet")
    (tmp_path / "in.parquet").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigurationError, match="cannot be read as parquet"):
        run(server, tmp_path / "in.parquet")


def test_a_job_that_is_stopped_leaves_no_sink_and_goes_on(server: SimulatedServer, source: Path) -> None:
    server.configure(schedule=[(0.5, {"status_all": 401})], latency_s=0.2, slots=16)
    with pytest.raises(
        EndpointError, match=r"of 100 rows are done; the same call goes on from .*out.parquet.checkpoint"
    ):
        run(server, source)
    assert {path.name for path in source.parent.iterdir()} == {"in.parquet", "out.parquet.checkpoint"}
    kept = len(llmframe.read_checkpoint(source.with_name("out.parquet.checkpoint")).query("status == 'ok'"))
    server.reset()
    run(server, source)
    assert server.stats().received == 100 - kept
    assert out_of(source)["response_status"].eq("ok").all()


def test_a_budget_holds_for_all_parts_together(server: SimulatedServer, source: Path) -> None:
    with pytest.raises(BudgetExceeded):
        run(server, source, max_tokens_total=600, max_tokens=10)
    stats = server.stats()
    assert stats.prompt_tokens + stats.completion_tokens <= 600


def test_a_job_that_was_killed_goes_on(server: SimulatedServer, source: Path) -> None:
    server.configure(latency_s=0.3, slots=8)  # 60 answers take more than a flush a second
    script = (
        "import sys, llmframe; from llmframe import jobs; jobs.PART_ROWS = 40; "
        "llmframe.run(sys.argv[1], sys.argv[2], '{text}', model='m', base_url=sys.argv[3], progress=False)"
    )
    sink = source.with_name("out.parquet")
    process = subprocess.Popen([sys.executable, "-c", script, str(source), str(sink), server.base_url])
    server.wait_for(answered=60)
    process.kill()
    process.wait()
    server.wait_for(in_flight=0)
    assert not sink.exists()
    before = server.stats().received
    run(server, source)
    assert out_of(source)["response"].tolist() == [f"echo: row {number}" for number in range(100)]
    assert server.stats().received - before < 100


def test_parts_overlap_so_that_the_endpoint_does_not_wait_for_the_last_answer_of_each(
    server: SimulatedServer, source: Path
) -> None:
    server.change(latency_s=0.3)
    began = time.monotonic()
    run(server, source)
    assert server.stats().max_in_flight > 40
    assert time.monotonic() - began < 100  # whatever the machine
