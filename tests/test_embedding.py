"""Embeddings: each text's vector belongs to its row, is paid for once, and one bad text costs its own row alone."""

from __future__ import annotations

import asyncio
import inspect
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import orjson
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llmframe
from llmframe import accessor
from llmframe.cli import main
from llmframe.embedding import LEAST_INPUTS, MOST_INPUTS, SPREAD, USUAL_INPUTS, Embedding
from llmframe.errors import BudgetExceeded, ConfigurationError, EndpointError, LLMFrameWarning, RowFailed, TemplateError
from llmframe.messages import user
from llmframe.options import embed_options
from llmframe.planning import make_plan
from llmframe.requests import Requests
from llmframe.results import EMBEDDING_DETAILS, column_names
from llmframe.texts import Texts
from llmframe.vectors import read_vectors, shared_out
from tests.server import SimulatedServer, embedding_of

Embed = Callable[..., pd.DataFrame]


@pytest.fixture
def embed(server: SimulatedServer) -> Embed:
    def call(frame: pd.DataFrame, text: Any = "text", **keywords: Any) -> pd.DataFrame:
        defaults = {"model": "m", "base_url": server.base_url, "progress": False}
        return frame.llm.embed(text, **defaults | keywords)

    return call


def rows(count: int) -> pd.DataFrame:
    return pd.DataFrame({"text": [f"text {number} {'x' * (number % 13)}" for number in range(count)]})


def is_right(out: pd.DataFrame, dimensions: int = 8) -> bool:
    """Whether every vector that is there is that of its row's text."""
    pairs = zip(out["text"], out["embedding"], strict=True)
    return all(np.allclose(vector, embedding_of(text, dimensions)) for text, vector in pairs if vector is not None)


def paid(server: SimulatedServer) -> Counter[str]:
    """Count how often each text was answered, and so paid for."""
    answered = [request for request in server.requests() if request.outcome == "answered"]
    return Counter(text for request in answered for text in request.body["input"])


# ---- the frame


def test_each_text_gets_its_vector_many_in_one_request(server: SimulatedServer, embed: Embed) -> None:
    out = embed(rows(2_000))
    assert is_right(out)
    assert out["embedding_status"].tolist() == ["ok"] * 2_000
    assert list(out.columns) == ["text", *column_names("embedding", details=False, embedding=True)]
    assert max(paid(server).values()) == 1
    assert server.stats().answered <= 20
    assert out["embedding_prompt_tokens"].sum() == server.stats().prompt_tokens


def test_the_vectors_are_views_of_one_matrix_of_float32(embed: Embed) -> None:
    out = embed(rows(300))
    assert {vector.dtype for vector in out["embedding"]} == {np.dtype("float32")}
    assert len({id(vector.base) for vector in out["embedding"]}) == 1
    assert np.stack(out["embedding"]).shape == (300, 8)


def test_types_never_depend_on_the_data(embed: Embed) -> None:
    frames = [rows(0), rows(3), pd.DataFrame({"text": pd.Series([None, None], dtype="str")})]
    dtypes = [embed(frame, details=True).dtypes.drop("text").to_dict() for frame in frames]
    assert dtypes[0] == dtypes[1] == dtypes[2]


def test_a_plain_read_parquet_gives_back_what_was_written(embed: Embed, tmp_path: Path) -> None:
    out = embed(pd.DataFrame({"text": ["a", None, "b"]}), details=True)
    out.to_parquet(tmp_path / "out.parquet")
    back = pd.read_parquet(tmp_path / "out.parquet")
    assert back["embedding"][0].dtype == np.float32
    assert is_right(back.iloc[[0, 2]])
    assert back["embedding"][1] is None
    assert back["embedding_status"].tolist() == ["ok", "skipped", "ok"]


def test_an_index_of_any_kind_and_a_missing_text_stay_where_they_are(embed: Embed) -> None:
    frame = pd.DataFrame({"text": ["a", None, "b", "a"]}, index=[7, 7, "x", -1.5])
    out = embed(frame)
    assert out.index.tolist() == frame.index.tolist()
    assert is_right(out)
    assert out["embedding_status"].tolist() == ["ok", "skipped", "ok", "ok"]
    assert out["embedding_prompt_tokens"].tolist() == [1, pd.NA, 1, 0]
    assert out["embedding"].iloc[1] is None


def test_templates_functions_and_numbers_are_texts_too(server: SimulatedServer, embed: Embed) -> None:
    frame = pd.DataFrame({"title": ["A"], "year": [1999]})
    embed(frame, "{title}: {year}")
    embed(frame, "year", output="b")
    embed(frame, lambda row: row.title.lower(), output="c")
    assert [request.body["input"] for request in server.requests()] == [["A: 1999"], ["1999"], ["a"]]


