"""Sources: the rows of parquet, csv or JSON-lines files, at a path, in a directory or behind a glob, part after part.

What can be known of a file is known when it is opened; nothing larger than a part is ever held.
"""

from __future__ import annotations

import glob
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import reduce
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.json
import pyarrow.parquet as pq

from llmframe.errors import ConfigurationError

__all__ = ["Piece", "Source", "filesystem_of", "frame_of"]

FORMATS = {
    **dict.fromkeys((".parquet", ".pq", ".parq"), "parquet"),
    ".csv": "csv",
    **dict.fromkeys((".jsonl", ".ndjson"), "json"),
}
OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}
_CONDITION = re.compile(rf"\s*(?P<column>.+?)\s*(?P<operator>{'|'.join(OPERATORS)})\s*(?P<value>.*?)\s*")
INTEGERS: dict[pa.DataType, pd.api.extensions.ExtensionDtype] = {
    pa.int8(): pd.Int8Dtype(),
    pa.int16(): pd.Int16Dtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.uint8(): pd.UInt8Dtype(),
    pa.uint16(): pd.UInt16Dtype(),
    pa.uint32(): pd.UInt32Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
}
PACKED = (".gz", ".bz2")  # a csv or JSON-lines file may have one of these after its own ending
TEXT_GROUP_ROWS = 131_072  # of a row group, where the source has none of its own
BLOCKS = (1 << 20, 1 << 24, 1 << 28)  # bytes of a text file read at once: a row has to fit


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of a source.

    Attributes
    ----------
    table : pyarrow.Table
        The rows.
    ends_group, ends_file : bool
        Whether the row group, or the file, ends with them.
    file : int
        Which of the source's files they are from.
    """

    table: pa.Table
    ends_group: bool
    ends_file: bool
    file: int


class Source:
    """The rows of one file or many.

    Parameters
    ----------
    where : str
        A path or fsspec URL of a file or a directory, or a glob.
    conditions : sequence of str
        Rows for which all of them hold: a column, an operator and a value each, as in ``score > 1``.
    limit : int, optional
        Rows, from the first.

    Raises
    ------
    ConfigurationError
        A file that is not there or cannot be read; a condition that is none.
    """

    def __init__(self, where: str, conditions: Sequence[str] = (), limit: int | None = None) -> None:
        filesystem, paths, base = _found(where)
        self.where = where
        self._filesystem, self._paths = filesystem, paths
        self.names = tuple(os.path.relpath(path, base) if base else PurePosixPath(path).name for path in paths)
        """Of the files, under the directory they are in."""
        self.one_file = base is None
        self._limit = limit
        self._files = [_opened(path, filesystem, conditions) for path in paths]
        if (conditions or limit is not None or base is not None) and any(file.labels for file in self._files):
            for file in self._files:  # all of them, so that they have the same columns
                file.write_labels()
        rows = sum(file.rows for file in self._files)
        self.rows = rows if limit is None else min(rows, limit)
        self.schemas = tuple(file.schema for file in self._files)

    def holds(self, files: Iterable[str]) -> bool:
        """Whether one of these is a file of the source, by whatever name."""
        local = isinstance(self._filesystem, pa.fs.LocalFileSystem)
        own = set().union(*map(_identities, self._paths)) if local else set(self._paths)
        for file in files:
            filesystem, path = filesystem_of(file)
            same = type(filesystem) is type(self._filesystem)
            if same and not own.isdisjoint(_identities(path) if local else {path}):
                return True
        return False

    def pieces(self, rows: int) -> Iterator[Piece]:
        """Read the files in order, so many rows at a time at most; a file of no rows is one piece."""
        left = self.rows
        for number, file in enumerate(self._files):
            if self._limit is not None and not left and number:
                return
            rest = min(left, file.rows)
            left -= rest
            if not rest:
                yield Piece(file.schema.empty_table(), True, True, number)
            for table, ends_group in file.tables(rows) if rest else ():
                part = table.slice(0, rest)
                rest -= part.num_rows
                if part.num_rows:
                    yield Piece(part, ends_group or not rest, not rest, number)
                if not rest:
                    break
            if rest:
                raise ConfigurationError(f"{self._paths[number]} has fewer rows than when the job began")


def frame_of(table: pa.Table) -> pd.DataFrame:
    """Give some rows to pandas, each value as it would be whatever rows are beside it.

    Raises
    ------
    ConfigurationError
        A column is of a type that pandas cannot take.
    """
    for number, column in enumerate(table.schema):
        if column.type == pa.time64("ns"):  # a time of Python has microseconds
            times = table.column(number).cast(pa.time64("us"), safe=False)
            table = table.set_column(number, column.with_type(times.type), times)
    # A null would make floats of a column's whole numbers, and 5 would be 5.0 in the prompts of its part.
    holed = {
        column.type: INTEGERS[column.type] for column in table.columns if column.null_count and column.type in INTEGERS
    }
    try:
        frame: pd.DataFrame = table.to_pandas(types_mapper=holed.get)
    except pa.ArrowException as error:
        raise ConfigurationError(f"pandas cannot take the rows: {error}; give their column another type") from error
    return frame


def filesystem_of(where: str) -> tuple[pa.fs.FileSystem, str]:
    """Give the file system that a path or an fsspec URL is on, and the path there.

    Raises
    ------
    ConfigurationError
        fsspec or its backend is missing, or knows no such scheme.
    """
    scheme, separator, rest = where.partition("://")
    if not separator or scheme in ("file", "local"):
        return pa.fs.LocalFileSystem(), os.path.expanduser(rest if separator else where)
    try:
        from fsspec.core import url_to_fs

        remote, path = url_to_fs(where)
    except ImportError as error:
        raise ConfigurationError(
            f"{where} needs fsspec and its backend for {scheme}://: pip install 'llmframe-pandas[fs]'"
        ) from error
    except ValueError as error:
        raise ConfigurationError(f"{where} cannot be reached: {error}") from error
    return pa.fs.PyFileSystem(pa.fs.FSSpecHandler(remote)), path


def _identities(path: str) -> set[object]:
    """Give what tells that two names are one local file: where its links lead, and its inode where it exists."""
    try:
        found = os.stat(path)
    except OSError:
        return {os.path.realpath(path)}
    return {os.path.realpath(path), (found.st_dev, found.st_ino)}


def _found(where: str) -> tuple[pa.fs.FileSystem, list[str], str | None]:
    """Find the files, sorted, and the directory that they are in, where there may be many."""
    filesystem, path = filesystem_of(where)
    try:
        named = isinstance(filesystem, pa.fs.LocalFileSystem) and os.path.exists(path)
        if glob.has_magic(path) and not named:  # a name may have brackets of its own
            return filesystem, *_matching(filesystem, path, where)
        info = filesystem.get_file_info(path)
        if info.type == pa.fs.FileType.Directory:
            names = [each.path for each in filesystem.get_file_info(pa.fs.FileSelector(path, recursive=True))]
            files = [name for name in names if _is_table(os.path.relpath(name, path))]
            if not files:
                raise ConfigurationError(
                    f"no {', '.join(FORMATS)} file is in {where}; name a file or another directory"
                )
            return filesystem, sorted(files), path
    except ConfigurationError:
        raise
    except Exception as error:  # each backend of fsspec has exception types of its own
        raise ConfigurationError(f"{where} cannot be listed: {error}") from error
    if info.type == pa.fs.FileType.NotFound:
        raise ConfigurationError(f"there is no {where}; name a parquet, csv or jsonl file, a directory or a glob")
    return filesystem, [path], None


def _matching(filesystem: pa.fs.FileSystem, path: str, where: str) -> tuple[list[str], str]:
    if isinstance(filesystem, pa.fs.LocalFileSystem):
        files = [each for each in glob.glob(path, recursive=True) if os.path.isfile(each)]
    else:
        files = filesystem.handler.fs.glob(path)
    if not files:
        raise ConfigurationError(f"nothing matches {where}; name a parquet, csv or jsonl file, a directory or a glob")
    plain = []
    for step in path.split("/")[:-1]:
        if glob.has_magic(step):
            break
        plain.append(step)
    return sorted(files), "/".join(plain) or "."


def _is_table(name: str) -> bool:
    """Whether a file in a directory is one of the source's: not what Spark, or a checkpoint, keeps beside them."""
    steps = PurePosixPath(name.replace(os.sep, "/"))
    hidden = any(step.startswith((".", "_")) or step.endswith(".checkpoint") for step in steps.parts)
    return not hidden and _form(name) is not None


