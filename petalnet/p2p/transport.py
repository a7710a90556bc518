"""TCP as libp2p's hosts use it here.

Differences from the stock transport: a listening port belongs to one process (stock shares it by SO_REUSEPORT, so that a second node
on a taken port would silently get half of the first one's callers); the place that an inbound connection takes among those allowed is
given back when it closes (stock gives none back, and refuses everybody after 250 in a lifetime); callers that have not proved who they
are yet are counted, in all and by address; a write to a closed socket is an error; small messages are not held back by Nagle's
algorithm, paced by the congestion control, or stuck behind megabytes in the kernel.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache

import trio
from libp2p.abc import IListener, IRawConnection
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from libp2p.utils.multiaddr_utils import multiaddr_from_socket
from multiaddr import Multiaddr

from petalnet.p2p.addresses import listen_target
from petalnet.p2p.protocols import Limits
from petalnet.p2p.sources import source_of

logger = logging.getLogger(__name__)

UNSENT_BYTES = 128 * 1024
"""Bytes that the kernel takes beyond what is under way: whatever lies there goes out before a short message that comes later."""

_READ_SIZE = 64 * 1024

_MIN_RTT = struct.Struct("=148xI")
"""`tcpi_min_rtt` (microseconds) in Linux's struct tcp_info, since Linux 4.6."""
_DELIVERY = struct.Struct("=7xB112xQ32xQ")
"""`tcpi_delivery_rate_app_limited` (lowest bit), `tcpi_bytes_acked` and `tcpi_delivery_rate` (bytes/s) there, since Linux 4.9."""
_SLOW_START_BYTES = 512 * 1024
"""A connection that has carried less has not found out yet how quick its link is."""
_REMEMBERED_RATES = 8
"""Rates of which the highest counts: one falls behind for a moment where something is lost or other traffic is on the link."""
_NO_RTT = 2**31

Handler = Callable[["TcpStream"], Awaitable[None]]


