"""A real Jupyter kernel: calls in cells, interrupts in the middle of them, and the cells that come after.

Nothing here waits for a time to pass: what the simulated server has seen says when to interrupt.
"""

from __future__ import annotations

import json
import queue
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

from tests import turns
from tests.keys import keys_in
from tests.server import SimulatedServer
from tests.server_batch import BatchServer
from tests.turns import STOPPED_S

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(jupyter_client|zmq|tornado).*")

CELL_S = 60.0  # for a cell on a machine that is busy with other tests
ROOT = Path(__file__).resolve().parent.parent


@dataclass(slots=True)
class Cell:
    """What a cell gave."""

    stdout: str = ""
    stderr: str = ""
    error: str | None = None
    message: str = ""
    displayed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def value(self) -> Any:
        """The JSON of the last line printed."""
        assert self.error is None, f"{self.error}: {self.message}"
        return json.loads(self.stdout.splitlines()[-1])


class Kernel:
    """A kernel under this interpreter, in the project's directory."""

    def __init__(self, spec_directory: Path) -> None:
        spec = spec_directory / "under-test"
        spec.mkdir()
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "test", "language": "python"}))
        specs = KernelSpecManager(kernel_dirs=[str(spec_directory)], ensure_native_kernel=False)
        self._manager = KernelManager(kernel_name="under-test", kernel_spec_manager=specs)
        self._manager.start_kernel(cwd=str(ROOT))
        self._client = self._manager.blocking_client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=CELL_S)

    def start(self, code: str) -> str:
        """Begin a cell; its id."""
        return str(self._client.execute(code))

    def finish(self, cell: str) -> Cell:
        """Wait for a cell's end."""
        seen = Cell()
        until = time.monotonic() + CELL_S
        while True:
            try:
                message = self._client.get_iopub_msg(timeout=until - time.monotonic())
            except queue.Empty:
                raise AssertionError(f"the kernel does not answer; so far {seen}") from None
            if message["parent_header"].get("msg_id") != cell:
                continue
            content = message["content"]
            if message["msg_type"] != "execute_input":  # what a notebook keeps
                assert not keys_in(json.dumps(content, default=str))
            match message["msg_type"]:
                case "stream" if content["name"] == "stdout":
                    seen.stdout += content["text"]
                case "stream":
                    seen.stderr += content["text"]
                case "display_data" | "execute_result":
                    seen.displayed.append(content["data"])
                case "error":
                    seen.error, seen.message = content["ename"], content["evalue"]
                case "status" if content["execution_state"] == "idle":
                    return seen

    def run(self, code: str) -> Cell:
        """Run a cell to its end."""
        return self.finish(self.start(code))

    def completions(self, code: str) -> list[str]:
        """Press Tab at the end of some code."""
        reply = self._client.complete(code, reply=True, timeout=CELL_S)
        return list(reply["content"]["matches"])

    def reference(self, code: str) -> str:
        """Ask what a name is, as with ``?``."""
        reply = self._client.inspect(code, reply=True, timeout=CELL_S)
        return str(reply["content"]["data"]["text/plain"])

    def interrupt(self) -> None:
        """Press the stop button."""
        self._manager.interrupt_kernel()

    def stop(self) -> None:
        """End the kernel at once."""
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)


PREPARE = """
import itertools, json, sys
sys.modules["ipywidgets"] = None  # as where it is not installed: the bar is text
import pandas as pd
import llmframe
keys = itertools.count(10_000)  # another key is another line, which no test before has taught anything
def show(value):
    print(json.dumps(value))
"""


SHOW_A_TRACEBACK = "1 / 0"  # the first one takes IPython most of a second, which is not ours to be measured


@pytest.fixture(scope="module")
def shared_kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path_factory.mktemp("kernels"))
    kernel.run(PREPARE)
    kernel.run(SHOW_A_TRACEBACK)
    yield kernel
    kernel.stop()


