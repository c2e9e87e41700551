"""Jobs: a parquet file in, the same with answers out, in order, whole or not at all, and each row paid for once."""

from __future__ import annotations

import asyncio
import json
import logging
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
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import BaseModel

import llmframe
from llmframe import JobResult, job_work, loops, sources
from llmframe.errors import BudgetExceeded, ConfigurationError, EndpointError, LLMFrameError, TemplateError
from llmframe.job_work import Paths, Work
from llmframe.jobs import estimate_job, job_options
from llmframe.sinks import Sink
from llmframe.sources import Source
from tests.server import SimulatedServer


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_work, "PART_ROWS", 40)


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


def run_to(server: SimulatedServer, source: Any, sink: Any, prompt: Any = "{text}", **keywords: Any) -> JobResult:
    keywords = {"model": "m", "base_url": server.base_url, "progress": False, **keywords}
    return llmframe.run(source, sink, prompt, **keywords)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A real S3 server with a bucket ``rows``; what pandas needs to reach it."""
    s3fs = pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    served = moto.ThreadedMotoServer(port=0, verbose=False)
    served.start()
    host, port = served.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("rows")
    yield {}
    s3fs.S3FileSystem.clear_instance_cache()
    served.stop()


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


def test_a_refresh_gives_no_row_the_old_answer_of_one_that_now_fails(
    server: SimulatedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_work, "PART_ROWS", 1)
    source = tmp_path / "in.parquet"
    pd.DataFrame({"text": ["same", "other", "same"]}).to_parquet(source)
    run(server, source)
    server.configure(status_all=400)
    job = run(server, source, refresh=True)
    assert out_of(source)["response_status"].tolist() == ["failed"] * 3
    assert job.counts == {"failed": 3}


def test_a_refresh_asks_rows_that_say_the_same_once(
    server: SimulatedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_work, "PART_ROWS", 1)
    source = tmp_path / "in.parquet"
    pd.DataFrame({"text": ["same", "other", "same", "same"]}).to_parquet(source)
    run(server, source)
    run(server, source, refresh=True, details=True)
    assert server.stats().received == 4
    assert out_of(source)["response_source"].tolist() == ["request", "request", "duplicate", "duplicate"]


def test_a_source_of_many_files_makes_one_client(
    server: SimulatedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[None] = []
    init = openai.AsyncOpenAI.__init__

    def counted(client: Any, **keywords: Any) -> None:
        made.append(None)
        init(client, **keywords)

    monkeypatch.setattr(openai.AsyncOpenAI, "__init__", counted)
    (tmp_path / "in").mkdir()
    for number in range(5):
        frame = pd.DataFrame({"text": [f"row {number} {place}" for place in range(number + 1)], f"of {number}": 1})
        frame.to_parquet(tmp_path / f"in/{number}.parquet")
    assert run_to(server, tmp_path / "in", tmp_path / "out").counts == {"ok": 15}
    assert len(made) == 1


@pytest.mark.parametrize(
    ("column", "error", "said"),
    [("txt", TemplateError, "did you mean 'txt'"), ("response", ConfigurationError, "has a column 'response' already")],
)
def test_what_is_wrong_with_one_file_of_many_is_known_before_anything_is_asked(
    server: SimulatedServer, tmp_path: Path, column: str, error: type[Exception], said: str
) -> None:
    (tmp_path / "in").mkdir()
    for name in "abd":
        pd.DataFrame({"text": [name]}).to_parquet(tmp_path / f"in/{name}.parquet")
    pd.DataFrame({"text" if column == "response" else "other": ["c"], column: ["c"]}).to_parquet(
        tmp_path / "in/c.parquet"
    )
    with pytest.raises(error, match=said):
        run_to(server, tmp_path / "in", tmp_path / "out")
    assert server.stats().received == 0


def test_limit_takes_the_first_rows(server: SimulatedServer, source: Path) -> None:
    assert run(server, source, limit=45).rows == 45
    assert out_of(source)["text"].tolist() == [f"row {number}" for number in range(45)]
    assert server.stats().received == 45


@pytest.mark.parametrize(
    ("keywords", "left"),
    [({"where": "text >= row 050"}, [*range(60, 220, 20)]), ({"limit": 2}, [0, 20])],
    ids=["where", "limit"],
)
@pytest.mark.parametrize("name", ["id", None, "text"])
def test_rows_of_a_range_keep_their_labels_where_some_are_left_out(
    server: SimulatedServer, tmp_path: Path, keywords: Any, left: list[int], name: str | None
) -> None:
    texts = [f"row {number:03}" for number in range(0, 220, 20)]
    frame = pd.DataFrame({"text": texts}, index=pd.RangeIndex(0, 220, 20, name=name))
    frame.to_parquet(tmp_path / "in.parquet", row_group_size=3)
    run_to(server, tmp_path / "in.parquet", tmp_path / "out.parquet", **keywords)
    out = pd.read_parquet(tmp_path / "out.parquet")
    assert out.index.tolist() == left
    assert out.index.name == name
    assert out["response"].tolist() == [f"echo: row {label:03}" for label in left]


def test_files_of_ranges_keep_their_labels_in_one_sink(server: SimulatedServer, tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": [f"row {number}" for number in range(6)]})
    for number in range(0, 6, 2):
        frame[number : number + 2].to_parquet(tmp_path / f"in-{number}.parquet")
    order = [4, 5, 0, 1, 2, 3]
    (tmp_path / "in-4.parquet").rename(tmp_path / "in--.parquet")
    run_to(server, tmp_path / "in-*.parquet", tmp_path / "out.parquet")
    out = pd.read_parquet(tmp_path / "out.parquet")
    assert out.index.tolist() == order
    assert out["response"].tolist() == [f"echo: row {number}" for number in order]


def test_a_source_of_no_rows_gives_a_sink_of_the_same_types(server: SimulatedServer, source: Path) -> None:
    run(server, source)
    full = out_of(source)
    assert run(server, source, where="small > 7").rows == 0
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
        ("{text}", {"history": "turns"}, ConfigurationError, "history= is about a frame at hand"),
        ("{text}", {"where": "missing"}, ConfigurationError, "no condition; write a column, an operator and a value"),
        ("{text}", {"where": "texd == a"}, ConfigurationError, "no column 'texd'; did you mean 'text'"),
        ("{text}", {"where": "small > many"}, ConfigurationError, "'many' is no value for a column of int8"),
        ("{text}", {"where": "small != null"}, ConfigurationError, "'null' is no value for a column of int8"),
        ("{text}", {"where": "day == NaT"}, ConfigurationError, "'NaT' is no value for a column of timestamp"),
        ("{text}", {"limit": 0}, ConfigurationError, "limit=0 has to be a whole number of at least 1"),
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
        EndpointError, match=r"of 100 rows are done; the same job goes on from .*out.parquet.checkpoint"
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
        "import sys, llmframe; from llmframe import job_work; job_work.PART_ROWS = 40; "
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


def test_what_a_killed_job_left_of_its_sink_goes_with_the_next_and_nobody_elses_does(
    server: SimulatedServer, source: Path
) -> None:
    sink, other = source.with_name("out.parquet"), source.with_name("other.parquet")
    script = (
        "import os, sys; from llmframe.sinks import Sink; sinks = [Sink(where) for where in sys.argv[1:]]; os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script, str(sink), str(other)], check=False)
    living = Sink(str(sink))
    assert len(list(sink.parent.glob(".*.tmp"))) == 3
    with pytest.warns(llmframe.LLMFrameWarning, match="another job writes"):
        run(server, source)
    assert len(list(sink.parent.glob(".out.parquet-*.tmp"))) == 1
    assert len(list(sink.parent.glob(".other.parquet-*.tmp"))) == 1
    living.close()
    assert not list(sink.parent.glob(".out.parquet-*"))


def test_the_same_job_twice_at_a_time_is_warned_of(server: SimulatedServer, source: Path) -> None:
    server.configure(latency_s=0.5)
    first = threading.Thread(target=run, args=(server, source))
    first.start()
    server.wait_for(received=10)
    with pytest.warns(llmframe.LLMFrameWarning, match=r"another job writes .*out.parquet now; .* paid for twice"):
        run(server, source)
    first.join()
    run(server, source)
    assert out_of(source)["response_status"].eq("ok").all()


def test_two_jobs_to_one_sink_are_in_each_others_way_nowhere(server: SimulatedServer, source: Path) -> None:
    server.change(latency_s=0.05)
    sinks = [Sink(str(source.with_name("out.parquet"))) for _ in range(3)]
    table = pa.table({"text": ["a"]})
    for sink in sinks:
        sink.write(table, ends_group=True)
    for sink in sinks:
        sink.finish()
        assert pq.read_table(source.with_name("out.parquet")).equals(table)
    assert {path.name for path in source.parent.iterdir()} == {"in.parquet", "out.parquet"}


def test_no_row_is_in_the_sink_before_its_answer_is_on_disk(
    server: SimulatedServer, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Sink.write
    early: list[str] = []

    def looked_at(sink: Sink, table: pa.Table, ends_group: bool) -> None:
        kept = set(llmframe.read_checkpoint(source.with_name("out.parquet.checkpoint"))["text"])
        early.extend(set(table["response"].to_pylist()) - kept)
        write(sink, table, ends_group)

    monkeypatch.setattr(Sink, "write", looked_at)
    assert run(server, source).rows == 100
    assert not early


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to one process here")
def test_an_interrupt_while_the_sink_is_written_leaves_nothing_of_it(
    server: SimulatedServer, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Sink.write
    ended = threading.Event()

    def slowly(sink: Sink, table: pa.Table, ends_group: bool) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        write(sink, table, ends_group)
        ended.set()

    monkeypatch.setattr(Sink, "write", slowly)
    with pytest.raises(llmframe.Interrupted, match="the same job goes on"):
        run(server, source)
    assert ended.is_set()
    assert {path.name for path in source.parent.iterdir()} == {"in.parquet", "out.parquet.checkpoint"}


def test_a_job_that_is_stopped_twice_loses_no_answer_that_came(server: SimulatedServer, source: Path) -> None:
    server.configure(latency_s=0.4)
    sink = source.with_name("out.parquet")
    options = job_options(sink, {"model": "m", "base_url": server.base_url, "progress": False})
    work = Work(Paths(str(source), str(sink)), "{text}", options)

    async def stop_twice() -> None:
        task = asyncio.create_task(work._execute())
        await server.until(answered=10)
        task.cancel()
        await asyncio.sleep(0.05)  # it waits for what is in flight
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run_coroutine_threadsafe(stop_twice(), loops.background_loop()).result()
    kept = len(llmframe.read_checkpoint(source.with_name("out.parquet.checkpoint")))
    assert kept == work.total.rows_done >= 10


def test_parts_overlap_so_that_the_endpoint_does_not_wait_for_the_last_answer_of_each(
    server: SimulatedServer, source: Path
) -> None:
    server.change(latency_s=0.3)
    began = time.monotonic()
    run(server, source)
    assert server.stats().max_in_flight > 40
    assert time.monotonic() - began < 100  # whatever the machine


@pytest.mark.parametrize("kind", ["row groups", "files", "files of other columns"])
def test_an_endpoint_does_not_wait_for_a_source_of_small_pieces(
    server: SimulatedServer, tmp_path: Path, kind: str
) -> None:
    server.change(latency_s=0.5)
    frame = pd.DataFrame({"text": [f"row {number}" for number in range(30)]})
    if kind == "row groups":
        source, sink = tmp_path / "in.parquet", tmp_path / "out.parquet"
        frame.to_parquet(source, row_group_size=1)
    else:
        source, sink = tmp_path / "in", tmp_path / "out"
        source.mkdir()
        for number in range(30):
            more = {"more": 1} if kind == "files of other columns" and number % 2 else {}
            frame[number : number + 1].reset_index(drop=True).assign(**more).to_parquet(source / f"{number:02}.parquet")
    run_to(server, source, sink)
    assert server.stats().max_in_flight > 4  # 2 pieces, where pieces count
    if kind == "row groups":
        assert pq.ParquetFile(sink).num_row_groups == 30
        assert pd.read_parquet(sink)["response"].tolist() == [f"echo: row {number}" for number in range(30)]
    else:
        written = [pd.read_parquet(path) for path in sorted(sink.iterdir())]
        assert [rows["response"].tolist() for rows in written] == [[f"echo: row {number}"] for number in range(30)]


def test_only_rows_that_fulfil_every_condition_are_asked_and_written(server: SimulatedServer, source: Path) -> None:
    job = run(server, source, where=["small >= 1", "text != 'row 4'", "kind = a", "day < 2024-01-09"])
    assert job.rows == server.stats().received == 3
    assert out_of(source)["text"].tolist() == ["row 0", "row 2", "row 6"]


def test_a_directory_of_files_gives_a_directory_of_files(server: SimulatedServer, tmp_path: Path) -> None:
    for name, texts in {"a/one.parquet": ["x", "y"], "a/two.parquet": [], "b/one.parquet": ["x", "z"]}.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame({"text": pd.array(texts, dtype="str")}).to_parquet(tmp_path / "in" / name)
    (tmp_path / "in" / "_SUCCESS").touch()
    job = run_to(server, tmp_path / "in", tmp_path / "out")
    assert job.rows == 4
    assert server.stats().received == 3  # x is in two files
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert written == {"a/one.parquet", "a/two.parquet", "b/one.parquet"}
    assert pd.read_parquet(tmp_path / "out/b/one.parquet")["response"].tolist() == ["echo: x", "echo: z"]
    assert pd.read_parquet(tmp_path / "out/a/two.parquet").dtypes["response_prompt_tokens"] == "Int64"


def test_a_glob_can_go_into_one_file(server: SimulatedServer, tmp_path: Path) -> None:
    for number in range(3):
        pd.DataFrame({"text": [f"{number}"]}).to_parquet(tmp_path / f"in-{number}.parquet")
    run_to(server, tmp_path / "in-*.parquet", tmp_path / "out.parquet")
    assert pd.read_parquet(tmp_path / "out.parquet")["text"].tolist() == ["0", "1", "2"]


def test_a_limit_that_is_met_before_the_last_file_gives_a_sink_too(server: SimulatedServer, tmp_path: Path) -> None:
    for number in range(3):
        pd.DataFrame({"text": [f"{number}"]}).to_parquet(tmp_path / f"in-{number}.parquet")
    run_to(server, tmp_path / "in-*.parquet", tmp_path / "out.parquet", limit=2)
    assert pd.read_parquet(tmp_path / "out.parquet")["text"].tolist() == ["0", "1"]


def test_a_file_whose_name_has_brackets_is_that_file(server: SimulatedServer, tmp_path: Path) -> None:
    for name in ("in[1].parquet", "in1.parquet"):
        pd.DataFrame({"text": [name]}).to_parquet(tmp_path / name)
    run_to(server, tmp_path / "in[1].parquet", tmp_path / "out.parquet")
    assert pd.read_parquet(tmp_path / "out.parquet")["text"].tolist() == ["in[1].parquet"]


def test_rows_that_another_part_asked_count_as_done(server: SimulatedServer, tmp_path: Path) -> None:
    server.change(latency_s=0.2)
    pd.DataFrame({"text": [f"row {number % 40}" for number in range(80)]}).to_parquet(tmp_path / "in.parquet")
    done: list[int] = []
    paths = Paths(str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet"))
    options = job_options(paths.sink, {"model": "m", "base_url": server.base_url, "progress": False})
    work = Work(paths, "{text}", options)
    put = work._put

    def noted(part: Any) -> None:
        done.append(part.prepared.state.rows_done)
        put(part)

    work._put = noted  # type: ignore[method-assign]
    work.run(lambda: None, lambda: None, partial=False, clean=False)
    assert done == [40, 40]


def test_a_job_stays_where_it_began_whatever_chdir_does(
    server: SimulatedServer, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source.parent / "elsewhere").mkdir()
    monkeypatch.chdir(source.parent)
    server.configure(latency_s=0.2, slots=30)
    moved = threading.Timer(0.0, lambda: (server.wait_for(answered=1), os.chdir("elsewhere")))
    moved.start()
    run_to(server, "in.parquet", "out.parquet")
    moved.join()
    assert list((source.parent / "elsewhere").iterdir()) == []
    assert len(out_of(source)) == 100


@pytest.mark.parametrize("index", [["id", "response"], ["response_status"]])
def test_an_index_with_the_name_of_a_new_column_is_refused(
    server: SimulatedServer, tmp_path: Path, index: list[str]
) -> None:
    frame = pd.DataFrame({"text": ["a"], **{name: ["x"] for name in index}}).set_index(index)
    frame.to_parquet(tmp_path / "in.parquet")
    with pytest.raises(ConfigurationError, match=rf"has a column '{index[-1]}' already; pass output=") as raised:
        run_to(server, tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert "where=" not in str(raised.value), "which has another meaning for a job"
    assert server.stats().received == 0


@pytest.mark.parametrize("name", ["in.csv", "in.jsonl"])
def test_text_files_are_read_too(server: SimulatedServer, tmp_path: Path, name: str) -> None:
    frame = pd.DataFrame({"text": ["a", "b, c", "d"], "score": [1, 2, 3]})
    if name.endswith(".csv"):
        frame.to_csv(tmp_path / name, index=False)
    else:
        frame.to_json(tmp_path / name, orient="records", lines=True)
    job = run_to(server, tmp_path / name, tmp_path / "out.parquet", where="score > 1.5")
    assert job.rows == 2
    out = pd.read_parquet(tmp_path / "out.parquet")
    assert out[["text", "response"]].to_numpy().tolist() == [["b, c", "echo: b, c"], ["d", "echo: d"]]
    assert out["score"].dtype == "int64"


@pytest.mark.parametrize(
    ("name", "text"),
    [("in.csv", "text\nGröße\n"), ("in.csv", "größe,text\n1,a\n"), ("in.jsonl", '{"text": "Größe"}\n')],
)
def test_a_text_file_that_is_not_utf_8_is_refused_before_anything_is_paid(
    server: SimulatedServer, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(ConfigurationError, match=r"UTF-?8"):
        run_to(server, tmp_path / name, tmp_path / "out.parquet")
    assert server.stats().received == 0


def test_an_empty_cell_of_csv_is_missing_and_not_paid(server: SimulatedServer, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('text,n,note\na,1,\n,2,x\n"",NA,NA\n')
    run_to(server, tmp_path / "in.csv", tmp_path / "out.parquet")
    out = pd.read_parquet(tmp_path / "out.parquet")
    assert out["response_status"].tolist() == ["ok", "skipped", "skipped"]
    assert out[["text", "note"]].isna().to_numpy().tolist() == [[False, True], [True, False], [True, False]]
    assert out["n"].fillna(0).tolist() == [1, 2, 0]
    assert server.stats().received == 1


def test_cells_of_several_lines_are_read_as_they_were_written_in_a_large_csv_file_too(tmp_path: Path) -> None:
    texts = [f"I liked number {number}{'.' * (number % 40)}\nBut, it broke" for number in range(60_000)]
    frame = pd.DataFrame({"title": [f"Title {number}" for number in range(60_000)], "text": texts})
    frame.to_csv(tmp_path / "in.csv", index=False)
    pieces = Source(str(tmp_path / "in.csv")).pieces(10_000)
    assert pa.concat_tables(piece.table for piece in pieces).to_pydict() == frame.to_dict("list")


def test_text_of_json_lines_that_looks_like_a_time_stays_text(tmp_path: Path) -> None:
    lines = ['{"text": "2024-01-02T00:00:00Z", "more": {"at": ["2024-01-02"]}}', '{"text": "2024-01-02"}']
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, *lines[1:] * 60_000, '{"text": "later"}']))
    (piece, *_, last) = Source(str(tmp_path / "in.jsonl")).pieces(10_000)
    assert piece.table["text"].to_pylist()[:2] == ["2024-01-02T00:00:00Z", "2024-01-02"]
    assert piece.table["more"][0].as_py() == {"at": ["2024-01-02"]}
    assert last.table["text"][-1].as_py() == "later"


@pytest.mark.parametrize("name", ["in.csv", "in.jsonl"])
def test_a_row_may_be_longer_than_a_block(tmp_path: Path, name: str) -> None:
    texts = ["x" * length for length in (10, 1_500_000, 10, 2_500_000)]
    frame = pd.DataFrame({"text": texts})
    if name.endswith(".csv"):
        frame.to_csv(tmp_path / name, index=False)
    else:
        frame.to_json(tmp_path / name, orient="records", lines=True)
    (table,) = [piece.table for piece in Source(str(tmp_path / name)).pieces(10)]
    assert table["text"].to_pylist() == texts


def test_a_row_without_an_end_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BLOCKS", (1 << 10, 1 << 12))
    (tmp_path / "in.csv").write_text('text\n"' + "a row\n" * 2_000)
    with pytest.raises(ConfigurationError, match="is a quote in it not closed"):
        Source(str(tmp_path / "in.csv"))


def test_a_file_that_becomes_shorter_mixes_no_files(server: SimulatedServer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "abc":
        pd.DataFrame({"text": [f"{name} {number}" for number in range(20)]}).to_csv(tmp_path / f"in/{name}.csv")
    options = job_options(tmp_path / "out", {"model": "m", "base_url": server.base_url, "progress": False})
    work = Work(Paths(str(tmp_path / "in"), str(tmp_path / "out")), "{text}", options)
    pd.DataFrame({"text": ["b 0"]}).to_csv(tmp_path / "in/b.csv")
    with pytest.raises(LLMFrameError, match=r"cannot be read any more: .*b.csv has fewer rows than when"):
        work.run(lambda: None, lambda: None, partial=False, clean=False)
    assert not {"b.parquet", "c.parquet"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_endings_may_be_in_capitals_and_text_files_compressed(server: SimulatedServer, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.csv", "B.CSV", "c.csv.gz", "d.jsonl.bz2", "E.PARQUET"):
        frame, path = pd.DataFrame({"text": [name]}), tmp_path / "in" / name
        if "csv" in name.lower():
            frame.to_csv(path, index=False)
        elif "jsonl" in name:
            frame.to_json(path, orient="records", lines=True)
        else:
            frame.to_parquet(path)
    assert run_to(server, tmp_path / "in", tmp_path / "out").counts == {"ok": 5}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "B.parquet",
        "E.parquet",
        "a.parquet",
        "c.csv.parquet",
        "d.jsonl.parquet",
    ]


def test_a_text_file_that_changes_its_types_half_way_is_refused_before_anything_is_paid(
    server: SimulatedServer, tmp_path: Path
) -> None:
    rows = "".join(f"row {number},{number}\n" for number in range(120_000))  # more than a block
    (tmp_path / "in.csv").write_text(f"text,score\n{rows}last,many\n")
    with pytest.raises(ConfigurationError, match=r"in.csv cannot be read as csv: .*many"):
        run_to(server, tmp_path / "in.csv", tmp_path / "out.parquet")
    assert server.stats().received == 0


@pytest.mark.parametrize(
    ("source", "sink", "said"),
    [
        ("nothing-*.parquet", "out.parquet", "nothing matches"),
        ("empty", "out.parquet", "file is in"),
        ("in", "out.parquet", "have not all the same columns"),
        ("in/a.parquet", "out.csv", "written as parquet"),
        ("in", "in", "is where the source is"),
        ("in/a.parquet", "in/a.parquet", "is where the source is"),
        ("s4://bucket/a.parquet", "out.parquet", "cannot be reached"),
    ],
)
def test_paths_that_cannot_be_meant_are_refused(
    server: SimulatedServer, tmp_path: Path, source: str, sink: str, said: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "empty").mkdir()
    pd.DataFrame({"text": ["a"]}).to_parquet(tmp_path / "in/a.parquet")
    pd.DataFrame({"text": ["a"], "more": [1]}).to_parquet(tmp_path / "in/b.parquet")
    where = source if "://" in source else tmp_path / source
    with pytest.raises(ConfigurationError, match=said):
        run_to(server, where, tmp_path / sink)
    assert server.stats().received == 0


def test_a_frame_as_the_source_or_sink_is_refused_with_the_way_for_frames(tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["a"]})
    for source, sink, name in ((frame, tmp_path / "out.parquet", "source"), (tmp_path, frame, "sink")):
        with pytest.raises(ConfigurationError, match=rf"{name} is of type DataFrame.*for a frame there is df\.llm"):
            llmframe.run(source, sink, "text", model="m")


@pytest.mark.parametrize(
    "name", ["./in.parquet", "in/../in.parquet", "{here}/in.parquet", "soft.parquet", "hard.parquet"]
)
def test_a_source_is_not_overwritten_by_another_of_its_names(
    server: SimulatedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    pd.DataFrame({"text": ["a", "b"]}).to_parquet("in.parquet")
    Path("soft.parquet").symlink_to("in.parquet")
    Path("hard.parquet").hardlink_to("in.parquet")
    with pytest.raises(ConfigurationError, match="is where the source is"):
        run_to(server, "in.parquet", name.format(here=tmp_path), limit=1)
    assert len(pd.read_parquet("in.parquet")) == 2
    assert server.stats().received == 0


def test_a_directory_is_not_overwritten_by_another_of_its_names(
    server: SimulatedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    pd.DataFrame({"text": ["a", "b"]}).to_parquet("in/a.parquet")
    Path("link").symlink_to("in")
    for name in (tmp_path / "in", "./in/", "link"):
        with pytest.raises(ConfigurationError, match="is where the source is"):
            run_to(server, "in", name, limit=1)


def test_a_stopped_job_can_leave_what_there_is(server: SimulatedServer, source: Path) -> None:
    server.configure(schedule=[(0.5, {"status_all": 401})], latency_s=0.2, slots=16)
    with pytest.raises(EndpointError, match=r"what there is is in .*out.parquet"):
        run(server, source, partial=True)
    counts = out_of(source)["response_status"].value_counts()
    assert counts["ok"] + counts["pending"] + counts["failed"] == 100
    assert counts["ok"] > 0
    assert counts["pending"] > 0


def test_the_checkpoint_goes_when_every_row_has_its_answer_and_only_if_asked_to(
    server: SimulatedServer, source: Path
) -> None:
    place = source.with_name("out.parquet.checkpoint")
    pd.read_parquet(source).head(5).to_parquet(source)
    server.configure(status_all=400)
    run(server, source, clean=True)
    assert place.exists()
    server.reset()
    run(server, source)
    assert place.exists()
    run(server, source, clean=True)
    assert not place.exists()


@pytest.mark.parametrize("some", [{"limit": 5}, {"where": "text != b"}])
def test_a_job_of_some_rows_keeps_the_checkpoint_that_others_are_in(
    server: SimulatedServer, source: Path, capsys: pytest.CaptureFixture[str], some: Any
) -> None:
    run(server, source)
    run(server, source, clean=True, progress=None, **some)
    assert "out.parquet.checkpoint is kept" in capsys.readouterr().err
    run(server, source)
    assert server.stats().received == 100


def test_a_stopped_refresh_says_what_the_same_job_would_cost(server: SimulatedServer, source: Path) -> None:
    with pytest.raises(BudgetExceeded, match=r"without refresh the same job goes on from .*asked and paid for again"):
        run(server, source, refresh=True, max_tokens_total=600, max_tokens=10)


def test_a_job_on_object_storage_reads_and_writes_there(
    server: SimulatedServer, tmp_path: Path, bucket: dict[str, Any]
) -> None:
    frame = pd.DataFrame({"text": [f"row {number}" for number in range(100)]})
    frame.to_parquet("s3://rows/in/a.parquet", row_group_size=30, storage_options=bucket)
    frame.head(3).to_parquet("s3://rows/in/b.parquet", storage_options=bucket)
    job = run_to(server, "s3://rows/in/", "s3://rows/out")
    assert job.rows == 103
    assert server.stats().received == 100
    out = pd.read_parquet("s3://rows/out/a.parquet", storage_options=bucket)
    assert out["response"].tolist() == [f"echo: row {number}" for number in range(100)]
    run_to(
        server, "s3://rows/in/*.parquet", tmp_path / "out.parquet", checkpoint="s3://rows/out.checkpoint", clean=True
    )
    assert server.stats().received == 100


def test_object_storage_without_credentials_is_said_in_one_line(
    server: SimulatedServer, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3fs = pytest.importorskip("s3fs")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    for where in ("s3://rows/in.parquet", "s3://rows/*.parquet"):
        with pytest.raises(ConfigurationError, match="credentials"):
            run_to(server, where, source.with_name("out.parquet"))
    with pytest.raises(LLMFrameError, match=r"s3://rows/out.parquet cannot be written: .*credentials.*goes on from"):
        run_to(server, source, "s3://rows/out.parquet", checkpoint=source.with_name("kept"), limit=3)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_form_that_the_endpoint_refuses_is_tried_once_a_job_and_not_once_a_part(
    server: SimulatedServer, source: Path
) -> None:
    class Stars(BaseModel):
        stars: int

    server.configure(refuse_formats=["json_schema"])
    run(server, source, '{text} [[say={{"stars": 4}}]]', schema=Stars, max_concurrency=1)
    assert out_of(source)["response_stars"].eq(4).all()
    assert server.stats().received <= 102, "only the next part's first request may have been on its way already"


def test_writes_to_object_storage_that_fail_once_cost_nothing(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3fs = pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    serving = pytest.importorskip("werkzeug.serving")
    store = moto.DomainDispatcherApplication(moto.create_backend_app)
    refused: list[str] = []

    def unsteady(environ: dict[str, Any], start_response: Any) -> Any:
        """Refuse the first of the writes to each key, as a store does whose partition is being split."""
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] in ("PUT", "POST") and path.count("/") > 1 and path not in refused:
            refused.append(path)
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"]
        return store(environ, start_response)

    served = serving.make_server("127.0.0.1", 0, unsteady, threaded=True)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{served.server_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        s3fs.S3FileSystem().mkdir("turns")
        pd.DataFrame({"text": [f"row {number}" for number in range(60)]}).to_parquet("s3://turns/in.parquet")
        job = run_to(server, "s3://turns/in.parquet", "s3://turns/out.parquet")
        made = pd.read_parquet("s3://turns/out.parquet")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        served.shutdown()
        thread.join()
        served.server_close()
    assert any("/out.parquet.checkpoint/part-" in path for path in refused)
    assert any(path.endswith("/out.parquet") for path in refused)
    assert made["response"].tolist() == [f"echo: row {number}" for number in range(60)]
    assert job.counts == {"ok": 60}
    assert server.stats().received == 60


def test_a_whole_number_is_the_same_text_whatever_rows_are_read_with_it(
    server: SimulatedServer, tmp_path: Path
) -> None:
    numbers = pa.array([None if number == 50 else number for number in range(100)], pa.int64())
    pq.write_table(pa.table({"n": numbers}), tmp_path / "in.parquet")
    run_to(server, tmp_path / "in.parquet", tmp_path / "out.parquet", "Is {n} large?", limit=45)
    run_to(server, tmp_path / "in.parquet", tmp_path / "out.parquet", "Is {n} large?")
    run_to(server, tmp_path / "in.parquet", tmp_path / "out.parquet", "Is {n} large?", where="n > 45")
    estimated = estimate_job(
        Paths(str(tmp_path / "in.parquet"), str(tmp_path / "out.parquet")),
        "Is {n} large?",
        job_options(tmp_path / "out.parquet", {"model": "m", "base_url": server.base_url}),
    )
    assert {request.text for request in server.requests()} == {f"Is {n} large?" for n in range(100) if n != 50}
    assert server.stats().received == 99
    assert estimated.requests == 0


def test_a_time_with_nanoseconds_stops_no_job(server: SimulatedServer, tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "when": pa.array([1_001], pa.time64("ns"))})
    pq.write_table(table, tmp_path / "in.parquet")
    run_to(server, tmp_path / "in.parquet", tmp_path / "out.parquet", "{text} at {when}")
    assert server.requests()[0].text == "a at 00:00:00.000001"
    assert pq.read_table(tmp_path / "out.parquet", columns=["text", "when"]).equals(table)
