"""Objects: answers with named, typed properties, by a pydantic model or a JSON schema.

An answer is validated as a whole, and what does not fit is `Unfit`; each top-level property has a column, whose type
follows from the schema and never from the data.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from fractions import Fraction
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import orjson
import pandas as pd
import pydantic
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import to_jsonable_python
from pydantic_core.core_schema import DataclassField, DecimalSchema, ModelField, TypedDictField

from llmframe.errors import LLMFrameError, SchemaError
from llmframe.messages import well_formed
from llmframe.repair import QUOTED, Unfit, read_answer
from llmframe.results import INT64, text_dtype
from llmframe.strict import (
    API_NAME,
    JsonSchema,
    canonical_form,
    check_required,
    is_loose,
    plain,
    strict,
    takes_null,
    target,
    with_nulls,
)

NAME = "answer"  # of a schema without a title that the API would take
REASONS = 3  # told of an answer that does not fit; the first ones explain the rest
LONGEST = 500  # characters of what is told

MOMENT = pd.DatetimeTZDtype("us", "UTC")  # what has no offset is taken as UTC: a column has one kind of time
DAY = "datetime64[us]"  # midnight

_KINDS = {MOMENT: "date and time", DAY: "date", pd.Int64Dtype(): "whole number", pd.Float64Dtype(): "number"}
_JSON_KINDS = {
    str: ("string",),
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    type(None): ("null",),
    list: ("array",),
    dict: ("object",),
}


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """A schema whose answers are JSON objects.

    Attributes
    ----------
    canonical : dict
        As a key has it: the same under every version of pydantic, and whatever its classes are called.
    response_format : dict
        As the API takes it: strict, where it can be.
    columns : dict of str
        The type of each top-level property's column.
    validate : callable
        Checks an answer's JSON and gives what it means: a model's instance, or the JSON itself. Raises `Unfit`.
    properties : callable
        Gives what `validate` gave by property.
    """

    canonical: dict[str, Any]
    response_format: dict[str, Any]
    columns: Mapping[str, Any]
    validate: Callable[[Any], Any] = field(repr=False)
    properties: Callable[[Any], Mapping[str, Any]] = field(repr=False)

    @property
    def dtype(self) -> Any:
        """The type of the answer's column, which holds the JSON text."""
        return text_dtype()

    def read(self, text: str) -> Any:
        """Read an answer.

        Raises
        ------
        Unfit
            It is no JSON object, or one that does not fit; the reason says where.
        """
        found = read_answer(text)
        if not isinstance(found, dict):
            raise Unfit(f"the answer {text!r:.{QUOTED}} is no JSON object")
        try:
            parsed = self.validate(found)
            self.cells(parsed)  # what fits no column fits no answer
        except (Unfit, LLMFrameError):  # ours: a validator that calls llmframe is told so, and no row is asked again
            raise
        except Exception as error:  # a validator or a serializer of the user's own may raise anything, or make anything
            raise Unfit(well_formed(f"the answer does not fit: {type(error).__name__}: {error}"[:LONGEST])) from error
        return parsed

    @property
    def answer(self) -> Literal["text", "parsed"]:
        """What of a completion stands in the answer's column: its JSON text."""
        return "text"

    def cells(self, parsed: Any) -> Mapping[str, Any]:
        """Give what stands in the properties' columns.

        Raises
        ------
        Unfit
            A value that its column cannot hold.
        """
        if parsed is None:
            return {}
        values = self.properties(parsed)
        return {name: _cell(values.get(name), dtype, name) for name, dtype in self.columns.items()}


