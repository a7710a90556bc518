"""A server's life: open the model, choose blocks, load them, serve, and leave in good order."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from petalnet.announcing import LIFETIME_S, Announcer, Load
from petalnet.config import Settings
from petalnet.errors import UsageError
from petalnet.linking import Linking
from petalnet.peering import Peering
from petalnet.routing.placement import choose_span
from petalnet.routing.records import MAX_ADDRS, ServerRecord
from petalnet.threads import in_thread

if TYPE_CHECKING:
    import torch

    from petalnet.blocks.service import BlockService
    from petalnet.blocks.throughput import Rates
    from petalnet.models.checkpoint import ModelSource

logger = logging.getLogger(__name__)

GRACE_S = 10.0
"""How long a server that is to stop, or to serve other blocks, waits for the sessions that it still has, where nobody said how long."""
WITHDRAW_WITHIN_S = 2.0
MAX_NAME = 128
"""Characters of a model's name in a record."""


@dataclass(frozen=True)
class Model:
    """A model that can be served: its source, its identity (see `models.identity`), what it will be run in, and whether sessions can share
    a pass through its blocks (see `blocks.probe`)."""

    source: ModelSource
    key: str
    num_blocks: int
    dtype: torch.dtype
    device: str
    packs: bool


def open_model(settings: Settings, name: str | None) -> Model:
    """Find a model, make sure that it can be split, and work out its identity. Blocks: imports the libraries, reads files.

    Raises:
        ModelError: there is no such model, or it cannot be split into blocks.
        UsageError: the span or the device that was asked for is not there.
    """
    from petalnet.models.lean import import_transformers

    import_transformers()
    from petalnet.blocks.probe import require_splittable
    from petalnet.capacity import best_device, require_device
    from petalnet.models.anatomy import text_config
    from petalnet.models.checkpoint import ModelSource
    from petalnet.models.identity import model_key
    from petalnet.models.loading import pick_dtype

    device = settings.device or best_device()
    require_device(device)
    source = ModelSource.open(name, revision=settings.revision, token=settings.token, cache_dir=settings.cache_dir)
    count = text_config(source.config).num_hidden_layers
    if isinstance(settings.serve, tuple) and settings.serve[1] > count:
        first, end = settings.serve
        raise UsageError(f"--serve {first}:{end} is out of range: {source.name} has {count} blocks, 0:{count}")
    if isinstance(settings.serve, int) and settings.serve > count:
        raise UsageError(f"--serve {settings.serve} is out of range: {source.name} has {count} blocks")
    packs = require_splittable(source.config).packs
    return Model(source, model_key(source), count, pick_dtype(settings.dtype, source, device), device, packs)


def _label(name: str) -> str:
    """A model's name as a record may carry it: printable and of bounded length, whatever a folder is called."""
    return "".join(char if char.isprintable() else "?" for char in name)[:MAX_NAME]


