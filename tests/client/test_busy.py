"""Full servers: gone round where others hold their blocks, else waited for within a bound, and never taken for broken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trio
from transformers import AutoModelForCausalLM
from trio.testing import MockClock

from petalnet.client.attempts import Busy, Patience
from petalnet.client.chain import Chain
from petalnet.client.inputs import Inputs
from petalnet.client.requests import retrying
from petalnet.client.server_side import ServerSide
from petalnet.client.settings import ClientSettings
from petalnet.errors import BusyError, MissingBlocksError, TooLargeError
from petalnet.p2p.session_messages import OpenSession, Step
from petalnet.p2p.tensors import encode_tensor

GREEDY = {"do_sample": False}
IDS = torch.tensor([[5, 6, 7]])


def test_a_session_goes_round_a_full_server(bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any]) -> None:
    with serving(bloom_path, []) as servers:
        small = servers.start(0, 6, pool_tokens=64)
        with connect(bloom_path, servers.peers, request_timeout=5) as model:
            expected = model.generate(IDS, max_new_tokens=4, **GREEDY)
            with model.inference_session(max_length=64) as holder:
                model.generate(IDS, max_new_tokens=1, session=holder, **GREEDY)
                large = servers.start(0, 6)
                # Whichever of the two the route takes first: it is the other that has room.
                sessions = [model.inference_session(max_length=60) for _ in range(4)]
                for session in sessions:
                    assert torch.equal(model.generate(IDS, max_new_tokens=4, session=session, **GREEDY), expected)
                    assert session.hops[0].peer_id == large.peer_id
                for session in sessions:
                    session.close()
                view = model.transformer.h.target.swarm.membership._peering.view
                assert not view.on_probation(small.peer_id) and not view.on_probation(large.peer_id)


@pytest.mark.parametrize("options", [{"max_new_tokens": 40}, {"max_new_tokens": 12, "num_beams": 5}])
def test_what_is_too_large_for_one_server_goes_to_others(
    bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any], options: dict[str, int]
) -> None:
    """A row that is too long is refused when the session is opened, too many rows at its first step."""
    with serving(bloom_path, []) as servers:
        small = servers.start(0, 6, pool_tokens=32)  # one hop instead of two: the better route
        with connect(bloom_path, servers.peers, request_timeout=20) as model:
            with pytest.raises(TooLargeError, match="exceed the 32 tokens of KV cache"):
                model.generate(IDS, **options, **GREEDY)
            servers.start(0, 3)
            servers.start(3, 6)
            assert [hop.peer_id for hop in model.transformer.h.route()] == [small.peer_id]
            local = AutoModelForCausalLM.from_pretrained(bloom_path)
            assert torch.equal(model.generate(IDS, **options, **GREEDY), local.generate(IDS, **options, **GREEDY))
            assert not model.transformer.h.target.swarm.membership._peering.view.on_probation(small.peer_id)


def test_a_full_server_is_waited_for(bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any]) -> None:
    """Two sessions that fit only one after the other."""
    with serving(bloom_path, []) as servers:
        servers.start(0, 3)
        servers.start(3, 6, pool_tokens=16)
        with connect(bloom_path, servers.peers, request_timeout=20) as model, ThreadPoolExecutor(1) as pool:
            expected = model.generate(IDS, max_new_tokens=8, **GREEDY)
            with model.inference_session(max_length=10) as holder:
                model.generate(IDS, max_new_tokens=2, session=holder, **GREEDY)
                waiting = pool.submit(model.generate, IDS, max_new_tokens=8, **GREEDY)
                threading.Event().wait(0.3)  # it may be asking by now; the outcome is the same if not
                assert not waiting.done()
            assert torch.equal(waiting.result(20), expected)


def test_rows_that_a_later_server_has_no_room_for_are_reordered_once(
    bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    """More rows in mid-session: the first server has done the reordering when the second says that it is full."""
    hidden, more = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)), torch.randn(3, 1, 32)
    with serving(bloom_path, []) as servers:
        servers.start(0, 3)
        servers.start(3, 6, pool_tokens=96)  # a page each for three rows of whichever session
        with connect(bloom_path, servers.peers, request_timeout=20) as model, torch.inference_mode():
            blocks = model.transformer.h
            order = torch.tensor([1, 0, 1])
            with blocks.inference_session(max_length=12) as session:
                session.step(hidden)
                with blocks.inference_session(max_length=12) as other:
                    other.step(hidden[:1])
                    threading.Timer(0.5, other.close).start()
                    answer = session.step(more, hypo_ids=order)
            expected = blocks(torch.cat([hidden[order], more], dim=1))[:, -1:]
            assert torch.allclose(answer, expected, atol=1e-4)


@pytest.mark.parametrize("own_session", [True, False])
def test_a_prompt_is_sent_again_only_when_there_is_room(
    bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any], wire: Any, own_session: bool
) -> None:
    """`generate` knows its rows and asks for room before it sends anything; a session does so once it was refused."""
    ids = torch.randint(4, 250, (1, 20), generator=torch.Generator().manual_seed(0))
    with serving(bloom_path, []) as servers:
        servers.start(0, 6, pool_tokens=128)
        with connect(bloom_path, servers.peers, request_timeout=20) as model:
            expected = model.generate(ids, max_new_tokens=3, num_beams=2, **GREEDY)
            holder = model.inference_session(max_length=96)
            model.generate(IDS, max_new_tokens=1, session=holder, **GREEDY)
            wire.clear()
            threading.Timer(1.0, holder.close).start()
            session = None if own_session else model.inference_session(max_length=22)
            assert torch.equal(model.generate(ids, max_new_tokens=3, num_beams=2, session=session, **GREEDY), expected)
            if session is not None:
                session.close()
    prompts = [message for message in wire.sent if isinstance(message, Step) and message.hidden.shape[1] == 20]
    asked = [message for message in wire.sent if isinstance(message, OpenSession) and message.promise_rows == 2]
    assert len(prompts) == (1 if own_session else 2)
    assert len(asked) >= (2 if own_session else 1), "the first to be refused is the one that asks, or the prompt itself"


def test_patience_has_an_end(bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any]) -> None:
    with serving(bloom_path, []) as servers:
        server = servers.start(0, 6, pool_tokens=16)
        for bound in ({"request_timeout": 1.0}, {"max_retries": 0}):
            with connect(bloom_path, servers.peers, **bound) as model, model.inference_session(max_length=10) as holder:
                first = model.generate(IDS, max_new_tokens=2, session=holder, **GREEDY)
                late = model.inference_session(max_length=10)
                began = time.monotonic()
                with pytest.raises(BusyError, match="no room"):
                    model.generate(IDS, max_new_tokens=8, session=late, **GREEDY)
                assert time.monotonic() - began < 4
                holder.close()
                servers.wait_until(lambda: server.service.sessions.free_tokens > 0)
                assert torch.equal(model.generate(IDS, max_new_tokens=2, session=late, **GREEDY), first)  # none the worse
                late.close()


def in_virtual_time(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` returns, or the error that it raises, and the seconds that it takes."""

    async def main() -> tuple[Any, float]:
        try:
            result = await work()
        except BusyError as error:
            result = error
        return result, trio.current_time()

    clock = MockClock(autojump_threshold=0)
    clock.jump(-clock.current_time())
    return trio.run(main, clock=clock)


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [({}, 90), ({"max_retries": 1}, 30), ({"max_retries": None}, 180), ({"request_timeout": 7}, 7), ({"max_retries": 0}, 0)],
)
def test_how_long_is_waited(settings: dict[str, Any], seconds: float) -> None:
    asked: list[float] = []

    async def work() -> None:
        patience = Patience(ClientSettings(**settings))
        while True:
            asked.append(trio.current_time())
            await patience.wait(BusyError("no room", 4.0))

    error, end = in_virtual_time(work)
    assert isinstance(error, BusyError)
    assert end == seconds
    assert [later - earlier for earlier, later in zip(asked, asked[1:], strict=False)][:1] in ([], [4.0])


