"""Dask: the same call over partitions, lazily; on a cluster of real processes, one of which may be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pandas as pd
import pytest

dd = pytest.importorskip("dask.dataframe")

import dask  # noqa: E402
from distributed import Client, LocalCluster  # noqa: E402

from llmframe.cli import main  # noqa: E402
from llmframe.errors import BudgetExceeded, ConfigurationError, EndpointError, SchemaError, TemplateError  # noqa: E402
from tests.server import SimulatedServer  # noqa: E402

KEY = "sk-test-not-a-secret"
SECRET = "sk-very-secret-indeed"
UNLIKE = ["response_latency_s", "response_request_id", "response_source"]


@pytest.fixture
def frame() -> pd.DataFrame:
    """30 rows of several types, with an index of their own."""
    return pd.DataFrame(
        {
            "text": [f"row {number}" for number in range(30)],
            "score": range(30),
            "kind": pd.Categorical(["a", "b", None] * 10),
        },
        index=pd.Index(range(100, 130), name="id"),
    )


@pytest.fixture(scope="session")
def client() -> Iterator[Client]:
    """Two worker processes of one thread each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = tempfile.mkdtemp()
        with (
            dask.config.set({"temporary-directory": place, "distributed.worker.memory.terminate": False}),
            LocalCluster(
                n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50, env={"OPENAI_API_KEY": KEY}
            ) as cluster,
            Client(cluster) as made,
        ):
            yield made


@pytest.fixture
def call(server: SimulatedServer, tmp_path: Path) -> dict[str, Any]:
    return {"model": "m", "base_url": server.base_url, "checkpoint": tmp_path / "kept", "progress": False}


@pytest.fixture(autouse=True)
def _in_threads() -> Iterator[None]:
    with dask.config.set(scheduler="threads"):
        yield


@pytest.mark.parametrize(
    "keywords",
    [
        {"details": True},
        {"schema": ["yes", "no"]},
        {"schema": {"type": "object", "properties": {"stars": {"type": "integer"}, "why": {"type": "string"}}}},
        {"n": 2},
        {"where": "missing", "output": "answer"},
    ],
    ids=["details", "labels", "object", "several", "missing"],
)
def test_it_gives_the_columns_types_and_values_that_pandas_gives(
    call: dict[str, Any], frame: pd.DataFrame, keywords: Any
) -> None:
    ddf = dd.from_pandas(frame, npartitions=3)
    expected = ddf.compute().llm.complete("{text} {score}", **{**call, "checkpoint": None}, **keywords)
    lazy = ddf.llm.complete("{text} {score}", **call, **keywords)
    made = lazy.compute()
    pd.testing.assert_series_equal(lazy.dtypes, expected.dtypes)
    pd.testing.assert_series_equal(made.dtypes, expected.dtypes)
    unlike = [name for name in UNLIKE if name in made]
    pd.testing.assert_frame_equal(made.drop(columns=unlike), expected.drop(columns=unlike))


def test_nothing_is_asked_until_it_is_computed_and_then_once(
    server: SimulatedServer, call: dict[str, Any], frame: pd.DataFrame
) -> None:
    out = dd.from_pandas(frame, npartitions=3).llm.complete("{text}", **call)
    assert server.stats().received == 0
    assert len(out.head(2)) == 2
    assert server.stats().received == 10
    assert (len(out), len(out.compute())) == (30, 30)
    assert server.stats().received == 30


def test_a_request_that_partitions_share_is_asked_once(server: SimulatedServer, call: dict[str, Any]) -> None:
    server.change(latency_s=0.3)
    frame = pd.DataFrame({"text": [f"row {number % 6}" for number in range(24)]})
    out = dd.from_pandas(frame, npartitions=4).llm.complete("{text}", **call).compute()
    assert server.stats().received == 6
    assert out["response"].tolist() == [f"echo: {text}" for text in frame["text"]]


def test_a_request_that_workers_share_is_asked_once(
    server: SimulatedServer, client: Client, call: dict[str, Any]
) -> None:
    server.change(latency_s=0.3)
    frame = pd.DataFrame({"text": [f"row {number % 6}" for number in range(24)]})
    out = client.compute(dd.from_pandas(frame, npartitions=4).llm.complete("{text}", **call)).result()
    assert server.stats().received == 6
    assert out["response"].tolist() == [f"echo: {text}" for text in frame["text"]]


