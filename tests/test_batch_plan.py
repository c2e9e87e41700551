"""The files of a Batch job stay within the provider's limits."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmframe.batch_plan import FileLimits, LineSize, file_numbers, input_line

SIZES = st.lists(st.builds(LineSize, bytes=st.integers(1, 40), tokens=st.integers(0, 40)), max_size=60)
LIMITS = st.builds(
    FileLimits, requests=st.integers(1, 8), bytes=st.integers(20, 90), tokens=st.none() | st.integers(20, 90)
)


@given(SIZES, LIMITS)
def test_no_file_passes_a_limit(sizes: list[LineSize], limits: FileLimits) -> None:
    files: dict[int, list[LineSize]] = defaultdict(list)
    for size, part in zip(sizes, file_numbers(sizes, limits), strict=True):
        if part is not None:
            files[part].append(size)
    for lines in files.values():
        assert len(lines) <= limits.requests
        assert sum(line.bytes for line in lines) <= limits.bytes
        assert limits.tokens is None or sum(line.tokens for line in lines) <= limits.tokens


@given(SIZES, LIMITS)
def test_files_are_numbered_without_a_gap_in_the_order_of_the_lines(sizes: list[LineSize], limits: FileLimits) -> None:
    placed = [part for part in file_numbers(sizes, limits) if part is not None]
    assert placed == sorted(placed)
    assert sorted(set(placed)) == list(range(len(set(placed))))


@given(SIZES, LIMITS)
def test_only_a_line_too_large_for_an_empty_file_has_no_place(sizes: list[LineSize], limits: FileLimits) -> None:
    for size, part in zip(sizes, file_numbers(sizes, limits), strict=True):
        too_large = size.bytes > limits.bytes or (limits.tokens is not None and size.tokens > limits.tokens)
        assert (part is None) == too_large


def test_120_000_lines_need_three_files() -> None:
    placed = list(file_numbers((LineSize(300, 50) for _ in range(120_000)), FileLimits()))
    assert [placed.count(part) for part in (0, 1, 2)] == [50_000, 50_000, 20_000]


def test_a_line_is_named_by_its_key_and_carries_its_body() -> None:
    line = input_line(bytes(range(32)), "/v1/chat/completions", b'{"model":"m"}')
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
    assert json.loads(line) == {
        "custom_id": bytes(range(32)).hex(),
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "m"},
    }


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 3"):
        input_line(b"abc", "/v1/chat/completions", b"{}")
