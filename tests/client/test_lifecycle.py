"""A model's life in its process: threads, event loops, copies, forks, interrupts, the end of a script; and servers that come and go."""

from __future__ import annotations

import asyncio
import copy
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from petalnet import AutoDistributedModelForCausalLM
from petalnet.errors import BusyError, MissingBlocksError, NoSwarmError, PeerUnreachable

GREEDY = {"do_sample": False}
NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN"


def test_several_threads_on_one_model(pair: Any) -> None:
    """Each has its own ambient session, and none sees another's."""
    inputs = [pair.ids(1, 4 + index, seed=index) for index in range(4)]
    expected = [pair.local.generate(ids, max_new_tokens=8, **GREEDY) for ids in inputs]
    together = threading.Barrier(4)

    def answer(ids: torch.Tensor) -> torch.Tensor:
        with pair.remote.inference_session(max_length=32):
            together.wait(30)
            first = pair.remote.generate(ids, max_new_tokens=3, **GREEDY)
            return torch.cat([first, pair.remote.generate(None, max_new_tokens=5, **GREEDY)], dim=1)

    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(answer, inputs), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_inside_a_running_event_loop(pair: Any) -> None:
    """As in a notebook."""
    ids = pair.ids(1, 4)

    async def cell() -> torch.Tensor:
        return pair.remote.generate(ids, max_new_tokens=3, **GREEDY)

    assert torch.equal(asyncio.run(cell()), pair.local.generate(ids, max_new_tokens=3, **GREEDY))


def test_copies_share_the_swarm(pair: Any) -> None:
    ids = pair.ids(1, 4)
    expected = pair.local.generate(ids, max_new_tokens=3, **GREEDY)
    copied = copy.deepcopy(pair.remote)
    assert torch.equal(copied.generate(ids, max_new_tokens=3, **GREEDY), expected)
    weight = copied.get_input_embeddings().weight
    assert weight.data_ptr() != pair.remote.get_input_embeddings().weight.data_ptr()
    with torch.no_grad():
        weight.zero_()
    del copied
    gc.collect()
    assert torch.equal(pair.remote.generate(ids, max_new_tokens=3, **GREEDY), expected)


def test_a_model_can_travel_to_another_process(pair: Any) -> None:
    """Workers that are spawned get their arguments so; the copy joins the swarm again where it arrives."""
    ids = pair.ids(1, 4)
    arrived = pickle.loads(pickle.dumps(pair.remote))
    assert type(arrived) is type(pair.remote)
    assert torch.equal(arrived.generate(ids, max_new_tokens=3, **GREEDY), pair.local.generate(ids, max_new_tokens=3, **GREEDY))
    arrived.close()


def test_forked_workers(pair: Any) -> None:
    ids = pair.ids(1, 4)
    expected = pair.local.generate(ids, max_new_tokens=3, **GREEDY)
    with pair.remote.inference_session(max_length=16) as session:
        first = pair.remote.generate(ids, max_new_tokens=2, session=session, **GREEDY)

        class Samples(torch.utils.data.Dataset[torch.Tensor]):
            """Holds the model, as a dataset that tokenises with it would."""

            model = pair.remote

            def __len__(self) -> int:
                return 4

            def __getitem__(self, index: int) -> torch.Tensor:
                return torch.full((2,), index)

        loader = torch.utils.data.DataLoader(Samples(), batch_size=2, num_workers=2, multiprocessing_context="fork")
        assert torch.equal(torch.cat(list(loader))[:, 0], torch.arange(4))
        rest = pair.remote.generate(None, max_new_tokens=1, session=session, **GREEDY)
    assert torch.equal(torch.cat([first, rest], dim=1), expected)


def test_a_forked_child_may_use_the_model(pair: Any) -> None:
    ids = pair.ids(1, 4)
    expected = pair.local.generate(ids, max_new_tokens=3, **GREEDY)
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    receive, send = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        answer = pair.remote.generate(ids, max_new_tokens=3, **GREEDY)
        send.send_bytes(bytes(answer[0].tolist()))
        os._exit(0)
    assert receive.poll(30)
    assert list(receive.recv_bytes()) == expected[0].tolist()
    os.waitpid(child, 0)
    assert torch.equal(pair.remote.generate(ids, max_new_tokens=3, **GREEDY), expected)


def test_ctrl_c_returns_at_once_and_frees_the_servers(pair: Any) -> None:
    ids = pair.ids(1, 4)
    pair.servers.wait_until(lambda: pair.servers.open_sessions() == 0)
    times: list[float] = []

    class Interrupt:
        def put(self, value: torch.Tensor) -> None:
            if not times and value.ndim == 1:
                times.append(0.0)
                threading.Timer(0.1, press).start()

        def end(self) -> None:
            raise AssertionError("the answer was not interrupted")

    def press() -> None:
        times[0] = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pair.remote.generate(ids, max_new_tokens=240, streamer=Interrupt(), **GREEDY)
    assert time.monotonic() - times[0] < 0.2
    pair.servers.wait_until(lambda: pair.servers.open_sessions() == 0)
    assert torch.equal(pair.remote.generate(ids, max_new_tokens=3, **GREEDY), pair.local.generate(ids, max_new_tokens=3, **GREEDY))


SCRIPT = """
    import sys, torch
    from petalnet import AutoDistributedModelForCausalLM
    model = AutoDistributedModelForCausalLM.from_pretrained(sys.argv[1], initial_peers=sys.argv[2:], dtype=torch.float32)
    session = model.inference_session(max_length=32)
    print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, session=session)[0].tolist())
"""


