"""The secured channel under every connection: libp2p's Noise handshake, then a session of our own.

The session is the standard one on the wire. It differs from the stock session in these ways, and peers whose identity is not an ed25519
key are turned away:

- encrypting is apart from sending: what was encrypted is sent, whoever is cancelled meanwhile. (A frame that was encrypted but not sent
  would use up a nonce and kill the whole connection, with everybody's streams in it.)
- it reads from the socket in large pieces, instead of twice for each message, and writes several messages at once;
- it notes when the peer was last heard, which the heartbeats use, and counts bytes.

Right after the handshake, before anything else is read or said, `Admission` decides whether the peer may stay. In a private swarm the
swarm's key is mixed into the handshake itself (Noise's XXpsk0 in place of XX), so that who does not have it cannot even read whom it has
reached.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import trio
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from libp2p.abc import IRawConnection, ISecureConn
from libp2p.connection_types import ConnectionType
from libp2p.crypto.keys import KeyPair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.security.base_session import BaseSession
from libp2p.security.noise.io import NoiseTransportReadWriter
from libp2p.security.noise.patterns import IPattern, PatternXX
from libp2p.security.noise.transport import PROTOCOL_ID, Transport
from libp2p.security.secure_session import SecureSession
from libp2p.transport.exceptions import SecurityUpgradeFailure
from multiaddr import Multiaddr

from petalnet.p2p.admission import Admission
from petalnet.p2p.identity import public_key_bytes
from petalnet.p2p.protocols import Limits
from petalnet.p2p.transport import TcpStream

NOISE_ID = PROTOCOL_ID
MAX_PLAIN = 65519
"""Bytes in one message of a Noise channel: 65535 less the tag."""
TAG = 16
_BUFFER = 4 * (2 + MAX_PLAIN + TAG)
_READS_A_TURN = 16
"""Reads of what is there already, after which other tasks have their turn."""

Buffer = bytes | bytearray | memoryview


class _Wire(Protocol):
    """What a session needs of the connection beneath: a TcpStream has it."""

    def established(self) -> None: ...
    def round_trip_s(self) -> float | None: ...
    def bytes_s(self) -> float | None: ...
    def try_send(self, data: Buffer) -> int: ...
    async def send_some(self, data: Buffer) -> int: ...
    async def receive_into(self, buffer: memoryview) -> int: ...


class _Circuit:
    """A connection that is no socket of ours (one through a relay), as a session needs it."""

    def __init__(self, raw: RawConnection) -> None:
        self._raw = raw

    def established(self) -> None:
        """A relay has admitted the connection long ago."""

    def round_trip_s(self) -> float | None:
        return None

    def bytes_s(self) -> float | None:
        return None

    def try_send(self, data: Buffer) -> int:
        return 0

    async def send_some(self, data: Buffer) -> int:
        await self._raw.write(bytes(data))
        return len(data)

    async def receive_into(self, buffer: memoryview) -> int:
        data = await self._raw.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class NoiseSession(BaseSession):
    """A Noise session after its handshake. One task receives at a time.

    Attributes:
        handshake_hash: of the whole handshake, the same on both sides and on no other connection.
        last_heard: trio time at which bytes last came from the peer.
        bytes_in, bytes_out: bytes on the wire since the handshake.
        on_received: is told how many bytes came; False ends the connection.
        broken: True once the connection has failed or was given up, which the layers above learn a little later.
    """

    def __init__(self, handshaken: SecureSession, limits: Limits) -> None:
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
        noise = channel.noise_state.noise_protocol
        self._raw = raw
        self._wire: _Wire = raw.stream if isinstance(raw.stream, TcpStream) else _Circuit(raw)
        self._write_timeout = limits.write_timeout
        self._cipher_out, self._send_nonce = ChaCha20Poly1305(noise.cipher_state_encrypt.k), noise.cipher_state_encrypt.n
        self._cipher_in, self._receive_nonce = ChaCha20Poly1305(noise.cipher_state_decrypt.k), noise.cipher_state_decrypt.n
        self._sealed = bytearray(_BUFFER)
        self._sealed_size = 0
        self._plain = bytearray()
        self._reads = 0
        self.handshake_hash: bytes = noise.handshake_hash
        self.bytes_in = self.bytes_out = 0
        self.on_received: Callable[[int], bool] = lambda size: True
        self.broken = False
        self.last_heard = trio.current_time()

    def get_remote_address(self) -> tuple[str, int] | None:
        return self._raw.get_remote_address()

    def get_transport_addresses(self) -> list[Multiaddr]:
        return self._raw.get_transport_addresses()

    def get_connection_type(self) -> ConnectionType:
        return self._raw.get_connection_type()

    def established(self) -> None:
        """Say that the connection is through with its handshakes."""
        self._wire.established()

    def round_trip_s(self) -> float | None:
        """The shortest round trip on the wire, seconds, where it is known there."""
        return self._wire.round_trip_s()

    def bytes_s(self) -> float | None:
        """Bytes a second that the link has been seen to carry away from here, where that is known."""
        return self._wire.bytes_s()

    # ---- receiving

    async def receive(self) -> list[bytes]:
        """The next decrypted bytes, in pieces; waits for one at least.

        Raises ConnectionClosedError where the connection has ended or what came was not encrypted by the peer.
        """
        if self._plain:
            plain, self._plain = self._plain, bytearray()
            return [bytes(plain)]
        return await self._receive_more()

    async def _receive_more(self) -> list[bytes]:
        while True:
            if self.broken:
                raise ConnectionClosedError("the connection was given up")
            try:
                with memoryview(self._sealed) as view, view[self._sealed_size :] as free:
                    size = await self._wire.receive_into(free)
            except ConnectionClosedError:
                self.broken = True
                raise
            if not size:
                self.broken = True
                raise ConnectionClosedError("the peer closed the connection")
            self.last_heard = trio.current_time()
            self.bytes_in += size
            self._sealed_size += size
            if not self.on_received(size):
                await self.abort()
                raise ConnectionClosedError("the peer sent more than it was granted")
            if pieces := self._unseal():
                return pieces

    def _unseal(self) -> list[bytes]:
        """Decrypt the messages that are complete."""
        sealed, size, start = self._sealed, self._sealed_size, 0
        pieces = []
        with memoryview(sealed) as view:
            while size - start >= 2:
                end = start + 2 + (sealed[start] << 8 | sealed[start + 1])
                if end > size:
                    break
                try:
                    pieces.append(self._cipher_in.decrypt(_nonce(self._receive_nonce), view[start + 2 : end], None))
                except InvalidTag:
                    self.broken = True
                    raise ConnectionClosedError("a message was not encrypted by the peer") from None
                self._receive_nonce += 1
                start = end
            if start:
                view[: size - start] = view[start:size]
                self._sealed_size = size - start
        return pieces

    async def read(self, n: int | None = None) -> bytes:
        """Exactly `n` bytes, or fewer where the connection ends before; with None whatever comes next.

        For the negotiation of a muxer, and for the stock one. Raises ConnectionClosedError as `receive` does.
        """
        if n is None:
            return b"".join(await self.receive())
        plain = self._plain
        if len(plain) < n:
            try:
                while len(plain) < n:
                    for piece in await self._receive_more():
                        plain += piece
            except ConnectionClosedError:
                if not plain:
                    raise
        else:
            await self._turn()
        data = bytes(plain[:n])
        del plain[:n]  # from the front, which copies nothing
        return data

    async def _turn(self) -> None:
        """Let others run, now and then: whoever reads word by word finds thousands of them in what has come."""
        self._reads += 1
        if self._reads % _READS_A_TURN:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await trio.lowlevel.checkpoint()

    @property
    def unread(self) -> int:
        """Decrypted bytes that wait to be read, or for more that is asked for with them."""
        return len(self._plain)

    # ---- sending

    def seal(self, pieces: Sequence[Buffer]) -> bytearray:
        """Encrypt bytes, given in pieces. The result has to be sent before that of the next call."""
        plain = memoryview(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        size = len(plain)
        count = -(-size // MAX_PLAIN)
        sealed = bytearray(size + count * (2 + TAG))
        with memoryview(sealed) as view:
            position = 0
            for start in range(0, size, MAX_PLAIN):
                piece = plain[start : start + MAX_PLAIN]
                end = position + 2 + len(piece) + TAG
                view[position : position + 2] = (len(piece) + TAG).to_bytes(2, "big")
                self._cipher_out.encrypt_into(_nonce(self._send_nonce), piece, None, view[position + 2 : end])
                self._send_nonce += 1
                position = end
        return sealed

    def try_send(self, sealed: Buffer) -> int:
        """Send as many encrypted bytes as go out at once, and return how many. Raises ConnectionClosedError."""
        if self.broken:
            raise ConnectionClosedError("the connection was given up")
        try:
            sent = self._wire.try_send(sealed)
        except ConnectionClosedError:
            self.broken = True
            raise
        self.bytes_out += sent
        return sent

    async def send_some(self, sealed: Buffer) -> int:
        """Send encrypted bytes, one at least, and return how many. Raises ConnectionClosedError, also where the peer takes nothing."""
        if self.broken:
            raise ConnectionClosedError("the connection was given up")
        with trio.move_on_after(self._write_timeout):
            try:
                sent = await self._wire.send_some(sealed)
            except ConnectionClosedError:
                self.broken = True
                raise
            self.bytes_out += sent
            return sent
        await self.abort()
        raise ConnectionClosedError(f"the peer took nothing for {self._write_timeout:g} s")

    async def write(self, data: bytes) -> None:
        """Send `data`, all of it even when cancelled. For the negotiation of a muxer. Raises ConnectionClosedError."""
        with trio.CancelScope(shield=True):  # send_some has a deadline
            sealed = memoryview(self.seal([data]))
            sent = self.try_send(sealed)
            while sent < len(sealed):
                sent += await self.send_some(sealed[sent:])

    async def abort(self) -> None:
        """End the connection at once, without a word to the peer; reads and writes under way fail."""
        self.broken = True
        await self._raw.close()

    async def close(self) -> None:
        await self.abort()


def _nonce(counter: int) -> bytes:
    return b"\0\0\0\0" + counter.to_bytes(8, "little")


class _KeyedXX(PatternXX):
    """Noise's XX handshake with a key of 32 bytes mixed in before its first message."""

    def __init__(self, transport: Transport, key: bytes) -> None:
        super().__init__(transport.local_peer, transport.libp2p_privkey, transport.noise_privkey)
        self.protocol_name = b"Noise_XXpsk0_25519_ChaChaPoly_SHA256"
        self._key = key

    def create_noise_state(self, prologue: bytes | None = None) -> Any:  # of a package that libp2p brings along, without types
        state = super().create_noise_state(prologue)
        state.set_psks(psk=self._key)
        return state


