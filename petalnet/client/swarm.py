"""The client's membership of a swarm: one libp2p host, what is known of the servers, and the routes through them.

A `Swarm` is shared by all models of a process that name the same bootstrap peers, and by copies of them. It starts to join at once, on
the portal's thread, so that joining overlaps with whatever the caller does next (loading weights). After a fork the child joins anew
when it first needs to, and after a failure to join the next use tries again.
"""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from petalnet.client.kept_graphs import KeptGraphs
from petalnet.client.lora_uploads import LoraUploads
from petalnet.client.observing import Observing
from petalnet.client.portal import Job, Portal, get_portal
from petalnet.client.prefix import SentNames
from petalnet.client.streams import IdleStreams
from petalnet.client.under_way import UnderWay
from petalnet.errors import MissingBlocksError, PeerUnreachable, PetalnetError, ServerError
from petalnet.p2p.access import Access
from petalnet.p2p.addresses import own_interfaces
from petalnet.p2p.pass_messages import DropGraphs
from petalnet.routing.adapters import adapter_label, having, unknown_adapter
from petalnet.routing.expected import Client
from petalnet.routing.observed import Observed
from petalnet.routing.pace import refresh_every_s
from petalnet.routing.precision import ANY, Precisions
from petalnet.routing.records import ServerRecord, Work
from petalnet.routing.routes import Hop, find_route
from petalnet.routing.swarm import SwarmView

if TYPE_CHECKING:
    from petalnet.client.trace import StepTimes
    from petalnet.p2p.host import Host
    from petalnet.peering import Peering

logger = logging.getLogger(__name__)

TIDY_EVERY_S = 10.0
"""How often streams that nobody uses are closed. The servers of a model in use are looked up about as often, less so in large swarms; what
they announce in between arrives by itself or is looked up on need."""
SETTLE_S = 6.0
"""How long after joining a missing block may still turn up: a server that became ready with us, a look-up that met a dead peer, peers to be
connected to at a tenth of a second a round trip."""
RETRY_LOOKUP_S = 0.25
LOOK_AGAIN_S = 5.0
"""Age of a look-up from which on servers that are full are a reason for another one."""
MOST_WARM = 32
WARM_WITHIN_S = 5.0
THERE_WITHIN_S = 1.5
"""For the servers of a route to be connected: five round trips across the world. Others are preferred to one that takes longer."""
OWN_WITHIN_S = 0.02
"""A server on this machine answers within this, unless it has no time at all."""
OWN_ADDRESSES_FOR_S = 60.0
PRESENT = ("joining", "online", "draining")
"""States of servers whose adapters count when a name is looked for."""
CUT_FOR_S = 60.0
"""How long two servers count as not reaching each other: they try again at each session, and with other clients."""