def test_a_series_gives_the_vectors_alone(server: SimulatedServer) -> None:
    made = pd.Series(["a", "b"], index=[5, 5]).llm.embed(model="m", base_url=server.base_url, progress=False)
    assert made.index.tolist() == [5, 5]
    assert np.allclose(made.iloc[1], embedding_of("b"))
    again = pd.Series(["a"]).llm.embed("passage: {}", model="m", base_url=server.base_url, progress=False)
    assert np.allclose(again[0], embedding_of("passage: a"))


def test_an_event_loop_gets_the_same(server: SimulatedServer) -> None:
    out = asyncio.run(rows(40).llm.aembed("text", model="m", base_url=server.base_url, progress=False))
    assert is_right(out)


def test_dimensions_are_asked_for(server: SimulatedServer, embed: Embed) -> None:
    out = embed(rows(3), dimensions=5)
    assert is_right(out, 5)
    assert server.requests()[0].body["dimensions"] == 5


def test_details_tell_of_each_rows_request(server: SimulatedServer, embed: Embed) -> None:
    out = embed(rows(100), details=True, prices={"input": 2.0})
    assert list(out.columns[5:]) == [f"embedding{name}" for name in EMBEDDING_DETAILS]
    assert out["embedding_cost_usd"].sum() == pytest.approx(server.stats().prompt_tokens * 2e-6)
    assert out["embedding_attempts"].tolist() == [1] * 100
    assert out["embedding_model"].unique().tolist() == ["m"]
    assert (out["embedding_latency_s"] > 0).all()
    assert out["embedding_request_id"].notna().all()


def test_where_fills_the_rows_it_selects(embed: Embed) -> None:
    frame = rows(6)
    one = embed(frame, where=[True] * 3 + [False] * 3)
    assert one["embedding_status"].tolist() == ["ok"] * 3 + ["skipped"] * 3
    two = embed(one, where="missing")
    assert two["embedding_status"].tolist() == ["ok"] * 6
    assert is_right(two)


def test_where_stops_at_the_first_vector_of_another_length_than_those_the_frame_keeps(
    server: SimulatedServer, embed: Embed, tmp_path: Path
) -> None:
    one = embed(rows(400), where=[True] * 3 + [False] * 397)
    one["text"] = [f"[[dimensions=6]] {number}" for number in range(400)]
    received = server.stats().received
    with pytest.raises(EndpointError, match="vectors of 6 numbers do not fit beside those of 8 in column 'embedding'"):
        embed(one, where="missing", checkpoint=tmp_path / "runs", max_concurrency=1)
    assert server.stats().received == received + 1
    with pytest.raises(ConfigurationError, match="vectors of 6 numbers do not fit beside those of 8"):
        embed(one, where="missing", checkpoint=tmp_path / "runs")  # what was paid is kept
    assert server.stats().received == received + 1


# ---- what is sent


def test_a_request_keeps_within_the_limits_of_inputs_and_tokens(server: SimulatedServer, embed: Embed) -> None:
    frame = pd.DataFrame({"text": [f"{number} " + "word " * 4_000 for number in range(150)] + list("abc")})
    assert is_right(embed(frame))
    assert server.stats().failed == {}
    assert max(sum(map(len, request.body["input"])) / 4 for request in server.requests()) < 300_000


def test_base64_is_asked_for_and_lists_are_taken_where_it_is_refused(
    server: SimulatedServer, embed: Embed, capsys: pytest.CaptureFixture[str]
) -> None:
    embed(rows(3))
    assert server.requests()[0].body["encoding_format"] == "base64"
    server.reset(refuse_formats=["base64"])
    out = embed(rows(1_000), progress=None)
    assert is_right(out)
    assert out["embedding_status"].eq("ok").all()
    assert [request.status for request in server.requests()].count(400) <= 20
    assert capsys.readouterr().err.count("sends no base64") == 1


def test_vectors_find_their_texts_in_whatever_order_they_come(server: SimulatedServer, embed: Embed) -> None:
    server.reset(shuffle=True)
    assert is_right(embed(rows(100)))


def test_an_endpoint_that_takes_few_texts_at_once_is_learned(server: SimulatedServer, embed: Embed) -> None:
    server.reset(most_inputs=32, latency_s=0.01)
    out = embed(rows(6_000), max_concurrency=4)
    assert out["embedding_status"].eq("ok").all()
    assert is_right(out)
    assert max(paid(server).values()) == 1
    assert server.stats().failed["400"] < 60
    assert server.stats().answered < 320


class Learned:
    """What a run knows when a request begins."""

    dimensions: int | None = None
    crowded = False


