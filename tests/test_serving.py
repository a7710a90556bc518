"""Servers of the demo model in one process, over real connections: how one goes to other blocks, and what others hear of it."""

from __future__ import annotations

import shutil
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
import trio
import trio.testing

from petalnet import placing, serving
from petalnet.config import Settings
from petalnet.errors import UsageError
from petalnet.models.checkpoint import DEMO_MODEL
from petalnet.p2p.identity import Identity
from petalnet.p2p.messages import Error
from petalnet.p2p.pass_messages import Forward, ForwardDone
from petalnet.p2p.protocols import FORWARD, INFERENCE
from petalnet.p2p.session_messages import OpenSession, SessionOpened
from petalnet.p2p.tensors import encode_tensor
from petalnet.peering import Peering, open_peering
from petalnet.routing.records import ServerRecord
from petalnet.serving import Model, Server, open_model
from tests.peft_adapters import save_adapter

HIDDEN = torch.zeros(1, 2, 160)


@pytest.fixture(scope="module")
def model() -> Model:
    return open_model(Settings(serve=1, dtype="float32", device="cpu"), None)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "TOLD_S", 0.3)


async def eventually(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while True:
            if condition():
                return
            await trio.sleep(0.01)


class Swarm:
    """Servers that know each other, and a watcher that remembers what each has said."""

    def __init__(self, nursery: trio.Nursery, model: Model, watcher: Peering) -> None:
        self._nursery = nursery
        self._model = model
        self.watcher = watcher
        self.said: dict[str, list[tuple[str, tuple[int, int]]]] = {}
        nursery.start_soon(self._watch)

    async def start(self, serve: tuple[int, int] | int, **options: object) -> Server:
        settings = Settings(
            **({"serve": serve, "dtype": "float32", "device": "cpu", "throughput": 10.0, "attn_cache_tokens": 512} | options)
        )
        opened = open_peering(Identity.generate(), initial_peers=self.watcher.host.addrs, listen=["/ip4/127.0.0.1/tcp/0"], server=True)
        peering = await self._nursery.start(_keep_open, opened)
        server = Server(settings, peering, self._model)
        await self._nursery.start(server.run)
        await eventually(lambda: self.record(server).state == "online")
        return server

    def record(self, server: Server) -> ServerRecord:
        record = self.watcher.view.record(server._peering.host.peer_id)
        assert record is not None
        return record

    def heard(self, server: Server) -> list[tuple[str, tuple[int, int]]]:
        return self.said[server._peering.host.peer_id]

    async def _watch(self) -> None:
        while True:
            for record in self.watcher.view.servers(now=time.time(), states=("joining", "online", "draining", "left"), include_failed=True):
                said = self.said.setdefault(record.peer_id, [])
                if said[-1:] != [(record.state, record.span)]:
                    said.append((record.state, record.span))
            await trio.sleep(0.005)


async def _keep_open(opened, *, task_status) -> None:
    async with opened as peering:
        task_status.started(peering)
        await trio.sleep_forever()


@asynccontextmanager
async def swarm_of(model: Model) -> AsyncIterator[Swarm]:
    async with (
        open_peering(Identity.generate(), initial_peers=[], listen=["/ip4/127.0.0.1/tcp/0"], server=True) as watcher,
        trio.open_nursery() as nursery,
    ):
        yield Swarm(nursery, model, watcher)
        nursery.cancel_scope.cancel()


async def runs(swarm: Swarm, server: Server, first: int, end: int) -> bool:
    """Whether the server runs these blocks for whoever asks."""
    stream = await swarm.watcher.host.open_stream(server._peering.host.peer_id, FORWARD, timeout_s=5)
    async with stream:
        await stream.send(Forward(swarm._model.key, first, end, encode_tensor(HIDDEN)))
        answer = await stream.receive()
    assert isinstance(answer, (Error, ForwardDone))
    return isinstance(answer, ForwardDone)


async def test_a_server_goes_to_other_blocks_and_says_so_first(model: Model) -> None:
    async with swarm_of(model) as swarm:
        await swarm.start((0, 6))
        mover = await swarm.start(6)
        assert mover.span == (6, 12)
        await swarm.start((6, 12))
        service = weakref.ref(mover._answering.service)
        weights = weakref.ref(mover._answering.service.span)
        await mover.move((3, 9))
        assert mover.span == (3, 9)
        assert service() is None and weights() is None, "the old blocks' memory is given back"
        assert await runs(swarm, mover, 3, 9) and not await runs(swarm, mover, 9, 12)
        await eventually(lambda: swarm.record(mover).state == "online")
        states = swarm.heard(mover)
        assert states[-4:] == [("online", (6, 12)), ("draining", (6, 12)), ("joining", (3, 9)), ("online", (3, 9))]
        assert len(swarm.record(mover).block_digests) == 6


async def test_a_server_stays_where_nobody_else_has_its_blocks(model: Model) -> None:
    async with swarm_of(model) as swarm:
        await swarm.start((0, 8))
        only = await swarm.start(6)
        await only.move((0, 6))
        assert only.span == (6, 12) and await runs(swarm, only, 6, 12)
        assert "draining" not in [state for state, _ in swarm.heard(only)]
        with pytest.raises(UsageError, match="out of range"):
            await only.move((8, 13))


async def test_a_server_stays_that_could_tell_nobody_that_it_leaves(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    async with swarm_of(model) as swarm:
        await swarm.start((0, 12))
        mover = await swarm.start((0, 6))

        async def keep_to_itself(record: ServerRecord) -> int:
            return 1  # on itself

        monkeypatch.setattr(mover._peering, "announce", keep_to_itself)
        await mover.move((6, 12))
        assert mover.span == (0, 6)


async def test_two_moves_that_are_wanted_at_once_are_both_settled(model: Model) -> None:
    async with swarm_of(model) as swarm:
        await swarm.start((0, 12))
        mover = await swarm.start((0, 6))
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(mover.move, (6, 12))
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(mover.move, (3, 9))


async def test_old_blocks_come_back_where_new_ones_cannot_be_loaded(model: Model, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    load = serving.load

    def fails(settings, model, span, open_link):
        if span == (0, 6):
            raise OSError("no such file")
        return load(settings, model, span, open_link)

    async with swarm_of(model) as swarm:
        await swarm.start((0, 12))
        mover = await swarm.start((6, 12))
        monkeypatch.setattr(serving, "load", fails)
        await mover.move((0, 6))
        assert mover.span == (6, 12) and await runs(swarm, mover, 6, 12)
        assert "no such file" in caplog.text
        assert (0, 6) in mover._placing._unloadable, "it does not leave its blocks for those again soon"
        states = swarm.heard(mover)
    assert states[-4:] == [("draining", (6, 12)), ("joining", (0, 6)), ("joining", (6, 12)), ("online", (6, 12))]


async def test_sessions_are_told_and_waited_for(model: Model) -> None:
    async with swarm_of(model) as swarm:
        await swarm.start((0, 12))
        mover = await swarm.start((0, 6), drain_time=30.0)
        stream = await swarm.watcher.host.open_stream(mover._peering.host.peer_id, INFERENCE, timeout_s=5)
        async with trio.open_nursery() as nursery:
            await stream.send(OpenSession("s", model.key, 0, 6, 64))
            assert isinstance(await stream.receive(), SessionOpened)
            assert mover.sessions == 1
            nursery.start_soon(mover.move, (6, 12))
            assert (await stream.receive()).name == "draining"
            assert mover.span == (0, 6)
            await stream.close()
        assert mover.span == (6, 12) and mover.sessions == 0


async def test_a_server_that_is_told_to_stop_while_it_moves_leaves(model: Model) -> None:
    async with swarm_of(model) as swarm:
        await swarm.start((0, 12))
        mover = await swarm.start((0, 6), drain_time=30.0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mover.move, (6, 12))
            await eventually(lambda: swarm.heard(mover)[-1][0] == "draining")
            await mover.drain(1.0)
            await eventually(lambda: swarm.heard(mover)[-1] == ("left", (0, 6)))
            assert mover.span == (0, 6)
            nursery.cancel_scope.cancel()


async def test_newcomers_at_the_same_moment_take_different_blocks(model: Model) -> None:
    async with swarm_of(model) as swarm:
        servers: list[Server] = []

        async def start() -> None:
            servers.append(await swarm.start(4))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(start)
        assert sorted(server.span for server in servers) == [(0, 4), (4, 8), (8, 12)]


@pytest.mark.long
async def test_adapters_are_announced_and_go_with_their_server_to_other_blocks(model: Model, tmp_path: Path) -> None:
    folder = save_adapter(DEMO_MODEL, tmp_path / "poet", "bloom")
    settings = Settings(serve=1, dtype="float32", device="cpu", adapters=(str(folder),))
    async with swarm_of(open_model(settings, None)) as swarm:
        await swarm.start((0, 6), throughput=1.0)
        server = await swarm.start((0, 6), throughput=100.0)
        for span in ((0, 6), (6, 12)):
            await server.move(span)
            (label,) = swarm.record(server).adapters
            service = server._answering.service
            assert label.startswith("poet@") and list(service.adapters) == [label]
            assert list(service.adapters[label].blocks) == list(range(*span))


def test_adapters_that_cannot_be_told_apart(tmp_path: Path) -> None:
    folders = [str(save_adapter(DEMO_MODEL, tmp_path / side / "poet", "bloom")) for side in ("a", "b")]
    with pytest.raises(UsageError, match="--adapters: two are named poet: rename one of the folders"):
        open_model(Settings(serve=1, dtype="float32", device="cpu", adapters=tuple(folders)), None)
    with pytest.raises(UsageError, match="--adapters: 33 are more than the 32 that a server can announce"):
        open_model(Settings(serve=1, dtype="float32", device="cpu", adapters=("x",) * 33), None)


def test_adapters_whose_names_no_record_holds(tmp_path: Path) -> None:
    """A server that could not announce itself would serve nobody."""
    one = save_adapter(DEMO_MODEL, tmp_path / "poet", "bloom")
    folders = [str(shutil.copytree(one, tmp_path / f"{number:0100}")) for number in range(14)]
    with pytest.raises(UsageError, match="--adapters: their names and digests take 1638 bytes, a server can announce 1536: name fewer"):
        open_model(Settings(serve=1, dtype="float32", device="cpu", adapters=tuple(folders)), None)
    assert len(open_model(Settings(serve=1, dtype="float32", device="cpu", adapters=tuple(folders[:13])), None).adapters) == 13


async def test_an_answer_goes_on_while_a_server_of_its_chain_goes_to_other_blocks(model: Model) -> None:
    from transformers import AutoModelForCausalLM, LogitsProcessorList

    from petalnet import AutoDistributedModelForCausalLM

    ids = torch.tensor([[40, 50, 60, 70]])
    options = {"max_new_tokens": 120, "min_new_tokens": 120, "do_sample": False}
    expected = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).generate(ids, **options)
    answers: list[torch.Tensor] = []
    moved = threading.Event()

    def last_token_waits(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """A logits processor: however quick this machine is, the answer does not end before the move."""
        if tokens.shape[1] == ids.shape[1] + 119:
            assert moved.wait(60)
        return scores

    async with swarm_of(model) as swarm:
        await swarm.start((6, 12))
        await swarm.start((0, 6), throughput=1.0)
        mover = await swarm.start((0, 6), throughput=100.0, drain_time=20.0)

        def ask() -> None:
            client = AutoDistributedModelForCausalLM.from_pretrained(
                str(DEMO_MODEL), initial_peers=swarm.watcher.host.addrs, dtype=torch.float32
            )
            try:
                answers.append(client.generate(ids, logits_processor=LogitsProcessorList([last_token_waits]), **options))
            finally:
                client.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, ask)
            await eventually(lambda: mover.sessions == 1)
            await mover.move((6, 12))
            moved.set()
        assert mover.span == (6, 12) and torch.equal(answers[0], expected)
