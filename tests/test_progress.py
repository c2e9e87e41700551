"""What a user sees of a run: the bar on a terminal, and the lines before it.

The bar is read as a terminal gets it: a pseudo-terminal of a given width, one drawing after each carriage return.
"""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import pytest
import tqdm.std
from tqdm.utils import disp_len

import llmframe
from llmframe import notices, progress
from llmframe.errors import LLMFrameWarning
from llmframe.results import Usage
from llmframe.state import State
from tests.server import SimulatedServer

termios = pytest.importorskip("termios", reason="no pseudo-terminals here")

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = 80, 120  # columns
SCRIPT_S = 60.0  # for a process on a machine that is busy with other tests


def frame(rows: int) -> pd.DataFrame:
    return pd.DataFrame({"text": [f"row {i}" for i in range(rows)]})


def ask(server: SimulatedServer, source: pd.DataFrame, prompt: str = "{text}", **keywords: Any) -> pd.DataFrame:
    out: pd.DataFrame = source.llm.complete(prompt, model="m", base_url=server.base_url, **keywords)
    return out


def seen_on_a_terminal(script: str) -> str:
    """Run a script whose standard error is a terminal; what the terminal got."""
    terminal, end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, stdout=subprocess.PIPE, stderr=end, text=True
    )
    os.close(end)
    got: list[bytes] = []

    def read() -> None:
        try:
            while piece := os.read(terminal, 65_536):
                got.append(piece)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        process.communicate(timeout=SCRIPT_S)
    finally:
        process.kill()
        reader.join()
        os.close(terminal)
    return b"".join(got).decode().replace("\r\n", "\n")


@pytest.fixture(scope="module")
def drawings() -> dict[int, list[str]]:
    """Every drawing of the bar of one call, on a narrow terminal and on a wide one."""
    with SimulatedServer(latency_s=0.15) as server:
        seen = seen_on_a_terminal(
            f"""
            import pandas as pd, llmframe, sys, termios
            frame = pd.DataFrame({{"text": [f"row {{i}}" for i in range(60)]}})
            for columns in {WIDTHS}:
                termios.tcsetwinsize(sys.stderr, (24, columns))
                frame.llm.complete("{{text}}", model="m", base_url={server.base_url!r}, api_key="sk-test-not-a-secret",
                                   max_concurrency=6, prices={{"input": 0.15, "output": 0.6}})
            """
        )
    bars = seen.removesuffix("\n").split("\n")
    assert len(bars) == len(WIDTHS), seen
    return {
        columns: [drawn.rstrip() for drawn in bar.strip("\r").split("\r")]
        for columns, bar in zip(WIDTHS, bars, strict=True)
    }


def test_a_run_draws_one_bar_and_leaves_it_with_its_last_state(drawings: dict[int, list[str]]) -> None:
    assert "60/60, in 00:0" in drawings[80][-1]
    assert len(drawings[80]) > 2


@pytest.mark.parametrize("columns", WIDTHS)
def test_no_drawing_is_wider_than_the_terminal(drawings: dict[int, list[str]], columns: int) -> None:
    assert max(map(len, drawings[columns])) <= columns


def test_the_bar_says_how_far_how_fast_and_at_what_cost(drawings: dict[int, list[str]]) -> None:
    going = [drawn for drawn in drawings[120] if " left" in drawn]
    assert going
    for words in ("/60", "/s", " in flight", " tokens", "$0.0"):
        assert words in going[-1]


def test_the_rate_that_is_left_standing_is_that_of_the_whole_run(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    going = state(rows=100, rows_done=0, options=SimpleNamespace(output="response"))
    bar = progress.Bar(going, progress=True)
    for seconds in range(1, 101):  # the last ten rows, of a hundred seconds, in the last two
        clock[0], going.rows_done = float(seconds), seconds * 9 // 10 if seconds < 99 else 100
        bar.draw()
    going.ended = clock[0]
    bar.close()
    assert "100/100, in 00:12, 1/s" in capfd.readouterr().err.replace("1.0/s", "1/s")


def test_a_run_that_is_over_before_the_clock_moves_has_its_bar(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 1.0))
    going = state(rows=3, rows_done=0, options=SimpleNamespace(output="response"))
    bar = progress.Bar(going, progress=True)
    going.rows_done, going.ended = 3, 1.0
    bar.close()
    assert "3/3" in capfd.readouterr().err