@pytest.fixture(scope="module")
def shared_kernel_with_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel of its own: once nest_asyncio has patched a process, it stays so."""
    kernel = Kernel(tmp_path_factory.mktemp("kernels"))
    kernel.run(PREPARE + "import httpx2, openai\n")
    kernel.run(SHOW_A_TRACEBACK)
    yield kernel
    kernel.stop()


@pytest.fixture
def kernel(shared_kernel: Kernel, server: SimulatedServer) -> Kernel:
    """A kernel that sends to the simulated server, and a frame whose 13th to 16th row hang the first time.

    With four in flight, that is where a run stands still.
    """
    return _prepared(shared_kernel, server, client="")


@pytest.fixture
def kernel_with_client(shared_kernel_with_client: Kernel, server: SimulatedServer) -> Kernel:
    """The same with a client of the user's own, that was used in the kernel's loop before."""
    kernel = _prepared(shared_kernel_with_client, server, client="client=client, ")
    cell = kernel.run(
        f"""
own = httpx2.AsyncClient()
client = openai.AsyncOpenAI(base_url={server.base_url!r}, api_key="sk-test-not-a-secret", http_client=own)
question = [{{"role": "user", "content": "used before"}}]
show((await client.chat.completions.create(model="m", messages=question)).choices[0].message.content)
"""
    )
    assert cell.value == "echo: used before"
    server.reset()
    return kernel


ANSWERED, IN_FLIGHT, ROWS = 12, 4, 40


def _prepared(kernel: Kernel, server: SimulatedServer, client: str) -> Kernel:
    kernel.run(
        f"""
hanging = range({ANSWERED}, {ANSWERED + IN_FLIGHT})
df = pd.DataFrame({{"text": [f"row {{i}} [[hang_first=1]]" if i in hanging else f"row {{i}}" for i in range({ROWS})]}})
keywords = dict(model="m", max_concurrency={IN_FLIGHT}, max_attempts=1)
{"" if client else f"keywords.update(base_url={server.base_url!r}, api_key=f'sk-test-{{next(keys)}}')"}
"""
    )
    return kernel


def _cell(call: str, checkpoint: Path) -> str:
    """Write the cell: the same whenever it is run."""
    client = "client=client, " if "client" in call else ""
    call = call.removesuffix(" with client")
    return f"""
out = {call}("{{text}}", {client}checkpoint={str(checkpoint)!r}, **keywords)
show(out["response_status"].value_counts()["ok"].item())
"""


def _interrupt_in_the_middle(kernel: Kernel, server: SimulatedServer, cell: str, times: int = 1) -> Cell:
    running = kernel.start(cell)
    server.wait_for(answered=ANSWERED, in_flight=IN_FLIGHT)
    began = time.monotonic()
    for _ in range(times):
        kernel.interrupt()
    stopped = kernel.finish(running)
    assert time.monotonic() - began < STOPPED_S
    return stopped


SYNC, ASYNC = "df.llm.complete", "await df.llm.acomplete"
CALLS = pytest.mark.parametrize("call", [SYNC, ASYNC], ids=["complete", "acomplete"])
CALLS_WITH_CLIENT = pytest.mark.parametrize(
    "call", [f"{SYNC} with client", f"{ASYNC} with client"], ids=["complete", "acomplete"]
)


@CALLS
def test_a_call_in_a_cell_gives_its_frame(kernel: Kernel, server: SimulatedServer, call: str) -> None:
    cell = kernel.run(f"""
out = {call}("{{text}}", **keywords, where=[i < {ANSWERED} for i in range(len(df))])
show(out["response"].dropna().tolist())
""")
    assert cell.value == [f"echo: row {i}" for i in range(ANSWERED)]


def _check_an_interrupted_cell_goes_on(kernel: Kernel, server: SimulatedServer, call: str, checkpoint: Path) -> None:
    cell = _cell(call, checkpoint)
    stopped = _interrupt_in_the_middle(kernel, server, cell)
    assert stopped.error == ("Interrupted" if SYNC in call else "CancelledError")
    before = server.answered_by_content()

    assert kernel.run("show(1 + 1)").value == 2
    again = kernel.run(cell)

    assert again.value == ROWS
    assert f"{ANSWERED} of {ROWS} answers are in {checkpoint}; asking {ROWS - ANSWERED}" in again.stderr
    answered = server.answered_by_content()
    assert len(before) == ANSWERED
    assert before.items() <= answered.items()
    assert set(answered.values()) == {1}
    assert len(answered) == ROWS


@CALLS
def test_an_interrupted_cell_ends_and_asks_only_what_is_missing_when_run_again(
    kernel: Kernel, server: SimulatedServer, tmp_path: Path, call: str
) -> None:
    _check_an_interrupted_cell_goes_on(kernel, server, call, tmp_path / "runs")


@CALLS
def test_a_cell_interrupted_twice_in_a_row_ends_and_the_next_call_works(
    kernel: Kernel, server: SimulatedServer, tmp_path: Path, call: str
) -> None:
    cell = _cell(call, tmp_path / "runs")
    stopped = _interrupt_in_the_middle(kernel, server, cell, times=2)
    assert stopped.error in ("Interrupted", "CancelledError")

    assert kernel.run(cell).value == ROWS
    assert set(server.answered_by_content().values()) == {1}


@CALLS
@pytest.mark.parametrize("how", turns.TURNS)
def test_an_interrupted_cell_whose_endpoint_has_turned_ends_in_time_with_all_that_was_answered(
    kernel: Kernel, server: SimulatedServer, tmp_path: Path, call: str, how: str
) -> None:
    turns.slow(server)
    kernel.run(f"""{turns.WATCH}
