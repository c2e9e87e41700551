"""The checkpoint: what it was given it gives back, whoever else writes, merges or damages what lies beside it."""

from __future__ import annotations

import dataclasses
import datetime as dt
import errno
import functools
import hashlib
import inspect
import io
import itertools
import logging
import os
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmframe import read_checkpoint
from llmframe.checkpoint import FLUSH_ROWS, FLUSH_S, Checkpoint, Origin
from llmframe.errors import CheckpointError, ConfigurationError, LLMFrameWarning
from llmframe.index import Hits, Index
from llmframe.merging import FANOUT
from llmframe.parts import COLUMNS, NewerFormat, NotAPart, Part, completions
from llmframe.requests import packed
from llmframe.results import PAID, STATUSES, Completion
from llmframe.shelf import Shelf
from llmframe.storage import Directory, storage_at
from tests.encoding import encode

ORIGIN = Origin("http://localhost:8000/v1", "chat", "gpt-4o-mini", "Good?\n\n{review}", '{"temperature":0}')


def key(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()


def answer(text: str = "good", **details: object) -> Completion:
    return Completion(**{"text": text, "status": "ok", "attempts": 1, "source": "checkpoint"} | details)


def save(path: str | os.PathLike[str], answers: dict[int, Completion], *, origin: Origin = ORIGIN) -> None:
    """Leave one part as a run that did not tidy does."""
    checkpoint = Checkpoint.open(path, origin)
    for number, completion in answers.items():
        checkpoint.add(key(number), completion)
    checkpoint.close(tidy=False)


def asked(checkpoint: Checkpoint | Shelf, numbers: Sequence[int]) -> Iterator[tuple[int, Completion]]:
    """What a checkpoint has for these numbers."""
    return ((numbers[place], each) for place, each in checkpoint.find(packed(map(key, numbers))))


def found(path: str | os.PathLike[str], numbers: range) -> dict[int, Completion]:
    checkpoint = Checkpoint.open(path, ORIGIN)
    try:
        pairs = list(asked(checkpoint, numbers))
    finally:
        checkpoint.close(tidy=False)
    assert len(pairs) == len(dict(pairs)), "an answer was given twice"
    return dict(pairs)


def parts(path: Path) -> list[Path]:
    return sorted(path.glob("*.parquet"))


# What is added is given back


def test_an_answer_is_found_by_its_key_after_a_restart(tmp_path: Path) -> None:
    save(tmp_path, {1: answer("one"), 2: answer("two")})

    assert found(tmp_path, range(4)) == {1: answer("one"), 2: answer("two")}


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
counts = st.none() | st.integers(0, 2**63 - 1)
amounts = st.none() | st.floats(allow_nan=False)
any_completion = st.builds(
    Completion,
    text=st.none() | texts | st.lists(texts, max_size=3),
    status=st.sampled_from(sorted(PAID)),
    error=st.none() | texts,
    prompt_tokens=counts,
    completion_tokens=counts,
    parsed=st.none(),
    cached_tokens=counts,
    reasoning_tokens=counts,
    cost_usd=amounts,
    latency_s=amounts,
    attempts=st.integers(0, 2**63 - 1),
    finish_reason=st.none() | texts,
    model=st.none() | texts,
    source=st.just("checkpoint"),
    request_id=st.none() | texts,
)


@given(st.lists(any_completion, max_size=20))
@settings(deadline=None)
def test_every_detail_of_every_completion_survives_a_part(answers: list[Completion]) -> None:
    data = encode([(key(number), each, number) for number, each in enumerate(answers)], ORIGIN)

    part = Part(pa.BufferReader(data))

    heads = part.heads()
    assert heads.keys.tolist() == [key(number) for number in range(len(answers))]
    assert heads.answered_at.tolist() == list(range(len(answers)))
    assert [each for table in part.take(np.arange(len(answers))) for each in completions(table)] == answers
    assert part.origins == (ORIGIN,)


def test_what_is_derived_is_not_stored(tmp_path: Path) -> None:
    save(tmp_path, {1: answer(parsed="good", source="request")})

    assert found(tmp_path, range(2)) == {1: answer(parsed=None, source="checkpoint")}


def test_a_lone_surrogate_and_an_absurd_count_keep_no_other_answer_off_the_disk(tmp_path: Path) -> None:
    save(tmp_path, {1: answer("a\ud800b", prompt_tokens=10**30), 2: answer("good"), 3: answer(["x\udfff", "y"])})

    assert found(tmp_path, range(4)) == {1: answer("a\ufffdb"), 2: answer("good"), 3: answer(["x\ufffd", "y"])}


def test_an_origin_with_a_lone_surrogate_is_stored(tmp_path: Path) -> None:
    save(tmp_path, {1: answer()}, origin=Origin("e", "chat", "m", "\ud83d {x}", "{}"))

    assert read_checkpoint(tmp_path)["template"].tolist() == ["\ufffd {x}"]


# Which answer of a key is given back


def test_a_failure_is_stored_and_not_given_back(tmp_path: Path) -> None:
    save(tmp_path, {1: answer(None, status="failed", error="503")})

    assert found(tmp_path, range(2)) == {}
    assert read_checkpoint(tmp_path)["error"].tolist() == ["503"]


def test_a_later_failure_does_not_hide_a_paid_answer(tmp_path: Path) -> None:
    save(tmp_path, {1: answer("paid", status="truncated", error="length")})
    save(tmp_path, {1: answer(None, status="failed", error="503")})

    assert found(tmp_path, range(2))[1].text == "paid"
    assert read_checkpoint(tmp_path)["status"].tolist() == ["truncated"]


def test_of_two_paid_answers_the_newer_is_given_back(tmp_path: Path) -> None:
    save(tmp_path, {1: answer("old")})
    save(tmp_path, {1: answer("new")})

    assert found(tmp_path, range(2))[1].text == "new"
    assert read_checkpoint(tmp_path)["text"].tolist() == ["new"]


def test_of_two_answers_within_a_microsecond_the_later_added_is_given_back(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(time, "time_ns", lambda: 10**18)
    checkpoint = Checkpoint.open(tmp_path, ORIGIN)
    for text in "abc":
        checkpoint.add(key(1), answer(text))
    checkpoint.close()

    assert found(tmp_path, range(2))[1].text == "c"


def save_by_a_clock_ahead(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the answer "old" to key 1, as of a minute from now."""
    now = time.time_ns()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: now + 60 * 10**9)
        save(path, {1: answer("old")})


def test_what_supersedes_an_answer_is_given_back_though_the_clock_of_the_first_was_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_by_a_clock_ahead(tmp_path, monkeypatch)
    checkpoint = Checkpoint.open(tmp_path, ORIGIN)
    checkpoint.supersede(packed([key(1), key(2)]))
    checkpoint.add(key(1), answer("new"))
    checkpoint.close()

    assert found(tmp_path, range(2))[1].text == "new"


def test_what_supersedes_an_answer_while_another_is_added_is_given_back_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time_ns()
    save_by_a_clock_ahead(tmp_path, monkeypatch)
    checkpoint = Checkpoint.open(tmp_path, ORIGIN)
    superseding = threading.Thread(target=checkpoint.supersede, args=[packed([key(1)])])

    class Now(int):
        """The time, in microseconds; when it is first compared with the last one, the other thread has its turn."""

        def __floordiv__(self, _: int) -> Now:
            return self

        def __lt__(self, last: int) -> bool:
            if superseding.ident is None:
                superseding.start()
                superseding.join(0.2)
            return int(self) < last

    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: Now(now // 1_000))
        checkpoint.add(key(2), answer("other"))
    superseding.join()
    checkpoint.add(key(1), answer("new"))
    checkpoint.close()

    assert found(tmp_path, range(3)) == {1: answer("new"), 2: answer("other")}


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 5), st.sampled_from(STATUSES)), min_size=1, max_size=4),
        min_size=1,
        max_size=9,
    )
)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_merge_changes_what_is_given_back(tmp_path: Path, flushes: list[list[tuple[int, str]]]) -> None:
    path = tmp_path / uuid.uuid4().hex
    best: dict[int, str] = {}
    checkpoint = Checkpoint.open(path, ORIGIN)
    for flush, adds in enumerate(flushes):
        for place, (number, status) in enumerate(adds):
            text = f"{flush}.{place}"
            checkpoint.add(key(number), answer(text, status=status))
            if status in PAID:
                best[number] = text
        checkpoint.flush()

    assert {number: each.text for number, each in found(path, range(6)).items()} == best
    checkpoint.close()
    assert {number: each.text for number, each in found(path, range(6)).items()} == best


# Files


def test_fifty_flushes_leave_a_handful_of_files(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tmp_path, ORIGIN)
    for flush in range(50):
        for place in range(20):
            checkpoint.add(key(20 * flush + place), answer(f"{flush}.{place}"))
        checkpoint.flush()
    checkpoint.close()

    assert len(os.listdir(tmp_path)) <= 5
    assert len(found(tmp_path, range(1000))) == 1000


def test_many_small_runs_leave_a_handful_of_files(tmp_path: Path) -> None:
    for number in range(30):
        checkpoint = Checkpoint.open(tmp_path, ORIGIN)
        checkpoint.add(key(number), answer(str(number)))
        checkpoint.close()

    assert len(os.listdir(tmp_path)) < FANOUT
    assert {number: each.text for number, each in found(tmp_path, range(30)).items()} == {
        number: str(number) for number in range(30)
    }


def test_a_large_part_is_not_rewritten_for_a_small_run(tmp_path: Path) -> None:
    save(tmp_path, {number: answer(os.urandom(500).hex()) for number in range(2_000)})
    (large,) = parts(tmp_path)
    for number in range(2_000, 2_010):
        checkpoint = Checkpoint.open(tmp_path, ORIGIN)
        checkpoint.add(key(number), answer())
        checkpoint.close()

    assert large.exists()
    assert len(found(tmp_path, range(2_010))) == 2_010


def test_opening_tidies_a_crowd_that_killed_runs_left(tmp_path: Path) -> None:
    for number in range(70):
        save(tmp_path, {number: answer(str(number))})

    checkpoint = Checkpoint.open(tmp_path, ORIGIN)

    assert len(parts(tmp_path)) < 10
    assert dict(asked(checkpoint, range(70))).keys() == set(range(70))
    checkpoint.close()


def test_parts_of_a_live_writer_are_left_to_it(tmp_path: Path) -> None:
    live = Checkpoint.open(tmp_path, ORIGIN)
    for number in range(FANOUT - 1):
        live.add(key(number), answer())
        live.flush()
    before = parts(tmp_path)

    for number in range(10, 20):
        checkpoint = Checkpoint.open(tmp_path, ORIGIN)
        checkpoint.add(key(number), answer())
        checkpoint.close()

    assert set(before) <= set(parts(tmp_path))
    live.close()


def test_what_a_dead_writer_left_unfinished_is_swept_and_a_live_ones_is_not(tmp_path: Path) -> None:
    live = Checkpoint.open(tmp_path, ORIGIN)
    (lock,) = tmp_path.glob(".*.lock")
    of_the_live = tmp_path / f".part-{lock.name[1:-5]}-000001.parquet.tmp"
    of_the_dead = tmp_path / ".part-0123456789abcdef012345-000001.parquet.tmp"
    lock_of_the_dead = tmp_path / ".0123456789abcdef012345.lock"
    for path in (of_the_live, of_the_dead, lock_of_the_dead):
        path.touch()

    Checkpoint.open(tmp_path, ORIGIN).close()

    assert of_the_live.exists()
    assert not of_the_dead.exists()
    assert not lock_of_the_dead.exists()
    of_the_live.unlink()
    live.close()
    assert os.listdir(tmp_path) == []


def test_merged_parts_keep_the_origin_of_each_row(tmp_path: Path) -> None:
    for number in range(8):
        save(tmp_path, {number: answer()}, origin=Origin("e", "chat", f"m{number % 3}", "t", "{}"))
    Checkpoint.open(tmp_path, ORIGIN).close()

    assert len(parts(tmp_path)) == 1
    assert read_checkpoint(tmp_path)["asked_model"].tolist() == [f"m{number % 3}" for number in range(8)]


def test_a_merge_that_fails_loses_nothing_and_stops_nothing(tmp_path: Path, caplog, monkeypatch) -> None:
    from llmframe import merging as module

    class Broken(module.PartWriter):
        def write(self, *_: object) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "PartWriter", Broken)
    checkpoint = Checkpoint.open(tmp_path, ORIGIN)
    for number in range(10):
        checkpoint.add(key(number), answer())
        checkpoint.flush()
    checkpoint.close()

    assert "No space left on device" in caplog.text
    assert len(found(tmp_path, range(10))) == 10
    assert not list(tmp_path.glob(".*"))


# Others at work


def test_a_reader_finds_every_answer_once_while_its_parts_are_merged_away(tmp_path: Path) -> None:
    writer = Checkpoint.open(tmp_path, ORIGIN)
    for number in range(FANOUT - 1):
        writer.add(key(number), answer(str(number)))
        writer.flush()
    reader = Checkpoint.open(tmp_path, ORIGIN)
    answers = asked(reader, range(FANOUT))
    first = next(answers)

    writer.add(key(FANOUT - 1), answer())
    writer.close()  # merges all of them

    assert len(parts(tmp_path)) == 1
    assert sorted(number for number, _ in [first, *answers])[: FANOUT - 1] == list(range(FANOUT - 1))
    reader.close()


def test_a_reader_between_two_parts_meets_what_a_merge_moves_behind_it(tmp_path: Path) -> None:
    writer = Checkpoint.open(tmp_path, ORIGIN)
    for number in range(FANOUT - 1):
        writer.add(key(number), answer())
        writer.flush()
    reading = Shelf(storage_at(tmp_path), "here").read(Part.heads)
    met = [next(reading)]

    writer.add(key(FANOUT - 1), answer())
    writer.close()
    met += reading

    assert {each for _, heads in met for each in heads.keys.tolist()} >= {key(number) for number in range(FANOUT - 1)}


def test_answers_may_be_added_while_another_thread_flushes(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tmp_path, ORIGIN)
    done = threading.Event()

    def flush() -> None:
        while not done.is_set():
            checkpoint.flush()

    thread = threading.Thread(target=flush)
    thread.start()
    for number in range(20_000):
        checkpoint.add(key(number), answer(str(number)))
    done.set()
    thread.join()
    checkpoint.close()

    answers = found(tmp_path, range(20_000))
    assert all(answers[number].text == str(number) for number in range(20_000))


def test_no_thread_is_left_after_close(tmp_path: Path) -> None:
    before = threading.enumerate()
    checkpoint = Checkpoint.open(tmp_path, ORIGIN)
    for number in range(2 * FANOUT):
        checkpoint.add(key(number), answer())
        checkpoint.flush()
    checkpoint.close(tidy=False)

    assert threading.enumerate() == before


# Files that are no parts


def test_a_part_torn_at_any_length_is_never_read() -> None:
    data = encode([(key(number), answer(str(number)), number) for number in range(20)], ORIGIN)

    for length in range(len(data)):
        with pytest.raises(NotAPart):
            Part(pa.BufferReader(data[:length]))


def give(data: bytes) -> dict[bytes, Completion]:
    part = Part(pa.BufferReader(data))
    heads = part.heads()
    paid = np.flatnonzero(heads.paid)
    answers = [each for table in part.take(paid) for each in completions(table)]
    return dict(zip(heads.keys[paid].tolist(), answers, strict=True))


SOUND = {key(number): answer(str(number), prompt_tokens=number, cost_usd=number / 8) for number in range(40)}
SOUND_PART = encode([(each, SOUND[each], number) for number, each in enumerate(SOUND)], ORIGIN)


FOOTER_AT = len(SOUND_PART) - 8 - int.from_bytes(SOUND_PART[-8:-4], "little")  # the format ends so


def damages(start: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    return st.lists(st.tuples(st.integers(start, len(SOUND_PART) - 1), st.integers(1, 255)), min_size=1, max_size=4)


@given(damages(0) | damages(FOOTER_AT))
@settings(deadline=None, max_examples=1_000)
def test_a_part_with_damaged_bytes_is_never_misread(damage: list[tuple[int, int]]) -> None:
    data = bytearray(SOUND_PART)
    for place, bits in damage:
        data[place] ^= bits
    try:
        given_back = give(bytes(data))
    except (NotAPart, NewerFormat):
        return
    assert given_back == SOUND


def test_a_page_header_that_denies_its_checksum_lets_no_damage_through() -> None:
    for place, other in itertools.combinations(range(4, 64), 2):  # such as 12 and 47, of the first page
        data = bytearray(SOUND_PART)
        data[place] ^= 1
        data[other] ^= 1
        with pytest.raises(NotAPart):
            give(bytes(data))


@given(st.binary(max_size=200))
def test_any_bytes_are_no_part(data: bytes) -> None:
    with pytest.raises(NotAPart):
        Part(pa.BufferReader(data))


class Flaky(io.FileIO):
    """A part's file on a disk where one reading fails, counted from 0 over all files."""

    def __init__(self, path: Path, readings: Iterator[int], fails: int, failure: Exception) -> None:
        super().__init__(path)
        self._readings = readings
        self._fails = fails
        self._failure = failure

    def read(self, size: int | None = -1) -> bytes:
        if next(self._readings) == self._fails:
            raise self._failure
        return super().read(size) or b""


class Deadline(Exception):
    """What a handler of SIGALRM raises, in whatever the main thread is at."""


@pytest.mark.parametrize(
    ("failure", "raised"),
    [
        (OSError(errno.EIO, "Input/output error"), CheckpointError),
        (OSError(errno.ESTALE, "Stale file handle"), CheckpointError),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), CheckpointError),
        (TimeoutError("out of time"), TimeoutError),
        (Deadline("out of time"), Deadline),
        (MemoryError("out of memory"), MemoryError),
    ],
    ids=repr,
)
def test_whichever_reading_of_a_disk_fails_a_part_is_not_taken_for_a_torn_one(
    tmp_path: Path, monkeypatch, failure: Exception, raised: type[Exception]
) -> None:
    save(tmp_path, {1: answer("one")})
    checkpoint = Shelf.at(tmp_path)
    assert checkpoint is not None
    said = f"could not be read: {failure}; its answers" if raised is CheckpointError else str(failure)

    def fail(at: int) -> Iterator[int]:
        readings = itertools.count()
        flaky = functools.partial(Flaky, readings=readings, fails=at, failure=failure)
        monkeypatch.setattr(Directory, "open", lambda _, name: flaky(tmp_path / name))
        return readings

    readings = fail(-1)
    assert dict(asked(checkpoint, [1])) == {1: answer("one")}
    for number in range(next(readings)):
        fail(number)
        with pytest.raises(raised, match=re.escape(said)):
            list(asked(checkpoint, [1]))
    fail(-1)
    assert dict(asked(checkpoint, [1])) == {1: answer("one")}


@pytest.mark.parametrize("kept", [0, 3, 100, -1])
def test_a_torn_part_is_reported_by_name_skipped_and_kept(tmp_path: Path, kept: int) -> None:
    save(tmp_path, {1: answer("one")})
    save(tmp_path, {2: answer("two")})
    victim = parts(tmp_path)[0]
    victim.write_bytes(victim.read_bytes()[:kept])

    with pytest.warns(LLMFrameWarning, match=victim.name) as caught:
        checkpoint = Checkpoint.open(tmp_path, ORIGIN)

    assert dict(asked(checkpoint, range(4))) == {2: answer("two")}
    checkpoint.close()
    assert len(caught) == 1
    assert victim.exists()


def test_a_part_damaged_after_it_was_listed_gives_way_to_another_copy(tmp_path: Path) -> None:
    save(tmp_path, {1: answer("one")})
    (part,) = parts(tmp_path)
    shutil.copy(part, tmp_path / "copy.parquet")
    checkpoint = Checkpoint.open(tmp_path, ORIGIN)
    data = bytearray(part.read_bytes())
    data[40] ^= 255
    part.write_bytes(data)

    with pytest.warns(LLMFrameWarning, match=part.name):
        assert dict(asked(checkpoint, [1])) == {1: answer("one")}
    checkpoint.close()


def write_part(path: Path, table: pa.Table, *, version: int = 1, origins: str = "[]") -> None:
    metadata = {
        "llmframe.format": str(version),
        "llmframe.columns": " ".join(table.column_names),
        "llmframe.origins": origins,
    }
    pq.write_table(table.replace_schema_metadata(metadata), path)


def one_row() -> pa.Table:
    data = encode([(key(1), answer("one", request_id="r"), 1)], ORIGIN)
    return next(Part(pa.BufferReader(data)).take(np.arange(1)))


@pytest.mark.parametrize(
    ("what", "table"),
    [
        ("not written by llmframe", None),
        ("'key' is not of type", one_row().set_column(0, "key", pa.array(["x"]))),
        ("'text' is not of type", one_row().set_column(2, "text", pa.array([b"\xff"]))),
        ("no column 'status'", one_row().drop_columns(["status"])),
        ("without a key", one_row().set_column(0, "key", pa.nulls(1, pa.binary(32)))),
    ],
)
def test_a_foreign_part_is_reported_by_name_skipped_and_kept(tmp_path: Path, what: str, table: pa.Table | None) -> None:
    path = tmp_path / "theirs.parquet"
    if table is None:
        pd.DataFrame({"key": [1]}).to_parquet(path)
    else:
        write_part(path, table)

    with pytest.warns(LLMFrameWarning, match=f"theirs.parquet is skipped: .*{what}"):
        assert found(tmp_path, range(2)) == {}

    assert path.exists()


@pytest.mark.parametrize("origins", ["", "{", "null", "[1]", '[{"endpoint":"e"}]'])
def test_a_part_whose_origins_make_no_sense_is_skipped(tmp_path: Path, origins: str) -> None:
    write_part(tmp_path / "theirs.parquet", one_row(), origins=origins)

    with pytest.warns(LLMFrameWarning, match="origins cannot be read"):
        assert found(tmp_path, range(2)) == {}


def test_text_that_is_not_utf8_is_not_trusted(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32).tobytes()), pa.py_buffer(b"\xff")]
    )
    write_part(tmp_path / "theirs.parquet", one_row().set_column(2, "text", bad))

    checkpoint = Checkpoint.open(tmp_path, ORIGIN)
    with pytest.warns(LLMFrameWarning, match="UTF"):
        assert list(asked(checkpoint, [1])) == []
    checkpoint.close()


