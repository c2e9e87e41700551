"""The report of a run: what it says, how it looks, and that nothing of a row or an answer acts in it."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import llmframe
from llmframe import Run, plots
from llmframe.errors import ConfigurationError
from tests.server import SimulatedServer

EVIL = "<script>alert(1)</script>"
PRICES = {"input": 1.0, "output": 2.0}


def run(server: SimulatedServer, texts: list[str], **keywords: Any) -> Run:
    frame = pd.DataFrame({"text": texts}, index=[f"{EVIL} {number}" for number in range(len(texts))])
    frame.llm.complete("{text}", model="m", base_url=server.base_url, progress=False, **keywords)
    return llmframe.last_run()


def figures(page: str) -> dict[str, str]:
    return dict(re.findall(r"<th scope='row'[^>]*>([^<]*)</th><td[^>]*>([^<]*)</td>", page))


def test_the_report_says_what_came_of_the_rows_and_what_it_took(server: SimulatedServer, tmp_path: Path) -> None:
    run(server, ["a"], checkpoint=tmp_path)
    page = run(server, ["a", "b", "c", "b", "[[status=400]]"], checkpoint=tmp_path, prices=PRICES)._repr_html_()
    said = figures(page)
    assert said["rows ok"] == "4"
    assert said["rows failed"] == "1"
    assert (said["from the checkpoint"], said["duplicates"], said["from requests"]) == ("1", "1", "2")
    assert (said["requests sent"], said["failed: request"]) == ("3", "1")
    assert float(said["USD"]) == pytest.approx(llmframe.last_run().cost_usd, abs=1e-4)
    assert said["prompt tokens"] == str(llmframe.last_run().usage.prompt_tokens)


def test_the_commonest_errors_come_with_a_row_to_look_at(server: SimulatedServer) -> None:
    page = run(server, ["[[status=400]] 1", "[[status=400]] 2", "[[finish=content_filter]]"])._repr_html_()
    rows = re.findall(r"<tr><td[^>]*>(\d+)</td><td[^>]*>(\w+)</td>", page)
    assert rows == [("2", "failed"), ("1", "filtered")]


def test_text_of_rows_labels_and_endpoints_is_escaped(server: SimulatedServer) -> None:
    page = run(server, [f"{EVIL} [[status=400:{EVIL}]]", f"[[refusal={EVIL}]]"])._repr_html_()
    assert "&lt;script&gt;" in page
    assert "<script" not in page


def test_the_page_needs_nothing_from_elsewhere(server: SimulatedServer, tmp_path: Path) -> None:
    run(server, ["a", "b"]).to_html(tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>")
    assert "<svg" in page
    assert "<script" not in page
    links = set(re.findall(r"(?:href|src)=['\"]([^'\"]+)", page))
    assert all(link.startswith("#") for link in links)


def test_a_report_that_cannot_be_written_says_where(server: SimulatedServer, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "run.html"):
        with pytest.raises(ConfigurationError, match=f"the report cannot be written to {re.escape(str(path))}: "):
            run(server, ["a"]).to_html(path)


def test_a_run_without_an_answer_has_a_report_too(server: SimulatedServer) -> None:
    for texts in ([], ["[[status=400]]"]):
        assert "<svg" not in run(server, texts)._repr_html_()


def test_the_report_can_be_looked_at_where_matplotlib_is_missing(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    done = run(server, ["a"])
    assert figures(done._repr_html_())["rows ok"] == "1"
    with pytest.raises(ConfigurationError, match=r"pip install 'llmframe-pandas\[plot\]'"):
        done.plot()


def test_the_plot_has_the_course_and_every_latency(server: SimulatedServer) -> None:
    course, histogram = run(server, [f"row {number}" for number in range(50)]).plot()
    assert course.get_xlabel() == "seconds"
    assert sum(bar.get_height() for bar in histogram.patches) == 50


def test_a_course_of_one_moment_can_be_seen(server: SimulatedServer) -> None:
    moment = run(server, ["a"]).timeline.reindex([0]).assign(time_s=1.0, rate=5.0, decision="", allowed=math.inf)
    course, _ = plots.draw(moment, np.array([0.1]))
    assert course.lines[0].get_marker() == "."
    assert course.get_xlim()[0] == 0


def test_a_run_of_a_moment_has_a_course(server: SimulatedServer) -> None:
    for text in "a", "b":
        timeline = run(server, [text]).timeline
        assert len(timeline) >= 2
        answered = (timeline["rate"] * timeline["time_s"].diff().clip(lower=1e-3)).fillna(0)
        assert answered.tolist() == [0] * (len(timeline) - 1) + [pytest.approx(1)]


def test_a_known_limit_is_marked_and_an_unknown_one_is_not() -> None:
    with SimulatedServer() as server:  # of which no test before has learned a limit
        run(server, ["a"])
        assert "limit" not in llmframe.last_run().plot()[0].get_ylabel()
        server.change(requests_per_min=600, rate_headers="openai")
        run(server, [f"row {i}" for i in range(300)])
    course, _ = llmframe.last_run().plot()
    assert course.get_ylabel() == "answers/s (dashed: the limit)"
    assert np.nanmax(course.lines[1].get_ydata()) == pytest.approx(10, rel=0.01)


def test_the_course_of_a_slow_run_is_a_rate_and_not_a_peak_for_each_answer() -> None:
    seconds = np.arange(1.0, 601.0)
    course = pd.DataFrame({"time_s": seconds, "rate": (seconds % 4 == 0) * 1.0, "decision": "", "allowed": math.inf})
    line = plots.draw(course.assign(window=8, in_flight=8), np.array([4.0]))[0].lines[0]
    assert np.asarray(line.get_ydata()) == pytest.approx(0.25, abs=0.06)


def test_decisions_whose_words_would_cover_one_another_are_marked_and_not_all_told() -> None:
    seconds = np.array([0.0, 1.0, 1.05, 1.1, 5.0, 10.0])
    words = ["", "first", "second", "third", "fourth", ""]
    course = pd.DataFrame({"time_s": seconds, "rate": 1.0, "decision": words, "allowed": math.inf})
    drawn = plots.draw(course.assign(window=8, in_flight=8), np.array([0.1]))[0]
    assert [text.get_text() for text in drawn.texts] == ["first", "fourth"]


def test_the_plot_can_be_drawn_into_the_users_own_axes(server: SimulatedServer) -> None:
    from matplotlib.figure import Figure

    mine = Figure().subplots(1, 2)
    assert run(server, ["a"]).plot(mine).tolist() == mine.tolist()


def test_a_timeline_is_of_its_own_run_alone(server: SimulatedServer) -> None:
    server.change(p_500=1.0)
    with pytest.raises(llmframe.RowFailed):
        run(server, ["a"], max_attempts=2, on_error="raise")
    server.change(latency_s=1.2, p_500=0.0)
    timeline = run(server, ["b"]).timeline
    assert len(timeline)
    assert timeline["time_s"].between(0, llmframe.last_run().seconds).all()
