"""Where the parts of a checkpoint lie: a local directory, or any place that fsspec reaches.

What has a part's name is whole and durable: a power cut leaves the part or nothing of it, never a piece. Who may tidy
up after others is settled by locks; where there are none (an object store), nobody does.
"""

from __future__ import annotations

import io
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from llmframe.errors import CheckpointError, ConfigurationError

if TYPE_CHECKING:
    import filelock

__all__ = ["Bucket", "Directory", "Names", "Storage", "storage_at", "unreadable", "writer_of", "written"]

LOCK_S = 10.0  # a lock of our own is contended only while somebody looks whether we are alive
_PART = re.compile(r"part-(?P<writer>[0-9a-f]+)-[0-9]+\.parquet")
_LEFTOVER = re.compile(r"\.(?:part|probe)-(?P<writer>[0-9a-f]+)\b.*\.tmp")
_LOCK = re.compile(r"\.(?P<writer>[0-9a-f]+)\.lock")


class Storage(Protocol):
    """What a checkpoint asks of the place its parts lie in. Failures are `OSError`, those of `open` aside."""

    def claim(self, writer: str) -> None:
        """Make the place if it is missing, prove that it can be written, and be known as alive until `release`."""

    def release(self) -> None:
        """Cease to be known as alive."""

    def parts(self) -> dict[str, int]:
        """List every parquet file with its size in bytes."""

    def open(self, name: str) -> AbstractContextManager[pa.NativeFile | IO[bytes]]:
        """Open a file to read.

        `FileNotFoundError` if it is gone, `PermissionError` if it may not be read, `CheckpointError` for any other
        trouble that may be over the next time: to go on without the file would be to pay for its answers again.
        """

    def write(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open a new file that gets its name, whole and durable, when the block ends without an exception."""

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""

    def remove_if_empty(self) -> None:
        """Delete the place itself, where nothing is in it."""

    def housekeeping(self) -> AbstractContextManager[bool]:
        """Hold the right to tidy up after others, and say whether it could be had; never wait for it."""

    def dead(self, writers: Iterable[str]) -> set[str]:
        """Say which writers are gone for good."""

    def sweep(self) -> None:
        """Delete what dead writers left unfinished."""


class Names:
    """The names of one writer's parts. Writers and their parts sort by age."""

    def __init__(self) -> None:
        self.writer = f"{time.time_ns() // 1_000_000:012x}{os.urandom(5).hex()}"
        """What the writer is called."""
        self._numbers = itertools.count(1)

    def new(self) -> str:
        """Give a name that no part has had."""
        return f"part-{self.writer}-{next(self._numbers):06d}.parquet"


def writer_of(name: str) -> str | None:
    """Say who wrote the part of this name; None if it is not the name of a part."""
    match = _PART.fullmatch(name)
    return match["writer"] if match else None


def storage_at(path: str | os.PathLike[str]) -> Storage:
    """Choose the storage for a path or URL; touches nothing."""
    where = os.fspath(path)
    scheme, separator, rest = where.partition("://")
    if not separator:
        return Directory(Path(where).expanduser().absolute())  # a run that goes on stays there whatever chdir does
    if scheme in ("file", "local"):
        return Directory(Path(rest))
    return Bucket(where)


@contextmanager
def written(path: Path, temporary: Path) -> Iterator[IO[bytes]]:
    """Open a local file under a temporary name; it gets its own, whole and durable, if no exception ends the block."""
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            _sync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_directory(path.parent)


class Directory:
    """A local directory. Writers are told from dead ones by a file lock each holds while it lives."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock: filelock.BaseFileLock | None = None

    def claim(self, writer: str) -> None:
        """Make the directory, write to it, and lock the writer's own file."""
        missing = [path for path in (self._path, *self._path.parents) if not path.exists()]
        self._path.mkdir(parents=True, exist_ok=True)
        for path in reversed(missing):
            _sync_directory(path.parent)
        probe = self._path / f".probe-{writer}.tmp"
        probe.write_bytes(b"llmframe\n")
        probe.unlink(missing_ok=True)  # another's sweep may be faster
        lock = self._file_lock(f".{writer}.lock")
        lock.acquire(timeout=LOCK_S)
        self._lock = lock

    def release(self) -> None:
        """Delete and release the writer's own lock."""
        if self._lock is not None:
            lock, self._lock = self._lock, None
            _retire(lock)

    def parts(self) -> dict[str, int]:
        """List the parquet files."""
        return _settled(self._list)

    def open(self, name: str) -> AbstractContextManager[pa.NativeFile]:
        """Open a part."""
        try:
            file: AbstractContextManager[pa.NativeFile] = pa.OSFile(os.fspath(self._path / name), "rb")
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            raise unreadable(os.fspath(self._path / name), error) from error
        return file

    def write(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Write under a temporary name; sync, rename, and sync the directory."""
        return written(self._path / name, self._path / f".{name}.tmp")

    def delete(self, name: str) -> None:
        """Delete a file, if it is there and nobody (on Windows) reads it."""
        with suppress(FileNotFoundError, PermissionError):
            (self._path / name).unlink()

    def remove_if_empty(self) -> None:
        """Delete the directory, if nothing is in it."""
        with suppress(OSError):
            self._path.rmdir()

    @contextmanager
    def housekeeping(self) -> Iterator[bool]:
        """Hold the directory's lock."""
        lock = self._file_lock(".housekeeping.lock")
        try:
            lock.acquire(timeout=0)
        except OSError:  # somebody else is at it, or the lock is not ours to take
            yield False
            return
        try:
            yield True
        finally:
            _retire(lock)

    def dead(self, writers: Iterable[str]) -> set[str]:
        """Find the writers whose lock nobody holds."""
        return {writer for writer in writers if not self._alive(writer)}

    def sweep(self) -> None:
        """Delete the locks and temporary files of dead writers."""
        names = os.listdir(self._path)
        leftovers = [(name, match["writer"]) for name in names if (match := _LEFTOVER.fullmatch(name))]
        locked = {match["writer"] for name in names if (match := _LOCK.fullmatch(name))}
        dead = self.dead(locked.union(writer for _, writer in leftovers))
        for name, writer in leftovers:
            if writer in dead:
                self.delete(name)

    def _list(self) -> dict[str, int]:
        sizes = {}
        with os.scandir(self._path) as entries:
            for entry in entries:
                if entry.name.endswith(".parquet") and not entry.name.startswith("."):
                    with suppress(FileNotFoundError):
                        if entry.is_file():
                            sizes[entry.name] = entry.stat().st_size
        return sizes

    def _alive(self, writer: str) -> bool:
        if not (self._path / f".{writer}.lock").exists():
            return False  # a writer has its lock before it has a file
        lock = self._file_lock(f".{writer}.lock")
        try:
            lock.acquire(timeout=0)
        except OSError:  # held, or not ours to take
            return True
        _retire(lock)
        return False

    def _file_lock(self, name: str) -> filelock.BaseFileLock:
        import filelock  # a tenth of the time that `import llmframe` would take

        # Not thread-local: a run may be closed by another thread than the one that opened it.
        return filelock.FileLock(self._path / name, thread_local=False)


class Bucket:
    """A place that fsspec reaches: one PUT a part, and no locks."""

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError as error:
            raise _missing_extra(url) from error
        try:
            self._fs, root = url_to_fs(url)
        except ImportError as error:
            raise _missing_extra(url) from error
        except ValueError as error:
            raise ConfigurationError(f"no checkpoint can be kept at {url!r}: {error}; use a directory") from error
        self._root = root.rstrip("/")
        self._claimed = False

    def claim(self, writer: str) -> None:
        """Make the place where places are made, and write to it."""
        probe = self._at(f".probe-{writer}")
        with _as_os_error():
            if self._fs.isfile(self._root):
                raise FileExistsError(self._root)
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(probe, b"llmframe\n")
            self._fs.rm_file(probe)
        self._claimed = True

    def release(self) -> None:
        """Do nothing: nobody can see whether a writer lives."""

    def parts(self) -> dict[str, int]:
        """List the parquet files."""
        return _settled(self._list)

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open a part; what the network does is told from what the bytes are."""
        try:
            file = _Watched(self._fs.open(self._at(name), "rb"))
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            raise unreadable(self._at(name), error) from error
        with file:
            try:
                yield file  # type: ignore[misc]  # all that pyarrow asks of a file
            except Exception:
                if file.failure is None:
                    raise
                if isinstance(file.failure, (FileNotFoundError, PermissionError)):
                    raise file.failure from None
                raise unreadable(self._at(name), file.failure) from file.failure

    @contextmanager
    def write(self, name: str) -> Iterator[IO[bytes]]:
        """Collect the bytes, then put them in one request."""
        buffer = io.BytesIO()
        yield buffer
        with _as_os_error():
            self._fs.pipe_file(self._at(name), buffer.getvalue())

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        with _as_os_error(), suppress(FileNotFoundError):
            self._fs.rm_file(self._at(name))

    def remove_if_empty(self) -> None:
        """Do nothing: a prefix is gone with its last object."""

    @contextmanager
    def housekeeping(self) -> Iterator[bool]:
        """Never hold the right."""
        yield False

    def dead(self, writers: Iterable[str]) -> set[str]:  # noqa: ARG002
        """Know of no dead writer."""
        return set()

    def sweep(self) -> None:
        """Do nothing: a PUT leaves nothing unfinished."""

    def _list(self) -> dict[str, int]:
        with _as_os_error():
            self._fs.invalidate_cache(self._root)
            try:
                entries = self._fs.ls(self._root, detail=True)
            except FileNotFoundError:  # an object store has no directory where there is no object
                if not self._claimed:
                    raise
                return {}
        names = ((entry["name"].rsplit("/", 1)[-1], entry) for entry in entries if entry["type"] == "file")
        return {name: int(entry["size"] or 0) for name, entry in names if name.endswith(".parquet")}

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"


class _Watched:
    """A remote file that remembers its failure, which pyarrow would pass on as one of many kinds."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.failure: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, size: int = -1) -> bytes:
        try:
            data: bytes = self._file.read(size)
        except Exception as error:
            self.failure = error
            raise
        return data


def _settled(listing: Callable[[], dict[str, int]]) -> dict[str, int]:
    """List until two listings name the same files.

    A merge names the new part before it deletes the old ones, but a listing takes time and can miss both: the new one
    came behind its back, the old one went before its eyes. Two that agree have missed nothing.
    """
    before, now = listing(), listing()
    while before.keys() != now.keys():
        before, now = now, listing()
    return now


def _missing_extra(url: str) -> ConfigurationError:
    scheme = url.partition("://")[0]
    return ConfigurationError(
        f"a checkpoint at {url!r} needs fsspec and its backend for {scheme}://: pip install 'llmframe-pandas[fs]'"
    )


def unreadable(where: str, error: BaseException | None) -> CheckpointError:
    """Build the error for a file that could not be read, though it is there and may be sound."""
    return CheckpointError(
        f"{where} could not be read: {error}; its answers would be paid for again, so try again, or move it away"
    )


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Let what a backend raises come out as `OSError`; each has exception types of its own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _retire(lock: filelock.BaseFileLock) -> None:
    """Delete a lock's file and release it."""
    # In this order nobody can lock the name that is about to go: filelock tries again when it finds its file deleted.
    # Windows does not delete an open file.
    if sys.platform == "win32":
        lock.release()
        with suppress(OSError):
            os.unlink(lock.lock_file)
    else:
        with suppress(OSError):
            os.unlink(lock.lock_file)
        lock.release()


def _sync(descriptor: int) -> None:
    if sys.platform == "darwin":
        import fcntl

        with suppress(OSError):  # a network file system may not know it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # there fsync stops at the drive's own cache
            return
    os.fsync(descriptor)


def _sync_directory(path: Path) -> None:
    if sys.platform == "win32":
        return  # a directory cannot be synced there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _sync(descriptor)
    finally:
        os.close(descriptor)
