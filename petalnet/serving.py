"""A server's life: open the model, choose blocks, load them, serve, go to other blocks where the swarm needs it more, and leave in good
order.

What others hear of it is always true, and always said first: "joining" with the blocks to be before they are loaded, "draining" before
sessions are sent away, "online" once requests are answered.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import trio

from petalnet.announcing import LIFETIME_S, RATE_FIELDS, Announcer, Load
from petalnet.answering import Answering
from petalnet.config import DEFAULT_DRAIN_S, Settings
from petalnet.errors import PetalnetError, UsageError
from petalnet.linking import Linking
from petalnet.loaded import Loaded, load, release_memory
from petalnet.peering import Peering
from petalnet.placing import SECOND_LOOKS, Placing
from petalnet.routing.placement import Move
from petalnet.routing.records import MAX_ADAPTERS, MAX_ADAPTERS_BYTES, MAX_ADDRS, ServerRecord
from petalnet.supply import Supply
from petalnet.threads import in_thread

if TYPE_CHECKING:
    import torch

    from petalnet.blocks.service import BlockService
    from petalnet.models.adapters import AdapterSource
    from petalnet.models.checkpoint import ModelSource
    from petalnet.models.manifest import Manifest

logger = logging.getLogger(__name__)

WITHDRAW_WITHIN_S = 2.0
MOVE_PATIENCE_S = 60.0
"""Without anything new of the blocks to go to, where they can only come from other servers; then this one goes back."""
ALIVE_WITHIN_S = 5.0
"""For a connection to a server, and for its answer: over a relay it takes a few round trips."""
MAX_NAME = 128
"""Characters of a model's name in a record."""


@dataclass(frozen=True)
class Model:
    """A model that can be served: its source, its identity (see `models.identity`), what it will be run in and quantized to, whether
    sessions can share a pass through its blocks (see `blocks.probe`), and adapters that users may choose."""

    source: ModelSource
    key: str
    num_blocks: int
    dtype: torch.dtype
    device: str
    packs: bool
    adapters: tuple[AdapterSource, ...] = ()
    quantization: str = "none"


def open_model(settings: Settings, name: str | None, manifest: Manifest | None = None) -> Model:
    """Find a model, make sure that it can be split, and work out its identity. Blocks: imports the libraries, reads files.

    Args:
        manifest: of a model that is known by that alone, whose blocks are to come from peers.

    Raises:
        ModelError: there is no such model, it cannot be split into blocks, or an adapter is not for it.
        UsageError: the span or the device that was asked for is not there.
    """
    from petalnet.models.lean import import_transformers

    import_transformers()
    from petalnet.blocks.probe import require_splittable
    from petalnet.blocks.quantization import require_quantization
    from petalnet.capacity import best_device, require_device
    from petalnet.devices import device_names
    from petalnet.models.anatomy import text_config
    from petalnet.models.cachedir import cache_dir
    from petalnet.models.checkpoint import ModelSource
    from petalnet.models.identity import model_key
    from petalnet.models.loading import pick_dtype
    from petalnet.models.prequantized import stored_quantization
    from petalnet.models.swarm_files import SwarmFiles

    device = settings.device or best_device()
    require_device(device)
    require_quantization(settings.quantization)
    if manifest is None:
        source = ModelSource.open(
            name,
            revision=settings.revision,
            token=settings.token,
            cache_dir=settings.cache_dir,
            max_disk_space=settings.max_disk_space,
        )
    else:
        source = ModelSource(manifest.name, SwarmFiles(manifest, cache_dir() / "models" / manifest.model_key))
    count = text_config(source.config).num_hidden_layers
    if isinstance(settings.serve, tuple) and settings.serve[1] > count:
        first, end = settings.serve
        raise UsageError(f"--serve {first}:{end} is out of range: {source.name} has {count} blocks, 0:{count}")
    if isinstance(settings.serve, int) and settings.serve > count:
        raise UsageError(f"--serve {settings.serve} is out of range: {source.name} has {count} blocks")
    packs = require_splittable(source.config).packs
    adapters = _open_adapters(settings, source)
    dtype = pick_dtype(settings.dtype, source, device_names(device)[0])
    key = model_key(source) if manifest is None else manifest.model_key
    quantization = settings.quantization if settings.quantization != "none" else stored_quantization(source.config)
    require_quantization(quantization)
    return Model(source, key, count, dtype, device, packs, adapters, quantization)


