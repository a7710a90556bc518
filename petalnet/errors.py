"""The exceptions that a user or a program can meet, and the codes by which they travel between peers.

An error has a class, and the class decides who acts on it:

- *caller*: the request itself is wrong; it is raised to the user at once, never retried, and the server is not blamed;
- *too large*: the server will never have the room; go elsewhere, and where nobody else is it is the caller's fault;
- *busy*: the server has no room now, or is about to leave; wait within a bound or go elsewhere, nobody is avoided for being full;
- *moved*: the blocks are not with this server any more; go elsewhere, nobody is avoided for that;
- *graph gone*, *LoRA gone*: the server has dropped what the client left there, as it may; the client brings it again, nobody is blamed;
- *server*: the server is dead, late or wrong; the route changes and the server is avoided for a while;
- *unsupported*: the peer speaks a newer or older dialect; treated as the server's fault by a caller, harmless otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

LONGEST_ANSWER = 200
"""Characters of what one peer answered, in the error of a request that several were asked for."""
MOST_NAMED = 8
"""Peers that such an error names; its attributes have all of them."""


class PetalnetError(Exception):
    """Base of every error that petalnet raises on purpose. `code` is its class on the wire.

    Attributes:
        answers: in the last error of a request that servers were asked for: what each of them answered, one line, by its peer id, in the
            order in which they were asked.
    """

    code = "server"
    answers: Mapping[str, str] = MappingProxyType({})


class UsageError(PetalnetError, ValueError):
    """A person asked for something that cannot be; the message is one line that says what to do instead."""

    code = "caller"


class NoSwarmError(UsageError):
    """No bootstrap peers were given and none could be found."""


class ModelError(UsageError):
    """A model cannot be read or cannot be split into blocks; the message says which and why."""


class AddressInUse(UsageError):
    """A listening address is taken by another program."""


class CallerError(PetalnetError, ValueError):
    """The request is wrong (shape, range, length, unknown adapter); repeating it would not help."""

    code = "caller"


class TooLargeError(CallerError):
    """The request needs more room than a server has in all: no waiting would help there, another server might."""

    code = "too_large"


class BusyError(PetalnetError):
    """A server has no room at the moment.

    Attributes:
        retry_after_s: seconds after which another try may succeed, as the server estimates.
        fits_tokens: KV tokens (rows × their max_length) that the server could promise now; 0 where that is not known.
    """

    code = "busy"

    def __init__(self, message: str, retry_after_s: float = 1.0, fits_tokens: int = 0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.fits_tokens = fits_tokens


class MovedError(BusyError):
    """The blocks that were asked for are not served here, or not any more: what the asking side knows of this server is out of date."""

    code = "moved"


class GraphGone(PetalnetError):
    """A server does not keep the graph that a backward pass names (any more): the pass has to be given with its inputs."""

    code = "graph_gone"


class LoraGone(PetalnetError):
    """A server does not have the LoRA parameters that a request names (any more): they have to be put there (again)."""

    code = "lora_gone"


class ServerError(PetalnetError, RuntimeError):
    """A peer failed at something that it should have done.

    Attributes:
        peer_id: the peer, or None where it is not known or nobody is to blame.
        said: what was wrong, without who it was; "" where the message has no more than that.
    """

    code = "server"

    def __init__(self, message: str, peer_id: str | None = None, *, said: str = "") -> None:
        super().__init__(message)
        self.peer_id = peer_id
        self.said = said


class PeerLost(ServerError, ConnectionError):
    """The connection or the stream to a peer ended in the middle of work."""


class PeerLate(PeerLost):
    """A peer does not answer for the moment: it hangs, or the network on the way to it does. It may be back before long."""


class PeerUnreachable(ServerError, ConnectionError):
    """None of a peer's addresses answered as that peer within the deadline."""


class NotAdmitted(PeerUnreachable):
    """One side of a connection does not admit the other: the swarm is private, or a list names the peer. One line for a person."""


class ProtocolError(ServerError):
    """A peer sent something that the protocol does not allow."""


class UnsupportedError(ServerError):
    """A peer does not know a message type, a version or a protocol."""

    code = "unsupported"


class SessionClosed(PetalnetError, RuntimeError):
    """An inference session was closed, or ended with the failure that the message tells."""


class RecordRejected(PetalnetError, ValueError):
    """A server record's signature, times or ranges do not hold."""


class MissingBlocksError(PetalnetError, RuntimeError):
    """Some blocks of a model have no reachable server.

    Attributes:
        blocks: the block numbers, ascending.
        peers_asked: ids of the peers that were considered or tried.
        hint: why, where that is known; empty otherwise.
    """

    def __init__(
        self, blocks: Iterable[int], peers_asked: Iterable[str] = (), *, hint: str = "", answers: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self.blocks = sorted(set(blocks))
        self.peers_asked = sorted({*peers_asked, *answers})
        self.hint = hint
        self.answers = answers
        silent = [peer_id for peer_id in self.peers_asked if peer_id not in answers]
        named = describe_peers({**answers, **dict.fromkeys(silent, "")})
        asked = (
            f"asked {len(self.peers_asked)} peer{'s' * (len(self.peers_asked) > 1)}: {named}" if self.peers_asked else "no server is known"
        )
        super().__init__(f"no server holds {describe_blocks(self.blocks)} ({asked}){': ' + hint if hint else ''}")


def short_id(peer_id: str) -> str:
    """A peer as it is named to people, who compare the ends of ids."""
    return f"…{peer_id[-6:]}"


def describe_peers(answers: Mapping[str, str]) -> str:
    """Peers and what they answered ("" for nothing), on one line: "…abc123: it has no room; …def456"."""
    shown = [f"{short_id(peer_id)}: {answer}" if answer else short_id(peer_id) for peer_id, answer in answers.items()]
    more = f"; and {len(shown) - MOST_NAMED} more" if len(shown) > MOST_NAMED else ""
    return "; ".join(shown[:MOST_NAMED]) + more


def describe_blocks(blocks: Iterable[int]) -> str:
    """`[0, 1, 2, 5]` as "blocks 0-2, 5"."""
    runs: list[list[int]] = []
    for block in sorted(set(blocks)):
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"block{'s' if len(runs) != 1 or (runs and runs[0][0] != runs[0][1]) else ''} {text}"


def one_line(text: str) -> str:
    """A peer's words as they may stand in a log or on a terminal: on one line, and without control characters."""
    return "".join(char if char.isprintable() else " " for char in text)


def to_wire(error: PetalnetError) -> tuple[str, str, float, int]:
    """`(code, message, retry_after_s, fits_tokens)` of an error that is to be told to a peer."""
    retry_after_s, fits_tokens = (error.retry_after_s, error.fits_tokens) if isinstance(error, BusyError) else (0.0, 0)
    return error.code, str(error)[:1000], retry_after_s, fits_tokens


def from_wire(code: str, message: str, retry_after_s: float, fits_tokens: int, peer_id: str) -> PetalnetError:
    """The exception for an error that the peer `peer_id` told us."""
    message = one_line(message)
    if code == "caller":
        return CallerError(message)
    if code == "too_large":
        return TooLargeError(message)
    if code == "busy":
        return BusyError(message, retry_after_s, fits_tokens)
    if code == "moved":
        return MovedError(message, retry_after_s, fits_tokens)
    if code == "graph_gone":
        return GraphGone(message)
    if code == "lora_gone":
        return LoraGone(message)
    if code == "unsupported":
        return UnsupportedError(message, peer_id)
    return ServerError(f"peer {peer_id} failed: {message}", peer_id)