class Noise(Transport):
    """libp2p's Noise handshake that yields sessions of ours, with peers that are admitted."""

    def __init__(self, key_pair: KeyPair, admission: Admission, limits: Limits) -> None:
        super().__init__(key_pair, noise_privkey=create_x25519_key_pair().private_key)
        self._admission = admission
        self._limits = limits

    def get_pattern(self) -> IPattern:
        key = self._admission.handshake_key
        return super().get_pattern() if key is None else _KeyedXX(self, key)

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        try:
            secured = await super().secure_inbound(conn)
        except InvalidTag as error:
            raise SecurityUpgradeFailure(f"the peer at {conn.get_remote_address()} does not have the swarm's key") from error
        return await self._admit(secured)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        try:
            with trio.fail_after(self._limits.handshake_timeout):  # libp2p's own deadline is for what comes after it
                return await self._admit(await super().secure_outbound(conn, peer_id))
        except trio.TooSlowError as error:
            raise SecurityUpgradeFailure(f"the peer did not finish the handshake within {self._limits.handshake_timeout:g} s") from error
        except (InvalidTag, IOException, OSError) as error:
            # With another key, each side finds the other's messages unreadable, and whoever finds it first goes away.
            if self._admission.handshake_key is not None:
                raise self._admission.refused_by(str(peer_id)) from error
            raise

    async def _admit(self, secured: ISecureConn) -> NoiseSession:
        if not isinstance(secured, SecureSession):
            raise TypeError(f"a Noise handshake gave a {type(secured).__name__}")
        peer_id = str(secured.remote_peer)
        if public_key_bytes(peer_id) is None:  # nothing above could name such a peer, or check what it signs
            raise SecurityUpgradeFailure(f"peer {peer_id} has no ed25519 key")
        self._admission.check(peer_id)
        session = NoiseSession(secured, self._limits)
        await self._admission.prove(session, session.handshake_hash, initiator=session.is_initiator)
        return session
