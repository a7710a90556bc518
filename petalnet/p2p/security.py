"""The secured channel under every connection: libp2p's Noise handshake, then a session of our own.

The session is the standard one on the wire (protocol id /noise). It differs from the stock session in three ways, and peers whose
identity is not an ed25519 key are turned away:

- the write of a frame, once begun, is shielded from cancellation: a frame that was encrypted but not sent would use up a nonce and
  kill the whole connection, with everybody's streams in it. The shield has a deadline, after which the connection is given up;
- it reads from the socket in large pieces, instead of twice for each message;
- it notes when the peer was last heard, which the heartbeats use.
"""

from __future__ import annotations

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.base_session import BaseSession
from libp2p.security.noise.io import MAX_PLAINTEXT_LENGTH, NoiseTransportReadWriter
from libp2p.security.noise.transport import PROTOCOL_ID, Transport
from libp2p.security.secure_session import SecureSession
from libp2p.transport.exceptions import SecurityUpgradeFailure
from multiaddr import Multiaddr

from petalnet.p2p.identity import public_key_bytes

NOISE_ID = PROTOCOL_ID
WRITE_TIMEOUT_S = 15.0
"""Seconds in which the peer's side of the socket has to take one frame of at most 64 KB; the slowest useful uplink does."""
_READ_SIZE = 256 * 1024


class NoiseSession(BaseSession):
    """A Noise session after its handshake.

    One reader and one writer at a time, as the muxer above guarantees.

    Attributes:
        last_heard: trio time at which bytes last came from the peer.
        broken: True once the connection has failed or was given up, which the layers above learn a little later.
    """

    def __init__(self, handshaken: SecureSession) -> None:
        super().__init__(
            local_peer=handshaken.local_peer,
            local_private_key=handshaken.local_private_key,
            remote_peer=handshaken.remote_peer,
            remote_permanent_pubkey=handshaken.remote_permanent_pubkey,
            is_initiator=handshaken.is_initiator,
        )
        channel = handshaken.conn
        if not isinstance(channel, NoiseTransportReadWriter):
            raise TypeError(f"a finished Noise handshake is needed, not {type(channel).__name__}")
        raw = channel.read_writer.read_write_closer
        if not isinstance(raw, RawConnection):
            raise TypeError(f"a session over a {type(raw).__name__} is not supported")
        self._raw = raw
        sending = channel.noise_state.noise_protocol.cipher_state_encrypt
        receiving = channel.noise_state.noise_protocol.cipher_state_decrypt
        self._encrypt, self._send_nonce = ChaCha20Poly1305(sending.k).encrypt, sending.n
        self._decrypt, self._receive_nonce = ChaCha20Poly1305(receiving.k).decrypt, receiving.n
        self._sealed = bytearray()
        self._plain = bytearray()
        self.broken = False
        self.last_heard = trio.current_time()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._raw.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self._raw.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self._raw.get_connection_type()

    async def read(self, n: int | None = None) -> bytes:
        """Exactly `n` bytes, or fewer where the connection ends before; with None whatever comes next.

        Raises ConnectionClosedError where the connection has ended or what came was not encrypted by the peer.
        """
        plain = self._plain
        if n is None:
            while not plain:
                await self._fill()
            n = len(plain)
        while len(plain) < n:
            try:
                await self._fill()
            except ConnectionClosedError:
                if not plain:
                    raise
                n = len(plain)
        data = bytes(memoryview(plain)[:n])
        del plain[:n]
        return data

    async def _fill(self) -> None:
        """Add at least one decrypted message to `_plain`."""
        if self.broken:
            raise ConnectionClosedError("the connection was given up")
        sealed = self._sealed
        while len(sealed) < 2 or len(sealed) < 2 + int.from_bytes(sealed[:2], "big"):
            try:
                data = await self._raw.read(_READ_SIZE)
            except ConnectionClosedError:
                self.broken = True
                raise
            if not data:
                self.broken = True
                raise ConnectionClosedError("the peer closed the connection")
            self.last_heard = trio.current_time()
            sealed += data
        start, view = 0, memoryview(sealed)
        try:
            while len(sealed) - start >= 2:
                end = start + 2 + int.from_bytes(view[start : start + 2], "big")
                if end > len(sealed):
                    break
                self._plain += self._decrypt(_nonce(self._receive_nonce), view[start + 2 : end], None)
                self._receive_nonce += 1
                start = end
        except InvalidTag:
            self.broken = True
            raise ConnectionClosedError("a message was not encrypted by the peer") from None
        finally:
            view.release()
            del sealed[:start]

    async def write(self, data: bytes) -> None:
        """Send `data`, all of it even when cancelled. Raises ConnectionClosedError where the connection is gone or too slow."""
        if self.broken:
            raise ConnectionClosedError("the connection was given up")
        parts = []
        for start in range(0, len(data), MAX_PLAINTEXT_LENGTH):
            sealed = self._encrypt(_nonce(self._send_nonce), memoryview(data)[start : start + MAX_PLAINTEXT_LENGTH], None)
            self._send_nonce += 1
            parts += [len(sealed).to_bytes(2, "big"), sealed]
        with trio.CancelScope(shield=True, deadline=trio.current_time() + WRITE_TIMEOUT_S) as scope:
            try:
                await self._raw.write(b"".join(parts))
            except ConnectionClosedError:
                self.broken = True
                raise
        if scope.cancelled_caught:
            await self.abort()
            raise ConnectionClosedError(f"the peer took nothing for {WRITE_TIMEOUT_S:g} s")

    async def abort(self) -> None:
        """End the connection at once, without a word to the peer; reads and writes under way fail."""
        self.broken = True
        await self._raw.close()

    async def close(self) -> None:
        self.broken = True
        await self._raw.close()


def _nonce(counter: int) -> bytes:
    return b"\0\0\0\0" + counter.to_bytes(8, "little")


class Noise(Transport):
    """libp2p's Noise handshake that yields sessions of ours."""

    def __init__(self, key_pair: KeyPair) -> None:
        super().__init__(key_pair, noise_privkey=create_x25519_key_pair().private_key)

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        return _session_of(await super().secure_inbound(conn))

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        return _session_of(await super().secure_outbound(conn, peer_id))


def _session_of(secured: ISecureConn) -> NoiseSession:
    if not isinstance(secured, SecureSession):
        raise TypeError(f"a Noise handshake gave a {type(secured).__name__}")
    if public_key_bytes(str(secured.remote_peer)) is None:  # nothing above could name such a peer, or check what it signs
        raise SecurityUpgradeFailure(f"peer {secured.remote_peer} has no ed25519 key")
    return NoiseSession(secured)