keywords |= {{"checkpoint": {str(tmp_path / "runs")!r}, "max_attempts": 8}}
rows = pd.DataFrame({{"text": [f"row {{i}}" for i in range({turns.ROWS})]}})
""")
    cell = f"watch({str(tmp_path / 'flag')!r})\nout = {call}('{{text}}', **keywords)".replace("df.llm", "rows.llm")
    running = kernel.start(cell)
    answered = turns.turn(server, how, tmp_path / "flag")
    began = time.monotonic()
    kernel.interrupt()
    stopped = kernel.finish(running)
    assert time.monotonic() - began < STOPPED_S
    assert stopped.error in ("Interrupted", "CancelledError")

    done, saved, left = kernel.run("""
done = (llmframe.last_run().frame["response_status"] == "ok").sum().item()
saved = (llmframe.read_checkpoint(keywords["checkpoint"])["status"] == "ok").sum().item()
show([done, saved, left_behind()])
""").value
    assert left == []
    assert done == saved
    assert answered in (done, -1)
    turns.mend(server)
    kernel.run("keywords['api_key'] = f'sk-test-{next(keys)}'")  # the line of the other would wait out the minute
    assert kernel.run(f"{cell}\nshow(len(out))").value == turns.ROWS
    assert server.stats().answered == turns.ROWS - done


@CALLS
def test_an_interrupt_in_a_cell_says_how_to_go_on(
    kernel: Kernel, server: SimulatedServer, tmp_path: Path, call: str
) -> None:
    stopped = _interrupt_in_the_middle(kernel, server, _cell(call, tmp_path / "runs"))
    assert f"{ANSWERED} of {ROWS} rows are done" in stopped.message
    assert f"the same call goes on from {tmp_path / 'runs'}" in stopped.message


def test_without_a_checkpoint_the_last_run_goes_on_from_its_frame(kernel: Kernel, server: SimulatedServer) -> None:
    stopped = _interrupt_in_the_middle(kernel, server, 'df.llm.complete("{text}", **keywords)')
    assert "llmframe.last_run().frame.llm.complete(..., where='missing')" in stopped.message

    cell = kernel.run("""
out = llmframe.last_run().frame.llm.complete("{text}", where="missing", **keywords)
show(out["response_status"].value_counts()["ok"].item())
""")

    assert cell.value == ROWS
    assert set(server.answered_by_content().values()) == {1}


def test_an_interrupt_ends_an_async_cell_that_calls_synchronously(
    kernel: Kernel, server: SimulatedServer, tmp_path: Path
) -> None:
    cell = "import asyncio\nawait asyncio.sleep(0)\n" + _cell(SYNC, tmp_path / "runs")
    assert _interrupt_in_the_middle(kernel, server, cell).error is not None
    assert kernel.run(cell).value == ROWS
    assert set(server.answered_by_content().values()) == {1}


@CALLS_WITH_CLIENT
def test_with_a_client_of_the_users_loop_an_interrupted_cell_goes_on(
    kernel_with_client: Kernel, server: SimulatedServer, tmp_path: Path, call: str
) -> None:
    _check_an_interrupted_cell_goes_on(kernel_with_client, server, call, tmp_path / "runs")


@CALLS_WITH_CLIENT
def test_with_a_client_of_the_users_loop_two_interrupts_leave_the_kernel_alive(
    kernel_with_client: Kernel, server: SimulatedServer, tmp_path: Path, call: str
) -> None:
    cell = _cell(call, tmp_path / "runs")
    _interrupt_in_the_middle(kernel_with_client, server, cell, times=2)
    assert kernel_with_client.run("show(1 + 1)").value == 2
    assert kernel_with_client.run(cell).value == ROWS
    assert set(server.answered_by_content().values()) == {1}


def test_the_users_client_works_in_its_loop_after_a_synchronous_call_with_it(
    kernel_with_client: Kernel, server: SimulatedServer, tmp_path: Path
) -> None:
    kernel_with_client.run(_cell(f"{SYNC} with client", tmp_path / "runs").replace("df.llm", "df.head(3).llm"))
    cell = kernel_with_client.run(
        """