def sizes_of_requests(learned: Learned) -> Iterator[int]:
    """Give how many texts each request takes, as it is begun; there are texts enough for a few of the largest."""
    texts = Texts(rows(16_000), "text")
    requests = Requests("e", "m", {}, api="embeddings")
    plan = make_plan(texts, requests, np.ones(len(texts), np.bool_), dedupe=True)
    made = Embedding(
        requests,
        texts,
        plan,
        None,
        dimensions=lambda: learned.dimensions,
        answered=lambda: 1,
        crowded=lambda: learned.crowded,
        tell=print,
    )
    for _, body in made.bodies(np.arange(len(plan.first))):
        yield len(orjson.loads(body)["input"])


def test_a_request_begun_when_the_length_of_a_vector_is_known_has_fewer_texts() -> None:
    learned = Learned()
    sizes = sizes_of_requests(learned)
    assert [next(sizes), next(sizes)] == [USUAL_INPUTS, USUAL_INPUTS]
    learned.dimensions = 1_536
    assert LEAST_INPUTS <= next(sizes) < USUAL_INPUTS / 2


def test_requests_begun_while_their_number_is_limited_have_as_many_texts_as_they_may() -> None:
    learned = Learned()
    sizes = sizes_of_requests(learned)
    assert next(sizes) == USUAL_INPUTS
    learned.crowded = True
    assert next(sizes) == MOST_INPUTS
    learned.crowded = False
    assert next(sizes) == USUAL_INPUTS


def test_an_endpoint_of_long_vectors_is_asked_for_fewer_at_once_after_its_first_answer(
    server: SimulatedServer, embed: Embed
) -> None:
    frame = rows(4_000)
    frame["text"] += " [[dimensions=1536]]"
    assert is_right(embed(frame, max_concurrency=1), 1_536)
    sizes = [len(request.body["input"]) for request in server.requests()]
    assert sizes[0] == 4_000 // SPREAD
    assert max(sizes[1:]) < 100


# ---- what fails


def test_one_bad_text_costs_its_own_row_alone(server: SimulatedServer, embed: Embed) -> None:
    frame = rows(1_000)
    frame.loc[617, "text"] = "[[status=400]]"
    out = embed(frame)
    assert out.index[out["embedding_status"] != "ok"].tolist() == [617]
    assert out["embedding_error"][617].startswith("HTTP 400")
    assert out["embedding"][617] is None
    assert is_right(out)
    assert max(paid(server).values()) == 1
    assert server.stats().failed["400"] <= 12


@settings(deadline=None, max_examples=15)
@given(bad=st.sets(st.integers(0, 199), max_size=12))
def test_whatever_texts_are_bad_the_others_have_their_vectors(bad: set[int]) -> None:
    server = SERVERS[0]
    server.reset()
    frame = rows(200)
    for number in bad:
        frame.loc[number, "text"] = f"[[status=422]] {number}"
    out = frame.llm.embed("text", model="m", base_url=server.base_url, progress=False)
    assert set(out.index[out["embedding_status"] == "failed"]) == bad
    assert (out["embedding_status"] == "ok").sum() == 200 - len(bad)
    assert is_right(out)
    assert max(paid(server).values(), default=0) <= 1


SERVERS: list[SimulatedServer] = []


@pytest.fixture(autouse=True)
def _server_of_properties(server: SimulatedServer) -> None:
    SERVERS[:] = [server]


def test_a_text_that_brings_the_server_down_is_found_too(server: SimulatedServer, embed: Embed) -> None:
    frame = rows(64)
    frame.loc[5, "text"] = "[[status=500]]"
    out = embed(frame, max_attempts=4)
    assert out.index[out["embedding_status"] == "failed"].tolist() == [5]
    assert is_right(out)