class Membership:
    """The running part of a `Swarm`; all of it on the portal's thread."""

    def __init__(self, initial_peers: Collection[str], access: Access) -> None:
        self.initial_peers = list(initial_peers)
        self.access = access
        self.failure: BaseException | None = None
        self.idle_streams = IdleStreams()
        self.kept_graphs = KeptGraphs(self._tell)
        self.under_way = UnderWay()
        self.sent_names = SentNames()
        self.lora_uploads = LoraUploads()
        self._observing = Observing(lambda peer_id: self.record(peer_id), lambda peer_id: self.host.round_trip_s(peer_id))
        self._cut: dict[tuple[str, str], float] = {}
        self._own_ips: frozenset[str] = frozenset()
        self._own_ips_at = -math.inf
        self._peering: Peering
        self._nursery: trio.Nursery
        self._over = trio.Event()  # the first attempt to join
        self._joined_at = math.inf
        self._look_ups: dict[str | None, trio.Event] = {}
        self._looked_at: dict[str | None, float] = {}  # when the last look-up for a model was over
        self._watched: set[str] = set()
        self._warming: dict[str, float] = {}  # since when
        self._warmed = trio.lowlevel.ParkingLot()
        self._random = random.Random()

    @property
    def host(self) -> Host:
        return self._peering.host

    @property
    def view(self) -> SwarmView:
        """What is known of the servers."""
        return self._peering.view

    async def run(self) -> None:
        """Join and stay until cancelled."""
        # Imported here, on the portal's thread: the caller's thread goes on with its own imports meanwhile.
        from petalnet.p2p.identity import Identity
        from petalnet.peering import open_peering

        peering = open_peering(Identity.generate(), initial_peers=self.initial_peers, listen=(), server=False, access=self.access)
        try:
            async with peering as self._peering, trio.open_nursery() as self._nursery:
                self._joined_at = trio.current_time()
                self._over.set()
                for model in self._watched:
                    self._nursery.start_soon(self._refresh, model)
                self._nursery.start_soon(self._keep_fresh)
                self._nursery.start_soon(self.kept_graphs.run)
        except Exception as error:  # not swallowed: whoever uses the swarm gets it
            self.failure = _first_cause(error)
            logger.debug("the connection to the swarm has failed: %s", self.failure)
        finally:
            self._over.set()

    async def joined(self) -> None:
        """Wait for the end of the attempt to join.

        Raises:
            PeerUnreachable: no bootstrap peer was reached.
            ServerError: the membership has failed since.
        """
        await self._over.wait()
        if isinstance(self.failure, PetalnetError):
            raise self.failure
        if self.failure is not None:
            raise ServerError(f"the connection to the swarm has failed: {type(self.failure).__name__}: {self.failure}") from self.failure

    def watch(self, model: str) -> None:
        """Keep the servers of a model in view, by the model's key."""
        if model not in self._watched:
            self._watched.add(model)
            if self._joined_at < math.inf:
                self._nursery.start_soon(self._refresh, model)

    async def look_up(self, model: str | None = None, *, thorough: bool = False) -> None:
        """Ask the swarm who serves a model (None: any). One look-up at a time: a second caller waits for the end of the one under way.

        Args:
            thorough: ask all that may know, where some block has no server.
        """
        under_way = self._look_ups.get(model)
        if under_way is not None:
            await under_way.wait()
            return
        self._look_ups[model] = done = trio.Event()
        try:
            await self._peering.look_up(model, thorough=thorough)
        finally:
            del self._look_ups[model]
            self._looked_at[model] = trio.current_time()
            done.set()
        self._warm(self._peering.view.servers(model, now=time.time()))

    async def route(
        self,
        model: str,
        first: int,
        end: int,
        *,
        allowed: Collection[str] | None = None,
        blocked: Collection[str] = (),
        work: Work = "decode",
        tokens: int = 1,
        look: bool = True,
        kv_tokens: int = 0,
        like: Sequence[ServerRecord] | None = None,
        direct: bool = True,
        adapter: str | None = None,
        precisions: Precisions = ANY,
    ) -> list[Hop]:
        """The quickest chain of servers through blocks [first, end) of a model.

        Args:
            kv_tokens: that the session will take on each server (rows × max_length): those with less free are left out where others are.
            like: records of servers whose work others are to go on with: only servers with the same bytes of these blocks, dtype and
                quantization.
            look: whether to look for servers where those that are known do not suffice, and to go on with it for a moment after joining.
                Without it they are looked for once, unless that was done lately: others are known, and there is something to do meanwhile.
            adapter: the name or label of a LoRA adapter that all of them have.
            precisions: what they may compute in.

        Raises:
            CallerError: nobody has the adapter, or there are several of the name.
            MissingBlocksError: some block has no server: at once where the swarm is known, a moment after joining at the latest. Its
                `answers` are of servers that have the blocks and failed a moment ago.
            ServerError: the swarm could not be joined.
        """
        await self.joined()
        view = self._peering.view
        looked = False
        while True:
            now = time.time()
            present = [] if adapter is None else view.servers(model, now=now, states=PRESENT, allowed=allowed, include_failed=True)
            label = "" if adapter is None else adapter_label(present, adapter)
            records = precisions.of(having(view.servers(model, now=now, allowed=allowed, blocked=blocked), adapter, label))
            # Passes without a session spread over servers that are about as good, by what this client has asked each of them for already;
            # sessions take the best route.
            spread = self._random if work == "forward" and not self.under_way.work else None
            find = partial(find_route, first=first, end=end, now=now, work=work, tokens=tokens, rng=spread, kv_tokens=kv_tokens, like=like)
            try:
                hops = find(records, client=self.outlook(records, direct=direct))
                if await self._are_there(hops):
                    return [replace(hop, adapter=label) for hop in hops] if label else hops
                continue
            except MissingBlocksError as error:
                is_settled = trio.current_time() > self._joined_at + SETTLE_S
                is_fresh = trio.current_time() <= self._looked_at.get(model, -math.inf) + LOOK_AGAIN_S
                if (looked and is_settled) if look else (looked or (is_settled and is_fresh)):
                    # Nobody else is to be found: rather a server that failed a moment ago than none.
                    if adapter is not None and not label:
                        raise unknown_adapter(present, adapter) from None
                    resorts = view.servers(model, now=now, allowed=allowed, blocked=blocked, last_resort=True)
                    records = precisions.of(having(resorts, adapter, label))
                    with suppress(MissingBlocksError):
                        hops = find(records, client=self.outlook(records, direct=direct))
                        return [replace(hop, adapter=label) for hop in hops]
                    known = view.servers(model, now=now, include_failed=True)
                    failed = {
                        record.peer_id: f"failed a moment ago, avoided for {until - now:.0f} s more"
                        for record in view.servers(model, now=now, allowed=allowed, blocked=blocked, include_failed=True)
                        if (until := view.failed_until(record.peer_id, now=now)) is not None
                        and any(record.span[0] <= block < record.span[1] for block in error.blocks)
                    }
                    peers = (record.peer_id for record in known)
                    hint = error.hint or precisions.hint(resorts, error.blocks)
                    hint = hint or (f"the adapter {label} is needed as well" if label else "")
                    raise MissingBlocksError(error.blocks, peers, hint=hint, answers=failed) from None
            if looked:
                await trio.sleep(RETRY_LOOKUP_S)
            try:
                await self.look_up(model, thorough=True)
            except PetalnetError:
                if look:
                    raise
            looked = True

    async def _are_there(self, hops: Sequence[Hop]) -> bool:
        """Whether the servers of a route are connected, or there is no use in waiting for that any longer.

        Who is not there soon is doubtful from then on: records outlive their servers, and a dead one may look better than all others.
        """
        missing = [record for hop in hops if not self.host.is_connected(hop.peer_id) and (record := self.record(hop.peer_id)) is not None]
        doubtful = [record for record in missing if self.view.is_doubtful(record.peer_id, now=time.time())]
        unknown = [record for record in missing if record not in doubtful]
        if not unknown:
            return True
        self._warm(unknown, most=MOST_WARM + len(unknown))
        with trio.move_on_at(max(self._warming.get(record.peer_id, -math.inf) for record in unknown) + THERE_WITHIN_S):
            while any(record.peer_id in self._warming for record in unknown):
                await self._warmed.park()
        late = [record for record in unknown if not self.host.is_connected(record.peer_id)]
        for record in late:
            self.mark_late(record.peer_id)
        return not late

    def start(self, function: Callable[[], Awaitable[None]]) -> None:
        """Run `function()` beside everything else for as long as this is a member of the swarm; it has to deal with its own errors."""
        self._nursery.start_soon(function)

    def outlook(self, records: Iterable[ServerRecord], *, direct: bool = True) -> Client:
        """What is known here of servers beside their records.

        The user's own are those on this machine: their connections lead to loopback or to one of this machine's addresses.
        """
        self._observing.count()
        host, view, now, wall = self.host, self._peering.view, trio.current_time(), time.time()
        if now - self._own_ips_at > OWN_ADDRESSES_FOR_S:
            self._own_ips_at = now
            self._own_ips = frozenset(str(interface.ip) for interface in own_interfaces())
        near = [record.peer_id for record in records if (trip_s := host.round_trip_s(record.peer_id)) is not None and trip_s < OWN_WITHIN_S]
        return Client(
            round_trip=host.round_trip_s,
            direct=direct,
            own={peer_id for peer_id in near if host.remote_ip(peer_id) in self._own_ips},
            cut={pair for pair, until in self._cut.items() if until > now},
            doubtful={record.peer_id for record in records if view.is_doubtful(record.peer_id, now=wall)},
            observed=self.observed,
            under_way=self.under_way.work,
            clock=now,
        )

    def record(self, peer_id: str) -> ServerRecord | None:
        """The newest record of a server, expired or not."""
        return self._peering.view.record(peer_id)

    def mark_cut(self, peer_id: str, next_id: str) -> None:
        """A server does not reach another one: for a while, routes count with this client between them."""
        now = trio.current_time()
        self._cut = {pair: until for pair, until in self._cut.items() if until > now} | {(peer_id, next_id): now + CUT_FOR_S}

    @property
    def observed(self) -> Observed:
        """What this client saw of servers' speed."""
        return self._observing.observed

    def observe(self, peer_id: str, *, tokens: int, blocks: int, compute_s: float, queue_s: float, work: Work | None = None) -> None:
        """Note what a finished step took at a server, so that routes count with it. Cheap.

        Args:
            tokens: rows × new tokens.
            blocks: how many blocks the server ran.
            compute_s, queue_s: seconds of computation, and of waiting for it.
            work: None for a session's step: decode or prefill, by the number of tokens.
        """
        self._observing.note(peer_id, tokens=tokens, blocks=blocks, compute_s=compute_s, queue_s=queue_s, work=work)

    def observe_step(self, step: StepTimes, *, rows: int = 1) -> None:
        """Note what a finished step of a session took, at all of its servers; what they say of it is checked by this client's clock."""
        self._observing.note_step(step, rows)

    def mark_failed(self, peer_id: str, *, wrong: bool = False) -> None:
        """Take a server out of all routes at once; `wrong` where it is there, and answered wrongly."""
        until = self._peering.view.mark_failed(peer_id, now=time.time(), wrong=wrong)
        logger.info("server %s failed and is avoided for %.0f s", peer_id, until - time.time())

    def mark_late(self, peer_id: str) -> None:
        """A server, or the way to it, may hang: for some seconds others are preferred."""
        self._peering.view.mark_late(peer_id, now=time.time())
        logger.info("server %s was late: others are preferred for a moment", peer_id)

    def mark_ok(self, peer_id: str) -> None:
        """A server has done its work."""
        self._peering.view.mark_ok(peer_id)

    async def _tell(self, peer_id: str, message: DropGraphs) -> None:
        """Send a server what it does not answer, if it is connected. Raises PetalnetError."""
        from petalnet.p2p.protocols import FORWARD

        if self.host.is_connected(peer_id):
            stream = self.idle_streams.take(peer_id) or await self.host.open_stream(peer_id, FORWARD)
            await stream.send(message)
            await self.idle_streams.keep(stream)

    def _warm(self, records: Iterable[ServerRecord], *, most: int = MOST_WARM) -> None:
        """Connect to servers ahead of need, so that their round trips are known when a route is chosen."""
        connected = set(self.host.connected_peers())
        for record in records:
            if record.peer_id not in connected and record.peer_id not in self._warming and len(self._warming) < most:
                self._warming[record.peer_id] = trio.current_time()
                self._nursery.start_soon(self._connect, record)

    async def _connect(self, record: ServerRecord) -> None:
        try:
            await self.host.connect(record.peer_id, record.addrs, timeout_s=WARM_WITHIN_S)
        except PeerUnreachable as error:
            # Nobody needed it yet, and this machine may be what is late: it stays in the routes, unmeasured, behind those that answer.
            logger.debug("server %s cannot be reached ahead of need: %s", record.peer_id, error)
        finally:
            del self._warming[record.peer_id]
            self._warmed.unpark_all()

    async def _keep_fresh(self) -> None:
        refreshed = trio.current_time()
        while True:
            await trio.sleep(TIDY_EVERY_S)
            await self.idle_streams.close_old()
            if trio.current_time() - refreshed >= refresh_every_s(len(self._peering.view)):
                refreshed = trio.current_time()
                for model in list(self._watched):
                    await self._refresh(model)

    async def _refresh(self, model: str) -> None:
        try:
            await self.look_up(model)
        except PetalnetError as error:
            logger.debug("the servers of %s could not be looked up: %s", model, error)


