"""The streams that peers open to a server's blocks, handed to the service that is there now.

A node stays when its blocks change: its handlers are set once, and what they hand streams to comes and goes. When a service goes, whatever
was still under way with it ends first, so that nothing keeps its memory.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from petalnet.errors import BusyError
from petalnet.p2p.protocols import FORWARD, INFERENCE, PUSH

if TYPE_CHECKING:
    from petalnet.blocks.service import BlockService
    from petalnet.p2p.host import Host
    from petalnet.p2p.streams import Stream

RETRY_S = 10.0
"""What a peer is told that comes while blocks are being loaded; its next route will not lead here."""


class Answering:
    """The handlers of one host's protocols for blocks.

    Attributes:
        service: who answers; None while there is nobody.
    """

    def __init__(self, host: Host) -> None:
        self.service: BlockService | None = None
        self._host = host
        self._listening = False
        self._streams: set[trio.CancelScope] = set()
        self._ended = trio.Event()

    def begin(self, service: BlockService) -> None:
        """Hand streams to this service from now on."""
        self.service = service
        if not self._listening:
            self._listening = True
            self._host.on_peer_lost(self._peer_lost)
            self._host.serve(INFERENCE, self._inference)
            self._host.serve(PUSH, self._push)
            self._host.serve(FORWARD, self._forward)

    async def end(self) -> None:
        """End the streams that are open, and hand no more to anybody; returns once the service has let go of all of them."""
        self.service = None
        for scope in self._streams:
            scope.cancel()
        while self._streams:
            self._ended = trio.Event()
            await self._ended.wait()

    def _peer_lost(self, peer_id: str) -> None:
        if self.service is not None:
            self.service.peer_lost(peer_id)

    async def _inference(self, stream: Stream) -> None:
        await self._answer(stream, lambda service: service.handle_inference)

    async def _push(self, stream: Stream) -> None:
        await self._answer(stream, lambda service: service.handle_push)

    async def _forward(self, stream: Stream) -> None:
        await self._answer(stream, lambda service: service.handle_forward)

    async def _answer(self, stream: Stream, handler: Callable[[BlockService], Callable[[Stream], Awaitable[None]]]) -> None:
        if self.service is None:
            raise BusyError("the server is loading other blocks", RETRY_S)
        with trio.CancelScope() as scope:
            self._streams.add(scope)
            try:
                await handler(self.service)(stream)
            finally:
                self._streams.discard(scope)
                self._ended.set()
