from __future__ import annotations

import pytest
import trio
from libp2p.peer.id import ID
from libp2p.pubsub.pb.rpc_pb2 import Message
from libp2p.pubsub.pubsub import Pubsub

from petalnet.p2p import gossip as module
from petalnet.p2p.gossip import MAX_MESSAGE_BYTES, Gossip
from petalnet.p2p.host import Host
from petalnet.p2p.identity import Identity
from petalnet.p2p.protocols import Limits, Rate
from petalnet.routing.records import RecordForged

TOPIC = "petalnet/test/1"


class Node:
    def __init__(self, host: Host) -> None:
        self.host = host
        self.got: list[tuple[str, bytes]] = []
        self.is_reached = False
        self.refused: list[bytes] = []
        self.gossip = Gossip(host)
        self.gossip.subscribe(TOPIC, self._check, self._take)

    def _take(self, author: str, data: bytes) -> None:
        if data.startswith(b"hello"):
            self.is_reached = True
        else:
            self.got.append((author, data))

    def _check(self, author: str, data: bytes) -> bool:
        if data == b"raise":
            raise KeyError("a validator that fails")
        if data == b"forged":
            raise RecordForged("a record that no honest peer makes")
        if data.startswith(b"bad"):
            self.refused.append(data)
            return False
        return True


@pytest.fixture
def line(hosts, nursery, until):
    """Nodes, each connected to the one before it, between which messages flow."""

    async def start(count: int, **options: object) -> list[Node]:
        nodes = [Node(await hosts.start(**options)) for _ in range(count)]
        for node in nodes:
            await nursery.start(node.gossip.run)
        for one, two in zip(nodes, nodes[1:], strict=False):
            await two.host.connect(one.host.peer_id, one.host.addrs)
        number = 0

        async def all_reached() -> bool:
            nonlocal number
            number += 1
            await nodes[0].gossip.publish(TOPIC, b"hello %d" % number)
            await trio.sleep(0.05)
            return all(node.is_reached for node in nodes[1:])

        await until(all_reached)
        return nodes

    return start


async def test_messages_reach_everybody_once_with_their_author(line, until) -> None:
    nodes = await line(4)
    sent = [b"message %d" % number for number in range(20)]
    for data in sent:
        await nodes[3].gossip.publish(TOPIC, data)
    await until(lambda: all(len(node.got) >= len(sent) for node in nodes[:3]))
    for node in nodes[:3]:
        assert sorted(node.got) == sorted((nodes[3].host.peer_id, data) for data in sent)
    assert nodes[3].got == []


async def test_what_a_validator_refuses_is_not_passed_on(line, until) -> None:
    nodes = await line(3)
    nodes[0].gossip._topics[TOPIC] = (lambda author, data: True, lambda author, data: None)
    await nodes[1].gossip.publish(TOPIC, b"bad from its own author")
    assert nodes[1].refused == [b"bad from its own author"]
    await nodes[2].gossip.publish(TOPIC, b"raise")
    await nodes[2].gossip.publish(TOPIC, b"fine")
    await until(lambda: (nodes[2].host.peer_id, b"fine") in nodes[0].got)
    assert [data for _, data in nodes[0].got] == [b"fine"]
    assert nodes[0].refused == nodes[2].refused == []


async def test_messages_are_small(hosts) -> None:
    node = Node(await hosts.start())
    with pytest.raises(ValueError, match="4096"):
        await node.gossip.publish(TOPIC, bytes(MAX_MESSAGE_BYTES + 1))
    await node.gossip.publish(TOPIC, b"nobody is there yet")


async def test_topics_come_first(hosts, nursery) -> None:
    node = Node(await hosts.start())
    await nursery.start(node.gossip.run)
    with pytest.raises(RuntimeError, match="before"):
        node.gossip.subscribe("other", lambda author, data: True, lambda author, data: None)


async def test_gossip_that_starts_late_reaches_earlier_peers(hosts, nursery, until) -> None:
    one, two = Node(await hosts.start()), Node(await hosts.start())
    await two.host.connect(one.host.peer_id, one.host.addrs)
    await nursery.start(one.gossip.run)
    await trio.sleep(0.1)
    await nursery.start(two.gossip.run)

    async def reached() -> bool:
        await one.gossip.publish(TOPIC, b"one")
        await two.gossip.publish(TOPIC, b"two")
        await trio.sleep(0.05)
        return bool(one.got and two.got)

    await until(reached)


