"""The links on which another server brings the steps of one session: the latest one counts, those before it end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from petalnet.blocks.requests import Held, Requests
from petalnet.errors import CallerError, PeerLost, UnsupportedError
from petalnet.p2p.session_messages import LinkOpened, Step

if TYPE_CHECKING:
    from petalnet.p2p.streams import Stream


class Incoming:
    """Those of one session."""

    def __init__(self, held: Held, take: Callable[[Step, Requests, str], Awaitable[bool]], end: Callable[[], object]) -> None:
        """
        Args:
            held: counts what is read ahead.
            take: runs a step that came among these requests, from this peer; False where the session is over.
            end: ends the session.
        """
        self._held = held
        self._take = take
        self._end = end
        self._links: set[Requests] = set()
        self._latest: Requests | None = None
        self._is_over = False

    async def serve(self, stream: Stream) -> None:
        """Run the steps that come on a link, until that or the session ends, or there is another one.

        Raises:
            CallerError: the session has ended.
            UnsupportedError: something else came than steps.
            PeerLost: of the link.
        """
        if self._is_over:
            raise CallerError("the session has ended")
        requests = Requests(stream, self._held, most=1)
        self._links.add(requests)
        try:
            await self.close()
            self._latest = requests
            await stream.send(LinkOpened())
            while not requests.is_closed and await self._serve_steps(requests, stream.peer_id):
                pass
        finally:
            requests.forget()
            self._links.discard(requests)
            if self._latest is requests:
                self._latest = None

    async def close(self) -> None:
        """Close the latest link: nothing more of it is served than the step under way."""
        latest, self._latest = self._latest, None
        if latest is not None:
            await latest.close()

    def end(self) -> None:
        """The session has ended: give up all steps that came this way."""
        self._is_over = True
        for requests in self._links:
            requests.forget()
            requests.scope.cancel()

    async def _serve_steps(self, requests: Requests, peer_id: str) -> bool:
        """Run the steps of a link; True where that was interrupted, and goes on."""
        with trio.CancelScope() as requests.scope:
            while not (requests.scope.cancel_called or requests.is_closed):
                request = await requests.next()
                if request is None:
                    return False
                if not isinstance(request, Step):
                    raise UnsupportedError(f"a link takes step, not {request.name}")
                try:
                    goes_on = await self._take(request, requests, peer_id)
                except PeerLost:  # the client's stream has ended
                    goes_on = False
                if not goes_on:
                    self._end()
                    return False
        return True
