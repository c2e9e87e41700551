"""Objects: pydantic models and JSON schemas, the answers that fit them, and the columns they fill."""

from __future__ import annotations

import enum
import io
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import pydantic
import pytest
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from typing_extensions import TypedDict

from llmframe.errors import SchemaError
from llmframe.objects import DAY, MOMENT, Objects, of_json_schema, of_model
from llmframe.repair import json_text, read_answer
from llmframe.requests import Requests
from llmframe.results import text_dtype, typed
from llmframe.schemas import Unfit, read_schema
from tests.server import SimulatedServer


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Person(BaseModel):
    name: str
    age: int | None = None


class Review(BaseModel):
    """A review."""

    stars: int = Field(ge=1, le=5, description="how many")
    mood: Mood
    kind: Literal["new", "used"] | None
    written: datetime
    bought: date | None = None
    price: Decimal
    by: Person
    tags: list[str] = []
    score: float
    again: bool
    note: int | str = ""


TEXT = """{"stars": 4, "mood": "good", "kind": null, "written": "2024-01-02T03:04:05+01:00", "bought": "2023-12-31",
"price": "1.20", "by": {"name": "Ann", "age": null}, "tags": ["a"], "score": 1, "again": true, "note": 7}"""


def test_a_deprecated_field_is_read_without_a_warning() -> None:
    class Old(BaseModel):
        stars: int = Field(deprecated="use score")

    schema = of_model(Old)
    assert schema.cells(schema.read('{"stars": 4}')) == {"stars": 4}


def test_each_property_has_a_column_of_its_type() -> None:
    assert of_model(Review).columns == {
        "stars": pd.Int64Dtype(),
        "mood": pd.CategoricalDtype(["good", "bad"]),
        "kind": pd.CategoricalDtype(["new", "used"]),
        "written": MOMENT,
        "bought": DAY,
        "price": object,
        "by": object,
        "tags": object,
        "score": pd.Float64Dtype(),
        "again": pd.BooleanDtype(),
        "note": text_dtype(),
    }


def test_an_answer_is_the_models_instance_and_its_cells_are_plain_values() -> None:
    schema = of_model(Review)
    parsed = schema.read(TEXT)
    assert isinstance(parsed, Review)
    assert schema.cells(parsed) == {
        "stars": 4,
        "mood": "good",
        "kind": None,
        "written": datetime(2024, 1, 2, 2, 4, 5, tzinfo=UTC),
        "bought": datetime(2023, 12, 31),
        "price": Decimal("1.20"),
        "by": {"name": "Ann", "age": None},
        "tags": ["a"],
        "score": 1.0,
        "again": True,
        "note": "7",
    }


def test_the_columns_come_back_from_parquet_as_they_were() -> None:
    schema = of_model(Review)
    cells = [schema.cells(schema.read(TEXT)), {}]
    frame = pd.DataFrame({name: typed([row.get(name) for row in cells], kind) for name, kind in schema.columns.items()})
    file = io.BytesIO()
    frame.to_parquet(file)
    back = pd.read_parquet(io.BytesIO(file.getvalue()))
    assert back.dtypes.astype(str).equals(frame.dtypes.astype(str))
    assert back["by"][0] == {"name": "Ann", "age": None}
    assert back["price"][0] == Decimal("1.20")
    assert back.drop(columns=["by", "tags"]).astype(object).equals(frame.drop(columns=["by", "tags"]).astype(object))


@pytest.mark.parametrize(
    "text",
    [
        '```json\n{"name": "Ann"}\n```',
        'Here it is: {"name": "Ann"}. Anything else?',
        "{'name': 'Ann',}",
        '\ufeff{"name": "Ann"}',
    ],
)
def test_ordinary_damage_is_read(text: str) -> None:
    assert of_model(Person).read(text) == Person(name="Ann")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"name": "An', "ends in the middle of its JSON"),
        ('{"name": "Ann", "tags": ["a"', "ends in the middle of its JSON"),
        ("I do not know.", "is no JSON"),
        ("", "is no JSON"),
        ("[1, 2]", "is no JSON object"),
        ('"Ann"', "is no JSON object"),
        ('{"age": 3}', "name: Field required"),
        ('{"name": "Ann", "age": "old"}', "age: Input should be a valid integer"),
    ],
)
def test_an_answer_that_does_not_fit_says_where(text: str, said: str) -> None:
    with pytest.raises(Unfit, match=said):
        of_model(Person).read(text)