def of_json_schema(schema: Mapping[str, Any]) -> Objects:
    """Read a JSON schema.

    Raises
    ------
    SchemaError
        It is no schema, or none of an object.

    Examples
    --------
    >>> schema = of_json_schema({"type": "object", "properties": {"stars": {"type": "integer"}}, "required": ["stars"]})
    >>> schema.cells(schema.read('{"stars": 4}'))
    {'stars': 4}
    """
    import jsonschema

    try:
        own: JsonSchema = orjson.loads(orjson.dumps(dict(schema)))  # a copy of JSON's own types
        jsonschema.Draft202012Validator.check_schema(own)
    except (TypeError, orjson.JSONEncodeError) as error:
        raise SchemaError(f"the JSON schema is no JSON: {error}") from error
    except jsonschema.SchemaError as error:
        raise SchemaError(f"the JSON schema is not valid: {error.message:.200}; see json-schema.org") from error
    simple = _object(plain(own))
    extended: Any = jsonschema.validators.extend  # untyped in its stubs
    checker = extended(jsonschema.Draft202012Validator, {"multipleOf": _multiple_of})(with_nulls(own))

    def validate(found: dict[str, Any]) -> dict[str, Any]:
        errors = sorted(checker.iter_errors(found), key=lambda error: list(map(str, error.absolute_path)))
        if errors:
            found = _pruned(found, simple, simple)
            errors = list(checker.iter_errors(found))
        if errors:
            raise Unfit(_reasons([(error.absolute_path, error.message) for error in errors]))
        return found

    columns = {name: _column(part, simple) for name, part in simple["properties"].items()}
    return _objects(own.get("title"), simple, columns, validate, lambda parsed: parsed)


def _multiple_of(validator: Any, step: float, value: Any, schema: Any) -> Iterator[Any]:  # noqa: ARG001
    """Check ``multipleOf`` by the digits as they are written: among floats 0.3 is no multiple of 0.1."""
    import jsonschema

    if validator.is_type(value, "number") and Fraction(str(value)) % Fraction(str(step)):
        yield jsonschema.ValidationError(f"{value!r} is not a multiple of {step}")


def of_model(model: type[pydantic.BaseModel]) -> Objects:
    """Read a pydantic model.

    Raises
    ------
    SchemaError
        The model has no JSON schema, or is none of an object.

    Examples
    --------
    >>> class Review(pydantic.BaseModel):
    ...     stars: int
    >>> of_model(Review).read('{"stars": "4"}')
    Review(stars=4)
    """
    try:
        own = model.model_json_schema()
        own_held = model.model_json_schema(schema_generator=_Held)
    except Exception as error:  # pydantic's own, or those of a json_schema_extra of the user's
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise SchemaError(f"{model.__name__} has no JSON schema: {said}") from error
    simple, held = _object(plain(own)), _object(plain(own_held))
    inside = _inside(model).model_fields
    own_names = {_name_read(each, info): each for each, info in inside.items()}
    for name in simple["properties"]:
        if name not in own_names:
            raise SchemaError(
                f"the schema of {model.__name__} has a property {name!r} that is no field of it; "
                "pass a model that has it as a field"
            )
    fields = {name: (own_names[name], inside[own_names[name]]) for name in simple["properties"]}
    columns = {
        name: object if _is_decimal(info.annotation) else _column(held["properties"][name], held)
        for name, (_, info) in fields.items()
    }

    def validate(found: dict[str, Any]) -> pydantic.BaseModel:
        try:
            try:
                return model.model_validate_json(orjson.dumps(found))
            except pydantic.ValidationError:
                pruned = _pruned(found, simple, simple)
                if pruned == found:
                    raise
                return model.model_validate_json(orjson.dumps(pruned))
        except pydantic.ValidationError as error:
            raise Unfit(_reasons([(each["loc"], each["msg"]) for each in error.errors(include_url=False)])) from None

    def properties(parsed: Any) -> Mapping[str, Any]:
        while isinstance(parsed, pydantic.RootModel):
            parsed = parsed.root
        return {name: _value(parsed, own_name, info) for name, (own_name, info) in fields.items()}

    return _objects(model.__name__, simple, columns, validate, properties)


class _Held(GenerateJsonSchema):
    """A model's schema as a column holds the answers: pydantic says that a Decimal may be a number or a string."""

    def decimal_schema(self, schema: DecimalSchema) -> dict[str, Any]:  # noqa: ARG002
        return {"type": "string"}

    def field_is_required(self, field: ModelField | DataclassField | TypedDictField, total: bool) -> bool:
        """Tell that a model's instance has every field, whatever the answer leaves to its default."""
        return field["type"] != "typed-dict-field" or super().field_is_required(field, total)


