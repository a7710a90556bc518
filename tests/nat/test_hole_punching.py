"""Peers behind different routers that meet through a relay, and are connected directly a moment later."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import LabNodes
from .lab import Lab

pytestmark = pytest.mark.nat


def visit(lab: Lab, nodes: LabNodes, **router: bool) -> dict[str, Any]:
    """What bob finds who visits alice, each behind a router of that kind."""
    lab.add_public("relay")
    lab.add_nated("alice", **router)
    lab.add_nated("bob", **router)
    relay = nodes.launch("relay", "--bootstrap", "--relay").wait_ready()
    circuit = nodes.launch_peer("alice", "serve", relay.addrs[0]).wait_for_circuit()
    found: dict[str, Any] = json.loads(nodes.run_peer("bob", "visit", relay.addrs[0], circuit))
    print(f"\n{found}")
    return found


def test_a_relayed_connection_becomes_direct(lab: Lab, nodes: LabNodes) -> None:
    found = visit(lab, nodes)
    assert not found["direct_at_first"] and found["direct"]


@pytest.mark.long
def test_where_routers_change_ports_the_relay_carries_on(lab: Lab, nodes: LabNodes) -> None:
    found = visit(lab, nodes, keeps_ports=False)
    assert not found["direct_at_first"] and not found["direct"]
    assert found["then"]["bulk_mb_s"] > 1