def test_a_null_stands_for_an_optional_property_that_takes_none() -> None:
    class Shop(BaseModel):
        name: str = "corner"
        owner: Person | None = None
        people: list[Person] = []

    assert of_model(Shop).read('{"name": null, "owner": null, "people": null}') == Shop()
    schema = of_json_schema({"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}})
    assert schema.read('{"a": null, "b": 1}') == {"b": 1}


class Fish(BaseModel):
    kind: Literal["fish"]
    age: int | None
    size: int | None = 1


class Bird(BaseModel):
    kind: Literal["bird"]
    age: int = 1
    size: int = 2


class Crowd(BaseModel):
    count: int
    age: int = 3
    size: int | None


class Zoo(BaseModel):
    star: Annotated[Fish | Bird, Field(discriminator="kind")]
    others: list[Fish | Bird] | list[int] | None = None
    best: list[Fish | (Bird | Crowd)] = []


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (
            '{"star": {"kind": "bird", "age": null, "size": null}, "others": null, "best": null}',
            Zoo(star=Bird(kind="bird")),
        ),
        (
            """{"star": {"kind": "fish", "age": null, "size": null},
            "others": [{"kind": "bird", "age": 7, "size": null}],
            "best": [{"kind": "bird", "age": null, "size": 7}, {"count": 4, "age": null, "size": null}]}""",
            Zoo(
                star=Fish(kind="fish", age=None, size=None),
                others=[Bird(kind="bird", age=7)],
                best=[Bird(kind="bird", size=7), Crowd(count=4, size=None)],
            ),
        ),
    ],
)
def test_a_null_stands_for_an_absent_property_of_the_one_of_a_union_that_the_answer_is(text: str, read: Zoo) -> None:
    assert of_model(Zoo).read(text) == read


def test_nulls_are_told_apart_in_the_items_of_a_list_that_may_be_null() -> None:
    class Herd(BaseModel):
        birds: list[Bird] | None
        fish: list[Fish] | None

    text = """{"birds": [{"kind": "bird", "age": null, "size": 3, "more": 1}],
    "fish": [{"kind": "fish", "age": null, "size": null}]}"""
    read = of_model(Herd).read(text)
    assert read == Herd(birds=[Bird(kind="bird", size=3)], fish=[Fish(kind="fish", age=None, size=None)])


def test_a_null_stands_for_an_absent_property_in_the_one_of_a_json_schemas_that_the_answer_is() -> None:
    one = {"properties": {"k": {"const": "a"}, "n": {"type": ["integer", "null"]}}, "required": ["k", "n"]}
    other = {"properties": {"k": {"const": "b"}, "n": {"type": "integer"}}, "required": ["k"]}
    third = {"properties": {"k": {"type": "integer"}, "n": {"type": "integer"}}, "required": ["k"]}
    schema = of_json_schema({"type": "object", "properties": {"v": {"oneOf": [one, other, third]}}, "required": ["v"]})
    assert schema.read('{"v": {"k": "a", "n": null}}') == {"v": {"k": "a", "n": None}}
    assert schema.read('{"v": {"k": "b", "n": null}}') == {"v": {"k": "b"}}
    assert schema.read('{"v": {"k": 3, "n": null}}') == {"v": {"k": 3}}


def test_a_null_that_openapis_nullable_allows_fits_and_is_asked_for_once(server: SimulatedServer) -> None:
    named = {"type": "string", "nullable": True}
    schema = {
        "type": "object",
        "properties": {
            "nullable": {"$ref": "#/definitions/named"},
            "kinds": {"type": "array", "items": {"enum": ["a"], "nullable": True}},
            "one": {"oneOf": [named, {"type": "integer"}]},
            "inner": {"type": "object", "properties": {"a": named, "b": {"const": {"nullable": True}}}},
            "never": {"type": "string", "nullable": False},
        },
        "required": ["nullable", "kinds", "one", "inner", "never"],
        "definitions": {"named": named},
    }
    text = """{"nullable": null, "kinds": [null], "one": null, "inner": {"a": null, "b": {"nullable": true}},
    "never": "."}"""
    frame = pd.DataFrame({"text": [f"[[say={text}]]"]})
    out = frame.llm.complete("{text}", schema=schema, model="m", base_url=server.base_url, progress=False)
    assert out["response_status"].tolist() == ["ok"]
    assert server.stats().answered == 1
    with pytest.raises(Unfit, match="never"):
        of_json_schema(schema).read(text.replace('"."', "null"))


