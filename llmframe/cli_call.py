"""What the verbs that make a call share: its flags, its prompt and schema, and the signals that are a Ctrl-C."""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmframe.cli_words import count, parameter
from llmframe.errors import ConfigurationError, SchemaError

# Keywords of `complete` that a shell can say, with the type of each and what its value is called.
WORDS = ("system", "images", "model", "output", "checkpoint")
REPLICAS = "base_url"  # given several times it names several servers
NUMBERS = {"rpm": float, "tpm": float, "max_cost": float, "timeout": float}
COUNTS = ("max_concurrency", "max_tokens_total", "max_attempts")
CHOICES = {"api": ("chat", "responses"), "na": ("skip", "raise", "keep")}
SWITCHES = ("details", "refresh")

PARAM = "one parameter of the API, as in temperature=0.2 (V is JSON, else text); repeat it for more"
WHERE = "only rows like 'score > 1', by == != < <= > >=; repeat it, and all have to hold"
PRICES = 'USD per million tokens, where they are not known: {"input": 0.15, "output": 0.6}'


def add_call(verb: argparse.ArgumentParser) -> None:
    """Add the flags of a call, the keywords of `complete` among them."""
    verb.add_argument("--prompt-file", type=Path, metavar="F", help="a file with the prompt")
    verb.add_argument("--schema", metavar="S", help="what an answer has to fit: yes,no or file.json or module:Model")
    verb.add_argument("--param", type=parameter, action="append", default=[], metavar="N=V", help=PARAM)
    verb.add_argument("--where", action="append", default=[], metavar="C", help=WHERE)
    verb.add_argument("--limit", type=count, metavar="N", help="only the first N rows")
    verb.add_argument("--prices", type=json.loads, metavar="JSON", help=PRICES)
    for name in WORDS:
        verb.add_argument(flag_of(name), metavar="X", help=argparse.SUPPRESS)
    verb.add_argument(flag_of(REPLICAS), action="append", metavar="URL", help=argparse.SUPPRESS)
    for name, kind in NUMBERS.items():
        verb.add_argument(flag_of(name), type=kind, metavar="X", help=argparse.SUPPRESS)
    for name in COUNTS:
        verb.add_argument(flag_of(name), type=count, metavar="N", help=argparse.SUPPRESS)
    for name, choices in CHOICES.items():
        verb.add_argument(flag_of(name), choices=choices, help=argparse.SUPPRESS)
    for name in SWITCHES:
        verb.add_argument(flag_of(name), action="store_true", help=argparse.SUPPRESS)
    verb.add_argument("--quiet", action="store_true", help="no progress")
    verb.add_argument_group("keywords of complete", " ".join(map(flag_of, _keywords())))


def _keywords() -> tuple[str, ...]:
    return (*WORDS, REPLICAS, *NUMBERS, *COUNTS, *CHOICES, *SWITCHES)


def flag_of(name: str) -> str:
    """Give a keyword as a flag."""
    return f"--{name.replace('_', '-')}"


def keywords_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Give the keywords that a command line names.

    Raises
    ------
    ConfigurationError, SchemaError
        One is given twice, or the schema cannot be read.
    """
    given = ((name, getattr(arguments, name)) for name in _keywords())
    keywords = {name: value for name, value in given if value is not None and value is not False}  # 0 is a value
    if len(keywords.get(REPLICAS, ())) == 1:
        (keywords[REPLICAS],) = keywords[REPLICAS]
    for name, value in arguments.param:
        if name in keywords:
            raise ConfigurationError(f"{name} is given twice; leave --param {name}= out")
        keywords[name] = value
    if arguments.schema is not None:
        keywords["schema"] = schema_named(arguments.schema)
    if arguments.prices is not None:
        keywords["prices"] = arguments.prices
    if arguments.quiet:
        keywords["progress"] = False
    return keywords


def prompt_of(arguments: argparse.Namespace) -> str:
    """Read the prompt.

    Raises
    ------
    ConfigurationError
        There is none, or two, or the file cannot be read.
    """
    if (arguments.prompt is None) == (arguments.prompt_file is None):
        raise ConfigurationError("give the prompt as an argument or with --prompt-file, one of the two")
    if arguments.prompt is not None:
        return str(arguments.prompt)
    try:
        return str(arguments.prompt_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--prompt-file {arguments.prompt_file} cannot be read: {error}") from None


def schema_named(text: str) -> Any:
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


@contextmanager
def terminations_interrupt() -> Iterator[None]:
    """Let SIGTERM, by which schedulers stop a job, be a Ctrl-C, also where a shell has turned that off.

    So is the end of the terminal (a window that is closed, ssh that is cut off), unless `nohup` says otherwise.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    hangs_up = sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    if hangs_up:
        signal.signal(signal.SIGHUP, lambda _number, _frame: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if hangs_up:
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
