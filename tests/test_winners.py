"""Which of several rows of a key wins."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmframe.index import Hits
from llmframe.parts import Heads
from llmframe.requests import packed
from llmframe.winners import Candidates, winners

Row = tuple[int, bool, int]
"""A key's number, whether it was paid for, and when it was answered."""


def part(name: str, *rows: Row) -> Candidates:
    keys = packed(bytes([number]) * 32 for number, _, _ in rows)
    paid, times = (np.array([row[place] for row in rows]) for place in (1, 2))
    return Candidates.of(name, Heads(keys, paid.astype(np.bool_), times.astype(np.int64)))


def chosen(*parts: Candidates) -> set[tuple[str, int]]:
    """The winners, as part and row."""
    return {(name, row) for name, rows, _ in winners(parts) for row in rows.tolist()}


@pytest.mark.parametrize(
    ("rows", "winner"),
    [
        ([(1, True, 5), (1, True, 9)], 1),
        ([(1, True, 9), (1, True, 5)], 0),
        ([(1, True, 5), (1, False, 9)], 0),
        ([(1, False, 5), (1, False, 9)], 1),
    ],
    ids=["the newest", "the newest, whatever the order", "what was paid for", "the newest failure where all failed"],
)
def test_of_the_rows_of_a_key_one_wins_in_one_part_and_in_two(rows: list[Row], winner: int) -> None:
    assert chosen(part("a", *rows)) == {("a", winner)}
    assert chosen(part("a", rows[0]), part("b", rows[1])) == {("ab"[winner], 0)}


def test_a_part_without_a_winner_is_left_out_and_no_parts_have_none() -> None:
    assert chosen(part("old", (1, True, 1)), part("new", (1, True, 2), (2, True, 2))) == {("new", 0), ("new", 1)}
    assert chosen() == set()


@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 10**6)), max_size=8), max_size=5))
def test_every_key_has_one_winner_and_nothing_beats_it(parts: list[list[Row]]) -> None:
    rows = {(str(number), row): each for number, part_ in enumerate(parts) for row, each in enumerate(part_)}
    won = [rows[place] for place in chosen(*(part(str(number), *each) for number, each in enumerate(parts) if each))]
    assert sorted(number for number, _, _ in won) == sorted({number for number, _, _ in rows.values()})
    best = {number: (paid, time) for number, paid, time in won}
    assert all((paid, time) <= best[number] for number, paid, time in rows.values())


def test_what_an_index_found_is_told_apart_by_the_places_of_the_keys() -> None:
    older = Hits("older", np.array([0, 1]), np.array([3, 4]), np.array([5, 5]))
    newer = Hits("newer", np.array([1]), np.array([6]), np.array([9]))
    places = np.array([70, 80])

    found = winners([Candidates.of_hits(hits, places) for hits in (older, newer)])

    assert [(name, rows.tolist(), ids.tolist()) for name, rows, ids in found] == [
        ("older", [3], [[70]]),
        ("newer", [6], [[80]]),
    ]