def test_a_mask_chooses_rows(server: SimulatedServer, call: dict[str, Any], frame: pd.DataFrame) -> None:
    ddf = dd.from_pandas(frame, npartitions=3)
    out = ddf.llm.complete("{text}", where=ddf["score"] >= 25, **call).compute()
    assert out["response"].notna().tolist() == [False] * 25 + [True] * 5
    assert server.stats().received == 5


def test_a_series_gives_the_answers_alone(server: SimulatedServer, call: dict[str, Any], frame: pd.DataFrame) -> None:
    lazy = dd.from_pandas(frame, npartitions=2)["text"].llm.complete("Say {}", schema=["yes", "no"], **call)
    made = lazy.compute()
    assert str(lazy.dtype) == str(made.dtype) == "category"
    assert made.index.equals(frame.index)
    assert made.notna().all()


def test_an_estimate_sums_the_partitions_and_sends_nothing(
    server: SimulatedServer, call: dict[str, Any], frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    made = dd.from_pandas(frame, npartitions=3).llm.estimate("{text}", max_tokens=10, **call)
    assert (made.rows, made.requests, made.completion_tokens) == (30, 30, 300)
    assert server.stats().received == 0


@pytest.mark.parametrize(
    ("prompt", "keywords", "error", "said"),
    [
        ("{txt}", {}, TemplateError, "did you mean 'text'"),
        ("{text}", {"output": "text"}, ConfigurationError, "has a column 'text' already"),
        ("{text}", {"checkpoint": None}, ConfigurationError, r"needs checkpoint=.*would be paid for"),
        ("{text}", {"client": openai.AsyncOpenAI(api_key="k"), "base_url": None}, ConfigurationError, "cannot travel"),
        ("{text}", {"history": "turns"}, ConfigurationError, "for a frame at hand"),
        ("{text}", {"refresh": True}, ConfigurationError, "for a frame at hand"),
        ("{text}", {"dedupe": False}, ConfigurationError, "for a frame at hand"),
        ("{text}", {"on_error": "raise"}, ConfigurationError, "for a frame at hand"),
        ("{text}", {"where": [True] * 30}, ConfigurationError, r"where=ddf\['score'\] > 1"),
        ("{text}", {"where": "score > 1"}, ConfigurationError, "is not known; it is 'missing'"),
        ("{text}", {"schema": []}, SchemaError, "no labels"),
        ("{text}", {"modell": "m"}, ConfigurationError, "did you mean 'model'"),
        ("{text}", {"model": None}, ConfigurationError, "no model"),
    ],
)
def test_what_is_wrong_is_known_at_once(
    server: SimulatedServer,
    call: dict[str, Any],
    frame: pd.DataFrame,
    prompt: str,
    keywords: Any,
    error: Any,
    said: str,
) -> None:
    with pytest.raises(error, match=said):
        dd.from_pandas(frame, npartitions=3).llm.complete(prompt, **{**call, **keywords})
    assert server.stats().received == 0


def test_what_cannot_travel_says_so(call: dict[str, Any], frame: pd.DataFrame) -> None:
    import threading

    lock = threading.Lock()
    with pytest.raises(ConfigurationError, match=r"cannot travel .* pass its text, or a function"):
        dd.from_pandas(frame, npartitions=1).llm.complete(lambda row: row["text"] if lock else "", **call)


def test_what_the_accessor_of_pandas_has_besides_says_where_it_is(frame: pd.DataFrame) -> None:
    with pytest.raises(AttributeError, match=r"no llm.review; compute a part of it"):
        dd.from_pandas(frame, npartitions=1).llm.review()


def test_no_key_shows_in_a_name_a_graph_or_a_repr(call: dict[str, Any], frame: pd.DataFrame) -> None:
    ddf = dd.from_pandas(frame, npartitions=2)
    headers = {"X-Key": SECRET}
    out = ddf.llm.complete("{text}", api_key=SECRET, extra_headers=headers, **call)
    graph = out.optimize().__dask_graph__()
    shown = [repr(graph), repr(dict(graph)), repr(out), out._repr_html_(), str(out.expr.tree_repr()), *map(str, graph)]
    assert not any(SECRET in text for text in shown)
    other = ddf.llm.complete("{text}", api_key="sk-another-one", extra_headers={"X-Key": "2"}, **call)
    assert out._name == other._name  # so the name does not even tell keys apart


def test_the_same_call_has_the_same_name_and_another_call_another(call: dict[str, Any], frame: pd.DataFrame) -> None:
    ddf = dd.from_pandas(frame, npartitions=2)
    names = [
        ddf.llm.complete(prompt, **{**call, **keywords})._name
        for prompt, keywords in [("{text}", {}), ("{text}", {}), ("{score}", {}), ("{text}", {"temperature": 0})]
    ]
    assert names[0] == names[1]
    assert len(set(names)) == 3
    assert names[0].startswith("llm-complete-")


def test_a_key_of_the_call_reaches_the_workers(
    server: SimulatedServer, client: Client, call: dict[str, Any], frame: pd.DataFrame
) -> None:
    out = dd.from_pandas(frame, npartitions=2).llm.complete("{text}", api_key=SECRET, **call)
    client.compute(out).result()
    assert {each.headers["authorization"] for each in server.requests()} == {f"Bearer {SECRET}"}


def test_a_worker_process_keeps_its_connections_from_partition_to_partition(
    server: SimulatedServer, client: Client, call: dict[str, Any], frame: pd.DataFrame
) -> None:
    out = dd.from_pandas(frame, npartitions=10).llm.complete("{text}", max_concurrency=2, **call)
    client.compute(out).result()
    assert server.stats().answered == 30
    assert server.stats().connections <= 4


def test_an_error_of_the_endpoint_comes_back_as_itself_with_the_way_to_go_on(
    server: SimulatedServer, client: Client, call: dict[str, Any], frame: pd.DataFrame
) -> None:
    server.configure(status_all=401)
    out = dd.from_pandas(frame, npartitions=2).llm.complete("{text}", **call)
    with pytest.raises(EndpointError, match=r"of this partition are done; .* the same call goes on") as raised:
        client.compute(out).result()
    assert raised.value.frame is None
    assert "sk-test" not in str(raised.value)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ({"max_tokens_total": 500}, "max_tokens_total=500 could be passed"),
        ({"max_cost": 0.0005, "prices": {"input": 1, "output": 1}}, "max_cost=0.0005 could be passed"),
    ],
    ids=["tokens", "USD"],
)
def test_a_budget_holds_for_all_workers_together(
    server: SimulatedServer,
    client: Client,
    call: dict[str, Any],
    frame: pd.DataFrame,
    budget: dict[str, Any],
    words: str,
) -> None:
    ddf = dd.from_pandas(frame, npartitions=4)
    with pytest.raises(BudgetExceeded, match=words):
        client.compute(ddf.llm.complete("{text}", max_tokens=10, **budget, **call)).result()
    server.wait_for(in_flight=0)
    stats = server.stats()
    assert 0 < stats.prompt_tokens + stats.completion_tokens <= 500


