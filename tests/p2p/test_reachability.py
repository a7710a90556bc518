"""What a node concludes from peers that dialled back, and what it announces then."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from petalnet.errors import BusyError, CallerError, PeerUnreachable
from petalnet.p2p import reachability as module
from petalnet.p2p.addresses import PeerAddress, circuit_addr, parse_peer, port_of
from petalnet.p2p.circuit import Reservation
from petalnet.p2p.host import Host
from petalnet.p2p.identity import Identity
from petalnet.p2p.protocols import REACHABILITY, Limits
from petalnet.p2p.reachability import Answer, Reachability, Verdict, ask_to_dial_back, choose_addrs, judge
from petalnet.p2p.relay import Relay

from .conftest import Hosts

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

    def test_one_liar_does_not_have_a_strangers_address_announced(self) -> None:
        honest = [answer("203.0.113.9", 31330)] * 2
        assert judge([answer("198.51.100.7", 31330), *honest], OWN).outside == ((ipaddress.ip_address("203.0.113.9"), 31330),)
        at_home = [ipaddress.ip_address("203.0.113.9")]
        assert judge([answer("198.51.100.7", 31330), *honest], at_home).outside == ()

    def test_one_liar_does_not_make_a_host_on_the_internet_unreachable(self) -> None:
        own = [ipaddress.ip_address("203.0.113.9")]
        assert judge([answer("198.51.100.7"), *[answer("203.0.113.9", 31330)] * 2], own).state == "direct"

    def test_each_of_two_ways_out_counts(self) -> None:
        answers = [answer("203.0.113.9", 31330), answer("2001:db8::9", 31330), answer("198.51.100.7", 31330)]
        assert len(judge(answers, OWN).outside) == 3

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


class Neighbours:
    """A host, as far as `Reachability` looks at it, and the peers around it: what each says, and after how long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.limits, self.circuits, self.announces_fixed = Limits(), SimpleNamespace(), False
        self.listened_addrs = self.plain_addrs = BASE
        self.asked: list[str] = []
        self._peers: dict[str, tuple[str, Answer, float]] = {}
        self._found: list[Callable[[str], None]] = []
        monkeypatch.setattr(module, "ask_to_dial_back", self._answer)
        monkeypatch.setattr(module, "own_interfaces", lambda: [ipaddress.ip_interface((ip, 24)) for ip in OWN])
        monkeypatch.setattr(module, "push_identify_to_peers", self._push)
        self.reachability = Reachability(self)  # type: ignore[arg-type]

    def meet(self, peer_id: str, ip: str, says: Answer, after_s: float = 0.0) -> None:
        self._peers[peer_id] = ip, says, after_s
        for callback in self._found:
            callback(peer_id)

    async def _answer(self, _: object, peer_id: str, ports: object) -> Answer:
        self.asked.append(peer_id)
        _, says, after_s = self._peers[peer_id]
        await trio.sleep(after_s)
        return says

    async def _push(self, *_: object) -> None: ...

    @property
    def libp2p(self) -> object:
        return self

    def get_peerstore(self) -> object:
        return SimpleNamespace(supports_protocols=lambda *_: [])

    def serve(self, *_: object) -> None: ...

    def on_peer_lost(self, _: object) -> None: ...

    def on_peer_found(self, callback: Callable[[str], None]) -> None:
        self._found.append(callback)

    def connected_peers(self) -> list[str]:
        return list(self._peers)

    def remote_ip(self, peer_id: str) -> str:
        return self._peers[peer_id][0]

    def set_announced(self, addrs: Sequence[str]) -> None:
        self.plain_addrs = list(addrs)


@pytest.fixture
async def around(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Neighbours]:
    neighbours = Neighbours(monkeypatch)
    nursery.start_soon(neighbours.reachability.run)
    await trio.testing.wait_all_tasks_blocked()
    yield neighbours
    nursery.cancel_scope.cancel()


PEERS = [Identity(bytes([number]) * 32).peer_id for number in range(4)]


