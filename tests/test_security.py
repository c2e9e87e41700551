"""No key leaves by any door but the request's header, and nothing that comes from outside is run."""

from __future__ import annotations

import io
import logging
import pickle
import shutil
import signal
import sys
import threading
import traceback
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import openai
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import llmframe
from llmframe import patience
from llmframe.call import plan_call, warn_of_open_line
from llmframe.checkpoint import Checkpoint
from llmframe.cli import main
from llmframe.errors import Interrupted, LLMFrameError, LLMFrameWarning, TemplateError
from llmframe.options import gather
from llmframe.origins import Origin
from llmframe.parts import COLUMNS
from llmframe.prompts import Prompts
from llmframe.requests import packed
from llmframe.results import Completion
from tests.encoding import encode
from tests.keys import keys_under
from tests.server import SimulatedServer

KEY = "sk-proj-DISTINCTIVE0123456789abcdefghijklmnop"


def ways(server: SimulatedServer) -> dict[str, dict[str, Any]]:
    """Give the ways in which a key comes in."""
    url = server.base_url
    return {
        "api_key": {"base_url": url, "api_key": KEY},
        "client": {"client": openai.AsyncOpenAI(base_url=url, api_key=KEY)},
        "sync client": {"client": openai.OpenAI(base_url=url, api_key=KEY, default_query={"a": "b"})},
        "header": {"base_url": url, "api_key": "sk-other", "extra_headers": {"Authorization": f"Bearer {KEY}"}},
    }


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error))


def looked_at(run: llmframe.Run) -> list[str]:
    frame = run.frame
    frames = [frame, run.timeline, run.errors]
    return [repr(run), *(each.to_csv() + each.to_html() + repr(each) for each in frames), repr(frame.attrs)]


def pictured(run: llmframe.Run, path: Path) -> list[str]:
    """Give a run's pages and picture."""
    review = run.frame.llm.review("response", prompt="{text}")
    picture = io.StringIO()
    run.to_html(path)
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # words as words, not as shapes
        run.plot()[0].figure.savefig(picture, format="svg")
    return [repr(review), review._repr_html_(), path.read_text(encoding="utf-8"), picture.getvalue()]