def test_a_budget_of_threads_goes_on_from_one_computation_to_the_next(
    server: SimulatedServer, call: dict[str, Any], frame: pd.DataFrame
) -> None:
    out = dd.from_pandas(frame, npartitions=3).llm.complete("{text}", max_tokens_total=500, max_tokens=10, **call)
    for _ in range(2):
        with pytest.raises(BudgetExceeded):
            out.compute()
        server.wait_for(in_flight=0)
    stats = server.stats()
    assert 0 < stats.prompt_tokens + stats.completion_tokens <= 500


def test_a_cap_on_requests_holds_for_all_workers_together(
    server: SimulatedServer, client: Client, call: dict[str, Any], frame: pd.DataFrame
) -> None:
    out = dd.from_pandas(frame.head(18), npartitions=2).llm.complete("{text}", rpm=300, **call)
    client.compute(out).result()
    stats = server.stats()
    assert stats.answered == 18
    assert stats.seconds > 2.5  # 5 a second, the first five at once


def test_a_cap_on_tokens_holds_for_all_workers_together(
    server: SimulatedServer, client: Client, call: dict[str, Any]
) -> None:
    frame = pd.DataFrame({"text": [f"{number} " + "word " * 200 for number in range(40)]})
    out = dd.from_pandas(frame, npartitions=4).llm.complete("{text}", tpm=240_000, **call)
    client.compute(out).result()
    stats = server.stats()
    assert stats.answered == 40
    assert stats.seconds > (stats.prompt_tokens + stats.completion_tokens) / 4_000 - 1.5  # of a burst, a second