def test_a_text_that_brings_the_server_down_in_every_request_is_no_outage(
    server: SimulatedServer, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmframe.outages.PROBE_S", 0.01)
    monkeypatch.setattr("llmframe.patience.PATIENCE_S", 5.0)
    frame = rows(32)
    frame.loc[3::8, "text"] = [f"[[status=500]] {number}" for number in range(4)]
    out = embed(frame, max_attempts=3)
    assert out.index[out["embedding_status"] == "failed"].tolist() == list(range(3, 32, 8))
    assert is_right(out)


def test_a_vector_that_is_none_is_its_texts_failure(embed: Embed) -> None:
    frame = rows(64)
    frame.loc[5, "text"] = "[[null]]"
    out = embed(frame, max_attempts=3)
    assert out.index[out["embedding_status"] == "failed"].tolist() == [5]
    assert "the reply holds no answer" in out["embedding_error"][5]


def test_vectors_of_another_length_fail_their_rows_alone_and_are_paid_for_once(
    server: SimulatedServer, embed: Embed
) -> None:
    frame = rows(96)
    frame.loc[40, "text"] = "[[dimensions=6]]"
    out = embed(frame, max_concurrency=1, prices={"input": 1.0}, details=True)
    failed = out["embedding_status"] == "failed"
    assert failed.sum() == 32
    assert out["embedding_error"][failed].unique().tolist() == ["the endpoint gave 6 numbers, where it gave 8 before"]
    assert is_right(out)
    assert out["embedding_prompt_tokens"].sum() == server.stats().prompt_tokens
    assert llmframe.last_run().usage.prompt_tokens == server.stats().prompt_tokens
    assert out["embedding_cost_usd"].sum() == pytest.approx(server.stats().prompt_tokens / 1e6)
    assert llmframe.last_run().cost_usd == pytest.approx(server.stats().prompt_tokens / 1e6)


def test_a_text_too_long_for_the_model_is_its_rows_error(embed: Embed) -> None:
    frame = rows(20)
    frame.loc[3, "text"] = "long " * 10_000
    out = embed(frame)
    assert out.index[out["embedding_status"] == "failed"].tolist() == [3]
    assert "maximum context length" in out["embedding_error"][3]


def test_an_endpoint_that_refuses_everything_is_soon_left_alone(server: SimulatedServer, embed: Embed) -> None:
    server.reset(status_all=400)
    with pytest.raises(EndpointError, match="the first 20 rows were all refused"):
        embed(rows(20_000))
    assert server.stats().received < 150


def test_faults_by_chance_cost_no_row_and_no_text_is_paid_for_twice(server: SimulatedServer, embed: Embed) -> None:
    server.reset(p_500=0.1, p_bad_json=0.05, p_empty_choices=0.05, p_html=0.05, p_reset=0.05, seed=3)
    out = embed(rows(1_500))
    assert out["embedding_status"].eq("ok").all()
    assert is_right(out)
    assert max(paid(server).values()) == 1


def test_a_run_that_is_stopped_says_how_to_go_on(server: SimulatedServer, embed: Embed) -> None:
    server.reset(status_all=401)
    with pytest.raises(EndpointError, match=r"last_run\(\)\.frame\.llm\.embed\(\.\.\., where='missing'\)"):
        embed(rows(3))
    server.reset()
    out = embed(llmframe.last_run().frame, where="missing")
    assert is_right(out)
    assert out["embedding_status"].eq("ok").all()


def test_on_error_raise_stops_with_the_row(embed: Embed) -> None:
    frame = rows(64)
    frame.loc[40, "text"] = "[[status=400]]"
    with pytest.raises(RowFailed, match=r"row 40 \(label 40\) failed: HTTP 400") as stopped:
        embed(frame, on_error="raise")
    assert stopped.value.frame is not None
    assert is_right(stopped.value.frame)


# ---- paid for once


def test_a_text_that_repeats_is_sent_once(server: SimulatedServer, embed: Embed) -> None:
    out = embed(pd.DataFrame({"text": ["a", "b"] * 500}))
    assert [request.body["input"] for request in server.requests()] == [["a", "b"]]
    assert out["embedding_prompt_tokens"].sum() == server.stats().prompt_tokens
    assert is_right(out)


def test_the_same_call_again_asks_nothing_and_gives_the_same_frame(
    server: SimulatedServer, embed: Embed, tmp_path: Path
) -> None:
    frame = rows(700)
    one = embed(frame, checkpoint=tmp_path, details=True)
    server.reset()
    two = embed(frame.iloc[::-1], checkpoint=tmp_path, details=True).iloc[::-1]
    assert server.stats().received == 0
    assert two["embedding_source"].eq("checkpoint").all()
    same = [name for name in one.columns if name not in ("embedding", "embedding_source")]
    pd.testing.assert_frame_equal(one[same], two[same])
    assert np.array_equal(np.stack(one["embedding"]), np.stack(two["embedding"]))
    with pytest.warns(LLMFrameWarning, match="dimensions was not set, now 5"):
        embed(frame, checkpoint=tmp_path, dimensions=5, output="short")
    assert server.stats().answered > 0


def test_refresh_asks_again(server: SimulatedServer, embed: Embed, tmp_path: Path) -> None:
    embed(rows(3), checkpoint=tmp_path)
    embed(rows(3), checkpoint=tmp_path, refresh=True)
    assert set(paid(server).values()) == {2}


def test_an_interrupted_run_goes_on_where_it_stopped(server: SimulatedServer, embed: Embed, tmp_path: Path) -> None:
    frame = rows(3_000)
    server.reset(schedule=[(0.0, {}), (0.3, {"status_all": 401})], latency_s=0.05)
    with pytest.raises(EndpointError) as stopped:
        embed(frame, checkpoint=tmp_path, max_concurrency=1)
    assert stopped.value.frame is not None
    done = (stopped.value.frame["embedding_status"] == "ok").sum()
    assert 0 < done < 3_000
    assert is_right(stopped.value.frame)
    before = paid(server)
    server.reset()
    out = embed(frame, checkpoint=tmp_path)
    assert out["embedding_status"].eq("ok").all()
    assert is_right(out)
    assert max((before + paid(server)).values()) == 1


def test_a_checkpoint_shows_its_vectors(embed: Embed, tmp_path: Path) -> None:
    embed(rows(40), checkpoint=tmp_path)
    held = llmframe.read_checkpoint(tmp_path)
    vectors = {tuple(np.round(vector, 5)) for vector in held["embedding"]}
    assert vectors == {tuple(np.round(np.float32(embedding_of(text)), 5)) for text in rows(40)["text"]}
    assert held["api"].unique().tolist() == ["embeddings"]
    assert held["prompt_tokens"].sum() > 0


def test_answers_and_embeddings_live_in_one_checkpoint(server: SimulatedServer, embed: Embed, tmp_path: Path) -> None:
    frame = rows(5)
    frame.llm.complete("text", model="m", base_url=server.base_url, progress=False, checkpoint=tmp_path)
    with pytest.warns(LLMFrameWarning, match="the api was chat, now embeddings"):
        embed(frame, checkpoint=tmp_path)
    frame.llm.complete("text", model="m", base_url=server.base_url, progress=False, checkpoint=tmp_path)
    embed(frame, checkpoint=tmp_path)
    assert server.stats().answered == 6


def test_a_part_of_before_there_were_embeddings_is_read(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    from llmframe.origins import Origin
    from llmframe.parts import COLUMNS
    from llmframe.results import Completion
    from tests.encoding import encode

    name = "part-0123456789ab-000001.parquet"
    data = encode([(bytes(32), Completion(text="kept", status="ok"), 1)], Origin("e", "chat", "m", "t", "{}"))
    table = pq.read_table(pa.BufferReader(data)).drop_columns("embedding").replace_schema_metadata(None)
    noted = pq.read_metadata(pa.BufferReader(data)).metadata
    with pq.ParquetWriter(tmp_path / name, table.schema, store_schema=False, write_page_checksum=True) as writer:
        writer.write_table(table)
        columns = " ".join(each for each in COLUMNS.names if each != "embedding")
        origins = noted[b"llmframe.origins"]
        writer.add_key_value_metadata(
            {"llmframe.format": "1", "llmframe.columns": columns, "llmframe.origins": origins}
        )
    held = llmframe.read_checkpoint(tmp_path)
    assert held["text"].tolist() == ["kept"]
    assert held["embedding"].tolist() == [None]


# ---- the budget


@pytest.mark.parametrize("most", [200, 2_000, 9_000])
def test_no_run_passes_its_budget_and_little_of_it_is_left(
    server: SimulatedServer, embed: Embed, tmp_path: Path, most: int
) -> None:
    server.reset(latency_s=0.005)
    with pytest.raises(BudgetExceeded, match="max_tokens_total"):
        embed(rows(5_000), max_tokens_total=most, checkpoint=tmp_path)
    assert server.stats().prompt_tokens <= most
    assert server.stats().prompt_tokens > (most - 300) * 0.8


def test_a_budget_in_usd_needs_no_output_price(server: SimulatedServer, embed: Embed) -> None:
    out = embed(rows(50), max_cost=1.0, prices={"input": 0.02})
    assert out["embedding_status"].eq("ok").all()


def test_an_estimate_counts_texts_and_sends_nothing(server: SimulatedServer, embed: Embed, tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": ["hello world"] * 2 + ["a", None]})
    keywords = {"api": "embeddings", "model": "text-embedding-3-small", "base_url": server.base_url}
    made = frame.llm.estimate("text", **keywords, prices={"input": 1.0})
    assert (made.requests, made.skipped, made.completion_tokens) == (2, 1, 0)
    assert made.prompt_tokens == 3
    assert made.prompts_by == "counted with cl100k_base"
    assert made.cost_usd == pytest.approx(3e-6)
    assert server.stats().received == 0
    embed(frame, model="text-embedding-3-small", checkpoint=tmp_path)
    again = frame.llm.estimate("text", **keywords, checkpoint=tmp_path)
    assert (again.requests, again.from_checkpoint) == (0, 2)


def test_an_estimate_counts_no_vector_that_the_run_would_not_take(
    server: SimulatedServer, embed: Embed, tmp_path: Path
) -> None:
    frame = pd.DataFrame({"text": ["a", "[[dimensions=6]] b"]})
    for position in range(2):
        embed(frame.iloc[[position]], checkpoint=tmp_path)
    keywords = {"api": "embeddings", "model": "m", "base_url": server.base_url, "checkpoint": tmp_path}
    made = frame.llm.estimate("text", **keywords)
    assert (made.requests, made.from_checkpoint) == (1, 1)
    server.reset()
    embed(frame, checkpoint=tmp_path)
    assert server.stats().answered == 1


# ---- the key


def key(text: str, **params: Any) -> str:
    requests = Requests("https://api.openai.com/v1", "text-embedding-3-small", params, api="embeddings")
    return requests.key(user(text)).hex()


GOLDEN = {
    "a text": (key("Hello"), "27b82a634df5e2e7902408cd729614fe982c8ecc75898acefaa68f6ed2900ac7"),
    "dimensions": (
        key("Größe \U0001f600", dimensions=256),
        "4c43ac5787f9f13e262ac2aa97788c8145f127ccc939b13612df687d9746478d",
    ),
}


@pytest.mark.parametrize(("made", "pinned"), GOLDEN.values(), ids=GOLDEN)
def test_a_texts_key_never_changes(made: str, pinned: str) -> None:
    assert made == pinned


def test_the_body_asks_for_all_its_texts() -> None:
    requests = Requests("e", "m", {"dimensions": 3}, api="embeddings")
    assert requests.embedding_body(["a", "b"]) == (
        b'{"model":"m","input":["a","b"],"dimensions":3,"encoding_format":"base64"}'
    )
    assert requests.embedding_body(["a"], "float") == b'{"model":"m","input":["a"],"dimensions":3}'


# ---- options


def test_the_docstring_and_the_signature_tell_of_the_same_keywords() -> None:
    documented = inspect.getdoc(accessor.LLMFrame.embed) or ""
    section = documented.split("Parameters\n----------\n")[1].split("\n\nReturns")[0]
    headings = re.findall(r"^(\S.*?)(?: : .*)?$", section, re.MULTILINE)
    named = [name for heading in headings for name in heading.split(", ")]
    shown = [*inspect.signature(embed_options).parameters]
    assert sorted(named) == sorted(["text", *shown[:-1], "**params"])
    assert [*inspect.signature(accessor.LLMFrame.embed).parameters] == ["self", "text", *shown]


@pytest.mark.parametrize(
    ("keywords", "error", "words"),
    [
        ({"model": None}, ConfigurationError, "no model: pass model= to embed"),
        ({"schema": ["a"]}, ConfigurationError, "schema= is about answers"),
        ({"system": "a"}, ConfigurationError, "system= is about answers"),
        ({"api": "chat"}, ConfigurationError, "api= is about answers"),
        ({"encoding_format": "float"}, ConfigurationError, "encoding_format= is chosen here"),
        ({"dimension": 3}, ConfigurationError, "did you mean 'dimensions'"),
        ({"dimensions": 0}, ConfigurationError, "whole number of at least 1"),
        ({"input": "a"}, ConfigurationError, "input= is made from the prompt"),
        ({"text": "txet"}, TemplateError, "did you mean 'text'"),
        ({"text": [{"role": "user", "content": "{text}"}]}, TemplateError, "the text to embed is of type list"),
        ({"text": rows(3)["text"]}, TemplateError, r"there is series\.llm\.embed\(\)"),
        ({"output": "text"}, ConfigurationError, "the frame has a column 'text' already"),
    ],
)
def test_what_cannot_be_embedded_is_refused_before_asking(
    server: SimulatedServer, embed: Embed, keywords: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        embed(rows(3), keywords.pop("text", "text"), **keywords)
    assert server.stats().received == 0


def test_complete_makes_no_embeddings(server: SimulatedServer) -> None:
    with pytest.raises(ConfigurationError, match=r"df\.llm\.embed"):
        rows(1).llm.complete("text", model="m", base_url=server.base_url, api="embeddings")


def test_what_is_configured_for_answers_does_not_reach_an_embedding(
    server: SimulatedServer, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmframe.options._configured", {})
    llmframe.configure(model="chat", temperature=0, system="Be brief.", base_url=server.base_url, progress=False)
    out = rows(2).llm.embed("text", model="m")
    assert is_right(out)
    assert server.requests()[0].body.keys() == {"model", "input", "encoding_format"}


def test_a_configured_price_is_that_of_the_configured_model_and_of_no_embedding(
    embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmframe.options._configured", {})
    llmframe.configure(model="chat", prices={"input": 1.0, "output": 1.0}, details=True)
    assert embed(rows(2))["embedding_cost_usd"].isna().all()


@pytest.mark.parametrize("cap", [{"max_tokens_total": 1}, {"max_cost": 1e-9}])
def test_a_configured_budget_holds_for_an_embedding(
    server: SimulatedServer, embed: Embed, monkeypatch: pytest.MonkeyPatch, cap: dict[str, Any]
) -> None:
    monkeypatch.setattr("llmframe.options._configured", {})
    llmframe.configure(**cap)
    with pytest.raises(BudgetExceeded):
        embed(rows(3), prices={"input": 0.02})
    assert server.stats().received == 0


def test_a_configured_budget_in_usd_is_never_left_out_for_want_of_a_price(
    server: SimulatedServer, embed: Embed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmframe.options._configured", {})
    llmframe.configure(max_cost=1.0)
    with pytest.raises(ConfigurationError, match="max_cost= needs a price"):
        embed(rows(3))
    assert server.stats().received == 0


def test_what_any_call_can_have_is_configured_for_embeddings_too(embed: Embed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmframe.options._configured", {})
    llmframe.configure(details=True, na="keep", dedupe=False)
    out = embed(pd.DataFrame({"text": ["same", "same", None]}), "text: {text}")
    assert out["embedding_status"].tolist() == ["ok"] * 3
    assert out["embedding_source"].tolist() == ["request"] * 3


# ---- what is read


@pytest.mark.parametrize(
    "payload",
    [
        None,
        {},
        {"data": []},
        {"data": [{"embedding": [1, 2]}]},
        {"data": [{"embedding": [1, 2]}, {"embedding": [1]}]},
        {"data": [{"embedding": [1, 2]}, {"embedding": [1, None]}]},
        {"data": [{"embedding": [1, 2]}, {"embedding": [1, "x"]}]},
        {"data": [{"embedding": [1, 2]}, {"embedding": "!!!"}]},
        {"data": [{"embedding": [1, 2]}, {}]},
        {"data": [{"embedding": [1, 2]}, "x"]},
        {"data": [{"embedding": []}, {"embedding": []}]},
        {"data": [{"embedding": [[1]]}, {"embedding": [[1]]}]},
        {"data": [{"embedding": [1e300]}, {"embedding": [1]}]},
        {"data": [{"index": 0, "embedding": [1]}, {"index": 0, "embedding": [1]}]},
        {"data": [{"index": 5, "embedding": [1]}, {"index": 0, "embedding": [1]}]},
        {"data": [{"index": -1, "embedding": [1]}, {"index": 0, "embedding": [1]}]},
        {"data": [{"index": "a", "embedding": [1]}, {"index": 0, "embedding": [1]}]},
    ],
)
def test_a_reply_is_read_whole_or_not_at_all(payload: Any) -> None:
    assert read_vectors(payload, 2) is None


@settings(deadline=None)
@given(st.integers(0, 2**50), st.lists(st.integers(0, 2**30), min_size=1, max_size=50))
def test_tokens_are_shared_out_to_the_last_one(total: int, weights: list[int]) -> None:
    shares = shared_out(total, np.array(weights))
    assert shares.sum() == total
    assert (shares >= 0).all()


def test_a_reply_without_usage_leaves_the_tokens_unknown(server: SimulatedServer, embed: Embed) -> None:
    server.reset(p_no_usage=1.0)
    assert embed(rows(3))["embedding_prompt_tokens"].tolist() == [pd.NA] * 3


# ---- similarity


def vectors(*values: Any) -> pd.Series:
    cells = pd.Series([None] * len(values), dtype=object)
    for place, value in enumerate(values):
        cells[place] = None if value is None else np.array(value, np.float32)
    return cells


def test_similarity_is_the_cosine_of_each_rows_two_vectors() -> None:
    a, b = vectors([1, 0], [1, 0], [2, 0], None, [0, 0]), vectors([3, 0], [0, 1], [-1, 0], [1, 1], [1, 1])
    assert llmframe.similarity(a, b).tolist() == [1.0, 0.0, -1.0, pd.NA, pd.NA]
    assert llmframe.similarity(a, np.array([1.0, 1.0])).round(4).tolist()[:2] == [0.7071, 0.7071]
    assert llmframe.similarity(a.iloc[:0], b.iloc[:0]).dtype == pd.Float64Dtype()


def test_similarity_goes_by_the_frames_own_index(embed: Embed) -> None:
    frame = pd.DataFrame({"text": ["a", "b", None], "other": ["a", "c", "d"]}, index=[3, 3, 4])
    both = embed(embed(frame), "other", output="b")
    made = llmframe.similarity(both["embedding"], both["b"])
    assert made.index.tolist() == [3, 3, 4]
    assert made.iloc[0] == pytest.approx(1.0)
    assert made.isna().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (np.zeros(3), vectors([1]), "pass a column"),
        (vectors([1]), vectors([1], [2]), "different indexes"),
        (vectors([1]), vectors([1, 2]), "of one model"),
        (vectors([1]), "text", "is a string"),
        (vectors([1]), [[1, 2], [1]], "is of type list"),
        (vectors([1]), ["x"], "is of type list"),
        (vectors([1]), [], "is of type list"),
        (pd.Series([["x"]]), vectors([1]), "cannot be compared"),
        (pd.Series(["text"]), vectors([1]), r"a cell to compare is a string \('text'\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(a: Any, b: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        llmframe.similarity(a, b)


def test_two_runs_at_once_keep_their_own(server: SimulatedServer, embed: Embed) -> None:
    made: dict[int, pd.DataFrame] = {}
    frames = {place: pd.DataFrame({"text": [f"{place}: {number}" for number in range(400)]}) for place in range(3)}
    threads = [
        threading.Thread(target=lambda place=place: made.update({place: embed(frames[place])})) for place in frames
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(is_right(made[place]) for place in frames)


# ---- whatever happens, and whoever sends


PROGRAM = """
import sys
import pandas as pd, llmframe
frame = pd.DataFrame({"text": [f"text {number}" for number in range(4_000)]})
frame.llm.embed("text", model="m", base_url=sys.argv[1], checkpoint=sys.argv[2], max_concurrency=1, progress=False)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_ended_costs_only_what_was_in_flight_or_just_before(
    server: SimulatedServer, embed: Embed, tmp_path: Path, how: signal.Signals
) -> None:
    server.reset(latency_s=0.4)
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, server.base_url, str(tmp_path)],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    with process:
        server.wait_for(answered=8)
        process.send_signal(how)
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert process.returncode != 0
    if how == signal.SIGINT:
        assert "Interrupted" in said
    before = paid(server)
    server.reset()
    frame = pd.DataFrame({"text": [f"text {number}" for number in range(4_000)]})
    out = embed(frame, checkpoint=tmp_path)
    assert is_right(out)
    assert out["embedding_status"].eq("ok").all()
    again = before.keys() & paid(server).keys()
    # An interrupt saves all; a kill may cost what came since the last flush, one a second: two or three requests.
    assert len(again) <= (0 if how == signal.SIGINT else 5 * 250)
    assert len(before) >= 8 * 250


@pytest.mark.parametrize("kind", ["sync", "azure", "own transport"])
def test_any_client_can_embed(server: SimulatedServer, kind: str) -> None:
    client: Any
    if kind == "sync":
        client = openai.OpenAI(base_url=server.base_url, http_client=openai.DefaultHttpxClient())
    elif kind == "azure":
        root = server.base_url.removesuffix("/v1")
        client = openai.AsyncAzureOpenAI(azure_endpoint=root, api_version="2024-10-21", api_key="key")
    else:
        client = openai.AsyncOpenAI(base_url=server.base_url, default_query={"a": "b"})
    frame = rows(100)
    frame.loc[3, "text"] = "[[status=400]]"
    out = frame.llm.embed("text", model="m", client=client, progress=False)
    assert is_right(out)
    assert (out["embedding_status"] == "ok").sum() == 99


def test_replicas_share_the_texts(server: SimulatedServer) -> None:
    with SimulatedServer() as other:
        urls = [server.base_url, other.base_url]
        out = rows(2_000).llm.embed("text", model="m", base_url=urls, progress=False)
        both = paid(server) + paid(other)
    assert is_right(out)
    assert len(both) == 2_000
    assert max(both.values()) == 1


def test_a_shell_exports_what_was_embedded(embed: Embed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embed(rows(5), checkpoint=tmp_path / "run")
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "all.parquet")]) == 0
    assert "5 requests: 5 ok" in capsys.readouterr().out
    assert pd.read_parquet(tmp_path / "all.parquet")["embedding"].map(len).tolist() == [8] * 5


def test_the_report_of_a_run_is_that_of_its_texts(embed: Embed) -> None:
    frame = rows(50)
    frame.loc[3, "text"] = "[[status=400]]"
    embed(frame)
    run = llmframe.last_run()
    assert run.counts == {"ok": 49, "failed": 1}
    assert run.usage.prompt_tokens == run.frame["embedding_prompt_tokens"].sum()
    assert run.errors["position"].tolist() == [3]
    assert "49 ok" in run._repr_html_()