@pytest.mark.parametrize("way", ["api_key", "client", "sync client", "header"])
def test_the_key_is_in_nothing_that_a_run_writes_shows_or_raises(
    server: SimulatedServer,
    way: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(patience, "FIRST_PATIENCE_S", 1.0)
    given = ways(server)[way]
    told: list[str] = []
    rows = pd.DataFrame({"text": ["a", "[[echo_headers]][[status=400]]", "[[status=400]]", "[[content=null]]"]})

    def call(**more: Any) -> None:
        keywords = {"model": "m", "progress": True, "details": True, "checkpoint": tmp_path / "run"} | given | more
        try:
            told.extend(looked_at_frame(rows.llm.complete("{text}", **keywords)))
        except (LLMFrameError, KeyboardInterrupt) as error:
            told.append(shown(error))
        told.extend(looked_at(llmframe.last_run()))

    call()
    told += pictured(llmframe.last_run(), tmp_path / "run.html")
    server.reset(valid_models=["another"])
    call(model=KEY, checkpoint=None)  # the server quotes the model's name, which is as good as the key
    server.reset(require_key="another")
    call(refresh=True)
    server.reset(p_reset=1.0)
    call(refresh=True, max_attempts=1)
    options = gather({"model": "m", **given})
    told += [repr(options), repr(plan_call(Prompts(rows, "text"), options)), repr(given.get("client"))]
    told.append(repr(rows.llm.estimate("{text}", model="m", **given)))
    told += [repr(llmframe.read_checkpoint(tmp_path / "run").to_dict())]
    told += [file.read_bytes().decode("latin-1") for file in (tmp_path / "run").iterdir()]
    told += [file.name for file in tmp_path.rglob("*")]
    told += [*capfd.readouterr(), caplog.text, *(repr(vars(record)) for record in caplog.records)]
    for number, text in enumerate(told):
        assert KEY not in text, (number, text[max(0, text.index(KEY) - 300) : text.index(KEY) + 60])
    assert any("***" in text for text in told), "the server quoted the key, and it was taken out"


def looked_at_frame(frame: pd.DataFrame) -> list[str]:
    return [frame.to_csv(), frame.to_html()]


@pytest.mark.parametrize("wrong", [False, True], ids=["taken", "refused"])
def test_the_key_is_in_nothing_that_the_shell_prints_or_writes(
    server: SimulatedServer,
    wrong: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    if wrong:
        server.change(require_key="another")
    pd.DataFrame({"text": ["a", "[[echo_headers]][[status=400]]", "[[status=400]]"]}).to_parquet("in.parquet")
    job = ["run", "in.parquet", "out.parquet", "{text}", "--model", "m"]
    statuses = [main([*job, *more]) for more in (["--dry-run"], ["--json"], [])]
    assert statuses[1:] == ([4, 4] if wrong else [3, 3])
    for command in (["inspect", "out.parquet.checkpoint"], ["export", "out.parquet.checkpoint", "all.csv"]):
        main(command)
    printed = "".join(capfd.readouterr())
    assert "out.parquet" in printed
    assert KEY not in printed
    assert list(keys_under(tmp_path)) == []


def test_the_suite_sees_a_key_that_is_left_in_a_file(tmp_path: Path) -> None:
    places = [tmp_path / "plain", tmp_path / "held", tmp_path / "none"]
    for place in places:
        place.mkdir()
    (places[0] / "log.txt").write_text(f"Bearer {KEY}")
    pd.DataFrame({"text": [KEY] * 100 + ["x" * n for n in range(100)]}).to_parquet(
        places[1] / "x.parquet", compression="zstd"
    )
    (places[2] / "a").write_text("task-force; disk-space; sk-***; risk-free")
    try:
        assert [{key for _, key in keys_under(place)} for place in places] == [{KEY}, {KEY}, set()]
    finally:
        for place in places:  # or the check would object to this very test
            shutil.rmtree(place)


@pytest.mark.skipif(sys.platform == "win32", reason="a signal cannot be sent to a thread there")
def test_the_key_is_not_in_what_an_interrupt_shows(
    server: SimulatedServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    server.configure(latency_s=5.0)
    rows = pd.DataFrame({"text": ["a", "b"]})

    def interrupt() -> None:
        server.wait_for(received=2)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted) as caught:
        rows.llm.complete("{text}", model="m", base_url=server.base_url, api_key=KEY, checkpoint=tmp_path)
    thread.join()
    assert KEY not in shown(caught.value)
    assert KEY not in "".join(capfd.readouterr())


# ---- text from rows and models is data


@pytest.mark.parametrize("field", ["text.__class__", "text[0]", "text!r", "0.__class__", "__class__", "text.{text}"])
def test_a_template_reaches_no_attribute_and_no_index(field: str) -> None:
    with pytest.raises(TemplateError):
        pd.DataFrame({"text": ["a"]}).llm.messages(f"{{{field}}}")


def test_a_text_that_looks_like_a_template_is_sent_as_it_is() -> None:
    text = "{text} {0.__class__} {{x}} %s $HOME {{ 7 * 7 }}"
    made = pd.DataFrame({"text": [text]}).llm.messages("<{text}>").iloc[0]
    assert made == [{"role": "user", "content": f"<{text}>"}]


# ---- a checkpoint from a stranger


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


ORIGIN = Origin("https://x/v1", "chat", "m", "{text}", "{}")


def read_every_way(directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LLMFrameWarning)  # of the part that is skipped
        llmframe.read_checkpoint(directory)
        checkpoint = Checkpoint.open(directory, ORIGIN)
        list(checkpoint.find(packed([b"k" * 32])))
        checkpoint.differs()
        checkpoint.close()


def test_a_strangers_checkpoint_runs_no_code(tmp_path: Path) -> None:
    bomb, directory = tmp_path / "went off", tmp_path / "run"
    directory.mkdir()
    pickled = pickle.dumps(Bomb(bomb))
    row = encode([(b"k" * 32, Completion(text="a", status="ok"), 1)], ORIGIN)
    table = pq.read_table(pa.BufferReader(row))
    footer = pq.read_metadata(pa.BufferReader(row)).metadata
    for name in ("arrow.py_extension_type", "pandas.object", "arrow.opaque"):
        fields = [
            field.with_metadata({b"ARROW:extension:name": name.encode(), b"ARROW:extension:metadata": pickled})
            for field in COLUMNS
        ]
        told = {**footer, b"pandas": pickled, b"PANDAS_ATTRS": pickled, b"llmframe.pickle": pickled}
        poisoned = pa.Table.from_arrays(table.columns, schema=pa.schema(fields, metadata=told))
        pq.write_table(poisoned, directory / f"part-0{len(name)}-000001.parquet", store_schema=True)
    for number, origins in enumerate((pickled, b"__import__('os').system('x')")):
        told = {**footer, b"llmframe.origins": origins}
        plain = pa.Table.from_arrays(table.columns, schema=COLUMNS.with_metadata(told))
        pq.write_table(plain, directory / f"part-0a{number}-000001.parquet")
    (directory / "part-0b-000001.parquet").write_bytes(pickled)
    read_every_way(directory)
    assert not bomb.exists()
    pickle.load(io.BytesIO(pickled))  # it would have been seen
    assert bomb.exists()


def test_a_link_out_of_the_directory_changes_nothing_outside_of_it(tmp_path: Path) -> None:
    outside, directory = tmp_path / "outside.parquet", tmp_path / "run"
    directory.mkdir()
    outside.write_bytes(encode([(b"k" * 32, Completion(text="a", status="ok"), 1)], ORIGIN))
    before = outside.read_bytes()
    for number in range(8):  # enough of them to be merged away
        (directory / f"part-0{number}-000001.parquet").symlink_to(outside)
    (directory / ".housekeeping.lock").touch()
    read_every_way(directory)
    assert outside.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"outside.parquet", "run"}


# ---- an open line


def told_of(base_url: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_open_line(base_url)
    return [str(each.message) for each in caught]


def test_a_key_over_plain_http_to_another_host_is_warned_of_once() -> None:
    said = told_of("http://api.somewhere.example/v1/chat/completions")
    assert len(said) == 1
    assert "http://api.somewhere.example" in said[0]
    assert "https://" in said[0]
    assert told_of("http://api.somewhere.example/v1/chat/completions") == []


@pytest.mark.parametrize(
    "base_url",
    [
        "https://api.openai.com/v1",
        "http://localhost:8000/v1",
        "http://127.0.0.1/v1",
        "http://[::1]:1/v1",
        "http://192.168.1.7:8000/v1",
        "http://10.1.2.3/v1",
        "http://vllm:8000/v1",
        "http://box.local/v1",
    ],
)
def test_a_key_over_tls_or_within_the_house_is_not_warned_of(base_url: str) -> None:
    assert told_of(base_url) == []
