"""What comes on a stream, in its order, for one task that serves it.

A request is read when the one before it is done, so that a token costs no switch between tasks. Where serving one takes long, those behind
it are read meanwhile: the next chunk of a prompt is here when this one is done, what may not wait is answered at once, and a stream that
ends is noticed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from petalnet.errors import PetalnetError
from petalnet.p2p.fields import Blob, Message

if TYPE_CHECKING:
    from petalnet.p2p.streams import Stream

log = logging.getLogger(__name__)

SLOW_S = 0.25
"""Seconds after which a request is taken to be slow."""
MOST_AHEAD, MOST_AHEAD_BYTES = 1024, 8 * 2**20
"""Messages, and bytes of them, that are held for one client; a single message may exceed that. As much as a client has on its way
by the time it hears that a server is lost, so that what it says then is read behind it."""
MESSAGE_BYTES, NUMBER_BYTES = 1024, 32
"""What a message takes without its arrays and lists, and each entry of a list."""
MOST_BYTES_OF_ALL = 512 * 2**20
"""The same for all clients together, one message of each aside."""


@dataclass
class Held:
    """Bytes of messages that were read ahead, on all streams of a server."""

    bytes: int = 0


class Requests:
    """The requests on one stream.

    Attributes:
        arrived: when the request that `next` gave last was here, by trio's clock.
        scope: what the task that serves them runs in, where it can be interrupted.
        is_closed: whether nothing more is to be served.
    """

    def __init__(
        self,
        stream: Stream,
        held: Held,
        *,
        most: int = MOST_AHEAD,
        urgent: Callable[[Message], Awaitable[bool]] | None = None,
        ended: Callable[[], object] | None = None,
    ) -> None:
        """
        Args:
            held: is kept up to date.
            most: messages that may be read ahead.
            urgent: answers a request that may not wait for those before it; False for one that has to wait like any other.
            ended: is called where the stream ends while a request is served.
        """
        self.arrived = 0.0
        self.scope = trio.CancelScope()
        self.is_closed = False
        self._stream = stream
        self._held = held
        self._most = most
        self._urgent = urgent
        self._on_end = ended
        self._ahead: deque[tuple[Message, float, int]] = deque()
        self._bytes = 0  # of those
        self._is_serving = False
        self._has_ended = False
        self._is_reading = False
        self._stops = False  # reading
        self._receiving = trio.CancelScope()
        self._changed = trio.lowlevel.ParkingLot()  # how much is read ahead, or whether anything is

    async def next(self) -> Message | None:
        """The next request, None at the end of the stream. Raises as `Stream.receive`."""
        self._is_serving = False
        if self._is_reading or self._ahead or self._has_ended:
            if not self._ahead:
                await self._stop_reading()
            if self._ahead:
                request, self.arrived, size = self._ahead.popleft()
                self._hold(-size)
                self._changed.unpark_all()
                self._is_serving = True
                return request
            if self._has_ended:
                return None
        received = await self._stream.receive()
        self.arrived = trio.current_time()
        self._is_serving = True
        return received

    def read_on(self, nursery: trio.Nursery | None) -> None:
        """Read what follows the request that is served, in a task of its own, until `next` has nothing else to give."""
        if nursery is not None and not (self._is_reading or self._has_ended or self.is_closed):
            self._is_reading, self._stops = True, False
            nursery.start_soon(self._read)

    def look(self, now: float, nursery: trio.Nursery | None) -> None:
        """`read_on` where the request that is served is slow; to be called now and then."""
        if self._is_serving and not self._is_reading and now - self.arrived >= SLOW_S:
            self.read_on(nursery)

    async def close(self) -> None:
        """Serve nothing more once the request under way is done, and reset the stream."""
        self.is_closed = True
        await self._stream.reset()

    def forget(self) -> None:
        """What was read ahead will not be served."""
        self.is_closed = self._stops = True
        self._receiving.cancel()
        self._ahead.clear()
        self._hold(-self._bytes)

    def _hold(self, size: int) -> None:
        self._bytes += size
        self._held.bytes += size

    @property
    def _is_full(self) -> bool:
        if not self._ahead:
            return False
        return len(self._ahead) >= self._most or self._bytes >= MOST_AHEAD_BYTES or self._held.bytes >= MOST_BYTES_OF_ALL

    async def _stop_reading(self) -> None:
        self._stops = True
        self._receiving.cancel()
        while self._is_reading:
            await self._changed.park()

    async def _read(self) -> None:
        try:
            while not self._stops:
                request = None
                with trio.CancelScope() as self._receiving:
                    while self._is_full:
                        await self._changed.park()
                    request = await self._receive_ahead()
                if request is not None:  # taken in outside the scope: an answer that is cut off in the middle would end the stream
                    await self._take_in(request, trio.current_time())
        finally:
            self._is_reading = False
            self._changed.unpark_all()

    async def _receive_ahead(self) -> Message | None:
        try:
            request = await self._stream.receive(ahead=1 + len(self._ahead))
        except PetalnetError as error:
            log.debug("peer %s sends no more requests: %s", self._stream.peer_id, error)
            request = None
        if request is None:
            self._has_ended = self._stops = True
            if self._on_end is not None and self._is_serving:
                self._on_end()
        return request

    async def _take_in(self, request: Message, arrived: float) -> None:
        if self._urgent is not None and await self._urgent(request):
            self._stream.forget_latest()
            return
        if self.is_closed:
            return
        size = _size(request)
        self._ahead.append((request, arrived, size))
        self._hold(size)
        self._changed.unpark_all()


def _size(message: Message) -> int:
    """About the bytes that a message takes."""
    values = vars(message).values()
    arrays = sum(len(value.data) for value in values if isinstance(value, Blob))
    return MESSAGE_BYTES + arrays + NUMBER_BYTES * sum(len(value) for value in values if isinstance(value, tuple))
