"""A machine that slept, a process that was stopped, and a clock that was set."""

from __future__ import annotations

import logging
import time

import pytest
import trio

from petalnet.announcing import Announcer, Load
from petalnet.errors import PeerUnreachable
from petalnet.p2p.identity import Identity
from petalnet.peering import Peering, open_peering
from petalnet.routing.records import ServerRecord
from petalnet.waking import Gap, Waking

LISTEN = ["/ip4/127.0.0.1/tcp/0"]


class Clocks:
    """A monotonic clock and one that can be set."""

    def __init__(self) -> None:
        self.monotonic = self.wall = 1000.0
        self.waking = Waking(lambda: self.monotonic, lambda: self.wall)

    def after(self, monotonic: float, wall: float) -> Gap | None:
        self.monotonic += monotonic
        self.wall += wall
        self.waking.look()
        return self.waking.take()


@pytest.mark.parametrize(
    ("monotonic", "wall", "gap"),
    [
        (1.0, 1.0, None),
        (4.0, 4.0, None),  # a busy machine
        (1.0, 4.0, None),  # a clock that is put right by a little
        (60.0, 60.0, Gap(60.0, 0.0)),  # stopped
        (1.0, 3601.0, Gap(3601.0, 0.0)),  # asleep: the monotonic clock stood
        (1.0, -3599.0, Gap(0.0, 3600.0)),  # set back
        (60.0, -3540.0, Gap(60.0, 3600.0)),
    ],
)
def test_what_the_clocks_tell(monotonic: float, wall: float, gap: Gap | None) -> None:
    clocks = Clocks()
    assert clocks.after(1.0, 1.0) is None
    assert clocks.after(monotonic, wall) == gap
    assert clocks.after(1.0, 1.0) is None
    assert clocks.waking.is_drowsy == (gap is not None)
    clocks.after(5.0, 5.0)
    clocks.after(5.0, 5.0)
    assert not clocks.waking.is_drowsy


def test_who_is_told_of_a_broken_connection_first_knows_why() -> None:
    clocks = Clocks()
    clocks.monotonic += 60
    assert clocks.waking.is_drowsy and clocks.waking.take() is not None


def test_a_gap_is_told_in_words() -> None:
    assert str(Gap(60.0, 0.0)) == "this machine slept, or this node was stopped, for 60 s"
    assert str(Gap(0.0, 3600.0)) == "this machine's clock was set back by 3600 s"


def record_of(peering: Peering) -> ServerRecord:
    now = time.time()
    return ServerRecord(
        peer_id=peering.host.peer_id, addrs=tuple(peering.host.plain_addrs), model="m", model_name="m", span=(0, 4), num_blocks=4,
        state="online", dtype="float32", sequence=0, issued=now, expires=now + 60,
    )  # fmt: skip


async def test_a_server_that_wakes_up_is_back_at_once(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    """Its peers have given it up, its records have expired: it connects, asks and announces itself without waiting for any beat."""
    caplog.set_level(logging.INFO, "petalnet")
    async with (
        open_peering(Identity.generate(), initial_peers=(), listen=LISTEN, server=True) as entry,
        open_peering(Identity.generate(), initial_peers=entry.host.addrs, listen=LISTEN, server=True) as server,
    ):
        announcer = Announcer(server, record_of(server), lambda: Load(100, 0), server.host.round_trip_s)
        other = Announcer(entry, record_of(entry), lambda: Load(100, 0), entry.host.round_trip_s)
        await other.tell()
        assert await announcer.tell() == 2
        nursery.start_soon(announcer.run)
        await server.look_up("m")
        asleep = [0.0]
        server._waking = Waking(lambda: trio.current_time() + asleep[0], lambda: time.time() + asleep[0])
        asleep[0] = 60.0  # nothing of it ran for a minute
        announcer._told_at -= 60.0
        sequence = announcer.record.sequence
        await entry.host.disconnect(server.host.peer_id)  # by its heartbeats
        entry.view.mark_failed(server.host.peer_id, now=time.time())

        def is_announced_anew() -> bool:
            return any(
                found.sequence > sequence for found in entry.view.servers("m", now=time.time()) if found.peer_id == server.host.peer_id
            )

        with trio.fail_after(5):
            while not is_announced_anew():  # noqa: ASYNC110  (there is no sign of it)
                await trio.sleep(0.02)
        assert server.host.is_connected(entry.host.peer_id)
        assert [found.peer_id for found in server.view.servers("m", now=time.time()) if found.peer_id == entry.host.peer_id]
        assert not server.view.on_probation(entry.host.peer_id), "that the connection broke was nobody's fault"
        assert "this machine slept, or this node was stopped, for 6" in caplog.text
        nursery.cancel_scope.cancel()


async def test_connections_that_only_look_alive_end_soon_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router forgot them while the machine slept; who finds out by heartbeats only needs six seconds."""
    async with (
        open_peering(Identity.generate(), initial_peers=(), listen=LISTEN, server=True) as entry,
        open_peering(Identity.generate(), initial_peers=entry.host.addrs, listen=LISTEN, server=True) as server,
    ):
        pinged: list[str] = []

        async def ping(peer_id: str, timeout_s: float) -> float:
            pinged.append(peer_id)
            raise PeerUnreachable("silence", peer_id)

        lost: list[str] = []
        server.host.on_peer_lost(lost.append)
        monkeypatch.setattr(server.host, "ping", ping)
        await server._wake_up(Gap(3600.0, 0.0))
        assert pinged == lost == [entry.host.peer_id]
        assert server.host.is_connected(entry.host.peer_id), "by a new connection"