def test_a_column_this_version_does_not_know_is_ignored_and_survives(tmp_path: Path) -> None:
    for number in range(FANOUT):
        later = one_row().append_column("mood", pa.array(["calm"]))
        write_part(tmp_path / f"part-0123456789abcdef012345-00000{number}.parquet", later)

    assert found(tmp_path, range(2)) == {1: answer("one", request_id="r")}
    Checkpoint.open(tmp_path, ORIGIN).close()
    assert len(parts(tmp_path)) == FANOUT


def test_a_column_an_older_version_did_not_write_is_null(tmp_path: Path) -> None:
    older = one_row().select(["key", "status", "text", "model"])
    for number in range(FANOUT):
        write_part(tmp_path / f"part-0123456789abcdef012345-00000{number}.parquet", older)

    assert found(tmp_path, range(2)) == {1: answer("one", attempts=0)}
    Checkpoint.open(tmp_path, ORIGIN).close()
    assert len(parts(tmp_path)) == 1
    assert found(tmp_path, range(2)) == {1: answer("one", attempts=0)}


def test_a_newer_format_is_refused_by_name_and_nothing_is_left_behind(tmp_path: Path) -> None:
    write_part(tmp_path / "part-1.parquet", one_row(), version=2)

    with pytest.raises(CheckpointError, match=r"part-1\.parquet.* format 2.*up to 1.*upgrade"):
        Checkpoint.open(tmp_path, ORIGIN)
    with pytest.raises(CheckpointError, match=r"part-1\.parquet"):
        read_checkpoint(tmp_path)
    assert os.listdir(tmp_path) == ["part-1.parquet"]