def test_a_change_in_the_list_of_one_row_is_in_no_other(server: SimulatedServer) -> None:
    schema = {"type": "object", "properties": {"tags": {"type": "array", "items": {"type": "string"}}}}
    frame = pd.DataFrame({"text": ['[[say={"tags": ["x"]}]]'] * 2})
    out = frame.llm.complete("{text}", schema=schema, model="m", base_url=server.base_url, progress=False)
    out.loc[0, "response_tags"].append("y")
    assert out["response_tags"].tolist() == [["x", "y"], ["x"]]


def test_a_null_in_a_union_is_asked_for_once(server: SimulatedServer) -> None:
    text = '{"star": {"kind": "bird", "age": null, "size": null}, "others": null, "best": null}'
    frame = pd.DataFrame({"text": [f"[[say={text}]]"]})
    out = frame.llm.complete("{text}", schema=Zoo, model="m", base_url=server.base_url, progress=False)
    assert out["response_status"].tolist() == ["ok"]
    assert server.stats().answered == 1


def test_a_validator_of_the_users_own_may_raise_anything() -> None:
    class Picky(BaseModel):
        name: str

        @pydantic.field_validator("name")
        @classmethod
        def refuse(cls, value: str) -> str:
            raise KeyError(value)

    with pytest.raises(Unfit, match="KeyError"):
        of_model(Picky).read('{"name": "Ann"}')


def test_a_value_that_a_validator_made_and_its_column_cannot_hold_does_not_fit() -> None:
    class Made(BaseModel):
        stars: int = 1
        score: float = 1.0
        again: bool = True
        kind: Literal["new", "used"] = "new"

        @pydantic.field_validator("*")
        @classmethod
        def unknown(cls, value: Any) -> Any:
            return {3: "n/a", 4: 4.5, 0.5: "half", False: "N", "used": "USED"}.get(value, value)

    schema = of_model(Made)
    for text, said in (
        ('{"stars": 3}', "stars: 'n/a' is no whole number"),
        ('{"stars": 4}', "stars: 4.5 is no whole number"),
        ('{"score": 0.5}', "score: 'half' is no number"),
        ('{"again": false}', "again: 'N' is neither true nor false"),
        ('{"kind": "used"}', "kind: 'USED' is none of"),
    ):
        with pytest.raises(Unfit, match=said):
            schema.read(text)
    assert schema.cells(schema.read('{"kind": "new"}')) == {"stars": 1, "score": 1.0, "again": True, "kind": "new"}


def test_a_row_whose_validator_gives_what_no_column_holds_stops_no_other_and_is_paid_for_once(
    server: SimulatedServer, tmp_path: Path
) -> None:
    class Rated(BaseModel):
        stars: int

        @pydantic.field_validator("stars")
        @classmethod
        def unknown(cls, value: int) -> Any:
            return value or "n/a"

    frame = pd.DataFrame({"text": [f'[[say={{"stars": {stars}}}]]' for stars in (3, 0, 4)]})
    calls = {"schema": Rated, "model": "m", "base_url": server.base_url, "progress": False, "checkpoint": tmp_path}
    out = frame.llm.complete("{text}", **calls)
    assert out["response_status"].tolist() == ["ok", "invalid", "ok"]
    assert out["response"].tolist()[1] == '{"stars": 0}'
    assert out["response_stars"].tolist() == [3, pd.NA, 4]
    answered = server.stats().answered
    assert frame.llm.complete("{text}", **calls)["response_status"].tolist() == ["ok", "invalid", "ok"]
    assert server.stats().answered == answered


def test_a_serializer_of_the_users_own_may_raise_anything() -> None:
    class Shy(BaseModel):
        tags: list[str]

        @pydantic.field_serializer("tags")
        def first(self, value: list[str]) -> str:
            return value[0]

    with pytest.raises(Unfit, match="does not fit: PydanticSerializationError"):
        of_model(Shy).read('{"tags": []}')


def test_a_number_beyond_every_float_does_not_fit() -> None:
    class Either(BaseModel):
        n: int | float

    with pytest.raises(Unfit, match="is no number: int too large"):
        of_model(Either).read(f'{{"n": "{"1" * 400}"}}')


def test_an_alias_is_what_the_model_sees_and_what_the_column_is_called() -> None:
    class Aliased(BaseModel):
        inner: str = Field(alias="outer")

    schema = of_model(Aliased)
    assert list(schema.columns) == ["outer"]
    assert schema.cells(schema.read('{"outer": "x"}')) == {"outer": "x"}


