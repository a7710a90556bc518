"""TCP as libp2p's hosts use it here.

Differences from the stock transport: a listening port belongs to one process (stock shares it by SO_REUSEPORT, so that a second node
on a taken port would silently get half of the first one's callers); the place that an inbound connection takes among those allowed is
given back when it closes (stock gives none back, and refuses everybody after 250 in a lifetime); a write to a closed socket is an
error; small messages are not held back by Nagle's algorithm or paced by the congestion control.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence

import trio
from libp2p.abc import IListener, IRawConnection
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.io.trio import TrioTCPStream
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from libp2p.utils.multiaddr_utils import multiaddr_from_socket
from multiaddr import Multiaddr

from petalnet.p2p.addresses import listen_target

logger = logging.getLogger(__name__)

Handler = Callable[[TrioTCPStream], Awaitable[None]]


class TcpStream(TrioTCPStream):
    """A connected socket. `on_close` is called when this side closes it."""

    def __init__(self, stream: trio.SocketStream, on_close: Callable[[], None] | None = None) -> None:
        super().__init__(stream)  # trio has set TCP_NODELAY
        self._on_close = on_close
        if hasattr(socket, "TCP_CONGESTION"):
            # BBR, the default of some machines, paces the small messages of an idle connection: up to 18 ms for a step's activations.
            try:
                stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
            except OSError as error:
                logger.debug("congestion control stays as it is: %s", error)

    # The stock methods take a lock each; the Noise session above has one reader and one writer already.
    async def write(self, data: bytes) -> None:
        try:
            await self.stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(f"the connection is gone: {error}", transport="tcp") from error

    async def read(self, n: int | None = None) -> bytes:
        if n == 0:
            return b""
        try:
            return bytes(await self.stream.receive_some(n))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(f"the connection is gone: {error}", transport="tcp") from error

    async def close(self) -> None:
        try:
            await trio.aclose_forcefully(self.stream)  # a TCP socket's close never waits
        finally:
            if self._on_close is not None:
                self._on_close()

    def get_remote_address(self) -> tuple[str, int] | None:
        if self._cached_remote_address is None:
            try:
                host, port, *_ = self.stream.socket.getpeername()  # IPv6 has two more entries, which the stock method trips over
            except OSError:
                return None
            self._cached_remote_address = (host, port)
        return self._cached_remote_address


class TcpListener(IListener):
    """Accepts connections on one address until it is closed."""

    background_nursery: trio.Nursery  # set by the swarm before it calls `listen`

    def __init__(self, handler: Handler, failures: dict[str, OSError]) -> None:
        self._handler = handler
        self._failures = failures
        self._scope = trio.CancelScope()
        self._stopped = trio.Event()
        self._listeners: Sequence[trio.SocketListener] = ()

    async def listen(self, maddr: Multiaddr) -> None:
        host, port = listen_target(str(maddr))
        try:
            self._listeners = await trio.open_tcp_listeners(port, host=host)
        except OSError as error:
            self._failures[str(maddr)] = error
            raise OpenConnectionError(f"cannot listen on {maddr}: {error}") from error
        self.background_nursery.start_soon(self._serve)

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        return tuple(multiaddr_from_socket(listener.socket) for listener in self._listeners)

    async def close(self) -> None:
        self._scope.cancel()
        if self._listeners:
            await self._stopped.wait()

    async def _serve(self) -> None:
        try:
            with self._scope:
                await trio.serve_listeners(self._accept, list(self._listeners))
        finally:
            self._stopped.set()

    async def _accept(self, stream: trio.SocketStream) -> None:
        with trio.CancelScope() as scope:
            # The swarm's handler would hold the connection's place until the swarm ends; the scope ends it with the connection.
            accepted = TcpStream(stream, on_close=scope.cancel)
            try:
                await self._handler(accepted)
            except Exception as error:
                # Whatever a stranger does in a handshake concerns that stranger's connection only.
                logger.debug("an inbound connection from %s failed: %r", accepted.get_remote_address(), error)
            finally:
                await accepted.close()


class Tcp(TCP):
    """The TCP transport.

    Attributes:
        failures: for each address that could not be listened on, why.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failures: dict[str, OSError] = {}

    def create_listener(self, handler_function: Handler) -> TcpListener:  # type: ignore[override]  # stock names its own class
        return TcpListener(handler_function, self.failures)

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        connection = await super().dial(maddr)
        if not isinstance(connection, RawConnection) or not isinstance(connection.stream, TrioTCPStream):
            raise OpenConnectionError(f"dialling {maddr} gave a {type(connection).__name__}")
        return RawConnection(TcpStream(connection.stream.stream), True)


def is_address_in_use(error: OSError) -> bool:
    """Whether listening failed because another program has the port. Trio wraps one error for each address of a host."""
    return error.errno == errno.EADDRINUSE or isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE
