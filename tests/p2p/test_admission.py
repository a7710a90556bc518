"""Who may be connected: the lists, the ban, and the proof of a swarm's key, here over streams in memory and on trio's clock."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectClientError
from libp2p.transport.exceptions import MuxerUpgradeFailure, SecurityUpgradeFailure

from petalnet.errors import NotAdmitted, PeerUnreachable
from petalnet.p2p.admission import MOST_REFUSALS, PRIVATE_NOISE_ID, PROOF_SIZE, Admission
from petalnet.p2p.identity import Identity
from petalnet.p2p.swarm_key import SwarmKey

KEY, OTHER_KEY = SwarmKey(bytes(32)), SwarmKey(b"\1" * 32)
PEER, OTHER_PEER = Identity(bytes(32)).peer_id, Identity(b"\1" * 32).peer_id
HASH = bytes(range(32))


class MemoryChannel:
    """A channel in memory with the manners of `NoiseSession`; `sent` is all that went out."""

    def __init__(self, stream: trio.StapledStream, peer_id: str) -> None:
        self._stream, self._peer_id = stream, peer_id
        self.sent = b""

    def get_remote_peer(self) -> ID:
        return ID.from_string(self._peer_id)

    async def read(self, n: int | None = None) -> bytes:
        data = b""
        while n is None or len(data) < n:
            try:
                more = await self._stream.receive_some(None if n is None else n - len(data))
            except trio.BrokenResourceError:
                more = b""
            if not more:
                if not data:
                    raise ConnectionClosedError("the peer closed the connection")
                break
            data += more
            if n is None:
                break
        return data

    async def write(self, data: bytes) -> None:
        self.sent += data
        try:
            await self._stream.send_all(data)
        except trio.BrokenResourceError:
            raise ConnectionClosedError("the connection is gone") from None

    async def close(self) -> None:
        await self._stream.aclose()


def channels() -> tuple[MemoryChannel, MemoryChannel]:
    """The initiator's end and the responder's."""
    one, other = trio.testing.memory_stream_pair()
    return MemoryChannel(one, OTHER_PEER), MemoryChannel(other, PEER)


async def proofs(
    initiator: Admission, responder: Admission, hashes: tuple[bytes, bytes] = (HASH, HASH)
) -> tuple[NotAdmitted | None, NotAdmitted | None, MemoryChannel, MemoryChannel]:
    """Both sides at once; a side that refuses ends the connection, as its caller does. What each raised, and its channel."""
    ends = channels()
    failed: list[NotAdmitted | None] = [None, None]

    async def prove(place: int, admission: Admission) -> None:
        try:
            await admission.prove(ends[place], hashes[place], initiator=place == 0)
        except NotAdmitted as error:
            failed[place] = error
            await ends[place].close()

    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prove, 0, initiator)
            nursery.start_soon(prove, 1, responder)
    return failed[0], failed[1], *ends


async def test_holders_of_the_same_key_admit_each_other(autojump_clock: trio.testing.MockClock) -> None:
    one, other, first, second = await proofs(Admission(swarm_key=KEY), Admission(swarm_key=KEY))
    assert (one, other) == (None, None)
    assert len(first.sent) == len(second.sent) == PROOF_SIZE and first.sent != second.sent


async def test_another_key_is_refused_and_learns_nothing(autojump_clock: trio.testing.MockClock) -> None:
    one, other, _, second = await proofs(Admission(swarm_key=OTHER_KEY), Admission(swarm_key=KEY))
    assert one is not None and one.peer_id == OTHER_PEER and "another swarm key" in str(one)
    assert other is not None and other.peer_id == PEER and "did not prove" in str(other)
    assert second.sent == b""
    for error in (one, other):
        assert "\n" not in str(error) and isinstance(error, PeerUnreachable)


async def test_a_proof_is_for_one_handshake(autojump_clock: trio.testing.MockClock) -> None:
    one, other, _, second = await proofs(Admission(swarm_key=KEY), Admission(swarm_key=KEY), (HASH, bytes(32)))
    assert one is not None and other is not None and second.sent == b""


async def against(admission: Admission, attack: Callable[[MemoryChannel], Awaitable[None]], *, initiator: bool) -> NotAdmitted | None:
    """What `admission` raises where the other side does as `attack` says and then ends the connection."""
    ends = channels()
    mine, theirs = ends if initiator else ends[::-1]
    failed: list[NotAdmitted] = []

    async def prove() -> None:
        try:
            await admission.prove(mine, HASH, initiator=initiator)
        except NotAdmitted as error:
            failed.append(error)
            await mine.close()

    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prove)
            await attack(theirs)
            await theirs.close()
    return failed[0] if failed else None


@pytest.mark.parametrize("initiator", [True, False])
@pytest.mark.parametrize("garbage", [b"", b"x", bytes(31), bytes(32), bytes(33), b"\xff" * 5000])
async def test_garbage_is_no_proof(garbage: bytes, initiator: bool, autojump_clock: trio.testing.MockClock) -> None:
    async def attack(channel: MemoryChannel) -> None:
        if garbage:
            await channel.write(garbage)

    assert await against(Admission(swarm_key=KEY), attack, initiator=initiator) is not None


async def test_a_proof_that_is_sent_back_is_none(autojump_clock: trio.testing.MockClock) -> None:
    async def reflect(channel: MemoryChannel) -> None:
        await channel.write(await channel.read(PROOF_SIZE))

    assert await against(Admission(swarm_key=KEY), reflect, initiator=True) is not None


async def test_a_proof_that_is_heard_elsewhere_is_none(autojump_clock: trio.testing.MockClock) -> None:
    """Somebody without the key has an honest peer prove itself to him, and passes that on."""
    heard, _, first, _ = await proofs(Admission(swarm_key=KEY), Admission(swarm_key=OTHER_KEY), (bytes(32), bytes(32)))
    assert heard is not None and len(first.sent) == PROOF_SIZE

    async def replay(channel: MemoryChannel) -> None:
        await channel.write(first.sent)

    assert await against(Admission(swarm_key=KEY), replay, initiator=False) is not None


async def test_a_proof_that_comes_in_pieces_holds(autojump_clock: trio.testing.MockClock) -> None:
    ends = channels()
    await proofs(Admission(swarm_key=KEY), Admission(swarm_key=KEY))
    good = (await proofs(Admission(swarm_key=KEY), Admission(swarm_key=KEY)))[2].sent
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:

            async def prove() -> None:
                await Admission(swarm_key=KEY).prove(ends[1], HASH, initiator=False)

            nursery.start_soon(prove)
            for byte in good:
                await ends[0].write(bytes([byte]))
                await trio.testing.wait_all_tasks_blocked()


async def test_silence_is_waited_for_by_the_caller_only(autojump_clock: trio.testing.MockClock) -> None:
    ends = channels()
    with trio.move_on_after(10) as scope:
        await Admission(swarm_key=KEY).prove(ends[1], HASH, initiator=False)
    assert scope.cancelled_caught and ends[1].sent == b""


async def test_in_an_open_swarm_nothing_is_sent() -> None:
    ends = channels()
    for place in (0, 1):
        await Admission().prove(ends[place], HASH, initiator=place == 0)
        assert ends[place].sent == b""


def test_private_swarms_have_a_name_of_their_own_for_the_channel() -> None:
    assert Admission().security_id == "/noise"
    assert Admission(swarm_key=KEY).security_id == PRIVATE_NOISE_ID == Admission(swarm_key=OTHER_KEY).security_id


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=64), st.binary(min_size=32, max_size=64))
def test_proofs_of_roles_and_handshakes_differ(secret: bytes, one: bytes, other: bytes) -> None:
    key = SwarmKey(secret)

    async def sent(handshake_hash: bytes, *, initiator: bool) -> bytes:
        """The proof that a side sends, given what it needs to hear before."""
        ends = channels()
        admission = Admission(swarm_key=key)
        if initiator:
            await ends[1].close()
            with pytest.raises(NotAdmitted):
                await admission.prove(ends[0], handshake_hash, initiator=True)
            return ends[0].sent
        await ends[0].write(await sent(handshake_hash, initiator=True))
        await admission.prove(ends[1], handshake_hash, initiator=False)
        return ends[1].sent

    async def check() -> None:
        first = await sent(one, initiator=True)
        assert len(first) == PROOF_SIZE
        assert first != await sent(one, initiator=False)
        assert (first == await sent(other, initiator=True)) == (one == other)

    trio.run(check)


@given(st.lists(st.binary(min_size=1, max_size=48), max_size=6), st.booleans())
def test_no_bytes_but_the_proof_are_one(pieces: list[bytes], initiator: bool) -> None:
    async def attack(channel: MemoryChannel) -> None:
        for piece in pieces:
            with contextlib.suppress(ConnectionClosedError):
                await channel.write(piece)

    async def check() -> None:
        refusal = await against(Admission(swarm_key=KEY), attack, initiator=initiator)
        assert refusal is not None and "\n" not in str(refusal)

    trio.run(check)


async def test_lists() -> None:
    Admission().check(PEER)
    Admission(allowed=[PEER]).check(PEER)
    Admission(blocked=[OTHER_PEER]).check(PEER)
    for admission, says in (
        (Admission(blocked=[PEER]), "blocked by this node's --block-peers"),
        (Admission(allowed=[OTHER_PEER]), "not among this node's --allow-peers"),
        (Admission(allowed=[]), "not among"),
        (Admission(allowed=[PEER], blocked=[PEER]), "blocked"),
    ):
        with pytest.raises(NotAdmitted, match=says) as caught:
            admission.check(PEER)
        assert PEER in str(caught.value) and caught.value.peer_id == PEER


async def test_who_breaks_rules_is_kept_away_for_a_while(autojump_clock: trio.testing.MockClock) -> None:
    admission = Admission()
    assert not admission.offend(PEER)
    admission.check(PEER)
    assert admission.offend(PEER, weight=100.0)
    with pytest.raises(NotAdmitted, match="kept away for another 900 s"):
        admission.check(PEER)
    admission.check(OTHER_PEER)
    await trio.sleep(901)
    admission.check(PEER)


def chain(*errors: BaseException) -> BaseException:
    """The first error, caused by the second, and so on."""
    for error, cause in zip(errors, errors[1:], strict=False):
        error.__cause__ = cause
    return errors[0]


def test_a_failed_dial_is_explained() -> None:
    refusal = MultiselectClientError("protocols not supported: tried ['/noise']")
    error = chain(OSError("dial"), SecurityUpgradeFailure(), refusal)
    without, with_key = Admission(), Admission(swarm_key=KEY)
    found = without.explain(PEER, error)
    assert found is not None and f"{PEER} is in a private swarm: give its key with --swarm-key FILE" in str(found)
    assert without.refusals == {PEER: found}
    found = with_key.explain(PEER, error)
    assert found is not None and "is in no private swarm" in str(found)
    closed = chain(OSError("dial"), MuxerUpgradeFailure(), MultiselectClientError("read failed"), ConnectionClosedError("gone"))
    found = without.explain(PEER, closed)
    assert found is not None and "right after the handshake: it does not admit this node" in str(found)
    own = NotAdmitted("because", PEER)
    assert without.explain(PEER, chain(OSError(), SecurityUpgradeFailure(), own)) is own


def test_a_dial_that_failed_for_another_reason_is_not() -> None:
    admission = Admission()
    for error in (
        OSError("refused"),
        chain(OSError(), MuxerUpgradeFailure(), MultiselectClientError("protocols not supported")),
        chain(OSError(), SecurityUpgradeFailure(), MultiselectClientError("protocol read failed")),
    ):
        assert admission.explain(PEER, error) is None
    assert not admission.refusals


def test_refusals_that_are_remembered_are_bounded() -> None:
    admission = Admission()
    for number in range(3 * MOST_REFUSALS):
        admission.explain(str(number), NotAdmitted("because", str(number)))
    assert len(admission.refusals) == MOST_REFUSALS and str(3 * MOST_REFUSALS - 1) in admission.refusals
