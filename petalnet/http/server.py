"""Serves the local web side on a trio loop."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from starlette.applications import Starlette

from petalnet.errors import AddressInUse, UsageError

logger = logging.getLogger(__name__)
logger.setLevel(logging.WARNING)  # hypercorn reports on "info" what the node says in its own words


def bind(host: str, ports: Sequence[int]) -> socket.socket:
    """A listening socket on the first of the ports that is free.

    Raises:
        AddressInUse: all of them are taken.
        UsageError: the address is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UsageError(f"--http: {host} is not an address: {error.strerror}") from None
    for port in ports:
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            opened.bind((address[0], port, *address[2:]))
            opened.listen()
        except OSError as error:
            opened.close()
            if port == ports[-1]:
                taken = f"port {port}" if len(ports) == 1 else f"every port from {ports[0]} to {port}"
                if isinstance(error, PermissionError) or "assign" in str(error):
                    raise UsageError(f"--http: cannot listen on {host}:{port}: {error.strerror}") from None
                raise AddressInUse(f"--http: {taken} of {host} is taken by another program") from None
            continue
        opened.setblocking(False)
        return opened
    raise UsageError("no port was given")


def url_of(opened: socket.socket) -> str:
    """`http://127.0.0.1:31331` for a listening socket."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def run_http(app: Starlette, opened: socket.socket, *, task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED) -> None:
    """Answer requests on `opened`, which is closed in the end, until cancelled."""
    config = Config()
    config.bind = [f"fd://{opened.detach()}"]  # hypercorn closes it
    config.accesslog = None
    config.errorlog = logger
    config.graceful_timeout = 1.0
    config.h11_max_incomplete_size = 16 * 1024
    config.include_server_header = False
    await serve(app, config, shutdown_trigger=trio.sleep_forever, task_status=task_status)  # type: ignore[arg-type]
