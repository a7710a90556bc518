"""Sessions whose servers vanish at any moment: the tokens are the same, and only what was lost is computed anew."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from petalnet.client.chain import Chain
from petalnet.client.session import InferenceSession
from petalnet.errors import MissingBlocksError
from petalnet.p2p.session_messages import Replay, Resume, Step

GREEDY = {"do_sample": False}
THIRDS = [(0, 2), (2, 4), (4, 6)]


@pytest.fixture
def mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed anew by a whole new chain."""

    async def rebuild(chain: Chain) -> None:
        raise AssertionError("the chain was not mended")

    monkeypatch.setattr(Chain, "rebuild", rebuild)


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


class Before:
    """Does something before a step of a session: the n-th that comes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = -1
        self.at = -1
        self.what: Callable[[InferenceSession], None] = lambda session: None
        run = InferenceSession.run

        def counted(session: InferenceSession, *args: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                self.what(session)
            return run(session, *args, **options)

        monkeypatch.setattr(InferenceSession, "run", counted)

    def step(self, number: int, what: Callable[[InferenceSession], None]) -> None:
        self.count, self.at, self.what = -1, number, what


@pytest.fixture
def before(monkeypatch: pytest.MonkeyPatch) -> Before:
    return Before(monkeypatch)


def replace(servers: Any, places: list[int]) -> Callable[[InferenceSession], None]:
    """Kills the servers of these places of a chain, and has others hold their blocks."""

    def act(session: InferenceSession) -> None:
        for place in places:
            hop = session.hops[place]
            servers.start(hop.first, hop.end)
            servers.stop(next(server for server in servers.servers if server.peer_id == hop.peer_id))

    return act


ANSWERS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 8},
    "beams": {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 2},
}


@pytest.mark.parametrize("options", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("places", [[1], *(pytest.param(places, marks=pytest.mark.long) for places in ([0], [2], [0, 1], [0, 2]))], ids=str)
def test_servers_are_killed_in_mid_answer(
    bloom_path: Path, serving: Any, connect: Any, before: Before, wire: Any, mended: None, places: list[int], options: dict[str, Any]
) -> None:
    prompt = ids(1, 150)
    with serving(bloom_path, THIRDS) as servers, connect(bloom_path, servers.peers, speculation=False) as model:
        expected = model.generate(prompt, **options, **GREEDY)
        with model.inference_session(max_length=200) as session:
            before.step(4, replace(servers, places))
            assert torch.equal(model.generate(prompt, session=session, **options, **GREEDY), expected)
            (recovery,) = session.recoveries
            assert [(hop.first, hop.end) for hop in recovery.lost] == [THIRDS[place] for place in places]
            assert [(hop.first, hop.end) for hop in recovery.replacements] == [THIRDS[place] for place in places]
            assert recovery.tokens >= 152 and recovery.rebuilt_s > 0
            assert model.last_trace.recoveries == [recovery] and "rebuilt" in str(model.last_trace)
            assert session._server_side.chain.counts.recoveries == 1
            resumes = [message for message in wire.sent if isinstance(message, Resume)]
            assert len(resumes) >= 3 - len(places)
            if 0 not in places:
                assert recovery.uploaded_bytes == 0
                assert any(isinstance(message, Replay) and message.until for message in wire.sent)
            else:
                assert recovery.uploaded_bytes >= 152 * 32 * 4


@pytest.mark.long
def test_whatever_a_session_does(bloom_path: Path, serving: Any, connect: Any, before: Before) -> None:
    """A part of a prompt is there, padding and positions of rows, going back, other rows, nothing under way."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 400, 32, generator=generator)
    mask = torch.ones(2, 400, dtype=torch.bool)
    mask[1, :9] = False
    order = torch.tensor([1, 0, 1])

    def script(session: InferenceSession) -> list[torch.Tensor]:
        outputs = session.run(hidden[:, :300], mask=mask[:, :300])
        outputs += session.run(hidden[:, 300:301])
        session.position = 290
        outputs += session.run(hidden[:, 290:380])
        session.reorder(order)
        outputs += session.run(hidden[order, 380:381])
        session.position = 70
        outputs += session.run(hidden[order, 70:72])
        outputs += session.run(hidden[order, 72:73], all_hidden=True)
        return outputs

    with serving(bloom_path, THIRDS) as servers, connect(bloom_path, servers.peers, max_retries=20) as model, torch.inference_mode():
        blocks = model.transformer.h
        with blocks.inference_session(max_length=400) as session:
            expected = script(session)
        for number in range(1, 6):
            for place in {(0, 1, 2)[number % 3], (0, 1, 2)[(number + 1) % 3]}:
                with blocks.inference_session(max_length=400) as session:
                    before.step(number, replace(servers, [place]))
                    got = script(session)
                    assert session.recoveries
                assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(got, expected, strict=True)), (number, place)


