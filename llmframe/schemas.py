"""Schemas: what an answer has to fit, whichever way a call says it.

A list of labels is `Labels`; a pydantic model or a JSON schema is `Objects`. Both say how the API is asked, read what
comes back, and name the columns that it fills.
"""

from __future__ import annotations

import enum
from collections.abc import KeysView, Mapping, Sequence, ValuesView
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pandas as pd
import pydantic

from llmframe.errors import SchemaError
from llmframe.labels import PROPERTY, Labels, read_labels
from llmframe.objects import Objects, of_json_schema, of_model
from llmframe.repair import Unfit

__all__ = ["Labels", "Objects", "Schema", "Unfit", "read_schema"]

Schema = Labels | Objects

SHOWN = 80  # characters of what is no schema; beyond them it is called by its type
_ORDERED = (pd.Index, pd.Series, pd.api.extensions.ExtensionArray, KeysView, ValuesView, enum.EnumMeta)


def read_schema(schema: Any, output: str = PROPERTY) -> Schema | None:
    """Read the ``schema=`` of a call.

    Parameters
    ----------
    schema : list of str, list of int, pydantic model, dict or None
        Labels (also an array, an index, a series, an enum's class or a ``Literal``), a class, or a JSON schema.
    output : str
        The column that it is for: with labels its name tells the model what they are about.

    Raises
    ------
    SchemaError
        It is none of these, or says what cannot be asked for.

    Examples
    --------
    >>> read_schema(["positive", "negative"])
    Labels(values=('positive', 'negative'), name='label')
    >>> read_schema({"type": "object", "properties": {"stars": {"type": "integer"}}}).columns
    {'stars': Int64Dtype()}
    """
    if schema is None:
        return None
    if isinstance(schema, type) and issubclass(schema, pydantic.BaseModel):
        return of_model(schema)
    if isinstance(schema, Mapping):
        own = schema.get("json_schema", schema)
        if isinstance(own, Mapping) and isinstance(own.get("schema"), Mapping) and "properties" not in own:
            raise SchemaError("schema= is a response_format and not a JSON schema; pass what is under its 'schema' key")
        return of_json_schema(schema)
    labels = _listed(schema)
    if labels is None:
        shown = repr(schema)
        if len(shown) > SHOWN or "\n" in shown:
            shown = f"<{type(schema).__name__}>"
        raise SchemaError(
            f"schema={shown} is no schema; pass a list of labels, as in schema=['positive', 'negative'] or list(...), "
            "a pydantic model (the class), or a JSON schema as a dict"
        )
    return read_labels(labels, output)


def _listed(schema: Any) -> list[Any] | None:
    """Give what may be labels in the order that they have; None for what has none, or is one thing."""
    if get_origin(schema) is Literal:
        return list(get_args(schema))
    if isinstance(schema, np.ndarray):
        return list(schema) if schema.ndim else None
    ordered = isinstance(schema, Sequence) and not isinstance(schema, str | bytes)
    return list(schema) if ordered or isinstance(schema, _ORDERED) else None
