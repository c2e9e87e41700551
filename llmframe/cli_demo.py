"""``llmframe demo``: a few reviews labelled by the embedded model, beside what people said of them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from llmframe.accessor import LLMFrame
from llmframe.cli_words import OK, ROWS_LEFT, Verbs, count
from llmframe.errors import ConfigurationError
from llmframe.report import Run
from llmframe.runner import last_run

QUESTION = "Is this review positive or negative?\n\n{review}"
LABELS = ["positive", "negative"]
OUTPUT = "sentiment"
SCORE = "human_score"  # -4, the most negative, to 4
CLEAR = 1.5  # points of the score away from 0; nearer than that, people disagree too


def add_demo(verbs: Verbs) -> None:
    """Add the verb."""
    demo = verbs.add_parser(
        "demo",
        help="label 60 reviews with the embedded model",
        description="Label product reviews positive or negative, and compare the labels with what people said.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--model", default="local", help="the model; local is the embedded one, which needs no key")
    demo.add_argument("--rows", type=count, default=60, help="how many of the reviews, from the first")
    demo.add_argument("--data", type=Path, default=Path("data/reviews.parquet"), help="parquet with a column review")
    demo.add_argument("--out", type=Path, default=Path("reviews-labelled.parquet"), help="where the table goes")
    demo.add_argument("--checkpoint", default="runs/demo", help="where the answers are kept")
    demo.set_defaults(verb=run_demo)


def run_demo(arguments: argparse.Namespace) -> int:
    """Label the reviews, compare, and give the exit status."""
    if not arguments.out.parent.is_dir():
        raise ConfigurationError(
            f"{arguments.out} cannot be written: there is no {arguments.out.parent}; make it first"
        )
    reviews = _read(arguments.data).head(arguments.rows)
    labelled = LLMFrame(reviews).complete(
        QUESTION, schema=LABELS, output=OUTPUT, model=arguments.model, checkpoint=arguments.checkpoint, temperature=0
    )
    run = last_run()
    try:
        labelled.to_parquet(arguments.out)
    except OSError as error:
        raise ConfigurationError(f"{arguments.out} cannot be written ({error}); name another with --out") from error
    shown = [name for name in ("review", SCORE, OUTPUT, f"{OUTPUT}_status", f"{OUTPUT}_error") if name in labelled]
    if run.counts.keys() == {"ok"}:
        shown.remove(f"{OUTPUT}_error")
    print(labelled[shown].head().to_string(max_colwidth=60))
    print()
    print(_cost(run, len(labelled), arguments.checkpoint))
    if SCORE in labelled:
        print(agreement(labelled))
    print(f"written to {arguments.out}")
    return OK if run.counts.keys() <= {"ok", "skipped"} else ROWS_LEFT


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except FileNotFoundError:
        raise ConfigurationError(
            f"there is no {path} here; run llmframe demo in a clone of the repository, or name a file with --data"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{path} cannot be read as parquet ({error}); name another with --data") from error


def _cost(run: Run, rows: int, checkpoint: str) -> str:
    if not run.requests:
        return f"all {rows} rows were answered from {checkpoint} in {run.seconds:.1f} s; nothing was asked"
    usage = run.usage
    return (
        f"{rows} rows, {run.requests} requests in {run.seconds:.1f} s ({run.requests / run.seconds:.1f} a second); "
        f"{usage.prompt_tokens:,} prompt and {usage.completion_tokens:,} completion tokens"
    )


def agreement(labelled: pd.DataFrame) -> str:
    """Say how often the labels agree with people, beside what the commonest label alone would reach.

    Examples
    --------
    >>> rows = {"human_score": [3.0, 2.5, -2.0, 0.1], "sentiment": ["positive", "negative", "negative", "positive"]}
    >>> print(agreement(pd.DataFrame(rows)))
    2 of the 3 reviews with |human_score| >= 1.5 are labelled as people did (67 %); always 'positive': 2 (67 %)
    """
    clear = labelled[labelled[SCORE].abs() >= CLEAR]
    if clear.empty:
        return f"none of these reviews has |{SCORE}| >= {CLEAR}"
    people = clear[SCORE].gt(0).map({True: LABELS[0], False: LABELS[1]})
    right = int((clear[OUTPUT].astype(object) == people).sum())
    commonest = people.value_counts()
    return (
        f"{right} of the {len(clear)} reviews with |{SCORE}| >= {CLEAR} are labelled as people did "
        f"({right / len(clear):.0%}); always {commonest.index[0]!r}: {commonest.iloc[0]} "
        f"({commonest.iloc[0] / len(clear):.0%})"
    ).replace("%", " %")
