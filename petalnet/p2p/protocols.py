"""The table of petalnet's own protocols and of every limit on what peers may take of a node, each with its reason.

`Limits` bounds the connections and what holds for all protocols together; a `Protocol` bounds its own messages and streams. A peer that
exceeds a limit is refused or slowed down; the others are not touched. What no honest peer would ever do is an offence besides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from petalnet.p2p.frames import FrameLimits
from petalnet.version import PROTOCOL

KIB, MIB = 1024, 1024 * 1024


class Rate(NamedTuple):
    """So much a second, and so much at once."""

    per_second: float
    burst: float


@dataclass(frozen=True)
class Limits:
    """What all protocols together may take. Sizes are bytes, times seconds."""

    # -- connections
    max_connections: int = 1000
    """A connection costs about 60 KB and a heartbeat; a client needs a dozen, a server one for each user."""
    max_connections_per_peer: int = 4
    """Two that crossed, one that is dying, and one that replaces a relayed one."""
    max_connections_per_address: int = 128
    """From one IP address: a university behind one router fits, one machine that makes up identities does not fill the table."""
    max_handshakes: int = 256
    """Connections that have not proved who they are yet; each costs a task and, at most once, about 0.5 ms of arithmetic."""
    max_handshakes_per_address: int = 32
    """A quarter second of honest dials at full speed; one address does not take all places."""
    handshake_timeout: float = 10.0
    """For TCP accept to a working muxer. The slowest honest handshake is five round trips of a second."""
    max_dials: int = 32
    """Dials under way at once: a fresh node with a long list of stale addresses must not look like a port scan."""

    # -- streams
    max_streams_per_peer: int = 256
    """Opened by one peer, of all protocols, those still in negotiation included."""
    max_streams: int = 4096
    """Opened by all peers. A stream that waits costs about 10 KB with its task."""
    max_streams_per_address: int = 2048
    """Opened from one IP address: half of all, so that one machine with many identities does not take them."""
    max_openings: float = 1000.0
    """Streams that one peer may open in a second; a burst of two seconds is free. Above that its connection is read more slowly. Each costs
    a task, also where it is reset at once; an honest peer opens a handful for a session and keeps them."""
    max_libp2p_streams: float = 50.0
    """Streams of libp2p's own protocols (identify, Kademlia, gossip, circuits) that are served for one peer in a second, and four times
    as many for one address; a burst of two seconds is free, the others wait. Each costs a millisecond; an honest peer opens a few as it
    connects, and one for each step of a look-up."""
    negotiation_timeout: float = 10.0
    """For a peer to say which protocol a stream is for."""
    linger: float = 5.0
    """For a peer to close its side of a stream that this side has closed; then it is reset."""
    write_timeout: float = 15.0
    """Without a byte taken by the peer's side of the socket, after which the connection is given up."""

    # -- bytes held for peers
    busy_window: int = 2 * MIB
    """Bytes that a peer may send ahead of the reading on a stream in use (on a new one: `mux_protocol.INITIAL_WINDOW`): what is
    under way at 1 Gbit/s and 16 ms, or 100 Mbit/s and 160 ms."""
    max_held_per_peer: int = 1024 * MIB
    """Windows above the first and long messages under way of one peer: two of the longest messages that a protocol allows."""
    max_held: int = 4096 * MIB
    """The same of all peers; a host with little memory holds a quarter of it at most (see `budget`)."""
    slowest_rate: int = 16 * KIB
    """Bytes a second, on average over a message, below which it is given up: a modem's rate, so that nobody keeps a message under way
    for days by a byte now and then."""

    # -- records and gossip (see `record_keeper`, `record_store`, `gossip`); a source is an address or the network around it
    max_records: int = 10_000
    """Records of servers that are kept for the swarm, 4 KB each at most: 40 MB."""
    record_requests_per_source: Rate = Rate(200.0, 600.0)
    """Requests of all peers of one source (for one peer the protocol's own limit holds): ten that ask as fast as they may, or two thousand
    servers behind one router that announce themselves every 15 s."""
    record_bytes_per_peer: Rate = Rate(256.0 * KIB, 4.0 * MIB)
    """Bytes of answers to one peer: eight of the longest answers, then one in two seconds."""
    record_bytes_per_source: Rate = Rate(2.0 * MIB, 16.0 * MIB)
    """To all peers of one source."""
    record_bytes: Rate = Rate(8.0 * MIB, 64.0 * MIB)
    """To everybody: what a node spends for the swarm. Its own work needs the line too."""
    gossip_per_neighbour: Rate = Rate(50.0, 500.0)
    """Messages that are looked at from one neighbour. A swarm gossips a few a second (see `routing.pace`), and each neighbour brings nearly
    all of them; the burst is for the history that a newcomer is handed, and for a swarm that starts."""
    gossip_per_source: Rate = Rate(150.0, 1500.0)
    """The same of all neighbours of one source: the dozen that a node hears most from may all sit behind one router. A message costs up to
    a millisecond, and ids nothing: without this bound, one machine with two dozen of them took all of a node's time."""
    gossip_per_author: Rate = Rate(0.5, 8.0)
    """Announcements of one server that are gossiped on; an honest one tells of its load once in 3 s at most."""

    # -- circuits through relays (see `relay`, which keeps most of these, and `circuit`)
    relay_step: float = 10.0
    """For each step of setting up a circuit: the far side of a relay may be two round trips of a second away."""
    relay_reservation: float = 3600.0
    """For which a relay keeps a reservation that is not renewed; it ends with the connection anyway."""
    max_reservations: int = 256
    """Servers that a relay stands in for. Each costs its connection and 200 bytes; what they carry is bounded below."""
    max_reservations_per_address: int = 16
    """From one IP address: several machines behind one router fit, one that makes up identities does not fill the table."""
    max_circuits: int = 256
    """Through a relay at once: two streams and two tasks each, and two of the windows below where nobody reads: half a gigabyte at most."""
    circuit_window: int = MIB
    """Bytes that may be under way on each half of a circuit: 100 Mbit/s at a round trip of 80 ms."""
    max_circuits_per_peer: int = 64
    """That begin, or that end, at one peer: a server's users are many, and a user's servers are few."""
    max_circuits_per_address: int = 32
    """That begin at one IP address: half of what a server gets, so that one machine with many identities does not shut others out."""
    circuit_lifetime: float = 12 * 3600.0
    """After which a relay ends a circuit; whoever still needs it dials again. Answers take minutes, so few are cut off."""
    circuit_bytes: int = 64 * 1024 * MIB
    """Both ways together, after which a relay ends a circuit: a week of decoding, or 500 of the longest prefills."""
    max_hole_punches: int = 16
    """Under way at once (see `hole_punching`): each dials two addresses at most that a peer named, for three seconds."""
    max_dial_backs: int = 8
    """Dials under way for peers that ask whether they can be reached (see `reachability`)."""
    dial_back_timeout: float = 4.0
    """For such a dial: what a firewall drops is never answered."""

    # -- offences (see `offences`)
    offence_threshold: float = 10.0
    """Weights summed up to which a peer is dropped: about ten messages that nobody sends by accident."""
    offence_half_life: float = 300.0
    """After which an offence counts half: a buggy but harmless peer is never dropped."""
    ban: float = 900.0
    """For which a dropped peer is refused; doubled by each further ban, up to a day. Then it is forgotten."""
    max_offenders: int = 4096
    """Peers whose offences are remembered, 100 bytes each; the mildest are forgotten first."""


