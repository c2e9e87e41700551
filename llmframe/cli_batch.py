"""``llmframe batch``: a call given to the Batch API from the shell, looked at, waited for and collected."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from llmframe.batch import BatchJob
from llmframe.cli_call import add_call, keywords_of, prompt_of, schema_named, terminations_interrupt
from llmframe.cli_words import OK, ROWS_LEFT, STOPPED, Verbs, complain, report
from llmframe.errors import EndpointError
from llmframe.job_work import Paths
from llmframe.jobs import submit_source
from llmframe.options import POLL_S, gather
from llmframe.sinks import write_whole

EXAMPLES = """\
examples:
  llmframe batch submit in.parquet "Is this positive? {review}" --schema yes,no --model gpt-4o-mini --job runs/batch
  llmframe batch wait runs/batch && llmframe batch collect runs/batch out.parquet
exit status: 0 every row ok or skipped (submit, status, cancel, resubmit: done), 2 wrong use, 3 some rows neither,
4 stopped, or the endpoint is away (the job is kept: the same command goes on)"""


def add_batch(verbs: Verbs) -> None:
    """Add the verb and its own verbs."""
    batch = verbs.add_parser(
        "batch",
        help="the same through a provider's Batch API, at half the price",
        description="Give a call to a provider's Batch API. A directory keeps the job; nothing is submitted twice.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = batch.add_subparsers(title="verbs", required=True, metavar="VERB")
    submit = own.add_parser(
        "submit",
        help="submit the rows of a file",
        description="Submit one request for each row of SOURCE.",
        usage="llmframe batch submit SOURCE [PROMPT] --job DIR [options]",
    )
    submit.add_argument("source", metavar="SOURCE", help="parquet, csv or jsonl: a file, directory, glob or URL")
    submit.add_argument("prompt", metavar="PROMPT", nargs="?", help="a column, or a template with {column} fields")
    submit.add_argument("--job", metavar="DIR", required=True, help="the directory that keeps the job")
    submit.add_argument("--keep-files", action="store_true", help="leave the files at the provider")
    add_call(submit)
    _add_own(submit)
    submit.set_defaults(verb=_submit)
    for name, help_, verb in (
        ("status", "look at the provider once, and say how far the job is", _status),
        ("wait", "wait until it has ended", _wait),
        ("collect", "look once, and write the rows with what has come", _collect),
        ("cancel", "send no more, and stop what runs", _cancel),
        ("resubmit", "submit again what has no answer and may get one", _resubmit),
    ):
        each = own.add_parser(name, help=help_, description=f"{help_[0].upper()}{help_[1:]}.")
        each.add_argument("job", metavar="DIR", help="the directory of the job")
        if name == "collect":
            each.add_argument("out", metavar="OUT", help="the parquet file")
        each.add_argument("--base-url", metavar="URL", help="the endpoint, where it is not the environment's")
        each.add_argument("--schema", metavar="S", help="module:Model, where the job was submitted with one")
        each.add_argument("--quiet", action="store_true", help="no progress")
        _add_own(each)
        each.set_defaults(verb=verb)


def _add_own(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--poll-s", type=float, default=POLL_S, metavar="S", help="seconds between two looks at first")
    verb.add_argument("--json", action="store_true", help="one line of JSON on standard output")


def _submit(arguments: argparse.Namespace) -> int:
    options = gather(keywords_of(arguments))
    paths = Paths(arguments.source, "", tuple(arguments.where), arguments.limit)
    prompt = prompt_of(arguments)
    job = submit_source(paths, prompt, options, arguments.job, keep_files=arguments.keep_files, poll_s=arguments.poll_s)
    return _say(job, arguments)


def _open(arguments: argparse.Namespace) -> BatchJob:
    given: dict[str, Any] = {"base_url": arguments.base_url, "poll_s": arguments.poll_s}
    if arguments.schema is not None:
        given["schema"] = schema_named(arguments.schema)
    if arguments.quiet:
        given["progress"] = False
    return BatchJob.open(arguments.job, **given)


def _status(arguments: argparse.Namespace) -> int:
    return _say(_open(arguments).refresh(), arguments)


def _cancel(arguments: argparse.Namespace) -> int:
    return _say(_open(arguments).cancel(), arguments)


def _resubmit(arguments: argparse.Namespace) -> int:
    return _say(_open(arguments).resubmit(), arguments)


def _wait(arguments: argparse.Namespace) -> int:
    with terminations_interrupt():
        job = _open(arguments).wait()
    _say(job, arguments)
    return _left(job)


def _collect(arguments: argparse.Namespace) -> int:
    job = _open(arguments)
    away: EndpointError | None = None
    try:
        job.refresh()
    except EndpointError as error:  # what has come is on this disk
        away = error
    write_whole(job.frame(), arguments.out)
    _say(job, arguments)
    if away is not None:
        complain(str(away))
        return STOPPED
    return _left(job)


def _left(job: BatchJob) -> int:
    left = {status: count for status, count in job.counts.items() if status not in ("ok", "skipped")}
    if not left:
        return OK
    said = ", ".join(f"{count:,} {status}" for status, count in left.items())
    complain(f"{said}; `llmframe batch resubmit` asks again what may get an answer")
    return ROWS_LEFT


def _say(job: BatchJob, arguments: argparse.Namespace) -> int:
    if arguments.json:
        parts = json.loads(job.parts.to_json(orient="records"))
        said = {"ended": job.ended, "usage": asdict(job.usage), "cost_usd": job.cost_usd, "parts": parts}
        report(json.dumps(said | ({"counts": job.counts} if job.ended else {})))
    else:
        report(str(job))
    return OK