def _form(name: str) -> str | None:
    """Tell a file's format by its name."""
    stem, ending = os.path.splitext(name)
    form = FORMATS.get((os.path.splitext(stem)[1] if ending in PACKED else ending).lower())
    return None if form == "parquet" and ending in PACKED else form


def _opened(path: str, filesystem: pa.fs.FileSystem, conditions: Sequence[str]) -> _Parquet | _Text:
    form = _form(path) or "parquet"
    words = {"json": "JSON lines"}.get(form, form)
    try:
        return (_Parquet if form == "parquet" else _Text)(path, filesystem, conditions, form)
    except UnicodeDecodeError as error:  # of a column's name
        raise ConfigurationError(f"{path} is not UTF-8; convert it") from error
    except ConfigurationError:
        raise
    except Exception as error:  # each backend of fsspec has exception types of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigurationError(f"{path} cannot be read as {words}: {reason}") from error


class _Parquet:
    """A parquet file; row groups that a condition rules out are not read."""

    def __init__(self, path: str, filesystem: pa.fs.FileSystem, conditions: Sequence[str], form: str) -> None:
        self._file = pq.ParquetFile(path, filesystem=filesystem, pre_buffer=False)
        self.schema = self._file.schema_arrow
        self._filter = _filter(conditions, self.schema)
        self._range = _range_of(self.schema)
        self._labelled = False
        self._groups = list(range(self._file.num_row_groups))
        self.rows = self._file.metadata.num_rows
        if self._filter is not None:
            table = ds.dataset(path, format=form, filesystem=filesystem)
            kept = [fragment.subset(filter=self._filter) for fragment in table.get_fragments()]
            self._groups = [group.id for fragment in kept for group in fragment.row_groups]
            self.rows = table.count_rows(filter=self._filter)

    @property
    def labels(self) -> bool:
        """Whether its rows have labels that only the whole file can be given: pandas notes a range, and no column."""
        return self._range is not None and (self._range["start"], self._range["step"]) != (0, 1)

    def write_labels(self) -> None:
        """Let the rows' labels be a column, where pandas has noted a range."""
        if self._range is not None:
            self._labelled = True
            self.schema = _with_labels(self.schema, self._range)

    def tables(self, rows: int) -> Iterator[tuple[pa.Table, bool]]:
        sizes = [self._file.metadata.row_group(group).num_rows for group in range(self._file.num_row_groups)]
        starts = [0, *accumulate(sizes)]
        for group in self._groups:
            at, left = starts[group], sizes[group]
            for batch in self._file.iter_batches(rows, row_groups=[group]):
                columns = batch.columns
                if self._labelled:
                    columns = [*columns, _labels(self._range, at, batch.num_rows)]
                at += batch.num_rows
                left -= batch.num_rows
                # The reader leaves the file's own metadata out of its batches.
                table = pa.Table.from_arrays(columns, schema=self.schema)
                yield table if self._filter is None else table.filter(self._filter), left == 0


