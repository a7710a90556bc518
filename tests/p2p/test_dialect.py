"""Peers of another release understand each other, those of another version of the protocols are refused by name."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable

import msgpack
import pytest
import trio

from petalnet.errors import NotAdmitted
from petalnet.p2p.dialect import describe_foreign, foreign_version
from petalnet.p2p.frames import FrameDecoder, FrameLimits, encode_frame
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Ping, decode_message
from petalnet.peering import open_peering
from petalnet.version import PROTOCOL, __version__

LISTEN = "/ip4/127.0.0.1/tcp/0"
FOREIGN = """
import petalnet.version
petalnet.version.PROTOCOL = {version}
import trio
from petalnet.p2p.identity import Identity
from petalnet.peering import open_peering

async def main():
    async with open_peering(Identity.generate(), initial_peers={peers}, listen=["/ip4/127.0.0.1/tcp/0"], server=True) as peering:
        print(*peering.host.addrs, flush=True)
        await trio.sleep_forever()

try:
    trio.run(main)
except BaseExceptionGroup as group:
    print(*group.exceptions)
except Exception as error:
    print(error)
"""


def foreign(peers: list[str], version: int) -> subprocess.Popen[str]:
    """A node in a process of its own whose protocols are of another version. It prints its addresses, or why it could not join."""
    program = FOREIGN.format(version=version, peers=peers)
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.parametrize(
    ("served", "version"),
    [
        ([f"/petalnet/ping/{PROTOCOL}.0.0", "/ipfs/id/1.0.0"], None),
        ([f"/petalnet/ping/{PROTOCOL}.3.1"], None),
        ([f"/petalnet/ping/{PROTOCOL}.0.0", f"/petalnet/ping/{PROTOCOL + 1}.0.0"], None),  # it speaks both
        ([f"/petalnet/ping/{PROTOCOL + 1}.0.0", f"/petalnet/inference/{PROTOCOL + 1}.2.0", "/ipfs/id/1.0.0"], PROTOCOL + 1),
        (["/petalnet/ping/0.9.0"], 0),
        (["/ipfs/id/1.0.0", "/meshsub/1.1.0"], None),  # no petalnet node
        (["/petalnet/ping/x", "/petalnet//2.0.0", "/petalnet/ping/99999999999.0.0", "\n", ""], None),
    ],
)
def test_the_names_of_protocols_tell_the_version(served: list[str], version: int | None) -> None:
    assert foreign_version(served) == version


def test_who_has_to_be_updated_is_said() -> None:
    assert describe_foreign("P", PROTOCOL + 1) == (
        f"peer P speaks version {PROTOCOL + 1} of petalnet's protocols, this node (petalnet {__version__}) version {PROTOCOL}: "
        "this machine has to be updated"
    )
    assert "that peer has to be updated" in describe_foreign("P", PROTOCOL - 1)


async def test_a_node_of_another_version_is_refused_on_both_sides(caplog: pytest.LogCaptureFixture, until: Callable[..., object]) -> None:
    async with open_peering(Identity.generate(), initial_peers=(), listen=[LISTEN], server=True) as peering:
        with foreign(peering.host.addrs, PROTOCOL + 1) as newer:
            assert newer.stdout is not None
            said = await trio.to_thread.run_sync(newer.stdout.read)  # it ends
        assert f"no swarm was joined: peer {peering.host.peer_id} speaks version {PROTOCOL} of petalnet's protocols, " in said
        assert f"version {PROTOCOL + 1}: that peer has to be updated" in said
        (warning,) = [entry.getMessage() for entry in caplog.records if entry.levelno == logging.WARNING]
        assert f"speaks version {PROTOCOL + 1} of petalnet's protocols" in warning and "this machine has to be updated" in warning
        await until(lambda: not peering.host.connected_peers())  # type: ignore[misc]


async def test_whom_we_dial_may_be_of_another_version() -> None:
    with foreign([], PROTOCOL + 1) as newer:
        try:
            assert newer.stdout is not None
            addr = (await trio.to_thread.run_sync(newer.stdout.readline)).split()[0]
            refused = f"no swarm was joined: .* speaks version {PROTOCOL + 1} .* this machine has to be updated"
            with pytest.RaisesGroup(pytest.RaisesExc(NotAdmitted, match=refused), flatten_subgroups=True):
                async with open_peering(Identity.generate(), initial_peers=[addr], listen=(), server=False):
                    pass
        finally:
            newer.kill()


async def test_nobody_waits_to_be_told_the_version_of_a_petalnet_peer(hosts, autojump_clock) -> None:
    one, other = await hosts.start(), await hosts.start()
    await one.connect(other.peer_id, other.addrs)
    began = trio.current_time()
    await one.check_version(other.peer_id)
    assert trio.current_time() == began


def test_a_later_release_may_add_to_messages() -> None:
    """What is not known is left alone (see `tests/routing/test_records.py` for records)."""
    decoder = FrameDecoder(FrameLimits(header=1024, payload=0))
    for part in encode_frame(msgpack.packb(("ping", {"nonce": 7, "mood": "good"}, {})), []):
        decoder.feed(part)
    frame = decoder.next_frame()
    assert frame is not None and decode_message(frame) == Ping(7)
