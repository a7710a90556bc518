from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnet.errors import RecordRejected
from petalnet.p2p.identity import Identity
from petalnet.p2p.signed import MAX_ENVELOPE_BYTES, open_signed, sign

IDENTITY, OTHER = Identity(bytes(32)), Identity(bytes([1]) * 32)


@given(st.binary(max_size=3840))
def test_an_envelope_gives_its_signer_and_payload(payload: bytes) -> None:
    envelope = sign(IDENTITY, payload)
    assert open_signed(envelope) == (IDENTITY.peer_id, payload)
    assert len(envelope) <= len(payload) + 256


@given(st.binary(max_size=100), st.data())
def test_no_bit_of_an_envelope_can_be_changed(payload: bytes, data: st.DataObject) -> None:
    envelope = bytearray(sign(IDENTITY, payload))
    envelope[data.draw(st.integers(0, len(envelope) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(RecordRejected):
        open_signed(bytes(envelope))


@given(st.binary(max_size=200))
def test_rubbish_is_rejected(data: bytes) -> None:
    with pytest.raises(RecordRejected):
        open_signed(data)


def test_a_signature_for_another_purpose_is_none() -> None:
    for signature in (IDENTITY.sign(b"payload"), OTHER.sign(b"payload")):
        with pytest.raises(RecordRejected, match="does not hold"):
            open_signed(msgpack.packb((IDENTITY.peer_id, b"payload", signature)))


def test_envelopes_are_bounded() -> None:
    with pytest.raises(RecordRejected, match="too long"):
        sign(IDENTITY, bytes(MAX_ENVELOPE_BYTES))
    with pytest.raises(RecordRejected, match="too long"):
        open_signed(bytes(MAX_ENVELOPE_BYTES + 1))