@dataclass(frozen=True)
class Protocol:
    """One protocol.

    Attributes:
        id: its name in the negotiation of a stream, with the version that both sides have to speak.
        limits: the longest header and payload of a frame, bytes.
        max_streams_per_peer: streams that one peer may have open to this node.
        max_streams: streams that all peers together may have open to this node.
        idle_timeout_s: seconds without a message after which a served stream is closed.
        frame_timeout_s: seconds in which, in the middle of a frame, half of what `Limits.slowest_rate` would bring has to come or be taken;
            else the stream is given up, on both sides.
        max_rate: requests a second that are read from one peer, over all its streams; above that it waits. A burst of two seconds is free.
            None where what a request takes (KV cache, a place in the queue) bounds it well enough.
    """

    id: str
    limits: FrameLimits = field(default_factory=FrameLimits)
    max_streams_per_peer: int = 64
    max_streams: int = 1024
    idle_timeout_s: float = 60.0
    frame_timeout_s: float = 30.0
    max_rate: float | None = None


INFERENCE = Protocol(
    f"/petalnet/inference/{PROTOCOL}.0.0",
    # A prefill of 4096 tokens of hidden size 8192 in float32 is 128 MiB; deep prompts may double that.
    limits=FrameLimits(header=16 * 1024, payload=256 * 1024 * 1024),
    # A session is a stream; a machine that serves a room of users sits behind one peer id.
    max_streams_per_peer=128,
    # A backstop for memory (a few KB each): the KV cache admits far fewer sessions than this.
    max_streams=2048,
    # The session manager closes idle sessions first; this one is for streams on which no session was ever opened.
    idle_timeout_s=3600.0,
    # A server that computes a prompt's chunk, or those of others first, reads no further meanwhile: longer than clients wait for an answer
    # by themselves (180 s). Who is gone is noticed by its heartbeat.
    frame_timeout_s=200.0,
)