def test_other_files_and_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "._part.parquet").write_bytes(b"of a Mac")
    (tmp_path / "directory.parquet").mkdir()
    (tmp_path / "nowhere.parquet").symlink_to(tmp_path / "missing")
    before = sorted(os.listdir(tmp_path))

    Checkpoint.open(tmp_path, ORIGIN).close()

    assert sorted(os.listdir(tmp_path)) == before


# Places that will not do


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    for place in (path, path / "below"):
        with pytest.raises(CheckpointError, match="not a directory"):
            Checkpoint.open(place, ORIGIN)
    assert path.read_text() == "mine"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a place nobody can write to")
@pytest.mark.parametrize("place", ["/proc/self/checkpoint", "/proc/self"])
def test_a_place_that_cannot_be_written_is_refused(place: str) -> None:
    with pytest.raises(CheckpointError, match=f"{place} cannot be written"):
        Checkpoint.open(place, ORIGIN)


def test_a_part_that_may_not_be_read_stops_the_run_before_it_pays_again(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, {1: answer()})

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # root may read everything
        patch.setattr(pa, "OSFile", refuse)
        with pytest.raises(CheckpointError, match=r"part-.*Permission denied"):
            found(tmp_path, range(2))


def test_a_part_that_cannot_be_opened_for_now_stops_the_run_before_it_pays_again(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    save(tmp_path, {1: answer()})
    checkpoint = Checkpoint.open(tmp_path, ORIGIN)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (used[0] + 2, hard))
    try:
        with pytest.raises(OSError, match="Too many"):  # noqa: PT012
            while True:
                used.append(os.open(os.devnull, os.O_RDONLY))
        os.close(used.pop())  # enough to list the directory, and that is closed again
        used.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(CheckpointError, match=r"cannot be listed|could not be read"):
            list(asked(checkpoint, [1]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in used:
            os.close(descriptor)
    assert dict(asked(checkpoint, [1])) == {1: answer()}
    checkpoint.close()


def test_a_full_disk_stops_the_flush_and_loses_nothing_when_there_is_room_again(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    checkpoint = Checkpoint.open(tmp_path, ORIGIN)
    checkpoint.add(key(0), answer())
    checkpoint.flush()
    for number in range(1, 1000):
        checkpoint.add(key(number), answer(os.urandom(50).hex()))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, hard))
    try:
        with pytest.raises(CheckpointError, match=r"999 answers could not be saved in .*too large"):
            checkpoint.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert found(tmp_path, range(1000)) == {0: answer()}
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))
    checkpoint.close()
    assert len(found(tmp_path, range(1000))) == 1000


