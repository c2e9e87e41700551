"""What a process brings to a Batch job and its directory does not keep: the key, the classes, the prices.

The key goes where the caller said, and not where a file says; and no file says what code is to run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from llmframe import replicas
from llmframe.batch_ledger import Terms
from llmframe.call import split_extras
from llmframe.endpoint import Endpoint
from llmframe.errors import ConfigurationError
from llmframe.options import Options
from llmframe.prices import PriceOf, halved, known_prices, read_prices
from llmframe.requests import canonical
from llmframe.schemas import Labels, Schema, read_schema
from llmframe.transports import Extras


@dataclass(frozen=True, slots=True)
class Access:
    """What a process brings to a job and the directory does not keep: the key, the classes, its patience.

    Attributes
    ----------
    options : Options
        With the client, or the pieces of one.
    schema : object
        A pydantic model, where the job has one.
    poll_s : float
        Seconds between two looks at first.
    """

    options: Options
    schema: Any
    poll_s: float

    @property
    def extras(self) -> Extras:
        """What the call adds to every request."""
        return split_extras(self.options.params)[1]

    def target(self, terms: Terms, directory: str) -> Endpoint:
        """Find the endpoint of a job; the key goes where the caller said and nowhere else.

        Raises
        ------
        ConfigurationError
            No key, or another endpoint than the job's.
        """
        options = self.options
        target = replicas.resolve(client=options.client, base_url=options.base_url, api_key=options.api_key)
        if target.identity != terms.identity:
            raise ConfigurationError(
                f"the job in {directory} is at {terms.identity}, and this call's key is for {target.identity}; "
                f"pass base_url={terms.identity!r} with its api_key=, or its client="
            )
        return target

    def schema_of(self, terms: Terms, directory: str) -> Schema | None:
        """Find what a job's answers have to fit.

        Raises
        ------
        ConfigurationError
            It is a pydantic model that this process does not know, or another than was submitted.
        """
        kept = terms.schema
        if kept is None:
            if self.schema is not None:
                raise ConfigurationError(f"the job in {directory} was submitted without a schema; leave schema= out")
            return None
        given: Any = kept.get("value")
        if kept["kind"] == "model":
            given = self.schema if self.schema is not None else _model_named(kept["module"], kept["name"])
            if given is None:
                raise ConfigurationError(
                    f"the job in {directory} was submitted with schema={kept['name']}, a class of {kept['module']} "
                    f"that is not imported here; pass it: llmframe.BatchJob.open({directory!r}, schema={kept['name']})"
                )
        schema = read_schema(given, terms.output)
        if schema is None or canonical(schema.canonical).decode() != kept["canonical"]:
            raise ConfigurationError(
                f"the schema is not the one that the job in {directory} was submitted with; pass that one as schema="
            )
        return schema

    def price_of(self, terms: Terms) -> PriceOf | None:
        """Give what a batch costs: half of the price."""
        online = known_prices(terms.model, terms.identity, terms.service_tier)
        if terms.prices is not None:
            online = read_prices(terms.prices, embeds=terms.api == "embeddings")
        return None if online is None else halved(online)


def checked_poll(poll_s: Any) -> float:
    """Refuse what is no time between two looks."""
    if isinstance(poll_s, bool) or not isinstance(poll_s, int | float) or not 0 < poll_s < float("inf"):
        raise ConfigurationError(f"poll_s={poll_s!r} has to be a number of seconds above 0")
    return float(poll_s)


def kept_schema(given: Any, schema: Schema | None) -> dict[str, Any] | None:
    """Note a schema so that another process finds it: labels and JSON as they are, a class by its name."""
    if schema is None:
        return None
    kept: dict[str, Any] = {"canonical": canonical(schema.canonical).decode()}
    if isinstance(schema, Labels):
        return {**kept, "kind": "labels", "value": list(schema.values)}
    if isinstance(given, type):
        return {**kept, "kind": "model", "module": given.__module__, "name": given.__qualname__}
    return {**kept, "kind": "json", "value": dict(given)}


def _model_named(module: str, name: str) -> Any:
    """Find a class among what is imported already: a file in a directory must not say what is to be run."""
    found: Any = sys.modules.get(module)
    for each in name.split("."):
        found = getattr(found, each, None)
    return found
