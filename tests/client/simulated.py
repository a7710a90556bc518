"""Servers of a chain as the protocol describes them, in one trio loop and virtual time: they are killed, hang, or do not reach each other
at any moment. What they compute depends on every entry before, so that nothing that is lost or doubled goes unnoticed."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from types import SimpleNamespace
from typing import Any

import trio

from petalnet.client.inputs import wanted_tokens
from petalnet.client.prefix import SentNames
from petalnet.client.requests import Target
from petalnet.client.settings import ClientSettings
from petalnet.errors import MissingBlocksError, PeerLost, PeerUnreachable
from petalnet.p2p.fields import Blob, Message
from petalnet.p2p.messages import Error
from petalnet.p2p.session_messages import (
    AskProgress,
    LinkDown,
    OpenSession,
    Progress,
    Replay,
    Reserve,
    Reserved,
    Resume,
    Resumed,
    SessionOpened,
    Step,
    StepDone,
)
from petalnet.routing.routes import Hop

Rows = list[list[int]]
"""Rows of numbers: what a token is here."""
MODULUS = 9973


def blob_of(rows: Rows) -> Blob:
    data = bytearray().join(struct.pack("<f", value) for row in rows for value in row)
    return Blob("float32", (len(rows), len(rows[0]), 1), "raw", data)


def rows_of(blob: Blob) -> Rows:
    rows, new, _ = blob.shape
    values = [int(value) for (value,) in struct.iter_unpack("<f", bytes(blob.data))]
    return [values[row * new : (row + 1) * new] for row in range(rows)]


def order_of(blob: Blob) -> list[int]:
    return [row for (row,) in struct.iter_unpack("<q", bytes(blob.data))]


def through(block: int, entries: list[int]) -> int:
    """What a block makes of the last of some entries."""
    return (sum((at + 1) * value for at, value in enumerate(entries)) * (block + 2) + 7) % MODULUS


class Caches:
    """The entries that some blocks hold, and what they put out."""

    def __init__(self, first: int, end: int) -> None:
        self.blocks = range(first, end)
        self.inputs: list[Rows] = [[] for _ in self.blocks]  # block, row, entry
        self.outputs: Rows = []

    @property
    def position(self) -> int:
        return len(self.outputs[0]) if self.outputs else 0

    def go_to(self, position: int, order: list[int] | None) -> None:
        for held in [*self.inputs, self.outputs]:
            for row in held:
                del row[position:]
            if order is not None:
                held[:] = [list(held[row]) for row in order]

    def take(self, position: int, hidden: Rows, order: list[int] | None) -> Rows:
        if position == 0:
            for held in [*self.inputs, self.outputs]:
                held[:] = [[] for _ in hidden]
        assert position <= self.position and (position or order is None)
        self.go_to(position, order)
        assert len(self.outputs) == len(hidden)
        result: Rows = []
        for row, values in enumerate(hidden):
            made = []
            for value in values:
                for index, block in enumerate(self.blocks):
                    self.inputs[index][row].append(value)
                    value = through(block, self.inputs[index][row])
                self.outputs[row].append(value)
                made.append(value)
            result.append(made)
        return result


@dataclass(eq=False)
class Machine:
    """A server. `state`: "well", "hung" or "dead"."""

    peer_id: str
    first: int
    end: int
    state: str = "well"
    changed: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    sessions: list[Hosted] = field(default_factory=list)

    def set(self, state: str) -> None:
        self.state = state
        self.changed.unpark_all()
        if state == "dead":
            for session in self.sessions:
                session.stream.end()

    async def answers(self) -> None:
        """Wait until the server does anything at all."""
        while self.state != "well":
            await self.changed.park()


class Line:
    """The client's stream to a session."""

    def __init__(self, hosted: Hosted) -> None:
        self.hosted = hosted
        self.peer_id = hosted.machine.peer_id
        self._to_client, self._from_server = trio.open_memory_channel[Message](math.inf)
        self.is_over = False
        self.sent: list[Message] = []

    async def send(self, message: Message) -> None:
        await trio.lowlevel.checkpoint()
        if self.is_over:
            raise PeerLost("gone", self.peer_id)
        self.sent.append(message)
        self.hosted.inbox.send_nowait(("", message))

    async def receive(self) -> Message | None:
        try:
            return await self._from_server.receive()
        except trio.EndOfChannel:
            raise PeerLost("gone", self.peer_id) from None

    def tell(self, message: Message) -> None:
        if not self.is_over:
            self._to_client.send_nowait(message)

    def end(self) -> None:
        self.is_over = True
        self._to_client.close()

    async def close(self) -> None:
        await trio.lowlevel.checkpoint()
        self.hosted.close()

    async def reset(self) -> None:
        await self.close()


