"""Progress: one bar a run.

Drawn in the thread that waits, never on the loop that works; what cannot be drawn stops nothing.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter, deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import TqdmWarning
from tqdm.utils import disp_len

from llmframe.notices import say, wanted

if TYPE_CHECKING:
    from llmframe.options import Options
    from llmframe.pacing import Pacer
    from llmframe.results import Usage

with warnings.catch_warnings():
    # A notebook without ipywidgets gets the bar as text, which is as good: nothing to warn of.
    warnings.simplefilter("ignore", TqdmWarning)
    from tqdm.auto import tqdm

DRAW_S = 0.5  # as often as a person can read it
LINE_S = 10.0  # a log is read afterwards
RATE_S = 10.0  # what rows/s is taken over: long enough to be steady, short enough to show a stall
BLOCKS = 3  # columns for the bar itself, where the words leave no more
TITLE = 20  # characters of the output's name
KINDS = 3  # failures named, the commonest first


class Going(Protocol):
    """What a bar shows: a run, or a job of many; see `State`."""

    @property
    def options(self) -> Options:
        """The call's keywords."""
        ...

    @property
    def rows(self) -> int:
        """Rows in all."""
        ...

    @property
    def rows_done(self) -> int:
        """Rows with an outcome."""
        ...

    @property
    def rows_a_request(self) -> float:
        """Rows that one request answers, on average."""
        ...

    @property
    def usage(self) -> Usage:
        """Tokens paid."""
        ...

    @property
    def cost_usd(self) -> float | None:
        """USD paid; None where no price is known."""
        ...

    @property
    def sent(self) -> int:
        """Requests sent."""
        ...

    @property
    def in_flight(self) -> int:
        """Requests in flight."""
        ...

    @property
    def failures(self) -> Counter[str]:
        """Attempts that gave no answer, by kind."""
        ...

    @property
    def pacer(self) -> Pacer | None:
        """What decides how fast."""
        ...

    @property
    def ended(self) -> float | None:
        """When it ended; None while it goes on."""
        ...

    @property
    def seconds(self) -> float:
        """Since its start."""
        ...


class Bar:
    """The bar of one run; nothing at all where none is wanted, or where there is nothing to ask."""

    def __init__(self, state: Going, progress: bool | None) -> None:
        self._state = state
        self._wanted = state.rows_done < state.rows and wanted(progress)
        self._bar: Any = None
        self._drawn = time.monotonic()
        self._begun = self._drawn, state.rows_done
        self._course = deque([self._begun])

    def draw(self) -> None:
        """Bring the bar up to date, where that is due."""
        if self._wanted and (self._bar is None or time.monotonic() - self._drawn >= DRAW_S):
            with suppress(Exception):  # whoever read it is gone, say; a run that is paid for goes on
                self._update()
                self._bar.refresh()

    def close(self) -> None:
        """Draw the last state, with the rate over the whole run, and let the bar stand."""
        if self._wanted:
            with suppress(Exception):
                self._update()
                self._bar.close()

    def _update(self) -> None:
        state, course = self._state, self._course
        if self._bar is None:
            # Not when it is made: nothing that may fail or take long comes between a plan and its run.
            self._bar = _Tqdm(
                desc=_cut(state.options.output, TITLE),
                total=state.rows,
                initial=self._begun[1],
                dynamic_ncols=True,
                bar_format=_layout(words(state, rate=0.0)),
            )
        self._drawn = now = time.monotonic()
        while len(course) > 1 and now - course[0][0] > RATE_S:
            course.popleft()
        course.append((now, state.rows_done))
        then, before = course[0] if state.ended is None else self._begun
        columns = self._bar.format_dict["ncols"]  # a terminal's; a notebook has a percentage, or none
        width = columns - len(_layout("").format(desc="", bar=" " * BLOCKS)) if isinstance(columns, int) else math.inf
        self._bar.desc = _cut(state.options.output, min(TITLE, width - len(_count(state))))
        self._bar.n = state.rows_done
        rate = (state.rows_done - before) / (now - then) if now > then else 0.0  # Windows' clock moves every 15 ms
        self._bar.bar_format = _layout(words(state, rate=rate, room=width - disp_len(self._bar.desc)))


