"""Vectors: what a reply of the embeddings API holds, as one matrix, and how alike two columns of them are.

Pure. A reply is read whole or not at all: a vector short, of another length or with a number that is none, and there
is no saying which of the texts the others are of.
"""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from llmframe.errors import ConfigurationError
from llmframe.messages import kind

Matrix = npt.NDArray[np.float32]

CHUNK = 4096  # rows compared at a time: a copy of all would double the memory


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """The vectors of some requests, a row each, and what they cost.

    Attributes
    ----------
    vectors : array of float32
        One row each.
    prompt_tokens : array of int
        -1 where the endpoint did not say.
    cost_usd : array of float
        NaN where no price is known.
    latency_s : array of float
        Seconds of the attempt that answered.
    attempts : array of int
        Requests sent for them.
    models, request_ids : list of str or None
        As the endpoint named them.
    """

    vectors: Matrix
    prompt_tokens: npt.NDArray[np.int64]
    cost_usd: npt.NDArray[np.float64]
    latency_s: npt.NDArray[np.float64]
    attempts: npt.NDArray[np.int64]
    models: Sequence[str | None]
    request_ids: Sequence[str | None]

    def __len__(self) -> int:
        return len(self.vectors)

    def taken(self, places: npt.NDArray[np.intp]) -> Embeddings:
        """Give those at some places."""
        return Embeddings(
            self.vectors[places],
            self.prompt_tokens[places],
            self.cost_usd[places],
            self.latency_s[places],
            self.attempts[places],
            [self.models[place] for place in places],
            [self.request_ids[place] for place in places],
        )


def read_vectors(payload: Any, count: int) -> Matrix | None:
    """Read the vectors of a reply, in the order of its inputs; None where they are not `count` sound ones.

    All are base64 of little-endian float32, or all are lists of numbers.

    Examples
    --------
    >>> read_vectors({"data": [{"index": 1, "embedding": [0, 1]}, {"index": 0, "embedding": [1, 0]}]}, 2).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    >>> read_vectors({"data": [{"index": 0, "embedding": "AACAPwAAAAA="}]}, 1).tolist()
    [[1.0, 0.0]]
    """
    data = payload.get("data") if isinstance(payload, dict) else None
    if not isinstance(data, list) or len(data) != count or count == 0:
        return None
    places = list(range(count))
    try:
        given = [one["embedding"] for one in data]
        with np.errstate(over="ignore"):  # beyond a float32 it is infinite, and so is no number
            matrix = _decoded(given) if isinstance(given[0], str) else np.array(given, np.float32)
        told = [one.get("index", place) for place, one in enumerate(data)]
        if matrix.ndim != 2 or not matrix.shape[1] or not np.isfinite(matrix).all():
            return None
        if told != places:
            if sorted(told) != places:
                return None
            matrix = matrix[np.argsort(told)]
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):  # binascii.Error is a ValueError
        return None
    return matrix


def _decoded(given: list[Any]) -> Matrix:
    pieces = list(map(binascii.a2b_base64, given))
    if len(set(map(len, pieces))) != 1:
        raise ValueError("vectors of several lengths")
    return np.frombuffer(b"".join(pieces), "<f4").reshape(len(pieces), -1)


def shared_out(total: int, weights: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Share a count out by weight, in whole numbers whose sum is exact.

    Examples
    --------
    >>> shared_out(10, np.array([1, 1, 1])).tolist()
    [3, 4, 3]
    """
    course = np.cumsum(weights, dtype=np.float64)
    if course[-1] <= 0:
        course = np.arange(1.0, len(weights) + 1)
    ends = np.rint(total * (course / course[-1])).astype(np.int64)
    ends[-1] = total
    shares: npt.NDArray[np.int64] = np.diff(ends, prepend=0)
    return shares


def similarity(a: pd.Series[Any], b: Any) -> pd.Series[Any]:
    """Say how alike the embeddings of two columns are, row by row: the cosine of the angle between them.

    Parameters
    ----------
    a : Series
        Embeddings, as `LLMFrame.embed` gives them.
    b : Series, or one embedding
        Of the same rows; or one vector, which each row is compared with.

    Returns
    -------
    Series
        Float64 from -1 to 1 (1 is the same direction), with the index of `a`; missing where one of the two is.

    Raises
    ------
    ConfigurationError
        The two are not of the same rows or dimensions, or hold what are no vectors.

    Examples
    --------
    >>> one, other = np.array([1, 0], "float32"), np.array([1, 1], "float32")
    >>> llmframe.similarity(pd.Series([one, one, None]), pd.Series([one, other, one])).round(3).tolist()
    [1.0, 0.707, <NA>]

    The rows nearest to one: ``df.assign(like=llmframe.similarity(df["e"], df["e"].iloc[0])).nlargest(5, "like")``.
    """
    if not isinstance(a, pd.Series):
        raise ConfigurationError(
            f"the embeddings to compare are {kind(a)}; pass a column, as in similarity(df['a'], b)"
        )
    theirs: Sequence[Any]
    if isinstance(b, pd.Series):
        if len(a) != len(b) or not a.index.equals(b.index):
            raise ConfigurationError("the two columns have different indexes; take them from one frame")
        theirs = b.tolist()
    else:
        theirs = [_vector(b)] * len(a)
    ours = a.tolist()
    values, missing = np.zeros(len(ours)), np.ones(len(ours), bool)
    for start in range(0, len(ours), CHUNK):
        both = [
            place
            for place in range(start, min(start + CHUNK, len(ours)))
            if _is_there(ours[place]) and _is_there(theirs[place])
        ]
        if not both:
            continue
        try:
            one, other = np.stack([ours[place] for place in both]), np.stack([theirs[place] for place in both])
            if one.shape != other.shape:
                raise ValueError(f"{one.shape[-1]} numbers and {other.shape[-1]}")
            dots = np.einsum("ij,ij->i", one, other, dtype=np.float64)
            norms = np.sqrt(
                np.einsum("ij,ij->i", one, one, dtype=np.float64)
                * np.einsum("ij,ij->i", other, other, dtype=np.float64)
            )
        except (ValueError, TypeError) as error:
            raise ConfigurationError(
                f"the embeddings cannot be compared: {error}; both columns have to be of one model and its dimensions"
            ) from error
        values[both] = np.clip(np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0), -1.0, 1.0)
        missing[both] = norms == 0  # no direction
    return pd.Series(pd.arrays.FloatingArray(values, missing), index=a.index, name="similarity")


def _vector(value: Any) -> Matrix:
    """Read the one embedding that all are compared with."""
    try:
        vector = np.asarray(value if isinstance(value, np.ndarray | list | tuple) else (), np.float32)
    except (ValueError, TypeError):  # of several lengths, or of what are no numbers
        vector = np.empty(0, np.float32)
    if vector.ndim != 1 or not len(vector):
        raise ConfigurationError(f"what to compare with is {kind(value)}; pass a column of embeddings, or one of them")
    return vector


def _is_there(value: Any) -> bool:
    if isinstance(value, np.ndarray | list | tuple):
        return True
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return False
    raise ConfigurationError(f"a cell to compare is {kind(value)}; both columns have to hold embeddings")
