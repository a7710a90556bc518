"""Real servers on loopback in a thread of the test process, and small models that they serve."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import trio
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

import petalnet
from petalnet.blocks.adapters import Adapter
from petalnet.blocks.service import BlockService
from petalnet.blocks.span import Span
from petalnet.linking import Linking
from petalnet.models.checkpoint import ModelSource
from petalnet.models.identity import model_key
from petalnet.p2p.fields import Message
from petalnet.p2p.host import Host
from petalnet.p2p.identity import Identity
from petalnet.p2p.protocols import FORWARD, INFERENCE, PUSH
from petalnet.p2p.session_messages import Step, StepDone
from petalnet.p2p.streams import Stream
from petalnet.peering import open_peering
from petalnet.routing.records import ServerRecord

LAYERS = 6
VOCABULARY = 256
HIDDEN = 32
POOL_TOKENS = 4096


def save_bloom(folder: Path) -> Path:
    torch.manual_seed(1)
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_head=4, n_layer=LAYERS, initializer_range=0.15, pad_token_id=3)
    return save(BloomForCausalLM(config), folder)


def save_llama(folder: Path) -> Path:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=80, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=LAYERS, initializer_range=0.2, max_position_embeddings=256, tie_word_embeddings=False, pad_token_id=3,
    )  # fmt: skip
    return save(LlamaForCausalLM(config), folder)


def save(model: torch.nn.Module, folder: Path) -> Path:
    model.generation_config.eos_token_id = None  # random weights would end some answers early
    model.save_pretrained(folder)
    return folder


@dataclass
class Server:
    """One server: its blocks and what answers for them. `scope` is what keeps it alive."""

    span: tuple[int, int]
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    service: BlockService = field(init=False)
    host: Host = field(init=False)
    peer_id: str = field(init=False)
    addrs: list[str] = field(init=False)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    alive: bool = True


class Servers:
    """Servers of one model, on a trio thread of their own."""

    def __init__(self, model: Path) -> None:
        self.model = model
        self.key = model_key(ModelSource.open(model))
        self.servers: list[Server] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))
        self._thread.start()
        self._ready.wait()

    async def _main(self) -> None:
        async with trio.open_nursery() as self._nursery:
            self._token = trio.lowlevel.current_trio_token()
            self._ready.set()
            await trio.sleep_forever()

    @property
    def peers(self) -> list[str]:
        return next(server.addrs for server in self.servers if server.alive)

    def start(
        self, first: int, end: int, *, pool_tokens: int = POOL_TOKENS, adapters: Mapping[str, Adapter] = MappingProxyType({})
    ) -> Server:
        """One more server, announced when this returns.

        Args:
            adapters: by their labels.
        """
        server = Server((first, end), adapters)
        peers = self.peers if self.servers else []
        trio.from_thread.run(self._nursery.start, self._serve, server, peers, pool_tokens, trio_token=self._token)
        self.servers.append(server)
        return server

    def stop(self, server: Server) -> None:
        """End a server without a word to anybody, as a crash does."""
        server.alive = False
        trio.from_thread.run_sync(server.scope.cancel, trio_token=self._token)

    def stop_all(self) -> None:
        """End all servers, whose pages have to be accounted for at any moment, so at this one as well."""
        try:
            for server in self.servers:
                if server.alive:
                    trio.from_thread.run(server.service.check, trio_token=self._token)
        finally:
            trio.from_thread.run_sync(self._nursery.cancel_scope.cancel, trio_token=self._token)
            self._thread.join(20)

    def cut(self, server: Server, other: Server) -> None:
        """End all connections between two servers at once."""
        trio.from_thread.run(server.host.disconnect, other.peer_id, trio_token=self._token)

    def wait_until(self, condition: Callable[[], bool], within_s: float = 5.0) -> None:
        """Wait until `condition()` of the servers' state holds."""
        deadline = time.monotonic() + within_s
        while not trio.from_thread.run_sync(condition, trio_token=self._token):
            assert time.monotonic() < deadline, "it has not come to that in time"
            threading.Event().wait(0.01)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function on the servers' thread."""
        return trio.from_thread.run_sync(function, *arguments, trio_token=self._token)

    def open_sessions(self) -> int:
        return sum(len(server.service.sessions) for server in self.servers if server.alive)

    async def _serve(
        self, server: Server, peers: Sequence[str], pool_tokens: int, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        source = ModelSource.open(self.model)
        span = Span.load(source, *server.span, dtype=torch.float32, device="cpu")
        listen = ["/ip4/127.0.0.1/tcp/0"]
        with server.scope:
            async with (
                open_peering(Identity.generate(), initial_peers=peers, listen=listen, server=True) as peering,
                trio.open_nursery() as nursery,
            ):
                linking = Linking(peering, self.key, server.span[1])
                server.service = BlockService(
                    span, model=self.key, kv_tokens=pool_tokens, open_link=linking.open, adapters=server.adapters
                )
                await nursery.start(server.service.run)
                server.host = peering.host
                server.peer_id, server.addrs = peering.host.peer_id, peering.host.addrs
                peering.host.on_peer_lost(server.service.peer_lost)
                peering.host.serve(INFERENCE, server.service.handle_inference)
                peering.host.serve(FORWARD, server.service.handle_forward)
                peering.host.serve(PUSH, server.service.handle_push)
                now = time.time()
                addrs = tuple(addr.rpartition("/p2p/")[0] for addr in server.addrs)
                record = ServerRecord(
                    peer_id=server.peer_id, addrs=addrs, model=self.key, model_name="test", span=server.span, num_blocks=LAYERS,
                    state="online", dtype="float32", sequence=int(now * 1000), issued=now, expires=now + 600,
                    adapters=tuple(server.adapters),
                )  # fmt: skip
                await peering.announce(record)
                task_status.started()
                await trio.sleep_forever()


@contextmanager
def start_servers(model: Path, spans: Sequence[tuple[int, int]]) -> Iterator[Servers]:
    servers = Servers(model)
    try:
        for first, end in spans:
            servers.start(first, end)
        yield servers
    finally:
        servers.stop_all()


def connect_model(model: Path, peers: Sequence[str], **options: object) -> torch.nn.Module:
    """The model over the swarm, with short bounds."""
    return petalnet.AutoDistributedModelForCausalLM.from_pretrained(
        str(model), initial_peers=list(peers), dtype=torch.float32, **{"request_timeout": 20, "max_retries": 2, **options}
    )


@dataclass
class Pair:
    """The same model on this machine and over a swarm of three servers."""

    family: str
    path: Path
    local: torch.nn.Module
    remote: torch.nn.Module
    servers: Servers

    @property
    def blocks(self) -> petalnet.RemoteSequential:
        backbone = self.remote.base_model
        return backbone.h if self.family == "bloom" else backbone.layers

    @staticmethod
    def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
        """Random ids that are no special tokens."""
        return torch.randint(4, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))

    @classmethod
    def padded(cls, side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Three rows of 9, 6 and 2 tokens, padded on one side, and their attention mask."""
        ids = cls.ids(3, 9, seed=5)
        mask = torch.ones_like(ids)
        for row, length in enumerate((9, 6, 2)):
            unused = slice(0, 9 - length) if side == "left" else slice(length, 9)
            ids[row, unused] = 3
            mask[row, unused] = 0
        return ids, mask

    def local_blocks(self, hidden: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Blocks [first, end) of the local model on [rows, length, hidden]."""
        outputs: list[torch.Tensor] = []
        layers = self.local.base_model.h if self.family == "bloom" else self.local.base_model.layers

        def take(_: object, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        hooks = [
            layers[first].register_forward_pre_hook(lambda _, args, kwargs: ((hidden, *args[1:]), kwargs), with_kwargs=True),
            layers[end - 1].register_forward_hook(take),
        ]
        try:
            self.local.base_model(inputs_embeds=torch.zeros_like(hidden), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs[0]


class Wire:
    """What the client's sessions sent and received, in order.

    Attributes:
        sent, received: messages.
    """

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.received: list[Message] = []

    def clear(self) -> None:
        self.sent.clear()
        self.received.clear()

    @property
    def steps(self) -> list[Step]:
        """Of each step what the first server got."""
        return list({message.step: message for message in reversed(self.sent) if isinstance(message, Step)}.values())[::-1]

    @property
    def answers(self) -> list[StepDone]:
        """The last answer to each step: the last server's."""
        return sorted({m.step: m for m in self.received if isinstance(m, StepDone)}.values(), key=lambda done: done.step)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    """Listens to the client's end of all sessions."""
    wire = Wire()
    send, receive = Stream.send, Stream.receive

    async def listening_send(stream: Stream, message: Message) -> None:
        if not stream.served and stream.protocol is INFERENCE:
            wire.sent.append(message)
        await send(stream, message)

    async def listening_receive(stream: Stream, **options: object) -> Message | None:
        message = await receive(stream, **options)
        if message is not None and not stream.served and stream.protocol is INFERENCE:
            wire.received.append(message)
        return message

    monkeypatch.setattr(Stream, "send", listening_send)
    monkeypatch.setattr(Stream, "receive", listening_receive)
    return wire


@pytest.fixture(scope="session", params=["bloom", "llama"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    save_model = {"bloom": save_bloom, "llama": save_llama}[request.param]
    path = save_model(tmp_path_factory.mktemp(request.param))
    with start_servers(path, [(0, 2), (2, 5), (5, LAYERS)]) as servers:
        remote = connect_model(path, servers.peers)
        yield Pair(request.param, path, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), remote, servers)
        remote.close()


@pytest.fixture(scope="session")
def bloom_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bloom(tmp_path_factory.mktemp("bloom-alone"))


@pytest.fixture(scope="session")
def serving() -> Callable[[Path, Sequence[tuple[int, int]]], AbstractContextManager[Servers]]:
    """`with serving(path, [(0, 2), (2, 6)]) as servers:` runs servers of these blocks."""
    return start_servers


@pytest.fixture(scope="session")
def connect() -> Callable[..., torch.nn.Module]:
    """`connect(path, peers, **options)` is the model over the swarm."""
    return connect_model


@pytest.fixture(scope="session")
def padded() -> Callable[[str], tuple[torch.Tensor, torch.Tensor]]:
    """`padded("left")`: ids of three unequal rows, and their attention mask."""
    return Pair.padded