class _Joined:
    """A membership and the handles that share it."""

    def __init__(self, initial_peers: tuple[str, ...], access: Access) -> None:
        self.initial_peers = initial_peers
        self.access = access
        self.users = 0
        self.start()

    def start(self) -> None:
        self.pid = os.getpid()
        self.portal = get_portal()
        self.membership = Membership(self.initial_peers, self.access)
        self.job: Job[None] = self.portal.start(self.membership.run)

    @property
    def ended(self) -> bool:
        """True where the membership has failed, and in a forked child, which has none of its parent's threads."""
        return self.pid != os.getpid() or self.membership.failure is not None


class Swarm:
    """A handle to a swarm, for synchronous code; see the module's docstring.

    Making one starts to join and does not wait. The swarm is left when its last handle is closed or forgotten.
    """

    def __init__(self, initial_peers: Collection[str], access: Access = Access()) -> None:  # noqa: B008  # a value that never changes
        self.initial_peers = tuple(sorted(set(initial_peers)))
        self.access = access
        with _lock:
            key = self.initial_peers, access
            if key not in _swarms:
                _swarms[key] = _Joined(*key)
            self._joined = _swarms[key]
            self._joined.users += 1
        self._leave = weakref.finalize(self, _leave, self._joined)
        self._leave.atexit = False

    @property
    def portal(self) -> Portal:
        """Where this swarm's coroutines run."""
        return self._live().portal

    @property
    def membership(self) -> Membership:
        """The running part, to be used on the portal's thread only."""
        return self._live().membership

    def close(self) -> None:
        """This handle is not used any more."""
        self._leave()

    def _live(self) -> _Joined:
        if not self._leave.alive:
            raise RuntimeError("the model was closed: its connection to the swarm is gone")
        joined = self._joined
        if joined.ended:
            with _lock:
                if joined.ended:
                    joined.start()
        return joined

    def __deepcopy__(self, memo: dict[int, Any]) -> Swarm:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (Swarm, (self.initial_peers, self.access))


# Reentrant: a handle that is forgotten may be finalised by the garbage collector while this very thread holds the lock.
_lock = threading.RLock()
_swarms: dict[tuple[tuple[str, ...], Access], _Joined] = {}


def _leave(joined: _Joined) -> None:
    with _lock:
        joined.users -= 1
        if joined.users == 0:
            _swarms.pop((joined.initial_peers, joined.access), None)
            if joined.pid == os.getpid():
                joined.job.cancel()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