def tune(sock: socket.socket | trio.socket.SocketType) -> None:
    """Set a TCP socket up for messages that should arrive soon, and to notice by itself when the other machine is gone for good."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    if hasattr(socket, "TCP_CONGESTION"):
        # BBR, the default of some machines, paces the small messages of an idle connection: up to 18 ms for a step's activations.
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"cubic")
        except OSError as error:
            logger.debug("congestion control stays as it is: %s", error)


class TcpStream(ReadWriteCloser):
    """A connected socket.

    Reads and writes go to the socket itself instead of through trio's wrapper, which yields to the scheduler at each: a message that the
    kernel takes at once is sent without giving up the turn.

    Args:
        connected: trio's socket, which this object takes over.
        on_close: called when this side closes it.
        on_established: called once the peer has proved who it is and a multiplexer runs.
    """

    def __init__(
        self,
        connected: trio.socket.SocketType,
        on_close: Callable[[], None] | None = None,
        on_established: Callable[[], None] | None = None,
    ) -> None:
        try:
            host, port, *_ = connected.getpeername()
            self._remote: tuple[str, int] | None = (host, port)
        except OSError:
            self._remote = None  # it is gone already, as the first read will tell
        self._socket = socket.socket(fileno=connected.detach())
        self._socket.setblocking(False)
        self._on_close = on_close
        self._on_established = on_established
        self._closed = False
        self._rates: deque[float] = deque(maxlen=_REMEMBERED_RATES)

    def established(self) -> None:
        """Say that the connection is through with its handshakes."""
        if self._on_established is not None:
            self._on_established()
            self._on_established = None

    def round_trip_s(self) -> float | None:
        """The shortest round trip that the kernel has seen, seconds; None where it does not say."""
        if not hasattr(socket, "TCP_INFO") or self._closed:
            return None
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MIN_RTT.size)
        except OSError:
            return None
        microseconds: int = _MIN_RTT.unpack(info)[0] if len(info) == _MIN_RTT.size else 0
        return microseconds / 1e6 if 0 < microseconds < _NO_RTT else None

    def bytes_s(self) -> float | None:
        """Bytes a second that the link has carried away from here when there was more to send than it took; None where that has not been
        seen, or the kernel does not say."""
        self._note_rate()
        return max(self._rates, default=None)

    def _note_rate(self) -> None:
        if not hasattr(socket, "TCP_INFO") or self._closed:
            return
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _DELIVERY.size)
        except OSError:
            return
        if len(info) < _DELIVERY.size:
            return
        flags, acked, rate = _DELIVERY.unpack(info)
        # Where the sender had nothing more to send, the rate says nothing about the link.
        if rate and not flags & 1 and acked >= _SLOW_START_BYTES:
            self._rates.append(rate)

    def try_send(self, data: bytes | bytearray | memoryview) -> int:
        """How many bytes the kernel took at once, maybe 0. Raises ConnectionClosedError."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise _gone(error) from error

    async def send_some(self, data: bytes | bytearray | memoryview) -> int:
        """Send at least one byte and return how many were sent. Raises ConnectionClosedError."""
        while True:
            await self._wait(trio.lowlevel.wait_writable)
            self._note_rate()
            if sent := self.try_send(data):
                return sent

    async def receive_into(self, buffer: memoryview) -> int:
        """Wait for bytes and return how many came, 0 at the end of the connection. Raises ConnectionClosedError."""
        while True:
            await self._wait(trio.lowlevel.wait_readable)
            try:
                return self._socket.recv_into(buffer)
            except BlockingIOError:
                continue
            except OSError as error:
                raise _gone(error) from error

    async def _wait(self, ready: Callable[[socket.socket], Awaitable[None]]) -> None:
        if self._closed:
            raise ConnectionClosedError("the connection was closed", transport="tcp")
        try:
            await ready(self._socket)
        except (trio.ClosedResourceError, OSError) as error:
            raise _gone(error) from error

    # The interface of libp2p, which the handshakes use.

    async def write(self, data: bytes) -> None:
        sent = self.try_send(data)
        while sent < len(data):
            sent += await self.send_some(memoryview(data)[sent:])

    async def read(self, n: int | None = None) -> bytes:
        if n == 0:
            return b""
        # Many of libp2p's readers ask for as many bytes as a stranger has announced: 4 GB must not be set aside for a word of five bytes.
        buffer = bytearray(_READ_SIZE if n is None else min(n, _READ_SIZE))
        return bytes(buffer[: await self.receive_into(memoryview(buffer))])

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()
        if self._on_close is not None:
            self._on_close()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._remote


def _gone(error: Exception) -> ConnectionClosedError:
    return ConnectionClosedError(f"the connection is gone: {error}", transport="tcp")


def caller_of(address: tuple[str, int] | None) -> str:
    """What callers are counted by: an IPv4 address, or the network of an IPv6 one, which a single customer has for itself.

    "" where there is no address: all that come through relays are one caller.
    """
    return "" if address is None else _caller_at(address[0])


@lru_cache(maxsize=4096)
def _caller_at(ip: str) -> str:
    source = source_of(ip)
    return source if ":" in source else ip.removeprefix("::ffff:")


