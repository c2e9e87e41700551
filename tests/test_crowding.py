"""What it means that a server fails many requests."""

from __future__ import annotations

import random

import pytest

from llmframe.crowding import Crowding


def wave(crowding: Crowding, second: float, slots: int, requests: int) -> None:
    """Send as many at once, of which the server takes what it has slots for, and answers half a second later."""
    for beside in range(slots, requests):
        crowding.failed(now=second + 0.01, beside=beside)
    for beside in range(slots):
        crowding.answered(sent=second, beside=beside)


@pytest.mark.parametrize("slots", [4, 16, 28])
def test_a_server_that_answers_what_it_has_slots_for_is_full(slots: int) -> None:
    crowding = Crowding()
    for second in range(5):
        wave(crowding, second, slots, 64)
    for beside in range(slots, 64):
        crowding.failed(now=5.01, beside=beside)
    assert crowding.full
    assert crowding.often_fails


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.67, 0.8])
def test_faults_by_chance_are_neither_an_outage_nor_a_lack_of_room(share: float) -> None:
    crowding, chance = Crowding(), random.Random(1)
    full = outage = 0
    for number in range(5_000):
        now, beside = number / 100, chance.randrange(32, 64)
        if chance.random() < share:
            crowding.failed(now, beside)
            full += crowding.full
            outage += not crowding.by_chance
        else:
            crowding.answered(now - 0.2, beside)
    assert full == 0
    assert outage < 100


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_an_outage_is_no_chance_and_no_lack_of_room(noise: float) -> None:
    crowding, chance = Crowding(), random.Random(1)
    for number in range(1_000):
        if chance.random() < noise:
            crowding.failed(number / 100, 63)
        else:
            crowding.answered(number / 100 - 0.1, 63)
    verdicts = []
    for number in range(64):
        crowding.failed(10 + number / 100, 63 - number)
        verdicts.append((crowding.full, crowding.by_chance))
    assert (True, False) not in verdicts
    assert not any(by_chance for _, by_chance in verdicts[32:])
    assert noise or not any(by_chance for _, by_chance in verdicts)


@pytest.mark.parametrize(("share", "common"), [(0.0, False), (0.2, False), (0.6, True), (1.0, True)])
def test_failures_are_common_where_most_attempts_fail(share: float, common: bool) -> None:
    crowding = Crowding()
    for number in range(200):
        if number % 10 < 10 * share:
            crowding.failed(number, 10)
        else:
            crowding.answered(number - 1, 10)
    assert crowding.often_fails == common