@pytest.mark.long
@pytest.mark.parametrize("place", [0, 1, 2])
def test_servers_are_killed_within_a_prompt(bloom_path: Path, serving: Any, connect: Any, place: int) -> None:
    """What was computed of it stays computed, where that is so."""
    hidden = torch.randn(2, 1500, 32, generator=torch.Generator().manual_seed(place))
    with serving(bloom_path, THIRDS) as servers, connect(bloom_path, servers.peers) as model, torch.inference_mode():
        blocks = model.transformer.h
        with blocks.inference_session(max_length=1501) as session:
            expected = session.step(hidden)
        for delay_s in (0.05, 0.15, 0.3):
            session = blocks.inference_session(max_length=1501)
            victim = next(server for server in servers.servers if server.alive and server.span == THIRDS[place])
            servers.start(*THIRDS[place])
            timer = threading.Timer(delay_s, servers.stop, (victim,))
            timer.start()
            assert torch.allclose(session.step(hidden), expected, atol=1e-4)
            timer.join()
            assert session.step(hidden[:, :1]).shape == (2, 1, 32)
            session.close()


@pytest.mark.long
def test_a_session_that_nobody_can_go_on_with_is_what_it_was(bloom_path: Path, serving: Any, connect: Any) -> None:
    prompt = ids(1, 20)
    with (
        serving(bloom_path, THIRDS) as servers,
        connect(bloom_path, servers.peers, request_timeout=2.0, max_retries=1, speculation=False) as model,
    ):
        expected = model.generate(prompt, max_new_tokens=8, **GREEDY)
        with model.inference_session(max_length=40) as session:
            first = model.generate(prompt, max_new_tokens=4, session=session, **GREEDY)
            servers.stop(servers.servers[1])
            with pytest.raises(MissingBlocksError, match="blocks 2-3"):
                model.generate(None, max_new_tokens=4, session=session, **GREEDY)
            assert session.position == 23
            servers.start(2, 4)
            rest = model.generate(None, max_new_tokens=4, session=session, **GREEDY)
        assert torch.equal(torch.cat([first, rest], dim=1), expected)


def test_a_server_that_drains_is_left_between_two_steps(bloom_path: Path, serving: Any, connect: Any, before: Before, mended: None) -> None:
    prompt = ids(1, 100)
    with serving(bloom_path, THIRDS) as servers, connect(bloom_path, servers.peers, speculation=False) as model:
        expected = model.generate(prompt, max_new_tokens=8, **GREEDY)

        def drain(session: InferenceSession) -> None:
            servers.start(2, 4)
            hop = session.hops[1]
            service = next(server for server in servers.servers if server.peer_id == hop.peer_id).service
            servers.call(service.drain, 30.0)

        with model.inference_session(max_length=120) as session:
            before.step(3, drain)
            assert torch.equal(model.generate(prompt, max_new_tokens=8, session=session, **GREEDY), expected)
            (recovery,) = session.recoveries
            assert recovery.uploaded_bytes == 0 and "leave" in recovery.reason
            view = model.transformer.h.target.swarm.membership._peering.view
            assert not view.on_probation(recovery.lost[0].peer_id)


def test_nothing_is_computed_anew_where_nothing_is_lost(bloom_path: Path, serving: Any, connect: Any, wire: Any) -> None:
    """Servers that leave the client between them: a link that is cut costs no entry."""
    prompt = ids(1, 100)
    with serving(bloom_path, THIRDS) as servers, connect(bloom_path, servers.peers, speculation=False) as model:
        expected = model.generate(prompt, max_new_tokens=8, **GREEDY)
        with model.inference_session(max_length=120) as session:
            first = model.generate(prompt, max_new_tokens=4, session=session, **GREEDY)
            chain = session._server_side.chain
            model.transformer.h.target.swarm.portal.run(cut, chain)
            rest = model.generate(None, max_new_tokens=4, session=session, **GREEDY)
            assert torch.equal(torch.cat([first, rest], dim=1), expected)
            assert chain is session._server_side.chain and chain.exchange.pipeline.relayed_steps[0] >= 4
            assert not session.recoveries
    assert not any(isinstance(message, Step) and message.until for message in wire.sent)


async def cut(chain: Chain) -> None:
    chain.exchange._cut(0)
