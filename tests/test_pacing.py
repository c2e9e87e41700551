"""The pacer through whole runs against simulated endpoints, and its promises one by one.

A run's figures are those that the engine must reach on real sockets; here they are held over several seeds.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmframe.limits import RateHeaders
from llmframe.pacing import Caps, Moment, Pacer
from llmframe.rates import Cap, Share
from llmframe.window import START_AT_ONCE
from tests.simulation import Outcome, Server, Simulation, simulate

SEEDS = range(6)
MEAN = math.exp(0.3**2 / 2)  # of a lognormal latency of sigma 0.3, in medians

LIMITED: dict[str, Any] = {"rpm": 6000, "burst": 100, "latency_s": 0.3, "sigma": 0.3}
TOLD: dict[str, Any] = {"headers": "answer", "retry_after": "seconds"}
SILENT: dict[str, Any] = {"latency_s": 0.3, "sigma": 0.3, "slots": 64}
FAST: dict[str, Any] = {"latency_s": 0.1, "sigma": 0.3, "slots": 64}


def runs(server: Server, rows: int) -> list[Outcome]:
    return [simulate(server, rows, seed=seed) for seed in SEEDS]


def prompts(rows: int, seed: int, estimate: float = 1.0) -> list[tuple[int, int]]:
    """Prompts of 20 to 2,000 tokens, estimated with an error of a factor and some noise."""
    chance = random.Random(seed)
    taken = [chance.randint(20, 2000) for _ in range(rows)]
    return [(tokens, max(1, int(tokens * estimate * chance.uniform(0.8, 1.25)))) for tokens in taken]


# ---- an endpoint that limits its rate


@pytest.mark.parametrize("headers", ["answer", "arrival"])
@pytest.mark.parametrize("rows", [1500, 6000])
def test_a_told_request_rate_is_used_to_97_percent_with_hardly_a_refusal(headers: Any, rows: int) -> None:
    for out in runs(Server(**LIMITED, headers=headers, retry_after="seconds"), rows):
        assert rows / out.seconds >= 0.97 * 100
        assert out.share_refused <= 0.005


@pytest.mark.parametrize("estimate", [0.25, 1.0, 4.0])
def test_a_told_token_rate_is_used_to_95_percent_however_wrong_the_estimates(estimate: float) -> None:
    server = Server(tpm=6e6, token_burst=1e5, latency_s=0.3, sigma=0.3, **TOLD)
    for seed in SEEDS:
        rows = prompts(3000, seed, estimate)
        out = simulate(server, rows, seed=seed)
        assert sum(taken for taken, _ in rows) / out.seconds >= 0.95 * 1e5
        assert out.share_refused <= 0.01


def test_tokens_by_the_minute_with_a_minute_of_burst_are_used_and_not_overdrawn() -> None:
    server = Server(tpm=1.2e6, latency_s=0.3, sigma=0.3, **TOLD)
    for seed in SEEDS:
        rows = prompts(2000, seed, 0.5)
        out = simulate(server, rows, seed=seed)
        ideal_s = (sum(taken for taken, _ in rows) - 1.2e6) / 2e4
        assert out.seconds <= ideal_s * 1.07
        assert out.share_refused <= 0.01


@pytest.mark.parametrize("retry_after", ["seconds", "exact"])
def test_a_rate_that_only_429_and_retry_after_show_is_used_to_93_percent(retry_after: Any) -> None:
    for out in runs(Server(**LIMITED, retry_after=retry_after), 1500):
        assert 1500 / out.seconds >= 0.93 * 100
        assert out.share_refused <= 0.02


def test_a_rate_that_only_bare_429s_show_is_used_to_88_percent() -> None:
    for out in runs(Server(**LIMITED), 1500):
        assert 1500 / out.seconds >= 0.88 * 100
        assert out.share_refused <= 0.03


@pytest.mark.parametrize("retry_after", [None, "seconds"])
def test_a_rate_without_headers_is_kept_through_a_long_run(retry_after: Any) -> None:
    for out in runs(Server(**LIMITED, retry_after=retry_after), 12_000):
        assert 12_000 / out.seconds >= 0.95 * 100
        assert out.share_refused <= 0.01


@pytest.mark.parametrize(("burst", "retry_after_s", "part"), [(100, 2.0, 0.85), (40, 5.0, 0.7), (100, 10.0, 0.5)])
def test_a_wait_far_longer_than_a_bucket_takes_to_fill_does_not_make_the_rate_look_low(
    burst: float, retry_after_s: float, part: float
) -> None:
    for out in runs(Server(rpm=60 * burst, burst=burst, latency_s=0.3, sigma=0.3, retry_after=retry_after_s), 9000):
        assert 9000 / out.seconds >= part * burst


def test_a_minute_of_burst_is_used() -> None:
    for out in runs(Server(rpm=3000, latency_s=0.3, sigma=0.3, **TOLD), 4000):
        assert out.seconds <= (1000 / 50 + 0.3) * 1.07
        assert out.share_refused <= 0.01


def halving(rows: int) -> tuple[tuple[tuple[float, dict[str, float]], ...], float]:
    """A limit that halves at 10 s and is back at 25 s, and the ideal time."""
    schedule = ((10.0, {"rpm": 3000, "burst": 50}), (25.0, {"rpm": 6000, "burst": 100}))
    return schedule, 25 + (rows - 100 - 1000 - 750) / 100 + 0.3


def test_a_told_limit_that_halves_and_doubles_is_followed() -> None:
    schedule, ideal_s = halving(3500)
    for out in runs(Server(**LIMITED, **TOLD, schedule=schedule), 3500):
        assert out.seconds <= ideal_s * 1.07
        assert out.share_refused <= 0.01


def test_a_limit_that_halves_and_doubles_without_a_word_is_found_again() -> None:
    schedule, ideal_s = halving(6000)
    for out in runs(Server(**LIMITED, schedule=schedule), 6000):
        assert out.seconds <= ideal_s * 1.25
        assert out.share_refused <= 0.01


@pytest.mark.parametrize("limiter", ["fixed", "sliding"])
def test_limiters_that_count_by_the_minute_are_used_politely(limiter: Any) -> None:
    for out in runs(Server(rpm=600, limiter=limiter, latency_s=0.3, sigma=0.3, **TOLD), 1500):
        assert out.seconds <= 122 * 1.05  # 600 at once, 600 a minute later, 300 another minute later
        assert out.share_refused <= 0.005


def test_a_bucket_that_others_use_too_is_shared_without_a_storm_of_refusals() -> None:
    for out in runs(Server(**LIMITED, **TOLD, others_rps=50), 2000):
        assert out.share_refused <= 0.015
        assert 2000 / out.seconds >= 0.9 * 50


def test_ten_thousand_a_minute_at_20_seconds_each_is_reached_within_a_minute() -> None:
    out = simulate(Server(rpm=10_000, burst=167, latency_s=20, sigma=0.3, **TOLD), 14_000)
    assert out.rate_between(60, 80) >= 0.93 * 10_000 / 60
    assert out.most_in_flight() >= 3000
    assert out.share_refused <= 0.005


def test_a_small_limit_is_found_at_the_price_of_the_first_requests() -> None:
    for out in runs(Server(rpm=60, burst=1, latency_s=1, **TOLD), 60):
        assert out.seconds <= 60 * 1.2
        assert out.refused <= 25


@pytest.mark.parametrize(("most", "latency_s", "sigma"), [(2, 0.3, 0.2), (10, 1, 0.3), (16, 0.3, 0.8), (50, 2, 0.2)])
def test_an_endpoint_that_refuses_by_the_number_at_work_is_kept_full(most: int, latency_s: float, sigma: float) -> None:
    ideal_s = 60.0
    rows = round(most * ideal_s / latency_s / math.exp(sigma**2 / 2))
    for out in runs(Server(most=most, latency_s=latency_s, sigma=sigma), rows):
        assert out.seconds <= ideal_s / 0.85
        assert out.share_refused <= 0.1


def test_a_number_at_work_that_changes_without_a_word_is_followed() -> None:
    schedule = ((20.0, {"most": 4}), (40.0, {"most": 64}))
    for out in runs(Server(most=32, latency_s=0.5, sigma=0.2, schedule=schedule), 8000):
        assert out.rate_between(10, 20) >= 0.85 * 32 / 0.5
        assert out.rate_between(25, 40) >= 0.85 * 4 / 0.5
        assert out.rate_between(60, 70) >= 0.85 * 64 / 0.5


@pytest.mark.parametrize("retry_after", [None, "seconds"])
@pytest.mark.parametrize("latency_s", [0.3, 3])
def test_a_rate_is_not_taken_for_a_number_at_work(latency_s: float, retry_after: Any) -> None:
    for burst in (20, 400):
        for out in runs(Server(rpm=1200, burst=burst, latency_s=latency_s, sigma=0.3, retry_after=retry_after), 800):
            assert all(moment.decision != "refused: seats counted" for moment in out.pacer.timeline)


def test_stale_headers_let_no_burst_through() -> None:
    server = Server(rpm=10_000, burst=167, latency_s=4, sigma=1, headers="arrival", retry_after="exact")
    for out in runs(server, 3000):
        assert out.share_refused <= 0.02


# ---- an endpoint that queues


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_a_server_that_queues_silently_is_kept_full_and_not_flooded(sigma: float) -> None:
    capacity = 64 / (0.3 * math.exp(sigma**2 / 2))
    for out in runs(Server(latency_s=0.3, sigma=sigma, slots=64), 5000):
        assert 5000 / out.seconds >= 0.95 * capacity
        assert out.most_in_flight(since_s=2) <= 128


@pytest.mark.parametrize("client_s", [0.0003, 0.0006])
def test_answers_in_waves_and_a_client_slow_to_connect_look_like_no_room(client_s: float) -> None:
    for seed in SEEDS:
        server = Server(latency_s=0.3, slots=64)
        out = simulate(server, 5000, seed=seed, client_s=client_s, connect_s=0.001)
        assert 5000 / out.seconds >= 0.95 * 64 / 0.3
        assert out.most_in_flight(since_s=2) <= 128


@pytest.mark.parametrize(
    ("slots", "latency_s", "rows"), [(16, 0.3, 2000), (16, 0.005, 10_000), (200, 0.05, 20_000), (200, 2.0, 8000)]
)
def test_servers_of_any_size_and_speed_are_kept_full(slots: int, latency_s: float, rows: int) -> None:
    client_rate = 1 / 0.0003
    capacity = min(slots / (latency_s * MEAN), client_rate)
    for out in runs(Server(latency_s=latency_s, sigma=0.3, slots=slots), rows):
        assert rows / out.seconds >= 0.9 * capacity
        assert out.pacer.window <= max(2 * slots + 8, 0.1 * capacity)


@pytest.mark.parametrize(("slots", "latency_s"), [(1, 0.14), (2, 1.0), (4, 2.0)])
def test_a_small_local_model_gets_a_few_requests_more_than_it_has_slots(slots: int, latency_s: float) -> None:
    for out in runs(Server(latency_s=latency_s, sigma=0.3, slots=slots), 500):
        assert 500 / out.seconds >= 0.93 * slots / (latency_s * MEAN)
        assert out.pacer.window <= 3 * slots + 6


@pytest.mark.parametrize(("sigma", "over"), [(0.0, 1.08), (0.3, 1.09)])
def test_slots_that_grow_mid_run_are_noticed(sigma: float, over: float) -> None:
    latency_s = 0.3 * math.exp(sigma**2 / 2)
    ideal_s = 8 + (5000 - 8 * 16 / latency_s) / (128 / latency_s)
    for out in runs(Server(slots=16, latency_s=0.3, sigma=sigma, schedule=((8, {"slots": 128}),)), 5000):
        assert out.seconds <= ideal_s * over
        assert out.pacer.window <= 256


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_slots_that_go_away_mid_run_are_noticed(sigma: float) -> None:
    for out in runs(Server(slots=128, latency_s=0.3, sigma=sigma, schedule=((5, {"slots": 16}),)), 4000):
        assert out.pacer.window <= 64


def test_a_server_that_batches_gets_more_as_long_as_that_is_faster() -> None:
    fastest = 64  # answers a second with any number at work
    for out in runs(Server(latency_s=1.0, sigma=0.3, crowding=64), 4000):
        assert out.rate_between(20, 40) >= 0.55 * fastest


def test_a_clock_too_coarse_to_time_an_answer_stops_nothing() -> None:
    pacer = Pacer(Caps(), 0.0)
    for number in range(5000):
        now = number // 50 / 64
        while pacer.wait_s(now, 10) <= 0:
            pacer.sent(now, 10)
        pacer.answered(now, latency_s=0.0, reserved=10, used=10, headers=None)
    assert pacer.window >= 16


def test_a_client_that_is_out_of_cpu_does_not_pile_up_requests() -> None:
    for out in runs(Server(latency_s=0.001), 10_000):
        assert 32 <= out.pacer.window <= 140
        assert out.most_in_flight() <= 160


def test_the_limit_is_this_machine_where_its_event_loop_is_late() -> None:
    pacer = Pacer(Caps(), 0.0)
    pacer.tick(0.1, lag_s=0.05)
    for _ in range(64):
        pacer.sent(0.2, 10)
    assert pacer.wait_s(0.2, 10) == math.inf
    assert pacer.limited_by == "this machine"


# ---- an endpoint that fails


def test_random_failures_are_no_outage_and_cost_no_speed() -> None:
    def nearly_all_s(out: Outcome) -> float:
        return out.answered_s[-10]  # the last few rows may be those that fail five times: that is the engine's wait

    clean_s = [nearly_all_s(out) for out in runs(Server(**FAST), 8000)]
    for out, clean in zip(runs(Server(**FAST, p_fault=0.08), 8000), clean_s, strict=True):
        assert out.outages == 0
        assert nearly_all_s(out) <= clean * 1.08


def test_hanging_requests_cost_their_timeout_and_no_more() -> None:
    clean_s = [out.seconds for out in runs(Server(**FAST), 5000)]
    for out, clean in zip(runs(Server(**FAST, p_hang=0.003), 5000), clean_s, strict=True):
        unlucky_s = 10 if max(out.answered_s) - out.answered_s[-2] > 1 else 0  # a row that hangs twice waits longer
        assert out.outages == 0
        assert out.seconds <= clean * 1.15 + 5 + unlucky_s


def test_one_slow_answer_in_a_hundred_does_not_shrink_the_window() -> None:
    capacity = 64 / (0.99 * 0.1 * MEAN + 0.01 * 2)
    for out in runs(Server(**FAST, p_slow=0.01), 8000):
        assert out.rate_between(1, 12) >= 0.95 * capacity
        assert out.timed_out == 0


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_an_outage_is_probed_and_left_behind_within_a_second(sigma: float) -> None:
    schedule = ((3, {"down": True}), (8, {"down": False}))
    full = 64 / (0.1 * math.exp(sigma**2 / 2))
    for out in runs(Server(latency_s=0.1, sigma=sigma, slots=64, schedule=schedule), 5000):
        assert out.outages == 1
        assert out.sent_between(3, 8) <= 20
        assert out.sent_between(3, 8) + out.most_in_flight(2.9, 3.0) <= 110  # those in flight when it began
        assert out.rate_between(9.0, 9.5) >= 0.93 * full


def test_an_outage_at_the_very_start_leaves_no_trace() -> None:
    server = Server(latency_s=0.5, sigma=0.3, schedule=((0.2, {"down": True}), (6, {"down": False})))
    for out in runs(server, 8000):
        assert out.rate_between(10, 12) >= 1000  # without limit, as far as the window can grow in that time


def test_an_endpoint_that_was_never_there_is_found_down_at_once() -> None:
    simulation = Simulation(Server(down=True), stop_s=5.0)
    with pytest.raises(AssertionError, match="rows are left: outage"):
        simulation.run([(100, 100)] * 1000)
    assert simulation.pacer.down_since is not None
    assert simulation.pacer.down_since < 0.2
    assert len(simulation.out.sent_s) < 60


def test_a_lone_row_that_fails_five_times_is_an_outage_and_one_answer_ends_it() -> None:
    pacer, now = Pacer(Caps(), 0.0), 0.0
    for _ in range(5):
        assert pacer.down_since is None
        assert pacer.wait_s(now, 10) == 0.0
        pacer.sent(now, 10)
        pacer.failed(now + 0.1, latency_s=0.1, kind="connection")
        now += 1.0
    down_since = pacer.down_since
    assert down_since == 4.1
    assert pacer.wait_s(4.1, 10) == pytest.approx(0.75)
    pacer.sent(4.85, 10)
    assert pacer.wait_s(4.9, 10) == math.inf  # one probe at a time
    pacer.answered(5.0, latency_s=0.15, reserved=10, used=10, headers=None)
    assert pacer.down_since is None
    assert [moment.decision for moment in pacer.timeline] == ["down: connection", "up again"]


def test_a_refusal_and_a_bad_request_are_signs_of_life() -> None:
    pacer = Pacer(Caps(), 0.0)
    for number in range(40):
        now = float(number)
        pacer.sent(now, 10)
        if number % 4 == 3:
            pacer.released(now + 0.1, latency_s=0.1, alive=True)
        else:
            pacer.failed(now + 0.1, latency_s=0.1, kind="server error")
    assert pacer.down_since is None


# ---- starts and shared runs


@pytest.mark.parametrize(("rows", "latencies"), [(1, 1), (10, 1), (100, 2)])
def test_a_short_run_is_not_held_up(rows: int, latencies: int) -> None:
    out = simulate(Server(latency_s=0.3), rows)
    assert out.seconds <= latencies * 0.3 + 0.03


def test_a_second_run_begins_with_what_the_first_one_learned() -> None:
    simulation = Simulation(Server(**LIMITED), seed=1)
    first = simulation.run([(100, 100)] * 2000)
    second = simulation.run([(100, 100)] * 2000, after_s=0.5)
    assert second.refused < first.refused
    assert 2000 / second.seconds >= 0.93 * 100
    silent = Simulation(Server(**SILENT), seed=1)
    silent.run([(100, 100)] * 2000)
    again = silent.run([(100, 100)] * 2000, after_s=10.0)
    assert again.most_in_flight() <= 128
    assert 2000 / again.seconds >= 0.93 * 64 / (0.3 * MEAN)


@pytest.mark.parametrize(
    ("told", "within_s"), [(TOLD, 5.0), ({"retry_after": "seconds"}, 15.0), ({}, 15.0)], ids=["told", "429", "bare 429"]
)
def test_a_limit_that_is_there_no_more_is_soon_forgotten(told: dict[str, Any], within_s: float) -> None:
    gone = {"rpm": None, "headers": None}
    simulation = Simulation(Server(rpm=3000, burst=50, latency_s=0.1, sigma=0.3, **told, schedule=((10.0, gone),)))
    simulation.run([(100, 100)] * 450)
    assert simulation.run([(100, 100)] * 2000, after_s=2.0).seconds <= within_s  # 40 s at the old rate


def test_one_answer_without_headers_among_others_forgets_nothing() -> None:
    pacer, told = Pacer(Caps(), 0.0), RateHeaders(60, 0, 60.0, None, None, None)
    for number in range(100):
        pacer.sent(0.0, 10)
        pacer.answered(0.1, latency_s=0.1, reserved=10, used=10, headers=None if number % 3 else told)
    assert 0.0 < pacer.wait_s(0.1, 10) < math.inf


# ---- what is asked is done


def test_nothing_is_sent_before_a_long_retry_after_is_over() -> None:
    pacer = Pacer(Caps(), 0.0)
    full = RateHeaders(6000, 5000, 1.0, None, None, None)
    pacer.sent(0.0, 10)
    pacer.sent(0.0, 10)
    pacer.refused(0.1, latency_s=0.1, reserved=10, retry_after_s=60.0, headers=full)  # whatever remains, they say
    pacer.answered(0.3, latency_s=0.3, reserved=10, used=10, headers=full)
    assert pacer.wait_s(0.4, 10) == pytest.approx(59.7)
    assert pacer.limited_by == "retry-after"
    assert pacer.wait_s(60.2, 10) <= 1.0


def test_however_long_everything_is_refused_the_next_request_waits_ten_seconds_at_most() -> None:
    pacer, now = Pacer(Caps(), 0.0), 0.0
    for _ in range(1100):
        pacer.sent(now, 10)
        pacer.refused(now + 0.1, latency_s=0.1, reserved=10, retry_after_s=None, headers=None)
        wait_s = pacer.wait_s(now + 0.1, 10)
        assert 0.0 < wait_s <= 10.001
        now += 0.1 + wait_s


def test_what_limits_is_named() -> None:
    told = RateHeaders(60, 0, 60.0, None, None, None)
    pacer = Pacer(Caps(max_concurrency=2), 0.0)
    assert pacer.limited_by == ""
    pacer.sent(0.0, 10)
    pacer.answered(1.0, latency_s=1.0, reserved=10, used=10, headers=told)
    assert 0.0 < pacer.wait_s(1.0, 10) <= 1.1
    assert pacer.limited_by == "requests/min"
    pacer.sent(2.0, 10)
    pacer.sent(2.0, 10)
    assert pacer.wait_s(2.0, 10) == math.inf
    assert pacer.limited_by == "max_concurrency"
    pacer.tick(2.1, lag_s=0.0)
    assert pacer.limited_by == "max_concurrency"
    pacer.tick(2.2, lag_s=0.0)
    assert pacer.limited_by == ""  # nobody has asked since


def test_a_share_of_max_concurrency_is_named_as_such_and_not_as_connections() -> None:
    share = Share()
    share.seats = 2.0
    pacer = Pacer(Caps(max_concurrency=8, share=share), 0.0, connections=2)
    pacer.sent(0.0, 10)
    pacer.sent(0.0, 10)
    assert pacer.wait_s(0.0, 10) == math.inf
    assert pacer.limited_by == "max_concurrency"


def test_a_start_that_no_answer_has_ended_yet_is_limited_by_nothing_once_its_time_has_come() -> None:
    pacer = Pacer(Caps(), 0.0)
    for _ in range(START_AT_ONCE):
        assert pacer.wait_s(0.0, 1) == 0.0
        pacer.sent(0.0, 1)
    assert 0.0 < pacer.wait_s(0.0, 1) < math.inf
    assert pacer.wait_s(9.0, 1) == 0.0
    assert pacer.limited_by == ""


def test_what_is_left_takes_at_least_what_the_known_limits_allow() -> None:
    pacer = Pacer(Caps(), 0.0)
    assert pacer.takes_s(1000) == 0.0
    pacer.sent(0.0, 10)
    told = RateHeaders(600, 100, 50.0, None, None, None)
    pacer.answered(1.0, latency_s=1.0, reserved=10, used=None, headers=told)
    assert pacer.takes_s(100) == pytest.approx(0.0, abs=0.2)
    assert pacer.takes_s(1100) == pytest.approx(100.0, abs=0.2)
    assert Pacer(Caps(rpm=60), 0.0).takes_s(600) == pytest.approx(600 * 1.02, abs=2)
    assert Pacer(Caps(max_concurrency=1), 0.0).takes_s(600) == 0.0


def test_tokens_that_run_out_are_named() -> None:
    pacer = Pacer(Caps(), 0.0)
    pacer.sent(0.0, 100)
    told = RateHeaders(None, None, None, 6000, 10, 60.0)
    pacer.answered(1.0, latency_s=1.0, reserved=100, used=100, headers=told)
    assert 0.0 < pacer.wait_s(1.0, 100) < math.inf
    assert pacer.limited_by == "tokens/min"


def told(pacer: Pacer, now: float, remaining: float, reset_s: float) -> None:
    """Let an answer say what is left of twenty requests."""
    pacer.sent(now - 0.1, 10)
    headers = RateHeaders(20, remaining, reset_s, None, None, None)
    pacer.answered(now, latency_s=0.1, reserved=10, used=10, headers=headers)


def test_a_limit_by_the_second_is_not_taken_for_one_by_the_minute() -> None:
    pacer = Pacer(Caps(), 0.0)
    for left in range(19, -1, -1):
        told(pacer, 0.2, left, 0.8)
    assert pacer.allowed == pytest.approx(20 / 60)
    told(pacer, 1.2, 19, 0.8)
    assert pacer.allowed == 20.0


def test_a_minute_that_ends_and_a_bucket_that_is_nearly_full_are_no_limit_by_the_second() -> None:
    window = Pacer(Caps(), 0.0)
    for left in range(19, -1, -1):
        told(window, 0.2, left, 0.8)
    told(window, 1.2, 19, 59.8)
    assert window.allowed == pytest.approx(20 / 60)
    bucket = Pacer(Caps(), 0.0)
    for number in range(20):
        told(bucket, 3.0 * number, 19.7, 0.9)
    assert bucket.allowed == pytest.approx(20 / 60)


def test_a_limit_by_the_day_is_not_taken_for_one_by_the_minute() -> None:
    pacer = Pacer(Caps(), 0.0)
    pacer.sent(0.0, 10)
    told = RateHeaders(14_400, 0, 86_390.0, None, None, None)
    pacer.answered(1.0, latency_s=1.0, reserved=10, used=10, headers=told)
    assert pacer.wait_s(1.0, 10) == pytest.approx(6.0, rel=0.1)


@pytest.mark.parametrize("most", [1, 7])
def test_max_concurrency_is_never_passed(most: int) -> None:
    out = simulate(Server(latency_s=0.05, sigma=0.5, p_fault=0.05), 300, caps=Caps(max_concurrency=most))
    assert out.most_in_flight() == most
    assert out.pacer.window <= most


def most_in_any(span_s: float, entries: list[tuple[float, float]]) -> float:
    """The largest sum in a sliding span; an amount that came alone in it does not count."""
    most = total = 0.0
    first = 0
    for number, (now, amount) in enumerate(entries):
        total += amount
        while entries[first][0] <= now - span_s:
            total -= entries[first][1]
            first += 1
        if number > first:
            most = max(most, total)
    return most


@pytest.mark.parametrize("rpm", [90.0, 600.0, 6000.0])
def test_a_capped_rate_is_used_and_holds_at_the_server_too(rpm: float) -> None:
    rows = int(rpm * 1.5)
    out = simulate(Server(latency_s=0.2, sigma=0.3), rows, caps=Caps(rpm=rpm))
    arrivals = [(now, 1.0) for now, _ in out.arrived]
    assert most_in_any(60.0, arrivals) <= rpm
    assert most_in_any(1.0, arrivals) <= math.ceil(rpm / 60)
    assert rows / out.seconds >= 0.93 * rpm / 60


def test_capped_tokens_are_used_and_hold_at_the_server_too() -> None:
    rows = prompts(1500, 1, estimate=3.0)
    exact = [(taken, taken) for taken, _ in rows]
    out = simulate(Server(latency_s=0.2, sigma=0.3), exact, caps=Caps(tpm=1e6))
    arrivals = [(now, float(tokens)) for now, tokens in out.arrived]
    assert most_in_any(60.0, arrivals) <= 1e6
    assert most_in_any(1.0, arrivals) <= 1e6 / 60
    assert sum(taken for taken, _ in exact) / out.seconds >= 0.85 * 1e6 / 60
    estimated = simulate(Server(latency_s=0.2, sigma=0.3), rows, caps=Caps(tpm=1e6))
    assert most_in_any(60.0, [(now, float(tokens)) for now, tokens in estimated.arrived]) <= 1.02e6


@given(
    rpm=st.floats(0.5, 20_000),
    tpm=st.none() | st.floats(100, 1e6),
    steps=st.lists(st.tuples(st.floats(0, 2), st.integers(1, 5000)), min_size=1, max_size=150),
)
def test_caps_hold_in_every_sliding_minute_and_second(
    rpm: float, tpm: float | None, steps: list[tuple[float, int]]
) -> None:
    pacer, now, sent = Pacer(Caps(rpm=rpm, tpm=tpm), 0.0), 0.0, []
    for gap_s, tokens in steps:
        now += gap_s
        wait_s = pacer.wait_s(now, tokens)
        if wait_s > 0:
            assert wait_s < math.inf
            now += wait_s
            if pacer.wait_s(now, tokens) > 0:
                continue
        pacer.sent(now, tokens)
        sent.append((now, float(tokens)))
        pacer.answered(now, latency_s=0.1, reserved=tokens, used=tokens, headers=None)
    assert sent
    requests = [(then, 1.0) for then, _ in sent]
    assert most_in_any(60.0, requests) <= max(1.0, rpm)
    assert most_in_any(1.0, requests) <= math.ceil(rpm / 60)
    if tpm is not None:
        assert most_in_any(60.0, sent) <= tpm * (1 + 1e-9)
        assert most_in_any(1.0, sent) <= tpm / 60 * (1 + 1e-9)


def test_what_is_not_on_the_wire_yet_holds_the_next_one_back_however_long_its_handshake_takes() -> None:
    pacer = Pacer(Caps(rpm=60), 0.0)
    pacer.sent(0.0, 10, written=False)
    assert pacer.wait_s(5.0, 10) == math.inf
    pacer.wrote(5.0)
    assert 1.0 <= pacer.wait_s(5.0, 10) < 1.1
    assert pacer.wait_s(6.1, 10) == 0.0


def test_a_request_of_more_than_the_tokens_of_a_minute_goes_alone() -> None:
    pacer = Pacer(Caps(tpm=1000), 0.0)
    assert pacer.wait_s(0.0, 5000) == 0.0
    pacer.sent(0.0, 5000)
    assert 60.0 <= pacer.wait_s(0.0, 5000) < 62.0


@given(st.lists(st.tuples(st.sampled_from("sarflt"), st.floats(0, 30), st.booleans()), max_size=200))
def test_whatever_happens_a_request_is_let_out_again(events: list[tuple[str, float, bool]]) -> None:
    pacer, now, out = Pacer(Caps(), 0.0), 0.0, []
    told = RateHeaders(600, 3, 1.0, 90_000, 100, 2.0)
    for event, gap_s, flag in events:
        now += gap_s
        if event == "s":
            if pacer.wait_s(now, 50) == 0.0:
                pacer.sent(now, 50)
                out.append(now)
        elif event == "t":
            pacer.tick(now, lag_s=0.05 if flag else 0.0)
        elif out:
            latency_s = now - out.pop(0)
            headers = told if flag else None
            if event == "a":
                pacer.answered(now, latency_s=latency_s, reserved=50, used=70, headers=headers)
            elif event == "r":
                pacer.refused(
                    now, latency_s=latency_s, reserved=50, retry_after_s=5.0 if flag else None, headers=headers
                )
            elif event == "f":
                pacer.failed(now, latency_s=latency_s, kind="timeout" if flag else "server error")
            else:
                pacer.released(now, latency_s=latency_s, alive=flag)
    assert pacer.in_flight == len(out)
    for then in out:
        pacer.answered(now, latency_s=now - then, reserved=50, used=50, headers=None)
    for _ in range(20):
        wait_s = pacer.wait_s(now, 50)
        if wait_s == 0.0:
            return
        assert 0.0 < wait_s < 100.0
        now += wait_s
    raise AssertionError(f"nothing may be sent: {pacer.limited_by}")


def test_a_clock_that_stands_still_breaks_nothing() -> None:
    pacer = Pacer(Caps(), 0.0)
    for _ in range(500):
        pacer.sent(0.0, 10)
        pacer.answered(0.0, latency_s=0.0, reserved=10, used=10, headers=RateHeaders(6000, 6000, 0.0, None, None, None))
    assert pacer.wait_s(0.0, 10) == 0.0


def test_what_is_counted_beside_a_request_that_waits_for_its_connection_leaves_it_its_own_time() -> None:
    cap = Cap(100, 60)
    cap.hold(90)
    cap.take(0.0, 5)
    cap.wrote(30.0)
    assert cap.wait_s(61.5, 10) == 0.0
    assert cap.wait_s(61.5, 60) == pytest.approx(30 + 60 * 1.02 - 61.5)


# ---- the timeline


def test_the_timeline_names_its_decisions_in_the_order_of_time() -> None:
    out = simulate(Server(**SILENT, schedule=((6, {"down": True}), (8, {"down": False}))), 3000)
    timeline = out.pacer.timeline
    assert [moment.time_s for moment in timeline] == sorted(moment.time_s for moment in timeline)
    decisions = {moment.decision for moment in timeline}
    assert {"", "knee", "measured", "down: server error", "up again"} <= decisions
    steady = [moment for moment in timeline if 3 < moment.time_s < 5]
    assert all(isinstance(moment, Moment) and moment.rate > 150 and moment.latency_s > 0.2 for moment in steady)


def test_a_long_timeline_is_thinned_and_keeps_its_decisions() -> None:
    pacer = Pacer(Caps(), 0.0)
    for second in range(20_000):
        pacer.tick(float(second), lag_s=0.0)
        if second == 10:
            for _ in range(5):
                pacer.sent(second + 0.1, 10)
                pacer.failed(second + 0.2, latency_s=0.1, kind="connection")
    assert 1000 <= len(pacer.timeline) <= 4000
    assert "down: connection" in {moment.decision for moment in pacer.timeline}