def test_a_nested_value_is_its_own_fields_whatever_the_fields_are_called_when_the_model_is_written() -> None:
    class Tagged(BaseModel):
        tags: list[str] = Field(alias="labels")
        labels: list[str] = Field(validation_alias="tags", serialization_alias="x")
        hidden: list[Person] = Field(exclude=True)
        read: list[str] = Field(validation_alias=pydantic.AliasChoices(pydantic.AliasPath("z", 0), "b", "c"))

    schema = of_model(Tagged)
    cells = schema.cells(schema.read('{"labels": ["L"], "tags": ["T"], "hidden": [{"name": "Ann"}], "b": ["B"]}'))
    assert cells == {"labels": ["L"], "tags": ["T"], "hidden": [{"name": "Ann", "age": None}], "b": ["B"]}


def test_a_nested_value_is_written_by_the_serializers_of_its_field_where_the_model_has_one() -> None:
    class Sorted(BaseModel):
        tags: list[str]
        more: list[str]

        @pydantic.field_serializer("tags")
        def in_order(self, value: list[str]) -> list[str]:
            return sorted(value)

        @pydantic.model_serializer(mode="wrap")
        def renamed(self, handler: Any) -> dict[str, Any]:
            written = handler(self)
            return {"tags": written["tags"]} if "tags" in written else {"others": written["more"]}

    schema = of_model(Sorted)
    assert schema.cells(schema.read('{"tags": ["b", "a"], "more": ["d", "c"]}')) == {
        "tags": ["a", "b"],
        "more": ["d", "c"],
    }


def test_a_root_model_has_the_columns_of_the_model_that_it_holds() -> None:
    class Wrapped(pydantic.RootModel[Review]):
        """A review, checked as a whole."""

    class Twice(pydantic.RootModel[Wrapped]):
        """The same again."""

    for model in (Wrapped, Twice):
        schema, own = of_model(model), of_model(Review)
        assert schema.columns == own.columns
        assert schema.cells(schema.read(TEXT)) == own.cells(own.read(TEXT))
        assert isinstance(schema.read(TEXT), model)


def test_a_field_that_the_schema_leaves_out_has_no_column() -> None:
    class Skipped(BaseModel):
        model_config = pydantic.ConfigDict(json_schema_extra=lambda schema: schema["properties"].pop("page"))
        source: SkipJsonSchema[str] = "llm"
        page: int = 1
        stars: int

    schema = of_model(Skipped)
    assert schema.cells(schema.read('{"stars": 4}')) == {"stars": 4}


def test_dates_that_are_none_and_numbers_beyond_64_bits_do_not_fit() -> None:
    schema = of_json_schema(
        {"type": "object", "properties": {"day": {"type": "string", "format": "date"}, "n": {"type": "integer"}}}
    )
    assert schema.cells(schema.read('{"day": "2024-02-29"}'))["day"] == datetime(2024, 2, 29)
    for text in ('{"day": "yesterday"}', '{"n": 123456789012345678901234567890}'):
        with pytest.raises(Unfit):
            schema.read(text)


def test_what_parquet_has_no_type_for_is_json_text() -> None:
    class Mixed(BaseModel):
        either: list[int | str]
        pair: tuple[int, str]
        anything: Any
        inside: dict[str, list[int | str]]
        whole: list[int | float | None]
        priced: list[dict[str, Decimal]]

    schema = of_model(Mixed)
    kinds = {name: kind is object for name, kind in schema.columns.items()}
    assert kinds == {
        "either": False,
        "pair": False,
        "anything": False,
        "inside": False,
        "whole": True,
        "priced": False,
    }
    text = """{"either": [1, "a"], "pair": [1, "a"], "anything": {"a": 1}, "inside": {}, "whole": [1, 2.5],
    "priced": [{"a": 1}]}"""
    cells = schema.cells(schema.read(text))
    assert (cells["either"], cells["anything"]) == ('[1,"a"]', '{"a":1}')
    frame = pd.DataFrame({name: typed([cells[name]], kind) for name, kind in schema.columns.items()})
    file = io.BytesIO()
    frame.to_parquet(file)
    assert pd.read_parquet(io.BytesIO(file.getvalue()))["pair"][0] == '[1,"a"]'


