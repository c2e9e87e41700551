"""The cases of the benchmark: what the server does, what is asked of it, and what the figures must reach.

llmframe runs with default settings in all of them: nothing is passed but the model, the endpoint and a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import llmframe
from tests.bench.apart import imports_compared, peak_memory_mb
from tests.bench.figures import Figure, Measured, measure, prompts_of_20_to_2000_tokens, short_prompts
from tests.bench.ways import by_aiohttp, by_gather, by_llmframe, by_llmframe_with_own_transport
from tests.server import SimulatedServer
from tests.server_simulation import BINS_PER_S

SPREAD: dict[str, Any] = {"latency_s": 0.3, "latency_sigma": 0.3}
MEAN = math.exp(0.3**2 / 2)  # of a lognormal latency of sigma 0.3, in medians
LIMITED: dict[str, Any] = {**SPREAD, "requests_per_min": 6000, "request_burst": 100}
TOLD: dict[str, Any] = {"rate_headers": "openai", "retry_after": "seconds"}
FAST: dict[str, Any] = {"latency_s": 0.1, "slots": 64}
GATHER_SHARE = 0.2  # of the rows are enough to know the speed of the slow way
TENTH = 0.1

Figures = Iterator[Figure]


@dataclass(frozen=True, slots=True)
class Case:
    """A case: its name, how many rows it asks for, and what it measures with so many."""

    name: str
    rows: int
    figures: Callable[[int], Figures]


CASES: list[Case] = []


def case(name: str, rows: int) -> Callable[[Callable[[int], Figures]], Callable[[int], Figures]]:
    """Add a case to the table."""

    def add(figures: Callable[[int], Figures]) -> Callable[[int], Figures]:
        CASES.append(Case(name, rows, figures))
        return figures

    return add


def of_limit(measured: Measured, per_s: float, share: float) -> Figure:
    """Hold the speed against a share of a limit."""
    return Figure(f"of {per_s:,.0f}/s", measured.rate / per_s, share, form="{:.1%}")


def over_ideal(measured: Measured, ideal_s: float, more: float) -> Figure:
    """Hold the time against the ideal one and so much more."""
    return Figure(f"times the ideal {ideal_s:.1f} s", measured.stats.seconds / ideal_s, 1 + more, at_most=True)


# ---- an endpoint that limits its rate


@case("6,000 requests/min, headers", 6000)
def requests_told(rows: int) -> Figures:
    """The rate is told."""
    ran = measure(by_llmframe, short_prompts(rows), **LIMITED, **TOLD)
    yield of_limit(ran, 100, 0.97)
    yield ran.refused_at_most(0.005)
    yield ran.all_answered


@case("tokens/min, prompts of 20 to 2,000", 3000)
def tokens_told(rows: int) -> Figures:
    """The limit is one of tokens: about a hundred rows a second."""
    behaviour = {**SPREAD, **TOLD, "tokens_per_min": 6_000_000, "token_burst": 100_000}
    ran = measure(by_llmframe, prompts_of_20_to_2000_tokens(rows), **behaviour)
    tokens_per_s = (ran.stats.prompt_tokens + ran.stats.completion_tokens) / ran.stats.seconds
    yield Figure("of 100,000 tokens/s", tokens_per_s / 100_000, 0.95, form="{:.1%}")
    yield ran.refused_at_most(0.01)
    yield ran.all_answered


@case("6,000 requests/min, only 429 + Retry-After", 3000)
def requests_untold(rows: int) -> Figures:
    """The rate shows in refusals, which say when to come back."""
    ran = measure(by_llmframe, short_prompts(rows), **LIMITED, retry_after="seconds")
    yield of_limit(ran, 100, 0.93)
    yield ran.refused_at_most(0.02)
    yield ran.all_answered


@case("6,000 requests/min, bare 429", 3000)
def requests_bare(rows: int) -> Figures:
    """The rate shows in refusals that say nothing."""
    ran = measure(by_llmframe, short_prompts(rows), **LIMITED)
    yield of_limit(ran, 100, 0.88)
    yield ran.refused_at_most(0.03)
    yield ran.all_answered


@case("3,000 requests/min, a minute of burst", 4000)
def burst(rows: int) -> Figures:
    """The bucket is full at first."""
    ran = measure(by_llmframe, short_prompts(rows), **SPREAD, **TOLD, requests_per_min=3000)
    yield over_ideal(ran, max(0, rows - 3000) / 50 + 0.3, 0.07)
    yield ran.refused_at_most(0.01)
    yield ran.all_answered


@case("the limit halves at 10 s, doubles at 25 s", 3500)
def halving(rows: int) -> Figures:
    """The limit changes mid-run."""
    schedule = [
        (10.0, {"requests_per_min": 3000, "request_burst": 50}),
        (25.0, {"requests_per_min": 6000, "request_burst": 100}),
    ]
    ran = measure(by_llmframe, short_prompts(rows), **LIMITED, **TOLD, schedule=schedule)
    yield over_ideal(ran, 25 + (rows - 100 - 1000 - 750) / 100 + 0.3, 0.07)
    yield ran.refused_at_most(0.01)
    yield ran.all_answered


# ---- an endpoint that queues


@case("64 slots x 0.3 s, a silent queue", 4000)
def slots(rows: int) -> Figures:
    """The server is kept full, and not flooded."""
    ran = measure(by_llmframe, short_prompts(rows), latency_s=0.3, slots=64)
    yield of_limit(ran, 64 / 0.3, 0.95)
    yield Figure("in flight after 2 s", ran.stats.max_in_flight_after_2_s, 128, at_most=True, form="{:.0f}")


@case("64 slots x 0.3 s lognormal, a silent queue", 4000)
def slots_with_spread(rows: int) -> Figures:
    """The same with answers of all lengths."""
    ran = measure(by_llmframe, short_prompts(rows), **SPREAD, slots=64)
    yield of_limit(ran, 64 / (0.3 * MEAN), 0.95)
    yield Figure("in flight after 2 s", ran.stats.max_in_flight_after_2_s, 128, at_most=True, form="{:.0f}")


@case("slots grow from 16 to 128 at 8 s", 5000)
def slots_grow(rows: int) -> Figures:
    """The server becomes eight times as large."""
    ran = measure(by_llmframe, short_prompts(rows), latency_s=0.3, slots=16, schedule=[(8.0, {"slots": 128})])
    yield over_ideal(ran, 8 + max(0.0, rows - 8 * 16 / 0.3) / (128 / 0.3), 0.08)
    window = int(llmframe.last_run().timeline["window"].iloc[-1])
    yield Figure("window at the end", window, 256, at_most=True, form="{:.0f}")


# ---- an endpoint that fails


@case("64 slots x 0.1 s: 5 % 500, 2 % reset, 1 % HTML", 6000)
def faults(rows: int) -> Figures:
    """Chance failures cost no speed and no row."""
    clean = measure(by_llmframe, short_prompts(rows), **FAST)
    ran = measure(by_llmframe, short_prompts(rows), **FAST, p_500=0.05, p_reset=0.02, p_html=0.01)
    yield Figure("times the clean time", ran.stats.seconds / clean.stats.seconds, 1.08, at_most=True)
    yield ran.all_answered


@case("64 slots x 0.1 s: 0.3 % hang for ever", 6000)
def hangs(rows: int) -> Figures:
    """A hung request costs its timeout, and no more."""
    clean = measure(by_llmframe, short_prompts(rows), **FAST)
    ran = measure(by_llmframe, short_prompts(rows), **FAST, p_hang=0.003)
    outcomes = llmframe.last_run()._state.outcomes
    hung = max(outcomes[number].attempts for number in range(rows)) - 1  # each time its row waits twice as long
    bound_s = 1.15 * clean.stats.seconds + 5
    name = f"seconds (1.15 x clean + 5; one row hung {hung} x)"
    yield Figure(name, ran.stats.seconds, bound_s, at_most=True, form="{:.1f}")
    yield ran.all_answered


@case("64 slots x 0.1 s: 1 % take 2 s", 6000)
def slow_answers(rows: int) -> Figures:
    """No answer that would have come is cut off."""
    ran = measure(by_llmframe, short_prompts(rows), **FAST, p_slow=0.01, slow_s=2.0)
    yield Figure("requests sent", ran.stats.received, rows, at_most=True, form="{:,.0f}")
    yield ran.all_answered


@case("64 slots x 0.1 s: 503 from 3 s to 8 s", 5000)
def outage(rows: int) -> Figures:
    """An outage is probed, and left behind at once."""
    schedule = [(3.0, {"status_all": 503}), (8.0, {"status_all": None})]
    ran = measure(by_llmframe, short_prompts(rows), **FAST, schedule=schedule)
    received, answered = ran.stats.received_course, ran.stats.answered_course
    began, ended = 3 * BINS_PER_S, 8 * BINS_PER_S
    in_flight = ran.stats.in_flight_course[began - 1]
    yield Figure("requests, with those in flight", sum(received[began:ended]) + in_flight, 99, True, "{:.0f}")
    back = sum(answered[ended + BINS_PER_S : ended + 2 * BINS_PER_S])
    yield Figure("of full speed from 1 s to 2 s after", back / (64 / 0.1), 0.95, form="{:.1%}")
    yield ran.all_answered


# ---- the machine's own limit


@case("50 ms, 128 in flight", 20_000)
def latency_50_ms(rows: int) -> Figures:
    """Ratios within one run: the machine's speed drifts."""
    behaviour: dict[str, Any] = {"latency_s": 0.05, "slots": 128}
    slow = measure(by_gather(128), short_prompts(int(GATHER_SHARE * rows)), **behaviour)
    bare = measure(by_aiohttp(128), short_prompts(rows), **behaviour)
    ran = measure(by_llmframe, short_prompts(rows), **behaviour)
    yield Figure(f"times gather ({slow.rate:,.0f}/s)", ran.rate / slow.rate, 4.5)
    yield Figure(f"times bare aiohttp ({bare.rate:,.0f}/s)", ran.rate / bare.rate, 0.8)


