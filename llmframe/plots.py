"""Plots: a run's course and its latencies, drawn by matplotlib, which is an extra.

Grey on nothing: the same picture is read on a light page and on a dark one.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from llmframe.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#808080"  # has the same contrast to white and to black
RATE, WINDOW, MARK = "#3b82c4", "#d9822b", "#c23030"
SIZE_IN = (9.0, 2.9)
NAMED = 12  # decisions told in words; more of them would cover the curve
LABELS = 50  # of them side by side are as wide as the picture
BINS = 40
SPANS, EACH = 60, 4  # of the course at most, and the answers that each has on average at least
FEW = 5  # moments; a line through one of them cannot be seen


def draw(course: pd.DataFrame, latencies_s: npt.NDArray[np.float64], axes: Any = None) -> npt.NDArray[np.object_]:
    """Draw the answers a second and the requests in flight over time, and a histogram of the latencies.

    Parameters
    ----------
    course : DataFrame
        A `Moment` a row.
    latencies_s : array of float
        Of each answer, in seconds.
    axes : sequence of two Axes, optional
        Where to draw; a new figure without it.

    Returns
    -------
    array of Axes
        The course, and the histogram.

    Raises
    ------
    ConfigurationError
        matplotlib is not there.
    """
    if axes is None:
        axes = _figure().subplots(1, 2, width_ratios=(2.2, 1))
    _draw_course(axes[0], course)
    _draw_latencies(axes[1], latencies_s)
    made = np.empty(2, object)
    made[:] = axes[0], axes[1]
    return made


def svg(course: pd.DataFrame, latencies_s: npt.NDArray[np.float64]) -> str | None:
    """Give the same picture as SVG for an HTML page; None where matplotlib is not there."""
    try:
        import matplotlib as mpl
    except ImportError:
        return None
    drawn, _ = draw(course, latencies_s)
    file = io.StringIO()
    # Text as text: a tenth of the size, and it can be found on the page. No date: the same run is the same page.
    with mpl.rc_context({"svg.fonttype": "none"}):
        drawn.figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def _figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(
            "a plot needs matplotlib, which is not installed: pip install 'llmframe-pandas[plot]'"
        ) from error
    return Figure(figsize=SIZE_IN, layout="constrained")


def _draw_course(axes: Axes, course: pd.DataFrame) -> None:
    times = course["time_s"].to_numpy()
    mark = "." if len(times) < FEW else ""
    axes.plot(*_rates(times, course["rate"].to_numpy(dtype=float)), color=RATE, marker=mark, label="answers/s")
    allowed = course["allowed"].to_numpy(dtype=float)
    known = np.where(np.isfinite(allowed), allowed, np.nan)
    axes.plot(times, known, color=MARK, linestyle="--", linewidth=1, drawstyle="steps-post", label="limit")
    axes.set_ylabel("answers/s (dashed: the limit)" if np.isfinite(known).any() else "answers/s", color=RATE)
    axes.set_ylim(bottom=0)
    flight = axes.twinx()
    flight.plot(times, course["window"], color=WINDOW, alpha=0.5, linestyle=":")
    flight.plot(times, course["in_flight"], color=WINDOW, marker=mark)
    flight.set_ylabel("in flight (dotted: the window)", color=WINDOW)
    flight.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    decided = course[course["decision"] != ""]
    for moment in decided["time_s"]:
        axes.axvline(moment, color=MARK, alpha=0.35, linewidth=0.8)
    for moment, words in _apart(decided[["time_s", "decision"]], times.max(initial=0.0) / LABELS):
        axes.annotate(
            words, (moment, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", fontsize=6, color=MARK
        )
    axes.set_xlabel("seconds")
    _grey(axes)
    _grey(flight)


def _apart(decided: pd.DataFrame, apart_s: float) -> list[tuple[float, str]]:
    """Choose the decisions that are told in words: the first ones, those out whose words would cover another's."""
    chosen: list[tuple[float, str]] = []
    for moment, words in decided.itertuples(index=False):
        if not chosen or moment - chosen[-1][0] >= apart_s:
            chosen.append((moment, words))
    return chosen[:NAMED]


def _rates(times: npt.NDArray[np.float64], rates: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], ...]:
    """Give the answers a second over at most `SPANS` spans of one length; of less than one a second, each is a peak."""
    if len(times) < FEW:
        return times, rates
    answers = np.cumsum(rates * np.diff(times, prepend=0.0))
    spans = min(len(times), SPANS, max(FEW, int(answers[-1] / EACH)))
    edges = np.linspace(0.0, times[-1], spans + 1)
    reached = np.interp(edges, np.append(0.0, times), np.append(0.0, answers))
    return (edges[:-1] + edges[1:]) / 2, np.diff(reached) / np.diff(edges)


def _draw_latencies(axes: Axes, latencies_s: npt.NDArray[np.float64]) -> None:
    if len(latencies_s):
        axes.hist(latencies_s, bins=BINS, color=RATE)
    axes.set_xlabel("latency, seconds")
    axes.set_ylabel("answers")
    _grey(axes)


def _grey(axes: Axes) -> None:
    axes.tick_params(colors=INK, labelsize=7)
    for side, spine in axes.spines.items():
        spine.set_visible(side != "top")
        spine.set_color(INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(8)
        if label.get_color() == "black":
            label.set_color(INK)
