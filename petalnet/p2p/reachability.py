"""Whether others can reach this node, and at which addresses they are told to.

A node that listens asks a few of its peers to dial it back (protocol `/petalnet/reachability/1.0.0`). A peer that is asked dials only the
IP address at which it sees the asker, at the ports that the asker names, and lets a Noise handshake prove that it is the asker who answers
there: so nobody can have it knock at a third party's door, and nobody is told that he is reached when he is not. It answers with that IP
address and the ports that worked.

From the answers the node concludes what to announce (`judge`): where dials from beyond its router arrive, the router's address too; where
they do not, addresses through relays, and one line tells its owner which port to open. An address that nobody could test stays as it is.
"""

from __future__ import annotations

import ipaddress
import logging
import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.identity.identify_push.identify_push import push_identify_to_peers
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from multiaddr import Multiaddr

from petalnet.errors import BusyError, CallerError, PeerUnreachable, PetalnetError, UnsupportedError
from petalnet.p2p.addresses import IpAddress, ip_of, own_interfaces, port_of, relay_of
from petalnet.p2p.circuit import Reservation
from petalnet.p2p.host import Host
from petalnet.p2p.messages import DialBack, DialBackDone, Error
from petalnet.p2p.protocols import REACHABILITY
from petalnet.p2p.reservations import Reservations
from petalnet.p2p.streams import Stream

logger = logging.getLogger(__name__)

ASKED = 4
"""Peers that are asked at a time: a liar is outvoted, and a swarm of thousands is not busy with dialling back."""
ENOUGH = 2
"""Answers with which a node is content; while it has fewer, it asks again when it meets another peer."""
MAX_PORTS = 4
SETTLE_S = 0.5
"""Seconds after a peer was found in which others may follow, so that they are asked together."""
CHECK_INTERFACES_S = 30.0
AGAIN_S = {"unknown": 60.0, "direct": 900.0, "unreachable": 120.0}
"""Seconds after which the question is asked again: soon where an owner may have opened a port."""
MOST_ANNOUNCED = 16

_NEAR_NETWORKS = [
    ipaddress.ip_network(net)
    for net in (
        *("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7"),  # private, and providers' own
        *("127.0.0.0/8", "169.254.0.0/16", "::1/128", "fe80::/10"),  # this machine, this link
    )
]

State = Literal["unknown", "direct", "unreachable"]


@dataclass(frozen=True)
class Answer:
    """What a peer that dialled back found.

    Attributes:
        observed: the IP address at which it sees this node.
        ports: the ports there at which this node answered.
    """

    observed: IpAddress
    ports: frozenset[int]


@dataclass(frozen=True)
class Verdict:
    """What follows from the answers.

    Attributes:
        state: "direct" where others can reach this node by themselves, as far as anybody could tell; "unknown" without answers.
        outside: (IP address, port) pairs beyond a router at which this node is reached.
        refuted: IP addresses at which dials did not arrive.
        answers: how many there were.
    """

    state: State = "unknown"
    outside: tuple[tuple[IpAddress, int], ...] = ()
    refuted: frozenset[IpAddress] = frozenset()
    answers: int = 0


def judge(answers: Sequence[Answer], own: Collection[IpAddress]) -> Verdict:
    """The verdict on a node whose interfaces have the addresses `own`.

    Those answers count that come from farthest away: from the internet before the local network, from beyond a router before this side
    of it. Of these, half have to have got through, by IPv4 or by IPv6. An address beyond a router counts where half of those that are as
    far away name it: to be announced takes more than one peer's word, so that nobody has a stranger dialled by a whole swarm.
    """
    if not answers:
        return Verdict()
    farthest = max(_distance(answer.observed, own) for answer in answers)
    far = [answer for answer in answers if _distance(answer.observed, own) == farthest]
    by_ip: dict[IpAddress, list[Answer]] = {}
    for answer in answers:
        by_ip.setdefault(answer.observed, []).append(answer)
    works = {ip: 2 * sum(bool(answer.ports) for answer in found) >= len(found) for ip, found in by_ip.items()}
    families = [[answer for answer in far if answer.observed.version == version] for version in (4, 6)]
    reached = any(found and 2 * sum(bool(answer.ports) for answer in found) >= len(found) for found in families)
    crowds = Counter(_crowd(answer.observed, own) for answer in answers)
    agreed = [ip for ip, found in by_ip.items() if works[ip] and ip not in own and 2 * len(found) >= crowds[_crowd(ip, own)]]
    outside = {(ip, port) for ip in agreed for answer in by_ip[ip] for port in answer.ports}
    return Verdict(
        "direct" if reached else "unreachable",
        tuple(sorted(outside, key=str)),
        frozenset(ip for ip, well in works.items() if not well),
        len(answers),
    )


def _distance(ip: IpAddress, own: Collection[IpAddress]) -> tuple[bool, bool]:
    is_public = _is_public(ip)
    return is_public, not is_public and ip not in own  # one peer that claims a strange public address must not speak for the internet


def _crowd(ip: IpAddress, own: Collection[IpAddress]) -> tuple[int, tuple[bool, bool]]:
    """Those who see this node from as far away, by IPv4 or by IPv6."""
    return ip.version, _distance(ip, own)


