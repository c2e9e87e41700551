"""The one door from ordinary code to async code: a script, a cell, a thread, a running loop.

An interrupt cancels the run, waits until it has unwound, and only then is raised; the caller's loop, thread
and kernel are as they were.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextvars
import math
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager
from types import FrameType
from typing import Any, TypeVar

from llmframe.errors import ConfigurationError
from llmframe.lines import close_lines

T = TypeVar("T")
Start = Callable[[], Coroutine[Any, Any, T]]

HEARTBEAT_S = 0.1  # how often the caller wakes: to draw, and so that ipykernel can hand an interrupt to its cell
HARD_STOP_S = 2.0  # what a second interrupt leaves a run to let go of its connections
CLOSE_S = 5.0  # what the end of the process leaves the runs that still go on, to save what was answered

_lock = threading.Lock()
_background: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None
_parents: object = None
_under_way: set[_Flight] = set()
_awaited: set[Callable[[], object]] = set()  # what cancels those that a loop of the main thread waits for


def in_running_loop() -> bool:
    """Whether the calling thread is inside a running event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def run(start: Start[T], beat: Callable[[], None]) -> T:
    """Run on the background loop, and wait.

    Parameters
    ----------
    start : callable
        Makes the coroutine.
    beat : callable
        Called in this thread every `HEARTBEAT_S`; it does not raise.

    Raises
    ------
    ConfigurationError
        It is called on the background loop itself, as from a validator of a schema: that loop would wait for itself.
    KeyboardInterrupt
        After the run has unwound; at a second one without waiting longer than `HARD_STOP_S`.
    """
    if _background is not None and threading.current_thread() is _background[1]:
        raise ConfigurationError(
            "a validator of a schema, or a hook of a client, called llmframe from inside a run, which would wait for "
            "itself; make it a second call, over the frame that came back"
        )
    flight = _Flight()
    with _interrupts_cancel(flight.cancel) as interrupts:
        try:
            flight.launch(start)
            flight.wait(beat, interrupts)
        except BaseException:  # what another signal's handler raises: nobody would be left to wait for the run
            flight.cancel()
            flight.wait(beat, interrupts)
            raise
    if interrupts:
        raise KeyboardInterrupt
    result: T = flight.outcome.result()
    return result


async def arun(start: Start[T], beat: Callable[[], None], *, here: bool) -> T:
    """Run on the background loop, or on the caller's own (`here`), and wait without blocking it."""
    if here:
        outcome: asyncio.Future[T] = asyncio.ensure_future(start())
        cancel: Callable[[], object] = outcome.cancel
    else:
        flight = _Flight()
        flight.launch(start, asyncio.get_running_loop())
        outcome = asyncio.wrap_future(flight.outcome)
        cancel = flight.cancel
    waiting = {outcome}
    try:
        with _interrupts_also_cancel(cancel):
            while not (await asyncio.wait(waiting, timeout=HEARTBEAT_S))[0]:
                beat()
    except (asyncio.CancelledError, Exception):
        outcome.add_done_callback(_mark_as_seen)  # what stopped the wait is what the caller gets
        cancel()
        await _unwound(outcome, cancel)
        raise
    return outcome.result()


async def _unwound(outcome: asyncio.Future[Any], cancel: Callable[[], object]) -> None:
    """Wait until a cancelled run has unwound; after a second cancellation no longer than `HARD_STOP_S`.

    anyio, and so Starlette, repeats one cancellation at every turn of the loop: those that follow at once are the same.
    """
    last, ends = time.monotonic(), math.inf
    while not outcome.done() and (now := time.monotonic()) < ends:
        try:
            await asyncio.wait({outcome}, timeout=None if ends == math.inf else ends - now)
        except asyncio.CancelledError:
            before, last = last, time.monotonic()
            if last - before > HEARTBEAT_S and ends == math.inf:
                ends = last + HARD_STOP_S
                cancel()


def _mark_as_seen(outcome: asyncio.Future[Any]) -> None:
    if not outcome.cancelled():
        outcome.exception()


def let_callers_loop_nest() -> None:
    """Patch the running loop so that a synchronous call in it can run it; the patch is process-wide.

    Raises
    ------
    ConfigurationError
        The loop cannot be patched (uvloop).
    """
    import nest_asyncio

    loop = asyncio.get_running_loop()
    try:
        nest_asyncio.apply(loop)
    except ValueError as error:
        raise ConfigurationError(
            f"this client belongs to a running event loop of type {type(loop).__module__}.{type(loop).__name__}, in "
            "which a call cannot wait; write `await df.llm.acomplete(...)`, or leave client= out"
        ) from error