async def test_the_service_is_started_again_where_it_fails(line, until, monkeypatch) -> None:
    monkeypatch.setattr(module, "REMIND_EVERY_S", 0.5)
    nodes = await line(2)
    before = nodes[0].gossip._pubsub
    assert before is not None

    async def fail() -> None:
        raise KeyError("libp2p failed")

    before.manager.run_task(fail)
    await until(lambda: nodes[0].gossip._pubsub not in (None, before))

    async def reached() -> bool:
        await nodes[0].gossip.publish(TOPIC, b"after")
        await nodes[1].gossip.publish(TOPIC, b"after")
        await trio.sleep(0.05)
        return bool(nodes[0].got and nodes[1].got)

    await until(reached, within_s=15)
    pubsub_notifees = [entry for entry in nodes[0].host.libp2p.swarm.notifees if type(entry).__name__ == "PubsubNotifee"]
    assert len(pubsub_notifees) == 1


async def test_a_neighbour_that_passes_on_what_no_honest_peer_does_is_dropped(line, until) -> None:
    nodes = await line(3)
    nodes[1].gossip._topics[TOPIC] = (lambda author, data: True, lambda author, data: None)
    nodes[1].gossip._pubsub.set_topic_validator(TOPIC, lambda forwarder, message: True, False)  # it does not check anything
    nodes[2].gossip._pubsub.set_topic_validator(TOPIC, lambda forwarder, message: True, False)
    for _ in range(30):
        await nodes[2].gossip.publish(TOPIC, b"forged")
        await trio.sleep(0.02)
    await until(lambda: not nodes[0].host.is_connected(nodes[1].host.peer_id))


async def test_a_neighbour_that_brings_too_much_is_not_listened_to(line, until) -> None:
    nodes = await line(2, limits=Limits(gossip_per_neighbour=Rate(50.0, 50.0)))
    sent = 400
    for number in range(sent):
        await nodes[1].gossip.publish(TOPIC, b"flood %d" % number)
        await trio.lowlevel.checkpoint()

    async def is_heard_again() -> bool:
        await nodes[1].gossip.publish(TOPIC, b"later %f" % trio.current_time())
        await trio.sleep(0.1)
        return any(data.startswith(b"later") for _, data in nodes[0].got)

    await until(is_heard_again, within_s=20)
    assert sum(data.startswith(b"flood") for _, data in nodes[0].got) < sent / 2


async def test_many_neighbours_in_one_place_bring_no_more_than_a_few(line, until, monkeypatch) -> None:
    hearer, other = await line(2)
    crowd = [Identity.generate().peer_id for _ in range(20)]
    addresses = {**dict.fromkeys(crowd, "198.51.100.1"), other.host.peer_id: "203.0.113.1"}
    monkeypatch.setattr(hearer.host, "remote_ip", addresses.get)
    checked = 0

    async def count(*_: object) -> None:
        nonlocal checked
        checked += 1

    with monkeypatch.context() as patched:
        patched.setattr(Pubsub, "push_msg", count)
        for number in range(400):
            for neighbour in crowd:
                message = Message(from_id=b"author", seqno=b"%d %s" % (number, neighbour.encode()), topicIDs=[TOPIC], data=b"flood")
                await hearer.gossip._pubsub.push_msg(ID.from_string(neighbour), message)
    assert hearer.host.limits.gossip_per_source.burst <= checked < 1.5 * hearer.host.limits.gossip_per_source.burst
    await other.gossip.publish(TOPIC, b"from elsewhere")
    await until(lambda: (other.host.peer_id, b"from elsewhere") in hearer.got)


async def test_gossip_that_was_cut_between_connected_peers_is_mended(line, until, monkeypatch) -> None:
    monkeypatch.setattr(module, "MEND_EVERY_S", 0.2)
    nodes = await line(2)
    for node in nodes:
        assert len(node.gossip.neighbours()) == 1
        pubsub = node.gossip._pubsub
        pubsub._peer_is_connected = lambda peer_id: False  # libp2p gives up on it
        for peer in list(pubsub.peers):
            pubsub._handle_dead_peer(peer)
        assert node.gossip.neighbours() == []
        del pubsub._peer_is_connected
    await until(lambda: all(len(node.gossip.neighbours()) == 1 for node in nodes), within_s=15)
