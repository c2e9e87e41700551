"""Sinks: parquet files that have their name when they are whole and never before."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import pandas as pd
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from llmframe.errors import ConfigurationError
from llmframe.sources import filesystem_of
from llmframe.storage import Directory, written

GROUP_BYTES = 128 << 20  # of a row group that is held back until it is whole
_LEFTOVER = re.compile(r"\.(?P<name>.+)-(?P<writer>[0-9a-f]{16})\.tmp")


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
