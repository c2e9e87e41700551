"""How long an attempt may take: learned from the answers, unless the user says.

Pure. A timed-out attempt may have been billed, so the limit errs on the side of waiting; and whether an attempt that is
overdue is lost, or only slow, is tried with one row before the others are asked again.
"""

from __future__ import annotations

UNKNOWN_S = 600.0  # the SDK's own timeout, until a first answer shows how long one takes
FLOOR_S = 5.0  # no answer is given up before it, however fast the others were
MARGIN = 4.0  # times the slowest answer seen
DOUBT_S = 60.0  # beyond the limit, for want of proof: an endpoint that holds requests back still answers
MOST_TRIALS = 64
STARVING, STARVING_S = 4.0, 0.5  # usual latencies, and seconds at least, after which an attempt may lack a connection


class Timeout:
    """The seconds an attempt may take, and which attempts to give up for having taken longer.

    A request that was lost is answered at once when it is sent anew; a row that is slow is slow again, and the answer
    to another of its kind comes meanwhile. So one overdue row is given up and sent anew, on trial. With each trial that
    is answered in time twice as many may be on trial; with the first answer that comes late, one again.

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
    >>> timeout.gives_up(9.0, failures=0, trials=0, silent=False)
    True
    >>> timeout.gives_up(9.0, failures=0, trials=1, silent=False)
    False
    """

    def __init__(self, fixed_s: float | None = None) -> None:
        self._fixed_s = fixed_s
        self._slowest_s: float | None = None
        self._trials = 1

    def answered(self, latency_s: float, failures: int = 0) -> None:
        """Learn from an answer to a row that had timed out so many times before."""
        if self._slowest_s is None:
            self._slowest_s = latency_s
            return
        if latency_s > self.seconds(0):
            self._trials = 1
        elif failures:
            self._trials = min(2 * self._trials, MOST_TRIALS)
        if latency_s > self._slowest_s:
            self._slowest_s = latency_s

    def seconds(self, failures: int) -> float:
        """Give the limit for a row that timed out `failures` times already."""
        if self._fixed_s is not None:
            return self._fixed_s
        if self._slowest_s is None:
            return UNKNOWN_S
        return max(FLOOR_S, MARGIN * self._slowest_s) * 2.0 ** min(failures, 10)

    def gives_up(self, waited_s: float, *, failures: int, trials: int, silent: bool) -> bool:
        """Say whether to give an attempt up.

        Parameters
        ----------
        waited_s : float
            Since it was sent.
        failures : int
            How many times its row has timed out already.
        trials : int
            Rows on trial that may still be answered in time.
        silent : bool
            No row has been answered for a while: what is in flight is not lost one by one.
        """
        limit_s = self.seconds(failures)
        if waited_s <= limit_s:
            return False
        if self._fixed_s is not None or waited_s > limit_s + DOUBT_S:
            return True
        proven = self._trials > 1
        return trials < (1 if silent else self._trials) and (proven or not failures)


def may_starve(waited_s: float, usual_s: float, times: int = 0) -> bool:
    """Say whether an attempt may wait for the server to take its connection, once more than so many times.

    Some servers take so many connections at once and work on each until it is closed (llama.cpp's: a thread for each,
    http.server's: one). Those beyond wait unseen, and as long as the others are used again they wait for ever.

    Examples
    --------
    >>> may_starve(3.0, usual_s=1.0), may_starve(5.0, usual_s=1.0), may_starve(5.0, usual_s=1.0, times=1)
    (False, True, False)
    """
    return waited_s > max(STARVING_S, STARVING * usual_s) * 2.0**times