def _open_adapters(settings: Settings, source: ModelSource) -> tuple[AdapterSource, ...]:
    from petalnet.models.adapters import AdapterSource

    if len(settings.adapters) > MAX_ADAPTERS:
        raise UsageError(f"--adapters: {len(settings.adapters)} are more than the {MAX_ADAPTERS} that a server can announce")
    adapters: dict[str, AdapterSource] = {}
    for name in settings.adapters:
        adapter = AdapterSource.open(name, source, token=settings.token, cache_dir=settings.cache_dir)
        if adapter.name in adapters:
            raise UsageError(f"--adapters: two are named {adapter.name}: rename one of the folders")
        adapters[adapter.name] = adapter
        logger.info("adapter %s changes %d of the %d blocks", adapter.label, len(adapter.layers), adapter.num_blocks)
    size = sum(len(adapter.label.encode()) for adapter in adapters.values())
    if size > MAX_ADAPTERS_BYTES:
        raise UsageError(f"--adapters: their names and digests take {size} bytes, a server can announce {MAX_ADAPTERS_BYTES}: name fewer")
    return tuple(adapters.values())


def _label(name: str) -> str:
    """A model's name as a record may carry it: printable and of bounded length, whatever a folder is called."""
    return "".join(char if char.isprintable() else "?" for char in name)[:MAX_NAME]