class Hosted:
    """A session at a server."""

    def __init__(self, swarm: Simulated, machine: Machine, request: OpenSession) -> None:
        self.swarm, self.machine = swarm, machine
        self.id, self.takes_from, self.pushes_to = request.session, request.takes_from, request.pushes_to
        self.pushes = bool(request.pushes_to)
        self.caches = Caches(request.first, request.end)
        self.send_in, self.receive_in = trio.open_memory_channel[tuple[str, Message]](math.inf)
        self.inbox = self.send_in
        self.stream = Line(self)
        self.last = self.ordered = self.sent = self.pushed = 0
        self.is_down = False
        self.scope = trio.CancelScope()

    def close(self) -> None:
        self.stream.end()
        self.scope.cancel()
        if self in self.machine.sessions:
            self.machine.sessions.remove(self)

    async def serve(self) -> None:
        with self.scope:
            async for brought_by, message in self.receive_in:
                await self.machine.answers()
                await trio.sleep(self.swarm.random.random() * 0.02)
                await self.machine.answers()
                if not brought_by or brought_by == self.takes_from:
                    self.serve_one(message)

    def serve_one(self, message: Message) -> None:
        caches, tell = self.caches, self.stream.tell
        if isinstance(message, Reserve):
            tell(Reserved(0))
        elif isinstance(message, AskProgress):
            tell(Progress(message.nonce, self.last, self.last, self.pushed))
        elif isinstance(message, Resume):
            assert message.position <= caches.position
            order = None if message.order is None or self.ordered >= message.order_step else order_of(message.order)
            caches.go_to(message.position, order)
            self.ordered = max(self.ordered, message.order_step if order else 0)
            self.last = max(self.last, message.step)
            self.takes_from, self.pushes_to, self.is_down = message.takes_from, message.pushes_to, False
            tell(Resumed(caches.position, len(caches.outputs)))
        elif isinstance(message, Replay):
            outputs = [row[message.position : message.position + message.tokens] for row in caches.outputs]
            if not outputs or len(outputs[0]) < message.tokens:
                tell(Error("caller", "there are not so many entries", step=message.step))
            elif message.until:
                self.go_on(Step(message.step, message.position, blob_of(outputs), keep=-1, until=message.until), outputs)
            else:
                tell(StepDone(message.step, 0, blob_of(outputs)))
        elif isinstance(message, Step) and message.step > self.last:
            self.last = message.step
            if message.position > caches.position:
                tell(Error("caller", "a step was left out", step=message.step))
                return
            order = None if message.order is None else order_of(message.order)
            outputs = caches.take(message.position, rows_of(message.hidden), order)
            self.ordered = message.step if order else self.ordered
            self.go_on(message, outputs)

    def go_on(self, step: Step, outputs: Rows) -> None:
        kept = wanted_tokens(step)
        if step.until == self.caches.blocks.stop or not self.pushes:
            shown = [row[len(row) - kept :] for row in outputs]
            blob = blob_of(shown) if kept else Blob("float32", (len(outputs), 0, 1), "raw", b"")
            self.stream.tell(StepDone(step.step, 0, blob))
            return
        step = replace(step, hidden=blob_of(outputs))
        if self.pushes_to and not self.is_down:
            way = self.swarm.way(self, self.pushes_to)
            if way is None:
                self.is_down = True
                self.stream.tell(LinkDown("it is gone", self.pushed))
            else:
                self.pushed = step.step
                way(step)
                return
        self.stream.tell(StepDone(step.step, 0, step.hidden))


