"""The ledger of a Batch job: a directory that knows what was meant to be sent, what was sent, and what came of it.

What is about to be sent is on disk before it is sent. One process at a time writes; any may read at any time. It holds
prompts (until their answers are kept), and never a key.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import IO, Any, Literal

import filelock
import orjson

from llmframe.errors import ConfigurationError, LLMFrameError
from llmframe.results import Status, Usage
from llmframe.storage import Directory

FORMAT = 1  # of the directory; one of a later version is refused
LEDGER = "job.json"

Stage = Literal[
    "planned", "uploading", "uploaded", "creating", "running", "fetched", "collected", "closed", "withdrawn", "replaced"
]
"""How far a part has come. ``uploading`` and ``creating`` are intents: a crash leaves open whether they were done."""

OVER: frozenset[Stage] = frozenset({"closed", "withdrawn", "replaced"})
WAITING: frozenset[Stage] = frozenset({"planned", "uploaded"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One input file of a job and the batch made of it.

    Attributes
    ----------
    number : int
        Its place in the ledger; names its files.
    requests, bytes, tokens : int
        Of its input file; the tokens are a guess.
    stage : str
        How far it has come.
    attempt : int
        Which attempt at a batch of this file, from 0: those before were refused.
    rounds : int
        Times that its lines were sent before, without those that a validation named.
    refused : int
        Times in a row that it was refused for too many enqueued tokens.
    missing_since : float or None
        When its batch, or a part of what that gave, was first not found; in seconds since 1970.
    file_id, batch_id, output_file_id, error_file_id : str or None
        As the provider names them.
    status : str or None
        The provider's word for how far it is; ``lost`` where the batch is not to be found, and ``cut`` where files of
        it are not, or only in part, as far as that is to be seen.
    done, failed : int
        Requests so far, as the provider counts them.
    left : int
        Requests without an answer that can be asked again.
    taken : bool
        Whether those were: they are in another part.
    error : str or None
        Why the batch as a whole came to nothing, or what is missing in its files.
    usage, cost_usd : Usage, float or None
        What its answers cost.
    """

    number: int
    requests: int
    bytes: int
    tokens: int
    stage: Stage = "planned"
    attempt: int = 0
    rounds: int = 0
    refused: int = 0
    missing_since: float | None = None
    file_id: str | None = None
    batch_id: str | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    status: str | None = None
    done: int = 0
    failed: int = 0
    left: int = 0
    taken: bool = False
    error: str | None = None
    usage: Usage = field(default_factory=Usage)
    cost_usd: float | None = None

    @property
    def lost(self) -> bool:
        """Whether its batch was there, and that or a part of what it gave is not to be found."""
        return self.batch_id is not None and self.missing_since is not None

    @property
    def missing(self) -> int:
        """How many of its requests may have an answer that nobody can fetch now."""
        return self.left if self.status in ("lost", "cut") and not self.taken else 0

    @property
    def input(self) -> str:
        """The name of its input file in the directory."""
        return f"input-{self.number:05}.jsonl"

    @property
    def output(self) -> str:
        """The same of the provider's output file."""
        return f"output-{self.number:05}.jsonl"

    @property
    def errors(self) -> str:
        """The same of the provider's error file."""
        return f"error-{self.number:05}.jsonl"

    @property
    def leftovers(self) -> str:
        """The same of the list of requests that have no answer."""
        return f"left-{self.number:05}.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a job is: nothing of it changes, but for the details that the same call wants the next time.

    Attributes
    ----------
    id : str
        Marks the job's files and batches at the provider.
    created_s : float
        Seconds since 1970.
    digest : str
        Of the rows and their requests: the same call has the same.
    identity, api, model, template, parameters : str
        What is asked, and where; see `parts.Origin`.
    service_tier : str or None
        Of the parameters, for the price.
    checkpoint : str
        Where the answers are kept: a URL, an absolute path, or one in the job's directory; see `Place.found`.
    output, details, several : str, bool, bool
        Of the call.
    prices : dict or None
        As the call had them.
    schema : dict or None
        Labels, a JSON schema, or where a pydantic model is to be found.
    keep_files : bool
        Whether the files stay at the provider.
    requests : int
        That are asked.
    """

    id: str
    created_s: float
    digest: str
    identity: str
    api: str
    model: str
    template: str
    parameters: str
    service_tier: str | None
    checkpoint: str
    output: str
    details: bool
    several: bool
    prices: dict[str, float] | None
    schema: dict[str, Any] | None
    keep_files: bool
    requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """A job at one moment.

    Attributes
    ----------
    terms : Terms
        What it is.
    parts : tuple of Part
        In their order.
    cancelled : bool
        Whether no part is to be sent any more.
    swept : bool
        Whether what may have been left at the provider was looked for.
    token_limit : int or None
        Tokens that may be enqueued, where the provider said so.
    held_until_s : float
        Until when nothing is sent, after a refusal for enqueued tokens; in seconds since 1970.
    held_for : tuple of int
        The parts that ran then: when one of them ends, there is room.
    """

    terms: Terms
    parts: tuple[Part, ...]
    cancelled: bool = False
    swept: bool = False
    token_limit: int | None = None
    held_until_s: float = 0.0
    held_for: tuple[int, ...] = ()

    @property
    def over(self) -> bool:
        """Whether nothing is left to do."""
        return all(part.stage in OVER for part in self.parts)

    @property
    def running(self) -> tuple[Part, ...]:
        """The parts that the provider has, or may have."""
        return tuple(part for part in self.parts if part.stage in ("running", "creating"))

    @property
    def usage(self) -> Usage:
        """What all answers so far took."""
        return sum((part.usage for part in self.parts), Usage())

    @property
    def cost_usd(self) -> float | None:
        """The same in USD; None where no price is known."""
        known = [part.cost_usd for part in self.parts if part.cost_usd is not None]
        return sum(known) if known else None

    def with_parts(self, *parts: Part) -> Ledger:
        """Give the ledger with these parts in place of those of their numbers, or added."""
        made = {part.number: part for part in self.parts} | {part.number: part for part in parts}
        return replace(self, parts=tuple(made[number] for number in sorted(made)))

    def to_json(self) -> bytes:
        """Write it."""
        return orjson.dumps({"format": FORMAT, **asdict(self)}, option=orjson.OPT_INDENT_2)

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Ledger:
        """Read it.

        Raises
        ------
        ConfigurationError
            It is none, or of a later version.
        """
        try:
            read = orjson.loads(data)
            if read["format"] > FORMAT:
                raise ConfigurationError(
                    f"the job in {where} is of format {read['format']}, and this version of llmframe knows {FORMAT}; "
                    "upgrade llmframe"
                )
            parts = tuple(Part(**{**part, "usage": Usage(**part["usage"])}) for part in read["parts"])
            rest = {each.name: read[each.name] for each in fields(cls) if each.name not in ("terms", "parts")}
            rest["held_for"] = tuple(rest["held_for"])
            return cls(terms=Terms(**read["terms"]), parts=parts, **rest)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigurationError(f"{where} holds no Batch job: {LEDGER} cannot be read ({error})") from error


@dataclass(frozen=True, slots=True)
class Left:
    """A request that got no answer.

    Attributes
    ----------
    key : bytes
        Whose.
    status : str
        What its row is: ``failed``, ``filtered``, or ``pending`` where it was not reached.
    error : str
        Why.
    again : bool
        Whether asking again may help.
    """

    key: bytes
    status: Status
    error: str
    again: bool


class Place:
    """The directory of a job.

    Parameters
    ----------
    path : path
        A local directory.

    Attributes
    ----------
    name : str
        As it was given, for people.
    path : Path
        The same, absolute.

    Raises
    ------
    ConfigurationError
        It is a URL: an intent is durable on a disk alone.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, str | os.PathLike):
            raise ConfigurationError(f"job={path!r} is no directory; pass a path, as in job='runs/reviews-batch'")
        where = os.fspath(path)
        if "://" in where:
            raise ConfigurationError(f"job={where!r} has to be a local directory; checkpoint= may be a URL")
        self.name = os.fspath(Path(where).expanduser())
        self.path = Path(os.path.abspath(self.name))  # of now: a notebook may change its directory before it waits
        self._directory = Directory(self.path)

    @property
    def exists(self) -> bool:
        """Whether a job is kept here."""
        return (self.path / LEDGER).is_file()

    def noted(self, path: str | os.PathLike[str]) -> str:
        """Give what the ledger says of a path or URL: one in here moves, and is copied, with the directory."""
        where = os.fspath(path)
        if "://" in where:
            return where
        full = Path(os.path.abspath(os.path.expanduser(where)))
        return full.relative_to(self.path).as_posix() if full.is_relative_to(self.path) else os.fspath(full)

    def found(self, noted: str) -> str:
        """Give the path or URL of which the ledger says so."""
        return noted if "://" in noted else os.path.abspath(self.path / noted)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the one process that works on the job; the directory is made if it is missing.

        Raises
        ------
        Busy
            Another one is.
        ConfigurationError
            It cannot be written.
        """
        try:
            self._directory.claim("0")
        except filelock.Timeout:
            raise Busy(f"another process is at work on the job in {self.name}; let it, or end it") from None
        except OSError as error:
            raise ConfigurationError(f"job={self.name!r} is no directory that can be written: {error}") from error
        try:
            yield
        finally:
            self._directory.release()

    def load(self) -> Ledger:
        """Read the ledger.

        Raises
        ------
        ConfigurationError
            There is none, or it cannot be read.
        """
        try:
            data = (self.path / LEDGER).read_bytes()
        except OSError as error:
            raise ConfigurationError(
                f"there is no Batch job in {self.name}; df.llm.submit_batch(..., job={self.name!r}) makes one"
            ) from error
        return Ledger.from_json(data, self.name)

    def save(self, ledger: Ledger) -> Ledger:
        """Make a ledger durable."""
        with self.write(LEDGER) as file:
            file.write(ledger.to_json())
        return ledger

    def write(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open a file that gets its name, whole and durable, when the block ends."""
        self._directory.delete(f".{name}.tmp")  # of a process that was killed
        return self._directory.write(name)

    def delete(self, *names: str) -> None:
        """Delete files, those that are there."""
        for name in names:
            self._directory.delete(name)

    def size(self, name: str) -> int:
        """Give the bytes of a file; 0 where there is none."""
        with suppress(FileNotFoundError):
            return (self.path / name).stat().st_size
        return 0

    def lines(self, name: str) -> Iterator[bytes]:
        """Read a file line by line; none where there is no file."""
        with suppress(FileNotFoundError), open(self.path / name, "rb") as file:
            yield from file

    def write_left(self, part: Part, left: Mapping[bytes, Left]) -> None:
        """Keep what has no answer."""
        with self.write(part.leftovers) as file:
            for each in left.values():
                file.write(orjson.dumps({**asdict(each), "key": each.key.hex()}) + b"\n")

    def left(self, part: Part, wanted: Callable[[Left], bool] = lambda _: True) -> Iterator[Left]:
        """Read it."""
        for line in self.lines(part.leftovers):
            read = orjson.loads(line)
            each = Left(**{**read, "key": bytes.fromhex(read["key"])})
            if wanted(each):
                yield each


class Busy(LLMFrameError):
    """Another process is at work on the job."""
