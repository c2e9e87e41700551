"""Garbage collection while requests are in flight."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Iterator

import pandas as pd
import pydantic
import pytest

from llmframe.collecting import OBJECTS, collect_young, rare_collections
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


def test_a_collector_that_is_rarer_still_by_a_users_own_choice_stays_so_though_it_was_chosen_in_a_run() -> None:
    with rare_collections():
        gc.set_threshold(50_000, 20, 20)
    assert gc.get_threshold()[:2] == (50_000, 20)


def test_what_was_found_in_a_run_and_put_back_after_it_is_not_taken_for_anybodys_choice() -> None:
    gc.set_threshold(701, 11, 12)
    with rare_collections():
        found = gc.get_threshold()
    gc.set_threshold(*found)
    with rare_collections():
        pass
    assert gc.get_threshold()[0] == 701


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_forked_in_a_run_collects_as_before_it() -> None:
    gc.set_threshold(701, 11, 12)
    with rare_collections():
        child = os.fork()
        if child == 0:
            at_first = gc.get_threshold()[0]
            with rare_collections():
                raised = gc.get_threshold()[0]
            os._exit(0 if (at_first, raised, gc.get_threshold()[0]) == (701, OBJECTS, 701) else 1)
        assert os.waitpid(child, 0)[1] == 0


class Page:
    """Something large whose parts refer to one another."""

    def __init__(self) -> None:
        self.root = self


def test_cycles_made_in_a_run_do_not_wait_for_its_end() -> None:
    gc.set_threshold(701, 11, 12)
    with rare_collections():
        page = weakref.ref(Page())
        others = [[number] for number in range(1_000)]
        assert page() is not None
        collect_young()
        assert page() is None
    assert len(others) == 1_000


def test_few_new_objects_are_no_reason_to_collect() -> None:
    gc.set_threshold(701, 11, 12)
    with rare_collections():
        gc.collect()
        page = weakref.ref(Page())
        collect_young()
        assert page() is not None
        gc.disable()
        others = [[number] for number in range(1_000)]
        collect_young()
        gc.enable()
        assert page() is not None
    assert len(others) == 1_000