def test_a_directory_deleted_half_way_stops_the_flush(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tmp_path / "runs", ORIGIN)
    checkpoint.add(key(1), answer())
    shutil.rmtree(tmp_path / "runs")

    with pytest.raises(CheckpointError, match=r"1 answers could not be saved in .*runs"):
        checkpoint.flush()
    with pytest.raises(CheckpointError):
        checkpoint.close()
    assert not (tmp_path / "runs").exists()


def test_missing_parents_are_made_and_a_tilde_is_home(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))

    save("~/a/b", {1: answer()})

    assert found(tmp_path / "a" / "b", range(2)) == {1: answer()}


# What a run is told


def test_held_counts_distinct_paid_answers_of_anybody(tmp_path: Path) -> None:
    save(tmp_path, {1: answer(), 2: answer(), 3: answer(None, status="failed", error="x")})
    save(tmp_path, {2: answer(), 4: answer()})
    checkpoint = Checkpoint.open(tmp_path, ORIGIN)

    assert checkpoint.held == 3
    checkpoint.close()


def test_a_new_directory_holds_nothing_and_nothing_differs(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tmp_path / "new", ORIGIN)

    assert checkpoint.held == 0
    assert checkpoint.differs() is None
    checkpoint.close()


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ({}, None),
        ({"template": "Bad?"}, "the prompt has changed since"),
        ({"model": "gpt-4o"}, "the model was gpt-4o, now gpt-4o-mini"),
        ({"parameters": '{"temperature":0.2}'}, "temperature was 0.2, now 0"),
        ({"parameters": "not JSON"}, "temperature was not set, now 0"),
        ({"parameters": "{}"}, "temperature was not set, now 0"),
        ({"endpoint": "http://a/v1"}, "the endpoint was http://a/v1, now http://localhost:8000/v1"),
        (
            {"api": "responses", "template": "Bad?"},
            "the api was responses, now chat; the prompt has changed since",
        ),
        ({"parameters": '{"stop":"' + 50 * "x" + '","temperature":0}'}, "stop has changed since"),
    ],
)
def test_what_differs_is_said_in_words(tmp_path: Path, then: dict[str, str], said: str | None) -> None:
    save(tmp_path, {1: answer()}, origin=Origin("http://far/v1", "chat", "other", "{x}", "{}"))
    save(tmp_path, {1: answer()}, origin=dataclasses.replace(ORIGIN, **then))
    checkpoint = Checkpoint.open(tmp_path, ORIGIN)

    assert checkpoint.differs() == said
    checkpoint.close()