def test_a_session_that_a_full_server_closed_goes_on_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    full_peers: list[frozenset[str]] = []

    class FakeChain:
        promised_rows = 1
        failure: Exception | None = None
        drains = False
        hops: tuple[Any, ...] = ()
        exchange = SimpleNamespace(links=[], uploaded_bytes=0, cut=set())
        history = target = None  # nothing is left of it to go on with
        is_full = True

        async def step(self, *_: Any) -> list[Any]:
            if self.is_full:
                self.failure = Busy(BusyError("no memory for the message", 5.0), "peer")
                raise self.failure
            return ["answer"]

        async def rebuild(self) -> None:
            pass

        async def close(self) -> None:
            pass

    class FakeTarget:
        settings = ClientSettings(max_retries=3)
        swarm = SimpleNamespace(membership=SimpleNamespace(start=lambda function: None))

    async def reopened(target: Any, max_length: int, rows: int, full: frozenset[str], *others: Any) -> FakeChain:
        full_peers.append(full)
        chain = FakeChain()
        chain.is_full = False
        return chain

    async def attempt() -> None:
        side = ServerSide(FakeTarget(), 8)  # type: ignore[arg-type]
        side.chain = FakeChain()  # type: ignore[assignment]
        before, token = encode_tensor(torch.zeros(1, 3, 4)), encode_tensor(torch.zeros(1, 1, 4))
        side._history.note(Step(1, 0, before), before, "raw")
        assert await side.step(token, 3, None, Inputs()) == ["answer"]

    monkeypatch.setattr(Chain, "open_once", reopened)
    _, end = in_virtual_time(attempt)
    assert end == 0 and full_peers == [frozenset({"peer"})]


def test_all_servers_are_asked_before_one_is_waited_for() -> None:
    asked: list[tuple[frozenset[str], float]] = []

    class FakeTarget:
        settings = ClientSettings(max_retries=1)

    async def attempt(full: frozenset[str]) -> str:
        asked.append((full, trio.current_time()))
        free = sorted({"a", "b", "c"} - full)
        if not free:
            raise MissingBlocksError([0])
        if trio.current_time() < 8:
            raise Busy(BusyError("no room", 5.0), free[0])
        return free[0]

    result, _ = in_virtual_time(lambda: retrying(FakeTarget(), attempt))  # type: ignore[arg-type]
    assert result == "a"
    assert [(len(full), now) for full, now in asked] == [(n, t) for t in (0.0, 5.0) for n in range(4)] + [(0, 10.0)]


def test_who_is_too_small_is_not_waited_for() -> None:
    asked: list[tuple[list[str], float]] = []

    class FakeTarget:
        settings = ClientSettings(max_retries=1)

    async def attempt(full: frozenset[str]) -> str:
        asked.append((sorted(full), trio.current_time()))
        free = sorted({"busy", "small"} - full)
        if not free:
            raise MissingBlocksError([0])
        raise Busy(BusyError("no room", 20.0) if free[0] == "busy" else TooLargeError("never"), free[0])

    error, end = in_virtual_time(lambda: retrying(FakeTarget(), attempt))  # type: ignore[arg-type]
    assert str(error).startswith("no room; waited for 30 s") and end == 30
    everybody = ["busy", "small"]
    assert asked == [([], 0), (["busy"], 0), (everybody, 0)] + [(full, now) for now in (10, 20, 30) for full in (["small"], everybody)]
