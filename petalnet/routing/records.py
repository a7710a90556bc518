"""What a server announces about itself, its coding, and the checks that a stranger's announcement has to pass.

A record is msgpack of a map of known fields. The signature is not part of it: `petalnet.p2p.signed` wraps the bytes, and `check`
compares the signer with the peer that the record speaks of.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, Literal

import msgpack

from petalnet.errors import RecordRejected
from petalnet.version import PROTOCOL

MAX_RECORD_BYTES = 3840
"""Records travel by gossip in messages below 4 KiB; this leaves 256 bytes for the signed envelope around them."""
MAX_LIFETIME = 3600.0
"""Seconds. Longer promises would keep a dead server in everybody's view for as long as it pleased."""
CLOCK_TOLERANCE = 600.0
"""Seconds by which a peer's clock may be ahead of ours or behind it."""
DIGEST_CHARS = 32
"""A block's digest is announced by its first 16 bytes: two blocks meet by chance once in 2^64, and 126 blocks fit into a record."""
MAX_BLOCKS = 4096
MAX_ADDRS = 16
MAX_ADAPTERS = 32
MAX_ADAPTERS_BYTES = 1536
"""Of the labels of a server's adapters together: a record has room for them beside addresses, even where it has none for digests."""
MAX_ROUND_TRIPS = 16
SLOWEST_BLOCK_S = 3600.0
"""Counted at most for a token and block: a rate next to zero would make times infinite."""

Work = Literal["decode", "prefill", "forward"]
"""What a server is asked for: one token after another, many tokens of a session at once, or a pass without a session."""


def next_sequence(last: int, now: float, *, told: int = 0) -> int:
    """The number of a server's next record.

    Args:
        last: that of the one before, 0 where there was none.
        now: unix seconds.
        told: the highest that others remember of this server, from a life in which its clock was ahead. What is too far ahead for that
            is a lie, and is left out.
    """
    milliseconds = int(now * 1000)
    furthest = milliseconds + int(2 * CLOCK_TOLERANCE * 1000)
    return max([milliseconds, *(number + 1 for number in (last, told) if number < furthest)])


class RecordForged(RecordRejected):
    """A record that no honest peer of any version makes or hands on: its signature does not hold, or is not its server's."""


class RecordOutOfTime(RecordRejected):
    """A record is from the future or long past, if the clocks are right.

    Attributes:
        ahead_s: seconds by which its server's clock is ahead of ours, if it has just been made.
    """

    def __init__(self, message: str, ahead_s: float) -> None:
        super().__init__(message)
        self.ahead_s = ahead_s


STATES = ("joining", "online", "draining", "left")