class TestAsking:
    async def test_who_is_met_while_another_is_asked_is_asked_as_well(self, autojump_clock: trio.abc.Clock, around: Neighbours) -> None:
        around.meet(PEERS[0], "203.0.113.2", answer("203.0.113.9"), after_s=4)
        await trio.sleep(2)
        around.meet(PEERS[1], "203.0.113.3", answer("203.0.113.9", 31330))
        await trio.sleep(10)
        assert PEERS[1] in around.asked and around.reachability.verdict.answers == 2

    async def test_a_relay_at_home_helps_only_where_nobody_is_further_away(
        self, autojump_clock: trio.abc.Clock, around: Neighbours
    ) -> None:
        around.meet(PEERS[0], "192.168.1.3", answer("192.168.1.2"))
        await trio.sleep(2)
        assert around.reachability._is_far_enough(PEERS[0])
        around.meet(PEERS[1], "203.0.113.2", answer("203.0.113.9"))
        await trio.sleep(2)
        assert [around.reachability._is_far_enough(peer) for peer in PEERS[:2]] == [False, True]

    async def test_a_neighbour_does_not_speak_for_the_internet(self, autojump_clock: trio.abc.Clock, around: Neighbours) -> None:
        around.meet(PEERS[0], "192.168.1.3", answer("192.168.1.2", 31330))
        around.meet(PEERS[1], "192.168.1.4", answer("203.0.113.9"))
        await trio.sleep(2)
        assert around.reachability.verdict.state == "direct" and around.plain_addrs == BASE


def listening_port(host: Host) -> int:
    return port_of(parse_peer(host.addrs[0]).addr)


class TestDialBack:
    async def test_a_peer_dials_back_and_says_what_it_found(self, hosts: Hosts, unused_port: int) -> None:
        asker, asked = await hosts.start(), await hosts.start()
        Reachability(asked)
        await asker.connect(asked.peer_id, asked.addrs)
        port = listening_port(asker)
        with trio.fail_after(5):
            found = await ask_to_dial_back(asker, asked.peer_id, (port, unused_port))
        assert found == answer("127.0.0.1", port)
        assert asked.is_connected(asker.peer_id) and len(asked.peers()) == 1  # the dial was for the answer only

    async def test_without_ports_it_tells_where_it_sees_the_asker(self, hosts: Hosts) -> None:
        asker, asked = await hosts.start(listen=False), await hosts.start()
        Reachability(asked)
        await asker.connect(asked.peer_id, asked.addrs)
        assert await ask_to_dial_back(asker, asked.peer_id, ()) == answer("127.0.0.1")

    async def test_another_peer_at_the_port_does_not_count(self, hosts: Hosts) -> None:
        asker, asked, other = await hosts.start(), await hosts.start(), await hosts.start()
        Reachability(asked)
        await asker.connect(asked.peer_id, asked.addrs)
        with trio.fail_after(5):
            assert (await ask_to_dial_back(asker, asked.peer_id, (listening_port(other),))).ports == frozenset()
        await hosts.check_alive(other)

    async def test_a_port_that_says_nothing_costs_the_asked_a_bounded_while(self, hosts: Hosts) -> None:
        asker, asked = await hosts.start(), await hosts.start(limits=Limits(dial_back_timeout=0.3))
        Reachability(asked)
        await asker.connect(asked.peer_id, asked.addrs)
        (mute,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with mute:
            with trio.fail_after(5):
                found = await ask_to_dial_back(asker, asked.peer_id, (mute.socket.getsockname()[1], listening_port(asker)))
        assert found.ports == {listening_port(asker)}

    async def test_who_is_busy_dialling_says_so(self, hosts: Hosts) -> None:
        asker, asked = await hosts.start(), await hosts.start(limits=Limits(max_dial_backs=0))
        Reachability(asked)
        await asker.connect(asked.peer_id, asked.addrs)
        with pytest.raises(BusyError):
            await ask_to_dial_back(asker, asked.peer_id, (1024,))

    async def test_a_peer_behind_a_relay_is_not_dialled(self, hosts: Hosts) -> None:
        relay, server, asker = await hosts.start(), await hosts.start(listen=False), await hosts.start(listen=False)
        Relay(relay)
        Reachability(server)
        await server.connect(relay.peer_id, relay.addrs)
        reservation = await server.circuits.reserve(relay.peer_id, tuple(relay.plain_addrs))
        server.circuits.reservations = {relay.peer_id: reservation}
        await asker.connect(server.peer_id, reservation.addrs)
        with pytest.raises(CallerError, match="behind a relay"):
            await ask_to_dial_back(asker, server.peer_id, (31330,))

    async def test_silence_is_waited_out(self, hosts: Hosts) -> None:
        asker, asked = await hosts.start(limits=Limits(dial_back_timeout=0.1)), await hosts.start()

        async def say_nothing(stream: object) -> None:
            await trio.sleep_forever()

        asked.serve(REACHABILITY, say_nothing)
        await asker.connect(asked.peer_id, asked.addrs)
        with pytest.raises(PeerUnreachable), trio.fail_after(5):
            await ask_to_dial_back(asker, asked.peer_id, (31330,))


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
