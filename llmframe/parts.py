"""One part file of a checkpoint: its columns, how rows become its bytes, and how it is read back.

Nothing is believed of a file that is not whole and ours: its footer names the format, each known column has exactly
its type, each page's checksum is verified, and whatever else pyarrow stumbles over ends in `NotAPart`. A file that
could not be read may be sound, and is `Unread`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import repeat
from operator import attrgetter, itemgetter
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from llmframe.messages import well_formed
from llmframe.origins import Origin
from llmframe.requests import KEY_BYTES
from llmframe.results import INT64, PAID, Completion
from llmframe.vectors import Embeddings

__all__ = [
    "COLUMNS",
    "FORMAT",
    "Heads",
    "NewerFormat",
    "NotAPart",
    "Part",
    "PartWriter",
    "Rows",
    "Unread",
    "completions",
    "embeddings",
    "renumbered",
    "write_rows",
]

FORMAT = 1
"""Raised only when an older reader would misread; a column more or less does not need it."""

COLUMNS = pa.schema(
    [
        ("key", pa.binary(32)),
        ("status", pa.string()),
        ("text", pa.string()),
        ("texts", pa.list_(pa.string())),  # in place of text, under n=
        ("error", pa.string()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("cached_tokens", pa.int64()),
        ("reasoning_tokens", pa.int64()),
        ("cost_usd", pa.float64()),
        ("latency_s", pa.float64()),
        ("attempts", pa.int64()),
        ("finish_reason", pa.string()),
        ("model", pa.string()),
        ("request_id", pa.string()),
        ("tool_calls", pa.string()),
        ("reasoning", pa.string()),
        ("embedding", pa.binary()),  # float32, the low byte first: as a list it would take four times as long
        ("answered_at", pa.timestamp("us", "UTC")),
        ("origin", pa.int32()),  # which of the footer's origins the row was asked with
    ]
)
REQUIRED = ("key", "status", "text")  # without one of these there is no answer to give back

PIECE_BYTES = 1 << 20  # what a checksum is taken over at once
GROUP_ROWS = 16_384  # what a reader decodes at once
GROUP_BYTES = 8 << 20  # the same for long texts and vectors, of which a merge holds four or five copies
REPEATING = ["status", "text", "texts.list.element", "error", "finish_reason", "model", "attempts", "origin"]

_LEAVES = ["texts.list.element" if name == "texts" else name for name in COLUMNS.names]

_FORMAT = b"llmframe.format"
_COLUMNS = b"llmframe.columns"  # pages have checksums, but a damaged footer could rename a column away
_ORIGINS = b"llmframe.origins"
_SUM = b"llmframe.sum"  # page headers and the footer have no checksum of parquet's own: this one is of the whole part
_UNSUMMED = b"%d " + b"#" * 10  # what stands in the place of the checksum while it is taken
_PAID = pa.array(sorted(PAID))
_DERIVED: Mapping[str, object] = {"parsed": None, "source": "checkpoint"}  # not stored
_FIELDS = tuple(field.name for field in fields(Completion))

Row = tuple[bytes, Completion, int]
"""A key, its completion, and when it was answered, in microseconds since 1970."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Keys, their embeddings, and when they were answered: many rows at once, as one request gives them."""

    keys: npt.NDArray[np.void]
    found: Embeddings
    answered_at: int

    def table(self) -> pa.Table:
        """Lay them out as `COLUMNS`."""
        count = len(self.keys)
        vectors = np.ascontiguousarray(self.found.vectors, "<f4")
        offsets = np.arange(count + 1, dtype=np.int32) * np.int32(4 * vectors.shape[1])
        tokens, costs, latencies = self.found.prompt_tokens, self.found.cost_usd, self.found.latency_s
        stored = {
            "key": pa.Array.from_buffers(pa.binary(KEY_BYTES), count, [None, pa.py_buffer(self.keys)]),
            "status": pa.repeat(pa.scalar("ok"), count),
            "prompt_tokens": pa.array(tokens, mask=tokens < 0),
            "cost_usd": pa.array(costs, mask=np.isnan(costs)),
            "latency_s": pa.array(latencies, mask=np.isnan(latencies)),
            "attempts": pa.array(self.found.attempts),
            "model": pa.array(self.found.models, pa.string()),
            "request_id": pa.array(self.found.request_ids, pa.string()),
            "embedding": pa.Array.from_buffers(
                pa.binary(), count, [None, pa.py_buffer(offsets), pa.py_buffer(vectors)]
            ),
            "answered_at": pa.array(np.full(count, self.answered_at), pa.timestamp("us", "UTC")),
            "origin": pa.array(np.zeros(count, np.int32)),
        }
        columns = [stored[each.name] if each.name in stored else pa.nulls(count, each.type) for each in COLUMNS]
        return pa.Table.from_arrays(columns, schema=COLUMNS)


