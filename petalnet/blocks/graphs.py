"""The graphs of autograd that a server keeps from a forward pass until the backward pass comes, which then computes nothing again.

Keeping one is a favour: it may be dropped at any time, and the client brings the inputs once more. So memory is bounded by dropping, the
oldest first: for each peer, for all together, and by age, since a peer may stay connected and never come back. What a graph takes is
counted while it is made, by torch's hooks for saved tensors: each piece of memory once, and without the model's weights, which are there
anyway.

The network thread begins, finds and drops graphs, the compute thread makes, uses and frees them; a lock guards what is counted.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

GRAPH_BYTES = 2 * 2**30
"""Memory for all graphs of a server, unless it is told otherwise."""
PEER_SHARE = 0.5
"""Of that memory, what the graphs of one peer may take."""
GRAPH_AGE_S = 300.0
"""Seconds for which a graph waits for its backward pass."""
NODE_BYTES = 1024
"""What is counted for each saved tensor beside its numbers: the nodes of the graph, which are Python's and C++'s objects."""
LEAST_BYTES = 2**18
"""What a graph is counted as at least, so that there are never too many to look through."""


class NoRoom(Exception):
    """A graph that is being made has no room left, or is not wanted any more."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """Some rows' pass through some blocks, of which gradients can be taken once.

    Attributes:
        first_row, end_row: which rows.
        begin, stop: which blocks of the model.
        output: [rows, length, hidden], of the last block.
        hidden: what entered, a leaf of the graph.
        prompts: the prompts, another; None where there were none.
        lora: the parameters of the client's LoRA, further leaves, in the order of `PutLora.weights`.
        lora_first: the number of the first of them among all in the request's blocks.
    """

    first_row: int
    end_row: int
    begin: int
    stop: int
    output: torch.Tensor
    hidden: torch.Tensor
    prompts: torch.Tensor | None
    lora: list[torch.Tensor]
    lora_first: int


@dataclass(eq=False)
class Graph:
    """What is kept of one forward pass.

    Attributes:
        peer_id, number: whose it is, and under which number; under 0 nobody finds it.
        first, end: the blocks.
        shape: [rows, length, hidden] of its input and its output.
        dtype: of its input, by its name on the wire.
        prompts_dtype: of its prompts; None where it had none.
        has_lora: whether the client's LoRA was applied.
        kind: what else than its shape and its blocks decides how much it takes.
        parts: what was recorded, in order; the compute thread's.
        bytes: what it takes.
        counted: the addresses of the memory that was counted, while it is made.
        kept_since: when it was complete.
    """

    peer_id: str
    number: int
    first: int
    end: int
    shape: tuple[int, ...]
    dtype: str
    prompts_dtype: str | None = None
    has_lora: bool = False
    kind: Hashable = None
    parts: list[Recorded] = field(default_factory=list)
    bytes: int = 0
    counted: set[int] = field(default_factory=set)
    kept_since: float = 0.0
    state: Literal["made", "kept", "taken", "gone"] = "made"

    def free(self) -> None:
        """Give the memory back; for the compute thread, since it takes a while."""
        self.parts.clear()


class GraphStore:
    """The graphs of a server."""

    def __init__(self, weights: Iterable[torch.Tensor] = (), *, most_bytes: int = GRAPH_BYTES, free: Callable[[Graph], object]) -> None:
        """
        Args:
            weights: memory that is not counted.
            most_bytes: what all graphs may take.
            free: has a graph's `free` called on the compute thread.
        """
        self._weights = frozenset(weight.untyped_storage().data_ptr() for weight in weights)
        self._most = most_bytes
        self._most_of_peer = int(most_bytes * PEER_SHARE)
        self._free = free
        self._lock = threading.Lock()
        self._graphs: OrderedDict[Graph, None] = OrderedDict()  # all that take memory, the oldest first
        self._named: dict[tuple[str, int], Graph] = {}  # those that a backward pass may name, and those that are made
        self._bytes = 0
        self._bytes_of: dict[str, int] = {}
        self._waiting_of: Counter[str] = Counter()  # of these, what can be dropped; summed up here, since there may be thousands of graphs
        self._waiting = 0
        self._dropped: list[Graph] = []  # while the lock is held
        # By a pass's length and kind: rows × blocks whose graph had no room though it was the only one. Without the kind, a peer with LoRA
        # of the highest rank would have others' passes taken for too large.
        self._too_large: dict[tuple[int, Hashable], int] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def bytes(self) -> int:
        """What all graphs take, those included that are made or used at the moment."""
        return self._bytes

    # For the network thread

    def begin(self, graph: Graph) -> Graph | None:
        """A graph is about to be made; one of the same name is dropped. None where it is known to have no room."""
        rows, length, _ = graph.shape
        with self._changing(self._free):
            self._drop(self._named.get((graph.peer_id, graph.number)))
            least = self._too_large.get((length, graph.kind))
            if least is not None and rows * (graph.end - graph.first) >= least:
                return None
            self._graphs[graph] = None
            if graph.number:
                self._named[graph.peer_id, graph.number] = graph
            return graph if self._grow(graph, LEAST_BYTES) else None

    def keep(self, graph: Graph, now: float) -> bool:
        """A graph is complete: it waits for its backward pass from now on. False where it was dropped meanwhile."""
        with self._lock:
            if graph.state != "made":
                return False
            graph.state, graph.kept_since = "kept", now
            graph.counted.clear()
            self._graphs.move_to_end(graph)  # in the order of being kept
            self._count_waiting(graph, graph.bytes)
            return True

    def find(self, peer_id: str, number: int) -> Graph | None:
        """The graph that a peer keeps under a number here."""
        with self._lock:
            graph = self._named.get((peer_id, number))
            return graph if graph is not None and graph.state == "kept" else None

    def take(self, graph: Graph) -> bool:
        """A graph that was found is used now: nobody finds it again, and it is not dropped until `done`. False where it is gone."""
        with self._lock:
            if graph.state != "kept":
                return False
            graph.state = "taken"
            self._count_waiting(graph, -graph.bytes)
            self._named.pop((graph.peer_id, graph.number), None)
            return True

    def done(self, graph: Graph) -> None:
        """A graph is not needed any more, whatever became of it."""
        with self._changing(self._free):
            self._drop(graph)

    def drop(self, peer_id: str, numbers: Collection[int]) -> None:
        """No backward pass will come for these."""
        with self._changing(self._free):
            for number in numbers:
                self._drop(self._named.get((peer_id, number)))

    def drop_peer(self, peer_id: str) -> None:
        """Nor for any of this peer's; those that are being used are dropped by whoever uses them."""
        with self._changing(self._free):
            for graph in [graph for graph in self._graphs if graph.peer_id == peer_id and graph.state != "taken"]:
                self._drop(graph)

    def expire(self, now: float) -> None:
        """Drop what has waited for too long."""
        with self._changing(self._free):
            for graph in [graph for graph in self._graphs if graph.state == "kept" and now - graph.kept_since >= GRAPH_AGE_S]:
                self._drop(graph)

    # For the compute thread

    @contextlib.contextmanager
    def recording(self, graph: Graph) -> Iterator[None]:
        """Count what operations within save for their gradients as the graph's.

        Raises NoRoom from within the operation that there is no room for.
        """
        weights, counted = self._weights, graph.counted

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            size, address = NODE_BYTES, storage.data_ptr()
            if address not in weights and address not in counted:
                counted.add(address)
                size += storage.nbytes()
            if not self.grow(graph, size):
                raise NoRoom
            # What a node has put out and saves itself would refer to the node: a cycle that only the collector ends.
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, _unpacked):
            yield

    def grow(self, graph: Graph, size: int) -> bool:
        """A graph that is being made is to take so many bytes more: whether there is room, for which others are dropped. Where there is
        none, or the graph is not wanted any more, it is gone."""
        with self._changing(Graph.free):
            return graph.state == "made" and self._grow(graph, size)

    # Beneath both

    @contextlib.contextmanager
    def _changing(self, free: Callable[[Graph], object]) -> Iterator[None]:
        """Hold the lock; what was dropped meanwhile is freed when it is released, so that no thread waits for that."""
        with self._lock:
            yield
            dropped, self._dropped = self._dropped, []
        for graph in dropped:
            free(graph)

    def _grow(self, graph: Graph, size: int) -> bool:
        peer_id = graph.peer_id
        of_peer, of_all = self._bytes_of.get(peer_id, 0) + size, self._bytes + size
        if of_peer > self._most_of_peer or of_all > self._most:
            rows, length, _ = graph.shape
            if graph.bytes + size > self._most_of_peer:
                amount = rows * (graph.end - graph.first)
                key = (length, graph.kind)
                self._too_large[key] = min(amount, self._too_large.get(key, amount))
            if of_peer - self._waiting_of[peer_id] > self._most_of_peer or of_all - self._waiting > self._most:
                self._drop(graph)
                return False
            self._make_room(of_peer - self._most_of_peer, peer_id)
            self._make_room(self._bytes + size - self._most)
        graph.bytes += size
        self._bytes += size
        self._bytes_of[peer_id] = self._bytes_of.get(peer_id, 0) + size
        return True

    def _make_room(self, lacking: int, peer_id: str | None = None) -> None:
        """Drop as many graphs that wait, of all peers or of one, as have to go for so many bytes, the oldest first."""
        if lacking <= 0:
            return
        going = []
        for graph in self._graphs:
            if graph.state == "kept" and peer_id in (None, graph.peer_id):
                going.append(graph)
                lacking -= graph.bytes
                if lacking <= 0:
                    break
        for graph in going:
            self._drop(graph)

    def _count_waiting(self, graph: Graph, size: int) -> None:
        self._waiting += size
        self._waiting_of[graph.peer_id] += size
        if not self._waiting_of[graph.peer_id]:
            del self._waiting_of[graph.peer_id]

    def _drop(self, graph: Graph | None) -> None:
        if graph is None or graph.state == "gone":
            return
        if graph.state == "kept":
            self._count_waiting(graph, -graph.bytes)
        graph.state = "gone"
        del self._graphs[graph]
        if self._named.get((graph.peer_id, graph.number)) is graph:
            del self._named[graph.peer_id, graph.number]
        self._bytes -= graph.bytes
        left = self._bytes_of.pop(graph.peer_id, 0) - graph.bytes
        if left:
            self._bytes_of[graph.peer_id] = left
        self._dropped.append(graph)


def _unpacked(tensor: Any) -> Any:
    return tensor
