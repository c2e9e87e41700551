"""Which parts become one, by their sizes alone; what a merge does with them is in `test_checkpoint`."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llmframe.merging import FANOUT, MERGE_BYTES, SMALL_BYTES, WHOLE_BYTES, full_tier


def named(*sizes: int) -> dict[str, int]:
    """Sizes by names that sort as they are given here."""
    return {f"part-{number:02}": size for number, size in enumerate(sizes)}


def test_parts_of_a_size_wait_until_there_are_enough_of_them() -> None:
    few = named(*[1_000] * (FANOUT - 1))
    assert full_tier(few, set()) == []
    enough = named(*[1_000] * FANOUT)
    assert full_tier(enough, set()) == list(enough)


def test_parts_of_unlike_sizes_are_not_merged() -> None:
    assert full_tier(named(1_000, SMALL_BYTES, 8 * SMALL_BYTES, 32 * SMALL_BYTES), set()) == []


def test_all_small_parts_are_of_one_size() -> None:
    small = named(1, 1_000, SMALL_BYTES // 2, SMALL_BYTES - 1)
    assert full_tier(small, set()) == list(small)


def test_the_smallest_come_first() -> None:
    small, larger = [1_000] * FANOUT, [8 * SMALL_BYTES] * FANOUT
    parts = named(*larger, *small)
    assert full_tier(parts, set()) == list(parts)[FANOUT:]


def test_a_large_part_and_one_that_cannot_be_merged_stay() -> None:
    assert full_tier(named(*[WHOLE_BYTES] * 9), set()) == []
    parts = named(*[1_000] * (FANOUT + 1))
    assert full_tier(parts, {"part-00"}) == list(parts)[1:]
    assert full_tier(parts, {"part-00", "part-01"}) == []


@given(st.lists(st.integers(0, 2 * WHOLE_BYTES), max_size=200))
def test_one_merge_takes_on_what_memory_holds_and_never_fewer_than_enough(sizes: list[int]) -> None:
    parts = named(*sizes)
    chosen = full_tier(parts, set())
    assert not chosen or len(chosen) >= FANOUT
    assert sum(parts[name] for name in chosen) <= MERGE_BYTES


@given(st.lists(st.integers(0, WHOLE_BYTES), max_size=100))
def test_merging_while_there_is_something_to_merge_comes_to_an_end_with_a_few_parts_of_each_size(
    sizes: list[int],
) -> None:
    parts = named(*sizes)
    merges = 0
    while chosen := full_tier(parts, set()):
        merges += 1
        parts[f"part-merged-{merges}"] = sum(parts.pop(name) for name in chosen)
    small = [size for size in parts.values() if size < WHOLE_BYTES]
    assert len(small) <= 5 * (FANOUT - 1)