def run_in_callers_loop(start: Start[T], beat: Callable[[], None]) -> T:
    """Run inside the caller's running loop from a synchronous call, for a client that belongs to that loop.

    A bare ``run_until_complete`` leaves a kernel dead after an interrupt, so an interrupt cancels the task instead.

    Raises
    ------
    ConfigurationError
        See `let_callers_loop_nest`.
    KeyboardInterrupt
        After the run has unwound.
    """
    let_callers_loop_nest()
    loop = asyncio.get_running_loop()
    task = loop.create_task(_with_beat(start, beat))
    with _interrupts_cancel(lambda: loop.call_soon_threadsafe(task.cancel)) as interrupts:
        _run_nested(loop, task)
    if interrupts:
        raise KeyboardInterrupt
    return task.result()


def _run_nested(loop: Any, task: asyncio.Task[Any]) -> None:
    """Turn a patched loop from inside, until the task is done.

    A callback whose context is entered already cannot run in here: it would raise, and be lost. ipykernel runs all
    cells in one context, so that is how the next cell waits for this one. Such callbacks are put by.
    """
    held: list[asyncio.Handle] = []
    try:
        while not task.done():
            for handle in [handle for handle in loop._ready if _is_entered(handle._context)]:
                loop._ready.remove(handle)
                held.append(handle)
            loop._run_once()
    finally:
        loop._ready.extendleft(reversed(held))


def _is_entered(context: contextvars.Context) -> bool:
    try:
        context.run(int)
    except RuntimeError:
        return True
    return False


async def _with_beat(start: Start[T], beat: Callable[[], None]) -> T:
    return await arun(start, beat, here=True)


@contextmanager
def _interrupts_cancel(cancel: Callable[[], object]) -> Iterator[list[float]]:
    """Let Ctrl-C cancel while the block runs, rather than raise in the middle of whatever it meets; gives when it came.

    So does a SIGTERM that was made one (by `signal.default_int_handler`). A handler of the user's own is left in place.
    One that stands while a loop runs is the loop's: it would wait for this call to end.
    """
    came: list[float] = []

    def note(_number: int, _frame: FrameType | None) -> None:
        came.append(time.monotonic())
        cancel()

    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    loops_own = in_running_loop() and previous.get(signal.SIGINT) not in (None, signal.SIG_IGN)
    taken = [
        number
        for number, handler in previous.items()
        if handler is signal.default_int_handler or (loops_own and number is signal.SIGINT)
    ]
    for number in taken:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number in taken:
            signal.signal(number, previous[number])


@contextmanager
def _interrupts_also_cancel(cancel: Callable[[], object]) -> Iterator[None]:
    """Let a Ctrl-C that nobody has a handler for cancel too, before it is raised as ever.

    `asyncio.run` and ipykernel cancel the task that waits. Out of `loop.run_until_complete`, which is how IPython
    awaits in a terminal, it is raised past that task, and what the task waits for would go on, and be paid for.
    """
    if not _takes_interrupts():
        yield
        return
    signal.signal(signal.SIGINT, _cancel_and_raise)
    _awaited.add(cancel)
    try:
        yield
    finally:
        _awaited.discard(cancel)
        if not _awaited and _takes_interrupts():
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _takes_interrupts() -> bool:
    if threading.current_thread() is not threading.main_thread():
        return False
    return signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _cancel_and_raise)


