"""What a Batch job shows of itself is read from its ledger, and from nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from llmframe.batch_ledger import Ledger, Part, Stage, Terms
from llmframe.batch_view import Awaited, page, parts_frame, summary, text

TERMS = Terms(
    id="0",
    created_s=0.0,
    digest="",
    identity="https://api.example.com/v1",
    api="chat",
    model="m",
    template="{text}",
    parameters="{}",
    service_tier=None,
    checkpoint="answers",
    output="response",
    details=False,
    several=False,
    prices=None,
    schema=None,
    keep_files=False,
    requests=1_200,
)


def ledger_of(*parts: Part) -> Ledger:
    return Ledger(terms=TERMS, parts=parts)


def part(number: int, stage: Stage, **known: Any) -> Part:
    return Part(number=number, requests=600, bytes=1, tokens=1, stage=stage, **known)


@pytest.mark.parametrize(
    ("stage", "said", "status"),
    [
        ("planned", None, "to submit"),
        ("uploaded", "waits for its turn", "waits for its turn"),
        ("running", "in_progress", "in_progress"),
        ("running", None, "running"),
        ("withdrawn", "in_progress", "withdrawn"),
    ],
)
def test_a_part_has_the_providers_word_for_how_far_it_is_or_our_own(
    stage: Stage, said: str | None, status: str
) -> None:
    assert parts_frame(ledger_of(part(0, stage, status=said)))["status"].tolist() == [status]


def test_a_part_that_others_replaced_is_shown_nowhere() -> None:
    ledger = ledger_of(part(0, "replaced"), part(1, "running"))
    assert parts_frame(ledger)["part"].tolist() == [1]
    assert summary(ledger).endswith("parts: 1 running")


def test_requests_that_were_submitted_again_are_not_left() -> None:
    ledger = ledger_of(part(0, "closed", left=3, taken=True), part(1, "closed", left=2))
    assert parts_frame(ledger)["left"].tolist() == [0, 2]


def test_the_line_says_what_was_answered_and_paid_so_far() -> None:
    ledger = ledger_of(part(0, "closed", status="completed", done=600, cost_usd=1.5), part(1, "planned"))
    assert summary(ledger) == "600 of 1,200 requests answered, 1.5000 USD so far; parts: 1 completed, 1 to submit"


def test_a_job_that_submitted_nothing_says_so_in_one_line() -> None:
    assert text("job", ledger_of()) == "<BatchJob job: every answer was in the checkpoint; nothing was submitted>"


def test_a_page_escapes_what_is_not_its_own() -> None:
    shown = page("<job>", ledger_of(part(0, "running", status="<b>", error="<i>")))
    assert not [tag for tag in ("<job>", "<b>", "<i>") if tag in shown]


def test_the_bar_counts_what_the_ledger_says_now() -> None:
    ledgers = [ledger_of(part(0, "running")), ledger_of(part(0, "running", done=7, failed=2))]
    awaited = Awaited(lambda: ledgers[0])
    assert awaited.rows_done == 0
    del ledgers[0]
    assert awaited.rows_done == 9