class Simulated:
    """A swarm, and the client's membership of it."""

    def __init__(self, blocks: int, machines: list[Machine], random: Random, nursery: trio.Nursery) -> None:
        self.blocks, self.machines, self.random, self.nursery = blocks, machines, random, nursery
        self.cut: set[tuple[str, str]] = set()  # what is sent there does not arrive
        self.avoided: dict[str, float] = {}
        self.sent_names = SentNames()
        self.host = SimpleNamespace(
            round_trip_s=lambda peer_id: 0.001, connected_peers=lambda: [], ping=self.ping, bytes_s=lambda peer_id: None,
            open_stream=self.open_stream,
        )  # fmt: skip

    def target(self, **options: Any) -> Any:
        settings = ClientSettings(**{"request_timeout": 60, "max_retries": None, "show_route": False, **options})
        swarm: Any = SimpleNamespace(membership=self)
        return Target(swarm=swarm, model="model", first=0, end=self.blocks, settings=settings)

    def machine(self, peer_id: str) -> Machine:
        return next(machine for machine in self.machines if machine.peer_id == peer_id)

    def way(self, hosted: Hosted, peer_id: str) -> Callable[[Step], None] | None:
        """How a session's outputs come to the next server; None where that is gone."""
        machine = self.machine(peer_id)
        if machine.state == "dead":
            return None
        if (hosted.machine.peer_id, peer_id) in self.cut:
            return lambda step: None
        first = hosted.caches.blocks.stop
        behind = [one for one in machine.sessions if one.id == hosted.id and one.caches.blocks.start == first]
        return (lambda step: behind[0].inbox.send_nowait((hosted.machine.peer_id, step))) if behind else None

    # ---- what the client asks of its membership

    async def ping(self, peer_id: str, within_s: float) -> float:
        with trio.move_on_after(within_s):
            await self.machine(peer_id).answers()
            return 0.001
        raise PeerUnreachable("no answer", peer_id)

    async def open_stream(self, peer_id: str, protocol: Any, **_: Any) -> Any:
        machine = self.machine(peer_id)
        await trio.sleep(self.random.random() * 0.01)
        if machine.state == "dead":
            raise PeerUnreachable("refused", peer_id)
        return _Opening(self, machine)

    async def route(self, model: str, first: int, end: int, *, blocked: Any = (), like: Any = None, **_: Any) -> list[Hop]:
        await trio.sleep(0.001)
        for last_resort in (False, True):
            hops: list[Hop] = []
            at = first
            while at < end:
                usable = [
                    machine
                    for machine in self.machines
                    if machine.first <= at < machine.end
                    and machine.peer_id not in blocked
                    and (last_resort or self.avoided.get(machine.peer_id, 0.0) <= trio.current_time())
                ]
                if not usable:
                    break
                chosen = self.random.choice(usable)
                hops.append(Hop(chosen.peer_id, (), at, min(chosen.end, end)))
                at = hops[-1].end
            else:
                return hops
        raise MissingBlocksError(range(first, end))

    def start(self, function: Any) -> None:
        self.nursery.start_soon(function)

    def record(self, peer_id: str) -> None:
        return None

    def mark_failed(self, peer_id: str, *, wrong: bool = False) -> None:
        self.avoided[peer_id] = trio.current_time() + 5.0

    def mark_late(self, peer_id: str) -> None:
        self.avoided[peer_id] = trio.current_time() + 2.0

    def mark_ok(self, peer_id: str) -> None:
        self.avoided.pop(peer_id, None)

    def mark_cut(self, peer_id: str, next_id: str) -> None:
        pass

    def observe_step(self, times: Any, *, rows: int = 1) -> None:
        pass


class _Opening:
    """A stream before its first message."""

    def __init__(self, swarm: Simulated, machine: Machine) -> None:
        self._swarm, self._machine, self._line = swarm, machine, None
        self.peer_id = machine.peer_id

    async def send(self, message: Message) -> None:
        if self._line is None:
            assert isinstance(message, OpenSession)
            if self._machine.state == "dead":
                raise PeerLost("gone", self.peer_id)
            hosted = Hosted(self._swarm, self._machine, message)
            self._machine.sessions.append(hosted)
            self._line = hosted.stream
            self._swarm.nursery.start_soon(self._open, hosted)
        else:
            await self._line.send(message)

    async def _open(self, hosted: Hosted) -> None:
        await self._machine.answers()
        hosted.stream.tell(SessionOpened(0, dtype="float32"))
        await hosted.serve()

    async def receive(self) -> Message | None:
        return await self._line.receive()

    async def close(self) -> None:
        if self._line is not None:
            await self._line.close()

    async def reset(self) -> None:
        await self.close()
