"""The asking side of the records protocol towards one peer."""

from __future__ import annotations

import trio

from petalnet.errors import PetalnetError, ProtocolError, UnsupportedError
from petalnet.p2p.fields import Message
from petalnet.p2p.host import Host
from petalnet.p2p.protocols import RECORDS
from petalnet.p2p.streams import Stream


class RecordLink:
    """The stream for requests to one peer, opened when needed and kept; one request at a time.

    Args:
        host: the asking node.
        peer_id: the peer that is asked.
        timeout_s: seconds in which a stream has to be open.
    """

    def __init__(self, host: Host, peer_id: str, *, timeout_s: float) -> None:
        self._host = host
        self._peer_id = peer_id
        self._timeout_s = timeout_s
        self._lock = trio.Lock()
        self._stream: Stream | None = None

    async def ask(self, request: Message) -> Message:
        """The answer to a request. Raises PetalnetError."""
        async with self._lock:
            reused = self._stream is not None
            try:
                return await self._ask_once(request)
            except UnsupportedError:
                raise
            except PetalnetError:
                if not reused:
                    raise
                return await self._ask_once(request)  # the peer may have closed a stream that was idle

    async def close(self) -> None:
        """End the stream, if there is one and nobody waits for an answer on it."""
        stream, self._stream = self._stream, None
        if stream is not None:
            await stream.reset()

    async def _ask_once(self, request: Message) -> Message:
        stream, self._stream = self._stream, None
        if stream is None:
            stream = await self._host.open_stream(self._peer_id, RECORDS, timeout_s=self._timeout_s)
        try:
            await stream.send(request)
            answer = await stream.receive()
            if answer is None:
                raise ProtocolError(f"peer {self._peer_id} closed the stream instead of answering", self._peer_id)
        except BaseException:
            await stream.reset()
            raise
        self._stream = stream
        return answer