_BASE58 = re.compile(r"[1-9A-HJ-NP-Za-km-z]{1,64}")
_HEX = re.compile(r"[0-9a-f]*")
_TOKEN = re.compile(r"[!-~]*")  # printable ASCII without blanks


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRecord:
    """One server's announcement. Making one checks every field, whoever makes it.

    Attributes:
        peer_id: the server, base58.
        addrs: multiaddrs at which it can be reached.
        model: the discovery key of the model that it serves (text without blanks).
        model_name: what a person calls that model; a label, never trusted.
        span: blocks [a, b) that it holds, or will hold while joining.
        num_blocks: blocks of the whole model.
        state: "joining" (loading), "online", "draining" (takes no new sessions) or "left".
        dtype: what it computes in, as torch names it.
        quantization: "none", "int8", "nf4", …
        adapters: names of the adapters that it has loaded.
        version: petalnet's version there.
        protocol: the version of the protocols that it speaks (`version.PROTOCOL`).
        public_name: what its owner wants to be called, or None.
        block_digests: hex digests of its blocks in order, cut to `DIGEST_CHARS` characters; empty while they are not known.
        decode_tokens_s: tokens a second through its whole span, one at a time; 0 where it is not known. Likewise the next two:
        prefill_tokens_s: many tokens of one session at once;
        forward_tokens_s: stateless forward passes.
        free_kv_tokens: tokens for which there is room in the KV cache.
        queue: requests that wait for its compute thread.
        movable: whether it goes to other blocks by itself where the swarm needs it more; not where its owner chose the span.
        shares: whether others get weights from it.
        next_round_trips: (peer id, seconds) to servers that hold the blocks after its own.
        next_bytes_s: bytes a second that its links to these were seen to carry, 0 where that is not known; or nothing at all.
        sequence: grows from record to record of one server, over restarts too: the clock's milliseconds (see `next_sequence`).
        issued, expires: unix seconds.

    Raises:
        RecordRejected: a field has the wrong type or is out of range.
    """

    peer_id: str
    addrs: tuple[str, ...]
    model: str
    model_name: str
    span: tuple[int, int]
    num_blocks: int
    state: str
    dtype: str
    sequence: int
    issued: float
    expires: float
    quantization: str = "none"
    adapters: tuple[str, ...] = ()
    version: str = ""
    protocol: int = PROTOCOL
    public_name: str | None = None
    block_digests: tuple[str, ...] = ()
    decode_tokens_s: float = 0.0
    prefill_tokens_s: float = 0.0
    forward_tokens_s: float = 0.0
    free_kv_tokens: int = 0
    queue: int = 0
    next_round_trips: tuple[tuple[str, float], ...] = ()
    next_bytes_s: tuple[float, ...] = ()
    movable: bool = False
    shares: bool = False

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            try:
                object.__setattr__(self, name, check(getattr(self, name)))
            except ValueError as error:
                raise RecordRejected(f"field {name!r} of a server record: {error}") from None
        first, end = self.span
        if not first < end <= self.num_blocks:
            raise RecordRejected(f"a server record announces blocks {first}:{end} of a model of {self.num_blocks} blocks")
        if self.block_digests and len(self.block_digests) != end - first:
            raise RecordRejected(f"a server record has {len(self.block_digests)} digests for {end - first} blocks")
        if self.next_bytes_s and len(self.next_bytes_s) != len(self.next_round_trips):
            raise RecordRejected(f"a server record has {len(self.next_bytes_s)} rates for {len(self.next_round_trips)} links")
        if not self.issued < self.expires <= self.issued + MAX_LIFETIME:
            raise RecordRejected(f"a server record is valid for {self.expires - self.issued:g} s; 0 to {MAX_LIFETIME:g} s are allowed")

    def encode(self) -> bytes:
        """The record as bytes. Raises RecordRejected where it takes more than `MAX_RECORD_BYTES`."""
        values = {name: getattr(self, name) for name in _CHECKS}
        values["block_digests"] = [bytes.fromhex(digest) for digest in self.block_digests]
        data = bytes(msgpack.packb(values))
        if len(data) > MAX_RECORD_BYTES:
            raise RecordRejected(f"a server record of {len(data)} bytes is too long; {MAX_RECORD_BYTES} are allowed")
        return data

    @classmethod
    def decode(cls, data: bytes) -> ServerRecord:
        """The record in `data`; fields that this version does not know are left out. Raises RecordRejected."""
        if len(data) > MAX_RECORD_BYTES:
            raise RecordRejected(f"a server record of {len(data)} bytes is too long; {MAX_RECORD_BYTES} are allowed")
        try:
            values = msgpack.unpackb(data)
        except (ValueError, msgpack.UnpackException) as error:
            raise RecordRejected("a server record is not valid msgpack") from error
        if type(values) is not dict:
            raise RecordRejected("a server record is not a map of fields")
        known = _UNSAID | {name: value for name, value in values.items() if name in _CHECKS}
        missing = sorted(_REQUIRED - known.keys())
        if missing:
            raise RecordRejected(f"a server record lacks the field {missing[0]!r}")
        digests = known.get("block_digests", [])
        if type(digests) is not list or any(type(digest) is not bytes for digest in digests):
            raise RecordRejected("field 'block_digests' of a server record: a list of byte strings is needed")
        known["block_digests"] = [digest.hex() for digest in digests]
        return cls(**known)

    def check(self, *, signer: str, now: float) -> None:
        """Whether the record may be believed at `now` (unix seconds) when `signer` signed it. Raises RecordRejected."""
        if signer != self.peer_id:
            raise RecordForged(f"a record of {self.peer_id} is signed by {signer}")
        if self.protocol != PROTOCOL:
            raise RecordRejected(f"peer {self.peer_id} speaks version {self.protocol} of petalnet's protocols; this is version {PROTOCOL}")
        if self.issued > now + CLOCK_TOLERANCE:
            ahead = self.issued - now
            raise RecordOutOfTime(f"a record of {self.peer_id} comes from {ahead:.0f} s in the future, if the clocks are right", ahead)
        if self.sequence > (now + 3 * CLOCK_TOLERANCE) * 1000:
            # What a peer's clock made of it once must not keep out, for good, all that the peer announces later.
            ahead = self.sequence / 1000 - now
            raise RecordOutOfTime(f"a record of {self.peer_id} has a sequence number from the future: {self.sequence}", ahead)
        if self.expires <= now - CLOCK_TOLERANCE:
            ago = now - self.expires
            raise RecordOutOfTime(f"a record of {self.peer_id} expired {ago:.0f} s ago, if the clocks are right", self.issued - now)

    def received(self, now: float, age: float = 0.0) -> ServerRecord:
        """The record with its times as our own clock would have told them.

        How long it is valid is counted from when it left its author, not from what the author's clock said then.

        Args:
            now: unix seconds by our clock.
            age: seconds since the record left its author, as far as is known.
        """
        issued = max(now - max(age, 0.0), 0.0)
        return replace(self, issued=issued, expires=issued + min(self.expires - self.issued, MAX_LIFETIME))

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The keys under which the record may be stored: its model's and the one that all servers share."""
        return discovery_key(self.model), SWARM_KEY

    def block_s(self, work: Work) -> float | None:
        """Seconds that it says a token takes in one of its blocks; None where it does not say."""
        rate = {"decode": self.decode_tokens_s, "prefill": self.prefill_tokens_s, "forward": self.forward_tokens_s}[work]
        return min(1 / (rate * (self.span[1] - self.span[0])), SLOWEST_BLOCK_S) if rate > 0 else None

    def holds(self, block: int) -> bool:
        """Whether the block lies in the span."""
        return self.span[0] <= block < self.span[1]


