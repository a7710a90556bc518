from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnet.errors import UsageError
from petalnet.p2p.identity import Identity, public_key_bytes, verify_signature


def test_peer_id_and_key_file_are_those_of_libp2p(tmp_path) -> None:
    from libp2p.crypto.ed25519 import Ed25519PrivateKey
    from libp2p.peer.id import ID

    identity = Identity.generate()
    theirs = Ed25519PrivateKey.from_bytes(identity.private_bytes)
    assert identity.peer_id == str(ID.from_pubkey(theirs.get_public_key()))
    assert identity.peer_id.startswith("12D3Koo")
    path = tmp_path / "theirs.key"
    path.write_bytes(theirs.serialize())
    assert Identity.load_or_create(path).peer_id == identity.peer_id


def test_a_new_identity_is_kept_in_a_private_file(tmp_path) -> None:
    path = tmp_path / "deep" / "folder" / "identity.key"
    first = Identity.load_or_create(path)
    assert Identity.load_or_create(path).peer_id == first.peer_id
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["identity.key"]


def test_those_who_make_the_same_file_at_once_agree(tmp_path) -> None:
    path = tmp_path / "identity.key"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: Identity.load_or_create(path).peer_id, range(16)))
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    "content", [b"", b"rubbish", b"\x08\x01\x12\x40" + bytes(63), b"\x08\x01\x12\x40" + bytes(64), b"\x08\x00" + bytes(66)]
)
def test_rubbish_is_refused_and_left_alone(tmp_path, content: bytes) -> None:
    path = tmp_path / "identity.key"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"identity\.key is not an identity file"):
        Identity.load_or_create(path)
    assert path.read_bytes() == content


def test_a_path_that_cannot_be_a_file_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        Identity.load_or_create(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="cannot"):
        Identity.load_or_create(tmp_path / "file" / "identity.key")


@given(st.binary(max_size=200), st.integers(0, 63), st.integers(1, 255))
def test_a_signature_holds_for_its_data_and_signer_only(data: bytes, place: int, change: int) -> None:
    identity, other = Identity(bytes(32)), Identity(bytes([1]) * 32)
    signature = identity.sign(data)
    assert verify_signature(identity.peer_id, data, signature)
    assert not verify_signature(other.peer_id, data, signature)
    assert not verify_signature(identity.peer_id, data + b"!", signature)
    bad = bytearray(signature)
    bad[place] ^= change
    assert not verify_signature(identity.peer_id, data, bytes(bad))
    assert not verify_signature(identity.peer_id, data, signature[:-1])


@given(st.text(max_size=80))
def test_no_text_breaks_the_reading_of_a_peer_id(text: str) -> None:
    assert public_key_bytes(text) is None
    assert not verify_signature(text, b"", bytes(64))


def test_only_the_one_form_of_a_peer_id_is_it() -> None:
    peer_id = Identity.generate().peer_id
    assert public_key_bytes(peer_id) is not None
    for other in (peer_id + " ", " " + peer_id, peer_id[:-1], "1" + peer_id, peer_id.lower()):
        assert public_key_bytes(other) is None
