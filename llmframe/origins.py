"""What answers were asked with, and what a person changed since.

Pure. An origin is for people to read: no answer is found by it, or given back because of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields

from llmframe.messages import well_formed

SHORT_CHARACTERS = 40  # the longest value of a parameter that is shown when it has changed


@dataclass(frozen=True, slots=True)
class Origin:
    """What a part's answers were asked with: for people, and to say what differs.

    It holds no row data and no secret.

    Attributes
    ----------
    endpoint : str
        The endpoint's identity.
    api : str
        ``chat`` or ``responses``.
    model : str
        The model asked for.
    template : str
        The prompt before a row fills it.
    parameters : str
        Every other API parameter, as canonical JSON.
    """

    endpoint: str
    api: str
    model: str
    template: str
    parameters: str

    def well_formed(self) -> Origin:
        """Return the same origin with lone surrogates replaced, as a file needs it."""
        return Origin(*map(well_formed, astuple(self)))


def difference(before: Sequence[Origin], now: Origin) -> str | None:
    """Say what a person changed since the origin that is most like that of now, the last of several such.

    Returns
    -------
    str or None
        None where all of it is the same, so that only the rows can have changed, or where nothing was before.
    """
    if not before:
        return None
    likeness = [sum(getattr(then, each.name) == getattr(now, each.name) for each in fields(Origin)) for then in before]
    nearest = before[max(range(len(before)), key=lambda place: (likeness[place], place))]
    return "; ".join(_changes(nearest, now)) or None


def _changes(then: Origin, now: Origin) -> list[str]:
    """Say in words what is not the same in two origins."""
    said = [
        f"the {name} was {getattr(then, name)}, now {getattr(now, name)}"
        for name in ("endpoint", "api", "model")
        if getattr(then, name) != getattr(now, name)
    ]
    if then.template != now.template:
        said.append("the prompt has changed since")
    if then.parameters != now.parameters:
        old, new = _parameters(then), _parameters(now)
        names = sorted(old.keys() | new.keys())
        said += [_parameter(name, old, new) for name in names if old.get(name) != new.get(name)]
    return said


def _parameters(origin: Origin) -> dict[str, object]:
    try:
        read = json.loads(origin.parameters)
    except ValueError:  # what is on disk need not be ours
        return {}
    return read if isinstance(read, dict) else {}


def _parameter(name: str, old: Mapping[str, object], new: Mapping[str, object]) -> str:
    was, now = (json.dumps(each[name]) if name in each else "not set" for each in (old, new))
    if max(len(was), len(now)) > SHORT_CHARACTERS:
        return f"{name} has changed since"
    return f"{name} was {was}, now {now}"
