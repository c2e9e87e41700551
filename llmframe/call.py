"""A call: its keywords are checked and its rows planned, before anything is asked or any checkpoint is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

from llmframe import endpoint, loops, replicas
from llmframe.asking import Accepted
from llmframe.budget import Bound, Budget, most_completion_tokens
from llmframe.checkpoint import Checkpoint, Origin
from llmframe.endpoint import Endpoint
from llmframe.errors import ConfigurationError
from llmframe.index import Index
from llmframe.notices import say, warn
from llmframe.options import Options
from llmframe.planning import Plan, check_columns, make_plan, select
from llmframe.prices import PriceOf, known_prices, read_prices
from llmframe.prompts import Prompts
from llmframe.requests import Requests
from llmframe.results import property_column
from llmframe.schemas import Schema, read_schema
from llmframe.texts import Texts
from llmframe.transports import Extras

LOCAL = "local"  # the model= that means the embedded one

_open_lines: set[str] = set()  # hosts that were warned of


@dataclass(frozen=True, slots=True)
class Call:
    """A call whose checks are done: what each of its rows sends, where to, and what that costs."""

    schema: Schema | None
    endpoint: Endpoint
    requests: Requests
    plan: Plan
    params: Mapping[str, Any]
    price: PriceOf | None
    budget: Budget | None
    accepted: Accepted = field(default_factory=Accepted)


def plan_call(prompts: Prompts, options: Options, like: Call | None = None) -> Call:
    """Check a call and plan it; nothing is asked, and no checkpoint is touched.

    Parameters
    ----------
    prompts : Prompts
        The rows and what each sends.
    options : Options
        The call's keywords.
    like : Call, optional
        The same call for other rows: all but the plan is taken from it, the budget too.

    Raises
    ------
    ConfigurationError, TemplateError, SchemaError
        The call cannot be made as it was written.
    """
    if like is not None:
        selected = select(prompts.frame, options)
        plan = make_plan(prompts, like.requests, selected, dedupe=options.dedupe)
        return replace(like, plan=plan)
    model = _model_of(prompts, options)
    schema = _schema_of(options)
    selected = select(prompts.frame, options)
    check_columns(prompts.frame, options, schema, selected)
    _tell_renamed_columns(options, schema)
    price: PriceOf | None = None if options.prices is None else read_prices(options.prices, embeds=options.embeds)
    params, extras = split_extras(options.params)
    target = _target(options, extras)
    if price is None and model != LOCAL:
        price = known_prices(model, target.url, params.get("service_tier"))
    budget = _budget(options, params, price)
    requests = Requests(
        target.identity,
        model,
        params,
        schema.canonical if schema else None,
        schema.response_format if schema else None,
        options.api,
    )
    plan = make_plan(prompts, requests, selected, dedupe=options.dedupe)
    return Call(schema, target, requests, plan, params, price, budget)


def _model_of(prompts: Prompts, options: Options) -> str:
    """Give the model that is asked."""
    if options.embeds and not isinstance(prompts, Texts):
        raise ConfigurationError("api='embeddings' gives no answers; embeddings are made by df.llm.embed('text')")
    if options.model is None and options.embeds:
        raise ConfigurationError("no model: pass model= to embed, as in model='text-embedding-3-small'")
    if options.model is None:
        raise ConfigurationError(
            "no model: pass model=, set it with llmframe.configure(model=...) or LLMFRAME_MODEL; "
            'model="local" needs no key and no network'
        )
    return options.model


def _schema_of(options: Options) -> Schema | None:
    """Read the schema; what cannot be asked for beside it, or by this API, is refused."""
    schema = read_schema(options.schema, options.output)
    if schema is not None and "response_format" in options.params:
        raise ConfigurationError("schema= and response_format= say the same; pass one of them")
    if options.api == "responses" and options.params.keys() & {"n", "background"}:
        raise ConfigurationError("api='responses' gives one answer a request, at once; leave n= and background= out")
    if schema is not None and schema.columns and options.several:
        raise ConfigurationError("n= gives a list of answers, and a schema with properties needs one; leave n= out")
    return schema


def _tell_renamed_columns(options: Options, schema: Schema | None) -> None:
    for name in () if schema is None else schema.columns:
        if (column := property_column(options.output, name)) != f"{options.output}_{name}":
            words = (
                f"the property {name!r} is in column {column!r}: without the underscore it is a column of llmframe's"
            )
            say(words, quiet=options.progress is False, once=True)


def _target(options: Options, extras: Extras) -> Endpoint:
    target = replicas.resolve(
        client=options.client,
        base_url=options.base_url,
        api_key=options.api_key,
        local_model=options.model == LOCAL and options.client is None,
        extras=extras,
        api=options.api,
    )
    if target.bound and loops.in_running_loop():
        loops.let_callers_loop_nest()
    return target


def _budget(options: Options, params: Mapping[str, Any], price: PriceOf | None) -> Budget | None:
    if options.max_cost is None and options.max_tokens_total is None:
        return None
    assert options.model is not None
    if options.max_cost is not None and price is None:
        raise ConfigurationError(
            f"max_cost= needs a price, and none is known for {options.model!r} here (genai-prices, of the extra "
            "'cost', knows most at their own endpoints); pass prices={'input': ..., 'output': ...} in USD per million "
            "tokens, or max_tokens_total="
        )
    keyword = "max_cost" if options.max_cost is not None else "max_tokens_total"
    bound = Bound(0 if options.embeds else most_completion_tokens(options.model, params, keyword), price)
    return Budget(bound=bound, max_usd=options.max_cost, max_tokens=options.max_tokens_total)


def split_extras(params: Any) -> tuple[dict[str, Any], Extras]:
    """Take apart what goes into the body and what goes beside it (the SDK's ``extra_*``)."""
    body = dict(params)
    extras: dict[str, dict[str, Any]] = {}
    for name in ("extra_headers", "extra_query", "extra_body"):
        given = body.pop(name, None)
        extras[name] = {} if given is None else given
        if not isinstance(extras[name], dict):
            raise ConfigurationError(f"{name}={extras[name]!r:.60} has to be a dict")
    body.update(extras["extra_body"])
    return body, Extras(tuple(extras["extra_headers"].items()), tuple(extras["extra_query"].items()))


def warn_of_open_line(url: str) -> None:
    """Warn once of an endpoint on the way to which the key can be read."""
    parts = urlsplit(url)
    host = f"{parts.scheme}://{parts.hostname}"
    if endpoint.is_open(url) and host not in _open_lines:
        _open_lines.add(host)
        warn(f"the key and the prompts go to {host} unencrypted, for anybody on the way to read; use https://")


def open_checkpoint(prompts: Prompts, options: Options, call: Call, index: Index | None = None) -> Checkpoint | None:
    """Open the checkpoint of a call, if it has one.

    Raises
    ------
    CheckpointError
        It cannot be read or written.
    """
    if options.checkpoint is None:
        return None
    assert options.model is not None
    origin = Origin(
        endpoint=call.endpoint.identity,
        api=options.api,
        model=options.model,
        template=prompts.description,
        parameters=call.requests.parameters,
    )
    return Checkpoint.open(options.checkpoint, origin, index)
