"""Gossip: small messages to everybody who listens to a topic, by libp2p's gossipsub.

Messages carry their author's signature and pass a validator on every node before they are handed on. Delivery is best effort: whoever
needs certainty asks (see `discovery`). How much an author may say is the validator's business; how much a neighbour may bring, be it new
or not, is checked here, before a signature costs time.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Set

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.peer.id import ID
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb.rpc_pb2 import RPC, Message
from libp2p.pubsub.pubsub import Pubsub
from libp2p.tools.anyio_service import background_trio_service

from petalnet.p2p.host import Host
from petalnet.p2p.rates import Rates
from petalnet.p2p.sources import source_of
from petalnet.routing.records import RecordForged

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 4096
"""Small messages only: joiners are handed the recent history, and a large one would hold up everybody's links."""
MAX_RPC_BYTES = 256 * 1024
"""The longest frame that is read from a peer, which may hold a history of several messages."""
HEARTBEAT_S = 1
REMIND_EVERY_S = 10.0
MEND_EVERY_S = 3.0
MIN_NEIGHBOURS = 3
"""Below which a node looks for more: with one, it hears what that one lets it hear."""
_RESTART_S = 1.0
_PROTOCOLS = [PROTOCOL_ID_V11]
"""Version 1.2 announces each message beside sending it, which pays for large ones; for ours it fills the queues of 32."""

Validator = Callable[[str, bytes], bool]
Receiver = Callable[[str, bytes], None]


class Gossip:
    """The gossip of one node: subscribe first, then `run`."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._topics: dict[str, tuple[Validator, Receiver]] = {}
        self._pubsub: _GuardedPubsub | None = None

    def subscribe(self, topic: str, validator: Validator, on_message: Receiver) -> None:
        """Listen to a topic, from the start of `run` on.

        Args:
            topic: its name.
            validator: is given the author's peer id and the data, of this node's own messages too; False: the message is dropped and
                not passed on. RecordForged: so it is, and the neighbour that brought it broke a rule.
            on_message: is given the author's peer id and the data of each valid message of another node, once.
        """
        if self._pubsub is not None:
            raise RuntimeError("topics are subscribed to before the gossip runs")
        self._topics[topic] = (validator, on_message)

    async def publish(self, topic: str, data: bytes) -> None:
        """Tell everybody who listens to `topic`. Raises ValueError where `data` is longer than 4 KB."""
        if len(data) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a gossip message of {len(data)} bytes is too long; {MAX_MESSAGE_BYTES} are allowed")
        if self._pubsub is None:
            logger.debug("a message was dropped: the gossip does not run")
            return
        try:
            await self._pubsub.publish(topic, data)
        except BaseLibp2pError as error:
            logger.debug("a message was not published: %r", error)

    def neighbours(self) -> list[str]:
        """Peers that this node tells what it hears, and that want to hear it."""
        if self._pubsub is None:
            return []
        listening = set[ID]().union(*(self._pubsub.peer_topics.get(topic, set()) for topic in self._topics))
        return [str(peer) for peer in self._pubsub.peers if peer in listening]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Gossip until cancelled; started once messages can be published. Where libp2p's service fails, a new one takes its place."""
        status: trio.TaskStatus[None] = task_status
        while True:
            try:
                await self._run_once(status)
            except Exception as error:  # not swallowed: logged, and the service begins anew
                logger.warning("the gossip's service failed and is started again: %r", error)
            finally:
                self._pubsub = None
            status = trio.TASK_STATUS_IGNORED
            await trio.sleep(_RESTART_S)

    async def _run_once(self, task_status: trio.TaskStatus[None]) -> None:
        network = self._host.libp2p.swarm
        notifees = list(network.notifees)
        router = GossipSub(
            _PROTOCOLS,
            degree=6,
            degree_low=4,
            degree_high=12,
            heartbeat_interval=HEARTBEAT_S,
            # A bound on what libp2p counts; the rate is checked in `_GuardedPubsub`.
            max_messages_per_topic_per_second=self._host.limits.gossip_per_neighbour.burst,
            adaptive_gossip_enabled=False,
            eclipse_protection_enabled=False,  # wants neighbours of three addresses; a swarm in one building has one
        )
        pubsub = _GuardedPubsub(self._host, router, allowed_topics=self._topics.keys())
        try:
            async with background_trio_service(pubsub), background_trio_service(router), trio.open_nursery() as nursery:
                await pubsub.wait_until_ready()
                for topic, (validator, on_message) in self._topics.items():
                    pubsub.set_topic_validator(topic, self._checked(topic, validator), False)
                    nursery.start_soon(self._drain, pubsub, topic, on_message)
                for peer_id in self._host.connected_peers():  # it is told of the later ones by itself
                    nursery.start_soon(pubsub.ensure_peer_stream, ID.from_string(peer_id))
                nursery.start_soon(self._remind, pubsub)
                nursery.start_soon(self._mend, pubsub)
                self._pubsub = pubsub
                task_status.started()
                await pubsub.get_manager().wait_finished()
        finally:
            for notifee in network.notifees[:]:
                if notifee not in notifees and type(notifee).__module__.startswith("libp2p.pubsub"):
                    network.remove_notifee(notifee)
            with trio.CancelScope(shield=True):
                await self._reset_streams()

    async def _remind(self, pubsub: Pubsub) -> None:
        """Tell neighbours again and again what this node listens to: one that sees an old stream of ours end forgets it."""
        subscriptions = [RPC.SubOpts(subscribe=True, topicid=topic) for topic in self._topics]
        reminder = RPC(subscriptions=subscriptions).SerializeToString()
        while True:
            await trio.sleep(REMIND_EVERY_S)
            await pubsub.message_all_peers(reminder)

    async def _mend(self, pubsub: Pubsub) -> None:
        """Open what is missing of the streams to connected peers, as long as there are few neighbours: libp2p gives up after a while."""
        while True:
            await trio.sleep(MEND_EVERY_S * random.uniform(0.8, 1.2))
            if len(self.neighbours()) < MIN_NEIGHBOURS:
                missing = [peer for name in self._host.connected_peers() if (peer := ID.from_string(name)) not in pubsub.peers]
                async with trio.open_nursery() as nursery:
                    for peer in random.sample(missing, min(len(missing), MIN_NEIGHBOURS)):
                        nursery.start_soon(pubsub.ensure_peer_stream, peer, MEND_EVERY_S)

    async def _reset_streams(self) -> None:
        """End the streams of a service that is over, so that peers open new ones instead of writing into the void."""
        for connection in self._host.libp2p.swarm.get_connections():
            for stream in connection.get_streams():
                if stream.get_protocol() in _PROTOCOLS:
                    await stream.reset()

    def _checked(self, topic: str, validator: Validator) -> Callable[[ID, Message], bool]:
        def check(_: ID, message: Message) -> bool:
            # One topic a message: for others that it names, every node on the way would keep counts.
            if list(message.topicIDs) != [topic] or len(message.data) > MAX_MESSAGE_BYTES:
                return False
            return validator(str(ID(message.from_id)), message.data)

        return check

    async def _drain(self, pubsub: Pubsub, topic: str, on_message: Receiver) -> None:
        """Hand messages on as they come; libp2p's queue holds 32 and drops the rest."""
        subscription = await pubsub.subscribe(topic)
        async for message in subscription:
            author = str(ID(message.from_id))
            if author != self._host.peer_id:
                on_message(author, message.data)


