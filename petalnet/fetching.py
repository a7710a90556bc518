"""Getting blocks from peers: finds those that share them, asks several at once, checks what comes, and puts it into the cache of weights.

What is asked from whom is decided by `models.assembly`; here are the streams and the waits around that, and in `incoming` the disk. What
has come stays there, so a node that is killed goes on where it was.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import trio
from blake3 import blake3

from petalnet.errors import BusyError, CallerError, ModelError, PeerLate, PeerLost, PetalnetError, ProtocolError, short_id
from petalnet.incoming import Brought, Incoming
from petalnet.models.assembly import AT_ONCE, Ask, Assembly, Outcome, WrongList
from petalnet.models.block_file import find_block
from petalnet.models.manifest import BlockEntry
from petalnet.models.weight_cache import WeightCache, readable
from petalnet.p2p.fields import Message
from petalnet.p2p.messages import Error
from petalnet.p2p.protocols import WEIGHTS
from petalnet.p2p.rates import Rates
from petalnet.p2p.weight_messages import (
    BLOCK_ID_BYTES,
    MAX_ASKED,
    Chunk,
    ChunkList,
    ChunksHeld,
    GetChunk,
    GetChunkList,
    WhichChunks,
    indices_of,
)
from petalnet.routing.records import ServerRecord
from petalnet.threads import in_thread

if TYPE_CHECKING:
    from petalnet.p2p.streams import Stream
    from petalnet.peering import Peering
    from petalnet.sharing import Sharing

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=Message)

MOST_PEERS = 16
"""That are asked at a time; each may have a few chunks of 4 MiB on their way."""
LOOK_EVERY_S = 1.0
"""How often the known servers are looked through for one to ask."""
LOOK_UP_EVERY_S = 10.0
"""How often the swarm is asked for servers of the model."""
POLL_S = 2.0
"""How often a peer is asked what it has by now."""
NEWS_S = 0.5
"""After which a peer that has nothing to do looks whether it should help another one out, without having been told."""
CONNECT_WITHIN_S = 10.0
ANSWER_WITHIN_S = 60.0
"""For what takes a peer no effort; a chunk may take as long as the peer's owner allows, and is asked elsewhere meanwhile."""
IDLE_S = 30.0
"""After which a peer that gave nothing makes room for another one."""
AGAIN_S, LONGEST_AGAIN_S = 5.0, 120.0
"""Seconds until a peer is asked again that had nothing or was lost: the first time, doubled up to the longest."""
REPORT_EVERY_S = 10.0
SHARING_STATES = ("joining", "online", "draining")


@dataclass(frozen=True)
class Wanted:
    """A block to get.

    Attributes:
        entry: what is known of it: its digest (or as much of its beginning as servers announce), its tensors, and maybe its chunks, which
            then come from where the model comes from: other lists of peers do not count.
    """

    entry: BlockEntry

    @property
    def name(self) -> str:
        """By what it is called among peers."""
        return self.entry.digest[: 2 * BLOCK_ID_BYTES]


class Fetching:
    """Gets blocks of one model from peers.

    Attributes:
        bytes_fetched: so far, by peer.
    """

    def __init__(self, peering: Peering, sharing: Sharing, cache: WeightCache, model: str, *, max_rate: int | None = None) -> None:
        """
        Args:
            sharing: gives others what has come, chunk by chunk.
            model: the model's key.
            max_rate: bytes a second of all peers together, None for no bound.
        """
        self.peering = peering
        self.sharing = sharing
        self.cache = cache
        self.model = model
        self.bytes_fetched: Counter[str] = Counter()
        self._rates = None if max_rate is None else Rates(max_rate, max_rate)

    async def bring(self, wanted: Sequence[Wanted], *, patience_s: float = math.inf, least_bytes_s: float = 0.0) -> dict[str, Brought]:
        """Get blocks: those that are in the cache, and the others from peers.

        Args:
            patience_s: seconds without anything new after which what is lacking is given up; 0 to ask no peers at all.
            least_bytes_s: bytes a second that all peers together have to give over so many seconds, or what is lacking is given up.

        Returns:
            those that are here, by `Wanted.name`; all of them, unless patience ended.
        Raises:
            UsageError: there is no room for them on the disk.
        """
        self.cache.require(sum(block.entry.nbytes + len(block.entry.header) for block in wanted))
        found, lacking = {}, []
        for block in wanted:
            cached = await in_thread(find_block, self.cache, block.entry.digest)
            if cached is None:
                lacking.append(block)
                continue
            path, entry, payload = cached
            if entry.tensors != block.entry.tensors:
                logger.warning("servers announce a block that is another model's (%s): it is not used", block.name)
                continue
            self.sharing.share(entry, payload)
            found[block.name] = Brought(path, entry, {})
        if lacking and patience_s > 0:
            found.update(await self._bring(lacking, patience_s, least_bytes_s))
        return found

    async def _bring(self, lacking: Sequence[Wanted], patience_s: float, least_bytes_s: float) -> dict[str, Brought]:
        run = _Run(self, lacking)
        try:
            await run.run(patience_s, least_bytes_s)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(run.incoming.close)
        if run.incoming.failure is not None:
            raise run.incoming.failure
        return run.incoming.blocks

    async def pace(self, size: int) -> None:
        """Wait until so many bytes may be asked for."""
        if self._rates is not None:
            now = trio.current_time()
            wait = self._rates.wait("", now, size)
            self._rates.charge("", now, size)
            await trio.sleep(wait)

    def candidates(self) -> list[ServerRecord]:
        """Servers that say that they share weights of the model."""
        records = self.peering.view.servers(self.model, now=time.time(), states=SHARING_STATES)
        return [record for record in records if record.shares and record.peer_id != self.peering.host.peer_id]


