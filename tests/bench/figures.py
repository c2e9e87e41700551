"""What a benchmark measures: one run of one way against one server, and figures beside what they must reach."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Any

from tests.bench.ways import Way
from tests.server import SimulatedServer, Stats


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured figure and its bound.

    Attributes
    ----------
    what : str
        With its unit.
    measured, bound : float
        As they are.
    at_most : bool
        The bound is the most it may be, and not the least.
    form : str
        How both are written.
    """

    what: str
    measured: float
    bound: float
    at_most: bool = False
    form: str = "{:.2f}"

    @property
    def reached(self) -> bool:
        """Whether it is within its bound."""
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    def row(self, case: str) -> str:
        """Write it as a row of a markdown table."""
        sign = "<=" if self.at_most else ">="
        verdict = "yes" if self.reached else "**no**"
        required, measured = self.form.format(self.bound), self.form.format(self.measured)
        return f"| {case} | {self.what} | {sign} {required} | {measured} | {verdict} |"


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run took.

    Attributes
    ----------
    rows, answered : int
        Asked, and with an answer.
    seconds : float
        Of the whole call.
    cpu_s : float
        Of this process in that time.
    stats : Stats
        What the server saw.
    """

    rows: int
    answered: int
    seconds: float
    cpu_s: float
    stats: Stats

    @property
    def rate(self) -> float:
        """Rows a second from the first request to the last answer."""
        return self.rows / self.stats.seconds

    @property
    def share_refused(self) -> float:
        """Requests that met a 429, of all that were sent."""
        return self.stats.refused / self.stats.received

    @property
    def all_answered(self) -> Figure:
        """The first promise."""
        return Figure("rows answered", self.answered, self.rows, form="{:,.0f}")

    def refused_at_most(self, share: float) -> Figure:
        """Hold the refusals against a bound."""
        return Figure("requests refused with 429", self.share_refused, share, at_most=True, form="{:.2%}")


def measure(way: Way, prompts: list[str], **behaviour: Any) -> Measured:
    """Run one way against a server of its own, which knows nothing of any other."""
    with SimulatedServer(**behaviour, log=False) as server:
        cpu_before = time.process_time()
        seconds, answered = way(server.base_url, prompts)
        cpu_s = time.process_time() - cpu_before
        return Measured(len(prompts), answered, seconds, cpu_s, server.stats())


def short_prompts(rows: int) -> list[str]:
    """Prompts of a line."""
    return [f"row {number}: is this review positive or negative?" for number in range(rows)]


def prompts_of_20_to_2000_tokens(rows: int) -> list[str]:
    """Prompts whose lengths are as different as those of reviews and reports; the same ones every time."""
    chance = random.Random(5)
    return [f"{number:06} " + "word" * (chance.randint(20, 2000) - 5) for number in range(rows)]
