"""The swarm of an example: two server processes on this machine, or whichever one `--initial-peers` names.

The servers hold half of the demo model's 12 blocks each and compute with one thread. They end with the program, or with the notebook's
kernel.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Sequence

import torch

from petalnet.demo import READY_WITHIN_S, LocalSwarm, local_swarm

HALVES = ((0, 6), (6, 12))


def peers() -> list[str]:
    """Multiaddrs of the swarm that the command line names; otherwise of one that is started now."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--initial-peers", nargs="+", metavar="MADDR", help="a swarm to use in place of two servers on this machine")
    given = parser.parse_known_args()[0].initial_peers  # a notebook's kernel has arguments of its own
    return given or serve()


def serve(initial_peers: Sequence[str] = (), adapters: Sequence[str | os.PathLike[str]] = ()) -> list[str]:
    """Start two servers, which join the swarm of `initial_peers` or begin one, and wait until they are online.

    Args:
        adapters: folders of LoRA adapters that they are to have (`petalnet node --adapters`).
    Returns:
        their multiaddrs.
    """
    torch.set_num_threads(1)  # the servers compute on this machine as well
    options = ["--dtype", "float32", *(["--adapters", *map(str, adapters)] if adapters else [])]
    deadline = time.monotonic() + READY_WITHIN_S
    known = list(initial_peers)
    servers = []
    for half in HALVES:
        servers.append(_swarm().launch(half, known, *options))
        if not known:
            servers[0].wait_ready(deadline)
            known = servers[0].loopback_addrs()
    for server in servers:
        server.wait_ready(deadline)
    return [addr for server in servers for addr in server.loopback_addrs()]


@functools.cache
def _swarm() -> LocalSwarm:
    ending = contextlib.ExitStack()
    atexit.register(ending.close)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # otherwise it would leave the servers behind
    return ending.enter_context(local_swarm())
