"""What a node concludes from peers that dialled back, and what it announces then."""

from __future__ import annotations

import ipaddress

import pytest

from petalnet.p2p.addresses import PeerAddress, circuit_addr
from petalnet.p2p.circuit import Reservation
from petalnet.p2p.identity import Identity
from petalnet.p2p.reachability import Answer, Verdict, choose_addrs, judge

OWN = [ipaddress.ip_address("192.168.1.2"), ipaddress.ip_address("127.0.0.1")]
RELAY = Identity(bytes(32)).peer_id
CIRCUIT = circuit_addr(PeerAddress(RELAY, "/ip4/203.0.113.2/tcp/31330"))
BASE = ["/ip4/192.168.1.2/tcp/31330", "/ip4/127.0.0.1/tcp/31330"]


def answer(ip: str, *ports: int) -> Answer:
    return Answer(ipaddress.ip_address(ip), frozenset(ports))


def reserved() -> list[Reservation]:
    return [Reservation(RELAY, (CIRCUIT,), 2e9)]


class TestJudge:
    def test_without_answers_nothing_is_known(self) -> None:
        assert judge([], OWN) == Verdict()

    def test_a_host_on_the_internet_is_reached(self) -> None:
        own = [ipaddress.ip_address("203.0.113.9")]
        verdict = judge([answer("203.0.113.9", 31330), answer("203.0.113.9", 31330)], own)
        assert (verdict.state, verdict.outside, verdict.refuted) == ("direct", (), frozenset())

    def test_a_port_forwarded_by_the_router_is_told_as_the_routers(self) -> None:
        verdict = judge([answer("203.0.113.9", 31330)], OWN)
        assert verdict.state == "direct"
        assert verdict.outside == ((ipaddress.ip_address("203.0.113.9"), 31330),)

    @pytest.mark.parametrize("neighbours", [0, 1, 3])
    def test_neighbours_behind_the_same_router_do_not_make_a_host_reachable(self, neighbours: int) -> None:
        verdict = judge([answer("203.0.113.9"), *[answer("192.168.1.2", 31330)] * neighbours], OWN)
        assert verdict.state == "unreachable"
        assert verdict.refuted == {ipaddress.ip_address("203.0.113.9")}

    def test_a_router_inside_a_private_network_counts_as_one(self) -> None:
        assert judge([answer("10.0.0.7"), answer("192.168.1.2", 31330)], OWN).state == "unreachable"

    def test_a_swarm_on_one_local_network_is_content_with_itself(self) -> None:
        assert judge([answer("192.168.1.2", 31330)] * 2, OWN).state == "direct"

    def test_one_liar_among_three_is_outvoted(self) -> None:
        honest = [answer("203.0.113.9", 31330)] * 2
        assert judge([*honest, answer("203.0.113.9")], OWN).state == "direct"
        assert judge([answer("203.0.113.9")] * 2 + honest[:1], OWN).state == "unreachable"

    def test_reached_by_one_family_is_reached(self) -> None:
        answers = [answer("203.0.113.9"), answer("203.0.113.9"), answer("2001:db8::9", 31330)]
        assert judge(answers, OWN).state == "direct"


class TestChoice:
    def test_what_nobody_could_test_stays(self) -> None:
        assert choose_addrs(BASE, Verdict(), []) == BASE

    def test_a_forwarded_port_comes_first(self) -> None:
        assert choose_addrs(BASE, judge([answer("203.0.113.9", 31330)], OWN), []) == ["/ip4/203.0.113.9/tcp/31330", *BASE]

    def test_a_host_that_is_not_reached_is_told_through_its_relays(self) -> None:
        assert choose_addrs(BASE, judge([answer("203.0.113.9")], OWN), reserved()) == [CIRCUIT, *BASE]

    def test_an_address_that_was_refuted_is_not_told_any_more(self) -> None:
        public = "/ip4/203.0.113.9/tcp/31330"
        verdict = judge([answer("203.0.113.9")], [ipaddress.ip_address("203.0.113.9")])
        assert choose_addrs([public, *BASE], verdict, reserved()) == [CIRCUIT, *BASE]
        assert choose_addrs([public], verdict, []) == [public]  # better than nothing

    def test_what_the_owner_tells_to_announce_is_announced(self) -> None:
        told = ["/dns4/example.org/tcp/443"]
        assert choose_addrs(told, judge([answer("203.0.113.9")], OWN), reserved(), fixed=True) == [*told, CIRCUIT]
