"""What servers behind routers find out about themselves, and tell others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import LabNodes
from .lab import Lab

pytestmark = pytest.mark.nat


def is_relayed(addrs: list[str]) -> bool:
    return any("p2p-circuit" in addr for addr in addrs)


def test_a_port_that_the_router_forwards_makes_a_server_reachable(lab: Lab, nodes: LabNodes) -> None:
    lab.add_public("relay")
    lab.add_public("visitor")
    lab.add_nated("alice")
    lab.forward("alice", 31330)
    relay = nodes.launch("relay", "--bootstrap", "--relay").wait_ready()
    alice = nodes.launch_peer("alice", "serve", relay.addrs[0])
    public = f"/ip4/{lab.public_ip('alice')}/tcp/31330"
    addrs = alice.wait_for_addrs(lambda addrs: public in addrs)
    assert addrs[0] == public and not is_relayed(addrs)
    found = json.loads(nodes.run_peer("visitor", "visit", relay.addrs[0], f"{public}/p2p/{alice.peer_id}"))
    assert found["direct_at_first"]


@pytest.mark.long
def test_a_lost_relay_is_replaced_by_another(lab: Lab, nodes: LabNodes) -> None:
    for name in ("one", "two", "three"):
        lab.add_public(name)
    lab.add_nated("alice")
    first = nodes.launch("one", "--bootstrap", "--relay").wait_ready()
    relays = [first, *(nodes.launch(name, "--bootstrap", "--relay", "--initial-peers", first.addrs[0]) for name in ("two", "three"))]
    for relay in relays[1:]:
        relay.wait_ready()
    alice = nodes.launch_peer("alice", "serve", relays[1].addrs[0])
    both = alice.wait_for_addrs(lambda addrs: sum("p2p-circuit" in addr for addr in addrs) >= 2)
    lost = next(relay for relay in relays if any(relay.peer_id in addr for addr in both))
    lost.process.kill()
    alice.wait_for_addrs(lambda addrs: sum("p2p-circuit" in addr for addr in addrs) >= 2 and not any(lost.peer_id in a for a in addrs))


@pytest.mark.long
def test_the_only_relay_is_found_again_when_it_is_back(lab: Lab, nodes: LabNodes, tmp_path: Path) -> None:
    lab.add_public("relay")
    lab.add_nated("alice")
    arguments = ("relay", "--bootstrap", "--relay", "--identity-path", tmp_path / "relay.key")
    relay = nodes.launch(*arguments).wait_ready()
    alice = nodes.launch_peer("alice", "serve", relay.addrs[0])
    alice.wait_for_addrs(is_relayed)
    relay.process.kill()
    alice.wait_for_addrs(lambda addrs: not is_relayed(addrs))
    nodes.launch(*arguments).wait_ready()
    alice.wait_for_addrs(is_relayed)


@pytest.mark.long
def test_neighbours_behind_one_router_meet_without_the_relay(lab: Lab, nodes: LabNodes) -> None:
    lab.add_public("relay")
    lab.add_nated("alice")
    lab.add_nated("bob", neighbour="alice")
    relay = nodes.launch("relay", "--bootstrap", "--relay").wait_ready()
    alice = nodes.launch_peer("alice", "serve", relay.addrs[0])
    addrs = alice.wait_for_addrs(is_relayed)
    local = f"/ip4/{lab.ip('alice')}/tcp/31330"
    assert local in addrs
    found = json.loads(nodes.run_peer("bob", "visit", relay.addrs[0], *(f"{addr}/p2p/{alice.peer_id}" for addr in addrs)))
    assert found["direct_at_first"]


def test_a_swarm_on_a_private_network_stays_as_it_is(lab: Lab, nodes: LabNodes) -> None:
    lab.add_nated("alice")
    lab.add_nated("bob", neighbour="alice")
    entry = nodes.launch("alice", "--bootstrap").wait_ready()
    bob = nodes.launch_peer("bob", "serve", entry.addrs[0])
    addrs = bob.wait_for_addrs(bool)
    assert addrs == [f"/ip4/{lab.ip('bob')}/tcp/31330", "/ip4/127.0.0.1/tcp/31330"]
    bob.wait_for_log("dialled back: direct")
    assert "warning" not in entry.log() and addrs == bob.told()[-1]["addrs"]
