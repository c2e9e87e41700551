"""`df.llm`: arguments in, a frame out. It keeps no setting and no state of a run.

`series.llm` is the same for one column.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pandas as pd

from llmframe import runner
from llmframe.errors import ConfigurationError, TemplateError
from llmframe.estimate import Estimate, estimate
from llmframe.messages import kind
from llmframe.options import (
    POLL_S,
    Options,
    call_options,
    embed_options,
    gather,
    gather_embedding,
    method_takes_options,
)
from llmframe.planning import prompts_of, select
from llmframe.prompts import Missing, Prompt, Prompts
from llmframe.results import typed
from llmframe.texts import Texts

if TYPE_CHECKING:
    from llmframe.batch import BatchJob
    from llmframe.review import Review


@pd.api.extensions.register_dataframe_accessor("llm")
class LLMFrame:
    """A language model over the rows of a DataFrame.

    Examples
    --------
    >>> df.llm.messages("Translate to French: {text}").iloc[0]
    [{'role': 'user', 'content': 'Translate to French: Good morning'}]
    """

    def __init__(self, frame: pd.DataFrame) -> None:
        if not isinstance(frame, pd.DataFrame):
            raise ConfigurationError(
                f"LLMFrame was given what is {kind(frame)}; give it a pandas DataFrame, as pd.DataFrame(...) makes one "
                "of a dict, table.to_pandas() of an Arrow table and series.to_frame() of a Series"
            )
        self._frame = frame

    @method_takes_options(call_options)
    def complete(self, prompt: Prompt, **keywords: Any) -> pd.DataFrame:
        r"""Ask a model once for each row, and give the frame with the answers as new columns.

        Parameters
        ----------
        prompt : column name, template, list of messages, or callable
            ``"review"``, ``"Translate: {text}"``, ``[{"role": "user", "content": "{text}"}]``, or a function of a row
            that returns text or messages (called once a row). A column may hold message arrays. A Jinja2 template
            works too. In a template ``{price:.2f}`` formats and ``{{`` is a brace.
        system : str, optional
            A template for the system message.
        examples : list of (str, str), optional
            Few-shot pairs of user and assistant texts, sent as they are.
        history : column name, optional
            A column of message arrays that each row's turn goes on from; in the result it has grown by the turn and
            its answer, so that the next call continues the conversation. It is made where the frame has none.
        images : column name or list of them, optional
            What goes beside each row's text, one thing or a list in a cell: ``http(s)://`` URLs as they are; paths,
            bytes, PIL images and arrays (height, width, channels) of uint8 or of floats from 0 to 1 as data URLs. A PDF
            goes as a file, WAV and MP3 as audio. A file that cannot be read is its row's error.
        model : str
            The model's name; ``"local"`` is the embedded one. Else `configure`, else ``LLMFRAME_MODEL``.
        schema : list of labels, pydantic model or dict, optional
            What the answer has to fit. One of some labels: the column is a category. Or an object, by a model's class
            or a JSON schema: the column holds its JSON, and ``response_<property>`` each property, typed.
        output : str, default "response"
            The response column, and the prefix of the others; with labels, also what the model is told they are of.
        details : bool, default False
            Also write cached and reasoning tokens, cost (USD), latency (s), attempts, finish reason, model, source,
            request id, tool calls (JSON) and the reasoning of a model that thinks.
        where : "missing" or boolean mask, optional
            Which rows to ask: those whose output column is null and whose status is not ``ok`` (a call of tools has no
            text), or those of the mask. The others keep what they hold. Text that was cut, or that does not fit an
            object schema, is not null; to ask such rows again, pass
            ``where=out.response_status.isin(["truncated", "invalid"]), refresh=True``.
        refresh : bool, default False
            Ask again, whatever the checkpoint holds; it is paid for again.
        na : {"skip", "raise", "keep"}
            What to do with a row where a used column is missing; ``"keep"`` renders it as empty.
        checkpoint : path or fsspec URL, optional
            A directory that keeps every answer: the same call again asks only what is not there. What was paid for
            (``ok``, ``truncated``, ``filtered``, ``refused``, ``invalid``) is given back, with ``where="missing"``
            only where there is text; ``failed`` and ``pending`` rows are asked again.
        dedupe : bool, default True
            Ask identical requests once.
        max_concurrency, rpm, tpm : optional
            Caps on requests in flight, on requests and on tokens per minute. Learned without them; 1 is sequential.
        max_cost, max_tokens_total : optional
            The most this call may spend, in USD or in tokens. Never passed: the worst case of what is in flight is
            set aside before it is sent. What is not reached is ``pending``. ``max_cost`` needs a known price (by the
            extra ``cost``, or ``prices=``). Both need ``max_tokens=`` for a model whose longest answer is not known;
            that of most OpenAI models is.
        prices : dict, optional
            USD per million tokens, ``{"input": 0.15, "cached": 0.075, "output": 0.60}`` (``"cached"`` may be left out),
            where the extra ``cost`` is not installed or does not know the model.
        timeout : float, optional
            Seconds for one attempt; learned without it.
        max_attempts : int, default 8
            Requests for one row before it is ``failed``.
        on_error : {"column", "raise"}
            Write a row's failure into its columns, or stop at the first.
        api : {"chat", "responses"}
            Which of the endpoint's APIs to ask.
        client, base_url, api_key : optional
            An openai client, or the pieces of one; else ``OPENAI_BASE_URL`` and ``OPENAI_API_KEY``. A list as
            ``base_url`` names replicas, servers with the same model: all are kept equally full, one that fails is left
            out until it answers again, and answers are kept under the first.
        progress : bool, optional
            True shows a bar, False none and no notices either. Without it there is a bar in a terminal or notebook.
        **params
            Anything else goes to the API: ``temperature``, ``max_tokens``, ``n``, ``extra_body``, ...

        Returns
        -------
        DataFrame
            A new frame, with the index and order of this one, and the columns ``response``, ``response_status``
            (``ok``, ``truncated``, ``filtered``, ``refused``, ``invalid``, ``failed``, ``skipped``, ``pending``),
            ``response_error``, ``response_prompt_tokens`` and ``response_completion_tokens``.

        Raises
        ------
        ConfigurationError, TemplateError, SchemaError, CheckpointError
            Before any request.
        EndpointError, BudgetExceeded, RowFailed, Interrupted
            While it runs; ``.frame`` holds the rows done so far.

        Examples
        --------
        >>> df = pd.DataFrame({"review": ["The best player I have owned.", "The worst player I have owned."]})
        >>> question = "Is this review positive or negative?\n\n{review}"
        >>> labels = ["positive", "negative"]
        >>> out = df.llm.complete(question, schema=labels, output="sentiment", model="local", temperature=0)
        >>> out["sentiment_status"].tolist()
        ['ok', 'ok']
        >>> out["sentiment"].cat.categories.tolist()
        ['positive', 'negative']
        """
        return runner.complete(*self._call(prompt, keywords)).frame()

    @method_takes_options(call_options)
    async def acomplete(self, prompt: Prompt, **keywords: Any) -> pd.DataFrame:
        """Do as `complete` does, for a caller that has an event loop.

        Examples
        --------
        >>> df = pd.DataFrame({"review": ["It is a joy to use."]})
        >>> async def label():
        ...     return await df.llm.acomplete("Is it good or bad? {review}", schema=["good", "bad"], model="local")
        >>> asyncio.run(label())["response_status"].tolist()
        ['ok']
        """
        state = await runner.acomplete(*self._call(prompt, keywords))
        return state.frame()

    @method_takes_options(embed_options)
    def embed(self, text: Prompt, **keywords: Any) -> pd.DataFrame:
        """Ask a model for the embedding of each row's text, many in one request, and give the frame with them.

        Parameters
        ----------
        text : column name, template, or callable
            What is embedded: ``"review"``, ``"{title}: {body}"``, or a function of a row that returns text.
        model : str
            The model's name, as in ``"text-embedding-3-small"``; ``"local"`` is the embedded one, which is for trying
            things out. It is not taken from `configure`, whose model answers.
        output : str, default "embedding"
            The column of vectors, and the prefix of the others.
        dimensions : int, optional
            The length of the vectors, for a model that can shorten them.
        details : bool, default False
            Also write cost (USD), latency (s), attempts, model, source and request id.
        where, refresh, na, checkpoint, dedupe, on_error, progress : optional
            As for `complete`.
        max_concurrency, rpm, tpm, max_cost, max_tokens_total, prices, timeout, max_attempts : optional
            As for `complete`; ``prices`` needs no ``"output"``, and is not taken from `configure`: its prices are those
            of the model that answers.
        client, base_url, api_key : optional
            As for `complete`.
        **params
            Anything else goes to the API: ``user``, ``extra_body``, ...

        Returns
        -------
        DataFrame
            A new frame, with the index and order of this one, and the columns ``embedding`` (arrays of float32, views
            of one matrix; None where there is none), ``embedding_status``, ``embedding_error`` and
            ``embedding_prompt_tokens`` (a request's tokens are shared out over its texts; the sum is exact).

        Raises
        ------
        ConfigurationError, TemplateError, CheckpointError
            Before any request.
        EndpointError, BudgetExceeded, RowFailed, Interrupted
            While it runs; ``.frame`` holds the rows done so far.

        Examples
        --------
        >>> out = df.llm.embed("text", model="local")
        >>> out["embedding"][0].dtype, len(out["embedding"][0]), out["embedding_status"].tolist()
        (dtype('float32'), 576, ['ok', 'ok'])
        """
        return runner.complete(*self._embedding(text, keywords)).frame()

    @method_takes_options(embed_options)
    async def aembed(self, text: Prompt, **keywords: Any) -> pd.DataFrame:
        """Do as `embed` does, for a caller that has an event loop.

        Examples
        --------
        >>> async def embed():
        ...     return await df.llm.aembed("text", model="local")
        >>> asyncio.run(embed())["embedding_status"].tolist()
        ['ok', 'ok']
        """
        state = await runner.acomplete(*self._embedding(text, keywords))
        return state.frame()

    @method_takes_options(call_options)
    def messages(self, prompt: Prompt, **keywords: Any) -> pd.Series[Any]:
        """Give the messages that each row would send; nothing is sent.

        Returns
        -------
        Series
            A list of messages a row; None for a row that would be skipped.

        Examples
        --------
        >>> df = pd.DataFrame({"text": ["Guten Tag"]})
        >>> df.llm.messages("Translate: {text}", system="You translate.").iloc[0]
        [{'role': 'system', 'content': 'You translate.'}, {'role': 'user', 'content': 'Translate: Guten Tag'}]
        """
        prompts, options = self._call(prompt, keywords)
        selected = select(self._frame, options)
        made = [None if isinstance(one, Missing) else one for one in prompts.render(wanted=selected)]
        cells = [one if chosen else None for one, chosen in zip(made, selected.tolist(), strict=True)]
        return pd.Series(typed(cells, object), index=self._frame.index, name="messages")

    @method_takes_options(call_options)
    def estimate(self, prompt: Prompt, *, sample: int | None = None, batch: bool = False, **keywords: Any) -> Estimate:
        r"""Estimate what `complete` would ask and cost; nothing is sent, and the checkpoint is only read.

        Parameters
        ----------
        prompt
            As for `complete`, with its keywords; with ``api="embeddings"`` as for `embed`. No key is needed.
        sample : int, optional
            Ask so many rows for real, spread over the frame, and take the length of the others' answers from theirs.
            It needs ``checkpoint=``, which keeps them: `complete` does not ask them again.
        batch : bool, default False
            Also show what `submit_batch` would save.

        Returns
        -------
        Estimate
            ``rows``, ``skipped``, ``requests`` (distinct, still to ask), ``from_checkpoint``, ``prompt_tokens``,
            ``completion_tokens`` and ``cost_usd`` (None where unknown), and what each was taken from.

        Raises
        ------
        ConfigurationError, TemplateError, SchemaError, CheckpointError
            As `complete` would, before any request.

        Examples
        --------
        >>> made = df.llm.estimate("Translate to French: {text}", model="gpt-4o-mini", max_tokens=50)
        >>> made.requests, made.prompt_tokens, made.completion_tokens, round(made.cost_usd, 6)
        (2, 26, 100, 6.4e-05)
        """
        if keywords.get("api") == "embeddings":
            given = {name: value for name, value in keywords.items() if name != "api"}
            return estimate(*self._embedding(prompt, given), sample=sample, batch=batch)
        return estimate(*self._call(prompt, keywords), sample=sample, batch=batch)

    @method_takes_options(call_options)
    def submit_batch(
        self,
        prompt: Prompt,
        *,
        job: str | os.PathLike[str],
        keep_files: bool = False,
        poll_s: float = POLL_S,
        **keywords: Any,
    ) -> BatchJob:
        """Give the call of `complete` to the provider's Batch API: half the price, and answers within a day.

        The same prompts, schemas, keys and columns. Rows that the checkpoint answers are not submitted, and answers
        land in it, so that `complete` with the same arguments finds them, and finishes what the batch left.

        Parameters
        ----------
        prompt, **keywords
            As for `complete`; with ``api="embeddings"`` as for `embed`. Nothing is paced here: ``max_concurrency``,
            ``rpm``, ``tpm``, ``timeout`` and ``max_attempts`` change nothing. ``max_cost`` and ``max_tokens_total``
            hold for the worst case of the whole batch; where that passes them, nothing is sent. Without
            ``checkpoint`` the answers are in ``<job>/answers``.
        job : path
            A directory that keeps the job, so that any process finds it: `BatchJob.open`. The same call with the same
            directory goes on with the job that is there, and submits nothing twice; the frame is that of the last
            call. It holds the prompts until they are answered, and never a key.
        keep_files : bool, default False
            Leave the files at the provider; else they are deleted when their answers are kept.
        poll_s : float, default 10
            Seconds between two looks of `BatchJob.wait` at first.

        Returns
        -------
        BatchJob
            Submitted, as far as the provider takes it at once.

        Raises
        ------
        ConfigurationError, TemplateError, SchemaError, CheckpointError, BudgetExceeded
            Before anything is sent.
        EndpointError
            The endpoint has no Batch API, takes no key, or is away; the job is kept, and the same call goes on.

        Examples
        --------
        >>> job = df.llm.submit_batch("Translate: {text}", model="gpt-4o-mini", job="runs/job")  # doctest: +SKIP
        >>> out = job.wait().frame()  # doctest: +SKIP
        """
        from llmframe.batch import submit_batch  # a tenth of the time that `import llmframe` would take

        if keywords.get("api") == "embeddings":
            given = {name: value for name, value in keywords.items() if name != "api"}
            return submit_batch(*self._embedding(prompt, given), job, keep_files=keep_files, poll_s=poll_s)
        return submit_batch(*self._call(prompt, keywords), job, keep_files=keep_files, poll_s=poll_s)

    def review(
        self,
        output: str = "response",
        prompt: Prompt | None = None,
        *,
        system: str | None = None,
        rows: int = 20,
        seed: int = 0,
    ) -> Review:
        """Look at a sample of answers beside what was sent for them; nothing is sent.

        Parameters
        ----------
        output : str, default "response"
            The response column. Rows that are ``skipped`` or ``pending`` are left out; for the failures alone, take
            them first: ``out[out.response_status == "failed"].llm.review()``.
        prompt : optional
            As it was given to `complete`: each row's messages are shown. Without it, the row's columns.
        system : str, optional
            As it was given to `complete`.
        rows : int, default 20
            How many rows at most.
        seed : int, default 0
            Another one gives other rows.

        Returns
        -------
        Review
            It shows itself: a table with a box to search it in a notebook, lines elsewhere.

        Raises
        ------
        ConfigurationError, TemplateError
            The frame has no such column, or the prompt does not fit it.

        Examples
        --------
        >>> out = pd.DataFrame({"text": ["hello"], "response": ["bonjour"], "response_status": ["ok"]})
        >>> out.llm.review("response", "Translate: {text}")
        <Review: 1 of 1 rows>
        [0] ok: bonjour
            user: Translate: hello
        """
        from llmframe.review import review  # what most calls do without: see `llmframe.__init__`

        if prompt is None and system is not None:
            raise ConfigurationError("system= shows nothing without the prompt; pass both as `complete` had them")
        prompts = None if prompt is None else Prompts(self._frame, prompt, system=system)
        return review(self._frame, output, prompts, rows=rows, seed=seed)

    def _call(self, prompt: Prompt, keywords: dict[str, Any]) -> tuple[Prompts, Options]:
        options = gather(keywords)
        return prompts_of(self._frame, prompt, options), options

    def _embedding(self, text: Prompt, keywords: dict[str, Any]) -> tuple[Prompts, Options]:
        options = gather_embedding(keywords)
        return Texts(self._frame, text, na=options.na), options


@pd.api.extensions.register_series_accessor("llm")
class LLMSeries:
    """A language model over the values of a Series.

    Examples
    --------
    >>> df["text"].llm.complete("Good or bad? {}", schema=["good", "bad"], model="local").cat.categories.tolist()
    ['good', 'bad']
    """

    def __init__(self, series: pd.Series[Any]) -> None:
        if not isinstance(series, pd.Series):
            raise ConfigurationError(
                f"LLMSeries was given what is {kind(series)}; give it a pandas Series, as df['text'] is one"
            )
        self._series = series

    @method_takes_options(call_options)
    def complete(self, prompt: str, **keywords: Any) -> pd.Series[Any]:
        """Ask a model once for each value, and give the answers alone.

        Parameters
        ----------
        prompt : str
            A template in which ``{}`` is the value; the keywords are those of `LLMFrame.complete`.

        Returns
        -------
        Series
            The answers, with the index of this one. The other columns are in ``llmframe.last_run().frame``.

        Examples
        --------
        >>> pd.Series(["A joy."]).llm.complete("Good or bad? {}", schema=["good", "bad"], model="local").notna().all()
        np.True_
        """
        if not isinstance(prompt, str) or "{" not in prompt:
            raise TemplateError(f"the prompt {prompt!r:.60} has no {{}} for the value, as in 'Translate: {{}}'")
        options = gather(keywords)
        for name in ("history", "images"):
            if getattr(options, name) is not None:
                raise ConfigurationError(f"{name}= is a column of a frame; write series.to_frame().llm.complete(...)")
        # The values are a column without a name, which is what {} and {:.2f} name.
        frame = self._series.to_frame("")
        return runner.complete(prompts_of(frame, prompt, options), options).frame()[options.output]

    @method_takes_options(embed_options)
    def embed(self, text: str = "{}", **keywords: Any) -> pd.Series[Any]:
        """Ask a model for the embedding of each value, and give the vectors alone.

        Parameters
        ----------
        text : str, default "{}"
            A template in which ``{}`` is the value; the keywords are those of `LLMFrame.embed`.

        Returns
        -------
        Series
            Arrays of float32, with the index of this one. The other columns are in ``llmframe.last_run().frame``.

        Examples
        --------
        >>> df["text"].llm.embed(model="local").map(len).tolist()
        [576, 576]
        """
        if not isinstance(text, str) or "{" not in text:
            raise TemplateError(f"the text {text!r:.60} has no {{}} for the value, as in 'passage: {{}}'")
        options = gather_embedding(keywords)
        return runner.complete(Texts(self._series.to_frame(""), text, na=options.na), options).frame()[options.output]
