"""The signed envelope around what a node announces.

    msgpack [peer id, payload, signature]

The signature is over the payload with a prefix of its own, so that nothing signed for another purpose passes for an announcement.
The peer id holds the public key, so the envelope can be checked by whoever gets it from wherever.
"""

from __future__ import annotations

import msgpack

from petalnet.errors import RecordRejected
from petalnet.p2p.identity import Identity, verify_signature
from petalnet.routing.records import RecordForged

MAX_ENVELOPE_BYTES = 4096
"""What gossip carries in one message."""
_PURPOSE = b"petalnet/record/1\0"


def sign(identity: Identity, payload: bytes) -> bytes:
    """The envelope of `payload`. Raises RecordRejected where it would be too long to travel."""
    envelope: bytes = msgpack.packb((identity.peer_id, payload, identity.sign(_PURPOSE + payload)))
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise RecordRejected(f"a signed record of {len(envelope)} bytes is too long; {MAX_ENVELOPE_BYTES} are allowed")
    return envelope


def open_signed(data: bytes) -> tuple[str, bytes]:
    """The signer's peer id and the payload. Raises RecordForged where the envelope is malformed or the signature does not hold."""
    if len(data) > MAX_ENVELOPE_BYTES:
        raise RecordForged(f"a signed record of {len(data)} bytes is too long; {MAX_ENVELOPE_BYTES} are allowed")
    try:
        parts = msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException) as error:
        raise RecordForged("a signed record is not valid msgpack") from error
    if type(parts) is not list or [type(part) for part in parts] != [str, bytes, bytes]:
        raise RecordForged("a signed record does not have the form of one")
    peer_id, payload, signature = parts
    if not verify_signature(peer_id, _PURPOSE + payload, signature):
        raise RecordForged(f"the signature of a record of {peer_id[:64]!r} does not hold")
    return peer_id, payload
