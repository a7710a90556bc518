"""Keeps libp2p's own log lines off the user's terminal.

libp2p logs what strangers do to it as warnings and errors, partly through the root logger, whose first use installs a handler that
prints to the terminal. Whoever debugs libp2p itself sets its LIBP2P_DEBUG variable, and then all stays as libp2p sets it up.
"""

from __future__ import annotations

import logging
import os

from libp2p.network.connection import swarm_connection


def tame_logging() -> None:
    """Let nothing that libp2p logs reach a handler, unless LIBP2P_DEBUG is set. May be called any number of times."""
    if os.environ.get("LIBP2P_DEBUG"):
        return
    ours = logging.getLogger("libp2p")
    ours.propagate = False
    if not ours.handlers:
        ours.addHandler(logging.NullHandler())  # without any handler, Python prints warnings to stderr
    ours.setLevel(logging.CRITICAL)  # refused before it is formatted: libp2p logs several lines for each frame
    # This module alone calls logging.debug() and its like, which log to the root logger and call basicConfig().
    swarm_connection.logging = ours  # type: ignore[assignment]
