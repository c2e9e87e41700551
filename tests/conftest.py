"""Fixtures of the whole suite: a simulated endpoint, and an environment that says nothing of the developer's own.

Nothing is shared between the workers of a parallel run, and no test sees what another left in the server.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

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
