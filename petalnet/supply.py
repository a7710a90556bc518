"""Where a server's weights come from, and who gets them from it: which peers' blocks are believed, and what is shared.

Weights of a hub repository come from peers first where these share them, else from the hub. What the bytes of a block have to be says the
manifest in the repository. Where there is none, the blocks are taken that most of the swarm's servers announce, and each that came from
peers is compared with the hub at a few places. A model that is only known by the manifest that peers gave comes from peers alone.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from petalnet.errors import ModelError, PetalnetError
from petalnet.fetching import Brought, Fetching, Wanted
from petalnet.models.block_file import key_of_block
from petalnet.models.cachedir import load_facts, store_facts
from petalnet.models.hub import HubFiles
from petalnet.models.manifest import CHUNK_BYTES, MANIFEST_FILE, BlockEntry, Manifest, describe_block, read_manifest
from petalnet.models.payload import Payload
from petalnet.models.remote_file import is_down
from petalnet.models.swarm_files import SwarmFiles
from petalnet.models.weight_cache import readable, weight_cache
from petalnet.routing.versions import versions
from petalnet.sharing import Sharing
from petalnet.threads import in_thread

if TYPE_CHECKING:
    from petalnet.config import Settings
    from petalnet.models.anatomy import Partition
    from petalnet.models.checkpoint import ModelSource
    from petalnet.peering import Peering

logger = logging.getLogger(__name__)

HUB_INSTEAD_S = 10.0
"""Without anything new from peers, or with too little, after which the rest comes from the hub."""
HUB_INSTEAD_BYTES_S = 1e6
"""All peers together have to give so much, if the owner's own bound lets them: a hub is rarely slower."""
HUB_WITHIN_S = 10.0
WINDOWS = 4
"""Places at which a block that came from peers is compared with the hub."""
WINDOW_BYTES = 16 * 1024


