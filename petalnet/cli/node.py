"""`petalnet node`: a server, a client daemon or a bootstrap node, until a signal ends it."""

from __future__ import annotations

import os
import signal
from types import FrameType

import click

from petalnet.cli.options import SettingsCommand
from petalnet.config import TABLE, Settings


def _run(settings: Settings) -> int:
    roles = {"--serve": settings.serve is not None, "--client": settings.client, "--bootstrap": settings.bootstrap}
    chosen = [flag for flag, given in roles.items() if given]
    if len(chosen) != 1:
        raise click.UsageError("say one of --serve A:B, --client or --bootstrap" + (f"; got {' and '.join(chosen)}" if chosen else ""))

    def stop(number: int, frame: FrameType | None) -> None:
        os._exit(0)

    # Until the node has its own handlers there is nothing to drain: a signal during the imports just ends it. Not by an exception, which
    # may be raised where Python ignores it (in a finaliser).
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

    from petalnet.cli.logs import set_up

    set_up(settings.log_level, settings.log_format)

    import trio

    from petalnet.node import run_node

    trio.run(run_node, settings)
    return 0


command = SettingsCommand(
    "node",
    settings=TABLE,
    callback=_run,
    help="""Run a node until Ctrl-C.

    \b
    petalnet node --serve 0:12                            a whole swarm of one server, with the model that ships in the package
    petalnet node MODEL --serve 0:12 --initial-peers ...  join a swarm as a server
    petalnet node --client --initial-peers ...            this machine's client daemon
    petalnet node --bootstrap                             an entry point of a swarm

    Every setting can also stand in the environment (PETALNET_DTYPE for --dtype) or in the configuration file, as far as it is not
    about a single run. Underscores in flags are accepted.""",
)