def embeddings(table: pa.Table) -> tuple[npt.NDArray[np.intp], Embeddings] | None:
    """Give the embeddings among rows read by `Part.take`, and their places; None where there are none.

    All are of one length, that of the first: the same request has no other.
    """
    with _decoding():
        column = table["embedding"].combine_chunks()
        sizes = pc.binary_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        sound = (sizes > 0) & (sizes % 4 == 0) & pc.equal(table["status"], "ok").fill_null(False).to_numpy()
        if not sound.any():
            return None
        places = np.flatnonzero(sound & (sizes == sizes[sound][0]))
        chosen = table.take(pa.array(places))
        column = chosen["embedding"].combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks)
        start = int(np.frombuffer(column.buffers()[1], np.int32)[column.offset])
        count = len(places) * int(sizes[places[0]]) // 4
        vectors = np.frombuffer(column.buffers()[2], "<f4", count, start).reshape(len(places), -1)
        return places, Embeddings(
            vectors=vectors,
            prompt_tokens=chosen["prompt_tokens"].fill_null(-1).to_numpy(),
            cost_usd=chosen["cost_usd"].fill_null(float("nan")).to_numpy(),
            latency_s=chosen["latency_s"].fill_null(float("nan")).to_numpy(),
            attempts=chosen["attempts"].fill_null(0).to_numpy(),
            models=chosen["model"].to_pylist(),
            request_ids=chosen["request_id"].to_pylist(),
        )


class NotAPart(Exception):
    """The file is torn, damaged or not ours."""


class Unread(Exception):
    """The disk or the network failed, which says nothing of the file; its cause is the `OSError`."""


class NewerFormat(Exception):
    """The file is ours, of a format that this version would misread."""


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """What decides which row of a key is given back, for every row of a part, in order."""

    keys: npt.NDArray[np.void]
    paid: npt.NDArray[np.bool_]
    answered_at: npt.NDArray[np.int64]


def write_rows(file: pa.NativeFile | IO[bytes], rows: Sequence[Row | Rows], origin: Origin) -> None:
    """Write rows as one part."""
    with PartWriter(file, [origin]) as part:
        single = [row for row in rows if not isinstance(row, Rows)]
        if single or not rows:
            part.write(_table(single))
        for row in rows:
            if isinstance(row, Rows):
                part.write(row.table())


def _table(rows: Sequence[Row]) -> pa.Table:
    answers = list(map(itemgetter(1), rows))
    texts = [answer.text for answer in answers]
    lists = any(isinstance(text, list) for text in texts)
    stored: dict[str, Iterable[Any]] = {
        "key": map(itemgetter(0), rows),
        "text": [text if isinstance(text, str) else None for text in texts] if lists else texts,
        "texts": [text if isinstance(text, list) else None for text in texts] if lists else repeat(None, len(rows)),
        "embedding": repeat(None, len(rows)),
        "answered_at": map(itemgetter(2), rows),
        "origin": repeat(0, len(rows)),
    }
    columns = [
        _column(list(stored[field.name] if field.name in stored else map(attrgetter(field.name), answers)), field.type)
        for field in COLUMNS
    ]
    return pa.Table.from_arrays(columns, schema=COLUMNS)


def completions(table: pa.Table) -> list[Completion]:
    """Build the completions of rows read by `Part.take`."""
    columns: dict[str, Iterable[Any]] = {name: repeat(value) for name, value in _DERIVED.items()}
    with _decoding():
        for name in _FIELDS:
            if name not in columns:
                columns[name] = table[name].to_pylist()
        if table["texts"].null_count < table.num_rows:
            pairs = zip(table["texts"].to_pylist(), columns["text"], strict=True)
            columns["text"] = [text if texts is None else texts for texts, text in pairs]
        columns["attempts"] = [attempts or 0 for attempts in columns["attempts"]]
    return list(map(Completion, *(columns[name] for name in _FIELDS)))