def _inside(model: type[pydantic.BaseModel]) -> type[pydantic.BaseModel]:
    """Give the model whose fields an answer has: of a RootModel it is the one that it holds."""
    if not issubclass(model, pydantic.RootModel):
        return model
    held: Any = model.model_fields["root"].annotation
    return _inside(held) if isinstance(held, type) and issubclass(held, pydantic.BaseModel) else model


def _name_read(own_name: str, info: FieldInfo) -> str:
    """Give the name of a field in the JSON schema, which is that of its alias, or of the first of several."""
    alias = info.validation_alias
    paths = alias.convert_to_aliases() if isinstance(alias, pydantic.AliasChoices) else [[alias]]
    return next((path[0] for path in paths if len(path) == 1 and isinstance(path[0], str)), own_name)


def _value(parsed: Any, own_name: str, info: FieldInfo) -> Any:
    """Give a field's value: a simple one as it is, a nested one as JSON."""
    held = getattr(parsed, "__dict__", {})  # to which a field that is deprecated gives no warning
    value = held[own_name] if own_name in held else getattr(parsed, own_name)
    if isinstance(value, str | int | float | bool | Decimal | date | enum.Enum | None):
        return value
    dumped = parsed.model_dump(mode="json", by_alias=True, include={own_name}, warnings=False)
    name = info.serialization_alias or own_name
    if isinstance(dumped, dict) and name in dumped:
        return dumped[name]
    return to_jsonable_python(value, by_alias=True)  # ``exclude=True``, or a model_serializer with names of its own


def _is_decimal(annotation: Any) -> bool:
    """Whether a column holds decimals, among which parquet takes whole numbers, and nothing else."""
    kinds = _alternatives(annotation)
    return Decimal in kinds and all(kind in (Decimal, int, type(None)) for kind in kinds)


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for each in get_args(annotation) for kind in _alternatives(each)]
    return [annotation]


def _objects(
    title: Any,
    simple: JsonSchema,
    columns: Mapping[str, Any],
    validate: Callable[[Any], Any],
    properties: Callable[[Any], Mapping[str, Any]],
) -> Objects:
    name = title if isinstance(title, str) and API_NAME.fullmatch(title) else NAME
    loose = is_loose(simple)
    if not loose:
        check_required(simple)
    shown = {"name": name, "strict": not loose, "schema": strict(simple)}
    return Objects(
        canonical={"json_schema": canonical_form(simple)},
        response_format={"type": "json_schema", "json_schema": shown},
        columns=columns,
        validate=validate,
        properties=properties,
    )


def _object(schema: JsonSchema) -> JsonSchema:
    if schema.get("type") not in (None, "object") or not isinstance(schema.get("properties"), dict):
        raise SchemaError(
            "the schema is not that of an object with properties, which is what the API takes; put what it describes "
            'into one, as in {"type": "object", "properties": {"items": {...}}} or a model with a field'
        )
    if not schema["properties"]:
        raise SchemaError("the schema has no properties; name at least one")
    return schema


def _column(schema: Any, root: JsonSchema) -> Any:
    """Give the type of a property's column: JSON text in place of objects that parquet has no type for."""
    dtype = _dtype(schema, root)
    return text_dtype() if dtype is object and _is_mixed(schema, root, set()) else dtype


