"""The work on a Batch job: send what waits, look at what runs, fetch and keep what has ended.

Each step is on disk before the next one begins, and each can be done again: whatever killed a process, the next one
goes on from the ledger. What may have been done already is looked for before it is done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from llmframe import loops
from llmframe.batch_api import ENDED, Away, BatchApi, Problem, Refused, Seen
from llmframe.batch_ledger import WAITING, Ledger, Left, Part, Place
from llmframe.batch_plan import FileLimits, LineSize, file_numbers, key_of, next_to_go, said_limit
from llmframe.batch_replies import Answered, Read, read_line, stacked
from llmframe.checkpoint import Checkpoint
from llmframe.requests import PATHS, Api
from llmframe.results import PAID, Completion, Usage

T = TypeVar("T")

SLOWEST = 30.0  # factor on `poll_s`, at most: 5 minutes between two looks, where `poll_s` is left as it is
SLOWER = 1.5  # factor by which each look without news lengthens the wait
SETTLE_S = 30.0  # what is not to be found for so long is not there: lists and files may be late, whatever `poll_s` is
SPLIT_AFTER = 2  # refusals for enqueued tokens of a part that is alone: the next time it is two
ROUNDS = 4  # times that a file is sent again without the lines its validation named
VECTORS = 512  # put into the checkpoint together
TOKEN_LIMIT = "token_limit"  # in the code of such a refusal


def slower(slow: float, *, news: bool) -> float:
    """Give how much longer than at first to wait for the next look: at once as at first where something has happened.

    Examples
    --------
    >>> slower(1.0, news=False), slower(25.0, news=False), slower(25.0, news=True)
    (1.5, 30.0, 1.0)
    """
    return 1.0 if news else min(SLOWEST, slow * SLOWER)


@dataclass(frozen=True, slots=True)
class Keeper:
    """Where answers go.

    Attributes
    ----------
    open : callable
        Opens the checkpoint.
    read : callable
        Reads a reply.
    """

    open: Callable[[], Checkpoint]
    read: Read


def write_parts(directory: Place, lines: Iterator[bytes], first: int, limits: FileLimits) -> tuple[list[Part], int]:
    """Write lines to input files, each as it comes; the parts, and how many lines no file could hold."""
    parts: dict[int, Part] = {}
    current: bytes = b""
    too_large = 0

    def sizes() -> Iterator[LineSize]:
        nonlocal current
        for line in lines:
            current = line
            yield LineSize.of(line)

    with ExitStack() as stack:
        file: Any = None
        for number in file_numbers(sizes(), limits):
            if number is None:
                too_large += 1
                continue
            part = parts.get(first + number)
            if part is None:
                stack.close()
                part = Part(number=first + number, requests=0, bytes=0, tokens=0)
                file = stack.enter_context(directory.write(part.input))
            file.write(current)
            size = LineSize.of(current)
            parts[part.number] = replace(
                part, requests=part.requests + 1, bytes=part.bytes + size.bytes, tokens=part.tokens + size.tokens
            )
    return list(parts.values()), too_large


@dataclass(slots=True)
class Worker:
    """Works on one job while it holds its directory.

    Attributes
    ----------
    directory : Place
        Where the job is.
    api : BatchApi
        The provider.
    keeper : Keeper or None
        Where answers go; None leaves them on disk as they came.
    poll_s : float
        Seconds between two looks at first.
    ledger : Ledger
        As it was last saved.
    asked_s : float
        How long the endpoint asked to wait at the last look, in seconds; 0 where it did not.
    """

    directory: Place
    api: BatchApi
    keeper: Keeper | None
    poll_s: float
    ledger: Ledger
    asked_s: float = 0.0

    async def look(self) -> None:
        """Do all that can be done now.

        Raises
        ------
        Away, Refused, EndpointError
            Where it cannot be done; what was done is in the ledger.
        """
        self.asked_s = 0.0
        while True:
            for number in [part.number for part in self.ledger.parts]:
                await self._advance(number)
            while (part := self._next()) is not None:
                await self._send(part)
            if not any(part.stage == "collected" for part in self.ledger.parts):  # what was refused on its way out
                break
        if self.ledger.over and not self.ledger.swept:
            await self._sweep()

    async def look_again(self) -> None:
        """Look, also for what was lost: a key of another project, or a proxy, may have hidden it."""
        for part in self.ledger.parts:
            if part.lost and part.left and not part.taken:  # it was missed long ago: what is missing still, is gone
                self._put(replace(part, stage="running", failed=0, left=0, error=None))
                self.directory.delete(part.leftovers)
        await self.look()

    async def cancel(self) -> None:
        """Send no more, and ask the provider to stop."""
        self._save(replace(self.ledger, cancelled=True))
        for part in self.ledger.parts:
            if part.stage == "running" and part.batch_id is not None:
                await self.api.cancel(part.batch_id)
            elif part.stage in WAITING or part.stage == "uploading":
                self._withdraw(part)

    def _withdraw(self, part: Part) -> None:
        left = {key: Left(key, "pending", "not asked: cancelled", True) for key in self._keys(part)}
        self.directory.write_left(part, left)
        self._put(replace(part, stage="withdrawn", left=len(left)))

    def _keys(self, part: Part) -> list[bytes]:
        return [key_of(line) for line in self.directory.lines(part.input)]

    # -- the ledger

    def _save(self, ledger: Ledger) -> None:
        self.ledger = self.directory.save(ledger)

    def _put(self, *parts: Part) -> None:
        self._save(self.ledger.with_parts(*parts))

    def _part(self, number: int) -> Part:
        return next(part for part in self.ledger.parts if part.number == number)

    # -- one part

    async def _advance(self, number: int) -> None:
        """Bring one part as far as it goes now, sending aside."""
        part = self._part(number)
        match part.stage:
            case "uploading":
                await self._adopt_file(part)
            case "creating":
                await self._adopt_batch(part)
        if self._part(number).stage == "running":
            await self._watch(self._part(number))
        if self._part(number).stage == "fetched" and self.keeper is not None:
            await loops.to_its_end(lambda: self._collect(self._part(number)))
        if self._part(number).stage == "collected":
            await self._clear(self._part(number))
        if self.ledger.cancelled and self._part(number).stage in WAITING:
            self._withdraw(self._part(number))

    def _name(self, part: Part) -> str:
        return f"llmframe-{self.ledger.terms.id}-{part.number:05}.jsonl"

    def _tag(self, part: Part) -> dict[str, str]:
        return {"llmframe_job": self.ledger.terms.id, "llmframe_part": f"{part.number}.{part.attempt}"}

    async def _adopt_file(self, part: Part) -> None:
        """Find out whether an upload that was meant was made; if not, it is made anew: a file costs nothing."""
        found = await self.api.find_files(self._name(part), self.ledger.terms.created_s)
        whole = [file_id for file_id, _, size in found if size == part.bytes]
        self._put(replace(part, stage="uploaded" if whole else "planned", file_id=whole[0] if whole else None))

    async def _adopt_batch(self, part: Part) -> None:
        """Find out whether a batch that was meant was created; if it was, it is not created again."""
        found = await self.api.find_batches(self._tag(part), self.ledger.terms.created_s)
        if found:
            for twin in found[1:]:  # the first was listed so late that a second was made; only what that did is paid
                await self.api.cancel(twin.id)
            self._put(replace(part, stage="running", batch_id=found[0].id, missing_since=None))
            return
        if self._long_missing(part):  # else the list may be late
            self._put(replace(part, stage="uploaded", missing_since=None))

    def _long_missing(self, part: Part) -> bool:
        """Note that something of a part is not to be found; whether that has lasted so long that it is not there."""
        now = time.time()
        if part.missing_since is None or part.missing_since > now:
            self._put(replace(part, missing_since=now))
            return False
        return now - part.missing_since >= SETTLE_S

    async def _send(self, part: Part) -> None:
        """Upload a part and make a batch of it: the intent first, then the deed."""
        if part.stage == "planned":
            self._put(replace(part, stage="uploading"))
            try:
                file_id = await self.api.upload(self.directory.path / part.input, self._name(part))
            except Refused as refusal:
                self._refused(part, str(refusal))
                return
            part = replace(part, stage="uploaded", file_id=file_id)
            self._put(part)
        assert part.file_id is not None
        api: Api = self.ledger.terms.api  # type: ignore[assignment]
        self._put(replace(part, stage="creating"))
        try:
            seen = await self.api.create(part.file_id, f"/v1{PATHS[api]}", self._tag(part))
        except Refused as refusal:
            if TOKEN_LIMIT in f"{refusal.code} {refusal}":
                await self._hold(part, str(refusal))
            else:
                self._refused(part, str(refusal))
            return
        except Away as away:
            if not away.maybe_done:
                self._put(part)
            raise
        self._put(replace(part, stage="running", batch_id=seen.id, status=seen.status, missing_since=None))

    def _next(self) -> Part | None:
        """Choose the part that goes out now, if one may."""
        ledger = self.ledger
        running = ledger.running
        if ledger.cancelled or any(part.stage == "creating" for part in running):
            return None
        still = {part.number for part in running}
        if time.time() < ledger.held_until_s and all(number in still for number in ledger.held_for):
            return None
        waiting = [part for part in ledger.parts if part.stage in WAITING]
        chosen = next_to_go([part.tokens for part in waiting], sum(part.tokens for part in running), ledger.token_limit)
        return None if chosen is None else waiting[chosen]

    async def _watch(self, part: Part) -> None:
        assert part.batch_id is not None
        try:
            seen = await self.api.look(part.batch_id)
        except Refused as refusal:
            await self._unknown(part, refusal)
            return
        self.asked_s = max(self.asked_s, seen.asked_s)
        now = replace(
            part,
            status=seen.status,
            done=seen.done,
            failed=seen.failed,
            output_file_id=seen.output_file_id,
            error_file_id=seen.error_file_id,
            # Where it had ended before, it is its files that are missed.
            missing_since=part.missing_since if part.status in (*ENDED, "cut") else None,
        )
        if not seen.ended:
            if now != part:
                self._put(now)
            if self.ledger.cancelled and seen.status in ("validating", "in_progress"):
                await self.api.cancel(part.batch_id)  # it was created, or found, after the others were cancelled
            return
        if seen.status == "failed" and seen.output_file_id is None and seen.error_file_id is None:
            await self._invalid(replace(now, missing_since=None), seen)
            return
        await self._fetch(now)

    async def _unknown(self, part: Part, refusal: Refused) -> None:
        """Give up a batch that is shown no more, where it is in no list either, and has not been for long."""
        if refusal.http != 404:  # a word of whatever is in between: the batch goes on, and is paid for
            raise refusal
        listed = await self.api.find_batches(self._tag(part), self.ledger.terms.created_s)
        if any(each.id == part.batch_id for each in listed):
            raise refusal
        if self._long_missing(part):
            words = (
                f"the provider neither shows nor lists the batch {part.batch_id} (is the key of its project?); "
                f"job.resubmit() looks for it once more before it asks again: {refusal}"
            )
            self._refused(replace(part, status="lost"), words)

    async def _hold(self, part: Part, message: str) -> None:
        """Put a part back whose tokens are too many just now; where they always will be, in pieces."""
        ledger, now = self.ledger, time.time()
        alone = not [each for each in ledger.running if each.number != part.number]
        refused = part.refused + 1 if alone else 0
        limit = said_limit(message) or ledger.token_limit
        waits = replace(
            part,
            stage="uploaded" if part.file_id else "planned",
            batch_id=None,
            status="waits for its turn",
            attempt=part.attempt + 1,
            refused=refused,
        )
        held = replace(
            ledger,
            token_limit=limit,
            held_until_s=now + self.poll_s * min(SLOWEST, 2.0**refused),
            held_for=tuple(each.number for each in ledger.running if each.number != part.number),
        )
        self._save(held.with_parts(waits))
        if part.requests > 1 and ((limit is not None and part.tokens > limit) or refused > SPLIT_AFTER):
            most = min(part.tokens // 2 + 1, limit or part.tokens)
            self._rewrite(waits, lambda _: True, tokens=most)

    async def _invalid(self, part: Part, seen: Seen) -> None:
        """Take a failed validation: it waits for tokens, goes again without the lines it named, or comes to nothing."""
        limit = next((each for each in seen.problems if TOKEN_LIMIT in each.code), None)
        if limit is not None:
            await self._hold(part, limit.message)
            return
        words = "; ".join(dict.fromkeys(f"{each.message} ({each.code})" for each in seen.problems)) or "no reason given"
        named = _by_line(seen.problems)
        lines = list(self.directory.lines(part.input))
        wrong = {
            key_of(lines[number - 1]): Left(key_of(lines[number - 1]), "failed", f"the batch refused it: {why}", False)
            for number, why in named.items()
            if 1 <= number <= len(lines)
        }
        if not wrong or part.rounds >= ROUNDS:
            self._refused(part, f"the batch was refused: {words:.500}")
            return
        self.directory.write_left(part, wrong)
        part = replace(part, failed=len(wrong), rounds=part.rounds + 1)
        self._rewrite(part, lambda line: key_of(line) not in wrong)

    def _refused(self, part: Part, words: str) -> None:
        """Note that a part came to nothing as a whole; each of its requests can be asked again."""
        left = {key: Left(key, "failed", words, True) for key in self._keys(part)}
        self.directory.write_left(part, left)
        self._put(
            replace(
                part, stage="collected", error=words, failed=len(left), left=len(left), status=part.status or "refused"
            )
        )

    def _rewrite(self, part: Part, wanted: Callable[[bytes], bool], tokens: int | None = None) -> None:
        """Put lines of a part into new ones, in its place."""
        longest = max(LineSize.of(line).tokens for line in self.directory.lines(part.input))
        limits = FileLimits(tokens=None if tokens is None else max(tokens, longest))
        lines = (line for line in self.directory.lines(part.input) if wanted(line))
        first = self.ledger.parts[-1].number + 1
        made, _ = write_parts(self.directory, lines, first, limits)
        self._put(replace(part, stage="replaced"), *(replace(each, rounds=part.rounds) for each in made))

    async def _fetch(self, part: Part) -> None:
        """Bring what a batch gave onto this disk: all of it, unless that is not to be had."""
        gone = False
        for file_id, name in ((part.output_file_id, part.output), (part.error_file_id, part.errors)):
            if file_id is None:
                continue
            try:
                with self.directory.write(name) as file:
                    await self.api.fetch(file_id, file)
            except Refused as refusal:
                if refusal.http != 404:
                    raise
                gone = True  # not there yet, or deleted by somebody else, or expired: the count of its lines tells
        fault = await loops.to_its_end(lambda: incomplete(part, self.directory))
        if fault is None:
            self._put(replace(part, stage="fetched", missing_since=None))
        elif self._long_missing(part):  # it is lost, and so its files stay: there is no other copy
            words = f"{fault.words}; job.resubmit() fetches them once more"
            cut = gone or fault.cut or await self._shorter(part)
            status = "cut" if cut else part.status
            self._put(replace(part, stage="fetched", status=status, error=words))

    async def _shorter(self, part: Part) -> bool:
        """Whether less came of a file than the provider says it has: a download may end between two lines, too."""
        for file_id, name in ((part.output_file_id, part.output), (part.error_file_id, part.errors)):
            told = None if file_id is None else await self.api.size(file_id)
            if told is not None and self.directory.size(name) < told:
                return True
        return False

    # -- what came

    def _collect(self, part: Part) -> None:
        """Put a part's answers into the checkpoint, and what has none onto its list."""
        assert self.keeper is not None
        checkpoint = self.keeper.open()
        try:
            totals = collect(self.directory, part, checkpoint, self.keeper.read)
        finally:
            checkpoint.close()
        self.directory.write_left(part, totals.left)
        again = sum(each.again for each in totals.left.values())
        self._put(
            replace(
                part,
                stage="collected",
                done=totals.answered,
                failed=len(totals.left),
                left=again,
                usage=totals.usage,
                cost_usd=totals.cost_usd,
            )
        )

    async def _clear(self, part: Part) -> None:
        """Delete what is no longer needed, here and at the provider."""
        if not self.ledger.terms.keep_files and not part.lost:
            for file_id in (part.file_id, part.output_file_id, part.error_file_id):
                if file_id is not None:
                    await self._delete(file_id)
        self.directory.delete(part.output, part.errors, *([] if part.left else [part.input]))
        self._put(replace(part, stage="closed"))

    async def _sweep(self) -> None:
        """Delete what was uploaded or written and then lost sight of: by a crash, or by a split."""
        self.directory.delete(*(part.input for part in self.ledger.parts if part.taken or not part.left))
        if not self.ledger.terms.keep_files:
            start = f"llmframe-{self.ledger.terms.id}-"
            kept = {part.file_id for part in self.ledger.parts if part.lost}  # of a batch that may be at work
            for file_id, _, _ in await self.api.find_files(start, self.ledger.terms.created_s):
                if file_id not in kept:
                    await self._delete(file_id)
        self._save(replace(self.ledger, swept=True))

    async def _delete(self, file_id: str) -> None:
        try:
            await self.api.delete(file_id)
        except Refused as refusal:
            raise Away(f"a file could not be deleted: {refusal}") from refusal


