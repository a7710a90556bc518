"""Services in a chain, each on a host of its own, and a client that speaks to them by messages."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import trio

from petalnet.blocks.service import BlockService
from petalnet.blocks.span import Span
from petalnet.errors import PeerUnreachable
from petalnet.models.checkpoint import ModelSource
from petalnet.p2p.fields import Message
from petalnet.p2p.host import Host, Stream, open_host
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Error
from petalnet.p2p.protocols import INFERENCE, PUSH
from petalnet.p2p.session_messages import OpenSession, SessionOpened, Step, StepDone
from petalnet.p2p.tensors import decode_tensor, encode_tensor

HIDDEN, MODEL, LAYERS = 32, "key", 4
LOOPBACK = ["/ip4/127.0.0.1/tcp/0"]


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until a condition of the servers' state holds; the test fails where it does not in time."""
    with trio.fail_after(10):
        while True:
            if condition():
                return
            await trio.sleep(0.002)


@dataclass
class Server:
    """One service of the chain.

    Attributes:
        knows: addresses of other servers, by their peer ids: whom it can open links to.
    """

    service: BlockService
    host: Host
    knows: dict[str, list[str]] = field(default_factory=dict)

    @property
    def peer_id(self) -> str:
        return self.host.peer_id

    @property
    def links(self) -> dict[str, int]:
        return self.service.describe()["links"]  # type: ignore[no-any-return]


@dataclass
class Chain:
    """Servers whose spans follow each other, a client, and one span of all their blocks to compare with.

    Attributes:
        spares: servers that are in no session of `session`.
    """

    servers: list[Server]
    client: Host
    twin: Span
    spares: list[Server] = field(default_factory=list)

    def whole(self, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        """The outputs of every block, [blocks, rows, length, hidden]."""
        with torch.no_grad():
            return torch.stack(self.twin.forward(hidden, all_hidden=True, **options))

    @asynccontextmanager
    async def session(self, *, direct: bool = True, **options: Any) -> AsyncIterator[ClientSession]:
        """A session through all servers, as a client opens it. `direct`: whether they push."""
        peers = [server.peer_id for server in self.servers]
        session = secrets.token_hex(16)
        streams: list[Stream] = []
        try:
            for index, server in enumerate(self.servers):
                takes_from = peers[index - 1] if direct and index else ""
                pushes_to = peers[index + 1] if direct and index + 1 < len(peers) else ""
                stream = await self.begin(server, session, takes_from=takes_from, pushes_to=pushes_to, **options)
                streams.append(stream)
            for stream in streams:
                opened = await receive(stream)
                assert isinstance(opened, SessionOpened), opened
            yield ClientSession(session, streams)
        finally:
            for stream in streams:
                await stream.close()

    async def begin(self, server: Server, session: str, **options: Any) -> Stream:
        """A stream to a server on which a session is opened; the answer is still to be received."""
        stream = await self.client.open_stream(server.peer_id, INFERENCE, addrs=server.host.addrs)
        span = server.service.span
        await stream.send(replace(OpenSession(session, MODEL, span.first, span.end, 200), **options))
        return stream

    async def nothing_is_left(self) -> None:
        """Wait until no session is left, and make sure that they left nothing."""
        for server in (*self.servers, *self.spares):
            service = server.service
            await eventually(lambda service=service: not len(service.sessions))  # type: ignore[misc]
            await eventually(lambda server=server: not server.links["open"])  # type: ignore[misc]
            await service.check()
            assert service.sessions.free_tokens == service.sessions.max_tokens
            assert service.engine.queue_length == 0
            assert service.read_ahead.bytes == 0 and not service.incoming_links.sessions


@dataclass
class ClientSession:
    """The client's streams of a session, in the order of the chain."""

    id: str
    streams: list[Stream]
    steps: int = 0

    def step(self, hidden: torch.Tensor, position: int, **extras: Any) -> Step:
        """The next step."""
        self.steps += 1
        flags = {
            name: extras.pop(name) for name in ("all_hidden", "keep", "promise_rows", "step", "codec", "reach", "until") if name in extras
        }
        blobs = {name: encode_tensor(tensor) for name, tensor in extras.items()}
        return Step(**{"step": self.steps, "position": position, "hidden": encode_tensor(hidden), **flags, **blobs})

    async def run(self, hidden: torch.Tensor, position: int, **extras: Any) -> torch.Tensor:
        """A step that only the first server is sent; the last one's output."""
        request = self.step(hidden, position, **extras)
        await self.streams[0].send(request)
        answer = await self.answer(request)
        return decode_tensor(answer.output)

    async def answer(self, request: Step, server: int = -1) -> StepDone:
        answer = await receive(self.streams[server])
        assert isinstance(answer, StepDone), answer
        assert (answer.step, answer.position) == (request.step, request.position + request.hidden.shape[1])
        return answer

    async def refused(self, server: int, step: int, code: str, match: str) -> None:
        """The next message of a server is an error about a step."""
        answer = await receive(self.streams[server])
        assert isinstance(answer, Error), answer
        assert (answer.code, answer.step) == (code, step), answer
        assert match in answer.message


async def receive(stream: Stream) -> Message:
    with trio.fail_after(10):
        answer = await stream.receive()
    assert answer is not None
    return answer


@asynccontextmanager
async def chain_of(
    folder: Path, cuts: Sequence[int] = (2,), *, spares: Sequence[tuple[int, int]] = (), pool: int = 1024, **options: Any
) -> AsyncIterator[Chain]:
    """Servers of a model of four blocks that is cut there, and others of blocks [first, end), who all know each other."""
    edges = [0, *cuts, LAYERS]
    count = len(cuts) + 1
    source = ModelSource.open(folder)
    async with AsyncExitStack() as stack:
        servers: list[Server] = []
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        for first, end in (*pairwise(edges), *spares):
            host = await stack.enter_async_context(open_host(Identity.generate(), listen=LOOPBACK))
            knows: dict[str, list[str]] = {}

            async def open_link(peer_id: str, host: Host = host, knows: dict[str, list[str]] = knows) -> Stream:
                if peer_id not in knows:
                    raise PeerUnreachable(f"{peer_id} is not known", peer_id)
                return await host.open_stream(peer_id, PUSH, addrs=knows[peer_id])

            service = BlockService(Span.load(source, first, end), model=MODEL, kv_tokens=pool, open_link=open_link, **options)
            await nursery.start(service.run)
            host.serve(INFERENCE, service.handle_inference)
            host.serve(PUSH, service.handle_push)
            host.on_peer_lost(service.peer_lost)
            servers.append(Server(service, host, knows))
        for server in servers:
            server.knows.update({other.peer_id: other.host.addrs for other in servers})
        client = await stack.enter_async_context(open_host(Identity.generate(), listen=[]))
        chain = Chain(servers[:count], client, Span.load(source, 0, LAYERS), servers[count:])
        yield chain
        await chain.nothing_is_left()
