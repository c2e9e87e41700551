"""Jinja2's templates: a name that is not known is written as nothing there, and every row would send the same."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from llmframe.errors import TemplateError


def unknown_name(renderer: Any, values: Mapping[str, Any]) -> TemplateError | None:
    """Give the error for the first name that a Jinja2 template writes for a row and that nothing is known by.

    The name of a column, or of an attribute: of a value that is there, and no dict, which may lack a key in some rows.

    None for a name that is only asked for (``is defined``, ``default``, ``if``), and for any other renderer. A template
    keeps no source to look for names in, so it is rendered with values that notice that they are written.

    Examples
    --------
    >>> import jinja2
    >>> unknown_name(jinja2.Template("{{ tetx }} {{ more or '' }}"), {"text": "Hello"})
    TemplateError("no column 'tetx'; did you mean 'text'?")
    """
    jinja2: Any = sys.modules.get("jinja2")  # who has a template of it has imported it
    if jinja2 is None or not isinstance(renderer, jinja2.Template):
        return None
    environment = renderer.environment
    if environment.undefined is not jinja2.Undefined or environment.is_async:
        return None  # its owner has said what becomes of such a name
    if "exported_vars" in renderer.root_render_func.__code__.co_names:
        return None  # it sets names of its own, for some rows perhaps and not for others
    found: list[TemplateError] = []

    def write(value: Any) -> str:
        name, owner = value._undefined_name, value._undefined_obj
        if value._undefined_hint is not None:  # a macro's argument
            return ""
        if owner is jinja2.utils.missing:
            found.append(TemplateError.unknown_column(name, values))
        elif isinstance(name, str) and owner is not None and not isinstance(owner, Mapping):  # a number: a list's place
            found.append(
                TemplateError(
                    f"the template writes {name!r} of a value of type {type(owner).__name__}, which has none; "
                    "where only some rows have it, write {{ ... | default('') }}"
                )
            )
        return ""

    noticing = environment.overlay(undefined=type("Noticing", (jinja2.Undefined,), {"__str__": write}))
    with suppress(Exception):  # what else is wrong with it render() says
        for _ in renderer.root_render_func(renderer.new_context(dict(values)), environment=noticing):
            pass
    return found[0] if found else None
