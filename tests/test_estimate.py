"""The estimate: it sends nothing, writes nothing, and agrees with what the server then counts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import llmframe
from llmframe.errors import CheckpointError, ConfigurationError
from llmframe.estimate import Estimate
from llmframe.tokens import counter_for, guess
from tests.server import SimulatedServer

REVIEWS = pd.read_parquet(Path(__file__).parent.parent / "data" / "reviews.parquet")
PRICES = {"input": 0.15, "output": 0.60}
FOREIGN = ["人人生而自由,在尊严和权利上一律平等。", "すべての人間は自由である。", "def f(x):\n    return x ** 2\n"]


def texts() -> pd.Series[Any]:
    return pd.concat([REVIEWS["review"].head(200), pd.Series(FOREIGN)], ignore_index=True)


def frame(count: int = 60) -> pd.DataFrame:
    return pd.DataFrame({"text": texts().drop_duplicates().head(count)})


def given(server: SimulatedServer, **more: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 1_000, "base_url": server.base_url, "prices": PRICES, "progress": False, **more}


@pytest.mark.parametrize(
    ("model", "vocabulary"),
    [
        ("gpt-4o-mini", "o200k_base"),
        ("gpt-4.1", "o200k_base"),
        ("gpt-4.1-mini-2025-04-14", "o200k_base"),
        ("gpt-3.5-turbo", "cl100k_base"),
    ],
)
def test_prompt_tokens_are_within_2_percent_of_the_servers_count(
    server: SimulatedServer, model: str, vocabulary: str
) -> None:
    server.configure(vocabulary=vocabulary)
    rows = pd.DataFrame({"text": texts()})
    call = given(server, model=model, system="Be brief.", examples=[("a", "b")])
    made = rows.llm.estimate("Label this: {text}", **call)
    assert made.prompts_by == f"counted with {vocabulary}"
    rows.llm.complete("Label this: {text}", **call)
    stats = server.stats()
    assert made.requests == stats.answered
    assert made.prompt_tokens == pytest.approx(stats.prompt_tokens, rel=0.02)


def test_it_sends_nothing_and_makes_no_directory_and_needs_no_key(
    server: SimulatedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    made = frame().llm.estimate("{text}", **given(server, checkpoint=tmp_path / "run"))
    assert (made.rows, made.requests, made.from_checkpoint) == (60, 60, 0)
    assert server.stats().received == 0
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_only_read(server: SimulatedServer, tmp_path: Path) -> None:
    rows, call = frame(), given(server, checkpoint=tmp_path / "run")
    rows.head(40).llm.complete("{text}", **call)

    def listing() -> dict[str, tuple[int, int]]:
        return {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in (tmp_path / "run").iterdir()}

    before, directory = listing(), os.stat(tmp_path / "run").st_mtime_ns
    made = rows.llm.estimate("{text}", **call)
    assert (made.requests, made.from_checkpoint) == (20, 40)
    assert (listing(), os.stat(tmp_path / "run").st_mtime_ns) == (before, directory)


def test_a_path_that_is_no_checkpoint_is_refused(server: SimulatedServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is not a directory"):
        frame().llm.estimate("{text}", **given(server, checkpoint=tmp_path / "file"))


def test_rows_are_those_skipped_those_shared_and_those_asked(server: SimulatedServer) -> None:
    rows = pd.DataFrame({"text": ["a", "a", None, "b", "c"]})
    made = rows.llm.estimate("{text}", **given(server, where=[True, True, True, True, False]))
    assert (made.rows, made.skipped, made.requests) == (5, 2, 2)


def test_answers_in_the_checkpoint_say_how_long_the_others_get(server: SimulatedServer, tmp_path: Path) -> None:
    rows, call = frame(60), given(server, checkpoint=tmp_path / "run")
    rows.head(40).llm.complete("{text}", **call)
    made = rows.llm.estimate("{text}", **call)
    assert "the mean of 40 answers in the checkpoint" in made.completions_by
    assert "a guess" in made.prompts_by
    assert "corrected by the usage of 40 answers" in made.prompts_by
    server.reset()
    rows.llm.complete("{text}", **call)
    assert made.prompt_tokens == pytest.approx(server.stats().prompt_tokens, rel=0.1)


def test_a_sample_is_asked_once_and_kept_for_the_call(server: SimulatedServer, tmp_path: Path) -> None:
    call = given(server, checkpoint=tmp_path / "run", max_tokens=None)
    assert frame().llm.estimate("{text}", **call).cost_usd is None
    made = frame().llm.estimate("{text}", sample=10, **call)
    assert server.stats().answered == 10
    assert (made.requests, made.from_checkpoint) == (50, 10)
    assert made.cost_usd is not None
    frame().llm.complete("{text}", **call)
    assert server.stats().answered == 60


def test_a_sample_without_a_checkpoint_would_be_paid_for_twice_and_is_refused(server: SimulatedServer) -> None:
    with pytest.raises(ConfigurationError, match="pass checkpoint= to keep their answers"):
        frame().llm.estimate("{text}", sample=10, **given(server))
    assert server.stats().received == 0


def test_a_sample_that_the_call_would_ask_again_is_refused(server: SimulatedServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="refresh=True asks them again"):
        frame().llm.estimate("{text}", sample=10, refresh=True, **given(server, checkpoint=tmp_path / "run"))
    assert server.stats().received == 0


def test_its_sums_are_those_of_the_run_to_the_cent(server: SimulatedServer) -> None:
    server.configure(vocabulary="o200k_base")
    call = given(server, model="gpt-4o-mini", prices={"input": 150.0, "output": 600.0}, details=True)
    made = frame().llm.estimate("{text}", **call)
    out = frame().llm.complete("{text}", **call)
    tokens = int(out["response_prompt_tokens"].sum())
    assert made.prompt_tokens == tokens
    answers = int(out["response_completion_tokens"].sum())
    cost = out["response_cost_usd"].sum()
    assert made.prompt_cost_usd == pytest.approx(cost - answers * 600e-6, abs=0.01)
    assert made.prompt_cost_usd == pytest.approx(tokens * 150e-6, abs=1e-9)


def test_what_is_unknown_is_none_and_says_what_would_make_it_known(server: SimulatedServer) -> None:
    made = frame().llm.estimate("{text}", **given(server, max_tokens=None, prices=None))
    assert (made.completion_tokens, made.cost_usd, made.prompt_cost_usd, made.batch_cost_usd) == (None,) * 4
    assert "max_tokens=" in made.completions_by
    assert "prices=" in made.price_by
    assert "unknown" in repr(made)


def test_a_cost_that_is_unknown_says_why_and_not_where_the_price_is_from(server: SimulatedServer) -> None:
    made = frame().llm.estimate("{text}", **given(server, max_tokens=None, prices={"input": 1.0, "output": 2.0}))
    (line,) = [each for each in repr(made).splitlines() if each.startswith("  cost ")]
    assert line.split() == ["cost", "unknown", "the", "completion", "tokens", "are", "unknown"]


def test_a_schema_is_said_to_be_left_out(server: SimulatedServer) -> None:
    made = frame().llm.estimate("{text}", **given(server, schema=["good", "bad"]))
    assert "the schema not counted" in made.prompts_by


def test_a_known_model_is_priced_and_half_of_it_as_a_batch() -> None:
    made = frame().llm.estimate("{text}", model="gpt-4o-mini", max_tokens=10)
    assert made.cost_usd == pytest.approx(made.prompt_tokens * 0.15e-6 + 600 * 0.60e-6)
    assert made.batch_cost_usd == pytest.approx(made.cost_usd / 2)


def test_an_estimate_of_a_batch_shows_both_prices_and_what_is_saved() -> None:
    made = frame().llm.estimate("{text}", batch=True, model="m", max_tokens=10, prices={"input": 1.0, "output": 10.0})
    shown = repr(made + made)
    assert f"{2 * made.cost_usd:.4f} USD" in shown
    assert f"as a batch         {2 * made.batch_cost_usd:>10.4f} USD" in shown
    assert f"saved by it        {2 * made.batch_saves_usd:>10.4f} USD" in shown
    assert "saved by it" not in repr(frame().llm.estimate("{text}", model="m"))


def test_its_view_escapes_what_came_from_outside_and_has_no_colour_of_its_own() -> None:
    made = Estimate(1, 0, 1, 0, 5, None, None, None, "<b>&", "<script>alert(1)</script>", "p")
    shown = made._repr_html_()
    assert "<script>" not in shown
    assert "<b>" not in shown
    assert "color" not in shown


def test_nothing_is_left_to_ask_costs_nothing(server: SimulatedServer, tmp_path: Path) -> None:
    call = given(server, checkpoint=tmp_path / "run")
    frame().llm.complete("{text}", **call)
    made = frame().llm.estimate("{text}", **call)
    assert (made.requests, made.prompt_tokens, made.completion_tokens, made.cost_usd) == (0, 0, 0, 0.0)


def test_an_empty_frame_costs_nothing(server: SimulatedServer) -> None:
    assert frame().head(0).llm.estimate("{text}", **given(server)).cost_usd == 0.0


def test_a_text_of_a_million_words_is_counted() -> None:
    assert counter_for("gpt-4o").count("word " * 10**6) == pytest.approx(10**6, rel=0.001)


def test_the_guess_by_characters_is_near_the_count_of_the_reviews() -> None:
    counted = counter_for("gpt-4o").count
    english = texts().head(200)
    assert sum(map(guess, english)) == pytest.approx(sum(map(counted, english)), rel=0.1)


def test_it_is_public() -> None:
    assert llmframe.Estimate is Estimate
