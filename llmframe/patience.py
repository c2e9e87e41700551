"""How long a run waits for an endpoint that is out of reach, down, or refuses everything.

Pure: the time and what happened go in, and the words that end the run come out.
"""

from __future__ import annotations

import time

from llmframe.endpoint import CONNECT_S
from llmframe.failures import Failure

FIRST_PATIENCE_S = 12.0  # nobody is there: most likely the address is wrong, and the user sits waiting
PATIENCE_S = 600.0  # an endpoint that is there comes back: it loads its model, is deployed anew, or restarts
NOT_THERE = frozenset({502, 504})  # statuses that only a proxy gives: a server that loads its model says 503


class Patience:
    """What a run has waited for, and since when.

    Parameters
    ----------
    url : str
        The endpoint, for the words.
    now : float
        When the run began, on the clock that every later call uses.
    """

    def __init__(self, url: str, now: float) -> None:
        self._url = url
        self._began = now
        self._unreached_since: float | None = None
        self._refused_since: float | None = None  # the first 429 with no answer after it
        self._there = False  # a server has refused a request itself
        self._asked_s = 0.0  # the longest wait that was asked for
        self._trouble = "none yet"  # the last failure

    def heard(self) -> None:
        """Note a reply, of whatever kind."""
        self._unreached_since = None

    def accepted(self) -> None:
        """Note that a request met no limit: it was answered, or refused for itself."""
        self._refused_since = None

    def failed(self, failure: Failure, sent: float, asked_s: float | None) -> None:
        """Note an attempt, sent then, that gave no answer, and the seconds that the endpoint asks to wait."""
        self._trouble = failure.message
        self._there |= (failure.http or 0) >= 400 and failure.http not in NOT_THERE
        self._asked_s = max(self._asked_s, asked_s or 0.0)
        if failure.kind == "connection" and self._unreached_since is None:
            self._unreached_since = sent

    def refused(self, failure: Failure, now: float, oldest: float | None) -> str | None:
        """Say why nothing but 429s has come for too long, as from a limit by the day that says no more than that.

        Judged when one comes and not by the clock: where a known limit lets nothing out for long, nobody refuses.

        Parameters
        ----------
        failure : Failure
            The 429.
        now : float
            The time.
        oldest : float or None
            When the oldest request in flight was sent.
        """
        if self._refused_since is None:
            self._refused_since = now
        refused_s = now - self._refused_since
        at_work = oldest is not None and oldest < self._refused_since  # it was let in, and is slow
        if refused_s <= PATIENCE_S or at_work:
            return None
        return (
            f"the endpoint has refused every request for {refused_s:,.0f} s, and llmframe waits no longer than "
            f"{PATIENCE_S:.0f} s: {failure.message}"
        )

    def asked(self, failure: Failure, asked_s: float) -> str | None:
        """Say why a wait that the endpoint asks for is too long."""
        if asked_s <= PATIENCE_S:
            return None
        until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + asked_s))
        return (
            f"the endpoint asks to come back at {until}, in {asked_s:,.0f} s, and llmframe waits no longer than "
            f"{PATIENCE_S:.0f} s: {failure.message}"
        )

    def lost(self, now: float, *, down_since: float | None, oldest: float | None, answered: bool) -> str | None:
        """Say why an endpoint that is out of reach, or down, is given up.

        Parameters
        ----------
        now : float
            The time.
        down_since : float or None
            When an outage began.
        oldest : float or None
            When the oldest request in flight was sent.
        answered : bool
            Whether the endpoint has ever answered.
        """
        since = min((at for at in (self._unreached_since, down_since) if at is not None), default=now)
        lost_s = now - max(since, self._began)  # an outage may be older than this run, which has yet to try
        if oldest is not None and now - oldest > CONNECT_S:
            return None  # no connection takes that long: somebody is there, at work on it
        patience_s = PATIENCE_S if self._there or answered else FIRST_PATIENCE_S
        # What was asked for is waited out, and what is sent then has a moment to be answered.
        if lost_s <= max(patience_s, self._asked_s and self._asked_s + FIRST_PATIENCE_S):
            return None
        return (
            f"no answer from {self._url} for {lost_s:.0f} s; the last attempt: {self._trouble}; check that the server "
            "runs, that base_url= is right, and the network"
        )
