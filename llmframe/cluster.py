"""A job on a Dask cluster: this process reads, plans and writes, and the workers ask.

All that holds of a job holds here, since all but the asking is the same: the order of the rows, the sink that has its
name when it is whole, one checkpoint, which the workers have to reach too.
"""

from __future__ import annotations

import functools
import os
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from llmframe import loops
from llmframe.dask import Answers, PartitionCall
from llmframe.errors import ConfigurationError
from llmframe.job_work import Paths, Work
from llmframe.options import Options
from llmframe.planning import rows_of
from llmframe.prepared import Prepared
from llmframe.prompts import Prompt

PART_ROWS = 4_096  # of a part: a worker that is lost has so few to look up again, and the end is even
AHEAD = 2  # parts for each worker process: while one has its last answers to come, it asks the next
CONNECT_S = 10.0  # until a scheduler that does not answer is not there

__all__ = ["ClusterWork"]


class ClusterWork(Work):
    """One job, whose requests are asked by the workers of a cluster.

    Parameters
    ----------
    paths, prompt, options
        The job's.
    scheduler : str
        Where the cluster is, as in ``tcp://scheduler:8786``.

    Raises
    ------
    ConfigurationError, TemplateError, SchemaError, CheckpointError
        The job cannot be done as it was written, or there is no such cluster.
    """

    def __init__(self, paths: Paths, prompt: Prompt, options: Options, scheduler: str) -> None:
        super().__init__(paths, prompt, _for_all(options))
        self._client = _connected(scheduler)
        empty = self._prompts(self._source.schemas[0].empty_table()).frame
        self._far = PartitionCall(prompt, self.options, empty)

    @property
    def _part_rows(self) -> int:
        return PART_ROWS

    @property
    def _under_way(self) -> int:
        return AHEAD * max(1, len(self._client.scheduler_info(n_workers=-1)["workers"]))

    async def _ask(self, prepared: Prepared, numbers: npt.NDArray[np.intp]) -> None:
        """Send a part's requests to a worker, and take what comes back."""
        state = prepared.state
        rows = state.source.iloc[state.plan.first[numbers]]
        future = self._client.submit(self._far.completions, rows, pure=False, key=f"llm-complete-{os.urandom(8).hex()}")
        try:
            answers: Answers = await loops.in_thread(functools.partial(future.result))
        except BaseException:
            future.cancel()
            raise
        shared = rows_of(state.plan)
        for number, completion in zip(numbers.tolist(), answers.completions, strict=True):
            state.outcomes.put(number, completion)
        state.rows_done += int(shared[numbers].sum())
        state.usage += answers.usage
        if answers.cost_usd is not None:
            state.cost_usd = (state.cost_usd or 0.0) + answers.cost_usd
        state.tally.sent += answers.sent
        state.tally.failures.update(answers.failures)


def _for_all(options: Options) -> Options:
    """Let the checkpoint's place be the same for every process on a machine, whatever directory it runs in."""
    where = os.fspath(options.checkpoint or "")
    return options if "://" in where else replace(options, checkpoint=os.path.abspath(os.path.expanduser(where)))


def _connected(scheduler: str) -> Any:
    try:
        from distributed import Client
    except ImportError as error:
        raise ConfigurationError("--dask needs Dask: pip install 'llmframe-pandas[dask]'") from error
    try:
        return Client(scheduler, timeout=CONNECT_S, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"there is no Dask scheduler at {scheduler}: {error}") from error
