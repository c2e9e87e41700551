"""Fixtures of the whole suite: a simulated endpoint, and an environment that says nothing of the developer's own.

Nothing is shared between the workers of a parallel run, and no test sees what another left in the server. A test that
leaves a key in a file, in what is printed or in a log fails, whatever else it shows.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.keys import keys_in, keys_under
from tests.server import SimulatedServer


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the developer's keys and settings, and give a key that is none."""
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "AZURE_OPENAI_", "LLMFRAME_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test-not-a-secret")


@pytest.fixture(scope="session")
def _server_process() -> Iterator[SimulatedServer]:
    with SimulatedServer() as server:
        yield server


@pytest.fixture
def server(_server_process: SimulatedServer) -> SimulatedServer:
    """A simulated endpoint with default behaviour, no connections and no counts."""
    if not _server_process.running:
        _server_process.start()
    _server_process.reset()
    return _server_process


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Fail a test that has left a key behind: `tests.keys`."""
    report = yield
    if call.when == "teardown" and report.passed:
        left = [
            f"{key} in what was {what} in {when}" for when, what, text in item._report_sections for key in keys_in(text)
        ]
        place = getattr(item, "funcargs", {}).get("tmp_path")
        if isinstance(place, Path):
            left += [f"{key} in {path}" for path, key in keys_under(place)]
        if left:
            report.outcome, report.longrepr = "failed", "a key was left behind: " + "; ".join(left[:5])
    return report