class Part:
    """A part, opened: its footer is read and its columns have the right types."""

    def __init__(self, file: pa.NativeFile | IO[bytes]) -> None:
        self._bytes = file
        import pyarrow.parquet as pq  # a tenth of the time that `import llmframe` would take

        with _decoding():
            self._file = pq.ParquetFile(file, page_checksum_verification=True)
            found = self._file.schema_arrow
            metadata = self._file.metadata.metadata or {}
        self.origins = _read_metadata(metadata)
        self._sum = metadata.get(_SUM)  # None in a part of a llmframe that wrote none, and once it was found right
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        if sum(sizes) != self._file.metadata.num_rows:
            raise NotAPart("it has lost a row group")
        if metadata.get(_COLUMNS, b"").decode("utf-8", "replace").split(" ") != found.names:
            raise NotAPart("its columns are not those it was written with")
        self.rows = sum(sizes)
        """How many answers it holds, failures among them."""
        self.extra = [name for name in found.names if name not in COLUMNS.names]
        """Columns of a later llmframe, which a rewriting would lose."""
        for name in REQUIRED:
            if name not in found.names:
                raise NotAPart(f"it has no column {name!r}")
        self._names = [name for name in COLUMNS.names if name in found.names]
        for name in self._names:
            if found.names.count(name) > 1 or found.field(name).type != COLUMNS.field(name).type:
                raise NotAPart(f"its column {name!r} is not of type {COLUMNS.field(name).type}")

    def heads(self) -> Heads:
        """Read the key, the status and the time of every row."""
        keys, paid, times = [], [], []
        with _decoding():
            for group in range(self._file.num_row_groups):
                table = self._read(group, ["key", "status", "answered_at"])
                keys.append(_keys(table["key"].combine_chunks()))
                paid.append(pc.is_in(table["status"], value_set=_PAID).to_numpy())
                times.append(table["answered_at"].cast(pa.int64()).fill_null(0).to_numpy())
        if not keys:
            return Heads(np.empty(0, f"V{KEY_BYTES}"), np.empty(0, np.bool_), np.empty(0, np.int64))
        return Heads(np.concatenate(keys), np.concatenate(paid), np.concatenate(times))

    def take(self, rows: npt.NDArray[np.int64]) -> Iterator[pa.Table]:
        """Decode the rows with these ascending numbers, a row group at a time."""
        start = 0
        for group in range(self._file.num_row_groups):
            end = start + self._file.metadata.row_group(group).num_rows
            chosen = rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)] - start
            if len(chosen):
                with _decoding():
                    table = self._read(group, COLUMNS.names)
                    if len(chosen) < table.num_rows:
                        table = table.take(pa.array(chosen))
                yield table
            start = end

    def _read(self, group: int, names: Sequence[str]) -> pa.Table:
        """Read columns of one row group; one that an older llmframe did not write is null."""
        self._check_sum()
        rows = self._file.metadata.row_group(group).num_rows
        present = [name for name in names if name in self._names]
        table = self._file.read_row_group(group, columns=present, use_threads=False)
        table.validate(full=True)  # pyarrow itself takes any bytes for text
        if table.num_rows != rows:
            raise NotAPart(f"its row group {group} has {table.num_rows} rows in place of {rows}")
        if table["key"].null_count:
            raise NotAPart("it has a row without a key")
        columns = [table[name] if name in present else pa.nulls(rows, COLUMNS.field(name).type) for name in names]
        return pa.Table.from_arrays(columns, schema=pa.schema([COLUMNS.field(name) for name in names]))

    def _check_sum(self) -> None:
        """Compare the part with the checksum in its footer, once."""
        written, self._sum = self._sum, None
        if written is None:
            return
        left, found = 0, 0
        if written.count(b" ") == 1 and written.replace(b" ", b"").isdigit():
            left = int(written.split()[0])
        length = left
        self._bytes.seek(0)
        while left and (piece := self._bytes.read(min(left, PIECE_BYTES))):
            found = zlib.crc32(piece, found)
            left -= len(piece)
        footer = self._bytes.read().replace(written, _UNSUMMED % length)
        if _sum(length, found, footer) != written:
            raise NotAPart("it is torn or damaged: its checksum is wrong")


def _sum(length: int, before: int, footer: bytes) -> bytes:
    """Say where the footer begins, and the checksum of what stands before it and of the footer without its own sum."""
    return b"%d %010d" % (length, zlib.crc32(footer, before))


class _Summed:
    """A file that takes the checksum of what is written to it, and puts it into the footer."""

    def __init__(self, file: pa.NativeFile | IO[bytes]) -> None:
        self._file = file
        self._sum = 0
        self._footer: list[bytes] | None = None
        self.length = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        if self._footer is None:
            self._file.write(data)
            self._sum = zlib.crc32(data, self._sum)
        else:
            self._footer.append(data)
        self.length += len(data)
        return len(data)

    def begin_footer(self) -> bytes:
        """Hold back what is written from now on, and return what the footer has to hold in place of its sum."""
        self._footer = []
        return _UNSUMMED % self.length

    def end_footer(self, unsummed: bytes) -> None:
        """Write what was held back, with the sum in the place of `unsummed`."""
        assert self._footer is not None
        footer = b"".join(self._footer)
        self._file.write(footer.replace(unsummed, _sum(self.length - len(footer), self._sum, footer)))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:  # pyarrow's; the file is its owner's
        self.closed = True

    def tell(self) -> int:
        return self.length

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