@case("answers at once, 64 in flight", 50_000)
def at_once(rows: int) -> Figures:
    """All of llmframe's own work."""
    slow = measure(by_gather(64), short_prompts(int(GATHER_SHARE * rows)))
    bare = measure(by_aiohttp(64), short_prompts(rows))
    ran = measure(by_llmframe, short_prompts(rows))
    yield Figure(f"times gather ({slow.rate:,.0f}/s)", ran.rate / slow.rate, 8)
    yield Figure(f"times bare aiohttp ({bare.rate:,.0f}/s)", ran.rate / bare.rate, 0.5)
    yield Figure("CPU ms a row, all included", 1000 * ran.cpu_s / rows, 0.35, at_most=True)


@case("the SDK's path: a user's http_client, 50 ms", 5000)
def sdk_path(rows: int) -> Figures:
    """The slower way, for a client that is more than its properties."""
    behaviour: dict[str, Any] = {"latency_s": 0.05, "slots": 128}
    slow = measure(by_gather(128), short_prompts(rows), **behaviour)
    ran = measure(by_llmframe_with_own_transport, short_prompts(rows), **behaviour)
    yield Figure(f"times gather ({slow.rate:,.0f}/s)", ran.rate / slow.rate, 1.5)


@case("200,000 short rows, 5 ms", 200_000)
def long_run(rows: int) -> Figures:
    """Memory follows what is in flight, and the last rows are as fast as the first."""
    with SimulatedServer(latency_s=0.005, log=False) as server:
        peak, before, answered = peak_memory_mb(server.base_url, rows)
        course = server.stats().answered_course
    yield Figure("MB over the frame's own", peak - before, 400, at_most=True, form="{:.0f}")
    yield Figure("last tenth, times the first", _speed_of(course, 0.9, 1) / _speed_of(course, 0, TENTH), 0.9)
    yield Figure("rows answered", answered, rows, form="{:,.0f}")


