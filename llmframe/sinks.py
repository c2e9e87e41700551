"""Sinks: parquet files that have their name when they are whole and never before.

A row there is as it was in the source, with the new columns after its own.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pandas as pd
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from llmframe.errors import ConfigurationError
from llmframe.sources import Source, filesystem_of
from llmframe.storage import Directory, written

GROUP_BYTES = 128 << 20  # of a row group that is held back until it is whole
_LEFTOVER = re.compile(r"\.(?P<name>.+)-(?P<writer>[0-9a-f]{16})\.tmp")


def sink_names(where: str, source: Source) -> list[str]:
    """Name the file that each of the source's files goes to.

    Raises
    ------
    ConfigurationError
        Such a file cannot be, or is the source.
    """
    if where.endswith(".parquet") and os.path.isdir(os.path.expanduser(where)):
        raise ConfigurationError(f"{where} is a directory; name a file, or a directory that does not end in .parquet")
    if source.one_file and not os.path.isdir(where):
        if not where.endswith(".parquet"):
            raise ConfigurationError(f"{where} is written as parquet; give it a name that ends in .parquet")
        if "://" not in where and not Path(where).expanduser().parent.is_dir():
            raise ConfigurationError(f"{where} cannot be written: there is no {Path(where).parent}; make it first")
        names = [where]
    elif where.endswith(".parquet"):
        other = next((each for each in source.schemas if not each.equals(source.schemas[0])), None)
        if other is not None:
            raise ConfigurationError(
                f"the files of {source.where} have not all the same columns, and {where} is one file; name a directory"
            )
        names = [where] * len(source.names)
    else:
        names = [f"{where.rstrip('/')}/{os.path.splitext(name)[0]}.parquet" for name in source.names]
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise ConfigurationError(f"two files of {source.where} would be {twice}; rename one of them")
    if source.holds(names):
        raise ConfigurationError(f"{where} is where the source is; write to another place")
    return names


def with_columns(table: pa.Table, new: pd.DataFrame) -> pa.Table:
    """Give rows as they were, with new columns after their own; lists and dicts in these are JSON text."""
    new = new.reset_index(drop=True)
    for name in new:
        if new[name].dtype == object:
            new[name] = pd.array([_as_json(cell) for cell in new[name]], dtype="string")
    made = pa.Table.from_pandas(new, preserve_index=False)
    metadata = _metadata(table.schema.metadata, made.schema.metadata)
    for field, column in zip(made.schema, made.columns, strict=True):
        table = table.append_column(field, column)
    return table.replace_schema_metadata(metadata)


def _as_json(cell: Any) -> str | None:
    return None if cell is None else json.dumps(cell, ensure_ascii=False, default=str)


def _metadata(source: Mapping[bytes, bytes] | None, new: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Add the new columns to what pandas has noted of the old ones; without it they would come back as other types."""
    kept = dict(source or {})
    added = json.loads(new[b"pandas"])
    noted = json.loads(kept[b"pandas"]) if b"pandas" in kept else {**added, "columns": [], "index_columns": []}
    noted["columns"] = [*noted["columns"], *added["columns"]]
    kept[b"pandas"] = json.dumps(noted).encode()
    return kept


class Sink:
    """A file to be, local or at an fsspec URL, that is written part by part.

    Parameters
    ----------
    where : str
        Its name. What has it already stays until the new file is whole.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._whole = ExitStack()
        self._file = self._whole.enter_context(whole_file(where))
        self._writer: pq.ParquetWriter | None = None
        self._held: list[pa.Table] = []

    def write(self, table: pa.Table, ends_group: bool) -> None:
        """Take a part; its row group is written when it is whole."""
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file, table.schema, compression="zstd")
        self._held.append(table.cast(self._writer.schema))
        if ends_group or sum(each.nbytes for each in self._held) > GROUP_BYTES:
            self._flush()

    def finish(self) -> None:
        """Give the file its name."""
        self._flush()
        assert self._writer is not None
        self._writer.close()
        self._whole.close()

    def close(self) -> None:
        """Leave nothing of a file that is not whole."""
        with suppress(Exception):  # each backend has exception types of its own, and none is news here
            if self._writer is not None:
                self._writer.close()
        with suppress(Exception):
            self._whole.__exit__(_NotWhole, _NotWhole(), None)

    def _flush(self) -> None:
        if self._writer is not None and self._held:
            whole = pa.concat_tables(self._held)
            self._held = []
            self._writer.write_table(whole, row_group_size=max(1, whole.num_rows))


class _NotWhole(Exception):
    """What ends the block of a file that is to be forgotten."""


def write_whole(frame: pd.DataFrame, where: str) -> None:
    """Write a frame as a parquet file.

    Raises
    ------
    ConfigurationError
        It cannot be written; what had the name still has it.
    """
    filesystem, name = filesystem_of(where)
    if isinstance(filesystem, pa.fs.LocalFileSystem):
        if not Path(name).parent.is_dir():
            raise ConfigurationError(f"{where} cannot be written: there is no {Path(name).parent}; make it first")
        if Path(name).exists() and not Path(name).is_file():  # a device would become a file
            raise ConfigurationError(f"{where} cannot be written: it is there and no file; name another")
    try:
        sweep([where])
        with whole_file(where) as file:
            frame.to_parquet(file)
    except ConfigurationError:
        raise
    except Exception as error:  # each backend has exception types of its own
        raise ConfigurationError(f"{where} cannot be written: {error}") from error


@contextmanager
def whole_file(where: str) -> Iterator[IO[bytes]]:
    """Open a file that gets its name if no exception ends the block, and leaves nothing otherwise."""
    filesystem, name = filesystem_of(where)
    if not isinstance(filesystem, pa.fs.LocalFileSystem):
        with _uploaded(filesystem.handler.fs, name) as file:
            yield file
        return
    path, writer = Path(name).absolute(), os.urandom(8).hex()
    directory = Directory(path.parent)
    directory.claim(writer)
    try:
        with written(path, path.with_name(f".{path.name}-{writer}.tmp")) as file:
            yield file
    finally:
        directory.release()


@contextmanager
def _uploaded(filesystem: Any, path: str) -> Iterator[IO[bytes]]:
    """Open a multipart upload, which an object store shows when it is completed."""
    file = filesystem.open(path, "wb", autocommit=False)
    try:
        yield file
        file.close()
        file.commit()
    except BaseException:
        with suppress(Exception):
            file.discard()
        raise


def sweep(sinks: Iterable[str]) -> bool:
    """Delete what is left of these files where whoever wrote them was killed; whether somebody writes one of them now.

    Of a file at a URL that cannot be known.
    """
    busy = False
    names: dict[Path, set[str]] = {}
    for where in sinks:
        filesystem, path = filesystem_of(where)
        if isinstance(filesystem, pa.fs.LocalFileSystem):
            names.setdefault(Path(path).parent, set()).add(Path(path).name)
    for place, own in names.items():
        directory = Directory(place)
        with suppress(FileNotFoundError):
            left = [
                match for each in os.listdir(place) if (match := _LEFTOVER.fullmatch(each)) and match["name"] in own
            ]
            dead = directory.dead({match["writer"] for match in left})
            for match in left:
                if match["writer"] in dead:
                    directory.delete(match.string)
                else:
                    busy = True
    return busy
