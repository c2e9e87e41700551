"""A reader of a checkpoint: it finds what is there, and leaves the place as it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmframe.checkpoint import Checkpoint
from llmframe.errors import CheckpointError
from llmframe.origins import Origin
from llmframe.requests import packed
from llmframe.results import Completion
from llmframe.shelf import Shelf

ORIGIN = Origin("e", "chat", "m", "{x}", "{}")
KEY = b"k" * 32


def looked_up(path: Path) -> list[str | list[str] | None]:
    shelf = Shelf.at(path)
    assert shelf is not None
    return [answer.text for _, answer in shelf.find(packed([KEY]))]


def everything_in(path: Path) -> dict[str, tuple[int, bytes]]:
    return {each.name: (each.stat().st_mtime_ns, each.read_bytes()) for each in path.iterdir()}


def test_a_reader_finds_what_was_flushed_and_not_what_was_only_added(tmp_path: Path) -> None:
    writer = Checkpoint.open(tmp_path, ORIGIN)
    writer.add(KEY, Completion(text="one", status="ok"))
    before = looked_up(tmp_path)
    writer.flush()
    after = looked_up(tmp_path)
    writer.close()
    assert (before, after) == ([], ["one"])


def test_a_reader_makes_locks_writes_and_merges_nothing(tmp_path: Path) -> None:
    for _ in range(8):  # enough of them to be merged
        writer = Checkpoint.open(tmp_path, ORIGIN)
        writer.add(KEY, Completion(text="one", status="ok"))
        writer.close(tidy=False)
    before, changed_ns = everything_in(tmp_path), tmp_path.stat().st_mtime_ns

    assert looked_up(tmp_path) == ["one"]

    assert everything_in(tmp_path) == before
    assert tmp_path.stat().st_mtime_ns == changed_ns


def test_where_there_is_no_checkpoint_there_is_none_to_look_at_and_none_is_made(tmp_path: Path) -> None:
    assert Shelf.at(tmp_path / "missing") is None
    assert not (tmp_path / "missing").exists()


def test_a_file_is_no_checkpoint_to_look_at(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is not a directory"):
        Shelf.at(tmp_path / "file")


def test_the_answers_that_are_held_are_counted_as_of_the_last_search(tmp_path: Path) -> None:
    writer = Checkpoint.open(tmp_path, ORIGIN)
    reader = Shelf.at(tmp_path)
    assert reader is not None
    assert reader.held == 0
    writer.add(KEY, Completion(text="one", status="ok"))
    writer.close()
    list(reader.find(packed([KEY])))
    assert reader.held == 1