class PartWriter:
    """Writes tables as one part, in row groups of a size that is good to read."""

    def __init__(self, file: pa.NativeFile | IO[bytes], origins: Sequence[Origin]) -> None:
        self._summed = _Summed(file)
        import pyarrow.parquet as pq  # see `Part`

        self._writer = pq.ParquetWriter(
            self._summed,
            COLUMNS,
            # What a model computes is as good as noise, and does not get smaller.
            compression={name: "none" if name == "embedding" else "zstd" for name in _LEAVES},
            use_dictionary=REPEATING,
            write_statistics=False,
            write_page_checksum=True,
            store_schema=False,  # every type is parquet's own
        )
        self._writer.add_key_value_metadata(
            {
                _FORMAT: str(FORMAT),
                _COLUMNS: " ".join(COLUMNS.names),
                _ORIGINS: orjson.dumps(list(origins)),
            }
        )
        self._waiting: list[pa.Table] = []

    def write(self, table: pa.Table) -> None:
        """Add rows laid out as `COLUMNS`."""
        self._waiting.append(table)
        if (
            sum(table.num_rows for table in self._waiting) >= GROUP_ROWS
            or sum(table.nbytes for table in self._waiting) >= GROUP_BYTES
        ):
            self._write_group()

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._writer.close()
            return
        try:
            self._write_group()
            unsummed = self._summed.begin_footer()
            self._writer.add_key_value_metadata({_SUM: unsummed})
        finally:
            self._writer.close()
        self._summed.end_footer(unsummed)

    def _write_group(self) -> None:
        if self._waiting:
            table = pa.concat_tables(self._waiting)
            self._waiting = []
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))


def renumbered(table: pa.Table, numbers: Sequence[int]) -> pa.Table:
    """Point each row to its origin's number in another part."""
    index = COLUMNS.get_field_index("origin")
    old = table["origin"].to_numpy(zero_copy_only=False)  # floats where one is null
    known = (old >= 0) & (old < len(numbers))
    new = np.asarray(numbers or [0], np.int32)[np.where(known, old, 0).astype(np.int64)]
    return table.set_column(index, COLUMNS.field(index), pa.array(new, pa.int32(), mask=~known))


def _column(values: list[Any], type_: pa.DataType) -> pa.Array | pa.ChunkedArray:
    try:
        return pa.array(values, type_)
    except (UnicodeEncodeError, OverflowError, pa.ArrowInvalid):
        # An endpoint may say what a column cannot hold; one such row must not keep the others off the disk.
        return pa.array([_fitting(value) for value in values], type_)


def _fitting(value: Any) -> Any:
    if isinstance(value, str):
        return well_formed(value)
    if isinstance(value, list):
        return [_fitting(each) for each in value]
    if isinstance(value, int) and value not in INT64:
        return None
    return value


def _keys(array: pa.Array) -> npt.NDArray[np.void]:
    if len(array) == 0:
        return np.empty(0, f"V{KEY_BYTES}")
    return np.frombuffer(array.buffers()[1], f"V{KEY_BYTES}", len(array), array.offset * KEY_BYTES)


def _read_metadata(metadata: Mapping[bytes, bytes]) -> tuple[Origin, ...]:
    written = metadata.get(_FORMAT)
    if written is None:
        raise NotAPart("it was not written by llmframe")
    if not written.isdigit():
        raise NotAPart(f"its format version is {written!r}")
    if int(written) > FORMAT:
        raise NewerFormat(
            f"it is of checkpoint format {int(written)}, and this llmframe reads formats up to {FORMAT}; upgrade "
            "llmframe, or name another directory"
        )
    try:
        origins = orjson.loads(metadata.get(_ORIGINS, b"[]"))
        return tuple(Origin(*(str(each[field.name]) for field in fields(Origin))) for each in origins)
    except (ValueError, TypeError, KeyError) as error:
        raise NotAPart(f"its origins cannot be read: {error}") from error


@contextmanager
def _decoding() -> Iterator[None]:
    """Let whatever a damaged file makes pyarrow raise come out as `NotAPart`, and nothing else.

    What a signal's handler raises has to reach its owner, and no memory today is no reason to pay for answers again.
    """
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None:
            raise Unread(str(error)) from error
        if type(error) is not OSError:  # the type of what pyarrow raises for bytes that it cannot take
            raise
        raise _damaged(error) from error
    except (pa.ArrowException, ValueError, TypeError, LookupError) as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> NotAPart:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return NotAPart(f"it is torn or damaged: {reason}")
