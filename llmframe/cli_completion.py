"""``llmframe completion``: what a shell has to know to complete verbs, options and files."""

from __future__ import annotations

import argparse
import functools

from llmframe.cli_words import OK, Verbs
from llmframe.errors import ConfigurationError

SHELLS = ("bash", "zsh", "tcsh")
EXAMPLES = """\
examples:
  llmframe completion bash > ~/.local/share/bash-completion/completions/llmframe
  llmframe completion zsh > "${fpath[1]}/_llmframe\""""


def add_completion(verbs: Verbs, parser: argparse.ArgumentParser) -> None:
    """Add the verb."""
    completion = verbs.add_parser(
        "completion",
        help="print a completion script for bash, zsh or tcsh",
        description="Print a completion script, by which a shell completes llmframe's verbs, options and files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    completion.add_argument("shell", choices=SHELLS, help="which shell")
    completion.set_defaults(verb=functools.partial(_completion, parser))


def _completion(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError as error:
        raise ConfigurationError("completion needs shtab: pip install 'llmframe-pandas[shell]'") from error
    _show_all(parser)
    print(shtab.complete(parser, arguments.shell))
    return OK


def _show_all(parser: argparse.ArgumentParser) -> None:
    """Let the options be completed that the help only names, so that it fits a screen; and files where they are."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                _show_all(verb)
            continue
        if action.help == argparse.SUPPRESS:
            action.help = ""
        if action.dest in ("source", "sink", "prompt_file", "out"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest == "checkpoint":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
