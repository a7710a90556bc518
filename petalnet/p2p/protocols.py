"""The table of petalnet's own protocols: their ids on the wire, and the limits within which a node serves them.

Limits are per node. A peer that exceeds one is refused with a *busy* error; the others are not touched.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from petalnet.p2p.frames import FrameLimits


@dataclass(frozen=True)
class Protocol:
    """One protocol.

    Attributes:
        id: its name in the negotiation of a stream; the version changes where an older peer could not follow.
        limits: the longest header and payload of a frame, bytes.
        max_streams_per_peer: streams that one peer may have open to this node.
        max_streams: streams that all peers together may have open to this node.
        idle_timeout_s: seconds without a message after which a served stream is closed.
        frame_timeout_s: seconds without a byte in the middle of a frame after which a stream is given up, on both sides.
    """

    id: str
    limits: FrameLimits = field(default_factory=FrameLimits)
    max_streams_per_peer: int = 64
    max_streams: int = 1024
    idle_timeout_s: float = 60.0
    frame_timeout_s: float = 30.0


INFERENCE = Protocol(
    "/petalnet/inference/1.0.0",
    # A prefill of 4096 tokens of hidden size 8192 in float32 is 128 MiB; deep prompts may double that.
    limits=FrameLimits(header=16 * 1024, payload=256 * 1024 * 1024),
    # A session is a stream; a machine that serves a room of users sits behind one peer id.
    max_streams_per_peer=128,
    # A backstop for memory (a few KB each): the KV cache admits far fewer sessions than this.
    max_streams=2048,
    # The session manager closes idle sessions first; this one is for streams on which no session was ever opened.
    idle_timeout_s=3600.0,
)

FORWARD = Protocol(
    "/petalnet/forward/1.0.0",
    # A micro-batch of activations and its gradient in one frame.
    limits=FrameLimits(header=16 * 1024, payload=512 * 1024 * 1024),
    max_streams_per_peer=64,
    max_streams=512,
    # A trainer keeps a stream between its steps, and a step through many hops takes a while.
    idle_timeout_s=600.0,
)

RECORDS = Protocol(
    "/petalnet/records/1.0.0",
    # Answers carry up to a few hundred records of 4 KB in the header; there are no arrays.
    limits=FrameLimits(header=1024 * 1024, payload=0),
    # Requests take milliseconds.
    max_streams_per_peer=16,
    max_streams=512,
    idle_timeout_s=120.0,
    frame_timeout_s=5.0,
)

PING = Protocol(
    "/petalnet/ping/1.0.0",
    limits=FrameLimits(header=256, payload=0),
    # One for each connection, and two peers that dial each other at once have two connections for a while.
    max_streams_per_peer=4,
    max_streams=2048,
    # Well over the interval of heartbeats in a crowded node.
    idle_timeout_s=120.0,
    frame_timeout_s=10.0,
)

PROTOCOLS = (INFERENCE, FORWARD, RECORDS, PING)