def _is_public(ip: IpAddress) -> bool:
    return not any(ip in network for network in _NEAR_NETWORKS if network.version == ip.version)


def choose_addrs(base: Sequence[str], verdict: Verdict, reservations: Sequence[Reservation], *, fixed: bool = False) -> list[str]:
    """What to announce, what reaches farthest first.

    Args:
        base: the addresses that are listened on, or that the owner told to announce (`fixed`), which nothing takes away.
    """
    if verdict.state == "unknown":
        return list(base)
    outside = [f"/ip{ip.version}/{ip}/tcp/{port}" for ip, port in verdict.outside]
    circuits = [addr for reservation in reservations for addr in reservation.addrs] if verdict.state == "unreachable" else []
    if fixed:
        return list(dict.fromkeys([*base, *circuits]))[:MOST_ANNOUNCED]
    standing = [addr for addr in base if relay_of(addr) is not None or ip_of(addr) not in verdict.refuted]
    return list(dict.fromkeys([*outside, *circuits, *standing]))[:MOST_ANNOUNCED] or list(base)


async def ask_to_dial_back(host: Host, peer_id: str, ports: Sequence[int]) -> Answer:
    """Where a connected peer sees this node, and at which of the ports it reaches it there; without ports it dials nothing.

    Raises:
        PetalnetError: it does not answer, or with what is no answer.
    """
    patience = 2 * host.limits.dial_back_timeout
    try:
        with trio.fail_after(patience):
            async with await host.open_stream(peer_id, REACHABILITY, timeout_s=patience) as stream:
                await stream.send(DialBack(tuple(ports)))
                answer = await stream.receive()
    except trio.TooSlowError:
        raise PeerUnreachable(f"no answer within {patience:g} s", peer_id) from None
    if isinstance(answer, Error):
        raise answer.exception(peer_id)
    if not isinstance(answer, DialBackDone):
        raise UnsupportedError(f"it answered with {type(answer).__name__}", peer_id)
    try:
        observed = ipaddress.ip_address(answer.observed)
    except ValueError:
        raise UnsupportedError(f"it sees this node at {answer.observed!r}, which is no address", peer_id) from None
    return Answer(observed, frozenset(answer.ports) & frozenset(ports))


