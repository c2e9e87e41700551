"""``llmframe run``: a job from the shell, and what a scheduler has to know of it."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from llmframe.cli_words import OK, ROWS_LEFT, STOPPED, Verbs, count, parameter
from llmframe.errors import ConfigurationError, LLMFrameError, SchemaError
from llmframe.jobs import JobResult, Paths, Work, estimate_job, job_options
from llmframe.notices import wanted
from llmframe.progress import Bar, Lines

EXAMPLES = """\
examples:
  llmframe run in.parquet out.parquet "Is this positive? {review}" --schema yes,no --model gpt-4o-mini
  llmframe run 's3://rows/2026-*.parquet' s3://answers/ --prompt-file ask.txt --max-cost 20 --json
exit status: 0 every row ok or skipped, 2 wrong use, 3 some rows neither, 4 stopped (run it again to go on)"""

# Keywords of `complete` that a shell can say, with the type of each and what its value is called.
WORDS = ("system", "images", "model", "output", "checkpoint")
REPLICAS = "base_url"  # given several times it names several servers
NUMBERS = {"rpm": float, "tpm": float, "max_cost": float, "timeout": float}
COUNTS = ("max_concurrency", "max_tokens_total", "max_attempts")
CHOICES = {"api": ("chat", "responses"), "na": ("skip", "raise", "keep")}
SWITCHES = ("details", "refresh")


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
    run.add_argument("--prompt-file", type=Path, metavar="F", help="a file with the prompt")
    run.add_argument("--schema", metavar="S", help="file.json, module:Model, or labels: yes,no")
    run.add_argument("--param", type=parameter, action="append", default=[], metavar="N=V", help="an API parameter")
    run.add_argument("--where", action="append", default=[], metavar="C", help="only rows like this: 'score > 1'")
    run.add_argument("--limit", type=count, metavar="N", help="only the first N rows")
    run.add_argument("--prices", type=json.loads, metavar="JSON", help='USD: {"input": 0.15, "output": 0.6}')
    for name in WORDS:
        run.add_argument(_flag(name), metavar="X", help=argparse.SUPPRESS)
    run.add_argument(_flag(REPLICAS), action="append", metavar="URL", help=argparse.SUPPRESS)
    for name, kind in NUMBERS.items():
        run.add_argument(_flag(name), type=kind, metavar="X", help=argparse.SUPPRESS)
    for name in COUNTS:
        run.add_argument(_flag(name), type=count, metavar="N", help=argparse.SUPPRESS)
    for name, choices in CHOICES.items():
        run.add_argument(_flag(name), choices=choices, help=argparse.SUPPRESS)
    for name in SWITCHES:
        run.add_argument(_flag(name), action="store_true", help=argparse.SUPPRESS)
    group = run.add_argument_group("keywords of complete", " ".join(map(_flag, _keywords())))
    group.add_argument("--dry-run", action="store_true", help="say what it would ask and cost; send nothing")
    group.add_argument("--partial", action="store_true", help="write SINK with what there is, also when stopped")
    group.add_argument("--clean", action="store_true", help="delete the checkpoint when every row is answered")
    group.add_argument("--json", action="store_true", help="one line of JSON on standard output at the end")
    group.add_argument("--quiet", action="store_true", help="no progress")
    run.set_defaults(verb=_run)


def _keywords() -> tuple[str, ...]:
    return (*WORDS, REPLICAS, *NUMBERS, *COUNTS, *CHOICES, *SWITCHES)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _run(arguments: argparse.Namespace) -> int:
    prompt = _prompt(arguments)
    keywords = {name: getattr(arguments, name) for name in _keywords() if getattr(arguments, name) not in (None, False)}
    if len(keywords.get(REPLICAS, ())) == 1:
        (keywords[REPLICAS],) = keywords[REPLICAS]
    for name, value in arguments.param:
        if name in keywords:
            raise ConfigurationError(f"{name} is given twice; leave --param {name}= out")
        keywords[name] = value
    if arguments.schema is not None:
        keywords["schema"] = _schema(arguments.schema)
    if arguments.prices is not None:
        keywords["prices"] = arguments.prices
    if arguments.quiet:
        keywords["progress"] = False
    options = job_options(arguments.sink, keywords)
    paths = Paths(arguments.source, arguments.sink, tuple(arguments.where), arguments.limit)
    if arguments.dry_run:
        made = estimate_job(paths, prompt, options)
        print(json.dumps(asdict(made)) if arguments.json else made)
        return OK
    work = Work(paths, prompt, options)
    quiet = options.progress is False
    drawn = Bar(work.total, options.progress) if quiet or wanted(None) else Lines(work.total)
    with _terminations_interrupt():
        try:
            job = work.run(drawn.draw, drawn.close, partial=arguments.partial, clean=arguments.clean)
        except (LLMFrameError, KeyboardInterrupt) as error:
            print(f"llmframe: {error}", file=sys.stderr)
            if arguments.json:
                print(json.dumps(asdict(work.outcome()) | {"stopped": str(error)}))
            return STOPPED
    print(json.dumps(asdict(job)) if arguments.json else _words(job))
    if job.counts.keys() <= {"ok", "skipped"}:
        return OK
    left = ", ".join(f"{count:,} {status}" for status, count in job.counts.items() if status not in ("ok", "skipped"))
    column = f"{options.output}_status"
    print(
        f"llmframe: {left} of {job.rows:,} rows; see {column} and {options.output}_error in {job.sink}", file=sys.stderr
    )
    return ROWS_LEFT


def _prompt(arguments: argparse.Namespace) -> str:
    if (arguments.prompt is None) == (arguments.prompt_file is None):
        raise ConfigurationError("give the prompt as the third argument or with --prompt-file, one of the two")
    if arguments.prompt is not None:
        return str(arguments.prompt)
    try:
        return str(arguments.prompt_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--prompt-file {arguments.prompt_file} cannot be read: {error}") from None


def _schema(text: str) -> Any:
    """Read a schema: a file of JSON, a model of a module that is at hand, or labels."""
    if text.endswith(".json"):
        try:
            return json.loads(Path(text).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SchemaError(f"--schema {text} cannot be read as JSON: {error}") from None
    module, separator, name = text.partition(":")
    if separator and module.replace(".", "").isidentifier():
        sys.path.insert(0, "")  # as `python -m` does: the model is in a file beside the job, as a rule
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise SchemaError(f"--schema {text} cannot be imported: {error}") from None
        finally:
            sys.path.remove("")
    labels = [label.strip() for label in text.split(",")]
    if len(labels) < 2:
        raise SchemaError(f"--schema {text!r} is no file.json, module:Model or list of labels (yes,no)")
    return labels


def _words(job: JobResult) -> str:
    counts = ", ".join(f"{count:,} {status}" for status, count in job.counts.items()) or "no rows"
    usage = job.usage
    cost = "" if job.cost_usd is None else f", {job.cost_usd:,.4f} USD"
    return (
        f"{counts}; {job.requests:,} requests in {job.seconds:,.1f} s, {usage.prompt_tokens:,} prompt and "
        f"{usage.completion_tokens:,} completion tokens{cost}; written to {job.sink}"
    )


@contextmanager
def _terminations_interrupt() -> Iterator[None]:
    """Let SIGTERM, by which schedulers stop a job, be a Ctrl-C."""

    def interrupt(_signum: int, _frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
