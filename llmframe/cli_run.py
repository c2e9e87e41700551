"""``llmframe run``: a job from the shell, and what a scheduler has to know of it."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict, replace

from llmframe.batch import AnotherCall, BatchJob
from llmframe.cli_call import add_call, keywords_of, prompt_of, terminations_interrupt
from llmframe.cli_words import OK, ROWS_LEFT, STOPPED, Verbs, complain, report
from llmframe.errors import ConfigurationError, LLMFrameError
from llmframe.job_work import JobResult, Paths, Work
from llmframe.jobs import batch_beside, estimate_job, job_options, submit_source
from llmframe.notices import wanted
from llmframe.options import POLL_S, Options
from llmframe.progress import Bar, Lines

LEAST_USD = 1e-12  # a budget of nothing

EXAMPLES = """\
examples:
  llmframe run in.parquet out.parquet "Is this positive? {review}" --schema yes,no --model gpt-4o-mini
  llmframe run in.parquet out.parquet --prompt-file ask.txt --batch --model gpt-4o-mini
  llmframe run 's3://rows/2026-*.parquet' s3://answers/ --prompt-file ask.txt --max-cost 20 --json
exit status: 0 every row ok or skipped, 2 wrong use, 3 some rows neither,
4 stopped (run it again to go on, but not with --refresh)"""


def add_run(verbs: Verbs) -> None:
    """Add the verb."""
    run = verbs.add_parser(
        "run",
        help="parquet in, parquet out: ask a model once for each row",
        description="Ask a model once for each row of SOURCE, and write the rows with the answers to SINK.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="llmframe run SOURCE SINK [PROMPT] [options]",
    )
    run.add_argument("source", metavar="SOURCE", help="parquet, csv or jsonl: a file, directory, glob or URL")
    run.add_argument("sink", metavar="SINK", help="a .parquet file, or a directory with one for each of the source's")
    run.add_argument("prompt", metavar="PROMPT", nargs="?", help="a column, or a template with {column} fields")
    add_call(run)
    group = run.add_argument_group("the job")
    group.add_argument("--dry-run", action="store_true", help="say what it would ask and cost; send nothing")
    group.add_argument("--partial", action="store_true", help="write SINK with what there is, also when stopped")
    group.add_argument("--clean", action="store_true", help="delete the checkpoint when all of SOURCE is answered")
    group.add_argument("--dask", metavar="URL", help="ask on the workers of a cluster: tcp://scheduler:8786")
    group.add_argument("--batch", action="store_true", help="by the Batch API first (SINK.batch keeps the job)")
    group.add_argument("--poll-s", type=float, default=POLL_S, metavar="S", help="with --batch: seconds between looks")
    group.add_argument("--json", action="store_true", help="one line of JSON on standard output at the end")
    run.set_defaults(verb=_run)


def _run(arguments: argparse.Namespace) -> int:
    with terminations_interrupt():
        return _job(arguments)


def _job(arguments: argparse.Namespace) -> int:
    prompt = prompt_of(arguments)
    keywords = keywords_of(arguments)
    options = job_options(arguments.sink, keywords)
    paths = Paths(arguments.source, arguments.sink, tuple(arguments.where), arguments.limit)
    if arguments.dry_run:
        made = replace(estimate_job(paths, prompt, options), batch=arguments.batch)
        print(json.dumps(asdict(made)) if arguments.json else made)
        return OK
    if arguments.dask and arguments.batch:
        raise ConfigurationError("--dask and --batch are two ways to ask; leave one of them out")
    work = _on_cluster(paths, prompt, options, arguments.dask) if arguments.dask else Work(paths, prompt, options)
    if arguments.batch:
        batch = _submitted(paths, prompt, options, arguments.poll_s)
        if batch.missing:
            batch.refresh()
        batch.wait()
        if options.progress is not False:
            complain(str(batch))
        if batch.missing:
            complain(
                f"{batch.missing:,} requests are in a batch or file that the provider does not give, and may be paid "
                "for, so they are not asked online; the same command looks for it again, and `llmframe batch resubmit "
                f"{batch_beside(paths.sink)}` asks them once more; what was answered is kept"
            )
            return STOPPED
        work = Work(paths, prompt, _what_is_left(options, batch))  # what it left is asked online
    quiet = options.progress is False
    drawn = Bar(work.total, options.progress) if quiet or wanted(None) else Lines(work.total)
    try:
        job = work.run(drawn.draw, drawn.close, partial=arguments.partial, clean=arguments.clean)
        if arguments.batch and arguments.clean and not job.counts.keys() & {"failed", "pending"}:
            _delete(batch_beside(arguments.sink))
    except (LLMFrameError, KeyboardInterrupt) as error:
        if isinstance(error, LLMFrameError) and not work.began:
            raise  # wrong use: the same command would meet the same again
        complain(str(error))
        if arguments.json:
            report(json.dumps(asdict(work.outcome()) | {"stopped": str(error)}))
        return STOPPED
    report(json.dumps(asdict(job)) if arguments.json else _words(job))
    if job.counts.keys() <= {"ok", "skipped"}:
        return OK
    left = ", ".join(f"{count:,} {status}" for status, count in job.counts.items() if status not in ("ok", "skipped"))
    column = f"{options.output}_status"
    complain(f"{left} of {job.rows:,} rows; see {column} and {options.output}_error in {job.sink}")
    return ROWS_LEFT


def _delete(directory: str) -> None:
    """Delete the directory of a batch, if it can be: the sink is whole, and the job done, also where it cannot."""
    try:
        shutil.rmtree(directory)
    except OSError as error:
        complain(f"{directory} could not be deleted: {error}; the job is done, and needs it no more")


def _submitted(paths: Paths, prompt: str, options: Options, poll_s: float) -> BatchJob:
    beside = batch_beside(paths.sink)
    try:
        return submit_source(paths, prompt, options, beside, poll_s=poll_s)
    except AnotherCall as error:
        raise ConfigurationError(
            f"{beside} keeps the Batch job of another call, or of {paths.source} as it was; let it end (llmframe batch "
            f"wait {beside}), move that directory away, and run this again: what is answered in {options.checkpoint} "
            "is not asked again"
        ) from error


def _on_cluster(paths: Paths, prompt: str, options: Options, scheduler: str) -> Work:
    try:
        from llmframe.cluster import ClusterWork
    except ImportError as error:
        raise ConfigurationError(f"--dask needs Dask: pip install 'llmframe-pandas[dask]' ({error})") from error
    return ClusterWork(paths, prompt, options, scheduler)


def _what_is_left(options: Options, batch: BatchJob) -> Options:
    """Take what a batch cost out of the budget of what is asked after it."""
    spent_tokens = batch.usage.prompt_tokens + batch.usage.completion_tokens
    cost, tokens = options.max_cost, options.max_tokens_total
    return replace(
        options,
        max_cost=None if cost is None else max(cost - (batch.cost_usd or 0.0), LEAST_USD),
        max_tokens_total=None if tokens is None else max(tokens - spent_tokens, 1),
    )


def _words(job: JobResult) -> str:
    counts = ", ".join(f"{count:,} {status}" for status, count in job.counts.items()) or "no rows"
    usage = job.usage
    cost = "" if job.cost_usd is None else f", {job.cost_usd:,.4f} USD"
    return (
        f"{counts}; {job.requests:,} requests in {job.seconds:,.1f} s, {usage.prompt_tokens:,} prompt and "
        f"{usage.completion_tokens:,} completion tokens{cost}; written to {job.sink}"
    )
