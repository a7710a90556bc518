"""What a host can say of its connections, for people and for programs of the same user."""

from __future__ import annotations

from dataclasses import dataclass

from libp2p.network.connection.swarm_connection import SwarmConn

from petalnet.p2p.mux import MuxConnection
from petalnet.p2p.security import NoiseSession


@dataclass(frozen=True)
class PeerStatus:
    """One connection to a peer.

    Attributes:
        peer_id: the peer, base58.
        addr: the multiaddr of its other end; "" where that is not known.
        direction: "in" where the peer dialled, "out" where this node did.
        path: "direct" or "relay".
        relay: the id of the relay that carries it, or None.
        round_trip_s: seconds, or None where it is not known yet.
        bytes_in, bytes_out: on the wire since the handshake.
        streams: streams that are open on it.
        muxer: the protocol id of the multiplexer.
        since: when it was made, unix seconds.
    """

    peer_id: str
    addr: str
    direction: str
    path: str
    relay: str | None
    round_trip_s: float | None
    bytes_in: int
    bytes_out: int
    streams: int
    muxer: str
    since: float

    @classmethod
    def of(cls, connection: SwarmConn, session: NoiseSession, round_trip_s: float | None) -> PeerStatus:
        muxed = connection.muxed_conn
        addr = next(map(str, session.get_transport_addresses()), "")
        head, relayed, _ = addr.partition("/p2p-circuit")
        return cls(
            peer_id=str(muxed.peer_id),
            addr=addr,
            direction="out" if session.is_initiator else "in",
            path="relay" if relayed else "direct",
            relay=head.rpartition("/p2p/")[2] if relayed else None,
            round_trip_s=round_trip_s,
            bytes_in=session.bytes_in,
            bytes_out=session.bytes_out,
            streams=len(muxed.streams) if isinstance(muxed, MuxConnection) else len(connection.streams),
            muxer=str(getattr(muxed, "negotiated_muxer_protocol", "")),
            since=connection._created_at,
        )