def _range_of(schema: pa.Schema) -> Any:
    """Give the range that pandas has noted in place of an index column, if any."""
    noted = json.loads((schema.metadata or {}).get(b"pandas", b"{}"))
    ranges = [each for each in noted.get("index_columns", ()) if isinstance(each, dict) and each["kind"] == "range"]
    return ranges[0] if ranges else None


def _labels(noted: Mapping[str, Any], at: int, count: int) -> pa.Array:
    start, step = noted["start"] + at * noted["step"], noted["step"]
    return pa.array(np.arange(start, start + count * step, step, dtype=np.int64))


def _with_labels(schema: pa.Schema, noted: Mapping[str, Any]) -> pa.Schema:
    """Add the column that pandas writes for an index which is no range."""
    name = noted["name"]
    field = name if name is not None and name not in schema.names else "__index_level_0__"
    pandas = json.loads(schema.metadata[b"pandas"])
    kinds = {"pandas_type": "int64", "numpy_type": "int64", "metadata": None}
    pandas["columns"] = [*pandas["columns"], {"name": name, "field_name": field, **kinds}]
    pandas["index_columns"] = [field]
    more = {**schema.metadata, b"pandas": json.dumps(pandas).encode()}
    return schema.append(pa.field(field, pa.int64())).with_metadata(more)


