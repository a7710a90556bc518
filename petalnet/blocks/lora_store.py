"""LoRA parameters that clients bring for their own passes and sessions: checked, kept by version, and bounded.

Whoever trains brings a new version at every step, and rarely names an older one. What is not there any more can be brought again, so
room is made by dropping what was named longest ago, a peer's own first. A session goes on with what it was opened with, which counts for
as long as anything refers to it.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from weakref import WeakSet

import torch
import trio

from petalnet.blocks.adapters import Adapter, DeviceOf
from petalnet.blocks.outputs import is_finite
from petalnet.errors import BusyError, CallerError, LoraGone, MovedError, TooLargeError
from petalnet.p2p.fields import FLOATS
from petalnet.p2p.pass_messages import MAX_RANK, Backward, Forward, LoraPut, PutLora
from petalnet.p2p.session_messages import OpenSession
from petalnet.p2p.tensors import decode_tensor
from petalnet.threads import in_thread

MOST_VERSIONS = 4
"""Versions of one peer: what it trains, with micro-batches of the step before still under way, and what it generates with beside that."""
MOST_ENTRIES = 1024
"""Versions of all peers."""
KEPT_S = 1800.0
"""Seconds after which parameters that nobody has named are dropped, even where there is room."""
RETRY_S = 5.0
LEAST_PEER_BYTES, MOST_PEER_BYTES = 64 * 2**20, 2**30
LEAST_BYTES, MOST_BYTES = 256 * 2**20, 4 * 2**30
NETWORK_SHARE = 0.75
"""Of the memory for all, what the peers of one public network may take: peer ids cost nothing, and what sessions hold is not dropped."""
NAMED_MODULES = 8
"""Modules that an error names."""

Shapes = Mapping[int, Mapping[str, tuple[int, int]]]
"""(in, out) of linear layers, by the number of their block and their path in it."""


@dataclass
class _Entry:
    adapter: Adapter
    named_at: float


@dataclass
class LoraStore:
    """What peers have put here. Belongs to one thread, as all of a server's bookkeeping.

    Attributes:
        peer_bytes: memory for the parameters of one peer.
        all_bytes: memory for those of all peers together.
        free_bytes: memory of the device that is free at the moment; what comes in takes half of it at most. Beside the blocks and the KV
            memory an accelerator may have less than the bounds above, and the passes of all sessions need some.
        clock: the present time in seconds.
    """

    peer_bytes: int = LEAST_PEER_BYTES
    all_bytes: int = LEAST_BYTES
    free_bytes: Callable[[], float] = lambda: math.inf
    clock: Callable[[], float] = time.monotonic
    _entries: OrderedDict[tuple[str, str], _Entry] = field(default_factory=OrderedDict)  # the one named longest ago first
    _alive: dict[str, WeakSet[Adapter]] = field(default_factory=dict)
    _networks: dict[str, str] = field(default_factory=dict)  # from which each of these peers came last
    _turn: trio.Lock = field(default_factory=trio.Lock)

    @classmethod
    def beside(cls, weight_bytes: int, devices: Collection[torch.device] = ()) -> LoraStore:
        """One for blocks of that size, which are on these devices.

        With rank 64 in every layer of a block of width 1024, parameters in float32 take a sixth of what the
        block's weights take in bfloat16, and less in wider ones: there is room for a few versions of a peer's, and for a few such peers."""
        return cls(
            min(max(weight_bytes // 2, LEAST_PEER_BYTES), MOST_PEER_BYTES),
            min(max(weight_bytes, LEAST_BYTES), MOST_BYTES),
            lambda: _free_memory(devices),
        )

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Memory that all of them take, with what only sessions and passes still refer to."""
        return sum(map(self._bytes_of, self._alive))

    async def take(self, peer_id: str, request: PutLora, shapes: Shapes, device_of: DeviceOf, *, network: str = "") -> LoraPut:
        """Check, convert and keep what a peer brings.

        Args:
            shapes: of the layers of the blocks that are served.
            device_of: where each block is.
            network: from which the peer is connected, by which it counts as well; "" where that is not known.
        Raises:
            CallerError, MovedError, TooLargeError, BusyError: it cannot be kept.
        """
        check_parameters(request, shapes)
        async with self._turn:  # what is being converted takes memory as well
            self._make_room_on_device(4 * math.prod(request.weights.shape))
            try:
                adapter = await in_thread(_converted, request, shapes, device_of)
            except (MemoryError, torch.OutOfMemoryError) as error:
                raise BusyError("there is no memory for LoRA parameters", RETRY_S) from error
            self.put(peer_id, request.version, adapter, network)
        return LoraPut(request.version)

    def put(self, peer_id: str, version: str, adapter: Adapter, network: str = "") -> None:
        """Keep parameters; they are joined with those for other blocks that came under the same version.

        Raises:
            TooLargeError: a peer may never have so many.
            BusyError: sessions that are open take up too much of the room.
        """
        now = self.clock()
        for key in [key for key, entry in self._entries.items() if entry.named_at < now - KEPT_S]:
            del self._entries[key]
        before = self._entries.pop((peer_id, version), None)
        if before is not None:
            adapter = Adapter({**before.adapter.blocks, **adapter.blocks})
            del before
        size = adapter.nbytes
        if size > self.peer_bytes:
            raise TooLargeError(f"LoRA parameters of {size} bytes exceed the {self.peer_bytes} that this server keeps for a peer")
        own = [key for key in self._entries if key[0] == peer_id]
        while own and (len(own) >= MOST_VERSIONS or self._bytes_of(peer_id) + size > self.peer_bytes):
            del self._entries[own.pop(0)]
        near = [key for key in self._entries if self._networks.get(key[0]) == network] if network else []
        while near and self._of_network(network) + size > NETWORK_SHARE * self.all_bytes:
            del self._entries[near.pop(0)]
        while self._entries and (len(self._entries) >= MOST_ENTRIES or self.nbytes + size > self.all_bytes):
            self._entries.popitem(last=False)
        full = network and self._of_network(network) + size > NETWORK_SHARE * self.all_bytes
        if full or self._bytes_of(peer_id) + size > self.peer_bytes or self.nbytes + size > self.all_bytes:
            raise BusyError("open sessions take up the memory for LoRA parameters", RETRY_S)
        for peer in [peer for peer, alive in self._alive.items() if not alive]:
            del self._alive[peer]
            self._networks.pop(peer, None)
        self._networks[peer_id] = network
        self._alive.setdefault(peer_id, WeakSet()).add(adapter)
        self._entries[peer_id, version] = _Entry(adapter, now)

    def get(self, peer_id: str, version: str, first: int, end: int) -> Adapter:
        """What a peer has put under a version, which counts as named now.

        Raises:
            LoraGone: it is not there, or not for all of blocks [first, end).
        """
        entry = self._entries.get((peer_id, version))
        if entry is None or not entry.adapter.blocks.keys() >= set(range(first, end)):
            raise LoraGone(f"LoRA parameters {version[:16]!r} for blocks {first}:{end} are not here (any more)")
        entry.named_at = self.clock()
        self._entries.move_to_end((peer_id, version))
        return entry.adapter

    def _make_room_on_device(self, size: int) -> None:
        """Drop what was named longest ago, until so many bytes take no more than half of what is free. Raises BusyError where they would
        even so, and then nothing is dropped."""
        if self.free_bytes() + sum(entry.adapter.nbytes for entry in self._entries.values()) < 2 * size:
            raise BusyError("there is no memory for LoRA parameters", RETRY_S)
        while self._entries and self.free_bytes() < 2 * size:
            self._entries.popitem(last=False)
        if self.free_bytes() < 2 * size:
            raise BusyError("open sessions take up the memory for LoRA parameters", RETRY_S)

    def _of_network(self, network: str) -> int:
        return sum(self._bytes_of(peer_id) for peer_id in self._alive if self._networks.get(peer_id) == network)

    def _bytes_of(self, peer_id: str) -> int:
        return sum(adapter.nbytes for adapter in self._alive.get(peer_id, ()))


