"""The estimate: what a call would ask and cost, before it is made.

Nothing is sent, but for a sample that is asked for, and nothing is written: a checkpoint is searched as it lies there.
What is not known is None, and what a figure was taken from is said beside it.
"""

from __future__ import annotations

import html
import numbers
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from llmframe import runner
from llmframe.budget import ANSWER_LIMITS
from llmframe.call import LOCAL, plan_call
from llmframe.errors import ConfigurationError
from llmframe.options import Options, answers_asked, check_count
from llmframe.planning import Plan
from llmframe.prepared import ready, take
from llmframe.prices import BATCH_SHARE, PriceOf
from llmframe.prompts import Missing, Prompts
from llmframe.results import Completion, Usage
from llmframe.shelf import Shelf
from llmframe.texts import text_of
from llmframe.tokens import Counter, counter_for

ENOUGH = 20  # answers whose mean says more of the others than a limit does


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a call would ask and cost.

    Attributes
    ----------
    rows : int
        Of the frame.
    skipped : int
        Rows that would send nothing: a missing value in a used column, or left out by ``where=``.
    requests : int
        Distinct requests still to be asked.
    from_checkpoint : int
        Distinct requests whose answers are in the checkpoint, and cost nothing.
    prompt_tokens, completion_tokens : int, int or None
        Of the requests still to be asked; None where nothing says how long an answer gets.
    cost_usd : float or None
        Of the same; None where the price or the length of an answer is unknown.
    prompt_cost_usd : float or None
        The part of it that the prompts take, without any discount for cached tokens.
    prompts_by, completions_by, price_by : str
        What the figures were taken from.
    batch : bool
        Whether a batch is what was asked about: its view then shows what one saves.

    Examples
    --------
    >>> made = df.llm.estimate("Translate to French: {text}", model="gpt-4o-mini")
    >>> made.requests, made.prompt_tokens, made.completion_tokens
    (2, 26, None)
    """

    rows: int
    skipped: int
    requests: int
    from_checkpoint: int
    prompt_tokens: int
    completion_tokens: int | None
    cost_usd: float | None
    prompt_cost_usd: float | None
    prompts_by: str
    completions_by: str
    price_by: str
    batch: bool = False

    def __add__(self, other: Estimate) -> Estimate:
        """Add the estimate of other rows of the same call; what is unknown of either is unknown of both."""
        numbers: dict[str, Any] = {
            each.name: None if None in (mine := (getattr(self, each.name), getattr(other, each.name))) else sum(mine)
            for each in fields(self)
            if not each.name.endswith("_by") and each.name != "batch"
        }
        return replace(other if other.requests and not self.requests else self, **numbers)

    @property
    def batch_cost_usd(self) -> float | None:
        """The USD of the same through a Batch API at half the price, as OpenAI's and Azure's are."""
        return None if self.cost_usd is None else self.cost_usd * BATCH_SHARE

    @property
    def batch_saves_usd(self) -> float | None:
        """The USD by which that is less."""
        return None if self.cost_usd is None else self.cost_usd * (1.0 - BATCH_SHARE)

    def __repr__(self) -> str:
        width = max(len(name) for name, _, _ in self._lines())
        lines = [f"{name:<{width}}  {value:>14}  {by}".rstrip() for name, value, by in self._lines()]
        return "\n".join(["<Estimate: nothing was sent", *(f"  {line}" for line in lines)]) + ">"

    def _repr_html_(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left;font-weight:normal'>{html.escape(name)}</th>"
            f"<td style='text-align:right'>{html.escape(value)}</td>"
            f"<td style='text-align:left;opacity:.7'>{html.escape(by)}</td></tr>"
            for name, value, by in self._lines()
        )
        # No colour of its own: it is read on whatever the notebook's theme has.
        caption = "<caption style='text-align:left'>Estimate: nothing was sent</caption>"
        return f"<table>{caption}<tbody>{cells}</tbody></table>"

    @property
    def _cost_by(self) -> str:
        """What the cost was taken from, or why it is unknown."""
        priced = self.prompt_cost_usd is not None
        return "the completion tokens are unknown" if self.cost_usd is None and priced else self.price_by

    def _lines(self) -> list[tuple[str, str, str]]:
        return [
            ("rows", f"{self.rows:,}", ""),
            ("skipped", f"{self.skipped:,}", ""),
            ("in the checkpoint", f"{self.from_checkpoint:,}", "distinct requests; they cost nothing"),
            ("to ask", f"{self.requests:,}", "distinct requests"),
            ("prompt tokens", f"{self.prompt_tokens:,}", self.prompts_by),
            ("completion tokens", _shown(self.completion_tokens, "{:,}"), self.completions_by),
            ("cost", _shown(self.cost_usd, "{:,.4f} USD"), self._cost_by),
            ("of it the prompts", _shown(self.prompt_cost_usd, "{:,.4f} USD"), ""),
            ("as a batch", _shown(self.batch_cost_usd, "{:,.4f} USD"), "where the provider's Batch API takes half"),
            *([("saved by it", _shown(self.batch_saves_usd, "{:,.4f} USD"), "")] if self.batch else []),
        ]


def _shown(value: float | None, form: str) -> str:
    return "unknown" if value is None else form.format(value)


def estimate(prompts: Prompts, options: Options, sample: int | None = None, *, batch: bool = False) -> Estimate:
    """Estimate a call; see `LLMFrame.estimate`."""
    if batch not in (True, False):
        raise ConfigurationError(f"batch={batch!r} is not known; it is True or False")
    return replace(_estimated(prompts, options, sample), batch=batch)


def _estimated(prompts: Prompts, options: Options, sample: int | None) -> Estimate:
    if sample is None:
        return _look(prompts, options, ENOUGH).estimate
    check_count("sample", sample)
    if options.checkpoint is None:
        raise ConfigurationError("sample= asks rows for real; pass checkpoint= to keep their answers for the call")
    if options.refresh:
        raise ConfigurationError("sample= asks rows for real, and refresh=True asks them again; leave one of them out")
    first = _look(prompts, options, ENOUGH)
    positions = first.ask_first(sample)
    if len(positions):
        mask = np.zeros(len(prompts), dtype=bool)
        mask[positions] = True
        runner.complete(prompts, replace(options, where=mask))
    return _look(prompts, options, min(sample, ENOUGH)).estimate


@dataclass(frozen=True, slots=True, eq=False)
class _Look:
    """An estimate, and where the requests stand that it is of."""

    estimate: Estimate
    positions: npt.NDArray[np.intp]

    def ask_first(self, count: int) -> npt.NDArray[np.intp]:
        """Choose some rows to ask, spread over the whole: the first of a frame are seldom like the rest."""
        places = np.linspace(0, len(self.positions) - 1, min(count, len(self.positions)))
        return self.positions[np.unique(places.astype(np.intp))]


def _look(prompts: Prompts, options: Options, enough: int) -> _Look:
    call = plan_call(prompts, options if options.client is not None else _keyless(options))
    assert options.model is not None
    state = ready(prompts, options, call, None).state
    held = None if options.checkpoint is None or options.refresh else Shelf.at(options.checkpoint)
    if held is not None:
        take(state, held)
    outcomes = state.outcomes
    asked = outcomes.pending().tolist()
    unkept = {*asked, *call.plan.unreadable}
    kept = {number: outcomes[number] for number in range(len(outcomes)) if number not in unkept}
    counter = counter_for(options.model)
    counted = _count(prompts, call.plan, counter, embedding=options.embeds)
    unseen = _unseen(call.schema, call.params) + (["images"] if options.images else [])
    prompt_tokens, prompts_by = _prompt_tokens(counted, kept, asked, counter, unseen, enough)
    mean, completions_by = _completion_tokens(kept, call.params, enough)
    completion_tokens = None if mean is None else round(mean * len(asked))
    if options.embeds:
        completion_tokens, completions_by = 0, "an embedding has none"
    if not asked:
        completion_tokens, completions_by = 0, "nothing to ask"
    made = Estimate(
        rows=len(prompts),
        skipped=int((call.plan.request_of < 0).sum()),
        requests=len(asked),
        from_checkpoint=len(kept),
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cost_usd=_cost(call.price, len(asked), prompt_tokens, completion_tokens),
        prompt_cost_usd=_cost(call.price, len(asked), prompt_tokens, 0),
        prompts_by=prompts_by,
        completions_by=completions_by,
        price_by=_price_by(options, call.price),
    )
    return _Look(made, call.plan.first[asked])


def _keyless(options: Options) -> Options:
    """Let a call be estimated before its owner has a key: none is sent anywhere."""
    given = options.api_key is not None or os.environ.get("OPENAI_API_KEY") or options.model == LOCAL
    return options if given else replace(options, api_key="none is needed to estimate")


def _count(prompts: Prompts, plan: Plan, counter: Counter, *, embedding: bool) -> list[int]:
    counted = []
    for messages in prompts.render(plan.first, for_key=True):
        if isinstance(messages, Missing):
            counted.append(0)
        else:
            counted.append(counter.count(text_of(messages)) if embedding else counter.prompt(messages))
    return counted


def _unseen(schema: Any, params: Mapping[str, Any]) -> list[str]:
    """Name what a prompt's tokens hold besides its messages."""
    return [
        *(["the schema"] if schema is not None else []),
        *(name for name in ("tools", "functions", "response_format") if params.get(name)),
    ]