class Server:
    """One server of blocks of a model.

    Attributes:
        span: the blocks [a, b) that it serves, or is loading.
        model_name: what the model is called.
        supply: where its weights come from, and who gets them from it.
    """

    def __init__(self, settings: Settings, peering: Peering, model: Model) -> None:
        self._settings = settings
        self._peering = peering
        self._model = model
        self.span = (0, 0)
        self.model_name = model.source.name
        self.supply = Supply(settings, peering, model.source, model.key)
        self._answering = Answering(peering.host)
        self._placing = Placing(peering, peering.host.peer_id, model.key, model.num_blocks, is_alive=self._is_alive)
        self._announcer: Announcer
        self._linking: Linking
        self._online = False
        self._leaving = trio.Event()
        self._wanted: Move | None = None
        self._asked = trio.Event()
        self._settled = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started once the swarm has been told that the blocks are online."""
        movable = not isinstance(self._settings.serve, tuple)
        await self.supply.open()
        self.span = await self._choose_span()
        self._announcer = self._make_announcer(movable)
        async with trio.open_nursery() as nursery:
            # "joining", renewed for as long as loading takes: others then choose other blocks meanwhile.
            nursery.start_soon(self._announcer.tell)
            nursery.start_soon(self._announcer.run)
            if movable and self._peering.host.connected_peers():
                await self._look_again()
            loaded = await self._load()
            while True:
                async with trio.open_nursery() as blocks:
                    await self._go_online(blocks, loaded)
                    del loaded  # nothing may refer to it once it goes
                    task_status.started()
                    task_status = trio.TASK_STATUS_IGNORED
                    if movable:
                        blocks.start_soon(self._look_out)
                    move = await self._until_gone()
                    blocks.cancel_scope.cancel()
                loaded = await self._load_other(move.span)
                if self._leaving.is_set():
                    await trio.sleep_forever()  # the swarm has been told goodbye meanwhile, and the node is about to end

    async def move(self, span: tuple[int, int]) -> None:
        """Serve blocks [a, b) instead, if others serve those that it has now; returns once it is online again, wherever that is.

        Raises:
            UsageError: there are no such blocks.
        """
        if not 0 <= span[0] < span[1] <= self._model.num_blocks:
            raise UsageError(f"blocks {span[0]}:{span[1]} are out of range: {self.model_name} has {self._model.num_blocks}")
        self._want(Move(self._peering.host.peer_id, span, self._placing.lacks(span), (0, 0)))
        await self._settled.wait()

    async def drain(self, grace_s: float = DEFAULT_DRAIN_S) -> None:
        """Take no new sessions, wait up to `grace_s` seconds for the present ones to end or to be moved, and tell the swarm goodbye."""
        if not self._online:
            return
        self._leaving.set()
        service = self._answering.service
        if service is not None:
            service.drain(grace_s)
            with trio.move_on_after(WITHDRAW_WITHIN_S):
                await self._say("draining")
            await self._wait_for_sessions(service, grace_s)
        with trio.move_on_after(WITHDRAW_WITHIN_S):
            await self._say("left")

    @property
    def sessions(self) -> int:
        """How many sessions are open here."""
        return 0 if self._answering.service is None else len(self._answering.service.sessions)

    def describe(self) -> dict[str, Any] | None:
        """What goes on in the blocks, for the node's own user; None while there are none."""
        return None if self._answering.service is None else self._answering.service.describe()

    # ---- which blocks

    async def _choose_span(self) -> tuple[int, int]:
        settings, model = self._settings, self._model
        serve = settings.serve
        if isinstance(serve, tuple):
            return serve
        if serve == "auto":
            count = await in_thread(self._count_that_fits)
            logger.info("%d of the %d blocks of %s fit into memory", count, model.num_blocks, model.source.name)
        elif serve is not None:
            count = serve
        else:
            raise UsageError("a server needs --serve")
        span = await self._placing.choose(count)
        logger.info("chose blocks %d:%d: the swarm can do these least", *span)
        return span

    async def _is_alive(self, record: ServerRecord) -> bool:
        host = self._peering.host
        try:
            await host.connect(record.peer_id, record.addrs, timeout_s=ALIVE_WITHIN_S)
            await host.ping(record.peer_id, ALIVE_WITHIN_S)
        except PetalnetError:
            return False
        return True

    async def _look_again(self) -> None:
        """Choose anew where others chose at the same moment."""
        for look in range(SECOND_LOOKS):
            span = await self._placing.reconsider(self._announcer.record, again=look > 0)
            if span is None:
                return
            logger.info("others chose the same blocks at the same moment: taking %d:%d instead", *span)
            self.span = span
            await self._say("joining", span=span)

    def _count_that_fits(self) -> int:
        from petalnet.capacity import blocks_that_fit, left_for_blocks

        model, settings = self._model, self._settings
        adapter_bytes = sum(adapter.nbytes(0, model.num_blocks) for adapter in model.adapters)  # of whichever blocks it will be, at most
        captures = settings.cuda_graphs != "off"
        return blocks_that_fit(
            model.source,
            dtype=model.dtype,
            device=model.device,
            max_memory=left_for_blocks(settings.max_memory, model.device, captures=captures, adapter_bytes=adapter_bytes),
            quantization=model.quantization,
            kv_tokens=settings.attn_cache_tokens,
        )

    # ---- what others hear

    def _make_announcer(self, movable: bool) -> Announcer:
        now = time.time()
        host, model = self._peering.host, self._model
        record = ServerRecord(
            peer_id=host.peer_id,
            addrs=tuple(host.plain_addrs[:MAX_ADDRS]),
            model=model.key,
            model_name=_label(model.source.name),
            span=self.span,
            num_blocks=model.num_blocks,
            state="joining",
            dtype=str(model.dtype).removeprefix("torch."),
            quantization=model.quantization,
            sequence=0,
            issued=now,
            expires=now + LIFETIME_S,
            adapters=tuple(adapter.label for adapter in model.adapters),
            public_name=self._settings.public_name,
            movable=movable,
            shares=self.supply.shares,
        )
        return Announcer(self._peering, record, self._load_now, host.round_trip_s, lambda: host.plain_addrs, self._done_now, host.bytes_s)

    def _load_now(self) -> Load:
        service = self._answering.service
        return Load(0, 0) if service is None else Load(service.sessions.free_tokens, service.engine.queue_length)

    def _done_now(self) -> Mapping[str, tuple[float, float]]:
        """What the blocks' work shows of their speed; nothing where the owner chose what to announce."""
        service = self._answering.service
        if service is None or self._settings.throughput is not None:
            return {}
        return {f"{kind}_tokens_s": done for kind, done in service.engine.done.items()}

    async def _say(self, state: str, **fields: Any) -> int:
        """Tell the swarm; returns on how many peers that is stored, 0 where it could not be told now: the next beat tells it."""
        self._announcer.change(state=state, **fields)
        try:
            return await self._announcer.tell()
        except PetalnetError as error:
            logger.warning("the swarm could not be told that this server is %s (%s)", state, error)
            return 0

    # ---- loading and serving

    async def _load(self, patience_s: float = math.inf) -> Loaded:
        from petalnet.capacity import describe

        model = self._model
        logger.info("loading blocks %d:%d of %s (%d blocks)", *self.span, model.source.name, model.num_blocks)
        began = trio.current_time()
        self._linking = Linking(self._peering, model.key, self.span[1])
        with self.supply.keeping():
            await self.supply.bring(*self.span, patience_s=patience_s)
            loaded = await in_thread(load, self._settings, model, self.span, self._linking.open)
        rates = loaded.rates
        logger.info(
            "loaded in %.1f s in %s on %s: %.0f tokens/s one by one, %.0f in a prompt, room for %d KV tokens",
            trio.current_time() - began, describe(model.dtype, model.quantization), model.device, rates.decode, rates.prefill,
            loaded.service.sessions.max_tokens,
        )  # fmt: skip
        return loaded

    async def _go_online(self, nursery: trio.Nursery, loaded: Loaded) -> None:
        """Answer requests from now on, and tell the swarm."""
        rates = loaded.rates
        await nursery.start(loaded.service.run)
        self._answering.begin(loaded.service)
        nursery.start_soon(self._linking.keep_warm)
        nursery.start_soon(self.supply.offer, *self.span)
        self._online = True
        digests = tuple(loaded.service.span.digests)
        stored = await self._say(
            "online", decode_tokens_s=rates.decode, prefill_tokens_s=rates.prefill, forward_tokens_s=rates.forward, block_digests=digests,
            shares=self.supply.shares,
        )  # fmt: skip
        others = f"its record is stored on {stored - 1} other peer{'s' * (stored > 2)}" if stored > 1 else "no other peer knows it yet"
        logger.info("online: blocks %d:%d of %s; %s", *self.span, self._model.source.name, others)
        self._settle()

    # ---- going to other blocks

    async def _look_out(self) -> None:
        """Find out, while the blocks are served, when it is this server's turn to go to others."""
        while True:
            move = await self._placing.next_move(lambda: self._announcer.record)
            logger.info("wanted at blocks %d:%d: %s", *move.span, move.why)
            self._want(move)
            await self._settled.wait()

    def _want(self, move: Move) -> None:
        self._wanted = move
        if self._settled.is_set():  # else somebody waits for it already
            self._settled = trio.Event()
        self._asked.set()

    def _settle(self) -> None:
        """It is clear what becomes of the move that was wanted; unless another has been wanted meanwhile."""
        if not self._asked.is_set():
            self._settled.set()

    async def _until_gone(self) -> Move:
        """Wait until this server is to go to other blocks, and no session is left that it would leave behind."""
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            move = self._wanted
            if move is not None and await self._took_leave(move):
                return move
            if self._leaving.is_set():
                await trio.sleep_forever()  # the node is about to end: nothing is loaded any more
            self._settle()

    async def _took_leave(self, move: Move) -> bool:
        """Tell others, wait for sessions to be moved, and say whether the blocks may go now; if not, all is as it was."""
        service = self._answering.service
        if service is None or self._leaving.is_set() or move.span == self.span or not self._placing.may_leave(self._announcer.record, move):
            return False
        told = await self._say("draining") > 1  # by others than itself
        cleared = told and await self._placing.clear_to_go(self._announcer.record, move)
        if cleared and not self._leaving.is_set():
            grace_s = self._settings.drain_time
            service.drain(grace_s)
            await self._wait_for_sessions(service, grace_s)
            cleared = self._placing.may_leave(self._announcer.record, move)  # a server may have died meanwhile
        if self._leaving.is_set():
            return False
        if not cleared:
            logger.info("staying: others leave, or have left, the same blocks, or could not be told")
            service.draining = False
            await self._say("online")
        return cleared

    async def _wait_for_sessions(self, service: BlockService, grace_s: float) -> None:
        if len(service.sessions):
            count = len(service.sessions)
            logger.info("waiting up to %.0f s for %d session%s to go elsewhere or to end", grace_s, count, "s" * (count > 1))
        with trio.move_on_after(grace_s):
            await service.empty()

    async def _load_other(self, span: tuple[int, int]) -> Loaded:
        """Other blocks in place of those by which nobody is served any more; the old ones again where that fails."""
        before = self.span
        await self._answering.end()
        await in_thread(release_memory)
        try:
            return await self._load_after_telling(span, MOVE_PATIENCE_S)
        except Exception as error:
            # Whatever it is that keeps these from being loaded, a file that cannot be had or a full memory: the ones before were loaded.
            logger.warning("blocks %d:%d could not be loaded, going back to %d:%d: %s", *span, *before, error)
            self._placing.could_not_load(span)
        await in_thread(release_memory)
        return await self._load_after_telling(before)

    async def _load_after_telling(self, span: tuple[int, int], patience_s: float = math.inf) -> Loaded:
        length = span[1] - span[0]
        unknown = {} if length == self.span[1] - self.span[0] else dict.fromkeys(RATE_FIELDS, 0.0)
        self.span = span
        if not self._leaving.is_set():
            await self._say("joining", span=span, block_digests=(), **unknown)
        return await self._load(patience_s)