class Server:
    """One server of blocks of a model.

    Attributes:
        span: the blocks [a, b) that it serves.
        model_name: what the model is called.
        service: what answers requests.
    """

    def __init__(self, settings: Settings, peering: Peering, model: Model) -> None:
        self._settings = settings
        self._peering = peering
        self._model = model
        self.span = (0, 0)
        self.model_name = model.source.name
        self.service: BlockService
        self._announcer: Announcer
        self._linking: Linking
        self._online = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started once the swarm has been told that the blocks are online."""
        self.span = await self._choose_span()
        name = self._model.source.name
        logger.info("loading blocks %d:%d of %s (%d blocks)", *self.span, name, self._model.num_blocks)
        self._announcer = self._make_announcer()
        self._linking = Linking(self._peering, self._model.key, self.span[1])
        async with trio.open_nursery() as nursery:
            # "joining", renewed for as long as loading takes: others then choose other blocks meanwhile.
            nursery.start_soon(self._announcer.tell)
            nursery.start_soon(self._announcer.run)
            await self._load(nursery)
            nursery.start_soon(self._linking.keep_warm)
            self._online = True
            stored = await self._say("online")
            others = f"its record is stored on {stored - 1} other peer{'s' * (stored > 2)}" if stored > 1 else "no other peer knows it yet"
            logger.info("online: blocks %d:%d of %s; %s", *self.span, name, others)
            task_status.started()
            await trio.sleep_forever()

    async def _say(self, state: str) -> int:
        self._announcer.change(state=state)
        return await self._announcer.tell()

    async def drain(self, grace_s: float = GRACE_S) -> None:
        """Take no new sessions, wait up to `grace_s` seconds for the present ones to end or to be moved, and tell the swarm goodbye."""
        if not self._online:
            return
        self.service.drain()
        with trio.move_on_after(WITHDRAW_WITHIN_S):
            await self._say("draining")
        if len(self.service.sessions):
            logger.info("waiting up to %.0f s for %d sessions to end", grace_s, len(self.service.sessions))
        with trio.move_on_after(grace_s):
            while len(self.service.sessions):  # noqa: ASYNC110  (a tenth of a second at the end of a node's life)
                await trio.sleep(0.1)
        with trio.move_on_after(WITHDRAW_WITHIN_S):
            await self._say("left")

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
        await self._peering.look_up(model.key)
        now = time.time()
        others = self._peering.view.servers(model.key, now=now, states=("joining", "online"), include_failed=True)
        span = choose_span((other for other in others if other.peer_id != self._peering.host.peer_id), model.num_blocks, count, now=now)
        logger.info("chose blocks %d:%d: the swarm can do these least", *span)
        return span

    def _count_that_fits(self) -> int:
        from petalnet.capacity import blocks_that_fit

        model = self._model
        return blocks_that_fit(model.source, dtype=model.dtype, device=model.device, max_memory=self._settings.max_memory)

    def _make_announcer(self) -> Announcer:
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
            sequence=0,
            issued=now,
            expires=now + LIFETIME_S,
            public_name=self._settings.public_name,
        )
        return Announcer(self._peering, record, self._load_now, host.round_trip_s, lambda: host.plain_addrs)

    def _load_now(self) -> Load:
        if not self._online:
            return Load(0, 0)
        return Load(self.service.sessions.free_tokens, self.service.engine.queue_length)

    async def _load(self, nursery: trio.Nursery) -> None:
        """Load the blocks, measure them and answer requests from then on."""
        from petalnet.p2p.protocols import FORWARD, INFERENCE, PUSH

        model = self._model
        began = trio.current_time()

        self.service, rates = await in_thread(self._load_blocking)
        span = self.service.span
        self._announcer.change(
            decode_tokens_s=rates.decode, prefill_tokens_s=rates.prefill, forward_tokens_s=rates.forward, block_digests=tuple(span.digests)
        )
        logger.info(
            "loaded in %.1f s in %s on %s: %.0f tokens/s one by one, %.0f in a prompt, room for %d KV tokens",
            trio.current_time() - began, self._announcer.record.dtype, model.device, rates.decode, rates.prefill,
            self.service.sessions.max_tokens,
        )  # fmt: skip
        await nursery.start(self.service.run)
        host = self._peering.host
        host.on_peer_lost(self.service.peer_lost)
        host.serve(INFERENCE, self.service.handle_inference)
        host.serve(PUSH, self.service.handle_push)
        host.serve(FORWARD, self.service.handle_forward)

    def _load_blocking(self) -> tuple[BlockService, Rates]:
        """The service of the loaded span, with memory for its KV tokens, and the rates to announce."""
        import torch

        from petalnet.blocks.service import USUAL_RATES, BlockService
        from petalnet.blocks.span import Span
        from petalnet.blocks.throughput import Rates, measure
        from petalnet.capacity import kv_tokens, require_room, too_large

        settings, model = self._settings, self._model
        require_room(model.source, *self.span, dtype=model.dtype, device=model.device, max_memory=settings.max_memory)
        try:
            span = Span.load(model.source, *self.span, dtype=model.dtype, device=model.device, may_pack=model.packs)
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise too_large(model.source, *self.span, dtype=model.dtype, device=model.device, max_memory=settings.max_memory) from error
        tokens = kv_tokens(span, model.source, device=model.device, max_memory=settings.max_memory, wanted=settings.attn_cache_tokens)
        span.speed_up()
        rate = settings.throughput
        rates = measure(span, model=model.key) if rate is None else Rates(rate, rate, rate)
        _ = span.digests  # computed here, on this thread, and kept by the span
        try:
            service = BlockService(
                span,
                model=model.key,
                kv_tokens=tokens,
                rates=rates if rate is None else USUAL_RATES,  # what somebody chose to announce says little of how fast this machine is
                share_prefixes=settings.share_prefixes,
                open_link=self._linking.open,
            )
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise UsageError(
                f"blocks {span.first}:{span.end} are loaded, but there is no memory left for {tokens} KV tokens on {model.device}: give a "
                "smaller --attn-cache-tokens, or serve fewer blocks"
            ) from error
        return service, rates
