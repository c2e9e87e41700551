"""How long an attempt may take: learned from the answers, unless the user says.

Pure. A timed-out attempt may have been billed, so the limit errs on the side of waiting.
"""

from __future__ import annotations

UNKNOWN_S = 600.0  # the SDK's own timeout, until a first answer shows how long one takes
FLOOR_S = 5.0  # no answer is given up before it, however fast the others were
MARGIN = 4.0  # times the slowest answer seen


class Timeout:
    """The seconds an attempt may take.

    Parameters
    ----------
    fixed_s : float, optional
        The user's own limit for every attempt.

    Examples
    --------
    >>> timeout = Timeout()
    >>> timeout.seconds(failures=0)
    600.0
    >>> timeout.answered(latency_s=2.0)
    >>> timeout.seconds(failures=0), timeout.seconds(failures=1)
    (8.0, 16.0)
    """

    def __init__(self, fixed_s: float | None = None) -> None:
        self._fixed_s = fixed_s
        self._slowest_s: float | None = None

    def answered(self, latency_s: float) -> None:
        """Learn from an answer."""
        if self._slowest_s is None or latency_s > self._slowest_s:
            self._slowest_s = latency_s

    def seconds(self, failures: int) -> float:
        """Give the limit for a row that timed out `failures` times already."""
        if self._fixed_s is not None:
            return self._fixed_s
        if self._slowest_s is None:
            return UNKNOWN_S
        return max(FLOOR_S, MARGIN * self._slowest_s) * 2.0 ** min(failures, 10)