def _is_mixed(schema: Any, root: JsonSchema, seen: set[str]) -> bool:
    """Whether values of several kinds may stand in one place somewhere in a nested value."""
    if not isinstance(schema, dict):
        return schema is not False  # true is anything
    if "$ref" in schema:
        reference = str(schema["$ref"])
        if reference in seen:
            return False  # as far as is known: what it holds is looked at where it was first met
        seen.add(reference)
        return _is_mixed(_followed(schema, root), root, seen)
    if "anyOf" in schema or "prefixItems" in schema:
        branches = [*schema.get("anyOf", ()), *schema.get("prefixItems", ())]
        kinds = {_kind(_followed(branch, root)) for branch in branches} - {"null"}
        leaves = [leaf for branch in branches for leaf in _branches(branch, root)]
        inner = {_kind(leaf) for leaf in leaves} - {"null"}  # of `int | None`, integer
        several = any(len(each) > 1 and each != {"integer", "number"} for each in (kinds, inner))
        nested = [leaf for leaf in leaves if _kind(leaf) in ("object", "array")]
        several = several or any(leaf != nested[0] for leaf in nested)
        return several or any(_is_mixed(branch, root, seen) for branch in branches)
    if "enum" in schema:
        return len({type(value) for value in schema["enum"] if value is not None}) > 1
    if schema.get("type") == "array":
        return _is_mixed(schema.get("items", True), root, seen)
    if _kind(schema) == "object" and (schema.get("additionalProperties") or not schema.get("properties")):
        return True  # parquet would give every row the keys of all, and write no empty one at all
    properties = schema.get("properties", {})
    if any(name not in schema.get("required", ()) for name in properties):
        return True  # the same
    return _kind(schema) is None or any(_is_mixed(each, root, seen) for each in properties.values())


def _branches(schema: Any, root: JsonSchema) -> list[JsonSchema]:
    """Give the schemas of which a value has one, of a union in a union too."""
    schema = _followed(schema, root)
    if "anyOf" not in schema:
        return [schema]
    return [branch for each in schema["anyOf"] for branch in _branches(each, root)]


def _kind(schema: JsonSchema) -> Any:
    """Give the JSON type of a schema's values, None where it does not say."""
    values = [value for value in schema.get("enum", ()) if value is not None]
    if values:
        return {str: "string", int: "integer", float: "number", bool: "boolean"}.get(type(values[0]), "object")
    return schema.get("type", "object" if "properties" in schema else "null" if "enum" in schema else None)


def _dtype(schema: Any, root: JsonSchema) -> Any:
    """Give the type of a property's column."""
    schema = _followed(schema, root)
    branches = [_followed(branch, root) for branch in schema.get("anyOf", ())]
    branches = [branch for branch in branches if branch.get("type") != "null" and branch.get("enum") != [None]]
    if branches:
        kinds = {_dtype(branch, root): None for branch in branches}
        if len(kinds) == 1:
            return next(iter(kinds))
        if kinds.keys() <= {pd.Int64Dtype(), pd.Float64Dtype()}:
            return pd.Float64Dtype()
        return object if object in kinds else text_dtype()  # a column of both numbers and text is none that parquet has
    if "enum" in schema:
        values = [value for value in schema["enum"] if value is not None]
        if values and _all(values, str):
            return pd.CategoricalDtype(list(dict.fromkeys(values)))
        if values and _all(values, int):  # parquet has no category of numbers: with a null it would come back as float
            return pd.Int64Dtype()
        if values and _all(values, int, float):
            return pd.Float64Dtype()
        return pd.BooleanDtype() if values and _all(values, bool) else text_dtype()
    kind = schema.get("type")
    if kind is None and "allOf" in schema:
        return _narrowest([_dtype(branch, root) for branch in schema["allOf"]])
    if kind == "string":
        return {"date-time": MOMENT, "date": DAY}.get(schema.get("format", ""), text_dtype())
    plain_kinds = {"integer": pd.Int64Dtype(), "number": pd.Float64Dtype(), "boolean": pd.BooleanDtype()}
    return plain_kinds.get(str(kind), object)


def _narrowest(dtypes: list[Any]) -> Any:
    """Give the type of a value that fits all of some schemas; those that say nothing of its kind are `object` here."""
    if pd.Int64Dtype() in dtypes:
        return pd.Int64Dtype()
    told = sorted((dtype for dtype in dtypes if dtype is not object), key=lambda dtype: bool(dtype == text_dtype()))
    return told[0] if told else object


def _all(values: list[Any], *kinds: type) -> bool:
    return all(type(value) in kinds for value in values)


def _followed(schema: Any, root: JsonSchema) -> JsonSchema:
    while isinstance(schema, dict) and "$ref" in schema:
        schema = target(schema["$ref"], root, root.get("$defs", {}))
    return schema if isinstance(schema, dict) else {}