def test_a_flush_is_due_after_a_second_or_a_thousand_rows(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tmp_path, ORIGIN)
    start = time.monotonic()
    assert not checkpoint.due(start + 10 * FLUSH_S)

    checkpoint.add(key(0), answer())
    assert not checkpoint.due(start)
    assert checkpoint.due(start + FLUSH_S)

    for number in range(1, FLUSH_ROWS):
        checkpoint.add(key(number), answer())
    assert checkpoint.due(start)

    checkpoint.flush()
    assert not checkpoint.due(start + 10 * FLUSH_S)
    checkpoint.close()


# read_checkpoint


def dtypes(path: Path) -> dict[str, str]:
    return {name: str(dtype) for name, dtype in read_checkpoint(path).dtypes.items()}


def test_a_frame_of_a_checkpoint_has_the_same_types_whatever_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save(tmp_path / "failed", {1: answer(None, status="failed", error="503")})
    save(tmp_path / "full", {1: answer(["a", "b"]), 2: answer(prompt_tokens=3, cost_usd=0.5, latency_s=1.0)})

    types = dtypes(tmp_path / "full")

    assert types == dtypes(tmp_path / "empty") == dtypes(tmp_path / "failed")
    assert types["text"] == types["key"] == ("str" if pd.__version__ >= "3" else "string")
    assert types["prompt_tokens"] == "Int64"
    assert types["cost_usd"] == "Float64"
    assert types["answered_at"] == "datetime64[us, UTC]"
    assert list(read_checkpoint(tmp_path / "full")["status"].cat.categories) == list(STATUSES)