def written_and_read(schema: Objects, *texts: str) -> pd.DataFrame:
    """Give the columns of some answers as a plain `read_parquet` does, the last row without one."""
    cells = [*(schema.cells(schema.read(text)) for text in texts), {}]
    frame = pd.DataFrame({name: typed([row.get(name) for row in cells], kind) for name, kind in schema.columns.items()})
    file = io.BytesIO()
    frame.to_parquet(file)
    back = pd.read_parquet(io.BytesIO(file.getvalue()))
    assert back.dtypes.astype(str).equals(frame.dtypes.astype(str))
    return back


def test_an_enum_of_numbers_is_a_column_of_whole_numbers_also_after_parquet() -> None:
    class Level(enum.IntEnum):
        LOW = 1
        HIGH = 3

    class Rated(BaseModel):
        level: Level
        grade: Literal[10, 20] | None

    back = written_and_read(of_model(Rated), '{"level": 3, "grade": 10}', '{"level": 1, "grade": null}')
    assert back["level"].tolist() == [3, 1, pd.NA]
    assert back["grade"].tolist() == [10, pd.NA, pd.NA]
    assert back["level"].dtype == pd.Int64Dtype()


class Share(enum.Enum):
    NONE = 0
    HALF = 0.5


@pytest.mark.parametrize(
    ("part", "dtype"),
    [
        ({"type": "number", "enum": [0, 0.5, 1]}, pd.Float64Dtype()),
        ({"enum": [0.5, None]}, pd.Float64Dtype()),
        ({"enum": [1, True]}, text_dtype()),
        ({"allOf": [{"type": "integer"}, {"minimum": 0}]}, pd.Int64Dtype()),
        ({"allOf": [{"type": "number"}, {"type": "integer"}]}, pd.Int64Dtype()),
        ({"allOf": [{"minLength": 1}, {"type": "string"}, {"enum": ["a", "b"]}]}, pd.CategoricalDtype(["a", "b"])),
        ({"anyOf": [{"allOf": [{"type": "boolean"}, {"not": {"const": 5}}]}, {"type": "null"}]}, pd.BooleanDtype()),
        ({"allOf": [{"minimum": 0}, {"maximum": 5}]}, text_dtype()),
        ({"allOf": [{"type": "object"}, {"required": ["a"]}]}, text_dtype()),
    ],
)
def test_an_enum_of_numbers_and_what_has_to_fit_several_schemas_have_their_type(part: Any, dtype: Any) -> None:
    assert of_json_schema({"type": "object", "properties": {"a": part}, "required": ["a"]}).columns == {"a": dtype}


def test_an_enum_of_fractions_is_a_column_of_numbers_also_after_parquet() -> None:
    class Shared(BaseModel):
        share: Share

    back = written_and_read(of_model(Shared), '{"share": 0.5}', '{"share": 0}')
    assert back["share"].tolist() == [0.5, 0.0, pd.NA]


def test_objects_whose_keys_differ_come_back_from_parquet_each_with_its_own() -> None:
    class Counts(BaseModel):
        by_word: dict[str, int]
        people: dict[str, Person] = {}

    texts = ['{"by_word": {"a": 1}, "people": {"x": {"name": "Ann"}}}', '{"by_word": {"b": 2}}', '{"by_word": {}}']
    back = written_and_read(of_model(Counts), *texts)
    assert back["by_word"].tolist()[:3] == ['{"a":1}', '{"b":2}', "{}"]
    assert back["people"].tolist()[:3] == ['{"x":{"name":"Ann","age":null}}', "{}", "{}"]
    assert back["by_word"].isna().tolist() == [False] * 3 + [True]


class Counted(BaseModel):
    kind: Literal["counted"]
    value: int


class Told(BaseModel):
    kind: Literal["told"]
    value: str
    by: str = ""


class Partly(TypedDict, total=False):
    a: int
    b: str


