"""The engine: workers that send requests as fast as the line lets them, and try again what may yet succeed.

A request is made when a worker is free for it and let go when its outcome is delivered, so memory follows what
is in flight and not what waits. Whatever was answered is delivered, also while the run is being stopped.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import takewhile
from typing import Any, Protocol

from llmframe import failures, patience
from llmframe.attempts import Attempt, Job
from llmframe.billing import may_be_billed, paid
from llmframe.blame import ALIKE, PERHAPS_THE_ROWS, Blame, Denied, is_strike
from llmframe.budget import Budget, Cost
from llmframe.crowding import Crowding
from llmframe.endpoint import Endpoint
from llmframe.errors import BudgetExceeded, EndpointError
from llmframe.failures import Failure, Kind, Unreachable
from llmframe.limits import rate_headers, retry_after_s
from llmframe.lines import Line
from llmframe.pacing import Caps
from llmframe.patience import NOT_THERE, Patience
from llmframe.replies import read_json, read_usage
from llmframe.requests import Form, text_bytes
from llmframe.results import Completion, Usage, after
from llmframe.timeouts import DOUBT_S, MOST_TRIALS, Timeout, may_starve
from llmframe.transports import Lost, ReplicaDown, Reply, Wrote

AHEAD = 2  # requests beyond the window that are made and wait: by them the pacer sees that more is wanted
GRACE_S = 1.0  # what is in flight is paid for: how long a stopped run waits for it
DOUBTED_SHARE = 1 / 16  # of what may be in flight: overdue attempts that stay open beside a new one of the same row
DOUBTED_LEAST = 4  # requests that may be in flight; of fewer, one that is lost and stays open would take too many
EMPTY = 3  # replies without an answer that a row is charged for, at most: chance would have mended it by then
STRIKES_TOGETHER = 3  # failures of a request of several rows before it is sent in parts: it may be one of them
BYTES_A_TOKEN = 4  # of English; the pacer learns how far that is off
EXPECTED_TOKENS = 64  # reserved for an answer, until the pacer has learned what requests really take


class Ask(Protocol):
    """Says what to send for a row once more."""

    @property
    def form(self) -> Form:
        """What is known to be taken."""
        ...

    def repaired(self, number: int, repairs: int, payload: Any, completion: Completion) -> bytes | None:
        """Give the body to send after an answer; None to take it as it is."""
        ...

    def fallen_back(self, number: int, form: Form, failure: Failure) -> bytes | None:
        """Give the body to send after a refusal of the request's form; None where it is none."""
        ...

    def divided(self, number: int, failure: Failure | None) -> Sequence[tuple[int, bytes]]:
        """Give what to send in place of a request that fails, or fits no budget; nothing where it is one row's."""
        ...


class Read(Protocol):
    """Reads the JSON of a reply; None where it holds no answer."""

    def __call__(
        self, payload: Any, *, number: int, latency_s: float, attempts: int, request_id: str | None
    ) -> Completion | None:
        """Give the completion."""
        ...


@dataclass(frozen=True, slots=True)
class Policy:
    """What a run allows.

    Attributes
    ----------
    caps : Caps
        Hard caps on requests in flight and on rates.
    max_attempts : int
        Requests for one row, at most; those that failed for the endpoint's sake do not count.
    timeout_s : float or None
        Of one attempt; None learns it.
    """

    caps: Caps = field(default_factory=Caps)
    max_attempts: int = 8
    timeout_s: float | None = None


@dataclass(slots=True)
class Tally:
    """What a run has sent and met so far.

    Attributes
    ----------
    sent, answered, in_flight : int
        Attempts.
    failures : Counter
        Attempts that gave no answer, by kind.
    maybe_billed : int
        Those of them that may have been billed, though nobody says so.
    unkept : dict of int to Completion
        Answers, paid for, that did not fit and are being asked again, by request.
    """

    sent: int = 0
    answered: int = 0
    in_flight: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    maybe_billed: int = 0
    unkept: dict[int, Completion] = field(default_factory=dict)


