"""Heartbeats: whether a connected peer is alive, and how far away it is.

A machine that froze or lost its network leaves its connections standing for minutes. So each side pings the other, and after three
pings without an answer the connection is given up. While a large message keeps a slow link busy, its bytes count as a sign of life.

Whoever has reason to doubt a peer asks at once and waits for a shorter time (`Pings`).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Awaitable, Callable

import trio

from petalnet.errors import BusyError, PeerUnreachable, PetalnetError, ProtocolError, UnsupportedError
from petalnet.p2p.messages import Ping, Pong
from petalnet.p2p.streams import Stream

INTERVAL_S = 2.0
"""Seconds between heartbeats, and the most that an answer may take."""
MAX_MISSED = 3
"""Pings in a row without an answer after which a peer is dead. A stall of our own costs one at most, however long it was."""
CROWD = 50
"""Peers beyond which heartbeats are spread, so that a well-connected node does not spend itself on them (25 pings a second)."""
_KEPT = 8
SLICES = 4
"""Parts in which the answer to a single ping is waited for: a stall of our own, however long, costs one of them."""
LEAST_APART_S = 0.1
"""Between two single pings to one peer, however many ask: well within the pace at which it reads them."""


class Heartbeat:
    """The watch over one connected peer.

    Attributes:
        peer_id: the peer.
        dead: True once it has not answered `MAX_MISSED` times in a row.
        shortest_s: the shortest round trip ever, seconds: what the distance costs, without any load. None where there was none yet.
    """

    def __init__(self, peer_id: str) -> None:
        self.peer_id = peer_id
        self.dead = False
        self.shortest_s: float | None = None
        self._scope = trio.CancelScope()
        self._round_trips: deque[float] = deque(maxlen=_KEPT)

    @property
    def round_trip_s(self) -> float | None:
        """The shortest of the last round trips in seconds: the longer ones tell of load, not of distance."""
        return min(self._round_trips, default=None)

    def stop(self) -> None:
        """End the watch."""
        self._scope.cancel()

    async def run(self, open_ping: Callable[[], Awaitable[Stream]], *, last_heard: Callable[[], float], peers: Callable[[], int]) -> None:
        """Ping the peer until it is dead, `stop` is called, or it turns out not to know heartbeats.

        Args:
            open_ping: opens a stream for pings; raises a PetalnetError where the peer is not there.
            last_heard: the trio time at which anything last came from the peer.
            peers: how many peers are watched altogether.
        """
        stream: Stream | None = None
        missed = 0
        with self._scope:
            try:
                while missed < MAX_MISSED:
                    began = trio.current_time()
                    with trio.move_on_after(INTERVAL_S) as scope:
                        try:
                            stream = stream or await open_ping()
                            taken = await _ping(stream)
                            self._round_trips.append(taken)
                            self.shortest_s = taken if self.shortest_s is None else min(self.shortest_s, taken)
                            missed = 0
                        except UnsupportedError:
                            return
                        except PetalnetError:
                            await _drop(stream)
                            stream = None
                            missed += 1
                    if scope.cancelled_caught:
                        await _drop(stream)  # what it still answers is for a ping that is over
                        stream = None
                        missed = 0 if last_heard() >= began else missed + 1
                    crowded = max(1.0, peers() / CROWD)
                    await trio.sleep_until(began + INTERVAL_S * (crowded if not missed else 1.0) * random.uniform(0.9, 1.1))
                self.dead = True
            finally:
                await _drop(stream)


class Pings:
    """Single pings, whenever somebody wants to know at once whether a peer is alive. Several at a time to one peer are one.

    Args:
        open_ping: opens a stream for pings to a peer; raises a PetalnetError where it is not connected.
        last_heard: the trio time at which anything last came from a peer.
    """

    def __init__(self, open_ping: Callable[[str], Awaitable[Stream]], last_heard: Callable[[str], float]) -> None:
        self._open_ping = open_ping
        self._last_heard = last_heard
        self._under_way: dict[str, _Shared] = {}
        self._asked_at: dict[str, float] = {}  # of the last moment

    async def ping(self, peer_id: str, timeout_s: float) -> float:
        """One round trip in seconds; arguments and errors as of `Host.ping`."""
        began = trio.current_time()
        left_s = timeout_s
        while left_s > 0:
            shared = self._under_way.get(peer_id)
            if shared is None:
                return await self._ask(peer_id, left_s)
            with trio.move_on_after(left_s):
                await shared.over.wait()
            if shared.taken_s is not None:
                return shared.taken_s
            left_s = timeout_s - (trio.current_time() - began)
        raise _unanswered(peer_id, timeout_s)

    async def _ask(self, peer_id: str, timeout_s: float) -> float:
        """A ping that others may wait for as well."""
        shared = self._under_way[peer_id] = _Shared()
        began = trio.current_time()
        failure: PetalnetError | None = None

        async def ask() -> None:
            nonlocal failure
            stream: Stream | None = None
            try:
                await self._keep_pace(peer_id)
                stream = await self._open_ping(peer_id)
                shared.taken_s = await _ping(stream)
            except (UnsupportedError, BusyError):  # whoever refuses is there
                shared.taken_s = trio.current_time() - began
            except PetalnetError as error:  # raised below, bare: leaving the nursery by it would wrap it into a group
                failure = error
            finally:
                await _drop(stream)
                shared.over.set()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask)
                for _ in range(SLICES):
                    with trio.move_on_after(timeout_s / SLICES):
                        await shared.over.wait()
                    if shared.over.is_set():
                        break
                nursery.cancel_scope.cancel()
        finally:
            del self._under_way[peer_id]
        if shared.taken_s is None and failure is None and self._last_heard(peer_id) >= began + timeout_s / 2:
            shared.taken_s = trio.current_time() - began  # it sends other things: the ping waits behind them
        if shared.taken_s is None:
            raise _unanswered(peer_id, timeout_s) from failure
        return shared.taken_s

    async def _keep_pace(self, peer_id: str) -> None:
        """Wait until another ping may be sent to a peer."""
        now = trio.current_time()
        self._asked_at = {peer: at for peer, at in self._asked_at.items() if now < at + LEAST_APART_S}
        if peer_id in self._asked_at:
            await trio.sleep_until(self._asked_at[peer_id] + LEAST_APART_S)
        self._asked_at[peer_id] = trio.current_time()


class _Shared:
    """A ping under way: `over` is set when it is, with `taken_s` where it was answered."""

    def __init__(self) -> None:
        self.over = trio.Event()
        self.taken_s: float | None = None


def _unanswered(peer_id: str, timeout_s: float) -> PeerUnreachable:
    return PeerUnreachable(f"peer {peer_id} did not answer a ping within {timeout_s:g} s", peer_id)


async def _ping(stream: Stream) -> float:
    """One round trip in seconds."""
    ping = Ping(random.getrandbits(62))
    began = trio.current_time()
    await stream.send(ping)
    answer = await stream.receive()
    if not isinstance(answer, Pong) or answer.nonce != ping.nonce:
        raise ProtocolError(f"peer {stream.peer_id} answered a ping with {type(answer).__name__}", stream.peer_id)
    return trio.current_time() - began


async def _drop(stream: Stream | None) -> None:
    if stream is not None:
        await stream.reset()


async def serve_ping(stream: Stream) -> None:
    """Answer pings."""
    while (message := await stream.receive()) is not None:
        if not isinstance(message, Ping):
            raise UnsupportedError(f"{stream.protocol.id} takes pings only")
        await stream.send(Pong(message.nonce))