def test_a_cap_on_what_is_in_flight_holds_for_all_workers_together(
    server: SimulatedServer, client: Client, call: dict[str, Any], frame: pd.DataFrame
) -> None:
    server.configure(latency_s=0.05)
    out = dd.from_pandas(frame, npartitions=4).llm.complete("{text}", max_concurrency=3, **call)
    client.compute(out).result()
    assert server.stats().answered == 30
    assert server.stats().max_in_flight <= 3


def test_a_worker_that_is_killed_loses_at_most_what_was_not_yet_on_disk(
    server: SimulatedServer, client: Client, call: dict[str, Any]
) -> None:
    server.configure(latency_s=0.4, slots=8)  # 20 a second, so that the disk has most of them
    frame = pd.DataFrame({"text": [f"row {number}" for number in range(120)]})
    workers = client.run(os.getpid)
    future = client.compute(dd.from_pandas(frame, npartitions=4).llm.complete("{text}", max_concurrency=4, **call))
    server.wait_for(answered=50)
    os.kill(next(iter(workers.values())), signal.SIGKILL)
    out = future.result()
    assert out["response"].tolist() == [f"echo: row {number}" for number in range(120)]
    paid = server.stats().answered - 120
    assert paid <= 20  # a second of 10 a second, and what was in flight


def test_a_computation_that_is_cancelled_asks_no_more_and_the_next_pays_for_the_rest(
    server: SimulatedServer, client: Client, call: dict[str, Any]
) -> None:
    server.configure(latency_s=0.2, slots=4)
    frame = pd.DataFrame({"text": [f"row {number}" for number in range(120)]})
    out = dd.from_pandas(frame, npartitions=2).llm.complete("{text}", max_concurrency=4, **call)
    future = client.compute(out)
    server.wait_for(answered=10)
    future.cancel()  # which the scheduler hears later, and tells every client of then
    key = future.key
    while client.run_on_scheduler(lambda dask_scheduler: key in dask_scheduler.tasks):
        time.sleep(0.05)
    stopped = server.wait_for(in_flight=0)
    assert stopped.answered < 60
    server.change(latency_s=0.0)
    # A client of its own: the word of the cancelled key, when it comes, would cancel the same key asked for again.
    with Client(client.scheduler.address, set_as_default=False) as after:
        assert after.compute(out).result()["response_status"].eq("ok").all()
    assert server.stats().answered == 120


def test_a_job_of_the_shell_runs_on_a_cluster(
    server: SimulatedServer, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("llmframe.cluster.PART_ROWS", 10)
    monkeypatch.chdir(tmp_path)
    frame = pd.DataFrame({"text": [f"row {number % 40}" for number in range(50)]})
    frame.to_parquet("in.parquet", row_group_size=25)
    address = client.scheduler.address
    job = ["run", "in.parquet", "out.parquet", "{text}", "--model", "m", "--base-url", server.base_url, "--json"]
    for sent in (40, 0):
        assert main([*job, "--dask", address]) == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["rows"], said["counts"], said["requests"]) == (50, {"ok": 50}, sent)
    made = pd.read_parquet("out.parquet")
    assert made["response"].tolist() == [f"echo: {text}" for text in frame["text"]]
    assert made["response_prompt_tokens"].sum() == server.stats().prompt_tokens
    assert server.stats().received == 40


def test_a_scheduler_that_is_not_there_is_wrong_use(
    server: SimulatedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("llmframe.cluster.CONNECT_S", 0.2)
    monkeypatch.chdir(tmp_path)
    pd.DataFrame({"text": ["a"]}).to_parquet("in.parquet")
    assert main(["run", "in.parquet", "out.parquet", "text", "--model", "m", "--dask", "tcp://127.0.0.1:9"]) == 2
    assert "there is no Dask scheduler at tcp://127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize("later", [True, False], ids=["dask later", "dask first"])
def test_the_accessor_is_there_in_whichever_order_they_are_imported_and_dask_is_not_without(later: bool) -> None:
    first = "" if later else "import dask.dataframe; "
    code = (
        f"import sys; {first}import llmframe; print('dask' in sys.modules); "
        "import dask.dataframe as dd; print(dd.DataFrame.llm.__name__, type(dd.__loader__).__name__)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == f"{not later}\nLLMDaskFrame SourceFileLoader\n", done.stderr