def discovery_key(model: str) -> bytes:
    """The 32-byte key under which the records of a model's servers are stored; `model` is `ServerRecord.model`."""
    return hashlib.sha256(b"petalnet/model/1\0" + model.encode()).digest()


SWARM_KEY = hashlib.sha256(b"petalnet/swarm/1").digest()
"""The key under which every server's record is stored as well, so that a newcomer can learn which models there are."""


Check = Callable[[Any], Any]


def _integer(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"an integer from {low} to {high} is needed")
        return value

    return check


def _number(high: float) -> Check:
    def check(value: Any) -> float:
        if type(value) not in (int, float) or not 0 <= value <= high:  # NaN fails the comparison
            raise ValueError(f"a number from 0 to {high:g} is needed")
        return float(value)

    return check


def _truth(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError("true or false is needed")
    return value


def _label(longest: int) -> Check:
    """Text that a person reads: it is printed on terminals, so it may not carry control characters."""

    def check(value: Any) -> str:
        if type(value) is not str or len(value) > longest or not value.isprintable():
            raise ValueError(f"printable text of at most {longest} characters is needed")
        return value

    return check


def _token(longest: int, pattern: re.Pattern[str] = _TOKEN, *, shortest: int = 0) -> Check:
    def check(value: Any) -> str:
        if type(value) is not str or not shortest <= len(value) <= longest or not pattern.fullmatch(value):
            raise ValueError(f"{shortest} to {longest} characters of {pattern.pattern} are needed")
        return value

    return check


def _many(check: Check, most: int) -> Check:
    def check_all(value: Any) -> tuple[Any, ...]:
        if type(value) not in (list, tuple) or len(value) > most:
            raise ValueError(f"a list of at most {most} entries is needed")
        return tuple(check(entry) for entry in value)

    return check_all


def _pair(left: Check, right: Check) -> Check:
    def check(value: Any) -> tuple[Any, Any]:
        if type(value) not in (list, tuple) or len(value) != 2:
            raise ValueError("a pair is needed")
        return left(value[0]), right(value[1])

    return check


def _state(value: Any) -> str:
    if type(value) is not str or value not in STATES:
        raise ValueError(f"one of {', '.join(STATES)} is needed")
    return value


def _digest(value: Any) -> str:
    checked: str = _token(128, _HEX, shortest=DIGEST_CHARS)(value)
    return checked[:DIGEST_CHARS]


def _public_name(value: Any) -> str | None:
    return None if value is None else str(_label(64)(value))


_peer_id = _token(64, _BASE58, shortest=1)

_CHECKS: dict[str, Check] = {
    "peer_id": _peer_id,
    "addrs": _many(_token(256, re.compile(r"/[!-~]+")), MAX_ADDRS),
    "model": _token(128, shortest=1),
    "model_name": _label(128),
    "span": _pair(_integer(0, MAX_BLOCKS), _integer(0, MAX_BLOCKS)),
    "num_blocks": _integer(1, MAX_BLOCKS),
    "state": _state,
    "dtype": _token(20),
    "sequence": _integer(0, 2**63 - 1),
    "issued": _number(1e11),
    "expires": _number(1e11),
    "quantization": _token(20),
    "adapters": _many(_label(128), MAX_ADAPTERS),
    "version": _token(40),
    "protocol": _integer(0, 9999),
    "public_name": _public_name,
    "block_digests": _many(_digest, MAX_BLOCKS),
    "decode_tokens_s": _number(1e9),
    "prefill_tokens_s": _number(1e9),
    "forward_tokens_s": _number(1e9),
    "free_kv_tokens": _integer(0, 2**53),
    "queue": _integer(0, 10**6),
    "next_round_trips": _many(_pair(_peer_id, _number(3600)), MAX_ROUND_TRIPS),
    "next_bytes_s": _many(_number(1e12), MAX_ROUND_TRIPS),
    "movable": _truth,
    "shares": _truth,
}
_UNSAID: dict[str, Any] = {"movable": False, "protocol": 1}
"""What fields are taken for that servers of earlier versions do not send."""
_REQUIRED = frozenset(item.name for item in fields(ServerRecord) if item.default is MISSING)
"""A server of an earlier release may lack the others, whose defaults, or `_UNSAID`, say what that means."""
if _CHECKS.keys() != {item.name for item in fields(ServerRecord)}:
    raise TypeError("every field of ServerRecord needs its check")