class Reachability:
    """Answers peers that ask to be dialled back, and finds out for its own host; announces what follows.

    Attributes:
        verdict: the present one.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._limits = host.limits
        self._dials = trio.CapacityLimiter(self._limits.max_dial_backs)
        self._wake = trio.Event()
        self._asked_far = False
        self._relaying: trio.CancelScope | None = None
        self._reservations = Reservations(host, self._announce, fits=self._is_far_enough)
        self._nursery: trio.Nursery
        self.verdict = Verdict()
        host.serve(REACHABILITY, self._serve)
        host.on_peer_found(self._on_peer_found)

    @property
    def relays(self) -> list[str]:
        """Ids of the relays through which others reach this node."""
        return [reservation.relay_id for reservation in self._reservations.held]

    # ---- for others

    async def _serve(self, stream: Stream) -> None:
        while (request := await stream.receive()) is not None:
            if not isinstance(request, DialBack):
                raise UnsupportedError(f"{REACHABILITY.id} takes questions for dialling back only")
            ip = self._host.remote_ip(stream.peer_id)
            if ip is None:
                raise CallerError("a peer behind a relay has no address that could be dialled")
            if self._dials.borrowed_tokens >= self._dials.total_tokens:
                raise BusyError("too many peers ask to be dialled back", retry_after_s=self._limits.dial_back_timeout)
            async with self._dials:
                await stream.send(DialBackDone(ip, tuple(await self._dial_back(ip, sorted(set(request.ports)), stream.peer_id))))

    async def _dial_back(self, ip: str, ports: Sequence[int], peer_id: str) -> list[int]:
        """Those of the ports at which the peer itself answers."""
        found: list[int] = []

        async def dial(port: int) -> None:
            family = "ip6" if ":" in ip else "ip4"
            raw: RawConnection | None = None
            try:
                dialled = await self._host.libp2p.transport.dial(Multiaddr(f"/{family}/{ip}/tcp/{port}"))
                if not isinstance(dialled, RawConnection):
                    raise TypeError(f"TCP gave a {type(dialled).__name__}")
                raw = dialled
                await self._host.libp2p.swarm.upgrader.upgrade_security(raw, True, ID.from_string(peer_id))
                found.append(port)
            except (BaseLibp2pError, PetalnetError, OSError) as error:
                logger.debug("peer %s is not reached at %s port %d: %s", peer_id, ip, port, error)
            finally:
                if raw is not None:
                    with trio.CancelScope(shield=True):
                        await raw.close()

        with trio.move_on_after(self._limits.dial_back_timeout):
            async with trio.open_nursery() as nursery:
                for port in ports:
                    nursery.start_soon(dial, port)
        return found

    # ---- for this node

    async def run(self) -> None:
        """Find out, announce, and find out again, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            interfaces = set(own_interfaces())
            due = float("inf")  # until the first peer is found
            while True:
                with trio.move_on_after(min(CHECK_INTERFACES_S, due - trio.current_time())) as idle:
                    await self._wake.wait()
                if not idle.cancelled_caught:
                    await trio.sleep(SETTLE_S)
                    self._wake = trio.Event()  # not later: who is found while the others are asked wants to be asked as well
                now_there = set(own_interfaces())
                if now_there != interfaces:
                    logger.info("this machine's addresses have changed")
                    interfaces = now_there
                    self._announce()
                elif idle.cancelled_caught and trio.current_time() < due:
                    continue
                own = [interface.ip for interface in interfaces]
                self._conclude(await self._ask_around(own), own)
                due = trio.current_time() + AGAIN_S[self.verdict.state] * random.uniform(0.9, 1.1)

    def _on_peer_found(self, peer_id: str) -> None:
        if self.verdict.answers < ENOUGH or (not self._asked_far and self._is_far(peer_id)):
            self._wake.set()

    def _is_far_enough(self, peer_id: str) -> bool:
        """Whether a relay is where those are that do not reach this node: one at home helps nobody on the internet."""
        return self._is_far(peer_id) or not self._asked_far

    def _is_far(self, peer_id: str) -> bool:
        """Whether a peer is somewhere on the internet, not on a private network."""
        address = self._host.remote_ip(peer_id)
        return address is not None and _is_public(ipaddress.ip_address(address))

    async def _ask_around(self, own: Collection[IpAddress]) -> list[Answer]:
        ports = sorted({port_of(addr) for addr in self._host.listened_addrs if relay_of(addr) is None})[:MAX_PORTS]
        peers = self._askable()
        answers: list[Answer] = []

        async def ask(peer_id: str) -> None:
            is_far = self._is_far(peer_id)
            try:
                answer = await ask_to_dial_back(self._host, peer_id, ports)
            except PetalnetError as error:
                logger.debug("peer %s does not dial back: %s", peer_id, error)
                return
            if _is_public(answer.observed) and not is_far and answer.observed not in own:
                logger.debug("peer %s, which is near, says that it sees this node at %s", peer_id, answer.observed)
                return
            answers.append(answer)
            self._asked_far |= is_far

        async with trio.open_nursery() as nursery:
            for peer_id in peers:
                nursery.start_soon(ask, peer_id)
        return answers

    def _askable(self) -> list[str]:
        """Peers to ask, those on the internet first. One on this very machine could tell nothing, nor one that a relay connects."""
        found = []
        for peer_id in self._host.connected_peers():
            address = self._host.remote_ip(peer_id)
            if address is not None and not ipaddress.ip_address(address).is_loopback:
                found.append((not self._is_far(peer_id), random.random(), peer_id))
        return [peer_id for _, _, peer_id in sorted(found)[:ASKED]]

    def _conclude(self, answers: Sequence[Answer], own: Sequence[IpAddress]) -> None:
        before, self.verdict = self.verdict, judge(answers, own)
        logger.debug("%d peers dialled back: %s", len(answers), self.verdict.state)
        if self.verdict.state == "unknown" and before.state != "unknown":
            self.verdict = before  # nobody was there to ask; nothing speaks against what was found before
            return
        if self.verdict.state != before.state:
            self._tell_owner(before.state)
        if self.verdict.state == "unreachable" and self._relaying is None:
            self._relaying = trio.CancelScope()
            self._nursery.start_soon(self._keep_reservations, self._relaying)
        elif self.verdict.state == "direct" and self._relaying is not None:
            self._relaying.cancel()
            self._relaying = None
        self._announce()

    async def _keep_reservations(self, scope: trio.CancelScope) -> None:
        with scope:
            await self._reservations.run()

    def _tell_owner(self, before: State) -> None:
        addrs = [addr for addr in self._host.listened_addrs if relay_of(addr) is None]
        ports = ", ".join(str(port) for port in sorted({port_of(addr) for addr in addrs}))
        if self.verdict.state == "direct":
            if before == "unreachable":
                logger.info("others can reach this node now, at port %s", ports)
            return
        machine = next((str(ip) for addr in addrs if (ip := ip_of(addr)) is not None and not ip.is_loopback), "this machine")
        logger.warning(
            "other peers cannot reach this node: open TCP port %s in the firewall, and forward it to %s where there is a router; "
            "until then it is reached through relays only (docs/reachability.md)", ports, machine,
        )  # fmt: skip

    def _announce(self) -> None:
        addrs = choose_addrs(self._host.listened_addrs, self.verdict, self._reservations.held, fixed=self._host.announces_fixed)
        if addrs == self._host.plain_addrs:
            return
        logger.debug("announcing %s", ", ".join(addrs))
        self._host.set_announced(addrs)
        self._nursery.start_soon(self._push)

    async def _push(self) -> None:
        """Tell connected peers the new addresses; others learn them from records."""
        peers = {ID.from_string(peer_id) for peer_id in self._host.connected_peers()}
        with trio.move_on_after(self._limits.negotiation_timeout):
            await push_identify_to_peers(self._host.libp2p, peers)