class Callers:
    """Inbound connections by address, and which of them have not proved who they are yet.

    Where too many are in their handshakes, the one that has been at it for longest makes room: an honest handshake takes milliseconds,
    so whoever holds places open by saying nothing loses them, and those who come after are served. Where nearly all places for
    connections are taken, the address that has most of them gives up its latest, so that a few addresses do not keep all others out.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._places = limits.max_connections - limits.max_connections // 8  # the rest is for those whom this node dials
        self._callers: dict[TcpStream, str] = {}  # and the address, the oldest first
        self._connections: Counter[str] = Counter()  # of the callers, by address
        self._handshakes: dict[TcpStream, str] = {}  # those of them that are not established, the oldest first
        self._by_address: Counter[str] = Counter()  # of the handshakes

    def arrived(self, caller: TcpStream, address: str) -> TcpStream | None:
        """Take a connection in; the one that has to go for it, which may be the connection itself, or None."""
        if self._connections[address] >= self._limits.max_connections_per_address:
            return caller
        evicted = self._to_evict(address)
        if evicted is not None:
            self.left(evicted)  # at once: its task ends later, and of many that come together each has to find another one
        self._callers[caller] = self._handshakes[caller] = address
        self._connections[address] += 1
        self._by_address[address] += 1
        return evicted

    def _to_evict(self, address: str) -> TcpStream | None:
        if self._by_address[address] >= self._limits.max_handshakes_per_address:
            return next(other for other, its_address in self._handshakes.items() if its_address == address)
        if len(self._handshakes) >= self._limits.max_handshakes:
            return next(iter(self._handshakes))
        if len(self._callers) >= self._places:
            ((crowded, count),) = self._connections.most_common(1)
            if count > self._connections[address] + 1:
                return next(other for other in reversed(self._callers) if self._callers[other] == crowded)
        return None

    def established(self, caller: TcpStream) -> None:
        """The handshakes of a connection are over, in one way or another."""
        address = self._handshakes.pop(caller, None)
        if address is not None:
            _less(self._by_address, address)

    def left(self, caller: TcpStream) -> None:
        """A connection has ended; nothing where it was not taken in, or has left already."""
        self.established(caller)
        address = self._callers.pop(caller, None)
        if address is not None:
            _less(self._connections, address)


def _less(counter: Counter[str], address: str) -> None:
    counter[address] -= 1
    if not counter[address]:
        del counter[address]


class TcpListener(IListener):
    """Accepts connections on one address until it is closed."""

    background_nursery: trio.Nursery  # set by the swarm before it calls `listen`

    def __init__(self, handler: Handler, failures: dict[str, OSError], callers: Callers) -> None:
        self._handler = handler
        self._failures = failures
        self._callers = callers
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
        for listener in self._listeners:
            tune(listener.socket)  # what is accepted inherits it
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
            accepted = TcpStream(stream.socket, on_close=scope.cancel, on_established=lambda: self._callers.established(accepted))
            remote = accepted.get_remote_address()
            address = caller_of(remote)
            evicted = self._callers.arrived(accepted, address)
            if evicted is not None:
                logger.debug("too many connections: one from %s is dropped", evicted.get_remote_address())
                await evicted.close()
            if evicted is accepted:
                return
            try:
                await self._handler(accepted)
            except Exception as error:
                # Whatever a stranger does in a handshake concerns that stranger's connection only.
                logger.debug("an inbound connection from %s failed: %r", remote, error)
            finally:
                self._callers.left(accepted)
                await accepted.close()


class Tcp(TCP):
    """The TCP transport.

    Attributes:
        failures: for each address that could not be listened on, why.
    """

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self.failures: dict[str, OSError] = {}
        self._callers = Callers(limits)

    def create_listener(self, handler_function: Handler) -> TcpListener:  # type: ignore[override]  # stock names its own class
        return TcpListener(handler_function, self.failures, self._callers)

    async def dial(self, maddr: Multiaddr) -> IRawConnection:
        _, _, host, _, port, *_ = str(maddr).split("/")
        try:
            return RawConnection(TcpStream(await _connect(host, int(port))), True)
        except OSError as error:
            raise OpenConnectionError(f"cannot connect to {maddr}: {error.strerror or error}") from error


async def _connect(host: str, port: int) -> trio.socket.SocketType:
    """A socket connected to the first address of a host that answers. Raises OSError."""
    failure: OSError | None = None
    for family, kind, protocol, _, target in await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = trio.socket.socket(family, kind, protocol)
        try:
            tune(sock)  # before it connects: the congestion control begins with the first packet
            await sock.connect(target)
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            failure = error
        else:
            return sock
    raise failure or OSError(f"{host} has no address")


def is_address_in_use(error: OSError) -> bool:
    """Whether listening failed because another program has the port. Trio wraps one error for each address of a host."""
    return error.errno == errno.EADDRINUSE or isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE
