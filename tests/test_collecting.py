"""Garbage collection while requests are in flight."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pandas as pd
import pydantic
import pytest

from llmframe.collecting import OBJECTS, rare_collections
from tests.server import SimulatedServer


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_collections_are_rare_in_a_run_and_as_they_were_after_it(server: SimulatedServer) -> None:
    gc.set_threshold(701, 11, 12)
    found = []

    class Answer(pydantic.BaseModel):
        word: str

        @pydantic.model_validator(mode="after")
        def look(self) -> Answer:
            found.append(gc.get_threshold()[0])
            return self

    frame = pd.DataFrame({"text": ["a row"]})
    frame.llm.complete("text", schema=Answer, model="m", base_url=server.base_url, api_key="k", progress=False)
    assert set(found) == {OBJECTS}
    assert gc.get_threshold()[0] == 701


def test_the_last_of_several_runs_gives_the_threshold_back() -> None:
    gc.set_threshold(701, 11, 12)
    first, second = rare_collections(), rare_collections()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert gc.get_threshold()[0] == OBJECTS
    second.__exit__(None, None, None)
    assert gc.get_threshold()[0] == 701


@pytest.mark.parametrize("chosen", [0, OBJECTS + 1])
def test_a_collector_that_is_off_or_rarer_still_stays_so(chosen: int) -> None:
    gc.set_threshold(chosen)
    with rare_collections():
        assert gc.get_threshold()[0] == chosen
    assert gc.get_threshold()[0] == chosen


def test_what_somebody_else_sets_meanwhile_stays() -> None:
    with rare_collections():
        gc.set_threshold(800)
    assert gc.get_threshold()[0] == 800
