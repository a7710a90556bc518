"""Streams for requests that belong to no session, kept open between requests: opening one takes a round trip or two."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from petalnet.p2p.host import Stream

MOST_IDLE = 4
"""Idle streams that are kept for each server: as many as requests were under way to it at a time, within reason."""
IDLE_S = 60.0
"""Seconds for which one is kept; well below the time after which a server closes it (`protocols.FORWARD`)."""


class IdleStreams:
    """The idle streams of a host; on the portal's thread."""

    def __init__(self) -> None:
        self._streams: dict[str, list[tuple[float, Stream]]] = {}

    def take(self, peer_id: str) -> Stream | None:
        """An idle stream to a peer, which is the caller's from now on; None where there is none."""
        streams = self._streams.get(peer_id)
        return streams.pop()[1] if streams and streams[-1][0] + IDLE_S > trio.current_time() else None

    async def keep(self, stream: Stream) -> None:
        """Keep a stream on which nothing is under way."""
        streams = self._streams.setdefault(stream.peer_id, [])
        if len(streams) < MOST_IDLE:
            streams.append((trio.current_time(), stream))
        else:
            await stream.close()

    async def close_old(self) -> None:
        """Close those that have been idle for too long."""
        oldest = trio.current_time() - IDLE_S
        for peer_id, streams in list(self._streams.items()):
            self._streams[peer_id] = [entry for entry in streams if entry[0] > oldest]
            if not self._streams[peer_id]:
                del self._streams[peer_id]
            for since, stream in streams:
                if since <= oldest:
                    await stream.close()
