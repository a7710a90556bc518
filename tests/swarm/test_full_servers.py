"""Servers without room: whoever finds none waits for it or goes elsewhere, and a server is not avoided for being full.

The second half of a small Llama is served twice: by a server with room for 256 KV tokens, which announces that it is the quicker one, and
by one with plenty.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from petalnet.client.swarm import Membership
from petalnet.p2p.messages import Error

from .models import connected, ids, load_local, save_model

ROOM = 256
GREEDY = {"do_sample": False}


@dataclass
class Servers:
    """Peer ids of the servers, and the addresses by which two clients enter the swarm, each as a peer of its own."""

    path: Path
    local: torch.nn.Module
    first: str
    tight: str
    roomy: str
    entries: list[list[str]]


@pytest.fixture(scope="module")
def servers(module_nodes, tmp_path_factory: pytest.TempPathFactory) -> Servers:
    path = save_model("llama", tmp_path_factory.mktemp("llama"))
    options = [path, "--dtype", "float32"]
    first = module_nodes.start(*options, "--serve", "0:3", "--throughput", "100", "--new-swarm")
    options += ["--serve", "3:6", "--initial-peers", *first.addrs]
    tight = module_nodes.launch(*options, "--throughput", "1000", "--attn-cache-tokens", ROOM)
    roomy = module_nodes.launch(*options, "--throughput", "5")
    for node in (tight, roomy):
        node.wait_ready()
    # What a process knows of a swarm belongs to the peers that it was told: with other peers it is another peer.
    entries = [first.addrs, first.addrs + roomy.addrs]
    return Servers(path, load_local(path), first.peer_id, tight.peer_id, roomy.peer_id, entries)


@pytest.fixture
def failures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Servers that were taken out of the routes."""
    failed: list[str] = []
    monkeypatch.setattr(Membership, "mark_failed", lambda self, peer_id: failed.append(peer_id))
    return failed


@pytest.fixture
def told_busy(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a server has told this process that it is busy."""
    told = threading.Event()
    exception = Error.exception

    def spy(error: Error, *arguments: Any) -> Exception:
        if error.code == "busy":
            told.set()
        return exception(error, *arguments)

    monkeypatch.setattr(Error, "exception", spy)
    return told


@pytest.fixture
def clients(servers: Servers, request: pytest.FixtureRequest) -> Iterator[list[torch.nn.Module]]:
    """Two peers that use only the tight server for the second half; with the parameter "both" either server."""
    allowed = None if getattr(request, "param", "tight") == "both" else [servers.first, servers.tight]
    with ExitStack() as stack:
        yield [
            stack.enter_context(connected(servers.path, entry, allowed_servers=allowed, request_timeout=60)) for entry in servers.entries
        ]


def test_the_second_of_two_that_do_not_fit_together_waits(
    servers: Servers, clients: list[torch.nn.Module], failures: list[str], told_busy: threading.Event
) -> None:
    one, other = clients
    prompt, second = ids(1, 60, seed=1), ids(1, 50, seed=2)
    with ThreadPoolExecutor(1) as pool:
        with one.inference_session(max_length=200) as session:
            one.generate(prompt, max_new_tokens=4, session=session, **GREEDY)
            waiting = pool.submit(other.generate, second, max_new_tokens=50, **GREEDY)
            assert told_busy.wait(30)
            answer = one.generate(None, max_new_tokens=40, session=session, **GREEDY)  # whoever is in does not notice
            assert not waiting.done()
        assert torch.equal(waiting.result(60), servers.local.generate(second, max_new_tokens=50, **GREEDY))
    assert torch.equal(answer, servers.local.generate(prompt, max_new_tokens=44, **GREEDY)[:, 64:])
    assert failures == []


def test_beams_wait_for_the_room_of_all_their_rows(
    servers: Servers, clients: list[torch.nn.Module], failures: list[str], told_busy: threading.Event
) -> None:
    one, other = clients
    prompt = ids(1, 20, seed=3)
    with ThreadPoolExecutor(1) as pool:
        with one.inference_session(max_length=100) as session:
            one.generate(prompt, max_new_tokens=2, session=session, **GREEDY)
            waiting = pool.submit(other.generate, prompt, max_new_tokens=30, num_beams=4, **GREEDY)  # 4 × 49 entries
            assert told_busy.wait(30) and not waiting.done()
        assert torch.equal(waiting.result(60), servers.local.generate(prompt, max_new_tokens=30, num_beams=4, **GREEDY))
    assert failures == []


def test_what_can_never_fit_is_refused_at_once(servers: Servers, clients: list[torch.nn.Module], failures: list[str]) -> None:
    for options in ({"max_new_tokens": 300}, {"max_new_tokens": 60, "num_beams": 5}):
        with pytest.raises(ValueError, match=rf"\b{ROOM}\b") as refused:
            clients[0].generate(ids(1, 8, seed=4), **options, **GREEDY)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 200
    assert failures == []
    assert clients[0].generate(ids(1, 8, seed=4), max_new_tokens=2, **GREEDY).shape == (1, 10)


def wait_for_room(servers: Servers, model: torch.nn.Module) -> None:
    """Until a client has heard that the tight server is free: one that announced little room is no server for a long session."""
    view = model.remote_blocks.target.swarm.membership.view
    deadline = time.monotonic() + 20
    while (record := view.record(servers.tight)) is None or record.free_kv_tokens < ROOM:
        assert time.monotonic() < deadline, "the end of the sessions before was not announced"
        model.remote_blocks.route()
        time.sleep(0.1)


@pytest.mark.parametrize("clients", ["both"], indirect=True)
def test_a_full_server_beside_a_free_one(servers: Servers, clients: list[torch.nn.Module], failures: list[str]) -> None:
    """Who does not fit into the quicker server goes to the slower one while that is full."""
    one, other = clients
    prompt = ids(1, 40, seed=5)
    expected = servers.local.generate(prompt, max_new_tokens=40, **GREEDY)
    wait_for_room(servers, one)
    with one.inference_session(max_length=200) as holding:
        one.generate(prompt, max_new_tokens=2, session=holding, **GREEDY)
        assert holding.hops[-1].peer_id == servers.tight
        with other.inference_session(max_length=100) as session:
            assert torch.equal(other.generate(prompt, max_new_tokens=40, session=session, **GREEDY), expected)
            assert session.hops[-1].peer_id == servers.roomy
    assert failures == []


@pytest.mark.parametrize("clients", ["both"], indirect=True)
def test_a_session_too_long_for_one_server_goes_to_another(servers: Servers, clients: list[torch.nn.Module], failures: list[str]) -> None:
    prompt = ids(1, 40, seed=6)
    clients[0].generate(prompt, max_new_tokens=2, **GREEDY)  # by now it has heard of both
    with clients[0].inference_session(max_length=2 * ROOM) as session:
        answer = clients[0].generate(prompt, max_new_tokens=10, session=session, **GREEDY)
        assert session.hops[-1].peer_id == servers.roomy
    assert torch.equal(answer, servers.local.generate(prompt, max_new_tokens=10, **GREEDY))
    assert failures == []