def test_a_script_ends_without_close(pair: Any) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(pair.path), *pair.servers.peers], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == str(pair.local.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, **GREEDY)[0].tolist())
    assert "Traceback" not in ended.stderr and "Fatal" not in ended.stderr
    pair.servers.wait_until(lambda: pair.servers.open_sessions() == 0)


def test_a_closed_model_says_so(bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any]) -> None:
    with serving(bloom_path, [(0, 6)]) as servers:
        model, other = connect(bloom_path, servers.peers), connect(bloom_path, servers.peers)
        session = model.inference_session(max_length=8)
        model.close()
        with pytest.raises(RuntimeError, match="closed"):
            model.generate(torch.tensor([[5]]), max_new_tokens=2)
        assert other.generate(torch.tensor([[5]]), max_new_tokens=2).shape == (1, 3)
        session.close()
        other.close()


def test_a_lost_server_is_replaced(bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any]) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with serving(bloom_path, [(0, 3), (3, 6)]) as servers, connect(bloom_path, servers.peers) as model:
        expected = model.generate(ids, max_new_tokens=4, **GREEDY)
        lost, block = servers.servers[1], model.transformer.h[3:6]
        inputs = torch.randn(1, 3, 32, requires_grad=True)
        outputs = block(inputs)
        session = model.inference_session(max_length=16)
        first = model.generate(ids, max_new_tokens=2, session=session, **GREEDY)
        spare = servers.start(3, 6)
        servers.stop(lost)
        rest = model.generate(None, max_new_tokens=2, session=session, **GREEDY)
        assert torch.equal(torch.cat([first, rest], dim=1), expected)
        (recovery,) = session.recoveries
        assert [hop.peer_id for hop in recovery.lost] == [lost.peer_id]
        assert [hop.peer_id for hop in recovery.replacements] == [spare.peer_id]
        began = time.monotonic()
        assert torch.equal(model.generate(ids, max_new_tokens=4, **GREEDY), expected)
        assert time.monotonic() - began < 5
        assert [hop.peer_id for hop in model.transformer.h.route()] == [servers.servers[0].peer_id, spare.peer_id]
        outputs.sum().backward()  # the forward pass went through the server that is gone
        assert inputs.grad is not None and inputs.grad.abs().max() > 0


def test_missing_blocks_are_named(bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any]) -> None:
    with serving(bloom_path, [(0, 2), (4, 5)]) as servers, connect(bloom_path, servers.peers) as model:
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(MissingBlocksError, match="blocks 2-3, 5") as caught:
                model.generate(torch.tensor([[5]]), max_new_tokens=2)
            assert caught.value.blocks == [2, 3, 5]
            assert caught.value.peers_asked == sorted(server.peer_id for server in servers.servers)
        assert time.monotonic() - began < 3  # the swarm is known by now
        assert model.transformer.h[0:2](torch.zeros(1, 1, 32)).shape == (1, 1, 32)
        servers.start(2, 6)
        assert model.generate(torch.tensor([[5]]), max_new_tokens=2).shape == (1, 3)


def test_a_full_server_is_passed_over_or_waited_for(bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any]) -> None:
    with serving(bloom_path, []) as servers:
        small = servers.start(0, 6, pool_tokens=16)
        with connect(bloom_path, servers.peers, request_timeout=3) as model:
            ids = torch.tensor([[5, 6, 7]])
            with model.inference_session(max_length=10) as session:
                model.generate(ids, max_new_tokens=2, session=session)
                with pytest.raises(BusyError, match="no room"):
                    model.generate(ids, max_new_tokens=8, session=model.inference_session(max_length=10))
                assert servers.peers == small.addrs
            assert model.generate(ids, max_new_tokens=8).shape == (1, 11)


def test_only_allowed_servers_are_used(bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any]) -> None:
    with serving(bloom_path, [(0, 6), (0, 6)]) as servers:
        first, second = servers.servers
        for options in ({"allowed_servers": [second.peer_id]}, {"blocked_servers": [first.peer_id]}):
            with connect(bloom_path, servers.peers, **options) as model:
                assert {hop.peer_id for hop in model.transformer.h.route()} == {second.peer_id}
        with connect(bloom_path, servers.peers, allowed_servers=[]) as model, pytest.raises(MissingBlocksError, match="blocks 0-5"):
            model.transformer.h.route()


def test_nobody_there(bloom_path: Path, connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with connect(bloom_path, [NOBODY]) as model, pytest.raises(PeerUnreachable, match="none of the initial peers answered"):
        model.generate(torch.tensor([[5]]), max_new_tokens=2)
    for name in ("STATE_DIR", "CONFIG"):
        monkeypatch.setenv(f"PETALNET_{name}", str(tmp_path / name))
    monkeypatch.delenv("PETALNET_INITIAL_PEERS", raising=False)
    with pytest.raises(NoSwarmError, match="initial_peers.*PETALNET_INITIAL_PEERS.*petalnet node --client"):
        AutoDistributedModelForCausalLM.from_pretrained(str(bloom_path))


def test_peers_from_the_environment(bloom_path: Path, serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with serving(bloom_path, [(0, 6)]) as servers:
        monkeypatch.setenv("PETALNET_CONFIG", str(tmp_path / "none.toml"))
        monkeypatch.setenv("PETALNET_INITIAL_PEERS", " ".join(servers.peers))
        with AutoDistributedModelForCausalLM.from_pretrained(str(bloom_path)) as model:
            assert model.generate(torch.tensor([[5]]), max_new_tokens=2).shape == (1, 3)