def _cancel_and_raise(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for cancel in tuple(_awaited):
        cancel()
    _awaited.clear()
    signal.default_int_handler(number, frame)


async def in_thread(work: Callable[[], T]) -> T:
    """Do blocking work in a thread of its own.

    Unlike an executor's it can be started while the interpreter shuts down, and is waited for by it: what was paid for
    is saved then too. Cancelling the wait does not stop the work.
    """
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
    outcome.set_running_or_notify_cancel()
    context = contextvars.copy_context()

    def do() -> None:
        try:
            outcome.set_result(context.run(work))
        except BaseException as error:
            outcome.set_exception(error)

    try:
        threading.Thread(target=do, name="llmframe-work").start()
    except RuntimeError:  # the interpreter is past the point where it takes new threads
        do()
    return await asyncio.wrap_future(outcome)


async def to_its_end(work: Callable[[], T]) -> T:
    """Do blocking work as `in_thread` does; whoever is cancelled meanwhile waits for it, since it holds files."""
    task = asyncio.ensure_future(in_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


@asynccontextmanager
async def entered(manager: AbstractContextManager[T]) -> AsyncIterator[T]:
    """Enter in a thread what is waited for, such as a lock of another process, and leave it when the block ends.

    Whoever is cancelled meanwhile waits for it and leaves it. Cancelled twice, nobody waits any more, and it is left as
    soon as it is entered: a lock that is taken with nobody there to release it would lock out the next call.
    """

    def leave(entering: asyncio.Task[T]) -> None:
        if not entering.cancelled() and entering.exception() is None:
            manager.__exit__(None, None, None)

    entering = asyncio.ensure_future(in_thread(manager.__enter__))
    try:
        value = await asyncio.shield(entering)
    except asyncio.CancelledError:
        entering.add_done_callback(leave)
        await asyncio.wait({entering})
        raise
    with ExitStack() as stack:
        stack.push(manager)
        yield value


async def ended(tasks: set[asyncio.Task[None]]) -> None:
    """Cancel these, and wait for it; who is interrupted twice cancels them twice: they wait for nothing in flight."""
    if not tasks:
        return
    for task in tasks:
        task.cancel()
    try:
        await asyncio.wait(tasks)
    except asyncio.CancelledError:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        raise


class _Flight:
    """A coroutine under way on the background loop.

    A future of `asyncio.run_coroutine_threadsafe` counts as done as soon as it is cancelled; this one is done
    when the coroutine is.
    """

    def __init__(self) -> None:
        self.outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.outcome.set_running_or_notify_cancel()
        self._loop = background_loop()
        self._task: asyncio.Task[Any] | None = None
        self._done = False
        self._landed = threading.Lock()
        self._landed.acquire()
        self.outcome.add_done_callback(self._tell)

    def launch(self, start: Start[Any], callers: asyncio.AbstractEventLoop | None = None) -> None:
        """Start the coroutine that `start` makes; it is stopped where the loop that waits for it is closed."""
        self._loop.call_soon_threadsafe(self._begin, start)
        if callers is not None:
            self._loop.call_soon_threadsafe(self._end_with, callers)

    def cancel(self) -> None:
        """Ask the coroutine to stop."""
        self._loop.call_soon_threadsafe(self._cancel)

    def abandon(self) -> asyncio.Task[Any]:
        """Stop the coroutine and tell nobody: who waits for it is a thread that ends with the process."""
        assert self._task is not None
        self._task.remove_done_callback(self._land)
        self._task.cancel()
        return self._task

    def wait(self, beat: Callable[[], None], interrupts: Sequence[float]) -> None:
        """Wait until it is done; after a second interrupt no longer than `HARD_STOP_S`.

        A signal's handler may raise anywhere in here. In whatever waits for a future, or only asks whether it is done,
        that can leave its lock taken, and the loop's thread would stand there for good.
        """
        while not self._done:
            if self._landed.acquire(timeout=HEARTBEAT_S):
                return
            if len(interrupts) > 1 and time.monotonic() - interrupts[1] > HARD_STOP_S:
                return
            beat()

    def _begin(self, start: Start[Any]) -> None:
        self._task = self._loop.create_task(start())
        _under_way.add(self)
        self._task.add_done_callback(self._land)

    def _end_with(self, callers: asyncio.AbstractEventLoop) -> None:
        if callers.is_closed():
            self.outcome = concurrent.futures.Future()  # the other one tells that loop
            self._cancel()
        elif not self._done:
            self._loop.call_later(HEARTBEAT_S, self._end_with, callers)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        elif not self.outcome.done():  # interrupted before it was launched
            self.outcome.set_exception(asyncio.CancelledError())

    def _tell(self, _outcome: object) -> None:
        self._done = True
        self._landed.release()

    def _land(self, task: asyncio.Task[Any]) -> None:
        _under_way.discard(self)
        if task.cancelled():
            self.outcome.set_exception(asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(task.result())


def background_loop() -> asyncio.AbstractEventLoop:
    """Give the process's own loop, on a thread of its own; started at first use.

    Connections and learned limits live on it from call to call, which a loop made for each call would throw away.
    """
    global _background
    with _lock:
        if _background is None:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=_serve, args=(loop,), name="llmframe", daemon=True)
            thread.start()
            _background = loop, thread
        return _background[0]


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    loop.close()


@atexit.register
def _shut_down() -> None:
    """End the runs that nobody waits for any more, and close the connections, so that a process ends in silence."""
    if _background is None:
        return
    loop, thread = _background
    ends = time.monotonic() + CLOSE_S
    # A first interrupt is of somebody who has waited for an end that is near; what was answered is saved before it.
    with _interrupts_cancel(lambda: None) as interrupts:
        winding_up = asyncio.run_coroutine_threadsafe(_wind_up(), loop)
        while not winding_up.done() and time.monotonic() < ends and len(interrupts) < 2:
            concurrent.futures.wait([winding_up], timeout=HEARTBEAT_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(CLOSE_S if len(interrupts) < 2 else HEARTBEAT_S)


async def _wind_up() -> None:
    await asyncio.gather(*[flight.abandon() for flight in _under_way], return_exceptions=True)
    await close_lines()


def _start_anew() -> None:
    """Forget the parent's loop in a forked child: threads do not survive a fork.

    The loop itself is kept: the end of its connections would take them out of the parent's selector too.
    """
    global _background, _parents, _lock
    _background, _parents = None, _background
    _under_way.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