def _cell(value: Any, dtype: Any, name: str) -> Any:
    """Give a property's value as its column holds it."""
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or dtype is object:
        return value
    try:
        if dtype == MOMENT:
            moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
            return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
        if dtype == DAY:
            day = value if isinstance(value, date) else date.fromisoformat(value)
            return datetime(day.year, day.month, day.day)
        if isinstance(dtype, pd.Int64Dtype):
            whole = int(value)
            if whole not in INT64:
                raise Unfit(f"{name}: {value} is beyond 64 bits")
            if whole != value and not isinstance(value, str):
                raise Unfit(f"{name}: {value!r:.80} is no whole number")
            return whole
        if isinstance(dtype, pd.Float64Dtype):
            return float(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise Unfit(f"{name}: {value!r:.80} is no {_KINDS[dtype]}: {error}") from None
    if isinstance(dtype, pd.BooleanDtype):
        if value not in (True, False):
            raise Unfit(f"{name}: {value!r:.80} is neither true nor false")
        return bool(value)
    if isinstance(dtype, pd.CategoricalDtype):
        if value not in dtype.categories:  # of which pandas would make a null
            raise Unfit(f"{name}: {value!r:.80} is none of {list(dtype.categories)!r:.200}")
        return value
    if isinstance(value, str | Decimal):
        return well_formed(str(value))
    if isinstance(value, date):  # or a moment
        return value.isoformat()
    return _json(value, name)


def _json(value: Any, name: str) -> str:
    """Write a value as JSON, by the standard library where it holds what orjson does not write: large integers."""
    try:
        return orjson.dumps(value, default=str).decode()
    except TypeError:
        pass
    try:
        return well_formed(json.dumps(value, default=str, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise Unfit(f"{name}: {value!r:.80} is no JSON: {error}") from None


def _pruned(value: Any, schema: Any, root: JsonSchema) -> Any:
    """Leave out the nulls that stand for an absent property: strict mode makes the model write every one."""
    schema = _followed(schema, root)
    if isinstance(value, list):
        items = [branch["items"] for branch in _branches(schema, root) if "items" in branch]
        return [_pruned(item, {"anyOf": items}, root) for item in value]
    if not isinstance(value, dict):
        return value
    if "anyOf" in schema:
        branches = [branch for branch in _branches(schema, root) if branch.get("type") != "null"]
        if len(branches) > 1:
            branches = [branch for branch in branches if value.keys() <= branch.get("properties", {}).keys()]
        if not branches:
            return value
        schema = max(branches, key=lambda branch: _closeness(value, branch, root))
    properties, required = schema.get("properties", {}), schema.get("required", ())
    return {
        name: _pruned(item, properties.get(name), root)
        for name, item in value.items()
        if not (item is None and name not in required and not takes_null(_followed(properties.get(name), root)))
    }


def _closeness(value: dict[str, Any], schema: JsonSchema, root: JsonSchema) -> int:
    """Count the properties that are as a schema has them: unions are told apart by one's word, or by one's kind.

    What is inside them is not looked at, which would take ever longer with each union in a union.
    """
    properties, required = schema.get("properties", {}), schema.get("required", ())
    return sum(
        (item is None and name not in required) or _may_be(item, properties.get(name), root)
        for name, item in value.items()
    )


def _may_be(value: Any, schema: Any, root: JsonSchema) -> bool:
    """Whether a value is one of those named, or of a kind that a schema takes."""
    return any(
        value in branch["enum"] if "enum" in branch else branch.get("type") in (None, *_JSON_KINDS[type(value)])
        for branch in _branches(schema, root)
    )


def _reasons(errors: list[tuple[Any, str]]) -> str:
    said = [f"{'.'.join(map(str, where)) or 'the answer'}: {what}" for where, what in errors[:REASONS]]
    more = f" (and {len(errors) - REASONS} more)" if len(errors) > REASONS else ""
    return well_formed(f"the answer does not fit the schema: {'; '.join(said)}{more}"[:LONGEST])