def test_a_frame_of_a_checkpoint_shows_what_was_answered_when_and_to_what(tmp_path: Path) -> None:
    save(tmp_path, {1: answer("one", prompt_tokens=5)})
    save(tmp_path, {2: answer(["a", "b"])})

    frame = read_checkpoint(tmp_path)

    assert frame["key"].tolist() == [key(1).hex(), key(2).hex()]
    assert frame["text"].tolist()[0] == "one"
    assert frame["text"].isna().tolist() == [False, True]
    assert frame["texts"].tolist() == [None, ["a", "b"]]
    assert frame["endpoint"].tolist() == [ORIGIN.endpoint] * 2
    assert frame["template"].tolist() == [ORIGIN.template] * 2
    now = dt.datetime.now(dt.UTC)
    assert ((now - frame["answered_at"]).dt.total_seconds() < 60).all()


def test_the_columns_of_a_frame_of_a_checkpoint_are_those_that_its_reference_names(tmp_path: Path) -> None:
    save(tmp_path, {1: answer()})
    reference = inspect.getdoc(read_checkpoint) or ""
    returns = reference[reference.index("Its columns:") : reference.index("Raises")]
    named = set(re.findall(r"``(\w+)``", returns)) - {"source", "ok"}
    assert named == set(read_checkpoint(tmp_path).columns)