class _Run:
    """Getting some blocks, once."""

    def __init__(self, fetching: Fetching, wanted: Sequence[Wanted]) -> None:
        self._fetching = fetching
        self._host = fetching.peering.host
        self._wanted = {block.name: block for block in wanted}
        self._size = sum(block.entry.nbytes for block in wanted)
        self._assembly = Assembly(self._wanted)
        self.incoming = Incoming(self._assembly, fetching.cache, fetching.sharing, blame=self._expel)
        self._peers: dict[str, trio.CancelScope] = {}
        self._useful_at: dict[str, float] = {}
        self._again_at: dict[str, tuple[float, float]] = {}
        self._news = trio.Event()
        self._nursery: trio.Nursery
        self._began = trio.current_time()

    async def run(self, patience_s: float, least_bytes_s: float) -> None:
        """Go on until all blocks are there, something keeps them from being written, or nothing new, or too little, has come for so many
        seconds."""
        logger.info("getting %d blocks (%s) from other servers", len(self._wanted), readable(self._size))
        async with trio.open_nursery() as self._nursery:
            for service in (self._look_up, self._look_for_peers, self._report, self._open_known, self.incoming.run):
                self._nursery.start_soon(service)
            await self._until_over(patience_s, least_bytes_s)
            self._nursery.cancel_scope.cancel()
        if self.incoming.blocks and self.incoming.failure is None:
            self._sum_up()

    async def _until_over(self, patience_s: float, least_bytes_s: float) -> None:
        since, before = trio.current_time(), self.incoming.nbytes_held
        while True:
            with trio.move_on_at(min(self.incoming.changed_at, since) + patience_s):
                await self.incoming.over.wait()
                return
            now, held = trio.current_time(), self.incoming.nbytes_held
            if now >= self.incoming.changed_at + patience_s:
                logger.info("no other server gives the %d blocks that are still lacking", len(self._assembly.open_blocks))
                return
            if now >= since + patience_s:
                # Where all has come already, only the disk is waited for.
                if held - before < min(least_bytes_s * (now - since), self._size - before):
                    logger.info("other servers give the %d blocks that are still lacking too slowly", len(self._assembly.open_blocks))
                    return
                since, before = now, held

    def _tell_news(self) -> None:
        """There may be something to ask for those that had nothing."""
        self._news.set()
        self._news = trio.Event()

    # ---- finding peers

    async def _look_up(self) -> None:
        while True:
            try:
                await self._fetching.peering.look_up(self._fetching.model)
            except PetalnetError as error:
                logger.debug("the swarm could not be looked up: %s", error)
            await trio.sleep(LOOK_UP_EVERY_S)

    async def _look_for_peers(self) -> None:
        while True:
            now = trio.current_time()
            free = [
                record
                for record in self._fetching.candidates()
                if record.peer_id not in self._peers
                and record.peer_id not in self._assembly.expelled
                and now >= self._again_at.get(record.peer_id, (0.0, 0.0))[0]
            ]
            free.sort(key=lambda record: (-self._promise(record), random.random()))
            for record in free[: MOST_PEERS - len(self._peers)]:
                self._peers[record.peer_id] = trio.CancelScope()
                self._useful_at[record.peer_id] = now
                self._nursery.start_soon(self._ask_peer, record)
            if len(free) > MOST_PEERS - len(self._peers) and self._peers:
                idlest = min(self._peers, key=lambda peer: self._useful_at[peer])
                if now - self._useful_at[idlest] > IDLE_S:
                    self._peers[idlest].cancel()
            await trio.sleep(LOOK_EVERY_S)

    def _promise(self, record: ServerRecord) -> int:
        """How likely a server has something: it says so; it loads blocks, who knows which; it may have more than it serves."""
        if any(digest in self._wanted for digest in record.block_digests):
            return 2
        return 1 if record.state == "joining" else 0

    async def _ask_peer(self, record: ServerRecord) -> None:
        """Get what a peer has until there is nothing more to get from it."""
        peer, host = record.peer_id, self._host
        try:
            with self._peers[peer]:
                async with (
                    await host.open_stream(peer, WEIGHTS, addrs=record.addrs, timeout_s=CONNECT_WITHIN_S) as control,
                    await host.open_stream(peer, WEIGHTS, timeout_s=CONNECT_WITHIN_S) as chunks,
                    trio.open_nursery() as nursery,
                ):
                    nursery.start_soon(self._ask_for_chunks, peer, chunks)
                    await self._ask_what_is_there(peer, control)
                    nursery.cancel_scope.cancel()
        except* ProtocolError as group:
            self._expel(peer, str(_first(group)))
        except* PetalnetError as group:
            logger.debug("no weights from peer %s for the moment: %s", peer, _first(group))
        finally:
            del self._peers[peer], self._useful_at[peer]
            self._assembly.leave(peer)
            _, before = self._again_at.get(peer, (0.0, 0.0))
            pause = min(max(2 * before, AGAIN_S), LONGEST_AGAIN_S)
            self._again_at[peer] = trio.current_time() + pause, pause
            self._tell_news()

    def _expel(self, peer: str, reason: str) -> None:
        """A peer lied: nothing is asked of it any more, and it is kept away."""
        logger.warning("peer %s is not asked for weights any more: %s", short_id(peer), reason)
        self._assembly.expel(peer)
        self._host.offence(peer, f"{WEIGHTS.id}: {reason}", self._host.limits.offence_threshold)
        if peer in self._peers:
            self._peers[peer].cancel()

    # ---- what a peer has

    async def _ask_what_is_there(self, peer: str, stream: Stream) -> None:
        while True:
            gives = False
            names = self._assembly.open_blocks
            for batch in (names[start : start + MAX_ASKED] for start in range(0, len(names), MAX_ASKED)):
                answer = await _request(stream, WhichChunks(tuple(map(bytes.fromhex, batch))), ChunksHeld)
                if not len(answer.lists) == len(answer.held) == len(batch) or any(len(digest) not in (0, 32) for digest in answer.lists):
                    raise ProtocolError("what it has makes no sense", peer)
                for name, digest, bits in zip(batch, answer.lists, answer.held, strict=True):
                    if 8 * len(bits) >= self._wanted[name].entry.num_chunks + 8:
                        raise ProtocolError("it says that it has more chunks than there are", peer)
                    gives |= bool(digest)
                    self._assembly.tell(peer, name, digest.hex(), indices_of(bits) if bits else None)
            while (lacking := self._assembly.list_to_ask(peer)) is not None:
                await self._ask_for_list(peer, lacking, stream)
            if not gives:
                return
            self._again_at.pop(peer, None)
            self._tell_news()
            await trio.sleep(POLL_S)

    async def _ask_for_list(self, peer: str, name: str, stream: Stream) -> None:
        try:
            answer = await _request(stream, GetChunkList(bytes.fromhex(name)), ChunkList)
        except (CallerError, BusyError):
            self._assembly.take_list(peer, name, None)
            return
        try:
            entry = await in_thread(_decode, bytes(answer.entry.data))
            believed = self._assembly.take_list(peer, name, entry)
        except (ModelError, WrongList) as error:
            raise ProtocolError(f"a list of chunks is wrong: {error}", peer) from error
        known = self._wanted[name].entry
        if believed and entry.tensors == known.tensors and entry.digest.startswith(known.digest):
            self._nursery.start_soon(self.incoming.use_list, name, entry)
        elif believed:
            logger.warning("peer %s has other tensors for a block than the model", short_id(peer))
            self._assembly.reject_list(name, entry.list_digest)

    async def _open_known(self) -> None:
        """Begin with the blocks whose chunks are known from where the model comes from."""
        known = {name: block.entry for name, block in sorted(self._wanted.items()) if block.entry.chunks}
        for name, entry in known.items():
            self._assembly.fix_list(name, entry.list_digest)
        for name, entry in known.items():
            await self.incoming.use_list(name, entry)

    # ---- chunks

    async def _ask_for_chunks(self, peer: str, stream: Stream) -> None:
        asked: deque[Ask] = deque()
        while True:
            while len(asked) < AT_ONCE and (ask := self._assembly.ask(peer, trio.current_time())) is not None:
                start, end = self._wanted[ask.block].entry.chunk_range(ask.index)
                await self._fetching.pace(end - start)
                asked.append(ask)
                await stream.send(GetChunk(bytes.fromhex(ask.block), ask.index, bytes.fromhex(ask.digest)))
            if asked:
                answer = await stream.receive()
                await self._take_answer(peer, asked.popleft(), answer)
            else:
                with trio.move_on_after(NEWS_S):
                    await self._news.wait()

    async def _take_answer(self, peer: str, ask: Ask, answer: Message | None) -> None:
        if answer is None:
            raise PeerLost(f"peer {peer} closed the stream", peer)
        if isinstance(answer, Error):
            error = answer.exception(peer)
            if not isinstance(error, CallerError):
                raise error
            self._assembly.refuse(peer, ask, trio.current_time())
            return
        if not isinstance(answer, Chunk):
            raise ProtocolError(f"a message {answer.name} is no answer to a request for a chunk", peer)
        data = bytes(answer.data.data)
        digest = await in_thread(lambda: blake3(data).hexdigest())
        outcome = self._assembly.answer(peer, ask, digest, trio.current_time())
        if outcome is Outcome.WRONG:
            raise ProtocolError(f"chunk {ask.index} of a block is not what it said it had", peer)
        self._fetching.bytes_fetched[peer] += len(data)
        self._useful_at[peer] = trio.current_time()
        if outcome is Outcome.TAKE:
            with trio.CancelScope(shield=True):  # it counts as there from now on, whatever becomes of the peer
                await self.incoming.write(peer, ask, data)

    # ---- how it goes

    async def _report(self) -> None:
        before = 0
        while True:
            await trio.sleep(REPORT_EVERY_S)
            rate, before = (self.incoming.nbytes - before) / REPORT_EVERY_S, self.incoming.nbytes
            here = f"{readable(self.incoming.nbytes_held)} of {readable(self._size)} are here"
            peers = f"{len(self._peers)} peer{'s' * (len(self._peers) != 1)}"
            if rate:
                logger.info("%s, %s/s from %s", here, readable(int(rate)), peers)
            else:
                logger.warning("%s; waiting for servers that share the rest (%s asked)", here, peers)

    def _sum_up(self) -> None:
        givers: Counter[str] = Counter()
        for brought in self.incoming.blocks.values():
            givers.update(brought.givers)
        named = ", ".join(f"{short_id(peer)} {readable(count)}" for peer, count in givers.most_common(4))
        more = f" and {len(givers) - 4} more" if len(givers) > 4 else ""
        took = trio.current_time() - self._began
        logger.info("%d blocks came from other servers in %.1f s: %s%s", len(self.incoming.blocks), took, named, more)


async def _request(stream: Stream, request: Message, kind: type[T]) -> T:
    """One request and its answer.

    Raises:
        PetalnetError: what the peer told, or that it does not answer.
        ProtocolError: the answer is none to this request.
    """
    with trio.move_on_after(ANSWER_WITHIN_S) as scope:
        await stream.send(request)
        answer = await stream.receive()
    if scope.cancelled_caught:
        raise PeerLate(f"peer {stream.peer_id} does not answer", stream.peer_id)
    if answer is None:
        raise PeerLost(f"peer {stream.peer_id} closed the stream", stream.peer_id)
    if isinstance(answer, Error):
        raise answer.exception(stream.peer_id)
    if not isinstance(answer, kind):
        raise ProtocolError(f"a message {answer.name} is no answer to {request.name}", stream.peer_id)
    return answer


def _decode(data: bytes) -> BlockEntry:
    """A list of chunks, with its digest worked out: both take a while where it is long. Raises ModelError."""
    entry = BlockEntry.decode(data)
    _ = entry.list_digest
    return entry


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """One of the errors in a group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
