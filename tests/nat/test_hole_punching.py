"""Peers behind different routers that meet through a relay, and are connected directly a moment later."""

from __future__ import annotations

import json

import pytest

from .conftest import LabNodes
from .lab import Lab

pytestmark = pytest.mark.nat


def test_a_relayed_connection_becomes_direct(lab: Lab, nodes: LabNodes) -> None:
    lab.add_public("relay")
    lab.add_nated("alice")
    lab.add_nated("bob")
    relay = nodes.launch("relay", "--bootstrap", "--relay").wait_ready()
    server = nodes.launch_peer("alice", "serve", relay.addrs[0])
    circuit = server.wait_for_circuit()
    found = json.loads(nodes.run_peer("bob", "visit", relay.addrs[0], circuit))
    print(f"\n{found}")
    assert not found["direct_at_first"] and found["direct"]