def test_a_run_with_nothing_to_ask_draws_no_bar(
    server: SimulatedServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(server, frame(3), checkpoint=tmp_path / "runs")
    ask(server, frame(3), checkpoint=tmp_path / "runs", progress=True)
    assert capfd.readouterr().err == f"llmframe: 3 of 3 answers are in {tmp_path / 'runs'}; nothing to ask\n"


def test_no_bar_is_drawn_where_nobody_sees_it(server: SimulatedServer, capfd: pytest.CaptureFixture[str]) -> None:
    ask(server, frame(3))
    assert capfd.readouterr() == ("", "")


def test_progress_true_draws_the_bar_anywhere(server: SimulatedServer, capfd: pytest.CaptureFixture[str]) -> None:
    ask(server, frame(3), progress=True)
    assert "3/3, in 00:00" in capfd.readouterr().err


class Breaking(io.StringIO):
    """Standard error on a disk that fills up, or in a pipe that is closed, after so many writes."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._left = after

    def write(self, text: str) -> int:
        self._left -= 1
        if self._left < 0:
            raise OSError(28, "No space left on device")
        return super().write(text)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_bar_that_cannot_be_drawn_stops_no_run(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(progress, "DRAW_S", 0.0)
    monkeypatch.setattr(sys, "stderr", Breaking(after))
    server.reset(latency_s=0.3)
    out = ask(server, frame(6), progress=True, max_concurrency=2)
    assert out["response_status"].tolist() == ["ok"] * 6


def test_a_bar_that_cannot_be_drawn_leaves_its_lock_to_the_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Breaking(0))
    bar = progress.Bar(state(options=SimpleNamespace(output="response")), progress=True)
    bar.draw()
    other = threading.Thread(target=notices.say, args=("a word",), kwargs={"quiet": False}, daemon=True)
    other.start()
    other.join(5.0)
    assert not other.is_alive()


class OnlyWrites:
    """What some programs put in the place of standard error."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None: ...


def closed() -> io.StringIO:
    file = io.StringIO()
    file.close()
    return file


@pytest.mark.parametrize("stderr", [None, OnlyWrites(), closed()], ids=["none", "only writes", "closed"])
@pytest.mark.parametrize("wanted", [None, True])
def test_a_run_does_without_a_bar_where_standard_error_is_no_file(
    server: SimulatedServer, monkeypatch: pytest.MonkeyPatch, stderr: Any, wanted: bool | None
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr)
    out = ask(server, frame(2), progress=wanted)
    assert out["response_status"].tolist() == ["ok"] * 2
    assert "going on" not in repr(llmframe.last_run())


def drawn_in(columns: int, output: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(tqdm.std, "_screen_shape_wrapper", lambda: lambda _file: (columns, 24))
    going = state(rows=100, rows_done=0, options=SimpleNamespace(output=output))
    bar = progress.Bar(going, progress=True)
    going.rows_done, going.ended = 100, 1.0
    bar.close()
    return capfd.readouterr().err.strip().split("\r")[-1]


def test_a_name_in_a_wide_script_takes_no_more_of_the_line_than_there_is(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    drawn = drawn_in(60, "感情分析結果の列名前", monkeypatch, capfd)
    assert disp_len(drawn) <= 60
    assert drawn.startswith("感情分析結果の列名前|")
    assert "100/100, in 00:12" in drawn


@pytest.mark.parametrize("columns", [14, 20, 30])
def test_in_a_narrow_terminal_the_name_is_shortened_before_the_count_goes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], columns: int
) -> None:
    drawn = drawn_in(columns, "a_very_long_output_name_indeed", monkeypatch, capfd)
    assert "100/100" in drawn
    assert len(drawn) <= columns


# ---- the words of the bar


def state(**values: Any) -> State:
    """Give as much of a run's state as the words are made of."""
    usual = {
        "rows": 3_708,
        "rows_done": 1_234,
        "seconds": 12.0,
        "ended": None,
        "usage": Usage(1_000_000, 200_000),
        "cost_usd": 0.1234,
        "rows_a_request": 1.0,
        "pacer": SimpleNamespace(limited_by="requests/min", takes_s=lambda requests: requests / 1000),
        "sent": 1_300,
        "in_flight": 64,
        "failures": Counter({"timeout": 3, "server error": 20}),
    }
    return cast("State", SimpleNamespace(**{**usual, **values}))


def words(rate: float = 103.4, room: float = float("inf"), **values: Any) -> str:
    return progress.words(state(**values), rate=rate, room=room)


def test_the_words_say_all_where_there_is_room() -> None:
    assert words() == (
        "1,234/3,708, 00:23 left, 103/s, 64 in flight, 1.20M tokens, $0.1234, 20 x server error, 3 x timeout, "
        "limit: requests/min"
    )


def test_the_words_fit_in_the_room_there_is() -> None:
    assert [room for room in range(11, 140) if len(words(room=room)) > room] == []


def test_in_eighty_columns_what_limits_the_run_and_what_fails_come_before_the_tokens() -> None:
    said = words(room=80 - len("response|") - progress.BLOCKS - len("| "))
    assert said == "1,234/3,708, 00:23 left, 103/s, $0.1234, 20 x server error"


def test_a_run_that_stands_still_says_so_and_promises_no_end() -> None:
    assert words(rate=0.0, room=20) == "1,234/3,708, 0/s"


def test_a_run_that_has_ended_says_how_long_it_took_and_no_more_what_limits_it() -> None:
    assert words(ended=12.0, room=60) == "1,234/3,708, in 00:12, 103/s, $0.1234, 20 x server error"


def test_the_time_left_is_what_the_limit_allows_and_not_what_a_full_bucket_let_through() -> None:
    known = SimpleNamespace(limited_by="requests/min", takes_s=lambda requests: requests / 10)
    assert "04:07 left, 103/s" in words(pacer=known)
    assert "02:03 left, 103/s" in words(pacer=known, rows_a_request=2.0)


def test_a_slow_run_says_its_rate_with_two_digits() -> None:
    assert "0.25/s" in words(rate=0.251)


# ---- the lines before the bar


@pytest.fixture
def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which nothing was said yet."""
    monkeypatch.setattr(notices, "_said", set())


@pytest.mark.usefixtures("unsaid")
def test_a_long_run_without_a_checkpoint_says_once_what_one_would_save(
    server: SimulatedServer, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        ask(server, frame(201))
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert "checkpoint='runs/name'" in said[0]


@pytest.mark.usefixtures("unsaid")
def test_a_short_run_without_a_checkpoint_says_nothing(
    server: SimulatedServer, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(server, frame(200))
    assert capfd.readouterr().err == ""


def test_a_resumed_run_says_what_it_found_before_it_asks(
    server: SimulatedServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(server, frame(12), checkpoint=tmp_path / "runs")
    ask(server, frame(40), checkpoint=tmp_path / "runs")
    assert capfd.readouterr().err == f"llmframe: 12 of 40 answers are in {tmp_path / 'runs'}; asking 28\n"


def test_a_checkpoint_that_holds_the_answers_of_other_rows_is_no_cause_for_a_warning(
    server: SimulatedServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(server, frame(10).head(4), checkpoint=tmp_path / "runs")
    ask(server, frame(10).tail(6), checkpoint=tmp_path / "runs")
    said = f"llmframe: none of the 4 answers in {tmp_path / 'runs'} is for these rows; asking 6\n"
    assert capfd.readouterr().err == said


def test_a_first_run_has_nothing_to_say_of_its_checkpoint(
    server: SimulatedServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(server, frame(3), checkpoint=tmp_path / "runs")
    assert capfd.readouterr().err == ""


def test_progress_false_silences_the_lines_too(
    server: SimulatedServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        ask(server, frame(3), checkpoint=tmp_path / "runs", progress=False)
    assert capfd.readouterr() == ("", "")


def test_every_line_goes_to_the_log_whoever_watches(
    server: SimulatedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="llmframe")
    for _ in range(2):
        ask(server, frame(3), checkpoint=tmp_path / "runs", progress=False)
    assert caplog.messages == [f"3 of 3 answers are in {tmp_path / 'runs'}; nothing to ask"]


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "the prompt": ({"prompt": "Please: {text}"}, "the prompt has changed since"),
    "a parameter": ({"temperature": 0.5}, "temperature was not set, now 0.5"),
}


@pytest.mark.parametrize(("change", "why"), CHANGES.values(), ids=CHANGES.keys())
def test_a_checkpoint_none_of_whose_answers_fit_is_warned_of_with_what_differs(
    server: SimulatedServer, tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    ask(server, frame(3), checkpoint=tmp_path / "runs")
    with pytest.warns(LLMFrameWarning) as warned:
        ask(server, frame(3), checkpoint=tmp_path / "runs", **change)
    (warning,) = warned
    assert str(warning.message) == f"llmframe: 0 of 3 answers in {tmp_path / 'runs'} fit: {why}; asking 3"


def test_a_warning_points_at_the_line_that_called(server: SimulatedServer, tmp_path: Path) -> None:
    ask(server, frame(3), checkpoint=tmp_path / "runs")
    with pytest.warns(LLMFrameWarning) as warned:
        ask(server, frame(3), "Please: {text}", checkpoint=tmp_path / "runs")
    assert warned[0].filename == __file__


def test_a_warning_is_not_printed_a_second_time_by_the_log(
    server: SimulatedServer, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a process that has set up no logging
    ask(server, frame(3), checkpoint=tmp_path / "runs")
    with pytest.warns(LLMFrameWarning):
        ask(server, frame(3), "Please: {text}", checkpoint=tmp_path / "runs")
    assert capfd.readouterr().err == ""