class _Text:
    """A csv or JSON-lines file. Its types are those of its first block, and have to hold to its end."""

    labels = False

    def __init__(self, path: str, filesystem: pa.fs.FileSystem, conditions: Sequence[str], form: str) -> None:
        for block in BLOCKS:
            try:
                self._read_through(path, filesystem, conditions, form, block)
            except pa.ArrowInvalid as error:
                if "block size" not in str(error):
                    raise
            else:
                return
        raise ConfigurationError(f"{path} has a row of more than {BLOCKS[-1] >> 20} MB; is a quote in it not closed?")

    def _read_through(
        self, path: str, filesystem: pa.fs.FileSystem, conditions: Sequence[str], form: str, block: int
    ) -> None:
        """Read it once, so many bytes at a time: a line that does not parse is found before anything is paid."""
        self._table = ds.dataset(path, format=_text_format(form, block), filesystem=filesystem)
        if form == "json":
            kinds = pa.schema([field.with_type(_without_times(field.type)) for field in self._table.schema])
            self._table = ds.dataset(path, schema=kinds, format=_text_format(form, block), filesystem=filesystem)
        self.schema = self._table.schema
        for name, kind in zip(self.schema.names, self.schema.types, strict=True):
            if pa.types.is_binary(kind):  # what the reader makes of text that is not
                raise ConfigurationError(f"{path}: column {name!r} is not UTF-8; convert it")
        texts = [number for number, kind in enumerate(self.schema.types) if pa.types.is_string(kind)]
        self._texts = texts if form == "csv" else []
        self._filter = _filter(conditions, self.schema)
        self.rows = 0
        for batch in self._batches(TEXT_GROUP_ROWS):
            batch.validate(full=True)  # JSON is taken as it comes, UTF-8 or not
            self.rows += batch.num_rows

    def write_labels(self) -> None:
        """Do nothing: no range is noted in it."""

    def _batches(self, rows: int) -> Iterable[pa.RecordBatch]:
        batches: Iterable[pa.RecordBatch] = self._table.to_batches(
            filter=self._filter, batch_size=rows, batch_readahead=2, fragment_readahead=1
        )
        return batches

    def tables(self, rows: int) -> Iterator[tuple[pa.Table, bool]]:
        taken = 0
        for batch in self._batches(rows):
            taken += batch.num_rows
            columns = batch.columns
            for number in self._texts:  # an empty cell of csv is a missing value, as it is for pandas
                empty = pc.fill_null(pc.equal(columns[number], ""), False)
                # With pyarrow 17 what if_else makes of a slice is damaged.
                columns[number] = pc.replace_with_mask(columns[number], empty, pa.scalar(None, pa.string()))
            yield pa.Table.from_arrays(columns, schema=self.schema), taken >= TEXT_GROUP_ROWS
            taken %= TEXT_GROUP_ROWS


def _without_times(kind: pa.DataType) -> pa.DataType:
    """Give a type with text in place of times: JSON has none, and the reader takes text that looks like one for it."""
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_times(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_times(field.type)) for field in kind])
    return kind


def _text_format(form: str, block: int) -> ds.FileFormat:
    if form == "csv":
        return ds.CsvFileFormat(
            read_options=pa.csv.ReadOptions(block_size=block),
            parse_options=pa.csv.ParseOptions(newlines_in_values=True),  # or a block may end in a quoted cell
        )
    return ds.JsonFileFormat(read_options=pa.json.ReadOptions(block_size=block))


def _filter(conditions: Sequence[str], schema: pa.Schema) -> ds.Expression | None:
    return reduce(operator.and_, (_condition(text, schema) for text in conditions)) if conditions else None


def _condition(text: str, schema: pa.Schema) -> ds.Expression:
    said = _CONDITION.fullmatch(text)
    if said is None:
        raise ConfigurationError(
            f"where={text!r} is no condition; write a column, an operator and a value: 'score > 1'"
        )
    name = said["column"]
    if name not in schema.names:
        near = get_close_matches(name, schema.names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(schema.names)}"
        raise ConfigurationError(f"where={text!r}: no column {name!r}; {hint}")
    kind = schema.field(name).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    words = said["value"]
    if len(words) > 1 and words[0] == words[-1] and words[0] in "'\"":
        words = words[1:-1]
    try:
        if pa.types.is_string(plain) or pa.types.is_large_string(plain):
            value = pa.scalar(words, plain)
        elif pa.types.is_boolean(plain) or pa.types.is_integer(plain) or pa.types.is_floating(plain):
            given = json.loads(words.lower())
            if isinstance(given, bool) is not pa.types.is_boolean(plain):
                raise ValueError(words)
            # 1.5 is a bound for whole numbers too.
            value = pa.scalar(given, None if isinstance(given, float) else plain)
        elif pa.types.is_timestamp(plain):
            moment = pd.Timestamp(words)
            value = pa.scalar(moment.tz_localize(plain.tz) if plain.tz and moment.tz is None else moment, plain)
        else:
            value = pa.scalar(words).cast(plain)
        if not value.is_valid:  # nothing equals it, nor differs
            raise ValueError(words)
    except (ValueError, pa.ArrowException) as error:
        raise ConfigurationError(f"where={text!r}: {words!r} is no value for a column of {plain}") from error
    column = ds.field(name) if plain is kind else ds.field(name).cast(plain)
    return OPERATORS[said["operator"]](column, value)