class _GuardedPubsub(Pubsub):
    """Bounds what each neighbour brings, and drops a message that makes libp2p's or our own check fail instead of ending the service."""

    def __init__(self, host: Host, router: GossipSub, *, allowed_topics: Set[str]) -> None:
        super().__init__(host.libp2p, router, max_inbound_rpc_size=MAX_RPC_BYTES, allowed_topics=allowed_topics)
        self._petalnet_host = host
        self._brought = Rates(*host.limits.gossip_per_neighbour)
        self._brought_from = Rates(*host.limits.gossip_per_source)

    async def push_msg(self, msg_forwarder: ID, msg: Message) -> None:
        neighbour = str(msg_forwarder)
        if neighbour != self._petalnet_host.peer_id and not self._may_bring(neighbour):
            logger.debug("a message was dropped: neighbour %s, or where it is, brings too many", neighbour)
            return
        try:
            await super().push_msg(msg_forwarder, msg)
        except RecordForged as error:
            self._petalnet_host.offence(neighbour, f"it passed on what does not hold: {error}")
        except Exception as error:  # not swallowed: logged, and the message goes no further; one from a stranger must not end the service
            logger.debug("a message that came through %s was dropped: %r", neighbour, error)

    def _may_bring(self, neighbour: str) -> bool:
        now = trio.current_time()
        return self._brought.take(neighbour, now) and self._brought_from.take(source_of(self._petalnet_host.remote_ip(neighbour)), now)