def _prompt_tokens(
    counted: list[int],
    kept: Mapping[int, Completion],
    asked: list[int],
    counter: Counter,
    unseen: list[str],
    enough: int,
) -> tuple[int, str]:
    """Give the tokens of the prompts to be asked, and by what: the endpoint's own count of others corrects ours."""
    total = sum(counted[number] for number in asked)
    said = [(counted[number], each.prompt_tokens) for number, each in kept.items() if each.prompt_tokens]
    if len(said) >= enough and not (counter.known and not unseen):
        total = round(total * sum(theirs for _, theirs in said) / sum(ours for ours, _ in said))
        return total, f"{counter.how}; corrected by the usage of {len(said):,} answers in the checkpoint"
    left_out = f"; {', '.join(unseen)} not counted" if unseen else ""
    return total, f"{counter.how}{left_out}"


def _completion_tokens(
    kept: Mapping[int, Completion], params: Mapping[str, Any], enough: int
) -> tuple[float | None, str]:
    """Give the tokens of one request's answers, and by what."""
    said = [each.completion_tokens for each in kept.values() if each.completion_tokens is not None]
    if len(said) >= enough:
        return sum(said) / len(said), f"the mean of {len(said):,} answers in the checkpoint"
    for name in ANSWER_LIMITS:
        limit = params.get(name)
        if not isinstance(limit, bool) and isinstance(limit, numbers.Integral):
            return float(limit) * answers_asked(params), f"{name}=, so at most"
    return None, f"pass max_tokens=, or sample={ENOUGH} with checkpoint= to ask so many rows"


def _cost(price: PriceOf | None, requests: int, prompt_tokens: int, completion_tokens: int | None) -> float | None:
    """Price the requests at their mean: a price may depend on the length of a prompt."""
    if not requests:
        return 0.0
    if price is None or completion_tokens is None:
        return None
    # Whole tokens a request, since a usage has no others; the rest is spread one by one.
    share, more = divmod(prompt_tokens, requests)
    answer, longer = divmod(completion_tokens, requests)
    sizes = [(min(more, longer), 1, 1), (max(0, more - longer), 1, 0), (max(0, longer - more), 0, 1)]
    sizes.append((requests - max(more, longer), 0, 0))
    return sum(count * price(Usage(share + a, answer + b)) for count, a, b in sizes)


def _price_by(options: Options, price: PriceOf | None) -> str:
    if price is None:
        return "no price is known; pass prices={'input': ..., 'output': ...}"
    return "prices=" if options.prices is not None else "genai-prices"
