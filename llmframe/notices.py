"""Notices: the lines a user should read before it pays, and whether anybody is there to read.

What is said goes to standard error and to the logger `llmframe`, which is silent unless asked for.
"""

from __future__ import annotations

import logging
import sys
import warnings
from contextlib import suppress

from tqdm import tqdm

from llmframe.errors import LLMFrameWarning

log = logging.getLogger("llmframe")
log.addHandler(logging.NullHandler())  # silent unless asked for: without it Python prints warnings by itself

_said: set[str] = set()


def say(text: str, *, quiet: bool, once: bool = False) -> None:
    """Tell the user something on standard error, unless the call asked for quiet; always to the log.

    Parameters
    ----------
    text : str
        What to say.
    quiet : bool
        Only to the log.
    once : bool, default False
        Not again in this process.
    """
    log.info(text)
    if quiet or (once and text in _said) or sys.stderr is None:
        return
    if once:
        _said.add(text)
    with suppress(Exception):  # it is closed, or whoever read it is gone, or a user's own: no reason to stop a run
        tqdm.write(f"llmframe: {text}", file=sys.stderr)


def warn(text: str) -> None:
    """Warn the user, at the line that called llmframe, whether or not somebody watches."""
    log.warning(text)
    warnings.warn(f"llmframe: {text}", LLMFrameWarning, stacklevel=_callers_level())


def _callers_level() -> int:
    """Count the frames between here and the first that is not llmframe's."""
    level = 2
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "llmframe":
        frame, level = frame.f_back, level + 1
    return level


def wanted(progress: bool | None) -> bool:
    """Whether to draw a bar: where there is somebody to see it, unless the call says."""
    return _watched() if progress is None else progress


def _watched() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is not None and hasattr(shell, "kernel"):
        return True
    marimo = sys.modules.get("marimo")
    if marimo is not None and marimo.running_in_notebook():
        return True
    try:
        return sys.stderr.isatty()
    except (AttributeError, OSError, ValueError):  # there is none, or one that only writes, or it is closed
        return False