class Crew:
    """The workers of one run.

    Parameters
    ----------
    line : Line
        Where they send.
    endpoint : Endpoint
        What messages may say of it.
    requests : iterator of (int, bytes)
        Each request's number and body, made as it is asked for.
    read : callable
        Reads a reply.
    deliver : callable
        Takes each request's outcome, once; what it raises stops the run.
    policy : Policy
        What the run allows.
    tally : Tally
        Where the run counts.
    ask : Ask, optional
        What to send once more for an answer that does not fit.
    budget : Budget, optional
        What the run may spend.
    """

    def __init__(
        self,
        line: Line,
        endpoint: Endpoint,
        requests: Iterator[tuple[int, bytes]],
        read: Read,
        deliver: Callable[[int, Completion], None],
        policy: Policy,
        tally: Tally,
        ask: Ask | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._line = line
        self._endpoint = endpoint
        self._requests = requests
        self._read = read
        self._deliver = deliver
        self._policy = policy
        self._tally = tally
        self._ask_again = ask
        self._budget = budget
        self._timeout = Timeout(policy.timeout_s)
        self._workers: set[asyncio.Task[None]] = set()
        self._flying: dict[Attempt, asyncio.Task[None]] = {}  # the oldest first
        self._due: deque[Job] = deque()  # retries whose wait is over
        self._later: dict[Job, asyncio.TimerHandle] = {}  # retries that wait
        self._on_trial: set[Job] = set()  # sent anew for being overdue, and nothing heard since
        self._exhausted = False
        self._open = 0  # requests begun and not yet delivered
        self._failing = 0  # those of them that are tried again
        self._heard_at = self._loop.time()  # the last reply
        self._patience = Patience(endpoint.url, self._heard_at)
        self._crowding = Crowding()
        self._blame = Blame()
        self._finished: asyncio.Future[None] = self._loop.create_future()

    async def run(self) -> None:
        """Send every request and deliver every outcome.

        Raises
        ------
        EndpointError
            The endpoint will not answer any row.
        BudgetExceeded
            Nothing is in flight, and the next request could pass the budget.
        """
        self._line.join(self._on_tick)
        try:
            self._hire()
            await self._finished
        finally:
            try:
                await self._wind_down()
            finally:
                self._tally.in_flight = 0
                self._line.leave(self._on_tick)

    async def _wind_down(self) -> None:
        """Wait a moment for what is in flight, and let go of the rest."""
        for timer in self._later.values():
            timer.cancel()
        flying = {task for attempt, task in self._flying.items() if not attempt.moot}
        for worker in self._workers - flying:
            worker.cancel()
        try:
            if flying:
                await asyncio.wait(flying, timeout=GRACE_S)
        finally:
            for worker in self._workers:
                worker.cancel()
            if self._workers:
                await asyncio.wait(self._workers)

    # -- workers

    def _hire(self) -> None:
        """Add a worker, if there may be work for one more; each that finds work hires the next."""
        most = self._line.pacer.window + AHEAD if self._policy.caps.max_concurrency != 1 else 1
        if len(self._workers) < most and (self._due or not self._exhausted):
            self._add_worker()

    def _add_worker(self) -> None:
        worker = self._loop.create_task(self._work())
        self._workers.add(worker)
        worker.add_done_callback(self._workers.discard)

    async def _work(self) -> None:
        try:
            while (job := self._take()) is not None:
                self._hire()
                body, most = job.body, None
                if self._budget is not None and (most := await self._afford(self._budget, job)) is None:
                    continue
                try:
                    started = await self._line.enter(job.tokens, trial=job in self._on_trial)
                except BaseException:  # it is not sent; and the budget may be that of other runs too
                    self._set_free(most)
                    raise
                if job.over or job.body is not body:  # meanwhile an attempt before it was answered after all
                    self._line.wrote()
                    self._line.release()
                    self._set_free(most)
                    if not job.over:
                        self._due.appendleft(job)
                    continue
                await self._attempt(job, started, most)
        except Exception as error:
            self._stop(error)

    def _take(self) -> Job | None:
        if self._finished.done():
            return None
        while self._due:
            job = self._due.popleft()
            if not job.over:
                return job
        if self._exhausted:
            return None
        try:
            number, body = next(self._requests)
        except StopIteration:
            self._exhausted = True
            self._finish_if_done()
            return None
        self._open += 1
        tokens = _tokens_of(body)
        form: Form = "json_schema" if self._ask_again is None else self._ask_again.form
        return Job(number, body, tokens, answered_before=self._tally.answered, form=form)

    # -- the budget

    async def _afford(self, budget: Budget, job: Job) -> Cost | None:
        """Set aside the most that an attempt can cost; None where there will be none, or the run ends."""
        most = budget.bound(job.body)
        while not job.over and not budget.fits(most):
            if budget.idle and self._divide(job, None):
                return None
            if budget.idle:
                self._stop(BudgetExceeded(budget.refusal(most)))
                return None
            change: asyncio.Future[None] = self._loop.create_future()
            budget.when_settled(partial(_wake, change))
            await change  # what is in flight costs less than its worst case, as a rule
        if job.over:
            return None
        budget.set_aside(most)
        return most

    def _set_free(self, most: Cost | None) -> None:
        """Give back what was set aside for an attempt that is not made."""
        if self._budget is not None and most is not None:
            self._budget.settle(most, Cost())

    def _charge(
        self, most: Cost | None, reply: Reply | None, payload: Any, outcome: Completion | Failure | None
    ) -> None:
        """Count what an attempt cost; its worst case where it may have been billed and nobody says how much."""
        if self._budget is not None and most is not None:
            self._budget.settle(most, paid(self._budget, most, reply, payload, outcome))

    # -- one attempt

    async def _attempt(self, job: Job, started: float, most: Cost | None) -> None:
        """Send a request once, and deliver its outcome or put it by for a retry."""
        task = asyncio.current_task()
        assert task is not None
        job.attempts += 1
        self._tally.sent += 1
        attempt = Attempt(job, job.body, started, len(self._flying))
        self._flying[attempt] = task
        wrote = _Once(self._line.wrote) if self._line.pacer.capped else None
        try:
            reply, payload, outcome = await self._ask(attempt, wrote)
        except BaseException:  # cancelled, or a fault of ours: the line is shared, and has to know
            if wrote is not None:
                wrote()
            self._line.release()
            self._tally.maybe_billed += 1
            self._charge(most, None, None, None)
            raise
        finally:
            del self._flying[attempt]
        if wrote is not None:
            wrote()  # it may have failed before
        self._charge(most, reply, payload, outcome)
        now = self._loop.time()
        if reply is not None:
            self._heard_at = now
            self._patience.heard()
        job.going -= 1
        if attempt.moot or (attempt.doubted and isinstance(outcome, Failure) and outcome.verdict == "retry"):
            self._heard_late(attempt, reply, outcome, now)
            if job.failure is not None and not job.over:
                self._end(job, job.failure)
        elif isinstance(outcome, Failure):
            await self._failed(attempt, reply, outcome, now)
        else:
            self._answered(attempt, reply, payload, outcome, now)

    async def _ask(self, attempt: Attempt, wrote: Wrote | None) -> tuple[Reply | None, Any, Completion | Failure]:
        """Send a request, and judge what comes back: the reply, its JSON, and what it means."""
        job = attempt.job
        try:
            async with asyncio.timeout(None) as attempt.deadline:
                reply = await self._line.transport.send(attempt.body, wrote)
        except TimeoutError:
            waited_s = self._loop.time() - attempt.started
            return None, None, Failure("retry", "timeout", f"no answer within {waited_s:.1f} s")
        except ReplicaDown as error:
            kind: Kind = "replica lost" if error.taken else "replica away"
            return None, None, Failure("retry", kind, error.message, error.status)
        except Lost as error:
            # Somebody was there, and it may be the row that brought him down.
            return None, None, replace(failures.of_error(error), kind="server error")
        except Unreachable as error:
            return None, None, failures.of_error(error)
        latency_s = self._loop.time() - attempt.started
        job.url = reply.url
        payload = read_json(reply.body)
        failure = failures.of_reply(reply.status, reply.headers, reply.body, payload, reply.redact)
        if failure is not None:
            return reply, payload, failure
        if job.over:  # what is delivered is not there to be read again: it is heard for when it came, and what it cost
            usage = read_usage(payload) or Usage()
            heard = Completion(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)
            return reply, payload, heard
        request_id = reply.headers.get("x-request-id")
        completion = self._read(
            payload, number=job.number, latency_s=latency_s, attempts=job.attempts, request_id=request_id
        )
        if completion is None or completion.status == "failed":
            failure = failures.of_no_answer(reply.status, reply.body, reply.redact)
            return reply, payload, failure if completion is None else replace(completion, error=failure.message)
        return reply, payload, completion

    def _heard_late(self, attempt: Attempt, reply: Reply | None, outcome: Completion | Failure, now: float) -> None:
        """Learn from an attempt that its row does not wait for any more: when it came, and that it may be billed."""
        latency_s = now - attempt.started
        if isinstance(outcome, Completion):
            self._timeout.answered(latency_s)
            self._tally.maybe_billed += 1
        else:
            self._tally.maybe_billed += may_be_billed(reply, outcome)
        self._line.pacer.released(now, latency_s=latency_s, alive=reply is not None)
        self._line.admit()

    def _answered(
        self, attempt: Attempt, reply: Reply | None, payload: Any, completion: Completion, now: float
    ) -> None:
        job, used = attempt.job, None
        if completion.prompt_tokens is not None:
            used = completion.prompt_tokens + (completion.completion_tokens or 0)
        self._line.answered = True
        self._patience.accepted()
        self._crowding.answered(attempt.started, attempt.beside)
        latency_s = now - attempt.started
        self._line.pacer.answered(
            now,
            latency_s=latency_s,
            reserved=job.tokens,
            used=used,
            headers=rate_headers(reply.headers, time.time()) if reply else None,
        )
        self._line.admit()
        self._timeout.answered(latency_s, 0 if attempt.doubted else job.timeouts)
        self._on_trial.discard(job)
        if self._blame.denied:
            self._clear(attempt.started)
        if completion.status == "failed":
            self._tally.failures["bad body"] += 1
            self._paid_for_nothing(job, completion)
            return
        self._tally.answered += 1
        self._blame.answered()
        if job.unfit is not None:
            completion = after(job.unfit, completion)
        if self._ask_again is not None:
            body = self._ask_again.repaired(job.number, job.repairs, payload, completion)
            if body is not None:
                job.repairs += 1
                job.form = self._ask_again.form
                self._pay_again(job, completion, body)
                return
        self._done(job, completion)

    def _paid_for_nothing(self, job: Job, completion: Completion) -> None:
        """Ask a few more times where a reply tells what it cost, and holds no answer: each is on the bill."""
        job.empty += 1
        kept, unfit = completion, job.unfit
        if unfit is not None:  # an answer that does not fit is better than none
            kept = after(unfit, completion) if unfit.status == "failed" else after(completion, unfit)
        if job.empty < EMPTY:
            self._pay_again(job, kept, job.body)
            return
        self._done(job, replace(kept, attempts=job.attempts))
        if kept.status == "failed":
            self._stop_if_all_end_so(job, "no answer", kept.error or "")

    def _pay_again(self, job: Job, unkept: Completion, body: bytes) -> None:
        """Ask again after a reply that was paid for; in a run that was stopped the row is pending, and asked anew."""
        job.unfit = self._tally.unkept[job.number] = unkept
        self._send_again(job, body)

    def _send_again(self, job: Job, body: bytes) -> None:
        """Send a body for a row, ahead of the rows that wait."""
        job.body = body
        job.tokens = _tokens_of(body)
        for attempt in self._attempts_of(job):
            attempt.give_up(self._loop.time())
        if not self._waits(job):  # else what waits sends it
            job.going += 1
            self._due.append(job)
        self._hire()

    async def _failed(self, attempt: Attempt, reply: Reply | None, failure: Failure, now: float) -> None:
        job = attempt.job
        self._tally.failures[failure.kind] += 1
        self._tally.maybe_billed += may_be_billed(reply, failure)
        self._crowding.failed(now, attempt.beside)
        if failure.kind == "timeout":
            job.timeouts += 1
        else:
            self._on_trial.discard(job)
        asked_s = self._tell_pacer(attempt, reply, failure, now)
        self._patience.failed(failure, attempt.started, asked_s)
        if self._ask_again is not None:
            body = self._ask_again.fallen_back(job.number, job.form, failure)
            if body is not None and not self._finished.done():
                job.form = self._ask_again.form
                self._line.admit()
                self._send_again(job, body)
                return
        wait_s = self._settle(attempt, failure, asked_s, now)
        self._line.admit()  # after it is settled whether the run goes on
        if wait_s is None or self._finished.done():
            return
        job.going += 1
        job.failed += 1
        self._failing += job.failed == 1
        if self._policy.caps.max_concurrency == 1:  # row order is the promise: its place is kept while it waits
            await asyncio.sleep(wait_s)
            self._due.append(job)
        elif not wait_s:
            self._due.appendleft(job)  # for the worker that was its last attempt's: no other may be free
        else:
            self._later[job] = self._loop.call_later(wait_s, self._retry, job)

    def _tell_pacer(self, attempt: Attempt, reply: Reply | None, failure: Failure, now: float) -> float | None:
        """Report a failed attempt; give the seconds that the endpoint asks to wait."""
        pacer, latency_s = self._line.pacer, now - attempt.started
        if failure.verdict != "retry" or failure.kind in failures.REPLICA:
            pacer.released(now, latency_s=latency_s, alive=reply is not None)
            return None
        asked_s = self._asked_of_all_s(reply, failure)
        full = failure.kind == "server error" and failure.http not in NOT_THERE and self._crowding.full
        if failure.kind == "server error" and self._crowding.by_chance and not full:
            pacer.released(now, latency_s=latency_s, alive=reply is not None)
            return asked_s
        if failure.kind == "rate limit" or full:
            headers = rate_headers(reply.headers, time.time()) if reply else None
            pacer.refused(now, latency_s=latency_s, reserved=attempt.job.tokens, retry_after_s=asked_s, headers=headers)
        else:
            pacer.failed(now, latency_s=latency_s, kind=failure.kind, limit_s=self._policy.timeout_s)
        return asked_s

    def _asked_of_all_s(self, reply: Reply | None, failure: Failure) -> float | None:
        """Give the seconds that a reply asks to wait; None where that is one server's word, and others answer."""
        asked_s = retry_after_s(reply.headers, time.time(), failure.wait) if reply else None
        others_answer = self._line.answered and self._line.pacer.down_since is None
        if asked_s is not None and asked_s > patience.PATIENCE_S and failure.kind != "rate limit" and others_answer:
            return None  # a page of maintenance: where it is every server's, an outage is found in a moment
        return asked_s

    def _settle(self, attempt: Attempt, failure: Failure, asked_s: float | None, now: float) -> float | None:
        """Stop the run, give up the row, or give the seconds to wait for its next attempt."""
        job = attempt.job
        if job.failure is not None:
            self._end(job, job.failure)
            return None
        if failure.verdict == "run":
            if self._blame.is_put_by(job):
                return None
            if self._line.answered and failure.http in PERHAPS_THE_ROWS:
                self._deny(Denied(job, failure, attempt.started, now, self._tally.answered))
            else:
                self._stop_at(job, failure.message)
            return None
        if failure.verdict == "row":
            self._patience.accepted()
        elif failure.kind == "rate limit" and (words := self._patience.refused(failure, now, self._oldest)):
            self._stop_at(job, words)
            return None
        down = self._line.pacer.down_since is not None
        alone = self._exhausted and self._failing == self._open and self._line.answered
        answered = self._tally.answered
        job.strikes += is_strike(job, failure, self._crowding, answered=answered, down=down, alone=alone)
        last = failure.verdict == "row" or job.strikes >= self._policy.max_attempts
        suspect = job.strikes >= STRIKES_TOGETHER and failure.kind != "rate limit"
        # While the endpoint looks down nothing is a strike: it may be one bad row in every request that looks like it.
        suspect |= failure.http == 500 and down
        if last:
            self._end(job, failure)
            return None
        if suspect and not job.going and self._divide(job, failure):
            return None
        if asked_s is not None and (words := self._patience.asked(failure, asked_s)):
            self._stop_at(job, words)
            return None
        if asked_s:
            return asked_s
        if failure.kind in failures.REPLICA:
            return 0.0
        if failure.kind == "timeout" and self._policy.timeout_s is None:
            return 0.0  # it has waited long enough, and others wait for what comes of it
        if down:
            return 0.0  # its probes are spaced already
        return failures.backoff_s(max(1, job.strikes), random.random())

    def _deny(self, denied: Denied) -> None:
        """Put a row by that is refused as a run is; stop where that is what comes of all that is sent."""
        denied.job.failed += 1
        self._failing += denied.job.failed == 1
        if self._blame.deny(denied, self._flying, self._tally.answered):
            first = self._blame.denied[0]
            self._stop_at(first.job, first.failure.message)
        self._finish_if_done()

    def _clear(self, sent: float) -> None:
        """Fail the rows that were put by before something was sent that is answered now: the endpoint is as it was."""
        for each in self._blame.cleared(sent):
            self._end(each.job, replace(each.failure, verdict="row"))

    def _retry(self, job: Job) -> None:
        del self._later[job]
        self._due.append(job)
        self._hire()

    def _divide(self, job: Job, failure: Failure | None) -> bool:
        """Send a request of several rows in parts, ahead of what waits, so that one row costs no other its answer."""
        parts = () if self._ask_again is None else self._ask_again.divided(job.number, failure)
        if not parts or self._ask_again is None:
            return False
        self._open += len(parts) - 1
        self._failing -= job.failed > 0
        self._let_go(job)
        for number, body in reversed(parts):
            tokens = _tokens_of(body)
            made = Job(number, body, tokens, answered_before=self._tally.answered, form=self._ask_again.form)
            self._due.appendleft(made)
        self._hire()
        return True

    def _end(self, job: Job, failure: Failure) -> None:
        """Fail a row, or ask its parts, unless it has an attempt that may yet be answered."""
        job.failure = failure
        if not (job.over or self._attempts_of(job) or self._divide(job, failure)):
            self._give_up(job, failure)

    def _give_up(self, job: Job, failure: Failure) -> None:
        failed = Completion(status=failure.status, error=failure.message, attempts=job.attempts)
        if job.unfit is not None and job.unfit.status != "failed":
            # It was paid for, though nothing better came of asking again.
            self._done(job, replace(job.unfit, attempts=job.attempts))
            return
        self._done(job, failed if job.unfit is None else after(job.unfit, replace(failed, source="request")))
        refused = failure.http is not None and 400 <= failure.http < 500
        self._stop_if_all_end_so(job, failure.http if refused else None, failure.message)

    def _stop_if_all_end_so(self, job: Job, end: int | str | None, words: str) -> None:
        if self._blame.all_end_alike(end):
            self._stop_at(job, f"the first {ALIKE} rows were all refused: {words}")

    def _done(self, job: Job, completion: Completion) -> None:
        self._open -= 1
        self._failing -= job.failed > 0
        self._let_go(job)
        self._tally.unkept.pop(job.number, None)
        try:
            self._deliver(job.number, completion)
        except Exception as error:
            self._stop(error)
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        denied = self._blame.denied
        if not self._exhausted or self._open > len(denied) or self._finished.done():
            return
        if not denied:
            self._finished.set_result(None)
        elif self._tally.answered:  # and nothing will be sent any more that would tell
            self._clear(math.inf)
        else:
            self._stop_at(denied[0].job, denied[0].failure.message)

    def _stop_at(self, job: Job, words: str) -> None:
        """Stop the run for what an endpoint said to a request, and say which it was."""
        self._stop(EndpointError(f"{words}; sent to {job.url or self._endpoint.url}"))

    def _stop(self, error: Exception) -> None:
        if not self._finished.done():
            self._finished.set_exception(error)

    # -- the clock

    def _on_tick(self, now: float) -> None:
        self._tally.in_flight = len(self._flying)
        self._end_overdue(now)
        self._feed_starving(now)
        self._check_patience(now)
        self._hire()

    def _end_overdue(self, now: float) -> None:
        """Ask rows again whose attempt is overdue."""
        least_s = self._timeout.seconds(0)
        # Whatever was sent after one that has not waited for so long has waited for less.
        late = list(takewhile(lambda each: now - each.started > least_s, self._flying))
        silent = now - self._heard_at > least_s / 2
        stuck = silent and self._line.pacer.full
        for attempt in late:
            if attempt.doubted and (now - attempt.started > least_s + DOUBT_S or (stuck and self._waits(attempt.job))):
                attempt.give_up(now)  # so that the attempt that waits has its place
        late = [each for each in late if self._is_overdue(each, now)]
        trials = len(self._on_trial - {attempt.job for attempt in late})
        for attempt in late:
            job, waited_s = attempt.job, now - attempt.started
            # Where the budget has no room for another, giving one up would gain nothing.
            room = self._budget is None or self._budget.fits(self._budget.bound(job.body))
            taken = trials if room else MOST_TRIALS
            if self._timeout.gives_up(waited_s, failures=job.timeouts, trials=taken, silent=silent):
                trials += 1
                if (
                    self._policy.timeout_s is None
                ):  # the user's own shows nothing, and all that is in flight may be late
                    self._on_trial.add(job)
                if stuck or not self._ask_beside(attempt):
                    attempt.give_up(now)

    def _feed_starving(self, now: float) -> None:
        """Have connections closed where attempts may wait for one; see `may_starve`."""
        usual_s = self._line.pacer.usual_s
        if usual_s is None:
            return
        starving = list(takewhile(lambda each: may_starve(now - each.started, usual_s), self._flying))
        if not starving:
            return
        hungry = [each for each in starving if may_starve(now - each.started, usual_s, each.starved)]
        for attempt in hungry:
            attempt.starved += 1
        self._line.transport.make_room(len(hungry), at_most=len(starving))

    def _is_overdue(self, attempt: Attempt, now: float) -> bool:
        """Whether an attempt takes longer than it should, and nothing came of that yet."""
        if attempt.doubted or attempt.given_up or attempt.moot:
            return False
        return now - attempt.started > self._timeout.seconds(attempt.job.timeouts)

    def _ask_beside(self, attempt: Attempt) -> bool:
        """Ask a row again beside an attempt that is overdue: were it slow and not lost, its answer will show that."""
        job = attempt.job
        window = self._line.pacer.window
        room = window >= DOUBTED_LEAST and sum(each.doubted for each in self._flying) < DOUBTED_SHARE * window
        if not room or self._policy.timeout_s is not None or job.strikes + 1 >= self._policy.max_attempts:
            return False
        attempt.doubted = True
        self._tally.failures["timeout"] += 1
        job.timeouts += 1
        job.strikes += 1
        job.failed += 1
        self._failing += job.failed == 1
        job.going += 1
        self._due.appendleft(job)
        self._add_worker()  # all others may be waiting for what is in flight
        return True

    def _let_go(self, job: Job) -> None:
        """End what is still under way for a row that has its outcome; what is doubted may go on, for what it shows."""
        job.over = True
        self._on_trial.discard(job)
        self._blame.forget(job)
        if not job.going:
            return
        if (timer := self._later.pop(job, None)) is not None:
            timer.cancel()
        for attempt in self._attempts_of(job):
            if not attempt.doubted:
                attempt.give_up(self._loop.time())

    def _waits(self, job: Job) -> bool:
        """Whether an attempt of a row waits for its turn."""
        return job.going > len(self._attempts_of(job))

    def _attempts_of(self, job: Job) -> list[Attempt]:
        """Give a row's attempts in flight."""
        return [attempt for attempt in self._flying if attempt.job is job] if job.going else []

    def _check_patience(self, now: float) -> None:
        """Stop when the endpoint has been out of reach, or down, for too long."""
        down_since = self._line.pacer.down_since
        words = self._patience.lost(now, down_since=down_since, oldest=self._oldest, answered=self._line.answered)
        if words:
            self._stop(EndpointError(words))

    @property
    def _oldest(self) -> float | None:
        """When the oldest request in flight was sent."""
        return next((attempt.started for attempt in self._flying), None)


class _Once:
    """Calls what it was given, the first time that it is called."""

    __slots__ = ("_call",)

    def __init__(self, call: Wrote) -> None:
        self._call: Wrote | None = call

    def __call__(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


def _tokens_of(body: bytes) -> int:
    """Give about what a request takes of a token limit."""
    return text_bytes(body) // BYTES_A_TOKEN + EXPECTED_TOKENS


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():  # its run may have ended meanwhile
        waiting.set_result(None)