def test_reading_a_checkpoint_that_is_not_there_makes_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_a_directory_of_parts_is_plain_parquet_for_other_tools(tmp_path: Path) -> None:
    live = Checkpoint.open(tmp_path, ORIGIN)
    live.add(key(1), answer("one"))
    live.flush()

    assert pd.read_parquet(tmp_path)["text"].tolist() == ["one"]
    live.close()


# Object stores


@pytest.fixture
def url() -> Iterator[str]:
    fsspec = pytest.importorskip("fsspec")
    where = f"memory://{uuid.uuid4().hex}/runs"
    yield where
    fs = fsspec.filesystem("memory")
    if fs.exists(where):
        fs.rm(where, recursive=True)


def test_an_object_store_gives_back_what_it_was_given(url: str) -> None:
    save(url, {1: answer("one"), 2: answer(None, status="failed", error="x")})

    assert found(url, range(4)) == {1: answer("one")}
    assert len(read_checkpoint(url)) == 2


def test_a_bucket_without_the_prefix_is_a_checkpoint_that_holds_nothing_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    bucket = moto.ThreadedMotoServer(port=0, verbose=False)
    bucket.start()
    try:
        host, port = bucket.get_host_and_port()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        s3fs.S3FileSystem().mkdir("bucket")
        with pytest.raises(CheckpointError, match="no checkpoint at s3://bucket/runs"):
            read_checkpoint("s3://bucket/runs")

        save("s3://bucket/runs", {1: answer("one")})

        assert found("s3://bucket/runs", range(2)) == {1: answer("one")}
    finally:
        bucket.stop()
        s3fs.S3FileSystem.clear_instance_cache()


