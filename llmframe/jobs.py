"""Jobs: parquet in, parquet out, by the same call, in memory that does not grow with the file.

The source is read a part at a time, and two parts are under way at once, so that the endpoint never waits for the
disk. The sink has its name when it is whole, and never before; whatever stopped a job, the same job goes on.
"""

from __future__ import annotations

import functools
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from llmframe.batch import BatchJob, submit_batch
from llmframe.errors import ConfigurationError
from llmframe.estimate import Estimate, estimate
from llmframe.job_work import JobResult, Paths, Work
from llmframe.messages import kind
from llmframe.options import POLL_S, Options, gather, shows_options
from llmframe.planning import prompts_of
from llmframe.progress import Bar
from llmframe.prompts import Prompt
from llmframe.sources import Source, frame_of

ESTIMATE_ROWS = 262_144  # of a part that is only counted
CHECKPOINT = ".checkpoint"  # is added to the sink's name
BATCH = ".batch"  # the same, for the directory of a Batch job

__all__ = ["JobResult", "batch_beside", "estimate_job", "job_options", "run", "submit_source"]


@shows_options
def run(
    source: str | os.PathLike[str],
    sink: str | os.PathLike[str],
    prompt: Prompt,
    *,
    where: str | Sequence[str] | None = None,
    limit: int | None = None,
    partial: bool = False,
    clean: bool = False,
    **keywords: Any,
) -> JobResult:
    """Ask a model once for each row of a file, and write a parquet file with the answers as new columns.

    Parameters
    ----------
    source : path
        A parquet, csv or jsonl file, a directory of them or a glob; a path or an fsspec URL (``s3://bucket/rows/``).
        Csv and jsonl files may be compressed, as ``.csv.gz`` or ``.csv.bz2``.
    sink : path
        Where the rows go, in the same order and row groups, with the source's columns as they were and the new ones
        after them: one file where it is named ``.parquet``, else a directory with a file for each of the source's.
        A file has its name when it is whole, and never before.
    prompt, **keywords
        As `LLMFrame.complete` takes them, those about a frame at hand aside. ``checkpoint`` is the sink's name with
        ``.checkpoint`` unless it is given: the same job again asks only what is not there.
    where : str or list of str, optional
        Only rows for which all these hold: a column, one of ``== != < <= > >=``, and a value each, as in
        ``"human_score > 1"``. The other rows are not in the sink.
    limit : int, optional
        Rows from the first; all of them without it.
    partial : bool, default False
        Where the job is stopped, write what there is all the same: rows that were not reached are ``pending``.
    clean : bool, default False
        Delete the checkpoint when the sink is whole and every row has its answer. With ``where=`` or ``limit=`` it is
        kept, since other rows may have theirs in it.

    Returns
    -------
    JobResult
        What came of it. Columns of lists and dicts are JSON text in the sink, so that every part has one type.

    Raises
    ------
    ConfigurationError, TemplateError, SchemaError, CheckpointError
        Before any request.
    EndpointError, BudgetExceeded, Interrupted
        While it runs; the same call goes on, but with ``refresh=True`` it asks every row again. So it is after an
        `LLMFrameError` that is none of these: the source cannot be read any more, or the sink be written.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as place:
    ...     source, sink = pathlib.Path(place, "in.parquet"), pathlib.Path(place, "out.parquet")
    ...     df.to_parquet(source)
    ...     job = llmframe.run(source, sink, "Translate to French: {text}", model="local", max_tokens=8)
    ...     pd.read_parquet(sink).columns.tolist()[:3]
    ['text', 'response', 'response_status']
    >>> job.rows
    2
    """
    for name, path in (("source", source), ("sink", sink)):
        if not isinstance(path, str | os.PathLike):
            raise ConfigurationError(
                f"{name} is {kind(path)}; it has to be a path or an fsspec URL (for a frame there is df.llm.complete)"
            )
    paths = Paths(os.fspath(source), os.fspath(sink), (where,) if isinstance(where, str) else tuple(where or ()), limit)
    work = Work(paths, prompt, job_options(sink, keywords))
    bar = Bar(work.total, work.options.progress)
    return work.run(bar.draw, bar.close, partial=partial, clean=clean)


def estimate_job(paths: Paths, prompt: Prompt, options: Options) -> Estimate:
    """Say what a job would ask and cost; a request that two parts of a large source have is counted in both.

    Raises
    ------
    ConfigurationError, TemplateError, SchemaError, CheckpointError
        See `run`.
    """
    parts = Source(paths.source, paths.where, paths.limit).pieces(ESTIMATE_ROWS)
    estimates = [estimate(prompts_of(frame_of(piece.table), prompt, options), options) for piece in parts]
    return functools.reduce(operator.add, estimates)


def job_options(sink: str | os.PathLike[str], keywords: Mapping[str, Any]) -> Options:
    """Gather the keywords of a job, and refuse those that it cannot keep.

    Raises
    ------
    ConfigurationError
        See `run`.
    """
    if keywords.get("history") is not None:
        raise ConfigurationError("history= is about a frame at hand, and a job reads its rows part by part")
    options = gather(keywords)
    if not options.dedupe or options.on_error == "raise":
        raise ConfigurationError(
            "dedupe=False and on_error='raise' are not for a job, which knows a part of its rows at a time; use "
            "df.llm.complete, or leave them out"
        )
    beside = f"{os.fspath(sink).rstrip('/')}{CHECKPOINT}"
    return options if options.checkpoint is not None else replace(options, checkpoint=beside)


def submit_source(
    paths: Paths, prompt: Prompt, options: Options, job: str, *, keep_files: bool = False, poll_s: float = POLL_S
) -> BatchJob:
    """Give the rows of a source to the Batch API; they are held in memory.

    Raises
    ------
    ConfigurationError, TemplateError, SchemaError, CheckpointError, BudgetExceeded, EndpointError
        See `LLMFrame.submit_batch`.
    """
    tables = [piece.table for piece in Source(paths.source, paths.where, paths.limit).pieces(ESTIMATE_ROWS)]
    try:
        table = pa.concat_tables(tables, promote_options="default")
    except pa.ArrowException as error:
        raise ConfigurationError(
            f"the files of {paths.source} have not all the same types, and a batch is made of all of them ({error}); "
            "give it one file at a time"
        ) from error
    prompts = prompts_of(frame_of(table), prompt, options)
    return submit_batch(prompts, options, job, keep_files=keep_files, poll_s=poll_s)


def batch_beside(sink: str) -> str:
    """Give the directory of the Batch job that goes before a job to this sink."""
    return f"{sink.rstrip('/')}{BATCH}"
