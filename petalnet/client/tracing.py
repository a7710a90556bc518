"""Follows the answers of `generate`: each gets a `Trace`, a line in the log, and is the last one of its model in its thread."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from petalnet.client.trace import Trace

if TYPE_CHECKING:
    from petalnet.client.session import InferenceSession

logger = logging.getLogger(__name__)

SLOW_S = 2.0
"""An answer that takes longer makes somebody wonder why: its line is logged as information, others' for debugging."""


class _Last(threading.local):
    """The last trace of each model, in each thread."""

    def __init__(self) -> None:
        self.traces: weakref.WeakKeyDictionary[Any, Trace] = weakref.WeakKeyDictionary()


_last = _Last()


@contextmanager
def tracing(model: Any, session: InferenceSession, *, show_route: bool) -> Iterator[Trace]:
    """Inside, the session's steps are those of one answer of this model; whoever opens this says how many tokens and rows it has."""
    trace = session.begin_trace()
    drafted, accepted = session.drafted, session.accepted
    error: str | None = None
    try:
        yield trace
    except BaseException as failure:
        error = "interrupted" if isinstance(failure, KeyboardInterrupt) else " ".join(str(failure).split()) or type(failure).__name__
        raise
    finally:
        trace.drafted, trace.accepted = session.drafted - drafted, session.accepted - accepted
        trace.end(time.perf_counter(), error)
        _last.traces[model] = trace
        level = logging.INFO if trace.wall_s > SLOW_S or error is not None else logging.DEBUG
        if logger.isEnabledFor(level):
            route = f"; route: {trace.route}" if show_route and trace.route else ""
            logger.log(level, "%s; %s%s", trace.summary, trace.slowest, route)


def last_trace(model: Any) -> Trace | None:
    """Of the last answer of this model in this thread that is over; None before."""
    return _last.traces.get(model)