@dataclass(slots=True)
class Totals:
    """What the files of one batch held.

    Attributes
    ----------
    answered : int
        Requests with an answer.
    left : dict of bytes to Left
        Those without.
    usage, cost_usd : Usage, float or None
        Of the answers.
    """

    answered: int = 0
    left: dict[bytes, Left] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    cost_usd: float | None = None


def collect(directory: Place, part: Part, checkpoint: Checkpoint, read: Read) -> Totals:
    """Read what a batch gave, whatever the order of its lines; answers go to the checkpoint, the first of each key."""
    totals, intake = Totals(), _Intake(checkpoint)
    missing = {key_of(line) for line in directory.lines(part.input)}
    for name in (part.output, part.errors):
        for line in directory.lines(name):
            found = read_line(line, read)
            if found is None or (found.key not in missing and found.key not in totals.left):
                continue  # of no request of the part, or of one that was answered
            missing.discard(found.key)
            if isinstance(found, Left):
                totals.left.setdefault(found.key, found)
                continue
            intake.take(found)
            _count(totals, found.completion)
            totals.left.pop(found.key, None)
    intake.empty()
    for left in totals.left.values():
        if left.status != "pending":
            checkpoint.add(left.key, Completion(status=left.status, error=left.error, attempts=1))
    why = f"not asked: the batch ({part.status}) gave no line for it"
    if part.status == "cut":
        why = f"not here yet: {part.error}"
    totals.left.update({key: Left(key, "pending", why, True) for key in missing})
    filtered = [key for key, each in totals.left.items() if each.status in PAID]
    for key in filtered:  # an outcome that is kept, as one that was answered
        del totals.left[key]
    totals.answered += len(filtered)
    return totals


