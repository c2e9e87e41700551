"""Sinks: one parquet file, written part by part, that has its name when it is whole and never before."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from llmframe.sources import filesystem_of

GROUP_BYTES = 128 << 20  # of a row group that is held back until it is whole


class Sink:
    """A file to be, local or at an fsspec URL.

    Parameters
    ----------
    where : str
        Its name. What has it already stays until the new file is whole.
    """

    def __init__(self, where: str) -> None:
        filesystem, path = filesystem_of(where)
        self._file: _Local | _Remote = (
            _Local(Path(path))
            if isinstance(filesystem, pa.fs.LocalFileSystem)
            else _Remote(filesystem.handler.fs, path)
        )
        self._writer: pq.ParquetWriter | None = None
        self._held: list[pa.Table] = []

    def write(self, table: pa.Table, ends_group: bool) -> None:
        """Take a part; its row group is written when it is whole."""
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._file.begin(), table.schema, compression="zstd")
        self._held.append(table.cast(self._writer.schema))
        if ends_group or sum(each.nbytes for each in self._held) > GROUP_BYTES:
            self._flush()

    def finish(self) -> None:
        """Give the file its name."""
        self._flush()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._file.name_it()

    def close(self) -> None:
        """Leave nothing of a file that is not whole."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(OSError):
                writer.close()
        self._file.discard()

    def _flush(self) -> None:
        if self._writer is not None and self._held:
            whole = pa.concat_tables(self._held)
            self._held = []
            self._writer.write_table(whole, row_group_size=max(1, whole.num_rows))


class _Local:
    """Under a temporary name in the same directory, then renamed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}-{os.getpid()}.tmp")

    def begin(self) -> str:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return os.fspath(self._temporary)

    def name_it(self) -> None:
        with open(self._temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(self._temporary, self._path)

    def discard(self) -> None:
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)


class _Remote:
    """A multipart upload, which an object store shows when it is completed."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem = filesystem
        self._path = path
        self._file: Any = None

    def begin(self) -> Any:
        self._file = self._filesystem.open(self._path, "wb", autocommit=False)
        return self._file

    def name_it(self) -> None:
        file, self._file = self._file, None
        file.close()
        file.commit()

    def discard(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(Exception):  # each backend has exception types of its own, and none is news here
                file.discard()