replies = await asyncio.gather(*[client.chat.completions.create(model="m", messages=question) for _ in range(3)])
show([reply.choices[0].message.content for reply in replies])
""".replace("replies", "import asyncio\nreplies", 1)
    )
    assert cell.value == ["echo: used before"] * 3


def test_a_cell_waits_for_the_synchronous_call_before_it(kernel_with_client: Kernel, server: SimulatedServer) -> None:
    kernel_with_client.run("order = []")
    first = kernel_with_client.start(
        'df.head(3).llm.complete("{text} [[sleep=0.5]]", client=client, **keywords)\norder.append(1)'
    )
    server.wait_for(in_flight=3)
    second = kernel_with_client.start("order.append(2)\nshow(order)")
    kernel_with_client.finish(first)
    assert kernel_with_client.finish(second).value == [1, 2]


@CALLS
def test_a_cell_shows_one_bar_and_no_warning(kernel: Kernel, server: SimulatedServer, call: str) -> None:
    server.change(latency_s=0.2)
    cell = kernel.run(f"""
out = {call}("{{text}}", where=[i < {ANSWERED} for i in range(len(df))], **keywords)
show(len(out))
""")
    lines = [line for line in re.split(r"[\n]", cell.stderr) if line]
    assert len(lines) == 1, cell.stderr
    drawn = lines[0].split("\r")
    assert f"{ANSWERED}/{ANSWERED}, in 00:0" in drawn[-1]
    assert any("in flight" in each for each in drawn)
    assert cell.stdout == f"{ROWS}\n"


def test_tab_after_the_accessor_shows_its_verbs_and_a_question_mark_what_they_take(shared_kernel: Kernel) -> None:
    shared_kernel.run("words = pd.DataFrame({'text': ['a']})")
    shown = {name.rpartition(".")[2] for name in shared_kernel.completions("words.llm.")}
    assert {"complete", "estimate", "messages", "review"} <= shown
    assert "checkpoint" in shared_kernel.reference("words.llm.complete")


def test_an_interrupted_wait_for_a_batch_says_how_to_come_back_and_the_job_goes_on(
    shared_kernel: Kernel, tmp_path: Path
) -> None:
    with BatchServer(stop_after=2) as provider:
        submitted = shared_kernel.run(f"""
texts = pd.DataFrame({{"text": [f"a batch from a cell, row {{i}}" for i in range(6)]}})
where = dict(base_url={provider.base_url!r}, api_key="sk-test-batch", poll_s=0.05)
job = texts.llm.submit_batch("{{text}}", model="m", job={str(tmp_path / "job")!r}, **where)
show(len(job.parts))
""")
        assert submitted.value == 1
        waiting = shared_kernel.start("job.wait()")
        provider.wait_for_a_look()
        began = time.monotonic()
        shared_kernel.interrupt()
        stopped = shared_kernel.finish(waiting)
        assert time.monotonic() - began < STOPPED_S
        assert stopped.error == "Interrupted"
        assert "the job goes on at the provider" in stopped.message
        assert f"llmframe.BatchJob.open({str(tmp_path / 'job')!r}" in stopped.message
        provider.change(stop_after=None)
        again = shared_kernel.run(f"""
job = llmframe.BatchJob.open({str(tmp_path / "job")!r}, **where)
show([job.wait().counts, len(job.frame()["response"].dropna())])
""")
        assert again.value == [{"ok": 6}, 6]
        assert set(provider.paid().values()) == {1}
