"""Labels: a closed list of answers, as the API takes it, and as one of them is read when it comes back.

An answer that is none of them is never guessed at: it is `Unfit`, with the reason.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import orjson
import pandas as pd

from llmframe.errors import SchemaError
from llmframe.messages import well_formed
from llmframe.repair import Unfit
from llmframe.strict import API_NAME

PROPERTY = "label"  # what a label is called where the output's name will not do


@dataclass(frozen=True, slots=True)
class Labels:
    """A closed list of labels, one of which is the answer.

    Parameters
    ----------
    values : tuple of str, or tuple of int
        The labels, in the order their categories will have.
    name : str
        What they are labels of, as the model is told: the one property of the object that the API's strict mode wants
        at the root. It steers a small model: on 80 reviews ``sentiment`` got 70 right, and ``label`` 53.
    """

    values: tuple[str, ...] | tuple[int, ...]
    name: str = PROPERTY

    @property
    def canonical(self) -> dict[str, Any]:
        """The schema as a key has it: what was asked for, not how it is put to the API."""
        return {"labels": list(self.values)}

    @property
    def response_format(self) -> dict[str, Any]:
        """The schema as the API takes it."""
        kind = "string" if isinstance(self.values[0], str) else "integer"
        schema = {
            "type": "object",
            "properties": {self.name: {"type": kind, "enum": list(self.values)}},
            "required": [self.name],
            "additionalProperties": False,
        }
        return {"type": "json_schema", "json_schema": {"name": self.name, "strict": True, "schema": schema}}

    @property
    def dtype(self) -> pd.CategoricalDtype:
        """The type of a column of labels."""
        return pd.CategoricalDtype(list(self.values))

    @property
    def columns(self) -> Mapping[str, Any]:
        """The columns beside the answer's own: none."""
        return {}

    @property
    def answer(self) -> Literal["text", "parsed"]:
        """What of a completion stands in the answer's column: the label, or a list of them."""
        return "parsed"

    def cells(self, parsed: Any) -> Mapping[str, Any]:  # noqa: ARG002
        """Give what stands in the other columns."""
        return {}

    def read(self, text: str) -> str | int:
        """Read an answer.

        Raises
        ------
        Unfit
            The answer is none of the labels; the reason quotes it.

        Examples
        --------
        >>> Labels(("positive", "negative")).read('{"label": "positive"}')
        'positive'
        """
        bare = text.strip()
        try:
            answer = orjson.loads(bare)
        except orjson.JSONDecodeError:
            answer = None
        wrapped = answer[self.name] if isinstance(answer, dict) and answer.keys() == {self.name} else None
        for label in self.values:
            # Exactly a label and nothing else is that label, also from a server that ignores response_format.
            if bare == str(label) or (type(wrapped) is type(label) and wrapped == label):
                return label
        labels = ", ".join(map(repr, self.values))
        raise Unfit(f"the answer {text!r:.200} is none of the labels {labels:.200}")


def _plain(label: Any) -> Any:
    """Give a member of an enum by its value, and text and numbers as Python's own, which are what an answer holds."""
    label = label.value if isinstance(label, enum.Enum) else label
    label = label.item() if isinstance(label, np.generic) else label
    if isinstance(label, str):
        return str.__str__(label)
    return int(label) if isinstance(label, int) and not isinstance(label, bool) else label


def read_labels(schema: Sequence[Any], output: str = PROPERTY) -> Labels:
    """Read a list of labels.

    Parameters
    ----------
    schema : list of str, or list of int
        The labels.
    output : str
        The column that they are for, whose name tells the model what they are about.

    Raises
    ------
    SchemaError
        The labels are none, empty, repeated or of mixed types.

    Examples
    --------
    >>> read_labels(["positive", "negative"])
    Labels(values=('positive', 'negative'), name='label')
    """
    labels = [_plain(label) for label in schema]
    if not labels:
        raise SchemaError("schema=[] has no labels; name at least one")
    kind = str if isinstance(labels[0], str) else int
    for label in labels:
        if not isinstance(label, kind) or isinstance(label, bool):
            raise SchemaError(
                f"the label {label!r} is of type {type(label).__name__}; labels are all text or all whole numbers"
            )
        if isinstance(label, int) and abs(label) >= 2**53:
            raise SchemaError(f"the label {label} is beyond 53 bits, which JSON readers may round; write it as text")
    values = tuple(well_formed(label) if isinstance(label, str) else label for label in labels)
    for label, count in Counter(values).items():
        if count > 1:
            raise SchemaError(f"the label {label!r} is given {count} times; give each label once")
    for label in values:
        if isinstance(label, str) and (not label or label.strip() != label):
            raise SchemaError(f"the label {label!r} is empty or has white space around it; write it without")
    name = output if API_NAME.fullmatch(output) else PROPERTY
    return Labels(values, name)