class Lines:
    """Progress where there is no terminal: a plain line every `LINE_S`, for the log of whoever runs the job."""

    def __init__(self, state: Going) -> None:
        self._state = state
        self._said = time.monotonic()
        self._before = state.rows_done

    def draw(self) -> None:
        """Say how it is getting on, where that is due."""
        now = time.monotonic()
        if now - self._said >= LINE_S:
            rate = (self._state.rows_done - self._before) / (now - self._said)
            self._said, self._before = now, self._state.rows_done
            say(words(self._state, rate=rate), quiet=False)

    def close(self) -> None:
        """Say the last state, with the rate over the whole run."""
        seconds = max(self._state.seconds, 1e-9)
        say(words(self._state, rate=self._state.rows_done / seconds), quiet=False)


class _Tqdm(tqdm):  # type: ignore[type-arg]
    monitor_interval = 0  # no thread that looks after the bar: it is drawn in time as it is

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> Any:  # noqa: ARG002
        # tqdm's own leaves it taken where drawing raises, and every `say` would wait for it.
        with self.get_lock():  # type: ignore[no-untyped-call]
            return super().refresh(nolock=True)

    def close(self) -> None:
        with suppress(Exception):  # called as it is collected, too, and Python would print what it raises
            super().close()


def _cut(text: str, width: float) -> str:
    """Shorten a name to so many columns of a terminal, in which some scripts take two a character."""
    if disp_len(text) <= width:
        return text
    while text and disp_len(text) > width - 1:
        text = text[:-1]
    return f"{text}…" if width >= 1 else ""


def _layout(text: str) -> str:
    return f"{{desc}}|{{bar}}| {text}"


def _count(state: Going) -> str:
    return f"{state.rows_done:,}/{state.rows:,}"


def _remaining_s(state: Going, rate: float) -> float:
    # What a full bucket lets through at first is not what the limit allows for long.
    rows = state.rows - state.rows_done
    known_s = state.pacer.takes_s(rows / max(1.0, state.rows_a_request)) if state.pacer is not None else 0.0
    return max(rows / rate, known_s)


def words(state: Going, *, rate: float, room: float = math.inf) -> str:
    """Say how a run is getting on, in the columns there are.

    Parameters
    ----------
    state : Going
        The run.
    rate : float
        Rows a second.
    room : float
        Columns. Where they are too few, what matters least is left out.
    """
    going = state.ended is None
    tokens = state.usage.prompt_tokens + state.usage.completion_tokens
    limit = state.pacer.limited_by if state.pacer is not None and going else ""
    remaining_s = _remaining_s(state, rate) if rate > 0 else None
    # In the order they are read, each with its weight.
    said = [(9, _count(state))]
    if not going:
        said.append((8, f"in {tqdm.format_interval(state.seconds)}"))
    elif remaining_s is not None:
        said.append((8, f"{tqdm.format_interval(remaining_s)} left"))
    if state.sent:
        said.append((7, f"{rate:,.0f}/s" if rate >= 10 or rate == 0 else f"{rate:.2g}/s"))
    if state.sent and going:
        said.append((3, f"{state.in_flight:,} in flight"))
    if tokens:
        said.append((2, f"{tqdm.format_sizeof(tokens) if tokens >= 10_000 else f'{tokens:,}'} tokens"))
    if state.cost_usd is not None:
        said.append((4, f"${state.cost_usd:.2f}" if state.cost_usd >= 1 else f"${state.cost_usd:.4f}"))
    for place, (kind, count) in enumerate(state.failures.most_common(KINDS)):
        said.append((1 if place else 6, f"{count:,} x {kind}"))
    if limit:
        said.append((5, f"limit: {limit}"))
    kept = set[int]()
    for place in sorted(range(len(said)), key=lambda place: -said[place][0]):
        text = ", ".join(said[each][1] for each in sorted({*kept, place}))
        if len(text) <= room:
            kept.add(place)
    return ", ".join(said[place][1] for place in sorted(kept))
