"""``llmframe inspect`` and ``llmframe export``: what a checkpoint holds, on the screen and as a file."""

from __future__ import annotations

import argparse
import os

import pandas as pd

from llmframe.checkpoint_frame import read_checkpoint
from llmframe.cli_words import OK, Verbs, report
from llmframe.errors import ConfigurationError
from llmframe.sinks import write_whole
from llmframe.sources import filesystem_of

COMMONEST = 5  # errors shown
ASKED_WITH = ["endpoint", "asked_model", "template", "parameters"]
MISSING = "no error was noted"


def add_inspect(verbs: Verbs) -> None:
    """Add the verb."""
    inspect = verbs.add_parser("inspect", help="what a checkpoint holds", description="Show what a checkpoint holds.")
    inspect.add_argument("checkpoint", metavar="DIR", help="the directory or URL of the checkpoint")
    inspect.set_defaults(verb=_inspect)


def add_export(verbs: Verbs) -> None:
    """Add the verb."""
    export = verbs.add_parser(
        "export", help="a checkpoint as one parquet file", description="Write all that a checkpoint holds as parquet."
    )
    export.add_argument("checkpoint", metavar="DIR", help="the directory or URL of the checkpoint")
    export.add_argument("out", metavar="OUT", help="the parquet file")
    export.set_defaults(verb=_export)


def _inspect(arguments: argparse.Namespace) -> int:
    print(shown(read_checkpoint(arguments.checkpoint)))
    return OK


def _export(arguments: argparse.Namespace) -> int:
    _refuse_part(arguments.out, arguments.checkpoint)
    answers = read_checkpoint(arguments.checkpoint)
    write_whole(answers, arguments.out)
    report(f"{len(answers):,} answers written to {arguments.out}")
    return OK


def _refuse_part(out: str, checkpoint: str) -> None:
    (_, place), (_, path) = filesystem_of(checkpoint), filesystem_of(out)
    if os.path.realpath(os.path.dirname(path)) == os.path.realpath(place):
        raise ConfigurationError(f"{out} is in the checkpoint, whose parts are its own; write to another place")


def shown(answers: pd.DataFrame) -> str:
    """Say what a checkpoint holds: requests by status, tokens and USD, by what was asked, and the commonest errors.

    Parameters
    ----------
    answers : pandas.DataFrame
        As `read_checkpoint` gives it.
    """
    counts = answers["status"].value_counts()
    lines = [f"{len(answers):,} requests: " + (", ".join(f"{n:,} {name}" for name, n in counts.items() if n) or "none")]
    for asked, group in answers.groupby(ASKED_WITH, dropna=False, sort=False, observed=True):
        endpoint, model, template, parameters = (str(each) for each in asked)
        cost = group["cost_usd"].sum(min_count=1)
        tokens = f"{group['prompt_tokens'].sum():,} prompt and {group['completion_tokens'].sum():,} completion tokens"
        money = "" if pd.isna(cost) else f", {cost:,.4f} USD"
        lines.append(f"{model} at {endpoint}, {parameters}: {len(group):,}; {tokens}{money}")
        lines.append(f"  asked with {_short(template)}")
    errors = answers.loc[answers["status"] != "ok", "error"].fillna(MISSING).value_counts()
    if len(errors):
        lines.append("commonest errors:")
        lines += [f"  {number:,} x {_short(str(error))}" for error, number in errors.head(COMMONEST).items()]
    return "\n".join(lines)


def _short(text: str, most: int = 150) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