@dataclass(frozen=True, slots=True)
class Fault:
    """What is missing in the files of a batch that has ended.

    Attributes
    ----------
    words : str
        For people.
    cut : bool
        Whether it is to be seen from them that there is more: it may be paid for. A line too few may be one that never
        was.
    """

    words: str
    cut: bool


def incomplete(part: Part, directory: Place) -> Fault | None:
    """Say what is missing in the files of a batch that has ended; None where all is there."""
    lines = 0
    for name in (part.output, part.errors):
        last = b""
        for line in directory.lines(name):
            if line.strip():
                lines, last = lines + 1, line
        try:
            json.loads(last or b"{}")
        except ValueError:
            return Fault(f"{name} breaks off in its line {lines:,}", cut=True)
    counted = max(part.done + part.failed, part.requests if part.status == "completed" else 0)
    if lines >= counted:
        return None
    words = f"the batch's files have {lines:,} lines, and it has {counted:,} requests that are done"
    return Fault(words, cut=lines == 0 or (part.done > 0 and part.output_file_id is None))


def _count(totals: Totals, answer: Completion) -> None:
    totals.answered += 1
    totals.usage += Usage.of(answer)
    if answer.cost_usd is not None:
        totals.cost_usd = (totals.cost_usd or 0.0) + answer.cost_usd


class _Intake:
    """Takes answers to a checkpoint; vectors many at a time, since each would be a part of its own otherwise."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._vectors: list[Answered] = []

    def take(self, found: Answered) -> None:
        """Take an answer."""
        vector = found.completion.parsed
        if not isinstance(vector, np.ndarray):
            self._checkpoint.add(found.key, found.completion)
        else:
            if self._vectors and self._vectors[0].completion.parsed.shape != vector.shape:
                self.empty()
            self._vectors.append(found)
            if len(self._vectors) == VECTORS:
                self.empty()
        if self._checkpoint.due(time.monotonic()):
            self._checkpoint.flush()

    def empty(self) -> None:
        """Hand on the vectors that wait."""
        if self._vectors:
            self._checkpoint.add_embeddings(*stacked(self._vectors))
            self._vectors = []


def _by_line(problems: tuple[Problem, ...]) -> Mapping[int, str]:
    named: dict[int, str] = {}
    for each in problems:
        if each.line is not None:
            named.setdefault(each.line, f"{each.message} ({each.code})")
    return named