def test_what_is_one_of_several_objects_or_lists_comes_back_from_parquet_as_it_was() -> None:
    class Found(BaseModel):
        one: Counted | Told
        several: list[int] | list[str] | None
        pair: tuple[list[int], list[str]]
        partly: Partly
        alike: tuple[Told, Told]

    texts = [
        """{"one": {"kind": "counted", "value": 1}, "several": [1], "pair": [[1], []], "partly": {"a": 1},
        "alike": [{"kind": "told", "value": "x"}, {"kind": "told", "value": "y"}]}""",
        """{"one": {"kind": "told", "value": "x"}, "several": ["x"], "pair": [[], ["x"]], "partly": {"b": "x"},
        "alike": [{"kind": "told", "value": ""}, {"kind": "told", "value": "z"}]}""",
    ]
    back = written_and_read(of_model(Found), *texts)
    assert back["one"].tolist()[:2] == ['{"kind":"counted","value":1}', '{"kind":"told","value":"x","by":""}']
    assert back["several"].tolist()[:2] == ["[1]", '["x"]']
    assert back["pair"].tolist()[:2] == ["[[1],[]]", '[[],["x"]]']
    assert back["partly"].tolist()[:2] == ['{"a":1}', '{"b":"x"}']
    assert [cell["value"] for cell in back["alike"][1]] == ["", "z"]


def test_an_object_of_a_json_schema_that_may_lack_a_property_comes_back_from_parquet_without_it() -> None:
    part: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
    whole = {**part, "required": ["a", "b"]}
    schema = of_json_schema({"type": "object", "properties": {"part": part, "whole": whole}})
    texts = ['{"part": {"a": 1}, "whole": {"a": 1, "b": "x"}}', '{"part": {"b": "x"}, "whole": {"a": 2, "b": "y"}}']
    back = written_and_read(schema, *texts)
    assert back["part"].tolist()[:2] == ['{"a":1}', '{"b":"x"}']
    assert back["whole"].tolist()[:2] == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


def test_a_date_among_texts_is_written_as_the_answer_has_it() -> None:
    class Due(BaseModel):
        due: date | str
        at: date | datetime

    schema = of_model(Due)
    for text in ("2024-01-01", "soon"):
        assert schema.cells(schema.read(f'{{"due": "{text}", "at": "2024-01-01"}}'))["due"] == text
    for text in ("2024-01-01", "2024-01-01T10:00:00+00:00"):
        assert schema.cells(schema.read(f'{{"due": "soon", "at": "{text}"}}'))["at"] == text


def test_lists_and_objects_come_back_from_a_plain_read_parquet() -> None:
    class Order(BaseModel):
        items: list[Person]
        tags: list[str]
        matrix: list[list[float]]
        buyer: Person | None

    texts = [
        '{"items": [{"name": "a", "age": 1}], "tags": ["x", "y"], "matrix": [[1, 2], []], "buyer": {"name": "b"}}',
        '{"items": [], "tags": [], "matrix": [], "buyer": null}',
    ]
    back = written_and_read(of_model(Order), *texts)
    assert back["items"][0].tolist() == [{"name": "a", "age": 1}]
    assert [list(tags) for tags in back["tags"][:2]] == [["x", "y"], []]
    assert [list(row) for row in back["matrix"][0]] == [[1.0, 2.0], []]
    assert back["buyer"].tolist() == [{"name": "b", "age": None}, None, None]
    assert back["items"][2] is None


class Measured(BaseModel):
    value: float | str
    name: str = ""


def test_nested_numbers_among_texts_come_back_from_parquet() -> None:
    class Measures(BaseModel):
        scores: list[tuple[str, float]]
        values: list[float | str]
        pair: tuple[float, str]
        some: tuple[int | None, str | None]
        one: Measured

    texts = [
        """{"scores": [["a", 0.5]], "values": [1.5, "n/a"], "pair": [1.5, "n/a"], "some": [1, "a"],
        "one": {"value": 1.5}}""",
        '{"scores": [], "values": [], "pair": [2, ""], "some": [null, "b"], "one": {"value": "n/a"}}',
    ]
    back = written_and_read(of_model(Measures), *texts)
    assert back["scores"].tolist()[:2] == ['[["a",0.5]]', "[]"]
    assert back["values"].tolist()[:2] == ['[1.5,"n/a"]', "[]"]
    assert back["pair"].tolist()[:2] == ['[1.5,"n/a"]', '[2.0,""]']
    assert back["some"].tolist()[:2] == ['[1,"a"]', '[null,"b"]']
    assert back["one"].tolist()[:2] == ['{"value":1.5,"name":""}', '{"value":"n/a","name":""}']
    nested = {"type": "array", "items": {"anyOf": [{"type": "number"}, {"type": "string"}]}}
    back = written_and_read(of_json_schema({"type": "object", "properties": {"a": nested}}), '{"a": [1, "b"]}')
    assert back["a"].tolist()[:1] == ['[1,"b"]']


class Priced(BaseModel):
    price: Decimal
    was: Decimal | None = None