def _speed_of(course: list[int], since: float, until: float) -> float:
    """Give the answers a second between two shares of all answers."""
    total, reached, times = sum(course), 0, []
    for share in (since, until):
        reached, number = 0, 0
        while number < len(course) and reached < share * total:
            reached += course[number]
            number += 1
        times.append(number / BINS_PER_S)
    return (until - since) * total / max(1 / BINS_PER_S, times[1] - times[0])


@case("1, 10 and 100 rows, 0.3 s", 100)
def few_rows(rows: int) -> Figures:
    """Starting costs nothing."""
    with SimulatedServer(latency_s=0.3, log=False) as server:
        for number, bound_s in ((1, 0.02), (10, 0.02), (rows, 0.3)):
            ways = [by_llmframe, by_gather(128)]
            for way in ways:
                way(server.base_url, short_prompts(number))  # the first call of a process imports what it needs
            runs = [[way(server.base_url, short_prompts(number))[0] for way in ways] for _ in range(5)]
            ours, theirs = (median(seconds) for seconds in zip(*runs, strict=True))
            yield Figure(f"seconds over gather ({theirs:.3f}), {number} rows", ours - theirs, bound_s, True, "{:.3f}")


@case("import llmframe", 1)
def import_time(rows: int) -> Figures:
    """Beside what nobody who uses it can do without."""
    ours, theirs = imports_compared()
    yield Figure(f"times pandas + openai ({theirs:.2f} s)", ours / theirs, 1.15, at_most=True)
