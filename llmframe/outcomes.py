"""What each request of a run gave, in columns: as objects of their own a million completions take half a gigabyte.

A completion goes in by its request's number, and comes out as it was, or with all others as the columns of a frame.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from llmframe.results import PAID, SOURCES, STATUSES, Completion, Source, column_dtype, suffixes, typed
from llmframe.vectors import Embeddings, Matrix

NOT_ASKED = "not asked"
NOT_SELECTED = "not selected"

_PENDING, _SKIPPED = STATUSES.index("pending"), STATUSES.index("skipped")
_DUPLICATE = SOURCES.index("duplicate")
_STATUS_CODES = {status: code for code, status in enumerate(STATUSES)}
_PAID = [_STATUS_CODES[status] for status in sorted(PAID)]
_SOURCE_CODES: dict[str | None, int] = {None: -1, **{source: code for code, source in enumerate(SOURCES)}}
_NO_COUNT = -(1 << 63)
_COUNTS = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")
_AMOUNTS = ("cost_usd", "latency_s")
_WORDS = ("error", "finish_reason", "model")
_OBJECTS = ("text", "parsed", "request_id", "tool_calls", "reasoning")


class Outcomes:
    """The outcome of each request, by number; ``pending`` until it has one.

    One thread puts; others may look at the same time.

    Parameters
    ----------
    count : int
        How many requests there are.
    """

    def __init__(self, count: int) -> None:
        # One more than there are: the last, at -1, is what a row has that sends no request.
        self._statuses = array("b", [_PENDING]) * count + array("b", [_SKIPPED])
        self._sources = array("b", [-1]) * (count + 1)
        self._counts = {name: array("q", [_NO_COUNT]) * (count + 1) for name in _COUNTS}
        self._attempts = array("q", [0]) * (count + 1)
        self._amounts = {name: array("d", [math.nan]) * (count + 1) for name in _AMOUNTS}
        self._words = {name: _Words(count + 1) for name in _WORDS}
        self._objects: dict[str, list[Any]] = {}  # each made when there is something to hold
        self._vectors: Matrix | None = None  # the same

    def __len__(self) -> int:
        return len(self._statuses) - 1

    def put(self, number: int, completion: Completion) -> None:
        """Take the outcome of a request."""
        for name, counts in self._counts.items():
            count = getattr(completion, name)
            counts[number] = _NO_COUNT if count is None else count
        self._attempts[number] = completion.attempts
        for name, amounts in self._amounts.items():
            amount = getattr(completion, name)
            amounts[number] = math.nan if amount is None else amount
        for name, words in self._words.items():
            words.put(number, getattr(completion, name))
        for name in _OBJECTS:
            value = getattr(completion, name)
            if value is not None or name in self._objects:
                if name not in self._objects:
                    self._objects[name] = [None] * len(self._statuses)
                self._objects[name][number] = value
        self._sources[number] = _SOURCE_CODES[completion.source]
        self._statuses[number] = _STATUS_CODES[completion.status]  # last: from now on it is there

    def put_embeddings(self, numbers: npt.NDArray[np.intp], found: Embeddings, source: Source) -> None:
        """Take the vectors of some requests, all of one length; see `dimensions`."""
        if self._vectors is None:  # the memory is taken as its rows are written
            self._vectors = np.empty((len(self), found.vectors.shape[1]), np.float32)
        self._vectors[numbers] = found.vectors
        tokens = np.where(found.prompt_tokens < 0, _NO_COUNT, found.prompt_tokens)
        np.frombuffer(self._counts["prompt_tokens"], np.int64)[numbers] = tokens
        np.frombuffer(self._attempts, np.int64)[numbers] = found.attempts
        np.frombuffer(self._amounts["cost_usd"], np.float64)[numbers] = found.cost_usd
        np.frombuffer(self._amounts["latency_s"], np.float64)[numbers] = found.latency_s
        request_ids = self._objects.setdefault("request_id", [None] * len(self._statuses))
        self._words["model"].put_all(numbers, found.models)
        for number, request_id in zip(numbers.tolist(), found.request_ids, strict=True):
            request_ids[number] = request_id
        np.frombuffer(self._sources, np.int8)[numbers] = _SOURCE_CODES[source]
        np.frombuffer(self._statuses, np.int8)[numbers] = _STATUS_CODES["ok"]  # last, as in `put`

    @property
    def dimensions(self) -> int | None:
        """The length of the vectors; None while there are none."""
        return None if self._vectors is None else self._vectors.shape[1]

    def __getitem__(self, number: int) -> Completion:
        values: dict[str, Any] = {"status": STATUSES[self._statuses[number]], "attempts": self._attempts[number]}
        if values["status"] == "pending":
            return Completion(status="pending", error=self._words["error"][number] or NOT_ASKED)
        for name, counts in self._counts.items():
            values[name] = None if counts[number] == _NO_COUNT else counts[number]
        for name, amounts in self._amounts.items():
            values[name] = None if math.isnan(amounts[number]) else amounts[number]
        for name, words in self._words.items():
            values[name] = words[number]
        for name, objects in self._objects.items():
            values[name] = objects[number]
        source = self._sources[number]
        values["source"] = None if source < 0 else SOURCES[source]
        return Completion(**values)

    def pending(self) -> npt.NDArray[np.intp]:
        """Give the numbers of the requests without an outcome."""
        return np.flatnonzero(np.frombuffer(self._statuses, np.int8)[:-1] == _PENDING)

    def paid(self) -> npt.NDArray[np.intp]:
        """Give the numbers of the requests whose answer was paid for, now or once."""
        return np.flatnonzero(np.isin(np.frombuffer(self._statuses, np.int8)[:-1], _PAID))

    def statuses(self, request_of: npt.NDArray[np.intp]) -> npt.NDArray[np.int8]:
        """Give each row's status, as its place in `STATUSES`."""
        return np.frombuffer(self._statuses, np.int8)[request_of]

    def latencies_s(self) -> npt.NDArray[np.float64]:
        """Give the seconds of each answer that this run itself was given."""
        asked = np.frombuffer(self._sources, np.int8) == _SOURCE_CODES["request"]
        latencies: npt.NDArray[np.float64] = np.frombuffer(self._amounts["latency_s"], np.float64)[asked]
        return latencies[~np.isnan(latencies)]

    def sources(self, request_of: npt.NDArray[np.intp], first: npt.NDArray[np.intp]) -> dict[Source, int]:
        """Count the rows by where their answers came from."""
        codes = self._sources_of(request_of, _twins(request_of, first))
        counts = np.bincount(codes[codes >= 0], minlength=len(SOURCES)).tolist()
        return dict(zip(SOURCES, counts, strict=True))

    def columns(
        self,
        request_of: npt.NDArray[np.intp],
        first: npt.NDArray[np.intp],
        skipped: Mapping[int, str],
        *,
        details: bool,
        answer: Literal["text", "parsed", "embedding"] = "text",
    ) -> dict[str, Any]:
        """Give the columns that a call writes, each but the answer an array of its type.

        Parameters
        ----------
        request_of : array of int
            Each row's request by number; -1 for a row that sends none.
        first : array of int
            Each request's first row: the others that send it are its twins, and cost nothing more.
        skipped : mapping of int to str
            Why a row sends none, by position, where it is one of those that were selected.
        details : bool
            Whether the detail columns are wanted.
        answer : {"text", "parsed", "embedding"}
            What the answer's own column holds, in an array of objects.

        Returns
        -------
        dict
            By suffix, the answer's own being empty.
        """
        embedding = answer == "embedding"
        answers = self._vector_cells() if embedding else self.cells(answer)
        made: dict[str, Any] = {"": by_row(answers, request_of, first)}
        twins = _twins(request_of, first)
        codes = self.statuses(request_of)
        for suffix in suffixes(details, embedding):
            name, dtype = suffix[1:], column_dtype(suffix, None)
            if name in self._counts or name == "attempts":
                made[suffix] = self._counts_of(name, request_of, twins)
            elif name in self._amounts:
                made[suffix] = self._amounts_of(name, request_of, twins)
            elif name == "status":
                made[suffix] = pd.Categorical.from_codes(codes, dtype=dtype)
            elif name == "source":
                made[suffix] = pd.Categorical.from_codes(self._sources_of(request_of, twins), dtype=dtype)
            else:
                cells = self.cells(name)[request_of]
                if name == "error":
                    cells[(codes == _PENDING) & np.equal(cells, np.array(None, object)).astype(bool)] = NOT_ASKED
                    cells[codes == _SKIPPED] = NOT_SELECTED
                    for position, reason in skipped.items():
                        cells[position] = reason
                made[suffix] = typed(cells, dtype)
        return made

    def cells(self, name: str) -> npt.NDArray[np.object_]:
        """Give a text or object of every request by number, and last of all that of a row that sends none: None."""
        if name in self._words:
            return self._words[name].cells()
        values = self._objects.get(name)
        count = len(self._statuses)
        return np.full(count, None, object) if values is None else np.fromiter(values, object, count)

    def _vector_cells(self) -> npt.NDArray[np.object_]:
        """Give the vector of every request by number, a view of one matrix; None where there is none."""
        cells = np.full(len(self._statuses), None, object)
        if self._vectors is not None:
            for number in np.flatnonzero(np.frombuffer(self._statuses, np.int8)[:-1] == _STATUS_CODES["ok"]).tolist():
                cells[number] = self._vectors[number]
        return cells

    def _sources_of(self, request_of: npt.NDArray[np.intp], twins: npt.NDArray[np.bool_]) -> npt.NDArray[np.int8]:
        codes = np.frombuffer(self._sources, np.int8)[request_of]
        codes[twins & (codes >= 0)] = _DUPLICATE
        return codes

    def _counts_of(self, name: str, request_of: npt.NDArray[np.intp], twins: npt.NDArray[np.bool_]) -> Any:
        values = np.frombuffer(self._attempts if name == "attempts" else self._counts[name], np.int64)[request_of]
        if name == "attempts":
            values[twins] = 0
        else:
            values[self._free(request_of, twins)] = 0
        missing = values == _NO_COUNT
        values[missing] = 0
        return pd.arrays.IntegerArray(values, missing)

    def _amounts_of(self, name: str, request_of: npt.NDArray[np.intp], twins: npt.NDArray[np.bool_]) -> Any:
        values = np.frombuffer(self._amounts[name], np.float64)[request_of]
        missing = np.isnan(values)
        if name == "cost_usd":
            values[self._free(request_of, twins)] = 0.0
        values[missing] = 0.0
        return pd.arrays.FloatingArray(values, missing)

    def _free(self, request_of: npt.NDArray[np.intp], twins: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Tell the rows whose answer another row has paid for."""
        return twins & (np.frombuffer(self._sources, np.int8)[request_of] >= 0)


def by_row(
    cells: npt.NDArray[np.object_], request_of: npt.NDArray[np.intp], first: npt.NDArray[np.intp]
) -> npt.NDArray[np.object_]:
    """Give each row the cell of its request, and each twin a list or dict of its own: a change in one is in no other.

    The vectors of embeddings stay views of their matrix.
    """
    made = cells[request_of]
    for position in np.flatnonzero(_twins(request_of, first)).tolist():
        made[position] = _copied(made[position])
    return made


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return {name: _copied(item) for name, item in value.items()} if isinstance(value, dict) else value


def _twins(request_of: npt.NDArray[np.intp], first: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
    """Tell the rows that send what a row before them sends."""
    twins = request_of >= 0
    twins[twins] = first[request_of[twins]] != np.flatnonzero(twins)
    return twins


class _Words:
    """A column of texts that repeat, or are mostly missing: each text once, and a code a request."""

    def __init__(self, count: int) -> None:
        self._codes = array("i", [-1]) * count
        self._texts: list[str] = []
        self._code_of: dict[str | None, int] = {None: -1}

    def put(self, number: int, text: str | None) -> None:
        code = self._code_of.get(text)
        if code is None:
            code = len(self._texts)
            self._texts.append(text or "")
            self._code_of[text] = code
        self._codes[number] = code

    def put_all(self, numbers: npt.NDArray[np.intp], texts: Sequence[str | None]) -> None:
        if len(set(texts)) > 1:
            for number, text in zip(numbers.tolist(), texts, strict=True):
                self.put(number, text)
        elif texts:
            self.put(int(numbers[0]), texts[0])
            np.frombuffer(self._codes, np.int32)[numbers] = self._codes[int(numbers[0])]

    def __getitem__(self, number: int) -> str | None:
        code = self._codes[number]
        return None if code < 0 else self._texts[code]

    def cells(self) -> npt.NDArray[np.object_]:
        codes = np.frombuffer(self._codes, np.int32).copy()  # before the texts: a code is put after its text
        return np.array([*self._texts, None], object)[codes]
