"""Serving one protocol: a handler for each stream that a peer opens, within the protocol's limits, and what becomes of its errors."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable

import trio
from libp2p.abc import INetStream
from libp2p.network.stream.net_stream import NetStream

from petalnet.errors import BusyError, PeerLost, PetalnetError, ServerError
from petalnet.p2p.messages import Error
from petalnet.p2p.protocols import Protocol
from petalnet.p2p.rates import Rates
from petalnet.p2p.streams import Stream
from petalnet.p2p.transport import caller_of

logger = logging.getLogger(__name__)

IDLE_LOOKS = 8
"""Looks at idle streams within their time-out; they end at most one interval late."""
RATE_BURST_S = 2.0
"""Seconds' worth of requests that a peer may send at once."""

Handler = Callable[[Stream], Awaitable[None]]
Pace = Callable[[], Awaitable[None]]


class ProtocolServer:
    """Runs `handler` for each stream of `protocol`.

    Args:
        protocol: with its limits.
        handler: serves one stream.
        wrap: makes a stream of messages of libp2p's, given what keeps the pace of its peer.
        capacity: peers whose pace is remembered.
    """

    def __init__(self, protocol: Protocol, handler: Handler, *, wrap: Callable[[NetStream, Protocol, Pace], Stream], capacity: int) -> None:
        self._protocol = protocol
        self._handler = handler
        self._wrap = wrap
        self._counts: Counter[str] = Counter()  # streams by peer
        self._streams: dict[Stream, str] = {}  # and the address from which each comes
        rate = protocol.max_rate
        self._rates = None if rate is None else Rates(rate, rate * RATE_BURST_S, capacity=capacity)

    async def serve(self, raw: INetStream) -> None:
        """Serve one stream of libp2p's until it is over."""
        if not isinstance(raw, NetStream):
            raise TypeError(f"libp2p gave a {type(raw).__name__} for a stream")
        protocol, counts, peer_id = self._protocol, self._counts, str(raw.muxed_conn.peer_id)
        stream = self._wrap(raw, protocol, lambda: self._keep_pace(peer_id))
        caller = caller_of(raw.get_remote_address())
        full = len(self._streams) >= protocol.max_streams and not self._make_room(caller)
        if full or counts[peer_id] >= protocol.max_streams_per_peer:
            logger.debug("%s with peer %s: a stream was refused, too many are open", protocol.id, peer_id)
            await _tell(stream, BusyError(f"too many streams of {protocol.id} are open"))
            return
        counts[peer_id] += 1
        self._streams[stream] = caller
        try:
            await _serve_stream(stream, self._handler)
        finally:
            self._streams.pop(stream, None)
            counts[peer_id] -= 1
            if not counts[peer_id]:
                del counts[peer_id]

    def _make_room(self, caller: str) -> bool:
        """End a stream on which nothing is under way for one more of `caller`, where another caller has more; False where none has.

        Else one machine with many identities would keep all others out, by streams that it does not even use.
        """
        held = Counter(self._streams.values())
        most = max(held.values(), default=0)
        if held[caller] + 1 >= most:
            return False
        now = trio.current_time()
        idle = ((stream.idle_s(now), stream) for stream, its_caller in self._streams.items() if held[its_caller] == most)
        longest, stream = max(idle, key=lambda entry: entry[0])
        if longest <= 0.0:
            return False
        stream.end_idle()
        del self._streams[stream]
        return True

    async def end_idle_streams(self) -> None:
        """End streams on which no request has come for too long, until cancelled."""
        while True:
            await trio.sleep(self._protocol.idle_timeout_s / IDLE_LOOKS)
            self._end_idle_streams(trio.current_time())

    def _end_idle_streams(self, now: float) -> None:
        """Not part of the task above, in whose variable the last stream would live on."""
        for stream in self._streams:
            if stream.idle_s(now) >= self._protocol.idle_timeout_s:
                stream.end_idle()

    async def _keep_pace(self, peer_id: str) -> None:
        """Wait until one more request of the peer may be taken."""
        if self._rates is not None:
            now = trio.current_time()
            wait = self._rates.wait(peer_id, now)
            self._rates.charge(peer_id, now, 1.0)  # before the wait: requests on several streams wait one after the other
            if wait:
                await trio.sleep(wait)


async def _serve_stream(stream: Stream, handler: Handler) -> None:
    """Run a handler on a stream and end the stream as its outcome asks."""
    try:
        await handler(stream)
    except PeerLost as error:
        logger.debug("%s: %s", stream.protocol.id, error)
        await stream.reset()
    except PetalnetError as error:
        logger.debug("%s with peer %s: %s", stream.protocol.id, stream.peer_id, error)
        await _tell(stream, error)
    except Exception:
        # A defect of ours, met by one peer's request: it is logged and told, and must not end the node, as libp2p would have it.
        logger.exception("the handler of %s failed on a stream of peer %s", stream.protocol.id, stream.peer_id)
        await _tell(stream, ServerError("internal error"))
    except BaseException:
        await stream.reset()
        raise
    else:
        await stream.close()


async def _tell(stream: Stream, error: PetalnetError) -> None:
    """Send an error and close, as far as the peer lets us."""
    with trio.move_on_after(1):
        try:
            await stream.send(Error.of(error))
        except PetalnetError as lost:
            logger.debug("%s", lost)
    await stream.close()
