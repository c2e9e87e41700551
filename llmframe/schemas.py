"""Schemas: what an answer has to fit, whichever way a call says it.

A list of labels is `Labels`; a pydantic model or a JSON schema is `Objects`. Both say how the API is asked, read what
comes back, and name the columns that it fills.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pydantic

from llmframe.errors import SchemaError
from llmframe.labels import PROPERTY, Labels, read_labels
from llmframe.objects import Objects, of_json_schema, of_model
from llmframe.repair import Unfit

__all__ = ["Labels", "Objects", "Schema", "Unfit", "read_schema"]

Schema = Labels | Objects


def read_schema(schema: Any, output: str = PROPERTY) -> Schema | None:
    """Read the ``schema=`` of a call.

    Parameters
    ----------
    schema : list of str, list of int, pydantic model, dict or None
        Labels, a class, or a JSON schema.
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
    several = schema.ndim > 0 if isinstance(schema, np.ndarray) else isinstance(schema, Sequence)
    if isinstance(schema, str | bytes) or not several:
        raise SchemaError(
            f"schema={schema!r:.80} is no schema; pass a list of labels, as in schema=['positive', 'negative'], "
            "a pydantic model (the class), or a JSON schema as a dict"
        )
    return read_labels(schema, output)