def test_fifty_flushes_leave_a_handful_of_objects(url: str) -> None:
    import fsspec

    checkpoint = Checkpoint.open(url, ORIGIN)
    for number in range(50):
        checkpoint.add(key(number), answer(str(number)))
        checkpoint.flush()
    checkpoint.close()

    assert len(fsspec.filesystem("memory").ls(url)) <= 5
    assert len(found(url, range(50))) == 50


def test_objects_of_other_writers_are_never_merged(url: str) -> None:
    import fsspec

    for number in range(2 * FANOUT):
        save(url, {number: answer()})
    Checkpoint.open(url, ORIGIN).close()

    assert len(fsspec.filesystem("memory").ls(url)) == 2 * FANOUT


def test_a_torn_object_is_reported_by_name(url: str) -> None:
    import fsspec

    save(url, {1: answer()})
    fs = fsspec.filesystem("memory")
    (name,) = fs.ls(url, detail=False)
    fs.pipe_file(name, fs.cat_file(name)[:100])

    with pytest.warns(LLMFrameWarning, match="torn"):
        assert found(url, range(2)) == {}


def test_a_network_that_fails_is_not_taken_for_a_torn_object(url: str, monkeypatch) -> None:
    from fsspec.implementations.memory import MemoryFile

    save(url, {1: answer()})
    checkpoint = Checkpoint.open(url, ORIGIN)

    def fail(*_: object) -> bytes:
        raise RuntimeError("connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFile, "read", fail, raising=False)
        with pytest.raises(CheckpointError, match="could not be read: connection reset"):
            list(asked(checkpoint, [1]))
    assert dict(asked(checkpoint, [1])) == {1: answer()}
    checkpoint.close()


def test_an_object_store_without_its_package_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ConfigurationError, match=r"llmframe-pandas\[fs\]"):
        Checkpoint.open("s3://bucket/runs", ORIGIN)


def test_an_unknown_scheme_is_refused() -> None:
    pytest.importorskip("fsspec")
    with pytest.raises(ConfigurationError, match="nonsense"):
        Checkpoint.open("nonsense://bucket/runs", ORIGIN)


def test_the_stored_columns_are_those_of_a_completion() -> None:
    derived = {"parsed", "source"}
    bookkeeping = {"key", "texts", "embedding", "answered_at", "origin"}
    assert set(COLUMNS.names) - bookkeeping == {field.name for field in dataclasses.fields(Completion)} - derived


# An index that is kept


def test_a_kept_index_reads_no_part_twice_and_finds_what_came_and_what_was_merged(tmp_path: Path) -> None:
    index = Index()
    for number in range(2 * FANOUT):
        checkpoint = Checkpoint.open(tmp_path, ORIGIN, index)
        known = set(index.parts)
        checkpoint.add(key(number), answer(str(number)))
        checkpoint.flush()
        got = dict(asked(checkpoint, range(2 * FANOUT)))
        assert {each: answered.text for each, answered in got.items()} == {n: str(n) for n in range(number + 1)}
        assert len(index) == checkpoint.held == number + 1
        assert len(set(index.parts) - known) <= 2  # what was added, and what a merge left
        checkpoint.close()


def test_a_kept_index_takes_45_bytes_an_answer_at_most(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tmp_path, ORIGIN)
    for number in range(5_000):
        checkpoint.add(key(number), answer())
    checkpoint.flush()
    index = Index()
    (path,) = parts(tmp_path)
    index.add(path.name, Part(pa.OSFile(str(path), "rb")).heads())
    (held,) = index._parts.values()
    assert held.keys.nbytes + held.rows.nbytes + held.answered_at.nbytes <= 45 * 5_000
    checkpoint.close()


def test_a_search_is_not_disturbed_by_another_on_the_same_index_with_an_older_list(tmp_path: Path, monkeypatch) -> None:
    others: list[threading.Thread] = []

    class Disturbed(Index):
        def find(self, keys: npt.NDArray[np.void]) -> Iterator[Hits]:
            if not others:
                others.append(threading.Thread(target=lambda: list(asked(other, [1]))))
                others[0].start()
                others[0].join(0.2)
            return super().find(keys)

    index = Disturbed()
    one, other = (Checkpoint.open(tmp_path, ORIGIN, index) for _ in range(2))
    older = other._storage.parts()
    monkeypatch.setattr(other._storage, "parts", lambda: older)
    one.add(key(1), answer("one"))
    one.flush()

    assert dict(asked(one, [1])) == {1: answer("one")}
    others[0].join()
    one.close(tidy=False)
    other.close(tidy=False)