def test_decimals_come_back_from_parquet_nested_or_not() -> None:
    class Basket(BaseModel):
        items: list[Priced]
        prices: list[Decimal]
        named: list[tuple[Decimal, str]]
        total: Decimal | int
        note: Decimal | str

    texts = [
        """{"items": [{"price": 1.5}], "prices": [1, "2.50"], "named": [["1", "a"]], "total": 3, "note": "free"}""",
        """{"items": [], "prices": [], "named": [], "total": "3.25", "note": 1.5}""",
    ]
    back = written_and_read(of_model(Basket), *texts)
    assert back["items"][0].tolist() == [{"price": "1.5", "was": None}]
    assert back["prices"][0].tolist() == ["1", "2.50"]
    assert [list(pair) for pair in back["named"][0]] == [["1", "a"]]
    assert back["total"].tolist() == [Decimal(3), Decimal("3.25"), None]
    assert back["note"].tolist()[:2] == ["free", "1.5"]


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    tricks: list[str]


class Owner(BaseModel):
    pet: Cat | Dog = Field(discriminator="kind")
    others: list[Annotated[Cat | Dog, Field(discriminator="kind")]] = []


def test_a_discriminated_union_is_asked_for_strictly_and_read_as_the_one_it_is() -> None:
    schema = of_model(Owner)
    asked = schema.response_format["json_schema"]
    assert asked["strict"] is True
    assert "oneOf" not in str(asked)  # which strict mode does not know
    assert "discriminator" not in str(asked)
    parsed = schema.read('{"pet": {"kind": "dog", "tricks": ["sit"]}, "others": [{"kind": "cat", "lives": 9}]}')
    assert parsed == Owner(pet=Dog(kind="dog", tricks=["sit"]), others=[Cat(kind="cat", lives=9)])
    cells = schema.cells(parsed)
    assert cells["pet"] == '{"kind":"dog","tricks":["sit"]}'
    with pytest.raises(Unfit, match="pet"):
        schema.read('{"pet": {"kind": "bird"}, "others": []}')
    back = written_and_read(schema, '{"pet": {"kind": "cat", "lives": 9}, "others": []}')
    assert back["pet"][1] is None or pd.isna(back["pet"][1])


def test_an_open_object_is_asked_for_without_strict_mode() -> None:
    class Counts(BaseModel):
        by_word: dict[str, int]

    schema = of_model(Counts)
    assert schema.response_format["json_schema"]["strict"] is False
    assert schema.read('{"by_word": {"a": 1}}') == Counts(by_word={"a": 1})
    assert of_model(Person).response_format["json_schema"]["strict"] is True


def test_a_recursive_model_works() -> None:
    class Node(BaseModel):
        value: int
        after: Node | None = None

    Node.model_rebuild(_types_namespace={"Node": Node})
    schema = of_model(Node)
    assert schema.cells(schema.read('{"value": 1, "after": {"value": 2, "after": null}}')) == {
        "value": 1,
        "after": {"value": 2, "after": None},
    }


CLOSED = {"type": "object", "properties": {"x": {"type": "string"}}}


class Words(pydantic.RootModel[list[str]]):
    """No object."""


class Added(BaseModel):
    model_config = pydantic.ConfigDict(json_schema_extra=lambda schema: schema["properties"].update(more={}))
    name: str


class Mistaken(BaseModel):
    model_config = pydantic.ConfigDict(json_schema_extra=lambda schema: schema["properties"].pop("nobody"))
    name: str


class Unspeakable(BaseModel):
    model_config = pydantic.ConfigDict(arbitrary_types_allowed=True)
    frame: pd.DataFrame


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (Words, "not that of an object with properties"),
        (Added, "Added has a property 'more' that is no field of it"),
        (Mistaken, "Mistaken has no JSON schema: KeyError: 'nobody'"),
        (Unspeakable, "Unspeakable has no JSON schema"),
        ({"type": "array", "items": {"type": "string"}}, "not that of an object with properties"),
        ({"type": "object", "properties": {}}, "has no properties"),
        ({"type": "objekt", "properties": {"a": {}}}, "the JSON schema is not valid"),
        ({"type": "object", "properties": {"a": object()}}, "the JSON schema is no JSON"),
        ({"type": "object", "properties": {"a": {}}, "allOf": [{"$ref": "#"}]}, "refers to itself"),
        (
            {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a", "b"]},
            r"requires 'b', which is not among its properties \['a'\]",
        ),
        (
            {"type": "object", "properties": {"a": {"type": "array", "items": {**CLOSED, "required": ["y"]}}}},
            "requires 'y'",
        ),
        (Person(name="Ann"), "is no schema"),
    ],
)
def test_a_schema_that_cannot_be_asked_for_is_refused(schema: Any, said: str) -> None:
    with pytest.raises(SchemaError, match=said):
        read_schema(schema)