PUSH = Protocol(
    f"/petalnet/push/{PROTOCOL}.0.0",
    # The same messages as of an inference session, from the server before instead of its client.
    limits=FrameLimits(header=16 * 1024, payload=256 * 1024 * 1024),
    # One for each session that two neighbours share, well below what one connection may have: the sessions above go through their clients.
    max_streams_per_peer=192,
    max_streams=2048,
    # As of an inference session, whose end ends the link as well.
    idle_timeout_s=3600.0,
    frame_timeout_s=200.0,
)

FORWARD = Protocol(
    f"/petalnet/forward/{PROTOCOL}.0.0",
    # A micro-batch of activations and its gradient in one frame.
    limits=FrameLimits(header=16 * 1024, payload=512 * 1024 * 1024),
    max_streams_per_peer=64,
    max_streams=512,
    # A trainer keeps a stream between its steps, and a step through many hops takes a while.
    idle_timeout_s=600.0,
)

RECORDS = Protocol(
    f"/petalnet/records/{PROTOCOL}.0.0",
    # Answers carry up to a few hundred records of 4 KB in the header; there are no arrays.
    limits=FrameLimits(header=1024 * 1024, payload=0),
    # Requests take milliseconds.
    max_streams_per_peer=16,
    max_streams=512,
    idle_timeout_s=120.0,
    frame_timeout_s=5.0,
    # A server stores its record under two keys once in 15 s, a client looks up once in 10 s: this is a hundred times as much.
    max_rate=20.0,
)

WEIGHTS = Protocol(
    f"/petalnet/weights/{PROTOCOL}.0.0",
    # A manifest of 16 MiB is the longest; chunks have 4 MiB. Headers name a few dozen blocks, with a bit for each chunk of those under way.
    limits=FrameLimits(header=64 * 1024, payload=16 * 1024 * 1024),
    # One for chunks, one for what can be had, and as many that are about to end.
    max_streams_per_peer=4,
    # Each may hold a chunk that its peer is slow to take: 192 MiB. Who finds no place turns to others that have the same.
    max_streams=48,
    # A newcomer that has all it wants from here says so by closing; one that waits for what others have yet to get asks now and then.
    idle_timeout_s=120.0,
    frame_timeout_s=30.0,
    # Chunks at 800 MB/s. How much of the line all of them may take together is the host's choice (`max_upload_rate`).
    max_rate=200.0,
)

PING = Protocol(
    f"/petalnet/ping/{PROTOCOL}.0.0",
    limits=FrameLimits(header=256, payload=0),
    # One for each connection, and two peers that dial each other at once have two connections for a while.
    max_streams_per_peer=4,
    max_streams=2048,
    # Well over the interval of heartbeats in a crowded node.
    idle_timeout_s=120.0,
    frame_timeout_s=10.0,
    # Each side pings every 2 s, and ten times a second while many of its sessions wait for steps that are late.
    max_rate=20.0,
)

REACHABILITY = Protocol(
    f"/petalnet/reachability/{PROTOCOL}.0.0",
    limits=FrameLimits(header=1024, payload=0),
    # A question whether it is reached, one where it is seen, and one more for what ends slowly.
    max_streams_per_peer=3,
    max_streams=64,
    idle_timeout_s=20.0,
    frame_timeout_s=5.0,
    # A node asks when it starts, when its addresses change, once in minutes, and before it punches a hole.
    max_rate=1.0,
)

PROTOCOLS = (INFERENCE, PUSH, FORWARD, RECORDS, WEIGHTS, PING, REACHABILITY)