def adapters_of(
    request: Forward | Backward | OpenSession, peer_id: str, hosted: Mapping[str, Adapter], loras: LoraStore
) -> tuple[Adapter, ...]:
    """What a request names: an adapter of the host, and then what its peer has put here.

    Raises:
        CallerError: there is no such adapter here.
        LoraGone: the peer's parameters are not here (any more).
    """
    adapters: tuple[Adapter, ...] = ()
    if request.adapter:
        if request.adapter not in hosted:
            known = ", ".join(sorted(hosted)) or "none"
            raise CallerError(f"there is no adapter {request.adapter!r} here; adapters that this server has: {known}")
        adapters = (hosted[request.adapter],)
    if request.lora:
        adapters += (loras.get(peer_id, request.lora, request.first, request.end),)
    return adapters


def adapted(request: OpenSession, peer_id: str) -> str:
    """What stands for what a session names, so that no two that compute differently are taken for one another, whatever versions peers
    give; "" for none."""
    if not request.adapter and not request.lora:
        return ""
    own = f"{peer_id} {request.lora}" if request.lora else ""
    return f"{request.adapter}\0{own}"


def check_parameters(request: PutLora, shapes: Shapes) -> None:
    """Check all of a request that can be seen without looking at the parameters.

    Raises:
        MovedError: some of its blocks are not served here.
        CallerError: it does not fit the model or itself.
    """
    first, end = request.first, request.end
    if not first < end:
        raise CallerError(f"{first}:{end} are no blocks")
    if not shapes.keys() >= set(range(first, end)):
        raise MovedError(f"blocks {first}:{end} are not served here, only {min(shapes)}:{max(shapes) + 1}")
    if not request.version:
        raise CallerError("LoRA parameters need a version by which they can be named")
    if len(set(request.modules)) != len(request.modules):
        raise CallerError("each kind of module is to be named once")
    ranks, weights = request.ranks, request.weights
    if ranks.dtype != "int32" or ranks.shape != (end - first, len(request.modules)):
        raise CallerError(f"ranks must be int32 [{end - first}, {len(request.modules)}], not {ranks.dtype} {list(ranks.shape)}")
    needed = 0
    for block, row in zip(range(first, end), decode_tensor(ranks).tolist(), strict=True):
        for path, rank in zip(request.modules, row, strict=True):
            if not 0 <= rank <= MAX_RANK:
                raise CallerError(f"ranks are from 0 to {MAX_RANK}, not {rank}")
            if rank and path not in shapes[block]:
                there = ", ".join([*shapes[block]][:NAMED_MODULES])
                raise CallerError(f"block {block} has no linear layer {path!r}; LoRA can be for {there}")
            needed += rank * sum(shapes[block][path]) if rank else 0
    if weights.dtype not in FLOATS or math.prod(weights.shape) != needed or len(weights.shape) != 1:
        raise CallerError(f"ranks and layers need [{needed}] parameters, not {weights.dtype} {list(weights.shape)}")


def _free_memory(devices: Collection[torch.device]) -> float:
    """Bytes of accelerators that nobody uses, or that only torch's allocator holds, where each gets as much as the fullest; no bound for
    other devices, whose servers leave half of the machine's memory free."""
    free = [
        torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        for device in devices
        if device.type == "cuda"
    ]
    return len(free) * min(free) if free else math.inf


def _converted(request: PutLora, shapes: Shapes, device_of: DeviceOf) -> Adapter:
    if not is_finite(decode_tensor(request.weights)):
        raise CallerError("LoRA parameters must be finite numbers")
    return Adapter.of(request, shapes, device_of)