def test_an_open_object_may_require_what_it_does_not_name() -> None:
    schema = of_json_schema(
        {"type": "object", "properties": {"a": {}}, "required": ["b"], "additionalProperties": {"type": "integer"}}
    )
    assert schema.read('{"b": 1}') == {"b": 1}


@pytest.mark.parametrize("step", [0.1, 0.01, 1])
def test_a_multiple_is_one_by_its_digits(step: float) -> None:
    schema = of_json_schema({"type": "object", "properties": {"r": {"type": "number", "multipleOf": step}}})
    for text in (f'{{"r": {times * step:.2f}}}' for times in range(200)):
        schema.read(text)
    for text in ('{"r": 0.355}', '{"r": 1e-300}', '{"r": -2.123}'):
        with pytest.raises(Unfit, match=f"is not a multiple of {step}"):
            schema.read(text)
    assert schema.read('{"r": 1e300}') == {"r": 1e300}


def key_of(schema: Objects) -> str:
    return (
        Requests("https://api.openai.com/v1", "m", {}, schema.canonical).key([{"role": "user", "content": "x"}]).hex()
    )


def test_the_key_of_a_schema_never_changes() -> None:
    assert key_of(of_model(Review)) == "b59aebe4ffcf478244eddf5bcc5eacb4c6da167f5d18aaf9b1182def99a220c2"


def test_titles_and_the_order_of_keys_are_no_part_of_a_key() -> None:
    one = {"type": "object", "title": "A", "properties": {"a": {"type": "string", "title": "A"}, "b": {"enum": [1]}}}
    two = {"properties": {"b": {"const": 1, "title": "B"}, "a": {"type": "string"}}, "type": "object"}
    assert key_of(of_json_schema(one)) == key_of(of_json_schema(two))


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ('{" ""-9223372036854775809"}', {" ": -9.223372036854775809e18}),
        ('{"a": 18446744073709551616,}', {"a": 18446744073709551616.0}),
    ],
)
def test_damaged_json_gives_what_sound_json_would(text: str, read: Any) -> None:
    assert read_answer(text) == read
    assert read_answer(json_text(text)) == read


def test_half_a_character_in_damaged_json_ends_no_run() -> None:
    read = read_answer(r'{"a": "\ud800",}')
    assert read["a"] in ("\ufffd", r"\ud800")  # json_repair 0.40 leaves the escape as it is
    assert read_answer(json_text(r'{"a": "\ud800",}')) == read


class Large(BaseModel):
    several: int | list[int]
    by_number: int | dict[int, str]


def test_integers_beyond_64_bits_and_keys_that_are_numbers_are_written_where_a_column_is_text() -> None:
    schema = of_model(Large)
    parsed = schema.read('{"several": ["99999999999999999999"], "by_number": {"7": "seven"}}')
    assert schema.cells(parsed) == {"several": "[99999999999999999999]", "by_number": '{"7":"seven"}'}


class Feeling(enum.StrEnum):
    GOOD = "good"
    BAD = "bad"


class Inner(BaseModel):
    """An inner."""

    when: date | None = None
    scores: list[Annotated[float, Field(ge=0, le=1)]] = []


class Everything(BaseModel):
    """What pydantic's versions may say otherwise than one another."""

    stars: int = Field(ge=1, le=5, description="Of five.")
    share: float = Field(gt=0, lt=1e3, multiple_of=0.5)
    mood: Feeling
    kind: Literal["a", "b", 3]
    inner: Inner
    others: dict[str, Inner] | None
    tags: set[str] = Field(default_factory=set, max_length=3)
    price: Decimal
    pair: tuple[int, str]
    at: datetime
    took: timedelta
    text: Annotated[str, Field(pattern="^a", min_length=1)]


def test_the_key_of_a_model_with_everything_in_it_is_that_of_every_version_of_pydantic() -> None:
    assert key_of(of_model(Everything)) == "c2aaf026b202ddaa56efff36d0587da4f53e7de8d9b30512093eef283a2c3e1c"