class Supply:
    """The weights of one server's model.

    Attributes:
        shares: whether others get weights here.
    """

    def __init__(self, settings: Settings, peering: Peering, source: ModelSource, model: str) -> None:
        """
        Args:
            model: the model's key.
        """
        self._settings = settings
        self._peering = peering
        self._source = source
        self._model = model
        self._sharing = Sharing(peering.host, max_rate=settings.max_upload_rate)
        own = weight_cache(settings.max_disk_space, settings.cache_dir)
        self._cache = source.files.cache if isinstance(source.files, HubFiles) else own
        self._fetching = Fetching(peering, self._sharing, self._cache, model, max_rate=settings.max_download_rate)
        self._offers = False
        self._offered: set[int] = set()
        self.shares = False

    async def open(self) -> None:
        """Decide whether to share, and answer who asks from now on."""
        self.shares = self._offers = await in_thread(self._may_share)
        if self._settings.share_weights == "no":
            return
        self._sharing.open()
        if isinstance(self._source.files, SwarmFiles):
            self._sharing.give_manifest(self._model, self._source.files.manifest)
        elif self._offers and self._source.folder is not None:
            self._sharing.make_manifest(self._model)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """What has come stays on the disk meanwhile: until it is loaded."""
        with self._cache.keeping():
            yield

    async def bring(self, first: int, end: int, *, patience_s: float = math.inf) -> None:
        """Get what peers give of blocks [first, end).

        Args:
            patience_s: seconds without anything new until blocks that can only come from peers are given up.

        Raises:
            UsageError: there is no room for them on the disk.
            ModelError: they cannot be split, or the manifest of the model is damaged.
        """
        files = self._source.files
        if isinstance(files, SwarmFiles):
            wanted = {index: files.manifest.blocks[index] for index in range(first, end)}
            await self._bring(wanted, patience_s=patience_s)
        elif isinstance(files, HubFiles):
            await self._peering_looked_up()
            manifest = await in_thread(self._own_manifest)
            wanted = await in_thread(self._not_fetched, files, first, end, manifest)
            if wanted:
                patience_s = min(HUB_INSTEAD_S, patience_s) if self._fetching.candidates() else 0.0
                least = min(HUB_INSTEAD_BYTES_S, (self._settings.max_download_rate or math.inf) / 2)
                await self._bring(wanted, patience_s=patience_s, least_bytes_s=least, compare=manifest is None)

    async def offer(self, first: int, end: int) -> None:
        """Share the blocks that are served, and of a folder all that it holds; returns once all of them can be had. Fails never."""
        if not self._offers:
            return
        try:
            if self._source.folder is None:
                await self._offer(range(first, end))
                manifest = None if isinstance(self._source.files, SwarmFiles) else await in_thread(self._own_manifest)
                self._sharing.give_manifest(self._model, manifest)
            else:
                await self._offer_folder()
        except (PetalnetError, OSError) as error:
            logger.warning("weights of %s cannot be shared: %s", self._source.name, error)

    def describe(self) -> dict[str, Any]:
        """What came from whom and what went to others, for the node's own user."""
        fetched = self._fetching.bytes_fetched
        return {"shares": self.shares, **self._sharing.describe(), "bytes_fetched": sum(fetched.values()), "fetched_from": dict(fetched)}

    # ---- what is shared

    def _may_share(self) -> bool:
        setting, files = self._settings.share_weights, self._source.files
        if setting != "auto":
            return setting == "yes"
        return isinstance(files, SwarmFiles) or (isinstance(files, HubFiles) and _is_public(files.name))

    async def _offer_folder(self) -> None:
        parts = await in_thread(lambda: self._parts)
        if len(self._offered) == len(parts.blocks):
            return
        manifest = None
        try:
            entries = await self._offer(range(len(parts.blocks)))
            manifest = await in_thread(Manifest.of, self._source, entries)
        finally:
            self._sharing.give_manifest(self._model, manifest)

    async def _offer(self, blocks: Sequence[int]) -> list[BlockEntry]:
        entries = []
        for index in blocks:
            entry, payload = await in_thread(self._describe, index)
            self._sharing.share(entry, payload)
            self._offered.add(index)
            entries.append(entry)
        total = sum(entry.nbytes for entry in entries)
        logger.info("%d blocks of %s (%s) can be had from here by other servers", len(entries), self._source.name, readable(total))
        return entries

    def _describe(self, index: int) -> tuple[BlockEntry, Payload]:
        entry, payload = describe_block(self._source, self._parts, index)
        known = load_facts("block-chunks", entry.digest).get("chunks")
        try:
            described = replace(entry, chunks=tuple(known or ()))
        except ModelError:
            described = entry
        if not described.chunks:
            described = replace(entry, chunks=payload.chunks(CHUNK_BYTES))
            store_facts("block-chunks", entry.digest, {"chunks": described.chunks})
        return described, payload

    # ---- what is believed

    def _own_manifest(self) -> Manifest | None:
        """The manifest that lies beside the model's files, if there is one."""
        manifest = read_manifest(self._source, self._model)
        if manifest is not None and len(manifest.blocks) != len(self._parts.blocks):
            raise ModelError(f"the manifest of {self._source.name} ({MANIFEST_FILE}) is that of another model: remove it, or make it anew")
        return manifest

    def _not_fetched(self, files: HubFiles, first: int, end: int, manifest: Manifest | None) -> dict[int, BlockEntry]:
        """Those of blocks [first, end) whose digests are known and which are not here from the hub."""
        known = self._announced(first, end) if manifest is None else {index: manifest.blocks[index] for index in range(first, end)}
        return {index: entry for index, entry in known.items() if not files.is_here(self._parts.blocks[index])}

    def _announced(self, first: int, end: int) -> dict[int, BlockEntry]:
        """The blocks that most servers of the swarm announce, as far as the tensors of the hub's files can be that."""
        records = self._peering.view.servers(self._model, now=time.time(), states=("joining", "online", "draining"))
        digests: dict[int, str] = {}
        for record in next(iter(versions(records)), []):
            digests.update(enumerate(record.block_digests, record.span[0]))
        return {index: self._entry_like_source(index, digests[index]) for index in range(first, end) if index in digests}

    def _entry_like_source(self, index: int, digest: str) -> BlockEntry:
        prefix = self._parts.prefixes[index]
        infos = sorted((name.removeprefix(prefix), self._source.info(name)) for name in self._parts.blocks[index])
        tensors = tuple((name, info.dtype, info.shape) for name, info in infos)
        return BlockEntry(digest, tensors, sum(info.nbytes for _, info in infos), prefix=prefix)

    async def _bring(
        self, entries: Mapping[int, BlockEntry], *, patience_s: float, least_bytes_s: float = 0.0, compare: bool = False
    ) -> None:
        parts = await in_thread(lambda: self._parts)
        blocks = [Wanted(entry) for entry in entries.values()]
        brought = await self._fetching.bring(blocks, patience_s=patience_s, least_bytes_s=least_bytes_s)
        for index, entry in entries.items():
            found = brought.get(Wanted(entry).name)
            if found is None or (compare and not await in_thread(self._is_as_on_hub, index, found)):
                continue
            self._source.add_file(found.path, {parts.prefixes[index] + name: name for name, _, _ in entry.tensors})
            self.shares |= self._settings.share_weights != "no"

    def _is_as_on_hub(self, index: int, found: Brought) -> bool:
        """Whether a block that came from peers is the hub's at some places drawn by chance."""
        prefix = self._parts.prefixes[index]
        windows: dict[str, list[tuple[int, int]]] = {}
        for place in random.choices(range(found.entry.nbytes), k=WINDOWS):
            name, (start, end) = next(item for item in found.entry.ranges.items() if place < item[1][1])
            windows.setdefault(name, []).append((place - start, min(place + WINDOW_BYTES, end) - start))
        try:
            there = self._source.files.sample({prefix + name: places for name, places in windows.items()})
        except PetalnetError as error:
            if is_down(error.__cause__):
                logger.warning("block %d came from peers and cannot be compared with the hub, which is not reached: %s", index, error)
                return True
            logger.warning("block %d came from peers and is not used, since the hub does not show its own: %s", index, error)
            self._sharing.withhold(found.entry)
            return False
        header = len(found.entry.header)
        with found.path.open("rb") as file:
            for name, places in windows.items():
                here = b""
                for start, end in places:
                    file.seek(header + found.entry.ranges[name][0] + start)
                    here += file.read(end - start)
                if here != there[prefix + name]:
                    logger.warning("block %d as other servers have it is not the hub's: it comes from the hub", index)
                    self._sharing.withhold(found.entry)
                    self._cache.discard(key_of_block(found.entry.digest))
                    return False
        return True

    @cached_property
    def _parts(self) -> Partition:
        from petalnet.models.anatomy import partition
        from petalnet.models.identity import empty_model

        return partition(empty_model(self._source), self._source.tensor_names())

    async def _peering_looked_up(self) -> None:
        try:
            await self._peering.look_up(self._model)
        except PetalnetError as error:
            logger.debug("the swarm could not be looked up: %s", error)


def _is_public(repository: str) -> bool:
    """Whether anybody may get a hub repository, without an account and without having agreed to anything."""
    from huggingface_hub import HfApi

    try:
        info = HfApi(token=False).model_info(repository, timeout=HUB_WITHIN_S)
    except Exception as error:  # whatever it is that keeps the hub from saying so: what is not known to be public is not shared
        logger.info("whether %s is public is not known, so it is not shared (%s)", repository, type(error).__name__)
        return False
    return not info.private and not info.gated
