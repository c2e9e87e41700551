"""Jinja2's templates: a name that is no column is written as nothing there, and every row would send the same."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any


def unknown_name(renderer: Any, values: Mapping[str, Any]) -> str | None:
    """Give the first name that a Jinja2 template writes for a row and that nothing is known by.

    None for a name that is only asked for (``is defined``, ``default``, ``if``), and for any other renderer. A template
    keeps no source to look for names in, so it is rendered with values that notice that they are written.

    Examples
    --------
    >>> import jinja2
    >>> unknown_name(jinja2.Template("{{ tetx }} {{ more or '' }}"), {"text": "Hello"})
    'tetx'
    """
    jinja2: Any = sys.modules.get("jinja2")  # who has a template of it has imported it
    if jinja2 is None or not isinstance(renderer, jinja2.Template):
        return None
    environment = renderer.environment
    if environment.undefined is not jinja2.Undefined or environment.is_async:
        return None  # its owner has said what becomes of such a name
    if "exported_vars" in renderer.root_render_func.__code__.co_names:
        return None  # it sets names of its own, for some rows perhaps and not for others
    found: list[str] = []

    def write(value: Any) -> str:
        # A hint is of a macro's argument, and an object of an attribute: neither is a column.
        if value._undefined_hint is None and value._undefined_obj is jinja2.utils.missing:
            found.append(value._undefined_name)
        return ""

    noticing = environment.overlay(undefined=type("Noticing", (jinja2.Undefined,), {"__str__": write}))
    with suppress(Exception):  # what else is wrong with it render() says
        for _ in renderer.root_render_func(renderer.new_context(dict(values)), environment=noticing):
            pass
    return found[0] if found else None
