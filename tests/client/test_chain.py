"""Chains of real servers as the client sees them: what goes through it, links that break, servers that are late or gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trio

from petalnet.client import exchange as exchange_module
from petalnet.client.chain import Counts
from petalnet.client.swarm import Membership
from petalnet.client.trace import StepTimes
from petalnet.errors import ServerError
from petalnet.p2p.session_messages import KEEP_NONE, Replay, Step

GREEDY = {"do_sample": False}


def chain_of(session: Any) -> Any:
    return session._server_side.chain


def relayed(session: Any) -> list[int]:
    """For each server how many of its outputs the client carried on."""
    return list(chain_of(session).exchange.pipeline.relayed_steps)


def test_nothing_between_servers_goes_through_the_client(pair: Any, wire: Any) -> None:
    ids = pair.ids(1, 9)
    with pair.remote.inference_session(max_length=64) as session:
        answer = pair.remote.generate(ids, max_new_tokens=12, session=session, **GREEDY)
        assert torch.equal(answer, pair.local.generate(ids, max_new_tokens=12, **GREEDY))
        assert chain_of(session).counts == Counts(0, 0)
        assert 0 < chain_of(session).round_trip_s < 5
        steps = [message for message in wire.sent if isinstance(message, Step)]
        assert len(steps) == len(wire.received) - 3  # one message out and one back for a step; the others opened the sessions


def test_everything_through_the_client(pair: Any, connect: Callable[..., Any]) -> None:
    ids = pair.ids(2, 130)
    with connect(pair.path, pair.servers.peers, direct_chains=False) as model:
        session = model.inference_session(max_length=160)
        answer = model.generate(ids, max_new_tokens=6, session=session, **GREEDY)
        first, second, last = relayed(session)
        assert first == second > 5 and last == 0
        session.close()
    assert torch.equal(answer, pair.local.generate(ids, max_new_tokens=6, **GREEDY))


def test_what_a_step_took_is_told(pair: Any) -> None:
    told: list[StepTimes] = []
    with pair.blocks.inference_session(max_length=200) as session:
        session.step(torch.zeros(1, 3, 32))
        chain_of(session).trace_sink = told.append
        session.step(torch.zeros(1, 150, 32))
        session.step(torch.zeros(1, 1, 32))
    prompt, token = told
    assert prompt.tokens == 150 and prompt.chunks > 1 and token.chunks == 1
    for times in told:
        assert [(hop.first, hop.end, hop.direct) for hop in times.hops] == [(0, 2, True), (2, 5, True), (5, 6, False)]
        assert all(hop.held_s >= hop.compute_s > 0 for hop in times.hops)
    assert token.wall_s > sum(hop.held_s for hop in token.hops)


def test_a_prompt_goes_in_chunks(pair: Any, wire: Any) -> None:
    ids = pair.ids(1, 200)
    with torch.inference_mode():
        logits = pair.remote(ids, use_cache=True, logits_to_keep=70).logits
        assert torch.allclose(logits, pair.local(ids).logits[:, -70:], atol=1e-4)
        steps = wire.steps
        assert len(steps) > 1 and steps[0].keep == KEEP_NONE
        states = pair.remote(ids, use_cache=True, output_hidden_states=True).hidden_states
        for ours, theirs in zip(states, pair.local(ids, output_hidden_states=True).hidden_states, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("broken", [0, 1])
def test_a_link_that_breaks_is_carried_by_the_client_from_then_on(
    bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any], broken: int
) -> None:
    ids = torch.tensor([[5, 6, 7]])
    with serving(bloom_path, [(0, 2), (2, 4), (4, 6)]) as servers, connect(bloom_path, servers.peers, speculation=False) as model:
        expected = model.generate(ids, max_new_tokens=12, **GREEDY)
        session = model.inference_session(max_length=32)
        first = model.generate(ids, max_new_tokens=5, session=session, **GREEDY)
        assert relayed(session) == [0, 0, 0]
        servers.cut(servers.servers[broken], servers.servers[broken + 1])
        rest = model.generate(None, max_new_tokens=7, session=session, **GREEDY)
        assert torch.equal(torch.cat([first, rest], dim=1), expected)
        carried = relayed(session)
        assert carried[broken] >= 6 and sum(carried) == carried[broken]
        assert not any(model.transformer.h.target.swarm.membership._peering.view.on_probation(s.peer_id) for s in servers.servers)
        session.close()


@pytest.mark.parametrize("seed", range(2))
def test_links_that_break_within_a_prompt_lose_nothing(
    bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 900, 32, generator=generator)
    with serving(bloom_path, [(0, 2), (2, 4), (4, 6)]) as servers, connect(bloom_path, servers.peers) as model, torch.inference_mode():
        blocks = model.transformer.h
        with blocks.inference_session(max_length=901) as session:
            expected = session.step(hidden)
        session = blocks.inference_session(max_length=901)
        delays = torch.rand(2, generator=generator).tolist()
        timers = [
            threading.Timer(delay * 0.4, servers.cut, (servers.servers[index], servers.servers[index + 1]))
            for index, delay in enumerate(delays)
        ]
        for timer in timers:
            timer.start()
        assert torch.allclose(session.step(hidden), expected, atol=1e-4)
        for timer in timers:
            timer.join()
        assert torch.allclose(session.step(hidden[:, :1]), blocks_after(blocks, hidden), atol=1e-4)
        session.close()


def blocks_after(blocks: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The outputs of one more token that is as the first."""
    return blocks(torch.cat([hidden, hidden[:, :1]], dim=1))[:, -1:]


@pytest.mark.parametrize("late", [0, 1, 2])
def test_the_server_that_is_late_is_blamed(
    bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, wire: Any, late: int
) -> None:
    """The others show that they have done the step."""
    monkeypatch.setattr(exchange_module, "PROBE_WITHIN_S", 1.0)
    with (
        serving(bloom_path, [(0, 2), (2, 4), (4, 6)]) as servers,
        connect(bloom_path, servers.peers, request_timeout=2, max_retries=0) as model,
    ):
        session = model.transformer.h.inference_session(max_length=8)
        session.step(torch.zeros(1, 2, 32))
        wire.clear()

        async def never(*_: Any) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(servers.servers[late].service.engine, "submit", never)
        with pytest.raises(ServerError, match="no answer within 2 s") as caught:
            session.step(torch.zeros(1, 1, 32))
        assert caught.value.peer_id == servers.servers[late].peer_id
        view = model.transformer.h.target.swarm.membership._peering.view
        assert [view.on_probation(server.peer_id) for server in servers.servers] == [index == late for index in range(3)]
        assert sum(isinstance(message, Replay) for message in wire.sent) == 2


def test_a_server_that_goes_between_two_steps_is_out_of_the_routes_at_once(
    bloom_path: Path, serving: Callable[..., Any], connect: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[tuple[str, float]] = []
    monkeypatch.setattr(Membership, "mark_failed", lambda self, peer_id: failed.append((peer_id, time.monotonic())))
    with serving(bloom_path, [(0, 3), (3, 6)]) as servers, connect(bloom_path, servers.peers) as model:
        session = model.inference_session(max_length=16)
        model.generate(torch.tensor([[5]]), max_new_tokens=2, session=session, **GREEDY)
        servers.stop(servers.servers[0])
        servers.wait_until(lambda: bool(failed))
        assert failed[0][0] == servers.servers[0].peer_id
        session.close()
