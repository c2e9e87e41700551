"""The command line: ``llmframe run``, ``batch``, ``inspect``, ``export``, ``demo`` and ``completion``.

The exit status is 0 where every row is ok or skipped, 2 for wrong use, 3 where some rows are neither, and 4 for a run
that was stopped and that the same command goes on with.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from llmframe.cli_batch import add_batch
from llmframe.cli_checkpoint import add_export, add_inspect
from llmframe.cli_completion import add_completion
from llmframe.cli_demo import add_demo
from llmframe.cli_run import add_run
from llmframe.cli_words import STOPPED, WRONG_USE, complain
from llmframe.errors import LLMFrameError

WHERE_FROM = """\
what a verb asks:
  the key       OPENAI_API_KEY (--model local needs none)
  the endpoint  --base-url, else OPENAI_BASE_URL, else OpenAI's own
  the model     --model, else LLMFRAME_MODEL
`llmframe VERB --help` tells more of each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, and give its exit status.

    Parameters
    ----------
    argv : list of str, optional
        The arguments; else the process's own.
    """
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.verb(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except LLMFrameError as error:
        complain(str(error))
        return WRONG_USE if error.frame is None else STOPPED
    except KeyboardInterrupt as interrupt:
        complain(str(interrupt) or "interrupted")
        return STOPPED
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llmframe",
        description="A language model over the rows of a table.",
        epilog=WHERE_FROM,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    add_run(verbs)
    add_batch(verbs)
    add_inspect(verbs)
    add_export(verbs)
    add_demo(verbs)
    add_completion(verbs, parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
