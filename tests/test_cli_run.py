"""Jobs from the shell: exit statuses, what is printed where, and how a scheduler stops one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

import pandas as pd
import pytest

from llmframe.cli import main
from llmframe.cli_call import terminations_interrupt
from tests.server import SimulatedServer


@pytest.fixture
def here(tmp_path: Path, server: SimulatedServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with ten rows in it, and an endpoint that answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
    monkeypatch.setenv("LLMFRAME_MODEL", "m")
    pd.DataFrame({"text": [f"row {n}" for n in range(10)], "score": range(10)}).to_parquet("in.parquet")
    return tmp_path


def run(*arguments: str) -> int:
    return main(["run", "in.parquet", "out.parquet", *arguments])


def test_a_job_whose_rows_are_all_answered_is_status_0(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("{text}") == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("10 ok; 10 requests in ")
    assert printed.out.rstrip().endswith("written to out.parquet")
    assert "10/10" in printed.err  # a plain line, since nobody watches
    assert "\r" not in printed.err
    assert pd.read_parquet("out.parquet")["response"].tolist() == [f"echo: row {n}" for n in range(10)]


def test_json_is_one_line_of_figures(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("text", "--json", "--quiet") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    (line,) = printed.out.splitlines()
    said = json.loads(line)
    assert said["counts"] == {"ok": 10}
    assert said["requests"] == 10
    assert said["checkpoint"] == "out.parquet.checkpoint"


def test_a_base_url_given_twice_names_two_servers(here: Path, server: SimulatedServer) -> None:
    nobody = "http://127.0.0.1:9/v1"
    assert run("text", "--quiet", "--base-url", server.base_url, "--base-url", nobody) == 0
    assert server.stats().answered == 10


def test_rows_that_failed_are_status_3_and_it_says_where(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pd.DataFrame({"text": ["fine", "no model reads this. [[status=400]]"]}).to_parquet("in.parquet")
    assert run("text", "--quiet") == 3
    assert "1 failed of 2 rows; see response_status and response_error in out.parquet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give the prompt as an argument or with --prompt-file"),
        (("{txt}",), "did you mean 'text'"),
        (("text", "--prompt-file", "ask.txt"), "one of the two"),
        (("--prompt-file", "ask.txt"), "ask.txt cannot be read"),
        (("text", "--schema", "no.json"), "no.json cannot be read as JSON"),
        (("text", "--schema", "nothing:Model"), "nothing:Model cannot be imported"),
        (("text", "--schema", "alone"), "is no file.json, module:Model or list of labels"),
        (("text", "--where", "score"), "is no condition"),
        (("text", "--param", "stream=true"), "stream= has no meaning here"),
        (("text", "--max-cost", "1"), "max_cost= needs a price"),
        (("text", "--max-cost", "0"), "max_cost=0.0 "),
        (("text", "--rpm", "0"), "rpm=0.0 "),
        (("text", "--timeout", "0"), "timeout=0.0 "),
    ],
)
def test_wrong_use_is_status_2_and_one_line(
    here: Path, server: SimulatedServer, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("llmframe: ")
    assert said in err
    assert err.count("\n") == 1
    assert server.stats().received == 0


@pytest.mark.parametrize("arguments", [["--param", "temperature"], ["--limit", "0"], ["--na", "drop"], ["--nonsense"]])
def test_a_flag_that_cannot_be_is_wrong_use(here: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("text", *arguments)
    assert caught.value.code == 2


def test_flags_are_the_keywords_of_complete(here: Path) -> None:
    Path("ask.txt").write_text("Is it good? {text} [[label=yes]]")
    flags = [
        "--prompt-file",
        "ask.txt",
        "--schema",
        "yes,no",
        "--output",
        "good",
        "--details",
        "--param",
        "temperature=0",
    ]
    assert run(*flags, "--where", "score >= 4", "--where", "score < 8", "--limit", "3", "--max-concurrency", "2") == 0
    out = pd.read_parquet("out.parquet")
    assert out["good"].tolist() == ["yes"] * 3
    assert out["score"].tolist() == [4, 5, 6]
    assert "good_latency_s" in out


def test_a_model_beside_the_job_is_a_schema(here: Path) -> None:
    Path("shapes_of_a_job.py").write_text("from pydantic import BaseModel\nclass Out(BaseModel):\n    name: str\n")
    assert run("text", "--schema", "shapes_of_a_job:Out", "--limit", "2", "--quiet") == 0
    assert pd.read_parquet("out.parquet")["response_name"].notna().all()


def test_a_dry_run_sends_and_writes_nothing(
    here: Path, server: SimulatedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("text", "--dry-run") == 0
    assert "to ask" in capsys.readouterr().out
    assert run("text", "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 10
    assert server.stats().received == 0
    assert {path.name for path in here.iterdir()} == {"in.parquet"}


def test_a_stop_is_status_4_and_the_same_command_goes_on(
    here: Path, server: SimulatedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.configure(status_all=401)
    assert run("text", "--json", "--quiet") == 4
    printed = capsys.readouterr()
    assert "the same job goes on from out.parquet.checkpoint" in printed.err
    assert json.loads(printed.out)["stopped"]
    server.reset()
    assert run("text") == 0


@pytest.mark.parametrize("interrupts", [signal.SIG_DFL, signal.SIG_IGN], ids=["in front", "in the background"])
def test_sigterm_is_a_clean_stop_within_5_s(here: Path, server: SimulatedServer, interrupts: signal.Handlers) -> None:
    server.configure(latency_s=0.5, slots=2)
    command = [sys.executable, "-m", "llmframe.cli", "run", "in.parquet", "out.parquet", "text", "--json"]
    before = signal.signal(signal.SIGINT, interrupts)  # a child inherits what is ignored, as a shell's background job
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    signal.signal(signal.SIGINT, before)
    server.wait_for(answered=4)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert time.monotonic() - began < 5
    assert process.returncode == 4, err
    assert "Traceback" not in err
    answered = json.loads(out)["usage"]["completion_tokens"]
    assert answered > 0
    assert not Path("out.parquet").exists()
    server.configure()
    assert run("text", "--quiet") == 0
    assert server.stats().answered <= 10 + 2, "more than was in the server's two slots was asked anew"


@pytest.mark.skipif(sys.platform == "win32", reason="no terminals of this kind there")
def test_the_end_of_its_terminal_is_a_clean_stop(here: Path, server: SimulatedServer) -> None:
    import fcntl
    import pty
    import termios

    server.configure(latency_s=0.5, slots=2)
    command = [sys.executable, "-m", "llmframe", "run", "in.parquet", "out.parquet", "text"]
    ours, theirs = pty.openpty()

    def take_the_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=take_the_terminal
    )
    os.close(theirs)
    server.wait_for(answered=4)
    os.close(ours)
    assert process.wait(timeout=30) == 4
    server.configure()
    assert run("text", "--quiet") == 0
    assert server.stats().answered <= 10 + 2, "more than was in the server's two slots was asked anew"


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGHUP there")
def test_a_job_under_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminations_interrupt():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_sigterm_before_anything_is_asked_is_a_clean_stop_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(_arguments: object) -> str:
        signal.raise_signal(signal.SIGTERM)
        return "text"

    monkeypatch.setattr("llmframe.cli_run.prompt_of", terminated)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert run("text", "--quiet") == 4
    finally:
        signal.signal(signal.SIGTERM, before)


def unread_pipe() -> IO[str]:
    """Open a pipe that nobody reads any more."""
    read, write = os.pipe()
    os.close(read)
    return open(write, "w", buffering=1)


@pytest.mark.parametrize("flags", [(), ("--json",)])
@pytest.mark.parametrize("kind", ["closed", "full", "unread"])
def test_a_job_that_is_done_is_done_where_its_output_goes_nowhere(
    here: Path, monkeypatch: pytest.MonkeyPatch, kind: str, flags: tuple[str, ...]
) -> None:
    if kind == "full" and not Path("/dev/full").exists():
        pytest.skip("no full device here")
    opened = {"closed": lambda: None, "full": lambda: os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")}
    out = opened.get(kind, unread_pipe)()
    monkeypatch.setattr(sys, "stdout", out)
    assert run("text", "--quiet", *flags) == 0
    if out is not None:
        out.close()


def test_a_job_that_is_done_says_so_in_ascii_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("said.txt", "w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["run", "in.parquet", "größe.parquet", "text", "--quiet"]) == 0
    assert Path("said.txt").read_text().rstrip().endswith(r"written to gr\xf6\xdfe.parquet")


@pytest.mark.parametrize("kind", ["closed", "unread"])
def test_a_job_goes_on_where_standard_error_goes_nowhere(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    run("text", "--quiet", "--limit", "3")  # so that there is something to say before it asks
    pd.DataFrame({"text": ["fine", "no model reads this. [[status=400]]"]}).to_parquet("in.parquet")
    capsys.readouterr()
    err = unread_pipe() if kind == "unread" else None
    monkeypatch.setattr(sys, "stderr", err)
    assert run("text", "--json") == 3
    assert json.loads(capsys.readouterr().out)["counts"] == {"ok": 1, "failed": 1}
    if err is not None:
        with suppress(BrokenPipeError):
            err.close()


def test_inspect_shows_what_a_checkpoint_holds(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pd.DataFrame({"text": ["fine", "bad [[status=400]]", "worse [[status=413]]"]}).to_parquet("in.parquet")
    run("Say: {text}", "--quiet", "--param", "temperature=0")
    capsys.readouterr()
    assert main(["inspect", "out.parquet.checkpoint"]) == 0
    out = capsys.readouterr().out
    assert "3 requests: " in out
    assert "2 failed" in out
    assert "Say: {text}" in out
    assert '"temperature": 0' in out or '"temperature":0' in out
    assert "1 x " in out
    assert main(["inspect", "nowhere"]) == 2
    assert main(["inspect", ""]) == 2


def test_export_writes_a_checkpoint_as_parquet(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("text", "--quiet")
    assert main(["export", "out.parquet.checkpoint", "answers.parquet"]) == 0
    assert sorted(pd.read_parquet("answers.parquet")["text"]) == [f"echo: row {n}" for n in range(10)]
    assert main(["export", "out.parquet.checkpoint", "nowhere/answers.parquet"]) == 2
    assert "nowhere/answers.parquet cannot be written" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="the length of files cannot be limited there")
@pytest.mark.parametrize("verb", ["export", "run"])
def test_a_disk_that_is_full_leaves_what_was_there(
    here: Path, server: SimulatedServer, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    run("text", "--quiet", "--checkpoint", "kept")
    before = Path("out.parquet").read_bytes()
    capsys.readouterr()
    command = ["export", "kept", "out.parquet"] if verb == "export" else []
    command = command or ["run", "in.parquet", "out.parquet", "text", "--checkpoint", "kept", "--json", "--quiet"]
    # A file may not be longer than this, which leaves room for the locks and the probe of the checkpoint.
    script = (
        "import resource, signal, sys; from llmframe.cli import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); "
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, check=False)
    assert done.returncode == (2 if verb == "export" else 4), done.stderr
    assert "out.parquet cannot be written: [Errno 27] File too large" in done.stderr
    assert "Traceback" not in done.stderr
    if verb == "run":
        assert "the same job goes on from kept" in done.stderr
        assert "cannot be written" in json.loads(done.stdout)["stopped"]
    assert Path("out.parquet").read_bytes() == before
    assert {path.name for path in here.iterdir()} == {"in.parquet", "out.parquet", "kept"}


def test_export_does_not_write_into_the_checkpoint(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("text", "--quiet", "--checkpoint", "kept")
    (part,) = Path("kept").glob("*.parquet")
    before = part.read_bytes()
    for out in (os.fspath(part), f"./kept/../kept/{part.name}", "kept/other.parquet"):
        assert main(["export", "kept", out]) == 2
        assert "is in the checkpoint" in capsys.readouterr().err
    assert part.read_bytes() == before
    assert list(Path("kept").glob("*.parquet")) == [part]


@pytest.mark.parametrize("flags", [["--checkpoint", "in.parquet"], ["--checkpoint", "in.parquet/in"]])
def test_a_checkpoint_that_cannot_be_opened_is_wrong_use_and_not_asked_for_again(
    here: Path, server: SimulatedServer, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert run("text", "--quiet", *flags) == 2
    err = capsys.readouterr().err
    assert "is not a directory" in err
    assert "goes on" not in err
    assert server.stats().received == 0
    assert {path.name for path in here.iterdir()} == {"in.parquet"}


def test_a_sink_that_cannot_be_written_is_known_before_anything_is_paid(
    here: Path, server: SimulatedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("dir.parquet").mkdir()
    Path("many").mkdir()
    pd.read_parquet("in.parquet").to_parquet("many/in.parquet")
    for source, sink, said in (
        ("in.parquet", "dir.parquet", "is a directory"),
        ("many", "in.parquet/out", "cannot be written"),
    ):
        assert main(["run", source, sink, "text", "--quiet", "--checkpoint", "kept"]) == 2
        assert said in capsys.readouterr().err
    assert server.stats().received == 0
